"""Benchmarks of prediction: many clips against decoding alone, and a long file against decoding all of it twice."""

from __future__ import annotations

import io
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

from benchmarks.data import SHORT_SIDE, clip_files, photograph_frames
from benchmarks.figures import Figure, against, compared, interleaved
from shards.files import replacing_path
from shards.frames import FrameReader, decode_frames
from shards.video import iter_frames, probe_video
from text4vis.common.progress import track
from text4vis.config.loading import config_from_dict
from text4vis.data.augmentation import scaled_size
from text4vis.model.video_clip import build_model
from text4vis.serving.footage import Sampler
from text4vis.serving.predictor import Predictor

_FPS, _SIZE = 25, (320, 240)  # of the long file
_LOOP_FRAMES = 1000  # different frames in it
_CLIP_FRAMES = 300
_WINDOW, _STEP = 4.0, 2.0
_SIDE = 64
# Two blocks at 64 px: the model costs little beside its frames.
_TINY = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": _SIDE, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


def predict(work: Path, clips: Path | None, *, videos: int, minutes: float, threads: int, rounds: int) -> list[Figure]:
    """Prediction of `videos` clips in videos/s, and of a file of `minutes` minutes in seconds of processor time."""
    folder = work / "predict"
    folder.mkdir(parents=True, exist_ok=True)
    model, long = folder / "tiny.json", folder / f"long-{minutes:g}.mp4"
    model.write_text(json.dumps(_TINY))
    sources = _short_clips(folder, clip_files(clips)) or photograph_clips(folder)
    paths = _copies(sources, folder / f"copies-{videos}", videos)
    if not long.exists():
        _encode(long, _looped(sources, round(60 * minutes * _FPS)), round(60 * minutes * _FPS))
    rival = "torchcodec" if has_torchcodec() else "PyAV (no torchcodec here)"
    decode = f"{rival} decodes the same frames and does nothing else"
    many: dict[str, Callable[..., float]] = {
        f"{videos} clips, tiny model": clips_per_second,
        decode: decoded_per_second,
    }
    with _process() as call:
        call(predict_seconds, model, paths[0])  # what only the first one costs
        runs = {name: partial(call, run, model, paths, threads) for name, run in many.items()}
        figures = compared("predict", "videos/s", interleaved("predict", runs, rounds), {decode: "at least 0.9"})
        figures += _of_the_long_file(call, model, long, minutes, rounds)
    return figures


def _of_the_long_file(call: Callable[..., float], model: Path, long: Path, minutes: float, rounds: int) -> list[Figure]:
    figures = []
    for what, ours, twice, target in (
        (f"8 frames of {minutes:g} minutes", predict_seconds, predict_twice_seconds, "at most 0.05"),
        (f"{minutes:g} minutes in windows of {_WINDOW:g} s", scan_seconds, scan_twice_seconds, "at most 0.5"),
    ):
        seconds = {name: partial(call, run, model, long) for name, run in ((what, ours), ("twice", twice))}
        values = interleaved("predict", seconds, rounds)
        figures.append(Figure("predict", f"{what}: processor time", "s", values[what]))
        ratios = against(values[what], values["twice"])
        figures.append(Figure("predict", f"{what}: decoding all of it twice", "s", values["twice"], ratios, target))
    return figures


@contextmanager
def _process() -> Iterator[Callable[..., float]]:
    """Calls functions in a process whose OpenMP threads sleep while they wait, as in `tools/predict.py`."""
    before = os.environ.get("OMP_WAIT_POLICY")
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda function, *given: pool.submit(function, *given).result()
    finally:
        del os.environ["OMP_WAIT_POLICY"]
        if before is not None:
            os.environ["OMP_WAIT_POLICY"] = before


@cache
def recogniser_of(model: Path) -> Predictor:
    """A recogniser of random weights."""
    network = {"arch": str(model), "init": False, "classifier": "random"}
    config = config_from_dict({"network": network, "data": {"input_size": _SIDE}}, "benchmark")
    torch.manual_seed(0)
    clip = build_model(config.network, config.data.num_segments)
    return Predictor(clip, config, [f"class {number}" for number in range(10)], torch.randn(10, clip.embed_dim))


def clips_per_second(model: Path, paths: list[Path], threads: int) -> float:
    """Videos a second of `predict_many`."""
    recogniser = recogniser_of(model)
    started = time.perf_counter()
    failed = [answer for answer in recogniser.predict_many(paths, threads=threads) if isinstance(answer, Exception)]
    if failed:
        raise failed[0]
    return len(paths) / (time.perf_counter() - started)


def has_torchcodec() -> bool:
    """Whether torchcodec is installed and finds FFmpeg's libraries."""
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def decoded_per_second(model: Path, paths: list[Path], threads: int) -> float:
    """Videos a second of decoding the frames that `predict_many` takes."""
    decode = _torchcodec_frames if has_torchcodec() else decode_frames
    indices = [_indices(model, path.resolve()) for path in paths]
    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(decode, paths, indices):
            pass
    return len(paths) / (time.perf_counter() - started)


