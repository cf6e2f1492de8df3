"""The image tower: EfficientNet-Lite, plain or with the head that aligns it with captions."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from alignment.towers.heads import AlignmentHead, join_parts

# EfficientNet-B0's stages: (expansion, channels, kernel, stride, repeats); Lite scales channels and repeats.
STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
          (6, 320, 3, 1, 1))  # fmt: skip
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280  # neither is scaled in the Lite family


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite2 by default; `embed_dim` > 0 adds the alignment."""

    model_type = "efficientnet-lite"

    image_size: int = 260  # side of the square input, pixels
    width_multiplier: float = 1.1  # of EfficientNet-B0's channels
    depth_multiplier: float = 1.2  # of its blocks
    num_classes: int = 1000  # ImageNet's
    embed_dim: int = 0  # width of the aligned part; 0 for the plain classifier
    concept_dim: int = 512  # width of the concept part, that of the text tower's sentence embedding
    tail_start: int = 15  # first block of which the aligned tower has a tuned copy of its own
    num_queries: int = 8  # attention queries over the last feature map
    hidden_dim: int = 1024  # width of the head's two-layer corrections
    dropout: float = 0.3
    concept_weight: Sequence[float] = (0.1, 0.5)  # g where the ImageNet head knows nothing, and where it is certain
    hidden_size: int = 0  # derived: that of `pooler_output`

    def __post_init__(self, **kwargs: Any) -> None:
        self.concept_weight = list(self.concept_weight)
        self.hidden_size = self.embed_dim + self.concept_dim if self.embed_dim else HEAD_CHANNELS
        super().__post_init__(**kwargs)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: at stride 2 the odd pixel goes to the right and the bottom."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups)

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolve (n, channels, height, width)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return functional.conv2d(pixels, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        high, wide = (max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in pixels.shape[-2:])
        padded = functional.pad(pixels, (wide // 2, wide - wide // 2, high // 2, high - high // 2))
        return functional.conv2d(padded, self.weight, self.bias, stride, 0, 1, self.groups)


class InvertedResidual(nn.Module):
    """Expand, convolve each channel by itself, project; batch norms are folded into the convolutions."""

    def __init__(self, channels: int, out_channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = channels * expansion
        self.expand = SameConv(channels, hidden, 1) if expansion > 1 else None
        self.depthwise = SameConv(hidden, hidden, kernel, stride, groups=hidden)
        self.project = SameConv(hidden, out_channels, 1)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, maps: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, out_channels, height / stride, width / stride)."""
        hidden = maps if self.expand is None else functional.relu6(self.expand(maps))
        projected: Tensor = self.project(functional.relu6(self.depthwise(hidden)))
        return maps + projected if self.residual else projected


class Tail(nn.Module):
    """The last blocks and the 1280-channel head: from the trunk's maps to the last feature map."""

    def __init__(self, blocks: Sequence[InvertedResidual]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.head = SameConv(blocks[-1].project.out_channels, HEAD_CHANNELS, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (n, channels, height, width) to (n, 1280, height / 2, width / 2)."""
        for block in self.blocks:
            maps = block(maps)
        return functional.relu6(self.head(maps))


class ConceptBranch(nn.Module):
    """What the ImageNet head sees, as a sentence embedding: ConSE (Norouzi et al., 2014)."""

    def __init__(self, config: EfficientNetLiteConfig, tail: Tail) -> None:
        super().__init__()
        self.tail = tail
        self.classifier = nn.Linear(HEAD_CHANNELS, config.num_classes)
        self.class_embeds = nn.Parameter(torch.zeros(config.num_classes, config.concept_dim))

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return concept embeddings (n, concept_dim), unit norm, and the head's certainty (n, 1) in [0, 1]."""
        probabilities = self.classifier(self.tail(maps).mean((2, 3))).softmax(-1)
        return self.concepts(probabilities), probabilities.amax(-1, keepdim=True)

    def concepts(self, probabilities: Tensor) -> Tensor:
        """Average the class names' embeddings (n, concept_dim) by probabilities (n, num_classes)."""
        return functional.normalize(probabilities @ self.class_embeds, dim=-1)


class EfficientNetLiteModel(PreTrainedModel):
    """EfficientNet-Lite, plain (logits of ImageNet's classes) or aligned with the text tower."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    held = ("stem.", "trunk.", "concept.")  # weights that fine-tuning leaves as a million pictures made them

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = SameConv(3, STEM_CHANNELS, 3, 2)
        blocks = _blocks(config)
        self.trunk = nn.ModuleList(blocks[: config.tail_start])
        self.tail = Tail(blocks[config.tail_start :])
        if config.embed_dim:
            self.concept = ConceptBranch(config, Tail(_blocks(config)[config.tail_start :]))
            self.head = AlignmentHead(HEAD_CHANNELS, HEAD_CHANNELS, config)
        else:
            self.classifier = nn.Linear(HEAD_CHANNELS, config.num_classes)
        self.post_init()

    def trunk_maps(self, pixel_values: Tensor) -> Tensor:
        """Run what is never tuned: (n, 3, side, side) to (n, channels, side / 16, side / 16)."""
        maps = functional.relu6(self.stem(pixel_values))
        for block in self.trunk:
            maps = block(maps)
        return maps

    def until(self, stage: Literal["trunk_maps", "last_maps"], pixel_values: Tensor) -> dict[str, Tensor]:
        """Run the aligned tower's frozen beginning on pictures (n, 3, side, side), for `forward` to go on from.

        It ends before the blocks that captions tune, or before the head behind them.
        """
        maps = self.trunk_maps(pixel_values)
        concepts, certainty = self.concept(maps)
        return {stage: maps if stage == "trunk_maps" else self.tail(maps), "concepts": concepts, "certainty": certainty}

    def forward(
        self,
        pixel_values: Tensor | None = None,
        trunk_maps: Tensor | None = None,
        last_maps: Tensor | None = None,
        concepts: Tensor | None = None,
        certainty: Tensor | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode normalised pictures (n, 3, side, side), or what `until` made of them.

        Plain, `pooler_output` is (n, 1280) averaged features and `last_hidden_state` (n, tokens, 1280); aligned,
        `pooler_output` is (n, embed_dim + concept_dim), unit norm.
        """
        if pixel_values is not None:
            trunk_maps = self.trunk_maps(pixel_values)
        last = self.tail(trunk_maps) if last_maps is None else last_maps
        tokens, pooled = last.flatten(2).transpose(1, 2), last.mean((2, 3))
        if not self.config.embed_dim:
            return BaseModelOutputWithPooling(tokens, pooled)
        if concepts is None:
            concepts, certainty = self.concept(trunk_maps)
        low, high = self.config.concept_weight
        embeds = join_parts(self.head(pooled, tokens), concepts, low + (high - low) * certainty)
        return BaseModelOutputWithPooling(pooler_output=embeds)


def _blocks(config: EfficientNetLiteConfig) -> list[InvertedResidual]:
    blocks, channels = [], STEM_CHANNELS
    for stage, (expansion, width, kernel, stride, repeats) in enumerate(STAGES):
        deepened = stage not in (0, len(STAGES) - 1)
        out_channels = _round_to_8(width * config.width_multiplier)
        for repeat in range(math.ceil(repeats * config.depth_multiplier) if deepened else repeats):
            blocks.append(InvertedResidual(channels, out_channels, expansion, kernel, 1 if repeat else stride))
            channels = out_channels
    return blocks


def _round_to_8(width: float) -> int:
    """Round to a multiple of 8, never down by more than a tenth (EfficientNet's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded
