"""The benchmark tool runs on a tiny data set and reports what it promises; its alternatives do what they stand for."""

import itertools
import json
import os
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from benchmarks import NAMES, contenders, engine, gpu, store
from benchmarks.data import make_workload, multiplied, open_workload
from benchmarks.engine import EngineSetup
from benchmarks.figures import Figure, against, compared, interleaved, machine, pss_of_tree, run_fresh
from benchmarks.lock_time import lock_time, preloaded
from benchmarks.peers import PEERS
from benchmarks.recipe import OpenCvFrames, Setup
from benchmarks.scale import scale
from benchmarks.suites import SUITES

from shards.format import ShardError
from shards.plan import Stream, rank_slice
from shards.reader import open_dataset
from text4vis.data.loader import build_loader

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark.py"
TINY = (
    "--videos 4 --frames-per-video 10 --runs 1 --seconds 0.05 --batch-size 2 --index-videos 300 --index-frames 12 "
    "--order-samples 1000 --step-videos 1 --ranks 2 --scale-videos 1000 --world-sizes 1 8 "
    "--predict-videos 4 --predict-minutes 0.2 --search-windows 3000"
)
NUM_PEERS = sum(peer.is_installed for peer in PEERS.values())
NUM_FAR_PEERS = sum(peer.is_installed and peer.epoch is not None for peer in PEERS.values())
FIGURES = {"loader": 3 * (4 + NUM_PEERS) + (NUM_PEERS > 0), "views": 2, "read": 4, "build": 3, "open": 2, "order": 2}
FIGURES |= {
    "position": 2,
    "remote": 49 + 10 * NUM_FAR_PEERS,
    "step": 4,
    "memory": 16,
    "resume": 7,
    "scale": 14,
    "predict": 6,
    "stored": 10,
    "search": 2,
    "lock": 9,
}
# Two blocks at 224 px, the size of the recipe that the benchmarks train.
SMALL_VIT = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 64, "head_width": 32, "patch_size": 56},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def workload(work):
    return make_workload(work, num_videos=4, num_frames=10, clips=None)


@pytest.fixture(scope="module")
def small_vit(work):
    path = work / "small.json"
    path.write_text(json.dumps(SMALL_VIT))
    return str(path)


LOCK_PROGRAM = """
import hashlib, json, sys, threading, time
sys.path.insert(0, sys.argv[1])
from benchmarks.lock_time import lock_time

def compute(used):
    begun = time.thread_time()
    while time.thread_time() - begun < 0.3:
        sum(range(1000))
    used.append(time.thread_time() - begun)

def hash_without_lock(used):
    begun = time.thread_time()
    while time.thread_time() - begun < 0.3:
        hashlib.sha256(bytes(8_000_000)).digest()

for work in (compute, hash_without_lock):
    used = []
    thread = threading.Thread(target=work, args=(used,))
    with lock_time() as held:
        thread.start()
        thread.join()
    print(json.dumps([held.seconds, held.takes, sum(used)]))
"""


def test_time_under_the_lock_is_that_of_python_alone(tmp_path):
    """A thread that computes in Python holds the lock all the time that it runs; one that hashes gives it back."""
    command = [sys.executable, "-c", LOCK_PROGRAM, str(TOOL.parent)]
    done = subprocess.run(command, env=preloaded(tmp_path), capture_output=True, text=True, check=True)
    (computing, _, used), (hashing, takes, _) = (json.loads(line) for line in done.stdout.splitlines())
    assert 0.9 * used < computing < 1.1 * used
    assert hashing < 0.15 and takes > 10  # the 8 MB are made under the lock


def test_time_under_the_lock_needs_the_library():
    with pytest.raises(OSError, match="was not started with the library"), lock_time():
        pass


def test_memory_of_a_process_counts_what_it_has_started():
    code = "import sys; block = bytearray(b'x' * 50_000_000); print('ready', flush=True); sys.stdin.read()"
    before = pss_of_tree(os.getpid())
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline()
        assert 50e6 < pss_of_tree(child.pid) < 90e6
        assert pss_of_tree(os.getpid()) > before + 40e6
        child.stdin.close()


def test_every_benchmark_has_a_name_for_the_command_line():
    assert tuple(SUITES) == NAMES


