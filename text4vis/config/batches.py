"""How many videos a job handles at a time, derived from the configuration and the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

from text4vis.config.schema import Config, ConfigError


@dataclass(frozen=True)
class BatchSizes:
    """The cut of a global batch. micro: videos of a rank's micro batch, accumulation: micro batches of a step."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Videos of an optimiser step over all ranks."""
        return self.micro * self.accumulation * self.world_size

    @classmethod
    def of(cls, config: Config, world_size: int, recorded: int | None = None) -> BatchSizes:
        """The sizes that a job of `world_size` ranks uses. recorded: the global batch of the run that goes on.

        The global batch is the recorded one, else solver.global_batch, else what the other keys make. A micro batch is
        the largest part of a rank's share that data.batch_size allows. Raises ConfigError if the ranks cannot share the
        global batch equally.
        """
        largest = config.data.batch_size
        given = recorded or config.solver.global_batch
        total = given or largest * config.solver.grad_accumulation_steps * world_size
        if total % world_size:
            below = total // world_size * world_size
            fits = f"{below} or {below + world_size}" if below else f"{world_size}"
            ranks = [ranks for ranks in range(max(1, world_size - 8), world_size) if total % ranks == 0]
            raise ConfigError(
                f"solver.global_batch: {total} videos cannot be shared equally by {world_size} ranks; {fits} can, "
                f"or start {ranks[-1] if ranks else 1} ranks"
            )
        share = total // world_size
        micro = max(size for size in range(1, min(largest, share) + 1) if share % size == 0)
        return cls(micro, share // micro, world_size)
