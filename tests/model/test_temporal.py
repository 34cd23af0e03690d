"""Temporal modelling and dropout in the visual tower, against open_clip's tower with plain loops over the frames.

B videos, T frames, L tokens, W tower width.
"""

import re
from dataclasses import replace

import pytest
import torch
from tiny import CONFIG, OPENAI_RESNET, random_clip, random_frames, tiny_network
from torch import nn

from text4vis.config.loading import load_config
from text4vis.config.schema import Config, ConfigError, DataConfig, NetworkConfig, SolverConfig
from text4vis.model.temporal import Block, adapt, shift_channels
from text4vis.model.video_clip import build_model
from text4vis.saved.weights import export_model, load_export, load_text4vis
from text4vis.training.optim import parameter_groups

T = 4
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
OPTIONS = {
    "tsm": {"tm": "tsm"},
    "tokenshift": {"tm": "tokenshift"},
    "tokent1d": {"tm": "tokent1d"},
    "joint_st": {"joint_st": True, "sim_header": "None"},
}
options = pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS.keys())


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> NetworkConfig:
    return tiny_network(tmp_path_factory.mktemp("clip"))


def built(network, **changes):
    torch.manual_seed(0)
    return build_model(replace(network, **changes), T).eval()


def pixels(videos=2, size=32):
    return torch.randn(videos * T, 3, size, size, generator=torch.Generator().manual_seed(3))


def moved(x_BTC, share):
    """By loops: the first 1/share of the channels come from the next frame, the second from the previous one."""
    out = x_BTC.clone()
    fold, frames = x_BTC.shape[-1] // share, x_BTC.shape[1]
    for t in range(frames):
        out[:, t, :fold] = x_BTC[:, t + 1, :fold] if t + 1 < frames else 0
        out[:, t, fold : 2 * fold] = x_BTC[:, t - 1, fold : 2 * fold] if t else 0
    return out


def convolved(x_BTC, weight_C1K):
    out = torch.zeros_like(x_BTC)
    for t in range(T):
        for tap in range(3):
            if 0 <= t + tap - 1 < T:
                out[:, t] += weight_C1K[:, 0, tap] * x_BTC[:, t + tap - 1]
    return out


def on_tokens(x_NLW, tokens, change):
    x_BTLW = x_NLW.clone().unflatten(0, (-1, T))
    for token in tokens:
        x_BTLW[:, :, token] = change(x_BTLW[:, :, token])
    return x_BTLW.flatten(0, 1)


def expected(visual, images, change_block, change_branch):
    """open_clip's tower, with a change of the tokens before each block and before each branch of a block."""
    x = visual.ln_pre(embed(visual, images))
    for index, block in enumerate(visual.transformer.resblocks):
        x = change_branch(change_block(x), index)
        x = x + block.attention(block.ln_1(x))
        x = change_branch(x, index)
        x = x + block.mlp(block.ln_2(x))
    return visual.ln_post(x[:, 0]) @ visual.proj


def embed(visual, images):
    patches = visual.conv1(images).flatten(2).transpose(1, 2)
    return torch.cat([visual.class_embedding.expand(len(images), 1, -1), patches], 1) + visual.positional_embedding


