"""The training run: build, resume, loop {batch, step, log, evaluate, save}, close. Knows the engine.

B videos of a micro batch, T frames, C classes, D embedding width.
"""

from __future__ import annotations

import json
import logging
import math
import resource
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter

from text4vis import checkpoint, distributed
from text4vis.checkpoint import CheckpointError, State
from text4vis.classifier import build_classifier
from text4vis.config import Config
from text4vis.evaluation import evaluate
from text4vis.model import build_model
from text4vis.optim import learning_rate, parameter_groups
from text4vis.pipeline import Loader, build_loader, class_names

logger = logging.getLogger("text4vis")

# Keys that change how a run is carried out, not what it computes: they may differ when a run goes on.
FREE_ON_RESUME = (
    "logging.", "engine.num_threads", "data.train", "data.val", "data.workers", "data.io_threads", "data.prefetch",
    "data.decode", "data.cache_", "data.verify",
)  # fmt: skip


def engine_config(config: Config, world_size: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours. The only place that makes one."""
    steps = config.solver.grad_accumulation_steps
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": steps,
        "train_batch_size": config.data.batch_size * steps * world_size,
        "gradient_clipping": config.solver.clip_gradient,
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }


@dataclass
class Meter:
    """Sums since the last log line."""

    loss: torch.Tensor
    steps: int = 0
    wait_seconds: float = 0.0
    started: float = 0.0

    @classmethod
    def new(cls, device: torch.device) -> Meter:
        return cls(torch.zeros((), device=device), started=time.perf_counter())


class Trainer:
    """One run in the folder `output`. resume: "auto" (its last checkpoint, if any), "never", or a checkpoint."""

    def __init__(self, config: Config, output: Path, resume: str = "auto", *, progress: bool = False) -> None:
        self.config, self.output, self.progress = config, output, progress
        self.ranks = distributed.ranks()
        self.start_from = _find_start(output, resume)
        torch.manual_seed(config.seed)  # the head's first weights: equal on all ranks
        distributed.use_cores(config.engine.num_threads)
        self.val_loader = self._loader("val")
        self.train_loader = self._loader("train")
        self.class_names = class_names(config, self.train_loader.dataset)
        self.device = distributed.device()
        model = build_model(config.network, config.data.num_segments, image_size=config.data.input_size)
        self.class_embeddings_CD = build_classifier(config, model, self.class_names).to(self.device)
        self.engine, self.optimizer = self._start_engine(model)
        num_samples = len(self.train_loader.dataset)
        self.global_batch = config.data.batch_size * config.solver.grad_accumulation_steps * self.ranks.world_size
        self.num_steps = math.ceil(config.solver.epochs * num_samples / self.global_batch)
        self.state = State(
            step=0,
            consumed=0,
            world_size=self.ranks.world_size,
            data_fingerprint=self.train_loader.dataset.fingerprint,
            config=config.to_dict(),
            class_names=self.class_names,
        )
        self.writer: SummaryWriter | None = None

    def fit(self) -> dict[str, Any]:
        """Trains to the last epoch. Returns the last evaluation's report (empty on ranks other than 0)."""
        self.resume()
        self.open_logs()
        batches = iter(self.train_loader)
        meter = Meter.new(self.device)
        figures: dict[str, Any] = self.state.figures
        while self.state.step < self.num_steps:
            self.train_step(batches, meter)
            if self.state.step % self.config.logging.print_freq == 0 or self.state.step == self.num_steps:
                self.log_step(meter)
                meter = Meter.new(self.device)
            if self.evaluation_is_due():
                figures = self.evaluate_and_save()
                meter = Meter.new(self.device)
        self.close()
        return figures

    def resume(self) -> None:
        """Restores, in this order: 1. the engine (weights, optimiser), 2. the position, 3. the loader from there."""
        if self.start_from is None:
            return
        state = checkpoint.read_state(self.start_from)
        _check_same_run(state, self.state, self.start_from)
        checkpoint.load(self.engine, self.start_from)
        self.state = replace(state, config=self.state.config)
        self.train_loader.consumed = state.consumed
        logger.info("resumed from %s at step %d", self.start_from, state.step)

    def train_step(self, batches: Any, meter: Meter) -> None:
        """One optimiser step: all micro batches of this rank's share of a global batch."""
        self.set_learning_rates()
        for _ in range(self.config.solver.grad_accumulation_steps):
            waiting = time.perf_counter()
            batch = next(batches)
            meter.wait_seconds += time.perf_counter() - waiting
            frames_BTCHW = batch.frames.to(self.device, non_blocking=True)[:, 0]
            logits_BC = self.engine(frames_BTCHW, self.class_embeddings_CD)
            loss = F.cross_entropy(logits_BC, batch.labels.to(self.device, non_blocking=True))
            self.engine.backward(loss)
            self.engine.step()
            meter.loss += loss.detach().float() / self.config.solver.grad_accumulation_steps
        meter.steps += 1
        self.state = replace(self.state, step=self.state.step + 1, consumed=self.state.consumed + self.global_batch)

    @property
    def epoch(self) -> float:
        """Epochs consumed, fractional."""
        return self.state.consumed / len(self.train_loader.dataset)

    def set_learning_rates(self) -> None:
        solver = self.config.solver
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.epoch, group["base_lr"], solver.epochs, solver.lr_warmup_step)

    def evaluation_is_due(self) -> bool:
        """After every `eval_freq` epochs, at the first step that reaches one, and at the end."""
        if self.state.step == self.num_steps:
            return True
        period = self.config.logging.eval_freq * len(self.train_loader.dataset)
        return self.state.consumed // period > (self.state.consumed - self.global_batch) // period

    def log_step(self, meter: Meter) -> None:
        seconds = time.perf_counter() - meter.started
        (loss,) = distributed.sum_over_ranks([meter.loss.item() / meter.steps / self.ranks.world_size])
        wait_seconds, memory = distributed.sum_over_ranks([meter.wait_seconds, _memory_bytes()])
        record = {
            "step": self.state.step,
            "epoch": round(self.epoch, 4),
            "loss": loss,
            **{f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups},
            "logit_scale": self._logit_scale(),
            "grad_norm": _number(self.engine.get_global_grad_norm()),
            "videos_per_second": meter.steps * self.global_batch / seconds,
            "step_seconds": seconds / meter.steps,
            "data_wait_share": wait_seconds / self.ranks.world_size / seconds,
            "memory_bytes": memory,
        }
        self._write("train", record)
        logger.info(
            "step %d/%d  epoch %.2f  loss %.4f  lr %.2e  %.1f videos/s  %.3f s/step  waiting for data %.0f %%",
            self.state.step, self.num_steps, self.epoch, loss, self.optimizer.param_groups[-1]["lr"],
            record["videos_per_second"], record["step_seconds"], 100 * record["data_wait_share"],
        )  # fmt: skip

    def evaluate_and_save(self) -> dict[str, Any]:
        """Evaluates, writes report.json, the best weights when they are better, and a checkpoint."""
        result = evaluate(
            self.engine.module, self.class_embeddings_CD, self.class_names, self.val_loader, progress=self.progress
        )
        (top1,) = distributed.sum_over_ranks([result["top1"] if result else 0.0])
        figures: dict[str, Any] = {}
        if result:
            figures = {key: result[key] for key in ("top1", "top5", "mean_class_accuracy", "videos")}
            self._write("val", {"step": self.state.step, "epoch": round(self.epoch, 4), **figures})
            write_report(self.output / "report.json", {"step": self.state.step, **result})
            logger.info(
                "evaluation after epoch %.2f: top-1 %.2f %%  top-5 %.2f %%  of %d videos",
                self.epoch, result["top1"], result["top5"], result["videos"],
            )  # fmt: skip
        is_best = top1 > self.state.best_top1
        self.state = replace(self.state, best_top1=max(top1, self.state.best_top1), figures=figures)
        if is_best:
            checkpoint.save_best(self.engine, self.output, self.state)
        checkpoint.save(self.engine, self.output, self.state)
        return figures

    def open_logs(self) -> None:
        """Rank 0: config.yaml, and metrics.jsonl and TensorBoard cut back to the step the run goes on from."""
        if not self.ranks.is_main:
            return
        (self.output / "config.yaml").write_text(self.config.to_yaml(), encoding="utf-8")
        metrics = self.output / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= self.state.step]
        metrics.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self.writer = SummaryWriter(str(self.output / "tensorboard"), purge_step=self.state.step + 1)

    def close(self) -> None:
        self.train_loader.close()
        self.val_loader.close()
        if self.writer:
            self.writer.close()

    def _loader(self, split: str) -> Loader:
        return build_loader(self.config, split, rank=self.ranks.rank, world_size=self.ranks.world_size)

    def _start_engine(self, model: torch.nn.Module) -> tuple[Any, Any]:
        import deepspeed

        groups = parameter_groups(model, self.config.solver)
        optimizer = torch.optim.AdamW(groups, betas=self.config.solver.betas, eps=1e-8)
        engine, wrapped, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=engine_config(self.config, self.ranks.world_size),
            dist_init_required=False,
        )
        return engine, wrapped

    def _logit_scale(self) -> float:
        value = checkpoint.whole(self.engine.module.logit_scale)
        return float(value.float().exp())

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl and the TensorBoard scalars. Rank 0 only."""
        if self.writer is None:
            return
        with (self.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "time": time.time(), **record}) + "\n")
        for key, value in record.items():
            if key != "step" and value is not None:
                self.writer.add_scalar(f"{kind}/{key}", value, record["step"])
        self.writer.flush()


def write_report(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def log_to(output: Path) -> None:
    """Sends the program's log to the screen and to OUT/log.txt. Rank 0; other ranks show warnings only."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if distributed.ranks().is_main:
        output.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(output / "log.txt", encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if distributed.ranks().is_main else logging.WARNING)
    logger.propagate = False


