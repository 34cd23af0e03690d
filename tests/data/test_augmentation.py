"""What is drawn for a video: parity with the published recipes, and randomness of (seed, epoch, sample) alone."""

import dataclasses
import hashlib
import itertools
from collections import Counter

import numpy as np
import pytest
import yaml
from frame_folders import make_frame_folders
from PIL import Image, ImageFilter
from torchvision.transforms import v2

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError, DataConfig, RandAugConfig
from text4vis.data import pixels
from text4vis.data.augmentation import (
    OPERATIONS,
    MultiScaleCrop,
    ResizedCrop,
    draw,
    eval_geometry,
    flip_swaps,
    generator,
    num_operations,
    scaled_size,
    train_geometry,
)
from text4vis.data.loader import build_loader

SIZES = [(240, 320), (256, 340), (320, 240), (1080, 1920), (256, 256), (257, 401), (31, 900), (180, 320)]
NUM_VIDEOS = 13


def values(drawn):
    """Everything that was drawn, as plain numbers and strings."""
    return repr(drawn._replace(indices=drawn.indices.tolist()))


@pytest.mark.parametrize("preset", ["released", "paper", "something"])
def test_a_draw_depends_on_seed_epoch_and_sample_alone(preset):
    data = DataConfig(augmentation=preset, blur=0.5, solarize=0.5, randaug=RandAugConfig(N=3))
    first = values(draw(data, 300, generator(3, 2, 17)))
    for key in [(3, 2, 18), (3, 3, 17), (4, 2, 17)]:
        assert values(draw(data, 300, generator(*key))) != first
    assert values(draw(data, 300, generator(3, 2, 17))) == first


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("released", "1b5efa4391188511"), ("paper", "0fe6784dc375c291"), ("something", "a5f75f9dec21481f")],
)
def test_the_stream_of_draws_is_what_it_always_was(preset, expected):
    """Who resumes a run with a newer version goes on with the same frames, crops and operations."""
    data = DataConfig(augmentation=preset, blur=0.5, solarize=0.5)
    drawn = [draw(data, 1 + sample % 40, generator(sample % 3, sample % 5, sample)) for sample in range(200)]
    plans = [(values(one), train_geometry(one, 100 + number, 150, 64).region) for number, one in enumerate(drawn)]
    assert hashlib.sha256(repr(plans).encode()).hexdigest()[:16] == expected


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("size", SIZES)
def test_random_crops_lie_inside_and_keep_the_recipe(size, side):
    height, width = size
    data = DataConfig(crop_area=(0.08, 1.0))
    shares, flips, greys = [], [], []
    for sample in range(300):
        drawn = draw(data, 10, generator(0, 0, sample))
        geometry = train_geometry(drawn, height, width, side)
        top, left, h, w = geometry.region
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        assert (geometry.height, geometry.width) == (side, side)
        shares.append(h * w / (height * width))
        flips.append(drawn.flip)
        greys.append(drawn.grey)
        if (h, w) != (min(size), min(size)):
            assert 3 / 4 - 0.05 <= w / h <= 4 / 3 + 0.05
    assert 0.4 < np.mean(flips) < 0.6 and 0.13 < np.mean(greys) < 0.27
    if max(size) / min(size) < 1.5:
        assert min(shares) < 0.2 and max(shares) > 0.7


def test_a_crop_may_be_one_pixel_but_not_none():
    def attempts(area):
        return ResizedCrop([area] * 10, [1.0] * 10, [False] * 10, 0.0, 0.0)

    assert attempts(0.25).region(2, 2, 24) == (0, 0, 1, 1)
    assert attempts(0.04).region(2, 3, 24) == (0, 0, 2, 2)  # rounds to no pixel: the short side's square


