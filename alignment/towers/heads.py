"""What both towers end in: the projection into the shared space."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class AlignmentHead(nn.Module):
    """Project one tower's summary vector, and what a few attention queries pick from its tokens, into the shared space.

    The summary says what a whole is about, the queries may look at the part a caption names. `config` is the tower's.
    """

    def __init__(self, summary_width: int, token_width: int, config: Any) -> None:
        super().__init__()
        embed_dim, num_queries = config.embed_dim, config.num_queries
        self.summary_norm = FixedNorm(summary_width)
        self.token_norm = FixedNorm(token_width)
        self.key = nn.Linear(token_width, num_queries)
        self.value = nn.Parameter(torch.randn(num_queries, token_width, embed_dim // num_queries) / token_width**0.5)
        self.summary = ResidualMLP(summary_width, embed_dim, config.hidden_dim, config.dropout)
        self.picked = ResidualMLP(embed_dim, embed_dim, config.hidden_dim, config.dropout)

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

    def __init__(self, width: int, embed_dim: int, hidden_dim: int, dropout: float = 0.0, *, bias: bool = True) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(width, embed_dim, bias=bias)
        self.hidden = nn.Linear(width, hidden_dim)
        self.out = nn.Linear(hidden_dim, embed_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Project (..., width) to (..., embed_dim)."""
        features = self.dropout(features)
        projected: Tensor = self.linear(features) + self.out(self.dropout(functional.gelu(self.hidden(features))))
        return projected


def join_parts(aligned: Tensor, concepts: Tensor, weight: Tensor | float) -> Tensor:
    """Put two unit-norm parts, (n, embed_dim) and (n, concept_dim), side by side to unit norm again.

    `weight` is the share of the concept part in [0, 1], a number or (n, 1).
    """
    weight = torch.as_tensor(weight, dtype=aligned.dtype, device=aligned.device)
    return torch.cat([(1 - weight).sqrt() * aligned, weight.sqrt() * concepts], dim=-1)
