"""Trains the demo's small CLIP, for tools/pretrain_demo_clip.py."""

import argparse
import gzip
import json
import math
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from drawings.captions import FRAMES_PER_SCENE, Example, render_examples, sample_caption
from drawings.people import ACTIONS, FRAME_HEIGHT, UNSEEN_ACTIONS, Action
from drawings.scene import render_video
from text4vis.common.progress import Progress, track

BASE_VOCABULARY = 512 + 2  # bytes, bytes that end a word, and the two special tokens
CLIP_MEAN_RGB = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD_RGB = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
PROMPT = "a video of a person {}."
SCENES_PER_TASK = 64


def write_vocabulary(path: Path, vocab_size: int) -> None:
    """Write the first `vocab_size - 514` merges of CLIP's vocabulary; the same bytes every time."""
    with gzip.open(default_bpe()) as file:
        lines = file.read().decode().split("\n")
    kept = lines[: 1 + vocab_size - BASE_VOCABULARY]  # the first line is a header
    path.write_bytes(gzip.compress("\n".join(kept).encode(), mtime=0))


def render_task(task: int, seed: int) -> list[Example]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng((seed, task))
    return [compress(rng, example) for _ in range(SCENES_PER_TASK) for example in render_examples(rng)]


def compress(rng: np.random.Generator, example: Example) -> Example:
    """The same example with its frame as JPEG bytes, a uint8 array."""
    quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(70, 96))]
    return example._replace(frame=cv2.imencode(".jpg", example.frame, quality)[1])


def render_pool(frames: int, seed: int, workers: int) -> list[Example]:
    """At least `frames` compressed examples; the same pool for any number of workers."""
    tasks = range(math.ceil(frames / (SCENES_PER_TASK * FRAMES_PER_SCENE)))
    with ProcessPoolExecutor(workers) as executor:
        rendered = executor.map(partial(render_task, seed=seed), tasks)
        return [example for part in track(rendered, "rendering", total=len(tasks), unit="task") for example in part]


def random_crop(rng: np.random.Generator, example: Example, size: int) -> tuple[np.ndarray, np.ndarray]:
    """A crop of 60 to 100 % of the frame as (size, size, 3), and its joints (J, 2), -1 to 1 from edge to edge."""
    frame = np.asarray(cv2.imdecode(example.frame, cv2.IMREAD_COLOR))
    height = round(FRAME_HEIGHT * math.sqrt(rng.uniform(0.6, 1.0)))
    width = min(round(height * rng.uniform(0.85, 1.18)), frame.shape[1])
    top = int(rng.integers(0, FRAME_HEIGHT - height + 1))
    left = round((frame.shape[1] - width) * rng.uniform(0.15, 0.85))
    image = cv2.resize(frame[top : top + height, left : left + width], (size, size), interpolation=cv2.INTER_LINEAR)
    return image, 2 * (example.joints - (left, top)) / (width, height) - 1


def centre_crop(frame: np.ndarray, size: int) -> np.ndarray:
    top, left = (frame.shape[0] - size) // 2, (frame.shape[1] - size) // 2
    return frame[top : top + size, left : left + size]


def to_tensor(images: Sequence[np.ndarray]) -> torch.Tensor:
    """BGR uint8 images (S, S, 3) to a normalised RGB float batch (N, 3, S, S)."""
    batch = (np.stack(images)[..., ::-1] / np.float32(255) - CLIP_MEAN_RGB) / CLIP_STD_RGB
    return torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()


