"""The trainer at one rank in this process: what it decides step by step, what a run leaves, how it goes on."""

import json
import shutil
import threading
import time
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml
from project import NUM_VIDEOS, losses, records, weights

from shards.plan import mix64
from text4vis.cluster import distributed
from text4vis.cluster.distributed import Ranks
from text4vis.cluster.stop import NonFiniteError, Stopped
from text4vis.config.batches import BatchSizes
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, ConfigError, DataConfig, EngineConfig, LoggingConfig, SolverConfig
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import TOKENIZER, RunInputs
from text4vis.training import trainer as module
from text4vis.training.logs import Meter
from text4vis.training.optim import learning_rate
from text4vis.training.steps import MicroBatchLoss, TakenStep, why_skipped
from text4vis.training.trainer import Requests, Trainer

pytestmark = pytest.mark.usefixtures("one_rank")

STEPS, EPOCHS = 13, 2  # of 4 of the 26 videos
SETTINGS = (
    "engine.precision=fp32", "engine.zero_stage=0", "data.batch_size=4", f"solver.epochs={EPOCHS}",
    "engine.num_threads=1", "logging.print_freq=3", "logging.pictures=0", "logging.keep_checkpoints=20",
    "logging.save_steps=5",
)  # fmt: skip


@pytest.fixture(autouse=True)
def own_arithmetic():
    """What a run sets for its whole process; ZeRO-3 replaces `linear` for good."""
    threads, linear, tf32 = torch.get_num_threads(), torch.nn.functional.linear, torch.backends.cudnn.allow_tf32
    yield
    torch.set_num_threads(threads)
    torch.nn.functional.linear = linear
    distributed.use_tf32(tf32)


class Stop:
    """Requests to stop, asked for by tests."""

    def __init__(self) -> None:
        self.code, self.wall_minutes = 0, []

    def limit(self, wall_minutes):
        self.wall_minutes.append(wall_minutes)


class Board:
    """In the place of a run's files: keeps what it was given. Pictures are drawn on itself."""

    def __init__(self) -> None:
        self.records, self.listed, self.drawn, self.closed = [], [], [], 0

    def write(self, kind, record):
        self.records.append((kind, record))

    def list_skipped(self, loader):
        self.listed.append(loader)

    def add_pictures(self, step, draw):
        draw(SimpleNamespace(
            end=lambda step: self.drawn.append(("end", step)),
            training_clips=lambda batch, consumed, at: self.drawn.append(("clips", batch, consumed, at, step)),
            evaluation=lambda result, classes, loader: self.drawn.append(("evaluation", result, classes, loader, step)),
        ))  # fmt: skip

    def close(self):
        self.closed += 1


def start(project, output, *settings, resume="auto", stop=None) -> Trainer:
    output.mkdir(parents=True, exist_ok=True)
    return Trainer(load_config(project.config, [*SETTINGS, *settings]), output, stop or Stop(), resume)


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.fixture(scope="module")
def whole(project, tmp_path_factory):
    """An uninterrupted run: its folder, what `fit` returned, its trainer after it was closed."""
    output, before = tmp_path_factory.mktemp("trainer") / "run", set(threading.enumerate())
    with start(project, output) as trainer:
        assert trainer.stop.wall_minutes == [None] and trainer.num_steps == STEPS and trainer.agreement is None
        figures = trainer.fit()
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("save")], "closed"
    return output, figures, trainer


# Decisions, by a trainer that holds only what they need


def bare(**attributes: object) -> Trainer:
    """A trainer with these attributes alone; of 8 steps with global batches of 4 over 10 videos, unless they differ."""
    trainer = object.__new__(Trainer)
    defaults = {
        "config": Config(), "ranks": Ranks(0, 1, 0, 1), "sizes": BatchSizes(4, 1, 1), "num_steps": 8, "log": Board(),
        "train_loader": SimpleNamespace(epoch_samples=10), "agreement": None, "taken": None, "stop": Stop(),
        "state": State(0, 0, 4, "f", {}, ["a"]), "device": torch.device("cpu"),
        "objective": SimpleNamespace(bias=None),
    }  # fmt: skip
    vars(trainer).update(defaults | attributes)
    return trainer


