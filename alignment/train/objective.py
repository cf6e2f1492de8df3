"""The contrastive step: embed a batch, gather it across processes, score it, send the gradient back.

Place in the flow: `examples -> objective (here) -> optimiser`, called by `trainer` once a step. Two things make batches
large: every process contrasts its part with everybody's (`gather`), and a batch too large for the memory is embedded in
chunks, twice (`backward`), which gives the very gradient of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx

from alignment.losses import sigmoid_loss, softmax_loss

Loss = Literal["softmax", "sigmoid"]
LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class Batch:
    """What one process embeds in one step.

    Attributes:
        images: inputs of the image side, num_images rows each.
        texts: inputs of the text side, num_texts rows each; a whole number of texts an image, image by image.
        rows: (num_images,) int64, which image of the data set each is.
        captions: (num_texts,) int64, which caption of the data set each is.
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    rows: Tensor
    captions: Tensor

    def chunks(self, size: int) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Part the inputs into `size` images and their texts at a time."""
        each = len(self.captions) // len(self.rows)
        for start in range(0, len(self.rows), size):
            images, texts = slice(start, start + size), slice(start * each, (start + size) * each)
            yield (
                {name: value[images] for name, value in self.images.items()},
                {name: value[texts] for name, value in self.texts.items()},
            )


class Objective:
    """The loss of a batch, and how its gradient reaches the weights.

    Args:
        towers: embeds `(images, texts)` as unit-norm float32 `(image_embeds, text_embeds)`; its attributes
            `logit_scale` (a logarithm) and `logit_bias` (or None) are parameters.
        positive_mask: says of image rows and caption numbers which pairs are `(positives, ignored)`, both bool
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
        """Add the gradient of the joint batch of all processes to the weights, averaged over nothing.

        A batch of several chunks is embedded without a graph, the loss differentiated down to the embeddings, and each
        chunk embedded again, with the same dropout, to take its share of that gradient on to the weights.

        Args:
            batch: this process's part.
            backward: how a loss is differentiated; the place for a gradient scaler.
            precision: context in which the towers run; the loss is always float32.

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
        self._share_gradients()
        return loss.detach()

    def score(self, image_embeds: Tensor, text_embeds: Tensor, batch: Batch) -> Tensor:
        """Return the loss of everybody's embeddings; those of this process carry their graph."""
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
        images, texts = (torch.cat(side).requires_grad_() for side in zip(*embedded, strict=True))
        loss = self.score(images, texts, batch)
        backward(loss)
        starts = (0, 0)
        for chunk, state in zip(chunks, states, strict=True):
            with _replayed(state), precision():
                again = self.towers(*chunk)
            ends = (starts[0] + len(again[0]), starts[1] + len(again[1]))
            _pass_on(again, (images.grad[starts[0] : ends[0]], texts.grad[starts[1] : ends[1]]))  # type: ignore[index]
            starts = ends
        return loss

    def _share_gradients(self) -> None:
        """Average the weights' gradients over processes.

        Each process differentiates the joint loss down to its own embeddings; `gather` adds what all of them say of
        these, so the average over processes is the gradient of the joint batch.
        """
        if _num_processes() == 1:
            return
        for parameter in self.towers.parameters():
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
                parameter.grad /= _num_processes()


def _pass_on(embeds: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Send the gradients of embeddings on to the weights; a side that is not trained has no use for them."""
    live = [(side, gradient) for side, gradient in zip(embeds, gradients, strict=True) if side.requires_grad]
    if live:
        torch.autograd.backward([side for side, _ in live], [gradient for _, gradient in live])


def gather(tensor: Tensor) -> Tensor:
    """Stack a tensor's (n, ...) of every process, in their order; all must have the same n. Gradients flow back."""
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
    """Draw the same random numbers again, then go on where we were."""
    now = _random_state()
    try:
        _set_random_state(state)
        yield
    finally:
        _set_random_state(now)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1] and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state[1][0])
    elif state[1]:
        torch.cuda.set_rng_state_all(state[1])
