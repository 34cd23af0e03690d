"""Exports: the ONNX graph computes what PyTorch does, its program needs no torch, the card shows texts as they are."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from pages import code_blocks
from tiny import CONFIG, OPENAI_RESNET, random_clip, random_frames, tiny_network, write_clip
from videos import write_video

import text4vis
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, ConfigError, DataConfig, NetworkConfig
from text4vis.evaluation.embedding import classes_fingerprint, measured_with
from text4vis.evaluation.multi_label import Decision
from text4vis.evaluation.protocols import class_scores
from text4vis.model import heads
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.saved.checkpoint import CheckpointError, State
from text4vis.saved.inputs import digests
from text4vis.saved.opening import TrainedModel, open_saved
from text4vis.saved.runs import check_same_classes
from text4vis.saved.weights import weights_fingerprint
from text4vis.serving import onnx_graph
from text4vis.serving.exporting import export, last_report, preprocessing
from text4vis.serving.onnx_graph import write_onnx

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'text4vis[onnx]'")

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["archery", "<b>*a*|", "`x_y_z`"]
T, S = 4, 32
ROW = {"videos": 8, "confidence": 25.0, "accuracy": 25.0}
CLOSE = 1e-3  # of logits between -100 and 100, in fp32


def trained_model(folder: Path, *, dense: bool = False, **network) -> TrainedModel:
    config = Config(
        network=tiny_network(folder, **network),
        data=DataConfig(num_segments=T, input_size=S, scale_size=36, dataset="tiny [x](y)", dense=dense),
    )
    config = settle(config)
    torch.manual_seed(0)
    model = build_model(config.network, T).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    card = {"step": 7, "figures": {"top1": 12.5}}
    return TrainedModel(model, config, NAMES, build_classifier(config, model, NAMES), card)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[TrainedModel, Path]:
    base = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "NUM_LAYERS", 1)
        trained = trained_model(base / "clip")
        report = {"videos": 8, "top1": 25.0, "top1_correct": 2, "per_class": [], "views": {"clips": 4}, "model": "/a/b",
                  "weights": weights_fingerprint(trained.model.state_dict())}  # fmt: skip
        (base / "report.json").write_text(json.dumps(report))
        written = export(base / "export", trained, report=base / "report.json", onnx=True)
        assert written.difference < CLOSE
        yield trained, base / "export"


def session(path: Path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def expected(trained: TrainedModel, frames_BVTCHW: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (B, V, D) and, by the evaluation's own rule, probabilities (B, C)."""
    with torch.no_grad():
        views_BVD = trained.model.encode_video(frames_BVTCHW.flatten(0, 1)).unflatten(0, frames_BVTCHW.shape[:2])
    return views_BVD.numpy(), class_scores(views_BVD.numpy(), trained.class_embeddings_CD.numpy())


def softmax(logits_BC: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits_BC).softmax(dim=-1).numpy()


@pytest.mark.slow
@pytest.mark.parametrize(("videos", "views"), [(1, 1), (2, 1), (5, 3)])
def test_the_graph_gives_an_evaluations_scores(exported, videos, views):
    trained, folder = exported
    frames = random_frames(videos * views, T, S, seed=videos).unflatten(0, (videos, views))
    embeddings_BD, logits_BC = session(folder / "model.onnx").run(None, {"frames": frames.numpy()})
    views_BVD, scores_BC = expected(trained, frames)
    np.testing.assert_allclose(embeddings_BD, views_BVD.mean(axis=1), atol=1e-5)
    np.testing.assert_allclose(softmax(logits_BC), scores_BC, atol=CLOSE)
    assert np.ptp(logits_BC) > 1, "a constant would agree too"


