"""Makes a mounted file system fail below real programs, so that the kernel itself reports it.

    python tests/support/fail_fuse.py [--tries 4] [--only NAME …]

fail_disk.py changes the calls that a process makes through the C library. Here mapped files fail as well, a read can
take two seconds, and a disk can be full only when a file is synchronised or closed, as on NFS: what was written to the
file since it was last synchronised or closed is lost then. Programs are judged as there, but for one thing: a mapped
file whose disk fails ends a process with SIGBUS (see docs/reliability.md), and it must say so.

Needs Linux, root, `pip install mfusepy` and Debian's libfuse3-3.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fail_disk import Program, judge, programs, run, spread
from mfusepy import FUSE, FuseOSError, Operations
from shard_data import serve

from shards.files import write_atomically

SLOW_SECONDS = 2.0
UTIME_NOW = (1 << 30) - 1  # of utimensat(2)


@dataclass(frozen=True)
class Fault:
    """Calls of one kind (read, write, fsync, flush) on files whose path holds `part`.

    The first `after` succeed. Of the next `count` (None: all) each takes `seconds` longer and, if `code` is not 0,
    fails with it. flush is the close of a file that is open for writing.
    """

    call: str
    part: str
    code: int = 0
    after: int = 0
    count: int | None = 1
    seconds: float = 0


NONE = Fault("", "")


class Passing(Operations):
    """Shows the folder `back`, with the fault that the file `control` holds; notes each call in `log`."""

    use_ns = True

    def __init__(self, back: Path, control: Path, log: Path) -> None:
        self.back, self.control, self.log = back, control, log
        self.fault_text, self.calls = "", 0
        self.kept_bytes: dict[int, int] = {}  # by inode: what a failing fsync or flush does not lose

    def at(self, path: str) -> Path:
        return self.back / path.removeprefix("/")

    def strike(self, call: str, path: str, handle: int) -> None:
        """Fails or waits if the fault is meant for this call."""
        text = self.control.read_text()
        if text != self.fault_text:
            self.fault_text, self.calls = text, 0
        with self.log.open("a") as log:
            print(call, path, file=log)
        fault = Fault(**json.loads(text))
        if call != fault.call or fault.part not in path:
            return
        place, self.calls = self.calls - fault.after, self.calls + 1
        if place < 0 or (fault.count is not None and place >= fault.count):
            return
        time.sleep(fault.seconds)
        if fault.code:
            if call in ("fsync", "flush"):
                os.truncate(self.at(path), self.kept_bytes.get(os.fstat(handle).st_ino, 0))
            raise FuseOSError(fault.code)

    def keep(self, handle: int) -> None:
        found = os.fstat(handle)
        self.kept_bytes[found.st_ino] = found.st_size

    def read(self, path, size, offset, fh):
        self.strike("read", path, fh)
        return os.pread(fh, size, offset)

    def write(self, path, data, offset, fh):
        self.strike("write", path, fh)
        return os.pwrite(fh, data, offset)

    def fsync(self, path, datasync, fh):
        self.strike("fsync", path, fh)
        self.keep(fh)
        return 0

    def flush(self, path, fh):
        if fcntl.fcntl(fh, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            self.strike("flush", path, fh)
            self.keep(fh)
        return 0

    def release(self, path, fh):
        os.close(fh)
        return 0

    def open(self, path, flags):
        return os.open(self.at(path), flags & ~os.O_APPEND)  # the kernel gives the offsets

    def create(self, path, mode, fi=None):
        handle = os.open(self.at(path), os.O_RDWR | os.O_CREAT | os.O_TRUNC, mode)
        self.keep(handle)
        return handle

    def getattr(self, path, fh=None):
        found = os.lstat(self.at(path))
        names = ("st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_ino", "st_blocks", "st_mtime_ns")
        return {name.removesuffix("_ns"): getattr(found, name) for name in names}

    def statfs(self, path):
        found = os.statvfs(self.at(path))
        return {name: getattr(found, name) for name in ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail")}

    def readdir(self, path, fh):
        return [".", "..", *(entry.name for entry in self.at(path).iterdir())]

    def truncate(self, path, length, fh=None):
        os.truncate(self.at(path), length)

    def utimens(self, path, times=None):
        if times is None or UTIME_NOW in times:
            os.utime(self.at(path))
        else:
            os.utime(self.at(path), ns=times)

    def chmod(self, path, mode):
        self.at(path).chmod(mode)

    def mkdir(self, path, mode):
        self.at(path).mkdir(mode)

    def rmdir(self, path):
        self.at(path).rmdir()

    def unlink(self, path):
        self.at(path).unlink()

    def rename(self, old, new):
        self.at(old).rename(self.at(new))

    def symlink(self, target, source):
        self.at(target).symlink_to(source)

    def readlink(self, path):
        return str(self.at(path).readlink())

    def link(self, target, source):
        self.at(target).hardlink_to(self.at(source))


class Disk:
    """A mounted folder that fails when it is told to."""

    def __init__(self, base: Path) -> None:
        self.folder, self._control, self._log = base / "disk", base / "control", base / "log"
        back = base / "back"
        for folder in (self.folder, back):
            folder.mkdir()
        self._tell(NONE)
        arguments = (Passing(back, self._control, self._log), str(self.folder))
        self._server = multiprocessing.get_context("fork").Process(
            target=FUSE, args=arguments, kwargs={"foreground": True}
        )
        self._server.start()
        while not os.path.ismount(self.folder):
            if not self._server.is_alive():
                raise SystemExit(f"fail_fuse: error: {self.folder}: cannot be mounted (see above); run as root")
            time.sleep(0.05)

    def _tell(self, fault: Fault) -> None:
        write_atomically(self._control, json.dumps(asdict(fault)).encode())

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        self._log.write_text("")
        self._tell(fault)
        try:
            yield
        finally:
            self._tell(NONE)

    def calls(self) -> list[tuple[str, str]]:
        """(call, path) of all calls since the last fault began, or ended."""
        return [tuple(line.split(" ", 1)) for line in self._log.read_text().splitlines()]

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)
        self._server.join()


def targets(base: Path, store: str) -> Iterator[tuple[Program, tuple[tuple[str, str], ...]]]:
    """Programs, each with the kinds of calls that fail in it and the parts of the paths that they fail on.

    store: address of the shards that `programs` makes.
    """
    known = programs(base)
    evaluate, train, index = known["evaluate"], known["train"], base / "calm"
    code, text = run(known["search"].command, index, {})
    assert code == 0, text
    far = (*evaluate.command, f"--set=data.val={store}", "--set=data.cache_bytes=10000000",
           "--set=data.cache_dir=OUTPUT/kept")  # fmt: skip
    find = ("tools/search.py", "find", index / "index", "one", "--json")
    yield known["check"], (("read", ".tar"), ("read", ".npy"), ("read", "manifest.json"))
    yield evaluate, (("read", ".tar"), ("read", ".npy"), ("read", "model.safetensors"), *writes("/try/"))
    yield Program("far", far, (), evaluate.result), (("read", "/kept/"), *writes("/kept/"))
    yield known["predict"], (("read", "/clips/"), *writes("all.jsonl"))
    yield known["search"], (("read", "/clips/"), *writes("/index/"))
    yield Program("find", find, (), lambda _, text: text), (("read", "/index/"),)
    yield known["build"], (("read", "/class/"), *writes("/shards/"))
    yield train, (("read", ".tar"), ("read", ".npy"), *writes("/checkpoints/"))


def writes(part: str) -> tuple[tuple[str, str], ...]:
    return tuple((call, part) for call in ("write", "fsync", "flush"))


def attack(disk: Disk, program: Program, points: tuple[tuple[str, str], ...], tries: int) -> int:
    """Tries all points; returns the number of mistakes."""
    output = disk.folder / "try"

    def call(fault: Fault) -> tuple[int, str]:
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        with disk.failing(fault):
            return run(program.command, output, {})

    code, text = call(NONE)
    assert code == 0, text
    expected, seen, mistakes, killed = program.result(output, text), disk.calls(), 0, 0
    faults = []
    for kind, part in points:
        number = sum(kind == call and part in path for call, path in seen)
        code = errno.EIO if kind == "read" else errno.ENOSPC
        faults += [Fault(kind, part, code, after, None if turn % 2 else 1)
                   for turn, after in enumerate(spread(number, tries))]  # fmt: skip
        faults.append(Fault(kind, part, count=3, seconds=SLOW_SECONDS))
    for fault in faults:
        code, text = call(fault)
        if code == -signal.SIGBUS and "Fatal Python error: Bus error" in text:
            code, killed = 1, killed + 1
        wrong = judge(program, output, expected, code, text)
        if code and not fault.code:
            wrong = f"it is slow, and the exit code is {code}: {text[-1500:]}"
        if wrong:
            mistakes += 1
            print(f"{program.name}, {fault}: {wrong}\n", flush=True)
    print(f"{program.name}: {len(faults)} tried, {killed} ended by SIGBUS, {mistakes} mistakes", flush=True)
    return mistakes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=4, help="of each kind of call and file")
    parser.add_argument("--only", nargs="+", help="names of programs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = str(Path(folder) / "cache")
        disk = Disk(Path(folder))
        try:
            with serve(disk.folder / "project" / "shards") as store:
                return 1 if sum(
                    attack(disk, program, points, arguments.tries)
                    for program, points in targets(disk.folder, store.address)
                    if program.name in (arguments.only or [program.name])
                ) else 0  # fmt: skip
        finally:
            disk.close()


if __name__ == "__main__":
    sys.exit(main())
