"""Videos: exactly the frames that were asked for, the same numbers everywhere, and folders of frames made from them."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import signal
import subprocess
import sys
import tarfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from frame_folders import jpeg
from PIL import Image
from videos import assert_sampled_as_decoded

from shards import frames as by_number
from shards.annotations import parse_annotations
from shards.checker import check_datasets
from shards.extraction import extract_frames
from shards.format import ShardError
from shards.frames import FrameReader, LongVideo, PacketsError, PacketTable, decode_frames, sample_frames
from shards.index import open_index, read_local_manifest
from shards.video import Timing, VideoError, frames_at_rate, iter_frames, probe_video
from shards.writer import build_shards

EXTRACT = Path(__file__).parents[2] / "tools" / "extract_frames.py"

# B-frames, key frames far apart and close together, constant and changing frame rate, every container we store.
KINDS = {
    "bframes.mp4": ("libx264", {"bf": "3", "g": "12", "x264-params": "b-pyramid=normal"}),
    "opengop.mkv": ("libx264", {"bf": "3", "g": "10", "x264-params": "open-gop=1"}),
    "onekey.mp4": ("libx264", {"bf": "2", "g": "1000"}),
    "mpeg4.avi": ("mpeg4", {"bf": "2", "g": "9"}),
    "h264.avi": ("libx264", {"bf": "2", "g": "9"}),
    "vp9.webm": ("libvpx-vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "intra.mkv": ("mjpeg", {}),
}


def write_video(path: Path, codec: str, options: dict[str, str], *, frames: int = 45, uneven: bool = False) -> None:
    """A video whose frame k shows k: 6 bars, white for each bit of k that is set."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=15, options=options)
        stream.width, stream.height = 96, 64
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = stream.time_base = Fraction(1, 150)
        for number in range(frames):
            pixels = np.zeros((64, 96, 3), np.uint8)
            for bit in range(6):
                pixels[:, bit * 16 : bit * 16 + 16] = 235 if number >> bit & 1 else 20
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number * 10 + (number % 3 * 3 if uneven else 0)
            frame.time_base = Fraction(1, 150)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def shown_number(frame_HWC: np.ndarray) -> int:
    return sum(int(frame_HWC[20:44, bit * 16 + 5 : bit * 16 + 11].mean() > 127) << bit for bit in range(6))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, options) in KINDS.items():
        write_video(folder / name, codec, options)
    write_video(folder / "uneven.mp4", "libx264", {"bf": "2", "g": "10"}, uneven=True)
    (folder / "list.txt").write_text("".join(f"{name} {k % 3}\n" for k, name in enumerate([*KINDS, "uneven.mp4"])))
    return folder


ALL = [*KINDS, "uneven.mp4"]


@pytest.mark.parametrize("name", ALL)
def test_every_number_means_the_same_frame(videos, name):
    path = videos / name
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (45, 96, 64)
    assert info.extension == name.rsplit(".", 1)[1]
    assert info.duration == pytest.approx(3, abs=0.1)
    frames = list(iter_frames(path))
    assert [shown_number(frame) for frame in frames] == list(range(45))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for count in (1, 1, 1, 2, 5, 8, 45):
        wanted = rng.integers(0, 45, count)
        for source in (path, data):
            for frame, index in zip(decode_frames(source, wanted, num_frames=45), wanted, strict=True):
                assert np.array_equal(frame, frames[index])


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_frame_count_means_decoding_from_the_start(videos, name):
    assert [shown_number(frame) for frame in decode_frames(videos / name, [40, 3], num_frames=44)] == [40, 3]


@pytest.mark.parametrize("name", ALL)
def test_a_reader_gives_the_same_frames_call_after_call_and_reads_the_packets_once(videos, name, monkeypatch):
    tables, read = [], PacketTable.read
    monkeypatch.setattr(PacketTable, "read", lambda *given: tables.append(read(*given)) or tables[-1])
    reader = FrameReader(videos / name, num_frames=45)
    for wanted in ([40, 3], [3], [12, 13, 12]):
        assert [shown_number(frame) for frame in reader.read(wanted)] == wanted
        assert [
            int(number) for number in reader.read(wanted, use=lambda frame: np.array(shown_number(frame)))
        ] == wanted
    assert len(tables) == 1


