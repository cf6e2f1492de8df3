"""The PyTorch back end: any family, any device, and the only one that computes gradients.

The module is built when first needed, and its state tells whether its weights have changed.
"""

import hashlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from alignment.model.graph_cache import ModelInfo
from alignment.model.tower import Inputs, Kind, features_of


class LazyModule:
    """A transformers model on its device, float32, in evaluation mode."""

    def __init__(self, module: nn.Module | Callable[[], Any], device: torch.device) -> None:
        """Take a model, or a function that loads one when it is first needed."""
        self.device = device
        self.exposed = isinstance(module, nn.Module)  # whether code outside this package may have changed it
        self._load: Callable[[], Any] = (lambda: module) if self.exposed else module
        self._lock = threading.RLock()
        self._module: Any = None
        self._loaded_state: object = None
        self._hashed: tuple[object, str] = (None, "")
        if self.exposed:
            self.get()

    @property
    def is_built(self) -> bool:
        """Whether the model is in memory."""
        return self._module is not None

    def get(self) -> Any:
        """Build the model if need be; the caller must not change it."""
        if self._module is None:  # no lock for readers: another thread may hold it while it exports a graph
            with self._lock:
                if self._module is None:
                    module = self._load().to(self.device).eval()
                    self._loaded_state = _state_token(module)
                    self._module = module
        return self._module

    @property
    def is_changed(self) -> bool:
        """Whether the weights differ from those that were loaded, other than through `.data`."""
        return self.exposed and self.is_built and _state_token(self._module) != self._loaded_state

    def fingerprint(self) -> str:
        """Hash the weights; again only if they have changed."""
        token = _state_token(self.get())
        if self._hashed[0] != token:
            self._hashed = (token, weights_sha256(self._module.state_dict()))
        return self._hashed[1]

    def info(self) -> ModelInfo:
        """Read what serving needs to know, without the fingerprint, which takes long to compute."""
        module = self.get()
        config, bias = module.config, getattr(module, "logit_bias", None)
        return ModelInfo(
            fingerprint="",
            logit_scale=float(module.logit_scale.detach().exp()),
            logit_bias=None if bias is None else float(bias.detach()),
            embed_dim=int(getattr(config, "projection_dim", None) or config.text_config.projection_size),
        )

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off, and back on afterwards if the model is being trained."""
        module = self.get()
        training = module.training
        module.eval()
        try:
            yield
        finally:
            module.train(training)


def _state_token(module: nn.Module) -> object:
    """Read what changes with the weights."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in module.state_dict().values())


def weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class TorchTower:
    """One side of a dual encoder, run by PyTorch."""

    backend = "torch"

    def __init__(self, module: LazyModule, kind: Kind) -> None:
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
            return (self.embed(inputs) if device == "cpu" else embed_in_half(self.embed, inputs, device)).cpu()

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
