"""COCO with additional labels: ECCV Caption's mAP@R and CxC's recall, through the package `eccv_caption`.

Place in the flow: `COCO's test split, embedded -> evaluate_eccv (here) -> report`. COCO labels only the five captions
of a picture as right, although captions of others often fit. ECCV Caption (Chun et al. 2022) and CxC (Parekh et al.
2021) add pairs judged by people. The package (extra `coco`) holds their labels and computes the metrics.
"""

import io
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.data import Pair
from alignment.evaluate.embedding import Embedded
from alignment.evaluate.ranks import DIRECTIONS, ROUNDING, scored_blocks
from alignment.preprocess import InputError, clean_caption

_FILES = ("dataset_coco.json", "captions_val2014.json")
_SIDES = dict(zip(DIRECTIONS, ("i2t", "t2i"), strict=True))  # the package's names
_METRICS = ("coco_5k_recalls", "cxc_recalls", "eccv_map_at_r", "eccv_rprecision", "eccv_r1")


@dataclass(frozen=True)
class EccvData:
    """Pictures of COCO's test split, and COCO's ids of a caption by the path of its picture and its text."""

    pairs: Sequence[Pair]
    caption_ids: Mapping[tuple[str, str], Sequence[int]]


def read_eccv(pairs: Sequence[Pair], source: Path) -> EccvData:
    """Keep the pictures of ECCV Caption, and look up the ids of their captions.

    `source`, which `pairs` were read from, is an annotation file or a folder that holds one. Raises ModuleNotFoundError
    without the package, and ValueError when pictures or captions of the test split are missing.
    """
    labels = _package().coco_gts["i2t"]
    places = [source, *(path for name in _FILES for path in (source / name, *sorted(source.glob(f"*/{name}"))))]
    file = next(filter(Path.is_file, places), None)
    if file is None:
        raise FileNotFoundError(f"{source} holds no {' and no '.join(_FILES)}; ECCV Caption needs COCO's annotations.")
    ids = _caption_ids(file)
    kept = [pair for pair in pairs if pair.id.isdecimal() and int(pair.id) in labels]
    found = {(pair.image, text): ids.get((int(pair.id), text), []) for pair in kept for text in pair.captions}
    _check_complete(labels, {int(pair.id) for pair in kept}, set(chain.from_iterable(found.values())))
    return EccvData(kept, found)


def evaluate_eccv(embedded: Embedded, data: EccvData) -> dict[str, float]:
    """Compute `eccv_metrics` of `data.pairs` as embedded; raises ValueError when a picture could not be opened."""
    image_ids = {pair.image: int(pair.id) for pair in data.pairs}
    captions = [
        (row, number)
        for row, (text, image) in enumerate(zip(embedded.texts, embedded.image_of_text.tolist(), strict=True))
        for number in data.caption_ids[embedded.images[image], text]
    ]
    texts = embedded.text_embeds[[row for row, _ in captions]]
    images = [image_ids[image] for image in embedded.images]
    return eccv_metrics(embedded.image_embeds, texts, images, [number for _, number in captions])


def eccv_metrics(
    image_embeds: Tensor, text_embeds: Tensor, image_ids: Sequence[int], caption_ids: Sequence[int]
) -> dict[str, float]:
    """Compute ECCV Caption's, CxC's and COCO's metrics in [0, 1] from embeddings (n, embed_dim) and COCO's ids.

    The package's 5,000 images and 25,000 captions are required, others are left out. Cosines within `ROUNDING` of each
    other are ties, and labelled candidates come last among them. For both `DIRECTIONS`: `..._eccv_map@r`,
    `..._eccv_r_precision`, `..._eccv_recall@1`, `..._cxc_recall@1`, `@5`, `@10` and `..._coco_recall@1`, `@5`, `@10`.
    """
    package = _package()
    coco = package.coco_gts["i2t"]
    _check_complete(coco, set(image_ids), set(caption_ids))
    images = _select(image_embeds, image_ids, set(coco))
    texts = _select(text_embeds, caption_ids, set(chain.from_iterable(coco.values())))
    retrieved = [
        _retrieve(*sides, [labels[side] for labels in (package.eccv_gts, package.cxc_gts, package.coco_gts)])
        for side, sides in (("i2t", (images, texts)), ("t2i", (texts, images)))
    ]
    with redirect_stderr(io.StringIO()):  # the package always prints progress bars
        found = package.compute_all_metrics(*retrieved, target_metrics=_METRICS, Ks=(1, 5, 10))
    return {
        f"{direction}_{_metric_name(name)}": float(found[name][side])
        for direction, side in _SIDES.items()
        for name in sorted(found, key=lambda name: not name.startswith("eccv"))
    }


