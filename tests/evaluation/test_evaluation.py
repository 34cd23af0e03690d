"""What a report says; features kept in a file; any number of ranks; reports compared."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from frame_folders import make_frame_folders
from launch import program, run
from original_files import save_train, save_train_nce
from scipy.stats import binomtest
from tiny import tiny_network

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.keys import keys_of
from text4vis.config.loading import config_from_dict
from text4vis.config.roles import Role
from text4vis.config.schema import Config, ConfigError, DataConfig, EngineConfig
from text4vis.data.augmentation import eval_geometry
from text4vis.data.loader import build_loader
from text4vis.data.sampling import test_indices as clip_indices
from text4vis.data.sampling import val_indices
from text4vis.evaluate import differences
from text4vis.evaluation import comparison
from text4vis.evaluation import embedding as evaluation
from text4vis.evaluation.embedding import (
    class_splits,
    embed_videos,
    evaluate,
    protocol_card,
)
from text4vis.evaluation.protocols import CENTRE_CROP, Views, figures, write_report
from text4vis.model.preprocessing import settle
from text4vis.model.tensors import write_tensors
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import export_model, load_export, load_text4vis, weights_fingerprint

T, NUM_VIDEOS, NUM_CLASSES = 4, 11, 6
EVALUATE, COMPARE = "text4vis/evaluate.py", "tools/compare_reports.py"
# What readers of a report may rely on, in its order.
KEYS = [
    "date", "data", "data_fingerprint", "missing", "skipped", "classes_fingerprint", "views", "pixels", "activation",
    "tokenizer", "classifier", "template", "class_embeddings", "weights", "precision", "device", "decode", "versions",
    "videos", "classes", "top1", "top5", "top1_correct", "top5_correct", "mean_class_accuracy", "map", "not_finite",
    "chance", "by_views", "calibration", "half_classes", "class_splits",
    "per_class", "confusion", "predictions",
]  # fmt: skip


def test_the_single_view_is_the_one_of_an_evaluation_with_one():
    for num_frames in range(1, 120):
        for clips in (2, 3, 4, 10):
            assert clip_indices(num_frames, 8, clips)[:8].tolist() == val_indices(num_frames, 8).tolist()
    for width in range(256, 480):
        (only,) = eval_geometry(256, width, 256, 224, 1).crops
        for crops in (3, 5, 10):
            centre = eval_geometry(256, width, 256, 224, crops).crops[CENTRE_CROP[crops]]
            assert not centre.flip and abs(centre.top - only.top) <= 2 and abs(centre.left - only.left) <= 2
        unflipped = eval_geometry(256, width, 256, 224, 10).crops[::2]
        assert unflipped == eval_geometry(256, width, 256, 224, 5).crops


class Project:
    """Eleven small videos of six classes in shards, one more left out, a tiny model and its configuration."""

    def __init__(self, base):
        folders = make_frame_folders(base, [3 + i % 10 for i in range(NUM_VIDEOS + 1)], num_classes=NUM_CLASSES)
        (folders.root / folders.names[4] / "img_00001.jpg").write_bytes(b"not a picture")
        self.base, self.labels = base, folders.labels
        build_shards(
            parse_annotations(folders.annotations), root=folders.root, labels=parse_labels(folders.labels),
            output=base / "shards", on_error="skip",
        )  # fmt: skip
        self.config = Config(
            data=DataConfig(
                dataset="tiny", val=(str(base / "shards"),), batch_size=3, num_segments=T, input_size=32, scale_size=36,
                test_clips=2, test_crops=3, workers=1,
            ),
            network=tiny_network(base / "clip"),
            engine=EngineConfig(precision="fp32"),
        )  # fmt: skip
        self.config = settle(self.config)
        torch.manual_seed(1)
        self.model = build_model(self.config.network, T)
        self.names = parse_labels(folders.labels)
        self.classes_CD = build_classifier(self.config, self.model, self.names)

    def evaluate(self, config=None, model=None, **options):
        model = model or self.model
        weights = weights_fingerprint(model.state_dict())
        with build_loader(config or self.config, "val") as loader:
            return evaluate(model, self.classes_CD, self.names, loader, weights=weights, **options)

    def embed(self, config=None):
        with build_loader(config or self.config, "val") as loader:
            return embed_videos(self.model, loader)

    def with_data(self, **changes):
        return replace(self.config, data=replace(self.config.data, **changes))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return Project(tmp_path_factory.mktemp("evaluation"))


def test_a_report_says_what_was_measured(project):
    report = project.evaluate()
    assert list(report) == KEYS
    assert (report["videos"], report["missing"], report["classes"]) == (NUM_VIDEOS, 1, NUM_CLASSES)
    views = {"clips": 2, "crops": 3, "frames": T, "sampling": "uniform", "scale_size": 36, "input_size": 32}
    assert report["views"].items() >= views.items()
    assert (report["pixels"]["resize"], report["activation"]) == ("shortest", "quick_gelu")
    assert report["tokenizer"]["context_length"] == 32
    assert report["precision"] == "float32" and report["classifier"] == "text" and report["template"].count("{}") == 1
    assert {"text4vis", "torch", "open_clip_torch", "deepspeed"} < set(report["versions"])
    assert any(package.startswith("nvidia-dali") for package in report["versions"])
    again = project.evaluate()
    assert report | {"date": ""} == again | {"date": ""}


def test_the_batch_size_of_an_evaluation_is_its_own_and_changes_nothing(project):
    whole, single = (project.embed(project.with_data(val_batch_size=views)) for views in (60, 1))
    assert whole.ids_N.tolist() == single.ids_N.tolist() and whole.labels_N.tolist() == single.labels_N.tolist()
    np.testing.assert_allclose(whole.embeddings_NVD, single.embeddings_NVD, rtol=0, atol=1e-5)


def test_the_report_follows_from_the_embeddings(project):
    embedded = project.embed()
    report = project.evaluate(splits={"half.csv": np.array([0, 1, 2])})
    expected = figures(
        embedded.embeddings_NVD, embedded.labels_N, project.classes_CD.numpy(), project.names, views=Views(2, 3),
        class_splits={"half.csv": np.array([0, 1, 2])},
    )  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    assert embedded.embeddings_NVD.shape[:2] == (NUM_VIDEOS, 6)


def test_the_first_clip_of_several_is_the_clip_of_one(project):
    """Pixels included: the view that stands for a single one is the same embedding as in a pass of its own."""
    several = project.embed(project.with_data(test_crops=1, test_clips=3)).embeddings_NVD
    one = project.embed(project.with_data(test_crops=1, test_clips=1)).embeddings_NVD
    np.testing.assert_allclose(several[:, :1], one, rtol=1e-4, atol=1e-5)


def test_the_hash_of_the_weights_is_that_of_every_file_they_are_kept_in(project, tmp_path):
    expected = weights_fingerprint(project.model.state_dict())
    for save in (save_train, save_train_nce):
        save(tmp_path / "model.pt", project.model, "module.")
        loaded = load_text4vis(tmp_path / "model.pt", project.config.network, T)
        assert weights_fingerprint(loaded.state_dict()) == expected
    export_model(tmp_path / "export", project.model, project.config.network, {}, project.names, project.classes_CD, {})
    state = load_export(tmp_path / "export").model.state_dict()
    assert weights_fingerprint(state) == expected
    state["logit_scale"] = state["logit_scale"] + 1e-6
    assert weights_fingerprint(state) != expected


class TestFeatures:
    def test_are_read_instead_of_embedding_again(self, project, tmp_path, monkeypatch):
        path = tmp_path / "deep" / "features.safetensors"
        first = project.evaluate(features=path)
        monkeypatch.setattr(evaluation, "embed_videos", lambda *_, **__: pytest.fail("embedded again"))
        second = project.evaluate(features=path)
        assert first | {"date": ""} == second | {"date": ""} == project.evaluate(features=path) | {"date": ""}

    def test_that_cannot_be_kept_are_refused_before_any_video(self, project, tmp_path, monkeypatch):
        monkeypatch.setattr(evaluation, "embed_videos", lambda *_, **__: pytest.fail("embedded"))
        (tmp_path / "file").touch()
        with pytest.raises(
            OSError, match=r"--features: the folder .*file cannot be written \(.*\); name one that you may write"
        ):
            project.evaluate(features=tmp_path / "file" / "features.safetensors")

    @pytest.mark.parametrize("changes", [{"test_crops": 1}, {"test_clips": 3}, {"dense": True}, {"scale_size": 40}])
    def test_of_other_views_are_made_again_with_a_notice(self, project, tmp_path, caplog, changes):
        path = tmp_path / "features.safetensors"
        project.evaluate(features=path)
        config = project.with_data(**changes)
        stale = project.evaluate(config, features=path)
        assert f"{path}: made with other views; embedding the videos again" in caplog.text
        assert stale | {"date": ""} == project.evaluate(config) | {"date": ""}
        caplog.clear()
        project.evaluate(config, features=path)
        assert not caplog.text

    def test_of_other_pixels_are_made_again_in_both_directions(self, project, tmp_path, caplog):
        path = tmp_path / "features.safetensors"
        plain = project.config
        for other, what in (("interpolation", "frames"), ("synthetic", "synthetic")):
            changed = project.with_data(**{other: {"interpolation": "bilinear", "synthetic": True}[other]})
            project.evaluate(changed, features=path)
            caplog.clear()
            again = project.evaluate(plain, features=path)
            assert f"{path}: made with other {what}; embedding the videos again" in caplog.text
            assert again | {"date": ""} == project.evaluate(plain) | {"date": ""}

    def test_of_other_weights_data_or_architecture_are_made_again(self, project, tmp_path, caplog):
        path = tmp_path / "features.safetensors"
        project.evaluate(features=path)
        other = build_model(project.config.network, T)
        project.evaluate(model=other, features=path)
        assert "made with other weights;" in caplog.text
        shifted = build_model(replace(project.config.network, tm="tokenshift"), T)
        shifted.load_state_dict(other.state_dict())
        project.evaluate(model=shifted, features=path)
        assert "made with other architecture;" in caplog.text
        twice = project.with_data(val=(*project.config.data.val, *project.config.data.val))
        report = project.evaluate(twice, model=shifted, features=path)
        assert (report["videos"], report["missing"]) == (2 * NUM_VIDEOS, 2)
        assert "made with other data_fingerprint;" in caplog.text

    @pytest.mark.parametrize("content", [b"", b"a report of mine", b"\x10" + b"\x00" * 40])
    def test_never_replace_a_file_that_is_something_else(self, project, tmp_path, content):
        path = tmp_path / "report.json"
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"--features: .*report\.json .*name another file"):
            project.evaluate(features=path)
        assert path.read_bytes() == content
        torch_weights = tmp_path / "model.safetensors"
        write_tensors(torch_weights, {"weight": torch.zeros(3)})
        with pytest.raises(ConfigError, match="holds something else"):
            project.evaluate(features=torch_weights)


def test_splits_name_classes_of_the_data(project, tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    first.write_text("id,name\n0,class 5\n1,class 2\n")
    second.write_text("id,name\n0,class 0\n1,class 1\n2,class 2\n")
    config = project.with_data(class_splits=(str(first), str(second)))
    labels = np.arange(NUM_CLASSES)
    splits = class_splits(config, project.names, labels)
    assert [ids.tolist() for ids in splits.values()] == [[2, 5], [0, 1, 2]]
    assert list(splits) == ["first.csv", "second.csv"], "file names, unless two of them are alike"
    second.write_text("id,name\n0,class 0\n1,clas 1\n")
    with pytest.raises(ConfigError, match=r"second\.csv: 'clas 1' is no class of data\.val; did you mean 'class 1'\?"):
        class_splits(config, project.names, labels)
    with pytest.raises(ConfigError, match=r"first\.csv: data\.val holds no video of these 2 classes"):
        class_splits(config, project.names, np.array([0, 1, 3]))


def test_rows_that_were_trained_are_reported_as_such(project):
    model = build_model(project.config.network, T)
    model.set_classifier(project.classes_CD, project.names)
    with build_loader(project.config, "val") as loader:
        card = protocol_card(model, project.classes_CD, project.names, loader, "")
    assert card["classifier"] == "trained" and project.config.network.classifier == "text"


DIFFERENCES = {
    "nothing that counts": ({}, {"seed": 9, "solver": {"lr": 1}, "data": {"test_clips": 3}}, []),
    "frames": ({}, {"data": {"num_segments": 2, "dense": True}}, ["data.num_segments", "data.dense"]),
    "head": ({}, {"network": {"sim_header": "LSTM"}}, ["network.sim_header"]),
    "prompt": ({}, {"network": {"template": "{}"}}, ["network.template"]),
    "kind": ({"classifier": "random"}, {"seed": 9, "network": {"template": "{}"}}, ["network.classifier"]),
    "seed": ({"classifier": "random"}, {"seed": 9, "network": {"classifier": "random"}}, ["seed"]),
    "no seed": ({"classifier": "file", "classifier_file": "a"},
                {"seed": 9, "network": {"classifier": "file", "classifier_file": "a"}}, []),
    "own rows": ({"classifier": "random", "classifier_trainable": True}, {"seed": 9}, []),
}  # fmt: skip


@pytest.mark.parametrize("case", DIFFERENCES)
def test_settings_are_compared_with_those_of_the_training(case):
    network, given, expected = DIFFERENCES[case]
    trained, given = config_from_dict({"network": network}, "test"), config_from_dict(given, "test")
    assert list(differences(trained, given, ())) == expected
    of_export = [key for key in expected if key != "network.sim_header"]  # an export brings its own head
    assert list(differences(trained, given, keys_of(Role.MODEL))) == of_export


@pytest.mark.parametrize("changes", [{"tm": "tokenshift"}, {"joint_st": True, "sim_header": "None"},
                                     {"sim_header": "Transf_cls"}])  # fmt: skip
def test_frames_that_a_model_cannot_take_are_refused(tmp_path, changes):
    model = build_model(tiny_network(tmp_path, **changes), T, image_size=32)
    model.check_frames(DataConfig(num_segments=T, input_size=32))
    with pytest.raises(ConfigError, match=f"data.num_segments: 6, but the model takes {T} frames"):
        model.check_frames(DataConfig(num_segments=6, input_size=32))
    with pytest.raises(ConfigError, match=r"data.input_size: 224, .*--set data.input_size=32"):
        model.check_frames(DataConfig(num_segments=T))
    model = build_model(tiny_network(tmp_path), T)
    model.check_frames(DataConfig(num_segments=77, input_size=32))
    with pytest.raises(ConfigError, match=f"data.num_segments: 78, but .* positions for 77 .*num_segments={T}"):
        model.check_frames(DataConfig(num_segments=78, input_size=32))


@pytest.mark.slow
def test_an_evaluation_warns_of_another_classifier_than_the_training_had(project, tmp_path):
    """For an export that was trained with random classes of another seed; silent once the settings are those."""
    (tmp_path / "config.yaml").write_text(project.config.to_yaml())
    trained = replace(project.config, seed=77, network=replace(project.config.network, classifier="random"))
    export = tmp_path / "export"
    export_model(
        export, project.model, trained.network, trained.to_dict(), project.names, project.classes_CD, {}
    )  # fmt: skip

    def output(*settings):
        return run(EVALUATE, "--config", tmp_path / "config.yaml", "--model", export, *settings)

    assert "was trained with other settings than are given here (network.classifier: 'random' -> 'text')" in output()
    random = "--set=network.classifier=random"
    assert f"(seed: 77 -> {project.config.seed})" in output(random)
    assert "was trained with" not in output(random, "--set=seed=77")


@pytest.mark.slow
def test_counts_are_equal_at_every_world_size(project, tmp_path):
    """Real processes: shares of 11 / 6 + 5 / 4 + 4 + 3 videos, and of a data set with fewer videos than ranks."""
    (tmp_path / "split.csv").write_text("id,name\n0,class 0\n1,class 1\n")
    (tmp_path / "config.yaml").write_text(project.with_data(class_splits=(str(tmp_path / "split.csv"),)).to_yaml())
    save_train_nce(tmp_path / "model.pt", project.model, "module.", seed=0)
    two = make_frame_folders(tmp_path / "two", [5, 7], num_classes=NUM_CLASSES)
    build_shards(
        parse_annotations(two.annotations), root=two.root, labels=parse_labels(two.labels), output=tmp_path / "shards"
    )

    def report(ranks, *settings):
        path = tmp_path / f"report{ranks}.json"
        arguments = ["--config", tmp_path / "config.yaml", "--model", tmp_path / "model.pt", "--report", path]
        run(EVALUATE, *arguments, *settings, ranks=ranks)
        return json.loads(path.read_text()) | {"date": ""}

    alone = report(1, "--features", tmp_path / "features.safetensors")
    assert alone["videos"] == NUM_VIDEOS and sum(row["videos"] for row in alone["per_class"]) == NUM_VIDEOS
    assert alone["class_splits"]["splits"][0]["videos"] == 4
    assert alone == report(2) == report(3, "--features", tmp_path / "features.safetensors")
    few = report(3, f"--set=data.val={tmp_path / 'shards'}")
    assert few["videos"] == 2
    for found, config in ((alone, project.config), (few, project.with_data(val=(str(tmp_path / "shards"),)))):
        here = project.evaluate(config)
        assert {key: found[key] for key in here.keys() - {"date", "class_splits"}} == {
            key: here[key] for key in here.keys() - {"date", "class_splits"}
        }


@pytest.fixture(scope="module")
def reports(project):
    """Of a model, of one with other weights, of one with another template."""
    a = project.evaluate()
    b = project.evaluate(model=build_model(project.config.network, T))
    drawn = replace(project.config, network=replace(project.config.network, template="a drawing of {}"))
    return a, b, project.evaluate(drawn)


def test_reports_of_one_protocol_are_compared(reports):
    a, b, _ = reports
    found = comparison.compare(a, b)
    assert found.is_comparable and {setting.key for setting in found.settings} == {"weights"}
    by_name = {figure.name: figure for figure in found.figures}
    assert (by_name["top1"].a, by_name["top1"].b) == (a["top1"], b["top1"])
    assert by_name["top1_mean, half_classes"].b == b["half_classes"]["top1_mean"]
    assert by_name["top1, 1 x 1 views"].a == a["by_views"][0]["top1"]
    assert all(figure.difference == figure.b - figure.a for figure in found.figures)
    gains = [change.difference for change in found.classes]
    assert gains == sorted(gains, reverse=True)
    assert sum(change.videos * change.difference for change in found.classes) / NUM_VIDEOS == pytest.approx(
        by_name["top1"].difference
    )
    wrong = [report["videos"] - report["top1_correct"] for report in (a, b)]
    assert [sum(pair.a for pair in found.confused), sum(pair.b for pair in found.confused)] == wrong
    assert all(0 < max(pair.a, pair.b) <= pair.videos and pair.name != pair.taken_for for pair in found.confused)
    assert (found.significance.only_b - found.significance.only_a) == b["top1_correct"] - a["top1_correct"]


def test_a_class_that_is_worded_otherwise_is_compared(reports):
    a, b, _ = reports
    rows = [dict(row) for row in b["per_class"]]
    old = rows[1]["class"]
    rows[1]["class"] = "in other words"
    expected = comparison.compare(a, b)
    found = comparison.compare(a, {**b, "per_class": rows})

    def reworded(name):
        return f"{old} -> in other words" if name == old else name

    assert [one.name for one in found.classes] == [reworded(one.name) for one in expected.classes]
    assert [one.difference for one in found.classes] == [one.difference for one in expected.classes]
    assert [(pair.name, pair.taken_for, pair.a, pair.b) for pair in found.confused] == [
        (reworded(pair.name), reworded(pair.taken_for), pair.a, pair.b) for pair in expected.confused
    ]
    other_videos = comparison.compare(a, {**b, "per_class": rows, "data_fingerprint": "f"})
    assert not [one for one in other_videos.classes if "in other words" in one.name or one.name == old]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"data_fingerprint": "f"}, "data_fingerprint"),
        ({"classes_fingerprint": "f"}, "classes_fingerprint"),
        ({"template": "{}"}, "template"),
        ({"classifier": "random"}, "classifier"),
        ({"views": {"clips": 4}}, "views.clips"),
        ({"views": {"crops": 1}}, "views.crops"),
        ({"views": {"sampling": "dense"}}, "views.sampling"),
    ],
)
def test_figures_of_different_protocols_are_not_comparable(reports, change, key):
    a = reports[0]
    changed = {name: a[name] | value if isinstance(value, dict) else value for name, value in change.items()}
    found = comparison.compare(a, a | changed)
    assert not found.is_comparable and [setting.key for setting in found.protocol] == [key]
    assert comparison.compare(a, a | {"weights": "w", "precision": "bfloat16"}).is_comparable
    if key == "data_fingerprint":
        assert found.significance is None


def test_a_template_that_no_classifier_reads_does_not_matter(reports):
    a, b = (reports[0] | {"classifier": "random", "template": template} for template in ("{}", "a {}."))
    assert comparison.compare(a, b).is_comparable
    assert not comparison.compare(a | {"classifier": "sentence"}, b | {"classifier": "sentence"}).is_comparable


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (0, 1), (3, 9), (9, 3), (7, 7), (40, 61), (900, 700)])
def test_mcnemar_and_wilson_against_scipy(only_a, only_b):
    videos = only_a + only_b + 5
    if only_a + only_b:
        assert comparison.mcnemar(only_a, only_b) == pytest.approx(binomtest(only_a, only_a + only_b).pvalue)
    interval = binomtest(only_a, videos).proportion_ci(0.95, method="wilson")
    found = comparison.wilson_interval(only_a, videos)
    assert found == pytest.approx((100 * interval.low, 100 * interval.high), abs=1e-4)


def test_mean_and_deviation_over_reports(reports):
    means = comparison.summarise(reports)
    tops = [report["top1"] for report in reports]
    assert means["top1"] == pytest.approx((np.mean(tops), np.std(tops)))
    without = {key: value for key, value in reports[0].items() if key != "half_classes"}
    assert "top1_mean, half_classes" not in comparison.summarise([*reports, without])


@pytest.mark.slow
def test_the_command_compares_and_its_exit_code_tells(reports, tmp_path):
    paths = [tmp_path / f"{letter}.json" for letter in "abc"]
    for path, report in zip(paths, reports, strict=True):
        write_report(path, report)

    def command(*arguments):
        done = program(COMPARE, *arguments)
        assert "Traceback" not in done.stderr
        return done.returncode, done.stdout + done.stderr

    code, output = command(paths[0], paths[1], "--json", tmp_path / "out.json")
    assert code == 0 and "NOT COMPARABLE" not in output and "McNemar" in output and "taken for" in output
    assert json.loads((tmp_path / "out.json").read_text())["comparable"] is True
    code, output = command(paths[0], paths[2])
    assert code == 3 and "NOT COMPARABLE" in output and "a drawing of {}" in output
    code, output = command("--mean", *paths, "--json", tmp_path / "mean.json")
    assert code == 0 and json.loads((tmp_path / "mean.json").read_text())["top1"].keys() == {"mean", "std"}
    (tmp_path / "other.json").write_text("{}")
    assert command(paths[0], tmp_path / "other.json") == (
        1, f"compare_reports: error: {tmp_path}/other.json: not a report of an evaluation; text4vis/evaluate.py "
        "--report writes one\n",
    )  # fmt: skip
    assert command(paths[0])[0] == 2
