"""The training data: read, checked and split (`prepare`), then a numbered series of images with sampled captions.

Place in the flow: `data -> dataset (here) -> objective`; `--check` ends with `prepare`. All that is random about an
example (image, captions, crop, mirroring) follows from the seed and its number alone, so a run that is resumed, or
split among any number of workers, sees the same examples as an uninterrupted one.
"""

import hashlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, get_worker_info

from alignment.data import (
    ImageHash,
    Pair,
    ReadResult,
    describe_issues,
    drop_leaked,
    hash_images,
    merge_duplicates,
    read_data,
    summarize_data,
)
from alignment.data.deduplicate import near_duplicates
from alignment.data.files import canonical_split
from alignment.picture_limits import LIMITS
from alignment.preprocess import Preprocessor, join_first, open_image
from alignment.train.config import TrainConfig
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import Batch

HELD_OUT = 0.05  # of the pictures, where the data set has no validation split
MIN_HELD_OUT, MAX_HELD_OUT = 20, 1000
MIN_IMAGES = 4  # fewer cannot be contrasted
MIN_CROP = 0.8  # of the area; smaller crops lose what the caption describes
_SIDES = re.compile(r"\b(left|right)\b|左|右", re.IGNORECASE)  # mirroring the image would make the caption wrong


@dataclass(frozen=True)
class Prepared:
    """Training and validation data: pictures with captions, each once, none in both.

    `near_duplicates` are pairs of rows of `train`, `second` is another data set to measure on, or empty, and `readings`
    maps option and data set to the result of reading it, that of --data first.
    """

    train: list[Pair]
    evaluation: list[Pair]
    near_duplicates: list[tuple[int, int]]
    report: str
    evaluation_name: str
    second: list[Pair]
    readings: Mapping[str, ReadResult]

    @property
    def is_complete(self) -> bool:
        """Whether all folders could be listed and all files of captions be read."""
        return all(reading.is_complete for reading in self.readings.values())

    def summaries(self, *, others_only: bool = False) -> list[str]:
        """List what was left out, repaired or not read, for the data sets after --data with the option before."""
        first, *others = self.readings.items()
        lines = [f"{option}: {line}" for option, reading in others for line in describe_issues(reading)]
        return lines if others_only else [*describe_issues(first[1]), *lines]

    @property
    def digest(self) -> str:
        """sha256 over names and captions."""
        content = [(pair.id, pair.captions) for part in (self.train, self.evaluation) for pair in part]
        return hashlib.sha256(repr(content).encode()).hexdigest()


def prepare(config: TrainConfig, *, progress: Callable[[int, int], None] | None = None) -> Prepared:
    """Read and check the data of a run; `progress` is called with (done, total) while pictures are opened.

    Raises FileNotFoundError when a data set is missing, and ValueError when too few pictures are left.
    """
    data = f"--data {config.data}"
    readings = {data: read_data(config.data, format=config.format)}
    if config.eval_data:
        readings[f"--eval-data {config.eval_data}"] = read_data(config.eval_data, split=config.eval_split)
    train, evaluation, name = _split(config, readings)
    prints = hash_images([pair.image for pair in [*train, *evaluation]], progress=progress)
    report = summarize_data(replace(readings[data], pairs=train), evaluation, prints)
    evaluation = merge_duplicates(evaluation, prints)
    train = merge_duplicates(drop_leaked(train, evaluation, prints), prints)
    if not name:
        train, evaluation, name = _hold_out(train, prints)
    for source, part, count in ((data, "learn from", len(train)), ([*readings][-1], "measure on", len(evaluation))):
        if count < MIN_IMAGES:
            why = "".join(f" {line};" for line in describe_issues(readings[source])).rstrip(";")
            raise ValueError(f"{source} leaves {count} captioned pictures to {part}; {MIN_IMAGES} are needed.{why}")
    second: list[Pair] = []
    if config.second_data:
        reading = read_data(config.second_data, split=config.second_split)
        readings[f"--second-data {config.second_data}"] = reading
        second = merge_duplicates(reading.pairs, hash_images(pair.image for pair in reading.pairs))
    rows = {pair.image: row for row, pair in enumerate(train)}
    alike = [(rows[one], rows[other]) for one, other in near_duplicates(prints) if one in rows and other in rows]
    return Prepared(train, evaluation, alike, report, name, second, readings)


