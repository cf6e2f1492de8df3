"""A visitor's own data set, measured: recall in both directions, the worst queries, labels that look wrong.

Place in the flow: `zip -> open_archive -> folder (here, for as long as it takes) -> pairs -> embeddings -> evaluate`.
The readers of `pairs` trust whoever typed the command; here a stranger wrote the annotations, so a picture counts only
if it lies in the folder, and nobody learns whether a file exists outside of it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from alignment.data import AmbiguousImageNames, EmptyDataset, ImageHash, Pair, ReadResult, merge_duplicates, read_data
from alignment.data.tables import CLASSES_ONLY
from alignment.engine.photos import as_webp
from alignment.engine.safe_zip import SafeZip, open_archive
from alignment.evaluate import (
    KS,
    Embedded,
    Estimate,
    evaluate_embedded,
    suspected_false_negatives,
    worst_queries,
)
from alignment.evaluate.error_analysis import Example
from alignment.gallery import Gallery
from alignment.model import chunk_size
from alignment.preprocess import IMAGE_SUFFIXES, ImageSource, InputError, open_image, sanitize_text

MAX_TRIAL_PICTURES, MAX_TRIAL_CAPTIONS = 500, 5000
FEWEST = 2
MAX_PICTURE_MB, MAX_TABLE_MB = 30, 10
MAX_LINES = 60_000
"""Lines of the annotations; all of Flickr8k's are 40,460."""

MAX_FOLDERS = 50
MAX_NAME = 150
"""Characters shown of a name in somebody's annotations."""

SHOWN = 5
"""Worst queries of each direction, and suspected labels."""

THUMBNAIL_PIXELS = 200
RESAMPLES = 1000

_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".token", ".caption")
_PICTURES_AT_ONCE, _CAPTIONS_AT_ONCE = 8, 128
_CAPTION_COST = 0.1  # of a picture's; far less for the compact model, somewhat more for others


