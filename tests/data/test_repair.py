"""`data.on_error: skip`: what is replaced, by what, what is counted, and what fails nevertheless."""

import io
import itertools
import json
import os
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import shard_data
from frame_folders import make_frame_folders
from launch import run
from original_files import save_train
from PIL import Image
from project import EVALUATE, Project, ledger, records
from read_stream import identify
from tiny import tiny_network

import shards.remote
from shards.annotations import parse_annotations, parse_labels
from shards.format import ShardError
from shards.reader import open_dataset
from shards.writer import build_shards
from text4vis.classifier.embeddings import build_classifier
from text4vis.config.loading import config_from_dict, load_config
from text4vis.config.schema import Config, ConfigError, DataConfig
from text4vis.data.loader import build_loader
from text4vis.data.repair import Repair
from text4vis.evaluation.embedding import embed_videos, evaluate
from text4vis.model.video_clip import build_model

NUM_VIDEOS = 24
FRAMES = 6


def spoilt_png() -> bytes:
    """Its header, size and end are in order; its compressed pixels are not."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    data = bytearray(stream.getvalue())
    data[200:260] = bytes(60)
    return bytes(data)


def build(folders, output: Path) -> Path:
    names = parse_labels(folders.labels)
    build_shards(
        parse_annotations(folders.annotations), root=folders.root, labels=names, output=output, shard_bytes=30_000
    )
    return output


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """24 videos of 6 frames."""
    base = tmp_path_factory.mktemp("sound")
    return build(make_frame_folders(base, [FRAMES] * NUM_VIDEOS), base / "shards")


def damage(folder: Path, sample: int, kind: str, frames=range(FRAMES)) -> None:
    """Spoils frames of a video in place, as a failing disk would: sizes and times of the files stay."""
    manifest = json.loads((folder / "manifest.json").read_text())
    videos = np.load(folder / manifest["index"]["videos"]["file"])
    index = folder / manifest["index"]["members"]["file"]
    rows = np.load(index)
    shard = folder / f"{videos['shard'][sample]:06d}.tar"
    status = shard.stat()
    with shard.open("r+b") as file:
        for row in rows[int(videos["first_member"][sample]) + np.array(frames)]:
            start, size = int(row["block"]) * 512, int(row["size"])
            if kind == "zeros":
                file.seek(start)
                file.write(bytes(size))
            if kind == "a flipped bit":
                byte = os.pread(file.fileno(), 1, start + size // 2)[0]
                os.pwrite(file.fileno(), bytes([byte ^ 4]), start + size // 2)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = rows[int(videos["first_member"][sample]) :][: max(frames) + 1]
    if kind == "another size":
        changed["width"][list(frames)] = 40
    elif kind == "a bomb":
        changed["width"][list(frames)] = changed["height"][list(frames)] = 65_535
    elif kind == "no bytes":
        changed["size"][list(frames)] = 0
    elif kind == "outside the tar":
        changed["block"][list(frames)] = 1 << 30
    np.save(index, rows)


DAMAGE = {
    "a flipped bit": "has the CRC-32",
    "zeros": "has the CRC-32",
    "another size": "is 48x32 pixels, the index says 40x32",
    "a bomb": "is 65535x65535 pixels by the index, of which 1 to 33554432 can be used",
    "no bytes": "the index places a member of video",
    "outside the tar": "the index places a member of video",
}
BAD = {3: "a flipped bit", 8: "another size", 9: "zeros", 14: "a bomb", 21: "outside the tar"}


@pytest.fixture(scope="module")
def faulty(sound, tmp_path_factory):
    """The same, five videos of it bad in every frame."""
    folder = tmp_path_factory.mktemp("faulty") / "shards"
    shutil.copytree(sound, folder)
    for sample, kind in BAD.items():
        damage(folder, sample, kind)
    return folder


def settings(folder, **data) -> Config:
    base = {"train": [str(folder)], "val": [str(folder)], "batch_size": 2, "num_segments": 4, "input_size": 24}
    base |= {"scale_size": 28, "workers": 2, "on_error": "skip", "max_bad_share": 0.3}
    return config_from_dict({"seed": 5, "data": base | data}, "test")


def take(config, split="train", count=None, **place):
    """(id, label, hash of the pixels) of each video, batch by batch; and the ids of the videos found bad."""
    with build_loader(config, split, **place) as loader:
        batches = [identify(batch) for batch in itertools.islice(loader, count)]
        loader.bad.join(())  # as the ranks do after a pass
        return batches, {entry["id"]: entry for entry in loader.bad.entries()}


def flat(batches):
    return list(itertools.chain(*batches))


@pytest.mark.parametrize("kind", DAMAGE)
def test_each_fault_is_named_or_skipped(sound, tmp_path, kind):
    folder = tmp_path / "shards"
    shutil.copytree(sound, folder)
    damage(folder, 5, kind, frames=[3])
    with pytest.raises(ShardError, match=DAMAGE[kind]) as caught:
        take(settings(folder, on_error="fail", test_clips=3, batch_size=12), "val")
    assert str(folder) in str(caught.value) and "build" in str(caught.value)
    batches, bad = take(settings(folder, test_clips=3, batch_size=12), "val")
    assert [i for i, _, _ in flat(batches)] == [i for i in range(NUM_VIDEOS) if i != 5]
    assert DAMAGE[kind] in bad[5]["reason"] and bad[5]["name"] and bad[5]["address"] == str(folder)


def test_good_videos_stay_where_and_what_they_are(sound, faulty):
    """Only the places of bad videos change: they hold good ones; every good one is at its own place in each epoch."""
    steps = 3 * NUM_VIDEOS // 6
    expected = flat(take(settings(sound, batch_size=6), count=steps)[0])
    batches, bad = take(settings(faulty, batch_size=6), count=steps)
    shown = flat(batches)
    assert {i for i, _, _ in expected} == set(range(NUM_VIDEOS)) and set(bad) == set(BAD)
    for was, is_now in zip(expected, shown, strict=True):
        assert is_now == was if was[0] not in BAD else is_now[0] not in BAD
    substitutes = [now[0] for was, now in zip(expected, shown, strict=True) if was[0] in BAD]
    assert len(set(substitutes)) > 3 and len(substitutes) == 3 * len(BAD)


@pytest.mark.parametrize("data", [{}, {"shuffle": "shards:2"}, {"shot": 2}, {"augmentation": "none"}])
def test_the_global_batches_are_the_same_at_every_world_size_and_after_a_restart(faulty, data):
    settings_of = lambda **more: settings(faulty, max_bad_share=0.6, **data, **more)  # noqa: E731
    alone = take(settings_of(batch_size=6), count=10)[0]
    for world_size in (2, 3):
        config = settings_of(batch_size=6 // world_size)
        by_rank = [take(config, count=10, rank=r, world_size=world_size)[0] for r in range(world_size)]
        assert [flat(step) for step in zip(*by_rank, strict=True)] == alone
    later = take(settings_of(batch_size=4), count=5, consumed=29)[0]
    assert flat(later) == flat(alone)[29:49]
    if "shot" in data:
        with build_loader(settings_of(), "train") as loader:
            assert {i for i, _, _ in flat(alone)} <= set(loader.planner.few_shot.tolist())


def test_streams_and_mixtures_are_the_same_at_every_world_size_and_after_a_restart(faulty, sound):
    """In a mixture a video of the same source takes a bad one's place, so that the shares stay exact."""
    sources = [{"path": str(faulty), "weight": 1}, {"path": str(sound), "weight": 2}]
    settings_of = lambda **more: settings(  # noqa: E731
        faulty, max_bad_share=0.6, train=sources, shuffle="shards:1", streams=2, **more
    )
    alone = take(settings_of(batch_size=6), count=16)[0]
    for world_size in (2, 3):
        config = settings_of(batch_size=6 // world_size)
        by_rank = [take(config, count=16, rank=r, world_size=world_size)[0] for r in range(world_size)]
        assert [flat(step) for step in zip(*by_rank, strict=True)] == alone
    assert flat(take(settings_of(batch_size=6), count=4, consumed=30)[0]) == flat(alone)[30:54]
    ids = [i for i, _, _ in flat(alone)]
    assert sum(i < NUM_VIDEOS for i in ids) == 2 * NUM_VIDEOS * 2 // 3 and not set(ids) & set(BAD)


def test_a_video_with_one_bad_frame_is_used_where_that_frame_is_not_drawn(sound, tmp_path):
    """What was found bad before must not decide: a run that starts later knows nothing of it."""
    folder = tmp_path / "shards"
    shutil.copytree(sound, folder)
    damage(folder, 11, "a flipped bit", frames=[1])
    config = settings(folder, batch_size=NUM_VIDEOS)
    whole, bad = take(config, count=8)
    expected = flat(take(settings(sound, batch_size=NUM_VIDEOS), count=8)[0])
    kept = [now == was for was, now in zip(expected, flat(whole), strict=True) if was[0] == 11]
    assert len(kept) == 8 and 0 < sum(kept) < 8 and list(bad) == [11]
    for start in range(8):
        assert take(config, count=1, consumed=start * NUM_VIDEOS)[0] == whole[start : start + 1]


def test_one_bad_batch_after_another(sound, tmp_path):
    """Decoding works ahead: the batch after one that fails is already under way, and may be bad too."""
    folders = make_frame_folders(tmp_path, [2] * 12)
    for video in (2, 3, 4, 5, 8):
        (folders.root / folders.names[video] / "img_00002.jpg").write_bytes(spoilt_png())
    folder = build(folders, tmp_path / "shards")
    with open_dataset(str(folder)) as dataset:
        spoilt = {i for i in range(12) if dataset.name(i) in {folders.names[v] for v in (2, 3, 4, 5, 8)}}
    for batch_size in (1, 2, 12):
        batches, bad = take(settings(folder, batch_size=batch_size, max_bad_share=0.5), "val")
        assert [i for i, _, _ in flat(batches)] == [i for i in range(12) if i not in spoilt] and set(bad) == spoilt
        assert all("frame 1 does not decode" in entry["reason"] for entry in bad.values())
    flipped = min(set(range(12)) - spoilt)
    damage(folder, flipped, "a flipped bit", frames=[0])
    spoilt.add(flipped)
    for batch_size in (2, 12):
        batches, bad = take(settings(folder, batch_size=batch_size, max_bad_share=0.6), "val")
        assert [i for i, _, _ in flat(batches)] == [i for i in range(12) if i not in spoilt] and set(bad) == spoilt
    shown = flat(take(settings(folder, batch_size=2, max_bad_share=0.6), count=18)[0])
    assert shown == flat(take(settings(folder, batch_size=12, max_bad_share=0.6), count=3)[0])
    assert not spoilt & {i for i, _, _ in shown}


def test_a_video_that_reading_finds_bad_costs_the_others_of_its_batch_no_decoding(faulty, monkeypatch):
    alone, decode = [], Repair.decode
    monkeypatch.setattr(
        Repair, "decode", lambda self, videos: alone.append([v.plan.sample for v in videos]) or decode(self, videos)
    )
    batches, bad = take(settings(faulty, batch_size=NUM_VIDEOS), count=2)
    substitutes = flat(alone)[: 2 * len(BAD)]  # it works ahead
    good = [i for i in range(NUM_VIDEOS) if i not in BAD]
    assert set(bad) == set(BAD) and all(len(ids) == 1 for ids in alone)
    assert sorted(i for i, _, _ in flat(batches)) == sorted([*good, *good, *substitutes])


def test_stored_videos(tmp_path):
    for number in range(6):
        with av.open(str(tmp_path / f"clip {number}.mp4"), "w") as file:
            stream = file.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
            for k in range(8):
                frame = np.full((72, 96, 3), 25 * number + k, np.uint8)
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
            file.mux(stream.encode())
    (tmp_path / "list.txt").write_text("".join(f"clip {n}.mp4 {n % 3}\n" for n in range(6)))
    folder = tmp_path / "shards"
    annotations = parse_annotations(tmp_path / "list.txt")
    build_shards(annotations, root=tmp_path, labels=["a", "b", "c"], output=folder, store="video")
    sound_batches = flat(take(settings(folder), "val")[0])
    damage(folder, 1, "zeros", frames=[0])
    damage(folder, 4, "another size", frames=[0])
    for verify, words in ((True, "the video has the CRC-32"), (False, "does not decode")):
        batches, bad = take(settings(folder, verify=verify, max_bad_share=0.5), "val")
        assert flat(batches) == [video for video in sound_batches if video[0] not in (1, 4)]
        assert words in bad[1]["reason"] and "96x72 pixels, the index says 40x72" in bad[4]["reason"]
        with pytest.raises(ShardError, match=words):
            take(settings(folder, verify=verify, on_error="fail"), "val")


@pytest.mark.parametrize("split", ["train", "val"])
def test_too_many_fail_with_the_first_named(faulty, split):
    with pytest.raises(ShardError, match=r"data.max_bad_share: [45] of 24 videos .* 0.14 .*\(1\) .*\(3\) ") as caught:
        take(settings(faulty, max_bad_share=0.14), split, count=NUM_VIDEOS)
    assert "(4)" not in str(caught.value)


@pytest.mark.parametrize("data", [{}, {"shot": 1}])
def test_nothing_sound_is_left(sound, tmp_path, data):
    folder = tmp_path / "shards"
    shutil.copytree(sound, folder)
    for sample in range(NUM_VIDEOS):
        damage(folder, sample, "no bytes")
    with pytest.raises(ShardError, match=r"data.max_bad_share: \d+ of \d+ videos"):
        take(settings(folder, max_bad_share=0.99, **data), count=1)
    with pytest.raises(ConfigError, match="max_bad_share"):
        settings(folder, max_bad_share=1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_evaluation_leaves_out_and_counts(sound, faulty, world_size):
    """8 ranks of 3 videos: one rank has a batch without a sound video."""
    expected = [video for video in flat(take(settings(sound), "val")[0]) if video[0] not in BAD]
    found, bad = [], {}
    for rank in range(world_size):
        batches, of_rank = take(settings(faulty, batch_size=1), "val", rank=rank, world_size=world_size)
        assert all(batches)
        found += flat(batches)
        bad |= of_rank
    assert found == expected and set(bad) == set(BAD)


def test_a_store_that_fails_is_no_bad_video(sound, monkeypatch, tmp_path):
    """A dead server and a tar that was replaced end the job: their videos may be sound."""
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.001)
    monkeypatch.setattr(shards.remote, "_MAX_BACKOFF_SECONDS", 0.002)
    with shard_data.serve(sound) as server:
        config = settings(
            server.address, cache_dir=str(tmp_path / "cache"), batch_size=1, prefetch=1, requests_in_flight=1
        )
        with build_loader(config, "train") as loader:
            batches = iter(loader)
            next(batches)
            server.die()
            with pytest.raises(ShardError, match="gave up after"):
                list(itertools.islice(batches, NUM_VIDEOS))
            assert not loader.bad.entries()
    folder = tmp_path / "shards"
    shutil.copytree(sound, folder)
    with build_loader(settings(folder), "train") as loader:
        for shard in folder.glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
        with pytest.raises(ShardError, match="changed or replaced while it was in use"):
            next(iter(loader))
        assert not loader.bad.entries()


def test_secrets_stay_out_of_the_list(sound, tmp_path):
    folder = tmp_path / "shards"
    shutil.copytree(sound, folder)
    damage(folder, 2, "a flipped bit")
    with shard_data.serve(folder) as server:
        address = server.address.replace("http://", "http://user:hunter2@") + "?token=hunter3"
        _, bad = take(settings(address, cache_dir=str(tmp_path / "cache")), "val")
    assert list(bad) == [2] and "hunter" not in json.dumps(bad) and bad[2]["address"] == server.address


def test_a_video_that_reads_again_counts(sound, tmp_path):
    config = settings(sound, input_size=32, scale_size=36, num_segments=4, batch_size=6)
    model = build_model(tiny_network(tmp_path / "clip"), 4)
    with build_loader(config, "val") as loader:
        loader.bad.add(5, "not read in the evaluation before")
        embedded = embed_videos(model, loader)
        assert embedded.ids_N.tolist() == list(range(NUM_VIDEOS)) and not len(loader.bad)


def test_an_evaluation_counts_and_lists_what_it_left_out(sound, faulty, tmp_path):
    """The figures are those of a data set that never held the bad videos."""
    config = settings(faulty, input_size=32, scale_size=36, num_segments=4, test_crops=3, batch_size=6)
    network = tiny_network(tmp_path / "clip")
    model = build_model(network, 4)
    names = [f"class {number}" for number in range(3)]
    classes_CD = build_classifier(Config(network=network, data=config.data), model, names)

    def report(folder):
        changed = settings(folder, input_size=32, scale_size=36, num_segments=4, test_crops=3, batch_size=6)
        with build_loader(changed, "val") as loader:
            features = tmp_path / f"{folder.parent.name}.safetensors"
            return evaluate(model, classes_CD, names, loader, weights="", features=features)

    whole, rest = report(sound), report(faulty)
    assert (whole["videos"], whole["missing"], whole["skipped"]) == (NUM_VIDEOS, 0, [])
    assert (rest["videos"], rest["missing"]) == (NUM_VIDEOS - len(BAD), len(BAD))
    assert {entry["id"]: DAMAGE[BAD[entry["id"]]] in entry["reason"] for entry in rest["skipped"]} == dict.fromkeys(
        BAD, True
    )
    kept = [i for i in range(NUM_VIDEOS) if i not in BAD]
    for key, values in rest["predictions"].items():
        assert values == [whole["predictions"][key][i] for i in kept]
    # Features that lack videos are not kept: mended data must not be taken for damaged ones.
    assert [path.name for path in tmp_path.glob("*.safetensors")] == [f"{sound.parent.name}.safetensors"]


@pytest.mark.slow
def test_ranks_without_a_sound_video_hang_nobody(sound, tmp_path):
    """Three real processes of two videos each, both of rank 1 bad, against one process."""
    config = tmp_path / "config.yaml"
    network = tiny_network(tmp_path / "clip")
    data = {"batch_size": 1, "num_segments": 4, "input_size": 32, "scale_size": 36, "on_error": "skip"}
    config.write_text(Config(data=DataConfig(**data, max_bad_share=0.4), network=network).to_yaml())
    save_train(tmp_path / "model.pt", build_model(network, 4))
    folders = make_frame_folders(tmp_path / "six", [FRAMES] * 6)
    folder = build(folders, tmp_path / "shards")
    for sample in (2, 3):
        damage(folder, sample, "a flipped bit")

    def report(ranks):
        path = tmp_path / f"{ranks}.json"
        arguments = ["--config", config, "--model", tmp_path / "model.pt", "--report", path]
        run(EVALUATE, *arguments, f"--set=data.val={folder}", ranks=ranks)
        return json.loads(path.read_text()) | {"date": ""}

    alone = report(1)
    assert alone["videos"] == 4 and [entry["id"] for entry in alone["skipped"]] == [2, 3]
    assert report(3) == alone


@pytest.mark.slow
def test_two_ranks_train_past_a_bad_video_and_go_on(tmp_path):
    """Same batches on one rank and on two with a restart between; every skipped video is listed once, and counted."""
    project = Project(tmp_path / "project")
    config = load_config(project.config)
    with build_loader(config, "train") as loader:
        bad = int(next(loader.planner.batches())[0][0])  # the stream's first, long behind where the job is stopped
        damage(project.shards, bad, "a flipped bit", frames=range(loader.dataset.num_frames[bad]))
    skip = (
        "data.on_error=skip",
        "data.max_bad_share=0.2",
        "solver.epochs=2",
        "logging.save_steps=3",
        "logging.print_freq=100",
    )
    project.train_with(tmp_path / "alone", f"--ledger {tmp_path / 'one'}", *skip, "data.batch_size=4", ranks=1)
    stopped = project.train_with(tmp_path / "run", f"--ledger {tmp_path / 'two'} --signal 5:SIGTERM", *skip)
    assert [code for code, _ in stopped] == [75, 75], stopped
    assert json.loads((tmp_path / "run" / "skipped.jsonl").read_text())["id"] == bad  # no step was logged yet
    results = project.train_with(tmp_path / "run", f"--ledger {tmp_path / 'two'}", *skip)
    assert [code for code, _ in results] == [0, 0], results
    assert ledger(tmp_path / "one") == ledger(tmp_path / "two")
    assert bad not in {i for ids in ledger(tmp_path / "two").values() for i in ids}
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert sorted((entry["split"], entry["id"]) for entry in listed) == [("train", bad), ("val", bad)]
    assert records(tmp_path / "run")[-2]["bad_videos"] == 1 and records(tmp_path / "run")[-1]["missing"] == 1
    assert json.loads((tmp_path / "run" / "report.json").read_text())["skipped"][0]["id"] == bad
    assert (tmp_path / "run" / "log.txt").read_text().count("skipped, data.train: ") == 1
    strict = project.train_with(tmp_path / "strict", "", "data.on_error=skip", "data.max_bad_share=0.01")
    assert [code for code, _ in strict] == [1, 1]
    assert all("data.max_bad_share: 1 of 26 videos" in output and "has the CRC-32" in output for _, output in strict)
