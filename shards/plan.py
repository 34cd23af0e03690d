"""Which sample comes when, and for which rank: pure functions of numbers, without input or output.

The training stream is the endless concatenation of epoch permutations. A position in it is one integer, the number of
samples that the whole job has consumed; everything below follows from (number of samples, seed, position), so a job
may stop anywhere and go on with any number of ranks.

With several streams, positions go round: position p belongs to stream p % S, and each stream has shards of its own. A
global batch is shared stream by stream, so that ranks that follow one another, those of a host, meet few streams:

    positions  0 1 2 3 4 5 6 7   of streams  0 1 2 3 0 1 2 3   shared by two hosts as  0 4 1 5 | 2 6 3 7

numpy's random generators are not promised to give the same numbers in every version. The orders here come from
integer hashing (splitmix64) and from sorting keys that are all different, so they never change.

Letters: N samples, C classes, S streams, K shards in a window or videos a class.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from shards.weave import small_numbers, stable_places, windows_of_samples

_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = (1 << 64) - 1
# Ids are hashed in blocks: they stay in the processor's cache, and the scratch memory stays small.
_BLOCK_IDS = 1 << 15
# A batch crosses at most one epoch border unless the data set is smaller than the batch.
_CACHED_EPOCHS = 2


def mix64(value: int) -> int:
    """splitmix64's finaliser of one integer: a bijection of 64-bit numbers (Steele, Lea, Flood, OOPSLA 2014)."""
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def _mix64_inplace(values: np.ndarray, scratch: np.ndarray) -> None:
    """`mix64` of each uint64 in `values`; `scratch` is an array of the same shape to work in."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(values, np.uint64(shift), out=scratch)
        values ^= scratch
        values *= np.uint64(factor)
    np.right_shift(values, np.uint64(31), out=scratch)
    values ^= scratch


def _hash_order(num_ids: int, *key: int) -> np.ndarray:
    """Permutation (num_ids,) int64 of range(num_ids) that depends on the integers in `key`.

    Each id is hashed; the hash's upper bits and the id share one 64-bit word, and the words are sorted. All words
    differ, so the result does not depend on the sorting algorithm, and sorting words is three times as fast as
    sorting ids by their hash. With 10 million ids the hash keeps 40 bits: about 45 pairs tie and keep their order.
    """
    salt = 0
    for part in key:
        salt = mix64(salt * _GOLDEN + part + _GOLDEN)
    id_bits = max(1, (num_ids - 1).bit_length())
    id_mask = np.uint64((1 << id_bits) - 1)
    words = np.empty(num_ids, np.uint64)
    scratch = np.empty(min(num_ids, _BLOCK_IDS), np.uint64)
    for start in range(0, num_ids, _BLOCK_IDS):
        block = words[start : start + _BLOCK_IDS]
        temporary = scratch[: len(block)]
        block[:] = np.arange(start, start + len(block), dtype=np.uint64)
        block *= np.uint64(_GOLDEN)
        block += np.uint64(salt)
        _mix64_inplace(block, temporary)
        block ^= np.uint64(mix64(salt + 1))
        _mix64_inplace(block, temporary)
        block &= ~id_mask
        block |= np.arange(start, start + len(block), dtype=np.uint64)
    words.sort()
    words &= id_mask
    return words.view(np.int64)


def shuffle_window(shuffle: str) -> int | None:
    """K of 'shards:K', None for 'global' and 'none'. Raises ValueError for anything else."""
    if shuffle in ("global", "none"):
        return None
    kind, _, window = shuffle.partition(":")
    if kind == "shards" and window.isascii() and window.isdigit() and len(window) < 10 and int(window) > 0:
        return int(window)
    raise ValueError(
        "shuffle: expected 'global', 'shards:K' with K of at least 1 (and at most 999999999), or 'none', got "
        f"{shuffle[:40]!r}"
    )


def epoch_order(
    num_samples: int,
    seed: int,
    epoch: int,
    *,
    shuffle: str = "global",
    shard_of: np.ndarray | None = None,
    streams: np.ndarray | None = None,
) -> np.ndarray:
    """Order of one epoch: (N,) int64, a permutation of range(N), the same for the same arguments everywhere.

    shuffle: 'global' permutes all samples. 'shards:K' permutes the shards, takes them K at a time and permutes the
    samples of each such window, so that at most K shards are in use at once; it needs `shard_of`, the (N,) shard
    numbers. 'none' is 0, 1, 2, ... for evaluation. Raises ValueError.
    streams: with 'shards:K', the stream 0 ... S-1 that each of the (N,) places of the order belongs to. The shards are
    dealt to the streams, and each stream has windows of its own; a shard that lies on a border belongs to both.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    window = shuffle_window(shuffle)
    if shuffle == "none":
        return np.arange(num_samples, dtype=np.int64)
    order = _hash_order(num_samples, seed, epoch)
    if window is None:
        return order
    if shard_of is None or shard_of.shape != (num_samples,):
        raise ValueError(f"shuffle={shuffle!r} needs shard_of, the ({num_samples},) shard numbers of the samples")
    shards = np.flatnonzero(np.bincount(shard_of))
    shards = shards[_hash_order(len(shards), seed, epoch, 1)]
    windows = windows_of_samples(shard_of, shards, window, None if streams is None else np.bincount(streams))
    # A stable sort keeps the hash order of the samples within each window.
    by_window = np.empty_like(order)
    for block, places in stable_places(windows[order]):
        by_window[places] = order[block]
    if streams is None:
        return by_window
    for block, places in stable_places(streams):
        order[block] = by_window[places]
    return order


