"""The commands and the code that the documentation shows."""

import re

from launch import ROOT


def code_blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(code: str) -> list[tuple[str, str]]:
    """(program of this project, what follows it) for each that a line of code starts."""
    return re.findall(r"(?<![\w/])((?:tools|text4vis)/\w+\.py)\b([^&|;]*)", code)
