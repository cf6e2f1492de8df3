"""Floor 3, measurement: what a model is worth on a data set, and what another one gains over it.

    python -m alignment.evaluate --model checkpoints/compact --data DATASET --split dev --json report.json
    python -m alignment.evaluate --compare checkpoints/compact runs/mine --data DATASET --split dev --html gains.html

Place in the flow: `pairs + model -> evaluate (here) -> report`. The package's rooms, from the sums to the page:

| module          | what it does |
|-----------------|--------------|
| `ranks`         | ranks and recall at k, pure functions of the scores |
| `bootstrap`     | intervals by resampling images |
| `embedding`     | a captioned data set, encoded once |
| `retrieval`     | recall in both directions |
| `class_folders` | pictures in class folders, names and templates |
| `zero_shot`     | which class name fits a picture |
| `eccv`          | COCO with the labels it lacks |
| `compare`       | two models on one data set |
| `examples`      | the queries behind the figures |
| `page`          | the report as one HTML file |
| `arguments`     | what was typed, and the data it names |
| `command`       | the command |
"""

from alignment.evaluate.bootstrap import Difference, Estimate
from alignment.evaluate.class_folders import LabelledImages, read_class_folders
from alignment.evaluate.command import main
from alignment.evaluate.compare import Comparison, compare_retrieval, difference_table
from alignment.evaluate.eccv import eccv_metrics
from alignment.evaluate.embedding import Embedded, Encoder, embed_pairs
from alignment.evaluate.error_analysis import changed_queries, suspected_false_negatives, worst_queries
from alignment.evaluate.ranks import KS, ROUNDING, recall_at_k, retrieval_ranks
from alignment.evaluate.retrieval import (
    RetrievalReport,
    evaluate_embedded,
    evaluate_embeddings,
    evaluate_retrieval,
    report_table,
)
from alignment.evaluate.zero_shot import ZeroShotReport, classify_zero_shot

__all__ = [
    "KS",
    "ROUNDING",
    "Comparison",
    "Difference",
    "Embedded",
    "Encoder",
    "Estimate",
    "LabelledImages",
    "RetrievalReport",
    "ZeroShotReport",
    "changed_queries",
    "classify_zero_shot",
    "compare_retrieval",
    "difference_table",
    "eccv_metrics",
    "embed_pairs",
    "evaluate_embedded",
    "evaluate_embeddings",
    "evaluate_retrieval",
    "main",
    "read_class_folders",
    "recall_at_k",
    "report_table",
    "retrieval_ranks",
    "suspected_false_negatives",
    "worst_queries",
]