class Embedder(Protocol):
    """What is needed of `AlignmentEngine`."""

    def embed_images(self, images: Sequence[ImageSource]) -> Tensor:
        """Embed pictures, (n, embed_dim)."""

    def embed_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed captions, (n, embed_dim)."""

    def cut_captions(self, captions: Sequence[str]) -> list[str]:
        """List the captions that are longer than the model reads."""


@dataclass(frozen=True)
class Progress:
    """A step of `measure_archive`.

    Attributes:
        what: "unpacking", "pictures" or "captions".
        done: how many of them.
        total: of how many.
        share: of all the work, in [0, 1], roughly.
    """

    what: str
    done: int
    total: int
    share: float = 0.0


@dataclass(frozen=True)
class SuspectedLabel:
    """A caption that fits another picture better than that picture's own, and better than it fits its own.

    Attributes:
        image: the picture.
        caption: the best of its own captions.
        rival: the caption in question.
        owner: the picture that it belongs to.
        margin: see `evaluate.FalseNegative`.
    """

    image: str
    caption: str
    rival: str
    owner: str
    margin: float


@dataclass(frozen=True)
class EvalResult:
    """What came out; pictures go by their names in the archive.

    Attributes:
        num_images: measured on.
        num_texts: captions of these.
        metrics: see `RetrievalReport`.
        chance: the same by drawing lots.
        left_out: reason -> names.
        worst: queries that found their answer last.
        suspects: labels that may be wrong or missing.
        thumbnails: name -> WebP of the pictures among these.
    """

    num_images: int
    num_texts: int
    metrics: Mapping[str, Estimate]
    chance: Mapping[str, float]
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    worst: Sequence[Example] = ()
    suspects: Sequence[SuspectedLabel] = ()
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)


# ---------------------------------------------------------------- from embeddings


def measure(
    embedded: Embedded, picture: Callable[[str], bytes], left_out: Mapping[str, Sequence[str]] | None = None
) -> EvalResult:
    """Measure what is embedded.

    Args:
        embedded: the data set, its images by name.
        picture: shows one of them, as WebP.
        left_out: what was left out before, and why.
    """
    report = evaluate_embedded(embedded, resamples=RESAMPLES)
    worst, suspects = worst_queries(embedded, SHOWN), _suspects(embedded)
    return EvalResult(
        report.num_images,
        report.num_texts,
        report.metrics,
        random_baseline(embedded.image_of_text.bincount().tolist()),
        left_out or {},
        worst,
        suspects,
        {name: picture(name) for name in _named(worst, suspects)},
    )


def random_baseline(captions: Sequence[int]) -> dict[str, float]:
    """Work out what drawing lots would earn, by the names of a `RetrievalReport`.

    Args:
        captions: how many each image has.
    """
    images, texts = len(captions), sum(captions)
    # Partition of queries whose best answer is among the first p of a shuffled list, for p = 1, 2, ...
    found = {"text_to_image": np.arange(1, images + 1) / images, "image_to_text": np.zeros(texts)}
    for count, times in zip(*np.unique(captions, return_counts=True), strict=True):
        places = np.arange(texts)
        missed = np.cumprod(np.clip((texts - count - places) / (texts - places), 0, 1))
        found["image_to_text"] += (1 - missed) * times / images
    level: dict[str, float] = {}
    for direction, share in found.items():
        level |= {f"{direction}_recall@{k}": float(share[min(k, len(share)) - 1]) for k in KS}
        level[f"{direction}_median_rank"] = float(np.searchsorted(share, 0.5 - 1e-9) + 1)
    return level


def _suspects(embedded: Embedded) -> list[SuspectedLabel]:
    owners: defaultdict[str, list[str]] = defaultdict(list)
    for text, owner in zip(embedded.texts, embedded.image_of_text.tolist(), strict=True):
        owners[text].append(embedded.images[owner])
    found = []
    for negative in suspected_false_negatives(embedded, SHOWN):
        owner = next(name for name in owners[negative.rival] if name != negative.image)
        found.append(SuspectedLabel(negative.image, negative.caption, negative.rival, owner, negative.margin))
    return found


def _named(worst: Sequence[Example], suspects: Sequence[SuspectedLabel]) -> list[str]:
    names = [name for suspect in suspects for name in (suspect.image, suspect.owner)]
    for example in worst:
        pictures = (example.query,) if example.direction == "image_to_text" else (example.answer, *example.tops)
        names += pictures
    return list(dict.fromkeys(names))


def gallery_trial(gallery: Gallery, lang: str) -> EvalResult | None:
    """Measure a gallery's own pictures against their captions in a language, or in any if it has none in this one.

    Returns:
        The outcome, its pictures by id and without thumbnails; None where fewer than two pictures have a caption.
    """
    pictures, captions = gallery.pictures[:MAX_TRIAL_PICTURES], list(gallery.captions)
    any_language = all(caption.lang != lang for caption in captions)
    own: dict[str, list[int]] = {picture.id: [] for picture in pictures}
    for row, caption in enumerate(captions):
        if caption.scene in own and (any_language or caption.lang == lang):
            own[caption.scene].append(row)
    chosen = [row for row, picture in enumerate(pictures) if own[picture.id]]
    if len(chosen) < 2:
        return None
    names = [pictures[row].id for row in chosen]
    texts = [row for name in names for row in own[name]]
    owners = torch.repeat_interleave(torch.tensor([len(own[name]) for name in names]))
    image_embeds, text_embeds = gallery.images[torch.tensor(chosen)], gallery.texts[torch.tensor(texts)]
    embedded = Embedded(names, [captions[row].text for row in texts], owners, image_embeds, text_embeds)
    return measure(embedded, lambda name: b"")


# ---------------------------------------------------------------- from a zip


def measure_archive(engine: Embedder, path: Path) -> Generator[Progress | EvalResult, None, None]:
    """Unpack a data set, measure it, and leave nothing of it behind, whatever happens.

    Yields:
        Signs of progress, and at last the outcome.

    Raises:
        InputError: when it cannot be read, holds nothing to measure, or too much.
    """
    with tempfile.TemporaryDirectory(prefix="trial-") as name:
        folder = Path(name).resolve()
        left_out: defaultdict[str, list[str]] = defaultdict(list)
        with open_archive(path) as archive:
            yield from _unpack(archive, folder, left_out)
        root = _data_root(folder)
        pairs = _read(root, left_out)
        yield from _measure_pairs(engine, root, pairs, left_out)


def _unpack(archive: SafeZip, folder: Path, left_out: defaultdict[str, list[str]]) -> Iterator[Progress]:
    """Write pictures and tables into a folder, and nothing else."""
    for reason, names in archive.left_out.items():
        left_out[reason] += names
    _check_counts(archive)
    lines = 0
    for done, name in enumerate(archive.members):
        if done % 20 == 0:
            yield Progress("unpacking", done, len(archive.members))
        kind = _kind(name)
        if not kind:
            left_out["kind"].append(name)
            continue
        try:
            data = archive.read(name, MAX_PICTURE_MB if kind == "picture" else MAX_TABLE_MB)
            if kind == "table" and (lines := lines + data.count(b"\n")) > MAX_LINES:
                message = "The captions file has more than {limit} lines; keep only those of the pictures in the zip."
                raise InputError(message, "trial.lines", limit=f"{MAX_LINES:,}")
            _write(folder / name, data)
        except OSError:  # a file where another name needs a folder
            left_out["name"].append(name)
        except InputError as error:
            if kind == "table":
                raise
            left_out[error.code].append(name)


def _kind(name: str) -> str:
    ending = Path(name).suffix.lower()
    return "picture" if ending in IMAGE_SUFFIXES else "table" if ending in _TABLES else ""


def _check_counts(archive: SafeZip) -> None:
    folders = {str(parent) for name in archive.members for parent in Path(name).parents}
    if len(folders) > MAX_FOLDERS:
        message = "The zip file holds more than {limit} folders; put the pictures into one."
        raise InputError(message, "trial.folders", limit=MAX_FOLDERS)
    if not archive.pictures():
        raise InputError("There is no picture in the zip file.", "zip.no_pictures")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)


def _data_root(folder: Path) -> Path:
    """Go down to where there is more than one folder."""
    while len(inside := list(folder.iterdir())) == 1 and inside[0].is_dir():
        folder = inside[0]
    return folder


def _read(root: Path, left_out: defaultdict[str, list[str]]) -> list[Pair]:
    """Read what is annotated; a name outside the folder comes to nothing, whether there is such a file or not."""
    reading = _reading(root)
    for found in (reading.left_out, reading.repaired):
        for reason, what in found.items():
            left_out[reason] += what
    if sum(bool(pair.captions) for pair in reading.pairs) < FEWEST:
        _check_causes(reading.left_out, reading.unread)
    left_out["unread"] += reading.unread
    pairs = []
    for pair in reading.pairs:
        if not Path(os.path.realpath(pair.image)).is_relative_to(root):  # the reader sees to that; nothing else may
            raise AssertionError("a picture outside the unpacked folder")
        if pair.captions:
            pairs.append(pair)
        else:
            left_out["uncaptioned"].append(_name(pair.image, root))
    return _without_doubles(pairs, root, left_out)


def _check_causes(left_out: Mapping[str, Sequence[str]], unread: Iterable[str] = ()) -> None:
    """Say why hardly any picture has a caption, where that is known."""
    for name in unread:
        message = (
            "The file {name} cannot be read as captions; save it as CSV in UTF-8, with the columns image and caption."
        )
        raise InputError(message, "trial.unread", name=sanitize_text(name, MAX_NAME))
    for name in left_out.get(CLASSES_ONLY, ()):
        message = "The file {name} holds classes, not captions; to take them as captions, call the column caption."
        raise InputError(message, "trial.classes", name=sanitize_text(name, MAX_NAME))
    for name in left_out.get("missing pictures", ()):
        message = "The captions file names {name}, which is not in the zip file; compare the file names."
        raise InputError(message, "trial.missing", name=sanitize_text(name, MAX_NAME))


def _reading(root: Path) -> ReadResult:
    try:
        return read_data(root, trusted=False)
    except AmbiguousImageNames as error:
        message = "{name} may mean several pictures in the zip file; write the folder before the names."
        raise InputError(message, "trial.ambiguous", name=sanitize_text(error.names[0], MAX_NAME)) from error
    except (ValueError, OSError, RecursionError, MemoryError, ArithmeticError, LookupError) as error:
        if isinstance(error, EmptyDataset):
            _check_causes(error.left_out)
        message = "The captions file cannot be read as any of the forms listed; compare it with the example."
        raise InputError(message, "trial.unreadable") from error


def _without_doubles(pairs: list[Pair], root: Path, left_out: defaultdict[str, list[str]]) -> list[Pair]:
    """Merge pictures that are the same file under two names; else each counts as wrong for the other's captions."""
    prints: dict[str, ImageHash | None] = {}
    for pair in pairs:
        with open(pair.image, "rb") as file:
            prints[pair.image] = ImageHash(hashlib.file_digest(file, "sha256").hexdigest(), 0)
    merged = merge_duplicates(pairs, prints)
    kept = {pair.image for pair in merged}
    left_out["doubles"] += [_name(pair.image, root) for pair in pairs if pair.image not in kept]
    return merged