def _find_start(output: Path, resume: str) -> Path | None:
    if resume == "auto":
        return checkpoint.latest(output)
    if resume != "never":
        return checkpoint.find(Path(resume))
    if checkpoint.latest(output):
        raise CheckpointError(
            f"{output}: holds a run already; give another --output, or --resume auto to go on with it"
        )
    return None


def _check_same_run(found: State, wanted: State, folder: Path) -> None:
    """A run goes on only with the data and the settings it began with. Raises CheckpointError."""
    if found.data_fingerprint != wanted.data_fingerprint:
        raise CheckpointError(
            f"{folder}: was trained on other data (fingerprint {found.data_fingerprint[:12]}, data.train has "
            f"{wanted.data_fingerprint[:12]}); give the original shards or another --output"
        )
    before, now = _flatten(found.config), _flatten(wanted.config)
    changed = [key for key in sorted(before | now) if before.get(key) != now.get(key)]
    changed = [key for key in changed if not key.startswith(FREE_ON_RESUME)]
    if changed:
        values = ", ".join(f"{key}: {before.get(key)!r} -> {now.get(key)!r}" for key in changed)
        raise CheckpointError(
            f"{folder}: the configuration differs ({values}); undo the change or give another --output"
        )


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _memory_bytes() -> float:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
