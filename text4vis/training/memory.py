"""Memory of a rank for weights, gradients and the optimiser's state, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from text4vis.config.batches import BatchSizes
from text4vis.config.schema import Config
from text4vis.training.runtime_config import accumulates_in_fp32, used_stage


@dataclass(frozen=True)
class StateMemory:
    """Bytes of a rank, but for what is rounded up to whole partitions. total, trainable: numbers in the whole model."""

    total: int
    trainable: int
    weights: float
    gradients: float
    optimizer: float

    @classmethod
    def of(cls, model: nn.Module, config: Config, sizes: BatchSizes, world_size: int) -> StateMemory:
        """As ZeRO shares them (Rajbhandari et al., 2020, section 5): the optimiser's state from stage 1 on, gradients
        from stage 2 on, weights at stage 3.

        The optimiser has fp32 weights (at stage 0 in fp32 and amp the weights themselves), AdamW's and Adam's two
        moments or SGD's one, and the average of solver.ema, for what trains alone.
        """
        counts = [(getattr(each, "ds_numel", each.numel()), each.requires_grad) for each in model.parameters()]
        total, trainable = sum(count for count, _ in counts), sum(count for count, trains in counts if trains)
        engine, solver = config.engine, config.solver
        stage = used_stage(config, sizes)
        in_fp32 = engine.precision in ("fp32", "amp")
        width = 4 if in_fp32 else 2
        masters = 0 if in_fp32 and stage == 0 else 1
        states = masters + (1 if solver.optim == "sgd" else 2) + (1 if solver.ema else 0)
        shares = [world_size if stage >= first else 1 for first in (3, 2, 1)]
        return cls(
            total,
            trainable,
            weights=width * total / shares[0],
            gradients=(4 if accumulates_in_fp32(config, sizes) else width) * trainable / shares[1],
            optimizer=4 * states * trainable / shares[2],
        )

    def in_words(self) -> dict[str, str]:
        """Two rows of the table of settings."""
        each = {"weights": self.weights, "gradients": self.gradients, "optimiser": self.optimizer}
        parts = ", ".join(f"{name} {size / 1e9:.3f}" for name, size in each.items())
        share = f"{self.trainable:,} of {self.total:,} ({self.trainable / self.total:.1%})"
        return {
            "trainable parameters": share,
            "memory a rank": f"{sum(each.values()) / 1e9:.3f} GB by formula ({parts}), and activations",
        }