def build_optimisers(named: list[tuple[str, torch.nn.Parameter]], lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer blocks, AdamW for everything else."""
    blocks = [value for name, value in named if "resblocks" in name and value.ndim == 2]
    others = [value for name, value in named if "resblocks" not in name or value.ndim != 2]
    return [
        torch.optim.Muon(blocks, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.0, betas=(0.9, 0.98)),
    ]


@torch.no_grad()
def initialise_positions(vision: VisionTransformer) -> None:
    """Give the patches two-dimensional sine and cosine positions, of the same magnitude as the patches."""
    positions, side = vision.positional_embedding, vision.grid_size[0]
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    frequencies = math.pi / side * 2 ** torch.linspace(0, 2.5, positions.shape[1] // 4)
    waves = [wave(axis.reshape(-1, 1) * frequencies) for axis in (row, column) for wave in (torch.sin, torch.cos)]
    positions[1:] = torch.cat(waves, dim=1)


def train(model: CLIP, tokenizer: SimpleTokenizer, pool: list[Example], args: argparse.Namespace) -> None:
    """Minimise the symmetric contrastive loss plus the joints' squared error; bf16 arithmetic, fp32 weights.

    A linear layer, thrown away at the end, predicts the joints from the image embedding before its normalisation.
    Without it a vision transformer this small needs several times the steps to learn the limbs.
    """
    joint_head = torch.nn.Linear(model.visual.output_dim, pool[0].joints.size)
    optimisers = build_optimisers([*model.named_parameters(), *joint_head.named_parameters()], args.lr)
    initialise_positions(model.visual)
    loss_of, rng = ClipLoss(), np.random.default_rng((args.seed, args.steps))
    size = model.visual.image_size[0]
    order = np.concatenate([rng.permutation(len(pool)) for _ in range(1 + args.steps * args.batch_size // len(pool))])
    model.train()
    with Progress("training", args.steps, unit="step") as progress:
        for step in range(args.steps):
            for group in (group for optimiser in optimisers for group in optimiser.param_groups):
                group["lr"] = args.lr * min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))
            examples = [pool[index] for index in order[step * args.batch_size : (step + 1) * args.batch_size]]
            crops, joints = zip(*(random_crop(rng, example, size) for example in examples), strict=True)
            tokens = tokenizer([sample_caption(rng, example.facts) for example in examples])
            with torch.autocast("cpu", torch.bfloat16):
                image_features = model.encode_image(to_tensor(crops))
                text_features = model.encode_text(tokens)
            images, texts = (F.normalize(features.float(), dim=-1) for features in (image_features, text_features))
            contrastive = loss_of(images, texts, model.logit_scale.exp())
            joint_error = F.mse_loss(
                joint_head(image_features.float()), torch.from_numpy(np.stack(joints)).float().flatten(1)
            )
            (contrastive + args.joint_weight * joint_error).backward()
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            progress.update(note=f"contrastive {contrastive.item():.2f}, joints {joint_error.item() ** 0.5:.3f}")


@torch.no_grad()
def scale_to_unit_length(model: CLIP, pool: list[Example]) -> None:
    """Scale the image projection so that embeddings have length 1 on average.

    CLIP's loss does not depend on this length, but a temporal head does: it adds frame positions with a standard
    deviation of 0.02. Beside embeddings thirty times as large they, and so the order of the frames, would be lost.
    """
    rng = np.random.default_rng(0)
    images = [random_crop(rng, example, model.visual.image_size[0])[0] for example in pool[:512]]
    model.visual.proj /= model.encode_image(to_tensor(images)).norm(dim=-1).mean()


def save(model: CLIP, path: Path) -> None:
    weights = {name: value.to(torch.float16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, path)
    path.chmod(0o644)


@torch.no_grad()
def zero_shot_accuracy(
    model: CLIP, tokenizer: SimpleTokenizer, actions: tuple[Action, ...], videos_per_class: int = 8
) -> float:
    """Per cent of rendered videos whose mean of 8 frame embeddings lies nearest to the name of their own action."""
    texts = model.encode_text(tokenizer([PROMPT.format(action.name) for action in actions]), normalize=True)
    size, correct = model.visual.image_size[0], 0
    for label, action in enumerate(actions):
        for number in range(videos_per_class):
            frames = list(render_video(np.random.default_rng((1, label, number)), action))
            chosen = [frames[index] for index in np.linspace(0, len(frames) - 1, 8).astype(int)]
            images = to_tensor([centre_crop(frame, size) for frame in chosen])
            video = model.encode_image(images, normalize=True).mean(dim=0)
            correct += int((texts @ video).argmax().item() == label)
    return 100 * correct / (len(actions) * videos_per_class)


@torch.no_grad()
def describe_texts(model: CLIP, tokenizer: SimpleTokenizer) -> str:
    """How far apart the embeddings of all class names lie."""
    names = [action.name for action in ACTIONS + UNSEEN_ACTIONS]
    texts = model.encode_text(tokenizer([PROMPT.format(name) for name in names]), normalize=True)
    cosines = texts @ texts.T - 2 * torch.eye(len(names))
    first, second = divmod(int(cosines.argmax()), len(names))
    mean = cosines[~torch.eye(len(names), dtype=torch.bool)].mean()
    return f"cosine of class names: mean {mean:.2f}, highest {cosines.max():.2f} ({names[first]} / {names[second]})"


def build(config: dict[str, Any], folder: Path) -> tuple[CLIP, SimpleTokenizer]:
    text = config["text_cfg"]
    tokenizer = SimpleTokenizer(
        bpe_path=str(folder / text["tokenizer_kwargs"]["bpe_path"]), context_length=text["context_length"]
    )
    if tokenizer.vocab_size != text["vocab_size"]:
        raise ValueError(f"vocab_size is {text['vocab_size']}, the vocabulary holds {tokenizer.vocab_size}: set it so")
    return CLIP(**config), tokenizer


def pretrain(args: argparse.Namespace) -> None:
    """Renders, trains, writes the three files and prints how well the model does."""
    start = time.monotonic()
    config = json.loads(args.config.read_text())
    config.pop("preprocess_cfg", None)  # Text4Vis's own; it describes this program's frames
    args.output.mkdir(parents=True, exist_ok=True)
    if args.config.resolve() != (args.output / args.config.name).resolve():
        shutil.copyfile(args.config, args.output / args.config.name)
    write_vocabulary(args.output / config["text_cfg"]["tokenizer_kwargs"]["bpe_path"], config["text_cfg"]["vocab_size"])
    torch.manual_seed(args.seed)
    model, tokenizer = build(config, args.output)
    pool = render_pool(args.frames, args.seed, args.workers)
    train(model, tokenizer, pool, args)
    model.eval()
    scale_to_unit_length(model, pool)
    path = args.output / f"{args.config.stem}.safetensors"
    save(model, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB after {time.monotonic() - start:.0f} s")
    print(describe_texts(model, tokenizer))
    for title, actions in (("training", ACTIONS), ("unseen", UNSEEN_ACTIONS)):
        accuracy = zero_shot_accuracy(model, tokenizer, actions)
        print(f"zero-shot on frames of {title} actions: {accuracy:.1f} % (chance {100 / len(actions):.1f} %)")
