"""The list of skipped videos: what it holds, and that it survives restarts and damage."""

import json

import numpy as np
import pytest

from shards.format import ShardError
from shards.reader import open_dataset
from text4vis.data.bad_videos import BadVideos, SkippedList


def test_the_list_survives_restarts(shards, tmp_path):
    with open_dataset(str(shards)) as dataset:
        bad = BadVideos(dataset, np.arange(23), 0.5, endless=True)
        bad.add(3, "torn\x1b")
        bad.add(3, "again")
        bad.add(7, "gone")
        assert [entry["reason"] for entry in bad.news()] == ["torn\\x1b", "gone"] and bad.news() == []
        listed = SkippedList(tmp_path)
        listed.add("train", bad.entries())
        with (tmp_path / "skipped.jsonl").open("a") as file:
            file.write('{"split": "tra')  # the job was killed
        bad.add(9, "worse")
        SkippedList(tmp_path).add("train", bad.entries())
        SkippedList(tmp_path).add("val", bad.entries()[:1])
        text = (tmp_path / "skipped.jsonl").read_text()
        expected = [{"split": "train", **entry} for entry in bad.entries()] + [{"split": "val", **bad.entries()[0]}]
        assert [json.loads(line) for line in text.splitlines()] == expected and "\x1b" not in text


def test_a_damaged_list_is_named(tmp_path):
    (tmp_path / "skipped.jsonl").write_text('{"split": "train", "id": 1, "name": "a"}\nnothing\n')
    with pytest.raises(ShardError, match=r"skipped.jsonl, line 2: damaged; delete the line"):
        SkippedList(tmp_path)


def test_too_many_are_an_error_at_once_in_training_and_after_the_pass_in_evaluation(shards):
    """A fifth of ten videos may be bad: two are, three are not."""
    with open_dataset(str(shards)) as dataset:
        training = BadVideos(dataset, np.arange(10), 0.2, endless=True)
        evaluation = BadVideos(dataset, np.arange(10), 0.2, endless=False)
        for bad in (training, evaluation):
            bad.add(1, "torn")
            bad.add(2, "torn")
            bad.join(())
        with pytest.raises(ShardError, match=r"3 of 10 videos cannot be used, more than the share of 0.2"):
            training.add(3, "torn")
        evaluation.add(3, "torn")
        with pytest.raises(ShardError, match=r"\(1\) torn \(2\) torn \(3\) torn"):
            evaluation.join(())
        evaluation.clear()
        evaluation.join(evaluation.news())