def at_step(step: int, **changes: object) -> State:
    return State(step, 4 * step, 4, "f", {}, ["a"], **changes)


@pytest.mark.parametrize(
    ("every", "due"), [(1, [3, 5, 8]), (2, [5, 8]), (3, [8])]
)  # 10 videos are an epoch: reached at steps 3, 5 and 8
def test_an_evaluation_is_due_when_an_epoch_is_reached_and_at_the_end(every, due):
    config = Config(logging=LoggingConfig(eval_freq=every))
    found = [bare(config=config, state=at_step(step)).evaluation_is_due() for step in range(1, 9)]
    assert found == [step in due for step in range(1, 9)]
    done = bare(config=config, state=at_step(5, evaluated_step=5))
    assert done.evaluation_is_due() is False, "once"
    assert bare(state=at_step(0)).evaluation_is_due() is False


def test_the_epoch_is_the_share_of_videos_consumed():
    assert bare(state=at_step(3)).epoch == 1.2


def test_a_checkpoint_is_wanted_by_time_or_by_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda: 1000.0)

    def wants(minutes, saved_at, rank=0):
        config = Config(logging=LoggingConfig(save_minutes=minutes))
        return bare(config=config, ranks=Ranks(rank, 2, rank, 2), output=tmp_path, saved_at=saved_at).wants_save()

    assert [wants(2, saved_at) for saved_at in (879.0, 880.0, 999.0)] == [True, False, False]
    assert wants(None, 0.0) is False
    (tmp_path / "save-now").touch()
    assert wants(None, 999.0) is True and wants(2, 999.0) is True
    assert wants(2, 0.0, rank=1) is False, "rank 0 decides for all"


def test_a_checkpoint_is_due_when_agreed_or_every_so_many_steps():
    every = Config(logging=LoggingConfig(save_steps=3))
    due = [bare(config=every, state=at_step(step)).save_is_due(Requests()) for step in (1, 2, 3, 4, 6)]
    assert due == [False, False, True, False, True]
    assert not bare(state=at_step(3)).save_is_due(Requests())
    assert bare(state=at_step(1)).save_is_due(Requests(save=True)) and Requests() == Requests(0, False)


def test_ranks_agree_on_what_was_asked_for_a_step_before(tmp_path):
    trainer = bare(output=tmp_path, saved_at=time.monotonic(), config=Config(logging=LoggingConfig(save_minutes=None)))
    assert trainer.agree() == Requests()
    trainer.stop.code = 2
    (tmp_path / "save-now").touch()
    assert trainer.agree() == Requests()
    assert trainer.agree() == Requests(2, True)


def test_a_run_of_steps_looks_after_its_saves_and_ends_them():
    done = []

    def step(batches, meter):
        trainer.state = at_step(trainer.state.step + 1)
        done.append((trainer.state.step, next(batches)))
        return Requests()

    saves = SimpleNamespace(check=lambda: done.append("checked"), finish=lambda: done.append("on disk"))
    trainer = bare(train_loader=iter("ab"), num_steps=2, saves=saves, save_is_due=lambda requests: False)
    trainer.open_logs, trainer.evaluation_is_due = lambda: done.append("logs"), lambda: False
    trainer.train_step, trainer.log_step = step, lambda meter: done.append("line")
    assert trainer.fit() == {} and trainer.log.drawn == [("end", 2)]
    assert done == ["logs", (1, "a"), "checked", (2, "b"), "checked", "line", "on disk"]


def test_a_save_counts_the_step_before_and_answers_what_was_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(module.time, "monotonic", lambda: 70.0)
    (tmp_path / "save-now").touch()
    done = []
    trainer = bare(output=tmp_path, saved_at=0.0, agreement=lambda: done.append("agreed"))
    trainer.saves = SimpleNamespace(start=lambda state, *, best: done.append((state.updates, best)))
    trainer.taken = TakenStep(1, [MicroBatchLoss([0], torch.tensor(1.0))], Meter.new(trainer.device), lambda: True)
    trainer.save()
    assert done == [(1, False), "agreed"] and trainer.agreement is None, "a request is answered once"
    assert trainer.saved_at == 70.0 and trainer.log.listed == [trainer.train_loader]
    assert list(tmp_path.iterdir()) == []
    trainer.save(best=True)
    assert done[2:] == [(1, True)]


