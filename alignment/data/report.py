"""Report what a data set contains and what is wrong with it, for `--check` and the summaries of the commands."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from alignment.data.collector import Pair, describe_unread
from alignment.data.deduplicate import ImageHashes, hash_images, near_duplicate_contents, near_duplicates
from alignment.data.reader import ReadResult
from alignment.preprocess import join_first, sanitize_text

NUM_LISTED = 10  # captions in a report
_NUM_EXAMPLES = 3  # of each finding, in the summary


@dataclass(frozen=True)
class Overlap:
    """What the evaluation part has in common with the training part.

    Attributes:
        num_images: of the evaluation part.
        unreadable: pictures of it that cannot be opened.
        same_content: (training picture, evaluation picture) with the same bytes, one pair for each content.
        near_duplicates: (training picture, evaluation picture), one photograph saved in two ways.
        num_captions: different captions that both parts have.
        captions: some of them.
    """

    num_images: int
    unreadable: tuple[str, ...]
    same_content: tuple[tuple[str, str], ...]
    near_duplicates: tuple[tuple[str, str], ...]
    num_captions: int
    captions: tuple[str, ...]

    def lines(self) -> list[str]:
        """Write a few lines, with at most three examples of each finding."""
        title = f"Evaluated on {_count(self.num_images, 'picture')}"
        lines = [
            *_finding("pictures that cannot be opened", _names(self.unreadable)),
            *_finding("pictures that are in the training part too", _joined(self.same_content, " = ")),
            *_finding("pictures that look the same as one in the training part", _joined(self.near_duplicates, " ~ ")),
            *_finding("captions that the training part has too", list(map(repr, self.captions)), self.num_captions),
        ]
        return [f"{title}:", *lines] if lines else [f"{title}, none of them in the training part."]


@dataclass(frozen=True)
class DataReport:
    """What a data set contains and what is wrong with it; `dataclasses.asdict` makes it JSON.

    Attributes:
        num_images: pictures, unusable ones included.
        num_captions: captions of all of them.
        captions_per_image: fewest, median, most.
        left_out: reason -> what was left out for it while reading.
        repaired: reason -> what was read although something is wrong with it.
        unread: files of captions that could not be read -> why.
        unreadable: pictures that cannot be opened.
        without_captions: pictures without a caption.
        same_content: groups of pictures with the same bytes.
        near_duplicates: pairs that are one photograph saved in two ways.
        num_repeated: captions that belong to pictures of different content; case and the final stop do not count.
        most_repeated: the most frequent of them, with the number of pictures.
        overlap: with the evaluation part, if there is one.
    """

    num_images: int
    num_captions: int
    captions_per_image: tuple[int, float, int]
    left_out: dict[str, tuple[str, ...]]
    repaired: dict[str, tuple[str, ...]]
    unread: dict[str, str]
    unreadable: tuple[str, ...]
    without_captions: tuple[str, ...]
    same_content: tuple[tuple[str, ...], ...]
    near_duplicates: tuple[tuple[str, str], ...]
    num_repeated: int
    most_repeated: tuple[tuple[str, int], ...]
    overlap: Overlap | None

    def summary(self) -> str:
        """Write a few lines, with at most three examples of each finding."""
        fewest, middle, most = self.captions_per_image
        spread = f"{fewest}" if fewest == most else f"{fewest} to {most}, half of them up to {middle:g},"
        title = f"{_count(self.num_images, 'picture')} with {_count(self.num_captions, 'caption')}: {spread} each."
        repeated = [f"{caption!r} on {times}" for caption, times in self.most_repeated]
        lines = [
            *(f"- {line}" for line in describe_issues(self)),
            *_finding("pictures that cannot be opened", _names(self.unreadable)),
            *_finding("pictures without a caption", _names(self.without_captions)),
            *_finding("same file under several names", _joined(self.same_content, " = ")),
            *_finding("pairs that look the same", _joined(self.near_duplicates, " ~ ")),
            *_finding("captions that belong to several pictures", repeated, self.num_repeated),
        ] or ["Nothing is missing, unreadable or there twice."]
        return "\n".join([title, *lines, *(self.overlap.lines() if self.overlap else [])])


class ReadIssues(Protocol):
    """What did not fit while reading: attributes of a `ReadResult`, and of reports that include it."""

    @property
    def left_out(self) -> Mapping[str, Sequence[str]]:
        """Reason -> what was left out for it."""

    @property
    def repaired(self) -> Mapping[str, Sequence[str]]:
        """Reason -> what was read although something is wrong with it."""

    @property
    def unread(self) -> Mapping[str, str]:
        """File -> why it could not be read."""


def describe_issues(issues: ReadIssues) -> list[str]:
    """Write a line for each reason why something was left out or repaired, and for each file that could not be read."""
    kinds = {"left out": issues.left_out, "read all the same": issues.repaired}
    lines = [
        f"{kind}, {reason}: {len(what):,} ({join_first(what)})"
        for kind, found in kinds.items()
        for reason, what in found.items()
    ]
    return lines + [f"not read, {line}" for line in describe_unread(issues.unread)]


def describe_truncated(captions: Sequence[str], max_length: int) -> list[str]:
    """Write a line about the captions that are longer than a model reads; none if there are none."""
    reason = f"captions of which the model reads only the first {max_length} tokens"
    return [f"{reason}: {len(captions):,} ({join_first(captions)})"] if captions else []


def check_data(
    train: ReadResult | Sequence[Pair],
    evaluation: ReadResult | Sequence[Pair] = (),
    *,
    hashes: ImageHashes | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Open every picture, and count what is there, what is missing and what is there twice.

    Args:
        train: the data set, preferably as `read_data` returns it, with what was left out.
        evaluation: the part to evaluate on, which is compared with the first.
        hashes: of the pictures of both, if they are known.
        progress: called after each picture with (done, total).
    """
    known = train if isinstance(train, ReadResult) else ReadResult([], "", {})
    train, evaluation = (part.pairs if isinstance(part, ReadResult) else part for part in (train, evaluation))
    if hashes is None:
        hashes = hash_images((pair.image for pair in (*train, *evaluation)), progress=progress)
    counts = [len(pair.captions) for pair in train]
    repeated = _repeated(train, hashes)
    return DataReport(
        num_images=len(train),
        num_captions=sum(counts),
        captions_per_image=(min(counts, default=0), float(median(counts or [0])), max(counts, default=0)),
        left_out=dict(known.left_out),
        repaired=dict(known.repaired),
        unread=dict(known.unread),
        unreadable=_unreadable(train, hashes),
        without_captions=tuple(pair.image for pair in train if not pair.captions),
        same_content=tuple(tuple(group) for group in _by_content(train, hashes).values() if len(group) > 1),
        near_duplicates=tuple(near_duplicates({pair.image: hashes[pair.image] for pair in train})),
        num_repeated=len(repeated),
        most_repeated=tuple(repeated[:NUM_LISTED]),
        overlap=_overlap(train, evaluation, hashes) if evaluation else None,
    )


