"""A captioned data set as embeddings, encoded once, and the ranks of its queries.

Place in the flow: `data + encoder -> embed_pairs -> ranks (here) -> retrieval, zero_shot, error_analysis`. The
convention of the ranks is CLIP_benchmark's, the hit rate over unit-norm embeddings compared in float32, but ties count
against the query.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from alignment.data import Pair
from alignment.model import DualEncoder
from alignment.model.dual_encoder import Progress
from alignment.preprocess import InputError, message_with_option, open_image, sanitize_text
from alignment.similarity import cosine_similarity

logger = logging.getLogger(__name__)

KS = (1, 5, 10)
ROUNDING = 1e-6  # closer cosines are ties: in float32, equal embeddings get scores that differ in the last bits
DIRECTIONS = ("image_to_text", "text_to_image")  # the query is named first
_QUERIES_AT_ONCE = 1024  # rows of the similarity matrix in memory at a time

NamedProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Embedded:
    """Images (paths) and captions, image by image, with the embeddings of one model."""

    images: Sequence[str]
    texts: Sequence[str]
    image_of_text: Tensor  # (num_texts,) index of the image that each caption describes
    image_embeds: Tensor  # (num_images, embed_dim)
    text_embeds: Tensor  # (num_texts, embed_dim)

    @cached_property
    def ranks(self) -> dict[str, Tensor]:
        """Rank of every query's best positive in both `DIRECTIONS`, int64, from 1; see `retrieval_ranks`."""
        images, texts = self.sides
        is_covered = len(texts[0]) == len(texts[1]) and texts[1].unique().tolist() == images[1].tolist()
        if len(images[0]) == 0 or not is_covered:
            raise ValueError("Every text must belong to an image, every image must own a text, and there must be some.")
        return {
            direction: torch.cat([retrieval_ranks(*block, tolerance=ROUNDING) for _, *block in scored_blocks(*sides)])
            for direction, sides in zip(DIRECTIONS, ((images, texts), (texts, images)), strict=True)
        }

    @property
    def sides(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Images and texts as `scored_blocks` takes them: embeddings, and the index of each one's image."""
        return (self.image_embeds, torch.arange(len(self.image_embeds))), (self.text_embeds, self.image_of_text)


def embed_pairs(
    encoder: DualEncoder, pairs: Sequence[Pair], *, batch_size: int = 16, progress: NamedProgress | None = None
) -> Embedded:
    """Embed the images of a data set and all their captions.

    Pairs of the same image are merged; images without captions or that cannot be opened are left out and logged; when
    none is left, ValueError is raised. `progress` is called with ("images" or "captions", done, total).
    """
    captions = _captions_by_image(pairs)
    images, image_embeds = embed_images(encoder, list(captions), "images", batch_size=batch_size, progress=progress)
    texts = [caption for image in images for caption in captions[image]]
    text_embeds = encoder.encode_texts(texts, progress=with_name(progress, "captions"))
    image_of_text = torch.repeat_interleave(torch.tensor([len(captions[image]) for image in images]))
    return Embedded(images, texts, image_of_text, image_embeds, text_embeds)


def embed_images(
    encoder: DualEncoder, images: Sequence[str], name: str, *, batch_size: int, progress: NamedProgress | None
) -> tuple[list[str], Tensor]:
    """Embed images, without those that cannot be opened: the paths that are left, and their embeddings (n, embed_dim).

    They are called `name` in `progress` and in the log. Raises ValueError when none can be opened.
    """
    images, report = list(images), with_name(progress, name)
    try:
        return images, encoder.encode_images(images, batch_size=batch_size, progress=report)
    except InputError:
        refused = {image: reason for image in images if (reason := _open_error(image))}
    first = [f"{sanitize_text(os.path.basename(image))} ({reason})" for image, reason in islice(refused.items(), 3)]
    more = ", ..." if len(refused) > len(first) else ""
    logger.warning("Left out %d %s that cannot be opened: %s%s", len(refused), name, " ".join(first), more)
    images = [image for image in images if image not in refused]
    if not images:
        raise ValueError(f"None of the images can be opened; check the data set. {first[0]}")
    return images, encoder.encode_images(images, batch_size=batch_size, progress=report)


def with_name(progress: NamedProgress | None, name: str) -> Progress | None:
    """Bind the name of what progresses."""
    return None if progress is None else lambda done, total: progress(name, done, total)


def _captions_by_image(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for pair in pairs:
        captions.setdefault(pair.image, []).extend(pair.captions)
    captioned = {image: texts for image, texts in captions.items() if texts}
    if not captioned:
        raise ValueError("There is no image with a caption to evaluate on; give a captioned data set.")
    if len(captioned) < len(captions):
        logger.warning("Left out %d images without a caption.", len(captions) - len(captioned))
    return captioned


def _open_error(image: str) -> str:
    """Return why an image cannot be opened; "" if it can."""
    try:
        open_image(image)
    except InputError as error:
        return message_with_option(error)
    return ""


def retrieval_ranks(similarity: Tensor, positives: Tensor, *, tolerance: float = 0.0) -> Tensor:
    """Rank each query's best positive among the negatives, from 1; recall@k is the share of ranks up to k.

    Every negative that scores no less counts as ranked before it, so a collapsed encoder that scores every pair equally
    earns a recall of 0; other positives of the query do not count. Two queries over four candidates:

        scores      .9  .8  .1  .0       positives   0 1 0 0       rank 2
                    .7  .6  .5  .5                   0 0 0 1       rank 4

    Args:
        similarity: (num_queries, num_candidates), any monotone score, higher is closer.
        positives: same shape, bool; several positives per query are allowed.
        tolerance: scores that differ by no more than this are ties.

    Raises ValueError on shapes that differ, non-finite scores, or a query without a positive.
    """
    if similarity.dim() != 2 or similarity.shape != positives.shape or positives.dtype != torch.bool:
        raise ValueError(
            f"Scores and positives must be one (num_queries, num_candidates) matrix each, the second bool, not "
            f"{tuple(similarity.shape)} and {positives.dtype} {tuple(positives.shape)}."
        )
    if not similarity.isfinite().all():
        raise ValueError("The scores hold NaN or infinity; the model or its precision is broken.")
    if not positives.any(dim=1).all():
        raise ValueError("A query has no positive among the candidates; leave it out, it can never be found.")
    best_positive = similarity.where(positives, -torch.inf).amax(dim=1, keepdim=True)
    return ((similarity >= best_positive - tolerance) & ~positives).sum(dim=1) + 1


def scored_blocks(
    queries: tuple[Tensor, Tensor], candidates: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Score the queries block by block: indices of the queries, their similarity to all candidates, and positives.

    Both sides are embeddings (n, embed_dim) and the index of each one's image (n,); the same image is a positive.
    """
    for rows in torch.arange(len(queries[0])).split(_QUERIES_AT_ONCE):
        embeds, images = queries[0][rows], queries[1][rows]
        yield rows, cosine_similarity(embeds, candidates[0]), images[:, None] == candidates[1]