def test_decode_frames_refuses_numbers_outside_the_video(videos):
    assert decode_frames(videos / "bframes.mp4", []) == []
    for index in (-1, 45, 1000):
        with pytest.raises(IndexError, match=f"frame {index} of a video"):
            decode_frames(videos / "bframes.mp4", [0, index])


def test_seeking_decodes_less(videos, monkeypatch):
    converted = []
    start = by_number._from_start
    monkeypatch.setattr(by_number, "_from_start", lambda *_: converted.append(1) or start(*_))
    for name in ("bframes.mp4", "opengop.mkv", "vp9.webm", "intra.mkv", "uneven.mp4"):
        assert shown_number(decode_frames(videos / name, [44])[0]) == 44
    assert converted == []


@pytest.mark.parametrize("name", ALL)
def test_frames_taken_by_packets_are_those_of_decoding_everything(videos, name):
    for source in (videos / name, (videos / name).read_bytes()):
        assert_sampled_as_decoded(source, probe_video(source), list(iter_frames(source)))


def count_decoded(monkeypatch) -> list[int]:
    """Numbers of all frames that come out of a decoder."""
    decoded, received = [], by_number._Feed.received
    monkeypatch.setattr(by_number._Feed, "received", lambda *given: decoded.append(received(*given)) or decoded[-1])
    monkeypatch.setattr(by_number, "decoded_frames", lambda *_: pytest.fail("decoded from the beginning"))
    monkeypatch.setattr(by_number, "probe_video", lambda *_: pytest.fail("decoded everything"))
    return decoded


def long_video(path: Path) -> Path:
    """1200 frames, a key frame every 50, of which the decoder needs about half: the others are B-frames."""
    options = {"bf": "3", "g": "50", "x264-params": "b-pyramid=none:b-adapt=0:scenecut=0"}
    write_video(path, "libx264", options, frames=1200)
    return path


def test_a_few_frames_of_a_long_video_cost_little(tmp_path, monkeypatch):
    path, decoded = long_video(tmp_path / "v.mp4"), count_decoded(monkeypatch)
    numbers, frames = sample_frames(path, lambda timing: np.arange(8) * timing.num_frames // 8)
    assert [shown_number(frame) for frame in frames] == [number % 64 for number in numbers]
    assert len(decoded) < 60, "each is a key frame, but what is decoded to check the packets"
    decoded.clear()
    numbers, frames = sample_frames(path, lambda _: np.array([1199, 49, 77]))
    assert [shown_number(frame) for frame in frames] == [1199 % 64, 49, 77 % 64]
    assert len(decoded) < 24 + 0.4 * (50 + 28 + 50) and len(decoded) == len(set(decoded))


def test_a_long_video_is_read_in_parts_that_share_no_frame(tmp_path, monkeypatch):
    path, decoded = long_video(tmp_path / "v.mp4"), count_decoded(monkeypatch)
    monkeypatch.setattr(by_number, "_PART_FRAMES", 100)
    video = LongVideo(path)
    parts = video.parts(range(0, 1200, 7))
    assert len(parts) >= 8 and [number for part in parts for number in part] == list(range(0, 1200, 7))
    shown = {number: shown_number(frame) for part in reversed(parts) for number, frame in video.read(part)}
    assert shown == {number: number % 64 for number in range(0, 1200, 7)}
    assert len(decoded) == len(set(decoded)) < 1000
    assert video.parts([]) == []


def test_where_the_decoder_contradicts_the_packets_all_is_decoded(videos, monkeypatch):
    """As with files whose packets lie; the numbers are chosen anew."""
    table = PacketTable.read

    def one_more(*given):
        found = table(*given)
        timing = Timing(found.timing.duration, np.append(found.timing.times_N, 9.0))
        return PacketTable([found.pts[0], found.pts[0] + 1, *found.pts[1:]], found.key_pts, False, timing)

    monkeypatch.setattr(PacketTable, "read", one_more)
    counts = []
    numbers, frames = sample_frames(
        videos / "bframes.mp4", lambda timing: counts.append(timing.num_frames) or np.array([timing.num_frames - 1, 3])
    )
    assert counts[0] == 46 and counts[-1] == 45
    assert numbers.tolist() == [44, 3] and [shown_number(frame) for frame in frames] == [44, 3]
    with pytest.raises(PacketsError):
        list(LongVideo(videos / "bframes.mp4").read([3]))


@pytest.mark.parametrize("data", [b"", b"no video at all" * 99, b"#EXTM3U\nfile:///etc/passwd\n"])
def test_no_video(tmp_path, data):
    (tmp_path / "a.mp4").write_bytes(data)
    for action in (probe_video, lambda path: list(iter_frames(path)), lambda path: decode_frames(path, [0])):
        with pytest.raises(VideoError, match=r"does not decode|no video"):
            action(tmp_path / "a.mp4")


def test_damaged_videos_raise_only_video_errors(videos):
    data = (videos / "bframes.mp4").read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data[: rng.integers(1, len(data))] if rng.random() < 0.3 else data)
        for position in rng.integers(0, len(damaged), rng.integers(1, 30)):
            damaged[position] = rng.integers(256)
        try:
            info = probe_video(bytes(damaged))
            assert len(decode_frames(bytes(damaged), range(info.num_frames), num_frames=info.num_frames)) > 0
            assert len(sample_frames(bytes(damaged), lambda timing: np.arange(timing.num_frames))[1]) > 0
        except VideoError:
            pass


