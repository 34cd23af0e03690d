"""Class embeddings from a sentence encoder: any text model in a local folder of Hugging Face's layout.

The folder holds what `save_pretrained` writes (config.json, tokenizer, weights). A sentence-transformers folder also
says how tokens are pooled to a sentence (their mean, or the first one); for other models it is the mean. Nothing is
downloaded and no code of the folder is run.

C classes, P prompts, L tokens, S width of the encoder, D of CLIP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from text4vis.classifier.embeddings import cache_folder, cached, orthogonal_projection
from text4vis.cluster import distributed
from text4vis.config.schema import Config, ConfigError
from text4vis.config.templates import prompts
from text4vis.model.tensors import fingerprint

KEY = "network.sentence_model"
BATCH_SIZE = 64
# Modules of a sentence-transformers folder that change nothing but what is done here anyway.
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


def sentence_classifier(config: Config, class_names: Sequence[str], width: int) -> Tensor:
    """Class embeddings (C, D), unit length, of the names in `network.template`; the mean of several prompts.

    An encoder of another width needs `network.sentence_projection`. Raises ConfigError.
    """
    network = config.network
    assert network.sentence_model, "checked with the configuration"
    encoder = SentenceEncoder(Path(network.sentence_model))
    if encoder.width != width and not network.sentence_projection:
        raise ConfigError(
            f"{KEY}: {network.sentence_model} is {encoder.width} wide, CLIP {width}; choose an encoder of that width, "
            "or set network.sentence_projection: true"
        )
    texts = prompts(network.template)
    filled = [text.replace("{}", name) for text in texts for name in class_names]
    tokens = encoder.tokenize(filled)

    def embed() -> Tensor:
        embeddings_PCS = encoder.encode(tokens).unflatten(0, (len(texts), len(class_names)))
        return normalize(normalize(embeddings_PCS, dim=-1).mean(dim=0), dim=-1)

    recipe = {
        "kind": "sentence",
        "prompts": texts,
        "tokens": fingerprint(tokens),
        "pooling": encoder.pooling,
        "weights": fingerprint(encoder.model.state_dict()),
    }
    classes_CS = cached(cache_folder(config), class_names, recipe, lambda: distributed.from_main(embed))
    return classes_CS if encoder.width == width else orthogonal_projection(classes_CS, width, config.seed)


class SentenceEncoder:
    """A frozen text model on the CPU in fp32. pooling: "mean" over a text's tokens, or "cls", its first one.

    Raises ConfigError if the folder is none, or asks for more than a model and its pooling.
    """

    def __init__(self, folder: Path) -> None:
        AutoModel, AutoTokenizer = _transformers()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{KEY}: {folder} is no folder of a text model: it has no config.json")
        self.pooling = _pooling(folder)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self.model = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise ConfigError(f"{KEY}: {folder}: not a usable text model ({' '.join(str(error).split())})") from None
        if self._tokenizer.pad_token is None:  # decoders have none; what pads is masked, so any token will do
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token
        if self._tokenizer.pad_token is None:
            raise ConfigError(
                f"{KEY}: {folder}: its tokenizer has none to pad with; give it a `pad_token` in tokenizer_config.json"
            )
        self.model = self.model.float().eval().requires_grad_(False)
        self.width = int(self.model.config.hidden_size)

    def tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """input_ids and attention_mask (P, L) int64. Raises ConfigError naming a text that is too long."""
        tokens = self._tokenizer(list(texts), padding=True, return_tensors="pt")
        limit = getattr(self.model.config, "max_position_embeddings", None)
        lengths_P = tokens["attention_mask"].sum(dim=1)
        if limit is not None and int(lengths_P.max()) > limit:
            text = texts[int(lengths_P.argmax())]
            raise ConfigError(f"class names: {text!r} is longer than the {limit} tokens of {KEY}; shorten it")
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    @torch.no_grad()
    def encode(self, tokens: dict[str, Tensor]) -> Tensor:
        """Sentences (P, S) float32, not normalised, without gradient."""
        parts = []
        for start in range(0, len(tokens["input_ids"]), BATCH_SIZE):
            batch = {name: value[start : start + BATCH_SIZE] for name, value in tokens.items()}
            hidden_PLS = self.model(**batch).last_hidden_state
            if self.pooling == "cls":
                parts.append(hidden_PLS[:, 0])
            else:
                mask_PL1 = batch["attention_mask"].unsqueeze(-1).float()
                parts.append((hidden_PLS * mask_PL1).sum(dim=1) / mask_PL1.sum(dim=1))
        return torch.cat(parts)


def _pooling(folder: Path) -> str:
    """How tokens are pooled to a sentence, as sentence-transformers records it. Raises ConfigError."""
    modules = _read_json(folder / "modules.json", [])
    kinds = [str(module.get("type", "")).rsplit(".", 1)[-1] for module in modules]
    others = [kind for kind in kinds if kind not in _KNOWN_MODULES]
    if others:
        raise ConfigError(f"{KEY}: {folder}: its module {others[0]} is not supported; use a model without it")
    path = next((module.get("path", "") for module in modules if module.get("type", "").endswith("Pooling")), None)
    if path is None:
        return "mean"
    settings = _read_json(folder / path / "config.json", {})
    # Releases before 6 write one key for each kind of pooling, later ones a single key.
    modes = [name for name in settings if name.startswith("pooling_mode_") and settings[name] is True]
    mode = settings.get("pooling_mode", modes[0] if len(modes) == 1 else modes)
    known = {"mean": "mean", "cls": "cls", "pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if not isinstance(mode, str) or mode not in known:
        raise ConfigError(f"{KEY}: {folder}: its pooling, {mode}, is not supported; mean and cls are")
    return known[mode]


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return default
    except (OSError, ValueError) as error:
        raise ConfigError(f"{KEY}: {path}: not readable ({error})") from None


def _transformers() -> tuple[Any, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise ConfigError(
            "network.classifier: sentence needs the package transformers: pip install transformers"
        ) from None
    logging.disable_progress_bar()
    return AutoModel, AutoTokenizer
