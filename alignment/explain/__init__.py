"""Floor 3, why a match: what each word of the caption and each place of the picture adds to it.

Place in the flow: `encoder + one picture + captions -> contributions (here) -> engine -> page`. All contributions are
cosines, on one scale for all results of a model: a caption that does not fit has little anywhere.
"""

from alignment.explain.gradient import UNIT
from alignment.explain.patches import PatchRelevance, patch_relevance
from alignment.explain.words import WordContribution, word_contributions

__all__ = ["UNIT", "PatchRelevance", "WordContribution", "patch_relevance", "word_contributions"]
