"""The graphs that decode: what they give, and that they exist for a GPU."""

import io

import numpy as np
from frame_folders import jpeg
from PIL import Image

from text4vis.config.schema import DataConfig
from text4vis.data.augmentation import draw, generator, train_geometry
from text4vis.data.dali import image_graph, outputs, start_run, video_graph


def test_the_graph_that_also_resizes_gives_the_same_pictures(photographs):
    """What a GPU runs, run here on the CPU: DALI's cubic resize against Pillow's; and it is defined for a GPU too."""
    _, root = photographs
    data = (root / "video1" / "img_00001.jpg").read_bytes()
    graph = image_graph(device_id=None, num_threads=1, batch_size=1, resize="cubic")
    start_run(graph, [data], [(0, 0, 270, 480)], [(256, 455)])
    ours = np.asarray(outputs(graph)[0]).astype(int)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize((455, 256), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(ours - expected).mean() <= 0.5 and np.abs(ours - expected).max() <= 8
    for resize in ("linear", "cubic"):
        for graph in (image_graph, video_graph):
            assert graph(device_id=0, num_threads=2, batch_size=8, resize=resize).device_id == 0


def test_a_decoder_that_also_resizes_leaves_frames_for_randaugment_as_they_are():
    """What a GPU's graph does, run on the CPU: operations come before the resize, so it gets the whole frame's size."""
    drawn = draw(DataConfig(augmentation="paper"), 10, generator(0, 0, 0))
    geometry = train_geometry(drawn, 32, 48, 24)
    assert geometry.region == (0, 0, 32, 48) and geometry.decoded_size == (32, 48)
    assert geometry.part == drawn.crop.region(32, 48, 24)
    assert train_geometry(drawn._replace(operations=()), 32, 48, 24).decoded_size == (24, 24)
    data = jpeg(0)
    graph = image_graph(device_id=None, num_threads=1, batch_size=1, resize="linear")
    start_run(graph, [data], [geometry.region], [geometry.decoded_size])
    np.testing.assert_array_equal(outputs(graph)[0], np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_graph_cuts_the_given_region_of_each_file():
    """Two runs under way at once come out in order, and outputs outlive the runs after them."""
    files = [jpeg(seed) for seed in range(4)]
    graph = image_graph(device_id=None, num_threads=1, batch_size=2, resize=None)
    start_run(graph, files[:2], [(0, 0, 32, 48), (3, 5, 20, 11)])
    start_run(graph, files[2:], [(30, 40, 2, 8), (0, 47, 1, 1)])
    regions = [*outputs(graph), *outputs(graph)]
    boxes = [(0, 0, 48, 32), (5, 3, 16, 23), (40, 30, 48, 32), (47, 0, 48, 1)]
    for data, box, region in zip(files, boxes, regions, strict=True):
        np.testing.assert_array_equal(region, Image.open(io.BytesIO(data)).crop(box))
