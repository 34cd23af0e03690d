"""The videos that `data.on_error: skip` has skipped: their list, and the limit on their number.

A video is bad in an epoch if a frame that the epoch draws from it cannot be used. So a video with a single bad frame is
bad in some epochs and not in others.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import numpy as np

from shards.files import write_atomically
from shards.format import ShardError
from shards.reader import ShardDataset
from shards.text import printable

logger = logging.getLogger("text4vis")

SKIPPED_LIST = "skipped.jsonl"  # in OUT
MOST_NAMED = 3


class Entry(TypedDict):
    """A bad video: its position in the data set, its original name, its data set's address, and what is wrong."""

    id: int
    name: str
    address: str
    reason: str


class BadVideos:
    """The bad videos of one split that this process knows of. The loader's thread adds to it while others read it.

    videos: ids of all videos that the split goes over, (N,) int64. most_share: the share of them that may be bad.
    endless: whether the split's stream never ends, as in training. Then too many bad videos are an error as soon as one
    more is found; else only in `join`, on all ranks alike.
    """

    def __init__(self, dataset: ShardDataset, videos: np.ndarray, most_share: float, *, endless: bool) -> None:
        self._dataset, self._num_videos, self._most_share, self._endless = dataset, len(videos), most_share, endless
        self._entries: dict[int, Entry] = {}
        self._num_reported = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, sample: int, reason: str) -> None:
        """Adds a video, unless it is known. Raises ShardError if `endless` and there are more than may be skipped."""
        name, address = printable(self._dataset.name(sample)), self._dataset.place(sample)
        entry = Entry(id=sample, name=name, address=address, reason=printable(reason))
        self._entries.setdefault(sample, entry)
        if self._endless:
            self._check()

    def join(self, entries: Iterable[Entry]) -> None:
        """Adds what other ranks have found. Raises ShardError if there are more than may be skipped."""
        for entry in entries:
            self._entries.setdefault(entry["id"], entry)
        self._check()

    def clear(self) -> None:
        """Removes all entries: the next pass tries every video again."""
        self._entries.clear()
        self._num_reported = 0

    def _check(self) -> None:
        if len(self) > self._most_share * self._num_videos:
            first = " ".join(f"({n}) {entry['reason']}" for n, entry in enumerate(self.entries()[:MOST_NAMED], start=1))
            raise ShardError(
                f"data.max_bad_share: {len(self)} of {self._num_videos} videos cannot be used, more than the share of "
                f"{self._most_share:g} that may be skipped; fix the data or raise the share. The first: {first}"
            )

    def entries(self) -> list[Entry]:
        """All bad videos, in the order in which they were found."""
        return list(self._entries.values())

    def news(self) -> list[Entry]:
        """The entries that were added since the last call."""
        new = self.entries()[self._num_reported :]
        self._num_reported += len(new)
        return new


class SkippedList:
    """OUT/skipped.jsonl: one entry a line with its split, from this job and those before it. Only rank 0 writes it.

    Raises ShardError if the file is damaged.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / SKIPPED_LIST
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        whole, _, half = text.rpartition("\n")
        if half:  # a line that a killed job did not finish
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
        """Writes and logs the entries that are not in the list yet."""
        keyed = {(split, entry["id"], entry["name"]): entry for entry in entries}
        new = {key: entry for key, entry in keyed.items() if key not in self._known}
        for entry in new.values():
            logger.warning("skipped, data.%s: %s", split, entry["reason"])
        if new:
            self._known |= new.keys()
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"split": split, **entry}, ensure_ascii=False) + "\n" for entry in new.values()
                )
