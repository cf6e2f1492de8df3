"""Join any vision tower and any text tower into an ordinary dual encoder of transformers.

Place in the flow: `checkpoints -> towers -> ComposedModel (here) -> DualEncoder`. Importing this registers the model,
and the compact model's towers, with transformers' Auto classes; it is imported when a model is built, not served.
"""

import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from alignment.model.tower import Pooling, Projection
from alignment.towers import ResidualMLP  # the import also registers the compact model's towers

FRESH_LOGIT_SCALE = math.log(1 / 0.07)  # where CLIP's temperature starts before training


class ComposedConfig(PreTrainedConfig):
    """Two towers, how each is pooled, and the projections that join them."""

    model_type = "composed-dual-encoder"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    projection_dim: int = 512
    vision_pooling: Pooling = "pooler"
    text_pooling: Pooling = "mean"
    vision_width: int = 768
    text_width: int = 768
    projection: Projection = "linear"

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _sub_config(self.vision_config or {"model_type": "vit"})
        self.text_config = _sub_config(self.text_config or {"model_type": "bert"})
        super().__post_init__(**kwargs)


def _sub_config(config: dict[str, Any] | PreTrainedConfig) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    # The composition must not publish the path that a tower was loaded from.
    return AutoConfig.for_model(**{name: value for name, value in config.items() if name != "_name_or_path"})


def _projection(config: ComposedConfig, width: int) -> nn.Module:
    if config.projection == "mlp":
        return ResidualMLP(width, config.projection_dim, 2 * config.projection_dim, bias=False)
    if config.projection == "linear":
        return nn.Linear(width, config.projection_dim, bias=False)
    if config.projection == "none":  # towers that already share a space, such as the compact model's
        if width != config.projection_dim:
            raise ValueError(f"A tower of width {width} needs a projection to width {config.projection_dim}.")
        return nn.Identity()
    raise ValueError(f"There is no projection {config.projection!r}: choose 'linear', 'mlp' or 'none'.")


class ComposedModel(PreTrainedModel):
    """Any vision tower and any text tower, joined, with the methods of transformers' dual encoders."""

    config_class = ComposedConfig
    base_model_prefix = "composed"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: ComposedConfig, vision_model: Any = None, text_model: Any = None) -> None:
        super().__init__(config)
        self.vision_model = build_tower(config.vision_config) if vision_model is None else vision_model
        self.text_model = build_tower(config.text_config) if text_model is None else text_model
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
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
    ) -> ModelOutput:  # fmt: skip
        """Score every picture against every caption."""
        images = self.get_image_features(
            pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
        )
        texts = self.get_text_features(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        image_embeds, text_embeds = (functional.normalize(side.pooler_output, dim=-1) for side in (images, texts))
        logits = image_embeds @ text_embeds.T * self.logit_scale.exp()
        return ModelOutput(
            logits_per_image=logits, logits_per_text=logits.T, image_embeds=image_embeds, text_embeds=text_embeds
        )


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModel.register(ComposedConfig, ComposedModel, exist_ok=True)


def auto_class(config: PreTrainedConfig) -> Any:
    """Choose the Auto class that builds a tower: of an encoder-decoder such as T5, the encoder alone."""
    is_text_encoder = type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
    return AutoModelForTextEncoding if is_text_encoder else AutoModel


def build_tower(config: PreTrainedConfig) -> Any:
    """Build a tower with random weights."""
    if (auto := auto_class(config)) is not AutoModel or type(config) in transformers.MODEL_MAPPING:
        return auto.from_config(config)
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
        pooled = pool_tokens(states, pooling, states.new_ones(states.shape[:2]) if keep is None else keep)
    if pooled is None:
        raise ValueError(f"A {tower.config.model_type} tower cannot be pooled by {pooling!r}: choose another pooling.")
    return states, pooled.flatten(1)


def pool_tokens(states: Tensor, pooling: str, keep: Tensor) -> Tensor | None:
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
