"""What is trained: everything, everything but the image tower, heads alone, or low-rank adapters.

Place in the flow: `model -> presets (here) -> trainer`. The dual encoder goes in whole and comes out with some of its
weights frozen, behind the one module (`Towers`) that the training loop sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from alignment.model import DualEncoder
from alignment.train.feature_cache import FreezePoint, find_freeze_point, random_window

Preset = Literal["full", "lit", "heads", "lora"]

_IMAGE_SIDE = ("vision_model.", "visual_projection.")
# Heads: the layers after the towers. Those of the compact model and SigLIP's pooling lie inside the tower.
_HEADS = ("visual_projection.", "text_projection.", "vision_model.head.", "text_model.head.", "logit_")
_LORA_RANK = 8


def apply_preset(encoder: DualEncoder, preset: Preset) -> None:
    """Freeze what the preset does not train.

    - full: all weights, but for those that a tower of ours holds as they are (`held` in `towers`);
    - lit: the text side alone, against a locked image tower;
    - heads: the projections (or what stands for them) and the scale;
    - lora: low-rank adapters in every linear layer of both towers, and the heads; `merge_lora` ends it.

    Raises:
        ValueError: when the model has nothing of the kind to train.

    Source: LiT, Zhai et al. 2022; LoRA, Hu et al. 2021.
    """
    module = encoder.module
    held = _held(module)
    for name, weight in module.named_parameters():
        weight.requires_grad_(_is_trained(name, preset) and not name.startswith(held))
    if preset == "lora":
        _add_lora(module)
    if not any(weight.requires_grad for name, weight in module.named_parameters() if not name.startswith("logit_")):
        raise ValueError(f"{encoder.name} has no weights that preset {preset!r} would train; choose another preset.")


def _is_trained(name: str, preset: Preset) -> bool:
    if preset == "full":
        return True
    if preset == "lit":
        return not name.startswith(_IMAGE_SIDE)
    return name.startswith(_HEADS)


def _held(module: Any) -> tuple[str, ...]:
    """List the beginnings of the names of what the towers hold as it is."""
    sides = {side: module.get_submodule(side) for side in ("vision_model", "text_model")}
    return tuple(f"{side}.{name}" for side, tower in sides.items() for name in getattr(tower, "held", ()))


def _add_lora(module: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    linear = [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and not f"{name}.".startswith(_HEADS + _held(module))
    ]
    if not linear:
        raise ValueError("This model has no linear layers outside its heads; choose another preset than 'lora'.")
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    inject_adapter_in_model(LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, target_modules=linear), module)
    for name, weight in module.named_parameters():  # peft froze the heads
        if name in trained:
            weight.requires_grad_(True)


def merge_lora(module: Any) -> None:
    """Add the adapters to the weights they adapt and take them away; a module without any is left alone."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


def checkpoint_activations(encoder: DualEncoder) -> None:
    """Keep less of the forward pass and compute it again on the way back.

    Raises:
        ValueError: when the model has no layers that can.
    """
    module = encoder.module
    try:
        for part in [module] if module.supports_gradient_checkpointing else [module.vision_model, module.text_model]:
            part.activation_checkpointing_enable()
    except ValueError as error:
        raise ValueError(
            f"{encoder.name} cannot compute its layers twice; leave --gradient-checkpointing out and save memory with "
            "--chunk-size."
        ) from error


class Towers(nn.Module):
    """The dual encoder as the training loop sees it: a batch in, two sets of embeddings out.

    Frozen parts stay in evaluation mode, and so does batch normalisation everywhere: its pretrained statistics are
    better than those of a small batch, and a gradient in chunks would not be that of the whole with statistics of its
    own for each chunk.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.module = encoder.module
        self._encoder = encoder
        self._cut: FreezePoint | None = None
        self._augment = False

    @property
    def logit_scale(self) -> Tensor:
        """Logarithm of the multiplier."""
        scale: Tensor = self.module.logit_scale
        return scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the logits, if the model has it."""
        bias: Tensor | None = getattr(self.module, "logit_bias", None)
        return bias

    def cache_features(self, *, augment: bool) -> FreezePoint | None:
        """From now on expect kept images, if some beginning of the image side is frozen; return where it was cut."""
        self._cut, self._augment = find_freeze_point(self._encoder), augment
        return self._cut

    def forward(self, images: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed both sides of a batch, each (n, embed_dim), unit norm."""
        return self._embed_images(images), self._encoder.embed_texts(texts)

    def _embed_images(self, images: Mapping[str, Tensor]) -> Tensor:
        if self._cut is None:
            return self._encoder.embed_images(images)
        return self._cut.after(random_window(images) if self._augment and self.training else images)

    def train(self, mode: bool = True) -> Towers:
        """Switch dropout on in what is trained."""
        super().train(mode)
        for layer in self.modules():
            weights = list(layer.parameters())
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) or (
                weights and not any(weight.requires_grad for weight in weights)
            ):
                layer.eval()
        return self


def weight_groups(module: nn.Module, *, rate: float, head_rate: float, weight_decay: float) -> list[dict[str, Any]]:
    """Part the trained weights by learning rate and decay; vectors and scalars (norms, biases, the scale) have none."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, weight in module.named_parameters():
        if weight.requires_grad:
            head = name.startswith(_HEADS) or "lora_" in name
            groups.setdefault((head, weight.ndim > 1), []).append(weight)
    return [
        {"params": weights, "lr": head_rate if head else rate, "weight_decay": weight_decay if decayed else 0.0}
        for (head, decayed), weights in groups.items()
    ]


def trained_names(module: nn.Module) -> Sequence[str]:
    """List the weights that training changes."""
    return [name for name, weight in module.named_parameters() if weight.requires_grad]


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copy the weights to the CPU, to come back to."""
    with torch.no_grad():
        return {name: weight.detach().cpu().clone() for name, weight in module.named_parameters()}
