"""Floor 1, the words for a probability: fits, may fit, nothing close; and the lines between them.

Place in the flow: `match probabilities -> verdicts (here) -> calibration -> page and API`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

Verdict = Literal["fits", "may_fit", "nothing_close", "no_meaning"]
"""What to think of a result or of a whole answer; `no_meaning` is of nonsense and empty pictures."""

VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""All of them, the best first."""

FITS_LINE = 0.5
"""Match probability from which a result fits, unless a calibration says otherwise."""


@dataclass(frozen=True)
class Lines:
    """Probabilities at which the verdicts of one direction begin.

    Attributes:
        fits: match probability from which a result fits.
        may_fit: match probability from which a result may fit; and probability that any candidate is a match, from
            which the likeliest result may fit in any case. Below it nothing is close.
    """

    fits: float
    may_fit: float

    def __post_init__(self) -> None:
        if not 0 <= self.may_fit <= self.fits <= 1:
            raise ValueError(f"Lines are probabilities, `may_fit` not above `fits`, unlike {self}.")

    @classmethod
    def of(cls, may_fit: float) -> Lines:
        """Put the usual line of `fits` above a line of `may_fit`."""
        return cls(max(FITS_LINE, may_fit), may_fit)

    def verdict(self, probability: float) -> Verdict:
        """Say what to think of one result."""
        return "fits" if probability >= self.fits else "may_fit" if probability >= self.may_fit else "nothing_close"

    def verdicts(self, probabilities: Tensor, something_fits: float) -> tuple[Verdict, ...]:
        """Say what to think of the results of one query.

        Args:
            probabilities: (num_results,), that a result is a match.
            something_fits: probability that any candidate is a match.
        """
        chances = probabilities.tolist()
        found = [self.verdict(chance) for chance in chances]
        if something_fits >= self.may_fit and best(found) == "nothing_close":
            likeliest = max(chances, default=0.0)
            found = ["may_fit" if chance == likeliest else "nothing_close" for chance in chances]
        return tuple(found)


def best(verdicts: Iterable[Verdict]) -> Verdict:
    """Say what to think of a whole answer: what its best result is; of none, that nothing is close."""
    return min(verdicts, key=VERDICTS.index, default="nothing_close")