def test_the_end_of_a_run_closes_all_that_it_opened():
    done, trainer = [], bare(_opened=ExitStack())
    trainer._opened.callback(done.append, "closed")
    with trainer as entered:
        assert entered is trainer and not done
    assert done == ["closed"] and trainer.log.closed == 1


START = SimpleNamespace(parent=SimpleNamespace(parent="run"))  # as the path of a checkpoint
KEPT = SimpleNamespace(network=lambda _: "kept", load_text=lambda model: model.append("text"), classes=lambda _: "CD")


@pytest.mark.parametrize(
    ("start_from", "kept", "pretrain", "done", "classes"),
    [
        (None, None, None, ["adapters"], "anew"),
        (None, KEPT, "x.pt", ["x.pt", "adapters"], "anew"),
        (START, KEPT, "x.pt", ["kept", "text", "adapters", "checkpoint"], "CD"),
        (START, None, "x.pt", ["adapters", "checkpoint"], "anew"),
    ],
)
def test_a_model_gets_its_weights_in_order(monkeypatch, start_from, kept, pretrain, done, classes):
    """Adapters come after other weights, and before those of a checkpoint, which has theirs. kept: of the run."""
    config = Config(pretrain=pretrain)
    monkeypatch.setattr(module, "build_model", lambda network, *_, **__: [network] if network == "kept" else [])
    monkeypatch.setattr(module, "add_adapters", lambda model, network: model.append("adapters"))
    monkeypatch.setattr(module, "load_pretrained", lambda model, path: model.append(str(path)))
    monkeypatch.setattr(module.checkpoint, "load_to_train", lambda model, path: model.append("checkpoint"))
    monkeypatch.setattr(module, "training_classes", lambda *_: "anew")
    monkeypatch.setattr(module.RunInputs, "find", lambda run: kept)
    trainer = bare(config=config, start_from=start_from, class_names=["a"])
    assert trainer._model_and_classes() == (done, classes)


class EngineStub:
    """An engine whose steps change the weights, or not."""

    def __init__(self, applied: bool = True) -> None:
        self.applied, self.rates = applied, []

    def set_rates(self, rate):
        self.rates.append(rate(2.0))

    def step(self):
        return lambda: self.applied


def take_step(trainer: Trainer, losses: list[float]) -> list[object]:
    """One step of micro batches with these losses; gives the batches that were trained on, and their seeds."""
    seen = []
    meter = Meter.new(trainer.device)

    def backward(batch):
        seen.append((batch, torch.initial_seed(), torch.rand(1).item()))
        return MicroBatchLoss([batch], torch.tensor(losses[batch]))

    trainer.backward = backward
    trainer.agree = lambda: Requests(3)
    trainer.report_nonfinite = lambda taken: seen.append(taken.seen)
    updates = trainer.state.updates
    assert trainer.train_step(iter(range(len(losses))), meter) == Requests(3)
    assert (meter.updates, trainer.state.updates) == (0, updates), "the device has not answered yet"
    trainer.settle()
    return [*seen, meter]


def test_a_step_takes_all_its_micro_batches_and_counts():
    solver = SolverConfig(lr=1.0, epochs=2, lr_warmup_step=1)
    trainer = bare(
        engine=EngineStub(), sizes=BatchSizes(2, 3, 2), state=at_step(1, updates=1), config=Config(solver=solver)
    )
    *seen, meter = take_step(trainer, [1.0, 2.0, 6.0])
    assert [batch for batch, _, _ in seen] == [0, 1, 2]
    assert (trainer.state.step, trainer.state.updates, trainer.state.consumed) == (2, 2, 4 + 12)
    assert (
        (meter.steps, meter.updates, meter.loss.item()) == (1, 1, 3.0)
        and 0 <= meter.wait_seconds() < 10
        and len(meter.waits) == 3
    )
    assert trainer.engine.rates == [learning_rate(0.4, 2.0, 2, 1)], "of the epoch before the step"
    assert trainer.log.drawn == []


