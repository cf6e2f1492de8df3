"""Two models on one data set: the difference of each metric, with paired intervals.

Place in the flow: `embedding of both models -> compare (here) -> report`. Both models are resampled by the same draws,
so variation that images cause in both cancels out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from alignment.evaluate.bootstrap import LOWER_IS_BETTER, Difference, differences
from alignment.evaluate.embedding import Embedded
from alignment.evaluate.retrieval import retrieval_bootstrap


@dataclass(frozen=True)
class Comparison:
    """The differences between model A and model B.

    Attributes:
        num_images: images that were queries and candidates.
        num_texts: the same for captions.
        metrics: the names of a `RetrievalReport`.
    """

    num_images: int
    num_texts: int
    metrics: Mapping[str, Difference]

    def __getitem__(self, name: str) -> float:
        return self.metrics[name].value


def compare_retrieval(before: Embedded, after: Embedded, *, resamples: int = 1000, seed: int = 0) -> Comparison:
    """Compare two models on the same images and captions.

    Args:
        before: the data set embedded by model A.
        after: the same by model B.
        resamples: samples of the paired bootstrap over images; 0 gives no interval.
        seed: of the draws.

    Raises:
        ValueError: on different images or captions, or embeddings that are not finite.
    """
    is_same = list(before.images) == list(after.images) and list(before.texts) == list(after.texts)
    if not is_same or not torch.equal(before.image_of_text, after.image_of_text):
        raise ValueError("The two models were given different images or captions; compare them on the same.")
    measured = (
        retrieval_bootstrap(model.ranks, model.image_of_text, resamples=resamples, seed=seed)
        for model in (before, after)
    )
    return Comparison(len(before.images), len(before.texts), differences(*measured))


def difference_table(metrics: Mapping[str, Difference]) -> str:
    """Format differences as text, shares in percent: A, B, B - A with its interval, and `p_not_better`."""
    lines = [f"{'':26}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % interval':18}{'B not better':>12}"]
    for name, found in metrics.items():
        before, after, gain, low, high = difference_cells(name, found)
        interval = f"[{low}, {high}]"
        lines.append(
            f"{metric_title(name):26}{before:>8}{after:>8}{gain:>8}   {interval:18}{found.p_not_better:>12.1%}"
        )
    return "\n".join(lines)


def difference_cells(name: str, found: Difference) -> list[str]:
    """Format A, B, the difference and the ends of its interval, shares in percent."""
    factor, places = (1, 0) if name.endswith(LOWER_IS_BETTER) else (100, 1)
    values = [f"{number * factor:.{places}f}" for number in (found.before, found.after)]
    # Adding zero turns -0.0 into 0.0.
    gains = [f"{round(number * factor, places) + 0.0:+.{places}f}" for number in (found.value, found.low, found.high)]
    return values + gains


def metric_title(name: str) -> str:
    """Return the display name of a metric: `image_to_text_recall@1` is "image to text R@1"."""
    return name.replace("recall@", "R@").replace("zero_shot_top", "zero-shot top-").replace("_", " ")
