"""Models of every kind in their published layout give open_clip's own class embeddings and logits, from a JPEG on."""

import io
import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from published import KINDS, jpeg, publish
from torch.nn.functional import normalize

from text4vis.classifier.embeddings import text_classifier
from text4vis.config.schema import Config, DataConfig, NetworkConfig
from text4vis.data.augmentation import eval_geometry, frame_rule
from text4vis.data.finishing import place
from text4vis.model.preprocessing import settle
from text4vis.model.video_clip import build_model

NAMES = ["Archery", "surfing; skiing!", "человек бежит", "ein Mensch läuft"]
SLOW = {"pe-core", "mobileclip2", "eva"}  # their smallest towers are not that small
EACH_KIND = [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS]


def settled(folder, kind, **data) -> Config:
    """The configuration of a recipe that names nothing but the folder and the size of the frames."""
    size = KINDS[kind][0]["vision_cfg"]["image_size"]
    if KINDS[kind][1].get("resize_mode", "shortest") == "shortest":
        data["scale_size"] = size  # open_clip crops nothing off the short side
    network = NetworkConfig(arch=f"local-dir:{folder}", sim_header="None")
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
