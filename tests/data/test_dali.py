"""The graphs: the pixels of a GPU's graph, run here on the CPU, beside the CPU's way and Pillow; and that it exists."""

import io

import numpy as np
import pytest
from frame_folders import jpeg
from PIL import Image
from sklearn.datasets import load_sample_image
from videos import encode, pictures

from shards.images import plain_image
from shards.video import iter_frames
from text4vis.config.schema import DataConfig
from text4vis.data import dali
from text4vis.data.augmentation import Crop, Geometry, draw, eval_geometry, generator, train_geometry
from text4vis.data.dali import Steps, dense_outputs, outputs, region_graph, start_regions, start_views, view_graph
from text4vis.data.finishing import place

FLOWER = Image.fromarray(load_sample_image("flower.jpg")).resize((340, 256))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 61, 3), dtype=np.uint8))
ALL = {"flip": True, "grey": True, "blur": True, "solarize": True}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def views(steps: Steps, files: list[bytes], geometries: list[Geometry]) -> np.ndarray:
    """(F, K, S, S, 3) of a GPU's graph."""
    graph = view_graph(steps, device_id=None, num_threads=1, batch_size=len(files))
    start_views(graph, steps, files, geometries)
    (dense,) = dense_outputs(graph)  # one tensor, whatever the frames' sizes
    return np.asarray(dense)


def placed(image: Image.Image, geometry: Geometry, side: int) -> np.ndarray:
    """(K, S, S, 3) of the CPU's way."""
    top, left, height, width = geometry.region
    out = np.full((1, len(geometry.crops), side, side, 3), 77, np.uint8)
    region = np.asarray(image.convert("RGB"))[top : top + height, left : left + width]
    place(region, geometry, [(0, c, c) for c in range(len(geometry.crops))], out)
    return out[0]


def difference(ours, theirs) -> tuple[float, int]:
    """Mean and largest, of 255."""
    off = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs))
    return float(off.mean()), int(off.max())


@pytest.mark.parametrize(("steps", "kwargs"), [
    (Steps(224, 1, "fast", **ALL), {}), (Steps(224, 10, "bicubic", flip=True), {}), (Steps(64, 3, "bilinear"), {}),
])  # fmt: skip
def test_the_graphs_are_defined_for_a_gpu(steps, kwargs):
    """Which checks every operator's arguments; building needs a GPU."""
    for graph in (dali.view_graph, dali.video_graph):
        assert graph(steps, device_id=0, num_threads=2, batch_size=8).device_id == 0


def test_decoding_a_region_is_cutting_it_out_of_the_whole_frame():
    """To the bit: so a GPU decodes whole frames, and passes by the fault of its region decoder."""
    rng = np.random.default_rng(0)
    for options in ({"subsampling": 0}, {"subsampling": 2}, {"subsampling": 2, "progressive": True}):
        data = encoded(FLOWER, "JPEG", quality=90, **options)
        regions = [(int(rng.integers(192)), int(rng.integers(276)), 64, 64) for _ in range(6)]
        graph = region_graph(num_threads=1, batch_size=6)
        start_regions(graph, [data] * 6, regions)
        geometries = [Geometry(region, 64, 64, "fast", (Crop(0, 0),)) for region in regions]
        ours = views(Steps(64, 1, "fast"), [data] * 6, geometries)
        np.testing.assert_array_equal(ours[:, 0], np.stack([np.asarray(region) for region in outputs(graph)]))


def test_a_graph_cuts_the_given_region_of_each_file():
    """Two runs under way at once come out in order, and outputs outlive the runs after them."""
    files = [jpeg(seed) for seed in range(4)]
    graph = region_graph(num_threads=1, batch_size=2)
    start_regions(graph, files[:2], [(0, 0, 32, 48), (3, 5, 20, 11)])
    start_regions(graph, files[2:], [(30, 40, 2, 8), (0, 47, 1, 1)])
    regions = [*outputs(graph), *outputs(graph)]
    boxes = [(0, 0, 48, 32), (5, 3, 16, 23), (40, 30, 48, 32), (47, 0, 48, 1)]
    for data, box, region in zip(files, boxes, regions, strict=True):
        np.testing.assert_array_equal(region, Image.open(io.BytesIO(data)).crop(box))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
def test_an_evaluation_is_pillows_at_every_size(resize, interpolation):
    """Photographs, and frames that are a pixel high or wide. CPU and Pillow are compared to the bit elsewhere."""
    side, num_crops = 64, 3 if resize == "shortest" else 1
    sizes = [(340, 256), (100, 60), (63, 65), (64, 64), (33, 97), (500, 5), (1, 1), (1, 9), (9, 1), (20, 31)]
    images = [FLOWER.resize(size) for size in sizes]
    geometries = [
        eval_geometry(image.height, image.width, 70, side, num_crops, resize=resize, interpolation=interpolation)
        for image in images
    ]
    ours = views(Steps(side, num_crops, interpolation), [encoded(image) for image in images], geometries)
    for image, geometry, view_KSS3 in zip(images, geometries, ours, strict=True):
        mean, largest = difference(view_KSS3, placed(image, geometry, side))
        assert mean <= 0.5 and largest <= 30, (image.size, mean, largest)


@pytest.mark.parametrize("preset", ["released", "something"])
def test_training_crops_are_the_cpus_at_every_size(preset):
    """Drawn regions that grow, shrink, and shrink by two or more: those the CPU averages by OpenCV's INTER_AREA."""
    data, side = DataConfig(augmentation=preset, flip=0, grey=0, flip_swaps=[]), 48
    averaged = 0
    for width, height in [(340, 256), (120, 90), (48, 48), (31, 97), (340, 1), (1, 50), (1, 1), (3, 2)]:
        image = FLOWER.resize((width, height))
        draws = [draw(data, 8, generator(0, 0, sample)) for sample in range(20)]
        geometries = [train_geometry(drawn, height, width, side) for drawn in draws]
        ours = views(Steps(side, 1, "fast"), [encoded(image)] * len(geometries), geometries)
        for geometry, view in zip(geometries, ours, strict=True):
            mean, largest = difference(view, placed(image, geometry, side))
            shrinks = max(geometry.region[2:]) >= 2 * side
            averaged += shrinks
            assert mean <= (1.5 if shrinks else 0.3) and largest <= (30 if shrinks else 1), (geometry, mean, largest)
    assert averaged > 10


def test_colours_are_the_cpus_for_each_crop_by_itself():
    """Every combination of flip, grey, blur and solarisation in one batch."""
    crops = [Crop(3, 5, bool(n & 1), bool(n & 2), (0.0, 0.1, 0.7, 2.0)[n // 4 % 4], bool(n & 16)) for n in range(32)]
    geometries = [Geometry((0, 0, 40, 61), 80, 122, "bicubic", (crop, Crop(60, 90))) for crop in crops]
    smooth = NOISE.resize((20, 13)).resize((61, 40), Image.Resampling.BICUBIC)
    ours = views(Steps(64, 2, "bicubic", **ALL), [encoded(smooth)] * len(crops), geometries)
    for crop, geometry, view_KSS3 in zip(crops, geometries, ours, strict=True):
        expected = placed(smooth, geometry, 64)
        mean, largest = difference(view_KSS3[0], expected[0])
        limits = (1.5, 255) if crop.blur else (0.6, 255) if crop.solarize else (0.6, 2)
        assert mean <= limits[0] and largest <= limits[1], (crop, mean, largest)
        assert difference(view_KSS3[1], expected[1])[1] <= 2, "its neighbour asks for nothing"


GREY16 = Image.fromarray((np.arange(40 * 61).reshape(40, 61) * 26).astype(np.uint16))
FORMATS = {
    "jpeg": encoded(FLOWER, "JPEG", quality=90), "grey jpeg": encoded(FLOWER.convert("L"), "JPEG"),
    "cmyk": encoded(FLOWER.convert("CMYK"), "JPEG"), "png": encoded(FLOWER), "palette": encoded(FLOWER.quantize(16)),
    "grey of 16 bits": encoded(GREY16), "webp": encoded(FLOWER, "WEBP", lossless=True), "bmp": encoded(FLOWER, "BMP"),
}  # fmt: skip


def test_every_format_is_what_the_cpu_decodes():
    for name, data in FORMATS.items():
        plain = plain_image(data)
        with Image.open(io.BytesIO(plain)) as image:
            geometry = eval_geometry(image.height, image.width, 72, 64, 1)
            mean, largest = difference(
                views(Steps(64, 1, "bicubic"), [plain], [geometry])[0], placed(image, geometry, 64)
            )
        assert mean <= 0.5 and largest <= 12, (name, mean, largest)


def test_the_graph_of_videos_shows_the_frames_of_pyav(tmp_path):
    """VP9, which DALI's CPU decoder knows; chroma is interpolated differently. A frame past the end is an error."""
    path = encode(tmp_path / "v.webm", "libvpx-vp9", images=pictures(12, 96, 72))
    frames, steps = list(iter_frames(path)), Steps(64, 2, "bicubic", **ALL)
    crops = (Crop(0, 3), Crop(0, 16, flip=True, grey=True, blur=1.0, solarize=True))
    geometry = Geometry((4, 10, 64, 80), 64, 80, "bicubic", crops)
    graph = dali.video_graph(steps, device_id=None, num_threads=1, batch_size=2)
    numbers = [np.array([0, 3, 11], np.int32), np.array([5], np.int32)]
    start_views(graph, steps, [path.read_bytes()] * 2, [geometry] * 2, numbers)
    for of_video, sequence_kKSS3 in zip(numbers, dense_outputs(graph), strict=True):
        assert np.asarray(sequence_kKSS3).shape == (len(of_video), 2, 64, 64, 3)
        for number, view_KSS3 in zip(of_video, np.asarray(sequence_kKSS3), strict=True):
            mean, largest = difference(view_KSS3, placed(Image.fromarray(frames[number]), geometry, 64))
            assert mean <= 2 and largest <= 10, (number, mean, largest)
    start_views(graph, steps, [path.read_bytes()], [geometry], [np.array([12], np.int32)])
    with pytest.raises(RuntimeError, match="out-of-bounds frame index 12"):
        dense_outputs(graph)
