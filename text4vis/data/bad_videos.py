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

from shards.files import write_atomically
from shards.format import ShardError
from shards.reader import ShardDataset
from shards.text import printable

logger = logging.getLogger("text4vis")

SKIPPED_LIST = "skipped.jsonl"  # in OUT
MOST_NAMED = 3

Entry = dict[str, Any]


class BadVideos:
    """Bad videos of one split that this process knows of. videos: ids (N,) of all that the split goes over.

    Filled by the loader's thread while others read. endless: the split's stream never ends, so that too many are an
    error as soon as they are found; else when they are joined, on all ranks alike.
    """

    def __init__(self, dataset: ShardDataset, videos: np.ndarray, most_share: float, *, endless: bool) -> None:
        self._dataset, self._num_videos, self._most_share, self._endless = dataset, len(videos), most_share, endless
        self._entries: dict[int, Entry] = {}
        self._told = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sample: int, reason: str) -> None:
        """Takes note of a video, once. Raises ShardError, if `endless`, as `join` does."""
        name, address = printable(self._dataset.name(sample)), self._dataset.place(sample)
        entry = {"id": sample, "name": name, "address": address, "reason": printable(reason)}
        self._entries.setdefault(sample, entry)
        if self._endless:
            self._check()

    def join(self, entries: Iterable[Entry]) -> None:
        """Takes note of what others have found. Raises ShardError when there are more than may be skipped."""
        for entry in entries:
            self._entries.setdefault(entry["id"], entry)
        self._check()

    def clear(self) -> None:
        """Forgets all: the next pass finds out anew."""
        self._entries.clear()
        self._told = 0

    def _check(self) -> None:
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
            write_atomically(self._path, (f"{whole}\n" if whole else "").encode())
        self._known: set[tuple[str, int, str]] = set()
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                self._known.add((entry["split"], entry["id"], entry["name"]))
            except (ValueError, TypeError, KeyError):
                raise ShardError(
                    f"{self._path}, line {number}: damaged; delete the line, it only lists a video"
                ) from None

    def add(self, split: str, entries: Iterable[Entry]) -> None:
        """Writes and logs those that are not in the list yet."""
        new = {(split, entry["id"], entry["name"]): {"split": split, **entry} for entry in entries}
        new = {key: entry for key, entry in new.items() if key not in self._known}
        for entry in new.values():
            logger.warning("skipped, data.%s: %s", split, entry["reason"])
        if new:
            self._known |= new.keys()
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in new.values())
