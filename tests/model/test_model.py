"""The recogniser on tiny CLIPs: parity with open_clip, invariances, gradients, precision, and every way to name towers.

B videos, T frames, C classes, D embedding width.
"""

import copy
import json
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import resize_pos_embed
from safetensors.torch import load_file, save_file
from tiny import CONFIG, OPENAI_RESNET, OPENAI_VIT, openai_state, random_clip, random_frames, tiny_network, write_clip

from text4vis.config.schema import ConfigError, NetworkConfig
from text4vis.model.sources import CLIP_NAMES
from text4vis.model.video_clip import build_model

T = 4
TEXTS = ["a dog running", "the cat is sleeping", "nothing at all, in the end"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> NetworkConfig:
    return tiny_network(tmp_path_factory.mktemp("clip"))


def built(network, **kwargs):
    torch.manual_seed(0)
    return build_model(network, T, **kwargs).eval()


def classes(num_classes=5, width=64):
    return torch.randn(num_classes, width, generator=torch.Generator().manual_seed(2))


def preprocessed(frames_BTCHW):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (frames_BTCHW.flatten(0, 1) / 255 - mean) / std


def test_embeddings_equal_open_clips(network):
    clip, model = random_clip(CONFIG), built(network)
    frames = random_frames(2, T)
    tokenizer = open_clip.tokenizer.SimpleTokenizer(str(model.text.tokenizer.bpe_path), context_length=32)
    with torch.no_grad():
        expected = clip.encode_image(preprocessed(frames)).unflatten(0, (2, T))
        torch.testing.assert_close(model.encode_frames(frames), expected, **CLOSE)
        torch.testing.assert_close(model.encode_text(TEXTS), clip.encode_text(tokenizer(TEXTS)), **CLOSE)
        torch.testing.assert_close(model.text.encode(TEXTS, batch_size=2), model.encode_text(TEXTS), **CLOSE)


def test_logits_are_the_scaled_cosine(network):
    model, frames = built(network), random_frames(2, T)
    with torch.no_grad():
        videos = model.encode_video(frames)
        expected = torch.stack([torch.cosine_similarity(video, classes()) for video in videos])
        logits = model(frames, classes())
    torch.testing.assert_close(logits, model.logit_scale.exp() * expected, **CLOSE)
    torch.testing.assert_close(model(frames, 3 * classes()), logits, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("config", [OPENAI_VIT, OPENAI_RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_in_openais_layout_gives_open_clips_embeddings(tmp_path, config, suffix):
    clip, path = random_clip(config), tmp_path / f"clip{suffix}"
    state = openai_state(clip)
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = built(NetworkConfig(arch=str(path)))
    frames = random_frames(1, T, size=config["vision_cfg"]["image_size"])
    with torch.no_grad():
        expected = clip.encode_image(preprocessed(frames))
        torch.testing.assert_close(model.encode_frames(frames)[0], expected, **CLOSE)
        tokens = open_clip.tokenizer.SimpleTokenizer(context_length=20)(TEXTS)
        torch.testing.assert_close(model.encode_text(TEXTS), clip.encode_text(tokens), **CLOSE)
    untrained = built(NetworkConfig(arch=str(path), init=False))
    assert untrained.state_dict().keys() == model.state_dict().keys()
    assert not torch.equal(untrained.visual.conv1.weight, model.visual.conv1.weight)


def test_openai_state_dicts_are_understood_as_open_clip_understands_them(tmp_path):
    clip, path = random_clip(OPENAI_VIT), tmp_path / "clip.pt"
    torch.save(openai_state(clip), path)
    half = open_clip.model.build_model_from_openai_state_dict(clip.state_dict()).float()  # keeps its weights in fp16
    model, frames = built(NetworkConfig(arch=str(path))), random_frames(1, T)
    with torch.no_grad():
        expected = half.encode_image(preprocessed(frames))
        torch.testing.assert_close(model.encode_frames(frames)[0], expected, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("config", [OPENAI_VIT, OPENAI_RESNET], ids=["vit", "resnet"])
def test_another_input_size_interpolates_the_positions(tmp_path, config, size):
    size *= 2 if config is OPENAI_RESNET else 1
    path = tmp_path / "clip.pt"
    torch.save(openai_state(random_clip(config)), path)
    network = NetworkConfig(arch=str(path))
    model = built(network, image_size=size)
    assert model.image_size == size == model.clip_config["vision_cfg"]["image_size"]
    assert model(random_frames(2, T, size=size), classes()).shape == (2, 5)
    native, resized = built(network).visual.state_dict(), model.visual.state_dict()
    changed = {name for name, tensor in native.items() if not torch.equal(tensor, resized[name])}
    assert changed == {next(name for name in native if name.endswith("positional_embedding"))}
    if config is OPENAI_VIT:
        state = {f"visual.{name}": tensor for name, tensor in native.items()}
        resize_pos_embed(state, model)
        torch.testing.assert_close(resized["positional_embedding"], state["visual.positional_embedding"])
    with pytest.raises(ConfigError, match=r"data\.input_size: 50 is not a multiple"):
        built(network, image_size=50)


@pytest.mark.parametrize("trunk", ["test_vit", "test_resnet"])
def test_timms_towers_are_built_at_the_size_asked_for(network, tmp_path, trunk):
    vision = {"timm_model_name": trunk, "timm_pool": "avg", "image_size": 160, "timm_proj": "linear"}
    config = CONFIG | {"custom_text": True, "vision_cfg": vision}
    write_clip(tmp_path)
    for size in (160, 96):
        (tmp_path / "timm.json").write_text(json.dumps(config))
        model = built(NetworkConfig(arch=str(tmp_path / "timm.json"), init=False), image_size=size)
        assert model(random_frames(1, T, size=size), classes()).shape == (1, 5)
        (tmp_path / "again.json").write_text(json.dumps(model.clip_config))
        again = built(NetworkConfig(arch=str(tmp_path / "again.json"), init=False))
        assert again.image_size == size
        again.load_state_dict(model.state_dict())
        frames = random_frames(2, T, size=size)
        torch.testing.assert_close(again(frames, classes()), model(frames, classes()), **CLOSE)
    if trunk == "test_vit":
        with pytest.raises(ConfigError, match=r"data\.input_size: 100 is not a multiple .* 16 pixels"):
            built(NetworkConfig(arch=str(tmp_path / "timm.json"), init=False), image_size=100)


def test_towers_of_grouped_convolutions_get_contiguous_frames_on_a_cpu(tmp_path):
    """torch crashes in the backward pass of such a tower otherwise."""
    vision = {"timm_model_name": "test_convnext", "timm_pool": "avg", "image_size": 160, "timm_proj": "linear"}
    write_clip(tmp_path)
    (tmp_path / "timm.json").write_text(json.dumps(CONFIG | {"custom_text": True, "vision_cfg": vision}))
    model = built(NetworkConfig(arch=str(tmp_path / "timm.json"), init=False))
    seen = []
    model.visual.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].is_contiguous()))
    channels_last = random_frames(1, T, size=160).permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    model(channels_last, classes())
    assert seen == [True]


def test_memory_format_of_frames_does_not_matter(network):
    model, frames_BTCHW = built(network), random_frames(2, T)
    channels_last = frames_BTCHW.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert not channels_last.is_contiguous()
    with torch.no_grad():
        torch.testing.assert_close(model(channels_last, classes()), model(frames_BTCHW, classes()), **CLOSE)


def test_permuting_a_batch_permutes_its_logits(network):
    model, frames, order = built(network), random_frames(3, T), [2, 0, 1]
    with torch.no_grad():
        torch.testing.assert_close(model(frames[order], classes()), model(frames, classes())[order], **CLOSE)


def test_order_of_frames_matters_to_transf_only(network):
    frames = random_frames(2, T)
    for header, blind in {"None": True, "Transf": False}.items():
        model = built(replace(network, sim_header=header))
        with torch.no_grad():
            same = torch.allclose(model(frames, classes()), model(frames.flip(1), classes()), **CLOSE)
        assert same == blind


def test_the_text_tower_is_not_part_of_the_module(network):
    model = built(network)
    text = model.text.state_dict()
    held = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    assert text and not held & {tensor.data_ptr() for tensor in text.values()}
    assert {name.split(".")[0] for name in model.state_dict()} == {"visual", "fusion_model", "logit_scale"}
    before = model.encode_text(TEXTS)
    after = model.to(torch.bfloat16).encode_text(TEXTS)
    assert after.dtype == torch.float32 and torch.equal(before, after) and not after.requires_grad


def test_gradients_reach_everything_that_trains(network):
    model = built(network).train()
    labels = torch.tensor([0, 1])
    torch.nn.functional.cross_entropy(model(random_frames(2, T), classes()), labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    assert model.logit_scale.shape == (1,)


def test_a_frozen_visual_tower_gets_no_gradient_and_keeps_its_statistics(tmp_path):
    path = tmp_path / "resnet.pt"
    torch.save(openai_state(random_clip(OPENAI_RESNET)), path)
    model = built(NetworkConfig(arch=str(path), fix_video=True)).train()
    before = copy.deepcopy(model.visual.state_dict())
    model(random_frames(2, T, size=64), classes()).sum().backward()
    assert all(parameter.grad is None for parameter in model.visual.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.visual.state_dict().items())
    assert all(parameter.grad is not None for parameter in model.fusion_model.parameters())


@pytest.mark.parametrize("header", ["None", "Transf"])
def test_bf16_is_close_to_fp32_and_gives_fp32(network, header):
    model, frames = built(replace(network, sim_header=header)), random_frames(3, T)
    with torch.no_grad():
        expected = model(frames, classes())
        found = model.to(torch.bfloat16)(frames, classes())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.25, rtol=0.05)


def test_frames_of_another_shape_or_type_are_refused(network):
    model = built(network)
    for frames in (random_frames(1, T, size=40), random_frames(1, T).float(), random_frames(1, T)[0]):
        with pytest.raises(ValueError, match=r"expected \(B, T, 3, 32, 32\) uint8"):
            model.encode_frames(frames)


def test_more_segments_than_positions_is_an_error(network):
    with pytest.raises(ConfigError, match=r"data\.num_segments: 78"):
        build_model(network, 78)


def test_clips_own_names_are_quick_gelu_models_of_open_clip():
    for name, plain in CLIP_NAMES.items():
        config = open_clip.get_model_config(f"{plain}-quickgelu")
        assert config["quick_gelu"], name


def test_a_name_without_weights_builds_without_a_download():
    model = build_model(NetworkConfig(arch="RN50", init=False, sim_header="None"), T)
    assert model.clip_config["quick_gelu"] and model.embed_dim == 1024 and model.image_size == 224
    assert model.encode_text(["archery"]).shape == (1, 1024)


@pytest.mark.parametrize("config", [CONFIG, OPENAI_RESNET], ids=["vit", "resnet"])
def test_a_tag_of_open_clips_brings_weights_and_the_normalisation_of_pixels(tmp_path, monkeypatch, config):
    config = copy.deepcopy(config) | {"quick_gelu": False}
    config["text_cfg"].pop("tokenizer_kwargs", None)
    config["text_cfg"]["vocab_size"] = 49408
    clip = random_clip(config)
    torch.save(clip.state_dict(), tmp_path / "downloaded.pt")
    tag = {"url": "https://host/tiny.pt", "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"mine": tag})
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *_, **__: str(tmp_path / "downloaded.pt"))
    network = NetworkConfig(arch="tiny", pretrained="mine")
    model, size = built(network), config["vision_cfg"]["image_size"]
    assert (model.mean, model.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    frames = random_frames(1, T, size=size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.mean, model.std))
    with torch.no_grad():
        expected = clip.encode_image((frames[0] / 255 - mean) / std)
        torch.testing.assert_close(model.encode_frames(frames)[0], expected, atol=1e-4, rtol=1e-4)
    assert built(network, image_size=2 * size).image_size == 2 * size
    with pytest.raises(ConfigError, match=r"network\.pretrained: tiny has no weights 'other'.*its tags: mine"):
        built(NetworkConfig(arch="tiny", pretrained="other"))


def test_a_local_file_for_a_named_architecture(network, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"tiny": {**OPENAI_VIT}})
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in random_clip(OPENAI_VIT).state_dict().items()}}, tmp_path / "w.pt"
    )
    pixels = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    model = built(NetworkConfig(arch="tiny", pretrained=str(tmp_path / "w.pt"), **pixels))
    assert torch.equal(model.visual.proj, random_clip(OPENAI_VIT).visual.proj)
    assert model.logit_scale.item() == random_clip(OPENAI_VIT).logit_scale.item()


