"""Which cases run when: all of them sometime, of many slow ones a third with the slow tests."""

from __future__ import annotations

import pytest

from tests.thinned import mark_exhaustive, paired, sampled, thinned


class Item:
    """As much of pytest's as is looked at."""

    def __init__(self, nodeid: str, *marks: str):
        self.nodeid, self.marks = nodeid, {*marks}

    def get_closest_marker(self, name: str) -> object:
        return name if name in self.marks else None

    def add_marker(self, mark: pytest.MarkDecorator) -> None:
        self.marks.add(mark.name)


def usual(cases: list) -> list[bool]:
    return [not any(mark.name == "slow" for mark in case.marks) for case in cases]


def test_every_so_many_cases_are_usual():
    assert usual(thinned(range(7), 3)) == [True, False, False, True, False, False, True]
    assert usual(thinned(range(4), 2, first=1)) == [False, True, False, True]


def test_of_a_slow_tests_cases_the_others_are_exhaustive():
    marks = [{mark.name for mark in case.marks} for case in sampled([1, 2, 3], 2)]
    assert marks == [set(), {"slow", "exhaustive"}, set()]


def test_pairs_take_turns_and_every_one_of_many_is_there():
    cases = paired("abc", "xy")
    assert [case.values for case in cases if not case.marks] == [("a", "x"), ("b", "y"), ("c", "x")]
    assert len(cases) == 6


def test_of_many_slow_cases_a_third_is_left_the_same_ones_whatever_else_there_is():
    def left(others: list[Item]) -> set[str]:
        items = [Item(f"a.py::many[{number}]", "slow") for number in range(20)]
        mark_exhaustive([*others, *items])
        assert all("slow" in item.marks for item in items)
        return {item.nodeid for item in items if "exhaustive" not in item.marks}

    few = [Item(f"a.py::few[{number}]", "slow") for number in range(12)]
    quick = [Item(f"a.py::many[quick{number}]") for number in range(50)]
    assert len(left([])) == 7 and left([*few, *quick]) == left([])
    assert not any("exhaustive" in item.marks for item in (*few, *quick))
