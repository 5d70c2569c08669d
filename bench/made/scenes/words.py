"""The words for what is in a scene, all of them one piece of BERT's uncased vocabulary."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bench.made.scenes.scene import Pair, Thing

NUMBERS = ("no", "one", "two", "three", "four", "five")
# The usual word first; then others, and what share of the time one of them is said.
_NOUNS = {"circle": ("disc",), "cross": ("plus",), "moon": ("crescent",)}
_COLORS = {"gray": ("grey",), "purple": ("violet",)}
_SIZES = {"large": ("big",), "small": ("little", "tiny")}
_RARELY, _OFTEN = 0.12, 0.35
# Words that every thing is.
ANYTHING = ("shape", "object", "thing")

# "{a} above {b}": column and row of a less those of b, and how it is said.
RELATIONS = {
    "above": ((0, -1), ("above", "over", "higher than")),
    "below": ((0, 1), ("below", "under", "beneath", "lower than")),
    "left": ((-1, 0), ("to the left of", "left of")),
    "right": ((1, 0), ("to the right of", "right of")),
}
_PLACES = {
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "at the top of the picture"),
    "bottom": ("at the bottom", "at the bottom of the picture"),
    "middle": ("in the middle", "in the center"),
}
_CORNERS = ("in the {} corner", "at the {}", "in the {}")


@dataclass(frozen=True)
class Kind:
    """Things of a size, a color and a shape, whichever of them are named."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def has(self, thing: Thing) -> bool:
        """Whether a thing is of this kind."""
        return (
            self.size in (None, thing.size) and self.color in (None, thing.color) and self.shape in (None, thing.shape)
        )

    def count(self, things: Sequence[Thing]) -> int:
        """How many of them are of this kind."""
        return sum(map(self.has, things))

    def names(self, pairs: Collection[Pair]) -> bool:
        """Whether it names one of these shapes together with its color."""
        return (self.shape, self.color) in pairs


def kind_of(thing: Thing, attributes: Sequence[str]) -> Kind:
    """The kind that a thing is of by some of its attributes."""
    return Kind(**{name: getattr(thing, name) for name in attributes})


def related(a: Thing, b: Thing, relation: str) -> bool:
    """Whether `a` is above, below, left or right of `b`: in another row, or another column."""
    (columns, rows), _ = RELATIONS[relation]
    return columns * (a.column - b.column) > 0 or rows * (a.row - b.row) > 0


def say(rng: random.Random, kind: Kind, *, many: bool = False, anything: str = "shape") -> str:
    """A kind without an article.

    Args:
        rng: chooses among words of one meaning.
        kind: what is spoken of.
        many: more than one, or none.
        anything: the word where no shape is named.
    """
    words = []
    if kind.size:
        words.append(_one_of(rng, kind.size, _SIZES, _OFTEN))
    if kind.color:
        words.append(_one_of(rng, kind.color, _COLORS, _RARELY))
    noun = anything if kind.shape is None else kind.shape
    # Plurals of the rarer nouns are no single pieces.
    words.append(_plural(noun) if many else _one_of(rng, noun, _NOUNS, _RARELY))
    return " ".join(words)


def some(rng: random.Random, kind: Kind, count: int = 1, anything: str = "shape") -> str:
    """So many of a kind: "a red circle", "two moons"."""
    said = say(rng, kind, many=count != 1, anything=anything)
    if count == 1:
        return f"{'an' if said[0] in 'aeiou' else 'a'} {said}"
    return f"{NUMBERS[count]} {said}"


def where(rng: random.Random, place: str) -> str:
    """A place in the picture: "at the top", "in the top left corner"."""
    return rng.choice(_CORNERS).format(place) if " " in place else rng.choice(_PLACES[place])


def joined(parts: Sequence[str]) -> str:
    """A, b and c."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _plural(noun: str) -> str:
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _one_of(rng: random.Random, word: str, others: dict[str, tuple[str, ...]], share: float) -> str:
    return rng.choice(others[word]) if word in others and rng.random() < share else word
