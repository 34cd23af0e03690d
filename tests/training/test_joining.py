"""Checks before a job begins a run or goes on with one."""

from types import SimpleNamespace

import pytest

from text4vis.cluster.distributed import Ranks
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError, EngineConfig
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import TOKENIZER
from text4vis.training import joining
from text4vis.training.joining import (
    check_joins,
    check_streams,
    check_world_size,
    first_state,
    settled,
    with_tokenizer,
)


def test_a_job_of_another_size_than_expected_is_refused():
    """A launcher that does not find its hosts starts on one machine alone."""
    for expected in (None, 2):
        check_world_size(Config(engine=EngineConfig(world_size=expected)), 2)
    for ranks in (1, 3):
        with pytest.raises(ConfigError, match=rf"engine\.world_size: expected 2 ranks, the job has {ranks}\. .*--host"):
            check_world_size(Config(engine=EngineConfig(world_size=2)), ranks)


def loader(fingerprint: str = "f", few_shot: str = "x\ny\n", mixture: tuple = ()) -> SimpleNamespace:
    planner = SimpleNamespace(order=SimpleNamespace(mixture=list(mixture)), few_shot_list=lambda: few_shot)
    return SimpleNamespace(dataset=SimpleNamespace(fingerprint=fingerprint), planner=planner)


def test_a_run_begins_with_nothing_seen_and_with_what_decides_it(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    config = config_from_dict({"data": {"label_list": str(tmp_path / "x.csv")}}, "test")
    state = first_state(config, loader(mixture=((5, 1.0),)), ["a"], 8)
    digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"  # SHA-256 of "a"
    inputs = {"data.label_list": digest}
    assert state == State(0, 0, 8, "f", config.to_dict(), ["a"], inputs=inputs, mixture=[(5, 1.0)])


def test_a_new_run_settles_what_its_model_needs_and_another_keeps_what_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "settle", lambda config: "as the model needs")
    saved = SimpleNamespace(settle=lambda config, say: "as the run has")
    monkeypatch.setattr(joining, "SavedRun", lambda folder: saved if folder == tmp_path else None)
    assert settled(Config(), None) == "as the model needs" and settled(Config(), tmp_path) == "as the run has"


def test_a_run_goes_on_with_the_tokenizer_that_it_began_with(tmp_path):
    def model(fingerprint: str) -> SimpleNamespace:
        return SimpleNamespace(
            text=SimpleNamespace(tokenizer=SimpleNamespace(facts=lambda: {"fingerprint": fingerprint}))
        )

    begun = with_tokenizer(State(1, 8, 8, "f", {}, ["a"], inputs={"x": "y"}), model("t"), tmp_path)
    assert begun.inputs == {"x": "y", TOKENIZER: "t"} and with_tokenizer(begun, model("t"), tmp_path) == begun
    with pytest.raises(CheckpointError, match="makes other tokens"):
        with_tokenizer(begun, model("u"), tmp_path)


def test_a_run_goes_on_with_its_own_data_and_videos_only(tmp_path):
    found, few_shot = State(1, 8, 8, "f", Config().to_dict(), ["a"]), tmp_path / "few_shot.txt"

    def join(other):
        check_joins(found, Config(), other, {}, tmp_path / "step-1", few_shot)

    join(loader())  # without few-shot there is no list
    few_shot.write_text("x\ny\n")
    join(loader())
    with pytest.raises(CheckpointError, match="was trained on other data"):
        join(loader(fingerprint="g"))
    with pytest.raises(CheckpointError, match="was trained on another mixture"):
        join(loader(mixture=((5, 1.0),)))
    for now, line, before, after in (
        ("x\nz\n", 2, "'y'", "'z'"),
        ("w\ny\n", 1, "'x'", "'w'"),
        ("w\nz\n", 1, "'x'", "'w'"),
        ("x\n", 2, "'y'", "''"),
        ("x\ny\nz\n", 3, "''", "'z'"),
        ("x\ny", 3, "''", "None"),
    ):
        with pytest.raises(
            CheckpointError,
            match=rf"few_shot\.txt:{line}: the run began with {before}, data.shot now chooses {after};",
        ):
            join(loader(few_shot=now))


@pytest.mark.parametrize(
    ("streams", "batch", "place", "message"),
    [
        (4, 10, Ranks(0, 1, 0, 1), "4 streams; in a new run set data.streams to 2, or solver.global_batch to 8 or 12$"),
        (8, 4, Ranks(0, 1, 0, 1), "in a new run set data.streams to 4, or solver.global_batch to 8$"),
        (6, 9, Ranks(0, 1, 0, 1), "in a new run set data.streams to 3, or solver.global_batch to 6 or 12$"),
        (2, 7, Ranks(0, 1, 0, 1), "in a new run set data.streams to 1, or solver.global_batch to 6 or 8$"),
        (2, 1, Ranks(0, 1, 0, 1), "in a new run set data.streams to 1, or solver.global_batch to 2$"),
        (
            4, 24, Ranks(2, 6, 0, 2),
            r"by 3 hosts \(this one has 2 of 6 ranks\); start 1 or 2 or 4 hosts .* a multiple of 3$",
        ),
        (2, 8, Ranks(3, 4, 0, 1), "2 streams cannot be shared equally by 4 hosts .*; start 1 or 2 hosts"),
        (4, 12, Ranks(0, 3, 0, 2), "4 streams cannot be shared equally by 2 hosts"),
        (4, 12, Ranks(2, 3, 0, 1), "4 streams cannot be shared equally by 3 hosts"),
        (6, 12, Ranks(3, 4, 0, 1), "6 streams .*; start 1 or 2 or 3 or 6 hosts"),
    ],
)  # fmt: skip
def test_streams_that_do_not_fit_are_an_error_in_words(streams, batch, place, message):
    with pytest.raises(ConfigError, match=f"data.streams: .*{message}"):
        check_streams(streams, batch, place)


@pytest.mark.parametrize(
    ("streams", "place"),
    [
        (4, Ranks(0, 1, 0, 1)),
        (4, Ranks(5, 8, 1, 2)),
        (4, Ranks(4, 8, 0, 2)),
        (4, Ranks(7, 8, 7, 8)),
        (4, Ranks(1, 4, 1, 3)),
        (2, Ranks(3, 8, 3, 4)),
        (1, Ranks(2, 7, 0, 3)),
    ],
)
def test_streams_that_fit(streams, place):
    check_streams(streams, 24 if streams > 1 else 7, place)
