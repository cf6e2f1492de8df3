"""The ZeroGPU back end: many pictures on a GPU that Hugging Face assigns for seconds; all else stays on the CPU.

Place in the flow: `batches of pictures -> a few large ones -> assigned GPU (here) -> embeddings`. A GPU takes a second
to be assigned and uses up the visitor's quota. Without a visitor, as at the start, no GPU is assigned.

The package `spaces` emulates CUDA in this process and runs wrapped functions in a forked process that has a GPU, unless
this one has called the CUDA driver. Arguments and results are pickled; no other state comes back. The names of `spaces`
and of torch that this depends on are tested in `tests/test_zerogpu.py`.
"""

import logging
import os
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from alignment.model.tower import Inputs, concatenate

logger = logging.getLogger(__name__)

Encode = Callable[[Inputs], Tensor]
Result = TypeVar("Result")
Arrays = dict[str, np.ndarray[Any, Any]]

MAX_CPU_PICTURES = 7  # the CPU encodes these sooner than a GPU is assigned
GPU_BATCH = 64  # pictures in one call to the GPU, some 0.6 MB each
_CPU_BATCH = 8  # pictures at a time when no GPU was assigned
GPU_DEVICE = "cuda"
DURATION_S = 10  # GPU time to ask for; less is used, and a low request suits visitors with little quota left


def on_zerogpu() -> bool:
    """Whether this is ZeroGPU and `spaces` was imported, before torch (see `app.py`)."""
    return os.environ.get("SPACES_ZERO_GPU", "").lower() in ("1", "t", "true") and "spaces" in sys.modules


def patch_cuda_capture() -> None:
    """Stub `is_current_stream_capturing`, which transformers calls for every caption; call this before a model is run.

    A real call initialises CUDA in this process, after which no forked process finds a GPU. Nothing is captured here.
    """
    torch.cuda.is_current_stream_capturing = lambda: False


def chunk_size(few: int, many: int = 16) -> int:
    """Choose how many of a visitor's pictures to encode at a time: `many` where that makes a GPU worth its cost."""
    return many if on_zerogpu() else few


def run_in_thread(work: Callable[[], Result]) -> Result:
    """Run a function in a thread of its own: the main thread, in which `spaces` emulates CUDA, cannot trace a model."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


class ZeroGPUTower:
    """An image tower that uses a GPU for many pictures, and the CPU for few or if no GPU is assigned."""

    backend = "zerogpu"

    def __init__(self, gpu: Encode, cpu: Encode) -> None:
        """Register `gpu`, which is run in another process, with ZeroGPU; call this before the page is served."""
        self.gpu, self._cpu = gpu, cpu
        self.call_gpu: Any = sys.modules["spaces"].GPU(self._run_on_gpu, duration=DURATION_S)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch: (n, embed_dim) float32, CPU, unit norm."""
        if _count(inputs) <= MAX_CPU_PICTURES:
            return self._cpu(inputs)
        try:
            return torch.from_numpy(self.call_gpu({name: tensor.numpy() for name, tensor in inputs.items()}))
        except Exception as error:  # no GPU free, no quota left, a worker that died: Gradio raises all of them
            logger.warning("No GPU was assigned, so the CPU encodes %d pictures: %s", _count(inputs), error)
            parts = zip(*(tensor.split(_CPU_BATCH) for tensor in inputs.values()), strict=True)
            return torch.cat([self._cpu(dict(zip(inputs, part, strict=True))) for part in parts])

    def stream(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch, joined to few large ones."""
        yield from map(self, _gathered(batches))

    def _run_on_gpu(self, arrays: Arrays) -> np.ndarray[Any, Any]:
        torch.set_num_threads(1)  # a forked process has none of its parent's threads
        return self.gpu({name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


def _count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))


def _gathered(batches: Iterable[Inputs]) -> Iterator[Inputs]:
    """Join batches until they hold `GPU_BATCH` pictures."""
    waiting: list[Inputs] = []
    for inputs in batches:
        waiting.append(inputs)
        if sum(map(_count, waiting)) >= GPU_BATCH:
            yield concatenate(waiting)
            waiting = []
    if waiting:
        yield concatenate(waiting)