def test_rotation_is_applied(videos, tmp_path):
    """Phones write a rotation into the track header; here a quarter turn is written by hand."""
    data = bytearray((videos / "onekey.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 0x10000
    turn = [0, one, 0, -one, 0, 0, one * 64, 0, 0x40000000]
    data[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turn)
    upright, turned = next(iter_frames(videos / "onekey.mp4")), next(iter_frames(bytes(data)))
    assert (probe_video(bytes(data)).width, probe_video(bytes(data)).height) == (64, 96)
    assert np.array_equal(turned, np.rot90(upright, -1))


def test_frames_at_rate_takes_what_is_on_the_screen():
    times = np.arange(30) / 10
    assert frames_at_rate(times, 3.0, 10).tolist() == list(range(30))
    assert frames_at_rate(times, 3.0, 5).tolist() == list(range(0, 30, 2))
    assert frames_at_rate(times, 3.0, 20)[:6].tolist() == [0, 0, 1, 1, 2, 2]
    assert frames_at_rate(times, 3.0, 4)[:5].tolist() == [0, 2, 5, 7, 10]
    assert frames_at_rate(times, 3.0, 0.001).tolist() == [0]
    for fps in (1, 3, 7.5, 24, 29.97):
        numbers = frames_at_rate(times, 3.0, fps)
        wanted = np.arange(len(numbers)) / fps
        assert ((times[numbers] <= wanted + 1e-6) & (wanted < times[numbers] + 0.1 + 1e-6)).all()
        assert abs(len(numbers) - 3.0 * fps) <= 0.5


def build(videos: Path, output: Path, **options):
    annotations = parse_annotations(videos / "list.txt")
    labels = ["run", "jump", "sit"]
    return build_shards(annotations, root=videos, labels=labels, output=output, workers=2, **options)


def stored(output: Path):
    """Name, row, JSON and members' bytes of each video."""
    manifest = read_local_manifest(output)
    index = open_index(str(output), manifest, {role: output / entry["file"] for role, entry in manifest.index.items()})
    with tarfile.open(output / "000000.tar") as archive:
        files = {member.name: archive.extractfile(member).read() for member in archive}
    for video, row in enumerate(index.videos):
        members = [data for name, data in files.items() if name.startswith(f"{video:09d}.") and "json" not in name]
        yield index.name(video), row, json.loads(files[f"{video:09d}.json"]), members


def test_store_video_keeps_the_files(videos, tmp_path):
    manifest = build(videos, tmp_path / "data", store="video")
    assert (manifest.content, manifest.num_members) == ("video", len(ALL))
    for name, row, text, members in stored(tmp_path / "data"):
        assert members == [(videos / name).read_bytes()]
        assert (row["num_frames"], row["num_members"]) == (45, 1)
        assert (text["num_frames"], text["width"], text["height"]) == (45, 96, 64)
        assert text["fps"] == pytest.approx(15, abs=0.6)
    assert check_datasets([tmp_path / "data"], deep=True).sound


def test_store_frames_decodes_and_resamples(videos, tmp_path):
    build(videos, tmp_path / "all", quality=95)
    build(videos, tmp_path / "some", fps=5, short_side=32, max_frames=10)
    for _, row, _, members in stored(tmp_path / "all"):
        assert row["num_frames"] == 45
        assert [shown_number(np.asarray(Image.open(io_of(data)))) for data in members] == list(range(45))
    for name, row, text, members in stored(tmp_path / "some"):
        assert row["num_frames"] == len(members) == 10
        assert text["source"]["frames"] == 45
        assert (text["width"], text["height"], text["fps"]) == (48, 32, 5)
        if not name.endswith(".avi") and name != "uneven.mp4":  # these know no true times, or others
            numbers = [shown_number(np.asarray(Image.open(io_of(data)).resize((96, 64)))) for data in members]
            expected = frames_at_rate(np.arange(45) / 15, 3.0, 5)[[0, 2, 3, 5, 6, 8, 9, 11, 12, 14]]
            assert numbers == expected.tolist()
    assert check_datasets([tmp_path / "some"], deep=True).sound


def io_of(data: bytes):
    import io

    return io.BytesIO(data)


def test_reading_videos_loses_no_memory(tmp_path, caplog):
    """PyAV loses 150 bytes and more of packets that are left early and not closed, and its options for the streams of
    files that it cannot open, which had 5 kB."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("needs glibc 2.33")
    fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    libc.mallinfo2.restype = type(
        "Info", (ctypes.Structure,), {"_fields_": [(n, ctypes.c_size_t) for n in fields.split()]}
    )
    write_video(tmp_path / "v.mp4", "mpeg4", {"g": "4"}, frames=8)
    write_video(tmp_path / "v.mkv", "libx264", {}, frames=8)
    content = bytearray((tmp_path / "v.mkv").read_bytes())
    width = content.index(b"\xb0\x81")  # the first element of the track's picture settings
    content[width - 1 : width + 1] = b"\0\1"  # their size; then what follows is not found
    (tmp_path / "v.mkv").write_bytes(content)

    def sample(path: Path) -> None:
        sample_frames(path, lambda timing: np.array([0, timing.num_frames // 2]))

    def fail(path: Path) -> None:
        with pytest.raises(VideoError, match="it does not decode"):
            sample(path)

    def used(look, path: Path, times: int) -> int:
        for _ in range(times):
            look(path)
        gc.collect()
        return libc.mallinfo2().uordblks

    caplog.set_level(logging.CRITICAL, "libav")  # torchvision may have them logged, and pytest keeps all that is logged
    for look, path in ((sample, tmp_path / "v.mp4"), (fail, tmp_path / "v.mkv")):
        before = used(look, path, 100)
        assert used(look, path, 500) - before < 200 * 500


def test_bad_videos_are_named(videos, tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    (root / "bad.mp4").write_bytes((videos / "onekey.mp4").read_bytes()[:900])
    (root / "good.mp4").write_bytes((videos / "onekey.mp4").read_bytes())
    (root / "song.mpg").write_bytes(b"\0" * 999)
    (root / "folder").mkdir()
    (root / "folder" / "img_00001.jpg").write_bytes(jpeg(0))
    for lines, store, words in [
        ("good.mp4 0\nbad.mp4 0", "frames", r"list\.txt:2: '.*bad\.mp4': it does not decode"),
        ("good.mp4 0\nbad.mp4 0", "video", r"list\.txt:2: '.*bad\.mp4': it does not decode"),
        ("gone.mp4 0", "frames", r"list\.txt:1: '.*gone\.mp4': no such file"),
        ("gone.mp4 0", "video", r"list\.txt:1: '.*gone\.mp4': no such file"),
        ("song.mpg 0", "frames", r"list\.txt:1: '.*song\.mpg': it"),
        ("folder 1 0", "video", r"list\.txt:1: '.*folder': a folder of frames cannot be stored as video"),
    ]:
        (tmp_path / "list.txt").write_text(lines)
        annotations = parse_annotations(tmp_path / "list.txt")
        settings = {"root": root, "labels": ["run"], "store": store, "list_name": tmp_path / "list.txt"}
        with pytest.raises(ShardError, match=words):
            build_shards(annotations, output=tmp_path / "failed", **settings)
        if len(annotations) > 1:
            skipping = build_shards(annotations, output=tmp_path / f"skip-{store}", on_error="skip", **settings)
            assert [entry["name"] for entry in skipping.skipped] == ["bad.mp4"]


def test_extract_then_build(videos, tmp_path):
    annotations = parse_annotations(videos / "list.txt")
    clash = [item for item in annotations if item.name != "h264.avi"]
    frames = extract_frames(clash, root=videos, output=tmp_path / "out", short_side=32, fps=5, workers=2)
    listed = parse_annotations(tmp_path / "out" / "annotations.txt")
    assert frames == sum(item.num_frames for item in listed)
    assert [(item.name, item.label) for item in listed] == [(a.name.rsplit(".", 1)[0], a.label) for a in clash]
    assert {item.num_frames for item in listed} <= {15, 16}
    build_shards(listed, root=tmp_path / "out", labels=["run", "jump", "sit"], output=tmp_path / "data")
    assert check_datasets([tmp_path / "data"], deep=True).sound
    with pytest.raises(ShardError, match="other settings"):
        extract_frames(clash, root=videos, output=tmp_path / "out", short_side=48, fps=5)
    with pytest.raises(ShardError, match="holds other files"):
        extract_frames(clash, root=videos, output=videos)


def extract_command(videos: Path, listed: Path, output: Path) -> list[str]:
    return [sys.executable, str(EXTRACT), "--videos", str(listed), "--root", str(videos), "--output", str(output)]


def test_extract_survives_kills(videos, tmp_path):
    root = tmp_path / "many"
    root.mkdir()
    names = [f"v{number:02d}.mp4" for number in range(20)]
    for name in names:
        (root / name).write_bytes((videos / "bframes.mp4").read_bytes())
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{name} 0\n" for name in names))
    output = tmp_path / "out"
    for _ in range(3):
        process = subprocess.Popen(extract_command(root, listed, output), stdout=subprocess.DEVNULL)
        while process.poll() is None and not (output / ".extracting").exists():
            time.sleep(0.001)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for folder in output.glob("v*"):
            assert len(list(folder.iterdir())) == 45
    (output / ".annotations.txt.1.part").touch()  # left by a kill at the very end
    subprocess.run(extract_command(root, listed, output), check=True, capture_output=True)
    assert (output / "annotations.txt").read_text() == "".join(f"{name[:-4]} 45 0\n" for name in names)
    assert sorted(path.name for path in output.iterdir()) == sorted(
        [*(name[:-4] for name in names), "annotations.txt", "extraction.json"]
    )


def test_extract_names_what_is_wrong(videos, tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    (tmp_path / "list.txt").write_text("bad.mp4 0")
    result = subprocess.run(
        extract_command(tmp_path, tmp_path / "list.txt", tmp_path / "out"), capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"extract_frames: error: {tmp_path}/list.txt:1: '{tmp_path}/bad.mp4': it does not")
    (tmp_path / "list.txt").write_text("a.mp4 0\na.avi 1")
    with pytest.raises(ShardError, match=r"'a\.avi' and 'a\.mp4' \(line 1\) would both"):
        extract_frames(parse_annotations(tmp_path / "list.txt"), root=tmp_path, output=tmp_path / "out")
    (tmp_path / "list.txt").write_text("folder 3 0")
    with pytest.raises(ShardError, match="is a folder of frames"):
        extract_frames(parse_annotations(tmp_path / "list.txt"), root=tmp_path, output=tmp_path / "out")
