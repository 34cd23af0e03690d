"""Near-duplicates: a recording encoded anew, resized or cut pairs up; black, mirrored and other videos do not."""

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from shards.annotations import parse_annotations
from shards.checker import check_datasets
from shards.similar import FRAMES, VideoHashes, frame_hash, similar_pairs
from shards.writer import build_shards


def recording(seed: int, frames: int = 48) -> list[np.ndarray]:
    """A camera that moves over a picture of smooth shapes."""
    rng = np.random.default_rng(seed)
    wide = cv2.resize(rng.integers(0, 256, (7, 16, 3), np.uint8), (480, 160), interpolation=cv2.INTER_CUBIC)
    return [wide[20:140, 5 * number : 5 * number + 160] for number in range(frames)]


def write(path: Path, frames: list[np.ndarray], size: tuple[int, int] = (160, 120), crf: int = 18) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": str(crf)})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for frame in frames:
            small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(small, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("similar")
    still = [recording(7)[0]] * 48
    black = [np.zeros((120, 160, 3), np.uint8)] * 48
    train = {"a": recording(0), "b": recording(1), "c": recording(2), "still": still, "black": black, "d": recording(3)}
    for name, frames in train.items():
        write(root / f"train/{name}.mp4", frames)
    write(root / "val/a_again.mp4", recording(0), crf=38)
    write(root / "val/b_small.mp4", recording(1), (96, 72), 30)
    write(root / "val/c_cut.mp4", recording(2)[17:33], crf=32)
    write(root / "val/still_again.mp4", still, (112, 84), 35)
    write(root / "val/black_again.mp4", black, (112, 84), 35)
    write(root / "val/d_mirrored.mp4", [frame[:, ::-1] for frame in recording(3)])
    write(root / "val/other.mp4", recording(9))
    write(root / "val/two_frames_of_a.mp4", recording(0)[:2])
    for split in ("train", "val"):
        names = sorted(path.name for path in (root / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"{name} 0\n" for name in names))
    return root


@pytest.mark.parametrize("store", ["frames", "video"])
def test_the_same_recording_is_found_across_data_sets_and_nothing_else(folder, tmp_path, store):
    for split in ("train", "val"):
        annotations = parse_annotations(folder / f"{split}.txt")
        build_shards(annotations, root=folder / split, labels=["x"], output=tmp_path / split, store=store)
    report = check_datasets([tmp_path / "train", tmp_path / "val"], similar=True)
    pairs = {(line.split("'")[3], line.split("'")[1]) for line in report.similar}
    assert pairs == {
        ("a.mp4", "a_again.mp4"), ("b.mp4", "b_small.mp4"), ("c.mp4", "c_cut.mp4"), ("still.mp4", "still_again.mp4")
    }  # fmt: skip
    assert report.sound and "looks like" in report.similar[0] and str(tmp_path / "train") in report.similar[0]
    assert check_datasets([tmp_path / "train", tmp_path / "val"]).similar == []


def test_what_is_the_same_to_the_byte_is_a_leak_and_not_said_twice(folder, tmp_path):
    annotations = parse_annotations(folder / "train.txt")
    for name in ("one", "two"):
        build_shards(annotations[:2], root=folder / "train", labels=["x"], output=tmp_path / name)
    report = check_datasets([tmp_path / "one", tmp_path / "two"], similar=True)
    assert len(report.leaks) == 2 and report.similar == []


def test_a_missing_shard_is_a_problem_and_no_crash(folder, tmp_path):
    annotations = parse_annotations(folder / "train.txt")
    for name in ("one", "two"):
        build_shards(annotations[:2], root=folder / "train", labels=["x"], output=tmp_path / name)
    (tmp_path / "two" / "000000.tar").unlink()
    assert not check_datasets([tmp_path / "one", tmp_path / "two"], similar=True).sound


def looks(rng: np.random.Generator, count: int) -> VideoHashes:
    hashes = rng.integers(0, 2**64, (count, FRAMES), dtype=np.uint64)
    return VideoHashes(hashes, np.ones(hashes.shape, bool))


@pytest.mark.slow
def test_many_videos_with_a_common_title_take_seconds():
    rng = np.random.default_rng(0)
    train, val = looks(rng, 45_000), looks(rng, 5_000)
    train.hashes_NK[:, :4] = val.hashes_NK[:, :4] = np.uint64(12345)
    val.hashes_NK[:40, 4:] = train.hashes_NK[500:540, 4:] ^ np.uint64(0b1011)
    assert [(pair.first, pair.second) for pair in similar_pairs(train, val)] == [(500 + n, n) for n in range(40)]


@pytest.mark.parametrize(("share", "found"), [(0.8, 1), (0.5, 0)])
def test_three_quarters_of_one_must_match(share, found):
    rng = np.random.default_rng(1)
    train, val = looks(rng, 3), looks(rng, 3)
    same = round(share * FRAMES)
    val.hashes_NK[2, :same] = train.hashes_NK[1, :same]
    pairs = similar_pairs(train, val)
    assert [(pair.first, pair.second) for pair in pairs] == [(1, 2)][:found]
    assert all(pair.share == same / FRAMES for pair in pairs)


def test_hashes_of_frames():
    ramp = np.tile(np.arange(0, 180, 2, dtype=np.uint8), (80, 1))
    assert frame_hash(ramp) == (2**64 - 1, True) and frame_hash(np.ascontiguousarray(ramp[:, ::-1])) == (0, True)
    assert frame_hash(np.full((80, 90), 200, np.uint8)) == (0, False)
