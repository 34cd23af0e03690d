"""The loader: every sample once, the same pixels whatever the ranks, batches and threads, and Pillow's pixels."""

import dataclasses
import io
import itertools
import json

import av
import launch
import numpy as np
import pytest
import torch
from frame_folders import make_frame_folders
from PIL import Image
from read_stream import identify
from sklearn.datasets import load_sample_image
from torchvision.transforms import v2

from shards.annotations import parse_annotations, parse_labels
from shards.format import ShardError
from shards.writer import build_shards
from text4vis.config.schema import Config, ConfigError, config_from_dict
from text4vis.data.augmentation import Crop, Geometry
from text4vis.data.dali import image_graph, video_graph
from text4vis.data.finishing import place, place_on_device
from text4vis.data.loader import build_loader
from text4vis.data.plan import FramePlan
from text4vis.data.sampling import test_indices as clip_indices

NUM_VIDEOS = 23


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    base = tmp_path_factory.mktemp("pipeline")
    folders = make_frame_folders(base, [1 + 3 * i % 20 for i in range(NUM_VIDEOS)])
    return build(folders.annotations, folders.root, folders.labels, base / "shards")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Three videos that pan over real photographs, 30 frames each, in three sizes."""
    base = tmp_path_factory.mktemp("photographs")
    lines = []
    for number, (name, size) in enumerate([("china", (341, 256)), ("flower", (480, 270)), ("china", (200, 320))]):
        picture = Image.fromarray(load_sample_image(f"{name}.jpg")).resize((size[0] + 30, size[1]))
        folder = base / "frames" / f"video{number}"
        folder.mkdir(parents=True)
        for frame in range(30):
            crop = picture.crop((frame, 0, frame + size[0], size[1]))
            crop.save(folder / f"img_{frame + 1:05d}.jpg", quality=90)
        lines.append(f"video{number} 30 {number}")
    (base / "list.txt").write_text("\n".join(lines))
    (base / "labels.csv").write_text("id,name\n0,a\n1,b\n2,c\n")
    return build(base / "list.txt", base / "frames", base / "labels.csv", base / "shards"), base / "frames"


def build(annotations, root, labels, output):
    names = parse_labels(labels)
    build_shards(parse_annotations(annotations), root=root, labels=names, output=output, shard_bytes=30_000)
    return output


def settings(folder, **data) -> Config:
    base = {"train": [str(folder)], "val": [str(folder)], "batch_size": 2, "num_segments": 4, "input_size": 24}
    return config_from_dict({"seed": 5, "data": base | {"scale_size": 28, "workers": 2} | data}, "test")


def take(config, split, count=None, **ranks):
    """(id, label, hash of the pixels) of each video of the first `count` batches, batch by batch."""
    with build_loader(config, split, **ranks) as loader:
        return [identify(batch) for batch in itertools.islice(loader, count)]


@pytest.mark.parametrize("shuffle", ["global", "shards:2"])
def test_the_global_batches_are_the_same_at_every_world_size(shards, shuffle):
    """24 videos a step by 1, 2, 3, 4 or 8 ranks: same videos, same labels, same pixels, each once an epoch."""
    steps = 2 * NUM_VIDEOS // 24 + 1
    alone = take(settings(shards, batch_size=24, shuffle=shuffle), "train", steps)
    for world_size in (2, 3, 4, 8):
        config = settings(shards, batch_size=24 // world_size, shuffle=shuffle)
        by_rank = [take(config, "train", steps, rank=r, world_size=world_size) for r in range(world_size)]
        assert [list(itertools.chain(*step)) for step in zip(*by_rank, strict=True)] == alone
    ids = [i for batch in alone for i, _, _ in batch]
    assert sorted(ids[:NUM_VIDEOS]) == sorted(ids[NUM_VIDEOS : 2 * NUM_VIDEOS]) == list(range(NUM_VIDEOS))
    assert ids[:NUM_VIDEOS] != ids[NUM_VIDEOS : 2 * NUM_VIDEOS]


@pytest.mark.slow
def test_real_processes_see_what_one_sees(shards, tmp_path):
    """One, two and three processes at once, each with its own interpreter and threads, and one that starts later."""
    alone = take(settings(shards, batch_size=6), "train", 10)
    for world_size in (1, 2, 3):
        (tmp_path / "c.yaml").write_text(settings(shards, batch_size=6 // world_size).to_yaml())
        started = launch.start("tests/support/read_stream.py", tmp_path / "c.yaml", 10, 0, ranks=world_size)
        by_rank = [json.loads(output.splitlines()[-1]) for code, output in launch.finish(started) if code == 0]
        assert len(by_rank) == world_size
        union = [list(itertools.chain(*step)) for step in zip(*by_rank, strict=True)]
        assert union == [[list(video) for video in batch] for batch in alone]
    output = launch.run("tests/support/read_stream.py", tmp_path / "c.yaml", 14, 18)  # the last ran with batches of two
    rest = list(itertools.chain(*json.loads(output.splitlines()[-1])))
    assert rest == list(itertools.chain(*union))[18 : 18 + 28]


def test_gradient_accumulation_cuts_the_same_global_batch(shards):
    whole = take(settings(shards, batch_size=6), "train", 4)
    config = dataclasses.replace(
        settings(shards, batch_size=3), solver=dataclasses.replace(Config().solver, grad_accumulation_steps=2)
    )
    assert list(itertools.chain(*take(config, "train", 8))) == list(itertools.chain(*whole))


def test_content_does_not_depend_on_batch_size_or_threads(shards):
    first = list(itertools.chain(*take(settings(shards, batch_size=1, workers=1), "train", 12)))
    for batch_size, workers in [(4, 1), (12, 3)]:
        config = settings(shards, batch_size=batch_size, workers=workers)
        assert list(itertools.chain(*take(config, "train", 12 // batch_size))) == first


def test_an_epoch_shows_a_video_in_another_way(shards):
    batches = take(settings(shards, batch_size=NUM_VIDEOS), "train", 2)
    first, second = ({i: pixels for i, _, pixels in batch} for batch in batches)
    assert sum(first[i] != second[i] for i in first) > NUM_VIDEOS // 2


@pytest.mark.parametrize("consumed", [2, 7, 22, 23, 40])
def test_a_stream_started_anywhere_is_the_tail_of_the_whole(shards, consumed):
    whole = list(itertools.chain(*take(settings(shards, batch_size=1), "train", 46)))
    tail = list(itertools.chain(*take(settings(shards, batch_size=2), "train", 3, consumed=consumed)))
    assert tail == whole[consumed : consumed + 6]


@pytest.mark.parametrize("dense", [False, True])
def test_without_augmentation_training_sees_what_an_evaluation_of_one_view_sees(shards, dense):
    config = settings(shards, augmentation="none", dense=dense, batch_size=1)
    shown = [sorted(itertools.chain(*take(config, split, NUM_VIDEOS))) for split in ("train", "val")]
    assert len(shown[0]) == NUM_VIDEOS and shown[0] == shown[1]


@pytest.mark.parametrize("world_size", [1, 2, 3, 40])
def test_evaluation_sees_every_video_once(shards, world_size):
    seen = [
        video
        for rank in range(world_size)
        for batch in take(settings(shards), "val", rank=rank, world_size=world_size)
        for video in batch
    ]
    assert [i for i, _, _ in seen] == list(range(NUM_VIDEOS))
    assert seen == list(itertools.chain(*take(settings(shards, batch_size=5), "val")))


def test_evaluation_pixels_are_those_of_the_published_recipe(photographs):
    """4 clips x 3 crops on real photographs against Pillow and torchvision."""
    folder, root = photographs
    data = {"input_size": 224, "scale_size": 256, "num_segments": 8, "test_clips": 4, "test_crops": 3, "batch_size": 24}
    with build_loader(settings(folder, **data), "val") as loader:
        batch = next(iter(loader))
        names = [loader.dataset.name(int(i)) for i in batch.ids]
    assert batch.frames.shape == (2, 12, 8, 3, 224, 224) and batch.frames.dtype == torch.uint8
    for b, name in enumerate(names):
        for position, frame in enumerate(clip_indices(30, 8, 4)):
            with Image.open(root / name / f"img_{frame + 1:05d}.jpg") as file:
                image = v2.Resize(256, v2.InterpolationMode.BICUBIC)(file.convert("RGB"))
            x, y = (image.width - 224) // 4, (image.height - 224) // 4
            for c, left in enumerate((0, 4 * x, 2 * x)):
                expected = np.asarray(image.crop((left, 2 * y, left + 224, 2 * y + 224)), dtype=int)
                ours = batch.frames[b, position // 8 * 3 + c, position % 8].permute(1, 2, 0).numpy().astype(int)
                assert np.abs(ours - expected).mean() <= 0.5 and np.abs(ours - expected).max() <= 4


def test_training_pixels_are_the_drawn_region(photographs):
    """A training view looks like Pillow's bilinear resize of the region that was drawn."""
    folder, root = photographs
    config = settings(folder, input_size=112, scale_size=112, num_segments=8, batch_size=3, grey=0.3)
    with build_loader(config, "train") as loader:
        plan = next(loader.plans())
        batch = next(iter(loader))
        names = [loader.dataset.name(int(i)) for i in batch.ids]
    for b, frame in ((b, frame) for b, video in enumerate(plan.videos) for frame in video.frames):
        _, t, c = frame.targets[0]
        crop = frame.geometry.crops[c]
        top, left, height, width = frame.geometry.region
        with Image.open(root / names[b] / f"img_{frame.number + 1:05d}.jpg") as file:
            expected = file.convert("RGB").crop((left, top, left + width, top + height)).resize((112, 112), 2)
        if crop.grey:
            expected = expected.convert("L").convert("RGB")
        if crop.flip:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        ours = batch.frames[b, 0, t].permute(1, 2, 0).numpy().astype(int)
        assert np.abs(ours - np.asarray(expected, dtype=int)).mean() < 4


