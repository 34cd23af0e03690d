"""Evaluation in one pass: embeds every video once and computes all figures from the embeddings.

Each rank embeds its share of the videos and sends the embeddings to rank 0, which computes the figures. No video is
padded, repeated or averaged over ranks, so the figures do not depend on the number of ranks.

B videos of a batch, N of the data set, V views, T frames, C classes, D embedding width.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from shards.annotations import parse_labels
from shards.files import replacing_path, require_file
from text4vis.cluster import distributed
from text4vis.common.progress import track
from text4vis.config.retired import EARLIER
from text4vis.config.schema import Config, ConfigError
from text4vis.data.bad_videos import BadVideos
from text4vis.data.datasets import multi_hot
from text4vis.data.loader import Loader
from text4vis.evaluation.multi_label import multi_label_figures
from text4vis.evaluation.protocols import FUSION, Views, figures
from text4vis.model.tensors import fingerprint, write_tensors
from text4vis.model.video_clip import VideoClip

logger = logging.getLogger("text4vis")

PACKAGES = ("text4vis", "torch", "open_clip_torch", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "deepspeed", "numpy")
FEATURES = "text4vis-features"
# Keys of the protocol card on which a features file depends, beside the architecture.
FEATURES_ORIGIN = ("weights", "data_fingerprint", "views", "precision", "device", "decode")


@dataclass(frozen=True)
class Embeddings:
    """embeddings_NVD float32 unnormalised, labels_N and ids_N int64, in the order of the data set.

    labels_N: (N, C) bool, as in a batch, where videos may have several labels. N videos: all but those that
    `data.on_error: skip` left out.
    """

    embeddings_NVD: np.ndarray
    labels_N: np.ndarray
    ids_N: np.ndarray

    def check(self) -> None:
        """Raises ValueError for a wrong dtype, wrong axes or unequal lengths."""
        several = self.labels_N.dtype == bool
        of_labels = (self.labels_N, bool, 2) if several else (self.labels_N, np.int64, 1)
        tables = {"embeddings_NVD": (self.embeddings_NVD, np.float32, 3), "labels_N": of_labels}
        for name, (table, dtype, axes) in {**tables, "ids_N": (self.ids_N, np.int64, 1)}.items():
            if table.dtype != dtype or table.ndim != axes or len(table) != len(self.ids_N):
                raise ValueError(f"{name} is {table.dtype} {table.shape}")


@torch.no_grad()
def embed_videos(
    model: VideoClip, loader: Loader, *, before_batch: Callable[[], None] = lambda: None
) -> Embeddings | None:
    """Embeds the loader's share on every rank and joins the shares on rank 0; None on the others.

    All ranks run the same number of forward passes, since parameters may be sharded over ranks (ZeRO-3): a rank that
    has run out of videos embeds a blank one and throws the result away. Videos skipped by
    `data.on_error: skip` are in rank 0's `loader.bad` afterwards; too many raise ShardError on all ranks. Raises
    RuntimeError if any other video is missing or a video is counted twice. before_batch: called before each forward
    pass on all ranks; an exception of its own ends the evaluation.
    """
    loader.bad.clear()  # try again what an earlier pass could not read
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    share = -(-len(loader.dataset) // loader.world_size)
    num_batches = -(-share // loader.batch_size)
    size = loader.config.data.input_size
    blank_BTCHW = torch.zeros(1, loader.config.data.num_segments, 3, size, size, dtype=torch.uint8, device=device)
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    batches = iter(loader)
    quiet = not distributed.ranks().is_main
    for _ in track(range(num_batches), "evaluating", unit="batch", quiet=quiet, keep=False):
        before_batch()
        batch = next(batches, None)
        if batch is None:
            model.encode_video(blank_BTCHW)
            continue
        frames_BVTCHW = batch.frames.to(device, non_blocking=True)
        views_BVD = model.encode_video(frames_BVTCHW.flatten(0, 1)).unflatten(0, frames_BVTCHW.shape[:2])
        parts.append((views_BVD.float().cpu(), batch.labels, batch.ids))
    batches.close()
    model.train(was_training)
    join_bad_videos(loader.bad)
    embeddings_nVD, labels_n, ids_n = (
        (torch.cat(column) for column in zip(*parts, strict=True)) if parts else [_NONE] * 3
    )
    seen_N = np.concatenate([np.empty(0, np.int64), *(piece.numpy() for piece in distributed.gather_rows(ids_n))])
    order_N = np.argsort(seen_N, kind="stable")
    if distributed.ranks().is_main:
        expected = np.setdiff1d(np.arange(len(loader.dataset)), [entry["id"] for entry in loader.bad.entries()])
        if not np.array_equal(seen_N[order_N], expected):
            raise RuntimeError(f"evaluation saw {len(seen_N)} videos, {len(expected)} of the data set can be used")
    embeddings_NVD, labels_N = _in_order(embeddings_nVD, order_N), _in_order(labels_n, order_N)
    return Embeddings(embeddings_NVD, labels_N, seen_N[order_N]) if distributed.ranks().is_main else None


_NONE = torch.empty(0)  # of a rank that has embedded nothing


def _in_order(rows: torch.Tensor, order_N: np.ndarray) -> np.ndarray:
    """The rows of all ranks on rank 0, of which number order_N[i] comes i-th; nothing elsewhere. Collective."""
    places_N, table, at = np.argsort(order_N), np.empty(0), 0
    for piece in distributed.gather_rows(rows):
        if not at:
            table = np.empty((len(order_N), *piece.shape[1:]), piece.numpy().dtype)
        table[places_N[at : at + len(piece)]] = piece.numpy()
        at += len(piece)
    return table


def join_bad_videos(bad: BadVideos) -> None:
    """Collects all ranks' bad videos on rank 0. Raises ShardError on all ranks if there are too many. Collective."""
    gathered = distributed.gather_to_main(bad.news())
    distributed.from_main(lambda: bad.join(entry for entries in gathered or () for entry in entries))


def embed_or_read(model: VideoClip, loader: Loader, path: Path, origin: Mapping[str, Any]) -> Embeddings | None:
    """Reads the embeddings from the file if its origin is `origin`; otherwise embeds the videos and writes the file.

    Replaces a file of another origin after a warning that names the differences. Writes no file if videos were left
    out. Only rank 0 touches the file. Raises ConfigError for a file that holds something else and OSError for one that
    cannot be written, both before any video is embedded. Collective.
    """
    kept: list[Embeddings] = []

    def look() -> bool:
        kept.extend(_read_features(path, origin))
        if not kept:
            require_file(path, "--features")
        return bool(kept)

    if distributed.from_main(look):
        return kept[0] if kept else None
    embedded = embed_videos(model, loader)
    if len(loader.bad):
        logger.warning("%s: not written because %d videos were left out", path, len(loader.bad))
    elif embedded is not None:
        columns = {name: torch.from_numpy(column) for name, column in vars(embedded).items()}
        with replacing_path(path) as partial:
            write_tensors(partial, columns, {FEATURES: json.dumps(origin)})
    return embedded


def _read_features(path: Path, origin: Mapping[str, Any]) -> list[Embeddings]:
    """[the file's embeddings], or [] if there is no file or one of another origin."""
    if not path.exists():
        return []
    try:
        with safe_open(path, framework="np") as file:
            found = json.loads((file.metadata() or {}).get(FEATURES, "null"))
            if not isinstance(found, dict):
                raise ConfigError(f"--features: {path} holds something else; name another file")
            changed = [key for key in {**origin, **found} if found.get(key) != origin.get(key)]
            if not changed:
                read = Embeddings(**{name: file.get_tensor(name) for name in Embeddings.__dataclass_fields__})
                read.check()
                return [read]
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"--features: {path} is not readable as features ({error}); name another file") from None
    logger.warning("%s: made with other %s; embedding the videos again", path, ", ".join(changed))
    return []