def published_multi_scale(height, width, side):
    """The rule of TSN and TSM, written out: all sizes with their places, each as likely as its size's share."""
    base = min(height, width)
    lengths = [int(base * scale) for scale in (1, 0.875, 0.75, 0.66)]
    sizes = []
    for i, h in enumerate(lengths):
        for j, w in enumerate(lengths):
            if abs(i - j) <= 1:
                sizes.append((side if abs(h - side) < 3 else h, side if abs(w - side) < 3 else w))
    regions = Counter()
    for h, w in sizes:
        y, x = (height - h) // 4, (width - w) // 4
        corners = [(0, 0), (0, 4 * x), (4 * y, 0), (4 * y, 4 * x), (2 * y, 2 * x)]
        edges = [(2 * y, 0), (2 * y, 4 * x), (4 * y, 2 * x), (0, 2 * x)]
        quarters = [(y, x), (y, 3 * x), (3 * y, x), (3 * y, 3 * x)]
        for top, left in corners + edges + quarters:
            regions[top, left, h, w] += 1
    return regions


@pytest.mark.parametrize("size", [(240, 320), (256, 340), (340, 256), (226, 300), (256, 256), (1080, 1920), (2, 3)])
def test_multi_scale_crops_are_the_published_ones_equally_often(size):
    steps = (np.arange(10 * 13) + 0.5) / (10 * 13)
    found = Counter(
        MultiScaleCrop(a, b).region(*size, 224) for a in steps[6::13].tolist() for b in steps[4::10].tolist()
    )
    assert found == published_multi_scale(*size, 224)


def test_a_multi_scale_crop_stays_in_a_frame_a_pixel_below_the_input():
    for a, b in itertools.product(np.linspace(0, 0.999, 30), repeat=2):
        top, left, h, w = MultiScaleCrop(float(a), float(b)).region(223, 400, 224)
        assert 0 <= top <= 223 - h and 0 <= left <= 400 - w


def test_the_something_preset_draws_all_sizes_and_places():
    data = DataConfig(augmentation="something")
    drawn = [draw(data, 10, generator(0, 0, sample)) for sample in range(4000)]
    assert {train_geometry(one, 240, 427, 224).region for one in drawn} == set(published_multi_scale(240, 427, 224))


def test_randaugment_draws_each_operation_with_the_published_magnitude():
    """Strength 9 of 30, each of 16 operations equally often, each sign half of the time."""
    data = DataConfig(augmentation="paper")
    drawn = [draw(data, 10, generator(1, 0, sample)).operations for sample in range(4000)]
    assert {len(operations) for operations in drawn} == {2}
    by_name = {}
    for operation in itertools.chain(*drawn):
        by_name.setdefault(operation.name, []).append(operation)
    assert set(by_name) == set(OPERATIONS) and len(OPERATIONS) == 16
    expected = {
        "rotate": 9, "posterize": 1.2, "solarize": 76.8, "solarize_add": 33, "color": 0.64, "contrast": 0.64,
        "brightness": 0.64, "sharpness": 0.64, "shear_x": 0.09, "shear_y": 0.09, "cutout": 12, "translate_x": 30,
        "translate_y": 30,
    }  # fmt: skip
    for name, operations in by_name.items():
        assert 400 < len(operations) < 600, name
        if name in expected:
            assert np.abs([operation.value for operation in operations]) == pytest.approx(expected[name])
        negative = np.mean([operation.value < 0 for operation in operations])
        signed = name in {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}
        assert 0.42 < negative < 0.58 if signed else negative == 0
    places = np.array([(operation.x, operation.y) for operation in by_name["cutout"]])
    assert places.min() >= 0 and places.max() < 1 and (np.abs(places.mean(0) - 0.5) < 0.06).all()


def test_the_drawn_region_alone_is_decoded_unless_operations_see_the_frame_first():
    plain = train_geometry(draw(DataConfig(), 10, generator(1, 0, 0)), 240, 320, 224)
    assert plain.part is None and plain.region[2:] != (240, 320)
    paper = train_geometry(draw(DataConfig(augmentation="paper"), 10, generator(1, 0, 0)), 240, 320, 224)
    assert paper.region == (0, 0, 240, 320) and paper.part == plain.region


def test_what_has_no_chance_never_happens():
    class Zeros:
        """A generator that draws the least numbers there are."""

        def random(self, size=None):
            return 0.0 if size is None else np.zeros(size)

    never = draw(DataConfig(flip=0, grey=0, blur=0, solarize=0), 10, Zeros())
    assert not (never.flip or never.grey or never.blur or never.solarize)
    always = draw(DataConfig(flip=1, grey=0.01, blur=0.01, solarize=0.01), 10, Zeros())
    assert always.flip and always.grey and always.blur and always.solarize


