"""Which of many like cases every run of the tests has; the others run with the slow tests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

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


def _case(case: object, usual: bool):
    named = isinstance(case, _Named)
    values = case.values if named else case if isinstance(case, tuple) else (case,)
    marks = [*(case.marks if named else ()), *(() if usual else (pytest.mark.slow,))]
    return pytest.param(*values, marks=marks, id=case.id if named else None)
