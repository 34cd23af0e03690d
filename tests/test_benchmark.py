"""The benchmark tool runs on a tiny data set and reports what it promises; its alternatives do what they stand for."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shards.format import ShardError
from shards.reader import open_dataset
from text4vis.benchmarks import contenders
from text4vis.benchmarks.contenders import Setup
from text4vis.benchmarks.data import make_workload, multiplied, open_workload
from text4vis.benchmarks.figures import Figure, against, compared, interleaved, machine
from text4vis.pipeline import build_loader

TOOL = Path(__file__).resolve().parent.parent / "tools" / "benchmark.py"
TINY = "--videos 4 --frames-per-video 10 --runs 1 --seconds 0.05 --batch-size 2 --index-videos 300 --index-frames 12"
FIGURES = {"loader": 5, "views": 2, "read": 4, "build": 3, "open": 2, "order": 2, "position": 2}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def workload(work):
    return make_workload(work, num_videos=4, num_frames=10, clips=None)


@pytest.mark.slow
def test_every_benchmark_reports_its_figures(work, workload, tmp_path):
    arguments = ["all", "--work", work, *TINY.split(), "--order-samples", 1000, "--json", tmp_path / "out.json"]
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {"machine", "arguments", "figures"}
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["machine"]["packages"]
    names = [figure["benchmark"] for figure in report["figures"]]
    assert {name: names.count(name) for name in names} == FIGURES
    for figure in report["figures"]:
        assert len(figure["values"]) == 1
        assert figure["min"] == figure["median"] == figure["max"] > 0
        assert figure["what"] in done.stdout
    # Of all figures these alone follow from the program and not from the machine.
    ours, whole = (figure for figure in report["figures"] if figure["unit"] == "kB/sample")
    assert 1 <= ours["ratio"] < 1.05 < whole["ratio"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("order --shards somewhere", "--shards and --frames go together"),
        ("order --runs 0", "--runs: expected at least 1, got 0"),
        ("step", "invalid choice: 'step'"),
    ],
)
def test_wrong_usage_is_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert message in capsys.readouterr().err


def test_bad_data_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *f"order --shards {tmp_path} --frames {tmp_path}".split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 1
    assert f"benchmark: error: {tmp_path}/manifest.json: not found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contender", "shape", "dtype"),
    [
        (contenders.ours_train, (2, 1, 8, 3, 224, 224), torch.uint8),
        (contenders.original_train, (2, 8 * 3, 224, 224), torch.float32),
        (contenders.webdataset_train, (2, 8, 3, 224, 224), torch.uint8),
        (contenders.tensor_train, (2, 8, 3, 224, 224), torch.uint8),
        (contenders.ours_views, (1, 12, 8, 3, 224, 224), torch.uint8),
        (contenders.original_views, (1, 12 * 8 * 3, 224, 224), torch.float32),
    ],
)
def test_contenders_give_batches_of_one_kind(workload, contender, shape, dtype):
    with contender(Setup(workload, batch_size=2, workers=1)) as batches:
        for _ in range(2 + len(workload.videos)):  # on into the next epoch
            batch = next(batches)
            assert tuple(batch.shape) == shape
            assert batch.dtype == dtype


def test_the_ceiling_counts_videos(workload):
    with contenders.decode_only(Setup(workload, batch_size=3, workers=1)) as batches:
        assert [len(next(batches)) for _ in range(20)] == [3] * 20


def test_the_alternatives_show_the_frames_that_our_loader_shows(workload):
    """The same regions of the same frames, up to the way of resizing."""
    setup = Setup(workload, batch_size=1, workers=1)
    mean, std = (np.array(values)[:, None, None] for values in (contenders._MEAN, contenders._STD))
    original = contenders.OriginalTrain(workload, setup.train)
    tensors = contenders.TensorTrain(workload, setup.train)
    with build_loader(setup.train, "train") as loader:
        for batch, _ in zip(loader, workload.videos, strict=False):
            video = int(batch.ids[0])
            ours_TCHW = batch.frames[0, 0].numpy().astype(float)
            theirs_TCHW = (original[video].numpy().reshape(8, 3, 224, 224) * std + mean) * 255
            assert np.abs(ours_TCHW - theirs_TCHW).mean() < 6
            assert np.abs(ours_TCHW - tensors[video].numpy()).mean() < 3


def test_a_multiplied_index_reads_the_stored_frames(workload, work):
    large = multiplied(workload.shards, work, num_videos=50, num_frames=25)
    assert multiplied(workload.shards, work, num_videos=50, num_frames=25) == large
    stored = {path.read_bytes() for path in workload.root.rglob("*.jpg")}
    with open_dataset(str(large)) as dataset:
        assert len(dataset) == 50
        assert set(dataset.num_frames.tolist()) == {25}
        assert all(data in stored for video in (0, 23, 49) for data in dataset.read(video, np.arange(25)))


def test_a_workload_knows_its_folders(workload, work, tmp_path):
    assert open_workload(workload.shards, workload.root) == workload
    assert make_workload(work, num_videos=4, num_frames=10, clips=None) == workload
    with pytest.raises(ShardError, match=r"give the folder that .* was built from as --frames"):
        open_workload(workload.shards, tmp_path)
    with pytest.raises(ShardError, match="holds no video files"):
        make_workload(work, num_videos=4, num_frames=10, clips=tmp_path)


def test_contenders_take_turns():
    turns = []
    values = interleaved("x", {name: lambda name=name: turns.append(name) or len(turns) for name in "ab"}, 3)
    assert turns == ["a", "b"] * 3
    assert values == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_ratios_are_taken_round_by_round():
    ours, other = compared(
        "x", "videos/s", {"ours": [4.0, 20.0, 6.0], "other": [2.0, 4.0, 3.0]}, {"other": "at least 1"}
    )
    assert ours.ratio is None
    assert other.ratios == against(ours.values, other.values) == [2, 5, 2]
    assert (other.ratio, other.median, other.target) == (2, 3, "at least 1")
    assert Figure("x", "y", "s", [1.0]).to_dict()["ratio"] is None


def test_the_machine_is_described_without_its_name():
    description = machine()
    assert {"date", "processor", "cores", "memory_GB", "python", "packages"} <= set(description)
    assert not {"host", "hostname", "node"} & set(description)
