"""Writes an export: the files of `weights.export_model`, a model card, and on demand an ONNX graph.

README.md         the model card
model.onnx        the visual side with the classes (text4vis/serving/onnx_graph.py); model.onnx.data from 2 GB on
predict_onnx.py   text4vis/serving/standalone.py, which runs the graph without torch; beside it shards/frames.py,
                  shards/video.py and shards/headers.py as predict_onnx_frames.py …, which decide what a video shows
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from typing import Any

from shards.files import require_folder, write_atomically
from text4vis.config.keys import schema
from text4vis.config.schema import DENSE_WINDOW, Config, ConfigError
from text4vis.data.augmentation import frame_rule
from text4vis.evaluation.comparison import read_report
from text4vis.evaluation.embedding import classes_fingerprint, measured_with, versions
from text4vis.evaluation.multi_label import Decision
from text4vis.evaluation.protocols import is_multi_label
from text4vis.model.sources import CLIP_NAMES
from text4vis.saved.opening import SavedModel, SavedRun, TrainedModel
from text4vis.saved.weights import EXPORT_FILE, Parts, export_model, weights_fingerprint, write_card
from text4vis.serving.fitted import fitted_of
from text4vis.serving.model_card import file_name, model_card
from text4vis.serving.onnx_graph import OPSET, OnnxFile, remove_onnx, require_packages, write_onnx
from text4vis.serving.predictor import takes_labels

CARD_FILE = "README.md"
ONNX_FILE = "model.onnx"
ONNX_PROGRAM = "predict_onnx.py"
# The modules that read videos: the very ones that made what the model was trained on.
ONNX_MODULES = {
    "shards.frames": "predict_onnx_frames.py",
    "shards.video": "predict_onnx_video.py",
    "shards.headers": "predict_onnx_headers.py",
}
UNFINISHED = ".exporting"  # an export that was killed may be written again
ADDED = ("preprocessing", "evaluation", "onnx", "versions")  # to the card of a run, by its export
RESIZE_WORDS = {
    "shortest": "the short side to scale_size, the long side in proportion, rounded down; the square in the centre",
    "squash": "the frame to a square of input_size, whatever its shape",
    "longest": "the long side to input_size, the short side in proportion, rounded; in the centre of a black square",
}
TABLES = ("per_class", "confusion", "predictions", "by_views", "half_classes", "class_splits", "skipped")


def export(folder: Path, trained: TrainedModel, *, report: Path | None = None, onnx: bool = False) -> OnnxFile | None:
    """Writes the export of a trained model; an older one in the folder is replaced. Returns what `onnx` wrote.

    report: of an evaluation, which the card quotes; by default the one that an export quotes already. Raises
    ConfigError, also for a folder that holds something else, and OSError.
    """
    evaluation = _evaluation(trained, report)
    require_folder(folder)
    if any(folder.iterdir()) and not any((folder / name).is_file() for name in (EXPORT_FILE, UNFINISHED)):
        raise ConfigError(
            f"--output: {folder} holds other files, no export; some might be overwritten: name a new or empty folder"
        )
    (folder / UNFINISHED).touch()
    (folder / EXPORT_FILE).unlink(missing_ok=True)  # without it the folder is no export
    remove_onnx(folder / ONNX_FILE)
    for name in (ONNX_PROGRAM, *ONNX_MODULES.values()):
        (folder / name).unlink(missing_ok=True)
    graph = _write_graph(folder, trained, evaluation) if onnx else None
    config, names = trained.config, trained.class_names
    card = _card(trained, evaluation, None if graph is None else _graph_facts(graph))
    export_model(folder, trained.model, config.network, config.to_dict(), names, trained.class_embeddings_CD, card)
    (folder / CARD_FILE).write_text(_page(trained, card), encoding="utf-8")
    (folder / UNFINISHED).unlink()
    return graph


def add_to_export(
    folder: Path, trained: TrainedModel, *, report: Path | None = None, onnx: bool = False
) -> OnnxFile | None:
    """Adds an ONNX graph, an evaluation or both to the export that `trained` was opened from; its weights stay as they
    are. Returns what `onnx` wrote. Raises ConfigError, OSError."""
    evaluation = _evaluation(trained, report)
    require_folder(folder)
    graph = _write_graph(folder, trained, evaluation) if onnx else None
    card = _card(trained, evaluation, trained.card.get("onnx") if graph is None else _graph_facts(graph))
    write_card(folder, card)
    write_atomically(folder / CARD_FILE, _page(trained, card).encode())
    return graph


def _evaluation(trained: TrainedModel, report: Path | None) -> dict[str, Any] | None:
    return trained.card.get("evaluation") if report is None else quote_report(report, trained)


def _write_graph(folder: Path, trained: TrainedModel, evaluation: dict[str, Any] | None) -> OnnxFile:
    require_packages()
    facts: dict[str, Any] = {
        "class_names": list(trained.class_names),
        "preprocessing": preprocessing(trained.config),
    }
    fitted = fitted_of({**trained.card, "evaluation": evaluation}, trained.config, folder)
    if isinstance(fitted, Decision):
        facts["decision"] = asdict(fitted)
    graph = write_onnx(folder / ONNX_FILE, trained.model.eval(), trained.class_embeddings_CD, facts)
    _write_program(folder)
    return graph


def _graph_facts(graph: OnnxFile) -> dict[str, Any]:
    difference = "not compared: onnxruntime is not installed" if graph.difference is None else graph.difference
    return {"opset": OPSET, "bytes": graph.bytes, "largest difference of logits to PyTorch": difference}


def _card(
    trained: TrainedModel, evaluation: dict[str, Any] | None, graph_facts: dict[str, Any] | None
) -> dict[str, Any]:
    """What export.json says of the model: what its run recorded, and ADDED."""
    added = {
        "preprocessing": preprocessing(trained.config),
        "evaluation": evaluation,
        "onnx": graph_facts,
        "versions": versions(),
    }
    assert tuple(added) == ADDED
    return trained.card | added


def _page(trained: TrainedModel, card: dict[str, Any]) -> str:
    config = trained.config
    return model_card(
        f"{file_name(config.network.arch)}{f', {config.data.dataset}' if config.data.dataset else ''}",
        trained.class_names,
        facts={**_what_it_is(trained), "versions": card["versions"]},
        training=_training(trained),
        preprocessing=card["preprocessing"],
        figures=trained.card.get("figures", {}),
        evaluation=card["evaluation"],
        onnx=card["onnx"],
        takes_labels=takes_labels(config),
        several=config.solver.multi_label or bool(card["evaluation"] and is_multi_label(card["evaluation"])),
    )


def _write_program(folder: Path) -> None:
    """The program and the modules that read its videos, which import each other by their names in the folder."""
    sources = {Path(__file__).with_name("standalone.py"): ONNX_PROGRAM}
    sources |= {Path(str(import_module(name).__file__)): copy for name, copy in ONNX_MODULES.items()}
    for source, copy in sources.items():
        text = source.read_text(encoding="utf-8")
        for name, other in ONNX_MODULES.items():
            text = text.replace(f"from {name} import", f"from {Path(other).stem} import")
        (folder / copy).write_text(text, encoding="utf-8")


def last_report(saved: SavedModel) -> Path | None:
    """The report of the last evaluation of the run that a model belongs to, None where there is none."""
    report = saved.run / "report.json" if isinstance(saved, SavedRun) else None
    return report if report is not None and report.is_file() else None


def quote_report(path: Path, trained: TrainedModel) -> dict[str, Any]:
    """The protocol card and the figures of a report, without its tables, whether it is of the same weights, and whether
    it was measured on the videos that the model was trained on.

    Raises ConfigError for a file that is no report.
    """
    report = read_report(path)
    quoted = {key: value for key, value in report.items() if key not in TABLES}
    same = report.get("weights") == weights_fingerprint(trained.model.state_dict())
    # The fingerprint leaves out a classifier that trains, maybe alone; reports of a run have its step.
    same = same and report.get("step") in (None, trained.card.get("step"))
    trained_on = report.get("data_fingerprint") == trained.card.get("data_fingerprint", "")
    quoted["model"] = file_name(report.get("model"))
    names = [row["class"] for row in report.get("per_class", [])]
    if not same or names != list(trained.class_names) or not _answers_alike(report, trained):
        quoted |= {"calibration": None, "decision": None}  # of other weights, classes or frames
    return {"of these weights": same, "of the training data": trained_on, **quoted}


def _answers_alike(report: Mapping[str, Any], trained: TrainedModel) -> bool:
    """Whether a report was measured with the frames and the class embeddings that prediction uses.

    The number of views does not matter: the calibration is that of one. What an older report lacks counts as equal.
    Embeddings of text differ in their last bits from device to device, so there the prompts are compared.
    """
    own = measured_with(trained.model, trained.config)
    ours, found = ({**card.get("views", {}), **card.get("pixels", {})} for card in (own, report))
    keys = found.keys() & ours.keys() - {"clips", "crops", "fusion"}
    if any(found[key] != ours[key] for key in keys):
        return False
    embeddings = classes_fingerprint(trained.class_embeddings_CD)
    made = [(card.get("classifier"), card.get("template")) for card in (own, report)]
    is_remade = own["classifier"] in ("text", "trained") and made[0] == made[1]
    return is_remade or report.get("class_embeddings", embeddings) == embeddings


def preprocessing(config: Config) -> dict[str, Any]:
    """What a program does to a video before the model sees it; frames are then uint8 RGB (T, 3, S, S)."""
    data = config.data
    resize, interpolation = frame_rule(data)
    return {
        "num_segments": data.num_segments,
        "sampling": "equal steps in the window in the middle" if data.dense else "the first frame of each segment",
        "dense_window": DENSE_WINDOW if data.dense else None,
        "resize": resize,
        "interpolation": interpolation,
        "scale_size": config.scale_size if resize == "shortest" else None,
        "input_size": data.input_size,
        "in words": f"{RESIZE_WORDS[resize]}; {interpolation} with antialias (Pillow's)",
    }


def _starting_weights(config: Config) -> str:
    network = config.network
    if config.pretrain:
        return f"{file_name(config.pretrain)} (pretrain)"
    if not network.init:
        return "random"
    if network.pretrained:
        return f"{file_name(network.pretrained)} (network.pretrained)"
    return f"OpenAI's CLIP {network.arch}" if network.arch in CLIP_NAMES else f"{file_name(network.arch)}'s own"


def _training(trained: TrainedModel) -> dict[str, Any]:
    """What a run records of its training; a .pt file records nothing, its recipe comes from the user who exports it."""
    recorded = {key: value for key, value in trained.card.items() if key not in {"figures", *ADDED}}
    if "step" not in recorded:
        return recorded
    return recorded | {key.name: file_name(attrgetter(key.name)(trained.config)) for key in schema() if key.on_card}


def _what_it_is(trained: TrainedModel) -> dict[str, Any]:
    config, network = trained.config, trained.config.network
    return {
        "architecture": file_name(network.arch),
        "weights before training": _starting_weights(config) if "step" in trained.card else None,
        "temporal head": network.sim_header,
        "temporal modelling in the tower": network.tm or ("joint_st" if network.joint_st else "none"),
        "parameters of the visual side": sum(
            tensor.numel() for tensor in Parts.of(trained.model.state_dict()).video.values()
        ),
        "pixels": {"mean": list(trained.model.mean), "std": list(trained.model.std)},
        "activation": "quick_gelu" if trained.model.clip_config.get("quick_gelu") else "gelu",
        "tokenizer": trained.model.text.tokenizer.facts(),
        "frames a video": config.data.num_segments,
        "embedding width": trained.model.embed_dim,
        "weights": "float32",
        "weights_fingerprint": weights_fingerprint(trained.model.state_dict()),
        "classifier": network.classifier + (", trained" if network.classifier_trainable else ""),
        "template": network.template,
        "data set": config.data.dataset or "unnamed",
    }
