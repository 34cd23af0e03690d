"""Videos made to hurt: headers that promise too much, endless files and clocks. All are refused before they cost."""

import os
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from videos import encode, pictures

import shards.headers
import shards.video
from shards.annotations import Annotation
from shards.frames import LongVideo, decode_frames, sample_frames
from shards.headers import HeaderError, refuse_promises
from shards.sources import SourceOptions, read_source
from shards.video import Timing, VideoError, frames_at_rate, probe_video

MANY = 1 << 24


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def numbers(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def track(samples: int, kind: bytes = b"vide", edits: int = 0) -> bytes:
    table = box(b"stbl", box(b"stts", numbers(0, 1, samples, 1)), box(b"stsz", numbers(0, 1, samples)))
    handler = box(b"hdlr", numbers(0, 0), kind, bytes(12))
    edit_list = box(b"edts", box(b"elst", numbers(0, edits))) if edits else b""
    return box(b"trak", edit_list, box(b"mdia", handler, box(b"minf", table)))


def header(*tracks: bytes) -> bytes:
    return box(b"ftyp", b"isom", bytes(4)) + box(b"mdat", bytes(5000)) + box(b"moov", box(b"mvhd", bytes(100)), *tracks)


def compressed(moov: bytes) -> bytes:
    packed = box(b"cmov", box(b"dcom", b"zlib"), box(b"cmvd", numbers(len(moov)), zlib.compress(moov)))
    return box(b"moov", packed)


BOMBS = {
    "a track": header(track(MANY)),
    "fifty tracks": header(*[track(3000)] * 50),
    "fragments": header(track(0)) + box(b"moof", box(b"traf", box(b"trun", numbers(0, 2**32 - 1)))) * 3,
    "edits": header(track(4000, edits=1 << 20)),
    "a compressed header": compressed(box(b"moov", track(MANY))),
    "a header in spare bytes": box(b"free", box(b"mvhd", bytes(100)), track(MANY)) + bytes(100),
    "a header that names no end": header()[:-108] + struct.pack(">I", 0) + b"moov" + track(MANY),
}


@pytest.mark.parametrize("name", BOMBS)
def test_headers_that_promise_too_much_are_refused(name, tmp_path):
    """FFmpeg would take memory for each promised sample: 12 GB for a file of 22 kB."""
    data = BOMBS[name]
    path = tmp_path / "bomb.mp4"
    path.write_bytes(data)
    for look in (probe_video, LongVideo, lambda source: sample_frames(source, lambda timing: np.array([0]))):
        for source in (data, path):
            with pytest.raises(VideoError, match=r"its header promises \d+ samples, too many for a file of \d+ bytes"):
                look(source)


def test_a_compressed_header_that_grows_is_refused():
    with pytest.raises(VideoError, match="its header has more than 67108864 bytes"):
        probe_video(compressed(bytes(65 << 20)))
    with pytest.raises(VideoError, match="32 within one another"):
        nested = b""
        for _ in range(40):
            nested = box(b"trak", nested)
        probe_video(box(b"moov", nested))


def test_sound_of_single_samples_counts_by_runs(monkeypatch, tmp_path):
    """A camera's uncompressed sound has 48,000 samples a second, of which FFmpeg makes a row for 160 or more."""
    monkeypatch.setattr(shards.headers, "_MOST_SAMPLES", 600)
    path = tmp_path / "v.mov"
    with av.open(str(path), "w") as container:
        video = container.add_stream("mjpeg", rate=10)
        video.width, video.height, video.pix_fmt = 32, 32, "yuvj420p"
        sound = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        for number in range(10):
            container.mux(video.encode(av.VideoFrame(32, 32, "yuvj420p")))
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts = 8000, 800 * number
            container.mux(sound.encode(frame))
        container.mux(video.encode())
    assert probe_video(path).num_frames == 10
    with pytest.raises(HeaderError), path.open("rb") as file:
        monkeypatch.setattr(shards.headers, "_MOST_SAMPLES", 50)
        refuse_promises(file)


def test_frames_beyond_8k_are_refused(tmp_path):
    path = encode(tmp_path / "v.mjpeg", "mjpeg", "yuvj420p", images=pictures(3))
    data = bytearray(path.read_bytes())
    at = -1
    while (at := data.find(b"\xff\xc0", at + 1)) >= 0:
        data[at + 5 : at + 9] = struct.pack(">HH", 8000, 8000)
    with pytest.raises(VideoError):
        probe_video(bytes(data))
    assert probe_video(path).num_frames == 3


def test_a_limit_of_pixels_holds_for_every_door(tmp_path, monkeypatch):
    path = encode(tmp_path / "v.mp4")
    monkeypatch.setattr(shards.video, "MOST_PIXELS", 48 * 32 - 1)
    doors = (
        probe_video,
        lambda source: decode_frames(source, [0]),
        lambda source: sample_frames(source, lambda timing: np.array([0])),
    )
    for look in doors:
        with pytest.raises(VideoError):
            look(path)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_more_frames_than_the_limit_are_refused(tmp_path, monkeypatch, name):
    path = encode(tmp_path / name, "mpeg4")
    monkeypatch.setattr(shards.video, "MOST_FRAMES", 6)
    assert probe_video(path).num_frames == 6
    monkeypatch.setattr(shards.video, "MOST_FRAMES", 5)
    for look in (probe_video, LongVideo):
        with pytest.raises(VideoError, match="it has more than 5 frames; cut it"):
            look(path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_files_that_never_end_are_refused(tmp_path, kind):
    path = tmp_path / "v.mp4" if kind == "pipe" else Path("/dev/zero")
    if kind == "pipe":
        os.mkfifo(path)
    for look in (probe_video, LongVideo, lambda source: sample_frames(source, lambda timing: np.array([0]))):
        with pytest.raises(VideoError, match="it is no regular file"):
            look(path)


def test_clocks_that_claim_anything_cost_no_memory(tmp_path, monkeypatch):
    """Three frames within nanoseconds and one a day later: no more frames than the limit stand for a window."""
    timing = Timing(86_400.0, np.array([0, 1e-9, 2e-9, 86_399]))
    monkeypatch.setattr(shards.video, "MOST_FRAMES", 1000)
    assert timing.shown(0, 86_400.0).tolist() == [2] * 1000
    assert timing.shown(86_399.5, 86_400.0).tolist() == [3] * 1000
    with pytest.raises(VideoError, match="by its clock it lasts 86400 s; 1000 frames are the limit, 5 a second"):
        frames_at_rate(timing.times_N, timing.duration, 5)
    encode(tmp_path / "v.mp4", images=pictures(3), times=[0, 1, 300])
    with pytest.raises(Exception, match=r"'v.mp4': by its clock it lasts \d+ s"):
        list(read_source(tmp_path, Annotation("v.mp4", None, 0, 1), SourceOptions(fps=5)))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.avi"])
def test_titles_in_any_encoding_are_no_damage(tmp_path, name):
    """Players show such videos; PyAV wants UTF-8 by default."""
    path = tmp_path / name
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pictures(1, 32)[0], "rgb24").reformat(format="yuv420p")))
        container.mux(stream.encode())
    data = path.read_bytes()
    assert b"TITLE" in data
    path.write_bytes(data.replace(b"TITLE", b"T\xe9\xff\x80E"))
    assert probe_video(path).num_frames == 1
