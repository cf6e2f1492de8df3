"""The data of a run, read, checked and split: `data -> prepare (here) -> run`; `--check` ends here."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from alignment.data import (
    ImageHash,
    Pair,
    ReadResult,
    describe_issues,
    drop_leaked,
    hash_images,
    merge_duplicates,
    near_duplicates,
    read_data,
    summarize_data,
)
from alignment.data.files import canonical_split
from alignment.preprocess import join_first
from alignment.train.config import TrainConfig

HELD_OUT = 0.05  # of the pictures, where the data set has no validation split
MIN_HELD_OUT, MAX_HELD_OUT = 20, 1000
MIN_IMAGES = 4  # fewer cannot be contrasted


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
