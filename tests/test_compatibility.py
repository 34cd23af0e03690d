"""Files of version 0.1 keep their meaning: its run resumes, its export predicts, its shards and reports are read.

tests/support/make_fixtures.py made the files with the programs of that version.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
from launch import ROOT, run
from make_fixtures import kept_video
from project import EVALUATE, TRAIN, losses

import text4vis
from shards.reader import open_dataset

FIXTURES = ROOT / "tests" / "fixtures" / "v0.1"
EXPECTED = json.loads((FIXTURES / "expected.json").read_text())


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Paths in the files begin at the repository's folder; the numbers were computed on a CPU."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.slow
def test_a_run_goes_on_as_the_version_that_began_it_would_have(tmp_path):
    output = tmp_path / "run"
    shutil.copytree(FIXTURES / "run", output)
    text = run(TRAIN, "--config", FIXTURES / "recipe.yaml", "--output", output)
    assert f"resumed from {output}/checkpoints/step-{EXPECTED['stopped_at']:08d}" in text
    expected = {int(step): loss for step, loss in EXPECTED["losses"].items()}
    assert max(expected) > EXPECTED["stopped_at"]
    assert losses(output) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("folder", ["export", "run", "run/checkpoints/best"])
def test_exports_runs_and_checkpoints_predict_what_they_did(folder):
    recogniser = text4vis.load(FIXTURES / folder, device="cpu")
    for labels, key in ((None, "own"), (["one", "two"], "others")):
        found, expected = recogniser.predict(kept_video(), labels).top, EXPECTED["predictions"][key]
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert np.allclose([share for _, share in found], [share for _, share in expected], atol=1e-5)


def test_shards_hold_the_same_frames():
    with open_dataset(str(FIXTURES / "shards")) as dataset:
        found = {}
        for video in range(len(dataset)):
            frames = dataset.read(video, np.arange(dataset.num_frames[video]))
            found[dataset.name(video)] = hashlib.sha256(b"".join(frames)).hexdigest()
    assert found == EXPECTED["frames"]


@pytest.mark.slow
def test_features_are_taken_from_their_file_and_give_the_same_report(tmp_path):
    features, report = tmp_path / "features.safetensors", tmp_path / "report.json"
    shutil.copy(FIXTURES / features.name, features)
    before = features.stat().st_mtime_ns
    run(
        EVALUATE, "--config", FIXTURES / "recipe.yaml", "--model", FIXTURES / "export",
        "--features", features, "--report", report,
    )  # fmt: skip
    assert features.stat().st_mtime_ns == before, "the videos were embedded again"
    found, expected = (json.loads(path.read_text()) for path in (report, FIXTURES / "report.json"))
    kept = expected.keys() - {"date", "model", "versions"}
    assert {key: found.get(key) for key in kept} == {key: expected[key] for key in kept}


def test_reports_are_compared():
    from text4vis.evaluation import compare, read_report

    of_export, of_run = read_report(FIXTURES / "report.json"), read_report(FIXTURES / "run")
    found = compare(of_export, of_run)
    assert found.is_comparable and found.significance is not None
    assert {figure.name: (figure.a, figure.b) for figure in found.figures}["top1"] == (
        of_export["top1"],
        of_run["top1"],
    )


def test_class_embeddings_are_read_by_name():
    from text4vis.classifier.embeddings import file_classifier

    names = ["class 2", "class 0", "class 1"]
    rows_CD = file_classifier(FIXTURES / "classes.safetensors", names, 4)
    own_CD = text4vis.load(FIXTURES / "export", device="cpu").class_embeddings_CD
    assert np.allclose(rows_CD[[1, 2, 0]], own_CD, atol=1e-6)
