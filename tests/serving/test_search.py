"""Finding: exact answers, moments that do not overlap, sentences and examples, through Python and the command."""

import csv
import io
import json
import os
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from launch import ROOT, finish, start
from PIL import Image
from stub_index import STRIDE, WINDOW, StubEmbed, build, settings, vectors, write_stub
from tiny import tiny_network
from videos import encode, write_video

import text4vis
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, DataConfig
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import export_model
from text4vis.serving.footage import Sampler
from text4vis.serving.index_store import Catalogue, SearchError, read_catalogue
from text4vis.serving.pictures import clock
from text4vis.serving.search import SearchIndex

DIMS = 16


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    """An index of 30 stubs of 1 to 10 windows in several parts, with rows of earlier versions of some files."""
    base = tmp_path_factory.mktemp("stubs")
    (base / "files").mkdir()
    for number in range(30):
        write_stub(base / "files" / f"{number}.mp4", number, 1 + number % 10)
        if number % 9 == 0:
            build(base / "index", base / "files", StubEmbed(DIMS))
    write_stub(base / "files" / "0.mp4", 1000, 1)
    os.utime(base / "files" / "0.mp4", ns=(1, 1))
    build(base / "index", base / "files", StubEmbed(DIMS))
    return base


def all_windows(catalogue: Catalogue, question_D: np.ndarray) -> list[tuple[float, str, float, float]]:
    """Score, video, start and end of every window, the best first, by plain arithmetic."""
    found = []
    for video in catalogue.videos.values():
        scores = catalogue.vectors(video).astype(np.float64) @ question_D
        starts = STRIDE * np.arange(video.windows)
        found += [(score, video.path, start, start + WINDOW) for score, start in zip(scores, starts, strict=True)]
    return sorted(found, reverse=True)


def plain_moments(windows: list[tuple[float, str, float, float]], top: int) -> list[tuple[float, str, float, float]]:
    kept: list = []
    for one in windows:
        if len(kept) < top and all(one[1] != other[1] or abs(one[2] - other[2]) >= WINDOW for other in kept):
            kept.append(one)
    return kept


@pytest.mark.parametrize("top", [1, 7, 40, 1000])
def test_the_answers_are_those_of_plain_arithmetic_over_all_windows(stubs, top):
    index = SearchIndex.open(stubs / "index")
    assert len(index.catalogue.parts) > 2 and index.catalogue.num_dead == 1
    for seed in range(5):
        (question_D,) = vectors(seed, 1, DIMS)
        expected = plain_moments(all_windows(index.catalogue, question_D), top)
        found = index.nearest(question_D, top)
        assert [(m.video, m.start, m.end) for m in found] == [one[1:] for one in expected]
        np.testing.assert_allclose([m.score for m in found], [one[0] for one in expected], atol=1e-6)


def test_scores_that_differ_by_less_than_the_rounding_are_in_order(tmp_path):
    """All windows lie within 0.002 of each other: float16 products alone would mix them up."""
    (tmp_path / "files").mkdir()
    (base_D,) = vectors(0, 1, 512)

    def embed(paths):
        for path in paths:
            noise_WD = 0.002 * vectors(int(Path(path).stem), 20, 512)
            close_WD = base_D + noise_WD
            yield WINDOW + STRIDE * 19, close_WD / np.linalg.norm(close_WD, axis=1, keepdims=True)

    for number in range(100):
        write_stub(tmp_path / "files" / f"{number}.mp4", number)
    paths = sorted(map(str, (tmp_path / "files").iterdir()))
    build(tmp_path / "index", paths, embed, settings=settings(512))
    index = SearchIndex.open(tmp_path / "index")
    expected = plain_moments(all_windows(index.catalogue, base_D), 20)
    scores = [m.score for m in index.nearest(base_D, 20)]
    assert max(scores) - min(scores) < 0.002
    np.testing.assert_allclose(scores, [one[0] for one in expected], atol=2e-7)


def test_vectors_that_are_none_are_refused(stubs, tmp_path):
    shutil.copytree(stubs / "index", tmp_path / "index")
    video = read_catalogue(tmp_path / "index").videos[str(stubs / "files" / "5.mp4")]
    for value in (np.nan, np.inf, 300.0):
        with (tmp_path / "index" / "vectors" / video.part).open("r+b") as stream:
            stream.seek(2 * DIMS * video.row)
            stream.write(np.full(DIMS, value, np.float16).tobytes())
        with pytest.raises(SearchError, match="no unit vectors"):
            SearchIndex.open(tmp_path / "index").nearest(vectors(0, 1, DIMS)[0])


