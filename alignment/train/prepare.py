"""The data of a run: read, checked, parted into what is learnt from and what is measured on.

Place in the flow: `pairs -> prepare (here) -> run`. `--check` ends here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from alignment.data import (
    DataReport,
    ImageHash,
    Pair,
    ReadResult,
    check_data,
    describe_issues,
    drop_leaked,
    hash_images,
    merge_duplicates,
    near_duplicates,
    read_data,
)
from alignment.data.files import canonical_split
from alignment.preprocess import join_first
from alignment.train.settings import TrainConfig

HELD_OUT = 0.05  # of the pictures, where the data set has no split to measure on
MIN_HELD_OUT, MAX_HELD_OUT = 20, 1000
MIN_IMAGES = 4  # with fewer there is nothing to contrast

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What a run learns from and what it is measured on.

    Attributes:
        train, evaluation: pictures with captions, each once, none in both.
        look_alikes: rows of `train` that are one photograph saved in two ways.
        report: what the check found.
        evaluation_name: where the evaluation part comes from, in words.
        second: another data set to measure on, or nothing.
        readings: option and data set -> how it was read.
    """

    train: list[Pair]
    evaluation: list[Pair]
    look_alikes: list[tuple[int, int]]
    report: DataReport
    evaluation_name: str
    second: list[Pair]
    readings: Mapping[str, ReadResult]

    @property
    def is_complete(self) -> bool:
        """Whether all of the data could be looked at, as in a build."""
        return all(reading.is_complete for reading in self.readings.values())

    def told(self) -> list[str]:
        """Say what became of the data sets: of --data in bare lines, of the others by their options."""
        return [*describe_issues(next(iter(self.readings.values()))), *self.told_of_others()]

    def told_of_others(self) -> list[str]:
        """Say what became of --eval-data and --second-data."""
        return [
            f"{option}: {line}" for option in [*self.readings][1:] for line in describe_issues(self.readings[option])
        ]

    @property
    def digest(self) -> str:
        """Tell two data sets apart: sha256 over names and captions."""
        said = [(pair.id, pair.captions) for part in (self.train, self.evaluation) for pair in part]
        return hashlib.sha256(repr(said).encode()).hexdigest()


def prepare(config: TrainConfig, *, progress: Progress | None = None) -> Prepared:
    """Read and check the data of a run.

    Args:
        config: what to read.
        progress: called with (done, total) while pictures are opened.

    Raises:
        FileNotFoundError: when something named is not there.
        ValueError: when too few pictures are left.
    """
    data = f"--data {config.data}"
    readings = {data: read_data(config.data, format=config.format)}
    if config.eval_data:
        readings[f"--eval-data {config.eval_data}"] = read_data(config.eval_data, split=config.eval_split)
    train, evaluation, name = _parts(config, readings)
    prints = hash_images([pair.image for pair in [*train, *evaluation]], progress=progress)
    report = check_data(replace(readings[data], pairs=train), evaluation, hashes=prints)
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
        reading = readings[f"--second-data {config.second_data}"] = read_data(
            config.second_data, split=config.second_split
        )
        second = merge_duplicates(reading.pairs, hash_images(pair.image for pair in reading.pairs))
    rows = {pair.image: row for row, pair in enumerate(train)}
    alike = [(rows[one], rows[other]) for one, other in near_duplicates(prints) if one in rows and other in rows]
    return Prepared(train, evaluation, alike, report, name, second, readings)


def _parts(config: TrainConfig, readings: Mapping[str, ReadResult]) -> tuple[list[Pair], list[Pair], str]:
    """Find what to learn from and what to measure on; no name for the second where it has to be held out."""
    pairs, *others = (reading.pairs for reading in readings.values())
    splits = {pair.split for pair in pairs}
    usual = {"train", ""} if "train" in splits else splits - {"dev", "test"}
    wanted = {canonical_split(config.split)} if config.split else usual
    if not wanted & splits:
        raise ValueError(_no_split(config.data, config.split or "train", splits))
    train = [pair for pair in pairs if pair.split in wanted]
    for evaluation in others:
        return train, evaluation, f"{config.eval_data}{f', split {config.eval_split}' if config.eval_split else ''}"
    split = canonical_split(config.eval_split or "dev")
    evaluation = [pair for pair in pairs if pair.split == split]
    if config.eval_split and not evaluation:
        raise ValueError(_no_split(config.data, split, splits))
    return train, evaluation, f"split {split}" if evaluation else ""


def _no_split(data: str, split: str, splits: set[str]) -> str:
    named = sorted(filter(None, splits))
    there = f"its splits are {join_first(named)}" if named else "it has no splits, so leave the option out"
    return f"{data} has no split {split!r}; {there}."


def _hold_out(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> tuple[list[Pair], list[Pair], str]:
    """Set a part aside by the pictures' content: the same ones in every run, however the data are sorted."""
    count = min(MAX_HELD_OUT, max(MIN_HELD_OUT, round(HELD_OUT * len(pairs))), len(pairs) // 2)

    def place(pair: Pair) -> str:
        found = prints[pair.image]
        return found.content if found else ""

    held = {pair.image for pair in sorted(pairs, key=place)[:count]}
    train = [pair for pair in pairs if pair.image not in held]
    # A look-alike of a picture to learn from would be too easy a question.
    seen_twice = {one for pair in near_duplicates(prints) for one in pair}
    evaluation = [pair for pair in pairs if pair.image in held and pair.image not in seen_twice]
    return train, evaluation, f"{len(evaluation)} pictures held out"
