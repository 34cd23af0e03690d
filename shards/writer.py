"""Builds a data set of tar shards from a list of videos: in parallel, resumable, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shards.annotations import Annotation
from shards.building import FOLDER, FinishedShard, Workspace, clean_up, publish
from shards.feed import OrderedFeed
from shards.format import (
    MANIFEST,
    Manifest,
    ShardError,
    ShardInfo,
    shard_name,
    video_key,
)
from shards.index import Index, open_index, read_local_manifest
from shards.plan import epoch_order
from shards.shardfile import ShardFile
from shards.sources import Chunk, InputError, SourceOptions, read_source

Progress = Callable[[int, int, int], object]

COPY_WORKERS = 2


def build_shards(
    annotations: Sequence[Annotation],
    *,
    root: str | Path,
    labels: Sequence[str],
    output: str | Path,
    image_template: str = "img_{:05d}.jpg",
    shard_bytes: int = 10**9,
    max_frames: int | None = None,
    short_side: int | None = None,
    quality: int | None = None,
    seed: int = 0,
    workers: int | None = None,
    on_error: str = "fail",
    append: bool = False,
    replace_unfinished: bool = False,
    store: str = "frames",
    fps: float | None = None,
    gop: int | None = None,
    progress: Progress | None = None,
    list_name: str | Path = "annotations",
) -> Manifest:
    """Packs the videos of a list into shards below `output` and returns the manifest.

    The videos are shuffled once by `seed`. The bytes depend on the input and the settings only: not on `workers`, nor
    on how often the build was stopped and run again (it goes on after the last finished shard). A shard is closed once
    it has reached `shard_bytes`, as `webdataset.ShardWriter` does, so it is larger by a part of one video.

    Frames of a folder are numbered from 1, or from 0 where frame `num_frames` is missing and frame 0 is there. Their
    bytes are kept unless short_side (pixels) or quality is given; image_template, max_frames, fps, gop: see
    `SourceOptions`. store: "frames", or "video" for encoded videos, as they are without gop. workers: threads; one a
    core by default, two where frames are copied as they are: more help on network mounts only. on_error: "skip" leaves
    bad videos out and records them in `Manifest.skipped`. append: adds videos as new shards to a finished data set.
    replace_unfinished: an unfinished build of other input in the folder is deleted, instead of an error. progress:
    called with the videos, frames and bytes that were added since its last call. list_name: the list's file, for
    messages.

    Memory: about 256 MiB of waiting frames, however long the videos are; stored videos are read whole. Raises
    ShardError (bad input, a data set in the way, a full disk) and ValueError (bad settings). Finished shards are kept.
    """
    options = SourceOptions(store, image_template, max_frames, short_side, quality, fps, gop)
    if on_error not in ("fail", "skip"):
        raise ValueError(f"on_error: expected 'fail' or 'skip', got {on_error!r}")
    for name, value in (("shard_bytes", shard_bytes), ("workers", 1 if workers is None else workers)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    root, output, labels = Path(root), Path(output), list(labels)
    _check_annotations(annotations, labels, list_name, append)
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; give the folder that the list's paths begin in as --root")
    record = {
        **options.record(),
        "shard_bytes": shard_bytes,
        "seed": seed,
        "on_error": on_error,
        "videos": len(annotations),
        "list_sha256": _list_digest(annotations),
    }
    build = _Build(
        annotations, root, labels, output, options, record, append, replace_unfinished, progress or _silent, list_name
    )
    return _run(build, workers or _default_workers(annotations, options))


def _silent(videos: int, frames: int, size: int) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class _Build:
    """The checked arguments of `build_shards`. record: the settings that the manifest keeps."""

    annotations: Sequence[Annotation]
    root: Path
    labels: list[str]
    output: Path
    options: SourceOptions
    record: dict[str, Any]
    append: bool
    replace_unfinished: bool
    progress: Progress
    list_name: str | Path


def _run(build: _Build, workers: int) -> Manifest:
    """The finished data set, built now or before. Raises ShardError."""
    output, existing = build.output, _existing_manifest(build.output)
    if existing is not None and _is_complete(existing, build.record, build.labels, output, build.append):
        _remove_leftovers(output, existing, build.record)
        return existing
    if existing is None:
        _check_new(output, build.append)
    try:
        with Workspace(output) as workspace:
            if _existing_manifest(output) != existing:
                raise ShardError(f"{output}: another process finished a build here just now; run again")
            index = None if existing is None else _open_for_append(build, existing)
            return _Builder(workspace, build, index).run(workers)
    except OSError as error:
        # Sources raise InputError, so this error comes from the output.
        raise ShardError(
            f"{error.filename or output}: {error.strerror or error}; make room, make the folder writable or name "
            "another --output, then run the same command again: finished shards are kept"
        ) from error


class _Builder:
    """One build: the videos in their order, the shards that are finished, and the one that is being written."""

    def __init__(self, workspace: Workspace, build: _Build, existing: Index | None) -> None:
        self.workspace, self.build, self.existing = workspace, build, existing
        self.annotations = build.annotations
        self.order_N = epoch_order(len(build.annotations), build.record["seed"], 0)
        self.finished: list[FinishedShard] = []
        self.skipped: list[dict[str, Any]] = []  # since the last finished shard
        old = existing.manifest if existing else None
        self.first_shard = len(old.shards) if old else 0
        self.num_videos = old.num_videos if old else 0
        self.num_members = old.num_members if old else 0
        self.name_bytes = len(existing.names) if existing else 0
        self.multi_label = old.multi_label if old else any(len(item.labels) != 1 for item in build.annotations)

    def run(self, workers: int) -> Manifest:
        """Builds the shards that are not there yet, then the data set."""
        start = self._resume()
        shard: ShardFile | None = None
        feed = OrderedFeed(
            self._produce, lambda chunk: chunk.bytes, start=start, stop=len(self.annotations), workers=workers
        )
        try:
            with feed:
                for position in range(start, len(self.annotations)):
                    if shard is None:
                        shard = self._new_shard()
                    self._add_video(shard, feed.take(position), self.annotations[self.order_N[position]])
                    if shard.position >= self.build.record["shard_bytes"]:
                        self._finish(shard, position + 1)
                        shard = None
            if shard is not None and shard.videos:
                self._finish(shard, len(self.annotations))
                shard = None
            return self._publish()
        finally:
            if shard is not None:
                shard.discard()

    def _resume(self) -> int:
        """Takes over what an earlier run finished. Returns the position in the order to go on from."""
        settings = {
            "record": self.build.record,
            "classes_sha256": hashlib.sha256(json.dumps(self.build.labels).encode()).hexdigest(),
            "appends_to": self.existing.manifest.fingerprint if self.existing else None,
            "encoders": _encoder_versions(self.build.options, self.annotations),
        }
        begun = self.workspace.settings()
        if begun is not None:
            self.finished = self.workspace.finished_shards(self.first_shard)
        if begun is None or not self.finished:
            self.workspace.begin(settings)
            return 0
        difference = _difference(begun, settings, any(shard.skipped for shard in self.finished))
        if difference and self.build.replace_unfinished:
            self.workspace.begin(settings)
            for shard in self.finished:
                (self.workspace.output / shard.info.name).unlink()
            self.finished = []
            return 0
        if difference:
            raise ShardError(
                f"{self.workspace.output}: holds an unfinished build of other input ({difference}); run that one to "
                f"its end, choose another --output, or delete {self.workspace.path} and the shards of that build"
            )
        for shard in self.finished:
            self.num_videos += shard.info.videos
            self.num_members += shard.info.members
            self.name_bytes += shard.name_bytes
            self.build.progress(shard.info.videos + len(shard.skipped), shard.info.members, shard.info.bytes)
        return self.finished[-1].next_position

    def _produce(self, position: int) -> Iterator[Chunk]:
        return read_source(self.build.root, self.annotations[self.order_N[position]], self.build.options)

    def _new_shard(self) -> ShardFile:
        number = self.first_shard + len(self.finished)
        part = self.workspace.part(number)
        content, multi_label = self.build.options.store, self.multi_label
        return ShardFile(number, part, content, self.num_members, self.name_bytes, multi_label=multi_label)

    def _add_video(self, shard: ShardFile, chunks: Iterator[Chunk], annotation: Annotation) -> None:
        start = shard.position
        key = video_key(self.num_videos + len(shard.videos))
        try:
            members = shard.add_video(key, chunks, annotation, self.build.labels)
        except InputError as error:
            if self.build.record["on_error"] == "fail":
                place = f"{self.build.list_name}:{annotation.line}: {str(self.build.root / error.path)!r}"
                raise ShardError(f"{place}: {error.reason}; {error.fix}") from None
            shard.truncate(start)
            self.skipped.append({"name": annotation.name, "line": annotation.line, "reason": str(error)})
            self.build.progress(1, 0, 0)
        else:
            self.build.progress(1, members, shard.position - start)

    def _finish(self, shard: ShardFile, next_position: int) -> None:
        tables = shard.close()
        info = ShardInfo(shard_name(shard.number), shard.position, len(tables["videos"]), len(tables["members"]))
        finished = FinishedShard(info, len(tables["names"]), next_position, self.skipped)
        self.workspace.commit(shard.number, finished, tables)
        self.finished.append(finished)
        self.skipped = []
        self.num_videos += info.videos
        self.num_members += info.members
        self.name_bytes += finished.name_bytes

    def _publish(self) -> Manifest:
        skipped = [entry for shard in self.finished for entry in shard.skipped] + self.skipped
        if not self.finished:
            first = min(skipped, key=lambda entry: entry["line"])
            kinds = Counter(entry["reason"].replace(entry["name"], "NAME") for entry in skipped).most_common(3)
            counts = "; ".join(f"{count} x {kind}" for kind, count in kinds)
            raise ShardError(
                f"{self.build.list_name}:{first['line']}: none of the {len(skipped)} videos could be stored, the first "
                f"is {first['name']!r} ({counts}); check --root and --image-template"
            )
        return publish(
            self.workspace,
            self.finished,
            self.existing,
            content=self.build.options.store,
            classes=self.build.labels,
            record=self.build.record,
            skipped=sorted(skipped, key=lambda entry: entry["line"]),
            multi_label=self.multi_label,
        )


def _default_workers(annotations: Sequence[Annotation], options: SourceOptions) -> int:
    """One thread a core for decoding and encoding. Copying frames is bound by Python's lock instead: more than two
    threads take it from each other (four are a third slower than two on two cores, sixteen a half)."""
    copies = not options.reencodes and all(annotation.num_frames is not None for annotation in annotations)
    cores = len(os.sched_getaffinity(0))
    return min(cores, COPY_WORKERS) if copies else cores


def _check_annotations(
    annotations: Sequence[Annotation], labels: Sequence[str], list_name: str | Path, append: bool
) -> None:
    if not annotations:
        raise ShardError(f"{list_name}: no videos; give a list with at least one")
    for annotation in annotations:
        wrong = next((label for label in annotation.labels if not 0 <= label < len(labels)), None)
        if wrong is not None:
            raise ShardError(
                f"{list_name}:{annotation.line}: label {wrong} of {annotation.name!r} has no class: the class list has "
                f"the ids 0 to {len(labels) - 1}; correct the label or add the class"
            )
    if not append and not any(annotation.labels for annotation in annotations):
        raise ShardError(f"{list_name}: none of the {len(annotations)} videos has a label; write them in place of `-`")


def _list_digest(annotations: Sequence[Annotation]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(annotations), 4096):
        part = annotations[start : start + 4096]
        digest.update("".join(f"{item.name}\0{item.num_frames}\0{item.label}\n" for item in part).encode())
    return digest.hexdigest()


def _encoder_versions(options: SourceOptions, annotations: Sequence[Annotation]) -> dict[str, str]:
    """Versions of the libraries that the stored bytes depend on."""
    decodes = any(annotation.num_frames is None for annotation in annotations)
    decodes = options.gop is not None or (options.store == "frames" and decodes)
    packages = [*(["pillow"] if options.reencodes or decodes else []), *(["av"] if decodes else [])]
    return {package: version(package) for package in packages}


def _difference(begun: dict[str, Any], wanted: dict[str, Any], has_skipped: bool) -> str | None:
    """The first setting in which two builds differ, None if the second can go on where the first stopped."""
    old, new = ({**settings.get("record", {}), **settings} for settings in (begun, wanted))
    for key in new:
        # What was built under "fail" is the same under "skip"; the other way round only if nothing was left out.
        if key == "record" or (key == "on_error" and not has_skipped):
            continue
        if old.get(key) != new[key]:
            return f"{key} was {old.get(key)!r} and is {new[key]!r}"
    return None


def _existing_manifest(output: Path) -> Manifest | None:
    return read_local_manifest(output) if (output / MANIFEST).exists() else None


def _check_new(output: Path, append: bool) -> None:
    if append:
        raise ShardError(f"{output}: no finished data set to append to; build it first, without --append")
    if output.exists() and not output.is_dir():
        raise ShardError(f"{output}: not a folder; choose another --output")
    if output.is_dir() and not (output / FOLDER).exists() and any(output.iterdir()):
        raise ShardError(f"{output}: holds other files; choose an empty or new folder as --output")


def _is_complete(manifest: Manifest, record: dict[str, Any], labels: list[str], output: Path, append: bool) -> bool:
    """Whether the data set holds this build already. Raises ShardError if it is another and not to be appended."""
    runs = manifest.build.get("runs", [])
    # A build that has left nothing out is what the other `on_error` would have made.
    free = {} if manifest.skipped else {"on_error": record["on_error"]}
    if record in [run | free for run in runs] and manifest.classes[: len(labels)] == labels:
        return True
    if append:
        return False
    old = {**(runs[0] if runs else {}), "classes": manifest.classes}
    new = {**record, "classes": labels}
    difference = next((key for key in new if old.get(key) != new[key]), "runs")
    raise ShardError(
        f"{output}: holds a finished data set of other input or settings ({difference} differs); choose another "
        "--output, delete that data set, or add to it with --append"
    )


def _remove_leftovers(output: Path, manifest: Manifest, record: dict[str, Any]) -> None:
    """Clears what a build left that was killed between its last two steps."""
    if (output / FOLDER).exists():
        with Workspace(output) as workspace:
            begun = workspace.settings()
            if begun is None or begun.get("record") == record:
                clean_up(workspace, manifest)


def _open_for_append(build: _Build, manifest: Manifest) -> Index:
    """Index of the data set that videos are added to. Raises ShardError when they do not fit to it."""
    output, labels, store = build.output, build.labels, build.options.store
    if manifest.content != store:
        raise ShardError(f"{output}: stores {manifest.content}, not {store}; append with --store {manifest.content}")
    if labels[: len(manifest.classes)] != manifest.classes:
        pairs = zip(manifest.classes, [*labels, *[None] * len(manifest.classes)], strict=False)
        number, (old, new) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ShardError(
            f"{output}: class {number} is {old!r} there and {new!r} in the class list; classes can be added at the end "
            "but not changed"
        )
    several = next((item for item in build.annotations if len(item.labels) != 1), None)
    if several is not None and not manifest.multi_label:
        raise ShardError(
            f"{build.list_name}:{several.line}: {several.name!r} has {len(several.labels)} labels, but every video in "
            f"{output} has one; build all videos together into another --output"
        )
    index = open_index(str(output), manifest, {role: output / entry["file"] for role, entry in manifest.index.items()})
    text = index.names.tobytes()
    starts = index.videos["name_start"].tolist()
    known = {text[start : start + size] for start, size in zip(starts, index.videos["name_size"].tolist(), strict=True)}
    for annotation in build.annotations:
        if annotation.name.encode() in known:
            raise ShardError(
                f"{build.list_name}:{annotation.line}: {annotation.name!r} is in {output} already; remove the line"
            )
    return index
