"""Compute once what stays frozen: the trunk's maps of every picture, the sentence embeddings of every caption.

Place in the flow: between `convert` and `recipe`. Pictures come as they are and mirrored; the maps are kept in half
precision on disk and mapped into memory, so that a second run starts where the first one stopped.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from alignment.compact.convert import MAX_TOKENS, teacher_folder
from alignment.durable import put_in_place
from alignment.pairs import Pair
from alignment.preprocess import Preprocessor, open_image
from alignment.towers import EfficientNetLiteModel, NgramTextModel

logger = logging.getLogger(__name__)

VIEWS = 2  # as it is, mirrored


@dataclass(frozen=True)
class ImageFeatures:
    """What the frozen trunk makes of the pictures.

    Attributes:
        maps: (num_images, views, channels, side, side) float16, mapped into memory.
        pooled: (num_images, views, 1280) float32, the plain tower's averaged features.
    """

    maps: np.ndarray
    pooled: Tensor

    def windows(self, images: Tensor, views: Tensor, side: int, rng: np.random.Generator | None = None) -> Tensor:
        """Cut a window of `side` cells out of the maps, at a random place each: (n, channels, side, side) float32."""
        spare = self.maps.shape[-1] - side
        corners = rng.integers(0, spare + 1, (len(images), 2)) if rng else np.zeros((len(images), 2), int)
        cut = [
            self.maps[image, view, :, top : top + side, left : left + side]
            for image, view, (top, left) in zip(images.tolist(), views.tolist(), corners, strict=True)
        ]
        return torch.from_numpy(np.stack(cut)).float().contiguous(memory_format=torch.channels_last)


@torch.inference_mode()
def image_features(
    tower: EfficientNetLiteModel, pairs: Sequence[Pair], preprocessor: Preprocessor, cache: Path, batch_size: int = 16
) -> ImageFeatures:
    """Run the plain tower over every picture and its mirror image, or take what an earlier run left in `cache`."""
    key = hashlib.sha256("\n".join(Path(pair.image).name for pair in pairs).encode()).hexdigest()[:16]
    maps_path, pooled_path = cache / f"maps-{key}.npy", cache / f"pooled-{key}.safetensors"
    if not pooled_path.exists():
        side = tower.trunk_maps(torch.zeros(1, 3, tower.config.image_size, tower.config.image_size)).shape
        shape = (len(pairs), VIEWS, *side[1:])
        maps = np.lib.format.open_memmap(maps_path, "w+", np.float16, shape)
        pooled = torch.zeros(len(pairs), VIEWS, tower.config.hidden_size)
        started = time.monotonic()
        for first in range(0, len(pairs), batch_size):
            rows = slice(first, first + batch_size)
            images = [open_image(pair.image) for pair in pairs[rows]]
            pixels = preprocessor.images(images)["pixel_values"].contiguous(memory_format=torch.channels_last)
            for view, seen in enumerate((pixels, pixels.flip(-1))):
                trunk = tower.trunk_maps(seen)
                maps[rows, view] = trunk.numpy()
                pooled[rows, view] = tower.tail(trunk).mean((2, 3))
            if first % (50 * batch_size) == 0:
                logger.info("features: %d of %d pictures, %.0f s", first, len(pairs), time.monotonic() - started)
        maps.flush()
        with put_in_place(pooled_path) as fresh:
            save_file({"pooled": pooled}, fresh)
    return ImageFeatures(np.load(maps_path, mmap_mode="r"), load_file(pooled_path)["pooled"])


@dataclass(frozen=True)
class TextFeatures:
    """What the frozen text tower makes of texts.

    Attributes:
        sentences: (num_texts, sentence_dim), unit norm.
        tokens: (num_tokens, width) float16, the texts one after the other.
        first, length: (num_texts,) where a text's tokens begin and how many they are.
    """

    sentences: Tensor
    tokens: Tensor
    first: Tensor
    length: Tensor

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pad some texts to one length: tokens (n, length, width), sentences (n, sentence_dim) and the mask."""
        places = torch.arange(int(self.length[rows].max()))
        mask = places < self.length[rows, None]
        found = (self.first[rows, None] + places).clamp(max=len(self.tokens) - 1)
        return self.tokens[found].float() * mask.unsqueeze(-1), self.sentences[rows], mask.long()


@torch.inference_mode()
def text_features(
    tower: NgramTextModel, preprocessor: Preprocessor, texts: Sequence[str], batch_size: int = 256
) -> TextFeatures:
    """Run the plain text tower over every text."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))  # a batch of one length holds little padding
    length = torch.zeros(len(texts), dtype=torch.long)
    first = torch.zeros(len(texts), dtype=torch.long)
    sentences = torch.zeros(len(texts), tower.config.sentence_dim)
    tokens: list[Tensor] = []
    total = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        inputs = preprocessor.texts([texts[row] for row in rows])
        features, sentences[rows] = tower.sentences(inputs["input_ids"], inputs["attention_mask"])
        keep = inputs["attention_mask"].bool()
        length[rows] = keep.sum(1)
        first[rows] = total + length[rows].cumsum(0) - length[rows]
        tokens.append(features[keep].half())
        total += int(keep.sum())
    return TextFeatures(sentences, torch.cat(tokens), first, length)


@torch.inference_mode()
def teacher_embeddings(texts: Sequence[str], cache: Path, batch_size: int = 256) -> Tensor:
    """Embed English texts with all-MiniLM-L6-v2: (num_texts, 384), unit norm; kept in `cache`."""
    key = hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
    path = cache / f"teacher-{key}.safetensors"
    if not path.exists():
        folder = teacher_folder(cache)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()
        order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
        embeddings = torch.zeros(len(texts), model.config.hidden_size)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = [texts[row] for row in rows]
            inputs = tokenizer(batch, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            mask = inputs["attention_mask"].unsqueeze(-1)
            tokens = model(**inputs).last_hidden_state
            embeddings[rows] = functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
        with put_in_place(path) as fresh:
            save_file({"embeddings": embeddings}, fresh)
    return load_file(path)["embeddings"]


@dataclass(frozen=True)
class ClassName:
    """What one ImageNet class is called.

    Attributes:
        english: names in use, the commonest first.
        chinese: the same in Chinese.
        kind: what a child would call it, in English and in Chinese.
    """

    english: tuple[str, ...]
    chinese: tuple[str, ...]
    kind: tuple[str, str]


def read_class_names(path: Path) -> list[ClassName]:
    """Read the thousand names in the order of the classifier's rows."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [
        ClassName(
            tuple(row["english"].split(" | ")), tuple(row["chinese"].split(" | ")), (row["kind"], row["kind_chinese"])
        )
        for row in rows
    ]


def read_scenes(path: Path) -> list[tuple[str, str]]:
    """Read the project's own scenes, each in English and in Chinese."""
    scenes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(scene["en"], scene["zh"]) for scene in scenes]
