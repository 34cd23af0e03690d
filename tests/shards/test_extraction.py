"""Frames of videos to folders: the list that is written parses to what was extracted."""

import pytest
from videos import write_video

from shards.annotations import Annotation, parse_annotations
from shards.extraction import extract_frames
from shards.format import ShardError


def test_names_that_the_list_of_frames_cannot_hold_are_refused_first(tmp_path):
    write_video(tmp_path / "v/# 1.mp4", 10, frames=2)
    extract_frames([Annotation("# 1.mp4", None, 0, 1)], root=tmp_path / "v", output=tmp_path / "f")
    (parsed,) = parse_annotations(tmp_path / "f/annotations.txt", root=tmp_path / "f")
    assert (parsed.name, parsed.num_frames) == ("# 1", 2)
    with pytest.raises(ShardError, match=r"list:4: 'a .mp4': the folder of its frames: the name 'a ' cannot stand"):
        extract_frames([Annotation("a .mp4", None, 0, 4)], root=tmp_path, output=tmp_path / "g", list_name="list")
    assert not (tmp_path / "g").exists()
