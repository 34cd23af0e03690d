"""Temporal heads against plain re-derivations. B videos, T frames, D embedding width."""

import pytest
import torch

from text4vis.model.heads import NUM_POSITIONS, build_head

D, TEXT_WIDTH = 64, 128
NAMES = ["None", "Transf", "Transf_cls", "LSTM", "Conv_1D"]
ORDER_BLIND = {"None"}  # heads to which a video played backwards is the same


def head(name: str, num_segments: int = 5):
    torch.manual_seed(0)
    return build_head(name, embed_dim=D, text_width=TEXT_WIDTH, num_segments=num_segments).eval()


def frames(videos: int = 3, num_frames: int = 5) -> torch.Tensor:
    return torch.randn(videos, num_frames, D, generator=torch.Generator().manual_seed(1))


def plain_transformer(state: dict, x_BTD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The published head, from its state dict, one video, one head and one frame pair at a time."""

    def norm(x, name):
        variance, mean = torch.var_mean(x, dim=-1, unbiased=False, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-12) * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    out = []
    for original in x_BTD.double():
        x = original + state["frame_position_embeddings.weight"][: len(original)]
        for layer in range(6):
            block = f"transformer.resblocks.{layer}"
            qkv = norm(x, f"{block}.ln_1") @ state[f"{block}.attn.in_proj_weight"].T
            queries, keys, values = (qkv + state[f"{block}.attn.in_proj_bias"]).chunk(3, dim=-1)
            mixed = []
            for q, k, v in zip(*(part.chunk(num_heads, dim=-1) for part in (queries, keys, values)), strict=True):
                weights = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, dim=-1)
                mixed.append(weights @ v)
            x = x + linear(torch.cat(mixed, dim=-1), f"{block}.attn.out_proj")
            hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            x = x + linear(hidden * torch.sigmoid(1.702 * hidden), f"{block}.mlp.c_proj")
        out.append((x + original).mean(dim=0))
    return torch.stack(out)


@pytest.mark.parametrize("grad", [True, False])
def test_transformer_equals_its_plain_derivation(grad):
    module = head("Transf")
    with torch.no_grad():
        for parameter in module.parameters():  # biases and norms off their initial values
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = {name: tensor.double() for name, tensor in module.state_dict().items()}
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(
            module(frames()).double(), plain_transformer(state, frames(), num_heads=2), atol=1e-4, rtol=1e-4
        )


def test_transformer_has_the_released_names_and_initial_values():
    state = head("Transf").state_dict()
    block = {"attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"}
    block |= {f"{name}.{kind}" for name in ("ln_1", "ln_2", "mlp.c_fc", "mlp.c_proj") for kind in ("weight", "bias")}
    names = {f"transformer.resblocks.{layer}.{name}" for layer in range(6) for name in block}
    assert set(state) == names | {"frame_position_embeddings.weight"}
    assert state["frame_position_embeddings.weight"].shape == (77, D)
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert not tensor.any()
        elif "ln_" in name:
            assert (tensor == 1).all()
        elif "in_proj" in name:  # torch's own: Xavier uniform
            assert tensor.abs().max() <= (6 / (4 * D)) ** 0.5
        else:
            assert tensor.std() == pytest.approx(0.02, rel=0.1)


def test_none_is_the_mean():
    torch.testing.assert_close(head("None")(frames()), frames().mean(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_a_head_sees_the_order_of_the_frames_or_is_blind_to_it(name):
    module, order = head(name), torch.tensor([4, 2, 0, 1, 3])
    difference = (module(frames()) - module(frames()[:, order])).abs().max()
    assert difference < 1e-5 if name in ORDER_BLIND else difference > 1e-3


def test_conv_starts_as_a_shift():
    x = frames()
    q = D // 4
    earlier, later = torch.zeros_like(x), torch.zeros_like(x)
    earlier[:, 1:], later[:, :-1] = x[:, :-1], x[:, 1:]
    shifted = torch.cat([earlier[..., :q], x[..., q:-q], later[..., -q:]], dim=-1)
    torch.testing.assert_close(head("Conv_1D")(x), (shifted + x).mean(dim=1))


def test_lstm_equals_its_cell_unrolled():
    module, x = head("LSTM"), frames()
    cell = torch.nn.LSTMCell(D, D)
    cell.load_state_dict({name.removesuffix("_l0"): p for name, p in module.lstm_visual.state_dict().items()})
    state, steps = None, []
    for t in range(x.shape[1]):
        state = cell(x[:, t], state)
        steps.append(state[0])
    torch.testing.assert_close(module(x), (torch.stack(steps, dim=1) + x).mean(dim=1))


@pytest.mark.parametrize("name", NAMES)
def test_videos_are_independent_and_outputs_are_fp32_near_those_of_fp32(name):
    module, x = head(name), frames()
    torch.testing.assert_close(module(x)[[2, 0, 1]], module(x[[2, 0, 1]]))
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
    low = module.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, head(name)(x), atol=0.05, rtol=0.05)


def test_too_many_frames_or_a_width_that_does_not_split_is_an_error():
    build_head("Transf", embed_dim=D, text_width=D, num_segments=NUM_POSITIONS)
    with pytest.raises(ValueError, match=r"data\.num_segments: 78"):
        build_head("Transf", embed_dim=D, text_width=D, num_segments=78)
    with pytest.raises(ValueError, match=r"network\.sim_header"):
        build_head("Transf", embed_dim=64, text_width=64 * 3, num_segments=8)
