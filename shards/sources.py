"""What a line of an annotation list stands for: the frames of a folder, or those of a video file, ready to be stored.

Sources give out chunks of frames, so a video of any length is never in memory as a whole (except a video that is stored
as one file).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from isal import isal_zlib

from shards.annotations import Annotation
from shards.format import MAX_FRAMES, MAX_MEMBER_BYTES
from shards.images import MAX_FRAME_PIXELS, ImageProbe, encode_jpeg, probe_image, reencode
from shards.packets import NO_PACKETS, Packets
from shards.reencoding import reencode_video
from shards.stored import probe_stored
from shards.video import VideoError, VideoInfo, frames_at_rate, iter_frames, probe_video

CHUNK_FRAMES = 64
CHUNK_BYTES = 4 << 20


class InputError(Exception):
    """A video that cannot be stored. path is relative to the root, fix says what to do about it."""

    def __init__(self, path: str, reason: str, fix: str) -> None:
        super().__init__(f"{path!r}: {reason}")
        self.path = path
        self.reason = reason
        self.fix = fix


class Member(NamedTuple):
    """One file of a video as it is stored. width and height in pixels."""

    data: bytes
    extension: str
    crc32: int
    width: int
    height: int


@dataclass
class Chunk:
    """Some members of a video, in order.

    num_frames, details and packets are those of the whole video and the same in all of its chunks; details go into its
    JSON.
    """

    num_frames: int
    details: dict[str, Any]
    members: list[Member] = field(default_factory=list)
    bytes: int = 0
    packets: Packets = NO_PACKETS

    def add(self, member: Member) -> None:
        """Appends a member."""
        self.members.append(member)
        self.bytes += len(member.data)

    @property
    def full(self) -> bool:
        """Whether the chunk is large enough to be passed on."""
        return len(self.members) >= CHUNK_FRAMES or self.bytes >= CHUNK_BYTES


@dataclass(frozen=True)
class SourceOptions:
    """How videos become members. Raises ValueError that names the option, the value and the fix.

    store: "frames" or "video" (the encoded file as it is). image_template: file name of frame k in a folder.
    max_frames: keep at most this many frames, evenly spaced. short_side, quality: re-encode as JPEG; short_side is in
    pixels. fps: resample video files to this many frames a second. gop: re-encode stored videos with a key frame at
    least every `gop` frames, and with `short_side`.
    """

    store: str = "frames"
    image_template: str = "img_{:05d}.jpg"
    max_frames: int | None = None
    short_side: int | None = None
    quality: int | None = None
    fps: float | None = None
    gop: int | None = None

    def __post_init__(self) -> None:
        if self.store not in ("frames", "video"):
            raise ValueError(f"store: expected 'frames' or 'video', got {self.store!r}")
        for name, low, high in (
            ("max_frames", 1, MAX_FRAMES),
            ("short_side", 1, 65_535),
            ("quality", 1, 100),
            ("gop", 1, 1000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name}: expected {low} to {high}, got {value}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"fps: expected more than 0 and at most 1000, got {self.fps}")
        if self.gop is not None and self.store != "video":
            raise ValueError("gop: frames are stored one by one; leave it out, or store videos")
        pixels = [name for name in ("max_frames", "short_side", "quality", "fps") if getattr(self, name) is not None]
        if self.store == "video" and pixels and (self.gop is None or pixels != ["short_side"]):
            how = "are kept as they are" if self.gop is None else "keep their frames"
            too = ", give gop too" if self.gop is None and pixels == ["short_side"] else ""
            wrong = next(name for name in pixels if self.gop is None or name != "short_side")
            raise ValueError(f"{wrong}: stored videos {how}; leave it out{too} or store frames")
        check_template(self.image_template)

    @property
    def reencodes(self) -> bool:
        """Whether frames are encoded anew."""
        return self.short_side is not None or self.quality is not None

    def record(self) -> dict[str, Any]:
        """The settings as the manifest keeps them. `gop`, which older ones lack, is there only if it is given."""
        return {name: value for name, value in asdict(self).items() if name != "gop" or value is not None}


OPTION_NAMES = tuple(option.name for option in fields(SourceOptions))


def check_template(template: str) -> None:
    """Raises ValueError unless the template makes a different file name below the folder for each number."""
    try:
        names = [template.format(number) for number in (0, 1, 2)]
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        raise ValueError(
            f"image_template: {template!r} is no template of one number ({error}); e.g. 'img_{{:05d}}.jpg'"
        ) from None
    if len(set(names)) < 3 or names[0].startswith("/") or ".." in names[0].split("/") or "\0" in names[0]:
        raise ValueError(
            f"image_template: {template!r} must name a file below the folder by its number; e.g. 'img_{{:05d}}.jpg'"
        )


def read_source(root: Path, annotation: Annotation, options: SourceOptions) -> Iterator[Chunk]:
    """The members of one video in order, in chunks. Raises InputError."""
    if annotation.num_frames is not None:
        if options.store == "video":
            raise InputError(annotation.name, "a folder of frames cannot be stored as video", "leave --store video out")
        if options.fps is not None:
            reason = f"the frames of a folder have no times, so --fps {options.fps:g} cannot choose among them"
            raise InputError(annotation.name, reason, "leave --fps out, or extract the frames anew at that rate")
        return _read_folder(root, annotation.name, annotation.num_frames, options)
    if options.store == "video":
        return _read_video_file(root, annotation.name, options)
    return _decode_video_file(root, annotation.name, options)


def thinned(num_frames: int, max_frames: int | None) -> np.ndarray:
    """Positions (K,) int64 of the frames that stay: the middles of `max_frames` equal parts, or all."""
    if max_frames is None or num_frames <= max_frames:
        return np.arange(num_frames, dtype=np.int64)
    return (2 * np.arange(max_frames, dtype=np.int64) + 1) * num_frames // (2 * max_frames)


def _read_folder(root: Path, name: str, num_frames: int, options: SourceOptions) -> Iterator[Chunk]:
    if num_frames == 0:
        raise InputError(
            name,
            "the list gives it 0 frames",
            "extract it again and correct its count, or leave out such videos with --on-error skip",
        )
    try:
        folder = os.open(root / name, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise InputError(
            name, "no such folder", "check --root and the path, or leave out such videos with --on-error skip"
        ) from None
    except OSError as error:
        raise InputError(name, error.strerror or str(error), "make the folder readable") from None
    try:
        first = _first_frame(folder, options.image_template, num_frames)
        positions = thinned(num_frames, options.max_frames).tolist()
        details = {"source": {"frames": num_frames}}
        chunk = Chunk(len(positions), details)
        probe = ImageProbe()
        for position in positions:
            frame = options.image_template.format(first + position)
            data = _read_frame(folder, name, frame, num_frames)
            try:
                extension, width, height = probe(data)
                if options.reencodes:
                    data = reencode(data, options.short_side, options.quality)
                    extension, width, height = probe_image(data)
            except ValueError as error:
                raise InputError(f"{name}/{frame}", str(error), "replace or extract the frame again") from None
            _check_pixels(f"{name}/{frame}", width, height)
            chunk.add(Member(data, extension, isal_zlib.crc32(data), width, height))
            if chunk.full:
                yield chunk
                chunk = Chunk(len(positions), details)
        if chunk.members:
            yield chunk
    finally:
        os.close(folder)


def _check_pixels(path: str, width: int, height: int) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            path, f"{width}x{height} pixels, {MAX_FRAME_PIXELS} is the limit of a stored frame", "add --short-side 256"
        )


def _first_frame(folder: int, template: str, num_frames: int) -> int:
    """Frames count from 1; they count from 0 where the last one, counted from 1, is missing and frame 0 is there."""
    try:
        os.stat(template.format(num_frames), dir_fd=folder)
    except OSError:
        try:
            os.stat(template.format(0), dir_fd=folder)
        except OSError:
            return 1
        return 0
    return 1


def _read_frame(folder: int, name: str, frame: str, num_frames: int) -> bytes:
    try:
        return _read_unchanged(frame, folder)
    except FileNotFoundError:
        reason = f"no such frame, though the list gives {name!r} {num_frames} frames"
        fix = "give --image-template as the frames are named, correct the count, or use --on-error skip"
    except OSError as error:
        reason, fix = error.strerror or str(error), "make the file readable"
    except ValueError as error:
        reason, fix = str(error), "run again when nothing writes to it"
    raise InputError(f"{name}/{frame}", reason, fix)


def _read_unchanged(path: str | Path, folder: int | None = None) -> bytes:
    """Bytes of a regular file. Raises ValueError if it changes while it is read, OSError."""
    # Non-blocking: a named pipe in place of a file must not stop the build.
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK, dir_fd=folder)
    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode):
            raise ValueError("not a regular file")
        # One byte more than expected: a file that grew shows itself.
        data = os.read(file, before.st_size + 1)
        while len(data) < before.st_size and (more := os.read(file, before.st_size + 1 - len(data))):
            data += more
        after = os.fstat(file)
    finally:
        os.close(file)
    if len(data) != before.st_size or after.st_mtime_ns != before.st_mtime_ns or after.st_size != before.st_size:
        raise ValueError("the file changed while it was read")
    return data


def _read_video_file(root: Path, name: str, options: SourceOptions) -> Iterator[Chunk]:
    try:
        if (root / name).stat().st_size > MAX_MEMBER_BYTES:
            raise InputError(name, "the file has 4 GiB or more", "cut it, or store frames")
        data = _read_unchanged(root / name)
    except OSError as error:
        raise _unreadable(name, error) from None
    except ValueError as error:
        raise InputError(name, str(error), "run again when nothing writes to it") from None
    with _explained(name):
        if options.gop is not None:
            data = reencode_video(data, gop=options.gop, short_side=options.short_side)
        info, packets = probe_stored(data)
    _check_length(name, info)
    if info.extension is None:
        fix = "convert it (ffmpeg -i IN -c copy OUT.mkv) or store frames"
        raise InputError(name, "only mp4, avi, mkv and webm files can be stored", fix)
    _check_pixels(name, info.width, info.height)
    member = Member(data, info.extension, isal_zlib.crc32(data), min(info.width, 65_535), min(info.height, 65_535))
    details = {"fps": info.fps, "duration": info.duration, "source": {"frames": info.num_frames}}
    yield Chunk(info.num_frames, details, [member], len(data), packets)


def _decode_video_file(root: Path, name: str, options: SourceOptions) -> Iterator[Chunk]:
    path = root / name
    try:
        before = path.stat()
    except OSError as error:
        raise _unreadable(name, error) from None
    info = probe_file(name, path)
    with _explained(name):
        chosen = video_positions(info, options.fps, options.max_frames)
    details = {
        "fps": info.fps if options.fps is None else options.fps,
        "duration": info.duration,
        "source": {"frames": info.num_frames, "fps": info.fps},
    }
    chunk = Chunk(len(chosen), details)
    for data, width, height in encoded_frames(name, path, chosen, options.short_side, options.quality):
        chunk.add(Member(data, "jpg", isal_zlib.crc32(data), width, height))
        if chunk.full:
            yield chunk
            chunk = Chunk(len(chosen), details)
    try:
        after = path.stat()
    except OSError as error:
        raise _unreadable(name, error) from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(name, "the file changed while it was read", "run again when nothing writes to it")
    if chunk.members:
        yield chunk


def video_positions(info: VideoInfo, fps: float | None, max_frames: int | None) -> np.ndarray:
    """Numbers (K,) of the frames to take from a video: resampled to `fps`, then thinned."""
    positions = np.arange(info.num_frames) if fps is None else frames_at_rate(info.times_N, info.duration, fps)
    return positions[thinned(len(positions), max_frames)]


def encoded_frames(
    name: str, path: Path, positions: np.ndarray, short_side: int | None, quality: int | None
) -> Iterator[tuple[bytes, int, int]]:
    """JPEG, width and height of the frames of a video with the given numbers (ascending; repeats are encoded once).

    Raises InputError.
    """
    repeats = np.bincount(positions)
    decoded = 0
    try:
        for frame_HWC, count in zip(iter_frames(path), repeats, strict=False):
            decoded += 1
            if count:
                data = encode_jpeg(frame_HWC, short_side, quality)
                _, width, height = probe_image(data)
                _check_pixels(name, width, height)
                for _ in range(count):
                    yield data, width, height
    except ValueError as error:
        raise InputError(name, str(error), "replace the video or leave out such videos with --on-error skip") from None
    if decoded < len(repeats):
        raise InputError(name, f"frame {decoded} no longer decodes", "run again when nothing writes to it")


def probe_file(name: str, source: bytes | Path) -> VideoInfo:
    """What a video file holds. Raises InputError."""
    with _explained(name):
        info = probe_video(source)
    _check_length(name, info)
    return info


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """What goes wrong with a video file in the body is an InputError."""
    try:
        yield
    except VideoError as error:
        raise InputError(name, str(error), "replace the video or leave out such videos with --on-error skip") from None
    except OSError as error:
        raise _unreadable(name, error) from None


def _check_length(name: str, info: VideoInfo) -> None:
    if info.num_frames > MAX_FRAMES:
        raise InputError(name, f"it has {info.num_frames} frames, {MAX_FRAMES} is the limit", "cut the video")


def _unreadable(name: str, error: OSError) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(
            name, "no such file", "check --root and the path, or leave out such videos with --on-error skip"
        )
    return InputError(name, error.strerror or str(error), "make the file readable")
