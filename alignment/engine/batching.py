"""Dynamic batching: requests that arrive while the encoder is busy are encoded together afterwards.

Place in the flow: `several visitors -> DynamicBatcher (here) -> encoder -> embeddings of each request`. There is no
worker thread and no waiting time: a request that finds the encoder idle is encoded at once. The requests that arrive
meanwhile wait, and one of their threads then encodes all of them in one batch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

TEXTS_AT_ONCE = 32
IMAGES_AT_ONCE = {"cpu": 1}
"""Pictures by device, `MORE_IMAGES` on any other. Together they take a CPU as long as one by one, and the first of them
would wait for the last; of eight captions each takes half of what it takes alone."""

MORE_IMAGES = 32


class _Request(Generic[Item]):
    """What one caller wants, and in the end its embeddings or the reason why there are none."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items
        self.embeds: Tensor | None = None
        self.error: Exception | None = None

    @property
    def answered(self) -> bool:
        return self.embeds is not None or self.error is not None

    def answer(self) -> Tensor:
        if self.embeds is None:
            raise self.error or RuntimeError("The request has not been answered yet.")
        return self.embeds


class DynamicBatcher(Generic[Item]):
    """An encoder that several threads may ask at once; it runs once at a time, for as many of them as wait.

    Answers are those that each request would get alone, exceptions too: where a batch fails, its requests are encoded
    one by one. Whoever is interrupted while encoding for others leaves these to the next.
    """

    def __init__(self, encode: Callable[[Sequence[Item]], Tensor], max_batch: int) -> None:
        """Take requests for an encoder.

        Args:
            encode: items -> (n, embed_dim), in their order.
            max_batch: items that are put together; a single request may have more.
        """
        self._encode, self.max_batch = encode, max_batch
        self._changed = threading.Condition()  # guards what follows
        self._waiting: deque[_Request[Item]] = deque()
        self._running: _Request[Item] | None = None  # whose thread encodes

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Encode items, perhaps together with those of others; (n, embed_dim). Raises what the encoder does."""
        request = _Request(items)
        try:
            with self._changed:
                self._waiting.append(request)
            while not request.answered:
                self._take_turn(request)
        finally:
            with self._changed:
                if request in self._waiting:  # interrupted
                    self._waiting.remove(request)
        return request.answer()

    def _take_turn(self, own: _Request[Item]) -> None:
        """Wait until nothing runs, then encode for those who came first; nothing is left to do if one's own is done."""
        batch: list[_Request[Item]] = []
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._running is None or own.answered)
                if own.answered:
                    return
                self._running = own
                batch = self._next_batch()
            self._answer(batch)
        finally:
            with self._changed:
                if self._running is own:
                    self._waiting.extendleft(request for request in reversed(batch) if not request.answered)
                    self._running = None
                    self._changed.notify_all()

    def _next_batch(self) -> list[_Request[Item]]:
        batch = [self._waiting.popleft()]
        size = len(batch[0].items)
        while self._waiting and size + len(self._waiting[0].items) <= self.max_batch:
            batch.append(self._waiting.popleft())
            size += len(batch[-1].items)
        return batch

    def _answer(self, batch: Sequence[_Request[Item]]) -> None:
        try:
            embeds = self._encode([item for request in batch for item in request.items])
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = error
                return
            for request in batch:  # one of them is to blame, and the others are not to suffer for it
                self._answer([request])
            return
        for request, own in zip(batch, embeds.split([len(request.items) for request in batch]), strict=True):
            request.embeds = torch.clone(own)  # a view would keep everybody's in memory
