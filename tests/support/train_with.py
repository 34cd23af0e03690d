"""Runs text4vis/train.py with a ledger of the videos that were trained on, and with faults on purpose. At the end it
names the threads that are left.

Arguments before `--` are for this program, those after it for text4vis/train.py:

    --ledger DIR        appends the ids of every micro batch to DIR/<rank>.jsonl, by step, and which entry of
                        data.train each is of
    --signal N:NAME     the last rank sends itself a signal within step N; the run stops after the one that follows
    --signal-in CALL:NAME   … within the first call of `evaluate` or `save`
    --not-finite ID     the loss is not a number when this video is in the batch; -1: always
    --raise-at N        the last rank raises an error within step N
    --slow SECONDS      each micro batch takes longer
    --slow-save SECONDS  so does each file of a save, in the background
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "text4vis"))  # what running train.py does

import train

from text4vis.cluster import distributed
from text4vis.training import checkpointing
from text4vis.training.losses import Objective
from text4vis.training.trainer import Trainer


def main() -> int:
    split = sys.argv.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", type=Path)
    parser.add_argument("--signal", default="0:SIGTERM")
    parser.add_argument("--signal-in", default=":SIGTERM")
    parser.add_argument("--not-finite", type=int)
    parser.add_argument("--raise-at", type=int)
    parser.add_argument("--slow", type=float, default=0)
    parser.add_argument("--slow-save", type=float, default=0)
    parser.add_argument("--local_rank")
    options = parser.parse_args(sys.argv[1:split])
    sys.argv = ["train.py", *sys.argv[split + 1 :]]
    signal_step, signal_name = options.signal.split(":")
    call, name_in_call = options.signal_in.split(":")
    place = distributed.ranks()
    is_last = place.rank == place.world_size - 1
    backward, write_pieces, embed = Trainer.backward, checkpointing.write_pieces, Trainer.save_and_stop_if_asked

    def watched_backward(self, batch):
        step = self.state.step + 1
        if options.ledger:
            options.ledger.mkdir(parents=True, exist_ok=True)
            record = {"step": step, "job": os.environ["MASTER_PORT"], "time": time.time(), "ids": batch.ids.tolist()}
            record["sources"] = self.train_loader.planner.order.source_of(batch.ids.numpy()).tolist()
            with (options.ledger / f"{place.rank}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        if is_last and step == int(signal_step):
            os.kill(os.getpid(), getattr(signal, signal_name))
        if is_last and step == options.raise_at:
            raise KeyError("broken on purpose")
        time.sleep(options.slow)
        return backward(self, batch)

    def slow_write(path, pieces):
        time.sleep(options.slow_save)
        return write_pieces(path, pieces)

    compute = Objective.__call__

    def poisoned(self, forward, frames, labels, ids, position):
        loss = compute(self, forward, frames, labels, ids, position)
        return loss * float("nan") if options.not_finite in (-1, *ids) else loss

    def signalling(function):
        sent = []

        def wrapped(*arguments):
            if not sent:
                sent.append(os.kill(os.getpid(), getattr(signal, name_in_call)))
            return function(*arguments)

        return wrapped

    Trainer.backward, checkpointing.write_pieces = watched_backward, slow_write
    if options.not_finite is not None:
        Objective.__call__ = poisoned
    if call == "save" and place.is_main:
        checkpointing.write_pieces = signalling(slow_write)
    if call == "evaluate" and is_last:
        Trainer.save_and_stop_if_asked = signalling(embed)
    code = train.main()
    print("threads left:", *sorted(thread.name for thread in threading.enumerate()), flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
