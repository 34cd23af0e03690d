"""Tables: whole in logs, within the screen on terminals, and text is never markup."""

import io
import sys

from text4vis.common.console import console, table

NAME = " ".join(["pulling [bold]somebody[/bold]"] * 10)


def draw() -> None:
    rows = table(("class", "taken for"), ("%",))
    rows.add_row(NAME, "b", "12.5")
    console().print(rows)


def test_a_log_has_every_row_on_one_line_as_markdown(capsys):
    draw()
    assert f"| {NAME} | b         | 12.5 |" in map(str.rstrip, capsys.readouterr().out.splitlines())


def test_a_terminal_has_every_letter_within_its_width(monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", "80")
    draw()
    lines = screen.getvalue().splitlines()
    assert max(len(line) for line in lines if "\x1b" not in line) <= 80
    cells = "".join(line.split("│")[1].strip() + " " for line in lines if "│" in line and "class" not in line)
    assert "".join(cells.split()) == "".join(NAME.split())


def test_without_titles_there_is_no_head(capsys):
    rows = table(("", ""))
    rows.add_row("a", "b")
    console().print(rows)
    assert capsys.readouterr().out.split() == ["|", "a", "|", "b", "|"]


def test_control_characters_are_shown_as_escapes(capsys):
    rows = table(("\x1b[2Ja",), ("b\u202e",))
    rows.add_row("\x1b]0;title\x07\n", "\udcff")
    console().print(rows)
    head, _, row = capsys.readouterr().out.strip().splitlines()
    assert head.split() == ["|", "\\x1b[2Ja", "|", "b\\u202e", "|"]
    assert row.split() == ["|", "\\x1b]0;title\\x07\\n", "|", "\\udcff", "|"]
