"""The loaders of others that the benchmarks compare with: each shows the frames that our plan draws, also from a far
store. Those that are not installed are skipped by name."""

import io
import itertools
import os
import shutil
import subprocess
import sys
from functools import partial

import benchmarks
import numpy as np
import pytest
from benchmarks import peers, remote
from benchmarks.data import make_workload
from benchmarks.figures import pss_of_tree, run_fresh
from benchmarks.peers import PEERS, FarData, Peer
from benchmarks.recipe import OpenCvFrames, Setup, channels_first
from benchmarks.speed import cpu_seconds
from benchmarks.store import far_store
from PIL import Image

EPOCHS = 6


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("peers")


@pytest.fixture(scope="module")
def workload(work):
    return make_workload(work, num_videos=4, num_frames=10, clips=None)


@pytest.fixture(scope="module")
def expected(workload):
    """What the plan draws for (video, epoch)."""
    frames, found = OpenCvFrames(Setup(workload, 1, 1).train), {}
    for epoch, (video, (_, count, _)) in itertools.product(range(EPOCHS), enumerate(workload.videos)):
        files = [workload.frame(video, index).read_bytes() for index in range(count)]
        found[video, epoch] = _thinned(channels_first(frames.sample(video, count, files.__getitem__)[None])[0])
    return found


def _thinned(sample_TCHW):
    """Enough of a sample to tell it from others."""
    return sample_TCHW[..., ::16, ::16].numpy().astype(int)


def skip_unless_installed(peer):
    if not peer.is_installed:
        pytest.skip(f"{peer.name} is not installed; {peer.install}")


def _samples(contender, setup, count):
    with contender(setup) as batches:
        taken = list(itertools.islice(batches, count))
    assert {tuple(batch.shape) for batch in taken} == {(setup.batch_size, 8, 3, 224, 224)}
    return [_thinned(video_TCHW) for batch in taken for video_TCHW in batch]


def test_the_command_line_knows_the_peers():
    assert tuple(PEERS) == benchmarks.PEERS


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_shows_the_frames_that_our_plan_draws(name, workload, work, expected):
    """Every video is shown, and its samples are those of its epochs, one after the other."""
    peer = PEERS[name]
    skip_unless_installed(peer)
    contender = peer.contender(peers.prepare([peer], workload, work))
    epochs = {video: [] for video in range(len(workload.videos))}
    for sample in run_fresh(_samples, contender, Setup(workload, batch_size=2, workers=1), 6):
        distances = {drawn: np.abs(sample - expected[drawn]).mean() for drawn in expected}
        video, epoch = min(distances, key=distances.get)
        assert distances[video, epoch] < 0.5  # OpenCV may round otherwise in other threads
        epochs[video].append(epoch)
    assert all(seen == list(range(len(seen))) and seen for seen in epochs.values()), epochs


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.epoch])
def test_a_peer_reads_a_far_store_whole(name, workload, work):
    peer = PEERS[name]
    skip_unless_installed(peer)
    if peer is peers.WEBDATASET and not shutil.which("curl"):
        pytest.skip("WebDataset reads HTTP with curl, which is not installed")
    folder = peers.prepare([peer], workload, work)
    served = workload.shards.parent if peer.prepare is None else work
    with far_store(served, work / "store", [1]) as store:
        far = FarData(store.addresses[1], peer.far_path(workload, folder), work / "cache" / name)
        run = run_fresh(remote.measure_peer, peer, Setup(workload, batch_size=1, workers=1), far, store)
    assert run.videos == len(workload.videos)
    frames = sum(path.stat().st_size for path in workload.root.rglob("*.jpg"))
    assert frames < run.sent_bytes < 1.2 * frames
    assert run.requests >= len(workload.tars)


def test_data_of_a_peer_are_written_once_and_never_left_half_done(workload, tmp_path):
    tries = tmp_path / "tries"
    peer = Peer("Slow", "slow", "", peers.webdataset_train, partial(_write_half, tries))
    with pytest.raises(OSError, match="full"):
        peers.prepare([peer], workload, tmp_path)
    folder = peers.prepare([peer], workload, tmp_path)
    assert peers.prepare([peer], workload, tmp_path) == folder
    assert [path.name for path in (folder / "slow").iterdir()] == ["2"]
    assert tries.read_text() == "xx"


def _write_half(tries, _, folder):
    """Fails the first time, after it has written something."""
    with tries.open("a") as stream:
        stream.write("x")
    count = tries.stat().st_size
    (folder / str(count)).touch()
    if count == 1:
        raise OSError("the disk is full")


def test_what_is_missing_is_named_with_its_command(capsys):
    missing = Peer("Other", "no_such_package.inside", "pip install 'other[all]'", peers.webdataset_train)
    here = Peer("Here", "json.decoder", "", peers.webdataset_train)
    assert peers.installed([missing, here]) == [here]
    said = " ".join(capsys.readouterr().out.split())
    assert said == "Other: left out, it is not installed; pip install 'other[all]'"


def test_frames_that_are_no_jpeg_are_shown_too(workload):
    frames, original_TSSC = OpenCvFrames(Setup(workload, 1, 1).train), []
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (256, 340, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    for draw in (frames.draw(0, 10), frames.draw(0, 10)):
        output_TSSC = frames.empty()
        frames.show(draw, [buffer.getvalue()] * 8, output_TSSC)
        original_TSSC.append(output_TSSC)
    assert not np.array_equal(*original_TSSC)
    with pytest.raises(ValueError, match="does not decode"):
        frames.show(draw, [b"no image"] * 8, output_TSSC)


def test_the_client_alone_goes_through_the_plan(workload):
    with remote.client_batches(Setup(workload, batch_size=3, workers=1).train) as batches:
        assert list(itertools.islice(batches, 5)) == [3] * 5


def test_processor_time_and_memory_include_what_was_started():
    cpu, held = cpu_seconds(), pss_of_tree(os.getpid())
    work = "import time; sum(range(3_000_000)); print(time.process_time())"
    used = float(subprocess.run([sys.executable, "-c", work], capture_output=True, text=True, check=True).stdout)
    assert cpu_seconds() - cpu > 0.9 * used - 0.02  # the kernel counts in hundredths
    hold = "import sys; block = bytearray(b'x') * (64 << 20); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout.readline() == b"ready\n"
        assert pss_of_tree(os.getpid()) - held > 60 << 20
        child.stdin.close()
