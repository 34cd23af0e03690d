"""What often spoils a training run without an error, seen from configuration, class names and index alone."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shards.reader import ShardDataset
from text4vis.config.schema import Config
from text4vis.data.augmentation import flip_swaps

FEW_VIDEOS = 8
_LARGE = 1.5  # times the size that the model needs
_SHOWN = 3
_SIZED_VIDEOS = 64
_MIRRORED = {"left": "right", "clockwise": "counterclockwise", "leftward": "rightward", "leftwards": "rightwards"}
_MIRRORED |= {after: before for before, after in _MIRRORED.items()}


@dataclass(frozen=True)
class Trap:
    """message: what was found, with figures; fix: what to do about it, with the key to set."""

    message: str
    fix: str


def find_traps(config: Config, names: Sequence[str], train: ShardDataset) -> list[Trap]:
    """The traps of a training run on this data set; names: class names by label. Reads no frame."""
    counts_C = train.class_counts(len(names))
    videos = np.unique(np.linspace(0, len(train) - 1, _SIZED_VIDEOS).round().astype(np.int64)).tolist()
    sides = [min(train.frame_sizes(video, np.zeros(1, np.int64))[0]) for video in videos]
    return [
        *sided_classes(config, names),
        *nearly_equal_names(config, names),
        *rare_classes(config, names, counts_C, multi_label=train.multi_label),
        *short_videos(config, train.num_frames),
        *large_frames(config, sides),
        *slow_arithmetic(config),
    ]


def log_traps(logger: logging.Logger, config: Config, names: Sequence[str], train: ShardDataset) -> None:
    """Warns of each trap, with its fix, in the run's log."""
    for trap in find_traps(config, names, train):
        logger.warning("%s; %s", trap.message, trap.fix)


def sided_classes(config: Config, names: Sequence[str]) -> Iterator[Trap]:
    """Classes that a horizontal flip turns into others, or into something that their names do not describe."""
    if config.data.augmentation == "none" or not config.data.flip:
        return
    swapped = flip_swaps(config.data)
    labels = {_words(name): label for label, name in enumerate(names)}
    pairs: set[tuple[int, int]] = set()
    alone: list[str] = []
    for words, label in labels.items():
        if label in swapped or not _MIRRORED.keys() & set(words):
            continue
        other = labels.get(tuple(_MIRRORED.get(word, word) for word in words))
        if other is None or other == label:
            alone.append(names[label])
        else:
            pairs.add((min(label, other), max(label, other)))
    what = f"data.flip: {config.data.flip} mirrors videos of"
    if pairs:
        one, other = min(pairs)
        swaps = [list(pair) for pair in sorted(pairs)]
        yield Trap(
            f"{what} {2 * len(pairs)} classes that say left or right, such as {names[one]!r} and {names[other]!r}, and "
            "keeps their labels",
            f"data.flip: 0, or data.flip_swaps: {swaps}",
        )
    if alone:
        yield Trap(
            f"{what} {_count(len(alone), 'class that says', 'classes that say')} left or right ({_some(alone)}), while "
            "no class is called the opposite",
            "data.flip: 0",
        )


def nearly_equal_names(config: Config, names: Sequence[str]) -> Iterator[Trap]:
    """Names of three words or more that differ in one, or in the order of the words: their texts embed nearly alike."""
    if config.network.classifier != "text" or config.network.classifier_trainable:
        return
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        words = _words(name)
        if len(words) >= 3:
            for place in range(len(words)):
                groups[(*words[:place], "*", *words[place + 1 :])].append(name)
            groups[("in order", *sorted(words))].append(name)
    alike = [group for group in groups.values() if len(set(group)) > 1]
    if alike:
        classes = {name for group in alike for name in group}
        yield Trap(
            f"{len(classes)} of {len(names)} class names differ from another in one word or in the order of words, "
            f"such as {_some(alike[0])}: their texts embed nearly alike",
            "reword them in a class list (data.label_list), or network.classifier: lda",
        )


def rare_classes(
    config: Config, names: Sequence[str], counts_C: np.ndarray, *, multi_label: bool = False
) -> Iterator[Trap]:
    """Classes with very few videos to train on, unless few-shot training was asked for."""
    none = [names[label] for label in np.flatnonzero(counts_C == 0).tolist()]
    if none:
        yield Trap(
            f"{_count(len(none), 'class has', 'classes have')} no video to train on ({_some(none)})",
            "build data.train with videos of them, or name a shorter class list when both splits are built",
        )
    few = np.flatnonzero((counts_C > 0) & (counts_C < FEW_VIDEOS)).tolist()
    if few and not config.data.shot:
        shown = ", ".join(f"{names[label]!r}: {counts_C[label]}" for label in few[:_SHOWN])
        yield Trap(
            f"{_count(len(few), 'class has', 'classes have')} fewer than {FEW_VIDEOS} videos to train on "
            f"({shown}{_more(few)})",
            "add videos of them"
            if multi_label
            else "add videos, or give all classes the same weight: data.shot: "
            f"{int(counts_C[counts_C > 0].min())} trains on that many videos of each",
        )


def short_videos(config: Config, num_frames_N: np.ndarray) -> Iterator[Trap]:
    """Videos with fewer frames than segments, whose frames are repeated."""
    segments = config.data.num_segments
    short = int((num_frames_N < segments).sum())
    if short:
        yield Trap(
            f"{short:,} of {len(num_frames_N):,} videos have fewer frames than data.num_segments: {segments}, down to "
            f"{int(num_frames_N.min())}, and repeat them",
            f"data.num_segments: {max(1, int(np.percentile(num_frames_N, 5)))}, or build with more frames a second "
            "(--fps) or longer clips",
        )


def large_frames(config: Config, sides: Sequence[int]) -> Iterator[Trap]:
    """Frames that cost decoding time and disk for pixels that the model never sees."""
    known = [side for side in sides if side]
    side = int(np.median(known)) if known else 0
    if side > _LARGE * config.scale_size:
        yield Trap(
            f"frames are {side} pixels on their shorter side, and data.scale_size makes {config.scale_size} of them: "
            f"decoding takes about {(side / config.scale_size) ** 2:.0f} times as long as needed",
            f"build the shards with --short-side {config.scale_size}",
        )


def slow_arithmetic(config: Config) -> Iterator[Trap]:
    """bf16 on a processor that does not compute it: a matrix product took 48 times as long as in fp32."""
    capability = torch.backends.cpu.get_cpu_capability()
    if config.engine.precision == "bf16" and not torch.cuda.is_available() and capability == "AVX2":
        yield Trap(
            "engine.precision: bf16 on a processor without AVX-512, where a step may take 50 times as long as in fp32",
            "engine.precision: fp32",
        )


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", name.lower().replace("anticlockwise", "counterclockwise")))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _more(items: Sequence[object]) -> str:
    return ", …" if len(items) > _SHOWN else ""


def _some(names: Sequence[str]) -> str:
    unique = list(Counter(names))
    return ", ".join(map(repr, unique[:_SHOWN])) + _more(unique)
