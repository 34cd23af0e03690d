"""The training run: build, resume, loop {evaluate, step, log, save}, close.

B videos of a micro batch, T frames, C classes, D embedding width.
"""

from __future__ import annotations

import itertools
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from shards.format import ShardError
from shards.plan import mix64
from text4vis.classifier.embeddings import build_classifier, file_digest, training_classes
from text4vis.cluster import distributed
from text4vis.cluster.stop import NonFiniteError, Stopped, StopRequest
from text4vis.config.schema import Config, ConfigError
from text4vis.data.bad_videos import SkippedList
from text4vis.data.loader import Batch, Loader, build_loader, class_names
from text4vis.evaluation.embedding import evaluate, join_bad_videos, weights_fingerprint
from text4vis.evaluation.protocols import write_report
from text4vis.model.video_clip import build_model
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.runs import check_same_run, check_streams, cut_global_batch, find_start
from text4vis.training import engine
from text4vis.training.logs import Meter, Metrics, gpu_utilisation, memory_bytes, table
from text4vis.training.losses import Objective
from text4vis.training.optim import scheduled_rate

if TYPE_CHECKING:
    from text4vis.report.tensorboard import Story

logger = logging.getLogger("text4vis")

FEW_SHOT_LIST = "few_shot.txt"  # in OUT: the videos that data.shot chose, by name
SAVE_NOW = "save-now"  # in OUT: a file whose appearance asks for a checkpoint
MOST_VIDEOS_NAMED = 32


@dataclass(frozen=True)
class Orders:
    """What all ranks agreed on during a step. stop: index into StopRequest.REASONS, 0 for none."""

    stop: int = 0
    save: bool = False


