"""How large a difference is, beside whether it is one; and what many tests at once leave of their p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from bench.tables import statistics


def rank_biserial(first: Sequence[float], second: Sequence[float]) -> float:
    """Of pairs, Wilcoxon's effect size: (ranks in favour - ranks against) / all ranks, from -1 to 1.

    Pairs without a difference are left out, as the test does; nan if none is left.
    """
    from scipy import stats

    # To the digits that accuracies have, as the test counts them.
    differences = np.round(np.subtract(first, second), 9)
    differences = differences[differences != 0]
    if differences.size == 0:
        return math.nan
    ranks = stats.rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum())


def hedges_g(first: Sequence[float], second: Sequence[float]) -> float:
    """The difference of two means in deviations, corrected for small samples (Hedges 1981).

    The deviation is the root of the two variances' mean, so that unequal ones count alike. The correction is exact for
    equal variances. nan for fewer than two values and for samples without variance: nothing to measure in.
    """
    from scipy import special

    if min(len(first), len(second)) < 2 or statistics.constant(first, second):
        return math.nan
    deviation = math.sqrt((_variance(first) + _variance(second)) / 2)
    free = len(first) + len(second) - 2
    correction = math.exp(special.gammaln(free / 2) - special.gammaln((free - 1) / 2)) * math.sqrt(2 / free)
    return float((np.mean(first) - np.mean(second)) / deviation * correction)


def _variance(sample: Sequence[float]) -> float:
    # Counted from one of them: of values that agree it is 0, and not the rounding of their mean.
    return float(np.var(np.subtract(sample, sample[0]), ddof=1))


def interval(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the difference of two means, by Welch's degrees of freedom.

    nan for fewer than two values and for samples without variance, of which the formula would have an interval of no
    width: certainty from seeds that say nothing of chance.
    """
    if min(len(first), len(second)) < 2 or statistics.constant(first, second):
        return math.nan, math.nan
    found = statistics.t_test(first, second).confidence_interval(level)
    return float(found.low), float(found.high)


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm (1979): the chance of one false finding in the whole family stays below the level."""
    from statsmodels.stats.multitest import multipletests

    return [] if not p else multipletests(p, method="holm")[1].tolist()
