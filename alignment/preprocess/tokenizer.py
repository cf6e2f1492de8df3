"""Tokenize captions for a text tower, id for id as transformers does, and without it where a file says all there is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

MIN_VOCABULARY = 10  # where the vocabulary's file is missing, transformers makes do with the special tokens


@dataclass(frozen=True)
class TokenizerSpec:
    """How a text tower wants its captions; what transformers' tokenizers do not know by themselves.

    Attributes:
        positions: tokens the tower has places for, unless its config says so.
        reserved: places that hold no token (RoBERTa counts from its padding index).
        trained_length: tokens it was trained on, where that is fewer than it has places for.
        pad_to_max: pad to the full length; SigLIP reads its embedding off the last place.
        lower: lower the case first.
    """

    positions: int = 512
    reserved: int = 0
    trained_length: int | None = None
    pad_to_max: bool = False
    lower: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TokenizerSpec:
        """Read the rules off a checkpoint's `config.json`, of a dual encoder or of a text tower alone."""
        text = config.get("text_config") or config
        kind = str(config.get("model_type", ""))
        if kind not in _TEXT_RULES:  # joined from two towers: the text tower decides
            kind = str(text.get("model_type", "")).removesuffix("_text_model")
        rules = _TEXT_RULES.get(kind, cls())
        places = text.get("max_position_embeddings")
        return replace(rules, positions=places - rules.reserved) if places else rules

    def max_length(self, known: int | None) -> int:
        """Return how many tokens a caption may have, special ones included; `known` is what the tokenizer says."""
        limits = (known, self.positions, self.trained_length)
        return min(limit for limit in limits if limit is not None)


_SIGLIP = TokenizerSpec(positions=64, pad_to_max=True, lower=True)
_ROBERTA = TokenizerSpec(reserved=2)
_TEXT_RULES = {
    "clip": TokenizerSpec(positions=77),
    "siglip": _SIGLIP,  # the fixed-size SigLIP2 checkpoints too
    "siglip2": _SIGLIP,
    "chinese_clip": TokenizerSpec(trained_length=52),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "mpnet": _ROBERTA,
}

# transformers rebuilds most tokenizers by code of the family's own; these it takes from `tokenizer.json` as they are.
_AS_FILED = ("TokenizersBackend", "PreTrainedTokenizerFast")
_FAMILIES = ("composed-dual-encoder", "vision-text-dual-encoder")  # and for these model types it does so without fail
_SPECIAL = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_INPUTS = ["input_ids", "attention_mask"]
_READ = {"tokenizer_class", "model_input_names", "model_max_length", "padding_side", "truncation_side", *_SPECIAL}
# Of no consequence to ids: how text is put together again, where it was saved from.
_SILENT = {"backend", "clean_up_tokenization_spaces", "is_local", "local_files_only", "name_or_path", "processor_class"}
_MORE_FILES = ("special_tokens_map.json", "added_tokens.json")  # of older versions; they may change tokens


class FileTokenizer:
    """A tokenizer read straight from `tokenizer.json`.

    Attributes:
        folder: the checkpoint it is from.
        max_length: tokens a caption is cut to.
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], rules: TokenizerSpec, folder: Path) -> None:
        self.folder = folder
        self.max_length = rules.max_length(config.get("model_max_length"))
        self._tokenizer = tokenizer
        # Once and for all: a change while another thread tokenizes raises "Already borrowed".
        tokenizer.enable_truncation(self.max_length, direction=config.get("truncation_side", "right"))
        tokenizer.enable_padding(
            direction=config.get("padding_side", "right"),
            pad_id=tokenizer.token_to_id(config["pad_token"]),
            pad_token=config["pad_token"],
            length=self.max_length if rules.pad_to_max else None,
        )

    @classmethod
    def read(cls, folder: Path, model_type: str, rules: TokenizerSpec) -> FileTokenizer | None:
        """Read a checkpoint's tokenizer; None when there is more to it than its file says.

        Raises:
            ValueError: when a file is damaged.
        """
        config = _plain_config(folder) if model_type in _FAMILIES else None
        if config is None:
            return None
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare ones
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {error}") from error
        named = {config[name] for name in _SPECIAL & config.keys()}
        # transformers would add the ones that the file lacks.
        return cls(tokenizer, config, rules, folder) if named <= _special(tokenizer) else None

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize, cut and pad: `input_ids` and `attention_mask`, (n, length) each."""
        encodings = self._tokenizer.encode_batch_fast(list(captions))
        ids, masks = ([getattr(encoding, name) for encoding in encodings] for name in ("ids", "attention_mask"))
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}

    def is_truncated(self, captions: Sequence[str]) -> list[bool]:
        """Tell which captions have more tokens than `max_length`."""
        return [bool(encoding.overflowing) for encoding in self._tokenizer.encode_batch(list(captions))]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are beside the special ones."""
        return self._tokenizer.get_vocab_size() - len(_special(self._tokenizer))


def _special(tokenizer: Tokenizer) -> set[str]:
    return {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}


def _plain_config(folder: Path) -> dict[str, Any] | None:
    """Return `tokenizer_config.json` if neither it nor a file beside it changes what `tokenizer.json` does."""
    path = folder / "tokenizer_config.json"
    if not (path.is_file() and (folder / "tokenizer.json").is_file()):
        return None
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict) or config.keys() - _READ - _SILENT:
        return None
    plain = (
        config.get("tokenizer_class") in _AS_FILED
        and config.get("model_input_names", _INPUTS) == _INPUTS
        and isinstance(config.get("pad_token"), str)
        and all(isinstance(config[name], str) for name in _SPECIAL & config.keys())
        and not any((folder / name).exists() for name in _MORE_FILES)
    )
    return config if plain else None


class TransformersTokenizer:
    """A tokenizer of transformers, called as the text tower wants it; attributes as those of `FileTokenizer`."""

    def __init__(self, tokenizer: Any, rules: TokenizerSpec) -> None:
        self.max_length = rules.max_length(tokenizer.model_max_length)
        self._tokenizer, self._padding = tokenizer, "max_length" if rules.pad_to_max else "longest"
        if tokenizer.pad_token is None:  # GPT-2 and its like; the attention mask hides it
            tokenizer.pad_token = tokenizer.eos_token
        # Fixes the tokenizer's padding and truncation: a change while another thread uses it raises "Already borrowed".
        self(["a"])

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize, cut and pad: `input_ids`, and `attention_mask` and `token_type_ids` for towers that read them."""
        return dict(
            self._tokenizer(
                list(captions), padding=self._padding, truncation=True, max_length=self.max_length, return_tensors="pt"
            )
        )

    def is_truncated(self, captions: Sequence[str]) -> list[bool]:
        """Tell which captions have more tokens than `max_length`."""
        if self._tokenizer.is_fast:  # cuts as it was told above, and says what it cut off
            return [
                bool(encoding.overflowing)
                for encoding in self._tokenizer.backend_tokenizer.encode_batch(list(captions))
            ]
        ids = self._tokenizer(list(captions), verbose=False)["input_ids"]
        return [len(row) > self.max_length for row in ids]

    @property
    def vocabulary(self) -> int:
        """How many tokens there are beside the special ones."""
        return len(self._tokenizer) - len(self._tokenizer.all_special_ids)
