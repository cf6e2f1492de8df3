"""Many pictures on a GPU that is lent for seconds at a time, as Hugging Face's ZeroGPU does; the rest stays on the CPU.

Place in the flow: `batches of pictures -> a few large ones -> lent GPU (here) -> embeddings`; private to the encoder.
To be lent the GPU costs a second and comes out of the visitor's quota, so it has to be worth it: captions, and up to
`FEW` pictures, are encoded by the CPU's graphs in less. Nor is the GPU lent to whoever has no visitor, as at the start.

ZeroGPU's package `spaces` pretends that there is CUDA, and runs a function that it has wrapped in a process forked off
this one, where there is. What goes in and comes out is pickled, and nothing else comes back. A process that has once
asked the driver anything cannot fork off one that finds a GPU.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Inputs = Mapping[str, Tensor]
Encode = Callable[[Inputs], Tensor]
Result = TypeVar("Result")
Arrays = dict[str, np.ndarray[Any, Any]]

FEW = 7
"""Pictures that the CPU encodes sooner than a GPU is lent."""

MANY = 64
"""Pictures that go there together, some 0.6 MB each."""

_HERE = 8  # pictures at a time where they are encoded here after all
SECONDS = 10
"""What is asked for; less is used, and less asked for lets a visitor with little quota left have it."""


def is_lent() -> bool:
    """Whether this is ZeroGPU, and its package in place: imported before torch, see `app.py`."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true") and "spaces" in sys.modules


def ask_no_driver() -> None:
    """Answer in the driver's place what transformers asks at every caption and `spaces` does not: whether CUDA records.

    Before a model is run. Nothing is ever recorded here, and the driver's own answer would cost all GPUs, see above.
    """
    torch.cuda.is_current_stream_capturing = lambda: False


def together(few: int, many: int = 16) -> int:
    """Tell how many of a visitor's pictures to bring at a time: `few`, or `many` where that makes a GPU worth it."""
    return many if is_lent() else few


def apart(work: Callable[[], Result]) -> Result:
    """Do something in a thread of its own: where `spaces` was imported nothing can be traced, for its pretending."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class LentTower:
    """An image tower that borrows a GPU for many pictures, and does with the CPU for few or if it gets none."""

    is_wide = True

    def __init__(self, gpu: Encode, cpu: Encode) -> None:
        """Announce to ZeroGPU what will be run there; before the page is served.

        Args:
            gpu: embeds a batch on the device "cuda"; run in another process.
            cpu: embeds a batch here.
        """
        self._gpu, self._cpu = gpu, cpu
        self._borrow: Callable[[Arrays], np.ndarray[Any, Any]] = sys.modules["spaces"].GPU(
            self._run_there, duration=SECONDS
        )

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch: (n, embed_dim) float32, CPU, unit norm."""
        if _count(inputs) <= FEW:
            return self._cpu(inputs)
        try:
            return torch.from_numpy(self._borrow({name: tensor.numpy() for name, tensor in inputs.items()}))
        except Exception as error:  # no GPU free, no quota left, a worker that died: all of them Gradio's to say
            logger.warning("No GPU was lent, so the CPU encodes %d pictures: %s", _count(inputs), error)
            return torch.cat([self._cpu(part) for part in _parted(inputs)])

    def many(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch, put together to few large ones."""
        for inputs in _gathered(batches):
            yield self(inputs)

    def _run_there(self, arrays: Arrays) -> np.ndarray[Any, Any]:
        torch.set_num_threads(1)  # the threads of the process that this one was forked off are not here
        return self._gpu({name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


def _count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _gathered(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Join batches until they hold `MANY` pictures."""
    waiting: list[Inputs] = []
    for inputs in batches:
        waiting.append(inputs)
        if sum(map(_count, waiting)) >= MANY:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _parted(inputs: Inputs) -> Iterator[Inputs]:
    for start in range(0, _count(inputs), _HERE):
        yield {name: tensor[start : start + _HERE] for name, tensor in inputs.items()}


def _joined(batches: list[Inputs]) -> Inputs:
    return {name: torch.cat([inputs[name] for inputs in batches]) for name in batches[0]}
