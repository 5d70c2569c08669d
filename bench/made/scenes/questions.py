"""Questions about a scene of which the picture decides the answer, and the choice among them that keeps answers even.

A question has a family, which the official files carry as its `question_type`, and within the family a form: questions
of one form differ in the words for shapes, colors and places alone. Which family is asked, and which of a form's
questions, depends on what has been asked of the split so far: the answers that are still rare come first, so that
neither the family nor the wording says much about the answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations, product
from typing import Any

from bench.made.scenes.scene import COLORS, SHAPES, SIZES, Pair, Scene, Thing
from bench.made.scenes.words import ANYTHING, RELATIONS, Kind, kind_of, related, say, some, where

# Answer types of the official evaluation, by family.
ANSWER_TYPES = {
    "color": "other", "shape": "other", "count": "number", "exists": "yes/no", "place": "other", "relation": "yes/no",
    "compare": "yes/no", "which": "other",
}  # fmt: skip
FAMILIES = tuple(ANSWER_TYPES)
# Nobody asks what shape the shape is.
_NOUNS = {"shape": ("object", "thing")}

# A part of a question: in words, given the noun for a thing whose shape is not named.
Words = Callable[[random.Random, str], str]
# What a thing is told by, and the words for it.
Told = tuple[Any, Words]


@dataclass(frozen=True)
class Asked:
    """A question with its answer."""

    family: str
    text: str
    answer: str


@dataclass(frozen=True)
class _Candidate:
    """A question that could be asked: its answer, what it is about, and the words for it when it is chosen."""

    answer: str
    about: Any
    words: Words


Form = Callable[[Scene, Collection[Pair]], Iterator[_Candidate]]


class Questioner:
    """Asks of one scene after the other.

    Args:
        unspoken: pairs of a shape and a color that no question names together.
    """

    def __init__(self, unspoken: Collection[Pair]) -> None:
        self._unspoken = frozenset(unspoken)
        self._asked: Counter[tuple[Any, ...]] = Counter()

    def ask(self, rng: random.Random, scene: Scene, count: int) -> list[Asked]:
        """Different questions about a scene, of different families as far as there are such.

        Args:
            rng: chooses among what is equally rare, and the words.
            scene: what is asked about.
            count: how many questions; fewer come back where a scene has no more.
        """
        asked: list[Asked] = []
        for _ in range(count):
            order = rng.sample(FAMILIES, len(FAMILIES))
            for family in sorted(order, key=lambda family: self._asked[family,]):
                one = self._one(rng, scene, family, {other.text for other in asked})
                if one:
                    asked.append(one)
                if len(asked) == count:
                    return asked
        return asked

    def _one(self, rng: random.Random, scene: Scene, family: str, known: Collection[str]) -> Asked | None:
        """A question of a family, other than those known; None where there is none, or the words came out the same."""
        forms = _FAMILIES[family]
        for form in rng.sample(forms, len(forms)):
            found = list(form(scene, self._unspoken))
            if not found:
                continue
            rng.shuffle(found)
            asked = self._asked
            rarest = min(asked[form, one.answer] for one in found)
            found = [one for one in found if asked[form, one.answer] == rarest]
            chosen = min(found, key=lambda one: asked[form, one.answer, one.about])
            text = chosen.words(rng, rng.choice(_NOUNS.get(family, ANYTHING)))
            if text in known:
                continue
            asked.update([(family,), (form, chosen.answer), (form, chosen.answer, chosen.about)])
            return Asked(family, text, chosen.answer)
        return None


def _references(scene: Scene, thing: Thing, attributes: Sequence[str], unspoken: Collection[Pair]) -> list[Kind]:
    """Kinds of which the thing is the only one, by some attributes; of these no more than needed."""
    for size in range(1, len(attributes) + 1):
        kinds = [kind_of(thing, chosen) for chosen in combinations(attributes, size)]
        kinds = [kind for kind in kinds if kind.count(scene.things) == 1 and not kind.names(unspoken)]
        if kinds:
            return kinds
    return []


def _the(kind: Kind) -> Words:
    return lambda rng, noun: f"the {say(rng, kind, anything=noun)}"


def _by_attributes(scene: Scene, thing: Thing, attributes: Sequence[str], unspoken: Collection[Pair]) -> Iterator[Told]:
    """Ways to speak of a thing by what it is."""
    for kind in _references(scene, thing, attributes, unspoken):
        yield kind, _the(kind)


def _by_place(scene: Scene, thing: Thing, attributes: Sequence[str], unspoken: Collection[Pair]) -> Iterator[Told]:
    """Ways to speak of a thing by where it is."""
    same_row, same_column = (
        sum(getattr(other, line) == getattr(thing, line) for other in scene.things) for line in ("row", "column")
    )
    # Any other thing in the top row could be the one "at the top" as well.
    sides = {"top": same_row, "bottom": same_row, "left": same_column, "right": same_column}
    if sides.get(thing.place, 1) == 1:
        yield thing.place, lambda rng, noun: f"the {noun} {where(rng, thing.place)}"


def _by_relation(scene: Scene, thing: Thing, attributes: Sequence[str], unspoken: Collection[Pair]) -> Iterator[Told]:
    """Ways to speak of a thing by how it alone stands to another one."""
    for other in scene.things:
        if other is thing:
            continue
        for relation, (_, how) in RELATIONS.items():
            if [one for one in scene.things if related(one, other, relation)] == [thing]:
                for kind in _references(scene, other, ("shape", "color"), unspoken):
                    yield (
                        relation,
                        lambda rng, noun, how=how, kind=kind: f"the {noun} {rng.choice(how)} {_the(kind)(rng, noun)}",
                    )


def _about_one(
    answer: str, attributes: Sequence[str], tell: Callable[..., Iterator[Told]], ways: Sequence[str]
) -> Form:
    """The form of questions about an attribute of one thing.

    Args:
        answer: the attribute that is asked for.
        attributes: those that the thing may be told by.
        tell: how it is told.
        ways: to put the question.
    """

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for thing in scene.things:
            for about, the in tell(scene, thing, attributes, unspoken):
                yield _Candidate(getattr(thing, answer), about, _put(ways, the))

    return form


def _put(ways: Sequence[str], *parts: Words) -> Words:
    return lambda rng, noun: rng.choice(ways).format(*(part(rng, noun) for part in parts))


_COLOR = ("what color is {}?", "what is the color of {}?", "which color does {} have?", "what color does {} have?")
_SHAPE = ("what shape is {}?", "what is {}?", "what is the shape of {}?", "which shape is {}?")
_WHERE = ("where is {}?", "where is {} in the picture?", "in which part of the picture is {}?", "where do you see {}?")
_HOW_MANY = (
    "how many {} are there?", "how many {} are in the picture?", "how many {} can you see?", "how many {} do you see?",
    "what is the number of {}?",
)  # fmt: skip
_IS_THERE = (
    "is there {}?",
    "is there {} in the picture?",
    "can you see {}?",
    "do you see {}?",
    "does the picture show {}?",
)


def _many(kind: Kind) -> Words:
    return lambda rng, noun: say(rng, kind, many=True, anything=noun)


def _kinds(*named: str) -> list[Kind]:
    """All kinds by some attributes."""
    values = {"size": tuple(SIZES), "color": tuple(COLORS), "shape": SHAPES}
    return [Kind(**dict(zip(named, chosen, strict=True))) for chosen in product(*(values[name] for name in named))]


def _how_many(*named: str) -> Form:
    kinds = _kinds(*named)

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for kind in kinds:
            if not kind.names(unspoken):
                yield _Candidate(str(kind.count(scene.things)), kind, _put(_HOW_MANY, _many(kind)))

    return form


def _is_there(*named: str) -> Form:
    kinds = _kinds(*named)

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for kind in kinds:
            there = kind.count(scene.things) > 0
            # What is not there but could be: each of its attributes is in the picture, on different things.
            near = all(any(getattr(kind, name) == getattr(thing, name) for thing in scene.things) for name in named)
            if not kind.names(unspoken) and (there or near or len(named) == 1):
                words = _put(_IS_THERE, lambda rng, noun, kind=kind: some(rng, kind, anything=noun))
                yield _Candidate("yes" if there else "no", kind, words)

    return form


def _told_pairs(scene: Scene, unspoken: Collection[Pair]) -> Iterator[tuple[Thing, Kind, Thing, Kind]]:
    """Pairs of things in either order, each with a kind of which it is the only one."""
    told = [(thing, kind) for thing in scene.things for kind in _references(scene, thing, ("shape", "color"), unspoken)]
    for (a, first), (b, second) in permutations(told, 2):
        if a is not b:
            yield a, first, b, second


def _is_related(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
    for a, first, b, second in _told_pairs(scene, unspoken):
        for relation, (_, how) in RELATIONS.items():
            yes = related(a, b, relation)
            if yes or related(b, a, relation):
                words = _put(tuple(f"is {{}} {one} {{}}?" for one in how), _the(first), _the(second))
                yield _Candidate(_yes(yes), relation, words)


def _is_larger(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
    for a, first, b, second in _told_pairs(scene, unspoken):
        if a.size != b.size:
            for size, words in (("large", ("larger", "bigger")), ("small", ("smaller",))):
                ways = tuple(f"is {{}} {word} than {{}}?" for word in words)
                yield _Candidate(_yes(a.size == size), size, _put(ways, _the(first), _the(second)))


def _are_same(attribute: str, ways: Sequence[str]) -> Form:
    """Whether two things, told by another attribute, have the same of this one."""

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for a, first, b, second in _told_pairs(scene, unspoken):
            if getattr(first, attribute) is None and getattr(second, attribute) is None:
                same = getattr(a, attribute) == getattr(b, attribute)
                yield _Candidate(_yes(same), None, _put(ways, _the(first), _the(second)))

    return form


def _are_more(attribute: str) -> Form:
    """Whether there are more things of one shape, or color, than of another; one of them is there."""
    kinds = _kinds(attribute)

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for first, second in permutations(kinds, 2):
            a, b = first.count(scene.things), second.count(scene.things)
            if a and b and a != b:
                yield _Candidate(_yes(a > b), "more", _put(_MORE, _many(first), _many(second)))
                yield _Candidate(_yes(a < b), "fewer", _put(_FEWER, _many(first), _many(second)))

    return form


_MORE = ("are there more {} than {}?", "do you see more {} than {}?")
_FEWER = ("are there fewer {} than {}?", "do you see fewer {} than {}?")


def _which(attribute: str, asked: str) -> Form:
    """Which of two things, told by their shapes or their colors, is larger, higher, farther to the left ..."""
    words = {
        "large": ("larger", "bigger"), "small": ("smaller",), "above": ("higher", "closer to the top"),
        "below": ("lower", "closer to the bottom"), "left": ("further left", "closer to the left side"),
        "right": ("further right", "closer to the right side"),
    }  # fmt: skip

    def form(scene: Scene, unspoken: Collection[Pair]) -> Iterator[_Candidate]:
        for a, first, b, second in _told_pairs(scene, unspoken):
            if first != kind_of(a, (attribute,)) or second != kind_of(b, (attribute,)):
                continue
            true = {"size": {a.size} if a.size != b.size else set()}
            true["place"] = {relation for relation in RELATIONS if related(a, b, relation)}
            for one in true[asked]:
                # Either may be named first: in a pair of candidates each of the two is.
                for parts in ((_the(first), _the(second)), (_the(second), _the(first))):
                    ways = tuple(f"which is {word}, {{}} or {{}}?" for word in words[one])
                    yield _Candidate(getattr(a, attribute), one, _put(ways, *parts))

    return form


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _seen(attribute: str, others: Sequence[str], ways: Sequence[str]) -> tuple[Form, ...]:
    return tuple(_about_one(attribute, others, tell, ways) for tell in (_by_attributes, _by_place, _by_relation))


_FAMILIES: dict[str, tuple[Form, ...]] = {
    "color": _seen("color", ("shape", "size"), _COLOR),
    "shape": _seen("shape", ("color", "size"), _SHAPE),
    "count": (_how_many(), _how_many("shape"), _how_many("color"), _how_many("size"), _how_many("color", "shape")),
    "exists": (_is_there("color", "shape"), _is_there("shape"), _is_there("color"), _is_there("size", "shape")),
    "place": (_about_one("place", ("shape", "color", "size"), _by_attributes, _WHERE),),
    "relation": (_is_related,),
    "compare": (
        _is_larger, _are_more("shape"), _are_more("color"),
        _are_same("color", ("are {} and {} the same color?", "do {} and {} have the same color?")),
        _are_same("shape", ("are {} and {} the same shape?", "do {} and {} have the same shape?")),
    ),
    "which": (_which("shape", "size"), _which("color", "size"), _which("shape", "place"), _which("color", "place")),
}  # fmt: skip
