"""The original project's checkpoints and our exports: what goes in comes out, and what does not fit is named."""

import json
import re
from dataclasses import replace

import pytest
import torch
from original_files import NAMES, T, original_state, save_train, save_train_nce, trained
from safetensors.torch import load_file, save_file
from tiny import CONFIG, OPENAI_VIT, openai_state, random_clip, random_frames, tiny_network

from text4vis.classifier.embeddings import build_classifier
from text4vis.config.schema import Config, ConfigError, DataConfig, NetworkConfig
from text4vis.model import tensors
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import export_model, load_export, load_text4vis


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> NetworkConfig:
    return tiny_network(tmp_path_factory.mktemp("clip"))


def logits(model, frames=None):
    frames = random_frames(2, T, size=model.image_size) if frames is None else frames
    with torch.no_grad():
        return model.eval()(frames, torch.eye(3, model.embed_dim))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("header", ["Transf", "None"])
@pytest.mark.parametrize("save", [save_train, save_train_nce])
def test_original_checkpoints_give_the_same_logits(network, tmp_path, save, header, prefix):
    network = replace(network, sim_header=header)
    model = trained(network)
    save(tmp_path / "best.pt", model, prefix)
    loaded = load_text4vis(tmp_path / "best.pt", network, T)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.logit_scale.shape == (1,)
    seed = 7 if save is save_train_nce else 0  # train_nce.py trains the text tower, train.py does not hold one
    expected = random_clip(CONFIG, seed)
    tokens = loaded.text.tokenize(NAMES)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encode_text(NAMES), expected.encode_text(tokens))


def test_the_state_dict_alone_is_enough(network, tmp_path):
    """What somebody saves whose checkpoint held more than tensors and numbers."""
    model = trained(network)
    torch.save(original_state(model), tmp_path / "state.pt")
    assert torch.equal(logits(load_text4vis(tmp_path / "state.pt", network, T)), logits(model))


def test_a_checkpoint_of_a_published_size_needs_no_renaming(tmp_path):
    """open_clip's names under `visual.` are OpenAI's; the released files have exactly these for ViT-B."""
    block = "visual.transformer.resblocks.0"
    state = random_clip(OPENAI_VIT).state_dict()
    for name in ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"):
        assert f"{block}.{name}" in state
    for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        assert f"{block}.{name}.weight" in state
    top = {name.split(".")[1] for name in state if name.startswith("visual.")}
    assert top == {
        "class_embedding",
        "conv1",
        "ln_post",
        "ln_pre",
        "positional_embedding",
        "proj",
        "transformer",
    }


def test_keys_that_do_not_fit_are_reported_by_name(network, tmp_path):
    model, path = trained(network), tmp_path / "best.pt"
    state = original_state(model)
    state["visual.time_embedding"] = torch.zeros(T, 64)
    del state["visual.ln_post.weight"]
    state["visual.proj"] = torch.zeros(64, 32)
    torch.save({"model_state_dict": state}, path)
    with pytest.raises(ConfigError) as caught:
        load_text4vis(path, network, T)
    message = str(caught.value)
    assert "missing: visual.ln_post.weight;" in message
    assert "unexpected: visual.time_embedding;" in message
    assert "shape: visual.proj [64, 32] for [64, 64]" in message


def test_a_head_that_the_network_lacks_points_at_the_key(network, tmp_path):
    save_train(tmp_path / "best.pt", trained(network))
    with pytest.raises(ConfigError, match=r"67 more; the file has a temporal head: check network\.sim_header"):
        load_text4vis(tmp_path / "best.pt", replace(network, sim_header="None"), T)
    save_train(tmp_path / "best.pt", trained(replace(network, sim_header="None")))
    with pytest.raises(ConfigError, match=r"the file has no temporal head: check network\.sim_header"):
        load_text4vis(tmp_path / "best.pt", network, T)


def released_names(header: str, **options: object) -> set[str]:
    """Names in a file of the release, from those of CLIP: its options wrap blocks or add tensors."""
    names = {"logit_scale"} | {f"fusion_model.{name}" for name in heads(header)}
    for name in random_clip(CONFIG).state_dict():
        if name.startswith("visual."):
            wrapped = options.get("tm") == "tsm" and ".resblocks." in name
            names.add(re.sub(r"(resblocks\.\d+\.)", r"\1net.", name) if wrapped else name)
    layers = range(CONFIG["vision_cfg"]["layers"])
    if options.get("tm") == "tokent1d":
        names |= {f"visual.transformer.resblocks.{layer}.control_point.conv.weight" for layer in layers}
    return names | ({"visual.time_embedding"} if options.get("joint_st") else set())


def heads(header: str) -> list[str]:
    if header == "None":
        return []
    blocks = ("attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias", "ln_1.weight",
              "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
              "mlp.c_proj.bias")  # fmt: skip
    return ["frame_position_embeddings.weight"] + [f"transformer.resblocks.{n}.{b}" for n in range(6) for b in blocks]


OPTIONS = [{"tm": "tsm"}, {"tm": "tokenshift"}, {"tm": "tokent1d"}, {"joint_st": True, "sim_header": "None"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("save", [save_train, save_train_nce])
def test_original_checkpoints_with_temporal_towers_load_by_their_names(network, tmp_path, save, options):
    network = replace(network, **options)
    model = trained(network)
    assert set(original_state(model)) == released_names(network.sim_header, **options)
    save(tmp_path / "best.pt", model, "module.")
    assert torch.equal(logits(load_text4vis(tmp_path / "best.pt", network, T)), logits(model))


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("tm") != "tokenshift"], ids=str)
def test_a_temporal_tower_that_the_network_lacks_points_at_the_key(network, tmp_path, options):
    plain = replace(network, sim_header=options.get("sim_header", "Transf"))
    save_train(tmp_path / "best.pt", trained(replace(network, **options)))
    key = next(key for key in options if key != "sim_header")
    with pytest.raises(ConfigError, match=rf"the file has a [a-z ]+: check network\.{key}"):
        load_text4vis(tmp_path / "best.pt", plain, T)
    save_train(tmp_path / "best.pt", trained(plain))
    with pytest.raises(ConfigError, match=rf"the file has no [a-z ]+: check network\.{key}"):
        load_text4vis(tmp_path / "best.pt", replace(network, **options), T)


def test_half_precision_files_load_as_fp32(network, tmp_path):
    model = trained(network)
    state = {name: tensor.half() for name, tensor in original_state(model).items()}
    torch.save({"epoch": 1, "model_state_dict": state}, tmp_path / "best.pt")
    loaded = load_text4vis(tmp_path / "best.pt", network, T)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.parameters())
    assert torch.equal(loaded.visual.proj, model.visual.proj.half().float())


def test_files_that_are_no_checkpoints_are_refused(network, tmp_path):
    torch.save({"weights": {}}, tmp_path / "other.pt")
    torch.save({"model_state_dict": {}, "args": pytest.Item}, tmp_path / "pickle.pt")
    for name, message in {
        "other.pt": "has no `model_state_dict`",
        "pickle.pt": "pickled code is never run",
        "absent.pt": "no such file",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load_text4vis(tmp_path / name, network, T)


def exported(folder, network, image_size=None):
    torch.manual_seed(1)
    model = build_model(network, T, image_size=image_size).eval()
    config = Config(network=network, data=DataConfig(num_segments=T, input_size=model.image_size, dataset="tiny"))
    embeddings = build_classifier(config, model, NAMES)
    export_model(folder, model, network, config.to_dict(), NAMES, embeddings, {"epoch": 3})
    return model, config, embeddings


@pytest.mark.parametrize("header", ["None", "Transf", "Transf_cls"])
def test_an_export_stands_alone_and_is_the_same_model(tmp_path, header):
    network = tiny_network(tmp_path / "source", sim_header=header)
    model, config, embeddings = exported(tmp_path / "export", network, image_size=48)
    (tmp_path / "export").rename(tmp_path / "moved")
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    export = load_export(tmp_path / "moved")
    assert torch.equal(logits(export.model), logits(model))
    assert torch.equal(export.model.encode_text(NAMES), model.encode_text(NAMES))
    assert torch.equal(export.class_embeddings, embeddings)
    assert (export.class_names, export.card, export.config) == (NAMES, {"epoch": 3}, config.to_dict())
    assert export.network.sim_header == header
    assert export.model.text.tokenizer.bpe_path.parent == tmp_path / "moved"


def test_an_export_from_openais_layout_keeps_open_clips_embeddings(tmp_path):
    clip = random_clip(OPENAI_VIT)
    torch.save(openai_state(clip), tmp_path / "clip.pt")
    exported(tmp_path / "export", NetworkConfig(arch=str(tmp_path / "clip.pt")))
    model = load_export(tmp_path / "export").model
    frames = random_frames(1, T)
    scale, shift = 1 / (255 * torch.tensor(model.std)), torch.tensor(model.mean) / torch.tensor(model.std)
    pixels = frames[0] * scale.view(3, 1, 1) - shift.view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_frames(frames)[0], clip.encode_image(pixels), atol=1e-5, rtol=1e-5)
        tokens = model.text.tokenize(NAMES)
        torch.testing.assert_close(model.encode_text(NAMES), clip.encode_text(tokens), atol=1e-5, rtol=1e-5)


def test_an_export_can_be_exported_again_even_over_itself(tmp_path, network):
    model, _, embeddings = exported(tmp_path / "export", network)
    for _ in range(2):
        export = load_export(tmp_path / "export")
        classes = export.class_embeddings
        export_model(tmp_path / "export", export.model, export.network, export.config, NAMES, classes, export.card)
    export = load_export(tmp_path / "export")
    assert torch.equal(logits(export.model), logits(model)) and torch.equal(export.class_embeddings, embeddings)


def test_a_damaged_export_is_an_error_that_names_the_file(tmp_path, network):
    folder = tmp_path / "export"
    exported(folder, network)
    index = json.loads((folder / "export.json").read_text())
    state = load_file(folder / "model.safetensors")

    (folder / "export.json").write_text(json.dumps(index | {"class_names": NAMES[:2]}))
    with pytest.raises(ConfigError, match=r"classes\.safetensors: does not match the 2 class names"):
        load_export(folder)
    (folder / "export.json").write_text(json.dumps(index | {"format": "other"}))
    with pytest.raises(ConfigError, match="not of format"):
        load_export(folder)
    (folder / "export.json").write_text(json.dumps({name: index[name] for name in ("format", "network", "config")}))
    with pytest.raises(ConfigError, match="lacks card, class_names, num_segments"):
        load_export(folder)
    (folder / "export.json").write_text(json.dumps(index))
    save_file({name: tensor for name, tensor in state.items() if name != "visual.proj"}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.safetensors does not fit the model; missing: visual\.proj"):
        load_export(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no such file: .*model\.safetensors"):
        load_export(folder)
    with pytest.raises(ConfigError, match=r"not an export \(no export\.json\)"):
        load_export(tmp_path / "absent")


def test_names_and_embeddings_that_disagree_are_not_exported(tmp_path, network):
    model = build_model(network, T)
    with pytest.raises(ConfigError, match="3 class names, but class embeddings of shape"):
        export_model(tmp_path / "export", model, network, {}, NAMES, torch.zeros(2, 64), {})
    assert not (tmp_path / "export").exists()


def test_a_trained_classifier_travels_with_its_export_and_answers_for_its_names_only(network, tmp_path):
    network = replace(network, classifier_trainable=True)
    config, model = Config(network=network), trained(network)
    model.set_classifier(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), NAMES)
    classes = build_classifier(config, model, NAMES)
    torch.testing.assert_close(classes, torch.nn.functional.normalize(model.classifier.detach(), dim=-1))
    export_model(tmp_path, model, network, config.to_dict(), NAMES, classes, {})
    assert "classifier" not in load_file(tmp_path / "model.safetensors")
    loaded = load_export(tmp_path).model
    torch.testing.assert_close(build_classifier(config, loaded, NAMES[::-1][:2]), classes.flip(0)[:2])
    with pytest.raises(ConfigError, match="has no class 'sailing'"):
        build_classifier(config, loaded, ["archery", "sailing"])


def test_a_trained_text_tower_is_exported_and_frozen_again(network, tmp_path):
    model = build_model(replace(network, fix_text=False), T)
    with torch.no_grad():
        model.text_tower.text_projection.add_(0.1)
    config = Config(network=replace(network, fix_text=False))
    classes = build_classifier(config, model, NAMES)
    export_model(tmp_path, model, config.network, config.to_dict(), NAMES, classes, {})
    assert all(not name.startswith("text_tower") for name in load_file(tmp_path / "model.safetensors"))
    loaded = load_export(tmp_path).model
    assert loaded.text_tower is None
    torch.testing.assert_close(loaded.encode_text(NAMES), model.encode_text(NAMES))
    torch.testing.assert_close(build_classifier(config, loaded, NAMES), classes)


@pytest.mark.parametrize("kept", [0, 7, 90])
def test_weights_that_a_full_disk_loses_at_the_close_are_named(tmp_path, monkeypatch, kept):
    """The library's writer does not say so. kept: bytes of the file that stay."""

    def save_and_lose(state, path, metadata):
        save_file(state, path, metadata)
        with path.open("r+b") as file:
            file.truncate(kept)

    monkeypatch.setattr(tensors, "save_file", save_and_lose)
    path = tmp_path / "w.safetensors"
    with pytest.raises(OSError, match=re.escape(f"{path}: cannot be written (") + ".*; free space on the disk"):
        tensors.write_tensors(path, {"a": torch.ones(100)})
