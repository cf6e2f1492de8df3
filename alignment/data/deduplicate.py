"""Which pictures are one: the same bytes under two names, or the same photograph saved anew.

Place in the flow: `read_data -> hash_images (once) -> check_data, merge_duplicates, drop_leaked,
look_alikes`. Captions of one picture must never count as wrong for its double, and no picture may be both learnt from
and measured on.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.data.collector import Pair
from alignment.preprocess import InputError, message_with_option, open_image, sanitize_text

logger = logging.getLogger(__name__)

# Bits of 64 in which two look-alikes may differ. Of Flickr8k's 25 million pairs of pictures only a photograph that is
# there twice lies within 3; the thirteen pairs at 4 to 6 have nothing in common. Of its pictures saved again, 98 % stay
# within 3 as a poor JPEG, 96 % at half the size, all in grey, 46 % cropped by 2 % a side and hardly one by 5 %.
MAX_BITS_APART = 3
# A picture is compared only if half of its 64 differences are real ones, of 2 grey levels at least: black frames, skies
# and plain drawings on white are alike without being the same. It is 0.2 % of Flickr8k.
MIN_TEXTURE = 32
MIN_STEP = 2
MAX_LOOK_ALIKES = 1_000_000  # pairs; the frames of a film would otherwise fill the memory

_THREADS = 8


class ImageHash(NamedTuple):
    """What a picture is recognised by.

    Attributes:
        content: sha256 of the file's bytes.
        look: 64-bit difference hash of the upright picture; 0 if it is too plain to be told from others.
    """

    content: str
    look: int


def hash_images(
    images: Iterable[str], *, progress: Callable[[int, int], None] | None = None
) -> dict[str, ImageHash | None]:
    """Open every picture once and take its prints.

    Args:
        images: paths; one that is named twice is opened once.
        progress: called after each picture with (done, total).

    Returns:
        Path -> its prints, in the order given; None for a picture that cannot be opened, of which the log tells.
    """
    paths = list(dict.fromkeys(images))
    problems: list[str] = []
    prints: dict[str, ImageHash | None] = {}
    # Decoding and hashing both let go of the interpreter's lock, so threads do.
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    try:
        for path, found in zip(paths, pool.map(_print_of, paths), strict=True):
            prints[path] = found if isinstance(found, ImageHash) else None
            if isinstance(found, str):
                problems.append(found)
            if progress:
                progress(len(prints), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupted run does not open the rest first
    if problems:
        more = ", ..." if len(problems) > 3 else ""
        logger.warning("%d pictures cannot be opened: %s%s", len(problems), " ".join(problems[:3]), more)
    return prints


def _print_of(path: str) -> ImageHash | str:
    """Take the prints of one picture, or say why that cannot be done."""
    try:
        look = _look_of(open_image(path))
        with Path(path).open("rb") as file:
            return ImageHash(hashlib.file_digest(file, "sha256").hexdigest(), look)
    except (InputError, OSError) as error:
        reason = message_with_option(error) if isinstance(error, InputError) else str(error)
        return f"{sanitize_text(os.path.basename(path))} ({reason})"


def _look_of(image: Image.Image) -> int:
    """Hash a picture by where, on a grid of 9 x 8, it gets brighter to the right.

    Source: the difference hash (dHash) of Neal Krawetz.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    steps = np.diff(grey, axis=1)
    if (np.abs(steps) >= MIN_STEP).sum() < MIN_TEXTURE:
        return 0
    return int.from_bytes(np.packbits(steps > 0).tobytes(), "big")


# ---------------------------------------------------------------- what looks alike


def near_duplicates(prints: Mapping[str, ImageHash | None]) -> list[tuple[str, str]]:
    """Find the pictures that are one photograph saved in two ways.

    Of pictures with the same content only the first is compared, which is the one `merge_duplicates` keeps.

    Args:
        prints: of all pictures in question, as `hash_images` gives them.

    Returns:
        Pairs in the order of `prints`; at most `MAX_LOOK_ALIKES`.
    """
    firsts: dict[str, str] = {}
    for image, found in prints.items():
        if found:
            firsts.setdefault(found.content, image)
    return [(firsts[one], firsts[other]) for one, other in alike_contents(prints)]