class Trainer:
    """One run in the folder `output`. resume: "auto" (its last sound checkpoint, if any), "never", or a checkpoint.

    stop: requests to stop early, from the moment it was made. Raises ConfigError, CheckpointError or ShardError.
    """

    def __init__(self, config: Config, output: Path, stop: StopRequest, resume: str = "auto") -> None:
        self.given_config, self.output, self.stop = config, output, stop
        self.ranks = distributed.ranks()
        _check_world_size(config, self.ranks.world_size)
        self.start_from = distributed.from_main(lambda: find_start(output, resume))
        start = None if self.start_from is None else checkpoint.read_state(self.start_from)
        self.config = cut_global_batch(config, self.ranks.world_size, start.global_batch if start else None)
        self.global_batch: int = self.config.solver.global_batch  # type: ignore[assignment]
        check_streams(config.data.streams, self.global_batch, self.ranks)
        torch.manual_seed(config.seed)  # the head's first weights: equal on all ranks
        distributed.use_cores(config.engine.num_threads)
        self.val_loader = self._loader("val")
        self.train_loader = self._loader("train")
        self.class_names = class_names(config, self.train_loader.dataset)
        _check_same_classes(config, self.train_loader.dataset.classes, self.val_loader.dataset.classes)
        self.num_steps = math.ceil(config.solver.epochs * self.train_loader.epoch_samples / self.global_batch)
        self.state = self._first_state(config) if start is None else self._joined_state(config, start)
        self.device = distributed.device()
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
        if self.start_from is not None:
            checkpoint.load_checkpoint(model, self.start_from)  # the engine restores only what trains
        elif config.pretrain:
            checkpoint.load_pretrained(model, Path(config.pretrain))
        self.objective = Objective(self.config, training_classes(config, model, self.class_names).to(self.device))
        self.engine = self._start_engine(model)
        self.metrics: Metrics | None = None
        self.skipped_list: SkippedList | None = None
        self.story: Story | None = None
        self.saved_at = time.monotonic()
        stop.limit(config.engine.wall_minutes)

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch. Returns the last evaluation's figures (empty on ranks other than 0).

        Raises Stopped when it was asked to stop (the checkpoint is written), NonFiniteError, or CheckpointError.
        """
        self.open_logs()
        if self.state.step == self.num_steps:
            logger.info("all %d steps of this run are done", self.num_steps)
        batches = iter(self.train_loader)
        meter = Meter.new(self.device)
        while True:
            if self.evaluation_is_due():
                self.evaluate_and_save()
                meter = Meter.new(self.device)
            if self.state.step == self.num_steps:
                break
            orders = self.train_step(batches, meter)
            if self.state.step % self.config.logging.print_freq == 0 or self.state.step == self.num_steps:
                self.log_step(meter)
                meter = Meter.new(self.device)
            if orders.stop or self.save_is_due(orders):
                self.save()
            if orders.stop:
                raise self.stopped(orders.stop)
        self.tell(lambda story: story.end(self.state.step))
        self.close()
        return self.state.figures

    def dry_run(self) -> None:
        """One micro batch forward and backward; says what memory it took. Changes and writes nothing."""
        logger.info("%s", table("settings", self.settings()))
        self.backward(next(iter(self.train_loader)), [])
        (memory,) = distributed.start_max([int(memory_bytes())])()
        logger.info("dry run: one micro batch took %.2f GB on the fullest rank", memory / 1e9)
        self.close()

    def train_step(self, batches: Any, meter: Meter) -> Orders:
        """One optimiser step: all micro batches of this rank's share of a global batch."""
        torch.manual_seed(mix64(self.config.seed ^ mix64(self.state.step * self.ranks.world_size + self.ranks.rank)))
        for group in self.engine.basic_optimizer.param_groups:
            group["lr"] = scheduled_rate(self.epoch, group["base_lr"], self.config.solver)
        seen: list[tuple[list[int], torch.Tensor]] = []
        steps = self.config.solver.grad_accumulation_steps
        for micro_step in range(steps):
            waiting = time.perf_counter()
            batch = next(batches)
            meter.wait_seconds += time.perf_counter() - waiting
            if micro_step == 0 and self.state.step == self.state.evaluated_step:
                self.tell(
                    lambda story, *clips: story.training_clips(*clips), batch, self.state.consumed, self.state.step + 1
                )
            self.backward(batch, seen)
            if micro_step == steps - 1:
                agreement = distributed.start_max([self.stop.code, self.wants_save()])
            applied = engine.take_step(self.engine)
        if applied:
            meter.loss += torch.stack([loss for _, loss in seen]).mean()
            meter.updates += 1
        else:
            self.report_nonfinite(seen)
        meter.steps += 1
        self.state = replace(
            self.state,
            step=self.state.step + 1,
            updates=self.state.updates + applied,
            consumed=self.state.consumed + self.global_batch,
        )
        stop, save = agreement()
        return Orders(stop, bool(save))

    def backward(self, batch: Batch, seen: list[tuple[list[int], torch.Tensor]]) -> None:
        """Forward and backward pass of a micro batch; adds its videos and its loss to `seen`."""
        frames_BTCHW = batch.frames.to(self.device, non_blocking=True)[:, 0]
        labels_B = batch.labels.to(self.device, non_blocking=True)
        loss = self.objective(self.engine, frames_BTCHW, labels_B, batch.ids.tolist(), self.state.consumed)
        seen.append((batch.ids.tolist(), loss.detach().float()))
        self.engine.backward(loss)

    def report_nonfinite(self, seen: list[tuple[list[int], torch.Tensor]]) -> None:
        """The step was skipped on all ranks. Raises NonFiniteError where solver.on_nonfinite says stop. Collective.

        fp16 skips steps while it looks for a loss scale: that is an error only if a loss is not finite.
        """
        wrong = [ids for ids, loss in seen if not bool(torch.isfinite(loss))]
        gathered = distributed.gather_to_main((wrong, [ids for ids, _ in seen]))

        def explain() -> str:
            assert gathered is not None
            suspects = [sample for wrong, _ in gathered for ids in wrong for sample in ids]
            if not suspects and self.config.engine.precision == "fp16":
                return ""
            what = "loss" if suspects else "gradient"
            suspects = suspects or [sample for _, all_ids in gathered for ids in all_ids for sample in ids]
            names = [self.train_loader.dataset.describe(sample) for sample in suspects[:MOST_VIDEOS_NAMED]]
            more = f" and {len(suspects) - len(names)} more" if len(suspects) > len(names) else ""
            return f"step {self.state.step + 1}: the {what} is not finite; videos: {'; '.join(names)}{more}"

        message = distributed.from_main(explain)
        if message and self.config.solver.on_nonfinite == "stop":
            raise NonFiniteError(f"{message}. Mend them, lower solver.lr, or go on with solver.on_nonfinite=skip")
        skipped = self.state.step + 1 - self.state.updates
        logger.info("%s; skipped, %d so far", message or f"step {self.state.step + 1}: fp16 overflow", skipped)

    @property
    def epoch(self) -> float:
        """Epochs consumed, fractional."""
        return self.state.consumed / self.train_loader.epoch_samples

    def evaluation_is_due(self) -> bool:
        """Once after every `eval_freq` epochs, at the first step that reaches one, and at the end."""
        if self.state.evaluated_step == self.state.step:
            return False
        period = self.config.logging.eval_freq * self.train_loader.epoch_samples
        crossed = self.state.consumed // period > (self.state.consumed - self.global_batch) // period
        return crossed or self.state.step == self.num_steps

    def wants_save(self) -> bool:
        """Rank 0's clock and its look at OUT/save-now decide for all."""
        if not self.ranks.is_main:
            return False
        minutes = self.config.logging.save_minutes
        is_time = minutes is not None and time.monotonic() - self.saved_at > 60 * minutes
        return is_time or (self.output / SAVE_NOW).exists()

    def save_is_due(self, orders: Orders) -> bool:
        every = self.config.logging.save_steps
        return orders.save or (every is not None and self.state.step % every == 0)

    def save(self) -> None:
        self.list_skipped(self.train_loader)  # what a resumed run has behind it is not met again
        checkpoint.save(self.engine, self.output, self.state, keep=self.config.logging.keep_checkpoints)
        self.saved_at = time.monotonic()
        if self.ranks.is_main:
            (self.output / SAVE_NOW).unlink(missing_ok=True)
            logger.info("saved step %d", self.state.step)

    def stopped(self, code: int) -> Stopped:
        return Stopped(
            f"stopped by {StopRequest.REASONS[code]} after step {self.state.step}; run the command again to go on"
        )

    def class_embeddings(self) -> torch.Tensor:
        """Class embeddings (C, D) as trained so far, for evaluation. Collective."""
        model = self.engine.module
        if model.classifier is not None:
            return engine.whole(self.engine, model.classifier)
        if model.text_tower is not None:
            return build_classifier(self.config, model, self.class_names)
        return self.objective.classes

    def log_step(self, meter: Meter) -> None:
        seconds = time.perf_counter() - meter.started
        (loss,) = distributed.sum_over_ranks([meter.loss.item() / max(1, meter.updates) / self.ranks.world_size])
        wait_seconds, memory, computing = distributed.sum_over_ranks(
            [meter.wait_seconds, memory_bytes(), gpu_utilisation() or 0.0]
        )
        self.list_skipped(self.train_loader)
        groups = self.engine.basic_optimizer.param_groups
        grad_norm = self.engine.get_global_grad_norm()
        record = {
            "step": self.state.step,
            "epoch": round(self.epoch, 4),
            "loss": loss if meter.updates else None,
            **{f"lr_{group['name']}": group["lr"] for group in groups},
            "logit_scale": float(engine.whole(self.engine, self.engine.module.logit_scale).float().exp()),
            "grad_norm": None if grad_norm is None else float(grad_norm),
            "skipped_steps": self.state.step - self.state.updates,
            "bad_videos": len(self.train_loader.bad),
            "videos_per_second": meter.steps * self.global_batch / seconds,
            "step_seconds": seconds / meter.steps,
            "data_wait_share": wait_seconds / self.ranks.world_size / seconds,
            "memory_bytes": memory,
            "gpu_utilisation": None if gpu_utilisation() is None else computing / self.ranks.world_size,
        }
        if self.metrics is not None:
            self.metrics.write("train", record)
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f videos/s  %.3f s/step  waiting for data %.0f %%  %s left",
            self.state.step, self.num_steps, self.epoch, loss, groups[-1]["lr"],
            record["videos_per_second"], record["step_seconds"], 100 * record["data_wait_share"],
            timedelta(seconds=round((self.num_steps - self.state.step) * record["step_seconds"])),
        )  # fmt: skip

    def list_skipped(self, loader: Loader) -> None:
        """Writes down the videos that ranks have skipped. Raises ShardError past data.max_bad_share. Collective."""
        if self.config.data.on_error == "skip":
            join_bad_videos(loader.bad)
        if self.skipped_list is not None:
            self.skipped_list.add(loader.split, loader.bad.entries())

    def tell(self, part: Callable[..., None], *arguments: Any) -> None:
        """A part of the run's story in pictures, on the rank that has one. What it cannot do ends no job."""
        if self.story is None:
            return
        try:
            part(self.story, *arguments)
        except (ShardError, OSError) as error:
            logger.warning("TensorBoard: pictures of step %d left out: %s", self.state.step, error)

    def evaluate_and_save(self) -> dict[str, Any]:
        """Evaluates, writes report.json, the best weights when they are better, and a checkpoint.

        Asked to stop meanwhile, it saves at once and raises Stopped; the run then goes on with this evaluation.
        """
        classes_CD = self.class_embeddings()
        result = evaluate(
            self.engine.module, classes_CD, self.class_names, self.val_loader,
            weights=weights_fingerprint(checkpoint.gather_weights(self.engine)),
            before_batch=self.save_and_stop_if_asked,
        )  # fmt: skip
        (top1,) = distributed.sum_over_ranks([result["top1"] if result else 0.0])
        figures: dict[str, Any] = {}
        if result:
            figures = {key: result[key] for key in ("top1", "top5", "mean_class_accuracy", "videos", "missing")}
            record = {"step": self.state.step, "epoch": round(self.epoch, 4), **figures}
            record["best_top1"] = max(result["top1"], self.state.best_top1)
            by_source = self.train_loader.planner.order.samples_by_source(self.state.consumed)
            record |= {f"samples of {name}": count for name, count in by_source.items()}
            if self.metrics is not None:
                self.metrics.write("val", record)
            write_report(self.output / "report.json", {"step": self.state.step, **result})
            self.tell(lambda story: story.evaluation(result | record, classes_CD, self.val_loader))
            logger.info(
                "evaluation after epoch %.2f: top-1 %.2f %%  top-5 %.2f %%  of %d videos",
                self.epoch, result["top1"], result["top5"], result["videos"],
            )  # fmt: skip
        self.list_skipped(self.val_loader)
        is_best = top1 > self.state.best_top1
        best_top1 = max(top1, self.state.best_top1)
        self.state = replace(self.state, evaluated_step=self.state.step, best_top1=best_top1, figures=figures)
        if is_best:
            checkpoint.save_best(self.engine, self.output, self.state)
        self.save()
        return figures

    def save_and_stop_if_asked(self) -> None:
        (code,) = distributed.start_max([self.stop.code])()
        if code:
            self.save()
            raise self.stopped(code)

    def settings(self) -> dict[str, Any]:
        """What the run will really use, for the table at its start. Collective; complete on rank 0."""
        hosts = distributed.gather_to_main(socket.gethostname()) or []
        config = self.config
        return {
            "hosts": f"{len(set(hosts))} ({', '.join(dict.fromkeys(hosts))})",
            "ranks": self.ranks.world_size,
            "global batch": f"{self.global_batch} videos",
            "micro batch": f"{config.data.batch_size} videos a rank",
            "accumulation": f"{config.solver.grad_accumulation_steps} x",
            "ZeRO stage": f"{config.engine.zero_stage}, offload {config.engine.offload}",
            "precision": config.engine.precision,
            "activation checkpointing": config.engine.activation_checkpointing,
            "torch.compile": config.engine.compile,
            "steps": f"{self.num_steps}, {self.train_loader.epoch_samples / self.global_batch:.1f} an epoch",
            "starts from": f"step {self.state.step}",
            **{name: f"{share:.2%} of the samples" for name, share in self.train_loader.planner.order.shares().items()},
        }

    def open_logs(self) -> None:
        """Rank 0: config.yaml, few_shot.txt, and metrics.jsonl and TensorBoard cut back to the step the run goes on
        from."""
        settings = self.settings()
        if not self.ranks.is_main:
            return
        checkpoint.check_room(self.output, self.config.logging.keep_checkpoints, *engine.state_bytes(self.engine))
        if self.start_from is not None:
            logger.info("resumed from %s at step %d", self.start_from, self.state.step)
        logger.info("%s", table("settings", settings))
        (self.output / "config.yaml").write_text(self.given_config.to_yaml(), encoding="utf-8")
        if self.config.data.shot:
            few_shot_list = self.train_loader.planner.few_shot_list()
            (self.output / FEW_SHOT_LIST).write_text(few_shot_list, encoding="utf-8")
        self.metrics = Metrics(self.output, self.state.step)
        self.skipped_list = SkippedList(self.output)
        if self.config.logging.pictures:
            from text4vis.report.tensorboard import Story

            self.story = Story(self.metrics.board, self.config, self.class_names, self.state.step)

    def close(self) -> None:
        self.train_loader.close()
        self.val_loader.close()
        if self.metrics is not None:
            self.metrics.close()

    def _loader(self, split: str) -> Loader:
        return build_loader(self.config, split, rank=self.ranks.rank, world_size=self.ranks.world_size)

    def _first_state(self, config: Config) -> State:
        return State(
            step=0,
            consumed=0,
            global_batch=self.global_batch,
            data_fingerprint=self.train_loader.dataset.fingerprint,
            config=config.to_dict(),
            class_names=self.class_names,
            classifier_file=file_digest(config.network),
            mixture=self.train_loader.planner.order.mixture,
        )

    def _joined_state(self, config: Config, found: State) -> State:
        """The state of the checkpoint, if it is of this run; the loader starts where it stood."""
        assert self.start_from is not None
        planner = self.train_loader.planner
        fingerprint = self.train_loader.dataset.fingerprint
        check_same_run(found, config, fingerprint, planner.order.mixture, self.start_from)
        _check_few_shot(self.output / FEW_SHOT_LIST, planner.few_shot_list())
        self.train_loader.consumed = found.consumed
        return replace(found, config=config.to_dict())

    def _start_engine(self, model: torch.nn.Module) -> Any:
        """The engine with the checkpoint's optimiser state and fp32 weights, or the model's own to begin with."""
        first = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        started = engine.start_engine(model, self.config, self.ranks.world_size)
        if self.start_from is None:
            engine.restore(started, first.__getitem__, None, 0)
        else:
            checkpoint.load(started, self.start_from, self.state)
        return started


