"""What a data set holds and what is wrong with it, counted: the report behind `--check`."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

from alignment.data.collector import Pair
from alignment.data.deduplicate import ImageHash, alike_contents, hash_images, near_duplicates
from alignment.data.reader import ReadResult
from alignment.data.unsupported import told_unread
from alignment.preprocess import join_first, sanitize_text

MOST_FREQUENT = 10  # captions to list
_EXAMPLES = 3  # of each finding, in the summary


@dataclass(frozen=True)
class Overlap:
    """What the evaluation part has in common with the training part.

    Attributes:
        num_images: pictures of the evaluation part.
        unreadable: those of them that cannot be opened.
        same_content: (training picture, evaluation picture) with the same bytes, one pair a content.
        look_alikes: (training picture, evaluation picture), one photograph saved in two ways.
        num_captions: different captions that both parts have.
        captions: some of them.
    """

    num_images: int
    unreadable: tuple[str, ...]
    same_content: tuple[tuple[str, str], ...]
    look_alikes: tuple[tuple[str, str], ...]
    num_captions: int
    captions: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """What a data set holds and what is wrong with it; `dataclasses.asdict` makes it JSON.

    Attributes:
        num_images: pictures, those without use included.
        num_captions: captions of all of them.
        captions_per_image: fewest, median, most.
        left_out: reason -> what was left out for it while reading.
        repaired: what was read although something is wrong with it -> where.
        unread: files of captions of which nothing could be read -> why.
        unreadable: pictures that cannot be opened.
        without_captions: pictures nobody described.
        same_content: groups of pictures with the same bytes.
        look_alikes: pairs that are one photograph saved in two ways.
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
    look_alikes: tuple[tuple[str, str], ...]
    num_repeated: int
    most_repeated: tuple[tuple[str, int], ...]
    overlap: Overlap | None

    def summary(self) -> str:
        """Say it in a few lines, with at most three examples of each finding."""
        fewest, middle, most = self.captions_per_image
        spread = f"{fewest}" if fewest == most else f"{fewest} to {most}, half of them up to {middle:g},"
        lines = [f"{_number(self.num_images, 'picture')} with {_number(self.num_captions, 'caption')}: {spread} each."]
        findings = [
            ("pictures that cannot be opened", _names(self.unreadable)),
            ("pictures without a caption", _names(self.without_captions)),
            ("same file under several names", [" = ".join(_few(_names(g))) for g in self.same_content]),
            ("pairs that look the same", [" ~ ".join(_names(pair)) for pair in self.look_alikes]),
        ]
        lines += [f"- {line}" for line in describe_issues(self)]
        lines += [_finding(what, examples) for what, examples in findings if examples]
        if self.num_repeated:
            examples = [f"{caption!r} on {times}" for caption, times in self.most_repeated]
            lines.append(_finding("captions that belong to several pictures", examples, self.num_repeated))
        if len(lines) == 1:
            lines.append("Nothing is missing, unreadable or there twice.")
        return "\n".join(lines + (_overlap_lines(self.overlap) if self.overlap else []))


class Told(Protocol):
    """What is known of a reading: a `ReadResult`, or a report that took it over."""

    @property
    def left_out(self) -> Mapping[str, Sequence[str]]:
        """Reason -> what was left out."""

    @property
    def repaired(self) -> Mapping[str, Sequence[str]]:
        """What was read although something is wrong with it."""

    @property
    def unread(self) -> Mapping[str, str]:
        """File -> why nothing of it could be read."""


def describe_issues(reading: Told) -> list[str]:
    """Say in lines what reading left out, what it read all the same, and which files of captions it could not read."""
    lines = [f"left out, {reason}: {len(what):,} ({join_first(what)})" for reason, what in reading.left_out.items()]
    lines += [
        f"read all the same, {reason}: {len(what):,} ({join_first(what)})" for reason, what in reading.repaired.items()
    ]
    return lines + [f"not read, {line}" for line in told_unread(reading.unread)]


def describe_truncated(captions: Sequence[str], max_length: int) -> list[str]:
    """Say which captions are longer than a model reads."""
    if not captions:
        return []
    reason = f"captions of which the model reads only the first {max_length} tokens"
    return [f"{reason}: {len(captions):,} ({join_first(captions)})"]


