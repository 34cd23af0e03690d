"""DeepSpeed: its configuration from ours, its start, and its state as named fp32 tensors.

However DeepSpeed keeps the state (flat, cut over ranks, on the host), here it is read and written as whole fp32 tensors
by the parameter's name. So a checkpoint knows neither the number of ranks nor the ZeRO stage.
Only this module and `distributed` know DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from text4vis.config.schema import Config, ConfigError
from text4vis.training.optim import build_optimizer

_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def engine_config(config: Config, world_size: int, trainable_numel: int) -> dict[str, Any]:
    """DeepSpeed's dictionary, derived from ours and the model's trainable numbers. The only place that makes one."""
    steps, engine = config.solver.grad_accumulation_steps, config.engine
    # A bucket is allocated whole: DeepSpeed's own 500 million numbers are a gigabyte that CLIP cannot fill.
    zero: dict[str, Any] = {"stage": engine.zero_stage, "reduce_bucket_size": min(5 * 10**8, max(1, trainable_numel))}
    if engine.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if engine.offload == "parameters":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    accumulates = steps > 1 and engine.precision == "bf16" and engine.zero_stage > 0  # DeepSpeed cannot at ZeRO-0
    return {
        "train_micro_batch_size_per_gpu": config.data.batch_size,
        "gradient_accumulation_steps": steps,
        "train_batch_size": config.data.batch_size * steps * world_size,
        "gradient_clipping": config.solver.clip_gradient,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "data_types": {"grad_accum_dtype": "fp32" if accumulates else None},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def start_engine(model: nn.Module, config: Config, world_size: int) -> Any:
    """DeepSpeed's engine around the model and its optimiser. `restore` must follow: it makes the first state exact.

    Raises ConfigError for fp16 without a GPU.
    """
    import deepspeed

    if config.engine.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("engine.precision: DeepSpeed computes fp16 on GPUs only, and there is none; use bf16 or fp32")
    if config.engine.activation_checkpointing:
        model.visual.set_grad_checkpointing(True)  # type: ignore[operator, union-attr]
    optimizer = build_optimizer(model, config.solver)
    for group in optimizer.param_groups:  # on the host one pass over the memory instead of ten
        group["fused"] = config.engine.offload != "none" or None
    trainable_numel = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=engine_config(config, world_size, trainable_numel),
        dist_init_required=False,
    )
    if config.engine.compile:
        engine.compile()
    return engine


def restore(
    engine: Any, weights: Callable[[str], Tensor], moments: Callable[[str, str], Tensor] | None, updates: int
) -> None:
    """Sets the fp32 weights and the optimiser's moments of every trainable parameter, after `updates` optimiser steps.

    weights(name) and moments(key, name) give whole fp32 tensors on the CPU, the weights those that the model had before
    `start_engine`; without moments they are zero. Every rank calls it with the same values. Needed at the start of a
    run too: DeepSpeed takes its fp32 weights from the rounded ones, and at ZeRO-0 it runs an optimiser step of its
    own, with weight decay.
    """
    for master in _masters(engine):
        zeros = {key: torch.zeros_like(master, requires_grad=False) for key in moment_names(engine)}
        engine.basic_optimizer.state[master] = {"step": torch.tensor(float(updates)), **zeros}
    link = getattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:  # ZeRO-1 and 2 find a parameter's moments only after this
        link()
    for name, parameter in _trainable(engine):
        _write(engine, parameter, weights(name), None)
        if moments is not None:
            for key in moment_names(engine):
                _write(engine, parameter, moments(key, name), key)


def moment_names(engine: Any) -> tuple[str, ...]:
    """The fp32 tensors that the optimiser keeps for every parameter, under torch's names."""
    return ("momentum_buffer",) if isinstance(engine.basic_optimizer, torch.optim.SGD) else ("exp_avg", "exp_avg_sq")


