"""Ten people's answers to a question: mostly the right one, some in another word, a few wrong."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

PEOPLE = 10
# The right answer is always the most frequent, by this many at the least: whoever gives it has full accuracy.
AGREE = 6

# Other words for an answer, and how often a person uses one of them.
_ALIKE = {
    "gray": (("grey",), 0.25), "purple": (("violet",), 0.12), "circle": (("round", "disc"), 0.12),
    "cross": (("plus",), 0.12), "moon": (("crescent",), 0.12), "square": (("box",), 0.06), "middle": (("center",), 0.2),
    "0": (("none", "zero"), 0.1), "1": (("one",), 0.06), "2": (("two",), 0.06), "3": (("three",), 0.06),
    "4": (("four",), 0.06), "5": (("five",), 0.06), "top left": (("upper left", "left corner"), 0.15),
    "top right": (("upper right", "right corner"), 0.15), "bottom left": (("lower left", "left corner"), 0.15),
    "bottom right": (("lower right", "right corner"), 0.15), "left": (("on left", "left side"), 0.1),
    "right": (("on right", "right side"), 0.1),
}  # fmt: skip
# What an answer is mistaken for.
_MISTAKEN = {
    "red": ("orange", "pink"), "green": ("blue", "brown"), "blue": ("purple", "green"), "yellow": ("orange", "white"),
    "orange": ("yellow", "red"), "purple": ("blue", "pink"), "pink": ("purple", "red"), "brown": ("orange", "black"),
    "gray": ("black", "white"), "black": ("gray", "brown"), "white": ("gray", "yellow"),
    "circle": ("ring", "moon"), "square": ("cross", "diamond"), "triangle": ("star", "square"),
    "star": ("cross", "heart"), "cross": ("star", "square"),
    "ring": ("circle", "moon"), "heart": ("star", "triangle"), "moon": ("ring", "circle"),
    "yes": ("no",), "no": ("yes",),
    "0": ("1",), "1": ("0", "2"), "2": ("1", "3"), "3": ("2", "4"), "4": ("3", "5"), "5": ("4",),
    "top": ("top left", "top right"), "bottom": ("bottom left", "bottom right"), "left": ("top left", "bottom left"),
    "right": ("top right", "bottom right"), "middle": ("top", "bottom", "left", "right"), "top left": ("top", "left"),
    "top right": ("top", "right"), "bottom left": ("bottom", "left"), "bottom right": ("bottom", "right"),
}  # fmt: skip
# How often a person is wrong about an easy, a usual and a hard question, and how many there are of each.
_WRONG, _HOW_HARD = (0.005, 0.05, 0.18), (0.55, 0.33, 0.12)


def answers(rng: random.Random, right: str) -> list[str]:
    """What ten people answer.

    Args:
        rng: of who says what.
        right: the answer.
    """
    wrong = rng.choices(_WRONG, _HOW_HARD)[0]
    others, share = _ALIKE.get(right, ((), 0.0))
    while True:
        given = []
        for _ in range(PEOPLE):
            draw = rng.random()
            if draw < wrong:
                given.append(rng.choice(_MISTAKEN[right]))
            else:
                given.append(rng.choice(others) if draw < wrong + share else right)
        if given.count(right) >= AGREE:
            return given


def accuracy(answer: str, given: Sequence[str]) -> float:
    """The official accuracy of an answer, in [0, 1]: how many others said so, three of them being enough.

    The mean over the ten ways to leave out one of the people.

    Args:
        answer: compared as it is, without the official normalisation, which these answers do not need.
        given: by ten people.
    """
    same = Counter(given)[answer]
    return (same * min(1, (same - 1) / 3) + (len(given) - same) * min(1, same / 3)) / len(given)
