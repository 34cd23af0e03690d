"""The page to try a model on: what a browser shows is what the model answers, and nothing is kept or fetched."""

from __future__ import annotations

import asyncio
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from aiohttp import FormData
from aiohttp.test_utils import TestClient, TestServer
from launch import free_port, kill, start_rank
from tiny import write_export
from videos import write_video

import text4vis
from shards.text import printable
from text4vis.evaluation.calibration import Calibration
from text4vis.evaluation.multi_label import Decision
from text4vis.serving.answers import Prediction, Timeline
from text4vis.serving.indexing import index_videos
from text4vis.serving.page import Page, Upload, size_in_words, typed_labels
from text4vis.serving.page_server import _application, serve_page
from text4vis.serving.pictures import clock
from text4vis.serving.predictor import PredictionError
from text4vis.serving.search import Moment

NAMES = ["archery", "surfing", "<img src=x>\x1b"]
HOSTILE = '<img src=x onerror=alert(1)>{{ 7 * 7 }}"\u202e.mp4'
LIMIT = 2**17


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Path:
    return write_export(tmp_path_factory.mktemp("export"), NAMES)


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """Six seconds."""
    path = tmp_path_factory.mktemp("video") / HOSTILE
    write_video(path, 40, 60)
    return path


@pytest.fixture(scope="module")
def index(export, video, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    index_videos(folder / "index", [str(video)], export, window=2)
    return folder / "index"


@pytest.fixture(scope="module")
def address(export, index) -> Iterator[str]:
    """The real program, with a small limit."""
    port = free_port()
    options = ["--model", export, "--index", index, "--port", port, "--upload-limit", LIMIT / 2**20]
    started = start_rank("tools/app.py", *options)
    try:
        while started.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/"
        started.send_signal(signal.SIGINT)
        output, _ = started.communicate(60)
        # torch 2.9 warns of TF32, in two lines.
        said = [line for line in output.splitlines() if "TF32" not in line and not line.startswith("  ")]
        assert (started.returncode, said) == (0, [f"open http://127.0.0.1:{port}/ (Ctrl-C ends it)"])
    finally:
        kill([started])


def ask(browser, kind: str, video: Path | None = None, **fields: str) -> None:
    """Fills the form in, presses a button and waits for the answer."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    if video is not None:
        browser.find_element(By.NAME, "video").send_keys(str(video))
    for name, value in fields.items():
        field = browser.find_element(By.NAME, name)
        field.clear()
        field.send_keys(value)
    browser.find_element(By.CSS_SELECTOR, f"button[value={kind}]").click()
    WebDriverWait(browser, 60).until(
        lambda _: browser.execute_script(
            "return !document.querySelector('button:disabled') && document.getElementById('answer').children.length"
        )
    )


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(one => one.textContent)", selector
    )


def per_cent(top: list[tuple[str, float]]) -> list[str]:
    return [f"{100 * share:.1f} %" for _, share in top]


@pytest.mark.slow
def test_the_page_answers_as_the_model_does(browser, address, export, video):
    recogniser = text4vis.load(export)
    browser.get(address)
    ask(browser, "recognise", video)
    expected = recogniser.predict(video)
    assert texts(browser, ".bars th") == [name.replace("\x1b", "\\x1b") for name, _ in expected.top]
    assert texts(browser, ".bars td.number") == per_cent(expected.top)
    assert texts(browser, "figcaption") == [f"frame {index}" for index in expected.indices]
    widths = "return [...document.querySelectorAll('.frames img')].map(one => one.naturalWidth)"
    assert browser.execute_script(widths) == [32] * 4

    ask(browser, "recognise", labels="a cat, a dog,a cat,")  # the video is still chosen
    expected = recogniser.predict(video, labels=["a cat", "a dog"])
    assert texts(browser, ".bars th") == [name for name, _ in expected.top]
    assert texts(browser, ".bars td.number") == per_cent(expected.top)

    ask(browser, "timeline", labels="a cat\na dog", window="2")
    timeline = recogniser.scan(video, ["a cat", "a dog"], window_seconds=2)
    rows = "return [...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(one => one.textContent))"
    assert browser.execute_script(rows) == [
        [f"{start:.1f} s", f"{end:.1f} s", timeline.top(window)[0][0], *per_cent(timeline.top(window, 1))]
        for window, (start, end) in enumerate(timeline.seconds_W2)
    ]
    assert browser.execute_script("return document.querySelector('.picture').naturalWidth") > 1000

    ask(browser, "recognise", labels="a cat")
    assert "of one label alone, 'a cat', every video is 100 %" in texts(browser, ".error")[0]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
    assert {name.removeprefix(address) for name in loaded if not name.startswith("data:")} == {"page.js", ""}
    assert [entry for entry in browser.get_log("browser") if "422" not in entry["message"]] == []


def test_names_are_text_and_large_videos_are_refused(browser, address, video, tmp_path):
    browser.get(address)
    ask(browser, "recognise", video)
    shown = video.name.replace('"', "%22").replace("\u202e", "\\u202e")
    assert texts(browser, "#answer p")[0] in (shown, shown.replace("%22", '"'))
    assert texts(browser, "img[src=x], #answer script") == []
    (tmp_path / "large.mp4").write_bytes(bytes(LIMIT + 1))
    ask(browser, "recognise", tmp_path / "large.mp4")
    assert texts(browser, ".error") == ["The video is larger than 128 KiB; choose a smaller one."]
    # A browser without scripts sends the form as it is.
    browser.get(address)
    browser.find_element("name", "video").send_keys(str(video))
    browser.execute_script(
        "const form = document.getElementById('video-form'), ask = document.createElement('input');"
        "ask.name = 'ask'; ask.value = 'recognise'; form.append(ask); form.submit()"
    )
    deadline = time.monotonic() + 60
    while not texts(browser, ".bars th") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(texts(browser, ".bars th")) == 3


def test_a_sentence_finds_the_moments_of_the_index(browser, address, index, video):
    browser.get(address)
    ask(browser, "search", text="a cat", count="2")
    expected = text4vis.open_index(index).find("a cat", 2)
    rows = "return [...document.querySelectorAll('tbody tr')].map(row => [...row.cells].map(one => one.textContent))"
    assert browser.execute_script(rows) == [
        [f"{moment.score:.3f}", clock(moment.start), clock(moment.end), str(video).replace("\u202e", "\\u202e")]
        for moment in expected
    ]
    assert len(expected) == 2
    assert browser.execute_script("return document.querySelector('.picture').naturalWidth") > 1000
    ask(browser, "search", text="word " * 40)
    assert "question: " in texts(browser, ".error")[0]


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_the_page_fits(browser, address, video, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(address)
    for kind in ("recognise", "timeline", "search"):
        ask(browser, kind, video, text="a cat")
        assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")


def send(page: Page, **fields) -> tuple[int, str]:
    """The status and the text that a form is answered with. A file is (name, content)."""

    async def post() -> tuple[int, str]:
        form = FormData(default_to_multipart=True)
        for key, value in fields.items():
            if isinstance(value, tuple):
                form.add_field(key, value[1], filename=value[0])
            else:
                form.add_field(key, value)
        async with TestClient(TestServer(_application(page))) as client, client.post("/", data=form) as reply:
            return reply.status, await reply.text()

    return asyncio.run(post())


@pytest.fixture(scope="module")
def recogniser(export):
    return text4vis.load(export)


def test_an_upload_has_no_name_and_is_gone_after_the_answer(recogniser, video, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen = []

    def predict(path, *given, **options):
        seen.append((path, path.read_bytes() == content, list(tmp_path.iterdir())))
        raise PredictionError(f"{path}: is damaged")

    monkeypatch.setattr(recogniser, "predict", predict)
    content = bytes(3 * 2**20)
    status, text = send(Page(recogniser, "m"), ask="recognise", video=("clip.mp4", content))
    ((path, same, listed),) = seen
    assert same and listed == [] and not path.exists()
    assert status == 422 and "clip.mp4: is damaged" in text and str(path) not in text


def test_a_program_that_fails_says_so_and_goes_on(recogniser, video, monkeypatch, caplog):
    page = Page(recogniser, "m")
    monkeypatch.setattr(recogniser, "predict", lambda *_, **__: 1 / 0)
    status, text = send(page, ask="recognise", video=("clip.mp4", b"x"))
    assert status == 500 and "its terminal shows why" in text and "ZeroDivisionError" in caplog.text
    monkeypatch.undo()
    status, text = send(page, ask="recognise", video=("clip.mp4", video.read_bytes()))
    assert status == 200 and "archery" in text


@pytest.mark.parametrize(("fields", "status", "message"), [
    ({"ask": "recognise"}, 422, "No video was chosen"),
    ({"ask": "recognise", "video": ("a.mp4", b"none")}, 422, "a.mp4: it does not decode"),
    ({"ask": "timeline", "video": ("a.mp4", b"none"), "window": "nan"}, 422, "&#39;nan&#39;; give a number from 1 to"),
    ({"ask": "recognise", "video": ("a.mp4", bytes(LIMIT + 2**20))}, 413, "The video is larger than 128 KiB"),
    ({"ask": "x"}, 422, "is no question of this page; use its buttons"),
])  # fmt: skip
def test_what_is_wrong_is_said_on_the_page(recogniser, fields, status, message):
    page = Page(recogniser, "m", upload_bytes=LIMIT)
    found, text = send(page, **fields)
    assert found == status and message in text and "</html>" in text


def test_other_sites_and_broken_forms_are_refused(recogniser):
    page = Page(recogniser, "m")

    async def statuses() -> list[int]:
        async with TestClient(TestServer(_application(page))) as client:
            own = f"{client.host}:{client.port}"
            found = []
            for method, headers in (
                ("get", {}),
                ("get", {"Host": "localhost:1"}),  # forwarded
                ("post", {"Origin": f"http://{own}"}),
                ("get", {"Host": f"rebound.example:{client.port}"}),
                ("get", {"Host": "[::"}),
                ("post", {"Origin": "http://other.example"}),
                ("post", {"Origin": "null"}),
                ("post", {"Content-Type": "multipart/form-data; boundary=x"}),
            ):
                body = b"no form" if method == "post" else None
                async with client.request(method, "/", headers=headers, data=body) as reply:
                    found.append(reply.status)
        return found

    assert asyncio.run(statuses()) == [200, 200, 422, 403, 403, 403, 403, 400]


def test_requests_that_are_no_forms_or_no_http_are_refused_without_a_traceback(recogniser, caplog):
    """As fuzzing found them: damaged parts, encodings that are not true, an Expect that is not UTF-8, no HTTP."""

    def form(fields: bytes, body: bytes = b"x") -> bytes:
        text = b"--b\r\n" + fields + b"\r\n\r\n" + body + b"\r\n--b--\r\n"
        head = b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        return head + b"Content-Length: %d\r\n\r\n" % len(text) + text

    requests = {
        form(b"Content-Disposition: form-data"): 400,
        form(b'Content-Disposition: form-data; name="labels"\r\nContent-Transfer-Encoding: none'): 400,
        form(b'Content-Disposition: form-data; name="labels"\r\nno header'): 400,
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        b"Content-Length: 5\r\nContent-Encoding: gzip\r\n\r\nask=x": 400,
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: \xff\r\n\r\n": 417,
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: \xff\r\n\r\n": 417,
        b"CONNECT x:1 HTTP/1.1\r\nHost: 127.0.0.1\r\nExpect: \xff\r\n\r\n": 417,
        b"OPTIONS * HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n": 404,
        b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n": 404,
        b"\xff\xfe / HTTP/9\r\n\r\n": 400,
    }

    async def answer(port: int, request: bytes) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await reader.readline()
        writer.close()
        return int(answer.split()[1])

    async def answers() -> list[int]:
        async with TestServer(_application(Page(recogniser, "m"))) as server:
            return [await answer(server.port, request) for request in requests]

    assert asyncio.run(answers()) == list(requests.values())
    assert not [record for record in caplog.records if record.exc_info]


MADE_TO_HURT = (
    '</textarea><script>alert(1)</script>" onfocus=alert(1) autofocus="<img src=x>{{ 7 }}&lt;b&gt;'
    "$\\frac{\x1b[2J\u202eexe\udcff\0"
)


class _Elements(HTMLParser):
    """The elements of a page with the names of their attributes, and all text that it shows."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, ...]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, *(name for name, _ in attributes)))
        self.text += "\n".join(value or "" for _, value in attributes)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("kind", ["recognise", "timeline", "search", "refused"])
def test_what_users_type_and_files_are_called_is_no_more_than_text(recogniser, index, video, monkeypatch, kind):
    """A page of hostile texts has the elements of one of harmless texts, and shows their control characters as escapes.

    The model takes any label here: what a tokenizer does with these is not asked.
    """
    monkeypatch.setattr(recogniser, "predict", lambda path, labels, accuracy: Prediction(
        [(name, 0.5) for name in labels], np.arange(2), np.zeros((2, 8, 8, 3), np.uint8)))  # fmt: skip
    monkeypatch.setattr(recogniser, "scan", lambda path, labels, window_seconds: Timeline(
        labels, np.array([[0.0, 4.0]]), np.full((1, len(labels)), 0.5), [np.zeros((8, 8, 3), np.uint8)]))  # fmt: skip
    opened = text4vis.open_index(index)
    monkeypatch.setattr(opened, "find", lambda text, count: [Moment(text, 0, 2, 0.5)])

    def shown(text: str, labels: list[str]) -> _Elements:
        page = Page(recogniser, text, index=opened)
        fields = {"ask": kind, "labels": "\n".join(labels), "text": text}
        if kind != "refused":
            return _Elements(page.answer(fields, Upload(video, text)))
        with pytest.raises(PredictionError) as error:
            page.answer(fields | {"ask": "timeline", "window": text}, Upload(video, text))
        return _Elements(page.show(fields | {"window": text}, error=str(error.value)))

    page = shown(MADE_TO_HURT, [MADE_TO_HURT, "long " * 1000])
    assert page.elements == shown("clip.mp4", ["a cat", "a dog"]).elements
    assert printable(MADE_TO_HURT) in page.text and page.text.replace("\n", "").isprintable()


def test_unsure_answers_say_so(export, video):
    recogniser = text4vis.load(export)
    recogniser.calibration = Calibration(1.0, {80.0: 0.0, 95.0: 1.0, 99.0: None}, {})
    page, upload = Page(recogniser, "m"), Upload(video, "clip.mp4")
    assert page.show().count("<option") == 3 and "99 %" not in page.show()
    fields = {"ask": "recognise", "accuracy": "95"}
    assert "Unsure: answers like this are right less than 95 % of the time" in page.answer(fields, upload)
    fields["accuracy"] = "80"
    assert "(answers as sure as this are right 80 % of the time)" in page.answer(fields, upload)
    with pytest.raises(PredictionError, match="leave the labels out"):
        page.answer({**fields, "labels": "a,b"}, upload)


def test_a_model_of_several_labels_names_all_that_it_shows(export, video):
    recogniser = text4vis.load(export)
    fields, upload = {"ask": "recognise"}, Upload(video, "clip.mp4")
    recogniser.decision = Decision(0.1, 0.0, (0.0, 2.0, 0.0))
    text = Page(recogniser, "m").answer(fields, upload)
    assert text.count('class="chosen"') == 2 and text.count('<th scope="row">') == 3
    recogniser.decision = Decision(0.1, 0.0, (2.0, 2.0, 2.0))
    text = Page(recogniser, "m").answer(fields, upload)
    assert "None of the classes. The likeliest are:" in text and 'class="chosen"' not in text
    assert "a cat" in Page(recogniser, "m").answer({**fields, "labels": "a cat"}, upload)


def test_a_model_of_its_own_classes_offers_no_labels(tmp_path):
    page = Page(text4vis.load(write_export(tmp_path, NAMES, classifier_trainable=True)), "m").show()
    assert "knows its own classes only" in page and "<textarea" not in page


def test_a_taken_port_is_an_error(recogniser):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"--port: {port} cannot be had .*; give another one, or 0 for any"):
            serve_page(Page(recogniser, "m"), port, print)


@pytest.mark.parametrize(("typed", "labels"), [
    ("", None),
    (" \n , ", None),
    ("surfing", ["surfing"]),
    ("surfing, skiing ,surfing,", ["surfing", "skiing"]),
    ("cutting, peeling\r\n\r\n skiing\n", ["cutting, peeling", "skiing"]),
])  # fmt: skip
def test_labels_are_lines_or_parts_of_one_line(typed, labels):
    assert typed_labels(typed) == labels


def test_sizes_are_said_in_words():
    assert [size_in_words(n) for n in (2**30, 3 * 2**19, 2**17, 7)] == ["1 GiB", "1.5 MiB", "128 KiB", "7 bytes"]
