"""Floor 1, tensor maths on embeddings: cosine similarity, scaled logits, match probabilities, the best k.

Place in the flow: `encode (model) -> score (here) -> ranking`. Matrices are (num_images, num_texts): rows are images.
Nothing here knows about devices, models or files.
"""

from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional


def cosine_similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Score images (num_images, embed_dim) against texts (num_texts, embed_dim): (num_images, num_texts).

    Embeddings need no unit norm, a zero vector scores 0. Computed in float32 at least; in [-1, 1] up to rounding.
    Raises ValueError when either is not two-dimensional or the widths differ.
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
    """Scale cosines (num_images, num_texts) to logits; the scale is exponentiated, the bias None for softmax models."""
    logits = similarity * logit_scale
    return logits if logit_bias is None else logits + logit_bias


def match_probabilities(logits: Tensor, *, dim: int, logit_bias: float | Tensor | None = None) -> Tensor:
    """Turn logits into the probability of a match, as the model was trained.

    Without a bias the candidates along `dim` compete (softmax): 1 ranks texts for an image, 0 images for a text. With
    one, which `logits_per_image` has already added, every pair is judged by itself (sigmoid).
    """
    logits = _at_least_float32(logits)
    return logits.softmax(dim) if logit_bias is None else logits.sigmoid()


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Pick the k highest scores along the last dimension, best first: values and indices (..., min(k, num_candidates)).

    Equal scores keep the order of their indices, on every machine; `torch.topk` does not promise that.
    """
    if k < 0:
        raise ValueError(f"k must not be negative, it is {k}.")
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def cosines_within(embeds: Tensor) -> Tensor:
    """Score every item (n, embed_dim) against every other one: (n, n - 1) float64."""
    cosines = cosine_similarity(embeds, embeds).double()
    return cosines[~torch.eye(len(embeds), dtype=torch.bool)].reshape(len(embeds), -1)


def group_near_duplicates(embeds: Tensor, k: int, threshold: float) -> list[list[int]]:
    """Group each item with the best ranked one that it is a near duplicate of, by a cosine from `threshold` on.

    `embeds` is (n, embed_dim), unit norm, best ranked first. Returns at most k groups of places in that order: of a, b,
    a', c with a' nearly a, and k = 2, [[0, 2], [1]].
    """
    rows, groups = embeds.numpy(), list[list[int]]()
    free = dict.fromkeys(range(len(rows)))
    while free and len(groups) < k:
        some = list(islice(free, k - len(groups)))  # several at a time
        near: dict[int, list[int]] = {first: [] for first in some}
        are_near = rows[some] @ rows.T >= threshold
        for row, place in zip(*(places.tolist() for places in are_near.nonzero()), strict=True):
            near[some[row]].append(place)
        for first in filter(free.__contains__, some):
            del free[first]
            groups.append([first, *(place for place in near[first] if place in free)])
            for place in groups[-1][1:]:
                del free[place]
    return groups


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
