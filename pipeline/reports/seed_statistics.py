"""Comparison of two variants over seeds: difference of the means and a two-sided t test."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_CRITICAL_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantile of Student's t for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Comparison:
    """A variant compared with the baseline.

    Attributes:
        difference: Difference of the means.
        deviations: Difference divided by the standard deviation over seeds, pooled over both variants; None with one seed each.
        significant: Whether a two-sided t test rejects equal means at the 5 % level.
    """

    difference: float
    deviations: float | None
    significant: bool


def compare(values: Sequence[float], baseline: Sequence[float]) -> Comparison | None:
    """Compare the values of a variant with those of the baseline, one per seed; None if either has no values."""
    if not values or not baseline:
        return None
    difference = statistics.mean(values) - statistics.mean(baseline)
    degrees = len(values) + len(baseline) - 2
    if degrees < 1:
        return Comparison(difference, None, False)
    squares = sum((v - statistics.mean(group)) ** 2 for group in (values, baseline) for v in group)
    deviation = math.sqrt(squares / degrees)
    if deviation == 0:
        return Comparison(difference, math.copysign(math.inf, difference) if difference else 0.0, difference != 0)
    needed = critical_t(degrees) * math.sqrt(1 / len(values) + 1 / len(baseline))
    return Comparison(difference, difference / deviation, abs(difference / deviation) > needed)


def critical_t(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t.

    It is from a table for up to 10 degrees of freedom, by the Cornish-Fisher expansion beyond.
    """
    if degrees <= len(_CRITICAL_T):
        return _CRITICAL_T[degrees - 1]
    return 1.95996 + 2.37227 / degrees + 2.8225 / degrees**2 + 2.5558 / degrees**3  # Relative error below 0.01 %.
