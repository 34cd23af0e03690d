"""Writes the checkpoints of a run in the background and restores them into the engine. `saved.checkpoint` shows the
files and reads them.

    main thread, all ranks     copy what the rank has to host memory ─> go on training
    thread of each rank                                                 └─> write, hash, flush ─> report to rank 0
    thread of rank 0                                                        rename, remove old ones ─> report the end

A checkpoint is written under another name and renamed when the disk has all of it. The threads take part in no
collective: they report through a store of key and value.
"""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from torch.distributed import DistStoreError

from shards.files import sync
from text4vis.cluster import distributed
from text4vis.saved.checkpoint import BEST, STATE, CheckpointError, Digests, State, complete, tensor_file
from text4vis.training.engine import Engine
from text4vis.training.snapshot import File, HostMemory, Part, Pieces, Plan, write_pieces

logger = logging.getLogger("text4vis")

SPARE_BYTES = 1 << 20  # for logs, metrics and state.json
WRITE_MINUTES = 30  # that ranks wait for the slowest one's part


@dataclass(frozen=True)
class _Folder:
    """A checkpoint or the best weights on their way to disk.

    temporary: a name that no save had before: for a minute after a rename, another host's NFS may take the old name for
    the finished folder. state: without the digests, which follow from writing.
    """

    final: Path
    temporary: Path
    state: State
    files: dict[str, File]

    def make(self) -> None:
        """Makes the unfinished folder with files of their full size.

        The size comes first: NFS may overwrite another host's bytes with zeros where a file grows under it.
        """
        self.temporary.mkdir(parents=True)
        for name, file in self.files.items():
            with (self.temporary / name).open("xb") as stream:
                stream.truncate(file.layout.size)

    def finish(self, digests: dict[str, Digests]) -> None:
        """Gives the folder its name when the disk has all of it."""
        text = replace(self.state, files=digests).to_json()
        (self.temporary / STATE).write_text(text, encoding="utf-8")
        _replace_folder(self.temporary, self.final)


class Saves:
    """The checkpoints that a run writes while it goes on, at most one at a time.

    keep: how many stay. What fails in the background is raised by the next call, as CheckpointError, on every rank.
    Each rank holds its share of one checkpoint in host memory from the first save on (`docs/cluster.md`). Close it.
    """

    def __init__(self, engine: Engine, output: Path, keep: int) -> None:
        self._engine, self._output, self._keep = engine, output, keep
        self._memory = HostMemory()
        self._mark = distributed.from_main(lambda: secrets.token_hex(4))  # of this job
        # Rank 0 always answers, unless it ends; so the others wait for long.
        limit = timedelta(minutes=WRITE_MINUTES) if distributed.ranks().is_main else timedelta(days=9)
        self._store = distributed.new_store(limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save", initializer=distributed.use_device)
        self._running: Future[None] | None = None
        self._count = 0

    @property
    def memory_bytes(self) -> int:
        """Host memory that this rank's copies take, from the first save on."""
        return self._memory.nbytes

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being written."""
        return self._running is None or self._running.done()

    def start(self, state: State, *, best: bool = False) -> None:
        """Saves the engine as it is now. best: also as OUT/checkpoints/best, or with solver.ema the averages.

        Waits for the save before. Returns when the tensors are copied. Collective. Raises CheckpointError, also where
        the disk has no room.
        """
        self.wait()
        self._count += 1
        plan = Plan(self._engine)
        step = replace(state, loss_scaler=self._engine.loss_scaler_state())
        folders = [self._folder(BEST, state, plan.best())] if best else []
        folders.append(self._folder(f"step-{state.step:08d}", step, plan.checkpoint()))
        distributed.from_main(lambda: _make_all(folders))
        held = self._memory.hold(plan.shards)
        writes = {
            folder.temporary / name: plan.pieces(file, held)
            for folder in folders
            for name, file in folder.files.items()
        }
        self._running = self._thread.submit(self._save, f"save-{self._count}", folders, writes)

    def _folder(self, name: str, state: State, files: dict[str, File]) -> _Folder:
        place = self._output / "checkpoints"
        return _Folder(place / name, place / f".{name}.{self._mark}-{self._count}.partial", state, files)

    def check(self) -> None:
        """Raises what has failed in the background, without waiting."""
        if self.is_idle:
            self.wait()

    def wait(self) -> None:
        """Waits until nothing is written any more. Raises what has failed."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def finish(self) -> None:
        """`wait` for a run that ends: no rank goes on before all know how it ended. Collective."""
        self.wait()
        distributed.barrier()

    def close(self) -> None:
        """Waits for what is being written, whatever comes of it, and ends the thread."""
        self._thread.shutdown()

    def _save(self, key: str, folders: list[_Folder], writes: dict[Path, Pieces]) -> None:
        """In the thread: writes this rank's share. Rank 0 then finishes, and tells the others how it ended."""
        self._memory.wait()
        report: dict[str, object] = {}
        try:
            parts = {path: write_pieces(path, pieces) for path, pieces in writes.items()}
            report["parts"] = {str(path): [asdict(part) for part in found] for path, found in parts.items()}
        except CheckpointError as error:
            report["error"] = str(error)
        except Exception as error:  # the other ranks must not wait for a report that never comes
            report["error"] = f"{folders[-1].final}: {type(error).__name__}: {error}"
        if distributed.ranks().is_main:
            failure = self._finish(key, folders, report)
            if self._store is not None:
                self._store.set(f"{key}-end", failure)
        else:
            assert self._store is not None
            self._store.set(f"{key}-of-{distributed.ranks().rank}", json.dumps(report))
            failure = self._store.get(f"{key}-end").decode()
        if failure:
            raise CheckpointError(failure)

    def _finish(self, key: str, folders: list[_Folder], own: dict) -> str:
        """Rank 0: names the folders once all ranks have written. Returns what failed, or nothing."""
        reports = [own]
        for rank in range(1, distributed.ranks().world_size):
            assert self._store is not None
            try:
                reports.append(json.loads(self._store.get(f"{key}-of-{rank}")))
                self._store.delete_key(f"{key}-of-{rank}")
            except DistStoreError:
                return f"{folders[-1].final}: rank {rank} has not written its part for {WRITE_MINUTES} minutes"
        if failures := [report["error"] for report in reports if "error" in report]:
            return failures[0]
        try:
            for folder in folders:
                folder.finish(
                    {name: _joined(folder.temporary / name, file, reports) for name, file in folder.files.items()}
                )
            for old in complete(self._output)[: -self._keep]:
                shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            return (
                f"{error.filename or folders[-1].final}: cannot be written ({error.strerror}); free space on the disk"
            )
        except Exception as error:
            return f"{folders[-1].final}: {type(error).__name__}: {error}"
        logger.info("saved step %d", folders[-1].state.step)
        return ""


def _make_all(folders: list[_Folder]) -> None:
    """Rank 0: makes the unfinished folders. Raises CheckpointError where the disk has no room for them or fails."""
    place = folders[0].final.parent
    try:
        _clear_leftovers(place)
        size = sum(file.layout.size for folder in folders for file in folder.files.values())
        _require_room(place, size, " and ".join(folder.final.name for folder in folders))
        for folder in folders:
            folder.make()
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or place}: cannot be written ({error.strerror}); name another --output"
        ) from None


