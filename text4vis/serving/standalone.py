"""Recognises the action in a video with an exported ONNX graph. Needs av, numpy, onnxruntime and pillow, no torch.

    python predict_onnx.py model.onnx clip.mp4 [more.mp4 …]

Prints video, class and probability for the five most probable classes; where a video may show several classes, or none,
for those that reach their threshold. Needs predict_onnx_frames.py,
predict_onnx_video.py and predict_onnx_headers.py beside it, which read the videos: copy the four files together.
"""

import argparse
import json
import sys
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image

from shards.frames import sample_frames
from shards.video import VideoError


def load(path: str) -> tuple[Any, dict[str, Any]]:
    """Returns the session and the graph's metadata: `class_names`, `preprocessing`, for several labels `decision`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns that the input `classes` has a default
    session = onnxruntime.InferenceSession(path, options, providers=onnxruntime.get_available_providers())
    return session, json.loads(session.get_modelmeta().custom_metadata_map["text4vis"])


def frame_numbers(num_frames: int, rule: dict[str, Any]) -> list[int]:
    """The first frame of each of T equal segments; if dense, T equally spaced frames of the middle window."""
    segments, window = rule["num_segments"], rule["dense_window"]
    if window is None:
        return [int(num_frames / segments * i) for i in range(segments)]
    start = max(0, num_frames - window) // 2
    return [(start + i * (window // segments)) % num_frames for i in range(segments)]


def scale_and_crop(image: Image.Image, rule: dict[str, Any]) -> np.ndarray:
    """(3, S, S) uint8, as `resize` says.

    shortest: scales the short side to `scale_size` and crops the centre square. squash: scales to the square. longest:
    scales the long side to the square's, black around.
    """
    width, height = image.size
    short, side, resize = rule["scale_size"], rule["input_size"], rule["resize"]
    if resize == "squash":
        size = (side, side)
    elif resize == "longest":
        ratio = max(width / side, height / side)
        size = (max(1, round(width / ratio)), max(1, round(height / ratio)))
    else:
        size = (int(short * width / height), short) if height <= width else (short, int(short * height / width))
    image = image.resize(size, Image.Resampling[rule["interpolation"].upper()])
    if resize == "longest":
        left, top = -((side - size[0]) // 2), -((side - size[1]) // 2)
    else:
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    return np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1)


def read_frames(path: str, rule: dict[str, Any]) -> np.ndarray:
    """Reads (T, 3, S, S) uint8 RGB. Raises VideoError if it is damaged or no video, OSError if it is unreadable."""
    _, frames = sample_frames(
        path,
        lambda timing: np.array(frame_numbers(timing.num_frames, rule)),
        lambda frame: scale_and_crop(Image.fromarray(frame), rule),
    )
    return np.stack(frames)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def answers(logits: np.ndarray, decision: dict[str, Any] | None) -> list[tuple[int, float]]:
    """(number, probability) of the classes to print, the most probable first."""
    if decision is None:
        scores = softmax(logits)
        chosen = np.argsort(-scores)[:5]
    else:
        scores = 1 / (1 + np.exp(-(decision["slope"] * logits.astype(np.float64) + decision["intercept"])))
        chosen = np.argsort(-np.where(scores >= decision["thresholds"], scores, -1))
        chosen = chosen[: int((scores >= decision["thresholds"]).sum())]
    return [(int(number), float(scores[number])) for number in chosen]


def main() -> int:
    """Recognises the videos of the command line. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the graph, model.onnx")
    parser.add_argument("videos", nargs="+", metavar="video")
    arguments = parser.parse_args()
    try:
        session, facts = load(arguments.model)
    except Exception as error:  # onnxruntime's errors share no base class
        print(f"error: {arguments.model}: not a graph written by tools/export.py --onnx ({error})", file=sys.stderr)
        return 1
    code = 0
    for path in arguments.videos:
        try:
            frames = read_frames(path, facts["preprocessing"])[None, None]  # one video, one view
        except (VideoError, OSError, IndexError) as error:
            print(f"error: {path}: not a readable video ({error})", file=sys.stderr)
            code = 1
            continue
        (logits,) = session.run(["logits"], {"frames": frames})
        for number, score in answers(logits[0], facts.get("decision")):
            print(f"{path}\t{facts['class_names'][number]}\t{score:.4f}")
    return code


if __name__ == "__main__":
    sys.exit(main())
