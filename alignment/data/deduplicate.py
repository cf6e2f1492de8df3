"""Find pictures that are the same: equal bytes under two names, or one photograph saved in two ways.

Place in the flow: `read_data -> hash_images (once) -> summarize_data, merge_duplicates, drop_leaked, near_duplicates`.
Captions of a picture must never count as wrong for its duplicate, and no picture may be both trained and evaluated on.
"""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignment.checksum import sha256_of
from alignment.data.collector import Pair, describe_issues
from alignment.data.reader import ReadResult
from alignment.prefetch import prefetch_map
from alignment.preprocess import InputError, message_with_option, open_image, sanitize_text

logger = logging.getLogger(__name__)

_NUM_EXAMPLES = 3  # of each finding

# Bits of 64 in which near-duplicates may differ. Of Flickr8k's 25 million pairs of pictures only one photograph that is
# there twice is within 3; the thirteen pairs at 4 to 6 have nothing in common. Of its pictures saved again, 98 % stay
# within 3 as a poor JPEG, 96 % at half the size, all in grey, 46 % cropped by 2 % a side and hardly one by 5 %.
MAX_HAMMING_DISTANCE = 3
# A picture is compared only if half of its 64 differences are of 2 grey levels at least: black frames, skies and plain
# drawings on white are alike without being the same. Of Flickr8k that leaves out 0.2 %.
MIN_TEXTURE = 32
MIN_STEP = 2
MAX_NEAR_DUPLICATES = 1_000_000  # pairs; the frames of a film would otherwise fill the memory


class ImageHash(NamedTuple):
    """The hashes of a picture."""

    content: str  # sha256 of the file's bytes
    difference: int  # 64-bit difference hash of the upright picture; 0 if it has too little texture to be compared


ImageHashes = Mapping[str, ImageHash | None]
"""Path -> hashes of each picture, as `hash_images` returns them; None if it cannot be opened."""


def hash_images(images: Iterable[str], *, progress: Callable[[int, int], None] | None = None) -> ImageHashes:
    """Open and hash each picture once, in the order given; log those that fail, and tell `progress` (done, total)."""
    paths, problems = list(dict.fromkeys(images)), list[str]()
    hashes: dict[str, ImageHash | None] = {}
    with closing(prefetch_map(_hash_image, paths)) as results:
        for path, result in zip(paths, results, strict=True):
            hashes[path] = result if isinstance(result, ImageHash) else None
            if isinstance(result, str):
                problems.append(result)
            if progress:
                progress(len(hashes), len(paths))
    if problems:
        listed = " ".join(problems[:3]) + (", ..." if len(problems) > 3 else "")
        logger.warning("Pictures that cannot be opened: %d, %s", len(problems), listed)
    return hashes


def _hash_image(path: str) -> ImageHash | str:
    """Hash one picture, or say why it cannot be opened."""
    try:
        difference = _difference_hash(open_image(path))
        return ImageHash(sha256_of(Path(path)), difference)
    except (InputError, OSError) as error:
        reason = message_with_option(error) if isinstance(error, InputError) else str(error)
        return f"{sanitize_text(os.path.basename(path))} ({reason})"


def _difference_hash(image: Image.Image) -> int:
    """Hash a picture by where, on a grid of 9 x 8, it gets brighter to the right.

    Source: the difference hash (dHash) of Neal Krawetz.
    """
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX), dtype=np.int16)
    steps = np.diff(grey, axis=1)
    if (np.abs(steps) >= MIN_STEP).sum() < MIN_TEXTURE:
        return 0
    return int.from_bytes(np.packbits(steps > 0).tobytes(), "big")


