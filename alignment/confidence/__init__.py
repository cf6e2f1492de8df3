"""Floor 2, how sure a match is: the probability of a match, and whether any candidate matches.

Place in the flow: `similarity -> confidence (here) -> gallery -> page`.

| module       | what it does |
|--------------|--------------|
| `cohort`     | unrelated items that a query's scores are compared with |
| `ood_probes` | random texts and blank images, to recognise meaningless queries |
| `curve`      | the logistic curve and its fit |
| `calibration` | match probabilities of a model, and their fit |
| `calibrator` | calibration and cohort of one gallery |
| `verdicts`   | thresholds that turn probabilities into verdicts |
"""

from alignment.confidence.calibration import DEFAULT_CALIBRATION, Calibration, MatchConfidence
from alignment.confidence.calibrator import MatchCalibrator, fit_calibration
from alignment.confidence.cohort import DIRECTIONS, Cohort, Direction, build_cohort, cohort_items, cohort_version
from alignment.confidence.verdicts import VERDICTS, Thresholds, Verdict

__all__ = [
    "DEFAULT_CALIBRATION",
    "DIRECTIONS",
    "VERDICTS",
    "Calibration",
    "Cohort",
    "Direction",
    "MatchCalibrator",
    "MatchConfidence",
    "Thresholds",
    "Verdict",
    "build_cohort",
    "cohort_items",
    "cohort_version",
    "fit_calibration",
]
