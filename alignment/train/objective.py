"""The contrastive step: embed a batch, gather it across processes, compute the loss, backpropagate.

Place in the flow: `dataset -> objective (here) -> optimiser`, called by `trainer` once a step. Two methods make large
batches possible: every process contrasts its part with those of all (`gather`), and a batch too large for memory is
embedded in chunks, twice (`Objective.backward`), which gives the exact gradient of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx

from alignment.losses import sigmoid_loss, softmax_loss
from alignment.train.config import Loss

LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class Batch:
    """The part of a batch that one process embeds.

    Attributes:
        images: inputs of the image side, num_images rows each.
        texts: inputs of the text side, num_texts rows each; the same number of texts for every image, image by image.
        rows: (num_images,) int64, index of each image in the data set.
        captions: (num_texts,) int64, number of each caption in the data set.
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    rows: Tensor
    captions: Tensor

    def chunks(self, size: int) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Split the inputs into `size` images and their texts at a time."""
        texts_per_image = len(self.captions) // len(self.rows)
        for start in range(0, len(self.rows), size):
            images = slice(start, start + size)
            texts = slice(start * texts_per_image, (start + size) * texts_per_image)
            yield (
                {name: value[images] for name, value in self.images.items()},
                {name: value[texts] for name, value in self.texts.items()},
            )


class Objective:
    """The loss of a batch and its backward pass.

    Args:
        towers: embeds `(images, texts)` as unit-norm float32 `(image_embeds, text_embeds)`; its attributes
            `logit_scale` (a logarithm) and `logit_bias` (or None) are parameters.
        positive_mask: returns `(positives, ignored)` of image rows and caption numbers, both bool
            (num_images, num_texts).
        loss: "softmax" or "sigmoid".
        chunk_size: images in memory together; the whole batch when None.
    """

    def __init__(
        self,
        towers: Any,
        positive_mask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        loss: Loss = "softmax",
        chunk_size: int | None = None,
    ) -> None:
        self.towers = towers
        self.positive_mask = positive_mask
        self.loss = LOSSES[loss]
        self.chunk_size = chunk_size

    def backward(
        self,
        batch: Batch,
        backward: Callable[[Tensor], None] = Tensor.backward,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Add the gradient of the joint batch of all processes to the weights.

        With several chunks, the batch is embedded without a graph, the loss is differentiated down to the embeddings,
        and each chunk is embedded again, with the same dropout, to backpropagate its part of that gradient.

        Args:
            batch: this process's part.
            backward: differentiates a loss; a gradient scaler goes here.
            precision: autocast context of the towers; the loss is always float32.

        Returns:
            The loss, a scalar without a graph; the same on every process.

        Source: gradient cache, Gao et al. 2021; gradients through the gathering as in open_clip's `gather_with_grad`.
        """
        chunks = list(batch.chunks(self.chunk_size or len(batch.rows)))
        if len(chunks) == 1:
            with precision():
                images, texts = self.towers(*chunks[0])
            loss = self.score(images, texts, batch)
            backward(loss)
        else:
            loss = self._in_chunks(chunks, batch, backward, precision)
        self._average_gradients()
        return loss.detach()

    def score(self, image_embeds: Tensor, text_embeds: Tensor, batch: Batch) -> Tensor:
        """Return the loss over the embeddings of all processes; those of this process carry their graph."""
        images, texts = gather(image_embeds), gather(text_embeds)
        positives, ignored = self.positive_mask(gather(batch.rows), gather(batch.captions))
        logits = images @ texts.T * self.towers.logit_scale.exp()
        if self.towers.logit_bias is not None:
            logits = logits + self.towers.logit_bias
        return self.loss(logits, positives.to(logits.device), ignored=ignored.to(logits.device))

    def _in_chunks(
        self,
        chunks: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]],
        batch: Batch,
        backward: Callable[[Tensor], None],
        precision: Callable[[], AbstractContextManager[Any]],
    ) -> Tensor:
        states, embedded = [], []
        with torch.no_grad(), precision():
            for chunk in chunks:
                states.append(_random_state())
                embedded.append(self.towers(*chunk))
        joint = [torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True)]
        loss = self.score(joint[0], joint[1], batch)
        backward(loss)
        sizes = [[len(side) for side in part] for part in embedded]
        gradients = [
            whole.grad.split(lengths)  # type: ignore[union-attr]
            for whole, lengths in zip(joint, zip(*sizes, strict=True), strict=True)
        ]
        for chunk, state, *parts in zip(chunks, states, *gradients, strict=True):
            with _replayed(state), precision():
                again = self.towers(*chunk)
            # A frozen side has no graph.
            trained = [(side, part) for side, part in zip(again, parts, strict=True) if side.requires_grad]
            if trained:
                torch.autograd.backward([side for side, _ in trained], [part for _, part in trained])
        return loss

    def _average_gradients(self) -> None:
        """Average the gradients over processes.

        Each process differentiates the joint loss down to its own embeddings, and `gather` sums these gradients over
        the processes; their average over processes is the gradient of the joint batch.
        """
        if _num_processes() == 1:
            return
        for parameter in self.towers.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
                parameter.grad /= _num_processes()


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (n, ...) of all processes by rank, n being equal on all; gradients flow back."""
    if _num_processes() == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        distributed.all_reduce(grad)
        return grad.chunk(distributed.get_world_size())[distributed.get_rank()]


def _num_processes() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _random_state() -> tuple[Tensor, list[Tensor]]:
    if torch.backends.mps.is_available():
        return torch.get_rng_state(), [torch.mps.get_rng_state()]
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _replayed(state: tuple[Tensor, list[Tensor]]) -> Iterator[None]:
    """Set an earlier random state, and restore the present one afterwards."""
    present = _random_state()
    try:
        _set_random_state(state)
        yield
    finally:
        _set_random_state(present)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state[1][0])
    elif state[1]:
        torch.cuda.set_rng_state_all(state[1])
