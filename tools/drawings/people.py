"""The people of the demo data: their actions, their bodies, and how they are drawn limb by limb.

    time -> action -> pose (joint angles) -> skeleton (3-D joints) -> figure on a background -> camera -> frames

Left and right are the **viewer's**: "the left arm" is the arm on the left side of the picture. Angles are in degrees,
lengths in body heights; x points to the viewer's right, y down, z towards the viewer. Arrays over time have shape (T,).

Actions that differ only in the direction of time share one pose function and one distribution of timings, holds and
camera paths, all of them symmetric under reversal: a reversed clip of "sitting down" is a valid clip of "standing up".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np

Array = np.ndarray
Pose = dict[str, Array]
Joints = dict[str, Array]
Colour = tuple[int, ...]

SIDES = {"left": -1.0, "right": 1.0}
MIN_FRAMES, MAX_FRAMES = 24, 96
FRAME_HEIGHT = 120
FRAME_WIDTHS = (136, 144, 152, 160)
SUPERSAMPLE = 2  # figures are drawn at twice the frame's size and averaged down
MARGIN = 14  # px of background around the frame, at the drawing size, for the camera to drift over
SUBPIXEL_BITS = 3
CAMERA_PITCH = 12.0  # the camera looks down a little

# --- actions: time -> pose ------------------------------------------------------------------------------------------


class Time(NamedTuple):
    """Where a clip is at each of its frames; each field has shape (T,)."""

    progress: Array  # 0 to 1, eased, held for a while at both ends
    clock: Array  # 0 to 1, even
    turns: Array  # cycles done, from a random phase on


def _wave(turns: Array) -> Array:
    return np.sin(2 * np.pi * turns)


def _there_and_back(turns: Array) -> Array:
    return 0.5 - 0.5 * np.cos(2 * np.pi * turns)


def _straight_arm(side: str, spread: Array) -> Pose:
    return {f"{side}_shoulder": spread, f"{side}_elbow": 0 * spread, f"{side}_shoulder_swing": 0 * spread}


def _lifted_knee(side: str, lift: Array) -> Pose:
    return {f"{side}_hip": 5 + 33 * lift, f"{side}_hip_swing": 72 * lift, f"{side}_knee": 80 * lift}


def wave(time: Time, sides: tuple[str, ...]) -> Pose:
    pose: Pose = {}
    for side in sides:
        pose[f"{side}_shoulder"] = 100 + 8 * _wave(time.turns)
        pose[f"{side}_elbow"] = 60 + 42 * _wave(time.turns + 0.1)
    return pose


def raise_arms(time: Time, sides: tuple[str, ...]) -> Pose:
    pose: Pose = {}
    for side in sides:
        pose |= _straight_arm(side, 8 + 157 * time.progress)
    return pose


def circle_arms(time: Time, sides: tuple[str, ...]) -> Pose:
    pose: Pose = {}
    for side in sides:
        pose |= _straight_arm(side, 360 * time.turns)
    return pose


def raise_knee(time: Time, side: str) -> Pose:
    return _lifted_knee(side, time.progress)


def march(time: Time) -> Pose:
    lift = _wave(time.turns)
    return _lifted_knee("left", np.maximum(lift, 0)) | _lifted_knee("right", np.maximum(-lift, 0))


def kick(time: Time, side: str) -> Pose:
    height = _there_and_back(time.turns)
    return {f"{side}_hip": 5 + 62 * height, f"{side}_hip_swing": 20 * height, f"{side}_knee": 0 * height}


def walk(time: Time, side: str) -> Pose:
    step = _wave(time.turns)
    pose = {"yaw": SIDES[side] * 78 + 0 * step, "travel": SIDES[side] * 0.75 * (time.clock - 0.5), "bow": 5 + 0 * step}
    for leg, sign in SIDES.items():
        pose[f"{leg}_hip_swing"] = 28 * sign * step
        pose[f"{leg}_knee"] = 10 + 32 * np.maximum(0, sign * _wave(time.turns + 0.25))
        pose[f"{leg}_shoulder_swing"] = -30 * sign * step
    return pose


def hop(time: Time, side: str) -> Pose:
    air = np.abs(_wave(time.turns / 2))
    pose = {"yaw": SIDES[side] * 50 + 0 * air, "travel": SIDES[side] * 0.7 * (time.clock - 0.5), "rise": 0.17 * air}
    for leg in SIDES:
        pose[f"{leg}_hip_swing"] = 42 - 36 * air
        pose[f"{leg}_knee"] = 74 - 48 * air
        pose[f"{leg}_shoulder"] = 28 + 30 * air
    return pose


def lean(time: Time, side: str) -> Pose:
    tilt = _there_and_back(time.turns)
    return {"lean": SIDES[side] * (4 + 32 * tilt)}


def sit(time: Time) -> Pose:
    p = time.progress
    pose = {"bow": 4 + 28 * np.sin(np.pi * p), "forward": -0.2 * p}
    for leg in SIDES:
        pose |= {f"{leg}_hip_swing": 84 * p, f"{leg}_knee": 82 * p, f"{leg}_hip": 5 + 7 * p}
        pose[f"{leg}_shoulder_swing"] = 30 * p
    return pose


def bow(time: Time) -> Pose:
    p = time.progress
    pose = {"bow": 3 + 77 * p, "forward": -0.08 * p}
    for arm in SIDES:
        pose[f"{arm}_shoulder_swing"] = 14 * p
    return pose


@dataclass(frozen=True)
class Action:
    """A class of the demo: its plain English name, and how a person does it.

    `turns` is the range of cycles in a clip (periodic actions only); `reverse` runs the pose function from its end to
    its start; `turned` actions are watched from an angle; `stool` puts something to sit on under the person.
    """

    name: str
    pose: Callable[[Time], Pose]
    turns: tuple[float, float] = (1.5, 4.0)
    reverse: bool = False
    turned: bool = False
    stool: bool = False

    def act(self, time: Time) -> Pose:
        """The joint angles, each (T,), that this action sets; all others rest."""
        return self.pose(time._replace(progress=1 - time.progress) if self.reverse else time)


LEFT, RIGHT, BOTH = ("left",), ("right",), ("left", "right")

ACTIONS = (
    Action("waving the left arm", partial(wave, sides=LEFT)),
    Action("waving both arms", partial(wave, sides=BOTH)),
    Action("raising the right arm", partial(raise_arms, sides=RIGHT)),
    Action("lowering the right arm", partial(raise_arms, sides=RIGHT), reverse=True),
    Action("raising both arms", partial(raise_arms, sides=BOTH)),
    Action("lowering both arms", partial(raise_arms, sides=BOTH), reverse=True),
    Action("circling the left arm", partial(circle_arms, sides=LEFT), turns=(1.0, 2.5)),
    Action("circling both arms", partial(circle_arms, sides=BOTH), turns=(1.0, 2.5)),
    Action("raising the right knee", partial(raise_knee, side="right")),
    Action("lowering the right knee", partial(raise_knee, side="right"), reverse=True),
    Action("kicking with the left leg", partial(kick, side="left"), turns=(1.0, 3.0)),
    Action("marching on the spot", march),
    Action("walking to the left", partial(walk, side="left")),
    Action("walking to the right", partial(walk, side="right")),
    Action("hopping to the left", partial(hop, side="left"), turns=(2.0, 5.0)),
    Action("leaning to the right", partial(lean, side="right"), turns=(0.8, 2.0)),
    Action("sitting down", sit, turned=True, stool=True),
    Action("standing up", sit, reverse=True, turned=True, stool=True),
    Action("bowing down", bow, turned=True),
    Action("straightening up", bow, reverse=True, turned=True),
)

# New combinations of words that the training classes use; never shown in training.
UNSEEN_ACTIONS = (
    Action("waving the right arm", partial(wave, sides=RIGHT)),
    Action("raising the left arm", partial(raise_arms, sides=LEFT)),
    Action("circling the right arm", partial(circle_arms, sides=RIGHT), turns=(1.0, 2.5)),
    Action("raising the left knee", partial(raise_knee, side="left")),
    Action("kicking with the right leg", partial(kick, side="right"), turns=(1.0, 3.0)),
    Action("hopping to the right", partial(hop, side="right"), turns=(2.0, 5.0)),
    Action("leaning to the left", partial(lean, side="left"), turns=(0.8, 2.0)),
)


def sample_time(rng: np.random.Generator, action: Action, num_frames: int) -> Time:
    """A random course of `action`. The distribution of `progress` is its own mirror image: p and 1 - p[::-1]."""
    clock = np.linspace(0, 1, num_frames)
    start, end = rng.uniform(0, 0.18, 2)
    linear = np.clip((clock - start) / (1 - start - end), 0, 1)
    progress = linear - rng.uniform(0.2, 0.9) * np.sin(2 * np.pi * linear) / (2 * np.pi)
    return Time(progress, clock, rng.uniform(0, 2) + rng.uniform(*action.turns) * clock)


def sample_pose(rng: np.random.Generator, action: Action, time: Time) -> Pose:
    """The whole pose, (T,) per angle: a random way of standing and swaying, with the action added."""
    sway_period, sway_phase = rng.uniform(0.7, 1.6), rng.uniform(0, 1, 3)
    sway = [_wave(time.clock / sway_period + phase) for phase in sway_phase]
    yaw = rng.uniform(30, 60) * rng.choice([-1, 1]) if action.turned else rng.uniform(-22, 22)
    pose = {"yaw": yaw + 3 * sway[0], "lean": rng.normal(0, 1.5) + 1.5 * sway[1], "bow": rng.uniform(0, 5) + sway[2]}
    for side, sway_arm in zip(SIDES, sway, strict=False):
        pose |= {
            f"{side}_shoulder": rng.uniform(6, 20) + 2 * sway_arm,
            f"{side}_elbow": rng.uniform(-12, 0) + 0 * sway_arm,
        }
        pose |= {f"{side}_hip": rng.uniform(3, 9) + 0 * sway_arm}
    vigour = rng.uniform(0.92, 1.06)
    return pose | {angle: vigour * value for angle, value in action.act(time).items()}


# --- bodies: pose -> joints ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """Proportions in body heights, and colours in BGR."""

    torso: float
    arm: float
    leg: float
    shoulders: float
    head: float
    bulk: float
    skin: Colour
    hair: Colour
    shirt: Colour
    trousers: Colour
    shoes: Colour
    long_sleeves: bool
    long_trousers: bool
    long_hair: bool


def _direction(side: float, spread: Array, swing: Array) -> Array:
    """Unit vectors (T, 3) of a limb that hangs down at 0, goes outwards with `spread` and forwards with `swing`."""
    spread, swing = np.radians(spread), np.radians(swing)
    return np.stack([side * np.sin(spread), np.cos(spread) * np.cos(swing), np.cos(spread) * np.sin(swing)], axis=-1)


def skeleton(pose: Pose, body: Body) -> Joints:
    """Joints (T, 3) of each pose, feet on the ground at y = 0 unless the pose rises, turned by its yaw."""
    zero = np.zeros(len(next(iter(pose.values()))))
    angle = pose.get
    bend, tilt = np.radians(angle("bow", zero)), np.radians(angle("lean", zero))
    up = np.stack([np.sin(tilt), -np.cos(tilt) * np.cos(bend), np.cos(tilt) * np.sin(bend)], axis=-1)
    across = np.stack([np.cos(tilt), np.sin(tilt), 0 * tilt], axis=-1)
    face = np.cross(up, across)
    joints = {"pelvis": np.zeros((len(zero), 3)), "neck": body.torso * up}
    joints["head"] = joints["neck"] + (0.03 + body.head) * up
    joints["nose"] = joints["head"] + body.head * face
    for side, sign in SIDES.items():
        joints[f"{side}_eye"] = joints["head"] + body.head * (0.36 * sign * across + 0.1 * up + 0.85 * face)
        shoulder = joints["neck"] + sign * body.shoulders * across - 0.03 * up
        spread, swing = angle(f"{side}_shoulder", zero), angle(f"{side}_shoulder_swing", zero)
        elbow = shoulder + 0.52 * body.arm * _direction(sign, spread, swing)
        hand = elbow + 0.48 * body.arm * _direction(sign, spread + angle(f"{side}_elbow", zero), swing * 1.3)
        joints |= {f"{side}_shoulder": shoulder, f"{side}_elbow": elbow, f"{side}_hand": hand}
        hip = joints["pelvis"] + np.array([sign * 0.55 * body.shoulders, 0, 0])
        spread, swing, knee_bend = (angle(f"{side}_{name}", zero) for name in ("hip", "hip_swing", "knee"))
        knee = hip + 0.5 * body.leg * _direction(sign, spread, swing)
        ankle = knee + 0.5 * body.leg * _direction(sign, spread * (1 - knee_bend / 100), swing - knee_bend)
        toe = ankle + np.array([0.025 * sign, 0.012, 0.075])
        joints |= {f"{side}_hip": hip, f"{side}_knee": knee, f"{side}_ankle": ankle, f"{side}_toe": toe}
    ground = np.maximum(joints["left_ankle"][:, 1], joints["right_ankle"][:, 1]) + 0.02
    yaw = np.radians(angle("yaw", zero))
    shift = np.stack([zero, -ground - angle("rise", zero), angle("forward", zero)], axis=-1)
    travel = angle("travel", zero)[:, None] * np.array([1.0, 0, 0])
    return {name: _turn(points + shift, yaw) + travel for name, points in joints.items()}


def _turn(points: Array, yaw: Array) -> Array:
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    return np.stack([x * np.cos(yaw) + z * np.sin(yaw), y, z * np.cos(yaw) - x * np.sin(yaw)], axis=-1)


# --- drawing ---------------------------------------------------------------------------------------------------------


def shade(colour: Colour, factor: float) -> Colour:
    """The colour made darker (factor < 1) or lighter (> 1)."""
    return tuple(int(min(255, channel * factor)) for channel in colour)


class Brush:
    """Draws on one canvas in sub-pixel coordinates; `light` is -1 or 1, the side the light comes from."""

    def __init__(self, canvas: Array, light: float) -> None:
        self.canvas, self.light = canvas, light

    @staticmethod
    def _fixed(point: Array) -> tuple[int, int]:
        return round(point[0] * (1 << SUBPIXEL_BITS)), round(point[1] * (1 << SUBPIXEL_BITS))

    def line(self, start: Array, end: Array, width: float, colour: Colour) -> None:
        thickness = max(1, round(width))
        cv2.line(self.canvas, self._fixed(start), self._fixed(end), colour, thickness, cv2.LINE_AA, SUBPIXEL_BITS)

    def disc(self, centre: Array, radius: float, colour: Colour) -> None:
        size = round(radius * (1 << SUBPIXEL_BITS))
        cv2.circle(self.canvas, self._fixed(centre), size, colour, -1, cv2.LINE_AA, SUBPIXEL_BITS)

    def polygon(self, points: list[Array], colour: Colour, outline: float) -> None:
        """A filled polygon whose corners are rounded by an outline of the given width."""
        corners = np.array([self._fixed(point) for point in points], np.int32)
        cv2.fillConvexPoly(self.canvas, cv2.convexHull(corners), colour, cv2.LINE_AA, SUBPIXEL_BITS)
        cv2.polylines(self.canvas, [corners], True, colour, max(1, round(outline)), cv2.LINE_AA, SUBPIXEL_BITS)

    def limb(self, start: Array, end: Array, width: float, colour: Colour) -> None:
        """A rounded limb: a dark edge, then the lit part a little towards the light."""
        towards_light = np.array([0.14 * width * self.light, -0.1 * width])
        self.line(start, end, width, shade(colour, 0.62))
        self.line(start + towards_light, end + towards_light, 0.66 * width, colour)


def draw_figure(brush: Brush, body: Body, height: float, joints: dict[str, Array]) -> None:
    """Draw one person `height` px tall; joints are (3,): x and y in px, and depth in body heights."""
    at = {name: point[:2] for name, point in joints.items()}
    depth = {name: point[2] for name, point in joints.items()}
    width = 0.085 * body.bulk * height

    def leg(side: str) -> None:
        brush.line(at[f"{side}_ankle"], at[f"{side}_toe"], 0.8 * width, shade(body.shoes, 0.9))
        shin = body.trousers if body.long_trousers else body.skin
        brush.limb(at[f"{side}_knee"], at[f"{side}_ankle"], 0.85 * width, shin)
        brush.limb(at[f"{side}_hip"], at[f"{side}_knee"], 1.08 * width, body.trousers)

    def arm(side: str) -> None:
        forearm = body.shirt if body.long_sleeves else body.skin
        brush.limb(at[f"{side}_elbow"], at[f"{side}_hand"], 0.7 * width, forearm)
        brush.limb(at[f"{side}_shoulder"], at[f"{side}_elbow"], 0.82 * width, body.shirt)
        brush.disc(at[f"{side}_hand"], 0.45 * width, body.skin)

    def torso() -> None:
        corners = [at["left_shoulder"], at["right_shoulder"], at["right_hip"], at["left_hip"]]
        brush.polygon(corners, shade(body.shirt, 0.7), 0.85 * width)
        towards_light = np.array([0.12 * width * brush.light, -0.08 * width])
        brush.polygon([corner + towards_light for corner in corners], body.shirt, 0.5 * width)
        brush.line(at["left_hip"], at["right_hip"], 0.8 * width, shade(body.trousers, 0.9))

    def head() -> None:
        draw_head(brush, body, height, at, depth)

    def long_hair() -> None:
        nape = at["head"] - 0.4 * (at["nose"] - at["head"])
        brush.line(nape, at["neck"] + 0.8 * (nape - at["head"]), 1.9 * body.head * height, shade(body.hair, 0.7))

    parts: list[tuple[float, Callable[[], None]]] = [(depth["neck"], torso), (depth["head"] + 0.02, head)]
    if body.long_hair:
        parts.append((depth["neck"] - 0.2 * (depth["nose"] - depth["head"]) / body.head, long_hair))
    for side in SIDES:
        parts.append((depth[f"{side}_knee"] - 0.05, partial(leg, side)))
        parts.append((0.5 * (depth[f"{side}_elbow"] + depth[f"{side}_hand"]) + 0.03, partial(arm, side)))
    for _, draw in sorted(parts, key=lambda part: part[0]):
        draw()


def draw_head(brush: Brush, body: Body, height: float, at: dict[str, Array], depth: dict[str, float]) -> None:
    radius = body.head * height
    ahead = at["nose"] - at["head"]
    brush.line(at["neck"], at["head"], 0.07 * height, shade(body.skin, 0.7))
    brush.disc(at["head"], 1.02 * radius, shade(body.hair, 0.75))
    brush.disc(at["head"] + np.array([0.1 * radius * brush.light, -0.12 * radius]), 0.8 * radius, body.hair)
    face = at["head"] + 0.2 * ahead + 0.24 * radius * (at["neck"] - at["head"]) / (radius + 0.03 * height)
    brush.disc(face, 0.84 * radius, shade(body.skin, 0.8))
    brush.disc(face + np.array([0.09 * radius * brush.light, -0.05 * radius]), 0.72 * radius, body.skin)
    for side in SIDES:
        if depth[f"{side}_eye"] > depth["head"]:
            brush.disc(at[f"{side}_eye"], 0.13 * radius, (35, 25, 25))
    if depth["nose"] > depth["head"] - 0.02:
        down = at["neck"] - at["head"]
        mouth, corner = at["head"] + 0.8 * ahead + 0.42 * down, 0.32 * (at["right_eye"] - at["left_eye"])
        for smile in (corner, -corner):
            brush.line(mouth, mouth + smile - 0.1 * down, 0.12 * radius, shade(body.skin, 0.45))
