"""Streams and a mixture in the real trainer: hosts fetch their share, and a run goes on with other hosts and ranks."""

import json

import numpy as np
import pytest
from launch import finish, free_port, start_rank
from project import NUM_VIDEOS, TRAIN_WITH, ledger, losses, records

from shards.annotations import parse_annotations, parse_labels
from shards.mixture import Mixture
from shards.plan import share_positions
from shards.reader import open_dataset
from shards.writer import build_shards

STREAMS, GLOBAL_BATCH, SMALL = 4, 12, 9


@pytest.fixture(scope="module")
def sources(project):
    """All the project's videos, and nine of them, both in small shards."""
    base = project.base
    lines = (base / "frames.txt").read_text().splitlines(keepends=True)
    (base / "small.txt").write_text("".join(lines[:SMALL]))
    folders = base / "mixture all", base / "mixture small"
    labels = parse_labels(base / "labels.csv")
    for folder, name in zip(folders, ("frames.txt", "small.txt"), strict=True):
        annotations = parse_annotations(base / name)
        build_shards(annotations, root=project.frames, labels=labels, output=folder, shard_bytes=20_000)
    return folders


def settings(sources, weights=(1, 3)):
    entries = ", ".join(f"{{path: {path}, weight: {weight}}}" for path, weight in zip(sources, weights, strict=True))
    return (
        f"data.train=[{entries}]", "data.shuffle=shards:1", f"data.streams={STREAMS}", "data.batch_size=3",
        f"solver.global_batch={GLOBAL_BATCH}", "solver.epochs=4", "solver.lr=5e-4", "engine.precision=fp32",
        "logging.save_steps=2",
    )  # fmt: skip


def on_hosts(project, output, options, given, *, hosts, ranks_per_host=1, script=TRAIN_WITH):
    """(exit code, output) of each rank of a job on so many hosts."""
    job = {"WORLD_SIZE": hosts * ranks_per_host, "LOCAL_WORLD_SIZE": ranks_per_host}
    job |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    places = [
        {"RANK": rank, "LOCAL_RANK": rank % ranks_per_host, "GROUP_RANK": rank // ranks_per_host}
        for rank in range(hosts * ranks_per_host)
    ]
    arguments = [*options.split(), "--", *project.arguments(output, *given)]
    return finish([start_rank(script, *arguments, variables=job | place) for place in places])


@pytest.mark.slow
def test_a_killed_run_goes_on_with_other_hosts_and_the_same_samples(project, sources, tmp_path):
    given = settings(sources)
    results = on_hosts(project, tmp_path / "whole", f"--ledger {tmp_path}/book-whole", given, hosts=1)
    assert [code for code, _ in results] == [0], results
    moved, book = tmp_path / "moved", tmp_path / "book-moved"
    for hosts, ranks_per_host, killed_at in ((2, 1, 4), (1, 2, 7), (4, 1, None)):
        options = f"--ledger {book}" + (f" --signal {killed_at}:SIGKILL" if killed_at else "")
        results = on_hosts(project, moved, options, given, hosts=hosts, ranks_per_host=ranks_per_host)
        codes = [code for code, _ in results]
        assert codes == [0] * len(codes) if killed_at is None else codes[-1] == -9 and 0 not in codes, results
    assert losses(moved) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)

    epoch = NUM_VIDEOS + SMALL
    with open_dataset([str(path) for path in sources]) as dataset:
        shard_of = dataset.shard_of
    counts = [round(epoch / 4), epoch - round(epoch / 4)]
    order = Mixture([NUM_VIDEOS, SMALL], counts, 3, "shards:1", shard_of, num_streams=STREAMS)
    num_steps = -(-4 * epoch // GLOBAL_BATCH)
    expected = {
        step + 1: order.at(share_positions(step * GLOBAL_BATCH, GLOBAL_BATCH, 0, 1, STREAMS))[0].tolist()
        for step in range(num_steps)
    }
    assert ledger(book) == ledger(tmp_path / "book-whole") == expected

    last = [record for record in records(moved) if record["kind"] == "val"][-1]
    ids = np.concatenate([expected[step + 1] for step in range(num_steps)])
    assert [last[f"samples of {path}"] for path in sources] == np.bincount(ids >= NUM_VIDEOS).tolist()
    for path in book.glob("*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            assert record["sources"] == [int(sample >= NUM_VIDEOS) for sample in record["ids"]]


@pytest.mark.slow
def test_other_weights_or_streams_are_another_run(project, sources, tmp_path):
    given = settings(sources)
    output = tmp_path / "run"
    results = on_hosts(project, output, "--signal 2:SIGTERM", given, hosts=1)
    assert [code for code, _ in results] == [75], results
    for change, message in (
        (settings(sources, (1, 4)), "26 videos with weight 1, 9 videos with weight 3), data.train now has 26 videos"),
        ((*given, f"data.train=[{sources[0]}, {sources[1]}]"), "data.train now has no weights"),
        ((*given, "data.streams=2"), "data.streams: 4 -> 2"),
    ):
        ((code, text),) = on_hosts(project, output, "", change, hosts=1)
        assert code == 1 and message in text.splitlines()[-1], text


@pytest.mark.slow
def test_hosts_that_cannot_share_the_streams_are_told_which_can(project, sources, tmp_path):
    results = on_hosts(project, tmp_path / "run", "", settings(sources), hosts=3)
    message = "4 streams cannot be shared equally by 3 hosts (this one has 1 of 3 ranks); start 1 or 2 or 4 hosts"
    assert [code for code, _ in results] == [1] * 3 and all(message in text for _, text in results), results
