"""Warnings of traps in the training data name figures and the key to set; without a trap there is no warning."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shards.annotations import parse_labels
from text4vis.config.loading import load_config
from text4vis.data import traps
from text4vis.data.traps import find_traps

CONFIGS = Path(__file__).parents[2] / "configs"


def config(*overrides: str):
    return load_config(str(CONFIGS / "own-small.yaml"), ["data.train=x", "data.val=x", *overrides])


class Videos(SimpleNamespace):
    """As much of a data set as traps look at."""

    def __len__(self) -> int:
        return len(self.labels)

    def class_counts(self, num_classes):
        return np.bincount(self.labels, minlength=num_classes)

    def frame_sizes(self, _sample, numbers):
        return [(self.side, self.side + 84)] * len(numbers)


def videos(labels, num_frames=30, side=112, multi_label=False):
    return Videos(
        labels=np.array(labels), num_frames=np.full(len(labels), num_frames), side=side, multi_label=multi_label
    )


NAMES = ["surfing", "ice skating"]
PLENTY = [0, 1] * 10


def test_nothing_is_said_where_there_is_no_trap():
    assert find_traps(config(), NAMES, videos(PLENTY)) == []


@pytest.mark.parametrize(
    ("names", "message", "fix"),
    [
        (["turn left", "stop", "turn right"], "2 classes that say left or right, such as 'turn left' and 'turn right'",
         "data.flip: 0, or data.flip_swaps: [[0, 2]]"),
        (["Pushing it from left to right", "x", "Pushing it from right to left"], "2 classes that say left",
         "flip_swaps: [[0, 2]]"),
        (["rotate clockwise", "rotate anticlockwise"], "2 classes", "flip_swaps: [[0, 1]]"),
        (["turn left", "stop"], "1 class that says left or right ('turn left'), while no class", "data.flip: 0"),
    ],
)  # fmt: skip
def test_a_flip_that_makes_labels_wrong(names, message, fix):
    flipped = config("data.flip=0.5", "data.augmentation=released")
    (trap,) = traps.sided_classes(flipped, names)
    assert trap.message.startswith("data.flip: 0.5 mirrors") and message in trap.message and fix in trap.fix


@pytest.mark.parametrize("override", ["data.flip=0", "data.augmentation=none", "data.flip_swaps=[[0,1]]"])
def test_a_flip_that_is_off_or_swaps_labels_is_none(override):
    assert not list(traps.sided_classes(config("data.flip=0.5", override), ["turn left", "turn right"]))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["putting on lipstick", "putting on mascara", "surfing"], "2 of 3 class names differ"),
        (["from left to right", "from right to left"], "2 of 2"),
        (["playing guitar", "playing violin"], ""),
        (["running", "walking"], ""),
        (["same name here", "same name here"], ""),
    ],
)
def test_names_that_are_nearly_the_same(names, found):
    messages = [trap.message for trap in traps.nearly_equal_names(config(), names)]
    assert len(messages) == bool(found) and all(found in message for message in messages)
    assert not list(traps.nearly_equal_names(config("network.classifier=orthogonal"), names))


def test_names_of_published_data_sets_are_mostly_apart():
    (trap,) = traps.nearly_equal_names(config(), parse_labels(CONFIGS / "classes/kinetics_400.csv"))
    assert trap.message.startswith("13 of 400 class names")
    assert not list(traps.nearly_equal_names(config(), parse_labels(CONFIGS / "classes/hmdb51.csv")))


def test_classes_of_few_videos():
    names = ["a", "b", "c", "d"]
    found = list(traps.rare_classes(config(), names, np.array([20, 0, 2, 7])))
    assert [trap.message for trap in found] == [
        "1 class has no video to train on ('b')",
        "2 classes have fewer than 8 videos to train on ('c': 2, 'd': 7)",
    ]
    assert "data.shot: 2" in found[1].fix
    assert not list(traps.rare_classes(config("data.shot=2"), names, np.array([20, 3, 2, 7])))


def test_videos_shorter_than_the_segments():
    frames = np.array([3, *[30] * 99])
    (trap,) = traps.short_videos(config("data.num_segments=8"), frames)
    assert "1 of 100 videos have fewer frames than data.num_segments: 8, down to 3" in trap.message
    assert trap.fix.startswith("data.num_segments: 30")
    assert not list(traps.short_videos(config("data.num_segments=3"), frames))


def test_frames_larger_than_needed():
    small = config()
    (trap,) = traps.large_frames(small, [4 * small.scale_size, 4 * small.scale_size, 0])
    assert "about 16 times" in trap.message and f"--short-side {small.scale_size}" in trap.fix
    assert not list(traps.large_frames(small, [small.scale_size])) and not list(traps.large_frames(small, [0]))


def test_bf16_on_a_processor_without_it(monkeypatch):
    monkeypatch.setattr(traps.torch.cuda, "is_available", lambda: False)
    for capability, precision, said in (
        ("AVX2", "bf16", True), ("AVX512", "bf16", False), ("AVX2", "fp32", False),
    ):  # fmt: skip
        monkeypatch.setattr(traps.torch.backends.cpu, "get_cpu_capability", lambda answer=capability: answer)
        found = list(traps.slow_arithmetic(config(f"engine.precision={precision}")))
        assert [trap.fix for trap in found] == ["engine.precision: fp32"] * said
    monkeypatch.setattr(traps.torch.cuda, "is_available", lambda: True)
    assert not list(traps.slow_arithmetic(config("engine.precision=bf16")))


def test_all_traps_are_looked_for():
    found = find_traps(
        config("data.flip=0.5", "data.augmentation=released"), ["now turn left", "now turn right"],
        videos([0, 1], 2, 1080),
    )  # fmt: skip
    assert len(found) == 5 and all(trap.fix for trap in found)
