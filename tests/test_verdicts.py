"""Probabilities become words, and the best result speaks for the answer."""

import pytest
import torch

from alignment.confidence.calibration import Thresholds, best

THRESHOLDS = Thresholds(fits=0.5, may_fit=0.2)


@pytest.mark.parametrize(
    ("probability", "verdict"),
    [(1, "fits"), (0.5, "fits"), (0.49, "may_fit"), (0.2, "may_fit"), (0.19, "nothing_close"), (0, "nothing_close")],
)
def test_a_line_belongs_to_what_is_above_it(probability, verdict):
    assert THRESHOLDS.verdict(probability) == verdict


@pytest.mark.parametrize(
    ("probabilities", "p_any_match", "verdicts"),
    [
        ([0.6, 0.3, 0.1], 0.7, ["fits", "may_fit", "nothing_close"]),
        ([0.1, 0.15], 0.19, ["nothing_close", "nothing_close"]),
        ([0.1, 0.15], 0.2, ["nothing_close", "may_fit"]),  # one of them does, so the likeliest may
        ([0.1, 0.15], 0.9, ["nothing_close", "may_fit"]),  # but no more than that
        ([0.1, 0.1, 0.05], 0.9, ["may_fit", "may_fit", "nothing_close"]),
        ([0.3, 0.1], 0.1, ["may_fit", "nothing_close"]),
        ([], 0.0, []),
    ],
)
def test_results_are_judged_one_by_one_and_the_likeliest_for_all(probabilities, p_any_match, verdicts):
    assert list(THRESHOLDS.verdicts(torch.tensor(probabilities), p_any_match)) == verdicts


def test_the_best_result_speaks_for_the_answer():
    assert best(["nothing_close", "fits", "may_fit"]) == "fits"
    assert best(["no_meaning", "no_meaning"]) == "no_meaning"
    assert best([]) == "nothing_close"


@pytest.mark.parametrize(("fits", "may_fit"), [(0.2, 0.3), (1.1, 0.5), (0.5, -0.1), (0.5, float("nan"))])
def test_lines_that_are_none_are_refused(fits, may_fit):
    with pytest.raises(ValueError, match="Thresholds"):
        Thresholds(fits, may_fit)
