"""The page that compares runs, as a browser shows it."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from shards.text import redact_text
from text4vis.config.loading import load_config
from text4vis.config.schema import ConfigError
from text4vis.evaluation.comparison import compare
from text4vis.model.preprocessing import settle
from text4vis.report.curves import HEIGHT, TOO_LARGE, WIDTH, Chart, charts, reliability_chart
from text4vis.report.page import read_examples, read_runs, render

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = '<script>alert(1)</script>\x1b[31m"><img src=x onerror=alert(2)>{{ 7 * 7 }}'
NAMES = [HOSTILE, "class 1", "class 2"]


@pytest.fixture(scope="module")
def runs(project, tmp_path_factory) -> list[Path]:
    """Two runs on the same videos; the second has other settings and was evaluated with fewer frames."""
    from text4vis.data.loader import build_loader
    from text4vis.evaluation.protocols import figures, write_report

    base, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    folders = [base / "first", base / (HOSTILE.replace("/", "") + 99 * "x")]
    for folder, frames in zip(folders, (4, 3), strict=True):
        folder.mkdir()
        config = settle(load_config(project.config, [f"solver.lr={frames}e-3", f"data.dataset={json.dumps(HOSTILE)}"]))
        (folder / "config.yaml").write_text(config.to_yaml())
        with build_loader(config, "val") as loader:
            labels, fingerprint = loader.dataset.labels, loader.dataset.fingerprint
        embeddings = rng.standard_normal((len(labels), 1, 8))
        report = figures(embeddings, labels, rng.standard_normal((3, 8)), NAMES)
        views = {"clips": 1, "crops": 1, "frames": frames, "sampling": "uniform"}
        card = {"data": HOSTILE, "data_fingerprint": fingerprint, "views": views, "template": HOSTILE}
        write_report(folder / "report.json", {"step": 20, **card, **report})
        write_report(folder / f"{HOSTILE.replace('/', '')}.json", {**card, **report})
        lines: list[dict] = []
        for step in range(1, 21):
            speed = {
                "lr_head": 0.01 / step,
                "videos_per_second": 30.0 + step,
                "data_wait_share": 0.01 * step,
                HOSTILE: 1.0,
            }
            lines.append({"kind": "train", "time": 0.5, "step": step, "epoch": step / 10, "loss": 2 / step, **speed})
            if step % 10 == 0:
                lines.append({"kind": "val", "time": 0.5, "step": step, "epoch": step / 10, "top1": report["top1"]})
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folders


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    found = read_runs(runs)
    path.write_text(render(found, list(read_examples(found, 2))), encoding="utf-8")
    return path


def vertices(path: str) -> np.ndarray:
    """(N, 2): the x and y of an SVG path of straight lines."""
    return np.array(re.findall(r"[ML] (\S+) (\S+)", path), float).reshape(-1, 2)


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


@pytest.mark.slow
def test_the_page_shows_the_numbers_of_the_files(browser, page, runs):
    browser.get(page.as_uri())
    reports = [report_of(run) for run in runs]
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#figures tbody tr')].map(row => [row.querySelector('th').textContent,"
        " [...row.querySelectorAll('td')].map(cell => [...cell.querySelectorAll('data')].map(one => one.textContent))])"
    )
    top1 = [report["top1"] for report in reports]
    assert dict(rows)["top1"] == [[f"{top1[0]:.2f}"], [f"{top1[1]:.2f}", f"{top1[1] - top1[0]:+.2f}"]]
    exact = browser.execute_script("return [...document.querySelectorAll('.big data')].map(one => one.value)")
    assert [float(value) for value in exact] == top1

    confused = browser.execute_script(
        "return [...document.querySelectorAll('.confused')].map(table => [...table.querySelectorAll('tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.textContent)))"
    )
    for table, report in zip(confused, reports, strict=True):
        times = [
            [count for predicted, count in enumerate(row) if predicted != true]
            for true, row in enumerate(report["confusion"])
        ]
        assert [int(row[2]) for row in table] == sorted((n for row in times for n in row if n), reverse=True)[:10]
        assert {row[0] for row in table} <= {redact_text(row["class"]) for row in report["per_class"]}

    changes = compare(*reports).classes
    gains = [f"{one.difference:+.2f}" for one in changes if one.difference > 0]
    losses = [f"{one.difference:+.2f}" for one in reversed(changes) if one.difference < 0]
    shown = "return [...document.querySelectorAll('.bars tr')].map(row => row.lastElementChild.textContent)"
    assert browser.execute_script(shown) == gains + losses and gains and losses

    lines, grid, last = browser.execute_script(
        "const chart = [...document.querySelectorAll('.chart')].find(one => one.textContent.includes('training loss'));"
        "const paths = at => [...chart.querySelectorAll(at + ' path')].map(path => path.getAttribute('d'));"
        "return [paths('.curve'), paths('.ytick'), [...chart.querySelectorAll('.legend data')].map(one => one.value)]"
    )
    assert [float(value) for value in last] == [0.1, 0.1]
    bottom, *_, top = [vertices(path)[0, 1] for path in grid]
    for line in map(vertices, lines):
        shares = (bottom - line[:, 1]) / (bottom - top)
        assert line.shape == (20, 2) and np.allclose(shares, 2 / np.arange(1, 21) / 2, atol=2e-3)  # ticks: 0 to 2

    keys = browser.execute_script(
        "return [...document.querySelectorAll('#settings tbody tr')]"
        ".map(row => [...row.children].map(cell => cell.textContent))"
    )
    assert keys == [["solver.lr", "0.004", "0.003"]]
    marked = "return [...document.querySelectorAll('#protocol tr.differs th')].map(cell => cell.textContent)"
    cards = browser.execute_script(marked)
    assert [key.split()[0] for key in cards] == ["views.frames"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_and_is_quiet(browser, page, width, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(page.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []
    ink, paper = browser.execute_script(
        "const style = getComputedStyle(document.body);"
        "return [style.color, style.backgroundColor].map(colour => colour.match(/\\d+/g).map(Number))"
    )
    assert (sum(ink) > sum(paper)) == (scheme == "dark") and abs(sum(ink) - sum(paper)) > 450
    smallest = (
        "Math.min(...[...document.querySelectorAll('.chart text')].map(one => one.getBoundingClientRect().height))"
    )
    assert browser.execute_script(f"return {smallest}") > 10


def test_nothing_in_the_files_is_more_than_text(browser, page):
    browser.get(page.as_uri())
    counted = "script, iframe, object, embed, link:not([rel=icon]), img:not([src^='data:image/jpeg;base64,'])"
    assert browser.execute_script("return document.querySelectorAll(arguments[0]).length", counted) == 0
    handlers = "[...document.querySelectorAll('*')].filter(one => [...one.attributes].some(x => /^on/i.test(x.name)))"
    assert browser.execute_script(f"return {handlers}.length") == 0
    text = browser.execute_script("return document.body.textContent")
    assert HOSTILE.replace("\x1b", "\\x1b") in text
    source = page.read_text(encoding="utf-8")
    assert all(character.isprintable() or character == "\n" for character in source)
    policy = browser.execute_script("return document.querySelector('meta[http-equiv]').content")
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_the_frames_are_those_that_the_model_saw(browser, page, runs, project):
    from text4vis.data.loader import build_loader

    browser.get(page.as_uri())
    videos = browser.execute_script(
        "return [...document.querySelectorAll('.example')].map(one =>"
        " [one.querySelector('figcaption .muted').textContent,"
        " [...one.querySelectorAll('img')].map(image => [image.src, image.naturalWidth])])"
    )
    assert len(videos) == 8  # two right and two wrong ones of each run
    seen = {}
    for frames in (4, 3):
        with build_loader(settle(load_config(project.config, [f"data.num_segments={frames}"])), "val") as loader:
            for batch in loader:
                for sample, clip in zip(batch.ids.tolist(), batch.frames[:, 0], strict=True):
                    seen[loader.dataset.name(sample), frames] = clip.permute(0, 2, 3, 1).numpy()
    for (name, images), frames in zip(videos, [4] * 4 + [3] * 4, strict=True):
        assert [width for _, width in images] == [32] * frames
        decoded = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source, _ in images]
        apart = np.abs(np.stack(decoded).astype(float) - seen[name, frames]).mean()
        others = np.abs(np.stack(decoded).astype(float) - seen[name, frames][::-1]).mean()
        assert apart < 8 < others  # JPEG, and another order of frames


@pytest.mark.parametrize("resize", ["squash", "longest"])
def test_frames_that_were_not_cropped_are_shown(runs, tmp_path, resize):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    content = report_of(run)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["data"] |= {"resize": resize, "scale_size": None}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    content["views"] = {**content.get("views", {}), "scale_size": 36, "input_size": 32}
    content["pixels"] = {"resize": resize, "interpolation": "bicubic"}
    (run / "report.json").write_text(json.dumps(content))
    assert _all(run).right


def test_what_cannot_be_shown_is_said(runs, tmp_path):
    for name in ("moved", "new"):
        shutil.copytree(runs[0], tmp_path / name)
    config = tmp_path / "moved" / "config.yaml"
    config.write_text(config.read_text().replace("/shards", "/elsewhere"))
    (tmp_path / "new" / "report.json").unlink()
    with (tmp_path / "new" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    found = read_runs([tmp_path / "moved", tmp_path / "new", runs[0] / "report.json"])
    examples = list(read_examples(found, 2))
    assert "elsewhere" in examples[0].missing and "not evaluated" in examples[1].missing
    assert "folder of the run" in examples[2].missing
    html = render(found, examples)
    assert html.count("No frames can be shown") == 3
    assert "there is no report.json" in html and "middle of a line" in html
    assert "nan" not in html.partition("</style>")[2]


def test_frames_of_other_videos_are_not_shown(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    content = report_of(runs[0])
    (tmp_path / "run" / "report.json").write_text(json.dumps({**content, "data_fingerprint": "0" * 64}))
    (examples,) = read_examples(read_runs([tmp_path / "run"]), 2)
    assert "not the videos that were evaluated" in examples.missing


def test_examples_count_past_the_videos_that_were_left_out(runs, tmp_path):
    """Rows of the predictions are videos of the data set without those that were skipped."""
    shutil.copytree(runs[0], tmp_path / "run")
    content = report_of(runs[0])
    predictions = {key: column[3:] for key, column in content["predictions"].items()}
    skipped = [{"id": number} for number in range(3)]
    whole = {video.video: video.predictions for video in [*_all(runs[0]).right, *_all(runs[0]).wrong]}
    (tmp_path / "run" / "report.json").write_text(
        json.dumps({**content, "predictions": predictions, "skipped": skipped})
    )
    partial = _all(tmp_path / "run")
    assert len(partial.right) + len(partial.wrong) == len(whole) - 3
    assert all(video.predictions == whole[video.video] for video in [*partial.right, *partial.wrong])


def _all(run: Path):
    (examples,) = read_examples(read_runs([run]), 99)
    assert not examples.missing
    return examples


def damage_line(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([*lines[:2], '{"kind": "train", \x1b[31m', *lines[3:]]))


def text_for_a_number(run: Path) -> None:
    path = run / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 1.0', '"loss": "low"'))


def cut_predictions(run: Path) -> None:
    content = report_of(run)
    content["predictions"]["labels"].pop()
    (run / "report.json").write_text(json.dumps(content))


def unknown_class(run: Path) -> None:
    content = report_of(run)
    content["predictions"]["predicted"][0] = 3
    (run / "report.json").write_text(json.dumps(content))


def calibration_out_of_range(run: Path) -> None:
    content = report_of(run)
    bins = [{"videos": 40, "confidence": 50.0, "accuracy": 50.0}]
    content["calibration"] = {"temperature": 1.0, "ece": float("nan"), "ece_calibrated": 1.0,
                              "reliability": bins, "reliability_calibrated": bins}  # fmt: skip
    (run / "report.json").write_text(json.dumps(content))


def more_right_than_videos(run: Path) -> None:
    content = report_of(run)
    content["per_class"][0]["correct"] = 99
    (run / "report.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda run: (run / "metrics.jsonl").unlink(), r"metrics\.jsonl: .*copy it from"),
        (damage_line, r"metrics\.jsonl:3: damaged.*remove the line"),
        (text_for_a_number, r"metrics\.jsonl:2: damaged"),
        (lambda run: (run / "config.yaml").write_text("data: ["), r"config\.yaml"),
        (lambda run: (run / "report.json").write_text("[]"), r"report\.json: not a report"),
        (cut_predictions, r"report\.json: .*unequal length.*--report"),
        (unknown_class, r"report\.json: .*class that is not in per_class"),
        (calibration_out_of_range, r"report\.json: .*calibration\.ece"),
        (more_right_than_videos, r"report\.json: .*more videos are right"),
        (shutil.rmtree, r"no such folder.*--output"),
    ],
)
def test_damaged_files_are_named(runs, tmp_path, damage, named):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    damage(run)
    with pytest.raises(ConfigError, match=named):
        read_runs([runs[1], run])


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(program, check=False, capture_output=True, text=True)


@pytest.mark.slow
def test_the_command(runs, tmp_path):
    page = tmp_path / "out" / "compared.html"
    done = command(*runs, "--examples", 0, "--output", page)
    assert done.returncode == 0 and "2 runs" in done.stdout, done.stderr
    assert page.read_text(encoding="utf-8") == render(read_runs(runs))
    shutil.copytree(runs[0], tmp_path / "run")
    damage_line(tmp_path / "run")
    failed = command(tmp_path / "run", "--output", page)
    assert failed.returncode == 1 and "metrics.jsonl:3" in failed.stderr
    assert "\x1b" not in failed.stderr and "Traceback" not in failed.stderr


def test_the_template_is_installed_with_the_package(monkeypatch):
    setuptools = pytest.importorskip("setuptools", minversion="77")
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution()
    distribution.parse_config_files(["pyproject.toml"])
    room = ROOT / "text4vis" / "report"
    installed = [path for pattern in distribution.package_data["text4vis.report"] for path in room.glob(pattern)]
    assert room / "report.html.j2" in installed


def drawn_paths(chart: Chart, kind: str) -> np.ndarray:
    """(N, 2): the vertices of all paths of a kind, "curve" or "ytick"."""
    return vertices(" ".join(path.get("d", "") for path in ElementTree.fromstring(chart.svg).iterfind(
        f".//g[@class='{kind}']//path")))  # fmt: skip


def tick_labels(chart: Chart, kind: str) -> list[float]:
    texts = ElementTree.fromstring(chart.svg).iterfind(f".//g[@class='{kind}']//text")
    return [float((text.text or "").replace("\u2212", "-")) for text in texts]


@pytest.mark.slow
@given(
    st.lists(st.one_of(st.none(), st.floats(allow_nan=True, allow_infinity=True, width=64)), min_size=1, max_size=3),
    st.integers(1, 900),
)
@example([6.4e-288], 1)
def test_every_curve_stays_in_its_chart(values, count):
    records = [{"kind": "train", "step": n, "loss": values[n % len(values)]} for n in range(count)]
    finite = [one["loss"] for one in records if one["loss"] is not None and abs(one["loss"]) < TOO_LARGE]
    drawn = charts({"run": records})
    assert len(drawn) == bool(finite)
    for chart in drawn:
        (left, bottom), *_, (right, top) = drawn_paths(chart, "ytick")
        assert 0 <= left < right <= WIDTH and 0 <= top < bottom <= HEIGHT
        for x, y in drawn_paths(chart, "curve"):
            assert left - 0.1 <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1
        assert chart.curves[0].last == finite[-1]
        for kind in ("xtick", "ytick"):
            labels = tick_labels(chart, kind)
            assert 2 <= len(labels) <= 8 and sorted(set(labels)) == labels


def test_long_curves_keep_their_extremes_and_stay_small():
    losses = np.random.default_rng(0).standard_normal(50_000)
    losses[12_345], losses[43_210] = 10, -10
    (chart,) = charts({"run": [{"kind": "train", "step": n, "loss": loss} for n, loss in enumerate(losses.tolist())]})
    assert len(chart.svg) < 40_000
    grid, labels, heights = drawn_paths(chart, "ytick")[:, 1], tick_labels(chart, "ytick"), drawn_paths(chart, "curve")
    values = np.interp(-heights[:, 1], [-grid[0], -grid[-1]], [labels[0], labels[-1]])
    assert min(values) == pytest.approx(-10, abs=0.02) and max(values) == pytest.approx(10, abs=0.02)


def test_pictures_are_the_same_each_time_and_take_the_colours_of_the_page():
    records = [{"kind": "val", "step": n, "top1": float(n), HOSTILE: 1.0} for n in range(5)]
    runs = {f"{HOSTILE} {number} #2a78d6": records for number in range(17)}
    first, again = charts(runs), charts(runs)
    assert [chart.svg for chart in first] == [chart.svg for chart in again]
    svg = first[0].svg
    elements = list(ElementTree.fromstring(svg).iter())
    styles = " ".join(element.get("style", "") for element in elements)
    assert "#" not in styles and {f"var(--s{n})" for n in range(8)} <= set(re.findall(r"var\(--\w+\)", styles))
    assert len({element.get("style") for element in elements if element.tag == "path"}) >= 17  # colours x dashes
    assert {element.tag for element in elements} == {"svg", "g", "path", "defs", "use", "text", "title"}
    titles = [element.text for element in elements if element.tag == "title"]
    assert len(titles) == 17 * 5 and titles[7] == redact_text(f"{HOSTILE} 1 #2a78d6, step 2: 2")


def test_the_reliability_of_a_report_is_drawn(runs, tmp_path):
    """Confidence and accuracy of each bin, before the temperature and at it; a report without them has no picture."""
    rows = [{"videos": 20, "confidence": 30.0, "accuracy": 60.0}, {"videos": 30, "confidence": 90.0, "accuracy": 95.0}]
    even = [{"videos": 50, "confidence": 80.0, "accuracy": 80.0}]
    known = {"temperature": 0.5, "ece": 15.0, "ece_calibrated": 0.25, "reliability": rows,
             "reliability_calibrated": even}  # fmt: skip
    chart = reliability_chart("run", 9, known)
    grid, labels = drawn_paths(chart, "ytick"), tick_labels(chart, "ytick")
    assert labels[0] == tick_labels(chart, "xtick")[0] == 0 and labels[-1] == tick_labels(chart, "xtick")[-1] == 100
    places = drawn_paths(chart, "curve")
    shares = 100 * (places - grid[0]) / (grid[-1] - grid[0])
    assert np.allclose(shares, [[30, 60], [90, 95], [80, 80]], atol=0.1)
    assert [curve.name for curve in chart.curves] == ["before: ECE 15.0 %", "at temperature 0.50: ECE 0.2 %"]

    assert 'id="calibration"' not in render(read_runs(runs))
    shutil.copytree(runs[0], tmp_path / "run")
    (tmp_path / "run" / "report.json").write_text(json.dumps({**report_of(runs[0]), "calibration": known}))
    html = render(read_runs([runs[1], tmp_path / "run"]))
    assert reliability_chart("run", 1, known).svg in html and html.count("accuracy over confidence") == 1