def _name(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def _measure_pairs(
    engine: Embedder, root: Path, pairs: list[Pair], left_out: defaultdict[str, list[str]]
) -> Iterator[Progress | EvalResult]:
    num_captions = sum(len(pair.captions) for pair in pairs)
    _check_size(len(pairs), num_captions)
    work = len(pairs) + _CAPTION_COST * num_captions
    read: list[Pair] = []
    image_embeds, text_embeds = [], []
    step = chunk_size(_PICTURES_AT_ONCE)
    for start in range(0, len(pairs), step):
        yield Progress("pictures", start, len(pairs), start / work)
        opened: list[Image.Image] = []
        for pair in pairs[start : start + step]:
            try:
                opened.append(open_image(pair.image))
                read.append(pair)
            except InputError as error:
                left_out[error.code].append(_name(pair.image, root))
        if opened:
            image_embeds.append(engine.embed_images(opened))
    texts = [caption for pair in read for caption in pair.captions]
    for start in range(0, len(texts), _CAPTIONS_AT_ONCE):
        yield Progress("captions", start, len(texts), (len(pairs) + _CAPTION_COST * start) / work)
        text_embeds.append(engine.embed_captions(texts[start : start + _CAPTIONS_AT_ONCE]))
    _check_size(len(read), len(texts))
    left_out["cut"] += engine.cut_captions(texts)
    embedded = Embedded(
        [_name(pair.image, root) for pair in read],
        texts,
        torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in read])),
        torch.cat(image_embeds),
        torch.cat(text_embeds),
    )
    shown = {reason: [sanitize_text(name, MAX_NAME) for name in names] for reason, names in left_out.items() if names}
    yield measure(embedded, lambda name: as_webp(open_image(root / name), THUMBNAIL_PIXELS), shown)


def _check_size(pictures: int, captions: int) -> None:
    if pictures < FEWEST:
        message = "Fewer than two pictures in the zip file have a caption; compare its captions file with the example."
        raise InputError(message, "trial.few")
    if pictures > MAX_TRIAL_PICTURES:
        message = "The zip file holds {count} captioned pictures, and the limit is {limit}; put fewer into it."
        raise InputError(message, "trial.pictures", count=f"{pictures:,}", limit=MAX_TRIAL_PICTURES)
    if captions > MAX_TRIAL_CAPTIONS:
        message = "The zip file holds {count} captions, and the limit is {limit}; put fewer into it."
        raise InputError(message, "trial.captions", count=f"{captions:,}", limit=f"{MAX_TRIAL_CAPTIONS:,}")
