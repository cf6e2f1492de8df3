"""The PyTorch back end: any family, any device, and the only one that computes gradients."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.model.module import LazyModule
from alignment.model.tower import Inputs, Kind, features_of


class TorchTower:
    """One side of a dual encoder, run by PyTorch."""

    backend = "torch"

    def __init__(self, module: LazyModule, kind: Kind) -> None:
        """Take the model and the side to run."""
        self.module, self.kind = module, kind

    def embed(self, inputs: Inputs) -> Tensor:
        """Embed a batch on the device, with gradients if these are enabled: (n, embed_dim) float32, unit norm."""
        moved = {name: self._moved(tensor) for name, tensor in inputs.items()}
        features = features_of(self.module.get(), self.kind)(**moved).pooler_output
        return functional.normalize(features.float(), dim=-1)

    def _moved(self, tensor: Tensor) -> Tensor:
        device = self.module.device
        if tensor.dim() == 4 and not torch.is_grad_enabled():  # the fastest layout for convolutions; training chooses
            return tensor.to(device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(device, non_blocking=True)

    def __call__(self, inputs: Inputs) -> Tensor:
        """Embed a batch: (n, embed_dim) float32, CPU, unit norm."""
        device = self.module.device.type
        with self.module.evaluating(), torch.no_grad():
            embeds = self.embed(inputs) if device == "cpu" else embed_in_half(self.embed, inputs, device)
            return embeds.cpu()

    def stream(self, batches: Iterable[Inputs]) -> Generator[Tensor]:
        """Embed batch after batch."""
        yield from map(self, batches)


class TracedSide(nn.Module):
    """One side of a dual encoder as a function of its inputs in order, for export."""

    def __init__(self, module: nn.Module, kind: Kind, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.kind, self.names = module, kind, tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """Embed (n, ...) as (n, embed_dim), unit norm."""
        features = features_of(self.module, self.kind)(**dict(zip(self.names, tensors, strict=True))).pooler_output
        return functional.normalize(features.float(), dim=-1)


def embed_in_half(embed: Callable[[Inputs], Tensor], inputs: Inputs, device_type: str) -> Tensor:
    """Compute in half precision with float32 weights; a batch that overflows is computed again in float32."""
    with torch.autocast(device_type, dtype=torch.float16):
        embeds = embed(inputs)
    return embeds if bool(embeds.isfinite().all()) else embed(inputs)


def pinned(items: Sequence[Inputs]) -> dict[str, Tensor]:
    """Join single items to a batch in pinned memory, from which a GPU copies while it computes."""
    batch = {}
    for name, first in items[0].items():
        shape = sum(len(item[name]) for item in items), *first.shape[1:]
        place = torch.empty(shape, dtype=first.dtype, pin_memory=True)
        batch[name] = torch.cat([item[name] for item in items], out=place)
    return batch