def test_the_graph_that_also_resizes_gives_the_same_pictures(photographs):
    """What a GPU runs, run here on the CPU: DALI's cubic resize against Pillow's; and it is defined for a GPU too."""
    _, root = photographs
    data = (root / "video1" / "img_00001.jpg").read_bytes()
    graph = image_graph(device_id=None, num_threads=1, batch_size=1, resize="cubic")
    graph.feed_input("encoded", [np.frombuffer(data, np.uint8)])
    graph.feed_input("start", np.array([[0, 0]], np.int32))
    graph.feed_input("shape", np.array([[270, 480]], np.int32))
    graph.feed_input("size", np.array([[256, 455]], np.float32))
    graph.schedule_run()
    ours = np.asarray(graph.share_outputs()[0][0]).astype(int)
    expected = np.asarray(Image.open(io.BytesIO(data)).resize((455, 256), Image.Resampling.BICUBIC), dtype=int)
    assert np.abs(ours - expected).mean() <= 0.5 and np.abs(ours - expected).max() <= 8
    for resize in ("linear", "cubic"):
        for graph in (image_graph, video_graph):
            assert graph(device_id=0, num_threads=2, batch_size=8, resize=resize).device_id == 0


def test_placing_on_the_device_equals_placing_on_the_cpu():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    crops = [Crop(3, 5), Crop(0, 36, flip=True), Crop(16, 0, grey=True), Crop(8, 20, flip=True, grey=True)]
    geometry = Geometry((0, 0, 40, 60), 40, 60, True, tuple(crops))
    frame = FramePlan(0, (40, 60), geometry, tuple((c, 0, c) for c in range(len(crops))))
    expected = np.zeros((4, 1, 24, 24, 3), np.uint8)
    place(image, geometry, frame.targets, expected)
    ours = torch.zeros(expected.shape, dtype=torch.uint8)
    place_on_device([torch.from_numpy(image)], [frame], ours)
    assert np.abs(ours.numpy().astype(int) - expected).max() <= 1  # grey may round the other way


