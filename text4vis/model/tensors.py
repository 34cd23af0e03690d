"""Named tensors from files, and their strict loading. Nothing but tensors, numbers and containers is ever rebuilt."""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.pretrained import get_pretrained_url, list_pretrained_models_by_tag
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from text4vis.config.schema import ConfigError
from text4vis.model.layouts import State, clip_names

# Under which training programs save a model: Lightning and open_clip, Text4Vis, many others, DeepSpeed.
_STATE_DICTS = ("state_dict", "model_state_dict", "model", "module")
# The names of types in a safetensors header.
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
# Numbers that OpenAI's archives keep among the tensors.
OPENAI_EXTRAS = ("input_resolution", "context_length", "vocab_size")


def read_weights(path: Path, key: str) -> State:
    """Named tensors of a file: safetensors, a torch file of tensors, or one of OpenAI's published archives.

    OpenAI's archives are TorchScript, that is, code: one is opened only if its SHA-256 is that of a published file.
    `key` is the config key named in errors. Raises ConfigError.
    """
    return read_clip_weights(path, key)[0]


def read_clip_weights(path: Path, key: str) -> tuple[State, bool]:
    """`read_weights`, and whether the file shows that OpenAI trained them: it is one of OpenAI's published archives, or
    holds the numbers that only these keep among their tensors."""
    published = False
    if path.suffix == ".safetensors":
        try:
            content: Any = load_file(path)
        except FileNotFoundError:
            raise ConfigError(f"{key}: no such file: {path}") from None
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{key}: {path} is not a readable safetensors file ({error})") from None
    elif _is_torchscript(path):
        content, published = _openai_archive(path, key), True
    else:
        content = read_torch_file(path, key)
    content = _unpacked(content)
    if not is_state(content):
        held = f"; it holds {some(list(map(str, content)))}" if isinstance(content, dict) else ""
        raise ConfigError(f"{key}: {path} is not a dictionary of named tensors{held}")
    state = clip_names(content, f"{key}: {path}")
    plain = {name: tensor for name, tensor in state.items() if name not in OPENAI_EXTRAS}
    return plain, published or len(plain) < len(state)


def _unpacked(content: Any) -> Any:
    """The state dict in what a training program saved: beside its optimiser and counters, under one of these names."""
    while isinstance(content, dict) and not is_state(content):
        found = [name for name in _STATE_DICTS if isinstance(content.get(name), dict)]
        if not found:
            break
        content = content[found[0]]
    return content


def write_tensors(path: Path, state: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes safetensors with the folder's default permissions. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, path, metadata)
        with safe_open(path, "pt"):  # save_file is silent where a disk says only at the close that it is full
            pass
    except SafetensorError as error:
        raise OSError(f"{path}: cannot be written ({error}); free space on the disk") from None
    with suppress(OSError):  # not every mount has modes
        path.chmod(mode)  # the library makes files owner-only


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a safetensors file lie. header: its first bytes. offsets: the byte of the file where each
    tensor begins, by name. size: bytes of the file."""

    header: bytes
    offsets: dict[str, int]
    size: int


def layout(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> Layout:
    """The layout of the file that holds tensors of these types and shapes, so that its parts can be written apart.

    Tensors of wide numbers come first, so that each is aligned; otherwise they keep their order.
    """
    entries, begins, end = {}, {}, 0
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: -item[1][0].itemsize):
        begins[name], end = end, end + dtype.itemsize * math.prod(shape)
        entries[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


def is_state(content: Any) -> bool:
    """Whether this is a dictionary of names and tensors that are what they seem: dense, on the CPU, in memory."""
    return isinstance(content, dict) and all(isinstance(name, str) and is_plain(content[name]) for name in content)


def is_plain(value: Any) -> bool:
    """Whether a value is a dense tensor with all its elements in memory: none that grows when it is copied."""
    return (
        isinstance(value, Tensor)
        and (value.layout, value.device.type, value.is_quantized) == (torch.strided, "cpu", False)
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def read_torch_file(path: Path, key: str) -> Any:
    """Tensors, numbers, strings and containers of a torch file; a file that holds more is refused, unread.

    `key` is named in errors. Raises ConfigError.
    """
    try:
        _refuse_bomb(path, key)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ConfigError(f"{key}: no such file: {path}") from None
    except ConfigError:
        raise
    except Exception as error:  # a damaged file fails in any way
        if "Weights only load failed" in str(error):
            reason = "holds more than tensors and numbers, and pickled code is never run; save its state dict alone"
        else:
            reason = f"is not a readable torch file ({' '.join(str(error).split())})"
        raise ConfigError(f"{key}: {path} {reason}") from None


def _refuse_bomb(path: Path, key: str) -> None:
    """Refuses an archive whose parts are larger than itself: torch compresses nothing. Raises ConfigError."""
    if zipfile.is_zipfile(path):
        size = sum(part.file_size for part in _parts(path))
        if size > path.stat().st_size:
            raise ConfigError(
                f"{key}: {path} would grow to {size} bytes when unpacked; no torch file does: save it again"
            )


def _is_torchscript(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path) and any(part.filename.endswith("/constants.pkl") for part in _parts(path))
    except Exception:  # a damaged archive fails in any way; `read_torch_file` says so
        return False


def _parts(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def _openai_archive(path: Path, key: str) -> State:
    published = {get_pretrained_url(name, "openai").split("/")[-2] for name in list_pretrained_models_by_tag("openai")}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() not in published:
        raise ConfigError(
            f"{key}: {path} is a TorchScript archive, which carries code, and none that OpenAI published; save its "
            "state dict as .safetensors"
        )
    return dict(torch.jit.load(path, map_location="cpu").state_dict())


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str, hint: str = "") -> None:
    """Loads exactly the module's tensors. Raises ConfigError listing every key that is missing, extra or mis-shaped.

    A scale of shape () fits one of shape (1,) and the other way round.
    """
    expected = module.state_dict()
    state = dict(state)
    for name in expected.keys() & state.keys():
        if state[name].numel() == 1 == expected[name].numel():
            state[name] = state[name].reshape(expected[name].shape)
    shapes = {
        f"{name} {list(state[name].shape)} for {list(expected[name].shape)}"
        for name in expected.keys() & state.keys()
        if state[name].shape != expected[name].shape
    }
    problems = {
        "missing": expected.keys() - state.keys(),
        "unexpected": state.keys() - expected.keys(),
        "shape": shapes,
    }
    report = [f"{kind}: {some(names)}" for kind, names in problems.items() if names]
    if report:
        raise ConfigError(f"{where} does not fit the model; {'; '.join(report)}{hint}")
    module.load_state_dict(state)


def some(names: Collection[str], most: int = 6) -> str:
    """The first names in words, and how many more there are."""
    first = ", ".join(sorted(names)[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex of the names, types, shapes and bytes of tensors, whatever their order and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