def near_duplicates(hashes: ImageHashes) -> list[tuple[str, str]]:
    """Find the pairs of pictures that are one photograph saved in two ways, at most `MAX_NEAR_DUPLICATES`.

    Of pictures with the same content only the first is compared, which is the one `merge_duplicates` keeps.
    """
    first: dict[str, tuple[str, int]] = {}
    for image, found in hashes.items():
        if found:
            first.setdefault(found.content, (image, found.difference))
    images = [image for image, _ in first.values()]
    differences = np.array([difference for _, difference in first.values()], dtype=np.uint64)
    return [(images[one], images[other]) for one, other in close_hashes(differences).tolist()]


def close_hashes(hashes: NDArray[np.uint64], limit: int = MAX_NEAR_DUPLICATES) -> NDArray[np.int64]:
    """Find the pairs within `MAX_HAMMING_DISTANCE` bits, without comparing all with all; hashes of 0 are ignored.

    Of four parts of 16 bits at least one is equal in such a pair, so only hashes with an equal part are compared.
    Returned are (num_pairs, 2) positions, at most `limit` pairs, the smaller first, in ascending order.
    """
    compared = np.flatnonzero(hashes)
    parts = hashes[compared].view(np.uint16).reshape(len(compared), MAX_HAMMING_DISTANCE + 1)
    found = np.concatenate([_close_in_part(hashes[compared], part, limit) for part in parts.T])
    pairs = np.unique(np.sort(compared[found], axis=1), axis=0)
    if len(pairs) >= limit:
        logger.warning("More than %d pairs of pictures look alike, as in films; the others are not listed.", limit)
    return pairs[:limit]


def _close_in_part(hashes: NDArray[np.uint64], part: NDArray[np.uint16], limit: int) -> NDArray[np.int64]:
    """Compare each hash, in the order of one part, with the following ones as long as that part is equal."""
    order = np.argsort(part, kind="stable")
    hashes, part = hashes[order], part[order]
    found = [np.empty((0, 2), dtype=np.int64)]
    at, step, num_found = np.arange(len(part)), 0, 0
    while at.size and num_found < limit:
        step += 1
        at = at[at + step < len(part)]
        at = at[part[at] == part[at + step]]
        close = at[np.bitwise_count(hashes[at] ^ hashes[at + step]) <= MAX_HAMMING_DISTANCE]
        found.append(np.stack([close, close + step], axis=1))
        num_found += len(close)
    return order[np.concatenate(found)]


def merge_duplicates(pairs: Sequence[Pair], hashes: ImageHashes) -> list[Pair]:
    """Merge the captions of equal pictures; drop pictures that have no caption or cannot be opened."""
    merged: dict[str, Pair] = {}
    for pair in pairs:
        if (found := hashes[pair.image]) and pair.captions:
            first = merged.get(found.content, replace(pair, captions=()))
            merged[found.content] = replace(first, captions=tuple(dict.fromkeys(first.captions + pair.captions)))
    return list(merged.values())


def drop_leaked(train: Sequence[Pair], evaluation: Sequence[Pair], hashes: ImageHashes) -> list[Pair]:
    """Drop the training pictures whose content is evaluated on as well; `hashes` are of the pictures of both parts."""
    evaluated = {found.content for pair in evaluation if (found := hashes[pair.image])}
    return [pair for pair in train if not ((found := hashes[pair.image]) and found.content in evaluated)]


def summarize_data(train: ReadResult, evaluation: Sequence[Pair], hashes: ImageHashes) -> str:
    """Count what is in a data set, missing or there twice, and what the evaluation part has in common with it.

    Write a few lines, with at most three examples of each finding; `hashes` are of the pictures of both parts.
    """
    pairs, counts = train.pairs, [len(pair.captions) for pair in train.pairs]
    fewest, most = min(counts, default=0), max(counts, default=0)
    spread = f"{fewest}" if fewest == most else f"{fewest} to {most}, half of them up to {median(counts):g},"
    duplicates = [images for images in _by_content(pairs, hashes).values() if len(images) > 1]
    alike = near_duplicates({pair.image: hashes[pair.image] for pair in pairs})
    lines = [
        *(f"- {line}" for line in describe_issues(train)),
        *_finding("pictures that cannot be opened", _unreadable(pairs, hashes)),
        *_finding("pictures without a caption", _names((pair.image,) for pair in pairs if not pair.captions)),
        *_finding("same file under several names", _names(duplicates, " = ")),
        *_finding("pairs that look the same", _names(alike, " ~ ")),
        *_finding("captions that belong to several pictures", _repeated(pairs, hashes)),
    ] or ["Nothing is missing, unreadable or there twice."]
    title = f"{_count(len(pairs), 'picture')} with {_count(sum(counts), 'caption')}: {spread} each."
    return "\n".join([title, *lines, *(_overlap(pairs, evaluation, hashes) if evaluation else [])])


