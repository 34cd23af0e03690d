"""Feeds damaged video files to every door that takes videos, in child processes with limits.

    nice python tests/support/fuzz_videos.py [--cases 100000] [--seed 0] [--minutes M] [--workers N] [--files FOLDER]
                                             [--keep FOLDER]

The files that are damaged: tiny ones of many containers and codecs, made here, and those of --files up to 1 MB. A case
flips, cuts, repeats or splices bytes, or sets a number behind a mark of the container (`stsz`, `idx1`, an EBML name).
Case k is the same in every run. A child looks at each case as building, stored reading, checking, training, prediction,
an index and extraction do; only documented errors may come out. The kernel ends a child that takes more than
CASE_SECONDS of processor time or CHILD_BYTES of memory; the parent ends one that is silent for SILENT_SECONDS. A child
that dies is a failure (the file is kept in --keep), and another one goes on with the next case. A child in which memory
is lost is one too: what its C library and Python have given out and not got back grows by more than GROWTH_BYTES after
its 1000th case. Resident memory would say less: it goes up and down by tens of megabytes with what lies where.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import io
import os
import random
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import av
import av.logging
import numpy as np
from fuzz_changes import Target, mutated

from shards.frames import LongVideo, PacketsError, decode_frames, sample_frames
from shards.packets import VideoParts
from shards.sources import InputError, encoded_frames, probe_file, video_positions
from shards.stored import decode_stored, probe_stored
from shards.video import VideoError, probe_video

CASE_SECONDS = 30  # of processor time
SILENT_SECONDS = 300
CHILD_BYTES = 2 << 30
LARGEST_FILE = 1 << 20
GROWTH_BYTES = 4 << 20  # of a child between its 1000th case and any later one
LOOK_EVERY = 500  # cases

# Where numbers stand that a reader believes: boxes of MP4, chunks of AVI, elements of Matroska, packets of ASF and Ogg.
MARKS = (
    b"moov", b"mvhd", b"trak", b"tkhd", b"mdhd", b"elst", b"stbl", b"stsd", b"avc1", b"mp4v", b"avcC", b"esds", b"stts",
    b"ctts", b"stss", b"stsc", b"stsz", b"stco", b"moof", b"tfhd", b"tfdt", b"trun", b"mdat", b"ftyp", b"free",
    b"RIFF", b"avih", b"strh", b"strf", b"idx1", b"movi", b"LIST", b"00dc", b"01wb",
    b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67", b"\x2a\xd7\xb1", b"\x1f\x43\xb6\x75", b"\xa3", b"\xb0", b"\xba", b"\xe7",
    b"OggS", b"FLV", b"onMetaData", b"\x47\x40", b"\x00\x00\x01\xba", b"\x00\x00\x01\xe0", b"\x00\x00\x01\xb3",
    b"\x26\xb2\x75\x8e", b"GIF89a", b"\x00\x00\x00\x01\x67", b"\x00\x00\x00\x01\x65", b"NETSCAPE",
)  # fmt: skip
NUMBERS = (0, 1, 2, 255, 0x7FFF, 0xFFFF, 65_500, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


@dataclass(frozen=True)
class Kind:
    """A tiny video: how it is encoded. sound: beside it."""

    suffix: str
    codec: str
    pix_fmt: str = "yuv420p"
    frames: int = 12
    options: dict[str, str] = field(default_factory=dict)
    container: dict[str, str] = field(default_factory=dict)
    sound: str = ""


KINDS = (
    Kind("mp4", "mpeg4", options={"g": "4"}),
    Kind("mp4", "libx264", options={"g": "4", "bf": "2"}, sound="aac"),
    Kind("mp4", "libx264", options={"g": "6"}, container={"movflags": "frag_keyframe+empty_moov"}),
    Kind("mp4", "libx265", options={"x265-params": "keyint=4:log-level=none"}),
    Kind("mp4", "libsvtav1", frames=4),
    Kind("mov", "mjpeg", "yuvj420p", 4),
    Kind("mov", "prores_ks", "yuv422p10le", 2),
    Kind("mkv", "libx264", options={"g": "4"}, sound="libmp3lame"),
    Kind("mkv", "ffv1", frames=4),
    Kind("webm", "libvpx", options={"g": "4"}),
    Kind("webm", "libvpx-vp9", options={"g": "4"}, frames=6),
    Kind("avi", "mpeg4", options={"g": "4"}, sound="libmp3lame"),
    Kind("avi", "mjpeg", "yuvj420p", 4),
    Kind("ts", "libx264", options={"g": "4"}, sound="aac"),
    Kind("mts", "mpeg2video", options={"g": "4"}),
    Kind("gif", "gif", "rgb8", 5),
    Kind("apng", "apng", "rgb24", 4),
    Kind("flv", "flv", options={"g": "4"}),
    Kind("mpg", "mpeg1video", options={"g": "4"}),
    Kind("vob", "mpeg2video", options={"g": "4"}),
    Kind("ogv", "libtheora", options={"g": "4"}),
    Kind("wmv", "wmv2", options={"g": "4"}),
    Kind("3gp", "h263", frames=4),
    Kind("mxf", "mpeg2video", options={"g": "4"}, frames=4),
    Kind("nut", "mpeg4", options={"g": "4"}),
    Kind("h264", "libx264", options={"g": "4"}),
    Kind("mjpeg", "mjpeg", "yuvj420p", 4),
    Kind("y4m", "wrapped_avframe", frames=2),
)  # fmt: skip


def tiny_videos(folder: Path, kinds: Sequence[Kind] = KINDS) -> dict[str, bytes]:
    """The files of the kinds that this FFmpeg can write, by what they are."""
    made = {}
    scheduling = os.sched_getscheduler(0), os.sched_getparam(0)
    for number, kind in enumerate(kinds):
        path = folder / f"seed{number}.{kind.suffix}"
        try:
            _write(path, kind)
        except (ValueError, OSError):  # an encoder that this build lacks
            continue
        made[f"{kind.suffix} {kind.codec}{' fragmented' if kind.container else ''}"] = path.read_bytes()
    os.sched_setscheduler(0, *scheduling)  # SVT-AV1 makes root's thread a real-time one
    return made


def _write(path: Path, kind: Kind) -> None:
    width, height = (176, 144) if kind.codec == "h263" else (64, 64) if "av1" in kind.codec else (32, 32)
    with av.open(str(path), "w", container_options=kind.container) as container:
        stream = container.add_stream(kind.codec, rate=25, options=kind.options)
        stream.width, stream.height, stream.pix_fmt = width, height, kind.pix_fmt
        sound = container.add_stream(kind.sound, rate=44_100) if kind.sound else None
        for number in range(kind.frames):
            picture = np.full((height, width, 3), 9 * number, np.uint8)
            picture[number : number + 9, :9] = 255 - picture[0, 0]
            frame = av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=kind.pix_fmt)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            samples = av.AudioFrame(format="fltp", layout="stereo", samples=1152)
            samples.sample_rate, samples.pts = 44_100, 0
            for plane in samples.planes:
                plane.update(bytes(plane.buffer_size))
            try:
                container.mux(sound.encode(samples))
                container.mux(sound.encode())
            except ValueError:  # another frame size: the video alone will do
                pass


def damaged(seeds: Sequence[bytes], seed: int, case: int) -> bytes:
    """Case `case`: half of them have numbers near marks of the container set to others."""
    draw = random.Random(f"video {seed} {case}")
    if draw.random() < 0.5:
        return mutated(Target(lambda folder: [], lambda data, folder: None, tokens=MARKS), list(seeds), draw)
    data = bytearray(draw.choice(seeds))
    for _ in range(draw.choice((1, 1, 2, 4))):
        places = [place for mark in MARKS if (place := _place(data, mark, draw)) >= 0]
        if places:
            place = draw.choice(places)
            form = draw.choice((">I", "<I", ">H", "<H", ">Q", "B"))
            value = draw.choice((*NUMBERS, draw.randrange(2**32)))
            number = struct.pack(form, value % (1 << 8 * struct.calcsize(form)))
            data[place : place + len(number)] = number
    return bytes(data)


def _place(data: bytearray, mark: bytes, draw: random.Random) -> int:
    """A place of a number near one of the marks: before it, where sizes are, or behind it."""
    count = data.count(mark)
    if not count:
        return -1
    at = -1
    for _ in range(draw.randrange(min(count, 8)) + 1):
        at = data.find(mark, at + 1)
    return max(0, at + draw.choice((-4, len(mark), len(mark) + 4 * draw.randrange(12), len(mark) + draw.randrange(64))))


# The doors. Each looks at a file as a part of the product does.


def look_as_a_build(path: Path, data: bytes) -> None:
    """Stored: probed, and the frames of training read in parts or as a whole."""
    info, packets = probe_stored(data)
    wanted = np.unique([0, info.num_frames // 2, info.num_frames - 1])
    whole = decode_frames(data, wanted, num_frames=info.num_frames)
    if len(packets.rows):
        assert packets.can_be_of(len(data), info.num_frames)
        parts = VideoParts(packets, len(data), wanted)
        chunks = [data[start:stop] for start, stop in parts.ranges]
        assert parts.damage(chunks) is None
        read = decode_stored(parts.file(chunks), wanted, num_frames=info.num_frames)
        assert all(np.array_equal(a, b) for a, b in zip(whole, read, strict=True)), "parts show other pixels"


def look_as_extraction(path: Path, data: bytes) -> None:
    """Frames of a file as JPEGs, five a second."""
    info = probe_file(path.name, path)
    positions = video_positions(info, 5.0, None)
    for _ in zip(range(8), encoded_frames(path.name, path, positions, 16, None), strict=False):
        pass


def look_as_prediction(path: Path, data: bytes) -> None:
    """Eight frames of a file, and a window of seconds."""
    sample_frames(path, lambda timing: np.linspace(0, timing.num_frames - 1, 8, dtype=np.int64))
    sample_frames(path, lambda timing: timing.shown(0.0, min(4.0, timing.duration))[:8])


def look_as_an_index(path: Path, data: bytes) -> None:
    """Windows of a long video."""
    for by_packets in (True, False):
        video = LongVideo(path, by_packets=by_packets)
        wanted = np.unique(np.concatenate([video.timing.shown(0.0, 4.0)[::10], [video.timing.num_frames - 1]]))
        try:
            for part in video.parts(wanted.tolist()):
                for _ in video.read(part):
                    pass
            return
        except PacketsError:
            assert by_packets


DOORS: dict[str, Callable[[Path, bytes], None]] = {
    "build": look_as_a_build,
    "extraction": look_as_extraction,
    "prediction": look_as_prediction,
    "index": look_as_an_index,
}
DOCUMENTED = (VideoError, InputError, IndexError)


def look(path: Path, data: bytes) -> str:
    """How each door ends: accepted, a documented error's name, or FAILED with the place."""
    path.write_bytes(data)
    ends = []
    for name, door in DOORS.items():
        try:
            door(path, data)
            ends.append("accepted")
        except DOCUMENTED as error:
            text = str(error)
            ends.append(type(error).__name__ if "\n" not in text else f"FAILED {name}: several lines: {text!r}")
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            ends.append(f"FAILED {name}: {type(error).__name__} at {place}: {str(error)[:200]!r}".replace("\t", " "))
    return "\t".join(ends).replace("\n", " ")


