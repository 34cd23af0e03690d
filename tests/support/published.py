"""Tiny random models of many kinds in the layout in which open_clip's models are published: one folder each.

open_clip_config.json, open_clip_model.safetensors or open_clip_pytorch_model.bin, tokenizer files
"""

import copy
import io
import json
from pathlib import Path

import numpy as np
import torch
from open_clip.constants import INCEPTION_MEAN, INCEPTION_STD, OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file

WORDS = (
    "a video of a person archery surfing skiing playing the guitar riding horse café running mountain slowly and "
    "ein Mensch läuft человек бежит walking dog dogs cat cats jumping over fence with ball class 0 1 2 3 4 5 6 7 8 9"
)
TEXT = {"context_length": 40, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
CLIPS_PIXELS = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
SIGLIP_TEXT = TEXT | {
    "context_length": 40,
    "vocab_size": 400,
    "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
    "tokenizer_kwargs": {"clean": "canonicalize"},
    "no_causal_mask": True,
    "proj_bias": True,
    "pool_type": "last",
    "norm_kwargs": {"eps": 1e-6},
}
SIGLIP_PIXELS = {
    "mean": INCEPTION_MEAN, "std": INCEPTION_STD, "interpolation": "bicubic", "resize_mode": "squash",
}  # fmt: skip


def timm(name: str, size: int, pool: str, proj: str | None, **more: object) -> dict:
    """A vision_cfg."""
    return {"image_size": size, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj, **more}


# By kind: model_cfg and preprocess_cfg as those models' repositories have them, but smaller.
KINDS: dict[str, tuple[dict, dict]] = {
    "openai": (
        {"embed_dim": 64, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
        CLIPS_PIXELS | {"interpolation": "bicubic", "resize_mode": "shortest"},
    ),
    "laion": ({"embed_dim": 64, "vision_cfg": VIT, "text_cfg": TEXT}, CLIPS_PIXELS),
    "siglip2": (
        {
            "embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
            "vision_cfg": timm("test_vit", 160, "map", "none"),
            "text_cfg": SIGLIP_TEXT | {"hf_tokenizer_name": "timm/ViT-B-16-SigLIP2",
                                       "act_kwargs": {"approximate": "tanh"}},
        },
        SIGLIP_PIXELS,
    ),
    "siglip": (
        {
            "embed_dim": 64, "init_logit_bias": -10, "custom_text": True,
            "vision_cfg": timm("test_vit", 160, "map", "none"), "text_cfg": SIGLIP_TEXT,
        },
        SIGLIP_PIXELS,
    ),
    "pe-core": (
        {
            "embed_dim": 64, "custom_text": True,
            "vision_cfg": timm("vit_pe_core_tiny_patch16_384", 384, "map", None), "text_cfg": TEXT,
        },
        {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"},
    ),
    "mobileclip2": (
        {
            "embed_dim": 64, "custom_text": True,
            "vision_cfg": timm("fastvit_mci0", 256, "avg", None, timm_drop=0.0, timm_drop_path=0.0),
            "text_cfg": TEXT | {"no_causal_mask": True},
        },
        {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear", "resize_mode": "shortest"},
    ),
    "eva": (
        {
            "embed_dim": 64, "custom_text": True,
            "vision_cfg": timm("eva02_tiny_patch14_224", 224, "token", None), "text_cfg": TEXT,
        },
        CLIPS_PIXELS | {"interpolation": "bicubic", "resize_mode": "shortest"},
    ),
    "convnext": (
        {
            "embed_dim": 64, "text_cfg": TEXT,
            "vision_cfg": timm("test_convnext", 160, "", "linear", timm_drop=0.0, timm_drop_path=0.1),
        },
        CLIPS_PIXELS | {"interpolation": "bicubic", "resize_mode": "shortest"},
    ),
    "xlm-roberta": (
        {
            "embed_dim": 64, "vision_cfg": VIT,
            "text_cfg": {"hf_model_name": "xlm-roberta-base", "hf_tokenizer_name": "xlm-roberta-base",
                         "hf_pooler_type": "mean_pooler", "context_length": 38},
        },
        CLIPS_PIXELS | {"interpolation": "bicubic", "resize_mode": "longest"},
    ),
}  # fmt: skip


def publish(folder: Path, kind: str, seed: int = 0) -> Path:
    """Writes a random model of that kind; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg, preprocess_cfg = copy.deepcopy(KINDS[kind])
    text_cfg = model_cfg["text_cfg"]
    if "hf_tokenizer_name" in text_cfg:
        write_tokenizer(folder, kind)
    if "hf_model_name" in text_cfg:
        text_cfg["hf_model_name"] = str(write_encoder(folder / "xlm-roberta-base"))  # open_clip looks at the hub else
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    state = random_model(model_cfg, seed).state_dict()
    if kind in {"laion", "mobileclip2"}:
        torch.save(state, folder / "open_clip_pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "open_clip_model.safetensors")
    return folder


def random_model(model_cfg: dict, seed: int = 0) -> torch.nn.Module:
    """open_clip's model with every parameter moved off its initial value, in evaluation mode."""
    config = copy.deepcopy(model_cfg)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    config["text_cfg"]["hf_model_pretrained"] = False
    torch.manual_seed(seed)
    model = (CustomTextCLIP if custom else CLIP)(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
            if "layer_scale" in name:  # MobileCLIP begins with 1e-5, and all frames look alike to it
                parameter.fill_(1)
    return model


def write_encoder(folder: Path) -> Path:
    """The configuration of a small XLM-RoBERTa."""
    from transformers import XLMRobertaConfig

    XLMRobertaConfig(
        vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40, pad_token_id=1, bos_token_id=0, eos_token_id=2, type_vocab_size=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def write_tokenizer(folder: Path, kind: str) -> None:
    """Tokenizer files as the kind's repository has them, with a vocabulary made of WORDS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = {"siglip2": ["<pad>", "<eos>", "<bos>", "<unk>"], "siglip": ["<unk>", "<pad>", "</s>"],
               "xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"]}[kind]  # fmt: skip
    letters = sorted({"▁", *WORDS.lower()} - {" "})
    if kind == "siglip2":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=False))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", initial_alphabet=letters
        )
    tokenizer.train_from_iterator([f" {word}" for word in WORDS.lower().split() * 5], trainer)
    end = special[1] if kind == "siglip2" else "</s>"
    start = "<s> " if kind == "xlm-roberta" else ""
    ids = [(token, tokenizer.token_to_id(token)) for token in (end, *start.split())]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start}$A {end}", special_tokens=ids)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    facts = {
        "siglip2": {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>",
                    "add_bos_token": False, "add_eos_token": True, "padding_side": "right"},
        "siglip": {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "extra_ids": 0, "legacy": False},
        "xlm-roberta": {"tokenizer_class": "XLMRobertaTokenizer", "bos_token": "<s>", "cls_token": "<s>",
                        "eos_token": "</s>", "sep_token": "</s>"},
    }[kind]  # fmt: skip
    facts |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))


def jpeg(width: int = 150, height: int = 100) -> bytes:
    """A frame with edges, colours and noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(0).integers(0, 60, (height, width, 3))
    image = np.stack([x * 200 // width, y * 200 // height, (x // 9 + y // 7) % 2 * 180], axis=-1) + noise
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()
