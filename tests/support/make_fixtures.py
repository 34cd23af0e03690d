"""Makes the files that tests/test_compatibility.py opens: what one version of the programs writes, a few KB of each.

    git worktree add /tmp/old COMMIT
    python tests/support/make_fixtures.py --code /tmp/old --output tests/fixtures/v0.1

The programs run from the repository's folder with the code of --code, so that the paths in the files are relative. The
run is stopped within its second epoch; expected.json holds what the same version computed after that, and more.
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
from pathlib import Path

import numpy as np
import yaml
from frame_folders import make_frame_folders
from safetensors.torch import save_file
from tiny import MERGES, random_clip

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, default=ROOT, help="repository whose programs write the files")
    parser.add_argument("--output", type=Path, required=True, help="folder below this repository, relative to it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        make(arguments.code.resolve(), arguments.output, Path(scratch))


def make(code: Path, output: Path, scratch: Path) -> None:
    """Writes everything below `output`, a path relative to the repository's folder; `scratch` is thrown away."""

    def call(*command: object, expected: int = 0) -> str:
        environment = os.environ | {"PYTHONPATH": str(code), "XDG_CACHE_HOME": str(scratch / "cache")}
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == expected, done.stdout + done.stderr
        return done.stdout

    folder = ROOT / output
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_clip(folder / "clip")
    frames = make_frame_folders(scratch, [3 + number % 2 for number in range(8)])
    call(
        code / "tools/build_shards.py", "--annotations", frames.annotations, "--root", frames.root,
        "--labels", frames.labels, "--output", output / "shards",
    )  # fmt: skip
    config = output / "recipe.yaml"
    (ROOT / config).write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    train = ["--config", config, "--output"]
    call(code / "text4vis/train.py", *train, scratch / "whole")
    call(
        next(code.glob("tests/**/train_with.py")), "--signal", f"{STOP_AT}:SIGTERM", "--", *train, output / "run",
        expected=75,
    )  # fmt: skip
    call(code / "tools/export.py", output / "run", "--output", output / "export")
    features = ["--features", output / "features.safetensors", "--report", output / "report.json"]
    call(code / "text4vis/evaluate.py", "--config", config, "--model", output / "export", *features)
    call(code / "tools/build_classifier.py", "--config", config, "--output", output / "classes.safetensors")
    predictions = json.loads(call("-c", PREDICT.format(shape=FRAMES_SHAPE), output / "export"))
    expected = {
        "stopped_at": STOP_AT,
        "losses": losses(scratch / "whole" / "metrics.jsonl"),
        "predictions": predictions,
        "frames": frame_digests(folder / "shards"),
    }
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    shutil.rmtree(folder / "run" / "tensorboard")
    for name in ("log.txt", ".running"):  # they name the machine
        (folder / "run" / name).unlink(missing_ok=True)


def write_clip(folder: Path) -> None:
    folder.mkdir()
    with gzip.GzipFile(folder / "tiny-bpe.txt.gz", "wb", mtime=0) as file:
        file.write("\n".join(["#version: tiny", *MERGES]).encode())
    (folder / "tiny.json").write_text(json.dumps(CLIP_CONFIG))
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
