"""Writing checkpoints: what lies on disk afterwards, wherever a job is killed, and who writes it."""

import errno
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.training import checkpointing

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
        self.asked: list[str] = []

    def named_weights(self):
        for name, tensor in self.weights.items():
            self.asked.append(name)
            yield name, tensor

    named_results = named_weights

    def named_moments(self, key):
        for name, tensor in self.moments[key].items():
            self.asked.append(f"{key} {name}")
            yield name, tensor

    def state_bytes(self):
        return 48, 96

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


def save(output: Path, step: int, **options: int) -> Path:
    return checkpointing.save(StandIn(step), output, state_after(step), **options)


def names_in(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_an_engine_goes_on_with_what_was_saved(tmp_path):
    saved, other = StandIn(3), StandIn(4)
    folder = checkpointing.save(saved, tmp_path / "run", state_after(3))
    assert folder == tmp_path / "run" / "checkpoints" / "step-00000003" == checkpoint.latest(tmp_path / "run")
    state = checkpoint.verify(folder)
    assert state.files.keys() == {"model.safetensors", "exp_avg.safetensors", "exp_avg_sq.safetensors"}
    checkpointing.load(other, folder, state)
    assert same(other.weights, saved.weights) and other.updates == 3 and other.scaler == {"cur_scale": 8.0}
    assert all(same(other.moments[key], saved.moments[key]) for key in saved.moment_names)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    checkpointing.save_best(StandIn(1), tmp_path, state_after(1))
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert names_in(tmp_path) == ["best", "step-00000002", "step-00000003"], "two, unless it is said otherwise"
    save(tmp_path, 4, keep=1)
    assert names_in(tmp_path) == ["best", "step-00000004"]
    for step in (5, 6, 7):
        save(tmp_path, step, keep=3)
    assert names_in(tmp_path) == ["best", "step-00000005", "step-00000006", "step-00000007"]


def test_the_best_holds_weights_alone_and_is_replaced_whole(tmp_path):
    for step in (1, 2):
        checkpointing.save_best(StandIn(step), tmp_path, state_after(step))
        folder = tmp_path / "checkpoints" / "best"
        assert names_in(tmp_path) == ["best"]
        assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "state.json"]
        assert checkpoint.verify(folder).step == step
        assert same(load_file(folder / "model.safetensors"), StandIn(step).weights)


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

    monkeypatch.setattr(checkpointing, "write_tensors", counting(checkpointing.write_tensors))
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
        checkpointing.save_best(StandIn(1), output, state_after(1))
        save(output, 1)
        kill_at(number)
        try:
            checkpointing.save_best(StandIn(2), output, state_after(2))
            save(output, 2, keep=1)
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
    checkpointing.save_best(StandIn(1), tmp_path, state_after(1))
    folder = save(tmp_path, 1).parent
    (folder / ".step-00000009.partial").mkdir()
    (folder / ".step-00000001.old").mkdir()

    def refuse(path, *_, **__):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", refuse)
        save(tmp_path, 2, keep=1)
        checkpointing.save_best(StandIn(2), tmp_path, state_after(2))
    assert checkpoint.latest(tmp_path) == folder / "step-00000002"
    assert checkpoint.verify(folder / "best").step == 2
    save(tmp_path, 3, keep=1)
    assert [name for name in names_in(tmp_path) if name.startswith(".")] == []


def test_other_ranks_take_part_and_write_nothing(tmp_path, monkeypatch):
    """Tensors are gathered collectively, so every rank asks for all of them in the same order."""
    main, other = StandIn(1), StandIn(1)
    checkpointing.save(main, tmp_path / "main", state_after(1))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    checkpointing.save(other, tmp_path / "other", state_after(1))
    assert other.asked == main.asked and len(main.asked) == 6
    checkpointing.save_best(other, tmp_path / "other", state_after(1))
    assert checkpointing.gather_weights(other) == {}
    assert not (tmp_path / "other").exists()


def test_no_rank_goes_on_before_the_checkpoint_is_there(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(checkpointing.distributed, "barrier", lambda: seen.append(names_in(tmp_path)))
    save(tmp_path, 1)
    save(tmp_path, 2, keep=1)
    checkpointing.save_best(StandIn(2), tmp_path, state_after(2))
    assert seen == [["step-00000001"], ["step-00000002"], ["best", "step-00000002"]]


def test_gathered_weights_are_copies(tmp_path):
    """The engine changes its own in the next step."""
    engine = StandIn(1)
    gathered = checkpointing.gather_weights(engine)
    assert same(gathered, engine.weights)
    engine.weights["a"].zero_()
    assert same(gathered, StandIn(1).weights)


def test_a_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def fail(path, tensors):
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(checkpointing, "write_tensors", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(No space.*\); free space"):
        save(tmp_path, 1)
    assert checkpoint.latest(tmp_path) is None


SPARE = 1 << 20  # logs and metrics grow beside the checkpoints


@pytest.mark.parametrize(
    ("steps", "best", "keep", "missing", "needed"),
    [
        ([], False, 2, 3, 3 * 150 + 50),
        ([1], False, 2, 2, 2 * 150 + 50),
        ([1, 2], True, 2, 1, 150),
        ([1, 2, 3], True, 2, 1, 150),
        ([], True, 1, 2, 2 * 150),
    ],
)  # fmt: skip
def test_the_room_asked_for_is_that_of_all_checkpoints_to_come(
    tmp_path, monkeypatch, steps, best, keep, missing, needed
):
    """`keep` checkpoints of 50 bytes of weights and 100 of moments, one that is not finished, and the best."""
    for step in steps:
        save(tmp_path, step, keep=9)
    if best:
        checkpointing.save_best(StandIn(1), tmp_path, state_after(1))
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


@pytest.mark.parametrize(("kind", "needed"), [("step-00000001", 48 + 96), ("best", 48)])
def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch, kind, needed):
    """A checkpoint takes 48 bytes of weights and 96 of moments; the best has the weights alone."""
    free = needed + SPARE - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(0, 0, free))

    def save_it():
        save(tmp_path, 1) if kind != "best" else checkpointing.save_best(StandIn(1), tmp_path, state_after(1))

    with pytest.raises(CheckpointError, match=f"{kind} need"):
        save_it()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    free += 1
    save_it()
    assert names_in(tmp_path) == [kind]
