"""The model card of an export: Markdown with a YAML header, as model hubs read it. Pure text.

Texts from files (class names, templates, names of data sets) are escaped: they never act as Markdown or HTML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

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
`classes` (classes, width) float32 for other classes. It returns `embeddings` and `logits`; {}
"""


class _Words(NamedTuple):
    """What the card says of models of one label a video, or of several. answer: the attribute of a prediction."""

    answer: str
    rule: str
    scores: str
    limit: str


_ONE_LABEL = _Words(
    "top",
    "the class whose embedding has the largest cosine with the video wins.",
    "the softmax of the logits\ngives the probabilities.",
    "It always names one of its classes, even for a video that shows none of them.",
)
_SEVERAL_LABELS = _Words(
    "present",
    "a video shows each class whose probability reaches the threshold of that class.",
    "the metadata\nholds `decision`: a class has the probability sigmoid(slope * logit + intercept), and a threshold.",
    "It decides on each class by itself, from that class's threshold on; classes given by name have the threshold 0.5.",
)


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
    several: bool = False,
) -> str:
    """Returns the model card. Mappings hold JSON values; inner mappings are shown with dotted keys.

    facts: architecture and origin. training: settings. figures: the run's figures when it saved the weights.
    evaluation: protocol card and figures of a report; its booleans `of these weights` and `of the training data` say
    what was evaluated. takes_labels: whether the model can be given other class names. several: whether a video may
    show several classes, or none.
    """
    header = {
        "library_name": "text4vis",
        "pipeline_tag": "video-classification",
        "tags": ["video-classification", "clip", "text4vis", *(["onnx"] if onnx else [])],
        "model_name": title,
    }
    words = _SEVERAL_LABELS if several else _ONE_LABEL
    usage = f'recogniser = text4vis.load(".")  # this folder\nprint(recogniser.predict("clip.mp4").{words.answer})\n'
    if takes_labels:
        usage += (
            f'print(recogniser.predict("clip.mp4", labels=["surfing", "skiing"]).{words.answer})  # any other classes\n'
        )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n",
        f"# {escape(title)}\n",
        "Recognises actions in videos: CLIP's vision tower sees the sampled frames, a temporal head fuses them, and "
        f"{words.rule}\n",
        _table(facts),
        "## Use\n",
        f"```python\nimport text4vis\n\n{usage}```\n",
    ]
    if onnx:
        parts += [_ONNX.format(words.scores), _table(onnx)]
    parts += ["## What it sees\n", _table(preprocessing), "Pixels are normalised inside the model.\n"]
    parts += ["## Training\n", _table(training) if training else "Not recorded.\n", "## Evaluation\n"]
    parts += [
        *_evaluation(figures, evaluation),
        "## Limits\n",
        f"- {words.limit}\n"
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
        yield from ("When these weights were saved:\n", _table(_without_lists(figures)))
    if evaluation is None:
        yield "There is no evaluation report; `text4vis/evaluate.py --report` writes one.\n"
        return
    whose = "these weights" if evaluation["of these weights"] else "**other weights** than these"
    if evaluation["of the training data"]:
        whose += ", **on the videos that it was trained on**: it says nothing about new ones"
    yield from (f"The evaluation of {whose}, and its protocol:\n", _table(_without_lists(evaluation)))


def _without_lists(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Without the tables of calibration and decision, which are in export.json."""
    return dict(figures) | {
        name: {key: value for key, value in figures[name].items() if not isinstance(value, (list, tuple))}
        for name in ("calibration", "decision")
        if figures.get(name)
    }


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
