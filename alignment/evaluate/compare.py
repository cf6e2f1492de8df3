"""Two models on one data set: what the second gains, with paired intervals.

Place in the flow: `embedding, of both models -> compare (here) -> report`. The draws of the bootstrap are the same for
both, so what makes an image easy or hard for either cancels out.
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
    """What model B gains over model A.

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
    """Compare two models by what they make of the same images and captions.

    Args:
        before: by model A.
        after: by model B.
        resamples: samples of the paired bootstrap over images; 0 gives no interval.
        seed: of the draws.

    Raises:
        ValueError: when the two hold different images or captions, or embeddings that are not finite.
    """
    alike = list(before.images) == list(after.images) and list(before.texts) == list(after.texts)
    if not alike or not torch.equal(before.image_of_text, after.image_of_text):
        raise ValueError("The two models were given different images or captions; compare them on the same.")
    measured = (
        retrieval_bootstrap(side.ranks, side.image_of_text, resamples=resamples, seed=seed) for side in (before, after)
    )
    return Comparison(len(before.images), len(before.texts), differences(*measured))


def difference_table(metrics: Mapping[str, Difference]) -> str:
    """Lay differences out as text, shares in percent: A, B, the gain with its interval, and the share against it."""
    lines = [f"{'':26}{'A':>8}{'B':>8}{'B - A':>8}   {'95 % interval':18}{'B not better':>12}"]
    for name, found in metrics.items():
        before, after, *gains = difference_cells(name, found)
        interval = f"[{gains[1]}, {gains[2]}]"
        lines.append(
            f"{metric_title(name):26}{before:>8}{after:>8}{gains[0]:>8}   {interval:18}{found.p_not_better:>12.1%}"
        )
    return "\n".join(lines)


def difference_cells(name: str, found: Difference) -> list[str]:
    """Write the figures of A and B, the difference and the ends of its interval, shares in percent."""
    is_rank = name.endswith(LOWER_IS_BETTER)
    factor, places = (1, 0) if is_rank else (100, 1)
    plain = [f"{number * factor:.{places}f}" for number in (found.before, found.after)]
    # Adding zero turns -0.0 into 0.0.
    return plain + [
        f"{round(number * factor, places) + 0.0:+.{places}f}" for number in (found.value, found.low, found.high)
    ]


def metric_title(name: str) -> str:
    """Name a figure for people: `image_to_text_recall@1` is "image to text R@1"."""
    return name.replace("recall@", "R@").replace("zero_shot_top", "zero-shot top-").replace("_", " ")
