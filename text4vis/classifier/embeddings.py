"""The classifier: frozen class embeddings of unit length, from text, random numbers, videos, sentences or a file.

What takes long (`text`, `lda`, `sentence`) is kept in `data.cache_dir` under the hash of all that went in. A kept file
and one of tools/build_classifier.py are the same format: safetensors with `class_embeddings` (C, D) float32 and the
class names and the recipe as JSON in its metadata.

C classes, D embedding width, L tokens, P prompts.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import normalize

from shards.files import write_atomically
from text4vis.cluster import distributed
from text4vis.common.cache import cache_dir
from text4vis.config.schema import Config, ConfigError
from text4vis.config.templates import prompts
from text4vis.model.tensors import fingerprint, is_plain, read_torch_file
from text4vis.model.video_clip import Classes, ClassRows, ClassTokens, VideoClip

logger = logging.getLogger("text4vis")

PROMPTS_A_BATCH = 256
TENSOR = "class_embeddings"
FORMAT = "text4vis-classifier-1"  # change it when the same recipe comes to mean other embeddings


def build_classifier(config: Config, model: VideoClip, class_names: Sequence[str]) -> Tensor:
    """Class embeddings (C, D) float32 on the CPU, unit length, without gradient, as `network.classifier` says.

    A model with a trained classifier of its own gives its rows, for the names that it was trained on. Row c belongs to
    `class_names[c]`. Equal on all ranks, whatever their number. Collective: every rank calls it. Raises ConfigError,
    and ShardError where it reads videos.
    """
    from text4vis.classifier.lda import lda_classifier  # both build upon this module
    from text4vis.classifier.sentence import sentence_classifier

    network, names, width = config.network, list(class_names), model.embed_dim
    _check_names(names)
    if model.classifier is not None:
        trained_CD = normalize(model.classifier.detach().float().cpu(), dim=-1)
        return trained_CD[rows_of(names, model.class_names, "network.classifier_trainable: the trained classifier")]
    builders: dict[str, Callable[[], Tensor]] = {
        # Not cached while the text tower trains: its weights change, so a kept file would not be read again.
        "text": lambda: text_classifier(
            model, names, network.template, cache=cache_folder(config) if network.fix_text else None
        ),
        "random": lambda: random_classifier(names, width, config.seed),
        "orthogonal": lambda: orthogonal_classifier(names, width, config.seed),
        "lda": lambda: lda_classifier(config, names),
        "sentence": lambda: sentence_classifier(config, names, width),
        "file": lambda: file_classifier(Path(network.classifier_file or ""), names, width),
    }
    return builders[network.classifier]()


def text_classifier(
    model: VideoClip, class_names: Sequence[str], template: str | Sequence[str], *, cache: Path | None = None
) -> Tensor:
    """Class embeddings (C, D) from the text tower, as `build_classifier` gives them.

    Each name takes the place of the `{}` in the template's prompts (`config.templates`). With several, a class is the
    mean of its prompts' unit-length embeddings, as CLIP does it. In a job the call is collective: the ranks share the
    prompts and compute on their devices, in fp32; a text tower that trains stays where it is. Raises ConfigError naming
    the class where a name is empty, reads the same as another to the text tower, or with its prompt is longer than the
    tower's context.
    """
    _check_names(class_names)
    texts = prompts(template)
    filled = [text.replace("{}", name) for text in texts for name in class_names]
    try:
        tokens_PL = model.text.tokenize(filled)
    except ValueError as error:
        raise ConfigError(f"class names: {error}") from None
    _refuse_twins(class_names, [*map(tuple, tokens_PL[: len(class_names)].tolist())], " to the text tower")

    def encode(tokens: Tensor) -> Tensor:
        is_frozen = model.text_tower is None
        return model.text.encode_tokens(tokens, device=distributed.job_device() if is_frozen else None)

    def embed() -> Tensor:
        embeddings_PD = distributed.compute_together(encode, tokens_PL, PROMPTS_A_BATCH)
        embeddings_PCD = embeddings_PD.unflatten(0, (len(texts), len(class_names)))
        return normalize(normalize(embeddings_PCD, dim=-1).mean(dim=0), dim=-1)

    if cache is None:
        return embed()
    recipe = {
        "kind": "text",
        "prompts": texts,
        "tokens": fingerprint({"tokens": tokens_PL}),
        "weights": fingerprint(model.text.state_dict()),
        "tower": {key: model.clip_config.get(key) for key in ("text_cfg", "quick_gelu")},
    }
    return cached(cache, class_names, recipe, embed)


def training_classes(config: Config, model: VideoClip, class_names: Sequence[str]) -> Classes:
    """The classes as VideoClip's forward takes them in training. Collective.

    Frozen: class embeddings (C, D) float32 on the CPU. `network.classifier_trainable`: ClassRows of the model's own
    classifier, which starts from the embeddings unless the model has one. `network.fix_text` false: ClassTokens for the
    text tower. Raises ConfigError, and ShardError where it reads videos.
    """
    if model.classifier is None:
        embeddings_CD = build_classifier(config, model, class_names)
        if model.text_tower is not None:
            return ClassTokens(class_tokens(model, class_names, config.network.template))
        if not config.network.classifier_trainable:
            return embeddings_CD
        model.set_classifier(embeddings_CD, class_names)
    return ClassRows(torch.arange(len(class_names)))


def class_tokens(model: VideoClip, class_names: Sequence[str], template: str | Sequence[str]) -> Tensor:
    """Tokens (C, P, L) int64 of the prompts of classes that `text_classifier` accepts."""
    texts = prompts(template)
    return torch.stack([model.text.tokenize([text.replace("{}", name) for text in texts]) for name in class_names])


def random_classifier(class_names: Sequence[str], width: int, seed: int) -> Tensor:
    """Gaussian directions (C, D). A class's row depends on its name, the width and the seed alone."""
    _check_names(class_names)
    rows_CD = np.stack([gaussians(width, "class", seed, name) for name in class_names])
    return normalize(torch.from_numpy(rows_CD), dim=-1).float()


