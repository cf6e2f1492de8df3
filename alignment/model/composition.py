"""Join any vision tower and any text tower; to everyone else an ordinary dual encoder of transformers.

Place in the flow: `checkpoints -> towers -> ComposedModel (here) -> DualEncoder`. Importing this registers the model,
and the compact model's towers, with transformers' Auto classes.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from alignment import towers  # noqa: F401 - registers the compact model's towers with the Auto classes

Pooling = Literal["mean", "cls", "pooler"]
Projection = Literal["linear", "mlp", "none"]

FRESH_LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's temperature starts before training


class ComposedConfig(PreTrainedConfig):
    """Two towers, how each is pooled, and the projections that join them."""

    model_type = "composed-dual-encoder"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}  # noqa: RUF012 - transformers' protocol

    def __init__(
        self,
        vision_config: dict[str, Any] | PreTrainedConfig | None = None,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        projection_dim: int = 512,
        vision_pooling: Pooling = "pooler",
        text_pooling: Pooling = "mean",
        vision_width: int = 768,
        text_width: int = 768,
        projection: Projection = "linear",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config(vision_config or {"model_type": "vit"})
        self.text_config = _sub_config(text_config or {"model_type": "bert"})
        self.projection_dim = projection_dim
        self.vision_pooling = vision_pooling
        self.text_pooling = text_pooling
        self.vision_width = vision_width
        self.text_width = text_width
        self.projection = projection
        super().__init__(**kwargs)


def _sub_config(config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    # Where a tower once lay on somebody's disk is not written into the composition.
    return AutoConfig.for_model(**{name: value for name, value in config.items() if name != "_name_or_path"})


@dataclass
class ComposedOutput(ModelOutput):
    """What transformers' dual encoders return from `forward`, without the loss."""

    logits_per_image: Tensor | None = None
    logits_per_text: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None


class MlpProjection(nn.Module):
    """A linear projection and a two-layer correction to it."""

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, embed_dim, bias=False)
        self.hidden = nn.Linear(width, 2 * embed_dim)
        self.out = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project (n, width) to (n, embed_dim)."""
        projected: Tensor = self.linear(features) + self.out(functional.gelu(self.hidden(features)))
        return projected


def _projection(config: ComposedConfig, width: int) -> nn.Module:
    if config.projection == "mlp":
        return MlpProjection(width, config.projection_dim)
    if config.projection == "linear":
        return nn.Linear(width, config.projection_dim, bias=False)
    if config.projection == "none":  # towers that already speak the shared space, such as the compact model's
        if width != config.projection_dim:
            raise ValueError(f"A tower of width {width} needs a projection to width {config.projection_dim}.")
        return nn.Identity()
    raise ValueError(f"There is no projection {config.projection!r}: choose 'linear', 'mlp' or 'none'.")


class ComposedModel(PreTrainedModel):
    """Any vision tower and any text tower, joined; an ordinary transformers dual encoder to everyone else."""

    config_class = ComposedConfig
    base_model_prefix = "composed"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: ComposedConfig, vision_model: Any = None, text_model: Any = None) -> None:
        super().__init__(config)
        self.vision_model = vision_model if vision_model is not None else build_tower(config.vision_config)
        self.text_model = text_model if text_model is not None else build_tower(config.text_config)
        self.visual_projection = _projection(config, config.vision_width)
        self.text_projection = _projection(config, config.text_width)
        self.logit_scale = nn.Parameter(torch.tensor(FRESH_LOGIT_SCALE))
        self.post_init()

    def get_image_features(
        self, pixel_values: Tensor | None = None, **inputs: Tensor | None
    ) -> BaseModelOutputWithPooling:
        """Project pictures into the shared space: `pooler_output`, un-normalised."""
        inputs["pixel_values"] = pixel_values
        states, pooled = pool_tower(self.vision_model, self.config.vision_pooling, inputs, "pixel_attention_mask")
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.visual_projection(pooled))

    def get_text_features(self, input_ids: Tensor, **inputs: Tensor | None) -> BaseModelOutputWithPooling:
        """Project captions into the shared space: `pooler_output`, un-normalised."""
        inputs["input_ids"] = input_ids
        states, pooled = pool_tower(self.text_model, self.config.text_pooling, inputs, "attention_mask")
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=self.text_projection(pooled))

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> ComposedOutput:
        """Score every picture against every caption."""
        images = self.get_image_features(
            pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
        )
        texts = self.get_text_features(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        image_embeds = functional.normalize(images.pooler_output, dim=-1)
        text_embeds = functional.normalize(texts.pooler_output, dim=-1)
        logits_per_image = image_embeds @ text_embeds.T * self.logit_scale.exp()
        return ComposedOutput(logits_per_image, logits_per_image.T, image_embeds, text_embeds)


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModel.register(ComposedConfig, ComposedModel, exist_ok=True)


def auto_class(config: PreTrainedConfig) -> Any:
    """Choose the Auto class that builds a tower: of an encoder-decoder such as T5, the encoder alone."""
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


def build_tower(config: PreTrainedConfig) -> Any:
    """Build a tower with random weights."""
    if type(config) in MODEL_MAPPING or type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        return auto_class(config).from_config(config)
    # The text halves of SigLIP and Chinese-CLIP: no Auto class knows them.
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ValueError(f"transformers builds no tower from a {config.model_type} config; choose another tower.")
    return kind(config)


def pool_tower(
    tower: Any, pooling: str, inputs: Mapping[str, Tensor | None], mask: str
) -> tuple[Tensor | None, Tensor]:
    """Run a tower and make one vector of its tokens; also the tokens, (n, length, width), if it shows them."""
    known = inspect.signature(tower.forward).parameters  # a BERT tokenizer's token_type_ids mean nothing to DistilBERT
    output = tower(**{name: value for name, value in inputs.items() if name in known and value is not None})
    states, pooled = output.last_hidden_state, None
    is_map = states is not None and states.ndim == 4
    if is_map:  # convolutional: its places are the tokens, and none of them is special
        states = states.flatten(2).transpose(1, 2)
    if pooling == "pooler":
        pooled = getattr(output, "pooler_output", None)
    elif states is not None and not (is_map and pooling == "cls"):
        keep = inputs.get(mask)
        pooled = _pool_tokens(states, pooling, states.new_ones(states.shape[:2]) if keep is None else keep)
    if pooled is None:
        raise ValueError(f"A {tower.config.model_type} tower cannot be pooled by {pooling!r}: choose another pooling.")
    return states, pooled.flatten(1)


def _pool_tokens(states: Tensor, pooling: str, keep: Tensor) -> Tensor | None:
    """Pool tokens (n, length, width) by their mean or to the first; `keep` is (n, length), 0 at padding."""
    if pooling == "mean":
        weights = keep.to(states.dtype)
        return (states * weights[:, :, None]).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    if pooling == "cls":
        return states[torch.arange(len(states), device=states.device), keep.int().argmax(dim=1)]
    return None


@torch.no_grad()
def pooled_width(tower: Any, pooling: Pooling, inputs: Mapping[str, Tensor], mask: str) -> int:
    """Measure the width of a tower's pooled output: configs name it in a dozen ways."""
    return int(pool_tower(tower, pooling, inputs, mask)[1].shape[-1])
