"""The PyTorch module of a dual encoder: built when first needed, with the state that tells whether it has changed."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from alignment.model.graph_cache import ModelInfo


class LazyModule:
    """A transformers model on its device, float32, in evaluation mode.

    Attributes:
        device: where it lies.
        exposed: whether code outside this package may have changed it.
    """

    def __init__(self, module: nn.Module | Callable[[], Any], device: torch.device) -> None:
        """Take a model, or a function that loads one when it is first needed."""
        self.device = device
        self.exposed = isinstance(module, nn.Module)
        self._lock = threading.RLock()
        self._module: Any = None
        self._hashed: tuple[object, str] = (None, "")
        if isinstance(module, nn.Module):
            self._take(module)
        else:
            self._load = module

    def _take(self, module: Any) -> None:
        module = module.to(self.device).eval()
        self._as_loaded = _state_token(module)
        self._module = module

    @property
    def is_built(self) -> bool:
        """Whether the model is in memory."""
        return self._module is not None

    def get(self) -> Any:
        """Build the model if need be; the caller must not change it."""
        if self._module is None:  # no lock for readers: another thread may hold it while it exports a graph
            with self._lock:
                if self._module is None:
                    self._take(self._load())
        return self._module

    @property
    def is_changed(self) -> bool:
        """Whether the weights differ from those that were loaded, other than through `.data`."""
        return self.exposed and self._module is not None and _state_token(self._module) != self._as_loaded

    def fingerprint(self) -> str:
        """Hash the weights; again only if they have changed."""
        module = self.get()
        token = _state_token(module)
        if self._hashed[0] != token:
            self._hashed = (token, weights_sha256(module.state_dict()))
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
    def evaluating(self) -> Iterator[Any]:
        """Switch dropout off, and back on afterwards if the model is being trained."""
        module = self.get()
        training = module.training
        module.eval()
        try:
            yield module
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
