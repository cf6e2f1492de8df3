"""What every back end is: a function of one side's inputs, with a faster way for many batches."""

from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

Kind = Literal["image", "text"]
Pooling = Literal["mean", "cls", "pooler"]
Projection = Literal["linear", "mlp", "none"]
Inputs = Mapping[str, Tensor]


class Tower(Protocol):
    """One side of a dual encoder, run by some back end; safe to call from several threads."""

    backend: str
    """"torch", "openvino" or "zerogpu"."""

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch: (n, embed_dim) float32, CPU, unit norm."""

    def stream(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch; the embeddings come in the order of the items, in batches of any size."""


def concatenate(batches: Sequence[Inputs]) -> dict[str, Tensor]:
    """Join the inputs of several batches into one."""
    return {name: torch.cat([inputs[name] for inputs in batches]) for name in batches[0]}


def features_of(module: Any, kind: Kind) -> Any:
    """Look up the method of a transformers dual encoder that computes one side's features."""
    return module.get_image_features if kind == "image" else module.get_text_features