def test_blur_and_solarisation_come_as_often_as_asked():
    data = DataConfig(blur=0.3, solarize=0.1)
    drawn = [draw(data, 10, generator(2, 0, sample)) for sample in range(4000)]
    sigmas = np.array([one.blur for one in drawn if one.blur])
    assert 0.26 < len(sigmas) / 4000 < 0.34 and 0.08 < np.mean([one.solarize for one in drawn]) < 0.12
    assert 0.1 <= sigmas.min() < 0.15 and 1.95 < sigmas.max() <= 2.0 and 1.0 < sigmas.mean() < 1.1
    released = [draw(DataConfig(), 10, generator(2, 0, sample)) for sample in range(100)]
    assert not any(one.blur or one.solarize or one.operations for one in released)


def test_presets_give_defaults_that_keys_replace():
    assert [num_operations(DataConfig(augmentation=name)) for name in ("released", "paper", "something")] == [0, 2, 0]
    assert num_operations(DataConfig(augmentation="released", randaug=RandAugConfig(N=3))) == 3
    assert num_operations(DataConfig(augmentation="paper", randaug=RandAugConfig(N=0))) == 0
    published = {86: 87, 87: 86, 93: 94, 94: 93, 166: 167, 167: 166}
    assert flip_swaps(DataConfig(augmentation="something")) == published
    assert flip_swaps(DataConfig(augmentation="something", flip_swaps=())) == {} == flip_swaps(DataConfig())
    assert flip_swaps(DataConfig(flip_swaps=((0, 4),))) == {0: 4, 4: 0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"augmentation": "none", "blur": 0.1}, "data.blur: 0.1 has nothing to act on with data.augmentation none"),
        ({"augmentation": "none", "randaug": {"N": 2}}, "data.randaug.N: 2 has nothing"),
        ({"randaug": {"M": 31}}, "data.randaug.M: input should be less than or equal to 30"),
        ({"randaug": {"K": 1}}, "data.randaug.K: unknown key"),
        ({"flip_swaps": [[1, 2], [2, 3]]}, "data.flip_swaps: expected pairs of labels, each label once"),
        ({"flip_swaps": [[1, 2, 3]]}, "data.flip_swaps"),
        ({"flip_swaps": [[-1, 2]]}, "data.flip_swaps: expected pairs of labels"),
        (
            {"dense": True, "num_segments": 129},
            "data.num_segments: 129 frames do not fit into data.dense's window of 128",
        ),
        ({"augmentation": "papr"}, "data.augmentation: input should be 'released', 'paper', 'something' or 'none'"),
    ],
)
def test_contradictions_are_refused(data, message):
    with pytest.raises(ConfigError) as error:
        config_from_dict({"data": data}, "test")
    assert message in str(error.value)


def test_the_original_yaml_keys_of_randaugment_are_read():
    config = config_from_dict({"data": {"randaug": {"N": 2, "M": 9}, "flip_swaps": [[4, 2]]}}, "test")
    assert (num_operations(config.data), config.data.randaug.M) == (2, 9)
    assert config_from_dict(yaml.safe_load(config.to_yaml()), "test") == config


@pytest.mark.parametrize(("side", "scale"), [(224, 256), (336, 336)])
@pytest.mark.parametrize("size", SIZES)
def test_sizes_and_centre_crop_are_torchvisions(size, side, scale):
    height, width = size
    assert Config(data=DataConfig(input_size=side)).scale_size == scale
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    resized = v2.Resize(scale, v2.InterpolationMode.BICUBIC)(image)
    assert scaled_size(height, width, scale) == (resized.height, resized.width)
    geometry = eval_geometry(height, width, scale, side, 1)
    crop = geometry.crops[0]
    ours = np.asarray(resized)[crop.top : crop.top + side, crop.left : crop.left + side]
    np.testing.assert_array_equal(ours, np.asarray(v2.CenterCrop(side)(resized)))


