"""One video, one picture: building, training, evaluating, predicting and the ONNX program see the same pixels."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from videos import ORIENTATIONS, encode, pictures

from shards.annotations import parse_annotations
from shards.checker import check_datasets
from shards.extraction import extract_frames
from shards.images import plain_image, read_image
from shards.reader import open_dataset
from shards.video import iter_frames
from shards.writer import build_shards
from text4vis.config.loading import config_from_dict
from text4vis.data import dali
from text4vis.data.gpu_decoding import GpuDecoder, VideoChoice
from text4vis.data.loader import build_loader
from text4vis.data.plan import Planner
from text4vis.data.reading import PlanReader
from text4vis.serving import standalone
from text4vis.serving.exporting import preprocessing
from text4vis.serving.footage import Sampler
from text4vis.serving.predictor import Predictor

T, S = 3, 32
X265 = {"x265-params": "log-level=none"}
GREY = (np.arange(48 * 64).reshape(48, 64) * 21).astype(">u2")


def write_all(folder) -> list[str]:
    """Videos of which each is seen wrongly by somebody."""
    folder.mkdir(exist_ok=True)
    for number, (matrix, _) in enumerate(ORIENTATIONS.values()):
        encode(folder / f"turned{number}.mp4", matrix=matrix)
    encode(folder / "bt709.mp4", colorspace=1, color_range=1)
    encode(folder / "full.mp4", "libx264", "yuvj420p")
    encode(folder / "ten_bits.mkv", "libx265", "yuv420p10le", images=pictures(6, 96, 64), options=X265)
    encode(folder / "still.mp4", times=[0, 0.1, 0.2, 0.3, 0.4, 9], options={"bf": "2"})
    encode(folder / "fields.mkv", options={"x264-params": "interlaced=1"})
    return sorted(path.name for path in folder.iterdir())


def config_of(folder, **data):
    base = {"val": [str(folder)], "num_segments": T, "input_size": S, "scale_size": S, "batch_size": 4, "workers": 2}
    return config_from_dict({"data": base | data}, "test")


def evaluated(folder, **data) -> dict[str, np.ndarray]:
    """Frames (T, S, S, 3) of each video."""
    with build_loader(config_of(folder, **data), "val") as batches:
        return {
            batches.dataset.name(int(i)): frames[0].permute(0, 2, 3, 1).numpy()
            for batch in batches
            for i, frames in zip(batch.ids, batch.frames, strict=True)
        }


@pytest.fixture(scope="module")
def recogniser():
    return Predictor(torch.nn.Linear(1, 1), config_of("nowhere"), ["a"], torch.zeros(1, 1))


def test_videos_are_seen_alike(tmp_path, recogniser):
    names = write_all(tmp_path / "videos")
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    listed = parse_annotations(tmp_path / "list.txt")
    build = {"root": tmp_path / "videos", "labels": ["a"]}
    build_shards(listed, output=tmp_path / "stored", store="video", **build)
    build_shards(listed, output=tmp_path / "frames", quality=100, **build)
    extract_frames(listed, root=tmp_path / "videos", output=tmp_path / "folders", quality=100)
    assert check_datasets([tmp_path / "stored"], deep=True).sound
    stored, frames = evaluated(tmp_path / "stored"), evaluated(tmp_path / "frames")
    rule, sampler = preprocessing(recogniser.config), Sampler(recogniser.config)
    for name in names:
        _, predicted = sampler.sample(tmp_path / "videos" / name)
        np.testing.assert_array_equal(stored[name], predicted, err_msg=name)
        onnx = standalone.read_frames(str(tmp_path / "videos" / name), rule).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(onnx, predicted, err_msg=name)
        assert np.abs(frames[name].astype(int) - predicted).mean() < 2, name
        _, extracted = sampler.sample(tmp_path / "folders" / name.rsplit(".", 1)[0])
        np.testing.assert_array_equal(extracted, frames[name], err_msg=name)
    assert len({stored[f"turned{number}.mp4"].tobytes() for number in range(8)}) == 8


def test_on_a_gpu_pyav_decodes_what_dali_would_show_otherwise(tmp_path, monkeypatch):
    """The GPU's decoder, whose graphs are not built: none of these videos is for them."""
    names = [name for name in write_all(tmp_path / "videos") if name not in ("turned0.mp4", "still.mp4")]
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    build_shards(
        parse_annotations(tmp_path / "list.txt"), root=tmp_path / "videos", labels=["a"], output=tmp_path / "stored",
        store="video",
    )  # fmt: skip
    expected = evaluated(tmp_path / "stored")
    monkeypatch.setattr(dali, "video_graph", lambda *_, **__: pytest.fail("a graph was built"))
    dataset = open_dataset([str(tmp_path / "stored")])
    planner = Planner(config_of(tmp_path / "stored"), "val", dataset, 0, 1)
    with ThreadPoolExecutor(1) as threads, dataset:
        decoder = GpuDecoder(planner, threads, VideoChoice(dataset), device_id=0, num_threads=1)
        for picked in planner.batches():
            batch = decoder.finish(decoder.start(PlanReader(dataset, planner, threads).read(picked)))
            for plan, frames_VTSS3 in zip(batch.videos, batch.frames(torch.device("cpu")), strict=True):
                np.testing.assert_array_equal(frames_VTSS3[0].numpy(), expected[dataset.name(plan.sample)])


