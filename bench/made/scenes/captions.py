"""Sentences about a scene, worded in different ways, every one true of it.

A number in a sentence, "a" among them, is always exactly how many things of that kind the picture has.
"""

from __future__ import annotations

import random

from bench.made.scenes.scene import Scene, Thing
from bench.made.scenes.words import RELATIONS, Kind, joined, kind_of, related, some, where

_OPENINGS = (
    "{}", "{}", "{}", "{}", "there {is} {}", "a picture of {}", "an image of {}", "a picture with {}",
    "the picture shows {}", "this image has {}", "here {is} {}",
)  # fmt: skip
_TRIES = 40


def captions(rng: random.Random, scene: Scene, count: int) -> list[str]:
    """Different sentences about a scene.

    Args:
        rng: chooses what is said and how.
        scene: what is spoken of.
        count: how many sentences.
    """
    said: list[str] = []
    for _ in range(_TRIES * count):
        ways, weights = zip(*_ways(scene), strict=True)
        sentence = rng.choices(ways, weights)[0](rng, scene)
        if sentence and sentence not in said:
            said.append(sentence)
        if len(said) == count:
            break
    return [f"{sentence[0].upper()}{sentence[1:]}." for sentence in said]


def _ways(scene: Scene):
    if len(scene.things) == 1:
        return (_all, 0.4), (_placed, 0.6)
    return (_all, 0.55), (_related, 0.2), (_placed, 0.15), (_counted, 0.1)


def _all(rng: random.Random, scene: Scene) -> str:
    """All things with their colors, sometimes their sizes: from large to small, or from the left."""
    order = rng.choice((lambda thing: (thing.size, thing.row, thing.column), lambda thing: (thing.column, thing.row)))
    things = sorted(scene.things, key=order)
    sized = rng.random() < 0.4
    parts = []
    for kind in dict.fromkeys(kind_of(thing, ("color", "shape")) for thing in things):
        same = [thing for thing in things if kind.has(thing)]
        if sized and len({thing.size for thing in same}) == 1:
            kind = kind_of(same[0], ("size", "color", "shape"))
        parts.append((kind, len(same)))
    sentence = joined([some(rng, kind, count) for kind, count in parts])
    return _opened(rng, sentence, parts[0][1]) + _behind(rng, scene, 0.15)


def _placed(rng: random.Random, scene: Scene) -> str:
    """One or two things and where they are."""
    single = _single(scene)
    if not single:
        return ""
    chosen = rng.sample(single, min(len(single), rng.choice((1, 2))))
    parts = [f"{_named(rng, thing)} {where(rng, thing.place)}" for thing in chosen]
    return _opened(rng, joined(parts), 1) + (_behind(rng, scene, 0.1) if len(chosen) == 1 else "")


def _related(rng: random.Random, scene: Scene) -> str:
    """Two things and how they stand to each other."""
    single = _single(scene)
    if len(single) < 2:
        return ""
    a, b = rng.sample(single, 2)
    relation = rng.choice([relation for relation in RELATIONS if related(a, b, relation)])
    first, second, how = _named(rng, a), _named(rng, b), rng.choice(RELATIONS[relation][1])
    the = [name.split(" ", 1)[1] for name in (first, second)]
    return rng.choice((
        f"{first} {how} {second}", f"{first} is {how} {second}", f"there is {first} {how} {second}",
        f"the {the[0]} is {how} the {the[1]}", f"{first} sits {how} {second}",
    ))  # fmt: skip


def _counted(rng: random.Random, scene: Scene) -> str:
    """How many things of each shape, or of each color, or in all."""
    way = rng.choice(("shape", "color", "all"))
    if way == "all":
        number = len(scene.things)
        return _opened(rng, some(rng, Kind(), number, rng.choice(("shape", "object"))), number) + _behind(rng, scene, 1)
    kinds = list(dict.fromkeys(kind_of(thing, (way,)) for thing in scene.things))
    groups = [(kind, kind.count(scene.things)) for kind in rng.sample(kinds, len(kinds))]
    return _opened(rng, joined([some(rng, kind, count) for kind, count in groups]), groups[0][1])


def _single(scene: Scene) -> list[Thing]:
    """Things of whose shape and color there is no other."""
    return [thing for thing in scene.things if kind_of(thing, ("color", "shape")).count(scene.things) == 1]


def _named(rng: random.Random, thing: Thing) -> str:
    return some(rng, kind_of(thing, ("size", "color", "shape") if rng.random() < 0.25 else ("color", "shape")))


def _opened(rng: random.Random, sentence: str, first: int) -> str:
    """The sentence behind one of the openings; `first` is the number that it begins with."""
    return rng.choice(_OPENINGS).format(sentence, **{"is": "is" if first == 1 else "are"})


def _behind(rng: random.Random, scene: Scene, share: float) -> str:
    """What is behind the things, or nothing."""
    if rng.random() >= share:
        return ""
    behind = scene.background
    known = [behind.tone] if behind.tone else []
    known += [behind.pattern] if behind.pattern in ("striped", "dotted", "checked") else []
    return f" on a {rng.choice(known)} background" if known else ""