def test_a_step_that_was_skipped_counts_as_no_update():
    trainer = bare(engine=EngineStub(applied=False), state=at_step(1, updates=1))
    _, micros, meter = take_step(trainer, [7.0])
    assert [micro.ids for micro in micros] == [[0]]
    assert (trainer.state.step, trainer.state.updates, trainer.state.consumed) == (2, 1, 8)
    assert (meter.steps, meter.updates, meter.loss.item()) == (1, 0, 0.0)


def test_every_step_and_rank_draws_its_own_numbers_and_a_resumed_step_the_same():
    def seed(step, rank, ranks=3, run=0):
        trainer = bare(
            engine=EngineStub(), ranks=Ranks(rank, ranks, 0, 1), state=at_step(step), config=Config(seed=run)
        )
        return take_step(trainer, [1.0])[0][1]

    places = [(step, rank) for step in range(6) for rank in range(3)]
    assert len({seed(*place) for place in places} | {seed(*place, run=1) for place in places}) == 2 * len(places)
    assert seed(4, 2) == seed(4, 2) == mix64(mix64(4 * 3 + 2)), "also as runs of other versions"


def test_clips_are_pictured_before_the_first_step_and_after_each_evaluation():
    def drawn(step, evaluated):
        trainer = bare(engine=EngineStub(), sizes=BatchSizes(2, 2, 1), state=at_step(step, evaluated_step=evaluated))
        take_step(trainer, [1.0, 1.0])
        return trainer.log.drawn

    assert drawn(0, 0) == [("clips", 0, 0, 1, 1)]
    assert drawn(5, 5) == [("clips", 0, 20, 6, 6)], "the first micro batch alone"
    assert drawn(6, 5) == []


NAN, INF = float("nan"), float("inf")


def explain(losses: list[float], precision: str = "fp32", on_nonfinite: str = "stop", videos: int = 2) -> str:
    """What is said of a skipped step whose micro batches of so many videos have these losses."""
    trainer = bare(
        config=Config(engine=EngineConfig(precision=precision), solver=SolverConfig(on_nonfinite=on_nonfinite)),
        state=at_step(6, updates=3),  # the device answers while a later step is under way
        train_loader=SimpleNamespace(dataset=SimpleNamespace(describe=lambda sample: f"v{sample}"), epoch_samples=10),
    )
    micros = [
        MicroBatchLoss([100 * number + video for video in range(videos)], torch.tensor(loss))
        for number, loss in enumerate(losses, start=1)
    ]
    trainer.report_nonfinite(TakenStep(5, micros, Meter.new(trainer.device), lambda: False))
    return ""


def test_a_loss_that_is_not_finite_names_its_own_videos():
    for wrong in (NAN, INF):
        with pytest.raises(NonFiniteError, match=r"^step 5: the loss is not finite; videos: v200; v201\. Fix them"):
            explain([1.0, wrong])
    with pytest.raises(NonFiniteError, match=r"the loss is not finite"):
        explain([1.0, NAN], precision="fp16")


def test_a_gradient_that_is_not_finite_names_all_videos():
    with pytest.raises(NonFiniteError, match=r"step 5: the gradient is not finite; videos: v100; v101; v200; v201\. F"):
        explain([1.0, 2.0])
    explain([1.0, 2.0], precision="fp16")  # it looks for a loss scale
    taken = TakenStep(5, [MicroBatchLoss([1], torch.tensor(1.0))], Meter.new(torch.device("cpu")), lambda: False)
    assert why_skipped(taken, str, searches_loss_scale=True) == ""


@pytest.mark.parametrize(("videos", "more"), [(32, r"v131\. "), (33, r"v131 and 1 more\. "), (40, "v131 and 8 more")])
def test_many_videos_are_counted(videos, more):
    with pytest.raises(NonFiniteError, match=more):
        explain([NAN], videos=videos)


def test_a_wrong_step_may_be_skipped_and_is_counted(caplog):
    caplog.set_level("INFO", logger="text4vis")
    explain([NAN], on_nonfinite="skip")
    assert "videos: v100; v101; skipped, 2 so far" in caplog.text