def orthogonal_classifier(class_names: Sequence[str], width: int, seed: int) -> Tensor:
    """Orthonormal rows (C, D): those of `random_classifier`, orthogonalised in their order (Gram-Schmidt, by QR).

    Raises ConfigError with more classes than dimensions, where no such rows exist.
    """
    if len(class_names) > width:
        raise ConfigError(
            f"network.classifier: orthogonal: {len(class_names)} classes cannot be orthogonal in {width} dimensions; "
            "use random"
        )
    return torch.from_numpy(_orthonormal(random_classifier(class_names, width, seed).double().numpy())).float()


def file_classifier(path: Path, class_names: Sequence[str], width: int) -> Tensor:
    """Rows (C, D) of a .safetensors, .npy or .pt file, made unit length. A file that carries names is read by name.

    Raises ConfigError: unreadable, of another shape, values that are not finite, zero rows, names that it lacks.
    """
    key = "network.classifier_file"
    rows, names = _read_matrix(path, key)
    if rows.ndim != 2 or rows.shape[1] != width:
        raise ConfigError(f"{key}: {path} holds {tuple(rows.shape)}; expected (classes, {width}) for this network")
    if names is None and len(rows) != len(class_names):
        raise ConfigError(f"{key}: {path} holds {len(rows)} rows for {len(class_names)} classes; give one for each")
    if names is not None and len(names) != len(rows):
        raise ConfigError(f"{key}: {path} holds {len(rows)} rows but {len(names)} class names; write it again")
    if names is not None:
        rows = rows[rows_of(class_names, names, f"{key}: {path}")]
    rows = rows.float()
    bad = ~torch.isfinite(rows).all(dim=1) | (rows == 0).all(dim=1)
    if bad.any():
        index = int(bad.nonzero()[0])
        raise ConfigError(f"{key}: {path}: the row of class {index} ({class_names[index]!r}) is not finite or all zero")
    return normalize(rows.double(), dim=-1).float()


def rows_of(class_names: Sequence[str], known: Sequence[str], where: str) -> list[int]:
    """Positions of the names among the known ones. Raises ConfigError naming the first that is missing."""
    place = {name: row for row, name in enumerate(known)}
    missing = [name for name in class_names if name not in place]
    if missing:
        raise ConfigError(f"{where}: has no class {missing[0]!r} ({len(missing)} of {len(class_names)} are missing)")
    return [place[name] for name in class_names]


def gaussians(count: int, *key: object) -> np.ndarray:
    """Standard normal numbers (count,) float64 that depend on nothing but the key, on no library's generator.

    The inverse normal distribution of 52-bit uniform numbers, which are the SHAKE-256 hash of the key.
    """
    text = json.dumps(list(key), ensure_ascii=True)
    words = np.frombuffer(hashlib.shake_256(text.encode()).digest(8 * count), "<u8")
    return torch.special.ndtri(torch.from_numpy(((words >> np.uint64(12)) + 0.5) / 2.0**52)).numpy()


