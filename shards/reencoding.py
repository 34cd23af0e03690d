"""Stored videos encoded anew, with key frames close together: any frame then needs few others."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import av.error
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image

from shards.images import scaled_down
from shards.video import VideoError, iter_frames, probe_video

_CRF = 23  # x264's own default of constant quality
_TIME_BASE = Fraction(1, 90_000)
_BT601, _LIMITED = 6, 1  # ITU-T H.273; what players and GPUs take small videos for
_BITEXACT = {"fflags": "+bitexact"}  # no version of FFmpeg in the file


def reencode_video(source: Path | bytes, *, gop: int, short_side: int | None) -> bytes:
    """The video as an H.264 mp4 without sound, with a key frame at least every `gop` frames.

    It shows the same frames at the same times, upright. Sides become even numbers, and the shorter one at most
    `short_side` pixels. The same input gives the same bytes with the same version of PyAV. Raises VideoError.
    """
    info = probe_video(source)
    ticks = np.round(info.times_N / float(_TIME_BASE)).astype(np.int64)
    if (np.diff(ticks) <= 0).any():
        raise VideoError("two of its frames are shown at the same time")
    width, height = (max(2, side // 2 * 2) for side in scaled_down(info.width, info.height, short_side))
    rate = Fraction(info.fps or 25).limit_denominator(1001)
    output = io.BytesIO()
    try:
        with av.open(output, "w", format="mp4", container_options=_BITEXACT) as container:
            options = {"crf": str(_CRF), "g": str(gop), "x264-params": "open-gop=0"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            context = stream.codec_context
            context.thread_count, context.time_base = 1, _TIME_BASE
            context.colorspace, context.color_range = _BT601, _LIMITED
            for image, tick in zip(iter_frames(source), ticks.tolist(), strict=True):
                # Pillow scales as it does for stored frames; FFmpeg's scaler does not give the same bytes every time.
                scaled = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
                frame = av.VideoFrame.from_image(scaled).reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG
                )
                frame.pts, frame.time_base = tick, _TIME_BASE
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    except av.error.FFmpegError as error:
        raise VideoError(f"it cannot be encoded ({error.strerror})") from error
    return output.getvalue()