def test_class_embeddings_are_those_that_train():
    classes = torch.ones(2, 3)
    model = SimpleNamespace(classifier=None, text_tower=None)
    frozen = bare(engine=SimpleNamespace(model=model), objective=SimpleNamespace(classes=classes))
    assert frozen.class_embeddings() is classes
    parameter = torch.nn.Parameter(torch.zeros(2, 3))
    trained = bare(
        engine=SimpleNamespace(
            model=SimpleNamespace(classifier=parameter, text_tower=None), result=lambda of: ("whole", of)
        )
    )
    assert trained.class_embeddings() == ("whole", parameter)


def test_class_embeddings_of_a_text_tower_that_trains_are_made_anew(monkeypatch):
    monkeypatch.setattr(module, "build_classifier", lambda config, model, names: ("anew", model, names))
    model = SimpleNamespace(classifier=None, text_tower=object())
    trainer = bare(engine=SimpleNamespace(model=model), class_names=["a"], objective=None)
    assert trainer.class_embeddings() == ("anew", model, ["a"])


def test_videos_that_were_skipped_are_listed_by_all_ranks(monkeypatch):
    joined = []
    monkeypatch.setattr(module, "join_bad_videos", joined.append)
    loader = SimpleNamespace(bad={"x": 1})
    for on_error, expected in (("fail", []), ("skip", [{"x": 1}])):
        trainer = bare(config=Config(data=DataConfig(on_error=on_error)))
        trainer.list_skipped(loader)
        assert joined == expected and trainer.log.listed == [loader]


def log_of(meter: Meter, monkeypatch, *, ranks: int = 1, state: State | None = None, gpu: float | None = None) -> dict:
    """The record of a line that is logged 2 s after the meter was made, from one of `ranks` ranks that are alike."""
    monkeypatch.setattr(module.time, "perf_counter", lambda: 102.0)
    monkeypatch.setattr(module, "gpu_utilisation", lambda: gpu)
    monkeypatch.setattr(module.distributed, "sum_over_ranks", lambda values: [ranks * value for value in values])
    engine = SimpleNamespace(
        rates=lambda: {"clip": 0.1, "head": 0.2}, model=SimpleNamespace(logit_scale=torch.tensor([0.0])),
        used=lambda parameter: parameter, grad_norm=lambda: 1.5, loss_scale=lambda: None,
    )  # fmt: skip
    loader = SimpleNamespace(epoch_samples=7, bad={1: "", 2: ""})
    trainer = bare(
        engine=engine, train_loader=loader, ranks=Ranks(0, ranks, 0, ranks), sizes=BatchSizes(4, 1, ranks),
        state=state or at_step(5, updates=4),
    )  # fmt: skip
    trainer.log_step(meter)
    ((kind, record),) = trainer.log.records
    assert kind == "train" and trainer.log.listed == [loader]
    return record


