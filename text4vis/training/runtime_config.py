"""What DeepSpeed is told, and which of its work we do ourselves: pure functions of the configuration."""

from __future__ import annotations

from typing import Any

import torch

from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config

# Numbers in a bucket that is reduced while the backward pass goes on: 100 MB in bf16, one of several in any CLIP.
OVERLAPPING_BUCKET = 5 * 10**7


def used_stage(config: Config, sizes: BatchSizes) -> int:
    """The ZeRO stage that DeepSpeed is given: 0 where one rank has nobody to share with.

    There ZeRO 1 and 2 would only keep a second copy of the fp32 weights and copy the gradients about. In bf16 and fp16
    that copy is what the optimiser updates, and DeepSpeed is slow without ZeRO.
    """
    engine = config.engine
    alone = sizes.world_size == 1 and engine.zero_stage < 3 and engine.offload == "none"
    return 0 if alone and engine.precision in ("fp32", "amp") else engine.zero_stage


def accumulates_in_fp32(config: Config, sizes: BatchSizes) -> bool:
    """Whether several bf16 gradients add up in fp32: in bf16 the last of many would hardly count.

    DeepSpeed cannot at ZeRO-0.
    """
    return sizes.accumulation > 1 and config.engine.precision == "bf16" and config.engine.zero_stage > 0


def checks_gradients(config: Config, sizes: BatchSizes) -> bool:
    """Whether we look at the gradients of a step, with `GradientCheck`, in DeepSpeed's place.

    DeepSpeed's own check waits for the device in every step; in bf16 at ZeRO 1 and 2 it takes 15 operations a tensor.
    It cannot be turned off in fp16, at ZeRO-3, with offload, in bf16 at ZeRO-0, and where ZeRO-1 accumulates in fp32.
    """
    engine = config.engine
    if engine.precision == "fp16" or engine.offload != "none" or engine.zero_stage == 3:
        return False
    return (
        engine.precision != "bf16"
        or engine.zero_stage == 2
        or (engine.zero_stage == 1 and not accumulates_in_fp32(config, sizes))
    )


def engine_config(config: Config, sizes: BatchSizes, trainable_numel: int, *, several_hosts: bool) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours and the model's trainable numbers. The only place that makes one.

    several_hosts: whether gradients travel between hosts.
    """
    engine, stage, ours = config.engine, used_stage(config, sizes), checks_gradients(config, sizes)
    # Reducing within the backward pass pays where a network is slower than the wait that it costs: below ZeRO-3
    # DeepSpeed then calls torch.cuda.synchronize() after each backward pass. Within a host all gradients of a CLIP take
    # a few milliseconds.
    overlaps = stage == 3 or (stage > 0 and several_hosts)
    # A bucket is allocated whole: DeepSpeed's own 500 million numbers are a gigabyte that CLIP cannot fill.
    bucket = OVERLAPPING_BUCKET if overlaps else 5 * 10**8
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": overlaps,
        "reduce_bucket_size": min(bucket, max(1, trainable_numel)),
        # Buckets are of use between ranks; for one rank to copy each gradient into one costs a pass over all of them.
        "contiguous_gradients": sizes.world_size > 1,
    }
    if ours and stage > 0:
        zero["compute_grad_norm"] = False
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": sizes.micro,
        "gradient_accumulation_steps": sizes.accumulation,
        "train_batch_size": sizes.global_batch,
        "gradient_clipping": 0.0 if ours else config.solver.clip_gradient,
        "communication_data_type": engine.communication_data_type,
        "bf16": {"enabled": engine.precision == "bf16", "check_grad_overflow": not ours},
        "fp16": {"enabled": engine.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32" if accumulates_in_fp32(config, sizes) else None},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
