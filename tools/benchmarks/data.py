"""Data to measure on: frame folders and their shards, and an index as large as that of Kinetics-400.

Everything is made once below a work folder and reused by later runs. Frames are as they are usually stored: short side
256, JPEG quality 90, about 20 KB each.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards.annotations import Annotation
from shards.format import (
    BLOCK_BYTES,
    INDEX_ROLES,
    MANIFEST,
    MEMBER_DTYPE,
    VIDEO_DTYPE,
    Manifest,
    ShardError,
    ShardInfo,
    fingerprint,
    index_file,
    shard_name,
    video_crc32,
)
from shards.images import encode_jpeg
from shards.index import open_index, read_local_manifest
from shards.list_lines import VIDEO_EXTENSIONS
from shards.reader import open_dataset
from shards.video import iter_frames
from shards.writer import build_shards
from text4vis.common.progress import track
from text4vis.data.augmentation import scaled_size

SHORT_SIDE = 256
QUALITY = 90
TEMPLATE = "img_{:05d}.jpg"
_WIDTH = 340  # of frames cut from photographs: the width of most Kinetics videos
_PHOTOGRAPHS = 8  # different clips made from photographs
_ZOOM = 2.0  # gives JPEGs of about 20 KB
_SHARDS = 32  # so that every worker of a loader that splits by shard has some
_INDEX_SHARD_BYTES = 10**9


@dataclass(frozen=True)
class Workload:
    """A data set twice: as shards, and as the frame folders below `root` that the shards were built from.

    videos: (folder, frames, label) in the order of the shards. first: number of a folder's first frame.
    """

    shards: Path
    root: Path
    template: str
    first: int
    videos: list[tuple[str, int, int]]

    @property
    def tars(self) -> list[str]:
        return [str(path) for path in sorted(self.shards.glob("*.tar"))]

    @property
    def annotations(self) -> list[Annotation]:
        return [Annotation(name, count, label, line) for line, (name, count, label) in enumerate(self.videos, start=1)]

    def frame(self, video: int, index: int) -> Path:
        """File of a video's frame, counted from 0."""
        return self.root / self.videos[video][0] / self.template.format(self.first + index)


def open_workload(shards: Path, root: Path) -> Workload:
    """Opens an existing data set. Raises ShardError if the folders are not those that it was built from."""
    with open_dataset(str(shards)) as dataset:
        counts, labels = dataset.num_frames.tolist(), dataset.labels.tolist()
        videos = [(dataset.name(sample), counts[sample], labels[sample]) for sample in range(len(dataset))]
        if dataset.content(0) != "frames":
            raise ShardError(f"{shards}: stores videos; the benchmark needs a data set of frames")
    runs = read_local_manifest(shards).build.get("runs", [])
    template = runs[0]["image_template"] if runs else TEMPLATE
    first = 0 if (root / videos[0][0] / template.format(0)).exists() else 1
    workload = Workload(shards, root, template, first, videos)
    if not workload.frame(0, 0).exists():
        raise ShardError(f"{workload.frame(0, 0)}: not found; give the folder that {shards} was built from as --frames")
    return workload