def test_weights_that_cannot_be_fetched_give_one_line_with_the_fix(monkeypatch):
    def unreachable(*_, **__):
        raise RuntimeError("no\nroute")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", unreachable)
    with pytest.raises(ConfigError) as caught:
        build_model(NetworkConfig(arch="ViT-B/32"), T)
    message = str(caught.value)
    assert "'openai' of ViT-B-32-quickgelu" in message and "network.pretrained: /path/to/file" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "ViT-B16"}, r"network\.arch: 'ViT-B16'.*did you mean ViT-B/16"),
        ({"arch": "ViT-B-16"}, r"network\.pretrained: ViT-B-16 needs a tag.*laion2b"),
        ({"arch": "ViT-B-16", "pretrained": "openai"}, r"network\.arch: .*use ViT-B-16-quickgelu"),
        ({"arch": "ViT-B/16", "pretrained": "nonsense"}, r"network\.pretrained: ViT-B-16-quickgelu has no weights"),
        ({"arch": "ViT-B/16", "pretrained": "absent.pt"}, r"network\.pretrained: no such file: absent\.pt"),
        ({"arch": "absent.json"}, r"network\.arch: no such file: absent\.json"),
        ({"arch": "absent.pt"}, r"network\.arch: no such file: absent\.pt"),
        ({"arch": "coca_ViT-B-32", "init": False}, r"network\.arch: .*captioning"),
    ],
)
def test_what_cannot_be_built_names_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(NetworkConfig(**changes), T)


