"""The documentation is true: its Python runs, and the options and files that it names exist."""

import re

import pytest
from frame_folders import make_frame_folders
from launch import ROOT
from pages import code_blocks, commands

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_shard_format_page_reads_real_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = make_frame_folders(tmp_path, [9] * 13)
    names_of_classes = parse_labels(folders.labels)
    build_shards(
        parse_annotations(folders.annotations), root=folders.root, labels=names_of_classes, output="shards/train"
    )
    stored = {name: [path.read_bytes() for path in sorted((folders.root / name).iterdir())] for name in folders.names}
    first, second = code_blocks("docs/shard-format.md", "python")
    names: dict = {}
    exec(first, names)
    assert names["first_frame"] == stored[names["facts"]["name"]][0] and names["facts"]["num_frames"] == 9
    exec(second, names)
    start = int(names["video"]["name_start"])
    name = bytes(names["tables"]["names"][start : start + int(names["video"]["name_size"])]).decode()
    assert names["jpeg"] == stored[name][7]


def test_the_samples_of_the_data_page_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folders = make_frame_folders(tmp_path, [9] * 5)
    labels = parse_labels(folders.labels)
    build_shards(parse_annotations(folders.annotations), root=folders.root, labels=labels, output="shards/train")
    (example,) = code_blocks("docs/data-sets.md", "python")
    names: dict = {}
    exec(example, names)
    assert capsys.readouterr().out.count("000000.tar") == 5
    decoded = list(names["loader"])
    assert len(decoded) == 5 and all(sample["json"]["num_frames"] == 9 for sample in decoded)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_are_shorter_than_120_characters(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) >= 120] == []


def test_the_readme_is_short_and_its_map_leads_to_files():
    """A room and the modules to begin with, in each row of the table of questions."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    rows = re.findall(r"^\| [^|]*\?[^|]*\| `([^`]+)/` \| (.*) \|$", text, re.MULTILINE)
    assert len(rows) > 10
    missing = [
        f"{room}/{module}"
        for room, modules in rows
        for module in re.findall(r"`([^`]+)`", modules)
        if not (ROOT / room / module).is_file()
    ]
    assert not missing
    rooms = {f"text4vis/{path.parent.name}" for path in ROOT.glob("text4vis/*/__init__.py")} | {"shards"}
    assert rooms - {room for room, _ in rows} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_their_options_exist(page):
    """Every `tools/x.py` and `text4vis/x.py` in a code block or span is there and takes the options that follow it."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for code in lines + spans:
        for program, rest in commands(code):
            assert (ROOT / program).is_file(), code
            source = (ROOT / program).read_text(encoding="utf-8")
            if "argparse" in source:
                options = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", rest.partition(" # ")[0]))
                unknown = {option for option in options if f'"{option}"' not in source}
                assert not unknown, f"{page.name}: {program} does not take {unknown}"


def test_the_tests_that_reliability_names_exist():
    """`room/test_file::test_name`, and further names of the same file after it."""
    named, file = set(), ""
    for word in re.findall(r"`([^`]+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")):
        if word.startswith("tests/"):
            assert (ROOT / word).is_file(), word
        elif re.match(r"(\w+/)?test_\w+", word):
            file = word.partition("::")[0] if "::" in word else file
            named.add((file, word.rpartition("::")[2]))
    assert len(named) > 50
    missing = [
        (file, name)
        for file, name in sorted(named)
        if f"def {name}(" not in (ROOT / "tests" / f"{file}.py").read_text()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_targets_of_make_exist(page):
    named = set(re.findall(r"(?:^|`)make ([a-z.][\w./]*)", page.read_text(encoding="utf-8"), re.MULTILINE))
    targets = set(re.findall(r"^([\w./]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets
