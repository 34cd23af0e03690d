"""The line between the weights that a training began with and those that it ended with (WiSE-FT).

    weights(alpha) = (1 - alpha) * pre-trained + alpha * trained          Wortsman et al., CVPR 2022

The trained end knows the classes of its training, the pre-trained one keeps what CLIP knows of others; between them
both accuracies are often near their best. C classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, ConfigError
from text4vis.model.video_clip import VideoClip, build_model
from text4vis.saved.inputs import digests
from text4vis.saved.opening import SavedModel, SavedRun, TrainedModel, open_saved
from text4vis.saved.weights import start_from

MARK = "interpolation"  # in the card of an export: its alpha
_TEXT = "text."
_DRAWN = "visual.time_embedding"  # of network.joint_st: the only part of the tower that starts from random numbers


class Interpolation:
    """A trained model whose weights can be moved along the line. Raises ConfigError where they began is not to be had.

    The visual tower and the logit scale move; the text tower, or the class embeddings, where they trained; and the
    temporal head where `pretrain` gave it. A head that began with random numbers stays as it was trained.
    """

    def __init__(self, saved: SavedModel, trained: TrainedModel) -> None:
        if MARK in trained.card:
            raise ConfigError(f"{saved.path}: is a mixture already ({trained.card[MARK]}); give the run it is made of")
        self.trained, self.model = trained, trained.model
        first, has_head = _first_model(saved, trained.config)
        network = trained.config.network
        names = [name for name in self.model.state_dict() if name.startswith("visual.") or name == "logit_scale"]
        if has_head:
            names += [name for name in self.model.state_dict() if name.startswith("fusion_model.")]
        elif _DRAWN in names:
            names.remove(_DRAWN)
        if not network.fix_text:
            names += [f"{_TEXT}{name}" for name in self.model.text.state_dict()]
        own, others = _tensors(self.model), _tensors(first)
        # Where each tensor that moves began, and where it ended.
        self._ends = {
            name: (others[name].clone(), own[name].clone()) for name in names if own[name].is_floating_point()
        }
        self._classes_CD = trained.class_embeddings_CD
        self._first_CD = self._classes_CD
        if network.classifier_trainable:
            self._first_CD = build_classifier(trained.config, first, trained.class_names)

    @torch.no_grad()
    def move(self, alpha: float) -> None:
        """Gives the model the weights at `alpha`: 0 for the first ones, 1 for the trained."""
        own = _tensors(self.model)
        for name, (first, last) in self._ends.items():
            own[name].copy_(first.lerp(last, alpha))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Moves the model to a device, in a precision; the ends of the line stay in fp32."""
        self.model.to(device, dtype)
        self._ends = {
            name: ends if name.startswith(_TEXT) else (ends[0].to(device), ends[1].to(device))
            for name, ends in self._ends.items()
        }

    def at(self, alpha: float) -> TrainedModel:
        """The model with the weights at `alpha`. Its card tells it, and no figures, which were of other weights."""
        self.move(alpha)
        trained = self.trained
        classes_CD = self._first_CD.lerp(self._classes_CD, alpha)
        if self.model.classifier is not None:
            self.model.set_classifier(classes_CD, trained.class_names)
        if not trained.config.network.fix_text:
            classes_CD = build_classifier(trained.config, self.model, trained.class_names)
        card = trained.card if alpha == 1 else {**trained.card, "figures": {}, "evaluation": None, MARK: alpha}
        return replace(trained, class_embeddings_CD=classes_CD, card=card)


def _tensors(model: VideoClip) -> dict[str, Tensor]:
    """The model's tensors by name, and those of its text tower, which it holds apart."""
    return model.state_dict() | {f"{_TEXT}{name}": value for name, value in model.text.state_dict().items()}


def _first_model(saved: SavedModel, config: Config) -> tuple[VideoClip, bool]:
    """The model as the training began with it, and whether its temporal head was trained before, too."""
    network, data = config.network, config.data
    if not network.init and not config.pretrain:
        raise ConfigError(f"network.init: {saved.path} began with random weights; there is nothing to interpolate with")
    _check_unchanged(saved, config)
    network = replace(network, fix_text=True, freeze_blocks=0)  # type: ignore[type-var]
    model = build_model(network, data.num_segments, image_size=data.input_size)
    if not config.pretrain:
        return model, False
    parts = open_saved(config.pretrain).parts("pretrain")
    start_from(model, parts, f"pretrain: {config.pretrain}")
    if parts.text and not config.network.fix_text:
        model.text.load_strictly(parts.text, f"pretrain: {config.pretrain}: text tower")
    head = {f"fusion_model.{name}": value.shape for name, value in model.fusion_model.state_dict().items()}
    return model, head.items() <= {name: value.shape for name, value in parts.video.items()}.items()


def _check_unchanged(saved: SavedModel, config: Config) -> None:
    """The files that a run began with hold what they held then. Raises ConfigError."""
    known: Mapping[str, str] = saved.state.inputs if isinstance(saved, SavedRun) else {}
    found = digests(config)
    for key in ("network.arch", "network.pretrained", "pretrain"):
        if key in known and key in found and known[key] != found[key]:
            raise ConfigError(f"{key}: holds other weights than {saved.path} began with; give the first ones again")
