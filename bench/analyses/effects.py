"""How large a difference is, beside whether it is one; and what many tests at once leave of their p-values."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def rank_biserial(first: Sequence[float], second: Sequence[float]) -> float:
    """Of pairs, Wilcoxon's effect size: (ranks in favour - ranks against) / all ranks, from -1 to 1.

    Pairs without a difference are left out, as the test does; nan if none is left.
    """
    from scipy import stats

    differences = np.subtract(first, second)
    differences = differences[differences != 0]
    if differences.size == 0:
        return math.nan
    ranks = stats.rankdata(np.abs(differences))
    return float((ranks * np.sign(differences)).sum() / ranks.sum())


def hedges_g(first: Sequence[float], second: Sequence[float]) -> float:
    """The difference of two means in deviations, corrected for small samples (Hedges 1981).

    The deviation is the root of the two variances' mean, so that unequal ones count alike. The correction is exact for
    equal variances. nan for fewer than two values; infinite if neither sample varies.
    """
    from scipy import special

    if min(len(first), len(second)) < 2:
        return math.nan
    gap = np.mean(first) - np.mean(second)
    deviation = math.sqrt((np.var(first, ddof=1) + np.var(second, ddof=1)) / 2)
    if deviation == 0:
        return math.copysign(math.inf, gap) if gap else 0.0
    free = len(first) + len(second) - 2
    correction = math.exp(special.gammaln(free / 2) - special.gammaln((free - 1) / 2)) * math.sqrt(2 / free)
    return float(gap / deviation * correction)


def interval(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Of the difference of two means, by Welch's degrees of freedom; nan for fewer than two values."""
    from scipy import stats

    if min(len(first), len(second)) < 2:
        return math.nan, math.nan
    if len(set(first)) == len(set(second)) == 1:
        gap = first[0] - second[0]
        return gap, gap
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(level)
    return float(found.low), float(found.high)


def holm(p: Sequence[float]) -> list[float]:
    """P-values adjusted by Holm (1979): the chance of one false finding in the whole family stays below the level."""
    from statsmodels.stats.multitest import multipletests

    return [] if not p else multipletests(p, method="holm")[1].tolist()
