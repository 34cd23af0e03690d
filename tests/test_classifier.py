"""The text classifier: prompts, unit length, and names that cannot be told apart."""

import pytest
import torch
from tiny import tiny_network

from text4vis.classifier import build_classifier, text_classifier
from text4vis.config import Config, ConfigError
from text4vis.model import build_model

NAMES = ["archery", "playing the flute", "surfing"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tiny_network(tmp_path_factory.mktemp("clip"), sim_header="None"), 4)


def test_rows_are_the_normalised_embeddings_of_the_prompts(model):
    config = Config()
    embeddings = build_classifier(config, model, NAMES)
    assert embeddings.shape == (3, 64) and embeddings.dtype == torch.float32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3))
    expected = model.encode_text([config.network.template.replace("{}", name) for name in NAMES])
    torch.testing.assert_close(embeddings, expected / expected.norm(dim=1, keepdim=True))
    torch.testing.assert_close(build_classifier(config, model, NAMES[::-1]), embeddings.flip(0))
    assert not torch.allclose(text_classifier(model, NAMES, "{}"), embeddings)


def test_it_can_take_part_in_training(model):
    embeddings = text_classifier(model, NAMES, "{}")
    video = torch.randn(2, 64, requires_grad=True)
    (video @ embeddings.T).sum().backward()
    assert video.grad is not None


@pytest.mark.parametrize("other", ["surfing", "Surfing", " surfing  "])
def test_names_that_read_the_same_are_an_error(model, other):
    with pytest.raises(ConfigError, match=rf"classes 2 \('surfing'\) and 3 \('{other}'\) read the same"):
        text_classifier(model, [*NAMES, other], "{}")


def test_empty_and_long_names_are_errors_that_name_them(model):
    with pytest.raises(ConfigError, match="class 1 has an empty name"):
        text_classifier(model, ["archery", "  "], "{}")
    with pytest.raises(ConfigError, match="the list is empty"):
        text_classifier(model, [], "{}")
    fits, long = "z " * 30, "z " * 31  # 32 tokens with start and end
    assert text_classifier(model, [fits], "{}").shape == (1, 64)
    with pytest.raises(ConfigError, match=r"'z z .* is longer than the text tower's context of 32 tokens"):
        text_classifier(model, ["archery", long], "{}")
