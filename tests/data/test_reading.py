"""Reading a batch's plan: the stored bytes of the planned frames, compared with the index before they are decoded."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from batches import build, settings
from frame_folders import jpeg, make_frame_folders

from shards.format import SampleError
from text4vis.data.loader import build_loader
from text4vis.data.reading import PlanReader


@contextmanager
def reader(folder, **data):
    """A data set and its reader."""
    with build_loader(settings(folder, **data), "val") as loader, ThreadPoolExecutor(1) as thread:
        yield loader.dataset, PlanReader(loader.dataset, loader.planner, thread)


def picked(*ids):
    return np.array(ids), np.zeros(len(ids), np.int64)


def test_the_bytes_are_those_of_the_planned_frames(tmp_path):
    folders = make_frame_folders(tmp_path, [3, 9])
    with reader(build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")) as (dataset, reading):
        videos = reading.read(picked(1, 0))
        assert reading.finish(reading.start(reading.begin(picked(1, 0)))) == videos
        assert [video.plan.sample for video in videos] == [1, 0]
        files = {dataset.name(video.plan.sample): video.files for video in videos}
    assert files[folders.names[0]] == [jpeg(number) for number in range(3)]  # of four segments: one frame is read once
    assert files[folders.names[1]] == [jpeg(3 + number) for number in (0, 2, 4, 6)]
    assert not any(video.is_stored_video for video in videos)


def test_a_stored_video_has_one_file(stored_videos):
    with reader(stored_videos / "shards") as (dataset, reading):
        for video in reading.read(picked(2, 0, 1)):
            assert video.is_stored_video and len(video.plan.frames) == 4
            assert video.files == [(stored_videos / dataset.name(video.plan.sample)).read_bytes()]


@pytest.mark.parametrize(
    ("column", "message"),
    [("height", r"frame 2 is 48x32 pixels, the index says 48x31; the index is damaged"), ("size", "does not decode")],
)
def test_what_is_not_as_the_index_says_is_named(tmp_path, column, message):
    folders = make_frame_folders(tmp_path, [4, 4])
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    index = folder / json.loads((folder / "manifest.json").read_text())["index"]["members"]["file"]
    rows = np.load(index)
    rows[column][6] = 31  # frame 2 of the second video; 31 bytes end before the size of a JPEG is told
    np.save(index, rows)
    with reader(folder, verify=False) as (dataset, reading):
        assert len(reading.read(picked(0))) == 1
        for read in (reading.read, lambda batch: reading.finish(reading.start(reading.begin(batch)))):
            with pytest.raises(SampleError, match=message) as error:
                read(picked(0, 1))
            assert dataset.describe(1) in str(error.value) and "frame 2" in str(error.value)
