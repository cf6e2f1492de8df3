"""Validation: retrieval on a data set with the current weights.

Place in the flow: `trainer` calls it every `measure_every` steps, `run` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from alignment.data import Pair
from alignment.evaluate import Embedded, evaluate_embedded
from alignment.model import DualEncoder
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import gather


@dataclass
class Validator:
    """Retrieval on `pairs`, each image once; `cache` has features of the images. All captions are candidates."""

    encoder: DualEncoder
    pairs: Sequence[Pair]
    cache: CachedFeatures | None = None
    batch_size: int = 16
    _image_of_text: Tensor = field(init=False)
    _texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self._texts = [caption for pair in self.pairs for caption in pair.captions]
        self._image_of_text = torch.repeat_interleave(torch.tensor([len(pair.captions) for pair in self.pairs]))

    def metrics(self) -> dict[str, float]:
        """Return the metrics of a `RetrievalReport`, without intervals."""
        report = evaluate_embedded(self.embed(), resamples=0)
        return {name: estimate.value for name, estimate in report.metrics.items()}

    def embed(self) -> Embedded:
        """Embed images and captions; each process embeds its share."""
        images = _distributed(range(len(self.pairs)), self._embed_images, self.encoder.embed_dim)
        texts = _distributed(range(len(self._texts)), self._embed_texts, self.encoder.embed_dim)
        return Embedded([pair.image for pair in self.pairs], self._texts, self._image_of_text, images, texts)

    def _embed_images(self, rows: Sequence[int]) -> Tensor:
        if self.cache is not None:
            return self.cache.embed(rows)
        return self.encoder.encode_images([self.pairs[row].image for row in rows], batch_size=self.batch_size)

    def _embed_texts(self, rows: Sequence[int]) -> Tensor:
        # Sorted by length, batches have less padding.
        order = sorted(range(len(rows)), key=lambda place: len(self._texts[rows[place]]))
        embeds = self.encoder.encode_texts([self._texts[rows[place]] for place in order], batch_size=256)
        return embeds[torch.tensor(order).argsort()] if order else embeds


def _distributed(rows: range, embed: Callable[[Sequence[int]], Tensor], embed_dim: int) -> Tensor:
    """Embed rows r, r + W, ... on process r of W, and gather the embeddings of all processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return embed(rows)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    share = -(-len(rows) // processes)
    part = torch.zeros(share, embed_dim)
    own = rows[rank::processes]
    part[: len(own)] = embed(own)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    gathered = gather(part.to(device)).cpu().view(processes, share, embed_dim)
    return gathered.transpose(0, 1).flatten(0, 1)[: len(rows)]