def make_workload(work: Path, *, num_videos: int, num_frames: int, clips: Path | None) -> Workload:
    """Makes frame folders and shards below `work`: `num_videos` videos of `num_frames` frames each.

    clips: a folder of video files to cut the frames from; without it they pan over scikit-learn's two photographs.
    Raises ShardError.
    """
    files = clip_files(clips)
    recipe = [num_videos, num_frames, SHORT_SIDE, QUALITY, [(path.name, path.stat().st_size) for path in files]]
    folder = work / f"data-{hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]}"
    if not (folder / "shards" / MANIFEST).exists():
        shutil.rmtree(folder, ignore_errors=True)
        sources = map(_clip_frames, files) if files else photograph_frames(num_frames)
        base = list(track(sources, "decoding clips", len(files) or _PHOTOGRAPHS))
        annotations = _write_folders(folder / "frames", base, num_videos, num_frames)
        total_bytes = sum(path.stat().st_size for path in (folder / "frames").rglob("*.jpg"))
        build_shards(
            annotations,
            root=folder / "frames",
            labels=[f"class {label}" for label in range(len(base))],
            output=folder / "shards",
            image_template=TEMPLATE,
            shard_bytes=max(1, total_bytes // _SHARDS),
        )
    return open_workload(folder / "shards", folder / "frames")


def clip_files(clips: Path | None) -> list[Path]:
    if clips is None:
        return []
    files = sorted(path for path in clips.iterdir() if path.suffix.lower() in VIDEO_EXTENSIONS)
    if not files:
        raise ShardError(f"{clips}: holds no video files; give a folder of clips as --clips")
    return files


def _clip_frames(path: Path) -> list[bytes]:
    return [_encode(Image.fromarray(frame_HWC)) for frame_HWC in iter_frames(path)]


def _encode(image: Image.Image) -> bytes:
    height, width = scaled_size(image.height, image.width, SHORT_SIDE)
    return encode_jpeg(image.resize((width, height), Image.Resampling.BICUBIC), None, QUALITY)


def photograph_frames(num_frames: int) -> Iterator[list[bytes]]:
    """Clips that pan over a photograph, with a little noise."""
    try:
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise ShardError("scikit-learn is not installed; pip install scikit-learn, or give --clips DIR") from None
    for number in range(_PHOTOGRAPHS):
        rng = np.random.default_rng(number)
        photograph = Image.fromarray(load_sample_image(("china.jpg", "flower.jpg")[number % 2]))
        size = (int(photograph.width * _ZOOM), int(photograph.height * _ZOOM))
        photograph_HWC = np.asarray(photograph.resize(size, Image.Resampling.BICUBIC))
        top, top_end = rng.integers(0, photograph_HWC.shape[0] - SHORT_SIDE, 2).tolist()
        left, left_end = rng.integers(0, photograph_HWC.shape[1] - _WIDTH, 2).tolist()
        frames = []
        for share in np.linspace(0, 1, num_frames).tolist():
            y, x = int(top + share * (top_end - top)), int(left + share * (left_end - left))
            window = photograph_HWC[y : y + SHORT_SIDE, x : x + _WIDTH]
            noisy = np.clip(window + rng.normal(0, 1, window.shape), 0, 255).astype(np.uint8)
            frames.append(_encode(Image.fromarray(noisy)))
        yield frames


def _write_folders(root: Path, base: Sequence[list[bytes]], num_videos: int, num_frames: int) -> list[Annotation]:
    """Writes the videos. Video v shows clip v modulo the number of clips, from another start each time."""
    annotations = []
    for video in track(range(num_videos), "writing frames"):
        label, frames = video % len(base), base[video % len(base)]
        start = video // len(base) * 37
        folder = root / f"class_{label}" / f"video_{video:05d}"
        folder.mkdir(parents=True)
        for number in range(num_frames):
            (folder / TEMPLATE.format(number + 1)).write_bytes(frames[(start + number) % len(frames)])
        annotations.append(Annotation(str(folder.relative_to(root)), num_frames, label, video + 1))
    return annotations


def multiplied(shards: Path, work: Path, *, num_videos: int, num_frames: int) -> Path:
    """Writes a data set below `work` that indexes `num_videos` videos x `num_frames` frames, all of them readable.

    Its tars, as many as shards of 1 GB would be, are links to the tars of `shards` in turn. Videos, and the frames of a
    video, are the stored ones, repeated as often as needed.
    """
    manifest = read_local_manifest(shards)
    folder = work / f"index-{manifest.fingerprint[:8]}-{num_videos}x{num_frames}"
    if (folder / MANIFEST).exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "index").mkdir(parents=True)
    index = open_index(str(shards), manifest, {role: shards / manifest.index[role]["file"] for role in INDEX_ROLES})
    frame_bytes = int(index.members["size"].mean())
    count = max(1, round(num_videos * num_frames * (frame_bytes + BLOCK_BYTES) / _INDEX_SHARD_BYTES))
    edges = np.linspace(0, num_videos, count + 1).astype(int)
    videos_N = np.zeros(num_videos, VIDEO_DTYPE)
    infos = []
    members_path = folder / "index" / "members.npy"
    with members_path.open("wb+") as stream:
        np.lib.format.write_array_header_1_0(
            stream,
            {
                "descr": np.lib.format.dtype_to_descr(MEMBER_DTYPE),
                "fortran_order": False,
                "shape": (num_videos * num_frames,),
            },
        )
        for number in track(range(count), "writing a large index", unit="shard"):
            first, last = int(edges[number]), int(edges[number + 1])
            source = number % len(manifest.shards)
            stored = index.videos[index.videos["shard"] == source]
            rows_VF = np.stack([_frame_rows(index.members, video, num_frames) for video in stored])
            chosen = np.arange(last - first) % len(stored)
            videos_N[first:last] = stored[chosen]
            videos_N["crc32"][first:last] = np.array([video_crc32(rows_F) for rows_F in rows_VF], np.uint32)[chosen]
            stream.write(rows_VF[chosen].tobytes())
            videos_N["shard"][first:last] = number
            target = manifest.shards[source]
            (folder / shard_name(number)).symlink_to((shards / target.name).resolve())
            infos.append(ShardInfo(shard_name(number), target.bytes, last - first, (last - first) * num_frames))
    names = [f"class_{label:03d}/video_{video:011d}" for video, label in enumerate(videos_N["label"].tolist())]
    name_bytes = len(names[0])
    videos_N["first_member"] = np.arange(num_videos, dtype=np.uint64) * np.uint64(num_frames)
    videos_N["num_members"] = videos_N["num_frames"] = num_frames
    videos_N["name_start"] = np.arange(num_videos, dtype=np.uint64) * np.uint64(name_bytes)
    videos_N["name_size"] = name_bytes
    names_U = np.frombuffer("".join(names).encode(), np.uint8)
    identity = fingerprint(videos_N, names_U, manifest.classes, manifest.content)
    members_path.rename(folder / index_file("members", identity))
    np.save(folder / index_file("videos", identity), videos_N)
    np.save(folder / index_file("names", identity), names_U)
    entries = {role: _index_entry(folder, index_file(role, identity)) for role in INDEX_ROLES}
    large = Manifest(
        manifest.content, manifest.classes, num_videos, num_videos * num_frames, identity, infos, entries, {}
    )
    os.sync()  # writing a gigabyte to the disk later would disturb the measurement
    (folder / MANIFEST).write_text(large.to_json(), encoding="utf-8")
    return folder


def _frame_rows(members: np.ndarray, video: np.void, num_frames: int) -> np.ndarray:
    first = int(video["first_member"])
    return members[first + np.arange(num_frames) % int(video["num_members"])]


def _index_entry(folder: Path, file: str) -> dict[str, str | int]:
    crc32, size = 0, 0
    with (folder / file).open("rb") as stream:
        while chunk := stream.read(1 << 20):
            crc32, size = zlib.crc32(chunk, crc32), size + len(chunk)
    return {"file": file, "bytes": size, "crc32": crc32}
