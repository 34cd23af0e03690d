"""Batches of videos with several labels or none, and what cannot be done with them."""

import json

import numpy as np
import pytest
import torch
from batches import build, settings
from frame_folders import make_frame_folders

from text4vis.config.schema import ConfigError
from text4vis.data.datasets import class_names, open_split
from text4vis.data.loader import build_loader
from text4vis.data.plan import Planner
from text4vis.data.samples import iterate_samples
from text4vis.data.traps import find_traps

LABELS = ["0,2", "1", "-", "0,1,2", "2"]
SETS = [{0, 2}, {1}, set(), {0, 1, 2}, {2}]


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    base = tmp_path_factory.mktemp("several")
    folders = make_frame_folders(base, [5] * len(LABELS), labels=LABELS)
    return build(folders.annotations, folders.root, folders.labels, base / "shards"), folders.names


def test_a_batch_says_of_each_class_whether_a_video_has_it(several):
    folder, names = several
    found = {}
    with build_loader(settings(folder), "val") as loader:
        for batch in loader:
            assert batch.labels.dtype == torch.bool and batch.labels.shape == (len(batch.ids), 3)
            for sample, target_C in zip(batch.ids.tolist(), batch.labels, strict=True):
                found[loader.dataset.name(sample)] = set(target_C.nonzero().flatten().tolist())
    assert found == dict(zip(names, SETS, strict=True))


def test_a_flip_swaps_each_label(several):
    config = settings(several[0], flip=1.0, flip_swaps=[[0, 1]])
    dataset = open_split(config, "train")
    plan = Planner(config, "train", dataset, 0, 1).plan(np.arange(5), np.zeros(5, np.int64))
    for sample, target_C in enumerate(plan.labels):
        stored = set(dataset.label_of(sample))
        assert set(np.flatnonzero(target_C).tolist()) == {{0: 1, 1: 0}.get(label, label) for label in stored}


def test_single_labels_beside_several_are_targets_too(several, shards):
    config = settings(several[0], val=[str(several[0]), str(shards)])
    with build_loader(config, "val") as loader:
        targets_NC = torch.cat([batch.labels for batch in loader])
    assert targets_NC.shape == (28, 3) and (targets_NC[5:].sum(dim=1) == 1).all()


def test_samples_for_other_programs_keep_the_json_of_their_data_set(several, shards):
    with iterate_samples([str(several[0]), str(shards)], "val") as samples:
        facts = [json.loads(sample["json"]) for sample in samples]
    assert [("labels" in fact, "label" in fact) for fact in facts] == [(True, False)] * 5 + [(False, True)] * 23


def test_few_shot_training_is_refused(several):
    with pytest.raises(ConfigError, match=r"data\.shot: 1 videos of each class cannot be chosen"):
        build_loader(settings(several[0], shot=1), "train")


def test_classes_and_traps_are_counted(several, tmp_path):
    shorter = tmp_path / "two.csv"
    shorter.write_text("id,name\n0,a\n1,b\n")
    config = settings(several[0], label_list=str(shorter))
    with open_split(config, "train") as dataset:
        with pytest.raises(ConfigError, match="names 2 classes, but the shards hold label 2"):
            class_names(config, dataset)
        (rare,) = (trap for trap in find_traps(config, dataset.classes, dataset) if "fewer than" in trap.message)
    assert "'class 0': 2, 'class 1': 2, 'class 2': 3" in rare.message and "data.shot" not in rare.fix
