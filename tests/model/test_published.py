"""Models of every kind in their published layout give open_clip's own class embeddings and logits, from a JPEG on."""

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from published import KINDS, jpeg, publish, write_tokenizer
from safetensors.torch import save_file
from tiny import CONFIG, OPENAI_VIT, openai_state, random_clip, write_clip
from torch.nn.functional import normalize

from text4vis.classifier.embeddings import text_classifier
from text4vis.config.loading import config_from_dict
from text4vis.config.schema import Config, ConfigError, DataConfig, NetworkConfig
from text4vis.data.augmentation import eval_geometry, frame_rule
from text4vis.data.finishing import place
from text4vis.model.preprocessing import KEYS, settle
from text4vis.model.tokenizing import Tokenizer
from text4vis.model.video_clip import build_model

NAMES = ["Archery", "surfing; skiing!", "человек бежит", "ein Mensch läuft"]
SLOW = {"pe-core", "mobileclip2", "eva"}  # their smallest towers are not that small
EACH_KIND = [pytest.param(kind, marks=[pytest.mark.long] if kind in SLOW else []) for kind in KINDS]


def settled(folder, kind, arch=None, **data) -> Config:
    """The configuration of a recipe that names nothing but the folder and the size of the frames."""
    size = KINDS[kind][0]["vision_cfg"]["image_size"]
    if KINDS[kind][1].get("resize_mode", "shortest") == "shortest":
        data["scale_size"] = size  # open_clip crops nothing off the short side
    network = NetworkConfig(arch=arch or f"local-dir:{folder}", sim_header="None")
    return settle(Config(data=DataConfig(input_size=size, **data), network=network))


def frame_as_evaluated(image: Image.Image, config: Config) -> torch.Tensor:
    """One video of one frame, (1, 1, 3, S, S) uint8."""
    side, pixels = config.data.input_size, np.asarray(image)
    resize, interpolation = frame_rule(config.data)
    geometry = eval_geometry(*pixels.shape[:2], config.scale_size, side, 1, resize=resize, interpolation=interpolation)
    out_VTSS3 = np.empty((1, 1, side, side, 3), np.uint8)
    place(pixels, geometry, [(0, 0, 0)], out_VTSS3)
    return torch.from_numpy(out_VTSS3).permute(0, 1, 4, 2, 3)


@pytest.mark.parametrize("kind", EACH_KIND)
def test_class_embeddings_and_logits_are_open_clips(tmp_path, kind):
    folder = publish(tmp_path, kind)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    config = settled(folder, kind)
    model = build_model(config.network, 1, image_size=config.data.input_size).eval()
    texts = [f"a video of a person {name}." for name in NAMES]
    with torch.no_grad():
        expected_CD = clip.eval().encode_text(tokenizer(texts), normalize=True)
        classes_CD = text_classifier(model, NAMES, config.network.template)
        torch.testing.assert_close(classes_CD, expected_CD, atol=1e-5, rtol=0)
        assert (expected_CD @ expected_CD.T).min() < 0.9999, "all texts are alike"
        videos = []
        for size in ((150, 100), (61, 128)):
            image = Image.open(io.BytesIO(jpeg(*size)))
            expected_D = clip.encode_image(preprocess(image)[None], normalize=True)
            found = frame_as_evaluated(image, config)
            logits_BC = clip.logit_scale.exp() * expected_D @ expected_CD.T
            torch.testing.assert_close(normalize(model.encode_video(found), dim=-1), expected_D, atol=1e-5, rtol=0)
            scale = clip.logit_scale.exp().item()
            torch.testing.assert_close(model(found, classes_CD) / scale, logits_BC / scale, atol=1e-5, rtol=0)
            videos.append(expected_D)
        assert (videos[0] - videos[1]).abs().max() > 1e-3, "all frames are alike"


def test_what_the_folder_says_is_settled_and_said(tmp_path):
    lines = []
    folder = publish(tmp_path / "siglip2", "siglip2")
    config = settle(
        Config(network=NetworkConfig(arch=f"local-dir:{folder}"), data=DataConfig(input_size=160)), say=lines.append
    )
    assert (config.data.resize, config.data.interpolation) == ("squash", "bicubic")
    assert (config.network.mean, config.network.activation) == ((0.5, 0.5, 0.5), "gelu")
    (line,) = lines
    assert "data.resize squash" in line and "(its own)" in line and str(folder) in line
    assert settle(config) == config
    content = json.loads((folder / "open_clip_config.json").read_text())
    assert content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "timm/ViT-B-16-SigLIP2"


@pytest.fixture
def bare(tmp_path) -> Path:
    """A model JSON without preprocess_cfg, with its weights."""
    path = write_clip(tmp_path)
    path.write_text(json.dumps(CONFIG))
    return path


