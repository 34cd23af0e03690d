"""Writes docs/config.md from the declared configuration."""

from __future__ import annotations

from pathlib import Path

from text4vis.config_page import config_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

if __name__ == "__main__":
    PAGE.write_text(config_page(), encoding="utf-8")
    print(PAGE)
