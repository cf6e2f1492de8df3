"""Report what a data set contains and what is wrong with it, for `--check` and the summaries of the commands."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from alignment.data.collector import Pair, ReadIssues, describe_unread
from alignment.data.deduplicate import ImageHashes, near_duplicates
from alignment.data.reader import ReadResult
from alignment.preprocess import join_first, sanitize_text

_NUM_EXAMPLES = 3  # of each finding


def describe_issues(issues: ReadIssues) -> list[str]:
    """Write a line for each reason why something was left out or repaired, and for each file that could not be read."""
    kinds = {"left out": issues.left_out, "read all the same": issues.repaired}
    lines = [_reason(f"{kind}, {reason}", what) for kind, found in kinds.items() for reason, what in found.items()]
    return lines + [f"not read, {line}" for line in describe_unread(issues.unread)]


def describe_truncated(captions: Sequence[str], max_length: int) -> list[str]:
    """Write a line about the captions that are longer than a model reads; none if there are none."""
    reason = f"captions of which the model reads only the first {max_length} tokens"
    return [_reason(reason, captions)] if captions else []


def _reason(reason: str, what: Sequence[str]) -> str:
    return f"{reason}: {len(what):,} ({join_first(what)})"


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