def _joined(path: Path, file: File, reports: list[dict]) -> Digests:
    """The digests of a file from those of all ranks' parts. Raises RuntimeError unless these are the whole file."""
    parts = sorted((Part(**part) for report in reports for part in report["parts"][str(path)]), key=lambda p: p.start)
    starts, stops = [part.start for part in parts], [part.stop for part in parts]
    if [*starts, file.layout.size] != [0, *stops]:
        raise RuntimeError(f"the ranks' parts of {path.name} are not the whole file")
    return [(part.stop, part.sha256) for part in parts]


def load(engine: Engine, folder: Path, state: State) -> None:
    """Gives the engine the fp32 weights and moments of a checkpoint of `save`. Every rank calls it and reads."""
    opened = {name: safe_open(str(folder / tensor_file(name)), "pt") for name in ("model", *engine.moment_names)}
    engine.restore(opened["model"].get_tensor, lambda key, name: opened[key].get_tensor(name), state.updates)
    engine.restore_loss_scaler(state.loss_scaler)


def check_room(output: Path, keep: int, weights: int, moments: int) -> None:
    """Raises CheckpointError when the disk has no room for `keep` checkpoints, the best, and one unfinished.

    weights, moments: their bytes in fp32.
    """
    missing = max(0, keep - len(complete(output))) + 1
    has_best = (output / "checkpoints" / BEST).exists()
    _require_room(output, missing * (weights + moments) + (0 if has_best else weights), f"{missing} more checkpoints")


def gather_weights(engine: Engine) -> dict[str, Tensor]:
    """The whole model in fp32 on rank 0 (empty elsewhere), whatever the ZeRO stage; with solver.ema the averages.
    Collective."""
    main = distributed.ranks().is_main
    return {name: tensor.cpu().clone() for name, tensor in engine.named_results() if main}


def _replace_folder(temporary: Path, final: Path) -> None:
    """Makes the finished folder durable and gives it its name; an older folder of that name is removed."""
    for file in temporary.iterdir():
        sync(file)
    old = final.with_name(f".{final.name}.old")
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Removes what a job leaves that is killed while it writes: unfinished folders, and an old one that was replaced.

    An old folder whose successor did not get the name yet gets its name back.
    """
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for old in folder.glob(".*.old"):
        final = old.with_name(old.name[1 : -len(".old")])
        if final.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(final)


def _require_room(place: Path, size: int, what: str) -> None:
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < size + SPARE_BYTES:
        raise CheckpointError(
            f"{place}: {what} need {(size + SPARE_BYTES) / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; free some, lower "
            "logging.keep_checkpoints, or give another --output"
        )
