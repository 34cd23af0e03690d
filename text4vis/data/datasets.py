"""Opens the data set of a split, and names its classes."""

from __future__ import annotations

from pathlib import Path

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
    Raises ConfigError if `data.label_list` has fewer names than the data set has labels.
    """
    if config.data.label_list is None:
        return list(dataset.classes)
    is_gone = recorded is not None and not Path(config.data.label_list).exists()
    names = list(recorded or ()) if is_gone else parse_labels(config.data.label_list)
    if len(dataset) and int(dataset.labels.max()) >= len(names):
        raise ConfigError(
            f"data.label_list: {config.data.label_list} names {len(names)} classes, but the shards hold label "
            f"{int(dataset.labels.max())}; give the list that the shards were built with"
        )
    return names