def alike_contents(prints: Mapping[str, ImageHash | None]) -> list[tuple[str, str]]:
    """Find the look-alikes among contents, each content once."""
    looks = {found.content: found.look for found in prints.values() if found}
    names = list(looks)
    hashes = np.fromiter(looks.values(), dtype=np.uint64, count=len(looks))
    return [(names[one], names[other]) for one, other in close_hashes(hashes).tolist()]


def close_hashes(hashes: NDArray[np.uint64], limit: int = MAX_LOOK_ALIKES) -> NDArray[np.int64]:
    """Find the pairs that differ in at most `MAX_BITS_APART` bits, without comparing all with all.

    Of four parts of 16 bits one at least is equal in such a pair, so only neighbours in the order of a part are
    compared.

    Args:
        hashes: (n,); zeros are left out.
        limit: number of pairs at which the search ends, for all four parts alike.

    Returns:
        (num_pairs, 2) positions, the smaller first, in ascending order.
    """
    told = np.flatnonzero(hashes)
    parts = hashes[told].view(np.uint16).reshape(len(told), MAX_BITS_APART + 1)
    found = np.concatenate([_close_in_part(hashes[told], part, limit) for part in parts.T])
    pairs = np.unique(np.sort(told[found], axis=1), axis=0)
    if len(pairs) >= limit:
        logger.warning("More than %d pairs of pictures look alike, as in films; the others are not listed.", limit)
    return pairs[:limit]


def _close_in_part(hashes: NDArray[np.uint64], part: NDArray[np.uint16], limit: int) -> NDArray[np.int64]:
    """Compare each hash with the next, the next but one, ... in the order of one part, as long as that is equal."""
    order = np.argsort(part, kind="stable")
    hashes, part = hashes[order], part[order]
    found = [np.empty((0, 2), dtype=np.int64)]
    at = np.arange(len(part))
    step, num_found = 0, 0
    while at.size and num_found < limit:
        step += 1
        at = at[at + step < len(part)]
        at = at[part[at] == part[at + step]]
        close = at[np.bitwise_count(hashes[at] ^ hashes[at + step]) <= MAX_BITS_APART]
        found.append(np.stack([close, close + step], axis=1))
        num_found += len(close)
    return order[np.concatenate(found)]


# ---------------------------------------------------------------- what the trainer and the report do about it


def merge_duplicates(pairs: Sequence[Pair], prints: Mapping[str, ImageHash | None]) -> list[Pair]:
    """Hold each picture once, with all its captions; drop those that cannot be opened or have no caption.

    Args:
        pairs: of one split: pictures of two are merged like any others.
        prints: of all their pictures, as `hash_images` gives them.

    Returns:
        In the order given; the first of several equal pictures stands for all, and no caption is in it twice.
    """
    merged: dict[str, Pair] = {}
    for pair in pairs:
        if (found := prints[pair.image]) and pair.captions:
            first = merged.get(found.content, replace(pair, captions=()))
            merged[found.content] = replace(first, captions=tuple(dict.fromkeys(first.captions + pair.captions)))
    return list(merged.values())


def drop_leaked(
    train: Sequence[Pair], evaluation: Sequence[Pair], prints: Mapping[str, ImageHash | None]
) -> list[Pair]:
    """Drop the training pictures that are, byte for byte, evaluated on as well.

    Args:
        train: pictures to learn from.
        evaluation: pictures to measure on; they stay as they are.
        prints: of the pictures of both, as `hash_images` gives them.
    """
    measured = {found.content for pair in evaluation if (found := prints[pair.image])}
    return [pair for pair in train if not ((found := prints[pair.image]) and found.content in measured)]
