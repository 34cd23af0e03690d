"""Every key has a role, and a changed key has the effects that its role promises and no others."""

import dataclasses
import itertools
from operator import attrgetter
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from text4vis.config.batches import BatchSizes
from text4vis.config.keys import keys_of, schema
from text4vis.config.loading import load_config
from text4vis.config.roles import Role, key, read_key
from text4vis.config.schema import Config
from text4vis.data.loader import open_split
from text4vis.data.plan import Planner
from text4vis.evaluate import differences
from text4vis.model.preprocessing import KEYS as PREPROCESSING
from text4vis.model.preprocessing import settle
from text4vis.report.tensorboard import hyperparameters
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.runs import check_same_run

KEYS = {declared.name: declared for declared in schema()}
CLASSIFIERS = ("text", "random", "orthogonal", "lda", "sentence", "file")
# Tried one after the other: the first that a key takes and does not have already is its changed value.
VALUES = (
    True, False, 5, 3, 2, 0.25, 7.5, "shards:3", "gpu", "skip", "paper", "something", "lda", "text", "LSTM", "tsm",
    "NCE", "fp32", "sgd", "multistep", "parameters", "other {}", "other", (0.2, 0.3), ((0, 1),), ("other",),
    "squash", "bilinear", "gelu", (0.2, 0.3, 0.4), "lora", "mlp",
)  # fmt: skip


def replaced(config, name, value):
    """The configuration with another value of a key, which may contradict others."""
    head, _, rest = name.partition(".")
    return dataclasses.replace(config, **{head: replaced(getattr(config, head), rest, value) if rest else value})


def changed(config, name):
    for value in VALUES:
        try:
            other = replaced(config, name, value)
        except ValidationError:
            continue
        if attrgetter(name)(other) != attrgetter(name)(config):
            return other
    raise AssertionError(f"VALUES: has no other value that {name} takes; add one")


def test_a_key_without_a_role_cannot_be_declared():
    assert all(isinstance(declared.role, Role) for declared in KEYS.values())
    with pytest.raises(TypeError, match=r"data\.new: declare it with .*roles\.key"):
        read_key("data.new", 1, Field(1, description="no role"))
    assert read_key("data.new", 1, key(1, Role.FRAMES, "meaning")).role is Role.FRAMES


@pytest.mark.parametrize("name", KEYS)
def test_a_run_goes_on_with_other_values_of_the_keys_that_may_change_alone(name):
    config = settle(Config())
    other = changed(config, name)
    found = State(0, 0, other.solver.global_batch or 8, "data", config.to_dict(), [])
    if KEYS[name].role.may_change:
        check_same_run(found, other, "data", [], {}, Path("run"))
        return
    with pytest.raises(CheckpointError, match=f"configuration differs \\({name}: "):
        check_same_run(found, other, "data", [], {}, Path("run"))


def test_a_run_that_began_before_a_key_existed_goes_on_with_its_default():
    config = Config()
    before = config.to_dict()
    del before["data"]["flip"], before["solver"]["smoothing"]
    found = State(0, 0, 8, "data", before, [])
    check_same_run(found, config, "data", [], {}, Path("run"))
    with pytest.raises(CheckpointError, match=r"data\.flip: 0\.5 -> 0\.25"):
        check_same_run(found, replaced(config, "data.flip", 0.25), "data", [], {}, Path("run"))


def test_a_run_of_a_version_that_recorded_no_pixels_goes_on_with_those_it_had():
    config = settle(Config())
    before = config.to_dict()
    for section, name in (name.split(".") for name in PREPROCESSING):
        del before[section][name]
    found = State(0, 0, 8, "data", before, [])
    check_same_run(found, config, "data", [], {}, Path("run"))
    with pytest.raises(CheckpointError, match=r"data\.resize: 'shortest' -> 'squash'"):
        check_same_run(found, replaced(config, "data.resize", "squash"), "data", [], {}, Path("run"))


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_an_evaluation_warns_of_what_its_figures_depend_on(classifier):
    trained = replaced(settle(Config()), "network.classifier", classifier)
    trained = replaced(trained, "network.sentence_projection", True)
    for name, declared in KEYS.items():
        is_model = declared.role is Role.MODEL
        counts = declared.role is Role.FRAMES or classifier in declared.classifiers or name == "network.classifier"
        given = changed(trained, name)
        assert list(differences(trained, given, ())) == [name] * (counts or is_model), name
        assert list(differences(trained, given, keys_of(Role.MODEL))) == [name] * counts, name


def test_every_classifier_declares_the_keys_that_decide_it():
    assert {kind for declared in KEYS.values() for kind in declared.classifiers} == set(CLASSIFIERS)


def test_tensorboard_shows_what_results_depend_on():
    values = hyperparameters(Config(), 24)
    fixed = {name for name, declared in KEYS.items() if not declared.role.may_change}
    assert set(values) == fixed | {"solver.global_batch"} and values["solver.global_batch"] == 24


def plans(config, split, dataset) -> str:
    planner = Planner(config, split, dataset, 0, 1, sizes=BatchSizes(4, 1, 1))
    videos = (video for plan in planner.plans() for video in dataclasses.astuple(plan)[0])
    return repr(list(itertools.islice(videos, 240 if split == "train" else 16)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("split", "roles"),
    [("train", {Role.DATA, Role.FRAMES, Role.AUGMENTATION}), ("val", {Role.DATA, Role.FRAMES, Role.VIEWS})],
)
def test_only_keys_of_these_roles_change_what_the_model_sees(project, split, roles):
    """And training sees a change of every key that decides the augmentation."""
    config = settle(load_config(project.config, ["data.augmentation=paper", "data.flip_swaps=[[1, 2]]"]))
    dataset = open_split(config, split)
    expected = plans(config, split, dataset)
    for name, declared in KEYS.items():
        if declared.role not in roles:
            assert plans(changed(config, name), split, dataset) == expected, name
        elif declared.role is Role.AUGMENTATION:
            assert plans(changed(config, name), split, dataset) != expected, name
    dataset.close()