def test_other_classes_are_fed_and_the_graph_tells_what_it_is(exported):
    trained, folder = exported
    frames = random_frames(2, T, S)[:, None]
    graph = session(folder / "model.onnx")
    own = graph.run(["logits"], {"frames": frames.numpy()})[0]
    rows_CD = 3 * trained.class_embeddings_CD[[2, 0]].numpy()  # of any length
    fed = graph.run(["logits"], {"frames": frames.numpy(), "classes": rows_CD})[0]
    np.testing.assert_allclose(fed, own[:, [2, 0]], atol=CLOSE)
    facts = json.loads(graph.get_modelmeta().custom_metadata_map["text4vis"])
    assert facts == {"class_names": NAMES, "preprocessing": preprocessing(trained.config)}
    assert str(ROOT).encode() not in (folder / "model.onnx").read_bytes(), "paths of this machine"


def test_the_program_beside_it_predicts_without_torch(exported, tmp_path):
    _, folder = exported
    write_video(tmp_path / "clip.mp4", 90, 11)
    code = "import runpy, sys; runpy.run_path('predict_onnx.py', run_name='__main__'); "
    code += "assert not {'torch', 'text4vis', 'shards'} & sys.modules.keys()"
    command = [sys.executable, "-B", "-c", code, "model.onnx", tmp_path / "clip.mp4"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = [line.split("\t")[1:] for line in result.stdout.splitlines()]
    top = text4vis.load(folder).predict(tmp_path / "clip.mp4").top
    assert [name for name, _ in found] == [name for name, _ in top]
    np.testing.assert_allclose([float(share) for _, share in found], [share for _, share in top], atol=CLOSE)


def test_the_program_names_the_classes_that_reach_their_thresholds():
    from text4vis.serving.standalone import answers

    decision = Decision(0.5, -10.0, (0.2, 0.9, 0.5, 0.1))
    logits_C = np.array([19.0, 22.0, 23.0, 10.0], np.float32)
    scores_C = decision.probabilities(logits_C)
    assert decision.shown(scores_C).tolist() == [True, False, True, False]
    expected = [(2, pytest.approx(scores_C[2])), (0, pytest.approx(scores_C[0]))]
    assert answers(logits_C, json.loads(json.dumps(asdict(decision)))) == expected
    assert answers(logits_C - 50, asdict(decision)) == []
    assert [label for label, _ in answers(logits_C, None)] == [2, 1, 0, 3]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("size", [(50, 40), (40, 71), (33, 33)])
def test_the_program_sees_the_same_frames(exported, dense, size):
    from PIL import Image

    from text4vis.serving.footage import Sampler
    from text4vis.serving.standalone import frame_numbers, scale_and_crop

    recogniser = text4vis.load(exported[1])
    recogniser.config = replace(recogniser.config, data=replace(recogniser.config.data, dense=dense))
    rule, sampler = preprocessing(recogniser.config), Sampler(recogniser.config)
    video = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    for count in (1, 3, 130, 301):
        assert frame_numbers(count, rule) == sampler.indices(count).tolist()
    ours = np.stack([scale_and_crop(Image.fromarray(image), rule) for image in video])
    assert np.array_equal(ours.transpose(0, 2, 3, 1), np.stack([sampler.prepare(image) for image in video]))


def test_the_code_of_the_deployment_page_gives_the_same_probabilities(exported, tmp_path, monkeypatch):
    _, folder = exported
    write_video(tmp_path / "clip.mp4", 140, 13)
    (tmp_path / "exported").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks("docs/deployment.md", "python")
    result = subprocess.run([sys.executable, "-B", "-c", block], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    name, share = text4vis.load("exported").predict("clip.mp4").top[0]
    found = result.stdout.strip().rpartition(" ")
    assert found[0] == name and float(found[2]) == pytest.approx(share, abs=CLOSE)
    assert not re.search(r"import (torch|text4vis)", block)


def test_the_card_shows_texts_as_they_are(exported):
    trained, folder = exported
    _, header, page = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    assert yaml.safe_load(header)["pipeline_tag"] == "video-classification"
    html = MarkdownIt("commonmark").enable("table").render(page)
    for text in NAMES:
        assert f"<td>{text.replace('<', '&lt;').replace('>', '&gt;')}</td>" in html
    assert "<b>" not in html and "<a" not in html and "<em>" not in html
    assert "<td>tiny [x](y)</td>" in html and "<td>views.clips</td>" in html
    assert "<td>weights before training</td>" in html and "that it was trained on" not in html
    assert "The evaluation of these weights" in html and "/a/" not in html and str(folder.parent) not in page
    card = text4vis.saved.weights.load_export(folder).card
    assert card["evaluation"]["top1"] == 25.0 and card["preprocessing"] == preprocessing(trained.config)


def test_the_card_says_when_the_figures_are_of_the_training_data(exported, tmp_path):
    trained, folder = exported
    report = json.loads((folder.parent / "report.json").read_text())
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**report, "data_fingerprint": "f00d"}))
    export(tmp_path / "out", replace(trained, card={**trained.card, "data_fingerprint": "f00d"}), report=path)
    assert "**on the videos that it was trained on**" in (tmp_path / "out" / "README.md").read_text()


