"""The training run: build, resume, loop {evaluate, step, log, save}, close.

B videos of a micro batch, T frames, C classes, D embedding width.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from shards.plan import mix64
from text4vis.classifier.embeddings import build_classifier, training_classes
from text4vis.cluster import distributed
from text4vis.cluster.stop import NonFiniteError, Stopped, StopRequest
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config
from text4vis.data.datasets import check_labels, check_same_classes, class_names, positive_share
from text4vis.data.loader import Batch, Loader, build_loader
from text4vis.data.traps import log_traps
from text4vis.evaluation.embedding import evaluate, join_bad_videos
from text4vis.evaluation.protocols import deciding_figure, decision_of, in_words, main_figures, write_report
from text4vis.model.adapters import add_adapters, merged
from text4vis.model.video_clip import Classes, VideoClip, build_model
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import State
from text4vis.saved.inputs import RunInputs
from text4vis.saved.opening import load_pretrained
from text4vis.saved.runs import find_start
from text4vis.saved.weights import weights_fingerprint
from text4vis.training import checkpointing, joining
from text4vis.training.engine import Engine
from text4vis.training.logs import Meter, gpu_utilisation, memory_bytes, table
from text4vis.training.losses import Objective
from text4vis.training.optim import scheduled_rate
from text4vis.training.run_log import RunLog
from text4vis.training.settings import run_settings
from text4vis.training.steps import MicroBatchLoss, TakenStep, why_skipped

logger = logging.getLogger("text4vis")

FEW_SHOT_LIST = "few_shot.txt"  # in OUT: the videos that data.shot chose, by name
SAVE_NOW = "save-now"  # in OUT: a file whose appearance asks for a checkpoint


@dataclass(frozen=True)
class Requests:
    """What all ranks agreed to do after a step. stop: index into StopRequest.REASONS, 0 for none."""

    stop: int = 0
    save: bool = False


class Trainer:
    """One run in the folder `output`. resume: "auto" (its last sound checkpoint, if any), "never", or a checkpoint.

    stop: requests to stop early, from the moment it was made. Close it, or use it as a context manager. Raises
    ConfigError, CheckpointError or ShardError.
    """

    def __init__(self, config: Config, output: Path, stop: StopRequest, resume: str = "auto") -> None:
        self.output, self.stop = output, stop
        self.ranks = distributed.ranks()
        joining.check_world_size(config, self.ranks.world_size)
        self.start_from = distributed.from_main(lambda: find_start(output, resume))
        start = None if self.start_from is None else checkpoint.read_state(self.start_from)
        self.config = config = joining.settled(config, self.start_from)
        self.sizes = BatchSizes.of(config, self.ranks.world_size, start.global_batch if start else None)
        joining.check_streams(config.data.streams, self.sizes.global_batch, self.ranks)
        torch.manual_seed(config.seed)  # the head's first weights: equal on all ranks
        distributed.use_cores(config.engine.num_threads)
        distributed.use_tf32(config.engine.tf32)
        with ExitStack() as opened:
            self.val_loader = opened.enter_context(self._loader("val"))
            self.train_loader = opened.enter_context(self._loader("train", start.consumed if start else 0))
            self.class_names = class_names(config, self.train_loader.dataset)
            class_names(config, self.val_loader.dataset)  # the list must fit its labels too
            check_same_classes(config, self.train_loader.dataset.classes, self.val_loader.dataset.classes)
            for loader in (self.train_loader, self.val_loader):
                check_labels(config, loader.split, loader.dataset)
            self.num_steps = math.ceil(config.solver.epochs * self.train_loader.epoch_samples / self.sizes.global_batch)
            self.state = self._state(start)
            self.device = distributed.device()
            model, classes = self._model_and_classes()
            self.state = joining.with_tokenizer(self.state, model, output)
            share, bias = positive_share(self.train_loader.dataset, len(self.class_names)), self.state.logit_bias
            self.objective = Objective(config, classes.to(self.device), self.sizes.micro, share=share, bias=bias)
            self.engine = self._engine(model)
            self.saves = checkpointing.Saves(self.engine, output, config.logging.keep_checkpoints)
            opened.callback(self.saves.close)
            self._opened = opened.pop_all()
        self.log = RunLog()
        self.agreement: Callable[[], list[int]] | None = None  # of the step before
        self.taken: TakenStep | None = None  # the step before
        self.saved_at = time.monotonic()
        stop.limit(config.engine.wall_minutes)

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch. Returns the last evaluation's figures (empty on ranks other than 0).

        Raises Stopped when it was asked to stop (the checkpoint is written), NonFiniteError, or CheckpointError.
        """
        self.open_logs()
        batches = iter(self.train_loader)
        meter = Meter.new(self.device)
        while True:
            if self.evaluation_is_due():
                self.evaluate_and_save()
                meter = Meter.new(self.device)
            if self.state.step == self.num_steps:
                break
            requests = self.train_step(batches, meter)
            self.saves.check()
            if self.state.step % self.config.logging.print_freq == 0 or self.state.step == self.num_steps:
                self.log_step(meter)
                meter = Meter.new(self.device)
            if requests.stop or self.save_is_due(requests):
                self.save()
            if requests.stop:
                raise self.stopped(requests.stop)
        self.saves.finish()
        self.log.add_pictures(self.state.step, lambda board: board.end(self.state.step))
        return self.state.figures

    def dry_run(self) -> None:
        """Runs one micro batch forward and backward and logs the memory that it took. Changes and writes nothing."""
        logger.info("%s", table("settings", run_settings(self)))
        if self.ranks.is_main:
            log_traps(logger, self.config, self.class_names, self.train_loader.dataset)
        self.backward(next(iter(self.train_loader)))
        (memory,) = distributed.start_max([int(memory_bytes())])()
        logger.info("dry run: one micro batch took %.2f GB on the rank that used most", memory / 1e9)

    def train_step(self, batches: Iterator[Batch], meter: Meter) -> Requests:
        """One optimiser step: all micro batches of this rank's share of a global batch."""
        torch.manual_seed(mix64(self.config.seed ^ mix64(self.state.step * self.ranks.world_size + self.ranks.rank)))
        self.engine.set_rates(lambda peak: scheduled_rate(self.epoch, peak, self.config.solver))
        seen: list[MicroBatchLoss] = []
        for _ in range(self.sizes.accumulation):
            with meter.waiting():
                batch = next(batches)
            if not seen and self.state.step == self.state.evaluated_step:
                self.picture_clips(batch)
            seen.append(self.backward(batch))
            applied = self.engine.step()
        meter.steps += 1
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            consumed=self.state.consumed + self.sizes.global_batch,
            logit_bias=self.objective.bias,
        )
        self.settle()
        self.taken = TakenStep(self.state.step, seen, meter, applied)
        return self.agree()

    def backward(self, batch: Batch) -> MicroBatchLoss:
        """Forward and backward pass of a micro batch."""
        frames_BTCHW = batch.frames.to(self.device, non_blocking=True)[:, 0]
        ids = batch.ids.tolist()
        loss = self.objective(self.engine, frames_BTCHW, batch.labels, ids, self.state.consumed)
        self.engine.backward(loss)
        return MicroBatchLoss(ids, loss.detach().float())

    def settle(self) -> None:
        """Counts the step that was taken last as an update or as skipped. Raises NonFiniteError. Collective.

        Called when the next step is under way: then the device has the answer, and has work while the host reads it.
        """
        taken, self.taken = self.taken, None
        if taken is None:
            return
        if not taken.applied():
            self.report_nonfinite(taken)
            return
        taken.meter.loss += torch.stack([micro.loss for micro in taken.seen]).mean()
        taken.meter.updates += 1
        self.state = replace(self.state, updates=self.state.updates + 1)

    def agree(self) -> Requests:
        """What the ranks asked for by the end of the step before. Their answers had a step's time, so none waits."""
        before, self.agreement = self.agreement, distributed.start_max([self.stop.code, self.wants_save()])
        if before is None:
            return Requests()
        stop, save = before()
        return Requests(stop, bool(save))

    def report_nonfinite(self, taken: TakenStep) -> None:
        """The step was skipped on all ranks. Raises NonFiniteError where solver.on_nonfinite says stop. Collective."""
        searches = self.config.engine.precision in ("fp16", "amp")
        message = why_skipped(taken, self.train_loader.dataset.describe, searches_loss_scale=searches)
        if message and self.config.solver.on_nonfinite == "stop":
            raise NonFiniteError(f"{message}. Fix them, lower solver.lr, or go on with solver.on_nonfinite=skip")
        skipped = taken.number - self.state.updates
        logger.info("%s; skipped, %d so far", message or f"step {taken.number}: fp16 overflow", skipped)

    @property
    def epoch(self) -> float:
        """Epochs consumed, fractional."""
        return self.state.consumed / self.train_loader.epoch_samples

    def evaluation_is_due(self) -> bool:
        """Once after every `eval_freq` epochs, at the first step that reaches one, and at the end."""
        if self.state.evaluated_step == self.state.step:
            return False
        period = self.config.logging.eval_freq * self.train_loader.epoch_samples
        crossed = self.state.consumed // period > (self.state.consumed - self.sizes.global_batch) // period
        return crossed or self.state.step == self.num_steps

    def wants_save(self) -> bool:
        """Whether it is time for a checkpoint or OUT/save-now asks for one. Rank 0 decides for all."""
        if not self.ranks.is_main:
            return False
        minutes = self.config.logging.save_minutes
        is_time = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return is_time or (self.output / SAVE_NOW).exists()

    def save_is_due(self, requests: Requests) -> bool:
        """Whether the ranks agreed on a checkpoint, or `logging.save_steps` asks for one after this step."""
        every = self.config.logging.save_steps
        return requests.save or (every is not None and self.state.step % every == 0)

    def save(self, *, best: bool = False) -> None:
        """Starts to write a checkpoint of this step, and with `best` the best weights. Collective.

        Raises CheckpointError, also for the save before, or ShardError.
        """
        self.settle()
        self.list_skipped(self.train_loader)  # so that a resumed run need not meet them again
        self.saves.start(self.state, best=best)
        if self.agreement is not None:  # a save that was asked for meanwhile is done; a stop is asked for again
            self.agreement()
            self.agreement = None
        self.saved_at = time.monotonic()
        if self.ranks.is_main:
            (self.output / SAVE_NOW).unlink(missing_ok=True)

    def stopped(self, code: int) -> Stopped:
        """Waits for the last save. Returns the exception that ends a run which was asked to stop. Collective."""
        self.saves.finish()
        return Stopped(
            f"stopped by {StopRequest.REASONS[code]} after step {self.state.step}; run the command again to go on"
        )

    def class_embeddings(self) -> torch.Tensor:
        """Class embeddings (C, D) as trained so far, for evaluation. Collective."""
        model = self.engine.model
        if model.classifier is not None:
            return self.engine.result(model.classifier)
        if model.text_tower is not None:
            return build_classifier(self.config, model, self.class_names)
        assert isinstance(self.objective.classes, torch.Tensor), "what trains is embedded anew"
        return self.objective.classes

    def log_step(self, meter: Meter) -> None:
        """Logs the means since the last line. Collective. Only here a step's numbers are read from the device."""
        self.settle()
        seconds = time.perf_counter() - meter.started
        (loss,) = distributed.sum_over_ranks([meter.loss.item() / max(1, meter.updates) / self.ranks.world_size])
        wait_seconds, memory, computing = distributed.sum_over_ranks(
            [meter.wait_seconds(), memory_bytes(), gpu_utilisation() or 0.0]
        )
        self.list_skipped(self.train_loader)
        rates = self.engine.rates()
        step_seconds, wait_share = seconds / meter.steps, wait_seconds / self.ranks.world_size / seconds
        record = {
            "step": self.state.step,
            "epoch": round(self.epoch, 4),
            "loss": loss if meter.updates else None,
            **{f"lr_{name}": rate for name, rate in rates.items()},
            "logit_scale": float(self.engine.used(self.engine.model.logit_scale).float().exp()),
            "grad_norm": self.engine.grad_norm(),
            "loss_scale": self.engine.loss_scale(),
            "skipped_steps": self.state.step - self.state.updates,
            "bad_videos": len(self.train_loader.bad),
            "videos_per_second": self.sizes.global_batch / step_seconds,
            "step_seconds": step_seconds,
            "data_wait_share": wait_share,
            "memory_bytes": memory,
            "gpu_utilisation": None if gpu_utilisation() is None else computing / self.ranks.world_size,
        }
        self.log.write("train", record)
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f videos/s  %.3f s/step  waiting for data %.0f %%  %s left",
            self.state.step, self.num_steps, self.epoch, loss, [*rates.values()][-1],
            self.sizes.global_batch / step_seconds, step_seconds, 100 * wait_share,
            timedelta(seconds=round((self.num_steps - self.state.step) * step_seconds)),
        )  # fmt: skip

    def list_skipped(self, loader: Loader) -> None:
        """Writes down the videos that ranks have skipped. Raises ShardError past data.max_bad_share. Collective."""
        if self.config.data.on_error == "skip":
            join_bad_videos(loader.bad)
        self.log.list_skipped(loader)

    def picture_clips(self, batch: Batch) -> None:
        """Shows the first videos of a micro batch in TensorBoard."""
        step, consumed = self.state.step + 1, self.state.consumed
        self.log.add_pictures(step, lambda board: board.training_clips(batch, consumed, step))

    def evaluate_and_save(self) -> dict[str, Any]:
        """Evaluates, writes report.json, the best weights when they are better, and a checkpoint.

        Asked to stop meanwhile, it saves at once and raises Stopped; the run then goes on with this evaluation.
        """
        self.settle()
        with self.engine.averaged():
            classes_CD = self.class_embeddings()
            weights = merged(checkpointing.gather_weights(self.engine), self.state.config)
            result = evaluate(
                self.engine.model, classes_CD, self.class_names, self.val_loader,
                weights=weights_fingerprint(weights), before_batch=self.save_and_stop_if_asked,
            )  # fmt: skip
        (deciding,) = distributed.sum_over_ranks([deciding_figure(result) if result else 0.0])
        figures = self.report_evaluation(result, classes_CD) if result else {}
        self.list_skipped(self.val_loader)
        is_best, best_top1 = deciding > self.state.best_top1, max(deciding, self.state.best_top1)
        self.state = replace(self.state, evaluated_step=self.state.step, best_top1=best_top1, figures=figures)
        self.save(best=is_best)
        return figures

    def report_evaluation(self, result: dict[str, Any], classes_CD: torch.Tensor) -> dict[str, Any]:
        """Writes down an evaluation's result on rank 0. Returns its main figures."""
        figures = main_figures(result)
        record = {"step": self.state.step, "epoch": round(self.epoch, 4), **figures}
        record["best_top1"] = max(deciding_figure(result), self.state.best_top1)
        by_source = self.train_loader.planner.order.samples_by_source(self.state.consumed)
        self.log.write("val", record | {f"samples of {name}": count for name, count in by_source.items()})
        write_report(self.output / "report.json", {"step": self.state.step, **result})
        self.log.add_pictures(
            self.state.step, lambda board: board.evaluation(result | record, classes_CD, self.val_loader)
        )
        logger.info("evaluation after epoch %.2f: %s of %d videos", self.epoch, in_words(figures), result["videos"])
        return figures | decision_of(result)

    def save_and_stop_if_asked(self) -> None:
        """Called before each batch of an evaluation. Collective. Raises Stopped, or CheckpointError of a save."""
        self.saves.check()
        (code,) = distributed.start_max([self.stop.code])()
        if code:
            self.save()
            raise self.stopped(code)

    def open_logs(self) -> None:
        """Rank 0 writes config.yaml and few_shot.txt, and cuts the logs back to the step that the run goes on from."""
        settings = run_settings(self)
        if not self.ranks.is_main:
            return
        checkpointing.check_room(self.output, self.config.logging.keep_checkpoints, *self.engine.state_bytes())
        if self.start_from is not None:
            logger.info("resumed from %s at step %d", self.start_from, self.state.step)
        if self.state.step == self.num_steps:
            logger.info("all %d steps of this run are done", self.num_steps)
        logger.info("%s", table("settings", settings))
        if self.start_from is None:
            log_traps(logger, self.config, self.class_names, self.train_loader.dataset)
        classes = self.objective.classes
        (self.output / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        if self.start_from is None or RunInputs.find(self.output) is None:
            kept = classes if isinstance(classes, torch.Tensor) else None
            RunInputs.keep(self.output, self.engine.model, self.config, kept)
        if self.config.data.shot:
            (self.output / FEW_SHOT_LIST).write_text(self.train_loader.planner.few_shot_list(), encoding="utf-8")
        global_batch, step = self.sizes.global_batch, self.state.step
        self.log = RunLog.open(self.output, self.config, self.class_names, global_batch=global_batch, step=step)

    def close(self) -> None:
        """Ends the last save and the loaders' threads, and closes the logs. It may be called more than once."""
        self._opened.close()
        self.log.close()

    def __enter__(self) -> Trainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _loader(self, split: str, consumed: int = 0) -> Loader:
        place = self.ranks
        return build_loader(
            self.config, split, rank=place.rank, world_size=place.world_size, consumed=consumed, sizes=self.sizes
        )

    def _state(self, start: State | None) -> State:
        """The state of a new run, or that of the checkpoint if it is of the run that is wanted."""
        first = joining.first_state(self.config, self.train_loader, self.class_names, self.sizes.global_batch)
        if start is None:
            return first
        assert self.start_from is not None
        few_shot_list = self.output / FEW_SHOT_LIST
        joining.check_joins(start, self.config, self.train_loader, first.inputs, self.start_from, few_shot_list)
        return replace(start, config=first.config)

    def _model_and_classes(self) -> tuple[VideoClip, Classes]:
        """The model with the weights that the run starts from, and its classes; a run that goes on keeps both."""
        config = self.config
        inputs = None if self.start_from is None else RunInputs.find(self.start_from.parent.parent)
        network = config.network if inputs is None else inputs.network(config.network)
        model = build_model(network, config.data.num_segments, image_size=config.data.input_size)
        if inputs is not None:
            inputs.load_text(model)
        if self.start_from is not None:
            add_adapters(model, config.network)
            checkpoint.load_to_train(model, self.start_from)  # the engine restores only what trains
        elif config.pretrain:
            load_pretrained(model, Path(config.pretrain))
        if self.start_from is None:
            add_adapters(model, config.network)
        classes_CD = None if inputs is None else inputs.classes(self.class_names)
        return model, training_classes(config, model, self.class_names) if classes_CD is None else classes_CD

    def _engine(self, model: VideoClip) -> Engine:
        """The engine with the checkpoint's optimiser state and fp32 weights, or the model's own to begin with."""
        first = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        engine = Engine(model, self.config, self.sizes)
        if self.start_from is None:
            engine.restore(first.__getitem__, None, 0)
        else:
            checkpointing.load(engine, self.start_from, self.state)
        if self.config.engine.zero_stage == 3:
            # DeepSpeed finds the parameters of a part, which evaluation calls, only after one pass of the whole model.
            data = self.config.data
            shape = (1, data.num_segments, 3, data.input_size, data.input_size)
            with torch.no_grad():
                engine(torch.zeros(shape, dtype=torch.uint8, device=self.device), self.objective.classes)
        return engine
