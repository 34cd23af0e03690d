"""Loaders that others made, each in the form that it recommends, on the frames, crops and flips of our plan.

SPDL reads our shards. WebDataset and Megatron-Energon read our tars as they are, LitData and Streaming the same frames
in formats of their own, which are written once. All decode with simplejpeg and finish with OpenCV.

B videos, T frames, S side of the model's input.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import cv2
import numpy as np
import torch
import yaml
from torch.utils.data import DataLoader

from benchmarks.data import Workload
from benchmarks.figures import run_fresh
from benchmarks.recipe import WORKER_START, Batches, Contender, OpenCvFrames, Setup, channels_first
from shards.reader import open_dataset
from text4vis.common.console import console
from text4vis.config.schema import Config

_EXTRA = "pip install 'text4vis[peers]'"
_BUCKET_KEYS = {"aws_access_key_id": "key", "aws_secret_access_key": "secret", "region_name": "us-east-1"}
_BUCKET_VARIABLES = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}


class Sample(TypedDict):
    """A video as LitData and Streaming store it: all its frames, as they are, and where each of them ends."""

    video: int
    ends: np.ndarray
    frames: bytes


@dataclass(frozen=True)
class FarData:
    """Where a peer's data lie in a far store, and an empty folder that is the peer's own.

    address: of the store, by HTTP and as an endpoint of S3. path: below it, whose first part is the bucket.
    """

    address: str
    path: str
    cache: Path


@dataclass(frozen=True)
class Peer:
    """A loader to compare with.

    module: what must be importable. install: the command for it. train: the loader, given the folder of its data.
    prepare(workload, folder): writes these data, None if it reads ours. epoch: one pass over a far store, for those
    that read one. has_workers: whether each worker process makes batches of its own.
    """

    name: str
    module: str
    install: str
    train: Callable[[Path, Setup], AbstractContextManager[Batches]]
    prepare: Callable[[Workload, Path], None] | None = None
    epoch: Callable[[Setup, FarData], Iterable[torch.Tensor]] | None = None
    has_workers: bool = True

    @property
    def is_installed(self) -> bool:
        try:
            return importlib.util.find_spec(self.module) is not None
        except ModuleNotFoundError:
            return False

    def contender(self, folder: Path) -> Contender:
        """folder: what `prepare` has returned."""
        return partial(self.train, folder / self.module)

    def far_path(self, workload: Workload, folder: Path) -> str:
        """`FarData.path` of the data that it reads, in a store that serves the parent of our shards or of `folder`."""
        return workload.shards.name if self.prepare is None else f"{folder.name}/{self.module}"

    def producers(self, setup: Setup) -> int:
        """Batches that are made at the same time."""
        return setup.workers if self.has_workers else 1


def installed(peers: Iterable[Peer]) -> list[Peer]:
    """Those that are installed. Names the others, each with the command that installs it."""
    found = []
    for peer in peers:
        if peer.is_installed:
            found.append(peer)
        else:
            console().print(f"{peer.name}: left out, it is not installed; {peer.install}", markup=False)
    return found


def prepare(peers: Iterable[Peer], workload: Workload, work: Path) -> Path:
    """Writes the data of the peers that need a format of their own, once, below `work`. Returns their folder."""
    with open_dataset(str(workload.shards)) as dataset:
        folder = work / f"peers-{dataset.fingerprint[:8]}"
    for peer in peers:
        target = folder / peer.module
        if peer.prepare is None or target.exists():
            continue
        partial_target = folder / f"{peer.module}.partial"
        shutil.rmtree(partial_target, ignore_errors=True)
        partial_target.mkdir(parents=True)
        run_fresh(peer.prepare, workload, partial_target.resolve())
        partial_target.rename(target)
    return folder


def _samples(workload: Workload) -> Iterator[Sample]:
    for video, (_, count, _) in enumerate(workload.videos):
        files = [workload.frame(video, index).read_bytes() for index in range(count)]
        yield {"video": video, "ends": np.cumsum([len(file) for file in files]), "frames": b"".join(files)}


def _shard_bytes(workload: Workload) -> int:
    """As large as our shards."""
    return max(Path(tar).stat().st_size for tar in workload.tars)


class SampleFrames:
    """Turns a stored `Sample` into (T, S, S, 3) uint8."""

    def __init__(self, config: Config) -> None:
        self._frames = OpenCvFrames(config)

    def __call__(self, sample: Sample) -> torch.Tensor:
        ends, frames = sample["ends"].tolist(), memoryview(sample["frames"])
        return self._frames.sample(
            int(sample["video"]), len(ends), lambda index: frames[ends[index - 1] if index else 0 : ends[index]]
        )


class TarFrames:
    """Turns all files of a video in a tar, by their extensions, into (T, S, S, 3) uint8."""

    def __init__(self, config: Config) -> None:
        self._frames = OpenCvFrames(config)

    def __call__(self, sample: Mapping[str, Any]) -> torch.Tensor:
        names = sorted(name for name in sample if name.endswith((".jpg", ".png")))
        return self._frames.sample(int(sample["__key__"]), len(names), lambda index: sample[names[index]])


def _one_thread_a_worker() -> None:
    """Forked workers keep this: OpenCV would else start threads for all cores in each of them."""
    cv2.setNumThreads(1)


def _endless(loader: DataLoader) -> Iterator[torch.Tensor]:
    """Epoch after epoch by the same workers."""
    return map(channels_first, itertools.chain.from_iterable(itertools.repeat(loader)))


# WebDataset


def webdataset_epoch(setup: Setup, addresses: list[str], *, repeats: bool = False) -> Iterator[torch.Tensor]:
    """Batches of one pass over tars, or of passes without end. It reads every frame of a video to use T of them."""
    import webdataset as wds

    _one_thread_a_worker()
    dataset = (
        wds.WebDataset(addresses, shardshuffle=False)
        .map(TarFrames(setup.train))
        .batched(setup.batch_size, collation_fn=torch.stack)
    )
    workers = min(setup.workers, len(addresses))
    loader = wds.WebLoader(
        dataset.repeat() if repeats else dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=WORKER_START,
    )
    return map(channels_first, loader)


def webdataset_far(setup: Setup, far: FarData) -> Iterator[torch.Tensor]:
    """By HTTP, with curl, as it does by default."""
    return webdataset_epoch(setup, [f"{far.address}/{far.path}/{Path(tar).name}" for tar in setup.workload.tars])


@contextmanager
def webdataset_train(_: Path, setup: Setup) -> Iterator[Batches]:
    yield webdataset_epoch(setup, setup.workload.tars, repeats=True)


# SPDL


@dataclass(frozen=True)
class _Task:
    """One video of a batch that is being made: what to decode, and where in the batch it goes."""

    batch_BTSSC: np.ndarray
    position: int
    draw: Any
    encoded: list[bytes]


@contextmanager
def spdl_train(_: Path, setup: Setup) -> Iterator[Batches]:
    """SPDL's pipeline of threads over our reader: one reads, the workers decode straight into the batch."""
    from spdl.pipeline import PipelineBuilder

    _one_thread_a_worker()
    frames, size = OpenCvFrames(setup.train), setup.batch_size
    with open_dataset(str(setup.workload.shards)) as dataset:

        def plans() -> Iterator[list[tuple[int, Any]]]:
            videos = itertools.cycle(range(len(dataset)))
            while True:
                batch = list(itertools.islice(videos, size))
                yield [(video, frames.draw(video, int(dataset.num_frames[video]))) for video in batch]

        def read(plan: list[tuple[int, Any]]) -> list[_Task]:
            files = dataset.read_many([(video, draw.indices) for video, draw in plan])
            batch_BTSSC = frames.empty(size)
            return [
                _Task(batch_BTSSC, position, draw, encoded)
                for position, ((_, draw), encoded) in enumerate(zip(plan, files, strict=True))
            ]

        def decode(task: _Task) -> np.ndarray:
            frames.show(task.draw, task.encoded, task.batch_BTSSC[task.position])
            return task.batch_BTSSC

        pipeline = (
            PipelineBuilder()
            .add_source(plans())
            .pipe(read, output_order="input")
            .disaggregate()
            .pipe(decode, concurrency=setup.workers, output_order="input")
            .aggregate(size)
            .add_sink(3)
            .build(num_threads=setup.workers + 1, max_failures=0)
        )
        with pipeline.auto_stop():
            yield (channels_first(torch.from_numpy(arrays[0])) for arrays in pipeline)


