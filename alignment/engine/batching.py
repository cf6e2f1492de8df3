"""Dynamic batching: requests that arrive while the encoder is busy are encoded together afterwards.

Place in the flow: `several visitors -> DynamicBatcher (here) -> encoder -> embeddings of each request`. There is no
worker thread and no waiting time: a request that finds the encoder idle is encoded at once. The requests that arrive
meanwhile wait, and one of their threads then encodes all of them in one batch.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")

TEXTS_AT_ONCE = 32
# By device. A CPU takes as long for several pictures together as one by one, and the first would wait for the last;
# eight captions together take half the time that they take one by one.
IMAGES_AT_ONCE, MORE_IMAGES = {"cpu": 1}, 32


class _Request(Future[Tensor], Generic[Item]):
    """The items of one caller, and in the end their embeddings or an exception."""

    def __init__(self, items: Sequence[Item]) -> None:
        super().__init__()
        self.items = items


class DynamicBatcher(Generic[Item]):
    """An encoder that several threads may call at once; it runs once at a time, on the requests that wait.

    Each request gets the embeddings or the exception that it would get alone: if a batch fails, its requests are
    encoded one by one. If a thread is interrupted while it encodes for others, the next thread takes their requests.
    """

    def __init__(self, encode: Callable[[Sequence[Item]], Tensor], max_batch: int) -> None:
        """Wrap an encoder, items -> (n, embed_dim); a single request may have more than `max_batch` items."""
        self._encode, self.max_batch = encode, max_batch
        self._changed = threading.Condition()  # guards the attributes below
        self._waiting: deque[_Request[Item]] = deque()
        self._running: _Request[Item] | None = None  # the request whose thread encodes

    def __call__(self, items: Sequence[Item]) -> Tensor:
        """Encode items, perhaps in a batch with others; (n, embed_dim). Raises what the encoder raises."""
        request = _Request(items)
        try:
            with self._changed:
                self._waiting.append(request)
            while not request.done():
                self._take_turn(request)
        finally:
            with self._changed:
                if request in self._waiting:  # interrupted
                    self._waiting.remove(request)
        return request.result()

    def _take_turn(self, own: _Request[Item]) -> None:
        """Wait until `own` is answered or the encoder is idle, then encode the requests that came first."""
        batch: list[_Request[Item]] = []
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._running is None or own.done())
                if own.done():
                    return
                self._running = own
                batch = self._next_batch()
            self._answer(batch)
        finally:
            with self._changed:
                if self._running is own:
                    self._waiting.extendleft(request for request in reversed(batch) if not request.done())
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
                batch[0].set_exception(error)
                return
            for request in batch:  # retry one by one to isolate the failing request
                self._answer([request])
            return
        if len(batch) == 1:
            batch[0].set_result(embeds)
            return
        for request, own in zip(batch, embeds.split([len(request.items) for request in batch]), strict=True):
            request.set_result(torch.clone(own))  # a view would keep the whole batch in memory
