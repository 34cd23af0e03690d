"""Checkpoints on disk: which one is meant, what is read, and that no damage goes unnoticed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_frames, tiny_network

from text4vis.config.schema import ConfigError
from text4vis.model.video_clip import build_model
from text4vis.saved import checkpoint
from text4vis.saved.checkpoint import CheckpointError, State

FILES = {"exp_avg.safetensors": b"moments", "model.safetensors": b"weights"}


def write(folder: Path, step: int = 3, files: dict[str, bytes] = FILES) -> Path:
    """A checkpoint whose files hold a few bytes; gives its folder."""
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    state = State(
        step=step, consumed=8 * step, global_batch=8, data_fingerprint="f", config={"seed": 1}, class_names=["höhle"],
        updates=step, evaluated_step=2, best_top1=61.5, figures={"top1": 60.0}, loss_scaler={"cur_scale": 2.0},
        files=digests, inputs={"network.classifier_file": "c"}, mixture=[(5, 1.5)],
    )  # fmt: skip
    (folder / "state.json").write_text(state.to_json(), encoding="utf-8")
    return folder


def write_run(output: Path, steps: list[int]) -> dict[int, Path]:
    return {step: write(output / "checkpoints" / f"step-{step:08d}", step) for step in steps}


def test_a_state_comes_back_as_it_was_and_is_read_by_people(tmp_path):
    folder = write(tmp_path / "step")
    state = checkpoint.read_state(folder)
    assert (state.step, state.consumed, state.updates, state.evaluated_step, state.best_top1) == (3, 24, 3, 2, 61.5)
    assert state.class_names == ["höhle"] and state.mixture == [(5, 1.5)] and state.loss_scaler == {"cur_scale": 2.0}
    text = (folder / "state.json").read_text(encoding="utf-8")
    assert "höhle" in text and state.to_json() == text


def test_a_state_of_an_earlier_version_opens_with_what_it_could_not_know(tmp_path):
    (tmp_path / "state.json").write_text(
        '{"consumed": 24, "step": 3, "global_batch": 8, "data_fingerprint": "f", "config": {}, '
        '"class_names": ["höhle"], "sha256": "e5e6a2976dca2d5ebf4670658a9ba91d4c39761d99fd1feabd5dd8aad4a65904"}',
        encoding="utf-8",
    )
    state = checkpoint.read_state(tmp_path)
    assert (state.updates, state.evaluated_step, state.best_top1) == (0, 0, -1)


def test_a_file_is_compared_part_by_part(tmp_path):
    content, path = bytes(range(100)), tmp_path / "model.safetensors"
    parts = [(stop, hashlib.sha256(content[start:stop]).hexdigest()) for start, stop in ((0, 10), (10, 11), (11, 100))]
    state = State(3, 24, 8, "f", {}, ["a"], files={"model.safetensors": parts})
    (tmp_path / "state.json").write_text(state.to_json(), encoding="utf-8")
    path.write_bytes(content)
    assert checkpoint.verify(tmp_path).files == state.files
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (0, 9, 10, 11, 99)]
    for damaged in (*flipped, content[:-1], content + b"x", b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, its bytes are not those written"):
            checkpoint.verify(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "integer"),
        (b'{"step": 3}', "sha256"),
        (b'{"step": "three", "sha256": ""}', "step"),
        (b"\xff\xfe", "decode"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_state_that_is_none_says_why_and_what_to_do(tmp_path, content, reason):
    (tmp_path / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"state\.json: not a readable checkpoint \(.*{reason}.*\); delete /"):
        checkpoint.read_state(tmp_path)


def test_a_state_that_was_changed_is_refused(tmp_path):
    path = write(tmp_path / "step") / "state.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"consumed": 24', '"consumed": 25'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json: damaged, its content is not what was written"):
        checkpoint.read_state(path.parent)


def test_complete_checkpoints_are_listed_from_old_to_new(tmp_path):
    steps = [7, 30, 2, 11, 100_000_000 - 1, 5, 400, 1]
    folders = write_run(tmp_path, steps)
    write(tmp_path / "checkpoints" / "best", 11)
    (tmp_path / "checkpoints" / "step-00000500").mkdir()  # no state: it is not complete
    assert checkpoint.complete(tmp_path) == [folders[step] for step in sorted(steps)]
    assert checkpoint.latest(tmp_path) == folders[99_999_999]
    assert checkpoint.complete(tmp_path / "none") == [] and checkpoint.latest(tmp_path / "none") is None


def test_a_run_stands_for_its_best_checkpoint_or_its_last(tmp_path):
    folders = write_run(tmp_path, [2, 4])
    assert checkpoint.find(tmp_path) == folders[4]
    assert checkpoint.find(folders[2]) == folders[2]
    best = tmp_path / "checkpoints" / "best"
    best.mkdir()  # a job was killed before it had written it
    assert checkpoint.find(tmp_path) == folders[4]
    best.rmdir()
    write(best, 2)
    assert checkpoint.find(tmp_path) == best and checkpoint.find(best) == best


def test_what_is_no_checkpoint_is_told_what_it_is(tmp_path):
    (tmp_path / "file.pt").touch()
    for path, message in (
        (tmp_path, r"neither an export nor a checkpoint nor a run with one \(no state\.json in it\)"),
        (tmp_path / "file.pt", "a file; name the folder"),
        (tmp_path / "nothing", "not there; name the folder"),
    ):
        with pytest.raises(CheckpointError, match=f"^{path}: {message}"):
            checkpoint.find(path)


@pytest.mark.parametrize("damaged", FILES)
def test_a_changed_byte_of_any_file_is_found(tmp_path, damaged):
    folder = write(tmp_path / "step")
    assert checkpoint.verify(folder) == checkpoint.read_state(folder)
    (folder / damaged).write_bytes(FILES[damaged].swapcase())
    with pytest.raises(CheckpointError, match=f"{damaged}: damaged, its bytes are not those written; delete {folder}"):
        checkpoint.verify(folder)
    others = FILES.keys() - {damaged}
    assert checkpoint.verify(folder, others).step == checkpoint.verify(folder, ()).step == 3
    with pytest.raises(CheckpointError, match=damaged):
        checkpoint.verify(folder, {damaged})
    (folder / damaged).unlink()
    with pytest.raises(CheckpointError, match=f"{damaged}: cannot be read .*; delete {folder}"):
        checkpoint.verify(folder)


def test_the_newest_sound_checkpoint_is_taken_and_each_damaged_one_named(tmp_path):
    folders, warnings = write_run(tmp_path, [1, 2, 3]), []
    assert checkpoint.latest_sound(tmp_path, warnings.append) == folders[3] and not warnings
    (folders[3] / "model.safetensors").write_bytes(b"other")
    (folders[2] / "state.json").write_text("{}")
    assert checkpoint.latest_sound(tmp_path, warnings.append) == folders[1]
    assert [str(folders[step]) in warning for step, warning in zip((3, 2), warnings, strict=True)] == [True, True]
    assert all(warning.endswith("; going back to the one before") for warning in warnings)
    (folders[1] / "exp_avg.safetensors").unlink()
    assert checkpoint.latest_sound(tmp_path, warnings.append) is None


@pytest.mark.parametrize("size", [0, 1, (1 << 22) - 1, 1 << 22, (1 << 22) + 5])
def test_the_digest_is_of_all_bytes(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert checkpoint.sha256_of(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize("classes", [None, ["a", "b", "c"]])
def test_a_model_computes_what_the_saved_one_did(tmp_path, classes):
    network = tiny_network(tmp_path / "clip", classifier_trainable=classes is not None)
    saved, other = (build_model(network, 4, image_size=32).eval() for _ in range(2))
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.mul_(1.1)
    if classes:
        saved.set_classifier(torch.randn(3, 64), classes)
    folder = write(tmp_path / "step")
    state = State(3, 24, 8, "f", {}, ["a", "b", "c"])
    (folder / "state.json").write_text(state.to_json(), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in saved.state_dict().items()}, folder / "model.safetensors")
    checkpoint.load_checkpoint(other, folder)
    frames_BTCHW = random_frames(2, 4)
    assert other.encode_video(frames_BTCHW).equal(saved.encode_video(frames_BTCHW))
    if classes:
        assert other.classifier.equal(saved.classifier) and other.class_names == tuple(classes)
    else:
        assert other.classifier is None


def test_what_is_opened_has_the_averages_and_what_goes_on_training_does_not(tmp_path):
    model = build_model(tiny_network(tmp_path / "clip"), 4, image_size=32)
    values = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    folder = write(tmp_path / "step")
    (folder / "state.json").write_text(State(3, 24, 8, "f", {}, ["a"]).to_json(), encoding="utf-8")
    save_file(values, folder / "model.safetensors")
    save_file({"logit_scale": values["logit_scale"] + 1}, folder / "ema.safetensors")
    for load, added in ((checkpoint.load_checkpoint, 1), (checkpoint.load_to_train, 0)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        load(model, folder)
        assert model.logit_scale.equal(values["logit_scale"] + added)
        assert model.visual.state_dict().keys() and all(
            value.equal(values[f"visual.{name}"]) for name, value in model.visual.state_dict().items()
        )


def test_a_model_that_does_not_fit_or_open_is_an_error(tmp_path):
    network = tiny_network(tmp_path / "clip", sim_header="None")
    model = build_model(network, 4, image_size=32)
    folder = write(tmp_path / "step")
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: cannot be read \(.*\); delete {folder}"):
        checkpoint.load_checkpoint(model, folder)
    save_file({"visual.a": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="the network of the configuration is not the one it was trained with"):
        checkpoint.load_checkpoint(model, folder)


def test_states_are_json_without_surprises(tmp_path):
    """What other programs read: the configuration and figures as plain values beside their digest."""
    values = json.loads((write(tmp_path / "step") / "state.json").read_text(encoding="utf-8"))
    assert values["config"] == {"seed": 1} and values["figures"] == {"top1": 60.0} and len(values["sha256"]) == 64