def eccv_table(metrics: Mapping[str, float]) -> str:
    """Format `eccv_metrics` as text, in percent."""
    prefix = f"{DIRECTIONS[0]}_"
    lines = [f"{'COCO test, extended':22}" + "".join(f"{direction.replace('_', ' '):>16}" for direction in DIRECTIONS)]
    for name in (name.removeprefix(prefix) for name in metrics if name.startswith(prefix)):
        title = name.replace("recall@", "R@").replace("map@r", "mAP@R").replace("_", " ")
        lines.append(f"{title:22}" + "".join(f"{metrics[f'{side}_{name}']:>16.1%}" for side in DIRECTIONS))
    return "\n".join(lines)


def _metric_name(name: str) -> str:
    """Rename `coco_5k_r1` to coco_recall@1, `eccv_map_at_r` to eccv_map@r."""
    source, _, metric = name.replace("coco_5k", "coco").partition("_")
    renamed = {"map_at_r": "map@r", "rprecision": "r_precision"}
    return f"{source}_{renamed.get(metric) or metric.replace('r', 'recall@')}"


def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it uses json instead of ujson
            from eccv_caption import Metrics
    except ImportError as error:
        raise ModuleNotFoundError(
            "ECCV Caption and CxC need the package `eccv_caption`: install this project with its extra `coco` "
            "(pip install '.[coco]')."
        ) from error
    return _read_labels(Metrics)


@cache
def _read_labels(metrics: Callable[[], Any]) -> Any:
    """Make the package's metrics, whose labels take a second to read, once."""
    return metrics()


def _check_complete(labels: Mapping[int, Sequence[int]], image_ids: set[int], caption_ids: set[int]) -> None:
    images, captions = len(set(labels) - image_ids), len(set(chain.from_iterable(labels.values())) - caption_ids)
    if images or captions:
        raise ValueError(
            "ECCV Caption is measured on the 5,000 pictures of Karpathy's COCO test split with five captions each; "
            f"{images:,} of the pictures and {captions:,} of the captions are missing here."
        )


def _select(embeds: Tensor, ids: Sequence[int], wanted: set[int]) -> tuple[Tensor, Tensor]:
    rows = [row for row, number in enumerate(ids) if number in wanted]
    return embeds[rows], torch.tensor(ids)[rows]


def _retrieve(
    queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor], labels: Sequence[Mapping[int, Sequence[int]]]
) -> dict[int, list[int]]:
    """Rank the candidates of each query as deep as any label set needs."""
    depth = max(10, *(len(positives) for labelled in labels for positives in labelled.values()))
    column_of = {number: column for column, number in enumerate(candidates[1].tolist())}
    retrieved: dict[int, list[int]] = {}
    for rows, scores, _ in scored_blocks(queries, candidates):
        numbers = queries[1][rows].tolist()
        for row, number in enumerate(numbers):
            positives = {other for labelled in labels for other in labelled.get(number, ())}
            # Two of ECCV Caption's labels are captions beyond the 25,000.
            scores[row, [column_of[other] for other in positives if other in column_of]] -= ROUNDING
        top = scores.topk(depth, dim=1).indices
        retrieved |= dict(zip(numbers, candidates[1][top].tolist(), strict=True))
    return retrieved


def _caption_ids(file: Path) -> dict[tuple[int, str], list[int]]:
    """Map a picture's id and a caption's clean text to the ids of that caption."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        if "annotations" in content:
            rows = [(entry["image_id"], entry["id"], entry["caption"]) for entry in content["annotations"]]
        else:
            images = content["images"]
            rows = [(image["cocoid"], item["sentid"], item["raw"]) for image in images for item in image["sentences"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not COCO's annotation of captions ({type(error).__name__}: {error}).") from error
    ids: dict[tuple[int, str], list[int]] = {}
    for image, number, text in rows:
        try:
            ids.setdefault((int(image), clean_caption(text)), []).append(int(number))
        except InputError:
            continue  # an empty caption; if it is one of the 25,000, it counts as missing
    return ids
