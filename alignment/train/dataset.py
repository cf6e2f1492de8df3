"""The training examples: a captioned data set as a numbered series of pictures with freshly drawn captions.

Place in the flow: `pairs -> examples (here) -> objective`. Example number p belongs to a known pass over the data, and
all that is random about it (its picture, captions, crop, mirroring) follows from the seed and p alone: a run that is
resumed, or shared among any number of workers, sees just what an undisturbed one sees.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from alignment.pairs import Pair
from alignment.picture_limits import LIMITS, lift_limits
from alignment.preprocess import Preprocessor, open_image
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Batch

MIN_CROP = 0.8  # of the area; smaller crops lose what the caption speaks of
_SIDES = re.compile(r"\b(left|right)\b|左|右", re.IGNORECASE)  # a mirror image would make a liar of the caption


class Captions:
    """Every caption of the training images, numbered, and which image it fits.

    Two captions with the same words are one: an image that has it is a positive for it, whoever it was drawn from.

    Attributes:
        texts: captions, image by image.
        owner: (num_captions,) the image each belongs to.
        first, count: (num_images,) where an image's captions begin and how many they are.
    """

    def __init__(self, pairs: Sequence[Pair], look_alikes: Sequence[tuple[int, int]] = ()) -> None:
        """Give numbers to the captions; `look_alikes` are pairs of images too much alike to be told apart."""
        self.texts = [caption for pair in pairs for caption in pair.captions]
        self.count = torch.tensor([len(pair.captions) for pair in pairs])
        if not len(pairs) or not bool(self.count.all()):
            raise ValueError("There must be images to train on, and each needs a caption.")
        self.owner = torch.arange(len(pairs)).repeat_interleave(self.count)
        self.first = self.count.cumsum(0) - self.count
        known: dict[str, int] = {}
        keys = [known.setdefault(_words(text), len(known)) for text in self.texts]
        self._key = torch.tensor(keys)
        self._keys = torch.nn.utils.rnn.pad_sequence(  # (num_images, most captions), -1 beyond an image's own
            list(self._key.split(self.count.tolist())), batch_first=True, padding_value=-1
        )
        self._look = torch.tensor(_components(len(pairs), look_alikes))
        alike = (self._look.bincount(minlength=len(pairs)) > 1)[self._look[self.owner]]
        self._alike = (self._look[self.owner] * len(keys) + self._key)[alike].unique()  # what look-alikes have

    def positive_mask(self, rows: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Say which pairs belong together and which must not be held apart.

        Args:
            rows: (num_images,) images.
            captions: (num_texts,) captions.

        Returns:
            positives and ignored, bool (num_images, num_texts).
        """
        rows, captions = rows.cpu(), captions.cpu()
        positives = torch.zeros(len(rows), len(captions), dtype=torch.bool)
        for keys in self._keys[rows].unbind(1):
            positives |= keys[:, None] == self._key[captions]
        alike = torch.isin(self._look[rows][:, None] * len(self._key) + self._key[captions], self._alike)
        return positives, alike & ~positives

    def sample(self, row: int, each: int, rng: np.random.Generator) -> list[int]:
        """Choose `each` captions of an image, none twice while they last."""
        first, count = int(self.first[row]), int(self.count[row])
        rounds = [rng.permutation(count) for _ in range(-(-each // count))]
        return [first + int(number) for number in np.concatenate(rounds)[:each]]


class ContrastiveDataset(Dataset[dict[str, Any]]):
    """Number p -> an image's inputs and its captions' numbers; ready for a DataLoader that counts from 0.

    Args:
        pairs: images with captions; the same that `captions` was made of.
        captions: their captions.
        preprocessor: of the model.
        batch_size: images a step, over all processes; no image comes twice in one.
        num_steps: length of the run.
        captions_per_image: drawn for each image of a step.
        augment: crop a little and mirror.
        seed: of everything random.
        kept: what a frozen part of the image side made of the images (see `frozen`), in place of the pictures.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        captions: Captions,
        preprocessor: Preprocessor,
        *,
        batch_size: int,
        num_steps: int,
        captions_per_image: int = 1,
        augment: bool = True,
        seed: int = 0,
        kept: CachedFeatures | None = None,
    ) -> None:
        self.pairs = pairs
        self.captions = captions
        self.preprocessor = preprocessor
        self.batch_size = min(batch_size, len(pairs))
        self.num_steps = num_steps
        self.captions_per_image = captions_per_image
        self.augment = augment
        self.seed = seed
        self.kept = kept
        self._pass: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        self._limits = dict(LIMITS)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Take the limits of pictures over with the rest, in a worker process that was started afresh."""
        self.__dict__.update(state)
        lift_limits(*self._limits.values())

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one pass; what is left over has its turn in another pass."""
        return len(self.pairs) // self.batch_size

    def __len__(self) -> int:
        return self.num_steps * self.batch_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1, number])
        row, chosen = self.pick(number, rng)
        mirror = not any(map(_SIDES.search, self.pairs[row].captions))
        images: Mapping[str, Tensor]
        if self.kept is not None:
            images = self.kept(row, rng, mirror=mirror)
        else:
            image = open_image(self.pairs[row].image)
            if self.augment:
                image = _augmented(image, rng, mirror=mirror)
            images = self.preprocessor.images([image])
        return {"images": images, "row": row, "captions": chosen}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if self.kept is not None or get_worker_info() is not None:
            return [self[number] for number in numbers]
        with ThreadPoolExecutor() as pool:  # decoding and resizing let go of the interpreter's lock
            return list(pool.map(self.__getitem__, numbers))

    def pick(self, number: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """Say which image example `number` shows, and draw its captions."""
        epoch, place = divmod(number, self.steps_per_epoch * self.batch_size)
        row = int(self._order(epoch)[place])
        return row, self.captions.sample(row, self.captions_per_image, rng)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch of examples: the fields of `Batch`."""
        numbers = [number for example in examples for number in example["captions"]]
        images = [example["images"] for example in examples]
        return {
            "images": {name: torch.cat([part[name] for part in images]) for name in images[0]},
            "texts": self.preprocessor.texts([self.captions.texts[number] for number in numbers]),
            "rows": torch.tensor([example["row"] for example in examples]),
            "captions": torch.tensor(numbers),
        }

    def batch(self, step: int) -> Batch:
        """Return the whole batch of a step."""
        first = step * self.batch_size
        return Batch(**self.collate(self.__getitems__(range(first, first + self.batch_size))))

    def _order(self, epoch: int) -> np.ndarray:
        known = self._pass  # looked at once: threads of one batch may be at two passes
        if known[0] != epoch:
            known = self._pass = epoch, np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.pairs))
        return known[1]


def _augmented(image: Image.Image, rng: np.random.Generator, *, mirror: bool) -> Image.Image:
    """Cut a little off the edges, the same share of width and height, and mirror every other picture."""
    share = rng.uniform(MIN_CROP, 1.0) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (int(rng.integers(spare + 1)) for spare in (image.width - width, image.height - height))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if mirror and rng.random() < 0.5 else image


def _words(text: str) -> str:
    """Leave out case and punctuation; a caption of nothing else is left as it is."""
    return " ".join(text.casefold().translate(_punctuation()).split()) or text


@cache
def _punctuation() -> Mapping[int, str]:
    marks = (mark for mark in range(sys.maxunicode + 1) if unicodedata.category(chr(mark)).startswith("P"))
    return dict.fromkeys(marks, " ")


def _components(count: int, links: Sequence[tuple[int, int]]) -> list[int]:
    """Give things numbers so that linked ones share theirs."""
    parent = list(range(count))

    def root(item: int) -> int:
        while parent[item] != item:
            parent[item] = item = parent[parent[item]]
        return item

    for one, other in links:
        parent[root(one)] = root(other)
    return [root(item) for item in range(count)]
