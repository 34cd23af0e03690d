"""The DALI graphs that decode images and videos, and how they are fed.

A graph gets every decision (which region, which size) as an input with the encoded bytes; DALI draws no random number.
The same graph serves the CPU and the GPU; only the device of its operators differs.

F encoded frames of a batch, B stored videos of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types
from nvidia.dali.data_node import DataNode
from nvidia.dali.tensors import TensorCPU, TensorGPU
from nvidia.dali.types import DALIDataType

from text4vis.data.augmentation import Region


def image_graph(*, device_id: int | None, num_threads: int, batch_size: int, resize: str | None) -> Pipeline:
    """The graph for stored frames, not yet built: F encoded frames -> F regions (H, W, 3) uint8 RGB.

    device_id: the GPU that decodes (DALI's "mixed"), or None for the CPU. batch_size: most frames of a run. resize:
    None, "linear" or "cubic" (both with antialias) to the size given with each frame. Inputs: `encoded`; `start` and
    `shape`, the region's (top, left) and (height, width); with resize `size`, the (height, width) after it.
    """

    def graph() -> DataNode:
        images = fn.decoders.image_slice(
            _input("encoded", types.UINT8),
            start=_input("start", types.INT32),
            shape=_input("shape", types.INT32),
            axes=(0, 1),
            device="cpu" if device_id is None else "mixed",
            output_type=types.RGB,
            adjust_orientation=False,  # as Pillow: EXIF orientation is not applied
            jpeg_fancy_upsampling=True,  # as Pillow
        )
        return _resized(images, resize)

    return _pipeline(graph, device_id, num_threads, batch_size)


def video_graph(*, device_id: int, num_threads: int, batch_size: int, resize: str) -> Pipeline:
    """The graph for stored videos on a GPU, not yet built: B encoded files -> B sequences (k, H, W, 3) uint8 RGB.

    Input `frames` holds each video's (k,) frame numbers; the other inputs are those of `image_graph`, one for each
    video. There is no CPU version: DALI's CPU decoder does not know H.264.
    """

    def graph() -> DataNode:
        frames = fn.decoders.video(
            _input("encoded", types.UINT8), frames=_input("frames", types.INT32), device="mixed", affine=False
        )
        regions = fn.slice(
            frames,
            _input("start", types.INT32),
            _input("shape", types.INT32),
            axis_names="HW",
            out_of_bounds_policy="error",
        )
        return _resized(regions, resize)

    return _pipeline(graph, device_id, num_threads, batch_size)


def start_run(
    graph: Pipeline,
    encoded: Sequence[bytes],
    regions: Sequence[Region],
    sizes: Sequence[tuple[int, int]] | None = None,
    frames: Sequence[np.ndarray] | None = None,
) -> None:
    """Starts one run of `image_graph` or `video_graph` on a batch and returns at once.

    encoded: the files. They are not copied: keep them until `outputs` has returned. regions: one for each file.
    sizes: (height, width) after the resize, for a graph that resizes. frames: (k,) int32 frame numbers of each video,
    for `video_graph`.
    """
    regions_N4 = np.array(regions, dtype=np.int32)
    graph.feed_input("encoded", [TensorCPU(data, "") for data in encoded])  # arrays would cost a conversion each
    graph.feed_input("start", np.ascontiguousarray(regions_N4[:, :2]))
    graph.feed_input("shape", np.ascontiguousarray(regions_N4[:, 2:]))
    if sizes is not None:
        graph.feed_input("size", np.array(sizes, dtype=np.float32))
    if frames is not None:
        graph.feed_input("frames", list(frames))
    graph.schedule_run()


def outputs(graph: Pipeline) -> list[TensorCPU] | list[TensorGPU]:
    """The outputs of the oldest run that was started, one for each file; each keeps its DALI memory alive.

    Waits for the run. Raises RuntimeError, which does not name the file, where one of them cannot be decoded.
    """
    (images,) = graph.share_outputs()
    graph.release_outputs()
    return list(images)


def _input(name: str, dtype: DALIDataType) -> DataNode:
    return fn.external_source(name=name, dtype=dtype, ndim=1, no_copy=name == "encoded")


def _resized(images: DataNode, resize: str | None) -> DataNode:
    if resize is None:
        return images
    kind = {"linear": types.INTERP_LINEAR, "cubic": types.INTERP_CUBIC}[resize]
    return fn.resize(images, size=_input("size", types.FLOAT), interp_type=kind, antialias=True)


def _pipeline(graph: Callable[[], DataNode], device_id: int | None, num_threads: int, batch_size: int) -> Pipeline:
    return pipeline_def(
        graph,
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=device_id,
        prefetch_queue_depth=1,  # `prefetch.pipelined` decides how many runs are under way
        exec_dynamic=True,  # outputs stay valid as long as they are held
    )()
