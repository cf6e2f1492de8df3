"""A checkpoint's image processor and tokenizer.

Pictures become, bit for bit, what transformers' PIL image processors make of them, and captions the ids that it gives;
it is imported only for checkpoints that need more than what is here.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from alignment.preprocess.images import ImageSource, open_image

_PLAIN = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SQUARE = {"height": 224, "width": 224}
_CLIP: dict[str, Any] = {**_PLAIN, "resample": 3, "size": {"shortest_edge": 224}, "do_center_crop": True}
_CLIP |= {"crop_size": _SQUARE, "image_mean": [0.48145466, 0.4578275, 0.40821073]}
_CLIP |= {"image_std": [0.26862954, 0.26130258, 0.27577711]}
# Defaults of each family's processor.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Siglip": {**_PLAIN, **_HALF, "resample": 3, "size": _SQUARE},
    "ViT": {**_PLAIN, **_HALF, "resample": 2, "size": _SQUARE},
}
_SHORTEST_EDGE = ("CLIP", "ChineseCLIP", "Siglip")  # families in which a size of one number is that of the shorter side
# Keys without effect on a picture that is RGB already.
_IGNORED = {"image_processor_type", "feature_extractor_type", "processor_class", "_processor_class"}
_IGNORED |= {"_valid_processor_keys", "do_convert_rgb", "auto_map"}
_MIN_VOCABULARY = 10
_TRUNCATION_BATCH = 4096  # captions tokenized at once in `truncated`
_DRAFT_SCALE = 1.44  # shorter side of a draft over that of the model's input; 12 megapixels at 1/8 (3000 / 8) reach 260
_MIN_DRAFT_SIZE = 320  # a gallery makes its thumbnail from the same draft


@dataclass(frozen=True)
class ImageTransform:
    """The resize, centre crop and normalisation that most checkpoints ask for."""

    size: tuple[int, int] | int  # (height, width) to resize to, or the length of the shorter side
    crop: tuple[int, int]  # (height, width) of the centre crop after that; `size` again without one
    resample: int  # number of the Pillow filter
    scale: float  # factor for a pixel of 0 to 255
    mean: tuple[float, ...]  # subtracted from each channel after scaling
    std: tuple[float, ...]  # divisor of each channel after that
    folder: Path | None = None  # checkpoint that the settings come from

    @classmethod
    def from_config(cls, config: Mapping[str, Any], folder: Path | None = None) -> Self | None:
        """Read the settings of a `preprocessor_config.json`; None if it asks for anything else."""
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        named = re.fullmatch(f"({'|'.join(_DEFAULTS)})(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?", kind)
        given = {name: value for name, value in config.items() if value is not None and name not in _IGNORED}
        if not named or given.keys() - _CLIP.keys():
            return None
        family = named[1]
        settings = {**_DEFAULTS[family], **given}
        if not all(settings[name] is True for name in ("do_resize", "do_rescale", "do_normalize")):
            return None
        size = _size(settings["size"], family in _SHORTEST_EDGE)
        crop = _size(settings.get("crop_size"), False) if settings.get("do_center_crop") else size
        mean, std = (_channels(settings[name]) for name in ("image_mean", "image_std"))
        # Without a crop to a fixed size, pictures of different shapes would not make a batch.
        if size is None or not isinstance(crop, tuple) or mean is None or std is None:
            return None
        return cls(size, crop, int(settings["resample"]), float(settings["rescale_factor"]), mean, std, folder)

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Load the settings of a checkpoint; None if its file is missing or asks for anything else."""
        nested = load_json(folder / "processor_config.json").get("image_processor")
        config = nested if isinstance(nested, dict) else load_json(folder / "preprocessor_config.json")
        return cls.from_config(config, folder)

    @property
    def side(self) -> int:
        """Pixels of the shorter side after resizing, or of the longer one where both are fixed."""
        return self.size if isinstance(self.size, int) else max(self.size)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize and normalise pictures in mode RGB: (n, 3, height, width) float32."""
        batch = np.empty((len(images), 3, *self.crop), dtype=np.float32)
        for image, channels in zip(images, batch, strict=True):
            pixels = np.asarray(self._resize(image))
            for channel, table in enumerate(self._tables):
                # With mode "clip" numpy writes into the batch without a copy; no byte is beyond the table.
                np.take(table, pixels[..., channel], out=channels[channel], mode="clip")
        return torch.from_numpy(batch)

    def _resize(self, image: Image.Image) -> Image.Image:
        if isinstance(self.size, int):
            short, long = sorted(image.size)
            long = int(self.size * long / short)
            width, height = (self.size, long) if image.width <= image.height else (long, self.size)
        else:
            height, width = self.size
        resized = image.resize((width, height), self.resample)
        if (height, width) == self.crop:
            return resized
        left, top = (width - self.crop[1]) // 2, (height - self.crop[0]) // 2
        return resized.crop((left, top, left + self.crop[1], top + self.crop[0]))  # black where it is too small

    @cached_property
    def _tables(self) -> NDArray[np.float32]:
        """(3, 256): the normalised value of each byte in each channel, rounded where transformers rounds."""
        scaled = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; {} if the file is missing or holds anything else. A damaged one is a ValueError."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return config if isinstance(config, dict) else {}


def _size(size: Any, is_shortest_edge: bool) -> tuple[int, int] | int | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size if is_shortest_edge else (size, size)
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    return int(size["shortest_edge"]) if isinstance(size, Mapping) and set(size) == {"shortest_edge"} else None


def _channels(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if isinstance(values, list | tuple) and len(values) == 3 else None


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
        return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}

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


class Preprocessor:
    """A checkpoint's image processor and tokenizer, applied as in its training.

    What most checkpoints ask for is computed here, with the same result as in transformers, which does the rest.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, tokenizer_spec: TokenizerSpec) -> None:
        is_ours = isinstance(image_processor, ImageTransform)
        self._image_processor, self._tokenizer = image_processor, tokenizer
        self._transform = image_processor if is_ours else ImageTransform.from_config(image_processor.to_dict())
        is_ours = isinstance(tokenizer, FileTokenizer)
        self._tokenize = tokenizer if is_ours else TransformersTokenizer(tokenizer, tokenizer_spec)
        self.tokenizer_spec = tokenizer_spec
        self.max_length = self._tokenize.max_length  # tokens to which a caption is truncated
        # As `ImageTransform.side`; None where that varies, as for NaFlex.
        self.image_side = self._transform.side if self._transform else None

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str], text: str | os.PathLike[str] | None = None) -> Self:
        """Load the preprocessor of a checkpoint, given by its folder or Hub id; `text` has the tokenizer, if given.

        Raises:
            FileNotFoundError: when a checkpoint, or its image processor or tokenizer, is missing.
        """
        source = name_or_path if text is None else text
        try:
            transform = ImageTransform.load(Path(name_or_path)) or _auto_image_processor(name_or_path)
            config = load_json(Path(source) / "config.json") or _hub_config(source)
            model_type, spec = str(config.get("model_type")), TokenizerSpec.from_config(config)
            tokenizer = FileTokenizer.load(Path(source), model_type, spec) or _auto_tokenizer(source)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name_or_path} lacks its image processor, or {source} its tokenizer or config.json: check the path, "
                "or save them next to the weights with `processor.save_pretrained(FOLDER)`."
            ) from error
        return cls(transform, tokenizer, spec)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Save the image processor and the tokenizer; `tokenizer_spec` follows from the model's `config.json`."""
        self.image_processor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    @cached_property
    def image_processor(self) -> Any:
        """The image processor of transformers, loaded on first access."""
        ours = self._image_processor
        return _auto_image_processor(ours.folder) if isinstance(ours, ImageTransform) else ours

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers, loaded on first access, its padding and truncation set."""
        if not isinstance(self._tokenizer, FileTokenizer):
            return self._tokenizer
        tokenizer = _auto_tokenizer(self._tokenizer.folder)
        TransformersTokenizer(tokenizer, self.tokenizer_spec)
        return tokenizer

    @property
    def draft_size(self) -> int | None:
        """The `draft_size` with which pictures may be opened without a loss; None: only at full size."""
        return None if self.image_side is None else max(math.ceil(_DRAFT_SCALE * self.image_side), _MIN_DRAFT_SIZE)

    def image(self, source: ImageSource) -> dict[str, Tensor]:
        """Open one picture, as a draft if possible, and return what `images` returns of it; thread-safe."""
        return self.images([open_image(source, draft_size=self.draft_size)])

    def images(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Resize and normalise opened images.

        Returns:
            `pixel_values`, and whatever else the vision tower reads (NaFlex: `pixel_attention_mask`, `spatial_shapes`).
        """
        if self._transform is not None and all(image.mode == "RGB" for image in images):
            return {"pixel_values": self._transform(images)}
        return dict(self.image_processor(list(images), return_tensors="pt"))

    def texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize captions: `input_ids`, and `attention_mask` if the text tower reads it."""
        return self._tokenize(self._cased(texts))

    def truncated(self, texts: Iterable[str]) -> list[str]:
        """List the captions that have more than `max_length` tokens, each once."""
        # A token takes at least one byte, apart from the special ones and the mark of a word's beginning.
        long = [text for text in dict.fromkeys(texts) if len(text.encode(errors="replace")) + 4 > self.max_length]
        flags: list[bool] = []
        for start in range(0, len(long), _TRUNCATION_BATCH):
            flags += self._tokenize.is_truncated(self._cased(long[start : start + _TRUNCATION_BATCH]))
        return [text for text, is_truncated in zip(long, flags, strict=True) if is_truncated]

    def _cased(self, texts: Sequence[str]) -> Sequence[str]:
        return [text.lower() for text in texts] if self.tokenizer_spec.lower else texts


def _hub_config(source: str | os.PathLike[str]) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    return dict(PreTrainedConfig.get_config_dict(source)[0])


def _auto_image_processor(source: str | os.PathLike[str] | None) -> Any:
    from transformers import AutoImageProcessor

    # PIL even where torchvision is installed: the same pixels on every machine.
    return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)


def _auto_tokenizer(source: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    # Without a vocabulary file transformers builds a tokenizer of special tokens only.
    if len(tokenizer) - len(tokenizer.all_special_ids) < _MIN_VOCABULARY:
        raise ValueError(f"{source} lacks its vocabulary")
    return tokenizer
