"""A captioned data set as embeddings, encoded once.

Place in the flow: `data + encoder -> embed_pairs (here) -> ranks -> retrieval, zero_shot, error_analysis`.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from alignment.data import Pair
from alignment.evaluate.ranks import DIRECTIONS, ROUNDING, retrieval_ranks, scored_blocks
from alignment.model import DualEncoder
from alignment.model.dual_encoder import Progress
from alignment.preprocess import InputError, message_with_option, open_image, sanitize_text

logger = logging.getLogger(__name__)

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
