"""The videos that `data.on_error: skip` passed over: counted, listed, limited. Imports nothing of text4vis.

A video is bad where the frames that are drawn from it cannot be used; one with a single bad frame is bad in the epochs
that draw this frame.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shards.address import printable
from shards.format import ShardError
from shards.reader import ShardDataset

logger = logging.getLogger("text4vis")

SKIPPED_LIST = "skipped.jsonl"  # in OUT
MOST_NAMED = 3

Entry = dict[str, Any]


class BadVideos:
    """Bad videos of one split that this process knows of. videos: ids (N,) of all that the split goes over.

    Filled by the loader's thread while others read.
    """

    def __init__(self, dataset: ShardDataset, videos: np.ndarray, most_share: float) -> None:
        self._dataset, self._num_videos, self._most_share = dataset, len(videos), most_share
        self._entries: dict[int, Entry] = {}
        self._told = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sample: int, reason: str) -> None:
        """Takes note of a video, once. Raises ShardError when they are more than `data.max_bad_share` allows."""
        name, address = printable(self._dataset.name(sample)), self._dataset.place(sample)
        self.join([{"id": sample, "name": name, "address": address, "reason": printable(reason)}])

    def join(self, entries: Iterable[Entry]) -> None:
        """Takes note of what others have found. Raises ShardError as `add` does."""
        for entry in entries:
            self._entries.setdefault(entry["id"], entry)
        if len(self) > self._most_share * self._num_videos:
            first = " ".join(f"({n}) {entry['reason']}" for n, entry in enumerate(self.entries()[:MOST_NAMED], start=1))
            raise ShardError(
                f"data.max_bad_share: {len(self)} of {self._num_videos} videos cannot be used, more than the share of "
                f"{self._most_share:g} that may be skipped; mend the data or raise the share. The first: {first}"
            )

    def entries(self) -> list[Entry]:
        """{"id", "name", "address", "reason"} of each, in the order of their discovery."""
        return list(self._entries.values())

    def news(self) -> list[Entry]:
        """The entries that an earlier call has not given out."""
        new = self.entries()[self._told :]
        self._told += len(new)
        return new


class SkippedList:
    """OUT/skipped.jsonl: an entry a line, with its split, of this job and those before it. Rank 0 alone writes it."""

    def __init__(self, output: Path) -> None:
        self._path = output / SKIPPED_LIST
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole, _, half = text.rpartition("\n")
        if half:  # what a killed job leaves
            self._path.write_text(f"{whole}\n" if whole else "", encoding="utf-8")
        self._entries: list[Entry] = [json.loads(line) for line in whole.split("\n") if line]

    def add(self, split: str, entries: Iterable[Entry]) -> None:
        """Writes and logs those that are not in the list yet."""
        known = {(entry["split"], entry["id"], entry["name"]) for entry in self._entries}
        new = [{"split": split, **entry} for entry in entries if (split, entry["id"], entry["name"]) not in known]
        for entry in new:
            logger.warning("skipped, data.%s: %s", split, entry["reason"])
        if new:
            self._entries += new
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new)
