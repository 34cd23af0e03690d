"""Small video files."""

import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from shards.frames import LongVideo, PacketsError, sample_frames
from shards.video import Timing, VideoInfo


def write_video(path: Path, value: int, frames: int = 6) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(frames):
            picture = np.full((48, 64, 3), (value + 3 * number) % 256, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


def pictures(count: int, width: int = 48, height: int = 32) -> list[np.ndarray]:
    """Smooth colours (H, W, 3) that differ in every corner and every frame: what is turned, mirrored or late shows."""
    y, x = np.mgrid[:height, :width]
    y, x = y / height, x / width
    colours = np.stack([40 + 150 * x, 30 + 160 * y, 200 - 150 * x * y], -1)
    return [np.minimum(colours + 5 * (number % 20), 255).astype(np.uint8) for number in range(count)]


def encode(
    path: Path,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    *,
    images: Sequence[np.ndarray] | None = None,
    times: Sequence[float] | None = None,
    rate: int = 20,
    matrix: tuple[int, int, int, int] | None = None,
    options: dict[str, str] | None = None,
    muxer: dict[str, str] | None = None,
    **context,
) -> Path:
    """A video of these images, shown at these seconds. matrix: a, b, c, d of the display matrix, for mp4 and mov.

    muxer: its options. context: attributes of the encoder, e.g. colorspace.
    """
    images = pictures(6) if images is None else images
    times = np.arange(len(images)) / rate if times is None else np.asarray(times)
    base = Fraction(1, rate) if np.allclose(times * rate % 1, 0, atol=1e-6) else Fraction(1, 1000)
    scheduling = os.sched_getscheduler(0), os.sched_getparam(0)
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = base
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts = round(times[number] / base)
            frame.time_base = base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # SVT-AV1 makes root's thread a real-time one, and every process that is started later inherits it.
    os.sched_setscheduler(0, *scheduling)
    if matrix is not None:
        path.write_bytes(turned(path.read_bytes(), matrix))
    return path


def turned(mp4: bytes, matrix: tuple[int, int, int, int]) -> bytes:
    """The same file with a, b, c, d of its first track's display matrix set."""
    at = mp4.index(b"tkhd") + 44
    a, b, c, d = (one << 16 for one in matrix)
    return mp4[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[at + 36 :]


# a, b, c, d of the matrix, and what they do to an image (H, W, 3).
ORIENTATIONS = {
    "as it is": ((1, 0, 0, 1), lambda image: image),
    "a quarter clockwise": ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    "half a turn": ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    "a quarter counter-clockwise": ((0, -1, 1, 0), np.rot90),
    "mirrored": ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    "upside down and mirrored": ((1, 0, 0, -1), lambda image: image[::-1]),
    "transposed": ((0, 1, 1, 0), lambda image: image.transpose(1, 0, 2)),
    "transposed the other way": ((0, -1, -1, 0), lambda image: np.rot90(image, 2).transpose(1, 0, 2)),
}


def assert_sampled_as_decoded(source: Path | bytes, info: VideoInfo, frames: Sequence[np.ndarray]) -> None:
    """Frames taken by what the packets say are those that decoding everything gives, with the same numbers and times.

    info, frames: from decoding everything.
    """
    last = info.num_frames - 1
    timings: list[Timing] = []
    for wanted in ([0], [last], [last, 0, last // 2, last // 2], list(range(0, last + 1, 3))):
        chosen = np.array(wanted)
        numbers, sampled = sample_frames(source, lambda timing, chosen=chosen: timings.append(timing) or chosen)
        assert numbers.tolist() == wanted
        for number, frame in zip(wanted, sampled, strict=True):
            np.testing.assert_array_equal(frame, frames[number])
        np.testing.assert_array_equal(timings[-1].times_N, info.times_N)
        assert timings[-1].duration == info.duration
    try:
        shown = read_long(LongVideo(source), range(0, last + 1, 2))
    except PacketsError:
        shown = read_long(LongVideo(source, by_packets=False), range(0, last + 1, 2))
    assert list(shown) == list(range(0, last + 1, 2))
    for number, frame in shown.items():
        np.testing.assert_array_equal(frame, frames[number])


def read_long(video: LongVideo, wanted: Sequence[int]) -> dict[int, np.ndarray]:
    return {number: frame for part in video.parts(wanted) for number, frame in video.read(part)}


def ffmpeg_shows(path: Path, height: int, width: int) -> tuple[np.ndarray, list[float]]:
    """All frames (N, H, W, 3) and their seconds as the program `ffmpeg` gives them; skips the test where it is not."""
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("compares with the program ffmpeg, which is not installed")
    common = ["-fps_mode", "passthrough", "-pix_fmt", "rgb24"]
    command = [program, "-v", "error", "-i", str(path), *common, "-f", "rawvideo", "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    command[-2:] = ["framecrc", "-"]
    lines = subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()
    base = Fraction(next(line.split(": ")[1] for line in lines if line.startswith("#tb 0")))
    seconds = [float(int(line.split(",")[2]) * base) for line in lines if line.startswith("0,")]
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3), [one - seconds[0] for one in seconds]
