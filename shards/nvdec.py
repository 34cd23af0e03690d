"""Which videos NVIDIA's decoder shows as `shards.video` does."""

from __future__ import annotations

import av
from av.container import InputContainer

from shards.frames import PacketTable
from shards.video import UNSPECIFIED, Source, VideoError, decoded_frames, opened_video, turning_filters

_CODECS = {"h264", "hevc", "mpeg4", "vp8", "vp9", "libdav1d", "av1"}
_LIMITED, _BT601 = 1, {5, 6}  # ITU-T H.273


def why_not_nvdec(source: Source, num_frames: int, size: tuple[int, int]) -> str | None:
    """Why DALI's decoder on an NVIDIA GPU would give this video's frames other numbers or pixels than they have here.

    None where it gives the same, up to the interpolation of chroma. num_frames, size: of the index, size as (height,
    width) in pixels. The reason is a few words, the same for all videos of a kind.

    DALI's decoder turns no picture, takes every video for BT.601 in limited range, and numbers frames by packets, those
    that edit lists hide among them. So packets must tell the frames for certain, as many as the index has, and the
    first and the last group of pictures must begin with a frame of the right size and kind. Transport streams may
    change their pictures anywhere.
    """
    try:
        with opened_video(source) as (container, stream):
            table = PacketTable.read(container, stream)
            reason = _why_not_by_packets(container, stream, table, num_frames)
            if reason or table is None:
                return reason
            for key in {table.key_pts[0], table.key_pts[-1]}:
                container.seek(key, stream=stream, backward=True)
                if reason := _why_not_by_frame(next(decoded_frames(container, stream)), size):
                    return reason
            return None
    except (VideoError, StopIteration):
        return "that are damaged"


def _why_not_by_packets(
    container: InputContainer, stream: av.VideoStream, table: PacketTable | None, num_frames: int
) -> str | None:
    if len(container.streams.video) > 1:
        return "with several streams of pictures"
    if stream.codec_context.name not in _CODECS:
        return f"in {stream.codec_context.name}"
    if container.format.name in ("mpegts", "mpeg"):
        return "in a transport or program stream"
    if table is None or table.timing is None or table.discards:
        return "with an edit list, or whose packets do not tell the frames"
    return "of another length than the index says" if len(table.pts) != num_frames else None


def _why_not_by_frame(frame: av.VideoFrame, size: tuple[int, int]) -> str | None:
    if turning_filters(frame):
        return "that are turned or mirrored"
    if (frame.height, frame.width) != size:
        return "of another size than the index says"
    if frame.format.name not in ("yuv420p", "yuvj420p") or frame.width % 2 or frame.height % 2:
        return "not in 8 bits 4:2:0 with even sides"
    if frame.interlaced_frame:
        return "of interlaced pictures"
    is_full = frame.format.name == "yuvj420p" or int(frame.color_range) not in (0, _LIMITED)
    if is_full or int(frame.colorspace) not in _BT601 | {UNSPECIFIED}:
        return "in other colours than BT.601 of limited range"
    return None
