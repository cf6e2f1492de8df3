"""Our recall beside CLIP_benchmark's, on the same embeddings.

`RECORDED` holds what clip-benchmark 1.6.2's own `metrics/zeroshot_retrieval.py:evaluate` answered: its `recall_at_k`,
batches of 32, `amp=False`, a model that hands the embeddings through.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from alignment.evaluate import evaluate_embeddings

# (seed, images, width, noise, most captions an image): image_retrieval_recall@1, @5, @10, then text_retrieval_recall.
RECORDED = {
    (0, 50, 16, 2.0, 1): [0.5, 0.8, 0.88, 0.48, 0.8, 0.9],
    (1, 64, 24, 2.5, 5): [0.3617021, 0.7180851, 0.819149, 0.5625, 0.78125, 0.84375],
    (2, 200, 32, 3.0, 7): [0.1867995, 0.4271482, 0.5516812, 0.33, 0.625, 0.725],
    (3, 333, 8, 1.0, 3): [0.2099698, 0.5, 0.6374623, 0.2552553, 0.5585586, 0.6876877],
    (4, 1100, 48, 3.0, 5): [0.1458894, 0.3408072, 0.4409567, 0.21, 0.4736364, 0.5818182],
}


def embeddings(seed: int, num_images: int, width: int, noise: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random images with 1 to `most` captions each that are the image plus noise; and who owns what."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, most + 1, num_images)
    images = rng.standard_normal((num_images, width))
    owners = np.repeat(np.arange(num_images), counts)
    texts = images[owners] + noise * rng.standard_normal((len(owners), width))
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (images, texts)]
    return torch.tensor(unit[0], dtype=torch.float32), torch.tensor(unit[1], dtype=torch.float32), torch.tensor(owners)


@pytest.mark.parametrize("case", RECORDED, ids=str)
def test_recall_equals_what_clip_benchmark_computes(case: tuple[int, int, int, float, int]) -> None:
    images, texts, owners = embeddings(*case)
    report = evaluate_embeddings(images, texts, owners, resamples=0)
    ours = [report[f"{direction}_recall@{k}"] for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)]
    assert ours == pytest.approx(RECORDED[case], abs=1e-6)


def test_the_recorded_cases_differ_in_what_matters() -> None:
    """Captions come one an image and several, always the same number and not."""
    counts = {case: torch.bincount(embeddings(*case)[2]) for case in RECORDED}
    assert {len(count.unique()) > 1 for count in counts.values()} == {True, False}
    assert len({tuple(figures) for figures in RECORDED.values()}) == len(RECORDED)


def test_ties_are_where_we_differ() -> None:
    """CLIP_benchmark takes the ten that topk happens to put first: there this collapsed model earned 0.5."""
    images = torch.ones(20, 4)
    report = evaluate_embeddings(images, images, torch.arange(20), resamples=0)
    assert report["text_to_image_recall@10"] == report["image_to_text_recall@10"] == 0.0
