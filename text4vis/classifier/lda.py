"""Class embeddings from videos: linear discriminants of CLIP's embeddings of a few training videos a class.

Wu et al. (AAAI 2023) compare text with such a classifier and publish neither its file nor its code; this is theirs as
far as the paper describes it: frozen CLIP, mean over frames, about 60 videos a class (a tenth of Kinetics-400).

N videos, T frames, C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from sklearn.covariance import ledoit_wolf
from torch import Tensor
from torch.nn.functional import normalize

from shards.plan import few_shot_subset
from text4vis.classifier.embeddings import cache_folder, cached, rows_of
from text4vis.cluster import distributed
from text4vis.common.progress import track
from text4vis.config.schema import Config, ConfigError
from text4vis.data.loader import Loader, build_loader
from text4vis.model.tensors import fingerprint
from text4vis.model.video_clip import VideoClip, build_model


def lda_classifier(config: Config, class_names: Sequence[str]) -> Tensor:
    """Discriminants (C, D), unit length, of at most `network.lda_videos` videos of each class of `data.train`.

    Which videos follows from the seed; with `data.shot` they are among the chosen ones. The tower is always
    `network.arch` with its own weights, whatever is being trained or evaluated. Collective: the ranks share the videos.
    Raises ConfigError where the training shards hold no videos of a class: such a classifier knows no unseen classes.
    """
    with build_loader(config, "train") as training:
        dataset = training.dataset
        where = f"network.classifier: lda: {', '.join(dataset.places)}"
        if dataset.multi_label:
            raise ConfigError(f"{where}: needs one label a video, but videos have several; use another classifier")
        labels = rows_of(class_names, dataset.classes, where)
        ids_N = training.planner.videos
        ids_N = ids_N[few_shot_subset(dataset.labels[ids_N], config.network.lda_videos, config.seed, at_most=True)]
        present, rows_N = np.unique(dataset.labels[ids_N], return_inverse=True)
        absent = [name for name, label in zip(class_names, labels, strict=True) if label not in present]
        if absent:
            raise ConfigError(
                f"{where}: holds no video of class {absent[0]!r} ({len(absent)} of {len(class_names)} have none); add "
                "some, take the class off data.label_list, or use another classifier"
            )
        # The result is kept: it must not depend on which of the videos could be used today.
        data = replace(config.data, test_clips=1, test_crops=1, on_error="fail")  # type: ignore[type-var]
        single = replace(config, data=data)  # type: ignore[type-var]
        model = _frozen_clip(config)
        recipe = {
            "kind": "lda",
            "data": dataset.fingerprint,
            "videos": fingerprint({"ids": torch.from_numpy(ids_N)}),
            "frames": [single.data.num_segments, single.data.dense, single.data.input_size, single.scale_size],
            "pixels": [model.mean, model.std, single.data.resize, single.data.interpolation],
            "weights": fingerprint(model.visual.state_dict()),
            "tower": {key: model.clip_config.get(key) for key in ("vision_cfg", "quick_gelu")},
        }

        def make() -> Tensor:
            ranks = distributed.ranks()
            with training.subset(ids_N, config=single, rank=ranks.rank, world_size=ranks.world_size) as loader:
                own_ND = torch.from_numpy(_embed(model, loader))
                shares = [piece.numpy() for piece in distributed.gather_rows(own_ND)]
            return distributed.from_main(lambda: discriminants(np.concatenate(shares), rows_N))

        names = [dataset.classes[label] for label in present]
        return cached(cache_folder(config), names, recipe, make)[np.searchsorted(present, labels)]


def discriminants(embeddings_ND: np.ndarray, labels_N: np.ndarray) -> Tensor:
    """Linear discriminants (C, D) float32, unit length, of embeddings of which each class 0 ... C-1 has some.

    Row c is the weight of class c in the discriminant functions of Gaussian classes with one covariance, S^-1 (m_c - m)
    (Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, 2nd ed., eq. 4.10), with the class's mean m_c,
    the mean m of all and the within-class covariance S, shrunk towards a multiple of the identity as Ledoit and Wolf
    (2004) derive. Subtracting m changes all classes' scores alike; without it unit-length rows would nearly coincide.
    The functions' constants and the rows' lengths are dropped, for a cosine has neither. Raises ConfigError if no class
    has two different videos.
    """
    embeddings_ND = embeddings_ND.astype(np.float64)
    counts_C = np.bincount(labels_N)
    means_CD = np.zeros((len(counts_C), embeddings_ND.shape[1]))
    np.add.at(means_CD, labels_N, embeddings_ND)
    means_CD /= counts_C[:, None]
    within_ND = embeddings_ND - means_CD[labels_N]
    if not within_ND.any():
        raise ConfigError("network.classifier: lda needs at least two different videos of some class in data.train")
    covariance_DD, _ = ledoit_wolf(within_ND, assume_centered=True)
    rows_DC = np.linalg.solve(covariance_DD, (means_CD - embeddings_ND.mean(axis=0)).T)
    return normalize(torch.from_numpy(rows_DC.T.copy()), dim=-1).float()


def _frozen_clip(config: Config) -> VideoClip:
    """CLIP with the mean over frames, without what a recipe adds to its tower, on the rank's device."""
    network = replace(  # type: ignore[type-var]
        config.network, sim_header="None", tm=None, joint_st=False, drop_out=0.0, emb_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):  # towers are built with random weights before theirs are loaded
        model = build_model(network, config.data.num_segments, image_size=config.data.input_size)
    return model.to(distributed.device()).eval()


@torch.no_grad()
def _embed(model: VideoClip, loader: Loader) -> np.ndarray:
    """This rank's videos (N, D) float32, unit length, in the loader's order."""
    device = distributed.device()
    quiet = not distributed.ranks().is_main
    parts = [np.empty((0, model.embed_dim), np.float32)]
    for batch in track(loader, "embedding videos for the classifier", unit="batch", quiet=quiet, keep=False):
        videos_ND = model.encode_video(batch.frames[:, 0].to(device, non_blocking=True))
        parts.append(normalize(videos_ND.float(), dim=-1).cpu().numpy())
    return np.concatenate(parts)