def test_an_export_again_leaves_nothing_of_the_old_one(exported, tmp_path):
    trained, folder = exported
    for name in ("export.json", "model.onnx", "model.onnx.data", "predict_onnx.py"):
        (tmp_path / name).touch()
    with torch.no_grad():
        trained.model.logit_scale.add_(1)
    export(tmp_path, trained, report=folder.parent / "report.json")
    with torch.no_grad():
        trained.model.logit_scale.sub_(1)
    assert not list(tmp_path.glob("*onnx*"))
    page = (tmp_path / "README.md").read_text()
    assert "onnx" not in page and "The evaluation of **other weights**" in page
    assert text4vis.load(tmp_path).class_names == NAMES


def test_a_folder_of_other_files_is_left_alone(exported, tmp_path):
    """A project's own README.md, or a run, which an export in the same folder would hide."""
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match=r"--output: .* holds other files, no export; .*name a new or empty folder"):
        export(tmp_path, exported[0])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def command(monkeypatch, *words) -> int:
    """Exit code of tools/export.py."""
    monkeypatch.syspath_prepend("tools")
    import export as program

    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
    return program.main()


@pytest.mark.slow
def test_a_graph_and_an_evaluation_are_added_to_an_export(exported, tmp_path, monkeypatch, capsys):
    """Its weights stay untouched; what is not asked for stays, in the folder and in a copy."""
    trained, complete = exported
    folder, copy = tmp_path / "export", tmp_path / "copy"
    export(folder, trained)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert command(monkeypatch, folder, "--onnx") == 0
    weights = [name for name in before if name.endswith(".safetensors")]
    assert len(weights) == 3 and all((folder / name).stat().st_mtime_ns == before[name] for name in weights)
    assert command(monkeypatch, folder, "--output", folder, "--report", complete.parent / "report.json") == 0
    assert command(monkeypatch, folder, "--output", copy) == 0
    found, copied, expected = (json.loads((place / "export.json").read_text()) for place in (folder, copy, complete))
    assert found["card"]["onnx"].keys() == expected["card"].pop("onnx").keys() and copied["card"].pop("onnx") is None
    del found["card"]["onnx"]  # how far a graph is from PyTorch differs from time to time
    assert found == expected == copied
    own, others = ((place / "README.md").read_text().partition("## Evaluation") for place in (folder, complete))
    assert own[2] == others[2] and "| top1 | 25.0 |" in own[2] and "onnx" in own[0]
    frames = random_frames(2, T, S)[:, None].numpy()
    own, others = (session(place / "model.onnx").run(["logits"], {"frames": frames})[0] for place in (folder, complete))
    np.testing.assert_allclose(own, others, atol=CLOSE)
    assert {path.name for path in folder.iterdir()} == {path.name for path in complete.iterdir()}
    capsys.readouterr()
    assert command(monkeypatch, folder) == 1 and "add to it with --onnx or --report" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("classifier", "measured", "keeps"),
    [
        ("text", {}, True),
        ("text", {"views.clips": 4, "views.crops": 3, "class_embeddings": "of another device"}, True),
        ("text", {"template": "a {}.", "class_embeddings": "another"}, False),
        ("text", {"classifier": "lda", "class_embeddings": "another"}, False),
        ("orthogonal", {"class_embeddings": "of another seed"}, False),
        ("text", {"views.frames": 2}, False),
        ("text", {"views.sampling": "dense"}, False),
        ("text", {"pixels.resize": "squash"}, False),
        ("text", {"step": 7}, True),
        ("text", {"step": 9}, False),  # where only the classifier trains, the weights are those of step 7
    ],
)
def test_a_calibration_is_kept_if_it_is_of_the_answers_that_prediction_gives(tmp_path, classifier, measured, keeps):
    trained = trained_model(tmp_path / "clip", classifier=classifier)
    own = {"temperature": 2.0, "ece": 1.0, "ece_calibrated": 1.0, "reliability": [ROW], "reliability_calibrated": [ROW]}
    report = {
        "videos": 8, "top1": 25.0, "top1_correct": 2, "calibration": {**own, "answers": [], "sets": []},
        "per_class": [{"class": name, "videos": 0, "correct": 0} for name in NAMES],
        "weights": weights_fingerprint(trained.model.state_dict()),
        "class_embeddings": classes_fingerprint(trained.class_embeddings_CD),
        **measured_with(trained.model, trained.config),
    }  # fmt: skip
    for key, value in measured.items():
        part, _, name = key.rpartition(".")
        (report[part] if part else report)[name] = value
    (tmp_path / "report.json").write_text(json.dumps(report))
    export(tmp_path / "export", trained, report=tmp_path / "report.json")
    found = text4vis.load(tmp_path / "export").calibration
    assert (found.temperature if found else None) == (2.0 if keeps else None)


