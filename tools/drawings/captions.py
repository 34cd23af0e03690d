"""Captions of single frames of the demo data, on which tools/pretrain_demo_clip.py trains the demo's small CLIP.

A caption either names the action of the clip that the frame was taken from or describes the posture, often with the
clothes or the place. Only `ACTIONS` are rendered and named, never `UNSEEN_ACTIONS`. Postures are described freely: "the
left arm up" occurs although "raising the left arm" is unseen.
"""

from typing import NamedTuple

import numpy as np

from drawings.people import ACTIONS, SIDES, Array, Pose, sample_pose, sample_time
from drawings.scene import draw_frames, joints_in_frame, sample_drift, sample_scene

FRAMES_PER_SCENE = 4

Wordings = tuple[str, ...]

ACTION_TEMPLATES: Wordings = (
    "a video of a person {}.",
    "a video of a person {}.",
    "a person {}",
    "a photo of a person {}",
    "someone {}",
    "{}",
)
POSTURE_TEMPLATES: Wordings = ("a person {}", "a photo of a person {}", "someone {}", "a picture of someone {}", "{}")


class Facts(NamedTuple):
    """What a frame shows. `posture` and `limbs` hold a tuple of equivalent wordings for each visible fact."""

    action: str | None
    posture: list[Wordings]
    limbs: list[Wordings]
    shirt: str
    place: str


def _arm_state(shoulder: float, elbow: float) -> Wordings:
    spread = shoulder % 360
    if 70 <= spread <= 120 and elbow > 25:
        return "bent up", "bent at the elbow"
    if 115 <= spread <= 245:
        return "raised", "up", "held high"
    if 55 <= spread < 115:
        return "stretched out", "out to the side"
    if 245 < spread < 330:
        return ("across the body",)
    return "down", "lowered"


def _describe_limbs(angles: dict[str, float]) -> list[Wordings]:
    limbs: list[Wordings] = []
    left, right = (_arm_state(angles[f"{side}_shoulder"], angles[f"{side}_elbow"]) for side in SIDES)
    if left == right:
        limbs.append(tuple(f"both arms {state}" for state in left))
    else:
        limbs.append(tuple(f"the left arm {state}" for state in left))
        limbs.append(tuple(f"the right arm {state}" for state in right))
    lifted = {side: angles.get(f"{side}_hip_swing", 0) > 35 for side in SIDES}
    for side in SIDES:
        if lifted[side] and not all(lifted.values()):
            limbs.append((f"the {side} knee up", f"the {side} knee raised"))
        elif angles[f"{side}_hip"] > 28 and not lifted[side]:
            limbs.append((f"the {side} leg out", f"the {side} leg stretched out"))
    if not any(lifted.values()) and max(angles["left_hip"], angles["right_hip"]) < 20:
        limbs.append(("both knees down", "both legs down"))
    return limbs


def _describe_posture(angles: dict[str, float]) -> list[Wordings]:
    posture: list[Wordings] = []
    seated = min(angles.get(f"{side}_hip_swing", 0) for side in SIDES) > 60
    if seated:
        posture.append(("sitting", "sitting on a stool"))
    elif angles["bow"] > 40:
        posture.append(("bent over", "bent forward"))
    elif angles.get("rise", 0) > 0.06:
        posture.append(("in the air", "off the ground"))
    elif abs(angles["lean"]) > 13:
        side = "right" if angles["lean"] > 0 else "left"
        posture.append((f"tilted to the {side}", f"bent to the {side}"))
    else:
        posture.append(("standing", "upright"))
    if abs(angles["yaw"]) > 40:
        side = "right" if angles["yaw"] > 0 else "left"
        posture.append((f"facing {side}", f"turned to the {side}"))
    return posture


def describe(pose: Pose, moment: int, action: str | None, shirt: str, place: str) -> Facts:
    """The facts of one moment of a pose sequence."""
    angles = {name: float(values[moment]) for name, values in pose.items()}
    sideways = abs(angles["yaw"]) > 40
    return Facts(action, _describe_posture(angles), [] if sideways else _describe_limbs(angles), shirt, place)


