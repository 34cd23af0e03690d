"""Writes docs/config.md from the keys that text4vis/config/schema.py declares.

Examples:
    python tools/document_config.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from text4vis.config.page import config_page

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(config_page(), encoding="utf-8")
    print(PAGE)
