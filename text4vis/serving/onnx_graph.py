"""Exports the video side of a recogniser as one ONNX graph.

    frames   (B, V, T, 3, S, S) uint8 RGB   ──> embeddings (B, D) float32: the mean over views, not normalised
    classes  (C, D) float32                 ──> logits (B, C) float32: 100 x cosine; their softmax is `predict`'s

`classes` is optional; its default is the model's own class embeddings. Pass other rows, of any length, to recognise
other classes. B, V and C may vary. The graph normalises the pixels. Its metadata entry `text4vis` is JSON with the
`preprocessing` that a program must apply to a video first, and the `class_names`.

B videos, V views, T frames, S side of the model's input, C classes, D embedding width.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from text4vis.config.schema import ConfigError
from text4vis.evaluation.protocols import LOGIT_SCALE
from text4vis.model.video_clip import VideoClip

OPSET = 20
TOLERANCE = 0.01  # of the logits, which lie between -100 and 100
INLINE_BYTES = 2**31 - 2**26  # protobuf allows less than 2 GiB: larger weights go into a second file
METADATA = "text4vis"


@dataclass(frozen=True)
class OnnxFile:
    """The file written. difference: the largest one between its logits and PyTorch's; None without onnxruntime."""

    path: Path
    bytes: int
    difference: float | None


class _Recogniser(nn.Module):
    """Computes the outputs of the graph from its two inputs."""

    def __init__(self, model: VideoClip) -> None:
        super().__init__()
        self.model = model

    def forward(self, frames_BVTCHW: Tensor, classes_CD: Tensor) -> tuple[Tensor, Tensor]:
        videos, views = frames_BVTCHW.shape[:2]
        views_BVD = self.model.encode_video(frames_BVTCHW.flatten(0, 1)).unflatten(0, (videos, views))
        video_BD = views_BVD.mean(dim=1)
        cosines_BC = normalize(video_BD, dim=-1) @ normalize(classes_CD, dim=-1).T
        return video_BD, LOGIT_SCALE * cosines_BC


def require_packages() -> None:
    """Raises ConfigError if the exporter's packages are missing."""
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--onnx needs the package {missing[0]}: pip install 'text4vis[onnx]'")


def write_onnx(path: Path, model: VideoClip, classes_CD: Tensor, facts: Mapping[str, Any]) -> OnnxFile:
    """Writes the graph of a model (fp32, on the CPU), and compares it with PyTorch if onnxruntime is installed.

    facts: the metadata, as JSON values. Weights above INLINE_BYTES go to PATH.data. Raises ConfigError if packages are
    missing, the exporter cannot convert the model, or the graph's logits differ from PyTorch's by TOLERANCE or more.
    """
    require_packages()
    import onnx_ir

    recogniser, classes_CD = _Recogniser(model).eval(), classes_CD.detach().float().cpu()
    frames = _noise(model, videos=2, views=3)
    recogniser(
        frames, classes_CD
    )  # fills the model's cache of constants before the exporter can put its own tensors there
    with _quiet():
        try:
            program = torch.onnx.export(
                recogniser,
                (frames, classes_CD),
                dynamo=True,
                opset_version=OPSET,
                input_names=["frames", "classes"],
                output_names=["embeddings", "logits"],
                dynamic_shapes=({0: "videos", 1: "views"}, {0: "classes"}),
                verbose=False,
            )
        except Exception as error:  # any failure here means that a part of the network cannot be converted
            reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
            raise ConfigError(
                f"--onnx: torch {torch.__version__} cannot convert this network ({reason[0]}); its parts are "
                "network.arch, network.sim_header, network.tm and network.joint_st. The export without --onnx works"
            ) from error
    assert program is not None
    graph = program.model.graph
    own = next(value for value in graph.inputs if value.name == "classes")
    own.const_value = onnx_ir.tensor(classes_CD.numpy(), name=own.name)
    graph.register_initializer(own)
    for node in onnx_ir.traversal.RecursiveGraphIterator(graph):
        for part in (node, *node.outputs):
            part.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props[METADATA] = json.dumps(facts, ensure_ascii=False)
    remove_onnx(path)
    size = sum(value.const_value.nbytes for value in graph.initializers.values() if value.const_value is not None)
    program.save(str(path), external_data=size > INLINE_BYTES)
    written = sum(file.stat().st_size for file in _files(path) if file.exists())
    difference = _difference(path, recogniser, classes_CD)
    if difference is not None and not difference < TOLERANCE:
        remove_onnx(path)
        raise ConfigError(
            f"--onnx: the graph computes logits that differ by {difference:.3g} from PyTorch's (at most {TOLERANCE}); "
            "try another version of torch or onnxscript"
        )
    return OnnxFile(path, written, difference)


def remove_onnx(path: Path) -> None:
    """Removes a graph and its weights."""
    for file in _files(path):
        file.unlink(missing_ok=True)


def _files(path: Path) -> tuple[Path, Path]:
    return path, path.with_name(f"{path.name}.data")


def _difference(path: Path, recogniser: _Recogniser, classes_CD: Tensor) -> float | None:
    """The largest difference of the logits, on batches of other sizes than the exported one."""
    try:
        import onnxruntime
    except ImportError:
        return None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that `classes` has a default
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    largest = 0.0
    for videos, views in ((1, 1), (3, 2)):
        frames = _noise(recogniser.model, videos, views)
        with torch.no_grad():
            expected_BC = recogniser(frames, classes_CD)[1]
        (found_BC,) = session.run(["logits"], {"frames": frames.numpy()})
        largest = max(largest, (torch.from_numpy(found_BC) - expected_BC).abs().max().item())
    return largest


def _noise(model: VideoClip, videos: int, views: int) -> Tensor:
    shape = (videos, views, model.num_segments, 3, model.image_size, model.image_size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(videos))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Turns off gradients, torch's fused attention (it has no ONNX operator) and the exporter's warnings."""
    level, fused = logging.getLogger("onnxscript").level, torch.backends.mha.get_fastpath_enabled()
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        logging.getLogger("onnxscript").setLevel(level)