# LitData


def write_litdata(workload: Workload, folder: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(folder), chunk_bytes=_shard_bytes(workload))
    for number, sample in enumerate(_samples(workload)):
        cache[number] = sample
    cache.done()
    cache.merge()


def litdata_epoch(setup: Setup, source: str, **options: Any) -> DataLoader:
    """One pass over a folder or an address."""
    from litdata import StreamingDataLoader, StreamingDataset

    _one_thread_a_worker()
    dataset = StreamingDataset(source, transform=SampleFrames(setup.train), **options)
    return StreamingDataLoader(
        dataset,
        batch_size=setup.batch_size,
        num_workers=setup.workers,
        collate_fn=torch.stack,
        persistent_workers=True,
        multiprocessing_context=WORKER_START,
    )


def litdata_far(setup: Setup, far: FarData) -> Iterable[torch.Tensor]:
    """By S3: it does not read its format by HTTP. Its fast client would refuse a store without TLS."""
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"
    options = {"endpoint_url": far.address, **_BUCKET_KEYS}
    return litdata_epoch(setup, f"s3://{far.path}", cache_dir=str(far.cache), storage_options=options)


@contextmanager
def litdata_train(folder: Path, setup: Setup) -> Iterator[Batches]:
    yield _endless(litdata_epoch(setup, str(folder)))