class Moment:
    """As a torch.cuda.Event that was recorded."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def elapsed_time(self, later) -> float:
        return 1000 * (later.seconds - self.seconds)


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_line_of_the_log_holds_means_over_steps_and_ranks(monkeypatch, ranks):
    waits = [(Moment(3.0), Moment(3.25)), (Moment(7.0), Moment(7.25))]
    meter = Meter(torch.tensor(6.0), started=100.0, steps=4, updates=3, waits=waits)
    record = log_of(meter, monkeypatch, ranks=ranks, gpu=0.4)
    memory = record.pop("memory_bytes")
    assert memory > 1e6
    assert record == pytest.approx({
        "step": 5, "epoch": 2.8571, "loss": 2.0, "lr_clip": 0.1, "lr_head": 0.2, "logit_scale": 1.0, "grad_norm": 1.5,
        "loss_scale": None,
        "skipped_steps": 1, "bad_videos": 2, "videos_per_second": 4 * ranks / 0.5, "step_seconds": 0.5,
        "data_wait_share": 0.25, "gpu_utilisation": 0.4,
    })  # fmt: skip


def test_a_line_of_the_log_without_an_update_has_no_loss(monkeypatch):
    record = log_of(Meter(torch.tensor(0.0), started=100.0, steps=1), monkeypatch)
    assert record["loss"] is None and record["gpu_utilisation"] is None
    assert log_of(Meter(torch.tensor(6.0), started=100.0, steps=2, updates=1), monkeypatch)["loss"] == 6


def test_a_request_during_an_evaluation_saves_and_stops():
    saved = []
    saves = SimpleNamespace(check=lambda: saved.append("checked"), finish=lambda: saved.append("on disk"))
    trainer = bare(save=lambda: saved.append("started"), state=at_step(5), saves=saves)
    trainer.save_and_stop_if_asked()
    assert saved == ["checked"]
    trainer.stop.code = 1
    with pytest.raises(Stopped, match="stopped by SIGTERM after step 5; run the command again"):
        trainer.save_and_stop_if_asked()
    assert saved[1:] == ["checked", "started", "on disk"]


def evaluated(monkeypatch, top1: float, best: float) -> tuple[Trainer, list[str], dict]:
    """An evaluation that gives `top1`, in a run whose best was `best`; and what was saved."""
    done = []
    result = {"top1": top1, "top5": 90.0, "mean_class_accuracy": 50.0, "videos": 6, "missing": 0, "per_class": []}
    order = SimpleNamespace(samples_by_source=lambda consumed: {"a": consumed})
    trainer = bare(
        state=at_step(5, best_top1=best), output=None, val_loader="val", class_names=["a"],
        engine=SimpleNamespace(model="model", named_results=lambda: iter(()), averaged=nullcontext),
        train_loader=SimpleNamespace(epoch_samples=7, planner=SimpleNamespace(order=order)),
        class_embeddings=lambda: "classes", save=lambda best: done.append(("save", best, trainer.state)),
    )  # fmt: skip

    def evaluate(model, classes, names, loader, *, weights, before_batch):
        assert (model, classes, names, loader) == ("model", "classes", ["a"], "val") and len(weights) == 64
        assert before_batch == trainer.save_and_stop_if_asked
        return result

    monkeypatch.setattr(module, "evaluate", evaluate)
    monkeypatch.setattr(module, "write_report", lambda path, report: done.append(("report", path.name, report)))
    return trainer, done, result


@pytest.mark.parametrize(("top1", "best", "better"), [(40.0, -1.0, True), (40.0, 39.0, True), (40.0, 41.0, False),
                                                      (40.0, 40.0, False), (0.0, -1.0, True)])  # fmt: skip
def test_an_evaluation_is_reported_and_the_best_weights_are_kept(monkeypatch, tmp_path, top1, best, better):
    trainer, done, result = evaluated(monkeypatch, top1, best)
    trainer.output = tmp_path
    figures = trainer.evaluate_and_save()
    main = {"top1": top1, "top5": 90.0, "mean_class_accuracy": 50.0, "videos": 6, "missing": 0}
    assert figures == main == trainer.state.figures
    assert trainer.state.evaluated_step == 5 and trainer.state.best_top1 == max(top1, best)
    assert done[0] == ("report", "report.json", {"step": 5, **result})
    assert done[1:] == [("save", better, trainer.state)]
    record = {"step": 5, "epoch": 2.8571, **main, "best_top1": max(top1, best)}
    assert trainer.log.records == [("val", record | {"samples of a": 20})] and trainer.log.listed == ["val"]
    assert trainer.log.drawn == [("evaluation", result | record, "classes", "val", 5)]


def test_other_ranks_learn_the_result_and_report_nothing(monkeypatch, tmp_path):
    trainer, done, _ = evaluated(monkeypatch, 40.0, 30.0)
    monkeypatch.setattr(module, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(module.distributed, "sum_over_ranks", lambda values: [value + 40.0 for value in values])
    trainer.settle = lambda: done.append("settled")
    assert trainer.evaluate_and_save() == {} and trainer.state.best_top1 == 40.0
    assert done == ["settled", ("save", True, trainer.state)] and trainer.log.records == []


# Runs


def test_a_run_evaluates_logs_and_saves_when_it_should(project, whole):
    output, figures, trainer = whole
    assert [record["step"] for record in records(output) if record["kind"] == "train"] == [3, 6, 9, 12, 13]
    assert [record["step"] for record in records(output) if record["kind"] == "val"] == [7, 13]
    for record in records(output):
        if record["kind"] == "train":
            epoch = 4 * (record["step"] - 1) / NUM_VIDEOS
            assert record["lr_head"] == pytest.approx(learning_rate(epoch, 2e-3, EPOCHS, 0.5))
            assert 0 <= record["data_wait_share"] < 1 and 0 < record["step_seconds"] < 60
            assert record["videos_per_second"] == pytest.approx(4 / record["step_seconds"])
    report = json.loads((output / "report.json").read_text())
    assert report["step"] == STEPS and figures == {key: report[key] for key in figures} and figures["videos"] == 26
    folders = {path.name: path for path in (output / "checkpoints").iterdir()}
    assert sorted(folders) == ["best", *(f"step-{step:08d}" for step in (5, 7, 10, 13))]
    state = checkpoint.verify(folders["step-00000013"])
    assert (state.step, state.updates, state.consumed, state.evaluated_step) == (13, 13, 52, 13)
    assert state.figures == figures and state.best_top1 == max(r["top1"] for r in records(output) if r["kind"] == "val")
    middle = checkpoint.read_state(folders["step-00000010"])
    assert (middle.evaluated_step, middle.updates) == (7, 10) and TOKENIZER in middle.inputs
    best = max((r for r in records(output) if r["kind"] == "val"), key=lambda record: record["top1"])
    assert checkpoint.verify(folders["best"]).step == best["step"]
    assert yaml.safe_load((output / "config.yaml").read_text()) == json.loads(json.dumps(trainer.config.to_dict()))
    assert state.class_names == trainer.class_names == ["class 0", "class 1", "class 2"]
    assert not (output / "few_shot.txt").exists()
    kept = RunInputs.find(output)
    assert kept is not None and kept.classes(trainer.class_names).equal(trainer.objective.classes)


def test_micro_batches_give_the_same_training(project, whole, tmp_path):
    with start(
        project, tmp_path, "data.batch_size=2", "solver.grad_accumulation_steps=2", "engine.zero_stage=2"
    ) as run:
        assert run.sizes == BatchSizes(2, 2, 1)
        run.fit()
    assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_that_was_stopped_goes_on_to_the_bit(project, whole, tmp_path, caplog, stage):
    """It stops in the middle of the second epoch, after a checkpoint that was asked for by a file."""
    settings = f"engine.zero_stage={stage}"
    caplog.set_level("INFO", "text4vis")
    trainer = start(project, tmp_path, settings)
    step = trainer.train_step

    def stopping_step(batches, meter):
        if trainer.state.step == 1:
            (tmp_path / "save-now").touch()
        if trainer.state.step == 7:
            trainer.stop.code = 1
        return step(batches, meter)

    trainer.train_step = stopping_step
    with trainer, pytest.raises(Stopped, match="stopped by SIGTERM after step 9"):
        trainer.fit()
    assert not (tmp_path / "save-now").exists()
    assert "resumed from" not in caplog.text
    assert [checkpoint.read_state(path).step for path in checkpoint.complete(tmp_path)] == [3, 5, 7, 9]
    with start(project, tmp_path, settings) as again:
        assert (again.state.step, again.state.consumed, again.start_from.name) == (9, 36, "step-00000009")
        figures = again.fit()
        assert f"resumed from {again.start_from} at step 9" in caplog.text
    assert figures == whole[1]
    if stage == 0:
        assert losses(tmp_path) == losses(whole[0]) and equal(weights(tmp_path), weights(whole[0]))
    else:
        assert losses(tmp_path) == pytest.approx(losses(whole[0]), rel=1e-5)


def test_what_a_job_cannot_train_with_is_refused_before_anything_is_opened(project, tmp_path):
    for setting in ("engine.world_size=2", "data.streams=3"):
        with pytest.raises(ConfigError, match=setting.partition("=")[0]):
            start(project, tmp_path, setting)


def test_a_zero_3_run_may_begin_with_an_evaluation_and_the_job_uses_what_it_is_told(project, tmp_path):
    begun = time.monotonic()
    with start(project, tmp_path, "engine.zero_stage=3", "engine.num_threads=2", "engine.tf32=true") as trainer:
        assert torch.get_num_threads() == 2 and torch.backends.cuda.matmul.allow_tf32
        assert begun < trainer.saved_at < time.monotonic()
        assert trainer.evaluate_and_save()["videos"] == NUM_VIDEOS


def test_a_finished_run_stays_finished_and_another_is_never_mixed_in(project, whole, monkeypatch, caplog):
    output, figures, _ = whole
    before = (output / "metrics.jsonl").read_text()
    kept = []
    monkeypatch.setattr(RunInputs, "keep", lambda run, *_: kept.append(run))
    caplog.set_level("INFO", "text4vis")
    with start(project, output) as again:
        assert again.fit() == figures and kept == [], "it keeps the inputs that it began with"
        assert f"all {STEPS} steps of this run are done" in caplog.text and "fewer frames" not in caplog.text
        monkeypatch.setattr(RunInputs, "find", lambda run: None)
        again.open_logs()
        assert kept == [output], "a run of version 0.1 has none"
    assert (output / "metrics.jsonl").read_text() == before
    with pytest.raises(CheckpointError, match="holds a run already"):
        start(project, output, resume="never")
    with pytest.raises(CheckpointError, match="the configuration differs"):
        start(project, output, "solver.lr=1")


def test_the_loss_must_take_the_labels_of_both_splits(project, tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(module, "check_labels", lambda config, split, dataset: checked.append((split, dataset)))
    monkeypatch.setattr(module, "check_same_classes", lambda config, *splits: checked.append(splits))
    with start(project, tmp_path) as trainer:
        train, val = trainer.train_loader.dataset, trainer.val_loader.dataset
        assert checked == [(train.classes, val.classes), ("train", train), ("val", val)]


def test_a_dry_run_warns_and_leaves_nothing(project, tmp_path, caplog):
    with start(project, tmp_path) as trainer:
        before = {name: value.clone() for name, value in trainer.engine.named_weights()}
        trainer.dry_run()
        assert "3 of 26 videos have fewer frames than data.num_segments" in caplog.text
        gradients = [p.grad for p in trainer.engine.model.parameters() if p.requires_grad]
        assert gradients and all(gradient is not None for gradient in gradients), "one micro batch went backward"
        assert equal(dict(trainer.engine.named_weights()), before)
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_few_videos_lists_them_and_starts_from_other_weights(project, whole, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "text4vis")
    with start(project, tmp_path, "data.shot=2", "data.batch_size=7", f"pretrain={whole[0]}") as trainer:
        assert 7 * (trainer.num_steps - 1) < EPOCHS * trainer.train_loader.epoch_samples < 7 * trainer.num_steps
        best = checkpoint.read_parts(whole[0] / "checkpoints" / "best").video
        assert equal({name: value for name, value in trainer.engine.named_weights() if name in best}, best)
        with monkeypatch.context() as full, pytest.raises(CheckpointError, match="checkpoints need"):
            full.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
            trainer.open_logs()
        assert list(tmp_path.iterdir()) == []
        trainer.open_logs()
        assert (tmp_path / "few_shot.txt").read_text() == trainer.train_loader.planner.few_shot_list()
        assert "fewer frames" in caplog.text and "steps of this run are done" not in caplog.text
        inputs, kept = RunInputs.find(tmp_path), []
        monkeypatch.setattr(RunInputs, "keep", lambda run, *_: kept.append(run))
        trainer.open_logs()
        assert inputs is not None and kept == [tmp_path], "those of a job that ended before its first checkpoint go"


@pytest.mark.parametrize("step", ["first", "last"])
def test_a_step_that_is_not_finite_is_skipped_in_a_run(project, tmp_path, monkeypatch, step):
    wrong = {"first": 0, "last": STEPS - 1}[step]
    compute = module.Objective.__call__
    monkeypatch.setattr(Trainer, "evaluation_is_due", lambda trainer: False)
    with start(project, tmp_path, "solver.on_nonfinite=skip", "logging.print_freq=1") as trainer:
        monkeypatch.setattr(
            module.Objective,
            "__call__",
            lambda *given: compute(*given) * (NAN if trainer.state.step == wrong else 1),
        )
        trainer.fit()
        assert (trainer.state.step, trainer.state.updates) == (STEPS, STEPS - 1)
    assert [number for number, loss in losses(tmp_path).items() if loss is None] == [wrong + 1]
