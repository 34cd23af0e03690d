"""Places the samples of an epoch in windows of shards, and the windows in streams. Pure functions of numbers.

    shards in random order      5 2 7 0 4 1 6 3
    arranged for two streams    5 2 0 1 | 7 4 6 3      equally many samples each, few shards on both sides of a border
    windows of three shards     (5 2 0) (1) | (7 4 6) (3)

A host that works on some of the streams meets only the shards of these. Letters: N samples, P shards, S streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

# A stream's last shards are chosen, among so many, when it lacks samples for about so few.
_CANDIDATES = 24
_CHOSEN_LAST = 8
_BLOCK_SAMPLES = 1 << 20


def small_numbers(num_values: int) -> type[np.signedinteger] | type[np.unsignedinteger]:
    """The type for numbers below `num_values` that sorts fastest: numpy sorts 16-bit numbers by radix."""
    return np.uint16 if num_values <= 1 << 16 else np.int64


def arranged(sizes: Sequence[int], targets: Sequence[int]) -> list[int]:
    """The P shards of these sizes in an order in which the S streams follow one another, as a permutation of range(P).

    Cut after `targets` samples each, the sequence gives the streams. Shards keep their order except that a stream's
    last ones are chosen to fill it exactly. Where that is impossible, a border cuts a shard. So at most S - 1 shards
    belong to more than one stream.
    """
    sequence, place, carried = list(range(len(sizes))), 0, 0
    enough = _CHOSEN_LAST * sum(sizes) // len(sizes)
    for target in targets[:-1]:
        missing = target - carried
        while missing > 0:
            if missing <= enough + sizes[sequence[place]]:
                candidates = sequence[place : place + _CANDIDATES]
                chosen = _exact_choice([sizes[shard] for shard in candidates], missing)
                if chosen:
                    rest = [shard for number, shard in enumerate(candidates) if number not in chosen]
                    first = [candidates[number] for number in sorted(chosen)]
                    sequence[place : place + _CANDIDATES] = first + rest
                    place += len(first)
                    missing = 0
                    break
            missing -= sizes[sequence[place]]
            place += 1
        carried = -missing
    return sequence


def _exact_choice(sizes: Sequence[int], total: int) -> set[int]:
    """Numbers of some `sizes` that sum to `total` > 0; empty if there are none. Bit t of a mask: t can be reached."""
    within = (1 << (total + 1)) - 1
    reached = [1]
    for size in sizes:
        reached.append((reached[-1] | reached[-1] << size) & within)
        if reached[-1] >> total:
            break
    chosen: set[int] = set()
    if reached[-1] >> total:
        for number in range(len(reached) - 2, -1, -1):
            if not reached[number] >> total & 1:
                chosen.add(number)
                total -= sizes[number]
    return chosen


def windows_of_samples(
    shard_of: np.ndarray, shards: np.ndarray, window: int, targets: np.ndarray | None = None
) -> np.ndarray:
    """The window, 0, 1, ..., of each sample: (N,) whole numbers. Windows follow one another, stream after stream.

    shard_of: (N,) shard numbers. shards: (P,), all of these numbers in the epoch's random order. window: shards in a
    window. targets: (S,) samples of each stream, N together; None: one stream. Of a shard that two streams share, the
    first has the samples with the lower ids, so that each needs one range of bytes.
    """
    counts = np.bincount(shard_of)
    cuts = np.array([len(shard_of)]) if targets is None else np.cumsum(targets)
    if len(cuts) > 1:
        shards = shards[arranged(counts[shards].tolist(), np.diff(cuts, prepend=0).tolist())]
    ends = np.cumsum(counts[shards])
    # A piece is what a stream has of a shard.
    piece_ends = np.unique(np.concatenate([ends, cuts[cuts > 0]]))
    piece_sizes = np.diff(piece_ends, prepend=0)
    piece_shards = shards[np.searchsorted(ends, piece_ends - piece_sizes, side="right")]
    streams = np.searchsorted(cuts, piece_ends - piece_sizes, side="right")
    numbers = np.arange(len(streams))
    is_first = np.diff(streams, prepend=-1) > 0
    in_stream = numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
    windows = np.cumsum(in_stream % window == 0) - 1
    by_id = np.argsort(piece_shards, kind="stable")
    kind = small_numbers(int(windows[-1]) + 1)
    by_shard = np.repeat(windows[by_id].astype(kind), piece_sizes[by_id])
    if (shard_of[1:] >= shard_of[:-1]).all():
        return by_shard
    of_samples = np.empty_like(by_shard)
    of_samples[np.argsort(shard_of, kind="stable")] = by_shard
    return of_samples


def stable_places(keys: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Where a stable sort by `keys`, (N,) whole numbers, puts each element: (block of elements, their places) in turn.

    Working block by block needs far less memory than a sort of all.
    """
    counts = np.bincount(keys)
    free = np.cumsum(counts) - counts
    for start in range(0, len(keys), _BLOCK_SAMPLES):
        part = keys[start : start + _BLOCK_SAMPLES]
        sorting = np.argsort(part, kind="stable")
        counts = np.bincount(part, minlength=len(free))
        places = np.empty(len(part), np.int64)
        places[sorting] = np.arange(len(part)) + np.repeat(free - (np.cumsum(counts) - counts), counts)
        free += counts
        yield slice(start, start + len(part)), places
