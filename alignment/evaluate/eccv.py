"""COCO with the labels it lacks: ECCV Caption's mAP@R and CxC's recall, through the package `eccv_caption`.

Place in the flow: `COCO's test split, embedded -> evaluate_eccv (here) -> report`. COCO calls only the five captions
of a picture right, and counts it against a model that it finds another that fits as well. ECCV Caption (Chun et al.
2022) and CxC (Parekh et al. 2021) add pairs that people have looked at. The package (extra `coco`) holds their labels
and computes the figures; ours is to rank what it asks for.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.evaluate.embedding import Embedded
from alignment.evaluate.ranks import DIRECTIONS, ROUNDING, scored_blocks
from alignment.pairs import Pair
from alignment.preprocess import InputError, clean_caption

_FILES = ("dataset_coco.json", "captions_val2014.json")
_SIDES = dict(zip(DIRECTIONS, ("i2t", "t2i"), strict=True))  # as the package calls them
_ASKED = ("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1")
_SPLIT = "the 5,000 pictures of Karpathy's COCO test split with five captions each"


@dataclass(frozen=True)
class EccvData:
    """COCO's test split, with the ids by which ECCV Caption knows its captions.

    Attributes:
        pairs: the pictures; their `id` is COCO's.
        caption_ids: COCO's ids of a caption, by the path of its picture and its text.
    """

    pairs: Sequence[Pair]
    caption_ids: Mapping[tuple[str, str], Sequence[int]]


def read_eccv(pairs: Sequence[Pair], source: Path) -> EccvData:
    """Keep the pictures that ECCV Caption knows, and look up the ids of their captions.

    Args:
        pairs: COCO, as `read_pairs` gave it.
        source: where it was read from: `dataset_coco.json`, `captions_val2014.json`, or a folder that holds one.

    Raises:
        ModuleNotFoundError: without the package `eccv_caption`.
        FileNotFoundError: when there is no such annotation file.
        ValueError: when it is not COCO's, or pictures or captions of the test split are missing.
    """
    known = _package().coco_gts["i2t"]
    ids = _caption_ids(_annotations(source))
    kept = [pair for pair in pairs if pair.id.isdecimal() and int(pair.id) in known]
    found = {(pair.image, text): ids.get((int(pair.id), text), []) for pair in kept for text in pair.captions}
    _check_complete(known, {int(pair.id) for pair in kept}, {number for of in found.values() for number in of})
    return EccvData(kept, found)


def evaluate_eccv(embedded: Embedded, data: EccvData) -> dict[str, float]:
    """Measure a model on COCO's test split with the extended labels.

    Args:
        embedded: `data.pairs` by the model.
        data: of `read_eccv`.

    Returns:
        The figures of `eccv_metrics`.

    Raises:
        ValueError: when a picture was left out because it cannot be opened.
    """
    image_ids = {pair.image: int(pair.id) for pair in data.pairs}
    rows = [
        (row, number)
        for row, (text, owner) in enumerate(zip(embedded.texts, embedded.image_of_text.tolist(), strict=True))
        for number in data.caption_ids[embedded.images[owner], text]
    ]
    texts = embedded.text_embeds[[row for row, _ in rows]]
    images = [image_ids[image] for image in embedded.images]
    return eccv_metrics(embedded.image_embeds, texts, images, [number for _, number in rows])


def eccv_metrics(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Sequence[int], caption_ids: Sequence[int]
) -> dict[str, float]:
    """Compute ECCV Caption's, CxC's and COCO's figures from embeddings.

    Cosines within `ROUNDING` of each other are ties, and what is labelled right comes last among them.

    Args:
        image_embeds: (num_images, embed_dim).
        text_embeds: (num_texts, embed_dim).
        image_ids: COCO's id of each image; the package's 5,000 are needed, others are left out.
        caption_ids: COCO's id of each caption; its 25,000 are needed, others are left out.

    Returns:
        For both directions `image_to_text` and `text_to_image`: `..._eccv_map@r`, `..._eccv_r_precision`,
        `..._eccv_recall@1`, `..._cxc_recall@1`, `@5`, `@10` and `..._coco_recall@1`, `@5`, `@10`, in [0, 1].

    Raises:
        ModuleNotFoundError: without the package `eccv_caption`.
        ValueError: when images or captions are missing.
    """
    package = _package()
    known = package.coco_gts["i2t"]
    _check_complete(known, set(image_ids), set(caption_ids))
    images = _known(image_embeds, image_ids, set(known))
    texts = _known(text_embeds, caption_ids, {number for numbers in known.values() for number in numbers})
    retrieved = {
        "i2t": _retrieve(images, texts, [package.eccv_gts["i2t"], package.cxc_gts["i2t"], known]),
        "t2i": _retrieve(texts, images, [package.eccv_gts["t2i"], package.cxc_gts["t2i"], package.coco_gts["t2i"]]),
    }
    with redirect_stderr(io.StringIO()):  # it draws progress bars, wanted or not
        figures = package.compute_all_metrics(retrieved["i2t"], retrieved["t2i"], target_metrics=_ASKED, Ks=(1, 5, 10))
    return {
        f"{direction}_{_named(name)}": float(figures[name][side])
        for direction, side in _SIDES.items()
        for name in sorted(figures, key=lambda name: not name.startswith("eccv"))
    }


def eccv_table(metrics: Mapping[str, float]) -> str:
    """Lay the figures of `eccv_metrics` out as text, in percent."""
    prefix = f"{DIRECTIONS[0]}_"
    names = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    lines = [f"{'COCO test, extended':22}" + "".join(f"{direction.replace('_', ' '):>16}" for direction in DIRECTIONS)]
    for name in names:
        title = name.replace("recall@", "R@").replace("map@r", "mAP@R").replace("_", " ")
        lines.append(f"{title:22}" + "".join(f"{metrics[f'{side}_{name}']:>16.1%}" for side in DIRECTIONS))
    return "\n".join(lines)


def _named(theirs: str) -> str:
    """Rename `coco_5k_r1` to coco_recall@1, `eccv_map_at_r` to eccv_map@r."""
    source, _, figure = theirs.replace("coco_5k", "coco").partition("_")
    ours = {"map_at_r": "map@r", "rprecision": "r_precision"}
    return f"{source}_{ours.get(figure) or figure.replace('r', 'recall@')}"


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it regrets that json is not ujson
            from eccv_caption import Metrics
    except ImportError as error:
        raise ModuleNotFoundError(
            "ECCV Caption and CxC need the package `eccv_caption`: install this project with its extra `coco` "
            "(pip install '.[coco]')."
        ) from error
    return Metrics()


def _check_complete(known: Mapping[int, Sequence[int]], image_ids: set[int], caption_ids: set[int]) -> None:
    images = len(set(known) - image_ids)
    captions = len({number for numbers in known.values() for number in numbers} - caption_ids)
    if images or captions:
        raise ValueError(
            f"ECCV Caption is measured on {_SPLIT}; {images:,} of the pictures and {captions:,} of the captions are "
            "missing here."
        )


def _known(embeds: Tensor, ids: Sequence[int], known: set[int]) -> tuple[Tensor, Tensor]:
    """Keep what the package knows: the embeddings, and their ids as (n,) int64."""
    rows = [row for row, number in enumerate(ids) if number in known]
    return embeds[rows], torch.tensor(ids)[rows]


def _retrieve(
    queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor], labels: Iterable[Mapping[int, Sequence[int]]]
) -> dict[int, list[int]]:
    """Rank the candidates for each query as far down as any label set looks."""
    labels = list(labels)
    depth = max(10, *(len(right) for of in labels for right in of.values()))
    place = {number: column for column, number in enumerate(candidates[1].tolist())}
    retrieved: dict[int, list[int]] = {}
    for rows, scores, _ in scored_blocks(queries, candidates):
        numbers = queries[1][rows].tolist()
        for row, number in enumerate(numbers):
            right = {other for of in labels for other in of.get(number, ())}
            # Two of ECCV's labels are captions beyond the 25,000.
            scores[row, [place[other] for other in right if other in place]] -= ROUNDING
        best = scores.topk(depth, dim=1).indices
        retrieved |= dict(zip(numbers, candidates[1][best].tolist(), strict=True))
    return retrieved


# ---------------------------------------------------------------- COCO's ids


def _annotations(source: Path) -> Path:
    if source.is_file():
        return source
    for name in _FILES:
        for file in (source / name, *sorted(source.glob(f"*/{name}"))):
            if file.is_file():
                return file
    raise FileNotFoundError(f"{source} holds no {' and no '.join(_FILES)}; ECCV Caption needs COCO's annotations.")


def _caption_ids(file: Path) -> dict[tuple[int, str], list[int]]:
    """Map a picture's id and a caption's clean text to the ids of that caption."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if "annotations" in content:
            rows = [(entry["image_id"], entry["id"], entry["caption"]) for entry in content["annotations"]]
        else:
            rows = [
                (image["cocoid"], entry["sentid"], entry["raw"])
                for image in content["images"]
                for entry in image["sentences"]
            ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not COCO's annotation of captions ({type(error).__name__}: {error}).") from error
    ids: dict[tuple[int, str], list[int]] = {}
    for image, number, text in rows:
        try:
            ids.setdefault((int(image), clean_caption(text)), []).append(int(number))
        except InputError:
            continue  # an empty caption; if it is one of the 25,000, it is counted as missing
    return ids
