"""Floor 1, the two towers of the compact model, registered with transformers' Auto classes.

Place in the flow: `model` loads them like any other tower. Each comes in two forms. Plain (`embed_dim` 0), it is the
pretrained network as published: `EfficientNetLiteModel` classifies ImageNet, `NgramTextModel` embeds sentences of
sixteen languages. Aligned (`embed_dim` > 0), its `pooler_output` is the finished unit-norm embedding, two parts side
by side:

    image   sqrt(1 - g) * aligned picture     |  sqrt(g) * what the ImageNet head sees, as a sentence embedding
    text    sqrt(1 - w) * aligned sentence    |  sqrt(w) * the sentence embedding itself

so that one dot product adds what captioned photographs taught to what a thousand class names already knew. The weight
g follows how sure the ImageNet head is; w is one number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

# EfficientNet-B0's stages: (expansion, channels, kernel, stride, repeats); Lite scales channels and repeats.
STAGES = ((1, 16, 3, 1, 1), (6, 24, 3, 2, 2), (6, 40, 5, 2, 2), (6, 80, 3, 2, 3), (6, 112, 5, 1, 3), (6, 192, 5, 2, 4),
          (6, 320, 3, 1, 1))  # fmt: skip
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280  # neither is scaled in the Lite family


class AlignmentHead(nn.Module):
    """Project one tower's summary vector and its tokens into the shared space.

    A linear map and a two-layer correction of the summary, plus the same of what a few attention queries pick from the
    tokens: the summary says what a whole is about, the queries may look at the part a caption names.
    """

    def __init__(
        self, summary_width: int, token_width: int, embed_dim: int, num_queries: int, hidden_dim: int, dropout: float
    ) -> None:
        super().__init__()
        self.summary_norm = FixedNorm(summary_width)
        self.token_norm = FixedNorm(token_width)
        self.key = nn.Linear(token_width, num_queries)
        self.value = nn.Parameter(torch.randn(num_queries, token_width, embed_dim // num_queries) / token_width**0.5)
        self.summary = ResidualMLP(summary_width, embed_dim, hidden_dim, dropout)
        self.picked = ResidualMLP(embed_dim, embed_dim, hidden_dim, dropout)

    def forward(self, summary: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """Project (n, summary_width) and (n, num_tokens, token_width) to (n, embed_dim), unit norm."""
        scores = self.key(tokens)
        if mask is not None:
            scores = scores.masked_fill(mask.unsqueeze(-1) == 0, torch.finfo(scores.dtype).min)
        picked = self.token_norm(scores.softmax(1).transpose(1, 2) @ tokens)
        values = torch.einsum("nqt,qtv->nqv", picked, self.value).flatten(1)
        return functional.normalize(self.summary(self.summary_norm(summary)) + self.picked(values), dim=-1)


class FixedNorm(nn.Module):
    """Standardise features by the mean and deviation they had on the training data."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise (..., width)."""
        return (features - self.mean) / self.deviation