def test_what_nothing_tells_is_asked_for_by_name(bare, tmp_path):
    config = Config(network=NetworkConfig(arch=str(bare)))
    with pytest.raises(ConfigError) as caught:
        settle(config)
    message = str(caught.value)
    for key in ("network.mean", "network.std", "data.resize", "data.interpolation"):
        assert f"{key}: open_clip knows no published weights" in message
    assert "network.activation" not in message, "the configuration tells it"
    with pytest.raises(ConfigError, match=r"network\.mean: .*network\.std: "):
        build_model(config.network, 1)
    lines = []
    given = replace(config, network=replace(config.network, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2)))
    given = replace(given, data=replace(given.data, resize="squash", interpolation="bilinear"))
    assert settle(given, say=lines.append).network.activation == "quick_gelu"
    assert "network.mean [0.5, 0.5, 0.5]" in lines[0] and "(given)" in lines[0]
    assert build_model(given.network, 1).mean == (0.5, 0.5, 0.5)


def test_random_weights_take_clips_pixels(bare):
    config = settle(Config(network=NetworkConfig(arch=str(bare), init=False)))
    assert (config.network.mean, config.data.resize) == (OPENAI_DATASET_MEAN, "shortest")


def test_the_activation_of_a_bare_weights_file_is_asked_for_unless_it_is_openais(tmp_path):
    clip = random_clip(OPENAI_VIT)
    torch.save(clip.state_dict(), tmp_path / "somebodys.pt")
    torch.save(openai_state(clip), tmp_path / "openais.pt")
    with pytest.raises(ConfigError, match=r"network\.activation: the tensors do not show it"):
        settle(Config(network=NetworkConfig(arch=str(tmp_path / "somebodys.pt"))))
    config = settle(Config(network=NetworkConfig(arch=str(tmp_path / "openais.pt"))))
    assert (config.network.activation, config.network.mean) == ("quick_gelu", OPENAI_DATASET_MEAN)
    pixels = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    found = {}
    for activation in ("gelu", "quick_gelu"):
        network = NetworkConfig(arch=str(tmp_path / "somebodys.pt"), activation=activation, **pixels)
        found[activation] = build_model(network, 1).encode_text(["archery"])
    expected = clip.encode_text(open_clip.tokenizer.SimpleTokenizer(context_length=20)(["archery"]))
    torch.testing.assert_close(found["quick_gelu"], expected.detach(), atol=1e-5, rtol=1e-5)
    assert (found["gelu"] - found["quick_gelu"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arch", "activation", "asked"),
    [
        ("ViT-B-32", None, {"network.activation"}),
        ("ViT-B-32", "gelu", set()),
        ("ViT-B-32-quickgelu", None, set()),
        ("ViT-B/32", None, {"network.activation"}),
        ("ViT-L-14", None, {"network.activation"}),
        ("ViT-L-14", "quick_gelu", set()),
        ("ViT-L-14", "gelu", {"network.mean", "network.std"}),  # laion2b_s32b_b82k saw other pixels than the others
        ("ViT-H-14-quickgelu", None, {"data.resize"}),  # dfn5b is squashed, metaclip_fullcc is not
        ("ViT-B-16-SigLIP2", None, set()),
        ("MobileCLIP2-S0", None, set()),
        ("PE-Core-B-16", None, set()),
    ],
)
def test_a_name_with_a_file_asks_for_what_published_weights_differ_in(tmp_path, arch, activation, asked):
    save_file({"nobodys": torch.zeros(1)}, tmp_path / "weights.safetensors")
    network = NetworkConfig(arch=arch, pretrained=str(tmp_path / "weights.safetensors"), activation=activation)
    if not asked:
        config = settle(Config(network=network))
        expected = next(iter(open_clip.pretrained._PRETRAINED[arch].values()))
        assert config.network.mean == tuple(expected["mean"])
        assert (config.data.resize, config.data.interpolation) == (expected["resize_mode"], expected["interpolation"])
        return
    with pytest.raises(ConfigError) as caught:
        settle(Config(network=network))
    assert {key for key in KEYS if f"{key}: " in str(caught.value)} == asked


def test_what_is_given_comes_before_what_the_model_says(tmp_path):
    config = settled(publish(tmp_path, "siglip2"), "siglip2", resize="shortest", scale_size=180)
    assert (config.data.resize, config.data.interpolation) == ("shortest", "bicubic")
    with pytest.raises(ConfigError, match=r"data\.scale_size: nothing is cropped with data\.resize squash"):
        settled(tmp_path, "siglip2", scale_size=180)
    with pytest.raises(ConfigError, match=r"data\.test_crops: 3 crops of a frame need data\.resize shortest"):
        settled(tmp_path, "siglip2", test_crops=3)


def test_a_run_that_goes_on_keeps_what_it_recorded(bare):
    recorded = replace(Config(), network=replace(NetworkConfig(), mean=(0.1, 0.2, 0.3), std=(1, 1, 1)))
    recorded = replace(recorded, data=DataConfig(resize="longest", interpolation="bilinear"))
    recorded = replace(recorded, network=replace(recorded.network, activation="gelu"))
    config = settle(Config(network=NetworkConfig(arch="nowhere.json")), recorded)  # which needs not be there
    assert (config.network.mean, config.data.resize) == ((0.1, 0.2, 0.3), "longest")
    former = config_from_dict({"network": {"arch": str(bare)}}, "a run of a version that recorded nothing")
    config = settle(Config(network=NetworkConfig(arch=str(bare))), former)
    assert (config.network.mean, config.data.resize) == (OPENAI_DATASET_MEAN, "shortest")


def test_a_hub_is_asked_once_and_its_absence_names_the_way_round(tmp_path, monkeypatch):
    folder = publish(tmp_path / "hub", "laion")

    def download(repo_id, filename, **_):
        if repo_id != "org/name" or not (folder / filename).exists():
            raise OSError("no\nroute")
        return str(folder / filename)

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    from_hub, from_folder = (
        build_model(settled(folder, "laion", arch=arch).network, 1)
        for arch in ("hf-hub:org/name", f"local-dir:{folder}")
    )
    assert torch.equal(from_hub.encode_text(NAMES), from_folder.encode_text(NAMES))
    with pytest.raises(
        ConfigError, match=r"network\.arch: hf-hub:org/other: open_clip_config\.json could not be.*local-dir:"
    ):
        settle(Config(network=NetworkConfig(arch="hf-hub:org/other")))


def test_a_folder_without_what_it_needs_says_so(tmp_path):
    folder = publish(tmp_path / "a", "siglip")
    network = NetworkConfig(arch=f"local-dir:{folder}")
    (folder / "open_clip_model.safetensors").rename(folder / "one.safetensors")
    assert build_model(network, 1).embed_dim == 64, "the only one is taken"
    shutil.copy(folder / "one.safetensors", folder / "two.safetensors")
    with pytest.raises(
        ConfigError, match=r"holds one\.safetensors, two\.safetensors; name the file in network\.pretrained"
    ):
        build_model(network, 1)
    network = replace(network, pretrained=str(folder / "two.safetensors"))
    assert build_model(network, 1).embed_dim == 64
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"its tokenizer .* (has no vocabulary|cannot be opened)"):
        build_model(network, 1)
    with pytest.raises(ConfigError, match=r"no such file: .*absent/open_clip_config\.json"):
        settle(Config(network=NetworkConfig(arch=f"local-dir:{tmp_path}/absent")))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    folder = publish(tmp_path, "siglip2")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"needs the package transformers: pip install 'text4vis\[tokenizers\]'"):
        build_model(NetworkConfig(arch=f"local-dir:{folder}"), 1)