def _by_content(pairs: Sequence[Pair], hashes: ImageHashes) -> dict[str, list[str]]:
    """Group the pictures that can be opened by their content."""
    groups: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for pair in pairs:
        if found := hashes[pair.image]:
            groups[found.content][pair.image] = None
    return {content: list(images) for content, images in groups.items()}


def _unreadable(pairs: Sequence[Pair], hashes: ImageHashes) -> tuple[str, ...]:
    return tuple(pair.image for pair in pairs if hashes[pair.image] is None)


def _folded(caption: str) -> str:
    return caption.casefold().rstrip(" .")


def _repeated(pairs: Sequence[Pair], hashes: ImageHashes) -> list[tuple[str, int]]:
    """Count the pictures of each caption that has several, most frequent first."""
    spelling = {_folded(caption): caption for pair in reversed(pairs) for caption in reversed(pair.captions)}
    uses = {
        (_folded(caption), found.content if (found := hashes[pair.image]) else pair.image)
        for pair in pairs
        for caption in pair.captions
    }
    times = Counter(caption for caption, _ in uses)
    repeated = ((spelling[caption], count) for caption, count in times.items() if count > 1)
    return sorted(repeated, key=lambda item: (-item[1], item[0]))


def _overlap(train: Sequence[Pair], evaluation: Sequence[Pair], hashes: ImageHashes) -> Overlap:
    """Compare content with content, so that a picture that is there under several names is found by each."""
    ours, theirs = _by_content(train, hashes), _by_content(evaluation, hashes)
    alike = near_duplicate_contents({pair.image: hashes[pair.image] for pair in (*train, *evaluation)})
    crossing = [(a, b) for pair in alike for a, b in (pair, pair[::-1]) if a in ours and b in theirs]
    known = {_folded(caption) for pair in train for caption in pair.captions}
    common = {_folded(c): c for pair in evaluation for c in pair.captions if _folded(c) in known}
    return Overlap(
        num_images=len(evaluation),
        unreadable=_unreadable(evaluation, hashes),
        same_content=tuple((ours[content][0], theirs[content][0]) for content in ours if content in theirs),
        near_duplicates=tuple((ours[a][0], theirs[b][0]) for a, b in crossing),
        num_captions=len(common),
        captions=tuple(sorted(common.values())[:NUM_LISTED]),
    )


# ---------------------------------------------------------------- the summary


def _finding(what: str, examples: Sequence[str], number: int | None = None) -> list[str]:
    """Write a line about a finding; none if there is nothing."""
    number = len(examples) if number is None else number
    shown = ", ".join(sanitize_text(example, 200) for example in examples[:_NUM_EXAMPLES])
    return [f"- {what}: {number:,} ({shown}{', ...' if number > _NUM_EXAMPLES else ''})"] if number else []


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _names(paths: Iterable[str]) -> list[str]:
    return [os.path.basename(path) for path in paths]


def _joined(groups: Sequence[Sequence[str]], sign: str) -> list[str]:
    return [sign.join(_names(group[:_NUM_EXAMPLES])) for group in groups]
