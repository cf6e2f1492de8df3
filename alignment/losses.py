"""Floor 1, contrastive objectives as functions of the logits and of which pairs belong together.

Place in the flow: `encode -> similarity.logits_per_image -> loss (here) -> backward`. Both losses take the scaled
logits (num_images, num_texts), which need not be square, and two optional bool masks of the same shape:

- `positives`: pairs that belong together, several per image and per text. Left out, image i owns text i; texts beyond
  the last image are then negatives (hard negatives, say).
- `ignored`: pairs that count neither as a match nor as a mismatch, such as near-duplicates. A positive stays one even
  where this mask covers it.
"""

import torch
from torch import Tensor
from torch.nn import functional


def softmax_loss(logits_per_image: Tensor, positives: Tensor | None = None, *, ignored: Tensor | None = None) -> Tensor:
    """Average the InfoNCE losses of images looking for texts and of texts looking for images.

    A query with several positives pays the mean of -log p over them, p being the softmax over all its candidates. The
    alternative, -log of their summed p, is content once one caption of five is close; here each caption has to be
    found, as recall counts it. A query without a positive is left out of its direction's mean but stays a candidate.

    Half precision is lifted to float32. Returns a scalar; log B when B x B logits are all equal. Raises ValueError on
    masks of another shape or type, or without any positive.

    Source: InfoNCE, van den Oord et al. 2018; symmetric as in CLIP, Radford et al. 2021; several positives as L_out of
    SupCon, Khosla et al. 2020.
    """
    logits, positives, ignored = _checked(logits_per_image, positives, ignored)
    if not positives.any():
        raise ValueError("Softmax loss needs at least one positive pair.")
    return (_one_direction(logits, positives, ignored) + _one_direction(logits.T, positives.T, ignored.T)) / 2


def sigmoid_loss(logits_per_image: Tensor, positives: Tensor | None = None, *, ignored: Tensor | None = None) -> Tensor:
    """Judge every pair by itself: a logistic loss per cell, summed over texts, averaged over images.

    The sum is divided by the number of images, not of pairs: the parts of a large batch, each scored against all texts,
    then average to the loss of the whole. The logits include the bias; half precision is lifted to float32. An image
    may have no positive. Returns a scalar; num_texts * log 2 when all logits are 0. Raises ValueError on masks of
    another shape or type.

    Source: SigLIP, Zhai et al. 2023.
    """
    logits, positives, ignored = _checked(logits_per_image, positives, ignored)
    signs = positives.to(logits.dtype) * 2 - 1
    losses = -functional.logsigmoid(signs * logits)
    return losses.masked_fill(ignored, 0.0).sum() / logits.shape[0]


def _one_direction(logits: Tensor, positives: Tensor, ignored: Tensor) -> Tensor:
    """Average -log p over a row's positives, then over the rows that have any."""
    has_positive = positives.any(dim=1)
    logits, positives, ignored = logits[has_positive], positives[has_positive], ignored[has_positive]
    log_probabilities = logits.masked_fill(ignored, float("-inf")).log_softmax(dim=1)
    # where, not a product: an ignored pair has log p = -inf, and -inf * 0 is NaN.
    own = torch.where(positives, log_probabilities, 0.0)
    return -(own.sum(dim=1) / positives.sum(dim=1)).mean()


def _checked(logits: Tensor, positives: Tensor | None, ignored: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the default masks, and refuse those that do not fit."""
    shape = tuple(logits.shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"Logits must be (num_images, num_texts) with at least one of each, not {shape}.")
    if positives is None:
        positives = torch.eye(*shape, dtype=torch.bool, device=logits.device)
    if ignored is None:
        ignored = torch.zeros_like(positives)
    for name, mask in (("positives", positives), ("ignored", ignored)):
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"`{name}` must be a bool tensor of shape {shape}, not {mask.dtype} of shape {tuple(mask.shape)}."
            )
    return logits if logits.dtype == torch.float64 else logits.float(), positives, ignored & ~positives