def test_a_configuration_cannot_have_code_run(tmp_path):
    folder = publish(tmp_path, "siglip2")
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["model_cfg"]["text_cfg"]["tokenizer_kwargs"]["trust_remote_code"] = True
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"tokenizer_kwargs: trust_remote_code is not supported"):
        build_model(NetworkConfig(arch=f"local-dir:{folder}"), 1)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("siglip2", "right"),
        ("siglip2", "left"),
        ("siglip", "right"),
        ("xlm-roberta", "right"),
        ("xlm-roberta", "clips"),
    ],
)
def test_a_text_fits_up_to_the_last_token_and_no_further(tmp_path, kind, mode):
    """Wherever the tokenizer pads. clips: start and end around the text, and a class token last of all."""
    length = 12
    text_config = KINDS[kind][0]["text_cfg"] | {"context_length": length, "tokenizer_kwargs": {}}
    write_tokenizer(tmp_path, kind)
    tokenizer = Tokenizer(text_config | ({"tokenizer_mode": "clips"} if mode == "clips" else {}), tmp_path, kind)
    inner = tokenizer._tokenizer.tokenizer
    inner.padding_side = "left" if mode == "left" else "right"
    seen = set()
    for count in range(1, 14):
        text = "a" + " dog" * count
        needed = len(inner(text, add_special_tokens=mode != "clips").input_ids) + (3 if mode == "clips" else 0)
        seen.add(needed - length)
        if needed <= length:
            assert tokenizer(["dog", text]).shape == (2, length)
        else:
            with pytest.raises(ValueError, match="is longer than the text tower's context of 12 tokens"):
                tokenizer(["dog", text])
    assert {-1, 0, 1} & seen and min(seen) < 0 < max(seen)
