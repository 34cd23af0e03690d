"""Stored videos in parts: the same frames as from the whole file, for the bytes of their packets."""

from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from shard_data import serve
from videos import encode, pictures

import shards.opening
import shards.stored
from shards.annotations import parse_annotations
from shards.checker import check_datasets
from shards.format import FORMAT_VERSION, KEY_PACKET, PACKETS_VERSION, SampleError
from shards.frames import decode_frames
from shards.index import Index, read_local_manifest
from shards.packets import NO_PACKETS, SparseVideo
from shards.reader import open_dataset
from shards.sources import SourceOptions
from shards.stored import decode_stored
from shards.video import VideoError, probe_video
from shards.writer import build_shards

COUNT = 120


def noisy(count: int = COUNT) -> list[np.ndarray]:
    """Pictures (64, 96, 3) that take some bytes, as real ones do. Smaller ones break x265."""
    rng = np.random.default_rng(0)
    return [
        np.clip(image + rng.normal(0, 12, image.shape), 0, 255).astype(np.uint8) for image in pictures(count, 96, 64)
    ]


def with_sound(source: Path, path: Path) -> Path:
    """The video with a sound track, whose packets lie between those of the video."""
    with av.open(str(source)) as given, av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video, sound = (
            container.add_stream_from_template(given.streams.video[0]),
            container.add_stream("aac", rate=8000),
        )
        packets = [packet for packet in given.demux(video=0) if packet.size]
        for number, packet in enumerate(packets):
            packet.stream = video
            container.mux(packet)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 400), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 8000, 400 * number
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return path


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    folder, images = tmp_path_factory.mktemp("videos"), noisy()
    options = {"g": "12", "bf": "3", "x264-params": "b-pyramid=normal"}
    encode(folder / "bframes.mp4", images=images, options=options)
    encode(folder / "turned.mp4", images=images, options={"g": "12"}, matrix=(0, 1, -1, 0))
    encode(folder / "opengop.mp4", images=images, options={**options, "x264-params": "open-gop=1"})
    encode(folder / "hevc.mp4", "libx265", images=images, options={"x265-params": "log-level=none:keyint=12:crf=15"})
    times = np.arange(COUNT) / 20 + np.arange(COUNT) % 3 / 90
    encode(folder / "uneven.mp4", images=images, options=options, times=times)
    encode(folder / "onekey.mp4", images=images, options={"g": "1000", "bf": "2"})
    encode(folder / "whole.mkv", images=images, options=options)
    with_sound(folder / "bframes.mp4", folder / "sound.mp4")
    (folder / "list.txt").write_text("".join(f"{path.name} 0\n" for path in sorted(folder.glob("*.m*"))))
    (folder / "few.txt").write_text("turned.mp4 0\nuneven.mp4 0\nwhole.mkv 0\n")
    return folder


def build(videos: Path, output: Path, list_name: str = "list.txt", **options):
    listed = parse_annotations(videos / list_name)
    return build_shards(listed, root=videos, labels=["a"], output=output, store="video", **options)