# Streaming


def write_streaming(workload: Workload, folder: Path) -> None:
    from streaming import MDSWriter

    columns = {"video": "int", "ends": "ndarray:int64", "frames": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=_shard_bytes(workload)) as writer:
        for sample in _samples(workload):
            writer.write(sample)


def streaming_epoch(setup: Setup, local: str, remote: str | None = None) -> DataLoader:
    """One pass over a folder, or over an address that is fetched into an empty folder."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    class Videos(StreamingDataset):
        """Decodes what it reads."""

        def __init__(self, frames: SampleFrames, **options: Any) -> None:
            super().__init__(**options)
            self.frames = frames

        def __getitem__(self, at: int) -> torch.Tensor:
            return self.frames(super().__getitem__(at))

    _one_thread_a_worker()
    clean_stale_shared_memory()
    dataset = Videos(SampleFrames(setup.train), local=local, remote=remote, batch_size=setup.batch_size, shuffle=False)
    for stream in dataset.streams:
        # Forked workers would share the connection that fetched the index, and get each other's shards.
        stream._downloader.clean_up()
    return DataLoader(
        dataset,
        setup.batch_size,
        num_workers=setup.workers,
        collate_fn=torch.stack,
        persistent_workers=True,
        multiprocessing_context=WORKER_START,
    )


def streaming_far(setup: Setup, far: FarData) -> Iterable[torch.Tensor]:
    """By S3: it does not read by HTTP."""
    os.environ |= {"S3_ENDPOINT_URL": far.address, **_BUCKET_VARIABLES}
    return streaming_epoch(setup, str(far.cache), f"s3://{far.path}")


@contextmanager
def streaming_train(folder: Path, setup: Setup) -> Iterator[Batches]:
    yield _endless(streaming_epoch(setup, str(folder)))


# Megatron-Energon


def write_energon(workload: Workload, folder: Path) -> None:
    """Links to our tars, and Energon's index of them."""
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    names = []
    for tar in workload.tars:
        names.append(Path(tar).name)
        (folder / names[-1]).symlink_to(Path(tar).resolve())
    WebdatasetPreparator.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=1
    )
    dataset = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset"}
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.safe_dump(dataset), encoding="utf-8")


@contextmanager
def energon_train(folder: Path, setup: Setup) -> Iterator[Batches]:
    """Energon over the same tars, without a shuffle buffer: it reads every frame of a video to use T of them."""
    from megatron.energon import Cooker, DefaultTaskEncoder, WorkerConfig, get_loader, get_train_dataset, stateless

    _one_thread_a_worker()
    frames = TarFrames(setup.train)

    class Encoder(DefaultTaskEncoder):
        """Decodes in the workers what is read as bytes."""

        decoder = None
        cookers = (Cooker(stateless(lambda sample: sample)),)

        def encode_sample(self, sample: Mapping[str, Any]) -> torch.Tensor:
            return frames({"__key__": sample["__key__"].rpartition("/")[2], **_files(sample)})

        def batch(self, samples: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(samples)

        def encode_batch(self, batch: torch.Tensor) -> torch.Tensor:
            return batch

    dataset = get_train_dataset(
        folder,
        batch_size=setup.batch_size,
        shuffle_buffer_size=None,
        max_samples_per_sequence=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=setup.workers),
        task_encoder=Encoder(),
    )
    yield map(channels_first, get_loader(dataset))


def _files(sample: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: value for name, value in sample.items() if isinstance(value, bytes)}


WEBDATASET = Peer("WebDataset", "webdataset", _EXTRA, webdataset_train, epoch=webdataset_far)
SPDL = Peer("SPDL", "spdl", _EXTRA, spdl_train, has_workers=False)
LITDATA = Peer("LitData", "litdata", _EXTRA, litdata_train, write_litdata, litdata_far)
# It asks for numpy below 2.2 and transformers below 5, but runs with later ones.
_STREAMING = f"{_EXTRA} && pip install --no-deps mosaicml-streaming"
STREAMING = Peer("Streaming", "streaming", _STREAMING, streaming_train, write_streaming, streaming_far)
ENERGON = Peer("Energon", "megatron.energon", _EXTRA, energon_train, write_energon)
# By their names on the command line, those of `benchmarks.PEERS`.
PEERS = {"webdataset": WEBDATASET, "spdl": SPDL, "litdata": LITDATA, "streaming": STREAMING, "energon": ENERGON}