def check_data(
    train: ReadResult | Sequence[Pair],
    evaluation: ReadResult | Sequence[Pair] = (),
    *,
    prints: Mapping[str, ImageHash | None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DataReport:
    """Open every picture and count what is there, what is missing and what is there twice.

    Args:
        train: the data set, best as `read_data` gives it, which knows what was left out.
        evaluation: the part to measure on, to be compared with the first.
        prints: of the pictures of both, if they have been taken; else they are taken here.
        progress: called after each picture with (done, total).
    """
    known = train if isinstance(train, ReadResult) else ReadResult([], "", {})
    train, evaluation = (part.pairs if isinstance(part, ReadResult) else part for part in (train, evaluation))
    if prints is None:
        prints = hash_images((pair.image for pair in (*train, *evaluation)), progress=progress)
    numbers = [len(pair.captions) for pair in train]
    groups = _by_content(train, prints)
    repeated = _repeated(train, prints)
    return DataReport(
        num_images=len(train),
        num_captions=sum(numbers),
        captions_per_image=(min(numbers, default=0), float(median(numbers or [0])), max(numbers, default=0)),
        left_out=dict(known.left_out),
        repaired=dict(known.repaired),
        unread=dict(known.unread),
        unreadable=_unreadable(train, prints),
        without_captions=tuple(pair.image for pair in train if not pair.captions),
        same_content=tuple(tuple(group) for group in groups.values() if len(group) > 1),
        look_alikes=tuple(near_duplicates({pair.image: prints[pair.image] for pair in train})),
        num_repeated=len(repeated),
        most_repeated=tuple(repeated[:MOST_FREQUENT]),
        overlap=_overlap(train, evaluation, prints) if evaluation else None,
    )


def _by_content(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> dict[str, list[str]]:
    """Group the pictures that can be opened by their content."""
    groups: defaultdict[str, dict[str, None]] = defaultdict(dict)
    for pair in pairs:
        if found := prints[pair.image]:
            groups[found.content][pair.image] = None
    return {content: list(images) for content, images in groups.items()}


def _unreadable(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> tuple[str, ...]:
    return tuple(pair.image for pair in pairs if prints[pair.image] is None)


def _said(caption: str) -> str:
    return caption.casefold().rstrip(" .")


def _repeated(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> list[tuple[str, int]]:
    """Count the pictures of each caption that has several, most frequent first."""
    spelling = {_said(caption): caption for pair in reversed(pairs) for caption in reversed(pair.captions)}
    uses = {
        (_said(caption), found.content if (found := prints[pair.image]) else pair.image)
        for pair in pairs
        for caption in pair.captions
    }
    times = Counter(said for said, _ in uses)
    return sorted(((spelling[said], n) for said, n in times.items() if n > 1), key=lambda item: (-item[1], item[0]))


def _overlap(train: Sequence[Pair], evaluation: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> Overlap:
    """Compare content with content, so that a picture that is there under several names is found by each."""
    ours, theirs = _by_content(train, prints), _by_content(evaluation, prints)
    alike = alike_contents({pair.image: prints[pair.image] for pair in (*train, *evaluation)})
    crossing = [(a, b) for one, other in alike for a, b in ((one, other), (other, one)) if a in ours and b in theirs]
    known = {_said(caption) for pair in train for caption in pair.captions}
    common = {_said(c): c for pair in evaluation for c in pair.captions if _said(c) in known}
    return Overlap(
        num_images=len(evaluation),
        unreadable=_unreadable(evaluation, prints),
        same_content=tuple((ours[content][0], theirs[content][0]) for content in ours if content in theirs),
        look_alikes=tuple((ours[a][0], theirs[b][0]) for a, b in crossing),
        num_captions=len(common),
        captions=tuple(sorted(common.values())[:MOST_FREQUENT]),
    )


# ---------------------------------------------------------------- the summary


def _overlap_lines(overlap: Overlap) -> list[str]:
    title = f"Evaluated on {_number(overlap.num_images, 'picture')}"
    findings = [
        ("pictures that cannot be opened", _names(overlap.unreadable)),
        ("pictures that are in the training part too", [_both(pair) for pair in overlap.same_content]),
        ("pictures that look the same as one in the training part", [_both(pair, "~") for pair in overlap.look_alikes]),
    ]
    lines = [_finding(what, examples) for what, examples in findings if examples]
    if overlap.num_captions:
        quoted = [repr(caption) for caption in overlap.captions]
        lines.append(_finding("captions that the training part has too", quoted, overlap.num_captions))
    return [f"{title}:", *lines] if lines else [f"{title}, none of them in the training part."]


def _both(pair: tuple[str, str], sign: str = "=") -> str:
    return f" {sign} ".join(_names(pair))


def _finding(what: str, examples: Sequence[str], number: int | None = None) -> str:
    number = len(examples) if number is None else number
    shown = ", ".join(sanitize_text(example, 200) for example in _few(examples))
    return f"- {what}: {number:,} ({shown}{', ...' if number > _EXAMPLES else ''})"


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _few(items: Sequence[str]) -> Sequence[str]:
    return items[:_EXAMPLES]


def _names(paths: Iterable[str]) -> list[str]:
    return [os.path.basename(path) for path in paths]
