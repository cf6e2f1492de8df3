"""Make a model's inputs of a picture, bit for bit as transformers' PIL processors do, in one pass and without them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

_PLAIN = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SQUARE = {"height": 224, "width": 224}
_CLIP = {
    **_PLAIN,
    "resample": 3,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": _SQUARE,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
# What each family's processor does where its file is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "Siglip": {**_PLAIN, **_HALF, "resample": 3, "size": _SQUARE},
    "ViT": {**_PLAIN, **_HALF, "resample": 2, "size": _SQUARE},
}
_SHORTEST = ("CLIP", "ChineseCLIP", "Siglip")  # here a size that is one number means the shorter side
# These say how a call is made or what it is made on, not what becomes of a picture that is RGB already.
_SILENT = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "_processor_class",
    "_valid_processor_keys",
    "do_convert_rgb",
    "auto_map",
}


@dataclass(frozen=True)
class ImageTransform:
    """How an image tower wants its pictures, where it wants no more than most do.

    Attributes:
        size: (height, width) to resize to, or the length of the shorter side.
        crop: (height, width) of the middle that is kept after that; `size` again where all is kept.
        resample: Pillow's number of the filter.
        scale: what a pixel of 0 to 255 is multiplied by.
        mean: what is then subtracted, a channel.
        std: what it is then divided by, a channel.
        folder: the checkpoint that says so.
    """

    size: tuple[int, int] | int
    crop: tuple[int, int]
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    folder: Path | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any], folder: Path | None = None) -> ImageTransform | None:
        """Read the rules off a `preprocessor_config.json`; None when it asks for anything not known here."""
        family = _family(config)
        asked = {name: value for name, value in config.items() if value is not None and name not in _SILENT}
        if family not in _DEFAULTS or asked.keys() - _CLIP.keys():
            return None
        rules = {**_DEFAULTS[family], **asked}
        if not all(rules[name] is True for name in ("do_resize", "do_rescale", "do_normalize")):
            return None
        size = _size(rules["size"], family in _SHORTEST)
        crop = _size(rules.get("crop_size"), False) if rules.get("do_center_crop") else size
        mean, std = (_channels(rules[name]) for name in ("image_mean", "image_std"))
        # Without a crop to one size, pictures of different shapes would not make a batch.
        if size is None or not isinstance(crop, tuple) or mean is None or std is None:
            return None
        return cls(size, crop, int(rules["resample"]), float(rules["rescale_factor"]), mean, std, folder)

    @classmethod
    def read(cls, folder: Path) -> ImageTransform | None:
        """Read the rules of a checkpoint; None when its file is missing or asks for anything not known here.

        Raises:
            ValueError: when the file is damaged.
        """
        nested = _read(folder / "processor_config.json").get("image_processor")
        config = nested if isinstance(nested, dict) else _read(folder / "preprocessor_config.json")
        return cls.of(config, folder)

    @property
    def side(self) -> int:
        """The longest side in pixels that a picture is resized to, of the shorter one where the longer may vary."""
        return self.size if isinstance(self.size, int) else max(self.size)

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Resize and normalise pictures in mode RGB: (n, 3, height, width) float32."""
        batch = np.empty((len(images), 3, *self.crop), dtype=np.float32)
        for image, rows in zip(images, batch, strict=True):
            pixels = np.asarray(self._cut(image))
            for channel, values in enumerate(self._values):
                # "clip" alone writes straight into the batch, and a byte is never beyond the table.
                np.take(values, pixels[..., channel], out=rows[channel], mode="clip")
        return torch.from_numpy(batch)

    def _cut(self, image: Image.Image) -> Image.Image:
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
    def _values(self) -> NDArray[np.float32]:
        """(3, 256): what becomes of each byte in each channel, rounded where transformers rounds."""
        scaled = (np.arange(256).astype(np.float64) * self.scale).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


def _family(config: Mapping[str, Any]) -> str:
    kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
    known = re.fullmatch("(.+)(?:ImageProcessor|FeatureExtractor)(?:Fast|Pil)?", kind)
    return known.group(1) if known else ""


def _read(path: Path) -> dict[str, Any]:
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return config if isinstance(config, dict) else {}


def _size(size: Any, shortest: bool) -> tuple[int, int] | int | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size if shortest else (size, size)
    if isinstance(size, Mapping):
        if set(size) == {"height", "width"}:
            return int(size["height"]), int(size["width"])
        if set(size) == {"shortest_edge"}:
            return int(size["shortest_edge"])
    return None


def _channels(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, list | tuple) or len(values) != 3:
        return None
    return tuple(float(value) for value in values)