@pytest.fixture(scope="module")
def stored(videos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("served") / "data"
    build(videos, output)
    return output


def in_parts(dataset, sample: int, numbers: np.ndarray) -> bytes:
    ((data,),) = dataset.start([(sample, numbers)], in_parts=True).result()
    return data


def num_bytes_read(data: bytes) -> int:
    """Bytes of the file that are there: those of packets that are not are zeros."""
    return int(np.count_nonzero(np.frombuffer(data, np.uint8)))


def test_frames_from_parts_are_those_of_the_file(videos, stored):
    assert read_local_manifest(stored).version == PACKETS_VERSION and check_datasets([stored], deep=True).sound
    rng = np.random.default_rng(0)
    sparse = set()
    with open_dataset(str(stored)) as dataset:
        for sample in range(len(dataset)):
            name = dataset.name(sample)
            whole = dataset.read_video(sample)
            assert whole == (videos / name).read_bytes() and not isinstance(whole, SparseVideo)
            frames = decode_frames(whole, np.arange(COUNT), num_frames=COUNT)
            requests = [[0], [COUNT - 1], [11, 12], [14, 12, 13], range(COUNT)]
            requests += [np.sort(rng.choice(COUNT, size, replace=False)) for size in (1, 2, 3, 8, 8, 8)]
            for wanted in map(np.array, requests):
                data = in_parts(dataset, sample, wanted)
                assert len(data) == len(whole)
                if data != whole:
                    sparse.add(name)
                for number, frame in zip(wanted, decode_stored(data, wanted, num_frames=COUNT), strict=True):
                    np.testing.assert_array_equal(frame, frames[number], err_msg=f"{name}, frame {number} of {wanted}")
    assert sparse == {path.name for path in videos.glob("*.mp4")}


def test_a_video_read_in_parts_is_not_taken_for_a_whole_file(stored):
    """The bytes that were not read are zeros: a decoder that does not know may show wrong frames."""
    with open_dataset(str(stored)) as dataset:
        videos = (in_parts(dataset, sample, np.array([0])) for sample in range(len(dataset)))
        data = next(video for video in videos if isinstance(video, SparseVideo))
        with pytest.raises(TypeError, match="decode_stored"):
            decode_frames(data, [0], num_frames=COUNT)


def test_over_http_eight_frames_of_ten_seconds_cost_half_of_the_file(tmp_path, monkeypatch):
    """Rows of the index included, fetched as those of a large data set are."""
    monkeypatch.setattr(shards.opening, "WHOLE_TABLE_BYTES", 0)
    (tmp_path / "videos").mkdir()
    options = {"g": "16", "bf": "3"}
    path = encode(tmp_path / "videos" / "v.mp4", images=noisy(300), rate=30, options=options)
    (tmp_path / "videos" / "list.txt").write_text("v.mp4 0\n")
    build(tmp_path / "videos", tmp_path / "served" / "data")
    with serve(tmp_path / "served") as server:
        with open_dataset(f"{server.address}/data", cache_dir=tmp_path / "cache") as dataset:
            before, wanted = server.bytes_sent, np.arange(8) * 37 + 20
            data = in_parts(dataset, 0, wanted)
            assert server.bytes_sent - before <= 0.5 * path.stat().st_size
            assert num_bytes_read(data) <= server.bytes_sent - before
        for frame, expected in zip(
            decode_stored(data, wanted, num_frames=300), decode_frames(path, wanted, num_frames=300), strict=True
        ):
            np.testing.assert_array_equal(frame, expected)


def test_damage_is_found_in_what_is_read(videos, tmp_path):
    build(videos, tmp_path / "data")
    tar = tmp_path / "data" / "000000.tar"
    sound = tar.read_bytes()
    with open_dataset(str(tmp_path / "data")) as dataset:
        sample = next(n for n in range(len(dataset)) if dataset.name(n) == "bframes.mp4")
        data, needed = dataset.read_video(sample), in_parts(dataset, sample, np.array([60]))
    start, there = sound.index(data), np.frombuffer(needed, np.uint8) != 0
    used, unused = np.flatnonzero(there), np.flatnonzero(~there & (np.frombuffer(data, np.uint8) != 0))
    for place, is_seen in ((used[5], True), (used[len(used) // 2], True), (used[-1], True), (unused[200], False)):
        position = start + int(place)
        tar.write_bytes(sound[:position] + bytes([sound[position] ^ 1]) + sound[position + 1 :])
        with open_dataset(str(tmp_path / "data")) as dataset:
            if is_seen:
                with pytest.raises(
                    SampleError, match=r"bframes.mp4 \(sample .*bytes \d+ to \d+ .*CRC-32.*check_shards"
                ):
                    in_parts(dataset, sample, np.array([60]))
            else:
                assert in_parts(dataset, sample, np.array([60])) == needed
        assert not check_datasets([tmp_path / "data"]).sound


def test_a_data_set_without_packets_is_read_whole_and_can_grow(videos, tmp_path, monkeypatch):
    """Such as older programs wrote."""
    with monkeypatch.context() as patch:
        patch.setattr("shards.sources.probe_stored", lambda data: (probe_video(data), NO_PACKETS))
        build(videos, tmp_path / "data")
    assert read_local_manifest(tmp_path / "data").version == FORMAT_VERSION
    with open_dataset(str(tmp_path / "data")) as dataset:
        assert in_parts(dataset, 0, np.array([3])) == dataset.read_video(0)
    (videos / "again").mkdir(exist_ok=True)
    (videos / "again" / "b.mp4").write_bytes((videos / "bframes.mp4").read_bytes())
    more = tmp_path / "more.txt"
    more.write_text("again/b.mp4 0\n")
    options = {"root": videos, "labels": ["a"], "store": "video", "append": True}
    build_shards(parse_annotations(more), output=tmp_path / "data", **options)
    assert read_local_manifest(tmp_path / "data").version == PACKETS_VERSION
    with open_dataset(str(tmp_path / "data")) as dataset:
        assert in_parts(dataset, 0, np.array([3])) == dataset.read_video(0)
        assert in_parts(dataset, len(dataset) - 1, np.array([3])) != dataset.read_video(len(dataset) - 1)


@pytest.mark.parametrize(
    ("column", "row", "value"),
    [("offset", 5, 2**32 - 1), ("size", 119, 2**31), ("flags", 0, 0), ("flags", 3, 2), ("pts", 3, 0)],
)
def test_packets_that_cannot_be_are_named(stored, monkeypatch, column, row, value):
    """As an index from a stranger may have them, with checksums that fit."""
    with open_dataset(str(stored)) as dataset:
        sample = next(n for n in range(len(dataset)) if dataset.name(n) == "bframes.mp4")
        rows = dataset._parts[0].index.packet_rows(sample).copy()
        rows[column][row] = value
        monkeypatch.setattr(Index, "packet_rows", lambda *_: rows)
        with pytest.raises(SampleError, match=r"bframes.mp4 \(.*packets in the index cannot be .* 120 frames; copy"):
            in_parts(dataset, sample, np.array([60]))


@pytest.mark.parametrize("early", [-(1 << 63), -(1 << 63) + 5632])
def test_times_at_the_end_of_what_a_number_holds_are_refused(stored, early):
    """As an index from a stranger may have them: the first is FFmpeg's mark of no time, of the second sums overflow."""
    with open_dataset(str(stored)) as dataset:
        sample = next(n for n in range(len(dataset)) if dataset.name(n) == "bframes.mp4")
        rows = dataset._parts[0].index.packet_rows(sample).copy()
        rows["pts"][rows["pts"].argmin()] = early
        video = SparseVideo.of(dataset.read_video(sample), rows)
        with pytest.raises(VideoError, match="its packets are not those that the index describes"):
            decode_stored(video, [0], num_frames=COUNT)


def test_a_video_whose_packets_lie_is_not_listed(videos, monkeypatch):
    """The table must be that of the frames which decoding the whole file gives."""
    data, listed = (videos / "bframes.mp4").read_bytes(), shards.stored._listed
    assert shards.stored.probe_stored(data)[1].stream["num_packets"] == COUNT

    def late(data: bytes):
        table, packets = listed(data)
        return shards.stored.PacketTable([pts + 1 for pts in table.pts], table.key_pts, False, table.timing), packets

    monkeypatch.setattr(shards.stored, "_listed", late)
    assert shards.stored.probe_stored(data)[1] is NO_PACKETS


@pytest.mark.parametrize(
    "fault", [np.zeros((64, 96, 3), np.uint8), VideoError("cannot be decoded")], ids=["black", "error"]
)
def test_a_video_whose_parts_show_something_else_is_not_listed(videos, monkeypatch, fault):
    """Its first frame, its last and one between them are decoded from their parts too."""
    data, decode, compared = (videos / "bframes.mp4").read_bytes(), shards.stored.decode_stored, []

    def decode_but(number: int):
        def decoded(sparse: bytes, numbers: list[int], *, num_frames: int) -> list[np.ndarray]:
            compared.append(*numbers)
            if numbers != [number]:
                return decode(sparse, numbers, num_frames=num_frames)
            if isinstance(fault, VideoError):
                raise fault
            return [fault]

        return decoded

    monkeypatch.setattr(shards.stored, "decode_stored", decode_but(-1))
    assert shards.stored.probe_stored(data)[1] is not NO_PACKETS
    assert len(compared) == 3 and compared[0] == 0 < compared[1] < compared[2] == COUNT - 1
    for number in compared[:]:
        monkeypatch.setattr(shards.stored, "decode_stored", decode_but(number))
        info, packets = shards.stored.probe_stored(data)
        assert packets is NO_PACKETS and info.num_frames == COUNT


def test_gop_encodes_anew_what_shows_the_same(videos, tmp_path):
    """Upright, at the same times, and small enough to be read in parts."""
    build(videos, tmp_path / "data", "few.txt", gop=8, short_side=48)
    build(videos, tmp_path / "again", "few.txt", gop=8, short_side=48, workers=1)
    assert (tmp_path / "data" / "000000.tar").read_bytes() == (tmp_path / "again" / "000000.tar").read_bytes()
    with open_dataset(str(tmp_path / "data")) as dataset:
        for sample in range(len(dataset)):
            given, data = probe_video(videos / dataset.name(sample)), dataset.read_video(sample)
            info = probe_video(data)
            np.testing.assert_allclose(info.times_N, given.times_N, atol=1e-4)
            is_turned = dataset.name(sample) == "turned.mp4"
            assert (info.width, info.height) == ((48, 72) if is_turned else (72, 48))
            frames = [decode_frames(one, [50])[0] for one in (data, videos / dataset.name(sample))]
            expected = np.asarray(
                Image.fromarray(frames[1]).resize((info.width, info.height), Image.Resampling.BICUBIC)
            )
            assert np.abs(frames[0].astype(int) - expected).mean() < 6
            keys = np.flatnonzero(shards.stored.probe_stored(data)[1].rows["flags"] & KEY_PACKET)
            assert keys[0] == 0 and np.diff([*keys, COUNT]).max() <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"store": "frames", "gop": 8}, "gop: frames are stored one by one"),
        ({"store": "video", "gop": 0}, "gop: expected 1 to 1000, got 0"),
        ({"store": "video", "short_side": 64}, "short_side: stored videos are kept as they are.* give gop too"),
        ({"store": "video", "gop": 8, "short_side": 64, "quality": 90}, "quality: stored videos keep their frames"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(ValueError, match=message):
        SourceOptions(**options)