def test_a_json_without_weights_or_with_wrong_ones_names_them(tmp_path):
    path = write_clip(tmp_path)
    weights = path.with_suffix(".safetensors")
    state = load_file(weights)
    state["visual.surplus"] = state.pop("visual.proj")
    save_file(state, weights)
    with pytest.raises(ConfigError, match=r"missing: visual\.proj; unexpected: visual\.surplus"):
        build_model(NetworkConfig(arch=str(path)), T)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"network\.pretrained: no such file: .*tiny\.safetensors"):
        build_model(NetworkConfig(arch=str(path)), T)
    assert build_model(NetworkConfig(arch=str(path), init=False), T).embed_dim == 64


def test_a_vocabulary_that_does_not_fit_is_an_error(tmp_path):
    path = write_clip(tmp_path)
    config = copy.deepcopy(CONFIG)
    del config["text_cfg"]["tokenizer_kwargs"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="vocab_size is 518, but its tokenizer has 49408"):
        build_model(NetworkConfig(arch=str(path), init=False), T)


class Payload:
    """Says so if it is ever rebuilt from a pickle."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


def test_pickles_and_unknown_torchscript_are_refused_unread(tmp_path):
    torch.save({"visual.proj": Payload()}, tmp_path / "pickle.pt")
    with pytest.raises(ConfigError, match="pickled code is never run"):
        build_model(NetworkConfig(arch=str(tmp_path / "pickle.pt")), T)
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "jit.pt")
    with pytest.raises(ConfigError, match="TorchScript archive"):
        build_model(NetworkConfig(arch=str(tmp_path / "jit.pt")), T)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "pickle.pt").read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"cut\.pt is not a readable torch file"):
        build_model(NetworkConfig(arch=str(tmp_path / "cut.pt")), T)


def test_a_published_torchscript_archive_is_opened(tmp_path, monkeypatch):
    import hashlib

    clip = random_clip(OPENAI_VIT)

    class Archive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("visual", "transformer", "token_embedding", "ln_final"):
                setattr(self, name, _bare(getattr(clip, name)))
            for name in ("positional_embedding", "text_projection", "logit_scale"):
                setattr(self, name, getattr(clip, name))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    path = tmp_path / "ViT-tiny.pt"
    torch.jit.script(Archive()).save(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(
        "text4vis.model.tensors.get_pretrained_url", lambda *_: f"https://host/models/{digest}/ViT-tiny.pt"
    )
    model = build_model(NetworkConfig(arch=str(path), sim_header="None"), T)
    assert all(torch.equal(tensor, clip.visual.state_dict()[n]) for n, tensor in model.visual.state_dict().items())


def _bare(module: torch.nn.Module) -> torch.nn.Module:
    """A module's tensors under their names, without its code."""
    bare = torch.nn.Module()
    for name, child in module.named_children():
        bare.add_module(name, _bare(child))
    for name, parameter in module.named_parameters(recurse=False):
        bare.register_parameter(name, parameter)
    return bare
