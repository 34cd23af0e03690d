"""The engine of a run: DeepSpeed around the model and its optimiser, and their state as named fp32 tensors.

However DeepSpeed keeps the state (flat, cut over ranks, on the host), it is read and written here as whole fp32 tensors
by the parameter's name. So a checkpoint depends neither on the number of ranks nor on the ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from text4vis.cluster import distributed
from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config, ConfigError
from text4vis.training.gradients import GradientCheck, read_later
from text4vis.training.optim import build_optimizer
from text4vis.training.runtime_config import checks_gradients, engine_config, used_stage

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScalerBase

    from text4vis.model.video_clip import Classes, VideoClip

EMA = "ema"  # the moving average of the weights, kept among the optimiser's moments
_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Shard:
    """What a rank itself has of a tensor.

    dtype, shape: of the whole tensor in a checkpoint. values: (n,) on any device, of any type; they are those from
    number `start` of the flattened whole on. on_all: every rank has the whole tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Tensor
    start: int = 0
    on_all: bool = False


class Engine:
    """Forward, backward and optimiser's step of a model. `restore` must follow: it makes the first state exact.

    model: as it was given, with its parameters in the run's precision. runtime: DeepSpeed's own engine.
    Raises ConfigError for fp16 without a GPU.
    """

    def __init__(self, model: VideoClip, config: Config, sizes: BatchSizes) -> None:
        import deepspeed

        if config.engine.precision == "fp16" and not torch.cuda.is_available():
            raise ConfigError(
                "engine.precision: DeepSpeed computes fp16 on GPUs only, and there is none; use bf16 or fp32"
            )
        if config.engine.activation_checkpointing:
            model.visual.set_grad_checkpointing(True)  # type: ignore[operator]
        model.autocast = config.engine.precision == "amp"
        optimizer = build_optimizer(model, config.solver)
        place = distributed.ranks()
        trainable_numel = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        self.model = model
        self.ema_decay = config.solver.ema
        self._set_aside: dict[nn.Parameter, Tensor] = {}
        self.runtime: DeepSpeedEngine
        self.runtime, _, _, _ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=engine_config(
                config, sizes, trainable_numel, several_hosts=place.world_size > place.local_world_size
            ),
            dist_init_required=False,
        )
        self._check: GradientCheck | None = None
        if checks_gradients(config, sizes):
            self._check = GradientCheck(
                self.runtime.basic_optimizer,
                distributed.device(),
                largest_norm=config.solver.clip_gradient,
                scales_loss=config.engine.precision == "amp",
                partitioned=used_stage(config, sizes) > 0,
            )
        if sizes.world_size == 1 and self._is_plain:
            self.runtime.enable_backward_allreduce = False  # DeepSpeed would copy all gradients there and back
        if config.engine.compile:
            self.runtime.compile()

    @property
    def _is_plain(self) -> bool:
        """Whether torch's own optimiser updates the model's own fp32 parameters."""
        return self.runtime.optimizer is self.runtime.basic_optimizer

    def __call__(self, *inputs: Tensor | Classes) -> Tensor:
        """The model's forward pass."""
        return self.runtime(*inputs)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro batch's loss (), which DeepSpeed averages over micro batches and ranks."""
        self.runtime.backward(loss if self._check is None else self._check.scaled(loss))

    def step(self) -> Callable[[], bool]:
        """Follows each backward pass. Updates the weights after a step's last one.

        Call the result to learn whether the weights changed; a step later that makes nothing wait. Gradients that are
        not finite change nothing, on any rank.
        """
        runtime, check = self.runtime, self._check
        if not runtime.is_gradient_accumulation_boundary():
            runtime.step()
            return lambda: False
        finite = None if check is None else check.look(self._gradients())
        runtime.step()
        if finite is None:
            applied = runtime.was_step_applied()
            if applied:
                self._average(torch.ones((), device=distributed.device()))
            return lambda: applied
        self._average(finite)
        return read_later(finite)

    def _gradients(self) -> list[Tensor]:
        """The gradients of a whole step that this rank's optimiser will use, averaged over micro batches and ranks."""
        if self._is_plain:
            return [parameter.grad for _, parameter in self._trainable() if parameter.grad is not None]
        averaged = self.runtime.optimizer.averaged_gradients  # ZeRO-1 and 2: this rank's share
        return [gradient for group in averaged.values() for gradient in group or ()]

    @torch.no_grad()
    def _average(self, applied: Tensor) -> None:
        """Moves the averages on after an update: average = d * average + (1 - d) * weights. applied: () 1 or 0.

        d = min(solver.ema, (1 + n) / (10 + n)) after n updates, so that a short run does not keep its first weights
        (TensorFlow's `ExponentialMovingAverage`).
        """
        if self.ema_decay:
            masters, state = self._masters(), self.runtime.basic_optimizer.state
            self._updates += applied
            decay = ((1 + self._updates) / (10 + self._updates)).clamp(max=self.ema_decay)
            weight = ((1 - decay) * applied).float()
            weights = [weight.to(master.device) for master in masters]
            torch._foreach_lerp_([state[master][EMA] for master in masters], masters, weights)

    def set_rates(self, rate: Callable[[float], float]) -> None:
        """Gives each parameter group the learning rate that `rate` computes from the group's peak."""
        for group in self._groups():
            group["lr"] = rate(group["base_lr"])

    def rates(self) -> dict[str, float]:
        """The learning rates by the name of the parameter group, in the groups' order."""
        return {group["name"]: group["lr"] for group in self._groups()}

    def grad_norm(self) -> float | None:
        """The norm of all gradients of the last step, before clipping; None if it is not finite or not known.

        Waits for the device.
        """
        norm = self.runtime.get_global_grad_norm() if self._check is None else self._check.norm
        return None if norm is None or not math.isfinite(norm) else float(norm)

    def restore(
        self, weights: Callable[[str], Tensor], moments: Callable[[str, str], Tensor] | None, updates: int
    ) -> None:
        """Sets the fp32 weights and the optimiser's moments of every trainable parameter, after `updates` updates.

        weights(name) and moments(key, name) give whole fp32 tensors on the CPU, the weights those that the model had
        before the engine was made; without moments they are zero. Every rank calls it with the same values. Needed at
        the start of a run too: DeepSpeed takes its fp32 weights from the rounded ones, and at ZeRO-0 it runs an
        optimiser step of its own, with weight decay.
        """
        for master in self._masters():
            zeros = {key: torch.zeros_like(master, requires_grad=False) for key in self.moment_names}
            # Fused optimisers count on the device of the weights.
            step = torch.tensor(float(updates), device=master.device)
            self.runtime.basic_optimizer.state[master] = {"step": step, **zeros}
        self._updates = torch.tensor(float(updates), dtype=torch.float64, device=distributed.device())
        link = getattr(self.runtime.optimizer, "_lazy_init_hp_params_optimizer_state", None)
        if link is not None:  # ZeRO-1 and 2 find a parameter's moments only after this
            link()
        for name, parameter in self._trainable():
            self._write(parameter, weights(name), None)
            if moments is not None:
                for key in self.moment_names:
                    self._write(parameter, moments(key, name), key)
            elif self.ema_decay:
                self._write(parameter, weights(name), EMA)

    @property
    def moment_names(self) -> tuple[str, ...]:
        """The fp32 tensors that are kept for every parameter: the optimiser's, under torch's names, and the average."""
        is_sgd = isinstance(self.runtime.basic_optimizer, torch.optim.SGD)
        moments = ("momentum_buffer",) if is_sgd else ("exp_avg", "exp_avg_sq")
        return (*moments, EMA) if self.ema_decay else moments

    def whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """A parameter's fp32 value, or its moment `key`, in full, on every rank. Collective under ZeRO."""
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if parameter.requires_grad and _is_partitioned(parameter):
            if key is not None:
                return safe_get_full_optimizer_state(parameter, key)
            return safe_get_full_fp32_param(parameter)
        if hasattr(parameter, "ds_id"):  # frozen under ZeRO-3
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().clone()
        master = self._whole_masters().get(parameter, parameter)
        if key is None and parameter in self._set_aside:
            return self._set_aside[parameter]
        return (master if key is None else self.runtime.basic_optimizer.state[master][key]).detach()

    def result(self, parameter: nn.Parameter) -> Tensor:
        """What training has made of a parameter, whole and in fp32: its average with solver.ema, else its value."""
        return self.whole(parameter, EMA if self.ema_decay and parameter.requires_grad else None).float()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within it the model computes with the averages of solver.ema. Collective, as is its end.

        The state stays: it may be saved within. An exception ends the run, so the weights are then not put back.
        """
        averaged = [parameter for _, parameter in self._trainable()] if self.ema_decay else []
        for parameter in averaged:
            if not _is_partitioned(parameter) and parameter not in self._whole_masters():
                self._set_aside[parameter] = parameter.detach().clone()
            self._show(parameter, self.result(parameter))
        yield
        for parameter in averaged:
            self._show(parameter, self.whole(parameter))
        self._set_aside.clear()

    @staticmethod
    def _show(parameter: nn.Parameter, value: Tensor) -> None:
        """Makes the forward pass compute with another value of a parameter, which the optimiser does not see."""
        import deepspeed

        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(value)
        else:
            parameter.data.copy_(value)

    def used(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's whole value as the forward pass has it, in the run's precision. Collective under ZeRO."""
        return self.whole(parameter).to(parameter.dtype)

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The model's whole parameters in fp32 and its buffers, one after the other. Collective."""
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            yield name, self.whole(parameter).float()
        for name, value in self.model.state_dict().items():
            if name not in parameters:
                yield name, value.detach()

    def named_results(self) -> Iterator[tuple[str, Tensor]]:
        """As `named_weights`, with the averages in place of what trains with solver.ema. Collective."""
        parameters = dict(self.model.named_parameters())
        for name, value in self.named_weights():
            averages = self.ema_decay and name in parameters and parameters[name].requires_grad
            yield name, self.result(parameters[name]) if averages else value

    def shards(self, key: str | None = None) -> Iterator[tuple[str, Shard]]:
        """This rank's own part of the model's weights, in fp32, and buffers; with a key, of the moments of what trains.

        Every rank gives all names in the same order, and exchanges nothing. The values are the engine's own memory.
        """
        parameters = dict(self.model.named_parameters())
        for name, parameter in parameters.items():
            if key is None or parameter.requires_grad:
                yield name, self._shard(parameter, key)
        for name, value in self.model.state_dict().items() if key is None else ():
            if name not in parameters:
                yield name, Shard(value.dtype, tuple(value.shape), value.detach().flatten(), on_all=True)

    def _shard(self, parameter: nn.Parameter, key: str | None) -> Shard:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, with zeros behind the last one's end
            if not parameter.requires_grad:
                own = parameter.ds_tensor  # type: ignore[attr-defined]
            elif key is None:
                own = safe_get_local_fp32_param(parameter)
            else:
                own = safe_get_local_optimizer_state(parameter, key)
            start = min(torch.distributed.get_rank() * own.numel(), math.prod(shape))
            return Shard(torch.float32, shape, own.detach()[: math.prod(shape) - start], start)
        if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2: one stretch of all parameters, which may miss this one
            mapping = parameter._hp_mapping
            if mapping is None:
                return Shard(torch.float32, shape, torch.empty(0))
            own = mapping.get_hp_fragment(key).detach()
            return Shard(torch.float32, shape, own, mapping.lp_fragment_address.start)
        return Shard(torch.float32, shape, self.whole(parameter, key).detach().flatten(), on_all=True)

    def state_bytes(self) -> tuple[int, int]:
        """Bytes of the whole fp32 weights, and of the moments, the average among them."""
        numels = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.model.parameters()]
        trainable = sum(numel for numel, trains in numels if trains)
        return 4 * sum(numel for numel, _ in numels), 4 * len(self.moment_names) * trainable

    def loss_scale(self) -> float | None:
        """The factor of the loss that fp16 and amp go backward from; None in other precisions. Waits for the device."""
        state = self.loss_scaler_state()
        return state.get("scale", state.get("cur_scale"))

    def loss_scaler_state(self) -> dict[str, float]:
        """fp16's and amp's dynamic loss scale and its counters; empty in other precisions. Waits for the device."""
        if self._check is not None:
            return self._check.state()
        scaler = self._loss_scaler()
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALER_STATE if hasattr(scaler, key)}

    def restore_loss_scaler(self, state: dict[str, float]) -> None:
        """Sets what `loss_scaler_state` gave."""
        if self._check is not None:
            self._check.restore(state)
        scaler = self._loss_scaler()
        for key, value in state.items():
            if hasattr(scaler, key):
                setattr(scaler, key, value)

    def _groups(self) -> list[dict[str, Any]]:
        return self.runtime.basic_optimizer.param_groups

    def _trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]

    def _masters(self) -> list[Tensor]:
        """This rank's fp32 tensors that the optimiser updates: flat partitions, or whole parameters."""
        flat = getattr(self.runtime.optimizer, "fp32_partitioned_groups_flat", None)  # ZeRO-3 hides them
        return flat or [master for group in self._groups() for master in group["params"]]

    def _whole_masters(self) -> dict[nn.Parameter, Tensor]:
        """ZeRO-0: the fp32 copy of each parameter in lower precision; empty in fp32, where a parameter is its own."""
        optimizer = self.runtime.optimizer
        groups = zip(getattr(optimizer, "fp16_groups", ()), getattr(optimizer, "fp32_groups", ()), strict=False)
        return {low: high for lows, highs in groups for low, high in zip(lows, highs, strict=True)}

    def _write(self, parameter: nn.Parameter, value: Tensor, key: str | None) -> None:
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        if hasattr(parameter, "ds_id"):  # ZeRO-3
            share = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            own = share_of_rank(value, share, torch.distributed.get_rank()).to(parameter.device)
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
            master = self._whole_masters().get(parameter, parameter)
            (master.data if key is None else self.runtime.basic_optimizer.state[master][key]).copy_(value)

    def _loss_scaler(self) -> LossScalerBase | None:
        if not self.runtime.fp16_enabled():
            return None
        return getattr(self.runtime.optimizer, "loss_scaler", None) or self.runtime.optimizer.loss_scale_config


def share_of_rank(value: Tensor, share: int, rank: int) -> Tensor:
    """The numbers (share,) of a whole tensor that ZeRO-3 keeps on a rank; zeros stand behind the tensor's end."""
    own = value.flatten()[rank * share : (rank + 1) * share]
    return nn.functional.pad(own, (0, share - own.numel()))


def _is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")
