"""What TensorBoard shows beside scalars, read back from its files."""

import html
import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from project import STEPS_PER_EPOCH
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.util.tensor_util import make_ndarray

from text4vis.config.loading import load_config
from text4vis.data.loader import build_loader
from text4vis.evaluation.protocols import figures
from text4vis.model.preprocessing import settle
from text4vis.report.pictures import CAPTION_PIXELS, GAP_PIXELS, contact_sheet, draw_confusion, most_confused, plain
from text4vis.report.tensorboard import TensorBoardLog, class_table, extremes
from text4vis.training.logs import Metrics
from text4vis.training.losses import Objective

NAMES = ["class 0", "class 1", "class 2"]


def test_what_cannot_be_pictured_ends_no_job(monkeypatch):
    from text4vis.training import run_log

    warnings = []
    monkeypatch.setattr(run_log.logger, "warning", lambda text, *values: warnings.append(text % values))

    def broken(log):
        raise OSError("no space left")

    run_log.RunLog(tensorboard=object()).add_pictures(3, broken)
    assert warnings == ["TensorBoard: pictures of step 3 left out: no space left"]


def read(folder, part: str = "") -> EventAccumulator:
    """The run as TensorBoard's server reads it: everything is a tensor."""
    board = EventAccumulator(str(folder / "tensorboard" / part), size_guidance={"tensors": 0})
    board.Reload()
    return board


def picture(board: EventAccumulator, tag: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(board.Tensors(tag)[0].tensor_proto.string_val[2])))


def texts(board: EventAccumulator, tag: str) -> list[str]:
    return [event.tensor_proto.string_val[0].decode() for event in board.Tensors(f"{tag}/text_summary")]


def steps(board: EventAccumulator, tag: str) -> list[int]:
    return [event.step for event in board.Tensors(tag)]


def frames_of(sheet: np.ndarray, rows: int, frames: int, side: int) -> np.ndarray:
    """The frames (rows, T, S, S, 3) of a contact sheet."""
    tops = [CAPTION_PIXELS + row * (CAPTION_PIXELS + side) for row in range(rows)]
    lefts = [t * (side + GAP_PIXELS) for t in range(frames)]
    return np.stack([[sheet[top : top + side, left : left + side] for left in lefts] for top in tops])


def channels_last(frames: torch.Tensor) -> np.ndarray:
    return frames.movedim(-3, -1).numpy()


def started(config, folder, step: int = 0) -> tuple[TensorBoardLog, Metrics]:
    metrics = Metrics(folder, step)
    return TensorBoardLog(metrics.board, config, NAMES, global_batch=10, step=step), metrics