@pytest.fixture(scope="module")
def stored_videos(tmp_path_factory):
    """Three short H.264 files with B-frames, stored as they are, and their decoded frames by name."""
    base = tmp_path_factory.mktemp("videos")
    picture = np.asarray(Image.fromarray(load_sample_image("flower.jpg")).resize((160, 120)))
    for number in range(3):
        with av.open(str(base / f"clip {number}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
            for k in range(20 + number):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[k : k + 72, 2 * k : 2 * k + 96]))
                file.mux(stream.encode(frame))
            file.mux(stream.encode())
    (base / "list.txt").write_text("".join(f"clip {n}.mp4 {n}\n" for n in range(3)))
    annotations = parse_annotations(base / "list.txt")
    build_shards(annotations, root=base, labels=["a", "b", "c"], output=base / "shards", store="video")
    return base


def test_stored_videos_give_exactly_the_planned_frames(stored_videos):
    config = settings(stored_videos / "shards", test_clips=2, test_crops=3, input_size=72, scale_size=72, batch_size=12)
    with build_loader(config, "val") as loader:
        seen = [(int(i), frames) for batch in loader for i, frames in zip(batch.ids, batch.frames, strict=True)]
        names = [loader.dataset.name(i) for i, _ in seen]
        counts = [int(loader.dataset.num_frames[i]) for i, _ in seen]
    assert sorted(names) == [f"clip {n}.mp4" for n in range(3)] and sorted(counts) == [20, 21, 22]
    for name, count, (_, frames) in zip(names, counts, seen, strict=True):
        with av.open(str(stored_videos / name)) as file:
            decoded = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        for position, number in enumerate(clip_indices(count, 4, 2)):
            for c, left in enumerate((0, 24, 12)):
                view = frames[position // 4 * 3 + c, position % 4].permute(1, 2, 0).numpy()
                np.testing.assert_array_equal(view, decoded[number][:, left : left + 72])


def test_frames_and_videos_can_be_joined(shards, stored_videos, tmp_path):
    """A batch that mixes both kinds is what the two alone would give."""
    folders = make_frame_folders(tmp_path, [4, 5])
    names = tmp_path / "abc.csv"
    names.write_text("id,name\n0,a\n1,b\n2,c\n")
    frames = build(folders.annotations, folders.root, names, tmp_path / "shards")
    videos = stored_videos / "shards"
    both = list(itertools.chain(*take(settings(frames, val=[str(frames), str(videos)], batch_size=5), "val")))
    apart = [video for folder in (frames, videos) for batch in take(settings(folder), "val") for video in batch]
    assert [video[1:] for video in both] == [video[1:] for video in apart]


def test_synthetic_data_keeps_plan_and_labels(shards):
    real = take(settings(shards, batch_size=4), "train", 3)
    made_up = take(settings(shards, batch_size=4, synthetic=True), "train", 3)
    assert [[v[:2] for v in batch] for batch in made_up] == [[v[:2] for v in batch] for batch in real]
    assert len({pixels for batch in made_up for _, _, pixels in batch}) == 4


def test_a_frame_that_does_not_decode_is_named(tmp_path):
    """A PNG whose compressed pixels are spoilt passes every check but decoding."""
    folders = make_frame_folders(tmp_path, [3, 3])
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    spoilt = bytearray(stream.getvalue())
    spoilt[200:260] = bytes(60)
    bad = folders.root / folders.names[1] / "img_00002.jpg"
    bad.write_bytes(spoilt)
    folder = build(folders.annotations, folders.root, folders.labels, tmp_path / "shards")
    with build_loader(settings(folder), "val") as loader, pytest.raises(ShardError) as error:
        list(loader)
    assert folders.names[1] in str(error.value) and "frame 1 does not decode" in str(error.value)


def test_the_loader_stops_when_asked(shards):
    loader = build_loader(settings(shards), "train")
    batches = iter(loader)
    next(batches)
    loader.close()
    assert list(batches) == []
    with pytest.raises(ValueError, match="closed"):
        loader.dataset.read(0, np.zeros(1, np.int64))


def test_a_pass_that_is_closed_leaves_the_loader_usable(shards):
    with build_loader(settings(shards), "val") as loader:
        batches = iter(loader)
        next(batches)
        batches.close()
        assert sum(len(batch.ids) for batch in loader) == NUM_VIDEOS


@pytest.mark.parametrize(
    ("data", "message"),
    [({"train": []}, "data.train: no shards named"), ({"decode": "gpu"}, "no GPU is visible")],
)
def test_settings_that_cannot_work_are_refused(shards, data, message):
    if "decode" in data and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match=message):
        build_loader(settings(shards, **data), "train")


def test_shards_that_are_not_there_are_named_with_their_key(shards, tmp_path):
    with pytest.raises(ShardError, match=rf"^data\.train: {tmp_path}/manifest.json: not found; name a folder"):
        build_loader(settings(shards, train=[str(tmp_path)]), "train")
