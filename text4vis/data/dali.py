"""The DALI graphs that decode images and videos, and how they are fed. The only module that knows DALI.

    CPU   encoded -> decode the region                                                       (`region_graph`)
    GPU   encoded -> decode -> region -> resize -> K crops, each: flip -> grey -> blur -> solarise   (`view_graph`)

Every decision is an input beside the encoded bytes, one value for each sample; DALI draws no random number. The graph
of a GPU also runs on the CPU, operator for operator: only the device differs. That is how the tests see its pixels.

F encoded frames of a batch, B stored videos, k frames of one, K crops of a frame, S side of the model's input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali import math as dali_math
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU, TensorGPU
from nvidia.dali.types import DALIDataType

from text4vis.data.augmentation import Crop, Geometry, Region

Tensor = TensorCPU | TensorGPU


class Steps(NamedTuple):
    """What a graph does to the decoded regions, the same for all of its runs.

    side: S. num_crops: K of every frame's geometry. resampling: every geometry's. flip, grey, blur, solarize: whether
    a crop may ask for it; a step that none asks for is not in the graph.
    """

    side: int
    num_crops: int
    resampling: Literal["bicubic", "bilinear", "fast"]
    flip: bool = False
    grey: bool = False
    blur: bool = False
    solarize: bool = False


def region_graph(*, num_threads: int, batch_size: int) -> Pipeline:
    """The CPU's graph for stored frames: F encoded frames -> F regions (H, W, 3) uint8 RGB.

    batch_size: most frames of a run.
    """

    def graph() -> DataNode:
        return fn.decoders.image_slice(
            _encoded(),
            start=_input("start", types.INT32, 1),
            shape=_input("shape", types.INT32, 1),
            axes=(0, 1),
            **_LIKE_PILLOW,
        )

    return _pipeline(graph, None, num_threads, batch_size)


def view_graph(steps: Steps, *, device_id: int | None, num_threads: int, batch_size: int) -> Pipeline:
    """The GPU's graph for stored frames: F encoded frames -> F times (K, S, S, 3) uint8 RGB.

    device_id: the GPU, or None to run the graph on the CPU. batch_size: most frames of a run.

    Frames are decoded whole and then cut. Decoding the region alone gives the same pixels, but on GPUs it has an open
    fault (nvImageCodec, issue 55: errors and crashes), and it may bypass the hardware's JPEG decoder.
    """

    def graph() -> DataNode:
        device = "cpu" if device_id is None else "mixed"
        return _views(fn.decoders.image(_encoded(), device=device, **_LIKE_PILLOW), steps, axis=0)

    return _pipeline(graph, device_id, num_threads, batch_size)


def video_graph(steps: Steps, *, device_id: int | None, num_threads: int, batch_size: int) -> Pipeline:
    """The GPU's graph for stored videos: B encoded files -> B sequences (k, K, S, S, 3) uint8 RGB.

    As `view_graph`, with the input `frames`, each video's k frame numbers. A number that the video does not have is an
    error. On the CPU DALI's decoder knows VP8, VP9 and MJPEG only. batch_size: most videos of a run.
    """

    def graph() -> DataNode:
        frames = fn.decoders.video(
            _encoded(),
            frames=_input("frames", types.INT32, 1),
            pad_mode="none",
            device="cpu" if device_id is None else "mixed",
            affine=False,
        )
        return _views(frames, steps, axis=1)

    return _pipeline(graph, device_id, num_threads, batch_size)


def start_regions(graph: Pipeline, encoded: Sequence[bytes], regions: Sequence[Region]) -> None:
    """Starts one run of `region_graph` on a batch, and returns at once.

    encoded: the files. They are not copied: keep them until `outputs` has returned. regions: one for each file.
    """
    _feed_files(graph, encoded, regions)
    graph.schedule_run()


def start_views(
    graph: Pipeline,
    steps: Steps,
    encoded: Sequence[bytes],
    geometries: Sequence[Geometry],
    frames: Sequence[np.ndarray] | None = None,
) -> None:
    """Starts one run of `view_graph` or `video_graph` on a batch, and returns at once.

    encoded: as for `start_regions`. geometries: one for each file, all of `steps`. frames: (k,) int32 frame numbers of
    each video, for `video_graph`.
    """
    _feed_files(graph, encoded, [geometry.region for geometry in geometries])
    sizes = np.array([geometry[1:3] for geometry in geometries], np.float32)
    graph.feed_input("size", sizes)
    if steps.resampling == "fast":
        whole = np.array([geometry.region[2:] for geometry in geometries], np.float32)
        graph.feed_input("reduced", _reduced(whole, sizes))
    for number in range(steps.num_crops):
        _feed_crops(graph, steps, number, [geometry.crops[number] for geometry in geometries])
    if frames is not None:
        graph.feed_input("frames", list(frames))
    graph.schedule_run()


def outputs(graph: Pipeline) -> list[Tensor]:
    """The outputs of the oldest run that was started, one for each file; each keeps its DALI memory alive.

    Waits for the run. Raises RuntimeError, which does not name the file, where one of them cannot be decoded.
    """
    (images,) = graph.share_outputs()
    graph.release_outputs()
    return list(images)


def dense_outputs(graph: Pipeline) -> list[Tensor]:
    """As `outputs`, but all in one tensor with another axis in front, where the files' outputs are of one shape."""
    (images,) = graph.share_outputs()
    graph.release_outputs()
    return [images.as_tensor()] if images.is_dense_tensor() else list(images)


