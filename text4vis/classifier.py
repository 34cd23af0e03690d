"""The classifier: frozen, L2-normalised text embeddings of the class names in their prompt. Imports config and model.

C classes, D embedding width, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.functional import normalize

from text4vis.config import Config, ConfigError
from text4vis.model import VideoClip


def build_classifier(config: Config, model: VideoClip, class_names: Sequence[str]) -> Tensor:
    """The classifier that the configuration asks for: `text_classifier` with `network.template`."""
    return text_classifier(model, class_names, config.network.template)


def text_classifier(model: VideoClip, class_names: Sequence[str], template: str) -> Tensor:
    """Class embeddings (C, D) float32 on the CPU, unit length, without gradient.

    Each name takes the place of the `{}` in the template. Raises ConfigError naming the class where a name is empty,
    reads the same as another to the text tower, or with its prompt is longer than the tower's context.
    """
    if not class_names:
        raise ConfigError("class names: the list is empty")
    for index, name in enumerate(class_names):
        if not name.strip():
            raise ConfigError(f"class names: class {index} has an empty name")
    prompts = [template.format(name) for name in class_names]
    try:
        tokens_CL = model.text.tokenize(prompts)
    except ValueError as error:
        raise ConfigError(f"class names: {error}") from None
    first: dict[tuple[int, ...], int] = {}
    for index, tokens in enumerate(tokens_CL.tolist()):
        other = first.setdefault(tuple(tokens), index)
        if other != index:
            same = f"{other} ({class_names[other]!r}) and {index} ({class_names[index]!r})"
            raise ConfigError(f"class names: classes {same} read the same to the text tower; name them apart")
    return normalize(model.encode_text(prompts), dim=-1)
