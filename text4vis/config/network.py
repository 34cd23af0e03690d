"""The section `network` of a configuration. `schema` holds the others."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StrictInt, StrictStr

from text4vis.config.roles import Role, key, section
from text4vis.config.values import (
    Bool,
    Count,
    Natural,
    OptionalStr,
    Rate,
    Str,
    Triple,
    false_is_none,
    pair,
)


@section
class NetworkConfig:
    """The video model and its classifier."""

    arch: Str = key(
        "ViT-B/16",
        Role.MODEL,
        "CLIP or open_clip name, hf-hub:ORG/NAME, local-dir:FOLDER, a model JSON, or a weights file in OpenAI's layout",
        classifiers=("lda",),
        path="name or path",
    )
    pretrained: OptionalStr = key(
        None,
        Role.MODEL,
        "open_clip tag or weights file; default: `openai` for CLIP's names, the file beside a JSON or in a folder",
        classifiers=("lda",),
        on_card=True,
        path="name or path",
    )
    mean: Triple | None = key(
        None, Role.MODEL, "mean of red, green and blue, 0 to 1; default: the model's own", classifiers=("lda",)
    )
    std: Triple | None = key(
        None, Role.MODEL, "standard deviation of the same; default: the model's own", classifiers=("lda",)
    )
    activation: Literal["gelu", "quick_gelu"] | None = key(
        None, Role.MODEL, "of open_clip's towers; default: what the weights were trained with", classifiers=("lda",)
    )
    init: Bool = key(True, Role.TRAINING, "start from pre-trained weights; false: random ones", on_card=True)
    sim_header: Literal["None", "Transf", "Transf_cls", "LSTM", "Conv_1D"] = key(
        "Transf", Role.MODEL, "temporal head; None: mean of frames, Transf: transformer, others: ActionCLIP's"
    )
    tm: Annotated[Literal["tsm", "tokenshift", "tokent1d"] | None, BeforeValidator(false_is_none)] = key(
        None, Role.MODEL, "temporal modelling in the visual tower; tsm: shift patches' channels, others: class token's"
    )
    joint_st: Bool = key(False, Role.MODEL, "attention over all frames' patches at once; needs sim_header: None")
    drop_out: Rate = key(
        0.0,
        Role.TRAINING,
        "dropout of the visual tower's branches and attention: rate of the last block, from 0 in the first",
        on_card=True,
    )
    emb_dropout: Rate = key(0.0, Role.TRAINING, "dropout of the visual tower's embedded patches")
    classifier: Literal["text", "random", "orthogonal", "lda", "sentence", "file"] = key(
        "text",
        Role.CLASSIFIER,
        "where the frozen class embeddings come from; text: CLIP's text tower, random and orthogonal: the "
        "seed, lda: videos of data.train, sentence: another text encoder, file: classifier_file",
    )
    template: Annotated[StrictStr | tuple[StrictStr, ...], BeforeValidator(pair)] = key(
        "a video of a person {}.",
        Role.CLASSIFIER,
        "prompt around a class name, a list of prompts (their mean), or a set: actionclip-16, kinetics-28",
        classifiers=(
            "text",
            "sentence",
        ),
    )
    classifier_file: OptionalStr = key(
        None,
        Role.CLASSIFIER,
        "class embeddings (C, D): .safetensors, .npy or .pt; tools/build_classifier.py writes one",
        classifiers=("file",),
        path="path",
    )
    lda_videos: Annotated[StrictInt, Field(ge=2)] = key(
        60, Role.CLASSIFIER, "lda: training videos a class, at most", classifiers=("lda",)
    )
    sentence_model: OptionalStr = key(
        None, Role.CLASSIFIER, "sentence: folder of a Hugging Face text encoder", classifiers=("sentence",), path="path"
    )
    sentence_projection: Bool = key(
        False,
        Role.CLASSIFIER,
        "sentence: bring its width to CLIP's by a fixed orthogonal projection",
        classifiers=("sentence",),
    )
    fix_video: Bool = key(False, Role.TRAINING, "freeze the visual tower", on_card=True)
    fix_text: Bool = key(
        True,
        Role.TRAINING,
        "freeze the text tower; false: it trains, and encodes the prompts of the step's classes",
        on_card=True,
    )
    classifier_trainable: Bool = key(
        False, Role.TRAINING, "train the class embeddings, from those of the classifier", on_card=True
    )
    freeze_blocks: Natural = key(
        0, Role.TRAINING, "freeze the visual tower's stem and this many of its first blocks; 0: none", on_card=True
    )
    adapter: Literal["lora"] | None = key(
        None,
        Role.TRAINING,
        "lora: low-rank matrices train in place of the visual tower's weights, and of the text tower's where fix_text "
        "is false; needs `pip install 'text4vis[lora]'`; default: the weights themselves",
        on_card=True,
    )
    adapter_rank: Count = key(16, Role.TRAINING, "rank of an adapter's matrices", on_card=True)
    adapter_alpha: Count = key(
        32, Role.TRAINING, "weight of an adapter: its product counts adapter_alpha / adapter_rank times", on_card=True
    )
    adapter_targets: Literal["all", "attention", "mlp"] = key(
        "all",
        Role.TRAINING,
        "layers that get an adapter, linear ones and 1 x 1 convolutions; attention: those of attention, mlp: the "
        "others",
        on_card=True,
    )
