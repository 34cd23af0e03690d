"""Kills a builder at random moments, runs it again each time, and compares with a build that was left alone.

    python tests/support/kill_builder.py [--kills 50] [--videos 400] [--seed 0]

Shards, index and manifest must be equal to the last byte. Kills fall anywhere from the start of the program to the end
of the build; a build that ends before the last kill is removed and started again. pytest runs the same with fewer kills
(tests/shards/test_writer.py).
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from frame_folders import make_frame_folders

TOOL = Path(__file__).parents[2] / "tools" / "build_shards.py"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--videos", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        folders = make_frame_folders(base, [1 + number % 9 for number in range(arguments.videos)])
        whole, killed = base / "whole", base / "killed"
        command = [sys.executable, str(TOOL), "--annotations", str(folders.annotations), "--root", str(folders.root)]
        command += ["--labels", str(folders.labels), "--shard-bytes", "200kB", "--output"]
        started = time.monotonic()
        subprocess.run([*command, str(whole)], check=True, stdout=subprocess.DEVNULL)
        seconds = time.monotonic() - started
        kills = builds = going_on = 0
        while kills < arguments.kills:
            process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL)
            time.sleep(draw.uniform(0, 1.1 * seconds))
            going_on += (killed / ".building").exists() and not (killed / "manifest.json").exists()
            process.kill()
            if process.wait() != 0:
                kills += 1
                continue
            assert content(killed) == content(whole)
            shutil.rmtree(killed)
            builds += 1
        subprocess.run([*command, str(killed)], check=True, stdout=subprocess.DEVNULL)
        same = content(killed) == content(whole)
        print(
            f"{kills} kills, {going_on} of them while shards were written, {builds + 1} builds finished, "
            f"{seconds:.1f} s for one: {'equal' if same else 'DIFFERENT'}"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
