"""The recipes that ship: each is complete, says how it is run, and runs, with a tiny tower in place of its own."""

import csv
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from frame_folders import make_frame_folders
from launch import ROOT, finish, start
from tiny import OPENAI_VIT, openai_state, random_clip

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards
from text4vis.config.keys import schema
from text4vis.config.loading import load_config
from text4vis.config.retired import FORMER, RETIRED
from text4vis.config.schema import ConfigError
from text4vis.data.traps import sided_classes
from text4vis.evaluation.embedding import class_splits

RECIPES = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "configs").rglob("*.yaml"))]
# Those of published data sets lie in folders. Their vision towers are swapped for a tiny one, as is that of own.yaml;
# the others have a small tower and run in the tests of the demo.
PUBLISHED = [recipe for recipe in RECIPES if recipe.count("/") > 1]
TRIED = [*PUBLISHED, "configs/own.yaml"]
# With the tiny tower they differ from others in names alone: those of HMDB-51 from those of UCF-101, these from a
# smaller or larger tower's, a split from another.
TWINS = {
    "anet-finetune-336", "charades-finetune-336", "k400-lora-vitl14-f8", "k400-vitb16-f16", "k400-vitb32-f16",
    "k400-vitl14-336-f16", "k600-zero-shot-split2", "k600-zero-shot-split3", "k700-vitl14-f8", "ssv2-vitl14-f16",
    "ucf101-finetune-336",
}  # fmt: skip
CLASSES = {
    "kinetics_400": 400,
    "kinetics_600": 600,
    "kinetics_600_split1": 160,
    "kinetics_600_split2": 160,
    "kinetics_600_split3": 160,
    "ucf101": 101,
    "hmdb51": 51,
    "activitynet200": 200,
}
# Data sets whose class names the shards hold, as prepare_dataset took them from the official files.
NAMED_BY_SHARDS = ("charades", "k700", "something-v2")
NUM_CLASSES = 174  # of the shards: the flip of Something-Something swaps labels up to 167
NUM_VIDEOS = 4  # two steps of two


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    """The commands of recipes run here; their data is named by a variable."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("DATA", "/data")


def header(recipe: str) -> str:
    lines = Path(recipe).read_text().splitlines()
    return "\n".join(line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def test_every_recipe_of_the_original_ships():
    names = {Path(recipe).stem for recipe in PUBLISHED}
    sizes = {"vitb32-f8", "vitb32-f16", "vitb16-f8", "vitb16-f16", "vitl14-f8", "vitl14-336-f8", "vitl14-336-f32"}
    assert {f"k400-{name}" for name in (*sizes, "rn50-f8", "few-shot")} <= names
    assert {f"k600-zero-shot-split{split}" for split in (1, 2, 3)} <= names
    kinds = ("finetune", "finetune-336", "few-shot", "zero-shot")
    assert {f"{data}-{kind}" for data in ("ucf101", "hmdb51", "anet") for kind in kinds} <= names


def test_the_recipes_of_something_swap_the_labels_of_left_and_right_and_no_others():
    names = [f"showing something {number}" for number in range(NUM_CLASSES)]
    for verb, first in (("pulling something", 86), ("pushing something", 93)):
        names[first : first + 2] = [f"{verb} from left to right", f"{verb} from right to left"]
    names[166:168] = [f"turning the camera {side} while filming something" for side in ("left", "right")]
    for size in ("vitb16", "vitl14"):
        config = load_config(f"configs/ssv2/ssv2-{size}-f16.yaml")
        assert config.data.flip and not list(sided_classes(config, names))
        mended = load_config(f"configs/ssv2/ssv2-{size}-f16.yaml", ["data.flip_swaps=[]"])
        (trap,) = sided_classes(mended, names)
        assert "[[86, 87], [93, 94], [166, 167]]" in trap.fix


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipe_is_complete(recipe):
    config = load_config(recipe)
    assert config.data.dataset and config.data.val
    assert bool(config.data.label_list) == (config.data.dataset not in NAMED_BY_SHARDS)
    assert config.data.train or "zero-shot" in recipe
    given = yaml.safe_load(Path(recipe).read_text())
    assert not re.search(r"(^|\s)/|~", json.dumps(given)), "an absolute path"
    assert config.network.arch and config.scale_size == (256 if config.data.input_size == 224 else 336)
    if "f16" in recipe or "finetune" in recipe:
        assert config.data.num_segments == 16
    if config.pretrain:
        start = next(other for other in PUBLISHED if Path(other).stem == Path(config.pretrain).name)
        assert Path(config.pretrain).parent == ROOT / "runs", "where the command of the recipe before writes"
        before = load_config(start)
        assert (before.network, before.data.num_segments) == (config.network, config.data.num_segments)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_its_command_and_what_to_expect(recipe):
    text = header(recipe)
    assert f"--config {recipe}" in text
    script = "evaluate" if "zero-shot" in recipe else "train"
    assert f"deepspeed text4vis/{script}.py " in text or "deepspeed --num_gpus 2 text4vis/train.py" in text
    if recipe in PUBLISHED:
        assert "Published: " in text or "No figure" in text


def test_no_recipe_repeats_another():
    seen: dict[str, str] = {}
    for recipe in PUBLISHED:
        resolved = load_config(recipe).to_yaml()
        assert resolved not in seen, f"{recipe} and {seen.get(resolved)}"
        seen[resolved] = recipe
    lines = [
        line for recipe in PUBLISHED for line in Path(recipe).read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert len(lines) < 10 * len(PUBLISHED)


@pytest.mark.parametrize(("name", "count"), CLASSES.items())
def test_class_lists_hold_plain_names_no_two_alike(name, count):
    path = ROOT / "configs" / "classes" / f"{name}.csv"
    names = parse_labels(path)
    assert len(names) == count == len({name.casefold() for name in names})
    for name in names:
        assert name == " ".join(name.split()) and re.fullmatch(r"[A-Za-z0-9 ()'-]+", name), name
        assert not re.search(r"[a-z][A-Z]", name), name
    with path.open(newline="") as file:
        assert [row[0] for row in list(csv.reader(file))[1:]] == [str(number) for number in range(count)]


def test_every_class_list_is_used_and_the_splits_of_kinetics_600_are_classes_that_kinetics_400_lacks():
    used = {path for recipe in PUBLISHED for path in _lists(load_config(recipe))}
    assert used == {str(ROOT / f"configs/classes/{name}.csv") for name in CLASSES}
    known, all_600 = (set(parse_labels(f"configs/classes/kinetics_{count}.csv")) for count in (400, 600))
    config = load_config("configs/k600/k600-zero-shot.yaml")
    splits = class_splits(config, parse_labels(config.data.label_list), np.arange(600))
    assert [len(ids) for ids in splits.values()] == [160, 160, 160]
    for split in (1, 2, 3):
        names = set(parse_labels(f"configs/classes/kinetics_600_split{split}.csv"))
        assert names <= all_600 and not names & known


def _lists(config) -> list[str]:
    return [*filter(None, [config.data.label_list]), *config.data.class_splits]


def test_a_variable_that_is_not_set_is_named_with_the_fix(monkeypatch):
    monkeypatch.delenv("DATA")
    recipe = "configs/k400/k400-vitb16-f8.yaml"
    message = r"data\.train: the environment variable DATA in '\$DATA/k400/train' is not set .*f8\.yaml.*export DATA="
    with pytest.raises(ConfigError, match=message):
        load_config(recipe)
    config = load_config(recipe, ["data.train=a", "data.val=[b, c]", "network.template=it costs $5 {}"])
    assert config.data.val == (str(ROOT / "b"), str(ROOT / "c"))
    with pytest.raises(ConfigError, match=r"data\.val: .*variable X .*--set"):
        load_config(recipe, ["data.train=a", "data.val=[b, '${X}']"])


@pytest.fixture(scope="module")
def results(request, tmp_path_factory) -> dict[str, dict]:
    """What the chosen recipes counted, run one after another in one process of the real trainer."""
    base = tmp_path_factory.mktemp("recipes")
    folders = make_frame_folders(base, [5, 9, 16, 40], num_classes=2)
    build_shards(
        parse_annotations(folders.annotations),
        root=folders.root,
        labels=[f"class {number}" for number in range(NUM_CLASSES)],
        output=base / "shards",
    )
    os.environ["DATA"] = "/data"
    chosen = {item.callspec.params["recipe"] for item in request.session.items if "trains_two_steps" in item.name}
    recipes = sorted(chosen, key=lambda recipe: ("finetune" in recipe, recipe))  # what they start from comes first
    model = base / "clip.pt"
    text = OPENAI_VIT["text_cfg"] | {"context_length": 32}  # room for the longest name
    torch.save(openai_state(random_clip(OPENAI_VIT | {"text_cfg": text})), model)
    ((code, output),) = finish(
        start("tests/support/run_recipes.py", base, base / "shards", model, *recipes), timeout=500
    )
    assert code == 0, output
    return json.loads((base / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=[pytest.mark.long] * (Path(recipe).stem in TWINS or "hmdb51" in recipe))
        for recipe in TRIED
    ],
)
def test_a_recipe_trains_two_steps_and_evaluates(results, recipe):
    assert "error" not in results[recipe], results[recipe]["error"]
    labels = load_config(recipe).data.label_list
    classes = len(parse_labels(labels)) if labels else NUM_CLASSES
    expected = {"step": 2, "videos": NUM_VIDEOS, "classes": classes}
    assert results[recipe].items() >= expected.items()


def test_the_page_for_those_who_come_from_the_original_names_real_keys_and_files():
    page = (ROOT / "docs" / "coming-from-text4vis.md").read_text()
    keys = {key.name for key in schema()}
    sections = "|".join(sorted({key.split(".")[0] for key in keys if "." in key}))
    named = set(re.findall(rf"`((?:{sections})\.[A-Za-z_.]+[A-Za-z_])", page)) | {"resume", "pretrain", "seed"}
    assert named <= keys | set(RETIRED), named - keys - set(RETIRED)
    assert set(RETIRED) - set(FORMER) <= named, "retired keys that the page does not explain"
    for path in re.findall(r"`((?:configs|docs|tools|text4vis)/[\w./-]+)`?", page):
        assert (ROOT / path).exists(), path
