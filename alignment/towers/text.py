"""The text tower: the CNN variant of Universal Sentence Encoder multilingual (Yang et al., 2019), over n-grams."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from alignment.towers.heads import AlignmentHead, FixedNorm, join_parts


class NgramTextConfig(PreTrainedConfig):
    """The multilingual sentence encoder; `embed_dim` > 0 adds the alignment."""

    model_type = "ngram-text"

    vocab_size: int = 128_010  # rows of the token table, a multiple of `num_chunks`
    num_chunks: int = 17  # token t was quantised with the scale and offset number t modulo this
    token_dim: int = 512
    gram_dim: int = 256  # width of one n-gram branch
    orders: Sequence[Sequence[int]] = ((2, 0), (3, 1), (5, 2))  # n-gram orders, and the tokens each sees to the left
    sentence_dim: int = 512
    embed_dim: int = 0  # width of the aligned part; 0 for the plain sentence encoder
    num_queries: int = 8  # attention queries over the token features
    hidden_dim: int = 512  # width of the head's two-layer corrections
    dropout: float = 0.3
    concept_weight: float = 0.3  # w, the share of the plain sentence embedding
    max_position_embeddings: int = 64
    pad_token_id: int = 0
    hidden_size: int = 0  # derived: that of `pooler_output`

    def __post_init__(self, **kwargs: Any) -> None:
        self.orders = [list(order) for order in self.orders]
        self.hidden_size = self.embed_dim + self.sentence_dim
        super().__post_init__(**kwargs)


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
    """Multilingual n-gram sentence encoder, plain or aligned with the image tower."""

    config_class = NgramTextConfig
    base_model_prefix = "text_model"
    main_input_name = "input_ids"
    # Frozen in fine-tuning: sixteen languages depend on the sentence encoder, and so do the image tower's concepts.
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
            self.head = AlignmentHead(config.sentence_dim, width, config)
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutputWithPooling:
        """Encode token ids (n, length): `pooler_output` (n, sentence_dim), aligned (n, embed_dim + sentence_dim)."""
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        features, sentences = self.sentences(input_ids, attention_mask)
        if not self.config.embed_dim:
            return BaseModelOutputWithPooling(features, sentences)
        aligned = self.head(sentences, features, attention_mask)
        concepts = functional.normalize(self.concept_norm(sentences), dim=-1)  # without what all names share
        return BaseModelOutputWithPooling(features, join_parts(aligned, concepts, self.config.concept_weight))
