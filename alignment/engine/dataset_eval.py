"""Evaluate a visitor's data set: recall in both directions, the worst queries, suspected wrong labels.

Place in the flow: `zip -> open_archive -> temporary folder (here) -> data -> embeddings -> evaluate`. The annotations
are untrusted: a picture counts only if it lies in the folder, and no error says whether a file outside exists.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from alignment.checksum import sha256_of
from alignment.data import AmbiguousImageNames, EmptyDataset, ImageHash, Pair, merge_duplicates, read_data
from alignment.data.tables import CLASSES_ONLY
from alignment.engine.core import AlignmentEngine, as_webp
from alignment.engine.safe_zip import MAX_PICTURE_MB, SafeZip, open_archive
from alignment.evaluate import KS, Embedded, Estimate, evaluate_embedded, suspected_false_negatives, worst_queries
from alignment.evaluate.error_analysis import Example, FalseNegative
from alignment.evaluate.retrieval import RetrievalReport
from alignment.gallery import Gallery
from alignment.model import chunk_size
from alignment.preprocess import InputError, open_image, sanitize_text

MIN_PICTURES, MAX_TRIAL_PICTURES, MAX_TRIAL_CAPTIONS = 2, 500, 5000

MAX_LINES = 60_000  # of the annotations; all of Flickr8k's are 40,460
MAX_TABLE_MB, MAX_FOLDERS = 10, 50
MAX_NAME = 150  # characters shown of a name from the annotations
SHOWN = 5  # worst queries of each direction, and suspected labels
THUMBNAIL_PIXELS = 200
RESAMPLES = 1000

_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson", ".token", ".caption")
_PICTURES_AT_ONCE, _CAPTIONS_AT_ONCE = 8, 128
_CAPTION_COST = 0.1  # of a picture's; far less for the compact model, somewhat more for others

_MESSAGES = {
    "trial.ambiguous": "{name} may mean several pictures in the zip file; write the folder before the names.",
    "trial.captions": "The zip file holds {count} captions, and the limit is {limit}; put fewer into it.",
    "trial.classes": "The file {name} holds classes, not captions; to take them as captions, call the column caption.",
    "trial.few": "Fewer than two pictures in the zip file have a caption; compare its captions file with the example.",
    "trial.folders": "The zip file holds more than {limit} folders; put the pictures into one.",
    "trial.lines": "The captions file has more than {limit} lines; keep only those of the pictures in the zip.",
    "trial.missing": "The captions file names {name}, which is not in the zip file; compare the file names.",
    "trial.pictures": "The zip file holds {count} captioned pictures, and the limit is {limit}; put fewer into it.",
    "trial.unread": "The file {name} cannot be read as captions; save it as CSV in UTF-8, with the columns image and "
    "caption.",
    "trial.unreadable": "The captions file cannot be read as any of the forms listed; compare it with the example.",
}
_CAUSES = {"unread": "trial.unread", CLASSES_ONLY: "trial.classes", "missing pictures": "trial.missing"}

LeftOut = defaultdict[str, list[str]]


@dataclass(frozen=True)
class Progress:
    """A step of `measure_archive`; `share` is that of all the work, in [0, 1], roughly."""

    what: str  # "unpacking", "pictures" or "captions"
    done: int
    total: int
    share: float = 0.0


@dataclass(frozen=True)
class SuspectedLabel(FalseNegative):
    """A suspected false negative, and `owner`, the picture that the rival caption belongs to."""

    owner: str


@dataclass(frozen=True)
class EvalResult(RetrievalReport[Estimate]):
    """A report with examples; pictures go by their names in the archive."""

    chance: Mapping[str, float]  # the metrics of a random ranking
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)  # reason -> names
    worst: Sequence[Example] = ()
    suspects: Sequence[SuspectedLabel] = ()
    thumbnails: Mapping[str, bytes] = field(default_factory=dict)  # name -> WebP, of `worst` and `suspects`


def _measure(
    embedded: Embedded, thumbnail: Callable[[str], bytes], left_out: Mapping[str, Sequence[str]]
) -> EvalResult:
    report = evaluate_embedded(embedded, resamples=RESAMPLES)
    worst, suspects = worst_queries(embedded, SHOWN), _suspects(embedded)
    names = [name for suspect in suspects for name in (suspect.image, suspect.owner)]
    for example in worst:
        names += [example.query] if example.direction == "image_to_text" else [example.answer, *example.tops]
    chance = random_baseline(embedded.image_of_text.bincount().tolist())
    thumbnails = {name: thumbnail(name) for name in dict.fromkeys(names)}
    size, metrics = (report.num_images, report.num_texts), report.metrics
    return EvalResult(*size, metrics, chance, left_out, worst, suspects, thumbnails)


def random_baseline(captions: Sequence[int]) -> dict[str, float]:
    """Compute the metrics of a random ranking, by their names, from the number of captions of each image."""
    images, texts = len(captions), sum(captions)
    # Share of queries whose best answer is among the first p of a shuffled list, for p = 1, 2, ...
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
    return [
        SuspectedLabel(**vars(found), owner=next(name for name in owners[found.rival] if name != found.image))
        for found in suspected_false_negatives(embedded, SHOWN)
    ]


def gallery_trial(gallery: Gallery, lang: str) -> EvalResult | None:
    """Evaluate a gallery on its captions in a language, or on all; None with fewer than two captioned pictures."""
    pictures, captions = gallery.pictures[:MAX_TRIAL_PICTURES], list(gallery.captions)
    any_language = all(caption.lang != lang for caption in captions)
    own: dict[str, list[int]] = {picture.id: [] for picture in pictures}
    for row, caption in enumerate(captions):
        if caption.scene in own and (any_language or caption.lang == lang):
            own[caption.scene].append(row)
    chosen = [row for row, picture in enumerate(pictures) if own[picture.id]]
    if len(chosen) < MIN_PICTURES:
        return None
    names = [pictures[row].id for row in chosen]
    texts = [row for name in names for row in own[name]]
    owners = torch.repeat_interleave(torch.tensor([len(own[name]) for name in names]))
    image_embeds, text_embeds = gallery.images[torch.tensor(chosen)], gallery.texts[torch.tensor(texts)]
    embedded = Embedded(names, [captions[row].text for row in texts], owners, image_embeds, text_embeds)
    return _measure(embedded, lambda name: b"", {})


def measure_archive(engine: AlignmentEngine, path: Path) -> Generator[Progress | EvalResult, None, None]:
    """Unpack a data set, evaluate it and delete it; yields progress, and at last the report.

    Raises InputError when it cannot be read, or holds too little or too much.
    """
    with tempfile.TemporaryDirectory(prefix="trial-") as name:
        root, left_out = Path(name).resolve(), LeftOut(list)
        with open_archive(path) as archive:
            yield from _unpack(archive, root, left_out)
        while len(inside := list(root.iterdir())) == 1 and inside[0].is_dir():
            root = inside[0]
        pairs = _read(root, left_out)
        yield from _measure_pairs(engine, root, pairs, left_out)


def _unpack(archive: SafeZip, folder: Path, left_out: LeftOut) -> Iterator[Progress]:
    """Write pictures and tables into a folder, and nothing else."""
    for reason, names in archive.left_out.items():
        left_out[reason] += names
    if len({parent for name in archive.members for parent in Path(name).parents}) > MAX_FOLDERS:
        raise _error("trial.folders", limit=MAX_FOLDERS)
    pictures, lines = set(archive.pictures()), 0
    for done, name in enumerate(archive.members):
        if done % 20 == 0:
            yield Progress("unpacking", done, len(archive.members))
        if name not in pictures and not name.lower().endswith(_TABLES):
            left_out["kind"].append(name)
            continue
        try:
            data = archive.read(name, MAX_PICTURE_MB if name in pictures else MAX_TABLE_MB)
            lines += 0 if name in pictures else data.count(b"\n")
            if lines > MAX_LINES:
                raise _error("trial.lines", limit=f"{MAX_LINES:,}")
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with (folder / name).open("xb") as file:
                file.write(data)
        except OSError:  # a file where another name needs a folder
            left_out["name"].append(name)
        except InputError as error:
            if name not in pictures:
                raise
            left_out[error.code].append(name)


def _read(root: Path, left_out: LeftOut) -> list[Pair]:
    """Read the captioned pictures, each content once: a copy would count as wrong for the other's captions."""
    try:
        reading = read_data(root, trusted=False)
    except AmbiguousImageNames as error:
        raise _error("trial.ambiguous", name=sanitize_text(error.names[0], MAX_NAME)) from error
    except (ValueError, OSError, RecursionError, MemoryError, ArithmeticError, LookupError) as error:
        if isinstance(error, EmptyDataset):
            _check_causes(error.left_out)
        raise _error("trial.unreadable") from error
    if not all(Path(os.path.realpath(pair.image)).is_relative_to(root) for pair in reading.pairs):
        raise AssertionError("a picture outside the unpacked folder")  # the reader refuses them already
    for reason, what in (*reading.left_out.items(), *reading.repaired.items(), ("unread", reading.unread)):
        left_out[reason] += what
    captioned = [pair for pair in reading.pairs if pair.captions]
    if len(captioned) < MIN_PICTURES:
        _check_causes(left_out)
    merged = merge_duplicates(captioned, {pair.image: ImageHash(sha256_of(Path(pair.image)), 0) for pair in captioned})
    kept = {pair.image for pair in merged}
    left_out["uncaptioned"] += [_name(pair.image, root) for pair in reading.pairs if not pair.captions]
    left_out["doubles"] += [_name(pair.image, root) for pair in captioned if pair.image not in kept]
    return merged