def orthogonal_projection(rows_CS: Tensor, width: int, seed: int) -> Tensor:
    """Rows (C, S) brought to the width D by a seeded projection with orthonormal rows, or columns where S > D.

    Raising the width keeps all cosines; lowering it keeps them about (Johnson and Lindenstrauss, 1984).
    """
    few, many = sorted((rows_CS.shape[1], width))
    basis = _orthonormal(gaussians(few * many, "projection", seed).reshape(few, many))
    projection_SD = torch.from_numpy(basis if rows_CS.shape[1] == few else basis.T)
    return normalize(rows_CS.double() @ projection_SD, dim=-1).float()


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Orthonormal rows that span the same flags; the signs that QR leaves open are fixed."""
    q, r = np.linalg.qr(rows.T)
    return (q * np.sign(np.diag(r))).T


def _check_names(class_names: Sequence[str]) -> None:
    """Every class has a name of its own."""
    if not class_names:
        raise ConfigError("class names: the list is empty")
    for index, name in enumerate(class_names):
        if not name.strip():
            raise ConfigError(f"class names: class {index} has an empty name")
    _refuse_twins(class_names, class_names)


def _refuse_twins(class_names: Sequence[str], readings: Sequence[Hashable], reader: str = "") -> None:
    first: dict[Hashable, int] = {}
    for index, reading in enumerate(readings):
        other = first.setdefault(reading, index)
        if other != index:
            same = f"{other} ({class_names[other]!r}) and {index} ({class_names[index]!r})"
            raise ConfigError(f"class names: classes {same} read the same{reader}; give them different names")


@dataclass(frozen=True)
class Pair:
    """Two classes and the cosine of their embeddings."""

    first: str
    second: str
    cosine: float


def confusable_pairs(classes_CD: Tensor, class_names: Sequence[str], count: int) -> list[Pair]:
    """The `count` pairs of classes whose embeddings are closest, the closest first."""
    a, b = np.triu_indices(len(class_names), k=1)
    unit_CD = normalize(classes_CD.double(), dim=-1)
    cosines = (unit_CD @ unit_CD.T).numpy()[a, b]
    order = np.argsort(-cosines, kind="stable")[:count]
    return [Pair(class_names[a[i]], class_names[b[i]], float(cosines[i])) for i in order]


def cache_folder(config: Config) -> Path:
    """Where classifiers are kept: beside what else the node caches."""
    return cache_dir(config) / "classifiers"


def cached(folder: Path, class_names: Sequence[str], recipe: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """The class embeddings from the folder, or else from `make()`. Collective; `make` gives the same on every rank.

    The file's name is the hash of names and recipe. A damaged file is made again; where nothing can be written, the
    classifier is made each time.
    """
    path = folder / f"{recipe_hash(class_names, recipe)}.safetensors"
    found = distributed.from_main(lambda: _read_cached(path))
    if found is not None:
        return found
    made = make()
    if distributed.ranks().is_main:
        try:
            save_classifier(path, made, class_names, recipe)
        except OSError as error:
            logger.warning("the classifier is not kept for the next run: %s: %s", folder, error.strerror or error)
    return made


def recipe_hash(class_names: Sequence[str], recipe: Mapping[str, Any]) -> str:
    """SHA-256 in hex of everything that a classifier follows from."""
    text = json.dumps([FORMAT, list(class_names), recipe], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def save_classifier(path: Path, classes_CD: Tensor, class_names: Sequence[str], recipe: Mapping[str, Any]) -> None:
    """Writes the file, complete or not at all. Raises OSError."""
    tensors = {TENSOR: classes_CD.float().contiguous()}
    metadata = {
        "format": FORMAT,
        "class_names": json.dumps(list(class_names)),
        "recipe": json.dumps(recipe),
        "hash": recipe_hash(class_names, recipe),
        "sha256": fingerprint(tensors),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(tensors, metadata))


def _read_cached(path: Path) -> Tensor | None:
    """A kept classifier, None if there is none or it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            tensors, metadata = {TENSOR: file.get_tensor(TENSOR)}, file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    return tensors[TENSOR].clone() if metadata.get("sha256") == fingerprint(tensors) else None


def _read_matrix(path: Path, key: str) -> tuple[Tensor, list[str] | None]:
    """The one tensor of a file, and the class names if it carries them. Raises ConfigError."""
    names: Any = None
    try:
        if path.suffix == ".npy":
            # Mapped: a header that promises more than the file has is refused before memory is taken for it.
            rows: Any = torch.from_numpy(np.array(_mapped(path), np.float32))
        elif path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                rows = _only_tensor(content)
                names = json.loads((file.metadata() or {}).get("class_names", "null"))
        else:
            content = read_torch_file(path, key)
            rows = _only_tensor(content) if isinstance(content, dict) else content
            names = content.get("class_names") if isinstance(content, dict) else None
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file: {path}") from None
    except (OSError, EOFError, ValueError, RecursionError, SafetensorError) as error:
        raise ConfigError(f"{key}: {path} is not readable ({error})") from None
    if not is_plain(rows) or rows.is_complex():
        raise ConfigError(f"{key}: {path} must hold one tensor, or one named {TENSOR}")
    if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
        raise ConfigError(f"{key}: {path}: its class names are no list of texts; write it again")
    return rows, None if names is None else list(names)


def _mapped(path: Path) -> np.ndarray:
    """The array of a .npy file, no object of any other kind. Raises OSError, ValueError."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a damaged header makes numpy's parser raise almost anything
        raise ValueError(f"no array: {type(error).__name__}: {error}") from None


def _only_tensor(content: Mapping[str, Any]) -> Any:
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    return tensors.get(TENSOR, next(iter(tensors.values())) if len(tensors) == 1 else None)
