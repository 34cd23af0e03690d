"""Writing checkpoints: what lies on disk afterwards, wherever a job is killed, and who writes it."""

import errno
import os
import shutil
import threading
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import DistStoreError, HashStore

from text4vis.cluster import distributed
from text4vis.cluster.distributed import Ranks
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.training import checkpointing, snapshot
from text4vis.training.checkpointing import Saves
from text4vis.training.engine import Shard

STATE = State(0, 0, 8, "f", {}, ["a"])
Usage = namedtuple("Usage", "total used free")


class StandIn:
    """What checkpoints take from an engine and give back to it. seed: of its tensors."""

    moment_names = ("exp_avg", "exp_avg_sq")

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        names = ("a", "b")
        self.weights = {name: torch.randn(3, 2, generator=generator) for name in names}
        self.moments = {
            key: {name: torch.randn(3, 2, generator=generator) for name in names} for key in self.moment_names
        }
        self.updates = seed
        self.scaler = {"cur_scale": 2.0**seed}

    def named_results(self):
        yield from self.weights.items()

    def shards(self, key=None):
        for name, tensor in (self.weights if key is None else self.moments[key]).items():
            yield name, Shard(torch.float32, (3, 2), tensor.flatten(), on_all=True)

    def loss_scaler_state(self):
        return self.scaler

    def restore(self, weights, moments, updates):
        self.weights = {name: weights(name) for name in self.weights}
        self.moments = {key: {name: moments(key, name) for name in self.weights} for key in self.moment_names}
        self.updates = updates

    def restore_loss_scaler(self, state):
        self.scaler = state


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def state_after(step: int) -> State:
    return State(step, 8 * step, 8, "f", {}, ["a"], updates=step)


def save_all(engine: StandIn, output: Path, step: int, *, keep: int = 2, best: bool = False) -> None:
    saves = Saves(engine, output, keep)
    try:
        saves.start(state_after(step), best=best)
        saves.finish()
    finally:
        saves.close()


def save(output: Path, step: int, **options: int) -> Path:
    save_all(StandIn(step), output, step, **options)
    return output / "checkpoints" / f"step-{step:08d}"


def names_in(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_an_engine_goes_on_with_what_was_saved(tmp_path):
    saved, other = StandIn(3), StandIn(4)
    save_all(saved, tmp_path / "run", 3)
    folder = checkpoint.latest(tmp_path / "run")
    assert folder == tmp_path / "run" / "checkpoints" / "step-00000003"
    state = checkpoint.verify(folder)
    assert state.files.keys() == {"model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}
    checkpointing.load(other, folder, state)
    assert same(other.weights, saved.weights) and other.updates == 3 and other.scaler == {"cur_scale": 8.0}
    assert all(same(other.moments[key], saved.moments[key]) for key in saved.moment_names)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    save(tmp_path, 1, best=True)
    for step in (2, 3):
        save(tmp_path, step)
    assert names_in(tmp_path) == ["best", "step-00000002", "step-00000003"]
    save(tmp_path, 4, keep=1)
    assert names_in(tmp_path) == ["best", "step-00000004"]
    for step in (5, 6, 7):
        save(tmp_path, step, keep=3)
    assert names_in(tmp_path) == ["best", "step-00000005", "step-00000006", "step-00000007"]


def test_the_best_holds_weights_alone_and_is_replaced_whole(tmp_path):
    for step in (1, 2):
        save(tmp_path, step, best=True)
        folder = tmp_path / "checkpoints" / "best"
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "state.json"]
        assert checkpoint.verify(folder).step == step
        assert same(load_file(folder / "model.safetensors"), StandIn(step).weights)
        assert names_in(tmp_path)[0] == "best", "the one before is gone"


def test_the_best_holds_the_averages_of_what_trains(tmp_path):
    engine = StandIn(1)
    engine.moment_names = ("exp_avg", "ema")
    engine.moments["ema"] = {"a": torch.full((3, 2), 7.0)}
    save_all(engine, tmp_path, 1, best=True)
    folders = tmp_path / "checkpoints"
    assert same(load_file(folders / "best" / "model.safetensors"), engine.weights | engine.moments["ema"])
    assert same(load_file(folders / "step-00000001" / "model.safetensors"), engine.weights)
    assert same(load_file(folders / "step-00000001" / "ema.safetensors"), engine.moments["ema"])


@pytest.fixture
def gate(monkeypatch):
    """Holds what is written in the background until it is set."""
    opened, write = threading.Event(), snapshot.write_pieces

    def held(*arguments):
        opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpointing, "write_pieces", held)
    yield opened
    opened.set()


