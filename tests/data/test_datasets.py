"""Opening a split and naming its classes."""

import pytest
from batches import settings

from shards.format import ShardError
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError
from text4vis.data.datasets import check_same_classes, class_names, open_split


def test_shards_that_are_not_there_are_named_with_their_key(shards, tmp_path):
    with pytest.raises(ShardError, match=rf"^data\.train: {tmp_path}/manifest.json: not found; name a folder"):
        open_split(settings(shards, train=[str(tmp_path)]), "train")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_shards_is_named(shards, split):
    with pytest.raises(ConfigError, match=rf"^data\.{split}: no shards named; build them with tools/build_shards.py"):
        open_split(settings(shards, **{split: []}), split)


def test_class_names_are_those_of_the_shards_or_of_the_list(shards, tmp_path):
    with open_split(settings(shards), "val") as dataset:
        assert class_names(settings(shards), dataset) == ["class 0", "class 1", "class 2"]
        given = tmp_path / "names.csv"
        given.write_text("id,name\n0,run\n1,jump\n2,swim\n3,fly\n")
        assert class_names(settings(shards, label_list=str(given)), dataset) == ["run", "jump", "swim", "fly"]
        given.write_text("id,name\n0,run\n1,jump\n")
        with pytest.raises(ConfigError, match=r"data.label_list: .* names 2 classes, but the shards hold label 2"):
            class_names(settings(shards, label_list=str(given)), dataset)
        given.write_text("id,name\n0,run\n1,class 2\n2,class 1\n")
        with pytest.raises(ConfigError, match=r"class 1 of .* is 'class 2', which is class 2 of the shards"):
            class_names(settings(shards, label_list=str(given)), dataset)


def test_splits_that_name_other_classes_are_refused():
    """Labels of both splits are counted under the names of one."""
    check_same_classes(Config(), ["a", "b"], ["a", "b"])
    for other in (["b", "a"], ["a"], ["a", "b", "c"]):
        with pytest.raises(ConfigError, match=r"data\.val: its shards name .* data\.label_list"):
            check_same_classes(Config(), ["a", "b"], other)


def test_a_list_gives_other_words_to_both_splits_and_no_class_another_label():
    listed = config_from_dict({"data": {"label_list": "x.csv"}}, "test")
    for other in (["a", "b"], ["A", "B", "C"], ["a"], ["A", "b"]):
        check_same_classes(listed, ["a", "b"], other)
    for other in (["b", "a"], ["A", "a"], ["b"]):
        with pytest.raises(
            ConfigError, match=r"data\.val: '[ab]' is class . of its shards and class . of those of data"
        ):
            check_same_classes(listed, ["a", "b"], other)
