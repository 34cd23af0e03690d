"""Writes what TensorBoard shows beside scalars: texts, pictures, histograms. Runs on rank 0 only.

    config             the configuration as text, when a job starts
    results/           the hyper-parameters that runs are compared by, with the evaluations' figures
    train/clips        the first clips of a step as they reach the model, when a run starts and after each evaluation
    val/right, wrong   the right and the wrong predictions of an evaluation that had the highest probability
    val/confusion      the confusion matrix of the most confused classes, as a picture
    val/classes        the accuracy of each class: a table, worst class first, and a histogram; where videos may have
                       several labels, precision and recall of each class, and no confusion matrix
    projector          the class embeddings with their names

Only the few videos shown are read again; all else the run has computed already. Everything is written at a step, and a
resumed job rewrites the steps after its checkpoint, so nothing appears twice. Names are untrusted: control characters
are removed and Markdown is escaped.

B videos of a batch, T frames, S side in pixels, C classes, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from text4vis.config.schema import Config, schema
from text4vis.data.loader import Batch, Loader
from text4vis.data.mixing import draw_mix, mix_frames
from text4vis.evaluation.comparison import class_share, labels_in
from text4vis.evaluation.protocols import Views, is_multi_label, main_figures
from text4vis.report.pictures import contact_sheet, draw_confusion, plain

MOST_FRAMES = 8  # of a clip that are shown, spread over it
MOST_CLASSES = 200  # lines of the table
RESULTS = ("map", "f1", "top1", "top5", "mean_class_accuracy", "best_top1")  # beside the hyper-parameters
PROJECTOR = """embeddings {
  tensor_name: "class embeddings"
  tensor_path: "class_embeddings.tsv"
  metadata_path: "class_names.tsv"
}
"""


class TensorBoardLog:
    """Writes the pictures, tables and texts of one job to `board`.

    global_batch: videos per step. step: the last step done before this job.
    """

    def __init__(
        self, board: SummaryWriter, config: Config, class_names: Sequence[str], *, global_batch: int, step: int
    ) -> None:
        self._board, self._config = board, config
        self._names = [plain(name) for name in class_names]
        board.add_text("config", "".join(f"    {line}\n" for line in config.to_yaml().splitlines()), step + 1)
        # Results get a folder of their own because TensorBoard lists every scalar of a folder beside its
        # hyper-parameters. Without a summary of the experiment, TensorBoard compares all runs by the keys that differ.
        self._results = SummaryWriter(f"{board.log_dir}/results", purge_step=step + 1)
        _, start, self._end = hparams(hyperparameters(config, global_batch), {})
        self._summarise(start, step + 1)
        self._flush()

    def training_clips(self, batch: Batch, consumed: int, step: int) -> None:
        """Shows the first videos of the first micro batch of `step`. consumed: videos of the stream before the step."""
        frames_BTCHW, ids = batch.frames[:, 0], batch.ids.tolist()
        several = batch.labels.dtype == torch.bool
        names = [self._named(row.nonzero().flatten() if several else row[None]) for row in batch.labels]
        mix = draw_mix(self._config.solver, self._config.seed, consumed, ids, frames_BTCHW.shape[-1])
        if mix is not None:
            frames_BTCHW = mix_frames(frames_BTCHW, mix)
            names = [
                f"{share:.0%} {name}, {1 - share:.0%} {names[partner]}"
                for name, share, partner in zip(names, mix.shares, mix.partners, strict=True)
            ]
        count = self._config.logging.pictures
        clips = [(_shown(frames), name) for frames, name in zip(frames_BTCHW[:count], names, strict=False)]
        self._board.add_image("train/clips", contact_sheet(clips), step, dataformats="HWC")
        self._flush()

    def evaluation(self, report: Mapping[str, Any], class_embeddings_CD: torch.Tensor, loader: Loader) -> None:
        """Shows an evaluation as pictures and a table. report: with `step` and `best_top1`. loader: of `data.val`;
        reads the videos shown once more."""
        step, predictions = report["step"], report["predictions"]
        several = is_multi_label(report)
        figures = main_figures(report) | {"best_top1": report["best_top1"]}
        for key in figures.keys() & set(RESULTS):
            self._results.add_scalar(f"result/{key}", figures[key], step)
        chosen = extremes(predictions, self._config.logging.pictures)
        ids = np.delete(np.arange(len(loader.dataset)), [entry["id"] for entry in report["skipped"]])
        frames = read_clips(loader, ids[sorted(set().union(*chosen.values()))])
        for kind, videos in chosen.items():
            clips = [
                (frames[ids[video]], self._caption(predictions, video)) for video in videos if ids[video] in frames
            ]
            if clips:
                self._board.add_image(f"val/{kind}", contact_sheet(clips), step, dataformats="HWC")
        rows = [row | {"class": name} for row, name in zip(report["per_class"], self._names, strict=True)]
        shares = np.array([class_share(row) for row in rows if row["videos"]])
        self._board.add_histogram("val/average_precision" if several else "val/class_accuracy", shares, step)
        if several:
            self._board.add_text("val/classes", precision_table(rows), step)
        else:
            confusion_CC = np.array(report["confusion"])
            self._board.add_image("val/confusion", draw_confusion(confusion_CC, self._names), step, dataformats="HWC")
            self._board.add_text("val/classes", class_table(rows, confusion_CC), step)
        _write_projector(Path(self._board.log_dir), class_embeddings_CD, self._names)
        self._flush()

    def end(self, step: int) -> None:
        """Marks the run as complete after `step`."""
        self._summarise(self._end, step + 1)

    def close(self) -> None:
        """Closes the file of the results; `board` belongs to the caller."""
        self._results.close()

    def _flush(self) -> None:
        for writer in (self._board, self._results):
            writer.flush()

    def _summarise(self, summary: Any, step: int) -> None:
        self._results.file_writer.add_summary(summary, step)  # type: ignore[attr-defined]

    def _caption(self, predictions: Mapping[str, Any], video: int) -> str:
        entry, predicted = predictions["labels"][video], predictions["predicted"][video]
        answer = f"{self._names[predicted]}, {100 * predictions['probability'][video]:.1f} %"
        if isinstance(entry, list):
            said = self._named(predictions["said"][video])
            return f"above thresholds: {said}    true: {self._named(entry)}    likeliest: {answer}"
        if entry == predicted:
            return answer
        return (
            f"predicted: {answer}    true: {self._names[entry]}, {100 * predictions['label_probability'][video]:.1f} %"
        )

    def _named(self, labels: Iterable[int]) -> str:
        return ", ".join(self._names[label] for label in labels) or "none of the classes"


def hyperparameters(config: Config, global_batch: int) -> dict[str, str | float]:
    """{key: value} of all keys that may not change when a run is resumed, and the global batch."""
    values = {key.name: attrgetter(key.name)(config) for key in schema() if not key.role.may_change}
    values["solver.global_batch"] = global_batch
    is_number = {key: isinstance(value, (int, float)) and not isinstance(value, bool) for key, value in values.items()}
    return {key: value if is_number[key] else plain(str(value), 200) for key, value in values.items()}


def extremes(predictions: Mapping[str, Any], count: int) -> dict[str, list[int]]:
    """{"right": rows, "wrong": rows}: the `count` predictions of each kind with the highest probability, in order.

    Where videos may have several labels, right is a likeliest class that is one of them; those without are left out.
    """
    probabilities = predictions["probability"]
    surest = sorted(
        (video for video, probability in enumerate(probabilities) if probability is not None),
        key=lambda video: -probabilities[video],
    )
    labels = [labels_in(entry) for entry in predictions["labels"]]
    right = [predicted in own for predicted, own in zip(predictions["predicted"], labels, strict=True)]
    return {
        "right": [video for video in surest if right[video]][:count],
        "wrong": [video for video in surest if labels[video] and not right[video]][:count],
    }


def class_table(per_class: Sequence[Mapping[str, Any]], confusion_CC: np.ndarray) -> str:
    """A Markdown table, worst class first: videos, accuracy in per cent, the class that it is taken for most often.

    per_class: `per_class` of a report.
    """
    wrong_CC = confusion_CC - np.diag(np.diag(confusion_CC))
    present = [c for c, row in enumerate(per_class) if row["videos"]]
    lines = ["| class | videos | right % | most often taken for |", "|---|---:|---:|---|"]
    for c in sorted(present, key=lambda c: class_share(per_class[c]))[:MOST_CLASSES]:
        row, other = per_class[c], int(wrong_CC[c].argmax())
        taken_for = f"{_literal(per_class[other]['class'])} ({wrong_CC[c, other]})" if wrong_CC[c, other] else ""
        lines.append(f"| {_literal(row['class'])} | {row['videos']} | {class_share(row):.1f} | {taken_for} |")
    return "\n".join([*lines, *_more(len(present))])


def precision_table(per_class: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table of classes that videos have among others, lowest average precision first; shares in per cent.

    per_class: `per_class` of a report.
    """
    present = sorted((row for row in per_class if row["videos"]), key=class_share)
    lines = [
        "| class | videos | average precision | precision | recall | threshold |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in present[:MOST_CLASSES]:
        precision = f"{100 * row['correct'] / row['said']:.1f}" if row["said"] else ""
        recall, threshold = 100 * row["correct"] / row["videos"], "" if row["threshold"] is None else row["threshold"]
        lines.append(
            f"| {_literal(row['class'])} | {row['videos']} | {class_share(row):.1f} | {precision} | {recall:.1f} | "
            f"{threshold} |"
        )
    return "\n".join([*lines, *_more(len(present))])


def _more(count: int) -> list[str]:
    return ["", f"and {count - MOST_CLASSES} classes with higher shares"] if count > MOST_CLASSES else []


def _literal(text: str) -> str:
    """Escapes the text for Markdown and HTML."""
    return re.sub(r"[^\w\s]|_", lambda found: f"&#{ord(found[0])};", text)


def _shown(frames_TCHW: torch.Tensor) -> np.ndarray:
    """At most MOST_FRAMES of the frames, (t, S, S, 3) uint8."""
    count = len(frames_TCHW)
    chosen = np.linspace(0, count - 1, min(count, MOST_FRAMES)).round().astype(int)
    return frames_TCHW[chosen].permute(0, 2, 3, 1).cpu().numpy()


def read_clips(loader: Loader, videos: Sequence[int] | np.ndarray) -> dict[int, np.ndarray]:
    """{id: (t, S, S, 3) uint8}: the frames that an evaluation with one view sees. Unreadable videos are missing."""
    data = loader.config.data
    _, _, (view,), _ = next(Views(data.test_clips, data.test_crops, data.dense).subsets())
    return {
        video: _shown(frames_VTCHW[view])
        for batch in loader.subset(np.array(videos, np.int64))
        for video, frames_VTCHW in zip(batch.ids.tolist(), batch.frames, strict=True)
    }


def _write_projector(folder: Path, class_embeddings_CD: torch.Tensor, class_names: Sequence[str]) -> None:
    """Overwrites the files of TensorBoard's projector; `add_embedding` would keep a copy for every step."""
    np.savetxt(folder / "class_embeddings.tsv", class_embeddings_CD.float().cpu().numpy(), "%.6g", "\t")
    (folder / "class_names.tsv").write_text("".join(f"{name}\n" for name in class_names), encoding="utf-8")
    (folder / "projector_config.pbtxt").write_text(PROJECTOR, encoding="utf-8")
