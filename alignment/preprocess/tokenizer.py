"""Tokenize captions as a checkpoint's text tower expects, from `tokenizer.json` or with transformers.

Place in the flow: `captions -> input_ids (here) -> model`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from alignment.preprocess.config import load_json


@dataclass(frozen=True)
class TokenizerSpec:
    """How a text tower expects its captions, as far as the tokenizer's files do not say it."""

    positions: int = 512  # tokens the tower has places for, unless its config says so
    reserved: int = 0  # places that hold no token (RoBERTa counts from its padding index)
    trained_length: int | None = None  # tokens it was trained on, where that is fewer than it has places for
    pad_to_max: bool = False  # pad to the full length; SigLIP takes its embedding from the last place
    lower: bool = False  # lower the case first

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TokenizerSpec":
        """Read the `config.json` of a dual encoder or of a text tower."""
        text = config.get("text_config") or config
        kind = str(config.get("model_type", ""))
        if kind not in _SPECS:  # joined from two towers: the text tower decides
            kind = str(text.get("model_type", "")).removesuffix("_text_model")
        spec = _SPECS.get(kind, cls())
        places = text.get("max_position_embeddings")
        return replace(spec, positions=places - spec.reserved) if places else spec

    def max_length(self, model_max_length: int | None) -> int:
        """Return how many tokens a caption may have, special ones included, given the tokenizer's own limit."""
        return min(filter(None, (model_max_length, self.positions, self.trained_length)))


_SPECS = {
    "clip": TokenizerSpec(positions=77),
    # The fixed-size SigLIP2 checkpoints have model type "siglip" too.
    **dict.fromkeys(("siglip", "siglip2"), TokenizerSpec(positions=64, pad_to_max=True, lower=True)),
    "chinese_clip": TokenizerSpec(trained_length=52),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), TokenizerSpec(reserved=2)),
}

# transformers rebuilds most tokenizers in code of their family; for these classes and model types it uses
# `tokenizer.json` unchanged.
_GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
_GENERIC_MODELS = ("composed-dual-encoder", "vision-text-dual-encoder")
_SPECIAL = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_INPUTS = ["input_ids", "attention_mask"]
_SUPPORTED = {"tokenizer_class", "model_input_names", "model_max_length", "padding_side", "truncation_side", *_SPECIAL}
# Without effect on ids.
_SUPPORTED |= {"backend", "clean_up_tokenization_spaces", "is_local", "local_files_only"}
_SUPPORTED |= {"name_or_path", "processor_class"}
_MORE_FILES = ("special_tokens_map.json", "added_tokens.json")  # of older versions; they may change tokens


class FileTokenizer:
    """A tokenizer read from `tokenizer.json` alone; captions are truncated to `max_length` tokens."""

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], spec: TokenizerSpec, folder: Path) -> None:
        self.folder = folder
        self.max_length = spec.max_length(config.get("model_max_length"))
        self._tokenizer = tokenizer
        # Set here and never changed: a change while another thread tokenizes raises "Already borrowed".
        tokenizer.enable_truncation(self.max_length, direction=config.get("truncation_side", "right"))
        tokenizer.enable_padding(
            direction=config.get("padding_side", "right"),
            pad_id=tokenizer.token_to_id(config["pad_token"]),
            pad_token=config["pad_token"],
            length=self.max_length if spec.pad_to_max else None,
        )

    @classmethod
    def load(cls, folder: Path, model_type: str, spec: TokenizerSpec) -> Self | None:
        """Load a checkpoint's tokenizer; None if transformers would do more than `tokenizer.json` says."""
        config = _sufficient_config(folder) if model_type in _GENERIC_MODELS else None
        if config is None:
            return None
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare `Exception`
            raise ValueError(f"{folder / 'tokenizer.json'} is damaged: {error}") from error
        named = {config[name] for name in _SPECIAL & config.keys()}
        special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        # transformers would add special tokens that the file lacks.
        return cls(tokenizer, config, spec, folder) if named <= special else None

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize, truncate and pad: `input_ids` and `attention_mask`, (n, length) each."""
        encodings = self._tokenizer.encode_batch_fast(list(captions))
        ids, masks = ([getattr(encoding, name) for encoding in encodings] for name in ("ids", "attention_mask"))
        # numpy: torch reads a list more slowly.
        return {"input_ids": torch.from_numpy(np.array(ids)), "attention_mask": torch.from_numpy(np.array(masks))}

    def is_truncated(self, captions: Sequence[str]) -> list[bool]:
        """Tell for each caption whether it has more than `max_length` tokens."""
        return _overflows(self._tokenizer, captions)


def _overflows(tokenizer: Tokenizer, captions: Sequence[str]) -> list[bool]:
    return [bool(encoding.overflowing) for encoding in tokenizer.encode_batch(list(captions))]


def _sufficient_config(folder: Path) -> dict[str, Any] | None:
    """Return `tokenizer_config.json`; None if it or a file beside it changes what `tokenizer.json` does."""
    config = load_json(folder / "tokenizer_config.json")
    is_sufficient = (
        config.get("tokenizer_class") in _GENERIC_CLASSES
        and not config.keys() - _SUPPORTED
        and config.get("model_input_names", _INPUTS) == _INPUTS
        and isinstance(config.get("pad_token"), str)
        and all(isinstance(config[name], str) for name in _SPECIAL & config.keys())
        and (folder / "tokenizer.json").is_file()
        and not any((folder / name).exists() for name in _MORE_FILES)
    )
    return config if is_sufficient else None


class TransformersTokenizer:
    """A tokenizer of transformers, called as the text tower expects; attributes as those of `FileTokenizer`."""

    def __init__(self, tokenizer: Any, spec: TokenizerSpec) -> None:
        self.max_length = spec.max_length(tokenizer.model_max_length)
        self._tokenizer, self._padding = tokenizer, "max_length" if spec.pad_to_max else "longest"
        if tokenizer.pad_token is None:  # as GPT-2's; the attention mask hides the padding
            tokenizer.pad_token = tokenizer.eos_token
        # Fixes padding and truncation: a change while another thread tokenizes raises "Already borrowed".
        self(["a"])

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize, truncate and pad: `input_ids`, and the masks and token types that the tower reads."""
        options = {"padding": self._padding, "truncation": True, "max_length": self.max_length}
        return dict(self._tokenizer(list(captions), return_tensors="pt", **options))

    def is_truncated(self, captions: Sequence[str]) -> list[bool]:
        """Tell for each caption whether it has more than `max_length` tokens."""
        if self._tokenizer.is_fast:
            return _overflows(self._tokenizer.backend_tokenizer, captions)
        return [len(ids) > self.max_length for ids in self._tokenizer(list(captions), verbose=False)["input_ids"]]
