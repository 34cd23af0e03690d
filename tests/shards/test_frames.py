"""Every kind of frame from the folder to the batch: what Pillow shows, or an error that names the frame."""

import io

import numpy as np
import pytest
from frame_folders import jpeg
from PIL import Image

from shards.annotations import parse_annotations
from shards.checker import check_datasets
from shards.format import ShardError
from shards.images import MAX_FRAME_PIXELS, check_decodes
from shards.writer import build_shards
from text4vis.config.loading import config_from_dict
from text4vis.data.augmentation import scaled_size
from text4vis.data.loader import build_loader

SIDE = 32


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(width: int = 48, height: int = SIDE, mode: str = "RGB") -> Image.Image:
    return (
        Image.open(io.BytesIO(jpeg(width + height, max(8, width), max(8, height))))
        .resize((width, height))
        .convert(mode)
    )


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def png_that_claims(width: int, height: int) -> bytes:
    data = encoded(picture(), "PNG")
    return data[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 320, 3), dtype=np.uint8))
LONG = encoded(NOISE, quality=90)
GOOD = {
    "grey": [encoded(picture(mode="L"))],
    "CMYK": [encoded(picture(mode="CMYK"))],
    "progressive": [encoded(picture(), progressive=True)],
    "turned by EXIF": [encoded(picture(), exif=turned())],
    "PNG": [encoded(picture(), "PNG")],
    "PNG with alpha": [encoded(picture(mode="RGBA"), "PNG")],
    "PNG with a palette": [encoded(picture().quantize(16), "PNG")],
    "black and white PNG": [encoded(picture(mode="1"), "PNG")],
    "WebP": [encoded(picture(), "WEBP")],
    "WebP without loss": [encoded(picture(), "WEBP", lossless=True)],
    "BMP": [encoded(picture(), "BMP")],
    "1x1": [encoded(picture(1, 1))],
    "one column": [encoded(picture(1, 300))],
    "wide": [encoded(picture(2000, 40))],
    "65,500 wide": [encoded(picture(65_500, 8))],
    "65,500 high": [encoded(picture(8, 65_500))],
    "mixed sizes": [
        encoded(picture(48, 32)),
        encoded(picture(32, 90)),
        encoded(picture(64, 64), "PNG"),
        jpeg(3, 40, 40),
    ],
    "bytes behind the end": [jpeg(1) + b"\0\0 left by the camera"],
}
# Bytes of the frame, and what the builder says of it.
REFUSED = {
    "empty": (b"", "the file is empty"),
    "no image": (b"<html>404</html>", "no JPEG, PNG, WebP or BMP image"),
    "cut in the middle": (LONG[: len(LONG) // 2], "the JPEG is cut off: it has no end marker"),
    "WebP that is cut": (encoded(NOISE, "WEBP")[:-50], "the WebP is cut off"),
    "claims more than Pillow decodes": (png_that_claims(60_000, 60_000), "the limits are"),
    "claims more than a stored frame may have": (png_that_claims(8_000, 8_000), f"{MAX_FRAME_PIXELS} is the limit"),
}
# Bytes that pass the builder, which looks at header and end, and what the loader says of them.
UNDECODABLE = {
    "PNG of spoilt pixels": (
        encoded(NOISE, "PNG")[:9000] + bytes(90) + encoded(NOISE, "PNG")[9090:],
        "does not decode",
    ),
    "PNG that claims another size": (png_that_claims(4_000, 4_000), "does not decode"),
    "too long when scaled": (encoded(picture(65_500, 1)), "2096000x32 when scaled"),
}


def build(base, videos: dict[str, list[bytes]], **options):
    """A data set of these videos, kinds with underscores as names."""
    lines = []
    for kind, frames in videos.items():
        name = kind.replace(" ", "_")
        (base / "frames" / name).mkdir(parents=True)
        for number, data in enumerate(frames, start=1):
            (base / "frames" / name / f"img_{number:05d}.jpg").write_bytes(data)
        lines.append(f"{name} {len(frames)} 0\n")
    (base / "list.txt").write_text("".join(lines))
    annotations = parse_annotations(base / "list.txt")
    build_shards(annotations, root=base / "frames", labels=["a"], output=base / "shards", **options)
    return base / "shards"


def shown(folder, **data) -> dict[str, np.ndarray]:
    """Frames (T, S, S, 3) of each video that evaluation sees, by kind."""
    base = {"val": [str(folder)], "num_segments": 4, "input_size": SIDE, "scale_size": SIDE, "batch_size": 4}
    with build_loader(
        config_from_dict({"data": base | {"workers": 1, "max_bad_share": 0.9} | data}, "test"), "val"
    ) as loader:
        return {
            loader.dataset.name(int(i)).replace("_", " "): frames[0].permute(0, 2, 3, 1).numpy()
            for batch in loader
            for i, frames in zip(batch.ids, batch.frames, strict=True)
        }


def as_pillow_shows(data: bytes) -> np.ndarray:
    """The centre crop of the frame, its short side scaled to the crop's."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    height, width = scaled_size(image.height, image.width, SIDE)
    image = image.resize((width, height), Image.Resampling.BICUBIC) if (width, height) != image.size else image
    top, left = round((height - SIDE) / 2), round((width - SIDE) / 2)
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = build(tmp_path_factory.mktemp("good"), GOOD)
    return folder, shown(folder)


@pytest.mark.parametrize("kind", GOOD)
def test_a_frame_is_what_pillow_shows(good, kind):
    frames = GOOD[kind]
    for t, pixels in enumerate(good[1][kind]):
        np.testing.assert_array_equal(pixels, as_pillow_shows(frames[t * len(frames) // 4]))


def test_all_kinds_are_sound_and_train(good):
    """Random crops of the extreme shapes too, and RandAugment, which decodes whole frames."""
    assert check_datasets([good[0]], deep=True).sound
    for preset in ("released", "paper", "something"):
        data = {"train": [str(good[0])], "num_segments": 2, "input_size": SIDE, "batch_size": 6, "augmentation": preset}
        with build_loader(
            config_from_dict({"data": data | {"scale_size": SIDE, "flip_swaps": []}}, "test"), "train"
        ) as loader:
            batches = iter(loader)
            assert all(next(batches).frames.shape == (6, 1, 2, 3, SIDE, SIDE) for _ in range(3))


@pytest.mark.parametrize("kind", REFUSED)
def test_the_builder_refuses(tmp_path, kind):
    data, words = REFUSED[kind]
    videos = {"sound": [jpeg(0), jpeg(1)], "bad": [jpeg(2), data]}
    with pytest.raises(ShardError, match=r"bad/img_00002\.jpg") as caught:
        build(tmp_path / "fail", videos)
    assert words in str(caught.value)
    build(tmp_path / "skip", videos, on_error="skip")
    assert list(shown(tmp_path / "skip" / "shards")) == ["sound"]


@pytest.mark.parametrize("kind", UNDECODABLE)
def test_the_loader_refuses_or_skips(tmp_path, kind):
    data, words = UNDECODABLE[kind]
    folder = build(tmp_path, {"sound": [jpeg(0), jpeg(1)], "bad": [jpeg(2), data], "also sound": [jpeg(3)]})
    with pytest.raises(ShardError, match="frame 1 ") as caught:
        shown(folder)
    assert words in str(caught.value) and str(caught.value).startswith("bad (sample ")
    left = shown(folder, on_error="skip")
    assert sorted(left) == ["also sound", "sound"]
    np.testing.assert_array_equal(left["sound"][-1], as_pillow_shows(jpeg(1)))


@pytest.mark.parametrize("end", [len(LONG) // 2, len(LONG) - 30])
def test_a_jpeg_whose_end_was_put_on_too_early_is_found_by_a_deep_check(tmp_path, end):
    """Decoders fill the rest with grey, Pillow and DALI alike; only looking for it tells."""
    data = LONG[:end] + b"\xff\xd9"
    folder = build(tmp_path, {"a": [data]})
    np.testing.assert_array_equal(shown(folder)["a"][0], as_pillow_shows(data))
    assert check_datasets([folder]).sound
    report = check_datasets([folder], deep=True)
    assert ".000000.jpg: the image does not decode (Corrupt JPEG data: premature end" in report.datasets[0].problems[0]
    check_decodes(LONG[:-2] + bytes(9) + LONG[-2:])  # bytes too many, as some cameras write


def test_large_frames_are_stored_small(tmp_path):
    """What is too large to store is not too large to read once."""
    large = encoded(Image.new("RGB", (6000, 6000), (9, 90, 200)), "PNG", compress_level=1)
    with pytest.raises(
        ShardError, match=r"6000x6000 pixels, 33554432 is the limit of a stored frame; add --short-side"
    ):
        build(tmp_path / "large", {"a": [large]})
    small = shown(build(tmp_path / "small", {"a": [large]}, short_side=40))
    assert small["a"].shape == (4, SIDE, SIDE, 3) and np.abs(small["a"][0, 0, 0] - [9.0, 90, 200]).max() < 4
