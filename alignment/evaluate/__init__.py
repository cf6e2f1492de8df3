"""Floor 3, evaluation: recall of a model on a data set, and the difference between two models.

    python -m alignment.evaluate --model checkpoints/compact --data DATASET --split dev --json report.json
    python -m alignment.evaluate --compare checkpoints/compact runs/mine --data DATASET --split dev --html gains.html

Place in the flow: `data + model -> evaluate (here) -> report`. `embedding` encodes a data set once and ranks its
queries; `retrieval`, `zero_shot` and `eccv` compute metrics and intervals; `error_analysis` selects queries;
`html_report` and `command` are the command line.
"""

from alignment.evaluate.command import main
from alignment.evaluate.embedding import Embedded, embed_pairs
from alignment.evaluate.error_analysis import suspected_false_negatives, worst_queries
from alignment.evaluate.ranks import KS
from alignment.evaluate.retrieval import (
    Difference,
    Estimate,
    compare_retrieval,
    difference_table,
    evaluate_embedded,
    evaluate_embeddings,
)

__all__ = [
    "KS", "Difference", "Embedded", "Estimate", "compare_retrieval", "difference_table", "embed_pairs",
    "evaluate_embedded", "evaluate_embeddings", "main", "suspected_false_negatives", "worst_queries",
]  # fmt: skip