def _check_same_classes(config: Config, train: list[str], val: list[str]) -> None:
    """Labels of both splits mean the same classes. Raises ConfigError."""
    if config.data.label_list is None and train != val:
        raise ConfigError(
            f"data.val: its shards name {len(val)} classes that are not the {len(train)} of data.train in their order; "
            "build both with one --labels file, name data.label_list, or evaluate other classes with evaluate.py"
        )


def _check_world_size(config: Config, world_size: int) -> None:
    expected = config.engine.world_size
    if expected is not None and expected != world_size:
        raise ConfigError(
            f"engine.world_size: expected {expected} ranks, the job has {world_size}. `deepspeed` starts on this "
            "machine alone when it does not find the file after --hostfile: check its path, its hosts and their slots"
        )


def _check_few_shot(path: Path, wanted: str) -> None:
    """The videos that a few-shot run began with are those it goes on with. Raises CheckpointError."""
    if path.exists() and (found := path.read_text(encoding="utf-8")) != wanted:
        line, before, now = next(
            (number, *pair)
            for number, pair in enumerate(itertools.zip_longest(found.split("\n"), wanted.split("\n")), start=1)
            if pair[0] != pair[1]
        )
        raise CheckpointError(
            f"{path}:{line}: the run began with {before!r}, data.shot now chooses {now!r}; "
            "bring the file back as it was, or give another --output"
        )