def test_training_goes_on_while_a_checkpoint_is_written_and_changes_nothing_in_it(tmp_path, gate):
    engine = StandIn(1)
    saves = Saves(engine, tmp_path, 2)
    saves.start(state_after(1))
    assert checkpoint.latest(tmp_path) is None and [name[:15] for name in names_in(tmp_path)] == [".step-00000001."]
    sizes = {path.name: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    engine.weights["a"].zero_()
    saves.check()
    gate.set()
    saves.finish()
    assert same(load_file(checkpoint.latest(tmp_path) / "model.safetensors"), StandIn(1).weights)
    assert sizes == {path.name: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}, "from the beginning"
    saves.close()


def test_one_checkpoint_at_a_time_is_written_and_the_end_waits(tmp_path, gate):
    saves = Saves(StandIn(1), tmp_path, 2)
    saves.start(state_after(1))
    second = threading.Thread(target=saves.start, args=(state_after(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive() and [name[:15] for name in names_in(tmp_path)] == [".step-00000001."], (
        "it waits for the first"
    )
    gate.set()
    second.join(60)
    saves.close()
    assert names_in(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_copies_take_the_memory_of_one_checkpoint_again_and_again(tmp_path):
    saves = Saves(StandIn(1), tmp_path, 2)
    sizes = []
    assert saves.memory_bytes == 0
    for step in (1, 2, 3):
        saves.start(state_after(step), best=step == 2)
        sizes.append(saves.memory_bytes)
    saves.finish()
    assert sizes == [6 * 32] * 3, "6 tensors of 24 bytes, each aligned; the best needs no copy of its own"
    saves.close()


def test_what_fails_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        saves = Saves(StandIn(1), tmp_path, 2)
        for call in (saves.wait, lambda: saves.start(state_after(3)), saves.finish):
            saves.start(state_after(2))
            expected = (
                r"step-00000002\.\w+-\d\.partial/model\.safetensors: cannot be written \(No space.*\); free space"
            )
            with pytest.raises(CheckpointError, match=expected):
                call()
        saves.start(state_after(2))
        while not saves.is_idle:
            time.sleep(0.01)
        with pytest.raises(CheckpointError, match="free space"):
            saves.check()
    assert checkpoint.latest(tmp_path) is None
    saves.start(state_after(4))
    saves.close()
    assert names_in(tmp_path) == ["step-00000004"], "what was left is gone"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "worn out", "/disk/x"), r"^/disk/x: cannot be written \(worn out\); free"),
        (OSError(errno.EIO, "worn out"), r"/step-00000001: cannot be written \(worn out\); free"),
        (ValueError("odd"), "/step-00000001: ValueError: odd$"),
    ],
)
def test_what_fails_when_a_checkpoint_gets_its_name_is_an_error_too(tmp_path, monkeypatch, error, message):
    def fail(_):
        raise error

    monkeypatch.setattr(checkpointing, "sync", fail)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1)


def test_an_output_that_takes_no_folder_is_named(tmp_path):
    (tmp_path / "checkpoints").touch()
    with pytest.raises(CheckpointError, match=rf"^{tmp_path}/checkpoints.*: cannot be written .* another --output"):
        save(tmp_path, 1)


def test_a_save_waits_for_the_copies_before_it_writes_and_at_the_end_for_the_other_ranks(tmp_path, monkeypatch):
    done, write = [], snapshot.write_pieces
    monkeypatch.setattr(snapshot.HostMemory, "wait", lambda _: done.append("copied"))
    monkeypatch.setattr(checkpointing, "write_pieces", lambda *of: done.append(of[0].parent.name) or write(*of))
    monkeypatch.setattr(distributed, "barrier", lambda: done.append(names_in(tmp_path)))
    saves = Saves(StandIn(1), tmp_path, 2)
    for _ in range(2):
        saves.start(state_after(1))
        saves.finish()
    saves.close()
    assert done[0] == done[5] == "copied" and done[4] == done[9] == ["step-00000001"]
    (first,), (second,) = set(done[1:4]), set(done[6:9])
    assert first != second, "NFS may take a name that was used for the folder it was given to"


