"""The demo's data and its small CLIP: what the tools promise, on small counts, and the shipped weights."""

import csv
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawings.captions import render_examples, sample_caption
from drawings.people import ACTIONS, MAX_FRAMES, MIN_FRAMES, UNSEEN_ACTIONS, Time, sample_time
from drawings.scene import render_video
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "configs" / "models"
COUNTS = {"train": 21, "val": 5, "unseen": 8}
REVERSED_PAIRS = [
    ("raising the right arm", "lowering the right arm"),
    ("raising both arms", "lowering both arms"),
    ("raising the right knee", "lowering the right knee"),
    ("sitting down", "standing up"),
    ("bowing down", "straightening up"),
]


def make_data(output: Path, *, workers: int, seed: int = 3) -> subprocess.CompletedProcess[str]:
    counts = [f"--{split}-videos={number}" for split, number in COUNTS.items()]
    command = [sys.executable, str(ROOT / "tools" / "make_demo_data.py"), "--output", str(output), *counts]
    return subprocess.run(
        [*command, f"--seed={seed}", f"--workers={workers}"], capture_output=True, text=True, cwd=ROOT, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo") / "data"
    done = make_data(output, workers=2)
    assert done.returncode == 0, done.stderr
    return output


@pytest.mark.slow
def test_same_bytes_with_one_and_two_workers(demo_data: Path, tmp_path: Path) -> None:
    assert make_data(tmp_path / "again", workers=1).returncode == 0
    assert contents(tmp_path / "again") == contents(demo_data)


def test_finished_output_is_left_alone_and_other_arguments_are_refused(demo_data: Path) -> None:
    before = contents(demo_data)
    again, other = make_data(demo_data, workers=2), make_data(demo_data, workers=2, seed=4)
    assert again.returncode == 0 and "up to date" in again.stdout
    assert other.returncode == 1 and "remove" in other.stderr
    assert contents(demo_data) == before


def test_lists_agree_with_folders_and_class_names(demo_data: Path) -> None:
    listed = set()
    for split, number in COUNTS.items():
        table = demo_data / ("unseen_labels.csv" if split == "unseen" else "labels.csv")
        with table.open(newline="") as file:
            names = {int(row["id"]): row["name"] for row in csv.DictReader(file)}
        lines = (demo_data / f"{split}.txt").read_text().splitlines()
        assert len(lines) == number
        for line in lines:
            path, frames, label = line.split(" ")
            images = sorted(image.name for image in (demo_data / "frames" / path).iterdir())
            assert images == [f"img_{index:05d}.jpg" for index in range(1, int(frames) + 1)]
            assert MIN_FRAMES <= int(frames) <= MAX_FRAMES
            assert path.endswith(names[int(label)].replace(" ", "_"))
            listed.add(path)
    folders = {str(path.parent.relative_to(demo_data / "frames")) for path in (demo_data / "frames").rglob("*.jpg")}
    assert listed == folders


def test_videos_depend_on_the_generator_only() -> None:
    first, second = (np.stack(list(render_video(np.random.default_rng(7), ACTIONS[0]))) for _ in range(2))
    assert first.dtype == np.uint8 and first.shape[3] == 3 and np.array_equal(first, second)


@pytest.mark.parametrize(("forwards", "backwards"), REVERSED_PAIRS)
def test_reversed_pairs_are_each_other_played_backwards(forwards: str, backwards: str) -> None:
    by_name = {action.name: action for action in ACTIONS}
    first, second = by_name[forwards], by_name[backwards]
    assert (first.turned, first.stool, first.turns) == (second.turned, second.stool, second.turns)
    progress = np.linspace(0, 1, 33)
    time = Time(progress, progress, 0.3 + 2 * progress)
    mirrored = Time(1 - progress, progress, time.turns)
    for angle, values in first.act(time).items():
        np.testing.assert_allclose(second.act(mirrored)[angle], values, atol=1e-9)


def test_progress_is_distributed_as_its_own_mirror_image() -> None:
    rng = np.random.default_rng(0)
    courses = np.stack([sample_time(rng, ACTIONS[2], 25).progress for _ in range(4000)])
    mirrored = 1 - courses[:, ::-1]
    assert courses.min() >= -1e-9 and courses.max() <= 1 + 1e-9 and (np.diff(courses) >= -1e-9).all()
    np.testing.assert_allclose(courses.mean(axis=0), mirrored.mean(axis=0), atol=0.01)
    np.testing.assert_allclose(courses.std(axis=0), mirrored.std(axis=0), atol=0.01)


def test_unseen_names_are_new_combinations_of_known_words() -> None:
    names, unseen = ({action.name for action in actions} for actions in (ACTIONS, UNSEEN_ACTIONS))
    assert len(names) >= 16 and len(unseen) >= 4 and not names & unseen
    assert {word for name in unseen for word in name.split()} <= {word for name in names for word in name.split()}


@pytest.mark.slow
def test_captions_name_training_actions_but_no_unseen_one() -> None:
    rng = np.random.default_rng(1)
    examples = [example for scene in range(240) for example in render_examples(np.random.default_rng((2, scene)))]
    captions = {sample_caption(rng, examples[index % len(examples)].facts) for index in range(20_000)}
    text = "\n".join(captions)
    assert all(action.name in text for action in ACTIONS)
    assert not re.search("|".join(action.name for action in UNSEEN_ACTIONS), text)


def test_shipped_weights_fit_their_json_and_tell_class_names_apart() -> None:
    files = [MODELS / f"demo-clip{ending}" for ending in (".json", "-bpe.txt.gz", ".safetensors")]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    config = json.loads(files[0].read_text())
    assert config.pop("preprocess_cfg").keys() == {"mean", "std", "interpolation", "resize_mode"}
    text = config["text_cfg"]
    bpe_path = MODELS / text["tokenizer_kwargs"]["bpe_path"]
    tokenizer = SimpleTokenizer(bpe_path=str(bpe_path), context_length=text["context_length"])
    assert tokenizer.vocab_size == text["vocab_size"]
    assert config["embed_dim"] % (text["width"] // 64) == 0

    model = CLIP(**config).eval()
    weights = load_file(files[2])
    assert all(value.dtype == torch.float16 for value in weights.values())
    model.load_state_dict(weights, strict=True)
    names = [action.name for action in (*ACTIONS, *UNSEEN_ACTIONS)]
    with torch.no_grad():
        tokens = tokenizer([f"a video of a person {name}." for name in names])
        embeddings = model.encode_text(tokens, normalize=True)
    cosines = [float(embeddings[a] @ embeddings[b]) for a, b in itertools.combinations(range(len(names)), 2)]
    assert np.mean(cosines) < 0.6 and max(cosines) < 0.99
