"""Floor 2, how sure a match is: the probability of a match, and whether any candidate matches.

Place in the flow: `similarity -> confidence (here) -> gallery -> page`.
"""

from alignment.confidence.calibration import (
    DEFAULT_CALIBRATION,
    VERDICTS,
    Calibration,
    MatchCalibrator,
    MatchConfidence,
    Thresholds,
    Verdict,
    fit_calibration,
)
from alignment.confidence.cohort import DIRECTIONS, Cohort, Direction, build_cohort, cohort_items, cohort_version

__all__ = [
    "DEFAULT_CALIBRATION", "DIRECTIONS", "VERDICTS", "Calibration", "Cohort", "Direction", "MatchCalibrator",
    "MatchConfidence", "Thresholds", "Verdict", "build_cohort", "cohort_items", "cohort_version",
    "fit_calibration",
]  # fmt: skip
