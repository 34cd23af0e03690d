"""How far each `engine.precision` computes from fp32, and what stays in fp32."""

import pytest
import torch
from tiny import random_frames, tiny_network

from text4vis.model.video_clip import WEIGHTS_DTYPE, build_model


def unit_videos(folder, precision: str) -> torch.Tensor:
    torch.manual_seed(0)
    model = build_model(tiny_network(folder), 4).eval().to(WEIGHTS_DTYPE[precision])
    model.autocast = precision == "amp"
    with torch.no_grad():
        return torch.nn.functional.normalize(model.encode_video(random_frames(8, 4)).float(), dim=-1)


def test_amp_is_several_times_nearer_to_fp32_than_bf16(tmp_path):
    exact = unit_videos(tmp_path, "fp32")
    away = {each: (unit_videos(tmp_path, each) - exact).norm(dim=-1).mean() for each in ("amp", "bf16")}
    assert 0 < 4 * away["amp"] < away["bf16"] < 2e-2


def test_gradients_of_amp_are_fp32_and_logits_too(tmp_path):
    model = build_model(tiny_network(tmp_path), 4)
    model.autocast = True
    logits_BC = model(random_frames(2, 4), torch.randn(3, model.embed_dim))
    (1000 * logits_BC.square().mean()).backward()
    assert logits_BC.dtype == torch.float32
    assert all(each.grad is not None and each.grad.dtype == torch.float32 for each in model.visual.parameters())


@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_around_the_model_stays_in_force(tmp_path, autocast):
    model = build_model(tiny_network(tmp_path), 4).eval()
    model.autocast = autocast
    frames = random_frames(1, 4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        within = model.encode_frames(frames)
    assert within.dtype == (torch.float16 if autocast else torch.bfloat16)


def test_the_constants_of_pixels_follow_the_weights_but_are_not_rounded(tmp_path):
    model = build_model(tiny_network(tmp_path), 4).bfloat16()
    assert model._scale_C11.dtype == model._shift_C11.dtype == torch.float32
    exact = 1 / (255 * torch.tensor(model.std, dtype=torch.float64))
    assert model._scale_C11.flatten().equal(exact.float())
    assert model.to("meta")._scale_C11.device.type == model._shift_C11.device.type == "meta"
