"""Every figure of a report against a plain re-derivation."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from text4vis.evaluation import comparison
from text4vis.evaluation.calibration import calibration_figures
from text4vis.evaluation.protocols import CENTRE_CROP, Views, class_scores, figures, write_report


class Embedded:
    """Embeddings of videos that lie near their class more often than not."""

    def __init__(self, classes=8, videos=60, views=12, width=5, seed=0):
        rng = np.random.default_rng(seed)
        self.classes_CD = rng.normal(size=(classes, width)).astype(np.float32)
        self.labels_N = rng.integers(0, classes, videos)
        noise = rng.normal(size=(videos, 1, width)) + rng.normal(size=(videos, views, width))
        lengths = rng.uniform(0.5, 4, (videos, views, 1))
        self.embeddings_NVD = (lengths * (self.classes_CD[self.labels_N][:, None] + noise)).astype(np.float32)
        self.names = [f"class {c}" for c in range(classes)]

    def figures(self, **options):
        return figures(self.embeddings_NVD, self.labels_N, self.classes_CD, self.names, **options)


def plain_scores(views_NVD, classes_CD):
    """View fusion, video by video, in torch."""
    scores = []
    for views_VD in torch.from_numpy(views_NVD).double():
        video_D, rows_CD = sum(views_VD) / len(views_VD), torch.from_numpy(classes_CD).double()
        cosines_C = rows_CD @ video_D / (video_D.norm() * rows_CD.norm(dim=1))
        scores.append(torch.softmax(100 * cosines_C, dim=0))
    return torch.stack(scores).numpy()


def plain_accuracy(scores_NC, labels_N, k):
    ranked = np.argsort(-scores_NC, axis=1)[:, :k]
    return 100 * float(np.mean([label in row for label, row in zip(labels_N, ranked, strict=True)]))


def test_views_are_fused_as_published():
    data = Embedded()
    expected = plain_scores(data.embeddings_NVD, data.classes_CD)
    np.testing.assert_allclose(class_scores(data.embeddings_NVD, data.classes_CD), expected, rtol=1e-9, atol=1e-30)


def test_figures_of_all_classes():
    data = Embedded()
    found = data.figures()
    scores = plain_scores(data.embeddings_NVD, data.classes_CD)
    assert 20 < found["top1"] < 95
    assert found["top1"] == pytest.approx(plain_accuracy(scores, data.labels_N, 1))
    assert found["top5"] == pytest.approx(plain_accuracy(scores, data.labels_N, 5))
    present = np.unique(data.labels_N)
    by_class = [plain_accuracy(scores[data.labels_N == c], data.labels_N[data.labels_N == c], 1) for c in present]
    assert found["mean_class_accuracy"] == pytest.approx(np.mean(by_class))
    aps = [average_precision_score(data.labels_N == c, scores[:, c]) for c in present]
    assert found["map"] == pytest.approx(100 * np.mean(aps))
    assert found["chance"] == 100 / 8
    told = found["predictions"]
    assert told["labels"] == data.labels_N.tolist() and told["predicted"] == scores.argmax(axis=1).tolist()
    np.testing.assert_allclose(told["probability"], scores.max(axis=1), atol=1e-4)
    np.testing.assert_allclose(told["label_probability"], scores[range(60), data.labels_N], atol=1e-4)
    assert [sum(row) for row in found["confusion"]] == [row["videos"] for row in found["per_class"]]
    assert [row[c] for c, row in enumerate(found["confusion"])] == [row["correct"] for row in found["per_class"]]


@pytest.mark.parametrize("classes", [4, 7, 51, 101])
def test_half_classes_are_evaluated_among_themselves(classes):
    """By the published rule: seed s, half of the classes, their videos, scores among these classes alone."""
    data = Embedded(classes=classes, videos=5 * classes, views=2, seed=classes)
    found = data.figures()["half_classes"]
    top1, top5 = [], []
    for seed in range(10):
        np.random.seed(seed)
        chosen = np.random.permutation(classes)[: classes // 2].tolist()
        videos = [n for n, label in enumerate(data.labels_N) if label in chosen]
        scores = plain_scores(data.embeddings_NVD[videos], data.classes_CD[chosen])
        labels = np.array([chosen.index(label) for label in data.labels_N[videos]])
        top1.append(plain_accuracy(scores, labels, 1))
        top5.append(plain_accuracy(scores, labels, 5))
        assert found["splits"][seed]["videos"] == len(videos) and found["splits"][seed]["classes"] == classes // 2
    assert [split["top1"] for split in found["splits"]] == pytest.approx(top1)
    assert [split["top5"] for split in found["splits"]] == pytest.approx(top5)
    assert (found["top1_mean"], found["top1_std"]) == pytest.approx((np.mean(top1), np.std(top1)))
    assert (found["top5_mean"], found["top5_std"]) == pytest.approx((np.mean(top5), np.std(top5)))


def test_given_splits_are_evaluated_among_themselves():
    data = Embedded()
    splits = {"one.csv": np.array([0, 3, 5]), "two.csv": np.array([1, 3, 4, 7])}
    found = data.figures(class_splits=splits)["class_splits"]
    expected = []
    for classes in splits.values():
        videos = np.isin(data.labels_N, classes)
        scores = plain_scores(data.embeddings_NVD[videos], data.classes_CD[classes])
        expected.append(plain_accuracy(scores, np.searchsorted(classes, data.labels_N[videos]), 1))
    assert [(split["name"], split["classes"]) for split in found["splits"]] == [("one.csv", 3), ("two.csv", 4)]
    assert [split["top1"] for split in found["splits"]] == pytest.approx(expected)
    assert found["top1_mean"] == pytest.approx(np.mean(expected)) and data.figures()["class_splits"] is None


def test_protocols_that_do_not_apply_are_null_and_the_report_stays_json(tmp_path):
    assert Embedded(classes=3).figures()["half_classes"] is None
    few = Embedded(videos=60)
    few.labels_N[:] = 0  # half of the splits hold no video
    assert few.figures()["half_classes"] is None
    broken = Embedded()
    broken.embeddings_NVD[3] = np.nan
    found = broken.figures()
    assert found["map"] is None and found["predictions"]["probability"][3] is None
    write_report(tmp_path / "deep" / "report.json", found)
    text = (tmp_path / "deep" / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(json.dumps(found))
    assert len(text.splitlines()) < 60, "rows of numbers stay on one line"


def test_a_video_without_finite_scores_is_wrong_everywhere():
    data = Embedded()
    whole = data.figures()
    right = [n for n, label in enumerate(data.labels_N) if whole["predictions"]["predicted"][n] == label == 0]
    data.embeddings_NVD[right] = np.nan
    found = data.figures()
    assert found["not_finite"] == len(right) > 0 and found["top1_correct"] == whole["top1_correct"] - len(right)
    assert sum(row["correct"] for row in found["per_class"]) == found["top1_correct"]
    assert [row["videos"] for row in found["per_class"]] == [row["videos"] for row in whole["per_class"]]
    assert found["confusion"][0][0] == whole["confusion"][0][0] - len(right)
    assert found["mean_class_accuracy"] < whole["mean_class_accuracy"]
    a, b = (report | {"data_fingerprint": "f"} for report in (whole, found))
    assert comparison.compare(a, b).significance.only_a == len(right)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("crops", [1, 3, 5, 10])
@pytest.mark.parametrize("clips", [1, 2, 4, 5])
def test_protocols_within_a_pass_use_the_views_they_say(clips, crops, dense):
    found = {(k, m): (chosen, note) for k, m, chosen, note in Views(clips, crops, dense).subsets()}
    expected = {(k, m) for k in {1, clips} for m in {1, crops, *([5] if crops == 10 else [])}}
    assert set(found) == expected
    assert list(found)[-1] == (clips, crops) and found[clips, crops] == (list(range(clips * crops)), "")
    if clips > 1 or crops > 1:
        (single,), note = found[1, 1]
        clip, crop = divmod(single, crops)
        assert (clip, crop) == (clips // 2 if dense and clips > 1 else 0, CENTRE_CROP[crops])
        assert ("2 pixels" in note) == (crops > 1) and ("window" in note) == (dense and clips > 1)
    if crops == 10:
        assert found[1, 1][0][0] in found[1, 5][0]
        assert found[clips, 5][0] == [v for v in range(10 * clips) if v % 2 == 0] and not found[clips, 5][1]


def test_protocols_within_a_pass_score_their_views_alone():
    data = Embedded()
    found = data.figures(views=Views(4, 3))
    for row in found["by_views"]:
        clips = [0] if row["clips"] == 1 else range(4)
        crops = [2] if row["crops"] == 1 else range(3)
        chosen = [3 * clip + crop for clip in clips for crop in crops]
        scores = plain_scores(data.embeddings_NVD[:, chosen], data.classes_CD)
        assert row["top1"] == pytest.approx(plain_accuracy(scores, data.labels_N, 1))
    assert [row["top1"] for row in found["by_views"]][-1] == found["top1"]
    assert len({row["top1"] for row in found["by_views"]}) > 1


def test_an_evaluation_has_one_view_unless_it_says_otherwise():
    assert list(Views().subsets()) == [(1, 1, [0], "")]


def test_the_calibration_is_that_of_one_view_without_videos_that_have_no_scores():
    data = Embedded(videos=60)
    centre_N1D = data.embeddings_NVD[:, 2:3].copy()
    data.embeddings_NVD[7] = np.nan
    others = np.arange(60) != 7
    scores_NC = class_scores(centre_N1D[others], data.classes_CD)
    assert data.figures(views=Views(4, 3))["calibration"] == calibration_figures(scores_NC, data.labels_N[others])


def test_probabilities_have_four_decimals():
    told = Embedded().figures()["predictions"]
    for column in (told["probability"], told["label_probability"]):
        assert column == [round(value, 4) for value in column] != [round(value, 3) for value in column]


def test_a_report_is_json_whatever_its_tables_hold(tmp_path):
    """One line for each key; a table has one for each row, and its rows are lists or objects."""
    report = {"name": "Zürich", "none": [], "numbers": [1, 2], "matrix": [[1], [2]], "rows": [{"a": 1}, {"é": 2}]}
    write_report(tmp_path / "a" / "b" / "report.json", report)
    write_report(tmp_path / "a" / "b" / "report.json", report)
    text = (tmp_path / "a" / "b" / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report and "Zürich" in text
    assert text.splitlines() == [
        "{", ' "name": "Zürich",', ' "none": [],', ' "numbers": [1, 2],', ' "matrix": [', "  [1],", "  [2]", " ],",
        ' "rows": [', '  {"a": 1},', '  {"é": 2}', " ]", "}",
    ]  # fmt: skip
