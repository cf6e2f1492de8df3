"""Which weights are trained, and the model as the training loop sees it: `model -> presets (here) -> trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from alignment.model import DualEncoder
from alignment.train.config import Preset
from alignment.train.feature_cache import FreezePoint, find_freeze_point, random_window
from alignment.train.settings import TrainRecipe

_IMAGE_SIDE = ("vision_model.", "visual_projection.")
# Heads: the layers after the towers. Those of the compact model and SigLIP's pooling lie inside the tower.
_HEADS = ("visual_projection.", "text_projection.", "vision_model.head.", "text_model.head.", "logit_")
_LORA_RANK = 8
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def apply_preset(encoder: DualEncoder, preset: Preset) -> None:
    """Freeze the weights that the preset does not train; raises ValueError when none would be trained.

    "full" trains all weights but those that a tower always freezes (`held` in `towers`), "lit" the text side, "heads"
    the projections (or the layers in their place) and the scale, and "lora" low-rank adapters in every linear layer of
    both towers, and the heads.

    Source: LiT, Zhai et al. 2022; LoRA, Hu et al. 2021.
    """
    module = encoder.module
    held = _held(module)
    for name, weight in module.named_parameters():
        is_locked = {"full": False, "lit": name.startswith(_IMAGE_SIDE)}.get(preset, not name.startswith(_HEADS))
        weight.requires_grad_(not is_locked and not name.startswith(held))
    if preset == "lora":
        _add_lora(module)
    if all(name.startswith("logit_") for name in trained_weights(module)):
        raise ValueError(f"{encoder.name} has no weights that preset {preset!r} would train; choose another preset.")


def _held(module: Any) -> tuple[str, ...]:
    """List the name prefixes of the weights that the towers always freeze."""
    sides = ("vision_model", "text_model")
    return tuple(f"{side}.{name}" for side in sides for name in getattr(module.get_submodule(side), "held", ()))


def _add_lora(module: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    outside = _HEADS + _held(module)
    layers = {name: layer for name, layer in module.named_modules() if not f"{name}.".startswith(outside)}
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if not linear:
        raise ValueError("This model has no linear layers outside its heads; choose another preset than 'lora'.")
    heads = trained_weights(module)
    inject_adapter_in_model(LoraConfig(r=_LORA_RANK, lora_alpha=2 * _LORA_RANK, target_modules=linear), module)
    for weight in heads.values():  # peft froze them
        weight.requires_grad_(True)


def merge_lora(module: Any) -> None:
    """Add the adapters to the weights they adapt and remove them; does nothing without adapters."""
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "merge") and hasattr(layer, "get_base_layer"):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.get_base_layer())


def checkpoint_activations(encoder: DualEncoder) -> None:
    """Turn gradient checkpointing on; raises ValueError when the model does not support it."""
    module = encoder.module
    try:
        for part in [module] if module.supports_gradient_checkpointing else [module.vision_model, module.text_model]:
            part.activation_checkpointing_enable()
    except ValueError as error:
        cure = "leave --gradient-checkpointing out and save memory with --chunk-size"
        raise ValueError(f"{encoder.name} cannot compute its layers twice; {cure}.") from error


class Towers(nn.Module):
    """The dual encoder as the training loop sees it: a batch in, two sets of embeddings out.

    Frozen layers stay in evaluation mode, and so does all batch normalisation: its pretrained statistics are better
    than those of a small batch, and statistics per chunk would change the gradient. `state_dict` holds the trained
    weights alone, which is what a checkpoint needs.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__()
        self.module, self._encoder = encoder.module, encoder
        self._freeze_point: FreezePoint | None = None
        self._augment = False

    @property
    def logit_scale(self) -> Any:
        """Logarithm of the multiplier."""
        return self.module.logit_scale

    @property
    def logit_bias(self) -> Any:
        """Bias of the logits; None if the model has none."""
        return getattr(self.module, "logit_bias", None)

    def cache_features(self, *, augment: bool) -> FreezePoint | None:
        """Take cached features as image inputs from now on; returns the freeze point, None if there is none."""
        self._freeze_point, self._augment = find_freeze_point(self._encoder), augment
        return self._freeze_point

    def forward(self, images: Mapping[str, Tensor], texts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Embed both sides of a batch, each (n, embed_dim), unit norm."""
        embed_images = self._freeze_point.after if self._freeze_point else self._encoder.embed_images
        if self._freeze_point and self._augment and self.training:
            images = random_window(images)
        return embed_images(images), self._encoder.embed_texts(texts)

    def train(self, mode: bool = True) -> Towers:
        """Switch the trained layers to training mode."""
        super().train(mode)
        for layer in self.modules():
            trained = [weight.requires_grad for weight in layer.parameters()]
            if (trained and not any(trained)) or isinstance(layer, _BATCH_NORMS):
                layer.eval()
        return self

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Copy the trained weights to the CPU, by their names in the model."""
        return {name: weight.detach().cpu().contiguous() for name, weight in trained_weights(self.module).items()}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Replace the trained weights; raises ValueError when they are of another model or preset."""
        if state_dict.keys() != trained_weights(self.module).keys():
            raise ValueError("The checkpoint is of a run with another model or preset; choose another --output.")
        self.module.load_state_dict(state_dict, strict=False, assign=assign)
        return nn.Module().load_state_dict({})  # neither missing nor unexpected keys


def weight_groups(module: nn.Module, recipe: TrainRecipe) -> list[dict[str, Any]]:
    """Group the trained weights by learning rate and decay; vectors and scalars (norms, biases, scale) get no decay."""
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, weight in trained_weights(module).items():
        is_head, is_matrix = name.startswith(_HEADS) or "lora_" in name, weight.ndim > 1
        rate = recipe.head_learning_rate if is_head else recipe.learning_rate
        group = {"params": [], "lr": rate, "weight_decay": recipe.weight_decay if is_matrix else 0.0}
        groups.setdefault((is_head, is_matrix), group)["params"].append(weight)
    return list(groups.values())


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that training changes, by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copy all weights to the CPU."""
    return {name: weight.detach().cpu().clone() for name, weight in module.named_parameters()}