class Stream:
    """The endless concatenation of epoch orders. See `epoch_order` for the arguments; raises ValueError as it does.

    num_streams: S of the module's header; with more than one, shuffle must be 'shards:K'. stream_of: the stream of the
    sample at each of some positions; default: position % S. Starting at any position costs the order of one epoch,
    wherever the position lies.
    """

    def __init__(
        self,
        num_samples: int,
        seed: int,
        shuffle: str = "global",
        shard_of: np.ndarray | None = None,
        *,
        num_streams: int = 1,
        stream_of: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
        window = shuffle_window(shuffle)
        if window is not None and shard_of is None:
            raise ValueError(f"shuffle={shuffle!r} needs shard_of, the ({num_samples},) shard numbers of the samples")
        if num_streams < 1 or (window is None and num_streams > 1):
            raise ValueError(f"num_streams: expected 1, or more with shuffle='shards:K', got {num_streams}")
        self.num_samples = num_samples
        self.seed = seed
        self.shuffle = shuffle
        self.shard_of = shard_of
        self.num_streams = num_streams
        self._stream_of = stream_of or (lambda positions: positions % num_streams)
        self._orders: dict[int, np.ndarray] = {}

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            while len(self._orders) >= _CACHED_EPOCHS:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = epoch_order(
                self.num_samples,
                self.seed,
                epoch,
                shuffle=self.shuffle,
                shard_of=self.shard_of,
                streams=self._streams(epoch) if self.num_streams > 1 else None,
            )
        return self._orders[epoch]

    def _streams(self, epoch: int) -> np.ndarray:
        """The (N,) streams of an epoch's places."""
        streams = np.empty(self.num_samples, small_numbers(self.num_streams))
        for start in range(0, self.num_samples, _BLOCK_IDS):
            stop = min(start + _BLOCK_IDS, self.num_samples)
            streams[start:stop] = self._stream_of(epoch * self.num_samples + np.arange(start, stop))
        return streams

    def take(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs, both (stop - start,) int64, at the stream positions start <= position < stop."""
        if not 0 <= start <= stop:
            raise ValueError(f"stream positions: expected 0 <= start <= stop, got {start} and {stop}")
        return self.at(np.arange(start, stop))

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sample ids and epochs, both (n,) int64, at these (n,) stream positions."""
        epochs, offsets = np.divmod(positions, self.num_samples)
        if len(positions) and epochs[0] == epochs.min() == epochs.max():
            return self._order(int(epochs[0]))[offsets], epochs
        ids = np.empty_like(offsets)
        for epoch in np.unique(epochs).tolist():
            in_epoch = epochs == epoch
            ids[in_epoch] = self._order(epoch)[offsets[in_epoch]]
        return ids, epochs


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world size, got rank {rank} of world size {world_size}")


def rank_slice(global_start: int, global_batch: int, rank: int, world_size: int) -> tuple[int, int]:
    """Stream positions (start, stop) of one rank's share of the global batch that starts at `global_start`.

    Raises ValueError if the world size does not divide the global batch.
    """
    _check_rank(rank, world_size)
    if global_batch < 1 or global_batch % world_size:
        nearest = max(1, (2 * global_batch + world_size) // (2 * world_size)) * world_size
        raise ValueError(
            f"a global batch of {global_batch} videos cannot be shared equally by {world_size} ranks; "
            f"the nearest that can is {nearest}"
        )
    share = global_batch // world_size
    start = global_start + rank * share
    return start, start + share


def share_positions(
    global_start: int, global_batch: int, rank: int, world_size: int, num_streams: int = 1
) -> np.ndarray:
    """Stream positions, (global batch / world size,) int64, of one rank's share of the batch at `global_start`.

    The batch is shared stream by stream. Raises ValueError if the world size does not divide the global batch.
    """
    start, stop = rank_slice(0, global_batch, rank, world_size)
    if num_streams == 1:
        return np.arange(global_start + start, global_start + stop)
    firsts_S = (np.arange(num_streams) - global_start) % num_streams  # each stream's first place in the batch
    counts_S = (global_batch - firsts_S + num_streams - 1) // num_streams
    ends_S = np.cumsum(counts_S)
    turns = np.arange(start, stop)
    streams = np.searchsorted(ends_S, turns, side="right")
    return global_start + firsts_S[streams] + (turns - ends_S[streams] + counts_S[streams]) * num_streams


def eval_slice(num_samples: int, rank: int, world_size: int) -> tuple[int, int]:
    """Samples (start, stop) that one rank evaluates: contiguous, every sample once, shares differ by at most one."""
    _check_rank(rank, world_size)
    return num_samples * rank // world_size, num_samples * (rank + 1) // world_size


def few_shot_subset(labels_N: np.ndarray, shots: int, seed: int, *, at_most: bool = False) -> np.ndarray:
    """Ids (shots * C,) int64, sorted, of `shots` samples of each class 0 ... C-1, C being the largest label plus one.

    Depends on nothing but the arguments, so every rank draws the same. Raises ValueError if a class has too few; with
    `at_most` such a class gives all it has.
    """
    if shots < 1 or len(labels_N) == 0:
        raise ValueError(f"few-shot subset: expected at least one shot and one sample, got {shots} and {len(labels_N)}")
    counts_C = np.bincount(labels_N)
    short = np.flatnonzero(counts_C < shots)
    if len(short) and not at_most:
        raise ValueError(
            f"few-shot subset: class {short[0]} has {counts_C[short[0]]} videos, {shots} are asked for "
            f"({len(short)} of {len(counts_C)} classes have too few); lower the number of shots or add videos"
        )
    order = _hash_order(len(labels_N), seed)
    by_class = order[np.argsort(np.asarray(labels_N)[order], kind="stable")]
    place_N = np.arange(len(labels_N)) - np.repeat(np.cumsum(counts_C) - counts_C, counts_C)
    return np.sort(by_class[place_N < shots])