def _torchcodec_frames(path: Path, indices: Sequence[int]) -> object:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(str(path), num_ffmpeg_threads=1).get_frames_at(list(indices)).data


@cache
def _indices(model: Path, path: Path) -> list[int]:
    return Sampler(recogniser_of(model).config).indices(probe_video(path).num_frames).tolist()


def predict_seconds(model: Path, path: Path) -> float:
    """Processor time of a prediction."""
    recogniser = recogniser_of(model)
    return _processor_seconds(lambda: recogniser.predict(path))


def predict_twice_seconds(model: Path, path: Path) -> float:
    """The same by counting the frames first, which decodes all of them."""
    recogniser = recogniser_of(model)
    sampler = Sampler(recogniser.config)

    def run() -> None:
        count = probe_video(path).num_frames
        frames = FrameReader(path, num_frames=count).read(sampler.indices(count), sampler.prepare)
        _recognise(recogniser, np.stack(frames)[None])

    return _processor_seconds(run)


def scan_seconds(model: Path, path: Path) -> float:
    """Processor time of a timeline."""
    recogniser = recogniser_of(model)
    return _processor_seconds(lambda: recogniser.scan(path, window_seconds=_WINDOW, step_seconds=_STEP))


def scan_twice_seconds(model: Path, path: Path) -> float:
    """The same by counting the frames first, and decoding those of eight windows at a time."""
    recogniser = recogniser_of(model)
    sampler = Sampler(recogniser.config)

    def run() -> None:
        info = probe_video(path)
        reader = FrameReader(path, num_frames=info.num_frames)
        last = max(0.0, info.duration - _WINDOW)
        starts = np.append(np.arange(0.0, last, _STEP), last)
        windows_WT = sampler.windows(info, np.stack([starts, np.minimum(starts + _WINDOW, info.duration)], axis=1))
        for begin in range(0, len(windows_WT), 8):
            batch_BT = windows_WT[begin : begin + 8]
            frames = np.stack(reader.read(batch_BT.ravel(), sampler.prepare))
            _recognise(recogniser, frames.reshape(*batch_BT.shape, *frames.shape[1:]))

    return _processor_seconds(run)


def _recognise(recogniser: Predictor, frames_BTSS3: np.ndarray) -> None:
    embeddings_BD = recogniser._embed(recogniser._frames(frames_BTSS3))
    recogniser._scores(embeddings_BD, recogniser.class_embeddings_CD)


def _processor_seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def _copies(sources: list[Path], folder: Path, count: int) -> list[Path]:
    """Links to the clips in turn."""
    folder.mkdir(exist_ok=True)
    paths = []
    for number, source in zip(range(count), itertools.cycle(sources)):
        paths.append(folder / f"{number:05d}{source.suffix}")
        paths[-1].unlink(missing_ok=True)
        paths[-1].symlink_to(source.resolve())
    return paths


def _short_clips(folder: Path, files: list[Path]) -> list[Path]:
    """Up to 300 frames of each, at short side 256 as data sets of the field are stored."""
    paths = []
    for file in files:
        paths.append(folder / f"short-{file.stem}.mp4")
        if not paths[-1].exists():
            images = map(Image.fromarray, itertools.islice(iter_frames(file), _CLIP_FRAMES))
            frames = (np.asarray(image.resize(scaled_size(*image.size, SHORT_SIDE))) for image in images)
            _encode(paths[-1], frames, _CLIP_FRAMES)
    return paths


def photograph_clips(folder: Path) -> list[Path]:
    paths = []
    for number, frames in enumerate(photograph_frames(100)):
        paths.append(folder / f"photograph-{number}.mp4")
        if not paths[-1].exists():
            _encode(paths[-1], (np.asarray(Image.open(io.BytesIO(data))) for data in frames), len(frames))
    return paths


def _looped(sources: list[Path], count: int) -> Iterator[np.ndarray]:
    beginnings = (itertools.islice(iter_frames(source), _LOOP_FRAMES // len(sources)) for source in sources)
    frames = [np.asarray(Image.fromarray(frame).resize(_SIZE)) for frame in itertools.chain.from_iterable(beginnings)]
    return itertools.islice(itertools.cycle(frames), count)


def _encode(path: Path, frames: Iterator[np.ndarray], count: int) -> None:
    """H.264 as x264 writes it by default: three B-frames, a key frame every 250 frames or at cuts."""
    with replacing_path(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"preset": "veryfast"})
        for frame in track(frames, f"encoding {path.name}", count, unit="frame"):
            if not stream.codec_context.is_open:
                stream.height, stream.width = (side // 2 * 2 for side in frame.shape[:2])
                stream.pix_fmt = "yuv420p"
            height, width = stream.height, stream.width
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame[:height, :width].copy(), "rgb24")))
        container.mux(stream.encode())
