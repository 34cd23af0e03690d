"""Many labels a video from the list to the prediction, with the programs as people start them."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import yaml
from launch import finish, run, start
from PIL import Image
from project import EVALUATE, TRAIN, losses
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import write_clip

import text4vis
from shards.reader import open_dataset
from text4vis.config.schema import ConfigError
from text4vis.doctor import checks as doctor

COLOURS = ["red", "green", "blue"]
SUBSETS = [[c for c in range(3) if chosen[c]] for chosen in product((False, True), repeat=3)]


def write_videos(folder: Path, count: int, seed: int) -> Path:
    """Frame folders that shine in the colours of their labels, over noise, and their list."""
    rng, lines = np.random.default_rng(seed), []
    for number in range(count):
        labels = SUBSETS[number % len(SUBSETS)]
        name = f"{folder.name}-{'-'.join(COLOURS[label] for label in labels) or 'dark'}{number}"
        (folder / name).mkdir(parents=True)
        for frame in range(4):
            pixels = rng.integers(0, 60, (40, 48, 3))
            pixels[..., labels] += 180
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"img_{frame + 1:05d}.jpg", quality=95)
        lines.append(f"{name} 4 {','.join(map(str, labels)) or '-'}\n")
    path = folder.with_suffix(".txt")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder with shards, recipe, run, report and export, and what the programs said."""
    base = tmp_path_factory.mktemp("many")
    (base / "labels.csv").write_text("id,name\n" + "".join(f"{c},{name}\n" for c, name in enumerate(COLOURS)))
    said = {}
    for split, count in (("train", 64), ("val", 48)):
        annotations = write_videos(base / split, count, seed=count)
        said[split] = run(
            "tools/build_shards.py", "--annotations", annotations, "--root", base / split, "--labels",
            base / "labels.csv", "--output", base / "shards" / split,
        )  # fmt: skip
    recipe = {
        "seed": 1,
        "data": {"train": str(base / "shards/train"), "val": str(base / "shards/val"), "batch_size": 16,
                 "num_segments": 2, "input_size": 32, "scale_size": 32, "dataset": "colours", "augmentation": "none"},
        "network": {"arch": str(write_clip(base / "clip")), "sim_header": "None"},
        "solver": {"loss_type": "ASL", "epochs": 12, "lr": 3e-3, "clip_ratio": 1.0, "lr_warmup_step": 1},
        "engine": {"precision": "fp32", "zero_stage": 0},
        "logging": {"print_freq": 4, "eval_freq": 6},
    }  # fmt: skip
    (base / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    said["check"] = run("tools/check_shards.py", base / "shards/train", base / "shards/val")
    said["train"] = run(TRAIN, "--config", base / "recipe.yaml", "--output", base / "run")
    said["evaluate"] = run(
        EVALUATE, "--config", base / "recipe.yaml", "--model", base / "run", "--report", base / "report.json",
        "--set", "data.test_crops=3", "--features", base / "features.safetensors",
    )  # fmt: skip
    said["export"] = run("tools/export.py", base / "run", "--output", base / "export", "--report", base / "report.json")
    return base, said


@pytest.mark.slow
def test_the_run_learns_the_colours_and_says_so(trained):
    base, said = trained
    report = json.loads((base / "report.json").read_text())
    assert report["map"] > 95 > 30 + report["chance"] and report["f1"] > 80
    assert (report["videos"], report["unlabelled"]) == (42, 6)
    assert len(report["by_views"]) == 2
    assert re.search(r"mAP \d+\.\d+ %  F1 \d+\.\d+ %  top-1 .* of 42 videos", said["train"])
    assert "6 videos without a label count for F1 alone; F1 at each class's threshold" in said["evaluate"]
    assert "labels per video" in said["check"]
    board = EventAccumulator(str(base / "run/tensorboard"))
    board.Reload()
    shown = {tag.removesuffix("/text_summary") for tag in board.Tags()["tensors"]} | set(board.Tags()["images"])
    assert {"val/classes", "val/average_precision"} <= shown | set(board.Tags()["histograms"])
    assert "train/clips" in shown and "val/confusion" not in shown
    records = [json.loads(line) for line in (base / "run/metrics.jsonl").read_text().splitlines()]
    assert {"map", "f1"} <= next(record for record in records if record["kind"] == "val").keys()


@pytest.mark.slow
def test_kept_embeddings_give_the_same_report(trained, tmp_path):
    base, _ = trained
    said = run(
        EVALUATE, "--config", base / "recipe.yaml", "--model", base / "run", "--report", tmp_path / "again.json",
        "--set", "data.test_crops=3", "--features", base / "features.safetensors",
    )  # fmt: skip
    assert "embedding the videos again" not in said
    reports = [json.loads(path.read_text()) for path in (base / "report.json", tmp_path / "again.json")]
    assert reports[0].pop("date") and reports[1].pop("date") and reports[0] == reports[1]


@pytest.mark.slow
def test_run_and_export_predict_every_class_of_a_video(trained):
    base, _ = trained
    right = {"export": 0, "run": 0}
    with open_dataset(str(base / "shards/val")) as dataset:
        labels = {dataset.name(n): [COLOURS[c] for c in dataset.label_of(n)] for n in range(len(dataset))}
    folders = [base / "val" / name for name in labels]
    for kind in right:
        recogniser = text4vis.load(base / kind, device="cpu")
        for folder, found in zip(folders, recogniser.predict_many(folders), strict=True):
            assert found.calibrated and [p for _, p in found.present] == sorted((p for _, p in found.present))[::-1]
            right[kind] += {name for name, _ in found.present} == set(labels[folder.name])
    assert min(right.values()) > 36, f"of 48: {right}"
    other = text4vis.load(base / "export", device="cpu").predict(folders[0], labels=["a", "b"])
    assert not other.calibrated and all(probability >= 0.5 for _, probability in other.present)
    with pytest.raises(text4vis.serving.PredictionError, match="accuracy: is of models of one label a video"):
        text4vis.load(base / "export", device="cpu").predict(folders[0], accuracy=95)


@pytest.mark.slow
def test_the_command_line_shows_them(trained, tmp_path):
    base, _ = trained
    videos = [base / "val" / "val-red-green-blue7", base / "val" / "val-dark0"]
    said = run(
        "tools/predict.py", *videos, "--model", base / "export", "--json", tmp_path / "all.json", "--csv",
        tmp_path / "all.csv", "--picture", tmp_path / "seen.png",
    )  # fmt: skip
    bright, dark = json.loads((tmp_path / "all.json").read_text())
    assert {entry["class"] for entry in bright["present"]} == set(COLOURS) and dark["present"] == []
    assert "none of the classes; the likeliest are" in said
    assert len((tmp_path / "all.csv").read_text().splitlines()) == 1 + 3
    assert (tmp_path / "seen-1.png").stat().st_size > 1000


@pytest.mark.slow
def test_reports_pages_and_cards_tell_of_several_labels(trained, tmp_path):
    base, _ = trained
    run("tools/report.py", base / "run", base / "report.json", "--output", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "% mAP" in page and "above their thresholds:" in page and "with several labels" in page
    said = run("tools/compare_reports.py", base / "run/report.json", base / "run/report.json")
    assert "f1_micro" in said and "map" in said
    card = (base / "export/README.md").read_text()
    assert 'predict("clip.mp4").present' in card and "decision.slope" in card and "thresholds" not in card
    assert "ASL" in card


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_bias_that_it_began_with(trained, tmp_path):
    base, _ = trained
    arguments = ["--config", base / "recipe.yaml", "--output", tmp_path / "run", "--set", "logging.save_steps=5"]
    ((code, _),) = finish(start(TRAIN, *arguments, "--set", "engine.wall_minutes=0.0001"))
    assert code == 75
    state = json.loads(sorted(tmp_path.glob("run/checkpoints/step-*/state.json"))[-1].read_text())
    whole = json.loads((base / "run/checkpoints/best/state.json").read_text())
    assert state["logit_bias"] == whole["logit_bias"] < 0
    run(TRAIN, *arguments)
    ends = [json.loads((folder / "report.json").read_text()) for folder in (base / "run", tmp_path / "run")]
    assert ends[0]["map"] == ends[1]["map"]
    assert ends[0]["decision"]["thresholds"] == pytest.approx(ends[1]["decision"]["thresholds"])


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["BCE", "ASL"])
def test_ranks_stages_and_precisions_compute_the_same_losses(trained, tmp_path, loss):
    base, _ = trained

    def trained_losses(name: str, ranks: int, *settings: str) -> dict[int, float]:
        options = [f"solver.loss_type={loss}", "solver.epochs=1", "solver.lr_warmup_step=0", "logging.print_freq=1"]
        run(
            TRAIN, "--config", base / "recipe.yaml", "--output", tmp_path / name,
            *(f"--set={setting}" for setting in (*options, *settings)), ranks=ranks,
        )  # fmt: skip
        return losses(tmp_path / name)

    expected = trained_losses("one", 1)
    two = "data.batch_size=8"  # without accumulation: the first bias is that of the run's first micro batches
    assert trained_losses("sharded", 2, two, "engine.zero_stage=3") == pytest.approx(expected, rel=1e-4)
    half = trained_losses("half", 2, two, "engine.zero_stage=2", "engine.precision=bf16")
    assert half == pytest.approx(expected, rel=0.03)
    assert len(expected) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["solver.loss_type=CE"], "solver.loss_type: CE takes one label a video, but videos of data.train"),
        (["data.shot=2"], "data.shot: 2 videos of each class cannot be chosen"),
        (["network.classifier=lda"], "lda: .* needs one label a video"),
    ],
)
def test_what_needs_one_label_is_refused(trained, tmp_path, settings, words):
    base, _ = trained
    options = ["--config", base / "recipe.yaml", "--output", tmp_path / "run"]
    ((code, said),) = finish(start(TRAIN, *options, *(f"--set={setting}" for setting in settings)))
    assert code == 1 and re.search(words, " ".join(said.split()))


@pytest.mark.slow
def test_the_doctor_names_a_loss_of_one_label(trained, tmp_path):
    base, _ = trained
    problems = [
        finding.message
        for finding in doctor.diagnose(str(base / "recipe.yaml"), ["solver.loss_type=CE"], None, tmp_path / "run")
        if finding.level == doctor.PROBLEM
    ]
    assert sum("CE takes one label a video" in problem for problem in problems) == 2


@pytest.mark.slow
def test_an_export_without_thresholds_says_what_is_missing(trained, tmp_path):
    base, _ = trained
    export = json.loads((base / "export/export.json").read_text())
    (tmp_path / "export").mkdir()
    for file in (base / "export").iterdir():
        (tmp_path / "export" / file.name).write_bytes(file.read_bytes())
    export["card"]["evaluation"] = export["card"]["figures"] = None
    (tmp_path / "export/export.json").write_text(json.dumps(export))
    with pytest.raises(ConfigError, match="no evaluation tells the thresholds"):
        text4vis.load(tmp_path / "export", device="cpu")