def class_splits(config: Config, class_names: Sequence[str], labels: np.ndarray) -> dict[str, np.ndarray]:
    """{name: ascending class ids} for the lists in `data.class_splits`: their file names, or else their paths.

    labels: those that videos have, in any order.

    Raises ConfigError for a name that is no class, and for a list whose classes have no videos.
    """
    ids = {name: number for number, name in enumerate(class_names)}
    splits = {}
    files = [Path(path).name for path in config.data.class_splits]
    split_names = files if len(set(files)) == len(files) else config.data.class_splits
    for split_name, path in zip(split_names, config.data.class_splits, strict=True):
        names = parse_labels(path)
        for name in names:
            if name not in ids:
                near = difflib.get_close_matches(name, class_names, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ConfigError(f"data.class_splits: {path}: {name!r} is no class of data.val{hint}")
        splits[split_name] = np.unique([ids[name] for name in names])
        if not np.isin(labels, splits[split_name]).any():
            raise ConfigError(f"data.class_splits: {path}: data.val holds no video of these {len(names)} classes")
    return splits


def evaluate(
    model: VideoClip,
    class_embeddings_CD: torch.Tensor,
    class_names: Sequence[str],
    loader: Loader,
    *,
    weights: str,
    splits: Mapping[str, np.ndarray] | None = None,
    features: Path | None = None,
    before_batch: Callable[[], None] = lambda: None,
) -> dict[str, Any] | None:
    """Evaluates on the loader's data set. Returns the report on rank 0, None on the other ranks. Collective.

    weights: `weights_fingerprint` of the model, needed on rank 0. splits: from `class_splits`. features: file that
    keeps the embeddings, see `embed_or_read`. Raises ConfigError for splits where videos have several labels.
    """
    data = loader.config.data
    multi_label = loader.dataset.multi_label or loader.config.solver.multi_label
    if splits and multi_label:
        raise ConfigError(
            "data.class_splits: is measured by the accuracy of one label a video, but videos have several; leave it out"
        )
    card = protocol_card(model, class_embeddings_CD, class_names, loader, weights)
    if features is None:
        embedded = embed_videos(model, loader, before_batch=before_batch)
    else:
        origin = {key: card[key] for key in FEATURES_ORIGIN} | {"architecture": _architecture(model)}
        if (how := (data.resize, data.interpolation)) != tuple(EARLIER["data"].values()):  # which files don't name
            origin["frames"] = list(how)
        if data.synthetic:
            origin["synthetic"] = True
        embedded = embed_or_read(model, loader, features, origin)
    if embedded is None:
        return None
    skipped = loader.bad.entries()
    card |= {"missing": card["missing"] + len(skipped), "skipped": skipped}
    return card | measured(embedded, class_embeddings_CD, class_names, loader, splits)


def measured(
    embedded: Embeddings,
    class_embeddings_CD: torch.Tensor,
    class_names: Sequence[str],
    loader: Loader,
    splits: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Any]:
    """The figures of a data set's embeddings: see `protocols.figures` and `multi_label.multi_label_figures`."""
    data = loader.config.data
    views, classes_CD = Views(data.test_clips, data.test_crops, data.dense), class_embeddings_CD.float().cpu().numpy()
    if loader.dataset.multi_label or loader.config.solver.multi_label:
        targets_NC = multi_hot(torch.from_numpy(embedded.labels_N), len(class_names)).numpy()
        return multi_label_figures(embedded.embeddings_NVD, targets_NC, classes_CD, class_names, views=views)
    return figures(
        embedded.embeddings_NVD, embedded.labels_N, classes_CD, class_names, views=views, class_splits=splits
    )


def protocol_card(
    model: VideoClip, class_embeddings_CD: torch.Tensor, class_names: Sequence[str], loader: Loader, weights: str
) -> dict[str, Any]:
    """The protocol card: data, views, classifier, weights, versions; JSON values only."""
    config, data = loader.config, loader.config.data
    parameter = next(model.parameters())
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "data": data.dataset,
        "data_fingerprint": loader.dataset.fingerprint,
        "missing": len(loader.dataset.skipped),
        "skipped": [],
        "classes_fingerprint": hashlib.sha256(json.dumps(list(class_names)).encode()).hexdigest(),
        **measured_with(model, config),
        "class_embeddings": classes_fingerprint(class_embeddings_CD),
        "weights": weights,
        "precision": "amp" if model.autocast else str(parameter.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else "cpu",
        "decode": loader.device.type,
        "versions": versions(),
    }


def measured_with(model: VideoClip, config: Config) -> dict[str, Any]:
    """The part of the protocol card that tells which frames and which classes a model is measured with."""
    data = config.data
    return {
        "views": {
            "clips": data.test_clips,
            "crops": data.test_crops,
            "frames": data.num_segments,
            "sampling": "dense" if data.dense else "uniform",
            "scale_size": config.scale_size,
            "input_size": data.input_size,
            "fusion": FUSION,
        },
        "pixels": {
            "resize": data.resize,
            "interpolation": data.interpolation,
            "mean": list(model.mean),
            "std": list(model.std),
        },
        "activation": "quick_gelu" if model.clip_config.get("quick_gelu") else "gelu",
        "tokenizer": model.text.tokenizer.facts(),
        "classifier": config.network.classifier if model.classifier is None else "trained",
        "template": config.network.template,
    }


def classes_fingerprint(class_embeddings_CD: torch.Tensor) -> str:
    """SHA-256 in hex of class embeddings (C, D), as the protocol card has it."""
    return fingerprint({"class_embeddings": class_embeddings_CD.float()})


def _architecture(model: VideoClip) -> str:
    """SHA-256 of the modules, CLIP's configuration and the pixel normalisation, which weights alone do not show."""
    parts = (str(model), json.dumps(model.clip_config, sort_keys=True), model.mean, model.std)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of the packages that the figures depend on."""
    installed = {}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed
