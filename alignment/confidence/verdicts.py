"""Turn a match probability into a verdict: fits, may fit, nothing close; and the thresholds between them.

Place in the flow: `match probabilities -> verdicts (here) -> calibration -> page and API`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Verdict = Literal["fits", "may_fit", "nothing_close", "no_meaning"]
"""Of a result or of a whole answer; `no_meaning`: the query is out of distribution (random text, a blank image)."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All verdicts, the best first."""

FITS_THRESHOLD = 0.5
"""Match probability from which a result fits, unless a calibration says otherwise."""


@dataclass(frozen=True)
class Thresholds:
    """Match probabilities from which a result fits and may fit, for one direction.

    If the probability that any candidate is a match reaches `may_fit`, the likeliest result may fit in any case.
    """

    fits: float
    may_fit: float

    def __post_init__(self) -> None:
        if not 0 <= self.may_fit <= self.fits <= 1:
            raise ValueError(f"Thresholds are probabilities, `may_fit` not above `fits`, unlike {self}.")

    @classmethod
    def of(cls, may_fit: float) -> Thresholds:
        """Combine a `may_fit` threshold with the default `fits` threshold."""
        return cls(max(FITS_THRESHOLD, may_fit), may_fit)

    def verdict(self, probability: float) -> Verdict:
        """Return the verdict on one result."""
        return "fits" if probability >= self.fits else "may_fit" if probability >= self.may_fit else "nothing_close"

    def verdicts(self, probabilities: Tensor, p_any_match: float) -> tuple[Verdict, ...]:
        """Return the verdicts on the results of one query, from (num_results,) match probabilities."""
        chances = probabilities.tolist()
        found = [self.verdict(chance) for chance in chances]
        if p_any_match >= self.may_fit and best(found) == "nothing_close":
            likeliest = max(chances, default=0.0)
            found = ["may_fit" if chance == likeliest else "nothing_close" for chance in chances]
        return tuple(found)


def best(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a whole answer: that of its best result; `nothing_close` without results."""
    return min(verdicts, key=VERDICTS.index, default="nothing_close")