def png(depth: int, colour: int, rows: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of 64 x 48 pixels from its rows of bytes; Pillow does not write all kinds."""
    header = struct.pack(">IIBBBBB", 64, 48, depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in ((b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data


def bmp(bits: int, compression: int, rows: np.ndarray, *masks: int) -> bytes:
    """A BMP of 64 x 48 pixels from its rows of bytes."""
    header = struct.pack("<IiiHHIIiiII", 40, 64, 48, 1, bits, compression, rows.size, 0, 0, 0, 0)
    header += struct.pack(f"<{len(masks)}I", *masks)
    begin = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", begin + rows.size, 0, 0, begin) + header + rows.tobytes()


def saved(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


NOISE = np.random.default_rng(0)
RGB16, GREY_ALPHA16 = (NOISE.integers(0, 65536, (48, 64, channels)).astype(">u2") for channels in (3, 2))
RGBA16 = NOISE.integers(0, 65536, (48, 64, 4)).astype(">u2")
BITS = NOISE.integers(0, 256, (48, 32), dtype=np.uint8)
PICTURE = Image.fromarray(pictures(1, 64, 48)[0])
ALPHA = Image.fromarray((GREY >> 8).astype(np.uint8))
# The bytes, and the pixels where Pillow is not asked: the upper eight of sixteen bits.
IMAGES = {
    "grey16": (png(16, 0, GREY), np.repeat((GREY >> 8)[..., None], 3, 2)),
    "transparent_grey16": (
        png(16, 0, GREY, (b"tRNS", struct.pack(">H", 500))), np.repeat((GREY >> 8)[..., None], 3, 2),
    ),
    "grey_alpha16": (png(16, 4, GREY_ALPHA16), np.repeat(GREY_ALPHA16[..., :1] >> 8, 3, 2)),
    "rgb16": (png(16, 2, RGB16), RGB16 >> 8),
    "rgba16": (png(16, 6, RGBA16), RGBA16[..., :3] >> 8),
    "gamma": (png(8, 2, (RGB16 >> 8).astype(np.uint8), (b"gAMA", struct.pack(">I", 100_000))), RGB16 >> 8),
    "grey1": (png(1, 0, BITS[:, :8]), None),
    "grey2": (png(2, 0, BITS[:, :16]), None),
    "grey4": (png(4, 0, BITS), None),
    "palette_with_transparency": (saved(PICTURE.quantize(16), transparency=bytes(range(0, 256, 16))), None),
    "grey_alpha": (saved(Image.merge("LA", (PICTURE.convert("L"), ALPHA))), None),
    "rgba": (saved(Image.merge("RGBA", (*PICTURE.split(), ALPHA))), np.asarray(PICTURE)),
    "rgba_webp": (saved(Image.merge("RGBA", (*PICTURE.split(), ALPHA)), "WEBP", lossless=True, exact=True),
                  np.asarray(PICTURE)),
    "animated_png": (saved(PICTURE, save_all=True, append_images=[PICTURE.rotate(180)]), np.asarray(PICTURE)),
    "cmyk": (saved(PICTURE.convert("CMYK"), "JPEG"), None),
    "rgb_jpeg": (saved(PICTURE, "JPEG", keep_rgb=True), None),
    "palette_bmp": (saved(PICTURE.quantize(16), "BMP"), None),
    "bmp": (saved(PICTURE, "BMP"), np.asarray(PICTURE)),
    "bmp_555": (bmp(16, 0, BITS.repeat(4, 1)), None),
    "bmp_565": (bmp(16, 3, BITS.repeat(4, 1), 0xF800, 0x07E0, 0x001F), None),
    "bmp_of_32_bits": (bmp(32, 0, NOISE.integers(0, 256, (48, 256), dtype=np.uint8)), None),
}  # fmt: skip


def test_images_are_seen_alike(tmp_path, recogniser):
    recogniser.config = config_of("nowhere", scale_size=48, input_size=48)
    for name, (data, _) in IMAGES.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "img_00001.jpg").write_bytes(data)
    (tmp_path / "list.txt").write_text("".join(f"{name} 1 0\n" for name in IMAGES))
    listed, build = parse_annotations(tmp_path / "list.txt"), {"root": tmp_path / "images", "labels": ["a"]}
    build_shards(listed, output=tmp_path / "as_they_are", **build)
    build_shards(listed, output=tmp_path / "encoded", quality=100, **build)
    one = {"scale_size": 48, "input_size": 48, "num_segments": 1}
    loaded, encoded = evaluated(tmp_path / "as_they_are", **one), evaluated(tmp_path / "encoded", **one)
    for name, (data, pixels) in IMAGES.items():
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB") if pixels is None else pixels)
        np.testing.assert_array_equal(np.asarray(read_image(data)), expected, err_msg=name)
        _, predicted = Sampler(recogniser.config).sample(tmp_path / "images" / name)
        np.testing.assert_array_equal(predicted[0], expected[:, 8:56], err_msg=name)
        np.testing.assert_array_equal(loaded[name][0], expected[:, 8:56], err_msg=name)
        smooth = "16" not in name and name != "gamma" and not name.startswith("bmp_")
        assert not smooth or np.abs(encoded[name][0].astype(int) - expected[:, 8:56]).mean() < 25, name
    assert np.abs(encoded["grey16"][0].astype(int) - (GREY >> 8)[:, 8:56, None]).mean() < 12


def test_what_decoders_show_differently_is_made_plain_before_they_see_it():
    for name, (data, _) in IMAGES.items():
        plain = plain_image(data)
        assert (plain is data) == ("16" not in name and ("bmp" not in name or name == "bmp")), name
        np.testing.assert_array_equal(np.asarray(read_image(plain)), np.asarray(read_image(data)), err_msg=name)


@pytest.mark.parametrize("image", [
    Image.fromarray(np.zeros((48, 64), np.float32)), Image.fromarray(GREY.astype(np.int32)), PICTURE,
])  # fmt: skip
def test_other_formats_are_refused_by_builder_and_predictor(tmp_path, recogniser, image):
    """A TIFF of any mode under a name that is usual."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "img_00001.jpg").write_bytes(saved(image, "TIFF"))
    (tmp_path / "list.txt").write_text("a 1 0\n")
    with pytest.raises(Exception, match="no JPEG, PNG, WebP or BMP image"):
        build_shards(parse_annotations(tmp_path / "list.txt"), root=tmp_path, labels=["a"], output=tmp_path / "out")
    with pytest.raises(Exception, match="no JPEG, PNG, WebP or BMP image"):
        Sampler(recogniser.config).sample(tmp_path / "a")


def test_windows_of_a_timeline_show_what_is_on_the_screen(tmp_path, recogniser, monkeypatch):
    """Red until 9 s, then green: no window before sees green."""
    recogniser.config = config_of("nowhere")
    red, green = (np.full((32, 48, 3), colour, np.uint8) for colour in ((220, 20, 20), (20, 200, 20)))
    path = encode(tmp_path / "v.mp4", images=[red] * 9 + [green], times=[k / 10 for k in range(9)] + [9.0], rate=10)
    seen = []
    recogniser.model.takes_fixed_frames = True  # so that it gets the frames of a window together
    keep = lambda frames: seen.extend(frames.movedim(-3, -1).numpy()) or np.zeros((len(frames), 1))  # noqa: E731
    monkeypatch.setattr(recogniser, "_embed", keep)
    monkeypatch.setattr(recogniser, "_scores", lambda embeddings, _: embeddings)
    timeline = recogniser.scan(path, window_seconds=2)
    assert timeline.seconds_W2[-1].tolist() == pytest.approx([7.1, 9.1])
    greens = np.array([[frame[..., 1].mean() > frame[..., 0].mean() for frame in frames] for frames in seen])
    assert len(timeline.scores_WC) == 9 and len(seen) == 2 and not greens.any(), "windows of the same frames are one"
    assert recogniser.scan(path, window_seconds=0.1, step_seconds=4.5).seconds_W2[-1].tolist() == pytest.approx(
        [9, 9.1]
    )
    assert len(list(iter_frames(path))) == 10 and np.mean(seen[-1][0][..., 1]) > 150
