"""Tars that other programs wrote are indexed in place, and then read like our own."""

import io
import json
import socket
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import webdataset as wds
from frame_folders import jpeg
from shard_data import hang_up_fault, read_everything, serve, status_fault, truncated_fault
from videos import write_video

import shards.foreign
import shards.remote
from shards import ShardError, check_datasets, index_tars, open_dataset
from shards.building import Workspace
from shards.format import INDEX_ROLES, MANIFEST

NAMES = ["archery", "surfing"]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(shards.foreign, "_PAUSES_SECONDS", (0,) * 3)
    monkeypatch.setattr(shards.remote, "_BACKOFF_SECONDS", 0.001)


def write_tar(path, members) -> None:
    """members: (name, bytes), in order; written as GNU tar does, long names included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def frames_sample(key: str, count: int, label: str, first: int = 0) -> list[tuple[str, bytes]]:
    # The tenth frame sorts behind the second by its number alone.
    numbers = [(f"{key}.{number}.jpg", jpeg(first + number)) for number in reversed(range(count))]
    return [*numbers, (f"{key}.cls", label.encode())]


@pytest.fixture
def tars(tmp_path):
    """Two tars of frames; what each of the three samples holds in order."""
    folder = tmp_path / "made"
    long_name = "deep/" * 30 + "b"
    write_tar(folder / "00000.tar", [*frames_sample("a", 12, "1"), *frames_sample(long_name, 2, "0", 50)])
    write_tar(folder / "00001.tar", [("__meta__", b"x"), ("a.notes.md", b"?"), *frames_sample("a", 3, "1", 90)])
    return folder


def stored() -> list[list[bytes]]:
    return [[jpeg(first + number) for number in range(count)] for first, count in ((0, 12), (50, 2), (90, 3))]


def test_frames_are_read_in_the_order_of_their_numbers(tars, tmp_path):
    manifest = index_tars(str(tars), output=tmp_path / "index", labels=NAMES)
    assert manifest.build["unused_members"] == {"md": 1, "meta": 1}
    with open_dataset(str(tmp_path / "index")) as dataset:
        assert read_everything(dataset) == stored()
        assert dataset.labels.tolist() == [1, 0, 1] and dataset.classes == NAMES
        assert dataset.name(0) == "00000/a" and dataset.name(2) == "00001/a"
        assert dataset.frame_sizes(0, np.array([0])) == [(32, 48)]
    assert check_datasets([tmp_path / "index"]).sound


def test_the_samples_are_those_of_webdataset(tars, tmp_path):
    index_tars(str(tars), output=tmp_path / "index", labels=NAMES)
    theirs = [
        {sample[name] for name in sample if name.endswith("jpg")}
        for sample in wds.WebDataset([str(path) for path in sorted(tars.glob("*.tar"))], shardshuffle=False)
    ]
    with open_dataset(str(tmp_path / "index")) as dataset:
        assert [set(frames) for frames in read_everything(dataset)] == theirs


def test_an_index_beside_the_tars_moves_with_them(tars, tmp_path):
    assert index_tars(str(tars), output=tars, labels=NAMES).tars == "."
    tars.rename(tmp_path / "moved")
    with open_dataset(str(tmp_path / "moved")) as dataset:
        assert read_everything(dataset) == stored()


def test_remote_tars_are_indexed_and_read_where_they_lie(tars, tmp_path):
    with serve(tars) as server:
        sources = f"{server.address}/{{00000..00001}}.tar"
        index_tars(sources, output=tmp_path / "index", labels=NAMES)
        for cache_bytes in (None, 10**7):
            with open_dataset(str(tmp_path / "index"), cache_dir=tmp_path / "c", cache_bytes=cache_bytes) as dataset:
                assert read_everything(dataset) == stored()


def length_unsaid(handler, body) -> bool:
    """A body that ends with its connection, as HTTP/1.0 has it."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(body)
    handler.close_connection = True
    return True


@pytest.mark.parametrize(
    ("fault", "first", "message"),
    [
        (status_fault(403), 1, "HTTP status 403 Forbidden; name tars"),
        (status_fault(500), 1, "HTTP status 500"),
        (hang_up_fault, 1, "ServerDisconnectedError"),
        (length_unsaid, 1, "the server does not say how large it is"),
        (status_fault(500), 2, "HTTP status 500 Internal Server Error; gave up after 6 attempts"),
        (status_fault(403), 2, "HTTP status 403 Forbidden"),
    ],
)
def test_what_a_server_answers_is_named(tars, tmp_path, impatient, fault, first, message):
    with serve(tars) as server:
        server.fault = lambda path, count: fault if count >= first else None
        with pytest.raises(ShardError, match=f"^{server.address}/00000.tar: {message}"):
            index_tars(f"{server.address}/00000.tar", output=tmp_path / "index", labels=NAMES)


@pytest.mark.parametrize("fault", [status_fault(503), hang_up_fault, truncated_fault])
def test_what_passes_is_tried_again(tars, tmp_path, monkeypatch, impatient, fault):
    monkeypatch.setattr(shards.remote, "PART_BYTES", 4096)
    index_tars(str(tars), output=tmp_path / "local", labels=NAMES)
    with serve(tars) as server:
        server.fault = lambda path, count: fault if count % 2 else None
        sources = [f"{server.address}/0000{number}.tar" for number in range(2)]
        index_tars(sources, output=tmp_path / "remote", labels=NAMES)
        assert sum(server.requests.values()) > 2 * 8, "of each tar several parts"
    for path in sorted((tmp_path / "local" / "index").iterdir()):
        assert (tmp_path / "remote" / "index" / path.name).read_bytes() == path.read_bytes()


def test_a_host_in_brackets_is_no_chain_of_addresses(tars, tmp_path):
    class Server6(ThreadingHTTPServer):
        address_family = socket.AF_INET6

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            pass

    try:
        server = Server6(("::1", 0), partial(Quiet, directory=tars))
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = f"http://[::1]:{server.server_address[1]}"
        assert index_tars(address, output=tmp_path / "index", labels=NAMES).tars == address
    finally:
        server.shutdown()
        server.server_close()