def test_shifting_moves_one_channel_in_share_each_way():
    x = torch.randn(6, 2, 5, 20)
    for share in (4, 8):
        shifted = shift_channels(x, 3, share)
        for place in ((0, 0), (1, 4)):
            at = (slice(None), *place)
            torch.testing.assert_close(shifted[at], moved(x[at].unflatten(0, (-1, 3)), share).flatten(0, 1))
        still = (shifted == x).flatten(0, -2).all(0)
        assert still.tolist() == [channel >= 2 * (20 // share) for channel in range(20)]


def test_tsm_shifts_the_patches_before_each_block(network):
    visual, model = random_clip(CONFIG).visual, built(network, tm="tsm")
    patches = range(1, 17)
    want = expected(visual, pixels(), lambda x: on_tokens(x, patches, lambda y: moved(y, 8)), lambda x, _: x)
    torch.testing.assert_close(model.visual(pixels()), want, **CLOSE)


def test_tokenshift_shifts_the_class_token_before_each_branch(network):
    visual, model = random_clip(CONFIG).visual, built(network, tm="tokenshift")
    want = expected(visual, pixels(), lambda x: x, lambda x, _: on_tokens(x, [0], lambda y: moved(y, 4)))
    torch.testing.assert_close(model.visual(pixels()), want, **CLOSE)


def test_tokent1d_convolves_the_class_token_and_starts_as_tokenshift(network):
    visual, model = random_clip(CONFIG).visual, built(network, tm="tokent1d")
    torch.testing.assert_close(model.visual(pixels()), built(network, tm="tokenshift").visual(pixels()), **CLOSE)
    weights = [block.control_point.conv.weight for block in model.visual.transformer.resblocks]
    with torch.no_grad():
        for weight in weights:
            weight.add_(torch.randn_like(weight))
    want = expected(visual, pixels(), lambda x: x, lambda x, i: on_tokens(x, [0], lambda y: convolved(y, weights[i])))
    torch.testing.assert_close(model.visual(pixels()), want, **CLOSE)


def test_joint_attention_sees_the_patches_of_all_frames(network):
    visual, model = random_clip(CONFIG).visual, built(network, **OPTIONS["joint_st"])
    tokens = embed(visual, pixels()).unflatten(0, (-1, T))
    videos = []
    for video_TLW in tokens:
        patches = [video_TLW[t, 1:] + model.visual.time_embedding[t] for t in range(T)]
        sequence = torch.cat([video_TLW[0, :1], *patches])[None]
        videos.append(visual.ln_post(visual.transformer(visual.ln_pre(sequence))[:, 0]) @ visual.proj)
    torch.testing.assert_close(model.visual(pixels()), torch.cat(videos), **CLOSE)
    frames = random_frames(2, T)
    assert model.encode_frames(frames).shape == (2, 1, 64)
    torch.testing.assert_close(model.encode_video(frames), model.encode_frames(frames)[:, 0], **CLOSE)


def test_joint_attention_knows_the_order_of_frames_by_their_time_embedding_alone(network):
    model, frames = built(network, **OPTIONS["joint_st"]), random_frames(2, T)
    assert not torch.allclose(model.encode_video(frames.flip(1)), model.encode_video(frames), **CLOSE)
    nn.init.zeros_(model.visual.time_embedding)
    torch.testing.assert_close(model.encode_video(frames.flip(1)), model.encode_video(frames), **CLOSE)


@pytest.mark.parametrize(("layers", "every"), [([2, 1, 1, 3], 1), ([1, 2, 23, 1], 2)])
def test_tsm_in_a_resnet_shifts_what_enters_the_first_convolutions(layers, every):
    config = OPENAI_RESNET | {"vision_cfg": OPENAI_RESNET["vision_cfg"] | {"layers": layers}}
    visual = random_clip(config).visual
    plain, shifted = {}, set()

    def shift(module, args):
        x_NHWC = args[0].movedim(1, -1).unflatten(0, (-1, T))
        flat = x_NHWC.flatten(2, 3).transpose(1, 2)  # B, HW, T, C
        flat = moved(flat.flatten(0, 1), 8).unflatten(0, flat.shape[:2]).transpose(1, 2)
        return flat.reshape(x_NHWC.shape).flatten(0, 1).movedim(-1, 1)

    for stage in range(1, 5):
        for index, block in enumerate(getattr(visual, f"layer{stage}")):
            if index % every == 0:
                plain[block.conv1] = block.conv1.register_forward_pre_hook(shift)
                shifted.add(f"layer{stage}.{index}.conv1.weight")
    want = visual(pixels(size=64))
    for hook in plain.values():
        hook.remove()
    names = set(visual.state_dict())
    tower = adapt(visual, NetworkConfig(tm="tsm"), T)
    torch.testing.assert_close(tower(pixels(size=64)), want, **CLOSE)
    assert set(tower.state_dict()) == names - shifted | {name.replace("conv1.", "conv1.net.") for name in shifted}


@options
def test_a_video_sees_its_own_frames_and_no_others(network, changes):
    model, frames = built(network, **changes), random_frames(3, T)
    with torch.no_grad():
        together = model.encode_frames(frames)
        for index in range(3):
            alone = model.encode_frames(frames[index : index + 1])
            torch.testing.assert_close(alone[0], together[index], **CLOSE)
        other = frames.clone()
        other[:, 2] = 255 - other[:, 2]
        changed = (model.encode_frames(other) - together).abs().amax(-1) > 1e-4
    assert changed.all() if "joint_st" in changes else changed[:, 1:].all()


@options
def test_names_and_weights_are_those_of_the_release(network, changes):
    plain = {f"visual.{name}": tensor for name, tensor in random_clip(CONFIG).visual.state_dict().items()}
    blocks = [f"visual.transformer.resblocks.{index}." for index in range(2)]
    names = {name: name for name in plain}
    if changes.get("tm") == "tsm":
        names = {name: re.sub(r"(resblocks\.\d+\.)", r"\1net.", name) for name in plain}
    new = {
        "tokent1d": {f"{block}control_point.conv.weight": (64, 1, 3) for block in blocks},
        None: {"visual.time_embedding": (T, 64)},
    }.get(changes.get("tm"), {})
    state = {n: t for n, t in built(network, **changes).state_dict().items() if n.startswith("visual.")}
    assert set(state) == set(names.values()) | set(new)
    assert all(torch.equal(state[names[name]], tensor) for name, tensor in plain.items())
    assert {name: tuple(state[name].shape) for name in new} == new


@options
def test_files_of_the_release_and_exports_keep_it(network, tmp_path, changes):
    model = built(network, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    frames, classes = random_frames(2, T), torch.eye(3, 64)
    want = model(frames, classes)
    changed = replace(network, **changes)
    torch.save({"model_state_dict": model.state_dict()}, tmp_path / "best.pt")
    loaded = load_text4vis(tmp_path / "best.pt", changed, T).eval()
    assert torch.equal(loaded(frames, classes), want)
    export_model(tmp_path / "export", model, changed, {}, ["a", "b", "c"], classes, {})
    assert torch.equal(load_export(tmp_path / "export").model.eval()(frames, classes), want)


def test_a_file_of_another_kind_of_tower_names_what_does_not_fit(network, tmp_path):
    torch.save({"model_state_dict": built(network).state_dict()}, tmp_path / "best.pt")
    with pytest.raises(ConfigError, match=r"missing: visual\.transformer\.resblocks\.0\.control_point\.conv\.weight"):
        load_text4vis(tmp_path / "best.pt", replace(network, tm="tokent1d"), T)


@options
def test_everything_trains_and_convolutions_over_time_learn_with_the_head(network, changes):
    model = built(network, **changes).train()
    nn.functional.cross_entropy(model(random_frames(2, T), torch.eye(3, 64)), torch.tensor([0, 1])).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, SolverConfig())}
    for name, parameter in model.named_parameters():
        with_head = "control_point" in name or name.startswith("fusion_model.")
        assert id(parameter) in groups["head" if with_head else "clip"]


@options
def test_activations_can_be_computed_again(network, changes):
    gradients = []
    for again in (False, True):
        model = built(network, drop_out=0.3, **changes).train()
        model.visual.set_grad_checkpointing(again)
        torch.manual_seed(1)
        model.encode_video(random_frames(2, T)).sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.visual.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_dropout_acts_in_training_alone_and_follows_the_seed(network):
    frames, plain = random_frames(2, T), built(network)
    for changes in ({"drop_out": 0.5}, {"emb_dropout": 0.3}, {"emb_dropout": 0.3, **OPTIONS["joint_st"]}):
        model = built(network, **changes)
        if "joint_st" not in changes:
            torch.testing.assert_close(model.encode_frames(frames), plain.encode_frames(frames), **CLOSE)
        model.train()
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(model.encode_frames(frames))
        assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
        model.eval()
        assert torch.equal(model.encode_frames(frames), model.encode_frames(frames))


def test_the_rate_grows_from_the_first_block_to_the_last():
    config = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": 5}}
    tower = adapt(random_clip(config).visual, NetworkConfig(drop_out=0.2), T)
    blocks = tower.transformer.resblocks
    assert [block.drop_path.p for block in blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert [block.attn.dropout for block in blocks] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


def test_a_branch_is_dropped_for_a_whole_frame_and_scaled_where_it_is_kept():
    block = Block(random_clip(CONFIG).visual.transformer.resblocks[0], nn.Identity(), 0.75)
    block.attn.dropout = 0.0
    nn.init.zeros_(block.attn.out_proj.weight)
    nn.init.zeros_(block.attn.out_proj.bias)
    x = torch.randn(400, 3, 64)
    torch.manual_seed(0)
    branch, scaled = block.eval()(x) - x, block.train()(x) - x
    kept = scaled.flatten(1).abs().amax(1) > 0
    assert kept.float().mean() == pytest.approx(0.25, abs=0.08)
    torch.testing.assert_close(scaled[kept], 4 * branch[kept], **CLOSE)


def test_embedded_patches_are_dropped_before_the_first_norm(network):
    seen = []
    model = built(network, emb_dropout=0.25)
    model.visual.ln_pre.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval().visual(pixels())
    model.train().visual(pixels())
    dropped = seen[1] == 0
    assert dropped.float().mean() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(seen[1][~dropped], seen[0][~dropped] / 0.75, **CLOSE)


def test_another_number_of_frames_is_refused(network):
    with pytest.raises(ValueError, match=r"expected 4 a video \(data\.num_segments\), got 8"):
        built(network, tm="tokenshift").encode_frames(random_frames(1, 2 * T))
    assert built(network).encode_frames(random_frames(1, 2 * T)).shape == (1, 2 * T, 64)


@pytest.mark.parametrize(
    ("vision", "changes", "message"),
    [
        (
            {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64},
            {"tm": "tokenshift"},
            "tm: 'tokenshift'",
        ),
        ({"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64}, {"drop_out": 0.1}, "drop_out: 0.1"),
        (
            {"layers": [1, 1, 1, 1], "width": 8, "head_width": 64, "image_size": 64},
            {"joint_st": True},
            "joint_st: True",
        ),
        (CONFIG["vision_cfg"] | {"pool_type": "avg"}, {"tm": "tsm"}, "tm: 'tsm'"),
    ],
)
def test_a_tower_that_it_has_no_meaning_for_is_an_error(vision, changes, message):
    visual = random_clip(OPENAI_RESNET | {"vision_cfg": vision}).visual
    with pytest.raises(
        ConfigError, match=rf"network\.{message} needs one of CLIP's own vision transformers; ViT-B/16 has"
    ):
        adapt(visual, NetworkConfig(**changes), T)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["network.tm=tsm", "network.joint_st=true"], r"network\.tm: 'tsm' moves channels.*network\.joint_st"),
        (["network.joint_st=true"], r"network\.sim_header: 'Transf' has nothing to fuse"),
        (["network.tm=tsm", "data.num_segments=1"], r"network\.tm: .*data\.num_segments is 1"),
        (["network.fix_video=true", "network.emb_dropout=0.1"], r"network\.emb_dropout: .*network\.fix_video"),
        (["network.drop_out=1"], r"network\.drop_out: .*less than 1"),
        (["network.tm=true"], r"network\.tm: .*True"),
    ],
)
def test_contradictions_are_named(tmp_path, overrides, message):
    (tmp_path / "c.yaml").write_text("")
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml", overrides)


def test_the_releases_files_say_false_where_no_temporal_modelling_is_meant(tmp_path):
    (tmp_path / "c.yaml").write_text("network: {tm: False, drop_out: 0.0, emb_dropout: 0.0, joint_st: False}")
    assert load_config(tmp_path / "c.yaml") == Config(data=DataConfig(), network=NetworkConfig())
