"""Data sets of almost nothing train and are evaluated; a rank that does not move ends the job."""

import math
import os
import signal

import pytest
from frame_folders import make_frame_folders
from launch import kill, wait_for
from project import last_line, losses, records

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards


@pytest.mark.slow
@pytest.mark.parametrize(
    ("videos", "classes", "ranks"), [(1, 1, 1), (3, 1, 2), (2, 2, 3)], ids=["one video", "one class", "more ranks"]
)
def test_the_smallest_data_sets_train(project, tmp_path, videos, classes, ranks):
    """Epochs smaller than a global batch of two videos a rank; ranks without a video to evaluate."""
    folders = make_frame_folders(tmp_path, [1 + number for number in range(videos)], num_classes=classes)
    annotations, names = parse_annotations(folders.annotations), parse_labels(folders.labels)
    build_shards(annotations, root=folders.root, labels=names, output=tmp_path / "shards")
    data = [f"data.train={tmp_path / 'shards'}", f"data.val={tmp_path / 'shards'}"]
    project.train(tmp_path / "run", *data, ranks=ranks)
    taken = losses(tmp_path / "run")
    assert list(taken) == list(range(1, math.ceil(3 * videos / (2 * ranks)) + 1))
    assert all(map(math.isfinite, taken.values()))
    evaluated = [record for record in records(tmp_path / "run") if record["kind"] == "val"]
    assert evaluated and {record["videos"] for record in evaluated} == {videos}


@pytest.mark.slow
def test_a_rank_that_is_stopped_ends_the_job(project, tmp_path):
    """It lives and holds its connections, but nothing comes from it."""
    output = tmp_path / "run"
    processes = project.start_with(output, "--slow 0.2", "engine.silence_seconds=5")
    try:
        wait_for(lambda: (output / "metrics.jsonl").exists() and len(records(output)) > 1, processes)
        os.kill(processes[1].pid, signal.SIGSTOP)
        assert processes[0].wait(timeout=60) == 1
        assert "rank 1 on host" in last_line(output) and "has been silent for 5 s" in last_line(output)
    finally:
        kill(processes)