def whole(engine: Any, parameter: nn.Parameter, key: str | None = None) -> Tensor:
    """A parameter's fp32 value, or its moment `key`, in full. Collective under ZeRO: every rank calls and gets it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if parameter.requires_grad and _is_partitioned(parameter):
        if key is not None:
            return safe_get_full_optimizer_state(parameter, key)
        return safe_get_full_fp32_param(parameter)
    if hasattr(parameter, "ds_id"):  # frozen under ZeRO-3
        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    master = _whole_masters(engine).get(parameter, parameter)
    return (master if key is None else engine.basic_optimizer.state[master][key]).detach()


def named_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """The model's whole parameters in fp32 and its buffers, one after the other. Collective."""
    parameters = dict(engine.module.named_parameters())
    for name, parameter in parameters.items():
        yield name, whole(engine, parameter).float()
    for name, value in engine.module.state_dict().items():
        if name not in parameters:
            yield name, value.detach()


def named_moments(engine: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """The whole moments `key` of the trainable parameters in fp32, one after the other. Collective."""
    for name, parameter in _trainable(engine):
        yield name, whole(engine, parameter, key).float()


def state_bytes(engine: Any) -> tuple[int, int]:
    """Bytes of the whole fp32 weights, and of the optimiser's moments."""
    numels = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in engine.module.parameters()]
    num_moments = len(moment_names(engine))
    return 4 * sum(numel for numel, _ in numels), 4 * num_moments * sum(numel for numel, trains in numels if trains)


def loss_scaler_state(engine: Any) -> dict[str, float]:
    """fp16's dynamic loss scale and its counters; empty in other precisions."""
    scaler = _loss_scaler(engine)
    return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER_STATE if hasattr(scaler, key)}


def restore_loss_scaler(engine: Any, state: dict[str, float]) -> None:
    scaler = _loss_scaler(engine)
    for key, value in state.items():
        if hasattr(scaler, key):
            setattr(scaler, key, value)


def take_step(engine: Any) -> bool:
    """DeepSpeed's step, after each backward pass; True if it changed the weights.

    Gradients that are not finite change nothing, on any rank. DeepSpeed sees to that, but for fp32 at ZeRO-0.
    """
    is_plain = engine.optimizer is engine.basic_optimizer
    if is_plain and engine.is_gradient_accumulation_boundary():
        gradients = [parameter.grad for _, parameter in _trainable(engine) if parameter.grad is not None]
        if not bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients)).sum())):
            engine.zero_grad()
            engine.micro_steps += 1  # the only trace that a step leaves for the next one
            return False
    engine.step()
    return engine.was_step_applied()


def _trainable(engine: Any) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")


def _masters(engine: Any) -> list[Tensor]:
    """This rank's fp32 tensors that the optimiser updates: flat partitions, or whole parameters."""
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hides them from the optimiser
    return flat or [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _whole_masters(engine: Any) -> dict[nn.Parameter, Tensor]:
    """ZeRO-0: the fp32 copy of each parameter in lower precision; empty in fp32, where a parameter is its own."""
    groups = zip(
        getattr(engine.optimizer, "fp16_groups", ()), getattr(engine.optimizer, "fp32_groups", ()), strict=False
    )
    return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}


def _write(engine: Any, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):  # ZeRO-3: this rank's share; the last one is padded
        share, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()  # type: ignore[attr-defined]
        padded = nn.functional.pad(value.flatten(), (0, share * torch.distributed.get_world_size() - value.numel()))
        own = padded[rank * share : (rank + 1) * share].to(parameter.device)
        if key is None:
            safe_set_local_fp32_param(parameter, own)
        else:
            safe_set_local_optimizer_state(parameter, own, key)
    elif hasattr(parameter, "_hp_mapping"):
        if key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
    else:
        master = _whole_masters(engine).get(parameter, parameter)
        (master.data if key is None else engine.basic_optimizer.state[master][key]).copy_(value)


def _loss_scaler(engine: Any) -> Any:
    if not engine.fp16_enabled():
        return None
    return getattr(engine.optimizer, "loss_scaler", None) or engine.optimizer.loss_scale_config