def test_crops_stand_where_the_original_puts_them():
    def places(count):
        return [(c.left, c.top, c.flip) for c in eval_geometry(256, 340, 256, 224, count).crops]

    x, y = (340 - 224) // 4, (256 - 224) // 4
    assert places(3) == [(0, 2 * y, False), (4 * x, 2 * y, False), (2 * x, 2 * y, False)]
    corners = [(0, 0), (4 * x, 0), (0, 4 * y), (4 * x, 4 * y), (2 * x, 2 * y)]
    assert places(5) == [(*corner, False) for corner in corners]
    assert places(10) == [(*corner, flip) for corner in corners for flip in (False, True)]
    with pytest.raises(ValueError, match="num_crops"):
        eval_geometry(256, 340, 256, 224, 2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Thirteen videos of 1 to 20 frames of 48 x 32, six classes, as folders and as shards."""
    base = tmp_path_factory.mktemp("augmentation")
    made = make_frame_folders(base, [1 + 3 * i % 20 for i in range(NUM_VIDEOS)], num_classes=6)
    build_shards(
        parse_annotations(made.annotations), root=made.root, labels=parse_labels(made.labels), output=base / "shards",
        shard_bytes=30_000,
    )  # fmt: skip
    return made, base / "shards"


def settings(shards, **data) -> Config:
    base = {"train": [str(shards)], "val": [str(shards)], "batch_size": 2, "num_segments": 4, "input_size": 24}
    return config_from_dict(
        {"seed": 5, "data": base | {"scale_size": 28, "workers": 2, "decode": "cpu"} | data}, "test"
    )


def take(config, count, **ranks):
    """(id, label, hash of the pixels) of each video of the first `count` batches."""
    with build_loader(config, "train", **ranks) as loader:
        return [
            [
                (int(i), int(label), hashlib.sha256(frames.contiguous().numpy().tobytes()).hexdigest())
                for i, label, frames in zip(batch.ids, batch.labels, batch.frames, strict=True)
            ]
            for batch in itertools.islice(loader, count)
        ]


@pytest.mark.parametrize(
    "data",
    [
        {"augmentation": "paper", "blur": 0.5, "solarize": 0.3},
        {"augmentation": "something", "flip_swaps": [[0, 1], [3, 5]]},
    ],
    ids=["paper", "something"],
)
def test_content_does_not_depend_on_batches_ranks_or_threads(folders, data):
    _, shards = folders
    alone = take(settings(shards, batch_size=6, **data), 5)
    once = list(itertools.chain(*alone))
    assert list(itertools.chain(*take(settings(shards, batch_size=1, workers=1, **data), 30))) == once
    for world_size in (2, 3):
        config = settings(shards, batch_size=6 // world_size, workers=3, **data)
        by_rank = [take(config, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert [list(itertools.chain(*step)) for step in zip(*by_rank, strict=True)] == alone
    assert list(itertools.chain(*take(settings(shards, batch_size=1, **data), 4, consumed=11))) == once[11:15]


def test_paper_end_to_end_is_the_same_operations_on_every_frame(folders):
    """Each view against Pillow: the video's operations on the whole frame, cut, resized, grey, flip, blur."""
    made, shards = folders
    config = settings(shards, augmentation="paper", blur=0.5, batch_size=NUM_VIDEOS)
    with build_loader(config, "train") as loader:
        batch = next(iter(loader))
        names = [loader.dataset.name(int(i)) for i in batch.ids]
        counts = [int(loader.dataset.num_frames[int(i)]) for i in batch.ids]
    seen = set()
    for b, (sample, name, count) in enumerate(zip(batch.ids.tolist(), names, counts, strict=True)):
        drawn = draw(config.data, count, generator(5, 0, sample))
        top, left, height, width = drawn.crop.region(32, 48, 24)
        seen |= {operation.name for operation in drawn.operations}
        for t, number in enumerate(drawn.indices):
            with Image.open(made.root / name / f"img_{number + 1:05d}.jpg") as file:
                expected = pixels.operate(file.convert("RGB"), drawn.operations)
            expected = expected.crop((left, top, left + width, top + height)).resize(
                (24, 24), Image.Resampling.BILINEAR
            )
            if drawn.grey:
                expected = expected.convert("L").convert("RGB")
            if drawn.flip:
                expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            if drawn.blur:
                expected = expected.filter(ImageFilter.GaussianBlur(drawn.blur))
            ours = batch.frames[b, 0, t].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(ours - np.asarray(expected, dtype=int)).mean() < 6, (name, drawn)
    assert len(seen) > 8


def test_a_flip_swaps_the_labels_that_it_must(folders):
    """Labels of the batches, two epochs long: swapped where the video was flipped, as stored elsewhere."""
    made, shards = folders
    stored = {name: number % 6 for number, name in enumerate(made.names)}
    swapped = {0: 1, 1: 0, 3: 5, 5: 3}
    config = settings(shards, augmentation="something", flip_swaps=[[0, 1], [3, 5]], batch_size=1)
    changed = 0
    with build_loader(config, "train") as loader:
        for position, batch in enumerate(itertools.islice(loader, 2 * NUM_VIDEOS)):
            (sample,) = batch.ids.tolist()
            label = stored[loader.dataset.name(sample)]
            count = int(loader.dataset.num_frames[sample])
            flipped = draw(config.data, count, generator(5, position // NUM_VIDEOS, sample)).flip
            assert batch.labels.tolist() == [swapped.get(label, label) if flipped else label]
            changed += batch.labels.tolist() != [label]
        again = [(int(loader.dataset.labels[i]), stored[loader.dataset.name(i)]) for i in range(NUM_VIDEOS)]
    assert changed > 3 and all(ours == theirs for ours, theirs in again)
    with build_loader(config, "val") as loader:
        assert all(
            batch.labels.tolist() == [stored[loader.dataset.name(int(i))] for i in batch.ids] for batch in loader
        )


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_labels_follow_the_probability_of_the_flip(folders, flip):
    _, shards = folders
    plain = [video[:2] for batch in take(settings(shards, flip=flip), 7) for video in batch]
    swapped = take(settings(shards, flip=flip, flip_swaps=[[0, 1], [2, 3], [4, 5]]), 7)
    assert [video[:2] for batch in swapped for video in batch] == [(i, label ^ int(flip)) for i, label in plain]


def test_swaps_of_labels_that_do_not_exist_are_refused(folders):
    _, shards = folders
    with pytest.raises(ConfigError, match=r"label 167, but there are 6 classes; name this data set's pairs"):
        build_loader(settings(shards, augmentation="something"), "train")
    build_loader(settings(shards, augmentation="something"), "val").close()
    build_loader(settings(shards, augmentation="something", flip_swaps=[]), "train").close()


@pytest.mark.parametrize("side", [224, 336])
@pytest.mark.parametrize("world_size", [1, 2])
def test_micro_batches_are_the_stream_in_order(folders, side, world_size):
    """Accumulation over 3 micro batches of 2: rank after rank, micro batch after micro batch is the global batch."""
    _, shards = folders
    data = {"input_size": side, "scale_size": None, "num_segments": 1}
    config = settings(shards, **data)
    config = dataclasses.replace(config, solver=dataclasses.replace(config.solver, grad_accumulation_steps=3))
    with build_loader(settings(shards, **data, batch_size=1), "train") as loader:
        stream = [int(plan.ids[0]) for plan in itertools.islice(loader.plans(), 2 * 6 * world_size)]
    micro = []
    for rank in range(world_size):
        with build_loader(config, "train", rank=rank, world_size=world_size) as loader:
            plans = list(itertools.islice(loader.plans(), 6))
            heights = {frame.geometry.height for plan in plans for video in plan.videos for frame in video.frames}
            assert heights == {side}
            micro.append([plan.ids.tolist() for plan in plans])
            if rank == 0:
                assert next(iter(loader)).frames.shape == (2, 1, 1, 3, side, side)
    steps = [micro[rank][3 * step : 3 * step + 3] for step in range(2) for rank in range(world_size)]
    assert [i for share in steps for batch in share for i in batch] == stream