class TwoRanks:
    """Lets threads named after their rank be a job of two ranks; threads that they start are of the same rank."""

    def __init__(self, monkeypatch) -> None:
        self.store, self.limits, self.meeting, self.shared = HashStore(), {}, threading.Barrier(2, timeout=20), {}
        self.store.set_timeout(timedelta(seconds=20))
        monkeypatch.setattr(distributed, "ranks", lambda: Ranks(self.rank, 2, self.rank, 2))
        monkeypatch.setattr(distributed, "new_store", self.new_store)
        monkeypatch.setattr(distributed, "from_main", self.from_main)
        monkeypatch.setattr(distributed, "barrier", self.meeting.wait)
        monkeypatch.setattr(
            checkpointing,
            "ThreadPoolExecutor",
            lambda size, **_: ThreadPoolExecutor(size, thread_name_prefix=threading.current_thread().name),
        )

    @property
    def rank(self) -> int:
        return int(threading.current_thread().name[:1])

    def new_store(self, limit: timedelta) -> HashStore:
        self.limits[self.rank] = limit
        return self.store

    def from_main(self, make):
        if self.rank == 0:
            self.shared["value"] = make()
        self.meeting.wait()
        value = self.shared["value"]
        self.meeting.wait()
        return value

    def save(self, output: Path, steps: tuple[int, ...]) -> list[str]:
        """What each rank is told, by rank."""
        told = ["", ""]

        def work():
            saves = Saves(StandIn(1), output, 2)
            try:
                for step in steps:
                    saves.start(state_after(step), best=True)
                    saves.finish()
            except CheckpointError as error:
                told[self.rank] = str(error)
            saves.close()

        threads = [threading.Thread(target=work, name=str(rank), daemon=True) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return told


def test_ranks_write_their_shares_and_the_first_one_names_the_whole(tmp_path, monkeypatch):
    job, writers, write = TwoRanks(monkeypatch), set(), snapshot.write_pieces
    monkeypatch.setattr(checkpointing, "write_pieces", lambda *given: writers.add(job.rank) or write(*given))
    assert job.save(tmp_path, (1, 2)) == ["", ""] and writers == {0, 1}
    assert names_in(tmp_path) == ["best", "step-00000001", "step-00000002"]
    for folder in (tmp_path / "checkpoints").iterdir():
        checkpoint.verify(folder)
        assert same(load_file(folder / "model.safetensors"), StandIn(1).weights)
    assert job.limits[0] < timedelta(hours=1) and job.limits[1] > timedelta(days=1), "the first rank always answers"
    assert job.store.num_keys() == 2, "how both saves ended; what ranks reported is gone"


@pytest.mark.parametrize("error", [CheckpointError("no room"), ValueError("odd")])
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_are_told_what_one_could_not_write(tmp_path, monkeypatch, rank, error):
    job, write = TwoRanks(monkeypatch), snapshot.write_pieces

    def failing(*given):
        if job.rank == rank:
            raise error
        return write(*given)

    monkeypatch.setattr(checkpointing, "write_pieces", failing)
    told = "no room" if isinstance(error, CheckpointError) else f"{tmp_path}/checkpoints/step-00000001: ValueError: odd"
    assert job.save(tmp_path, (1,)) == [told, told] and checkpoint.complete(tmp_path) == []


def test_a_rank_that_does_not_report_is_named(tmp_path, monkeypatch):
    def late(key):
        raise DistStoreError(key)

    monkeypatch.setattr(distributed, "ranks", lambda: Ranks(0, 2, 0, 2))
    monkeypatch.setattr(distributed, "new_store", lambda _: SimpleNamespace(get=late, set=lambda *_: None))
    with pytest.raises(CheckpointError, match=r"step-00000001: rank 1 has not written its part for 30 minutes"):
        save(tmp_path, 1)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.fixture
def kill_at(monkeypatch):
    """Lets the n-th change of the disk from now on be the last one that is not done."""
    left = [0]

    def counting(function):
        def counted(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise Killed
            return function(*arguments, **options)

        return counted

    monkeypatch.setattr(checkpointing, "write_pieces", counting(checkpointing.write_pieces))
    monkeypatch.setattr(checkpointing, "sync", counting(checkpointing.sync))
    monkeypatch.setattr(shutil, "rmtree", counting(shutil.rmtree))
    for name in ("rename", "write_text", "mkdir"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))

    def set_left(number: int) -> None:
        left[0] = number

    yield set_left
    left[0] = 0


def test_wherever_a_job_is_killed_a_sound_checkpoint_is_left_and_the_next_job_cleans_up(tmp_path, kill_at):
    """It saves the best and then step 2 beside an older best and step 1."""
    number, ended = 0, False
    while not ended:
        number += 1
        output = tmp_path / str(number)
        save(output, 1, best=True)
        kill_at(number)
        try:
            save(output, 2, keep=1, best=True)
            ended = True
        except Killed:
            pass
        kill_at(0)
        left = checkpoint.latest_sound(output, pytest.fail)
        assert left is not None and checkpoint.read_state(left).step in (1, 2)
        save(output, 3, keep=1)
        assert names_in(output) == ["best", "step-00000003"], f"killed at {number}"
        assert checkpoint.verify(output / "checkpoints" / "best").step in (1, 2)
    assert number > 15, "it was killed at every change of the disk"


def test_a_checkpoint_has_its_name_only_when_the_disk_has_its_bytes(tmp_path, monkeypatch):
    """A power cut after a rename must not leave a complete name over empty files."""
    events: list[tuple[str, str]] = []
    rename = Path.rename

    def renamed(path, target):
        events.append(("named", target.name))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(checkpointing, "sync", lambda path: events.append(("on disk", path.name)))
    save(tmp_path, 5)
    moments = ["exp_avg.safetensors", "exp_avg_sq.safetensors"]
    assert sorted(events[:4]) == [("on disk", name) for name in (*moments, "model.safetensors", "state.json")]
    assert events[4:] == [("named", "step-00000005"), ("on disk", "checkpoints")]


def test_what_cannot_be_removed_ends_no_run(tmp_path, monkeypatch):
    """As on NFS, where a file that somebody has open stays."""
    folder = save(tmp_path, 1, best=True).parent
    (folder / ".step-00000009.partial").mkdir()
    (folder / ".step-00000001.old").mkdir()

    def refuse(path, *_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        save(tmp_path, 2, keep=1, best=True)
    assert checkpoint.latest(tmp_path) == folder / "step-00000002"
    assert checkpoint.verify(folder / "best").step == 2
    save(tmp_path, 3, keep=1)
    assert [name for name in names_in(tmp_path) if name.startswith(".")] == []


def test_gathered_weights_are_copies(tmp_path):
    """The engine changes its own in the next step."""
    engine = StandIn(1)
    gathered = checkpointing.gather_weights(engine)
    assert same(gathered, engine.weights)
    engine.weights["a"].zero_()
    assert same(gathered, StandIn(1).weights)


SPARE = 1 << 20  # logs and metrics grow beside the checkpoints


@pytest.mark.parametrize(
    ("steps", "best", "keep", "missing", "needed"),
    [
        ([], False, 2, 3, 3 * 150 + 50),
        ([1], False, 2, 2, 2 * 150 + 50),
        ([1, 2], True, 2, 1, 150),
        ([1, 2, 3], True, 2, 1, 150),
        ([1], True, 1, 1, 150),
    ],
)  # fmt: skip
def test_the_room_asked_for_is_that_of_all_checkpoints_to_come(
    tmp_path, monkeypatch, steps, best, keep, missing, needed
):
    """`keep` checkpoints of 50 bytes of weights and 100 of moments, one that is not finished, and the best."""
    for step in steps:
        save(tmp_path, step, keep=9)
    if best:
        save(tmp_path, steps[-1], keep=9, best=True)
    free = needed + SPARE
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free))
    checkpointing.check_room(tmp_path, keep, 50, 100)
    free -= 1
    with pytest.raises(CheckpointError, match=f"{tmp_path}: {missing} more checkpoints need .* lower logging.keep_che"):
        checkpointing.check_room(tmp_path, keep, 50, 100)


def test_a_folder_that_is_not_there_yet_is_judged_by_the_disk_it_will_be_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda place: asked.append(place) or Usage(0, 0, 1 << 40))
    checkpointing.check_room(tmp_path / "not" / "yet", 2, 50, 100)
    assert asked == [tmp_path]


@pytest.mark.parametrize(("best", "kind"), [(False, "step-00000001"), (True, "best and step-00000001")])
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, best, kind):
    """Asked for are the bytes of all files of tensors."""
    needed = sum(file.stat().st_size for file in save(tmp_path / "other", 1, best=best).parent.rglob("*.safetensors"))
    free = needed + SPARE - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free))
    with pytest.raises(CheckpointError, match=f"{kind} need"):
        save(tmp_path, 1, best=best)
    assert not (tmp_path / "checkpoints").exists()
    free += 1
    save(tmp_path, 1, best=best)
    assert names_in(tmp_path) == kind.split(" and ")