def test_a_remote_index_beside_its_tars_is_read_and_one_that_leads_elsewhere_is_refused(tars, tmp_path):
    index_tars(str(tars), output=tars, labels=NAMES)
    with serve(tars) as server:
        with open_dataset(server.address, cache_dir=tmp_path / "c") as dataset:
            assert read_everything(dataset) == stored()
        path = tars / MANIFEST
        path.write_text(path.read_text().replace('"tars": "."', '"tars": "/etc"'))
        with pytest.raises(ShardError, match="names tars in another place"):
            open_dataset(server.address, cache_dir=tmp_path / "c")


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a//b.tar", "", "a\\b.tar", "a?b.tar"])
def test_a_manifest_whose_tars_lead_out_of_their_place_is_refused(tars, name):
    index_tars(str(tars), output=tars, labels=NAMES)
    content = json.loads((tars / MANIFEST).read_text())
    content["shards"][0]["name"] = name
    (tars / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(ShardError, match="shard 0"):
        open_dataset(str(tars))


def test_videos_with_json_and_text_labels(tmp_path):
    for number in range(3):
        write_video(tmp_path / f"{number}.mp4", 60 * number, frames=4 + number)
    clips = [(tmp_path / f"{number}.mp4").read_bytes() for number in range(3)]
    write_tar(
        tmp_path / "made" / "clips.tar",
        [
            ("x.mp4", clips[0]),
            ("x.json", json.dumps({"meta": {"kind": "surfing"}, "caption": "a wave"}).encode()),
            ("y.MP4", clips[1]),
            ("y.json", json.dumps({"meta": {"kind": "archery"}}).encode()),
            ("z.mp4", clips[2]),
            ("z.txt", b"surfing\n"),
        ],
    )
    with pytest.raises(ShardError, match=r"clips.tar: sample 'z': no label in the key 'meta.kind'"):
        index_tars(str(tmp_path / "made"), output=tmp_path / "one", label_key="meta.kind")
    manifest = index_tars(str(tmp_path / "made"), output=tmp_path / "two", label_key="meta.kind", on_error="skip")
    assert [entry["name"] for entry in manifest.skipped] == ["clips.tar/z"]
    with open_dataset(str(tmp_path / "two")) as dataset:
        assert dataset.content(0) == "video" and dataset.num_frames.tolist() == [4, 5]
        assert dataset.classes == NAMES and dataset.labels.tolist() == [1, 0]
        assert [dataset.read_video(sample) for sample in range(2)] == clips[:2]
    assert check_datasets([tmp_path / "two"], deep=True).sound


def test_damage_is_found(tars, tmp_path):
    index_tars(str(tars), output=tmp_path / "index", labels=NAMES)
    path = tars / "00001.tar"
    data = path.read_bytes()
    start = data.index(jpeg(91))
    path.write_bytes(data[: start + 20] + b"????" + data[start + 24 :])
    with open_dataset(str(tmp_path / "index")) as dataset, pytest.raises(ShardError, match="frame 1 has the CRC-32"):
        dataset.read(2, np.array([1]))
    (problem,) = check_datasets([tmp_path / "index"]).datasets[0].problems
    assert "00001/a" in problem and "frame 1" in problem
    path.write_bytes(data[:-512])
    with pytest.raises(ShardError, match=r"00001.tar: has \d+ bytes, the manifest says"):
        open_dataset(str(tmp_path / "index"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", b"no image"), ("a.cls", b"0")], "sample 'a': it does not decode"),
        ([("a.cls", b"0")], "sample 'a': it holds no video and no image, only cls"),
        ([("a.jpg", jpeg(0))], "sample 'a': no label in cls, txt and the keys"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"labels": [0, 1]}')], "'labels' of its json is a list, but a sample"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"label": [0, 1]}')], "'label' of its json is a list, but a sample"),
        ([("a.jpg", jpeg(0)), ("a.cls", b"0,1")], "'0,1' stands for several classes, but a sample"),
        ([("a.jpg", jpeg(0)), ("a.cls", b"7")], "the label 7 is not in the class list of 2 names"),
        ([("a.jpg", jpeg(0)), ("a.txt", b"golf")], "the label 'golf' is not in the class list"),
        ([("a.jpg", jpeg(0)), ("a.cls", b"\x1b[2J")], r"its label '\\\\x1b\[2J' is no class"),
        ([("a.jpg", jpeg(0)), ("a.JPG", jpeg(1)), ("a.cls", b"0")], "two members .jpg"),
        ([("a.json", b"{"), ("a.jpg", jpeg(0))], "its json cannot be read"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"label": -1}')], "the label -1 is not in the class list of 2 names"),
        ([("a.jpg", jpeg(0)), ("a.json", b'{"label": 1.0}')], "'label' of its json is 1.0, no whole number"),
        ([("a.jpg", jpeg(0)), ("a.mask.png", jpeg(1)), ("a.cls", b"0")], "images .mask.png and .jpg are not numbered"),
        ([("a.left.0.jpg", jpeg(0)), ("a.right.0.jpg", jpeg(1)), ("a.cls", b"0")], "are not numbered as frames of one"),
        ([("a.1.jpg", jpeg(0)), ("a.01.png", jpeg(1)), ("a.cls", b"0")], "images .1.jpg and .01.png have the same num"),
        (
            [*frames_sample("a", 2, "0"), *frames_sample("b", 1, "0"), *frames_sample("a", 1, "1")],
            "'a': it comes a sec",
        ),
        ([("a.b.mp4", b""), ("a.cls", b"0")], "only cls; a key ends at the first dot"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, members, message):
    write_tar(tmp_path / "t" / "x.tar", members)
    with pytest.raises(ShardError, match=message) as caught:
        index_tars(str(tmp_path / "t"), output=tmp_path / "index", labels=NAMES)
    assert "x.tar" in str(caught.value)
    assert not (tmp_path / "index" / MANIFEST).exists()


def test_numbers_without_names_compressed_tars_and_no_tars_are_refused(tars, tmp_path):
    with pytest.raises(ShardError, match=r"the labels are numbers \(1\); give the class names with --labels"):
        index_tars(str(tars), output=tmp_path / "index")
    (tmp_path / "z").mkdir()
    with tarfile.open(tmp_path / "z" / "x.tar", "w:gz") as archive:
        archive.add(tars / "00000.tar", "big.jpg")
    data = (tmp_path / "z" / "x.tar").read_bytes()
    (tmp_path / "z" / "x.tar").write_bytes(data + bytes(-len(data) % 512))
    with pytest.raises(ShardError, match=r"not a plain tar .* unpack it if compressed"):
        index_tars(str(tmp_path / "z"), output=tmp_path / "index2")
    with pytest.raises(ShardError, match="the folder holds no"):
        index_tars(str(tmp_path), output=tmp_path / "index3")
    with pytest.raises(ShardError, match=r"passwords and tokens, .* do not belong into an index"):
        index_tars("http://user:secret@127.0.0.1:9/x.tar", output=tmp_path / "index4")


def test_frames_may_have_a_name_before_their_number(tmp_path):
    names = [(f"{before}{number}.jpg", jpeg(number)) for before in ("a.img_", "b.frame.") for number in range(11)]
    labels = [("a.cls", b"1"), ("b.cls", b"0")]
    write_tar(tmp_path / "t" / "x.tar", sorted([*names, *labels]))
    index_tars(str(tmp_path / "t"), output=tmp_path / "index", labels=NAMES)
    with open_dataset(str(tmp_path / "index")) as dataset:
        assert read_everything(dataset) == [[jpeg(number) for number in range(11)]] * 2


@pytest.mark.parametrize("damage", ["header", "zeros", "joined"])
def test_a_tar_whose_rest_would_be_lost_is_refused(tars, tmp_path, damage):
    """tarfile ends at a header that is damaged or empty as it does at the tar's end."""
    path = tars / "00000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as archive:
        start = archive.getmember("a.5.jpg").offset
    if damage == "header":
        data[start] ^= 0xFF
    elif damage == "zeros":
        data[start : start + 512] = bytes(512)
    else:
        data = data + data
    path.write_bytes(data)
    with pytest.raises(ShardError, match=r"00000.tar: not a plain tar \(more data follows where its members end"):
        index_tars(str(tars), output=tmp_path / "index", labels=NAMES)


def test_threads_take_recorded_rows_one_after_another(tmp_path, monkeypatch):
    """As in test_index: with Python 3.11.7 some failed, and their tars were read again."""
    free, load = threading.Lock(), np.load

    def alone(path, **options):
        assert free.acquire(blocking=False)
        time.sleep(0.01)
        free.release()
        return load(path, **options)

    monkeypatch.setattr(np, "load", alone)
    tables = {role: np.zeros(1, np.uint8) for role in INDEX_ROLES}
    with Workspace(tmp_path / "index") as workspace, ThreadPoolExecutor(4) as pool:
        for number in range(4):
            workspace.record(number, {"number": number}, tables)
        found = list(pool.map(workspace.recorded, range(4)))
    assert [one and one[0] for one in found] == [{"number": number} for number in range(4)]


def test_a_killed_call_goes_on_and_a_second_changes_nothing(tars, tmp_path, monkeypatch):
    import shards.foreign as module

    done, read = threading.Event(), module.read_tar

    def fail_at_the_second(stream, where, name, **options):
        if name == "00001.tar":
            assert done.wait(20)
            raise KeyboardInterrupt
        return read(stream, where, name, **options)

    def note(count):
        done.set()

    monkeypatch.setattr(module, "read_tar", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        index_tars(str(tars), output=tmp_path / "index", labels=NAMES, workers=2, progress=note)
    names = []
    monkeypatch.setattr(
        module, "read_tar", lambda stream, where, name, **more: names.append(name) or read(stream, where, name, **more)
    )
    first = index_tars(str(tars), output=tmp_path / "index", labels=NAMES)
    assert names == ["00001.tar"]
    files = {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()}
    assert index_tars(str(tars), output=tmp_path / "index", labels=NAMES) == first
    assert {path: path.read_bytes() for path in (tmp_path / "index").rglob("*") if path.is_file()} == files
    with pytest.raises(ShardError, match="holds another data set"):
        index_tars(str(tars), output=tmp_path / "index", labels=[*NAMES, "golf"])
