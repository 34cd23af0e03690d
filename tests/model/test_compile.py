"""torch.compile: the forward pass is one graph, and training never makes another."""

import pytest
import torch
from tiny import random_frames, tiny_network
from torch._dynamo.utils import counters

from text4vis.model.adapters import add_adapters
from text4vis.model.video_clip import VideoClip, build_model


@pytest.fixture(autouse=True)
def own_counts():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def train(model: VideoClip, classes_CD: torch.Tensor) -> None:
    """Two epochs of two steps, each followed by an evaluation whose last batch is smaller."""
    model.compile(backend="eager")  # what is traced does not depend on what the trace is made into
    for _ in range(2):
        for step in range(2):
            model(random_frames(2, 4, seed=step), classes_CD).square().mean().backward()
        model.eval()
        with torch.no_grad():
            for videos in (3, 3, 1):
                model.encode_video(random_frames(videos, 4))
        model.train()


@pytest.mark.parametrize(
    ("changes", "autocast"), [({}, False), ({}, True), ({"sim_header": "None"}, False), ({"adapter": "lora"}, False)]
)
def test_the_forward_pass_is_one_graph_in_the_whole_training(tmp_path, changes, autocast):
    network = tiny_network(tmp_path, **changes)
    model = build_model(network, 4)
    add_adapters(model, network)
    model.autocast = autocast
    train(model, torch.randn(3, model.embed_dim))
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1


def test_the_count_sees_a_break(tmp_path):
    model = build_model(tiny_network(tmp_path, sim_header="None"), 4)
    model.visual.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    train(model, torch.randn(3, model.embed_dim))
    assert counters["graph_break"] and counters["stats"]["unique_graphs"] > 1