@pytest.mark.long
@pytest.mark.slow
def test_every_benchmark_reports_its_figures(work, workload, small_vit, tmp_path):
    arguments = ["all", "--work", work, *TINY.split(), "--model", small_vit, "--json", tmp_path / "out.json"]
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert set(report) == {"machine", "arguments", "figures"}
    assert report["machine"]["cores"] >= 1
    assert "torch" in report["machine"]["packages"]
    names = [figure["benchmark"] for figure in report["figures"]]
    assert {name: names.count(name) for name in names} == FIGURES
    for figure in report["figures"]:
        assert len(figure["values"]) == (engine.TURNS_A_ROUND if figure["benchmark"] == "step" else 1)
        assert (0 if "stalls" in figure["what"] else 1e-9) <= figure["min"] <= figure["median"] <= figure["max"]
        assert figure["what"] in done.stdout
    # Of all figures these alone follow from the program and not from the machine.
    ours, whole = (figure for figure in report["figures"] if figure["unit"] == "kB/sample")
    assert 1 <= ours["ratio"] < 1.05 < whole["ratio"]
    held = {figure["what"]: figure["ratio"] for figure in report["figures"] if figure["benchmark"] == "memory"}
    for stage, kind in itertools.product(engine.STAGES, ("parameters", "optimiser")):
        assert held[f"2 ranks, ZeRO {stage}: {kind} / formula"] == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("order --shards somewhere", "--shards and --frames go together"),
        ("order --runs 0", "--runs: expected at least 1, got 0"),
        ("steps", "invalid choice: 'steps'"),
        ("memory --ranks 2 0", "--ranks: expected at least 1, got 0"),
    ],
)
def test_wrong_usage_is_named(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments.split()])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOL), run_name="__main__")
    assert message in capsys.readouterr().err


def test_bad_data_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(TOOL), *f"loader --shards {tmp_path} --frames {tmp_path}".split()])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert stopped.value.code == 1
    assert f"benchmark: error: {tmp_path}/manifest.json: not found" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("contender", "shape", "dtype"),
    [
        (contenders.ours_train, (2, 1, 8, 3, 224, 224), torch.uint8),
        (contenders.original_train, (2, 8 * 3, 224, 224), torch.float32),
        (contenders.tensor_train, (2, 8, 3, 224, 224), torch.uint8),
        (contenders.ours_views, (1, 12, 8, 3, 224, 224), torch.uint8),
        (contenders.original_views, (1, 12 * 8 * 3, 224, 224), torch.float32),
    ],
)
def test_contenders_give_batches_of_one_kind(workload, contender, shape, dtype):
    """In a process of its own, as in a benchmark: some fork, which a process with threads may not survive."""
    setup = Setup(workload, batch_size=2, workers=1)
    assert run_fresh(_kinds_of_batches, contender, setup, 2 + len(workload.videos)) == {(shape, dtype)}


def _kinds_of_batches(contender, setup, count):
    with contender(setup) as batches:
        return {(tuple(batch.shape), batch.dtype) for batch in itertools.islice(batches, count)}


def test_the_ceiling_counts_videos(workload):
    with contenders.decode_only(Setup(workload, batch_size=3, workers=1)) as batches:
        assert [len(next(batches)) for _ in range(20)] == [3] * 20


def test_the_alternatives_show_the_frames_that_our_loader_shows(workload):
    """The same regions of the same frames, up to the way of resizing."""
    setup = Setup(workload, batch_size=1, workers=1)
    mean, std = (np.array(values)[:, None, None] for values in (contenders._MEAN, contenders._STD))
    original = contenders.OriginalTrain(workload, setup.train)
    tensors = contenders.TensorTrain(workload, setup.train)
    frames = OpenCvFrames(setup.train)
    with build_loader(setup.train, "train") as loader:
        for batch, _ in zip(loader, workload.videos, strict=False):
            video = int(batch.ids[0])
            ours_TCHW = batch.frames[0, 0].numpy().astype(float)
            theirs_TCHW = (original[video].numpy().reshape(8, 3, 224, 224) * std + mean) * 255
            assert np.abs(ours_TCHW - theirs_TCHW).mean() < 6
            assert np.abs(ours_TCHW - tensors[video].numpy()).mean() < 3
            files = [workload.frame(video, index).read_bytes() for index in range(workload.videos[video][1])]
            peers_TCHW = frames.sample(video, len(files), files.__getitem__).permute(0, 3, 1, 2).numpy()
            assert np.abs(ours_TCHW - peers_TCHW).mean() < 3


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


def test_activations_checkpointed_twice_change_no_gradient(workload, small_vit):
    config = engine.EngineSetup(workload.shards, small_vit, 1, "fp32").config(0)
    classes_CD = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    gradients, calls = [], []
    with build_loader(config, "train") as loader:
        batch = next(iter(loader))
        for twice in (False, True):
            loop = engine.BareLoop(config, batch, classes_CD, twice=twice)
            loop.optimizer.step = loop.optimizer.zero_grad = lambda: None
            mlp = loop.model.visual.transformer.resblocks[0].mlp
            mlp.register_forward_hook(lambda *_, twice=twice: calls.append(twice))
            loop()
            gradients.append({name: parameter.grad for name, parameter in loop.model.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0])
    assert [calls.count(twice) for twice in (False, True)] == [1, 3]


