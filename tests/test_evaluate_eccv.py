"""ECCV Caption and CxC through their package, against figures worked out here from its labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from alignment.data import Pair
from alignment.evaluate import Embedded
from alignment.evaluate.eccv import eccv_metrics, eccv_table, evaluate_eccv, read_eccv

WIDTH = 12


@pytest.fixture(scope="module")
def labels() -> dict[str, dict[str, dict[int, list[int]]]]:
    """The label files as the package ships them: coco, cxc and eccv, each i2t and t2i."""
    import importlib.util

    spec = importlib.util.find_spec("eccv_caption")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    names = {"i2t": "image_to_caption", "t2i": "caption_to_image"}

    def read(source: str, side: str) -> dict[int, list[int]]:
        content = json.loads((folder / f"{source}_{names[side]}.json").read_text(encoding="utf-8"))
        return {int(key): [int(value) for value in values] for key, values in content.items()}

    return {source: {side: read(source, side) for side in names} for source in ("original", "cxc", "eccv")}


@pytest.fixture(scope="module")
def coco(labels) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Seeded embeddings of the 5,000 pictures and 25,000 captions, and their ids."""
    images = list(labels["original"]["i2t"])
    captions = [(caption, image) for image, of in labels["original"]["i2t"].items() for caption in of]
    rng = np.random.default_rng(0)
    rows = {image: row for row, image in enumerate(images)}
    seen = rng.standard_normal((len(images), WIDTH))
    read = seen[[rows[image] for _, image in captions]] + 0.8 * rng.standard_normal((len(captions), WIDTH))
    units = [functional.normalize(torch.tensor(part, dtype=torch.float32), dim=-1) for part in (seen, read)]
    return units[0], units[1], images, [caption for caption, _ in captions]


@pytest.fixture(scope="module")
def figures(coco) -> dict[str, float]:
    return eccv_metrics(*coco)


def ranked(coco, right: dict[int, list[int]], side: str) -> Iterator[tuple[list[int], set[int]]]:
    """For each query that has labels: the candidates' ids, best first, and the ids that are right."""
    images, texts, image_ids, caption_ids = coco
    asked, ids, offered, others = (images, image_ids, texts, caption_ids)
    if side == "t2i":
        asked, ids, offered, others = texts, caption_ids, images, image_ids
    place = {number: row for row, number in enumerate(ids)}
    numbers = np.array(others)
    for some in torch.tensor(list(right)).split(500):
        queries = some.tolist()
        scores = asked[[place[query] for query in queries]] @ offered.T
        best = scores.topk(100).indices.numpy()  # no query has as many right answers
        for query, row in zip(queries, best, strict=True):
            yield numbers[row].tolist(), set(right[query])


def map_at_r(found: list[int], right: set[int]) -> float:
    """Mean over the first R places of the precision so far, where the place is right (R: how many are right)."""
    hits = np.array([candidate in right for candidate in found[: len(right)]])
    return float((hits.cumsum() / np.arange(1, len(right) + 1) * hits).mean())


@pytest.mark.parametrize(("direction", "side"), [("image_to_text", "i2t"), ("text_to_image", "t2i")])
def test_eccv_equals_the_definition(labels, coco, figures, direction: str, side: str) -> None:
    lists = list(ranked(coco, labels["eccv"][side], side))
    maps = [map_at_r(found, right) for found, right in lists]
    precisions = [len(set(found[: len(right)]) & right) / len(right) for found, right in lists]
    assert 0.01 < figures[f"{direction}_eccv_map@r"] < 0.9
    assert figures[f"{direction}_eccv_map@r"] == pytest.approx(np.mean(maps), abs=1e-6)
    assert figures[f"{direction}_eccv_r_precision"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert figures[f"{direction}_eccv_recall@1"] == pytest.approx(
        np.mean([found[0] in right for found, right in lists])
    )


@pytest.mark.parametrize(("direction", "side"), [("image_to_text", "i2t"), ("text_to_image", "t2i")])
def test_cxc_equals_the_definition(labels, coco, figures, direction: str, side: str) -> None:
    """Hits of any label, over the pictures or captions that have one."""
    lists = ranked(coco, labels["cxc"][side], side)
    hits = [[bool(set(found[:k]) & right) for k in (1, 5, 10)] for found, right in lists]
    measured = [figures[f"{direction}_cxc_recall@{k}"] for k in (1, 5, 10)]
    assert measured == pytest.approx(np.mean(hits, axis=0), abs=1e-4)


def test_coco_recall_is_ours(coco, figures) -> None:
    from alignment.evaluate import evaluate_embeddings

    images, texts, _, _ = coco
    report = evaluate_embeddings(images, texts, torch.arange(5000).repeat_interleave(5), resamples=0)
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5, 10):
            assert figures[f"{direction}_coco_recall@{k}"] == pytest.approx(report[f"{direction}_recall@{k}"], abs=1e-9)


def test_a_collapsed_model_earns_nothing(coco) -> None:
    images, texts, image_ids, caption_ids = coco
    flat = eccv_metrics(torch.ones_like(images), torch.ones_like(texts), image_ids, caption_ids)
    assert len(flat) == 18
    assert set(flat.values()) == {0.0}


def test_the_table(figures) -> None:
    lines = eccv_table(figures).splitlines()
    assert lines[0].split("  ")[0] == "COCO test, extended"
    assert lines[1].split() == [
        "eccv", "mAP@R", f"{figures['image_to_text_eccv_map@r']:.1%}", f"{figures['text_to_image_eccv_map@r']:.1%}"
    ]  # fmt: skip
    assert [line.split("  ")[0] for line in lines[2:5]] == ["eccv r precision", "eccv R@1", "coco R@1"]
    assert len(lines) == 10


def test_what_is_missing_is_counted(coco) -> None:
    images, texts, image_ids, caption_ids = coco
    with pytest.raises(ValueError, match=r"1 of the pictures and 0 of the captions are missing"):
        eccv_metrics(images[1:], texts, image_ids[1:], caption_ids)
    with pytest.raises(ValueError, match=r"0 of the pictures and 2 of the captions are missing"):
        eccv_metrics(images, texts[:-2], image_ids, caption_ids[:-2])


def test_without_the_package_the_extra_is_named(coco, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "eccv_caption", None)
    with pytest.raises(ModuleNotFoundError, match=r"extra `coco` \(pip install '\.\[coco\]'\)"):
        eccv_metrics(*coco)


# ---------------------------------------------------------------- COCO's files


def annotation(labels, kind: str) -> dict:
    """Write COCO's test split as its own file or Karpathy's says it, with a picture that is no part of it."""
    right = {**labels["original"]["i2t"], 999_999_999: [5, 6]}
    if kind == "captions_val2014.json":
        rows = [
            {"image_id": image, "id": caption, "caption": f"caption {caption} \n"}
            for image, of in right.items()
            for caption in of
        ]
        return {"images": [], "annotations": rows}
    images = [
        {"cocoid": image, "sentences": [{"sentid": caption, "raw": f" caption  {caption}"} for caption in of]}
        for image, of in right.items()
    ]
    return {"images": images}


def test_ids_come_from_the_annotations(labels, coco, figures, tmp_path: Path) -> None:
    images, texts, image_ids, _ = coco
    captions = labels["original"]["i2t"]
    pairs = [
        Pair(f"{image}.jpg", tuple(f"caption {id}" for id in captions[image]), id=str(image)) for image in image_ids
    ]
    strangers = [Pair("x.jpg", ("caption 5",), id="999999999"), Pair("y.jpg", ("a",), id="not a number")]
    (tmp_path / "annotations").mkdir()
    for kind in ("captions_val2014.json", "dataset_coco.json"):  # where both are, Karpathy's is taken
        (tmp_path / "annotations" / kind).write_text(json.dumps(annotation(labels, kind)), encoding="utf-8")
    data = read_eccv([*strangers, *pairs], tmp_path)
    assert data == read_eccv([*pairs, *strangers], tmp_path / "annotations" / "captions_val2014.json")
    assert data.pairs == pairs
    paths, words = [pair.image for pair in pairs], [caption for pair in pairs for caption in pair.captions]
    embedded = Embedded(paths, words, torch.arange(5000).repeat_interleave(5), images, texts)
    assert evaluate_eccv(embedded, data) == figures
    with pytest.raises(ValueError, match="4,999 of the pictures and 24,995 of the captions are missing"):
        read_eccv(pairs[:1], tmp_path)


@pytest.mark.parametrize("content", ["{", '{"images": [1]}', '{"annotations": [{"id": 1}]}', "[]"])
def test_other_annotations_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "dataset_coco.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="not COCO's annotation"):
        read_eccv([], file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no dataset_coco\.json"):
        read_eccv([], tmp_path)
