"""Captions of indexed videos, and how well an index finds the videos of its captions.

A caption file is a CSV with a header that names the columns `video` (or `video_id`) and `caption` (or `sentence`), as
MSR-VTT's lists have them; other columns are left alone. A video may have several lines. It is named by its path, by
the end of its path (`a/b.mp4`), or by its file name without extension.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from shards.text import printable
from text4vis.evaluation.retrieval import ranks, retrieval_figures
from text4vis.serving.index_store import SearchError
from text4vis.serving.search import SearchIndex

_VIDEO, _CAPTION = ("video", "video_id"), ("caption", "sentence")


def read_captions(path: Path, videos: Sequence[str]) -> list[tuple[int, str]]:
    """Lines of a caption file: a position in `videos`, which are paths, and a caption.

    Raises SearchError that names the file, the line and the fix.
    """
    by_name = _by_name(videos)
    found: list[tuple[int, str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            columns = [name.strip().lower() for name in reader.fieldnames or ()]
            reader.fieldnames = columns
            video_column, caption_column = (
                next((name for name in names if name in columns), "") for names in (_VIDEO, _CAPTION)
            )
            if not video_column or not caption_column:
                raise SearchError(f"{path}:1: the first line must name the columns `video` and `caption`")
            for row in reader:
                where = f"{path}:{reader.line_num}"
                name, caption = (row[video_column] or "").strip(), (row[caption_column] or "").strip()
                if not name or not caption:
                    raise SearchError(f"{where}: no {'caption' if name else 'video'}; complete the line or delete it")
                found.append((_position(name, by_name, videos, where), caption))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SearchError(f"{path}: no CSV in UTF-8 ({error})") from None
    if not found:
        raise SearchError(f"{path}: no captions below the header")
    return found


def _by_name(videos: Iterable[str]) -> dict[str, list[int]]:
    names: dict[str, list[int]] = defaultdict(list)
    for position, path in enumerate(videos):
        for name in {PurePath(path).name, PurePath(path).stem}:
            names[name].append(position)
    return names


def _position(name: str, by_name: dict[str, list[int]], videos: Sequence[str], where: str) -> int:
    ends = f"/{name.lstrip('/')}"
    candidates = by_name.get(PurePath(name).name, [])
    if "/" in name:
        candidates = [position for position in candidates if videos[position].endswith(ends)]
    if len(candidates) != 1:
        what = f"fits {len(candidates)} videos of the index" if candidates else "is no video of the index"
        fix = "give more of its path" if candidates else "index it first, or delete the line"
        raise SearchError(f"{where}: {printable(name)!r} {what}; {fix}")
    return candidates[0]


def score_captions(index: SearchIndex, path: Path, prompt: str = "{}") -> dict[str, Any]:
    """R@1, R@5, R@10 and median rank of text to video and of video to text, in JSON values.

    The videos that the file names are the candidates, and its captions. A video and a caption are as near as the
    video's best window. Raises SearchError.
    """
    paths = [video.path for video in index.videos]
    lines = read_captions(path, paths)
    positions = sorted({position for position, _ in lines})
    texts = list(dict.fromkeys(caption for _, caption in lines))
    column, row = ({value: number for number, value in enumerate(values)} for values in (positions, texts))
    right_QV = np.zeros((len(texts), len(positions)), bool)
    for position, caption in lines:
        right_QV[row[caption], column[position]] = True
    questions_QD = np.stack([index.embed(text, prompt) for text in texts])
    scores_QV = index.best_scores(questions_QD, positions)
    return {
        "captions": len(texts),
        "videos": len(positions),
        "prompt": prompt,
        "text_to_video": retrieval_figures(ranks(scores_QV, right_QV)),
        "video_to_text": retrieval_figures(ranks(scores_QV.T, right_QV.T)),
    }
