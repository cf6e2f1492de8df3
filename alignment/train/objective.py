"""The contrastive step: embed a batch, gather it across processes, compute the loss, backpropagate.

Called by `trainer` once a step. Every process contrasts its part with those of all (`gather`), and a batch too large
for memory is embedded in chunks, twice, which gives the exact gradient of the whole batch.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx
from torch.utils.checkpoint import checkpoint

from alignment.losses import sigmoid_loss, softmax_loss
from alignment.similarity import logits_per_image
from alignment.train.config import Loss

LOSSES = {"softmax": softmax_loss, "sigmoid": sigmoid_loss}


@dataclass(frozen=True)
class Batch:
    """The part of a batch that one process embeds.

    Attributes:
        images: inputs of the image side, num_images rows each.
        texts: inputs of the text side, num_texts rows each; the same number of texts for every image, image by image.
        rows, captions: (num_images,) and (num_texts,) int64, the number of each image and caption in the data set.
    """

    images: Mapping[str, Tensor]
    texts: Mapping[str, Tensor]
    rows: Tensor
    captions: Tensor

    def chunks(self, size: int) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
        """Split the inputs into `size` images and their texts at a time."""
        each = len(self.captions) // len(self.rows)
        for start in range(0, len(self.rows), size):
            end = start + size
            yield (
                {name: value[start:end] for name, value in self.images.items()},
                {name: value[start * each : end * each] for name, value in self.texts.items()},
            )


class Objective:
    """The loss of a batch and its backward pass.

    `towers` and `positive_mask` are those of `Towers` and `CaptionIndex`; `chunk_size` images are in memory together,
    the whole batch when None.
    """

    def __init__(
        self,
        towers: Any,
        positive_mask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        *,
        loss: Loss = "softmax",
        chunk_size: int | None = None,
    ) -> None:
        self.towers, self.positive_mask, self.loss, self.chunk_size = towers, positive_mask, LOSSES[loss], chunk_size

    def backward(
        self,
        batch: Batch,
        backward: Callable[[Tensor], None] = Tensor.backward,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Tensor:
        """Add the gradient of the joint batch of all processes to the weights, and return the loss.

        `backward` differentiates a loss, perhaps scaled; `precision` is the autocast context of the towers alone.

        Source: as GradCache, Gao et al. 2021, by checkpointing; gradients through the gathering as in open_clip's
        `gather_with_grad`.
        """
        chunks = list(batch.chunks(self.chunk_size or len(batch.rows)))
        with precision():
            embedded = [self._embed(*chunk) if len(chunks) > 1 else self.towers(*chunk) for chunk in chunks]
        images, texts = (torch.cat(side) for side in zip(*embedded, strict=True))
        loss = self.score(images, texts, batch)
        backward(loss)
        self._average_gradients()
        return loss.detach()

    def _embed(self, images: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> Any:
        """Embed a chunk that is embedded again, with the same dropout, when its gradient is due."""
        # The scale is an argument so that the random state of its device is restored, too.
        scale = self.towers.logit_scale
        return checkpoint(lambda *inputs: self.towers(*inputs[:2]), images, texts, scale, use_reentrant=False)

    def score(self, image_embeds: Tensor, text_embeds: Tensor, batch: Batch) -> Tensor:
        """Return the loss over the embeddings of all processes; those of this process carry their graph."""
        images, texts = gather(image_embeds), gather(text_embeds)
        positives, ignored = self.positive_mask(gather(batch.rows), gather(batch.captions))
        logits = logits_per_image(images @ texts.T, self.towers.logit_scale.exp(), self.towers.logit_bias)
        return self.loss(logits, positives.to(logits.device), ignored=ignored.to(logits.device))

    def _average_gradients(self) -> None:
        """Average the gradients over processes; `gather` has summed those of the joint loss over them."""
        if num_processes() == 1:
            return
        for weight in filter(lambda weight: weight.requires_grad, self.towers.parameters()):
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            distributed.all_reduce(weight.grad)
            weight.grad /= num_processes()


def gather(tensor: Tensor) -> Tensor:
    """Concatenate a tensor (n, ...) of all processes by rank, n being equal on all; gradients flow back."""
    if num_processes() == 1:
        return tensor
    return _Gather.apply(tensor)


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


def num_processes() -> int:
    """Count the processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
