"""Shows a page to try a model on, to browsers of this machine.

Examples:
    python tools/app.py --model exported
    python tools/app.py --model runs/own --index index --port 8000 --upload-limit 200

Open the address that it prints. A video that is sent is recognised, with the labels that are typed or the model's own
classes, as a whole or window by window. With --index the videos of an index are searched by sentences.

It listens on 127.0.0.1 alone, asks nothing of any other machine, and keeps neither videos nor answers. From another
machine: `ssh -L 7860:127.0.0.1:7860 HOST`, then open http://127.0.0.1:7860 there.

Exit codes: 0 stopped by Ctrl-C or SIGTERM, 1 failed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import text4vis
from shards.format import ShardError
from shards.text import shown
from text4vis import saved, serving  # faces: they load torch where it is first needed
from text4vis.common.threads import sleep_while_waiting
from text4vis.config.schema import ConfigError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, type=Path, help="folder written by tools/export.py, or a run")
    add("--index", type=Path, help="index that tools/search.py made with this model, for the search")
    add("--port", type=int, default=7860, help="port of the page (default 7860; 0: any free one)")
    add("--upload-limit", type=float, default=1024, metavar="MIB", help="largest video, in MiB (default 1024)")
    arguments = parser.parse_args()
    if not 0 <= arguments.port < 2**16:
        parser.error(f"--port: expected a number from 0 to {2**16 - 1}, got {arguments.port}")
    if not 0 < arguments.upload_limit < float("inf"):
        parser.error(f"--upload-limit: expected a number of MiB above 0, got {arguments.upload_limit}")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    sleep_while_waiting()  # videos are decoded beside the model
    try:
        index = text4vis.open_index(arguments.index, arguments.model) if arguments.index else None
        recogniser = index.predictor if index else text4vis.load(arguments.model)
        limit = round(arguments.upload_limit * 2**20)
        page = serving.Page(recogniser, arguments.model.resolve().name, index=index, upload_bytes=limit)
        serving.serve_page(page, arguments.port, lambda address: print(f"open {address} (Ctrl-C ends it)", flush=True))
    except (serving.SearchError, saved.CheckpointError, ConfigError, ShardError, OSError) as error:
        print(f"app: error: {shown(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass  # while the model was loaded
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # not sys.exit, which would wait for an answer that is still in work
