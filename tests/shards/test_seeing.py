"""Videos are what `ffmpeg` shows: codecs, containers, orientations, colours, streams and clocks of all kinds."""

from __future__ import annotations

import io

import av
import numpy as np
import PIL.Image
import pytest
from videos import ORIENTATIONS, assert_sampled_as_decoded, encode, ffmpeg_shows, pictures, turned

from shards.frames import FrameReader, decode_frames
from shards.images import encode_jpeg
from shards.nvdec import why_not_nvdec
from shards.video import (
    VideoError,
    frames_at,
    frames_at_rate,
    iter_frames,
    probe_video,
)

# Codec, pixel format, file name's ending, options.
CODECS = [
    ("libx264", "yuv420p", "mp4", {"bf": "2"}),
    ("libx264", "yuv420p", "m2ts", {"bf": "2"}),
    ("libx264", "yuv420p", "flv", {}),
    ("libx264", "yuv420p", "f4v", {}),
    ("libx264", "yuv420p", "h264.avi", {}),
    ("libx264", "yuv422p", "mkv", {}),
    ("libx264", "yuv444p", "mov", {}),
    ("libx264", "yuv420p10le", "mp4", {}),
    ("libx264", "yuv422p10le", "mkv", {}),
    ("libx264", "gray", "mkv", {}),
    ("libx265", "yuv420p", "mp4", {"x265-params": "log-level=none"}),
    ("libx265", "yuv420p10le", "mkv", {"x265-params": "log-level=none"}),
    ("libvpx", "yuv420p", "webm", {"deadline": "realtime"}),
    ("libvpx-vp9", "yuv420p", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    ("libvpx-vp9", "yuva420p", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    ("libvpx-vp9", "yuv444p", "mp4", {"deadline": "realtime", "cpu-used": "8"}),
    ("libsvtav1", "yuv420p", "mp4", {"preset": "12"}),
    ("mpeg4", "yuv420p", "avi", {"bf": "2"}),
    ("mpeg4", "yuv420p", "3gp", {}),
    ("mpeg2video", "yuv420p", "mpg", {"bf": "2"}),
    ("mpeg2video", "yuv420p", "vob", {"flags": "+ildct+ilme"}),
    ("mpeg2video", "yuv422p", "ts", {}),
    ("wmv2", "yuv420p", "wmv", {}),
    ("flv", "yuv420p", "flv1.flv", {}),
    ("mjpeg", "yuvj420p", "avi", {}),
    ("mjpeg", "yuvj422p", "mov", {}),
    ("prores_ks", "yuv422p10le", "mov", {}),
    ("prores_ks", "yuva444p10le", "mov", {}),
    ("ffv1", "gray16le", "mkv", {}),
    ("ffv1", "bgra", "mkv", {}),
    ("ffv1", "yuv420p", "mkv", {}),
    ("huffyuv", "yuv422p", "avi", {}),
    ("rawvideo", "bgr24", "avi", {}),
    ("qtrle", "argb", "mov", {}),
    ("gif", "rgb8", "gif", {}),
    ("apng", "rgba", "apng", {}),
    ("mjpeg", "yuvj420p", "mjpeg", {}),
    ("mjpeg", "yuvj420p", "mjpg", {}),
    ("rpza", "rgb555le", "mov", {}),
    ("h261", "yuv420p", "h261", {}),
    ("flv", "yuv420p", "swf", {}),
]


def assert_as_ffmpeg_shows(path, *, times=True) -> None:
    """Pixels to the last bit: the filters are the same. Also by number, after seeking."""
    info = probe_video(path)
    frames = np.stack(list(iter_frames(path)))
    expected, seconds = ffmpeg_shows(path, info.height, info.width)
    assert len(frames) == len(expected) == info.num_frames
    assert np.abs(frames.astype(int) - expected).mean() < 1
    if times:
        np.testing.assert_allclose(info.times_N, seconds, atol=0.0011)  # containers round to a millisecond
    last = info.num_frames - 1
    assert_sampled_as_decoded(path, info, frames)
    for source in (path, path.read_bytes()):
        for frame, number in zip(decode_frames(source, [last, 0], num_frames=last + 1), [last, 0], strict=True):
            np.testing.assert_array_equal(frame, frames[number])


@pytest.mark.parametrize(("codec", "pix_fmt", "name", "options"), CODECS, ids=lambda value: str(value)[:16])
def test_codecs_and_containers(tmp_path, codec, pix_fmt, name, options):
    images = pictures(6, *size_for(codec))
    path = encode(tmp_path / f"video.{name}", codec, pix_fmt, images=images, options=options)
    assert_as_ffmpeg_shows(path, times="avi" not in name)
    if pix_fmt.startswith("gray"):
        images = [np.repeat((image @ [0.299, 0.587, 0.114])[..., None].astype(np.uint8), 3, 2) for image in images]
    difference = np.abs(np.stack(list(iter_frames(path))).astype(int) - np.stack(images))
    assert difference.mean() < (25 if codec == "gif" else 12), "ffmpeg may be wrong too"


@pytest.mark.parametrize(("name", "codec", "muxer", "rate"), [
    ("fragments.mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}, 20),
    ("live.webm", "libvpx", {"live": "1"}, 20),
    ("late.mkv", "libx264", {"output_ts_offset": "7.3"}, 20),
    ("early.mkv", "libx264", {"output_ts_offset": "-0.15", "avoid_negative_ts": "disabled"}, 20),
    ("v.mxf", "mpeg2video", {}, 25),
    ("v.nut", "libx264", {}, 20),
    ("v.ivf", "libvpx", {}, 20),
    ("v.h264", "libx264", {}, 25),
    ("v.wtv", "mpeg2video", {}, 25),
])  # fmt: skip
def test_containers_without_index_or_duration_and_clocks_that_start_elsewhere(tmp_path, name, codec, muxer, rate):
    path = encode(tmp_path / name, codec, images=pictures(12), muxer=muxer, rate=rate)
    info = probe_video(path)
    assert (info.num_frames, info.duration) == (12, pytest.approx(12 / rate, abs=0.002))
    np.testing.assert_allclose(info.times_N, np.arange(12) / rate, atol=0.0011)
    assert_as_ffmpeg_shows(path, times=name != "early.mkv")  # ffmpeg moves what is before 0


def size_for(codec: str) -> tuple[int, int]:
    if codec == "h261":
        return 176, 144
    return (96, 64) if codec == "libx265" else (48, 32)  # x265 writes behind its buffers when the picture is smaller


@pytest.mark.parametrize(("name", "codec", "pix_fmt", "size"), [
    ("v.h261", "h261", "yuv420p", (176, 144)),  # every packet is called a key frame, and is none
    ("v.mov", "rpza", "rgb555le", (48, 32)),
    ("v.avi", "rawvideo", "pal8", (48, 32)),  # the palette comes with the first packet alone
])  # fmt: skip
def test_frames_that_need_the_beginning_of_the_file_have_it(tmp_path, name, codec, pix_fmt, size):
    path, rng = tmp_path / name, np.random.default_rng(0)
    if pix_fmt == "pal8":
        write_palette_video(path, rng)
    else:
        encode(path, codec, pix_fmt, images=pictures(20, *size))
    frames = list(iter_frames(path))
    for number in (0, 7, len(frames) - 1):
        reader = FrameReader(path, num_frames=len(frames))
        for wanted in ([number], [number, 3]):
            np.testing.assert_array_equal(reader.read(wanted)[0], frames[number])


def write_palette_video(path, rng) -> None:
    palette = np.concatenate([rng.integers(0, 256, (256, 3), np.uint8), np.full((256, 1), 255, np.uint8)], axis=1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "pal8"
        for _ in range(10):
            numbers = rng.integers(0, 256, (32, 48), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray((numbers, palette), "pal8")))
        container.mux(stream.encode())


def test_an_empty_packet_leaves_the_frame_before_on_the_screen(tmp_path):
    """Ogg's Theora writes them for frames that repeat."""
    whole = encode(tmp_path / "whole.nut", "mpeg4")
    with av.open(str(whole)) as source, av.open(str(tmp_path / "v.nut"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.size:
                put = packet if number not in (2, 5) else av.Packet(0)
                put.pts, put.dts, put.time_base, put.stream = packet.pts, packet.dts, packet.time_base, stream
                target.mux(put)
    info = probe_video(tmp_path / "v.nut")
    np.testing.assert_allclose(info.times_N, [0, 0.05, 0.15, 0.2])
    assert info.shown(0, 0.2).tolist() == [0, 1, 1, 2]
    assert_as_ffmpeg_shows(tmp_path / "v.nut")


def test_a_damaged_key_frame_looks_the_same_by_number(tmp_path):
    """The decoder conceals what is missing with the frames before, so these have to be decoded first."""
    rng = np.random.default_rng(0)
    images = [image // 2 + rng.integers(0, 64, image.shape, np.uint8) for image in pictures(40, 96, 64)]
    path = encode(tmp_path / "v.avi", images=images, options={"g": "10", "bf": "0", "preset": "ultrafast"})
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        keys = [packet for packet in container.demux(video=0) if packet.is_keyframe]
        middle = keys[2].pos + 8 + keys[2].size // 2
    data[middle : middle + 40] = bytes(40)
    frames = list(iter_frames(bytes(data)))
    for number in (20, 29, 39):
        (frame,) = decode_frames(bytes(data), [number], num_frames=40)
        np.testing.assert_array_equal(frame, frames[number])


@pytest.mark.parametrize("matrix", [1, 5, 7, 9], ids=["BT.709", "BT.601", "SMPTE 240M", "BT.2020"])
@pytest.mark.parametrize("colours", [1, 2], ids=["limited", "full"])
@pytest.mark.parametrize(("codec", "pix_fmt", "name"), [
    ("libx264", "yuv420p", "mp4"), ("libx264", "yuv420p10le", "mkv"), ("libx265", "yuv444p", "mp4"),
    ("ffv1", "yuv422p", "mkv"),
])  # fmt: skip
def test_colour_matrices_and_ranges(tmp_path, matrix, colours, codec, pix_fmt, name):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    images = pictures(3, *size_for(codec))
    path = encode(
        tmp_path / f"v.{name}", codec, pix_fmt, images=images, options=options, colorspace=matrix, color_range=colours
    )
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
    assert (int(frame.colorspace), int(frame.color_range)) == (matrix, colours)
    assert_as_ffmpeg_shows(path)


@pytest.mark.parametrize("matrix", [3, 8, 10, 12, 14], ids=["reserved", "YCgCo", "BT.2020 c", "derived", "ICtCp"])
def test_rare_colour_matrices(tmp_path, matrix):
    """Newer versions of FFmpeg refuse these."""
    path = encode(tmp_path / "v.webm", "libvpx-vp9", "yuv444p", colorspace=matrix, color_range=1)
    assert_as_ffmpeg_shows(path)


@pytest.mark.parametrize("kind", ORIENTATIONS)
@pytest.mark.parametrize(("codec", "pix_fmt", "size"), [
    ("libx264", "yuv420p", (48, 32)), ("libx264", "yuv422p", (48, 32)), ("libx264", "yuv444p", (45, 31)),
    ("libx265", "yuv420p10le", (96, 64)), ("prores_ks", "yuv422p10le", (48, 32)), ("mjpeg", "yuvj420p", (48, 32)),
    ("png", "rgb24", (45, 31)),
])  # fmt: skip
def test_all_eight_orientations(tmp_path, kind, codec, pix_fmt, size):
    matrix, turn = ORIENTATIONS[kind]
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    images = pictures(3, *size)
    path = encode(tmp_path / "v.mov", codec, pix_fmt, images=images, matrix=matrix, options=options)
    frames = list(iter_frames(path))
    info = probe_video(path)
    for frame, image in zip(frames, images, strict=True):
        assert frame.shape == turn(image).shape == (info.height, info.width, 3)
        assert np.abs(frame.astype(int) - turn(image)).mean() < 8
    assert_as_ffmpeg_shows(path)


def test_other_angles_are_turned_as_ffmpeg_turns_them(tmp_path):
    path = encode(tmp_path / "v.mp4")
    path.write_bytes(turned(path.read_bytes(), (3, 2, -2, 3)))
    assert_as_ffmpeg_shows(path)
    path.write_bytes(turned(path.read_bytes(), (0, 0, 0, 0)))
    assert_as_ffmpeg_shows(path)


def with_message(path, message: str) -> None:
    """Puts a message (SEI) into an H.264 transport stream, in place."""
    with av.open(io.BytesIO(path.read_bytes())) as source, av.open(str(path), "w") as target:
        video = target.add_stream_from_template(source.streams.video[0])
        edit = av.bitstream.BitStreamFilterContext(f"h264_metadata={message}", source.streams.video[0])
        for packet in source.demux(video=0):
            for edited in edit.filter(packet) if packet.size else ():
                edited.stream = video
                target.mux(edited)


def test_an_orientation_in_the_stream_counts_in_every_container(tmp_path):
    path = encode(tmp_path / "v.ts", images=pictures(1))
    with_message(path, "display_orientation=insert:flip=horizontal")
    (frame,) = iter_frames(path)
    assert np.abs(frame.astype(int) - pictures(1)[0][:, ::-1]).mean() < 8
    assert_as_ffmpeg_shows(path)


def test_what_changes_its_size_or_turns_meanwhile_keeps_the_first_size(tmp_path):
    small = encode(tmp_path / "small.ts", options={"g": "3"}).read_bytes()
    large = encode(tmp_path / "large.ts", images=pictures(6, 64, 64), options={"g": "3"}).read_bytes()
    quarter = encode(tmp_path / "quarter.ts")
    with_message(quarter, "display_orientation=insert:rotate=90")
    for number, data in enumerate((small + large, large + small, small + quarter.read_bytes())):
        path = tmp_path / f"{number}.ts"
        path.write_bytes(data)
        assert probe_video(path).num_frames == 12
        assert_as_ffmpeg_shows(path, times=False)


def mux(path, *streams, muxer=None) -> None:
    """A file of several videos; each stream is (codec, pix_fmt, images, disposition)."""
    with av.open(str(path), "w", format=muxer) as container:
        made = []
        for codec, pix_fmt, images, disposition in streams:
            stream = container.add_stream(codec, rate=20)
            stream.height, stream.width = images[0].shape[:2]
            stream.pix_fmt = pix_fmt
            stream.disposition = disposition
            made.append((stream, images))
        for stream, images in made:
            for image in images:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=stream.pix_fmt)))
            container.mux(stream.encode())


NONE, DEFAULT, ATTACHED = av.stream.Disposition(0), av.stream.Disposition.default, av.stream.Disposition.attached_pic
COVER = [np.full((90, 90, 3), (200, 30, 30), np.uint8)]


@pytest.mark.parametrize(("name", "streams"), [
    ("cover_first.mp4", [("mjpeg", "yuvj420p", COVER, ATTACHED), ("libx264", "yuv420p", pictures(6), DEFAULT)]),
    ("cover_last.mp4", [("libx264", "yuv420p", pictures(6), DEFAULT), ("mjpeg", "yuvj420p", COVER, ATTACHED)]),
    ("default_is_second.mkv", [
        ("libx264", "yuv420p", pictures(3, 64, 48), NONE), ("libx264", "yuv420p", pictures(6), DEFAULT),
    ]),
    ("largest.mkv", [("libx264", "yuv420p", pictures(3, 32, 16), NONE), ("libx264", "yuv420p", pictures(6), NONE)]),
    ("largest.ts", [("mpeg2video", "yuv420p", pictures(3, 32, 16), NONE), ("libx264", "yuv420p", pictures(6), NONE)]),
    ("picture_track.mp4", [("mjpeg", "yuvj420p", COVER, NONE), ("libx264", "yuv420p", pictures(6), DEFAULT)]),
])  # fmt: skip
def test_the_stream_that_players_show(tmp_path, name, streams):
    path = tmp_path / name
    mux(path, *streams)
    info = probe_video(path)
    assert (info.num_frames, info.width, info.height) == (6, 48, 32)
    assert_as_ffmpeg_shows(path, times=False)
    assert why_not_nvdec(path, 6, (32, 48)) == "with several streams of pictures"


def test_a_cover_picture_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "song.m4a"), "w", format="mp4") as container:
        cover = container.add_stream("mjpeg", rate=20)
        cover.width, cover.height, cover.pix_fmt, cover.disposition = 90, 90, "yuvj420p", ATTACHED
        sound = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(cover.encode(av.VideoFrame.from_ndarray(COVER[0], "rgb24").reformat(format="yuvj420p")))
        container.mux(sound.encode(silence))
        container.mux(sound.encode())
    with pytest.raises(VideoError, match="it holds a cover picture, but no video stream"):
        probe_video(tmp_path / "song.m4a")
    with pytest.raises(VideoError, match="not a video format that is read here"):
        probe_video(encode_jpeg(COVER[0], None, None))


RED, GREEN = (np.full((32, 48, 3), colour, np.uint8) for colour in ((220, 20, 20), (20, 200, 20)))


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv", "v.ts", "v.flv", "v.webm"])
def test_a_frame_is_shown_until_the_next_one(tmp_path, name):
    """Red until 9.0 s, in nine frames of the first 0.9 s; then green."""
    codec = "libvpx" if name == "v.webm" else "libx264"
    path = encode(tmp_path / name, codec, images=[RED] * 9 + [GREEN], times=[k / 10 for k in range(9)] + [9.0], rate=10)
    info = probe_video(path)
    assert_as_ffmpeg_shows(path)
    assert info.duration == pytest.approx(9.1, abs=0.02)
    assert info.fps == pytest.approx(10 / 9.1, abs=0.01)
    assert frames_at_rate(info.times_N, info.duration, 1).tolist() == [0, *[8] * 8]
    assert set(info.shown(0, 4).tolist()) == set(range(9)) and set(info.shown(5, 9).tolist()) == {8}
    assert info.shown(8.1, 9.1).tolist() == [8] * 9 + [9]
    assert info.shown(9.0, 9.1).tolist() == [9]


def test_the_last_frame_that_is_not_later():
    rng = np.random.default_rng(0)
    for _ in range(50):
        times = np.cumsum(rng.random(20)) - 0.1
        times -= times[0]
        wanted = rng.random(30) * 12
        expected = [max(k for k in range(20) if times[k] <= second + 0.0005) for second in wanted]
        assert frames_at(times, wanted).tolist() == expected
    milliseconds = np.round(np.arange(90) / 30, 3)  # as Matroska has them
    assert frames_at(milliseconds, np.arange(45) / 15).tolist() == list(range(0, 90, 2))


def joined(tmp_path, name: str, codec: str, *, seconds: tuple[float, ...] = (0.0, 0.0), count: int = 20):
    """Recordings of `count` frames at 20/s one after another in one file; the clock starts at `seconds` in each."""
    path, data = tmp_path / name, b""
    for number, begin in enumerate(seconds):
        part = tmp_path / f"{number}-{name}"
        images = pictures(count * len(seconds))[number * count : (number + 1) * count]
        encode(part, codec, images=images, times=[begin + k / 20 for k in range(count)], options={"g": "10", "bf": "2"})
        data += part.read_bytes()
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("name", "codec", "seconds"), [
    ("reset.ts", "libx264", (0, 0)),
    ("reset.m2ts", "libx264", (0, 0)),
    ("reset.vob", "mpeg2video", (0, 0)),
    ("earlier.ts", "libx264", (500, 3)),
    ("overlaps.ts", "libx264", (1, 1.125)),
    ("a_day_later.ts", "libx264", (0, 80_000)),
    ("three.ts", "mpeg2video", (0, 100, 0)),
    ("wraps.ts", "libx264", (95_442.0,)),
])  # fmt: skip
def test_clocks_that_jump(tmp_path, name, codec, seconds):
    path = joined(tmp_path, name, codec, seconds=seconds)
    count, info = 20 * len(seconds), probe_video(path)
    assert (info.num_frames, info.fps) == (count, pytest.approx(20, abs=0.01))
    assert info.duration == pytest.approx(count / 20, abs=0.001)
    assert (np.diff(info.times_N) > 0).all()
    np.testing.assert_allclose(info.times_N, np.arange(count) / 20, atol=0.001)
    assert frames_at_rate(info.times_N, info.duration, 5).tolist() == list(range(0, count, 4))
    assert_as_ffmpeg_shows(path, times=False)
    frames, reader = list(iter_frames(path)), FrameReader(path, num_frames=count)
    for wanted in ([count - 1], [0], [count // 2, 3], [3, count - 3]):
        for number, frame in zip(wanted, reader.read(wanted), strict=True):
            np.testing.assert_array_equal(frame, frames[number])
    assert why_not_nvdec(path, count, (32, 48)) is not None


def test_a_long_silence_is_a_frame_that_stands_still_but_not_in_a_broadcast(tmp_path):
    times = [0, 0.05, 0.1, 60, 60.05]
    assert probe_video(encode(tmp_path / "v.mp4", images=pictures(5), times=times)).duration == pytest.approx(60.1)
    assert probe_video(encode(tmp_path / "v.ts", images=pictures(5), times=times)).duration == pytest.approx(0.25)
    forty_hours = encode(tmp_path / "v.mkv", images=pictures(4), times=[0, 0.05, 144_000, 144_000.05])
    assert probe_video(forty_hours).duration == pytest.approx(0.2, abs=0.002)


@pytest.mark.parametrize(("stamps", "expected"), [
    ([0, 1, 2, 3], [0, 1, 2, 3]),
    ([-5, -4, -3], [0, 1, 2]),
    ([7, None, 9, None], [0, 1, 2, 3]),
    ([None, 4, 5], [0, 1, 2]),
    ([None, None], [0, 1]),
    ([0, 1, 3, 2, 4, 5], [0, 1, 3, 3.5, 4, 5]),  # out of order
    ([0, 1, 1, 2], [0, 1, 1.5, 2]),
    ([8, 9, 0, 1], [0, 1, 2, 3]),  # reset at the end
    ([8, 9, *range(20)], range(22)),
    ([0, 1, *range(1000, 1020)], range(22)),  # ahead
    ([5, 5, 5], [0, 1, 2]),
])  # fmt: skip
def test_times_from_stamps(stamps, expected):
    from shards.video import _continuous

    np.testing.assert_allclose(_continuous(stamps, 1.0, 100.0), expected)


def test_an_edit_list_cuts_the_beginning(tmp_path):
    whole = encode(tmp_path / "whole.mp4", images=pictures(20), options={"g": "20", "bf": "2"})
    with (
        av.open(str(whole)) as source,
        av.open(str(tmp_path / "cut.mp4"), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.pts -= 7 * packet.time_base.denominator // 20
                packet.dts -= 7 * packet.time_base.denominator // 20
                packet.stream = stream
                target.mux(packet)
    info = probe_video(tmp_path / "cut.mp4")
    assert (info.num_frames, info.duration) == (13, pytest.approx(0.65))
    for frame, image in zip(iter_frames(tmp_path / "cut.mp4"), pictures(20)[7:], strict=True):
        assert np.abs(frame.astype(int) - image).mean() < 4
    assert_as_ffmpeg_shows(tmp_path / "cut.mp4")
    assert (
        why_not_nvdec(tmp_path / "cut.mp4", 13, (32, 48))
        == "with an edit list, or whose packets do not tell the frames"
    )


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video"])
def test_a_recording_that_begins_between_key_frames(tmp_path, codec):
    options = {"libx265": {"x265-params": "log-level=none:keyint=10:min-keyint=10"}}.get(codec, {"g": "10", "bf": "2"})
    path = encode(tmp_path / "v.ts", codec, images=pictures(30, 96, 64), options=options)
    data = path.read_bytes()
    pictures_at = [
        at for at in range(0, len(data), 188) if data[at + 1] & 0x40 and data[at + 5] and data[at + 1] & 0x1F
    ]
    cut = tmp_path / "cut.ts"
    cut.write_bytes(data[: 188 * 3] + data[pictures_at[5] :])
    frames = list(iter_frames(cut))
    assert 15 <= len(frames) < 30
    np.testing.assert_array_equal(frames[-10:], list(iter_frames(path))[-10:])
    if codec != "libx265":  # older ones show grey pictures until the key frame
        assert_as_ffmpeg_shows(cut, times=False)


def test_files_that_end_early_or_hold_nothing(tmp_path):
    ts = encode(tmp_path / "v.ts", images=pictures(30), options={"g": "10"}).read_bytes()
    assert 5 < probe_video(ts[: len(ts) // 2]).num_frames < 30
    fast = encode(tmp_path / "v.mov", "mjpeg", "yuvj420p", images=pictures(30))
    with (
        av.open(str(fast)) as source,
        av.open(str(tmp_path / "f.mp4"), "w", options={"movflags": "faststart"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    data = (tmp_path / "f.mp4").read_bytes()
    for read in (probe_video, lambda source: list(iter_frames(source))):
        with pytest.raises(VideoError, match="it does not decode"):
            read(data[: len(data) * 3 // 4])
    with av.open(str(tmp_path / "empty.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=20)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoError, match=r"holds no frame that decodes|does not decode"):
        probe_video(tmp_path / "empty.mkv")


def test_playlists_and_pictures_are_no_videos(tmp_path):
    animated = io.BytesIO()
    first, *others = (PIL.Image.fromarray(image) for image in pictures(3))
    first.save(animated, "WEBP", save_all=True, append_images=others)
    for data in (encode_jpeg(RED, None, None), animated.getvalue(), b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"):
        with pytest.raises(VideoError, match=r"not a video format that is read|it does not decode"):
            probe_video(data)


def test_what_nvidias_decoder_shows_otherwise_is_not_given_to_it(tmp_path):
    def reason(name: str, *arguments, count: int = 6, size=(32, 48), **options) -> str | None:
        return why_not_nvdec(encode(tmp_path / name, *arguments, **options), count, size)

    assert reason("v.mp4", options={"bf": "2"}) is None
    assert reason("v.mkv", colorspace=5, color_range=1) is None
    assert reason("v9.webm", "libvpx-vp9") is None
    silent = {"x265-params": "log-level=none"}
    assert reason("x265.mp4", "libx265", images=pictures(6, 96, 64), options=silent, size=(64, 96)) is None
    assert reason("count.mp4", count=7) == "of another length than the index says"
    assert reason("size.mp4", size=(32, 50)) == "of another size than the index says"
    for kind, (matrix, _) in ORIENTATIONS.items():
        assert reason("turned.mp4", matrix=matrix) == (None if kind == "as it is" else "that are turned or mirrored")
    for options in ({"colorspace": 1, "color_range": 1}, {"color_range": 2}, {"pix_fmt": "yuvj420p"}):
        assert "other colours" in reason("colours.mp4", **options)
    for pix_fmt in ("yuv422p", "yuv444p", "yuv420p10le"):
        assert "not in 8 bits 4:2:0" in reason("v.mp4", "libx264", pix_fmt)
    odd = pictures(6, 47, 32)
    assert "with even sides" in reason("odd.webm", "libvpx-vp9", images=odd, size=(32, 47))
    assert reason("old.mpg", "mpeg2video", options={"flags": "+ildct+ilme"}) == "in mpeg2video"
    assert reason("fields.mkv", options={"x264-params": "interlaced=1"}) == "of interlaced pictures"
    assert reason("mjpeg.avi", "mjpeg", "yuvj420p") == "in mjpeg"
    assert reason("v.avi", "mpeg4") == "with an edit list, or whose packets do not tell the frames"
    assert reason("v.ts") == "in a transport or program stream"
    assert why_not_nvdec(b"no video at all" * 99, 6, (32, 48)) == "that are damaged"
