"""The scenes of the demo data (backgrounds, clothes, light and camera), and the frames rendered from poses in them.

Images are BGR uint8 (height, width, 3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from drawings.people import (
    CAMERA_PITCH,
    FRAME_HEIGHT,
    FRAME_WIDTHS,
    MARGIN,
    MAX_FRAMES,
    MIN_FRAMES,
    SUPERSAMPLE,
    Action,
    Array,
    Body,
    Brush,
    Colour,
    Pose,
    draw_figure,
    sample_pose,
    sample_time,
    shade,
    skeleton,
)

CLOTHES: dict[str, Colour] = {
    "red": (60, 60, 205),
    "orange": (50, 135, 235),
    "yellow": (70, 205, 240),
    "green": (80, 160, 70),
    "blue": (190, 105, 50),
    "purple": (160, 75, 130),
    "pink": (170, 130, 240),
    "white": (235, 238, 240),
    "grey": (125, 120, 118),
    "black": (50, 46, 45),
}
SKINS = ((205, 222, 250), (160, 190, 232), (120, 160, 210), (85, 125, 180), (60, 90, 135), (45, 65, 100))
HAIRS = ((30, 30, 38), (35, 55, 90), (45, 90, 140), (110, 180, 225), (50, 80, 190), (175, 175, 180))


def _texture(rng: np.random.Generator, width: int, height: int, cell: int) -> Array:
    """Smooth random light and dark (height, width, 1) in about -1 to 1, its blotches `cell` px wide."""
    coarse = rng.standard_normal((height // cell + 2, width // cell + 2)).astype(np.float32)
    return 0.5 * cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)[..., None]


def _pastel(rng: np.random.Generator) -> Array:
    hue, saturation, value = rng.integers(0, 180), rng.integers(25, 110), rng.integers(130, 225)
    return cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]


def _plain_wall(rng: np.random.Generator, wall: Array) -> None:
    wall[:] = _pastel(rng)


def _striped_wall(rng: np.random.Generator, wall: Array) -> None:
    wall[:] = _pastel(rng)
    other, period = shade(tuple(wall[0, 0]), rng.choice([0.85, 1.12])), int(rng.integers(14, 34))
    for left in range(0, wall.shape[1], period):
        wall[:, left : left + int(period * 0.45)] = other


def _spotted_wall(rng: np.random.Generator, wall: Array) -> None:
    wall[:] = _pastel(rng)
    other, period = shade(tuple(wall[0, 0]), rng.choice([0.83, 1.15])), int(rng.integers(18, 34))
    for row, y in enumerate(range(6, wall.shape[0], period)):
        for x in range(6 + (row % 2) * period // 2, wall.shape[1], period):
            cv2.circle(wall, (x, y), period // 6, other, -1, cv2.LINE_AA)


def _brick_wall(rng: np.random.Generator, wall: Array) -> None:
    brick = np.array([75, 95, 165]) * rng.uniform(0.75, 1.2) + rng.uniform(-15, 15, 3)
    height, width = int(rng.integers(9, 15)), int(rng.integers(24, 36))
    wall[:] = np.clip(1.25 * brick + 20, 0, 255)
    for row, y in enumerate(range(0, wall.shape[0], height)):
        for x in range(-(row % 2) * width // 2, wall.shape[1], width):
            colour = tuple(np.clip(brick * rng.uniform(0.88, 1.1), 0, 255).tolist())
            cv2.rectangle(wall, (x, y), (x + width - 3, y + height - 3), colour, -1)


def _sky(rng: np.random.Generator, wall: Array) -> None:
    height, width = wall.shape[:2]
    top, bottom = np.array([235, 185, 120.0]), np.array([245, 232, 215.0])
    wall[:] = (top + (bottom - top) * np.linspace(0, 1, height)[:, None, None] ** 0.7).astype(np.uint8)
    for distance in (0.45, 0.7):
        x = np.linspace(0, width, 24)
        ridge = height * (distance + 0.12 * np.sin(x / width * rng.uniform(4, 9) + rng.uniform(0, 6)))
        hill = np.concatenate([np.stack([x, ridge], 1), [[width, height], [0, height]]]).astype(np.int32)
        cv2.fillPoly(wall, [hill], shade((120, 185, 150), 1.15 - 0.4 * distance), cv2.LINE_AA)


def _wooden_floor(rng: np.random.Generator, floor: Array) -> None:
    floor[:] = np.clip(np.array([85, 130, 175]) * rng.uniform(0.65, 1.15), 0, 255)
    height, width = floor.shape[:2]
    for x in np.arange(-width, 2 * width, rng.integers(22, 40)):
        ends = (int(width / 2 + 0.5 * (x - width / 2)), 0), (int(x), height)
        cv2.line(floor, *ends, shade(tuple(floor[0, 0]), 0.75), 1, cv2.LINE_AA)


def _carpet(rng: np.random.Generator, floor: Array) -> None:
    floor[:] = np.clip(_pastel(rng) * 0.8, 0, 255)


def _grass(rng: np.random.Generator, floor: Array) -> None:
    floor[:] = np.clip(np.array([75, 155, 105]) * rng.uniform(0.75, 1.15), 0, 255)
    height, width = floor.shape[:2]
    for x, y in zip(rng.integers(0, width, 90), rng.integers(3, height, 90), strict=True):
        colour = shade((75, 155, 105), rng.uniform(0.6, 1.25))
        cv2.line(floor, (int(x), int(y)), (int(x + rng.integers(-2, 3)), int(y - 5)), colour, 1, cv2.LINE_AA)


Painter = Callable[[np.random.Generator, Array], None]
PLACES: dict[str, tuple[Painter, tuple[Painter, ...]]] = {
    "in front of a plain wall": (_plain_wall, (_wooden_floor, _carpet)),
    "in front of a striped wall": (_striped_wall, (_wooden_floor, _carpet)),
    "in front of a spotted wall": (_spotted_wall, (_wooden_floor, _carpet)),
    "in front of a brick wall": (_brick_wall, (_wooden_floor, _carpet, _grass)),
    "outdoors": (_sky, (_grass,)),
}


def paint_background(rng: np.random.Generator, place: str, width: int, height: int, horizon: int) -> Array:
    """A wall (or sky) above the horizon and a floor below it, with soft uneven light."""
    image = np.empty((height, width, 3), np.uint8)
    paint_wall, floors = PLACES[place]
    paint_wall(rng, image[:horizon])
    floors[rng.integers(len(floors))](rng, image[horizon:])
    light = 1 + rng.uniform(0.04, 0.10) * _texture(rng, width, height, 60) + 0.04 * _texture(rng, width, height, 5)
    if place != "outdoors":
        image[horizon - 5 : horizon] = shade(tuple(image[horizon - 8, 0]), 0.7)
    return np.clip(image * light, 0, 255).astype(np.uint8)


@dataclass(frozen=True)
class Scene:
    """One person at one place before one camera; everything that stays the same during a clip.

    `ground` is the point (x, y) in canvas px on which the person stands, `height` the person's height in canvas px.
    """

    place: str
    shirt: str
    body: Body
    background: Array
    ground: Array
    height: float
    light: float
    exposure: float
    noise: Array
    stool_x: float | None

    @property
    def frame_size(self) -> tuple[int, int]:
        """(width, height) of a frame."""
        rows, columns = self.background.shape[:2]
        return (columns - 2 * MARGIN) // SUPERSAMPLE, (rows - 2 * MARGIN) // SUPERSAMPLE


def sample_body(rng: np.random.Generator, shirt: Colour, trousers: Colour) -> Body:
    skin = np.array(SKINS[rng.integers(len(SKINS))]) * rng.uniform(0.92, 1.04)
    return Body(
        torso=0.30 * rng.uniform(0.93, 1.07),
        arm=0.36 * rng.uniform(0.94, 1.07),
        leg=0.47 * rng.uniform(0.93, 1.05),
        shoulders=0.125 * rng.uniform(0.88, 1.15),
        head=0.098 * rng.uniform(0.9, 1.1),
        bulk=rng.uniform(0.82, 1.2),
        skin=tuple(np.clip(skin, 0, 255).tolist()),
        hair=HAIRS[rng.integers(len(HAIRS))],
        shirt=shirt,
        trousers=trousers,
        shoes=tuple(CLOTHES.values())[rng.integers(len(CLOTHES))],
        long_sleeves=bool(rng.random() < 0.5),
        long_trousers=bool(rng.random() < 0.7),
        long_hair=bool(rng.random() < 0.4),
    )


def sample_scene(rng: np.random.Generator, stool: bool = False) -> Scene:
    """A random scene. stool: put a stool where the person sits down; otherwise one may stand at the side."""
    width, height = SUPERSAMPLE * int(rng.choice(FRAME_WIDTHS)), SUPERSAMPLE * FRAME_HEIGHT
    ground_y = height * rng.uniform(0.86, 0.94)
    person = min(height * rng.uniform(0.60, 0.76), (ground_y - 0.04 * height) / 1.12)
    place = tuple(PLACES)[rng.integers(len(PLACES))]
    horizon = round(MARGIN + ground_y - height * rng.uniform(0.06, 0.22))
    shirt, trousers = rng.permutation(tuple(CLOTHES))[:2]
    aside = rng.choice([-1, 1]) * rng.uniform(0.4, 0.6) if rng.random() < 0.2 else None
    return Scene(
        place=place,
        shirt=str(shirt),
        body=sample_body(rng, CLOTHES[shirt], CLOTHES[trousers]),
        background=paint_background(rng, place, width + 2 * MARGIN, height + 2 * MARGIN, horizon),
        ground=np.array([MARGIN + width / 2 + height * rng.uniform(-0.1, 0.1), MARGIN + ground_y]),
        height=person,
        light=float(rng.choice([-1, 1])),
        exposure=rng.uniform(0.82, 1.15),
        noise=_sensor_noise(rng, width // SUPERSAMPLE, height // SUPERSAMPLE),
        stool_x=0.0 if stool else aside,
    )


def _sensor_noise(rng: np.random.Generator, width: int, height: int) -> Array:
    """An int16 field a little larger than a frame; each frame cuts another window out of it."""
    noise = rng.standard_normal((height + 32, width + 32, 3), np.float32)
    return (rng.uniform(1, 6) * noise).round().astype(np.int16)


def _project(points: Array, scene: Scene) -> Array:
    """Points (..., 3) in body heights to x, y in canvas px, and depth in body heights."""
    pitch = np.radians(CAMERA_PITCH)
    x = scene.ground[0] + scene.height * points[..., 0]
    y = scene.ground[1] + scene.height * (points[..., 1] * np.cos(pitch) + points[..., 2] * np.sin(pitch))
    return np.stack([x, y, points[..., 2]], axis=-1)


def _darken(canvas: Array, centre: Array, size: tuple[int, int]) -> None:
    """A soft shadow on the ground: an ellipse of `size` px around `centre`."""
    columns, rows = np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1])
    strength = 0.5 * np.exp(-3 * (columns[None, :] ** 2 + rows[:, None] ** 2)).astype(np.float32)
    strength = np.maximum(strength - 0.5 * np.exp(-3), 0)
    left, top = round(centre[0]) - size[0] // 2, round(centre[1]) - size[1] // 2
    inside = canvas[max(top, 0) : top + size[1], max(left, 0) : left + size[0]]
    rows_cut, columns_cut = max(-top, 0), max(-left, 0)
    strength = strength[rows_cut : rows_cut + inside.shape[0], columns_cut : columns_cut + inside.shape[1]]
    inside[:] = (inside * (1 - strength[..., None])).astype(np.uint8)


def _draw_stool(canvas: Array, scene: Scene, x: float, depth: float) -> None:
    """A wooden stool whose middle stands at `x` and `depth`, in body heights from where the person stands."""
    brush, wood = Brush(canvas, scene.light), (70, 115, 160)
    corners = np.array([[dx, y, dz] for y in (0.0, -0.22) for dz in (-0.07, 0.07) for dx in (-0.1, 0.1)])
    points = _project(corners + np.array([x, 0, depth]), scene)[:, :2]
    _darken(canvas, points[:4].mean(axis=0), (round(0.34 * scene.height), round(0.12 * scene.height)))
    for foot, top in zip(points[:4], points[4:], strict=True):
        brush.limb(foot, top, 0.035 * scene.height, shade(wood, 0.8))
    brush.polygon(list(points[4:]), shade(wood, 0.7), 0.05 * scene.height)
    brush.polygon(list(points[4:] - np.array([0, 0.02 * scene.height])), shade(wood, 1.15), 0.02 * scene.height)


def draw_frames(rng: np.random.Generator, scene: Scene, pose: Pose, drift: Array) -> Iterator[Array]:
    """Frames of a pose sequence; `drift` (T, 2) in canvas px is the camera's offset, at most MARGIN."""
    width, height = scene.frame_size
    world = skeleton(pose, scene.body)
    joints = {name: _project(points, scene) for name, points in world.items()}
    floor = np.stack([world["pelvis"][:, 0], 0 * drift[:, 0], world["pelvis"][:, 2]], axis=-1)
    shadows = _project(floor, scene)[:, :2]
    shadow_size = round(0.62 * scene.height), round(0.17 * scene.height)
    stage = scene.background.copy()
    if scene.stool_x is not None:
        yaw = np.radians(np.mean(pose["yaw"])) if scene.stool_x == 0 else 0.0
        back = 0.2 if scene.stool_x == 0 else 0.12
        _draw_stool(stage, scene, scene.stool_x - back * np.sin(yaw), -back * np.cos(yaw))
    for index, (dx, dy) in enumerate(np.rint(drift).astype(int) + MARGIN):
        canvas = stage.copy()
        _darken(canvas, shadows[index], shadow_size)
        figure = {name: points[index] for name, points in joints.items()}
        draw_figure(Brush(canvas, scene.light), scene.body, scene.height, figure)
        view = canvas[dy : dy + SUPERSAMPLE * height, dx : dx + SUPERSAMPLE * width]
        frame = cv2.resize(view, (width, height), interpolation=cv2.INTER_AREA)
        frame = cv2.convertScaleAbs(frame, alpha=scene.exposure)
        row, column = rng.integers(0, 32, 2)
        yield cv2.add(frame, scene.noise[row : row + height, column : column + width], dtype=cv2.CV_8U)


