"""Decoded images: exactly the planned frames of stored videos, and errors that name what does not decode."""

import io
import itertools
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
from batches import build, settings, take
from frame_folders import make_frame_folders
from PIL import Image

from shards.format import SampleError, ShardError
from text4vis.data import decoding
from text4vis.data.decoding import CpuDecoder
from text4vis.data.loader import build_loader
from text4vis.data.reading import PlanReader
from text4vis.data.sampling import test_indices as clip_indices


def test_stored_videos_give_exactly_the_planned_frames(stored_videos):
    config = settings(stored_videos / "shards", test_clips=2, test_crops=3, input_size=72, scale_size=72, batch_size=12)
    with build_loader(config, "val") as loader:
        seen = [(int(i), frames) for batch in loader for i, frames in zip(batch.ids, batch.frames, strict=True)]
        names = [loader.dataset.name(i) for i, _ in seen]
        counts = [int(loader.dataset.num_frames[i]) for i, _ in seen]
    assert sorted(names) == [f"clip {n}.mp4" for n in range(3)] and sorted(counts) == [20, 21, 22]
    for name, count, (_, frames) in zip(names, counts, seen, strict=True):
        with av.open(str(stored_videos / name)) as file:
            decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        for position, number in enumerate(clip_indices(count, 4, 2)):
            for c, left in enumerate((0, 24, 12)):
                view = frames[position // 4 * 3 + c, position % 4].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(view, decoded[number][:, left : left + 72])


def test_frames_and_videos_can_be_joined(shards, stored_videos, tmp_path):
    """A batch that mixes both kinds is what the two alone would give."""
    folders = make_frame_folders(tmp_path, [4, 5])
    names = tmp_path / "abc.csv"
    names.write_text("id,name\n0,a\n1,b\n2,c\n")
    frames = build(folders.annotations, folders.root, names, tmp_path / "shards")
    videos = stored_videos / "shards"
    both = list(itertools.chain(*take(settings(frames, val=[str(frames), str(videos)], batch_size=5), "val")))
    apart = [video for folder in (frames, videos) for batch in take(settings(folder), "val") for video in batch]
    assert [video[1:] for video in both] == [video[1:] for video in apart]


def test_a_frame_that_does_not_decode_is_named(tmp_path):
    """A PNG whose compressed pixels are spoilt passes every check but decoding."""
    folders = make_frame_folders(tmp_path, [3, 3])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    spoilt = bytearray(stream.getvalue())
    spoilt[200:260] = bytes(60)
    bad = folders.root / folders.names[1] / "img_00002.jpg"
    bad.write_bytes(spoilt)
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    with build_loader(settings(folder), "val") as loader, pytest.raises(ShardError) as error:
        list(loader)
    assert folders.names[1] in str(error.value) and "frame 1 does not decode" in str(error.value)


def test_two_batches_are_decoded_at_once_and_come_out_in_order(shards, stored_videos, monkeypatch):
    """As the loader does it: the second batch is started before the first is finished; each takes several runs."""
    monkeypatch.setattr(decoding, "FRAMES_A_THREAD", 3)
    for folder in (shards, stored_videos / "shards"):
        with build_loader(settings(folder), "train") as loader, ThreadPoolExecutor(2) as threads:
            reader = PlanReader(loader.dataset, loader.planner, threads)
            batches = [reader.read(picked) for picked in itertools.islice(loader.planner.batches(), 2)]
            decoder = CpuDecoder(loader.dataset, threads, num_threads=1)
            decoded = [decoder.finish(run) for run in [decoder.start(videos) for videos in batches]]
            for videos, images in zip(batches, decoded, strict=True):
                assert [plan for plan, _ in images] == [video.plan for video in videos]
                alone = CpuDecoder(loader.dataset, threads, num_threads=1)
                for video, (plan, ours) in zip(videos, images, strict=True):
                    assert [image.shape for image in ours] == [(*f.geometry.region[2:], 3) for f in plan.frames]
                    ((_, expected),) = alone.finish(alone.start([video]))
                    for mine, theirs in zip(ours, expected, strict=True):
                        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("bad", [0, 1, 3])
def test_a_batch_that_fails_leaves_the_next_one_whole(shards, monkeypatch, bad):
    """Runs of a batch behind the one that failed wait in the same graph as those of the next batch."""
    monkeypatch.setattr(decoding, "FRAMES_A_THREAD", 3)
    with build_loader(settings(shards, batch_size=4), "train") as loader, ThreadPoolExecutor(1) as threads:
        reader = PlanReader(loader.dataset, loader.planner, threads)
        first, second = (reader.read(picked) for picked in itertools.islice(loader.planner.batches(), 2))
        file = first[bad].files[0]
        first[bad].files[0] = file[:2] + bytes(len(file) - 2)
        decoder = CpuDecoder(loader.dataset, threads, num_threads=1)
        runs = [decoder.start(videos) for videos in (first, second)]
        with pytest.raises(SampleError, match="does not decode"):
            decoder.finish(runs[0])
        after = [image for _, images in decoder.finish(runs[1]) for image in images]
        again = decoder.finish(decoder.start(second))
        for image, expected in zip(after, [image for _, images in again for image in images], strict=True):
            np.testing.assert_array_equal(image, expected)
