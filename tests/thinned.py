"""Which of many like cases every run of the tests has, which run with the slow tests, which when there is time."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

EXHAUSTIVE = (pytest.mark.slow, pytest.mark.exhaustive)
_Named = type(pytest.param())


def thinned(cases: Iterable, keep: int, first: int = 0) -> list:
    """All cases for `pytest.mark.parametrize`, of which all but every `keep`-th are slow.

    Of a product of lists whose lengths have no divisor in common with `keep`, each value of each list is still there.
    """
    return [_case(case, number % keep == first) for number, case in enumerate(cases)]


def paired(many: Sequence, few: Sequence) -> list:
    """All pairs for `pytest.mark.parametrize`, slow but for one of each of `many`, which take turns with `few`."""
    return [
        _case((one, other), number % len(few) == place)
        for number, one in enumerate(many)
        for place, other in enumerate(few)
    ]


def sampled(cases: Iterable, keep: int, first: int = 0) -> list:
    """All cases of a slow test, of which all but every `keep`-th are exhaustive."""
    return [_case(case, number % keep == first, EXHAUSTIVE) for number, case in enumerate(cases)]


def mark_exhaustive(items: Iterable[pytest.Item], many: int = 12, keep: int = 3) -> None:
    """Leave one in three slow cases of a test that has many of them; the others are marked exhaustive.

    A sum over a case's name chooses it: the same ones every time, and no period of a product of lists is hit.
    """
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for alike in cases.values():
        ordered = sorted(alike, key=lambda item: zlib.crc32(item.nodeid.encode()))
        for item in ordered[-(-len(alike) // keep) :] if len(alike) > many else ():
            item.add_marker(pytest.mark.exhaustive)


def _case(case: object, usual: bool, others: Sequence[pytest.MarkDecorator] = (pytest.mark.slow,)):
    named = isinstance(case, _Named)
    values = case.values if named else case if isinstance(case, tuple) else (case,)
    marks = [*(case.marks if named else ()), *(() if usual else others)]
    return pytest.param(*values, marks=marks, id=case.id if named else None)