def joints_in_frame(scene: Scene, pose: Pose, drift: Array) -> Array:
    """Where the joints of each frame of `draw_frames` are: (T, J, 2), x and y in frame px."""
    world = skeleton(pose, scene.body).values()
    canvas = np.stack([_project(points, scene)[:, :2] for points in world], axis=1)
    return (canvas - np.rint(drift)[:, None] - MARGIN) / SUPERSAMPLE


def sample_drift(rng: np.random.Generator, clock: Array) -> Array:
    """A slow camera path (T, 2) in canvas px, within MARGIN; its distribution is symmetric under time reversal."""
    slope = rng.uniform(-0.45, 0.45, 2) * MARGIN
    period, phase = rng.uniform(0.8, 2.0, 2), rng.uniform(0, 1, 2)
    swing = rng.uniform(0, 0.5) * MARGIN * np.sin(2 * np.pi * (clock[:, None] / period + phase))
    return slope * (2 * clock[:, None] - 1) + swing


def render_video(rng: np.random.Generator, action: Action) -> Iterator[Array]:
    """The frames, 24 to 96 of them, of a random person at a random place doing `action`."""
    num_frames = round(np.exp(rng.uniform(np.log(MIN_FRAMES), np.log(MAX_FRAMES))))
    time = sample_time(rng, action, num_frames)
    scene = sample_scene(rng, action.stool)
    yield from draw_frames(rng, scene, sample_pose(rng, action, time), sample_drift(rng, time.clock))