def _overlap(train: Sequence[Pair], evaluation: Sequence[Pair], hashes: ImageHashes) -> list[str]:
    """Compare content with content, so that a picture that is there under several names is found by each."""
    ours, theirs = _by_content(train, hashes), _by_content(evaluation, hashes)
    same = [(images[0], theirs[content][0]) for content, images in ours.items() if content in theirs]
    alike = near_duplicates({found.content: found for pair in (*train, *evaluation) if (found := hashes[pair.image])})
    crossing = [(a, b) for pair in alike for a, b in (pair, pair[::-1]) if a in ours and b in theirs]
    known = {_folded(caption) for pair in train for caption in pair.captions}
    common = {_folded(c): c for pair in evaluation for c in pair.captions if _folded(c) in known}
    looks = _names(((ours[a][0], theirs[b][0]) for a, b in crossing), " ~ ")
    lines = [
        *_finding("pictures that cannot be opened", _unreadable(evaluation, hashes)),
        *_finding("pictures that are in the training part too", _names(same, " = ")),
        *_finding("pictures that look the same as one in the training part", looks),
        *_finding("captions that the training part has too", [repr(caption) for caption in sorted(common.values())]),
    ]
    title = f"Evaluated on {_count(len(evaluation), 'picture')}"
    return [f"{title}:", *lines] if lines else [f"{title}, none of them in the training part."]


def _by_content(pairs: Sequence[Pair], hashes: ImageHashes) -> Mapping[str, list[str]]:
    """Group the pictures that can be opened by their content."""
    groups = defaultdict[str, list[str]](list)
    for image in dict.fromkeys(pair.image for pair in pairs):
        if found := hashes[image]:
            groups[found.content].append(image)
    return groups


def _unreadable(pairs: Sequence[Pair], hashes: ImageHashes) -> list[str]:
    return _names((pair.image,) for pair in pairs if hashes[pair.image] is None)


def _folded(caption: str) -> str:
    return caption.casefold().rstrip(" .")


def _repeated(pairs: Sequence[Pair], hashes: ImageHashes) -> list[str]:
    """List the captions that belong to pictures of different content, most frequent first."""
    spelling = {_folded(caption): caption for pair in reversed(pairs) for caption in reversed(pair.captions)}
    contents = [found.content if (found := hashes[pair.image]) else pair.image for pair in pairs]
    uses = {(_folded(c), content) for pair, content in zip(pairs, contents, strict=True) for c in pair.captions}
    times = Counter(caption for caption, _ in uses)
    repeated = sorted((-count, spelling[caption]) for caption, count in times.items() if count > 1)
    return [f"{caption!r} on {-count}" for count, caption in repeated]


def _finding(what: str, examples: Sequence[str]) -> list[str]:
    """Write a line about a finding; none if there is nothing."""
    shown = ", ".join(sanitize_text(example, 200) for example in examples[:_NUM_EXAMPLES])
    more = ", ..." if len(examples) > _NUM_EXAMPLES else ""
    return [f"- {what}: {len(examples):,} ({shown}{more})"] if examples else []


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _names(groups: Iterable[Sequence[str]], sign: str = "") -> list[str]:
    return [sign.join(map(os.path.basename, group[:_NUM_EXAMPLES])) for group in groups]
