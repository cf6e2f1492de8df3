"""Validation: retrieval on a data set with the current weights.

Place in the flow: `trainer` calls it every `measure_every` steps, `run` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from alignment.data import Pair, positive_mask
from alignment.evaluate import Embedded, evaluate_embedded
from alignment.model import DualEncoder
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import num_processes


class Validator:
    """Retrieval on `pairs`, each image once; `cache` has features of the images. All captions are candidates."""

    def __init__(
        self, encoder: DualEncoder, pairs: Sequence[Pair], cache: CachedFeatures | None = None, batch_size: int = 16
    ) -> None:
        self.encoder, self.cache, self.batch_size = encoder, cache, batch_size
        self.images = [pair.image for pair in pairs]
        positives, self.texts = positive_mask(pairs)
        self.image_of_text = positives.int().argmax(dim=0)

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a `RetrievalReport`, without intervals."""
        report = evaluate_embedded(self.embed(), resamples=0)
        return {name: estimate.value for name, estimate in report.metrics.items()}

    def embed(self) -> Embedded:
        """Embed images and captions; each process embeds its share."""
        image_embeds = _distributed(range(len(self.images)), self._embed_images)
        text_embeds = _distributed(range(len(self.texts)), self._embed_texts)
        return Embedded(self.images, self.texts, self.image_of_text, image_embeds, text_embeds)

    def _embed_images(self, rows: Sequence[int]) -> Tensor:
        if self.cache is not None:
            return self.cache.embed(rows)
        return self.encoder.encode_images([self.images[row] for row in rows], batch_size=self.batch_size)

    def _embed_texts(self, rows: Sequence[int]) -> Tensor:
        # Sorted by length, batches have less padding.
        order = sorted(range(len(rows)), key=lambda place: len(self.texts[rows[place]]))
        embeds = self.encoder.encode_texts([self.texts[rows[place]] for place in order], batch_size=256)
        return embeds[torch.tensor(order, dtype=torch.long).argsort()]


def _distributed(rows: range, embed: Callable[[Sequence[int]], Tensor]) -> Tensor:
    """Embed rows r, r + W, ... on process r of W, and gather the embeddings of all processes."""
    processes = num_processes()
    if processes == 1:
        return embed(rows)
    parts: list[Any] = [None] * processes
    distributed.all_gather_object(parts, embed(rows[distributed.get_rank() :: processes]))
    gathered = torch.empty(len(rows), parts[0].shape[1])
    for rank, part in enumerate(parts):
        gathered[rank::processes] = part
    return gathered