def test_an_export_that_was_killed_is_written_again(exported, tmp_path, monkeypatch):
    with monkeypatch.context() as killed:
        killed.setattr("text4vis.serving.exporting.model_card", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(tmp_path / "x", exported[0])
    (tmp_path / "x" / "export.json").unlink()  # as if it had been killed before that
    export(tmp_path / "x", exported[0])
    assert {path.name for path in (tmp_path / "x").iterdir()} == {
        path.name for path in exported[1].iterdir() if "onnx" not in path.name
    }


def test_who_may_read_files_here_may_read_the_weights(exported):
    (exported[1].parent / "another").touch()
    usual = (exported[1].parent / "another").stat().st_mode
    assert {path.name: oct(path.stat().st_mode) for path in exported[1].iterdir()} == {
        path.name: oct(usual) for path in exported[1].iterdir()
    }


def test_a_pt_file_records_no_training(exported, tmp_path):
    trained, _ = exported
    export(tmp_path, replace(trained, card={"source": "theirs.pt"}))
    page = (tmp_path / "README.md").read_text()
    assert "solver.epochs" not in page and "weights before training" not in page and "theirs.pt" in page


def test_the_last_evaluation_of_a_run_is_found(tmp_path):
    best = tmp_path / "checkpoints" / "best"
    best.mkdir(parents=True)
    (best / "state.json").touch()
    assert last_report(open_saved(tmp_path)) is None
    (tmp_path / "report.json").touch()
    assert {last_report(open_saved(path)) for path in (tmp_path, best)} == {tmp_path / "report.json"}
    (tmp_path / "best.pt").touch()
    assert last_report(open_saved(tmp_path / "best.pt")) is None


def test_another_file_of_class_embeddings_is_noticed(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, np.eye(3, 64))
    config = Config(network=NetworkConfig(classifier="file", classifier_file=str(path)))
    state = State(0, 0, 1, "", config.to_dict(), NAMES, inputs=digests(config))
    check_same_classes(state, config, tmp_path)
    np.save(path, 2 * np.eye(3, 64))
    with pytest.raises(CheckpointError, match=r"other class embeddings than .*rows\.npy \(network.classifier_file\)"):
        check_same_classes(state, config, tmp_path)
    check_same_classes(replace(state, inputs={}), config, tmp_path)  # a checkpoint of before


@pytest.mark.slow
def test_large_weights_lie_in_a_file_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_graph, "INLINE_BYTES", 1000)
    trained = trained_model(tmp_path / "clip", sim_header="None", joint_st=True)
    written = write_onnx(tmp_path / "model.onnx", trained.model, trained.class_embeddings_CD, {})
    data = tmp_path / "model.onnx.data"
    assert written.difference < CLOSE and written.bytes == written.path.stat().st_size + data.stat().st_size
    assert data.stat().st_size > sum(p.numel() for p in trained.model.parameters() if p.numel() > 1000) * 4 * 0.9


