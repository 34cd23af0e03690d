"""Which videos NVIDIA's decoder shows as `shards.video` does."""

from __future__ import annotations

from shards.frames import PacketTable
from shards.video import UNSPECIFIED, Source, VideoError, decoded_frames, opened_video, turning_filters

_CODECS = {"h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1"}
_LIMITED, _BT601 = 1, {5, 6}  # ITU-T H.273


def nvdec_shows_the_same(source: Source, num_frames: int) -> bool:
    """Whether DALI's decoder on an NVIDIA GPU gives this video's frames the numbers and pixels that they have here.

    It turns no picture, counts the packets that edit lists hide, and takes every video for BT.601, limited range.
    Only chroma is interpolated differently. num_frames: by the index. False for a damaged file.
    """
    try:
        with opened_video(source) as (container, stream):
            table = PacketTable.read(container, stream)
            if table is None or table.discards or len(table.pts) != num_frames or len(container.streams.video) > 1:
                return False
            container.seek(table.key_pts[0], stream=stream, backward=True)
            frame = next(decoded_frames(container, stream))
            return (
                stream.codec_context.name in _CODECS
                and frame.format.name == "yuv420p"
                and not (frame.width % 2 or frame.height % 2 or frame.interlaced_frame or turning_filters(frame))
                and int(frame.colorspace) in _BT601 | {UNSPECIFIED}
                and int(frame.color_range) in (0, _LIMITED)
            )
    except (VideoError, StopIteration):
        return False
