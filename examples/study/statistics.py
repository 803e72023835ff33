"""Means, paired differences and their intervals over seeds.

An interval is mean +- t s / sqrt(n): s is the standard deviation of n values with n - 1 in the denominator, t the
0.975 quantile of Student's t with n - 1 degrees of freedom (Student, "The probable error of a mean", Biometrika 6,
1908). It holds the true mean in 95 % of studies if the values are independent and normal.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit


class Interval(NamedTuple):
    """A mean over seeds and half the width of its 95 % interval, which is None for a single seed."""

    mean: float
    half: float | None
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval. A single seed excludes nothing."""
        return self.half is not None and abs(self.mean) > self.half


def deviation(values: Sequence[float]) -> float | None:
    """The standard deviation with n - 1 in the denominator. None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def resolved(deviation: float, seeds: int) -> float:
    """The smallest mean of `seeds` values whose 95 % interval excludes 0, if their standard deviation is that."""
    return float(stdtrit(seeds - 1, 0.975)) * deviation / math.sqrt(seeds)


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean of at least one value."""
    spread = deviation(values)
    half = None if spread is None else resolved(spread, len(values))
    return Interval(float(np.mean(values)), half, len(values))


def differences(values: Mapping[int, float], reference: Mapping[int, float]) -> list[float]:
    """The values minus the reference's values with the same seed, for the seeds that both have."""
    return [values[seed] - reference[seed] for seed in sorted(values.keys() & reference.keys())]
