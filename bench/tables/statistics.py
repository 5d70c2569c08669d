"""The papers' significance tests, by SciPy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.tables.measured import mean


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
    pairs = [(mean(first[task]), mean(second[task])) for task in tasks]
    if not pairs or all(a == b for a, b in pairs):
        return None
    # Of equal sizes of differences the test has ranks between them, which rounding of a difference would undo.
    found = stats.wilcoxon([round(a - b, 9) for a, b in pairs], alternative="greater")
    return Test(float(found.pvalue), len(pairs))


# Below a table in which `constant` has left a cell without a p.
CONSTANT = (
    "No p where the seeds of both methods agree to the last digit: samples without variance say nothing of chance, and "
    "by the formula any difference between them would be certain."
)


def welch(first: Sequence[float], second: Sequence[float]) -> Test | None:
    """Welch's t-test of one task, seeds against seeds, unequal variances: Fig. 16.

    Returns:
        The test; None for fewer than two seeds and for `constant` samples, of which it is not defined.
    """
    if min(len(first), len(second)) < 2 or constant(first, second):
        return None
    return Test(float(t_test(first, second, "greater").pvalue), len(first))


def t_test(first: Sequence[float], second: Sequence[float], alternative: str = "two-sided"):
    """SciPy's `ttest_ind` with unequal variances, of samples of two values or more; at most one is `constant`.

    The rounding of a constant sample's mean would be its variance; SciPy warns of it. Counted from the constant, the
    sample is zero, its variance is none, and no difference has changed.
    """
    from scipy import stats

    origin = next((sample[0] for sample in (first, second) if len({*sample}) == 1), 0.0)
    samples = ([value - origin for value in sample] for sample in (first, second))
    return stats.ttest_ind(*samples, equal_var=False, alternative=alternative)


def constant(first: Sequence[float], second: Sequence[float]) -> bool:
    """Whether both are of two seeds or more and neither sample varies. One that does makes a test."""
    return min(len(first), len(second)) > 1 and len({*first}) == len({*second}) == 1
