"""What becomes of a step's gradients, decided on the device: norm, clipping, loss scale, skipping the update.

To ask the device whether gradients are finite would stop the host until the backward pass is done, in every step.
torch's fused optimisers take the answer as a tensor instead: `found_inf` 1 makes an update change nothing, and they
divide gradients by `grad_scale`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from text4vis.cluster import distributed

FIRST_SCALE = 2.0**16  # these three are those of torch's GradScaler, which the original uses
SCALE_FACTOR = 2.0
STEPS_BETWEEN_GROWTHS = 2000


class GradientCheck:
    """Clips gradients to a norm, scales the loss, and makes `optimizer` skip an update that would not be finite.

    optimizer: one of torch's fused ones. largest_norm: 0 for no clipping. scales_loss: for fp16, as torch's GradScaler.
    partitioned: whether each rank holds its share of the gradients, not all.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        device: torch.device,
        *,
        largest_norm: float,
        scales_loss: bool,
        partitioned: bool,
    ) -> None:
        self._optimizer, self._largest_norm = optimizer, largest_norm
        self._scales_loss, self._partitioned = scales_loss, partitioned
        self._scale = torch.full((), FIRST_SCALE if scales_loss else 1.0, device=device)
        self._steps_since_growth = torch.zeros((), dtype=torch.int32, device=device)
        self.norm: Tensor | None = None  # () float32: of the last step's gradients, before clipping

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss () to go backward from."""
        return loss * self._scale if self._scales_loss else loss

    @torch.no_grad()
    def look(self, gradients: list[Tensor]) -> Tensor:
        """Looks at the gradients of a step before the optimiser does. Returns whether they are finite, () bool.

        The same on every rank. Collective with `partitioned`.
        """
        square = torch.stack(torch._foreach_norm(gradients, 2, torch.float32)).square().sum()
        if self._partitioned:
            distributed.add_over_ranks(square)
        self.norm = square.sqrt() / self._scale
        finite = torch.isfinite(self.norm)
        found_inf = finite.logical_not().float()
        divisor = self._scale
        if self._largest_norm:
            divisor = divisor * (self.norm / self._largest_norm).clamp(min=1.0)
        vars(self._optimizer)["found_inf"] = found_inf
        if self._scales_loss or self._largest_norm:
            vars(self._optimizer)["grad_scale"] = divisor.clone()
        if self._scales_loss:
            torch._amp_update_scale_(
                self._scale, self._steps_since_growth, found_inf, SCALE_FACTOR, 1 / SCALE_FACTOR, STEPS_BETWEEN_GROWTHS
            )
        return finite

    def state(self) -> dict[str, float]:
        """The loss scale and the steps since it last grew; empty where the loss is not scaled. Waits for the device."""
        if not self._scales_loss:
            return {}
        return {"scale": self._scale.item(), "steps_since_growth": self._steps_since_growth.item()}

    def restore(self, state: dict[str, float]) -> None:
        """Sets what `state` gave."""
        if state:
            self._scale.fill_(state["scale"])
            self._steps_since_growth.fill_(int(state["steps_since_growth"]))


def read_later(flag: Tensor) -> Callable[[], bool]:
    """Starts to copy a flag () bool to the host. Call the result to wait for that, and for no work queued after it."""
    if not flag.is_cuda:
        return lambda: bool(flag.numpy())
    on_host = torch.empty((), dtype=torch.bool, pin_memory=True)
    on_host.copy_(flag, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> bool:
        copied.synchronize()
        return bool(on_host.numpy())

    return read
