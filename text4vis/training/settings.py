"""The table of settings at the start of a run's log."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from text4vis.cluster import distributed
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config
from text4vis.training.memory import StateMemory
from text4vis.training.runtime_config import used_stage

if TYPE_CHECKING:
    from text4vis.training.trainer import Trainer


def run_settings(trainer: Trainer) -> dict[str, Any]:
    """The sizes and settings that a run will use. Collective; complete on rank 0."""
    hosts = distributed.gather_to_main(socket.gethostname()) or []
    config, sizes, ranks, loader = trainer.config, trainer.sizes, trainer.ranks, trainer.train_loader
    engine = config.engine
    memory = StateMemory.of(trainer.engine.model, config, sizes, ranks.world_size)
    return {
        "hosts": f"{len(set(hosts))} ({', '.join(dict.fromkeys(hosts))})",
        "ranks": ranks.world_size,
        "global batch": f"{sizes.global_batch} videos",
        "micro batch": f"{sizes.micro} videos a rank",
        "accumulation": f"{sizes.accumulation} x",
        "ZeRO stage": _stage_in_words(config, sizes),
        "precision": engine.precision,
        "activation checkpointing": engine.activation_checkpointing,
        "torch.compile": engine.compile,
        **memory.in_words(),
        "steps": f"{trainer.num_steps}, {loader.epoch_samples / sizes.global_batch:.1f} an epoch",
        "starts from": f"step {trainer.state.step}",
        **{name: f"{share:.2%} of the samples" for name, share in loader.planner.order.shares().items()},
    }


def _stage_in_words(config: Config, sizes: BatchSizes) -> str:
    stage, used = config.engine.zero_stage, used_stage(config, sizes)
    return f"{stage}, offload {config.engine.offload}" if used == stage else f"{used}: one rank shares with nobody"
