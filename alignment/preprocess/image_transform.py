"""Resize, crop and normalise pictures, bit for bit as transformers' PIL image processors do.

Place in the flow: `open pictures -> pixel_values (here) -> model`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from alignment.preprocess.config import load_json

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


def _size(size: Any, is_shortest_edge: bool) -> tuple[int, int] | int | None:
    if isinstance(size, int) and not isinstance(size, bool):
        return size if is_shortest_edge else (size, size)
    if isinstance(size, Mapping) and set(size) == {"height", "width"}:
        return int(size["height"]), int(size["width"])
    return int(size["shortest_edge"]) if isinstance(size, Mapping) and set(size) == {"shortest_edge"} else None


def _channels(values: Any) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if isinstance(values, list | tuple) and len(values) == 3 else None
