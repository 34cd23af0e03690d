"""Opening a split and naming its classes."""

import pytest
from batches import settings

from shards.format import ShardError
from text4vis.config.schema import ConfigError
from text4vis.data.datasets import class_names, open_split


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