@pytest.mark.slow
def test_the_bare_loop_computes_what_the_trainer_does(workload, small_vit, process_group):
    from text4vis.cluster.stop import StopRequest
    from text4vis.training.logs import Meter
    from text4vis.training.trainer import Trainer

    setup = engine.EngineSetup(workload.shards, small_vit, 2, "fp32")
    os.environ.update(process_group)
    trainer = Trainer(setup.config(1), Path("unused"), StopRequest(), "never")
    meter = Meter.new(trainer.device)
    bare = engine.BareLoop(trainer.config, next(iter(trainer.train_loader)), trainer.objective.classes)
    trainer.train_step(iter(trainer.train_loader), meter)
    trainer.settle()
    assert float(meter.loss) == pytest.approx(float(bare()), rel=1e-5)
    trainer.close()


def test_the_formula_of_memory():
    """16 bytes a parameter on one rank; on infinitely many 4, 2 and 0 of them stay (ZeRO, figure 1)."""
    assert [sum(engine.formula(10, stage, 1).values()) for stage in engine.STAGES] == [160] * 4
    left = [sum(engine.formula(10, stage, 10**9).values()) for stage in engine.STAGES]
    assert left == pytest.approx([160, 40, 20, 0], abs=1e-3)


def test_shares_of_4096_ranks_are_a_partition():
    ranks, num_videos, global_batch = 4096, 10_001, 8192
    stream = Stream(num_videos, seed=3)
    parts = [
        stream.take(*rank_slice(start, global_batch, rank, ranks))[0]
        for start in range(0, 5 * global_batch, global_batch)
        for rank in range(ranks)
    ]
    ids = np.concatenate(parts)[: 4 * num_videos].reshape(4, num_videos)
    assert (np.sort(ids, axis=1) == np.arange(num_videos)).all()
    assert np.array_equal(ids.ravel(), stream.take(0, 4 * num_videos)[0])


def test_scale_leaves_out_batches_larger_than_an_epoch():
    figures = scale([500], world_sizes=[1, 4, 1000], batch_size=8, rounds=1)
    assert [figure.unit for figure in figures if figure.unit] == ["s", "MB", "us", "us"] * 2
    fetched = [figure.values[0] for figure in figures if not figure.unit]
    assert fetched[::2] == pytest.approx([2, 4, 16], rel=1e-3) and all(1 <= ratio <= 1.02 for ratio in fetched[1::2])


@pytest.mark.parametrize("has_nginx", [True, False])
def test_the_far_store_is_late_and_serves_ranges(tmp_path, monkeypatch, has_nginx):
    if not has_nginx:
        monkeypatch.setattr(store, "_MODULES", tmp_path)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(bytes(range(200)))
    with store.far_store(tmp_path / "served", tmp_path / "work", [0, 200]) as far:
        assert has_nginx or far.kind.startswith("our own server")
        for pause, address in far.addresses.items():
            started = time.perf_counter()
            request = urllib.request.Request(f"{address}/file", headers={"Range": "bytes=5-9"})
            with urllib.request.urlopen(request) as answer:
                assert answer.status == 206 and answer.headers["Content-Range"] == "bytes 5-9/200"
                assert answer.read() == bytes(range(5, 10))
            assert time.perf_counter() - started >= pause / 1000
        requests, sent = far.counts()
        assert requests >= 2 and sent >= 10
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{address}/nothing")


def test_without_a_gpu_nothing_is_run_and_a_line_says_so(work, capsys):
    def find():
        raise AssertionError

    assert gpu.gpu(find, work, 1, 0.1) == []
    assert capsys.readouterr().out == "gpu: no GPU is visible, so nothing was run\n"


def test_peaks_are_those_of_the_card_that_is_named():
    assert gpu.peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert gpu.peak_of("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert gpu.peak_of("Some other card") is None


def test_operations_of_a_step_are_those_of_the_arithmetic():
    """Blocks: 24 n d^2 + 4 n^2 d a frame forward, twice that backward; the rest is the patches and the head."""
    width, layers, tokens, frames = 768, 12, 50, 8
    blocks = 3 * frames * layers * (24 * tokens * width**2 + 4 * tokens**2 * width)
    assert blocks < gpu.training_flops("ViT-B-32") < 1.04 * blocks


def test_steps_are_measured_where_there_is_no_gpu(workload, small_vit):
    steps = run_fresh(gpu.train, EngineSetup(workload.shards, small_vit, 2, "bf16"), 2, 1)
    assert steps.videos_per_second > 0
    assert 0 <= steps.waiting < 1
    assert (steps.launches, steps.synchronisations) == (0, 0)


@pytest.mark.long
def test_the_benchmark_of_a_gpu_runs_to_its_end_on_a_cpu(workload, small_vit, monkeypatch):
    monkeypatch.setattr(gpu, "REAL_STEPS", 3)
    figures = gpu.measure(Setup(workload, 2, 1), workload.shards, 1, 0.05, {small_vit: 2})
    assert [figure.what.split(",")[0] for figure in figures[:3]] == ["decode only", "loader", "loader"]
    assert len(figures) == 3 + 5 + 5