def _split(config: TrainConfig, readings: Mapping[str, ReadResult]) -> tuple[list[Pair], list[Pair], str]:
    """Select training and validation data, and name the latter; "" where it has to be held out."""
    pairs, *others = (reading.pairs for reading in readings.values())
    splits = {pair.split for pair in pairs}
    default = {"train", ""} if "train" in splits else splits - {"dev", "test"}
    wanted = {canonical_split(config.split)} if config.split else default
    split = canonical_split(config.eval_split or "dev")
    train = [pair for pair in pairs if pair.split in wanted]
    evaluation = others[0] if others else [pair for pair in pairs if pair.split == split]
    for name, is_missing in (
        (config.split or "train", not train),
        (split, config.eval_split and not others and not evaluation),
    ):
        if is_missing:
            names = sorted(filter(None, splits))
            there = f"its splits are {join_first(names)}" if names else "it has no splits, so leave the option out"
            raise ValueError(f"{config.data} has no split {name!r}; {there}.")
    if others:
        return train, evaluation, f"{config.eval_data}{f', split {config.eval_split}' if config.eval_split else ''}"
    return train, evaluation, f"split {split}" if evaluation else ""


def _hold_out(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> tuple[list[Pair], list[Pair], str]:
    """Hold out a part by the hash of the pictures' content: the same pictures in every run, in any order."""
    count = min(MAX_HELD_OUT, max(MIN_HELD_OUT, round(HELD_OUT * len(pairs))), len(pairs) // 2)
    contents = {image: found.content for image, found in prints.items() if found}
    held = {pair.image for pair in sorted(pairs, key=lambda pair: contents[pair.image])[:count]}
    train = [pair for pair in pairs if pair.image not in held]
    # A near-duplicate of a training picture would be too easy a query.
    duplicated = {image for pair in near_duplicates(prints) for image in pair}
    evaluation = [pair for pair in pairs if pair.image in held - duplicated]
    return train, evaluation, f"{len(evaluation)} pictures held out"


class CaptionIndex:
    """The captions of the training images, numbered, and the images each one fits.

    Captions with the same words count as one: every image that has it is a positive. `texts` are the captions, image by
    image, and `image_of_text` (num_captions,) is the index of each one's image.
    """

    def __init__(self, pairs: Sequence[Pair], near_duplicates: Sequence[tuple[int, int]] = ()) -> None:
        """Assign numbers to the captions; `near_duplicates` are pairs of near-duplicate images, by index."""
        self.texts = [caption for pair in pairs for caption in pair.captions]
        self._count = torch.tensor([len(pair.captions) for pair in pairs])
        if not len(pairs) or not bool(self._count.all()):
            raise ValueError("There must be images to train on, and each needs a caption.")
        self.image_of_text = torch.arange(len(pairs)).repeat_interleave(self._count)
        self._first = self._count.cumsum(0) - self._count
        known: dict[str, int] = {}
        self._key = torch.tensor([known.setdefault(_normalize(text), len(known)) for text in self.texts])
        keys = list(self._key.split(self._count.tolist()))
        self._keys = pad_sequence(keys, batch_first=True, padding_value=-1)  # (num_images, most captions)
        labels = np.arange(len(pairs))  # near-duplicates of near-duplicates form one group
        for one, other in near_duplicates:
            if labels[one] != labels[other]:
                labels[labels == labels[other]] = labels[one]
        self._group = torch.from_numpy(labels)
        group = self._group[self.image_of_text]
        in_group = self._group.bincount(minlength=len(pairs))[group] > 1
        self._group_keys = (group * len(self._key) + self._key)[in_group].unique()  # captions of each group

    def positive_mask(self, rows: Tensor, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Find the positive pairs, and those with captions of near-duplicates, which are not contrasted.

        Takes image indices (num_images,) and caption numbers (num_texts,), and returns bool (num_images, num_texts).
        """
        rows, captions = rows.cpu(), captions.cpu()
        positives = torch.zeros(len(rows), len(captions), dtype=torch.bool)
        for keys in self._keys[rows].unbind(1):
            positives |= keys[:, None] == self._key[captions]
        of_group = torch.isin(self._group[rows][:, None] * len(self._key) + self._key[captions], self._group_keys)
        return positives, of_group & ~positives

    def sample(self, row: int, num: int, rng: np.random.Generator) -> list[int]:
        """Sample `num` captions of an image, without repeats while they last."""
        first, count = int(self._first[row]), int(self._count[row])
        rounds = [rng.permutation(count) for _ in range(-(-num // count))]
        return [first + int(number) for number in np.concatenate(rounds)[:num]]


class ContrastiveDataset(Dataset[dict[str, Any]]):
    """Maps a number to an image's inputs and the numbers of its captions; for a DataLoader that counts from 0.

    `captions` is made of `pairs`; `batch_size` counts images per step, over all processes, and no image comes twice in
    one; `cache` has features to return in place of the pixels.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        captions: CaptionIndex,
        preprocessor: Preprocessor,
        *,
        batch_size: int,
        num_steps: int,
        captions_per_image: int = 1,
        augment: bool = True,
        seed: int = 0,
        cache: CachedFeatures | None = None,
    ) -> None:
        self.pairs, self.captions, self.preprocessor = pairs, captions, preprocessor
        self.batch_size, self.num_steps = min(batch_size, len(pairs)), num_steps
        self.captions_per_image, self.augment, self.seed, self.cache = captions_per_image, augment, seed, cache
        self._limits = dict(LIMITS)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore the limits of picture sizes too, in a worker process started by spawn."""
        self.__dict__.update(state)
        LIMITS.update(self._limits)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in one epoch; the remaining images come in other epochs."""
        return len(self.pairs) // self.batch_size

    def __len__(self) -> int:
        return self.num_steps * self.batch_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        rng = np.random.default_rng([self.seed, 1, number])
        row, captions = self.pick(number, rng)
        mirror = not any(map(_SIDES.search, self.pairs[row].captions))
        if self.cache is not None:
            return {"images": self.cache(row, rng, mirror=mirror), "row": row, "captions": captions}
        image = open_image(self.pairs[row].image)
        image = _augmented(image, rng, mirror=mirror) if self.augment else image
        return {"images": self.preprocessor.images([image]), "row": row, "captions": captions}

    def __getitems__(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        if self.cache is not None or get_worker_info() is not None:
            return [self[number] for number in numbers]
        with ThreadPoolExecutor() as pool:  # decoding and resizing release the GIL
            return list(pool.map(self.__getitem__, numbers))

    def pick(self, number: int, rng: np.random.Generator) -> tuple[int, list[int]]:
        """Return the image of example `number`, and sample its captions."""
        epoch, place = divmod(number, self.steps_per_epoch * self.batch_size)
        row = int(_shuffled(self.seed, epoch, len(self.pairs))[place])
        return row, self.captions.sample(row, self.captions_per_image, rng)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join examples to the fields of a `Batch`."""
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


@lru_cache(maxsize=2)  # threads of one batch may be in two epochs
def _shuffled(seed: int, epoch: int, num_images: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(num_images)


def _augmented(image: Image.Image, rng: np.random.Generator, *, mirror: bool) -> Image.Image:
    """Crop the same share of width and height, and mirror with probability 1/2."""
    share = rng.uniform(MIN_CROP, 1.0) ** 0.5
    width, height = (max(1, round(side * share)) for side in image.size)
    left, top = (int(rng.integers(spare + 1)) for spare in (image.width - width, image.height - height))
    image = image.crop((left, top, left + width, top + height))
    return ImageOps.mirror(image) if mirror and rng.random() < 0.5 else image


def _normalize(text: str) -> str:
    """Drop case and punctuation; a caption of punctuation alone stays as it is."""
    marks = (" " if unicodedata.category(mark)[0] == "P" else mark for mark in text.casefold())
    return " ".join("".join(marks).split()) or text
