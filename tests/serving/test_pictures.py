"""Pictures of predictions: names that are made to hurt are drawn as text, and cut."""

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from text4vis.report.pictures import draw_confusion
from text4vis.serving.answers import Prediction, Timeline
from text4vis.serving.pictures import save_moments, save_prediction, save_timeline
from text4vis.serving.search import Moment

FRAMES = np.zeros((4, 8, 8, 3), np.uint8)
NAMES = {
    "$\\frac{": "$\\frac{",
    "_hidden": "_hidden",
    "<b>{}%s\\": "<b>{}%s\\",
    "\x1b[31mred\r\n\0": " [31mred   ",
    "\u202egpj.exe\udcff": " gpj.exe ",
    "n" * 100_000: "nnnnnnnnnnnnnnnnnnnnnnnnnnn\u2026",
    "": "",
}


def draw(kind: str, name: str, stream: io.BytesIO) -> None:
    if kind == "prediction":
        save_prediction(Prediction([(name, 0.5), ("b", 0.2)], np.arange(4), FRAMES), name, stream)
    elif kind == "timeline":
        seconds, scores = np.array([[0.0, 1.0], [1.0, 2.0]]), np.full((2, 2), 0.5)
        save_timeline(Timeline([name, "b"], seconds, scores, list(FRAMES[:2])), name, stream)
    elif kind == "moments":
        save_moments([Moment(name or ".", 0.0, 1.0, 0.5)], [FRAMES], name, stream)
    else:
        Image.fromarray(draw_confusion(np.array([[1, 2], [3, 4]]), [name, "b"])).save(stream, "PNG")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["prediction", "timeline", "moments", "confusion"])
def test_names_made_to_hurt_are_drawn_as_text_and_cut(kind, monkeypatch):
    drawn = []

    def keep(text: Text, *given: object, **options: object) -> None:
        drawn.append(text)
        original(text, *given, **options)

    original = Text.draw
    monkeypatch.setattr(Text, "draw", keep)
    for name, shown in NAMES.items():
        drawn.clear()
        draw(kind, name, stream := io.BytesIO())
        assert Image.open(stream).size < (2000, 2000)
        texts = [text.get_text() for text in drawn]
        assert any(text.endswith(shown[-20:]) for text in texts)
        assert all(text.isprintable() and len(text) <= 120 for text in texts)
        assert not [text for text in drawn if "$" in text.get_text() and text.get_parse_math()]
