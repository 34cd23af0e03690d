"""What a job writes about its run beside log.txt: metrics, pictures for TensorBoard, the list of skipped videos."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.format import ShardError
from text4vis.config.schema import Config
from text4vis.data.bad_videos import SkippedList
from text4vis.training.logs import Metrics

if TYPE_CHECKING:
    from text4vis.data.loader import Loader
    from text4vis.report.tensorboard import TensorBoardLog

logger = logging.getLogger("text4vis")


@dataclass
class RunLog:
    """The files of a run that grow with its steps. Those that are None are not written, as on ranks other than 0."""

    metrics: Metrics | None = None
    skipped: SkippedList | None = None
    tensorboard: TensorBoardLog | None = None

    @classmethod
    def open(cls, output: Path, config: Config, class_names: list[str], *, global_batch: int, step: int) -> RunLog:
        """The files in `output`, cut back to `step`, from which the run goes on."""
        metrics, tensorboard = Metrics(output, step), None
        if config.logging.pictures:
            from text4vis.report.tensorboard import TensorBoardLog

            tensorboard = TensorBoardLog(metrics.board, config, class_names, global_batch=global_batch, step=step)
        return cls(metrics, SkippedList(output), tensorboard)

    def write(self, kind: str, record: Mapping[str, Any]) -> None:
        """Adds a record of `kind`, "train" or "val", to metrics.jsonl and TensorBoard."""
        if self.metrics is not None:
            self.metrics.write(kind, record)

    def list_skipped(self, loader: Loader) -> None:
        """Adds the videos that the loader skipped to the list in the run's folder."""
        if self.skipped is not None:
            self.skipped.add(loader.split, loader.bad.entries())

    def add_pictures(self, step: int, draw: Callable[[TensorBoardLog], None]) -> None:
        """Lets `draw` add to TensorBoard's pictures. What it cannot read or write is logged, never fatal."""
        if self.tensorboard is None:
            return
        try:
            draw(self.tensorboard)
        except (ShardError, OSError) as error:
            logger.warning("TensorBoard: pictures of step %d left out: %s", step, error)

    def close(self) -> None:
        """Closes the files."""
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.metrics is not None:
            self.metrics.close()