@pytest.mark.parametrize("settings", [[], ["solver.mixup=0.8", "solver.cutmix=1"]], ids=["plain", "mixed"])
def test_the_clips_shown_are_what_the_model_gets(project, tmp_path, settings):
    config = settle(load_config(project.config, ["data.batch_size=5", "logging.pictures=3", *settings]))
    log, metrics = started(config, tmp_path)
    with build_loader(config, "train", consumed=10) as loader:
        batch = next(iter(loader))
        log.training_clips(batch, 10, 3)
        given: list[torch.Tensor] = []

        def forward(frames_BTCHW: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
            given.append(frames_BTCHW)
            return torch.zeros(len(frames_BTCHW), len(NAMES))

        Objective(config, torch.eye(3), config.data.batch_size)(
            forward, batch.frames[:, 0], batch.labels, batch.ids.tolist(), 10
        )
        expected = channels_last(given[0][:3])
    metrics.close()
    board = read(tmp_path)
    assert steps(board, "train/clips") == [3]
    assert np.array_equal(frames_of(picture(board, "train/clips"), 3, 4, 32), expected)


@pytest.mark.parametrize("views", [[], ["data.test_clips=2", "data.test_crops=3"]], ids=["one view", "six views"])
def test_the_predictions_shown_are_the_surest_right_and_wrong_ones(project, tmp_path, views):
    config = settle(load_config(project.config, ["logging.pictures=2", "data.num_segments=9", *views]))
    rng = np.random.default_rng(0)
    with build_loader(config, "val") as loader:
        num_views, kept = loader.planner.num_views, np.delete(np.arange(len(loader.dataset)), 3)
        labels = loader.dataset.labels[kept]
        embeddings, classes = rng.standard_normal((len(labels), num_views, 8)), rng.standard_normal((3, 8))
        report = figures(embeddings, labels, classes, NAMES)
        log, metrics = started(config, tmp_path)
        log.evaluation(
            report | {"step": 7, "best_top1": 0.0, "skipped": [{"id": 3}]}, torch.from_numpy(classes), loader
        )
        with build_loader(settle(load_config(project.config, ["data.num_segments=9"])), "val") as single:
            seen = {
                sample: channels_last(frames[0])
                for batch in single
                for sample, frames in zip(batch.ids.tolist(), batch.frames, strict=True)
            }
    metrics.close()
    predictions = report["predictions"]
    probability, is_right = np.array(predictions["probability"]), np.array(predictions["predicted"]) == labels
    board = read(tmp_path)
    for kind, among in (("right", is_right), ("wrong", ~is_right)):
        shown = extremes(predictions, 2)[kind]
        assert among[shown].all() and (probability[among] <= probability[shown].min()).sum() >= among.sum() - 1
        assert probability[shown[0]] == probability[among].max()
        eight_of_nine = np.linspace(0, 8, 8).round().astype(int)
        frames = frames_of(picture(board, f"val/{kind}"), 2, 8, 32)
        # One crop of several may lie up to 2 pixels off the only one of one: see protocols.Views.
        tolerance = 0 if not views else 40
        expected = np.stack([seen[kept[video]][eight_of_nine] for video in shown])
        assert np.abs(frames.astype(int) - expected).mean() <= tolerance


def test_an_evaluation_becomes_a_matrix_a_table_and_a_projector(project, tmp_path):
    config = settle(load_config(project.config))
    rng = np.random.default_rng(1)
    with build_loader(config, "val") as loader:
        labels = loader.dataset.labels
        classes = rng.standard_normal((3, 8)).astype(np.float32)
        report = figures(rng.standard_normal((len(labels), 1, 8)), labels, classes, NAMES)
        log, metrics = started(config, tmp_path)
        for step in (7, 14):
            evaluated = report | {"step": step, "best_top1": 99.0, "skipped": []}
            log.evaluation(evaluated, torch.from_numpy(classes), loader)
        log.end(14)
    metrics.close()
    board = read(tmp_path)
    confusion = np.array(report["confusion"])
    assert np.array_equal(picture(board, "val/confusion"), draw_confusion(confusion, NAMES))
    for row in report["per_class"]:
        (line,) = (line for line in texts(board, "val/classes")[0].splitlines() if f"| {row['class']} |" in line)
        assert line.split("|")[2:4] == [f" {row['videos']} ", f" {100 * row['correct'] / row['videos']:.1f} "]
    histogram = make_ndarray(board.Tensors("val/class_accuracy")[0].tensor_proto)  # rows of left, right, count
    shares = [100 * row["correct"] / row["videos"] for row in report["per_class"]]
    assert histogram[:, 2].sum() == 3 and histogram[0, 0] <= min(shares) <= max(shares) <= histogram[-1, 1]
    folder = tmp_path / "tensorboard"
    assert np.loadtxt(folder / "class_embeddings.tsv") == pytest.approx(classes, rel=1e-5)
    assert (folder / "class_names.tsv").read_text().splitlines() == NAMES
    assert [text.count("- class") + text.count("lr: 0.002") for text in texts(board, "config")] == [1]
    results = read(tmp_path, "results")
    start, end = (
        HParamsPluginData.FromString(results.SummaryMetadata(f"_hparams_/session_{what}_info").plugin_data.content)
        for what in ("start", "end")
    )
    assert steps(results, "result/best_top1") == steps(results, "result/top1") == [7, 14]
    hparams = start.session_start_info.hparams
    assert hparams["solver.lr"].number_value == 2e-3 and hparams["network.fix_text"].string_value == "True"
    assert not any(key.startswith(("logging.", "engine.zero")) for key in hparams)
    assert end.session_end_info.status == Status.Value("STATUS_SUCCESS")


def test_a_job_that_takes_over_shows_nothing_twice(project, tmp_path):
    config = settle(load_config(project.config))
    with build_loader(config, "train") as loader:
        batch = next(iter(loader))
        for step in (0, 0, 4):
            log, metrics = started(config, tmp_path, step)
            for later in (step + 1, step + 5):
                log.training_clips(batch, 0, later)
            metrics.close()
    board = read(tmp_path)
    assert steps(board, "train/clips") == [1, 5, 9]
    assert steps(board, "config/text_summary") == [1, 5]
    assert steps(read(tmp_path, "results"), "_hparams_/session_start_info") == [1, 5]


@given(st.integers(1, 12).flatmap(lambda c: st.lists(st.integers(0, 9), min_size=c * c, max_size=c * c)))
def test_the_classes_of_the_matrix_are_those_confused_most(counts):
    size = int(len(counts) ** 0.5)
    confusion = np.array(counts).reshape(size, size)
    wrong = confusion - np.diag(np.diag(confusion))
    shown = most_confused(confusion, 4)
    assert len(shown) == min(4, size) and sorted(set(shown.tolist())) == shown.tolist()
    hidden = [c for c in range(size) if c not in shown]
    pairs_shown = wrong[np.ix_(shown, shown)]
    assert not hidden or wrong[np.ix_(hidden, hidden)].max() <= pairs_shown.max()


@pytest.mark.parametrize("num_classes", [1, 3, 400])
def test_a_matrix_is_readable_for_few_and_many_classes(num_classes):
    rng = np.random.default_rng(0)
    confusion = rng.integers(0, 3, (num_classes, num_classes))
    drawn = draw_confusion(confusion, [f"a rather long name of class {number} $x$" for number in range(num_classes)])
    height, width = drawn.shape[:2]
    assert max(height, width) < 1600 and drawn.std() > 5


HOSTILE = "<script>alert(1)</script> | [x](javascript:y) *b* _i_ `c`\n# head\x1b[31m\u202e"


def test_names_are_only_names(project, tmp_path):
    assert plain(HOSTILE, 200).isprintable() and len(plain("x" * 99)) == 60
    names = [plain(HOSTILE, 200), "other"]
    table = class_table([{"class": name, "videos": 3, "correct": 1} for name in names], np.array([[1, 2], [0, 3]]))
    cells = re.findall(r"<td.*?>(.*?)</td>", markdown_to_safe_html(table), re.DOTALL)
    assert len(cells) == 8 and not any("<" in cell for cell in cells)
    assert html.unescape(cells[0]) == plain(HOSTILE, 200).strip()
    hostile = settle(load_config(project.config, ['data.dataset="```\\n<b>x</b>"']))
    _, metrics = started(hostile, tmp_path)
    metrics.close()
    shown = markdown_to_safe_html(texts(read(tmp_path), "config")[0])
    assert shown.count("<pre>") == 1 and "<b>" not in shown and "&lt;b&gt;" in shown


def test_long_clips_and_captions_fit_on_a_sheet():
    frames = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    sheet = contact_sheet([(frames, "a caption that is wider than the frames"), (frames[::-1], "b")])
    assert np.array_equal(frames_of(sheet, 2, 2, 16), np.stack([frames, frames[::-1]]))
    assert sheet.shape[1] > 200 and (sheet[:CAPTION_PIXELS, -6:] == 255).all()


@pytest.mark.slow
def test_a_run_in_several_jobs_is_shown_without_repetition(project, tmp_path):
    """The first job breaks after steps that it has not saved, the second one draws no pictures."""
    output = tmp_path / "run"
    first, second, last = STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH - 1, 3 * STEPS_PER_EPOCH - 1
    settings = ("data.batch_size=4", "logging.pictures=2")
    assert project.train_with(output, f"--raise-at {second + 2}", *settings, ranks=1)[0][0] == 1
    assert steps(read(output), "train/clips") == [1, first + 1, second + 1]
    project.train(output, *settings, "logging.pictures=0", ranks=1)
    board = read(output)
    assert steps(board, "train/clips") == [1, first + 1]
    assert steps(board, "val/confusion") == steps(board, "val/classes/text_summary") == [first, second]
    assert set(steps(board, "val/right") + steps(board, "val/wrong")) == {first, second}
    assert steps(board, "config/text_summary") == [1]
    assert steps(read(output, "results"), "result/top1") == [first, second]
    assert steps(board, "val/best_top1") == [first, second, last]
