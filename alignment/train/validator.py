"""Measurement during training: retrieval on the validation data, as cheaply as the locked parts allow.

Place in the flow: `trainer` asks for it every so many steps, `run` before and after.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, distributed

from alignment.evaluate import Embedded, RetrievalReport, evaluate_embedded
from alignment.model import DualEncoder
from alignment.pairs import Pair, positives_of
from alignment.train.feature_cache import CachedFeatures
from alignment.train.objective import gather

Progress = Callable[[str, int, int], None]


@dataclass
class Validator:
    """Retrieval on one data set by whatever the model's weights are at the moment.

    Attributes:
        encoder: the model in training.
        pairs: images with captions, all of which are candidates; each image once.
        kept: what the frozen part of the image side made of them, if it is kept.
    """

    encoder: DualEncoder
    pairs: Sequence[Pair]
    kept: CachedFeatures | None = None
    batch_size: int = 16
    progress: Progress | None = None
    _image_of_text: Tensor = field(init=False)
    _texts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        positives, self._texts = positives_of(self.pairs)
        self._image_of_text = positives.int().argmax(dim=0)

    def report(self, *, resamples: int = 1000) -> RetrievalReport:
        """Measure recall in both directions, with intervals."""
        return evaluate_embedded(self.embedded(), resamples=resamples)

    def figures(self) -> Mapping[str, float]:
        """Measure recall in both directions, without intervals."""
        return {name: estimate.value for name, estimate in self.report(resamples=0).metrics.items()}

    def embedded(self) -> Embedded:
        """Embed images and captions; every process takes its share."""
        images = _shared(range(len(self.pairs)), self._embed_images, self.encoder.embed_dim)
        texts = _shared(range(len(self._texts)), self._embed_texts, self.encoder.embed_dim)
        return Embedded([pair.image for pair in self.pairs], self._texts, self._image_of_text, images, texts)

    def _embed_images(self, rows: Sequence[int]) -> Tensor:
        if self.kept is not None:
            return self.kept.embed(rows)
        images = [self.pairs[row].image for row in rows]
        return self.encoder.encode_images(images, batch_size=self.batch_size, progress=self._reporter("images"))

    def _embed_texts(self, rows: Sequence[int]) -> Tensor:
        # Neighbours in length share a batch: less padding, and the order is put back.
        order = sorted(range(len(rows)), key=lambda place: len(self._texts[rows[place]]))
        texts = [self._texts[rows[place]] for place in order]
        embeds = self.encoder.encode_texts(texts, batch_size=256, progress=self._reporter("captions"))
        return embeds[torch.tensor(order).argsort()] if order else embeds

    def _reporter(self, what: str) -> Callable[[int, int], None] | None:
        progress = self.progress
        return None if progress is None else lambda done, total: progress(what, done, total)


def _shared(rows: range, embed: Callable[[Sequence[int]], Tensor], embed_dim: int) -> Tensor:
    """Embed rows r, r + W, ... on process r of W and put everybody's together."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return embed(rows)
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    each = -(-len(rows) // processes)
    part = torch.zeros(each, embed_dim)
    own = rows[rank::processes]
    part[: len(own)] = embed(own)
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    everything = gather(part.to(device)).cpu().view(processes, each, embed_dim)
    return everything.transpose(0, 1).flatten(0, 1)[: len(rows)]