_LIKE_PILLOW = {"output_type": types.RGB, "adjust_orientation": False, "jpeg_fancy_upsampling": True}


def _views(images: DataNode, steps: Steps, axis: int) -> DataNode:
    """Decoded images or sequences to their crops, joined along a new axis."""
    images = fn.slice(
        images, start=_input("start", types.INT32, 1), shape=_input("shape", types.INT32, 1), axis_names="HW"
    )
    if steps.resampling == "fast":  # what shrinks by two or more is averaged first, as OpenCV's INTER_AREA does
        images = fn.resize(images, size=_input("reduced", types.FLOAT, 1), antialias=True)
    kind = types.INTERP_CUBIC if steps.resampling == "bicubic" else types.INTERP_LINEAR
    antialias = steps.resampling != "fast"
    images = fn.resize(images, size=_input("size", types.FLOAT, 1), interp_type=kind, antialias=antialias)
    return fn.stack(*(_view(images, steps, number) for number in range(steps.num_crops)), axis=axis)


def _reduced(whole_N2: np.ndarray, sizes_N2: np.ndarray) -> np.ndarray:
    """The sizes (N, 2) to which regions are averaged: their own, unless a side shrinks by two or more. Then it is that
    side's size twice, from which the bilinear resize takes the mean of two pixels, and the other side's final size.

    Against INTER_AREA at factors of 2 to 6 this is 0.5 of 255 away on average, 28 at most; DALI's antialias alone 1.2
    and 43; neither 4.4 and 160.
    """
    large = whole_N2 >= 2 * sizes_N2
    return np.where(large.any(1, keepdims=True), np.where(large, 2 * sizes_N2, sizes_N2), whole_N2)


def _view(images: DataNode, steps: Steps, number: int) -> DataNode:
    """A crop. What lies outside the image is black."""
    view = fn.slice(
        images,
        start=_input(f"corner{number}", types.INT32, 1),
        shape=(steps.side, steps.side),
        axis_names="HW",
        out_of_bounds_policy="pad",
    )
    if steps.flip:
        view = fn.flip(view, horizontal=_input(f"flip{number}", types.INT32))
    if steps.grey:
        view = fn.saturation(view, saturation=_input(f"saturation{number}", types.FLOAT))
    if steps.blur:
        sigma, window = _input(f"sigma{number}", types.FLOAT), _input(f"window{number}", types.INT32)
        view = fn.gaussian_blur(view, sigma=sigma, window_size=window)
    if steps.solarize:
        ceiling = _input(f"ceiling{number}", types.INT16)
        ceiling = ceiling.gpu() if view.device == "gpu" else ceiling
        view = fn.cast(dali_math.min(view, ceiling - view), dtype=types.UINT8)
    return view


def _feed_crops(graph: Pipeline, steps: Steps, number: int, crops: Sequence[Crop]) -> None:
    """The inputs of `_view`, with arguments that change nothing where a crop does not ask for a step."""
    graph.feed_input(f"corner{number}", np.array([crop[:2] for crop in crops], np.int32))
    if steps.flip:
        graph.feed_input(f"flip{number}", np.array([crop.flip for crop in crops], np.int32))
    if steps.grey:
        graph.feed_input(f"saturation{number}", np.array([not crop.grey for crop in crops], np.float32))
    if steps.blur:
        graph.feed_input(f"sigma{number}", np.array([crop.blur or 1 for crop in crops], np.float32))
        windows = [2 * math.ceil(3 * crop.blur) + 1 for crop in crops]  # of one pixel: no blur
        graph.feed_input(f"window{number}", np.array(windows, np.int32))
    if steps.solarize:
        # min(x, 255 - x) inverts from 128 up; min(x, 510 - x) is x
        graph.feed_input(f"ceiling{number}", np.array([255 if crop.solarize else 510 for crop in crops], np.int16))


def _feed_files(graph: Pipeline, encoded: Sequence[bytes], regions: Sequence[Region]) -> None:
    regions_N4 = np.array(regions, dtype=np.int32)
    graph.feed_input("encoded", [TensorCPU(data, "") for data in encoded])  # arrays would cost a conversion each
    graph.feed_input("start", np.ascontiguousarray(regions_N4[:, :2]))
    graph.feed_input("shape", np.ascontiguousarray(regions_N4[:, 2:]))


def _encoded() -> DataNode:
    return fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)


def _input(name: str, dtype: DALIDataType, ndim: int = 0) -> DataNode:
    return fn.external_source(name=name, dtype=dtype, ndim=ndim)


def _pipeline(graph: Callable[[], DataNode], device_id: int | None, num_threads: int, batch_size: int) -> Pipeline:
    return pipeline_def(
        graph,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # `prefetch.pipelined` decides how many runs are under way
        exec_dynamic=True,  # outputs stay valid as long as they are held
    )()
