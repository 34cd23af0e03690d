"""Opens the data set of a split, and names its classes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shards.annotations import parse_labels
from shards.format import ShardError
from shards.reader import ShardDataset, open_dataset
from text4vis.common.cache import cache_dir
from text4vis.config.schema import Config, ConfigError
from text4vis.config.sources import addresses


def open_split(config: Config, split: str) -> ShardDataset:
    """Opens the shards that `data.train` or `data.val` names. The caller closes the data set.

    split: "train" or "val". Raises ConfigError if the key names nothing, ShardError if its shards cannot be opened.
    """
    sources = config.data.train if split == "train" else config.data.val
    if not sources:
        raise ConfigError(f"data.{split}: no shards named; build them with tools/build_shards.py and name the folder")
    try:
        return open_dataset(
            addresses(sources),
            requests_in_flight=config.data.requests_in_flight,
            bytes_in_flight=config.data.bytes_in_flight,
            cache_dir=cache_dir(config),
            cache_bytes=config.data.cache_bytes or None,
            verify=config.data.verify,
        )
    except ShardError as error:
        raise ShardError(f"data.{split}: {error}") from error


def class_names(config: Config, dataset: ShardDataset, recorded: list[str] | None = None) -> list[str]:
    """The class names by label: those of `data.label_list`, or those that the shards hold.

    recorded: names that were read from `data.label_list` before; they count where it is gone.
    Raises ConfigError if `data.label_list` has fewer names than the data set has labels, or names of the shards in
    another order.
    """
    if config.data.label_list is None:
        return list(dataset.classes)
    is_gone = recorded is not None and not Path(config.data.label_list).exists()
    names = list(recorded or ()) if is_gone else parse_labels(config.data.label_list)
    largest = len(dataset.class_counts()) - 1
    if largest >= len(names):
        raise ConfigError(
            f"data.label_list: {config.data.label_list} names {len(names)} classes, but the shards hold label "
            f"{largest}; give the list that the shards were built with"
        )
    known = {name: label for label, name in enumerate(dataset.classes)}
    for label, name in enumerate(names):
        if known.get(name, label) != label:
            raise ConfigError(
                f"data.label_list: class {label} of {config.data.label_list} is {name!r}, which is class {known[name]} "
                f"of the shards of {', '.join(dataset.places)}, so videos would get the names of other classes; give "
                "the list that the shards were built with"
            )
    return names


def check_same_classes(config: Config, train: list[str], val: list[str]) -> None:
    """Labels of both splits mean the same classes, as far as the shards' class names tell. Raises ConfigError.

    With `data.label_list` the shards may hold other words for the classes, but none with another label.
    """
    if config.data.label_list is None and train != val:
        raise ConfigError(
            f"data.val: its shards name {len(val)} classes that are not the {len(train)} of data.train in their order; "
            "build both with one --labels file, name data.label_list, or evaluate other classes with evaluate.py"
        )
    known = {name: label for label, name in enumerate(train)}
    for label, name in enumerate(val):
        if known.get(name, label) != label:
            raise ConfigError(
                f"data.val: {name!r} is class {label} of its shards and class {known[name]} of those of data.train, so "
                "its videos would count for other classes; build both with one --labels file"
            )


def check_labels(config: Config, split: str, dataset: ShardDataset) -> None:
    """Training's loss can take as many labels a video as the split has. Raises ConfigError."""
    if dataset.multi_label and not config.solver.multi_label:
        raise ConfigError(
            f"solver.loss_type: {config.solver.loss_type} takes one label a video, but videos of data.{split} "
            f"({', '.join(dataset.places)}) have several, or none; set solver.loss_type to BCE or ASL"
        )


def positive_share(dataset: ShardDataset, num_classes: int) -> float:
    """The share of all (video, class) pairs that belong together, 0 to 1."""
    return float(dataset.class_counts().sum() / (len(dataset) * num_classes))


def multi_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Which of C = `num_classes` classes videos have, (B, C) bool.

    labels: of a batch, (B,) int64, or (B, C') bool with the shards' number of classes; all labels are below C.
    """
    if labels.dtype != torch.bool:
        return labels[:, None] == torch.arange(num_classes, device=labels.device)
    return torch.nn.functional.pad(labels, (0, num_classes - labels.shape[1]))
