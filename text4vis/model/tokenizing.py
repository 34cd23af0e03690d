"""A text tower's tokenizer: CLIP's byte pairs, or one of Hugging Face's (SigLIP's, multilingual ones).

Files that open_clip's `text_cfg` names are looked for beside the configuration first, so a folder needs no hub:

    tokenizer_kwargs.bpe_path   FOLDER/PATH, a vocabulary for CLIP's own tokenizer
    hf_tokenizer_name           FOLDER/NAME, or FOLDER itself if it holds tokenizer files; else the hub's NAME
    hf_model_name               FOLDER/NAME, the configuration of a Hugging Face encoder; else the hub's NAME

open_clip's classes do the work; no code that a folder holds is ever run. C texts, L tokens.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIPTextCfg
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from torch import Tensor

from text4vis.config.schema import ConfigError
from text4vis.model.strangers import check_vocabulary, name_within

INSTALL = "pip install 'text4vis[tokenizers]'"
# What open_clip's tokenizers take from a configuration. Anything else might have the library run a folder's code.
ARGUMENTS = {"additional_special_tokens", "bpe_path", "clean", "language", "reduction_mask", "strip_sep_token"}
TOKENIZER_FILES = ("tokenizer*.json", "*.model", "vocab.*")
VOCABULARY, TOKENIZER, ENCODER = "bpe.txt.gz", "tokenizer", "encoder"  # in an export
_CHARACTERS_A_TOKEN = 32  # at most, on average; byte pairs take time that grows with the square of a word's length
_PROBE = ["A person's café: 42 dogs, RUNNING_fast!", "人が走っている; бежит человек"]


class Tokenizer:
    """Turns texts into tokens for the text tower of `text_config`, open_clip's text_cfg.

    folder: beside the configuration, None where it is open_clip's own. arch: names the model in errors. bpe_path: the
    vocabulary file of a custom byte-pair tokenizer. Raises ConfigError for a tokenizer that cannot be opened.
    """

    def __init__(self, text_config: Mapping[str, Any], folder: Path | None, arch: str) -> None:
        where = f"network.arch: {arch}: text_cfg"
        arguments = text_config.get("tokenizer_kwargs") or {}
        if not isinstance(arguments, dict):
            raise ConfigError(f"{where}.tokenizer_kwargs: {arguments!r:.80} is no table of settings")
        arguments = dict(arguments)
        if unknown := sorted(arguments.keys() - ARGUMENTS):
            raise ConfigError(f"{where}.tokenizer_kwargs: {unknown[0]} is not supported")
        self._text_config = text_config
        self.bpe_path = None
        if "bpe_path" in arguments:
            own = name_within(arguments.pop("bpe_path"), folder, f"{where}.tokenizer_kwargs.bpe_path")
            self.bpe_path = (folder or Path()) / own
        arguments["context_length"] = text_config.get("context_length") or CLIPTextCfg.context_length
        if name := text_config.get("hf_tokenizer_name"):
            name = name_within(name, folder, f"{where}.hf_tokenizer_name")
            self._tokenizer = self._from_hugging_face(name, folder, arguments, arch)
        else:
            self._tokenizer = self._byte_pairs(arguments, arch)
        self.context_length: int = self._tokenizer.context_length

    def _byte_pairs(self, arguments: Mapping[str, Any], arch: str) -> Any:
        files = {"bpe_path": str(self.bpe_path)} if self.bpe_path else {}
        try:
            if self.bpe_path:
                check_vocabulary(self.bpe_path, f"network.arch: {arch}: text_cfg.tokenizer_kwargs.bpe_path")
            tokenizer = SimpleTokenizer(**files, **arguments)
        except (OSError, EOFError, TypeError, ValueError, LookupError, AssertionError, zlib.error) as error:
            raise ConfigError(f"network.arch: the tokenizer of {arch} cannot be loaded ({error})") from None
        vocabulary = self._text_config.get("vocab_size", CLIPTextCfg.vocab_size)
        if tokenizer.vocab_size > vocabulary:
            raise ConfigError(
                f"network.arch: {arch}: text_cfg.vocab_size is {vocabulary}, but its tokenizer has "
                f"{tokenizer.vocab_size} tokens; name the right vocabulary in text_cfg.tokenizer_kwargs.bpe_path"
            )
        return tokenizer

    def _from_hugging_face(self, name: str, folder: Path | None, arguments: Mapping[str, Any], arch: str) -> Any:
        places = [] if folder is None else [folder / name, folder]
        own = next((place for place in places if any(any(place.glob(name)) for name in TOKENIZER_FILES)), None)
        options = {"trust_remote_code": False, "local_files_only": own is not None}
        mode = self._text_config.get("tokenizer_mode")
        where = f"network.arch: {arch}: its tokenizer {own or name}"
        try:
            tokenizer = HFTokenizer(str(own or name), tokenizer_mode=mode, **arguments, **options)
        except ImportError:
            raise ConfigError(f"{where} needs the package transformers: {INSTALL}") from None
        except Exception as error:  # the library raises any kind for a file that is damaged, and for no network
            reason = " ".join(str(error).split())[:300]
            fix = "" if own else "; put its files into one folder with the model: network.arch: local-dir:FOLDER"
            raise ConfigError(f"{where} cannot be opened ({reason}){fix}") from None
        inner = tokenizer.tokenizer
        if len(inner.get_vocab()) <= len(inner.all_special_ids) + 1:  # the library makes an empty one without a word
            raise ConfigError(
                f"{where} has no vocabulary; add the file that holds it (tokenizer.json, *.model, vocab.*)"
            )
        if inner.pad_token_id is None:
            raise ConfigError(f"{where} has no pad_token; name one in tokenizer_config.json")
        try:
            tokenizer(_PROBE)  # some damage shows only when it is used
        except Exception as error:  # as above
            raise ConfigError(f"{where} cannot be used ({' '.join(str(error).split())[:300]})") from None
        return tokenizer

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens (C, L) int64. Raises ValueError naming the text that is longer than the context of L tokens."""
        length = self.context_length
        for text in texts:
            if len(text) > _CHARACTERS_A_TOKEN * length:
                raise self._too_long(text)
        tokens_CL = self._tokenizer(list(texts), context_length=length)
        # With room for one more token a truncated row changes; a complete one only gains padding.
        longer = self._tokenizer(list(texts), context_length=length + 1)
        place, padding = self._padding()
        same = torch.cat([longer[:, :place], longer[:, place + 1 :]], dim=1) == tokens_CL
        for text, complete in zip(texts, (same.all(dim=1) & (longer[:, place] == padding)).tolist(), strict=True):
            if not complete:
                raise self._too_long(text)
        return tokens_CL

    def _too_long(self, text: str) -> ValueError:
        limit = self.context_length
        return ValueError(f"{text!r:.100} is longer than the text tower's context of {limit} tokens; shorten it")

    def _padding(self) -> tuple[int, int]:
        """Where a row of L + 1 tokens has one more padding token than a row of L, and this token."""
        if isinstance(self._tokenizer, SimpleTokenizer):
            return self.context_length, 0
        inner, length = self._tokenizer.tokenizer, self.context_length
        if self._tokenizer.tokenizer_mode == "clips":  # the class token comes last
            return length - 1, inner.pad_token_id
        return (0 if inner.padding_side == "left" else length), inner.pad_token_id

    def facts(self) -> dict[str, Any]:
        """What to record of it, in JSON values. fingerprint: SHA-256 of its vocabulary and of some texts' tokens."""
        inner = getattr(self._tokenizer, "tokenizer", None)
        vocabulary = self._tokenizer.encoder if inner is None else inner.get_vocab()
        digest = hashlib.sha256(repr(sorted(vocabulary.items())).encode())
        digest.update(self._tokenizer(_PROBE, context_length=self.context_length).numpy().tobytes())
        return {
            "kind": "CLIP's byte pairs" if inner is None else type(inner).__name__,
            "tokens": len(vocabulary),
            "context_length": self.context_length,
            "clean": self._tokenizer.clean_fn.__name__.removeprefix("_clean_"),
            "fingerprint": digest.hexdigest(),
        }

    def save(self, folder: Path) -> dict[str, Any]:
        """Writes its files into a folder. Returns the text_cfg that finds them beside itself, without a hub.

        Raises ConfigError if the copy would not make the same tokens, OSError.
        """
        config = copy.deepcopy(dict(self._text_config))
        shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
        if self.bpe_path is not None:
            content = self.bpe_path.read_bytes()  # of an export that is being replaced, perhaps
            (folder / VOCABULARY).write_bytes(content)
            config["tokenizer_kwargs"]["bpe_path"] = VOCABULARY
        elif isinstance(self._tokenizer, HFTokenizer):
            self._tokenizer.save_pretrained(folder / TOKENIZER)
            config["hf_tokenizer_name"] = TOKENIZER
        if Tokenizer(config, folder, str(folder)).facts() != self.facts():
            raise ConfigError(
                f"{folder}: the copy of the tokenizer makes other tokens than {config.get('hf_tokenizer_name')}; try "
                "another version of transformers"
            )
        return config


def beside(folder: Path | None, name: str) -> Path | None:
    """The folder of that name beside a configuration, if there is one."""
    return folder / name if folder is not None and (folder / name).is_dir() else None