def _check_causes(left_out: Mapping[str, Sequence[str]]) -> None:
    """Raise an error that says why hardly any picture has a caption, if that is known."""
    for reason, code in _CAUSES.items():
        for name in left_out.get(reason, ()):
            raise _error(code, name=sanitize_text(name, MAX_NAME))


def _name(path: str, root: Path) -> str:
    return Path(path).relative_to(root).as_posix()


def _measure_pairs(
    engine: AlignmentEngine, root: Path, pairs: list[Pair], left_out: LeftOut
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
        image_embeds.append(engine.embed_images(opened))
    texts = [caption for pair in read for caption in pair.captions]
    for start in range(0, len(texts), _CAPTIONS_AT_ONCE):
        yield Progress("captions", start, len(texts), (len(pairs) + _CAPTION_COST * start) / work)
        text_embeds.append(engine.embed_captions(texts[start : start + _CAPTIONS_AT_ONCE]))
    _check_size(len(read), len(texts))
    left_out["cut"] += engine.encoder.preprocessor.truncated(texts)
    names = [_name(pair.image, root) for pair in read]
    owners = torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in read]))
    embedded = Embedded(names, texts, owners, torch.cat(image_embeds), torch.cat(text_embeds))
    shown = {reason: [sanitize_text(name, MAX_NAME) for name in names] for reason, names in left_out.items() if names}
    yield _measure(embedded, lambda name: as_webp(open_image(root / name), THUMBNAIL_PIXELS), shown)


def _check_size(pictures: int, captions: int) -> None:
    if pictures < MIN_PICTURES:
        raise _error("trial.few")
    if pictures > MAX_TRIAL_PICTURES:
        raise _error("trial.pictures", count=f"{pictures:,}", limit=MAX_TRIAL_PICTURES)
    if captions > MAX_TRIAL_CAPTIONS:
        raise _error("trial.captions", count=f"{captions:,}", limit=f"{MAX_TRIAL_CAPTIONS:,}")


def _error(code: str, **values: object) -> InputError:
    return InputError(_MESSAGES[code], code, **values)