@pytest.mark.slow
def test_a_graph_that_computes_something_else_does_not_stay(exported, tmp_path, monkeypatch):
    trained, _ = exported
    export(tmp_path, trained)
    monkeypatch.setattr(onnx_graph, "_difference", lambda *_: 0.5)
    with pytest.raises(ConfigError, match=r"logits that differ by 0\.5"):
        export(tmp_path, trained, onnx=True)
    assert not list(tmp_path.glob("*onnx*")) and not (tmp_path / "export.json").exists()


def test_the_command_says_what_a_file_or_a_run_needs(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend("tools")
    import export as command

    (tmp_path / "train.pt").touch()
    for words, message in (
        (["typo.pt", "--config", "c.yaml", "--labels", "l.csv"], "typo.pt: no such file or folder"),
        (["train.pt"], "train.pt: a .pt file does not hold its recipe and classes; add --config and --labels"),
        ([".", "--labels", "l.csv"], "a run has its own recipe and classes; leave --config and --labels out"),
    ):
        monkeypatch.setattr(sys, "argv", ["export.py", str(tmp_path / words[0]), "--output", "x", *words[1:]])
        with pytest.raises(SystemExit, match="2"):
            command.parse_arguments()
        assert message in capsys.readouterr().err


def test_what_stands_in_the_way_is_named(exported, tmp_path, monkeypatch):
    trained, _ = exported
    classes_CD = trained.class_embeddings_CD

    def fails(*_, **__):
        raise RuntimeError("no such operator\nand a long trace")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ConfigError, match=r"cannot convert this network \(no such operator\); .*network.sim_header"):
        write_onnx(tmp_path / "model.onnx", trained.model, classes_CD, {})
    monkeypatch.setattr(onnx_graph.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package onnx: pip install 'text4vis\[onnx\]'"):
        write_onnx(tmp_path / "model.onnx", trained.model, classes_CD, {})


@pytest.mark.long
@pytest.mark.parametrize(
    "network",
    [{"sim_header": "None"}, {"sim_header": "Transf"}, {"sim_header": "Transf_cls"}, {"sim_header": "LSTM"},
     {"sim_header": "Conv_1D"}, {"tm": "tsm"}, {"tm": "tokenshift"}, {"tm": "tokent1d"},
     {"classifier_trainable": True}, {"fix_text": False}],
    ids=str,
)  # fmt: skip
def test_every_network_can_be_exported(tmp_path, network):
    trained = trained_model(tmp_path / "clip", **network)
    assert write_onnx(tmp_path / "model.onnx", trained.model, trained.class_embeddings_CD, {}).difference < CLOSE


@pytest.mark.long
@pytest.mark.parametrize("tm", [None, "tsm"])
def test_a_resnet_can_be_exported(tmp_path, tm):
    path = write_clip(tmp_path)
    path.write_text(json.dumps(CONFIG | {"vision_cfg": OPENAI_RESNET["vision_cfg"]}))
    torch.save(random_clip(json.loads(path.read_text())).state_dict(), path.with_suffix(".pt"))
    path.with_suffix(".safetensors").unlink()
    model = build_model(NetworkConfig(arch=str(path), sim_header="None", tm=tm), T).eval()
    assert write_onnx(tmp_path / "model.onnx", model, torch.randn(3, 64), {}).difference < CLOSE
