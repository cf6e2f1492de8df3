"""Floor 3, why this match: what each word of the caption and each place of the picture adds to it.

Place in the flow: `encoder + one picture + captions -> contributions (here) -> engine -> page`. Everything is quoted in
cosine, on one scale for all results of a model, so that a caption that does not fit looks as little founded as it is.
"""

from alignment.explain.deletion import DeletionCurves, deletion_curves
from alignment.explain.occlusion import UNIT
from alignment.explain.patches import PatchRelevance, patch_relevance
from alignment.explain.words import WordContribution, split_words, word_contributions

__all__ = [
    "UNIT",
    "DeletionCurves",
    "PatchRelevance",
    "WordContribution",
    "deletion_curves",
    "patch_relevance",
    "split_words",
    "word_contributions",
]
