"""Makes the files that tests/test_compatibility.py opens: what one version of the programs writes, a few KB of each.

    python tests/support/make_fixtures.py --output tests/fixtures/NAME                    # of this version
    git worktree add /tmp/old COMMIT
    python tests/support/make_fixtures.py --code /tmp/old --output tests/fixtures/NAME    # of another one

A folder is made once, with the version that it is of, and never again. The tests open every folder that is there. What
is new in a version's files gets a part of its own in `make`, and a test that names it.

The programs run with the code of --code in a folder for temporary files, so that the files name no place of anybody's:
the tests open them as runs and exports that were moved. The run is stopped within its second epoch; expected.json holds
what the same version computed after that, and more.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE

import numpy as np
import yaml
from frame_folders import make_frame_folders
from launch import free_port
from safetensors.torch import save_file
from tiny import MERGES, PIXELS, random_clip
from videos import encode, pictures

ROOT = Path(__file__).resolve().parents[2]
CLIP_CONFIG = {
    "embed_dim": 4,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 8, "patch_size": 8},
    "text_cfg": {
        "context_length": 32,
        "vocab_size": 512 + len(MERGES) + 2,
        "width": 8,
        "heads": 1,
        "layers": 1,
        "tokenizer_kwargs": {"bpe_path": "tiny-bpe.txt.gz"},
    },
}
FRAMES_SHAPE = (6, 24, 32, 3)  # of the video whose prediction is kept
STOP_AT = 6  # of 12 steps; an epoch has 4
PREDICT = """
import json, sys
import numpy as np
import text4vis
frames = np.random.default_rng(5).integers(0, 256, {shape}, np.uint8)
recogniser = text4vis.load(sys.argv[1], device="cpu")
print(json.dumps(dict(own=recogniser.predict(frames).top, others=recogniser.predict(frames, ["one", "two"]).top)))
"""

RECIPE = {
    "seed": 3,
    "data": {"train": "shards", "val": "shards", "batch_size": 2, "num_segments": 2,
             "input_size": 16, "scale_size": 18, "dataset": "tiny"},
    "network": {"arch": "clip/tiny.json"},
    "solver": {"epochs": 3, "lr": 2e-3, "lr_warmup_step": 0.5, "clip_gradient": 1.0},
    "engine": {"precision": "fp32", "zero_stage": 1},
    "logging": {"print_freq": 1, "pictures": 0, "keep_checkpoints": 1},
}  # fmt: skip

# Stored videos with several labels; two ranks of ZeRO 1, so that each writes its part of the optimiser's state.
MANY = {
    "seed": 5,
    "data": {"train": "shards", "val": "shards", "batch_size": 2, "num_segments": 2, "input_size": 16,
             "scale_size": 18, "dataset": "tiny"},
    "network": {"arch": "../clip/tiny.json", "adapter": "lora", "adapter_rank": 2, "adapter_targets": "attention"},
    "solver": {"epochs": 3, "lr": 2e-3, "lr_warmup_step": 0.5, "clip_gradient": 1.0, "loss_type": "ASL", "ema": 0.9},
    "engine": {"precision": "fp32", "zero_stage": 1},
    "logging": {"print_freq": 1, "pictures": 0, "keep_checkpoints": 1},
}  # fmt: skip
LABELS = ["0", "0,2", "1", "-", "2", "1,2", "0,1,2", "2", "0"]
MANY_STOP_AT, MANY_RANKS = 3, 2  # of 6 steps
QUESTION = "a video of class 1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=ROOT, help="repository whose programs write the files")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    place = Path(tempfile.gettempdir()) / "text4vis-fixtures"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    with tempfile.TemporaryDirectory() as scratch:
        make(arguments.code.resolve(), place, Path(scratch))
    shutil.copytree(place, arguments.output)
    shutil.rmtree(place)


def make(code: Path, folder: Path, scratch: Path) -> None:
    """Writes everything below `folder`; `scratch` is thrown away."""

    def call(*command: object, expected: int = 0, ranks: int = 1) -> str:
        """Output of rank 0."""
        environment = os.environ | {"PYTHONPATH": str(code), "XDG_CACHE_HOME": str(scratch / "cache")}
        job = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        words, processes = [sys.executable, *map(str, command)], []
        for rank in range(ranks):
            place = {name: str(value) for name, value in (job | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            variables = environment | (place if ranks > 1 else {})
            processes.append(subprocess.Popen(words, cwd=scratch, env=variables, stdout=PIPE, stderr=PIPE, text=True))
        outputs = [process.communicate() for process in processes]
        assert {process.returncode for process in processes} == {expected}, outputs
        return outputs[0][0]

    write_clip(folder / "clip")
    frames = make_frame_folders(scratch, [3 + number % 2 for number in range(8)])
    call(
        code / "tools/build_shards.py", "--annotations", frames.annotations, "--root", frames.root,
        "--labels", frames.labels, "--output", folder / "shards",
    )  # fmt: skip
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    train = ["--config", config, "--output"]
    call(code / "text4vis/train.py", *train, scratch / "whole")
    call(
        next(code.glob("tests/**/train_with.py")), "--signal", f"{STOP_AT}:SIGTERM", "--", *train, folder / "run",
        expected=75,
    )  # fmt: skip
    call(code / "tools/export.py", folder / "run", "--output", folder / "export")
    features = ["--features", folder / "features.safetensors", "--report", folder / "report.json"]
    call(code / "text4vis/evaluate.py", "--config", config, "--model", folder / "export", *features)
    call(code / "tools/build_classifier.py", "--config", config, "--output", folder / "classes.safetensors")
    predictions = json.loads(call("-c", PREDICT.format(shape=FRAMES_SHAPE), folder / "export"))
    expected = {
        "stopped_at": STOP_AT,
        "losses": losses(scratch / "whole" / "metrics.jsonl"),
        "predictions": predictions,
        "frames": frame_digests(folder / "shards"),
    }
    expected |= make_many(code, folder / "many", scratch, call)
    expected |= make_packets(code, folder / "packets", scratch, call)
    expected |= make_answers(code, folder, call)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    for run in (folder / "run", folder / "many" / "run"):
        shutil.rmtree(run / "tensorboard")
        for name in ("log.txt", ".running"):  # they name the machine
            (run / name).unlink(missing_ok=True)


def make_many(code: Path, folder: Path, scratch: Path, call: Callable[..., str]) -> dict[str, object]:
    """Shards of stored videos with many labels and key frames, and the run, export, report and features of them.

    Adds an adapter, a moving average of the weights, and a checkpoint that two ranks wrote. Returns what is expected.
    """
    videos = scratch / "videos"
    folder.mkdir()
    videos.mkdir()
    names = [f"clip {number}.mp4" for number in range(len(LABELS))]
    for number, name in enumerate(names):
        encode(videos / name, images=pictures(8 + number)[number:])
    lines = [f"{name} {labels}" for name, labels in zip(names, LABELS, strict=True)]
    (scratch / "videos.txt").write_text("\n".join(lines))
    (scratch / "classes.csv").write_text("id,name\n" + "".join(f"{number},class {number}\n" for number in range(3)))
    call(
        code / "tools/build_shards.py", "--annotations", scratch / "videos.txt", "--root", videos, "--labels",
        scratch / "classes.csv", "--output", folder / "shards", "--store", "video", "--gop", 4,
    )  # fmt: skip
    config = folder / "recipe.yaml"
    config.write_text(yaml.safe_dump(MANY, sort_keys=False))
    call(code / "text4vis/train.py", "--config", config, "--output", scratch / "many", ranks=MANY_RANKS)
    stopped = ["--signal", f"{MANY_STOP_AT}:SIGTERM", "--", "--config", config, "--output", folder / "run"]
    call(next(code.glob("tests/**/train_with.py")), *stopped, expected=75, ranks=MANY_RANKS)
    call(code / "tools/export.py", folder / "run", "--output", folder / "export")
    features = ["--features", folder / "features.safetensors", "--report", folder / "report.json"]
    call(code / "text4vis/evaluate.py", "--config", config, "--model", folder / "export", *features)
    return {
        "many": {
            "stopped_at": MANY_STOP_AT,
            "losses": losses(scratch / "many" / "metrics.jsonl"),
            "labels": dict(zip(names, LABELS, strict=True)),
            "videos": frame_digests(folder / "shards"),
        }
    }


def make_packets(code: Path, folder: Path, scratch: Path, call: Callable[..., str]) -> dict[str, object]:
    """Shards of stored videos that are long enough to be read in parts. Returns what is expected."""
    videos = scratch / "long"
    videos.mkdir()
    noise = np.random.default_rng(0)  # what is smaller than the opening of the file is read whole
    for number in range(2):
        images = [np.clip(image + noise.normal(0, 12, image.shape), 0, 255) for image in pictures(60, 96, 64)]
        encode(videos / f"{number}.mp4", images=[image.astype(np.uint8) for image in images])
    (scratch / "long.txt").write_text("0.mp4 0\n1.mp4 2\n")
    call(
        code / "tools/build_shards.py", "--annotations", scratch / "long.txt", "--root", videos, "--labels",
        scratch / "classes.csv", "--output", folder, "--store", "video", "--gop", 8,
    )  # fmt: skip
    return {"packets": frame_digests(folder)}


def make_answers(code: Path, folder: Path, call: Callable[..., str]) -> dict[str, object]:
    """Three videos, a prediction list of them and a search index. Returns what is expected of questions to it."""
    clips = folder / "clips"
    clips.mkdir()
    for number in range(3):
        encode(clips / f"{number}.mp4", images=pictures(10 + 2 * number, 64, 48)[number:])
    model = ["--model", folder / "export"]
    call(code / "tools/predict.py", folder / "clips", *model, "--jsonl", folder / "answers.jsonl")
    call(code / "tools/search.py", "index", folder / "clips", *model, "--output", folder / "index", "--window", 0.2)
    moments = json.loads(call(code / "tools/search.py", "find", folder / "index", QUESTION, *model, "--json"))
    return {"moments": moments}


def write_clip(folder: Path) -> None:
    folder.mkdir()
    with gzip.GzipFile(folder / "tiny-bpe.txt.gz", "wb", mtime=0) as file:
        file.write("\n".join(["#version: tiny", *MERGES]).encode())
    (folder / "tiny.json").write_text(json.dumps({"model_cfg": CLIP_CONFIG, "preprocess_cfg": PIXELS}))
    save_file(random_clip(CLIP_CONFIG).state_dict(), folder / "tiny.safetensors")


def losses(path: Path) -> dict[int, float]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


def frame_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the frames of each video, one after the other as Python's tarfile reads them, by the video's name."""
    digests: dict[str, str] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            name = ""
            for member in tar:
                data = tar.extractfile(member).read()
                if member.name.endswith(".json"):
                    name = json.loads(data)["name"]
                    digest = hashlib.sha256()
                else:
                    digest.update(data)
                digests[name] = digest.hexdigest()
    return digests


def kept_video() -> np.ndarray:
    """The frames (N, H, W, 3) uint8 whose prediction expected.json holds."""
    return np.random.default_rng(5).integers(0, 256, FRAMES_SHAPE, np.uint8)


if __name__ == "__main__":
    main()