# Children


@dataclass
class Child:
    """A process that works on the cases next, next + step, …"""

    process: int
    pipe: io.BufferedReader
    next: int
    heard: float


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class _Mallinfo2(ctypes.Structure):
    """What glibc says of its memory: mallinfo(3)."""

    _names = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    _fields_ = tuple((name, ctypes.c_size_t) for name in _names)


def _in_use() -> int:
    """Bytes that the C library has given out, and small blocks of Python at their largest, without garbage.

    Before glibc 2.33 the C library does not say, and only Python's count.
    """
    gc.collect()
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    given = 0
    if mallinfo2 is not None:
        mallinfo2.restype = _Mallinfo2
        found = mallinfo2()
        given = found.uordblks + found.hblkhd
    return given + 512 * sys.getallocatedblocks()


def _open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _peak() -> int:
    """Most memory of this process since the last call, bytes."""
    status = Path("/proc/self/status").read_text()
    Path("/proc/self/clear_refs").write_text("5")
    return int(status.split("VmHWM:")[1].split()[0]) << 10


def work(seeds: Sequence[bytes], seed: int, cases: range, folder: Path, output: int) -> None:
    """The life of a child: a line for each case."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + CHILD_BYTES, used + CHILD_BYTES))
    path = folder / f"case{os.getpid()}"
    _peak()
    in_use = 0
    for number, case in enumerate(cases):
        spent = resource.getrusage(resource.RUSAGE_SELF)
        cpu = spent.ru_utime + spent.ru_stime
        # Not RLIMIT_CPU: its clock counts ticks, and on a busy machine gets ahead of getrusage's by seconds a minute.
        signal.setitimer(signal.ITIMER_PROF, CASE_SECONDS)
        before, files = _resident(), _open_files()
        ends = look(path, damaged(seeds, seed, case))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = spent.ru_utime + spent.ru_stime - cpu
        if (more := _open_files() - files) > 0:
            ends += f"\tFAILED {more} files left open"
        peak = _peak()
        in_use = _in_use() if number % LOOK_EVERY == 0 else in_use
        os.write(output, f"{case}\t{number}\t{seconds:.2f}\t{(peak - before) >> 20}\t{in_use}\t{ends}\n".encode())
    path.unlink(missing_ok=True)


def start(seeds: Sequence[bytes], seed: int, cases: range, folder: Path) -> Child:
    """Forks a child."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        status = 1
        try:
            work(seeds, seed, cases, folder, writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    return Child(process, os.fdopen(reading, "rb", 0), cases.start, time.monotonic())


@dataclass
class Findings:
    """What came out. deaths: of children, by how and case."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    deaths: list[tuple[int, str]] = field(default_factory=list)
    slowest: tuple[float, int] = (0.0, 0)
    largest: tuple[int, int] = (0, 0)
    growth: tuple[int, int] = (0, 0)
    early: dict[int, int] = field(default_factory=dict)  # bytes in use of a child after its 1000th case

    def add(self, child: Child, line: str) -> None:
        """A line of a child."""
        case, number, seconds, peak, in_use, *ends = line.split("\t")
        self.cases += 1
        self.slowest = max(self.slowest, (float(seconds), int(case)))
        self.largest = max(self.largest, (int(peak), int(case)))
        if int(number) == 1000:
            self.early[child.process] = int(in_use)
        self.growth = max(self.growth, (int(in_use) - self.early.get(child.process, int(in_use)), int(case)))
        for name, end in zip((*DOORS, "files"), ends, strict=False):
            self.outcomes[f"{name}: {end.split(' ')[0]}"] += 1
            if end.startswith("FAILED"):
                kind = end.split(": '")[0]
                if kind not in self.failures:
                    print(f"case {case}: {end}", flush=True)
                self.failures.setdefault(kind, f"case {case}: {end}")

    def print(self, seconds: float) -> None:
        """The table."""
        print(f"{self.cases} cases in {seconds:.0f} s; slowest {self.slowest[0]:.1f} s of CPU (case {self.slowest[1]})")
        print(
            f"  most memory {self.largest[0]} MB (case {self.largest[1]}); growth {self.growth[0] >> 10} kB "
            f"(case {self.growth[1]})"
        )
        for name in DOORS:
            counts = {key.split(": ")[1]: count for key, count in self.outcomes.items() if key.startswith(f"{name}:")}
            print(f"  {name}: {', '.join(f'{count} {end}' for end, count in sorted(counts.items()))}")
        for failure in self.failures.values():
            print(f"  {failure}")
        for case, how in self.deaths:
            print(f"  case {case}: the child was ended by {how}")
        sys.stdout.flush()


def fuzz_videos(
    seeds: Sequence[bytes],
    *,
    cases: int,
    seed: int = 0,
    minutes: float | None = None,
    workers: int = 1,
    keep: Path | None = None,
) -> Findings:
    """Runs the cases in children. keep: gets the files of the failures and of those on which a child died."""
    findings = Findings()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-videos-", dir=_memory()) as place:
        folder = Path(place)
        children = [start(seeds, seed, range(first, cases, workers), folder) for first in range(min(workers, cases))]
        while children:
            ready, _, _ = select.select([child.pipe for child in children], [], [], 5)
            for child in list(children):
                if child.pipe in ready and (line := child.pipe.readline()):
                    child.next, child.heard = child.next + workers, time.monotonic()
                    text = line.decode().rstrip("\n")
                    findings.add(child, text)
                    if "FAILED" in text and keep is not None:
                        (keep / f"failed-{seed}-{text.split(chr(9))[0]}").write_bytes(
                            damaged(seeds, seed, child.next - workers)
                        )
                    continue
                if child.pipe not in ready and time.monotonic() - child.heard > SILENT_SECONDS:
                    os.kill(child.process, signal.SIGKILL)
                if child.pipe not in ready:
                    continue
                children.remove(child)
                child.pipe.close()
                _, status = os.waitpid(child.process, 0)
                if status:
                    ended = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {status}"
                    findings.deaths.append((child.next, ended))
                    if keep is not None:
                        (keep / f"died-{seed}-{child.next}").write_bytes(damaged(seeds, seed, child.next))
                    if child.next + workers < cases:
                        children.append(start(seeds, seed, range(child.next + workers, cases, workers), folder))
            if deadline is not None and time.monotonic() > deadline:
                for child in children:
                    os.kill(child.process, signal.SIGKILL)
                    os.waitpid(child.process, 0)
                    child.pipe.close()
                break
    return findings


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--files", type=Path, help="a folder of small real videos to damage too")
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    arguments = parser.parse_args()
    if arguments.keep is not None:
        arguments.keep.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    av.logging.set_level(av.logging.PANIC)
    with tempfile.TemporaryDirectory() as place:
        files = tiny_videos(Path(place))
    if arguments.files is not None:
        for path in sorted(arguments.files.iterdir()):
            with suppress(VideoError):  # no video
                if path.is_file() and path.stat().st_size <= LARGEST_FILE:
                    probe_video(path)
                    files[path.name] = path.read_bytes()
    print(f"{len(files)} files are damaged: {', '.join(files)}", flush=True)
    began = time.monotonic()
    findings = fuzz_videos(
        list(files.values()),
        cases=arguments.cases,
        seed=arguments.seed,
        minutes=arguments.minutes,
        workers=arguments.workers,
        keep=arguments.keep,
    )
    findings.print(time.monotonic() - began)
    return 1 if findings.failures or findings.deaths or findings.growth[0] > GROWTH_BYTES else 0


if __name__ == "__main__":
    sys.exit(main())
