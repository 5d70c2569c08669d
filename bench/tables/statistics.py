"""The papers' significance tests, by SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Test:
    """A one-tailed test that the first is greater.

    Attributes:
        p: the probability of such a difference, or a greater, if there were none.
        count: pairs, or tasks, that it rests on.
    """

    p: float
    count: int


def wilcoxon(first: Mapping[str, Sequence[float]], second: Mapping[str, Sequence[float]]) -> Test | None:
    """Wilcoxon's signed-rank test over tasks, paired by task: Table 10.

    Args:
        first: accuracies of the seeds by task, of the method that should be better.
        second: of the rival.

    Returns:
        The test over the tasks that both have, exact where SciPy has the exact distribution; None if all differences
        are zero or there is no such task.
    """
    from scipy import stats

    tasks = [task for task in first if task in second]
    pairs = [(fmean(first[task]), fmean(second[task])) for task in tasks]
    if not pairs or all(a == b for a, b in pairs):
        return None
    found = stats.wilcoxon(*zip(*pairs, strict=True), alternative="greater")
    return Test(float(found.pvalue), len(pairs))


def welch(first: Sequence[float], second: Sequence[float]) -> Test | None:
    """Welch's t-test of one task, seeds against seeds, unequal variances: Fig. 16; None for fewer than two."""
    from scipy import stats

    if min(len(first), len(second)) < 2 or len({*first, *second}) == 1:
        return None
    found = stats.ttest_ind(first, second, equal_var=False, alternative="greater")
    return Test(float(found.pvalue), len(first))