class ResidualMLP(nn.Module):
    """A linear projection and a two-layer correction to it, with dropout on the way in and in the middle."""

    def __init__(self, width: int, embed_dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, embed_dim)
        self.hidden = nn.Linear(width, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project (..., width) to (..., embed_dim)."""
        features = self.dropout(features)
        projected: Tensor = self.linear(features) + self.out(self.dropout(functional.gelu(self.hidden(features))))
        return projected


# ---------------------------------------------------------------- pictures


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite2 by default; `embed_dim` > 0 adds the alignment.

    Attributes:
        image_size: side of the square input, pixels.
        width_multiplier, depth_multiplier: Lite2's scaling of EfficientNet-B0.
        num_classes: ImageNet's.
        embed_dim: width of the aligned part; 0 for the plain classifier.
        concept_dim: width of the concept part, that of the text tower's sentence embedding.
        tail_start: first block of which the aligned tower has a tuned copy of its own.
        num_queries: attention queries over the last feature map.
        hidden_dim: width of the head's two-layer corrections.
        concept_weight: g where the head knows nothing and g where it is certain.
    """

    model_type = "efficientnet-lite"

    def __init__(
        self,
        image_size: int = 260,
        width_multiplier: float = 1.1,
        depth_multiplier: float = 1.2,
        num_classes: int = 1000,
        embed_dim: int = 0,
        concept_dim: int = 512,
        tail_start: int = 15,
        num_queries: int = 8,
        hidden_dim: int = 1024,
        dropout: float = 0.3,
        concept_weight: Sequence[float] = (0.1, 0.5),
        **kwargs: Any,
    ) -> None:
        self.image_size = image_size
        self.width_multiplier = width_multiplier
        self.depth_multiplier = depth_multiplier
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.concept_dim = concept_dim
        self.tail_start = tail_start
        self.num_queries = num_queries
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.concept_weight = list(concept_weight)
        self.hidden_size = embed_dim + concept_dim if embed_dim else HEAD_CHANNELS
        super().__init__(**kwargs)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's "same" padding: at stride 2 the odd pixel goes to the right and the bottom."""

    def __init__(self, channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out_channels, kernel, stride, groups=groups)

    def forward(self, pixels: Tensor) -> Tensor:
        """Convolve (n, channels, height, width)."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return functional.conv2d(pixels, self.weight, self.bias, 1, kernel // 2, 1, self.groups)
        spare = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in pixels.shape[-2:]]
        (high, wide) = spare
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
    """What the ImageNet head sees, said as a sentence embedding.

    Source: ConSE (Norouzi et al., 2014): class-name embeddings averaged by the classifier's probabilities.
    """

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
            self.head = AlignmentHead(
                HEAD_CHANNELS, HEAD_CHANNELS, config.embed_dim, config.num_queries, config.hidden_dim, config.dropout
            )
        else:
            self.classifier = nn.Linear(HEAD_CHANNELS, config.num_classes)
        self.post_init()

    def trunk_maps(self, pixel_values: Tensor) -> Tensor:
        """Run what is never tuned: (n, 3, side, side) to (n, channels, side / 16, side / 16)."""
        maps = functional.relu6(self.stem(pixel_values))
        for block in self.trunk:
            maps = block(maps)
        return maps

    def align(self, maps: Tensor) -> Tensor:
        """Embed the last feature map in the space learnt from captions: (n, embed_dim), unit norm."""
        embeds: Tensor = self.head(maps.mean((2, 3)), maps.flatten(2).transpose(1, 2))
        return embeds

    def until(self, stage: Literal["trunk_maps", "last_maps"], pixel_values: Tensor) -> dict[str, Tensor]:
        """Run the aligned tower's frozen beginning; `forward` takes what this returns in place of the pictures.

        Args:
            stage: up to the blocks that captions tune, or to the head behind them.
            pixel_values: (n, 3, side, side).
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

        Returns:
            Plain: `pooler_output` (n, 1280) averaged features, `last_hidden_state` (n, tokens, 1280).
            Aligned: `pooler_output` (n, embed_dim + concept_dim), unit norm.
        """
        if pixel_values is not None:
            trunk_maps = self.trunk_maps(pixel_values)
        last = self.tail(trunk_maps) if last_maps is None else last_maps
        if not self.config.embed_dim:
            return BaseModelOutputWithPooling(last.flatten(2).transpose(1, 2), last.mean((2, 3)))
        if concepts is None:
            concepts, certainty = self.concept(trunk_maps)
        low, high = self.config.concept_weight
        return BaseModelOutputWithPooling(
            pooler_output=join_parts(self.align(last), concepts, low + (high - low) * certainty)
        )


def join_parts(aligned: Tensor, concepts: Tensor, weight: Tensor | float) -> Tensor:
    """Put two unit-norm parts side by side so that the whole has unit norm again.

    Args:
        aligned: (n, embed_dim), unit norm.
        concepts: (n, concept_dim), unit norm.
        weight: share of the concept part, in [0, 1]; a number or (n, 1).
    """
    weight = torch.as_tensor(weight, dtype=aligned.dtype, device=aligned.device)
    return torch.cat([(1 - weight).sqrt() * aligned, weight.sqrt() * concepts], dim=-1)


def _blocks(config: EfficientNetLiteConfig) -> list[InvertedResidual]:
    blocks, channels = [], STEM_CHANNELS
    for stage, (expansion, width, kernel, stride, repeats) in enumerate(STAGES):
        deepened = stage not in (0, len(STAGES) - 1)
        out_channels = _round_to_8(width * config.width_multiplier)
        for repeat in range(math.ceil(repeats * config.depth_multiplier) if deepened else repeats):
            first = repeat == 0
            blocks.append(InvertedResidual(channels, out_channels, expansion, kernel, stride if first else 1))
            channels = out_channels
    return blocks


def _round_to_8(width: float) -> int:
    """Round to a multiple of 8, never down by more than a tenth (EfficientNet's rule)."""
    rounded = max(8, int(width + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * width else rounded


# ---------------------------------------------------------------- sentences


class NgramTextConfig(PreTrainedConfig):
    """The multilingual sentence encoder; `embed_dim` > 0 adds the alignment.

    Attributes:
        vocab_size: rows of the token table, a multiple of `num_chunks`.
        num_chunks: token t was quantised with the scale and offset number t modulo this.
        token_dim, gram_dim: width of a token and of one n-gram branch.
        orders: n-gram orders with the tokens each sees to the left.
        sentence_dim: width of the sentence embedding.
        embed_dim: width of the aligned part; 0 for the plain sentence encoder.
        num_queries: attention queries over the token features.
        hidden_dim: width of the head's two-layer corrections.
        concept_weight: w, the share of the plain sentence embedding.
    """

    model_type = "ngram-text"

    def __init__(
        self,
        vocab_size: int = 128_010,
        num_chunks: int = 17,
        token_dim: int = 512,
        gram_dim: int = 256,
        orders: Sequence[Sequence[int]] = ((2, 0), (3, 1), (5, 2)),
        sentence_dim: int = 512,
        embed_dim: int = 0,
        num_queries: int = 8,
        hidden_dim: int = 512,
        dropout: float = 0.3,
        concept_weight: float = 0.3,
        max_position_embeddings: int = 64,
        pad_token_id: int = 0,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.num_chunks = num_chunks
        self.token_dim = token_dim
        self.gram_dim = gram_dim
        self.orders = [list(order) for order in orders]
        self.sentence_dim = sentence_dim
        self.embed_dim = embed_dim
        self.num_queries = num_queries
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.concept_weight = concept_weight
        self.max_position_embeddings = max_position_embeddings
        self.hidden_size = embed_dim + sentence_dim if embed_dim else sentence_dim
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class QuantizedTable(nn.Module):
    """A frozen token table in 8 bits; rows are interleaved over chunks, each with a scale and an offset."""

    codes: Tensor
    scale: Tensor
    offset: Tensor

    def __init__(self, rows: int, width: int, num_chunks: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.ones(num_chunks))
        self.register_buffer("offset", torch.zeros(num_chunks))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up (n, length) as (n, length, width)."""
        chunks = input_ids % len(self.scale)
        return self.codes[input_ids].to(self.scale.dtype) * self.scale[chunks, None] + self.offset[chunks, None]


class NgramBranch(nn.Module):
    """Two residual convolutions over n consecutive tokens."""

    def __init__(self, width: int, order: int, left: int) -> None:
        super().__init__()
        self.order, self.left = order, left
        self.first = nn.Linear(order * width, width)
        self.second = nn.Linear(order * width, width)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Map (n, length, width) to the same shape; `mask` is (n, length, 1) in the tokens' dtype."""
        hidden = functional.relu(self.first(self._grams(tokens * mask))) + tokens
        grams: Tensor = functional.relu(self.second(self._grams(hidden * mask))) + hidden
        return grams

    def _grams(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        padded = functional.pad(tokens, (0, 0, self.left, self.order - 1 - self.left))
        return torch.cat([padded[:, step : step + length] for step in range(self.order)], dim=-1)


class SentenceHead(nn.Module):
    """The residual MLP with tanh that turns pooled n-grams into a sentence embedding."""

    def __init__(self, width: int, hidden: int = 320) -> None:
        super().__init__()
        self.up1 = nn.Linear(width, hidden, bias=False)
        self.down1 = nn.Linear(hidden, hidden, bias=False)
        self.skip1 = nn.Linear(width, hidden, bias=False)
        self.up2 = nn.Linear(hidden, width, bias=False)
        self.down2 = nn.Linear(width, width, bias=False)
        self.skip2 = nn.Linear(hidden, width, bias=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """Map (n, width) to (n, width), unit norm."""
        hidden = functional.relu(self.skip1(pooled) + self.down1(functional.relu(self.up1(pooled))))
        sentence = torch.tanh(self.skip2(hidden) + self.down2(functional.relu(self.up2(hidden))))
        return functional.normalize(sentence, dim=-1)


class NgramTextModel(PreTrainedModel):
    """Multilingual n-gram sentence encoder, plain or aligned with the image tower.

    Source: Universal Sentence Encoder multilingual (Yang et al., 2019), its CNN variant.
    """

    config_class = NgramTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    # Fine-tuning leaves the sentence encoder alone: sixteen languages hang on it, and the image tower's concepts do.
    held = ("table.", "input.", "input_norm.", "branches.", "token_norm.", "pool.", "sentence.")

    def __init__(self, config: NgramTextConfig) -> None:
        super().__init__(config)
        grams = len(config.orders) * config.gram_dim
        width = config.token_dim + grams
        self.table = QuantizedTable(config.vocab_size, config.token_dim, config.num_chunks)
        self.input = nn.Linear(config.token_dim, grams)
        self.input_norm = nn.LayerNorm(grams, eps=1e-12)
        self.branches = nn.ModuleList(NgramBranch(config.gram_dim, order, left) for order, left in config.orders)
        self.token_norm = nn.LayerNorm(width, eps=1e-12)
        self.pool = nn.Linear(width, config.sentence_dim)
        self.sentence = SentenceHead(config.sentence_dim)
        if config.embed_dim:
            self.head = AlignmentHead(
                config.sentence_dim, width, config.embed_dim, config.num_queries, config.hidden_dim, config.dropout
            )
            self.concept_norm = FixedNorm(config.sentence_dim)
        self.post_init()

    def sentences(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return token features (n, length, width), zero at padding, and sentence embeddings (n, sentence_dim)."""
        tokens = self.table(input_ids)
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        parts = self.input_norm(self.input(tokens)).chunk(len(self.branches), dim=-1)
        grams = [branch(part, mask) for branch, part in zip(self.branches, parts, strict=True)]
        features = self.token_norm(torch.cat([tokens, *grams], dim=-1)) * mask
        pooled = (self.pool(features) * mask).sum(1) / mask.sum(1).clamp(min=1).sqrt()
        return features, self.sentence(pooled)

    def align(self, features: Tensor, sentences: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed sentences in the space learnt from captions: (n, embed_dim), unit norm."""
        embeds: Tensor = self.head(sentences, features, attention_mask)
        return embeds

    def concepts(self, sentences: Tensor) -> Tensor:
        """Take what all names share out of sentence embeddings (n, sentence_dim), unit norm again."""
        return functional.normalize(self.concept_norm(sentences), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """Encode token ids (n, length).

        Returns:
            Plain: `pooler_output` (n, sentence_dim), unit norm. Aligned: (n, embed_dim + sentence_dim), unit norm.
        """
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        features, sentences = self.sentences(input_ids, attention_mask)
        if not self.config.embed_dim:
            return BaseModelOutputWithPooling(features, sentences)
        aligned = self.align(features, sentences, attention_mask)
        return BaseModelOutputWithPooling(
            features, join_parts(aligned, self.concepts(sentences), self.config.concept_weight)
        )


for _config, _model in ((EfficientNetLiteConfig, EfficientNetLiteModel), (NgramTextConfig, NgramTextModel)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _model, exist_ok=True)
