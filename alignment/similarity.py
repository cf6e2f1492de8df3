"""Floor 1, pure tensor maths on embeddings: cosine similarity, scaled logits, match probabilities, the best k.

Place in the flow: `encode (model) -> score (here) -> heatmap / ranking`. Matrices are (num_images, num_texts): rows are
images. Nothing here knows about devices, models or files.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

_FEW = 64


def cosine_similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Score every image against every text.

    Embeddings are normalised here as well, so un-normalised features are welcome; a zero vector scores 0 with
    everything.

    Args:
        image_embeds: (num_images, embed_dim), any floating type; computed in float32 at least.
        text_embeds: (num_texts, embed_dim).

    Returns:
        (num_images, num_texts), in [-1, 1] up to rounding.

    Raises:
        ValueError: when either is not two-dimensional or the widths differ.
    """
    if image_embeds.dim() != 2 or text_embeds.dim() != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            "Embeddings must be (num_images, embed_dim) and (num_texts, embed_dim) with one width, "
            f"not {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    images = functional.normalize(_at_least_float32(image_embeds), dim=-1)
    texts = functional.normalize(_at_least_float32(text_embeds), dim=-1)
    return images @ texts.T


def logits_per_image(
    similarity: Tensor, logit_scale: float | Tensor, logit_bias: float | Tensor | None = None
) -> Tensor:
    """Scale cosines to the logits a model was trained with; rows are images.

    Args:
        similarity: (num_images, num_texts) cosines.
        logit_scale: the multiplier, already exponentiated; a tensor keeps its gradient.
        logit_bias: SigLIP's additive bias; None for models trained with a softmax.

    Returns:
        (num_images, num_texts); transpose it for the logits per text.
    """
    logits = similarity * logit_scale
    return logits if logit_bias is None else logits + logit_bias


def match_probabilities(logits: Tensor, *, dim: int, logit_bias: float | Tensor | None = None) -> Tensor:
    """Turn logits into the probability of a match, the way the model was trained.

    Without a bias the candidates along `dim` compete (softmax). With one, every pair is judged by itself (sigmoid)
    and the candidates need not add up to 1. The bias only decides which: `logits_per_image` has already added it.

    Args:
        logits: (num_images, num_texts), scaled, with the bias in it if there is one.
        dim: the axis of the candidates: 1 ranks texts for an image, 0 ranks images for a text.
        logit_bias: the model's bias, None for a softmax model.

    Returns:
        Same shape, float32 at least, in [0, 1].
    """
    logits = _at_least_float32(logits)
    return logits.softmax(dim) if logit_bias is None else logits.sigmoid()


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pick the k highest scores along the last dimension, best first.

    Equal scores keep the order of their indices, which `torch.topk` does not promise: the same query gives the same
    list on every machine.

    Args:
        scores: (..., num_candidates).
        k: how many; clipped to the number of candidates.

    Returns:
        Values and int64 indices, both (..., min(k, num_candidates)).

    Raises:
        ValueError: when k is negative.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, it is {k}.")
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def cosines_within(embeds: Tensor) -> Tensor:
    """Score every item of a collection against every other one.

    Args:
        embeds: (n, embed_dim), any length but 0.

    Returns:
        (n, n - 1) float64, without what each scores with itself.
    """
    cosines = cosine_similarity(embeds, embeds).double()
    return cosines[~torch.eye(len(embeds), dtype=torch.bool)].reshape(len(embeds), -1)


def group_near_duplicates(embeds: Tensor, k: int, threshold: float) -> list[list[int]]:
    """Group each item with the best ranked one that it is a near duplicate of.

    Of a, b, a', c with a' nearly a, and k = 2: [[0, 2], [1]].

    Args:
        embeds: (n, embed_dim), unit norm, best ranked first.
        k: number of groups; further ones are left out.
        threshold: cosine from which two items are near duplicates.

    Returns:
        At most k groups of places, each and all best ranked first.
    """
    free = np.ones(len(embeds), bool)
    groups: list[list[int]] = []
    rows = embeds.numpy()
    for first in range(len(embeds)):
        if len(groups) == k:
            break
        if free[first]:
            # numpy is quicker, until there are so many rows that its threads wake up
            cosines = rows @ rows[first] if len(rows) <= _FEW else torch.mv(embeds, embeds[first]).numpy()
            alike = (cosines >= threshold) & free
            alike[first] = True
            free &= ~alike
            groups.append(alike.nonzero()[0].tolist())
    return groups


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Lift half precision (and integers) to float32; leave float32 and float64 as they are."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
