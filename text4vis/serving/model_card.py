"""The model card of an export: Markdown with a YAML header, as model hubs read it. Pure text.

Texts from files (class names, templates, names of data sets) are escaped: they never act as Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

WEIGHT_SUFFIXES = (".json", ".pt", ".pth", ".bin", ".safetensors")


def escape(value: Any) -> str:
    """The value as one line of text, escaped for Markdown and HTML."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", " ".join(text.split()))


def file_name(value: Any) -> Any:
    """The file name of a path, so that the card does not show folders; other values unchanged."""
    is_path = isinstance(value, str) and (PurePath(value).is_absolute() or value.endswith(WEIGHT_SUFFIXES))
    return PurePath(value).name if is_path else value


_ONNX = """Without torch, with `pip install av numpy onnxruntime pillow`:

```
python predict_onnx.py model.onnx clip.mp4
```

`model.onnx` takes `frames` (videos, views, frames, 3, height, width) uint8 RGB, and optionally
`classes` (classes, width) float32 for other classes. It returns `embeddings` and `logits`; the softmax of the logits
gives the probabilities.
"""


def model_card(
    title: str,
    class_names: Sequence[str],
    *,
    facts: Mapping[str, Any],
    training: Mapping[str, Any],
    preprocessing: Mapping[str, Any],
    figures: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    onnx: Mapping[str, Any] | None,
    takes_labels: bool,
) -> str:
    """Returns the model card. Mappings hold JSON values; inner mappings are shown with dotted keys.

    facts: architecture and origin. training: settings. figures: the run's figures when it saved the weights.
    evaluation: protocol card and figures of a report; its booleans `of these weights` and `of the training data` say
    what was evaluated. takes_labels: whether the model can be given other class names.
    """
    header = {
        "library_name": "text4vis",
        "pipeline_tag": "video-classification",
        "tags": ["video-classification", "clip", "text4vis", *(["onnx"] if onnx else [])],
        "model_name": title,
    }
    usage = 'recogniser = text4vis.load(".")  # this folder\nprint(recogniser.predict("clip.mp4").top)\n'
    if takes_labels:
        usage += 'print(recogniser.predict("clip.mp4", labels=["surfing", "skiing"]).top)  # any other classes\n'
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        f"# {escape(title)}\n",
        "Recognises actions in videos: CLIP's vision tower sees the sampled frames, a temporal head fuses them, and "
        "the class whose embedding has the largest cosine with the video wins.\n",
        _table(facts),
        "## Use\n",
        f"```python\nimport text4vis\n\n{usage}```\n",
    ]
    if onnx:
        parts += [_ONNX, _table(onnx)]
    parts += ["## What it sees\n", _table(preprocessing), "Pixels are normalised inside the model.\n"]
    parts += ["## Training\n", _table(training) if training else "Not recorded.\n", "## Evaluation\n"]
    parts += [
        *_evaluation(figures, evaluation),
        "## Limits\n",
        "- It always names one of its classes, even for a video that shows none of them.\n"
        "- It looks at one clip of a few frames. Long videos are scanned in windows (`recogniser.scan`).\n"
        + ("" if takes_labels else "- Its class embeddings are not text, so it knows no classes but its own.\n")
        + "- The figures above hold only for the data, views and classes named with them; nothing else was "
        "measured. The gaps and biases of CLIP's training data are in this model too.\n",
        f"## Classes ({len(class_names)})\n",
        _table({str(number): name for number, name in enumerate(class_names)}),
    ]
    return "\n".join(parts)


def _evaluation(figures: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> Iterable[str]:
    if figures:
        yield from ("When these weights were saved:\n", _table(figures))
    if evaluation is None:
        yield "There is no evaluation report; `text4vis/evaluate.py --report` writes one.\n"
        return
    whose = "these weights" if evaluation["of these weights"] else "**other weights** than these"
    if evaluation["of the training data"]:
        whose += ", **on the videos that it was trained on**: it says nothing about new ones"
    shown = dict(evaluation)
    if known := shown.get("calibration"):  # its tables are in export.json
        shown["calibration"] = {key: value for key, value in known.items() if not isinstance(value, list)}
    yield from (f"The evaluation of {whose}, and its protocol:\n", _table(shown))


def _table(values: Mapping[str, Any]) -> str:
    rows = [f"| {escape(key)} | {escape(value)} |\n" for key, value in flatten(values)]
    return "".join(["| | |\n|---|---|\n", *rows])


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yields (dotted key, value); keys whose value is None are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value
