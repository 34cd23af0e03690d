"""Few-shot training: one seeded subset, the same on every rank and after every restart, gone over in whole passes."""

import itertools
from collections import Counter

import numpy as np
import pytest
import yaml
from frame_folders import make_frame_folders
from launch import finish, run, start
from tiny import write_clip

from shards.annotations import parse_annotations, parse_labels
from shards.plan import few_shot_subset
from shards.writer import build_shards
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError
from text4vis.data.loader import build_loader

TRAIN = "text4vis/train.py"
NUM_VIDEOS, NUM_CLASSES, SHOTS = 37, 4, 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("few-shot")
    return make_frame_folders(base, [1 + i % 5 for i in range(NUM_VIDEOS)], num_classes=NUM_CLASSES)


@pytest.fixture(scope="module")
def shards(folders):
    output = folders.root.parent / "shards"
    build_shards(
        parse_annotations(folders.annotations), root=folders.root, labels=parse_labels(folders.labels), output=output,
        shard_bytes=30_000,
    )  # fmt: skip
    return output


def settings(folder, seed=5, **data) -> Config:
    base = {"train": [str(folder)], "val": [str(folder)], "batch_size": 2, "num_segments": 2, "input_size": 24}
    return config_from_dict(
        {"seed": seed, "data": {**base, "scale_size": 28, "workers": 1, "shot": SHOTS, **data}}, "test"
    )


def stream(config, count, rank=0, world_size=1, consumed=0):
    """Ids of the rank's first `count` batches, from the plans."""
    with build_loader(config, "train", rank=rank, world_size=world_size, consumed=consumed) as loader:
        return [plan.ids.tolist() for plan in itertools.islice(loader.plans(), count)]


def chosen(config, **ranks):
    with build_loader(config, "train", **ranks) as loader:
        return loader.planner.few_shot.tolist()


def test_exactly_k_videos_of_each_class_and_all_of_them(shards):
    config = settings(shards)
    with build_loader(config, "train") as loader:
        batches = list(itertools.islice(loader, NUM_CLASSES * SHOTS // 2))
    ids = np.concatenate([batch.ids.numpy() for batch in batches])
    labels = np.concatenate([batch.labels.numpy() for batch in batches])
    assert sorted(ids.tolist()) == chosen(config)
    assert Counter(labels.tolist()) == dict.fromkeys(range(NUM_CLASSES), SHOTS)


@pytest.mark.parametrize("shuffle", ["global", "shards:2"])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_share_one_subset_and_one_stream(shards, world_size, shuffle):
    config = settings(shards, shuffle=shuffle)
    alone = list(itertools.chain(*stream(settings(shards, shuffle=shuffle, batch_size=2 * world_size), 9)))
    by_rank = [stream(config, 9, rank, world_size) for rank in range(world_size)]
    assert [i for step in zip(*by_rank, strict=True) for batch in step for i in batch] == alone
    assert all(chosen(config, rank=rank, world_size=world_size) == chosen(config) for rank in range(world_size))
    assert set(alone) == set(chosen(config))


def test_every_pass_shows_each_chosen_video_once_in_another_order_and_another_way(shards):
    config = settings(shards, batch_size=NUM_CLASSES * SHOTS)
    passes = stream(config, 3)
    assert all(sorted(ids) == chosen(config) for ids in passes)
    assert passes[0] != passes[1] != passes[2]
    with build_loader(config, "train") as loader:
        first, second = (
            {int(i): frames for i, frames in zip(batch.ids, batch.frames, strict=True)}
            for batch in itertools.islice(loader, 2)
        )
    assert sum(not first[i].equal(second[i]) for i in first) > len(first) // 2


@pytest.mark.parametrize("consumed", [1, 11, 12, 36, 55])
def test_a_stream_started_anywhere_is_the_tail_of_the_whole(shards, consumed):
    config = settings(shards, batch_size=1)
    whole = list(itertools.chain(*stream(config, 70)))
    assert list(itertools.chain(*stream(config, 10, consumed=consumed))) == whole[consumed : consumed + 10]


def test_the_seed_chooses(shards):
    default = chosen(settings(shards))
    assert default == chosen(settings(shards)) == chosen(settings(shards, shot_seed=5, seed=9))
    with build_loader(settings(shards), "val") as loader:
        assert default == few_shot_subset(loader.dataset.labels, SHOTS, 5).tolist()
    others = [chosen(settings(shards, shot_seed=seed)) for seed in range(6)]
    assert len({tuple(ids) for ids in [*others, default]}) == 6  # seed 5 twice


def test_an_epoch_is_whole_passes_about_as_long_as_the_data_set(shards):
    for shot, samples in ((SHOTS, 36), (1, 36), (5, 20), (None, NUM_VIDEOS), (0, NUM_VIDEOS)):
        with build_loader(settings(shards, shot=shot), "train") as loader:
            assert loader.epoch_samples == samples
    assert len(set(itertools.chain(*stream(settings(shards, shot=0), 20)))) == NUM_VIDEOS


def test_evaluation_takes_all_videos(shards):
    with build_loader(settings(shards), "val") as loader:
        assert [i for batch in loader for i in batch.ids.tolist()] == list(range(NUM_VIDEOS))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"shot": 10}, "data.shot: few-shot subset: class 1 has 9 videos, 10 are asked for"),
        ({"shot": -1}, "data.shot: input should be greater than or equal to 0, got -1"),
        ({"shot": "all"}, "data.shot"),
    ],
)
def test_a_number_that_cannot_be_had_is_refused(shards, data, message):
    with pytest.raises(ConfigError) as error:
        build_loader(settings(shards, **data), "train")
    assert message in str(error.value)


