"""Files of earlier versions keep their meaning: a run resumes, an export predicts, shards, lists and reports are read.

tests/support/make_fixtures.py made each folder of tests/fixtures with the programs of one version, and makes the next
one's: `python tests/support/make_fixtures.py --output tests/fixtures/NAME`. Whatever is there is tested.
"""

import hashlib
import json
import shutil

import numpy as np
import pytest
from launch import ROOT, run
from make_fixtures import QUESTION, kept_video
from project import EVALUATE, TRAIN, losses

import text4vis
from shards.format import PACKETS_VERSION
from shards.packets import SparseVideo
from shards.reader import open_dataset
from shards.stored import decode_stored

VERSIONS = sorted(path.parent for path in (ROOT / "tests" / "fixtures").glob("*/expected.json"))
WITH_MANY = [folder for folder in VERSIONS if (folder / "many").is_dir()]


def of_versions(folders):
    return pytest.mark.parametrize("version", folders, ids=lambda folder: folder.name)


def expected_of(version):
    return json.loads((version / "expected.json").read_text())


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    """Paths in the files of v0.1 begin at the repository's folder; the numbers were computed on a CPU."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def resumes(folder, expected, tmp_path):
    """A run of one rank goes on from the checkpoint to the losses that its own version had."""
    output = tmp_path / "run"
    shutil.copytree(folder / "run", output)
    text = run(TRAIN, "--config", folder / "recipe.yaml", "--output", output)
    assert f"resumed from {output}/checkpoints/step-{stopped_at(folder):08d}" in text
    losses_then = {int(step): loss for step, loss in expected["losses"].items()}
    assert max(losses_then) > stopped_at(folder)
    assert losses(output) == pytest.approx(losses_then, rel=1e-4)


def stopped_at(folder):
    (checkpoint,) = (folder / "run" / "checkpoints").glob("step-*")
    return int(checkpoint.name.partition("-")[2])


def evaluates_from_features(folder, tmp_path):
    """The features are taken from their file and give the same report."""
    features, report = tmp_path / "features.safetensors", tmp_path / "report.json"
    shutil.copy(folder / features.name, features)
    before = features.stat().st_mtime_ns
    run(
        EVALUATE, "--config", folder / "recipe.yaml", "--model", folder / "export",
        "--features", features, "--report", report,
    )  # fmt: skip
    assert features.stat().st_mtime_ns == before, "the videos were embedded again"
    found, expected = (json.loads(path.read_text()) for path in (report, folder / "report.json"))
    kept = expected.keys() - {"date", "model", "versions"}
    assert {key: found.get(key) for key in kept} == {key: expected[key] for key in kept}


def digests(dataset, read):
    return {dataset.name(video): hashlib.sha256(read(video)).hexdigest() for video in range(len(dataset))}


@pytest.mark.slow
@of_versions(VERSIONS)
def test_a_run_goes_on_as_the_version_that_began_it_would_have(version, tmp_path):
    resumes(version, expected_of(version), tmp_path)


@pytest.mark.parametrize("folder", ["export", "run", "run/checkpoints/best"])
@of_versions(VERSIONS)
def test_exports_runs_and_checkpoints_predict_what_they_did(version, folder):
    recogniser = text4vis.load(version / folder, device="cpu")
    for labels, key in ((None, "own"), (["one", "two"], "others")):
        found, expected = recogniser.predict(kept_video(), labels).top, expected_of(version)["predictions"][key]
        assert [name for name, _ in found] == [name for name, _ in expected]
        assert np.allclose([share for _, share in found], [share for _, share in expected], atol=1e-5)


@of_versions(VERSIONS)
def test_shards_hold_the_same_frames(version):
    with open_dataset(str(version / "shards")) as dataset:
        found = digests(dataset, lambda video: b"".join(dataset.read(video, np.arange(dataset.num_frames[video]))))
    assert found == expected_of(version)["frames"]


@pytest.mark.slow
@of_versions(VERSIONS)
def test_features_are_taken_from_their_file_and_give_the_same_report(version, tmp_path):
    evaluates_from_features(version, tmp_path)


@of_versions(VERSIONS)
def test_reports_are_compared(version):
    from text4vis.evaluation import compare, read_report

    of_export, of_run = read_report(version / "report.json"), read_report(version / "run")
    found = compare(of_export, of_run)
    assert found.is_comparable and found.significance is not None
    assert {figure.name: (figure.a, figure.b) for figure in found.figures}["top1"] == (
        of_export["top1"],
        of_run["top1"],
    )


@of_versions(VERSIONS)
def test_class_embeddings_are_read_by_name(version):
    from text4vis.classifier.embeddings import file_classifier

    names = ["class 2", "class 0", "class 1"]
    rows_CD = file_classifier(version / "classes.safetensors", names, 4)
    own_CD = text4vis.load(version / "export", device="cpu").class_embeddings_CD
    assert np.allclose(rows_CD[[1, 2, 0]], own_CD, atol=1e-6)


@of_versions(WITH_MANY)
def test_stored_videos_keep_their_bytes_and_labels(version):
    expected = expected_of(version)["many"]
    with open_dataset(str(version / "many" / "shards")) as dataset:
        videos = range(len(dataset))
        assert digests(dataset, dataset.read_video) == expected["videos"]
        found = {dataset.name(video): ",".join(map(str, dataset.label_of(video))) or "-" for video in videos}
    assert found == expected["labels"]


@of_versions(WITH_MANY)
def test_stored_videos_are_read_in_parts(version):
    assert json.loads((version / "packets" / "manifest.json").read_text())["version"] == PACKETS_VERSION
    with open_dataset(str(version / "packets")) as dataset:
        requests = [(video, np.array([20])) for video in range(len(dataset))]
        parts = dataset.start(requests, in_parts=True).result()
        assert digests(dataset, dataset.read_video) == expected_of(version)["packets"]
        wholes, counts = dataset.read_many(requests), dataset.num_frames.tolist()
        for (part,), (whole,), count in zip(parts, wholes, counts, strict=True):
            assert isinstance(part, SparseVideo)
            of_part, of_whole = (decode_stored(data, [20], num_frames=count)[0] for data in (part, whole))
            np.testing.assert_array_equal(of_part, of_whole)


@pytest.mark.slow
@of_versions(WITH_MANY)
def test_a_run_of_two_ranks_with_adapter_average_and_labels_goes_on(version, tmp_path):
    resumes(version / "many", expected_of(version)["many"], tmp_path)


@pytest.mark.slow
@of_versions(WITH_MANY)
def test_features_of_several_labels_give_the_same_report(version, tmp_path):
    evaluates_from_features(version / "many", tmp_path)


@pytest.mark.slow
@of_versions(WITH_MANY)
def test_a_prediction_list_is_complete_and_takes_more(version, tmp_path):
    answers, clips = tmp_path / "answers.jsonl", tmp_path / "clips"
    shutil.copytree(version / "clips", clips)
    lines = (version / "answers.jsonl").read_text().splitlines(keepends=True)
    home = json.loads(lines[1])["video"].rpartition("/")[0]
    answers.write_text("".join(line.replace(home, str(clips)) for line in lines))
    before = answers.read_bytes()
    words = ["tools/predict.py", clips, "--model", version / "export", "--jsonl", answers]
    run(*words)
    assert answers.read_bytes() == before
    shutil.copy(clips / "0.mp4", clips / "new.mp4")
    run(*words)
    assert answers.read_bytes().startswith(before) and len(answers.read_text().splitlines()) == len(lines) + 1


@pytest.mark.slow
@of_versions(WITH_MANY)
def test_an_index_answers_as_it_did(version):
    index = text4vis.open_index(version / "index", version / "export", device="cpu")
    found, expected = index.find(QUESTION), expected_of(version)["moments"]
    assert [(one.video, one.start) for one in found] == [(one["video"], one["start"]) for one in expected]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in expected], abs=1e-3)