def sample_caption(rng: np.random.Generator, facts: Facts) -> str:
    """A random caption that fits the facts. If there is an action, about two in three captions name it."""

    def pick(wordings: Wordings) -> str:
        return wordings[rng.integers(len(wordings))]

    if facts.action is not None and rng.random() < 0.65:
        words, templates = facts.action, ACTION_TEMPLATES
    else:
        parts = [pick(wordings) for wordings in facts.posture if rng.random() < 0.7]
        limbs = [pick(facts.limbs[index]) for index in rng.permutation(len(facts.limbs))[: rng.integers(1, 4)]]
        if limbs:
            parts.append("with " + " and ".join(limbs))
        words, templates = " ".join(parts or [pick(facts.posture[0])]), POSTURE_TEMPLATES
    caption = pick(templates).format(words)
    if caption.endswith(".") or rng.random() < 0.55:
        return caption
    return f"{caption} in a {facts.shirt} shirt" if rng.random() < 0.5 else f"{caption} {facts.place}"


def sample_postures(rng: np.random.Generator, count: int) -> Pose:
    """Independent random postures (count,) per angle, limb by limb: combinations that no action shows."""
    postures = [_sample_posture(rng) for _ in range(count)]
    return {angle: np.array([posture.get(angle, 0.0) for posture in postures]) for angle in set().union(*postures)}


def _sample_posture(rng: np.random.Generator) -> dict[str, float]:
    posture = {"yaw": rng.uniform(-25, 25), "lean": rng.normal(0, 2), "bow": rng.uniform(0, 6)}
    for side in SIDES:
        low, high = ((5, 22), (5, 22), (122, 172), (122, 172), (60, 112), (90, 110), (250, 325))[rng.integers(7)]
        bent = (low, high) == (90, 110)
        posture[f"{side}_shoulder"] = rng.uniform(low, high)
        posture[f"{side}_elbow"] = rng.uniform(28, 100) if bent else rng.uniform(-10, 10)
        posture[f"{side}_hip"] = rng.uniform(3, 9)
    side, how = str(rng.choice(list(SIDES))), rng.random()
    if how < 0.3:
        lift = rng.uniform(0.6, 1)
        posture |= {f"{side}_hip": 5 + 33 * lift, f"{side}_hip_swing": 72 * lift, f"{side}_knee": 80 * lift}
    elif how < 0.5:
        posture |= {f"{side}_hip": rng.uniform(30, 66), f"{side}_hip_swing": rng.uniform(0, 20)}
    elif how < 0.65:
        posture["lean"] = rng.uniform(14, 36) * SIDES[side]
    elif how < 0.75:
        posture["rise"] = rng.uniform(0.07, 0.17)
    if rng.random() < 0.2:
        posture["yaw"] = rng.uniform(45, 85) * rng.choice([-1, 1])
    return posture


class Example(NamedTuple):
    """A frame, what it shows, and where the joints are: (J, 2), x and y in frame px."""

    frame: Array
    facts: Facts
    joints: Array


def render_examples(rng: np.random.Generator) -> list[Example]:
    """Four frames of one random scene: 60 % of the scenes show an action, the others random postures.

    Frames late in an action are drawn more often, as in captioned photographs: "sitting down" mostly shows a person who
    already sits. Only this tells the two directions of an action apart in a single frame.
    """
    if rng.random() < 0.6:
        action = ACTIONS[rng.integers(len(ACTIONS))]
        scene = sample_scene(rng, action.stool)
        time = sample_time(rng, action, 64)
        moments = (64 * rng.random(FRAMES_PER_SCENE) ** 0.4).astype(int)
        pose = {angle: values[moments] for angle, values in sample_pose(rng, action, time).items()}
        name: str | None = action.name
    else:
        scene, name = sample_scene(rng), None
        pose = sample_postures(rng, FRAMES_PER_SCENE)
    drift = sample_drift(rng, rng.random(FRAMES_PER_SCENE))
    joints = joints_in_frame(scene, pose, drift)
    facts = [describe(pose, moment, name, scene.shirt, scene.place) for moment in range(FRAMES_PER_SCENE)]
    frames = draw_frames(rng, scene, pose, drift)
    return [Example(*example) for example in zip(frames, facts, joints, strict=True)]