def test_the_list_names_the_videos_as_an_annotation_list_does(folders, shards, tmp_path):
    with build_loader(settings(shards), "train") as loader:
        (tmp_path / "few.txt").write_text(loader.planner.few_shot_list())
        ids = loader.planner.few_shot.tolist()
    listed = parse_annotations(tmp_path / "few.txt")
    everything = {(video.name, video.num_frames, video.label) for video in parse_annotations(folders.annotations)}
    assert {(video.name, video.num_frames, video.label) for video in listed} < everything
    few = tmp_path / "few"
    build_shards(listed, root=folders.root, labels=parse_labels(folders.labels), output=few)
    with build_loader(settings(few, shot=None), "val") as loader:
        assert len(loader.dataset) == len(ids) == NUM_CLASSES * SHOTS
    with build_loader(settings(shards, shot=None), "train") as loader:
        assert loader.planner.few_shot_list() == ""


@pytest.mark.slow
def test_a_run_writes_its_videos_and_goes_on_with_no_others(shards, tmp_path):
    recipe = {
        "seed": 3,
        "data": {"train": str(shards), "val": str(shards), "batch_size": 2, "num_segments": 2, "input_size": 32,
                 "scale_size": 36, "shot": SHOTS, "shot_seed": 7, "augmentation": "paper"},
        "network": {"arch": str(write_clip(tmp_path / "clip"))},
        "solver": {"epochs": 1, "lr": 1e-3, "lr_warmup_step": 0},
        "engine": {"precision": "fp32"},
    }  # fmt: skip
    config, output = tmp_path / "few.yaml", tmp_path / "out"
    config.write_text(yaml.safe_dump(recipe))
    arguments = [TRAIN, "--config", config, "--output", output]
    run(*arguments, ranks=2)
    with build_loader(settings(shards, shot_seed=7), "train") as loader:
        assert (output / "few_shot.txt").read_text() == loader.planner.few_shot_list()
    log = (output / "log.txt").read_text()
    assert "step 9/9  epoch 1.00" in log and f"of {NUM_VIDEOS} videos" in log  # 36 samples by 4
    assert "resumed from" in run(*arguments, ranks=2)
    lines = (output / "few_shot.txt").read_text().splitlines()
    (output / "few_shot.txt").write_text("\n".join(["another 3 0", *lines[1:]]) + "\n")
    code, text = finish(start(*arguments, ranks=2))[0]
    assert code == 1 and "few_shot.txt:1: the run began with 'another 3 0'" in text