def export(folder: Path, seed: int = 0, **network) -> Path:
    chosen = tiny_network(folder / "clip", **network)
    torch.manual_seed(seed)
    model = build_model(chosen, 4).eval()
    with torch.no_grad():
        model.visual.proj.add_(0.01 * seed)
    config = settle(Config(network=chosen, data=DataConfig(num_segments=4, input_size=32, dataset="tiny")))
    names = ["archery", "surfing"]
    export_model(folder / "export", model, chosen, config.to_dict(), names, build_classifier(config, model, names), {})
    return folder / "export"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """Four films of 10 frames a second: 0.6, 3, 9 and 12 s, one with a name that no terminal should be shown."""
    base = tmp_path_factory.mktemp("videos")
    (base / "deep").mkdir()
    rng = np.random.default_rng(0)
    for name, frames in (("a", 6), ("deep/b", 30), ("deep/c\n\x1b[31m", 90), ("d", 120)):
        images = [np.full((48, 64, 3), colour, np.uint8) for colour in rng.integers(0, 256, (frames // 3, 3))]
        images = [image for image in images for _ in range(3)]
        encode(base / f"{name}.mp4", images=images, rate=10)
    (base / "broken.mp4").write_bytes(b"\0\0\0\x18ftypmp42 but no video follows" * 20)
    (base / "note.pdf").write_bytes(b"%PDF")
    return base


@pytest.fixture(scope="module")
def index(model, videos, tmp_path_factory) -> Path:
    """Built by the command, by two processes at once."""
    folder = tmp_path_factory.mktemp("index") / "index"
    ended = finish(start("tools/search.py", "index", videos, "--model", model, "--output", folder, ranks=2))
    assert [code for code, _ in ended] == [1, 1]
    text = ended[0][1]
    assert "search: not indexed: " in text and "broken.mp4" in text
    assert "1 file could not be read" in text and "`touch` them" in text
    assert "1 no video ('note.pdf')" in text and "4 videos, 11 windows" in text
    assert "\x1b" not in text.replace("\x1b[A", "")
    return folder


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """Runs tools/search.py in this process; what it printed to standard output and to standard error."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["search.py", *map(str, arguments)])
        with redirect_stdout(io.StringIO()) as stdout, redirect_stderr(io.StringIO()) as stderr:
            runpy.run_path(str(ROOT / "tools" / "search.py"), run_name="__main__")
    assert ended.value.code == code, stdout.getvalue() + stderr.getvalue()
    return stdout.getvalue(), stderr.getvalue()


@pytest.mark.slow
def test_windows_are_embedded_as_the_model_embeds_their_frames(index, model, videos):
    recogniser = text4vis.load(model)
    catalogue = read_catalogue(index)
    video = catalogue.videos[str(videos / "d.mp4")]
    assert (video.seconds, video.windows) == (12.0, 5)
    for number in range(video.windows):
        start, end = catalogue.settings.span(video.seconds, number)
        frames_TSS3 = Sampler(recogniser.config).sample_part(video.path, start, end)
        frames = torch.from_numpy(frames_TSS3).permute(0, 3, 1, 2)[None]
        with torch.no_grad():
            expected = torch.nn.functional.normalize(recogniser.model.encode_video(frames), dim=-1)[0].numpy()
        np.testing.assert_allclose(catalogue.vectors(video)[number], expected, atol=1e-3)


def test_a_sentence_finds_moments_in_python_and_by_the_command(index, videos, tmp_path):
    opened = text4vis.open_index(index)
    text = opened.predictor.model.encode_text(["the thing"])
    question_D = torch.nn.functional.normalize(text, dim=-1)[0].numpy()
    np.testing.assert_allclose(opened.embed("the thing"), question_D, atol=1e-6)
    found = opened.find("the thing", top=3)
    assert [vars(m) for m in found] == [vars(m) for m in opened.nearest(question_D, 3)]
    assert found != opened.find("the thing", top=3, prompt="a video of {}.")
    picture = tmp_path / "sheet.png"
    stdout, _ = run("find", index, "the thing", "--top", 3, "--json", "--picture", picture)
    assert json.loads(stdout) == [pytest.approx(vars(m), abs=1e-6) for m in found]
    with Image.open(picture) as sheet:
        assert sheet.width > 1000 and len(np.unique(np.asarray(sheet))) > 50
    stdout, _ = run("find", index, "the thing", "--top", 1000)
    rows = [row for row in stdout.splitlines() if str(videos) in row]
    assert len(rows) == len(opened.find("the thing", top=1000))
    assert "\x1b" not in stdout and any("c\\n\\x1b[31m.mp4" in row for row in rows)


def test_an_example_finds_its_like_but_not_itself(index, videos, tmp_path):
    opened = text4vis.open_index(index)
    shutil.copy(videos / "d.mp4", tmp_path / "copy.mp4")
    best = opened.like(tmp_path / "copy.mp4", at=4.0, top=1)[0]
    assert (best.video, best.start, best.end) == (str(videos / "d.mp4"), 4.0, 8.0)
    assert best.score == pytest.approx(1, abs=1e-3)
    others = opened.like(videos / "d.mp4", at=4.0, top=100)
    assert {(m.video, m.start) for m in others} >= {(str(videos / "d.mp4"), 0.0), (str(videos / "d.mp4"), 8.0)}
    assert all(m.video != best.video or m.end <= 4 or m.start >= 8 for m in others)
    assert best.video not in {m.video for m in opened.like(videos / "d.mp4", top=100)}
    stdout, _ = run("find", index, "--like", videos / "a.mp4", "--json")
    assert json.loads(stdout)[0]["video"] != str(videos / "a.mp4")
    _, stderr = run("find", index, "--like", videos / "a.mp4", "--at", 7, code=1)
    assert "lasts 0.6 s, so there is no moment at 7 s" in stderr


def test_the_index_goes_with_its_model_alone(index, model, videos, tmp_path):
    other = export(tmp_path, seed=1)
    before = (index / "videos.jsonl").read_bytes()
    _, stderr = run("index", videos, "--model", other, "--output", index, code=1)
    assert "was made with another model (other weights)" in stderr
    assert (index / "videos.jsonl").read_bytes() == before
    with pytest.raises(SearchError, match="another model"):
        text4vis.open_index(index, other).find("a")
    shutil.copytree(index, tmp_path / "copied")
    shutil.copytree(model, tmp_path / "moved")
    (tmp_path / "copied" / "model.json").write_text(json.dumps({"path": str(tmp_path / "nowhere")}))
    with pytest.raises(SearchError, match="nowhere: the index's model is not there any more; name its place"):
        text4vis.open_index(tmp_path / "copied").find("a")
    assert text4vis.open_index(tmp_path / "copied", tmp_path / "moved").find("a")
    with pytest.raises(SearchError, match=r"question: .*(too long|tokens)"):
        text4vis.open_index(index).find("word " * 300)
    with pytest.raises(SearchError, match="no search index; build one"):
        text4vis.open_index(tmp_path / "moved")


def test_a_model_that_never_saw_text_answers_by_example_only(videos, tmp_path):
    trained = export(tmp_path, classifier="random")
    assert "1 video," in run("index", videos / "a.mp4", "--model", trained, "--output", tmp_path / "index")[0]
    opened = text4vis.open_index(tmp_path / "index")
    with pytest.raises(SearchError, match="sentences mean nothing to it"):
        opened.find("a")
    assert opened.like(videos / "d.mp4")


def write_captions(path: Path, lines: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("key", "video_id", "sentence"), *(("x", *line) for line in lines)])
    return path


def test_captions_give_the_figures_of_plain_arithmetic(index, videos, tmp_path):
    lines = [("a", "in a thing"), ("b", "the thing"), ("d.mp4", "the in"), ("deep/b.mp4", "thing thing")]
    run("score", index, "--captions", write_captions(tmp_path / "c.csv", lines), "--json", tmp_path / "out.json")
    figures = json.loads((tmp_path / "out.json").read_text())
    opened = text4vis.open_index(index)
    paths = [str(videos / name) for name in ("a.mp4", "deep/b.mp4", "d.mp4")]
    scores = np.array([
        [(opened.catalogue.vectors(opened.catalogue.videos[path]).astype(np.float64) @ opened.embed(text)).max()
         for path in paths] for _, text in lines
    ])  # fmt: skip
    right = [0, 1, 2, 1]
    by_text = [1 + int((row > row[right[q]]).sum()) for q, row in enumerate(scores)]
    assert figures["text_to_video"]["median_rank"] == np.median(by_text)
    assert figures["text_to_video"]["R@1"] == 100 * np.mean([rank == 1 for rank in by_text])
    of_b = max(scores[1, 1], scores[3, 1])
    by_video = [1 + (scores[:, 0] > scores[0, 0]).sum(), 1 + (scores[:, 1] > of_b).sum(),
                1 + (scores[:, 2] > scores[2, 2]).sum()]  # fmt: skip
    assert figures["video_to_text"]["median_rank"] == np.median(by_video)
    assert (figures["captions"], figures["videos"]) == (4, 3)
    for bad, message in (
        ([("e", "x")], "c.csv:2: 'e' is no video of the index"),
        ([("a", "")], "c.csv:2: no caption"),
        ([], "no captions below the header"),
    ):
        _, stderr = run("score", index, "--captions", write_captions(tmp_path / "c.csv", bad), code=1)
        assert message in stderr


def test_lists_name_files_and_what_is_gone_is_said(model, tmp_path):
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", 10)
    (tmp_path / "list.txt").write_text("a.mp4\nb.mp4\n\n")
    arguments = ("index", tmp_path / "list.txt", "--model", model, "--output", tmp_path / "index", "--window", 2)
    assert "2 videos, 2 windows" in run(*arguments)[0]
    (tmp_path / "b.mp4").unlink()
    stdout, stderr = run(*arguments, code=1)
    assert "2 videos" in stdout and "1 file of the index is gone: kept; --remove-gone removes" in stderr
    assert "b.mp4: no such file" in stderr
    stdout, stderr = run("index", tmp_path / "a.mp4", *arguments[2:6], "--remove-gone")
    assert "1 video, 1 window" in stdout and "1 file of the index is gone: removed" in stderr


def test_times_are_written_as_players_do():
    assert [clock(s) for s in (0, 59.96, 61.25, 3723.4)] == ["0:00.0", "1:00.0", "1:01.2", "1:02:03.4"]
