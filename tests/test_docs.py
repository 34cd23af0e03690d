"""What the documentation says runs: its Python, and the options and files that it names."""

import re
from pathlib import Path

import pytest
from conftest import make_frame_folders

from shards.annotations import parse_annotations, parse_labels
from shards.writer import build_shards

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_their_options_exist(page):
    """Every `tools/x.py` and `text4vis/x.py` in a code block or span is there and takes the options that follow it."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for block in re.findall(r"^```.*?\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for code in lines + spans:
        for program, rest in re.findall(r"\b((?:tools|text4vis)/\w+\.py)\b([^&|;]*)", code):
            assert (ROOT / program).is_file(), code
            source = (ROOT / program).read_text(encoding="utf-8")
            if "argparse" in source:
                options = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", rest.partition(" # ")[0]))
                unknown = {option for option in options if f'"{option}"' not in source}
                assert not unknown, f"{page.name}: {program} does not take {unknown}"
