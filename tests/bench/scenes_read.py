"""What a caption or a question about a made scene says, read from its words and compared with the scene's record.

Written without the maker's own rules and words: things are the dicts of `scenes/*.jsonl`, places are coordinates.
"""

from __future__ import annotations

import re

NUMBERS = {"a": 1, "an": 1, "the": 1, "no": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
SIZES = {"large": "large", "big": "large", "small": "small", "little": "small", "tiny": "small"}
COLORS = {name: name for name in "red green blue yellow orange purple pink brown gray black white".split()}
COLORS |= {"grey": "gray", "violet": "purple"}
NOUNS = {name: name for name in "circle square triangle star ring heart moon cross".split()}
NOUNS |= {f"{name}s": name for name in NOUNS} | {"crosses": "cross", "disc": "circle", "plus": "cross"}
NOUNS |= {"crescent": "moon"} | {f"{name}{s}": None for name in ("shape", "object", "thing") for s in ("", "s")}
RELATIONS = {
    **dict.fromkeys(("above", "over", "higher than"), (0, -1)),
    **dict.fromkeys(("below", "under", "beneath", "lower than"), (0, 1)),
    **dict.fromkeys(("left of", "to the left of"), (-1, 0)),
    **dict.fromkeys(("right of", "to the right of"), (1, 0)),
}


def one_of(words):
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


KIND = rf"(?:({one_of(SIZES)}) )?(?:({one_of(COLORS)}) )?({one_of(NOUNS)})\b"
PHRASE = re.compile(rf"\b(a|an|the|no|one|two|three|four|five) {KIND}")
PLACE = re.compile(
    r"(?:in|at|on) the (?:(?P<row>top|bottom) (?P<column>left|right)(?: corner)?|(?P<middle>middle|center)"
    r"|(?P<side>left|right|top|bottom)(?: side| of the picture)?)"
)
OPENING = re.compile(
    r"(?:there (?:is|are) |(?:a picture|an image) (?:of|with) |the picture shows |this image has |here (?:is|are) )"
)


def kind(size, color, noun):
    return {"size": SIZES.get(size), "color": COLORS.get(color), "shape": NOUNS[noun]}


def of_kind(things, wanted):
    return [thing for thing in things if all(value in (None, thing[name]) for name, value in wanted.items())]


def kinds(things, words):
    """Things of the kind that words without an article name."""
    match = re.fullmatch(KIND, words)
    assert match, words
    return of_kind(things, kind(*match.groups()))


def stands(a, b, relation):
    across, down = RELATIONS[relation]
    far = across * (a["x"] - b["x"]) + down * (a["y"] - b["y"])
    assert not 0.12 < abs(far) < 0.18, "so far apart that nobody doubts it, or not at all"
    return far > 0.15


def at(thing, place):
    """Whether a thing is where the words say; on a side in any part of it."""
    match = PLACE.fullmatch(place)
    assert match, place
    low = {"left": thing["x"] < 0.3, "right": thing["x"] > 0.7, "top": thing["y"] < 0.3, "bottom": thing["y"] > 0.7}
    if match["middle"]:
        return not any(low.values())
    return low[match["side"]] if match["side"] else low[match["row"]] and low[match["column"]]


def the_one(things, words):
    """The only thing that "the ..." can be."""
    match = PHRASE.match(words)
    assert match and match[1] == "the", words
    found, rest = of_kind(things, kind(*match.groups()[1:])), words[match.end() :].strip()
    if rest and PLACE.fullmatch(rest):
        found = [thing for thing in found if at(thing, rest)]
    elif rest:
        relation, other = re.fullmatch(rf"({one_of(RELATIONS)}) (the .+)", rest).groups()
        other = the_one(things, other)
        found = [thing for thing in found if thing is not other and stands(thing, other, relation)]
    assert len(found) == 1, (words, found)
    return found[0]


def check_caption(scene, raw):
    """Fail where a caption is not true of a scene, or cannot be read."""
    assert raw[0].isupper() and raw.endswith("."), raw
    text, things = raw[:-1].lower(), scene["things"]
    behind = re.search(r" on a (\w+) background$", text)
    if behind:
        assert behind[1] in (scene["background"]["tone"], scene["background"]["pattern"]), raw
        text = text[: behind.start()]
    text = OPENING.sub("", text, count=1)
    found = list(PHRASE.finditer(text))
    assert found and found[0].start() == 0, raw
    meant = []
    for match in found:
        number, *words = match.groups()
        meant.append(of_kind(things, kind(*words)))
        assert len(meant[-1]) == NUMBERS[number], f"{raw}: {match[0]}"
    ends = [match.start() for match in found[1:]] + [len(text)]
    for number, (match, end) in enumerate(zip(found, ends, strict=True)):
        rest = text[match.end() : end].removesuffix(" ").removesuffix(" and").removesuffix(",").strip()
        relation = re.fullmatch(rf"(?:is |sits )?({one_of(RELATIONS)})", rest)
        if relation:
            assert stands(meant[number][0], meant[number + 1][0], relation[1]), raw
        elif rest:
            assert at(meant[number][0], rest), f"{raw}: {rest}"


def place_of(thing):
    low = {"top": thing["y"] < 0.3, "bottom": thing["y"] > 0.7, "left": thing["x"] < 0.3, "right": thing["x"] > 0.7}
    return " ".join(word for word, there in low.items() if there) or "middle"


def yes(true):
    return "yes" if true else "no"


def more(things, which, first, second):
    a, b = len(kinds(things, first)), len(kinds(things, second))
    return yes(a > b if which == "more" else a < b)


def larger(things, word, first, second):
    a, b = the_one(things, first), the_one(things, second)
    assert a["size"] != b["size"]
    return yes(a["size"] == ("small" if word == "smaller" else "large"))


def same(things, first, second, attribute):
    return yes(the_one(things, first)[attribute] == the_one(things, second)[attribute])


def related(things, first, relation, second):
    a, b = the_one(things, first), the_one(things, second)
    assert stands(a, b, relation) or stands(b, a, relation), "the answer is in doubt"
    return yes(stands(a, b, relation))


def which(things, word, first, second):
    a, b = the_one(things, first), the_one(things, second)
    sizes = {"larger": 1, "bigger": 1, "smaller": -1}
    ways = {
        "higher": ("y", -1), "closer to the top": ("y", -1), "lower": ("y", 1), "closer to the bottom": ("y", 1),
        "further left": ("x", -1), "closer to the left side": ("x", -1), "further right": ("x", 1),
        "closer to the right side": ("x", 1),
    }  # fmt: skip
    measure, sign = ("radius", sizes[word]) if word in sizes else ways[word]
    assert abs(a[measure] - b[measure]) > (0.04 if word in sizes else 0.15), "the answer is in doubt"
    winner = max(a, b, key=lambda thing: sign * thing[measure])
    # The word for it is the one the question tells it by.
    told = PHRASE.match(first if winner is a else second)
    return winner["shape"] if NOUNS[told[4]] else winner["color"]


SHAPE_OR_WHAT = r"(?:what shape is|which shape is|what is the shape of|what is) (the .+)\?"
READINGS = [
    ("count", r"(?:how many (.+) (?:are there|are in the picture|can you see|do you see)|what is the number of (.+))\?",
     lambda things, one, other: str(len(kinds(things, one or other)))),
    ("color", r"(?:what color is|what is the color of) (the .+)\?", lambda things, the: the_one(things, the)["color"]),
    ("color", r"(?:which|what) color does (the .+) have\?", lambda things, the: the_one(things, the)["color"]),
    ("shape", SHAPE_OR_WHAT, lambda things, the: the_one(things, the)["shape"]),
    ("place", r"(?:where is|in which part of the picture is|where do you see) (the .+?)(?: in the picture)?\?",
     lambda things, the: place_of(the_one(things, the))),
    ("compare", r"(?:are there|do you see) (more|fewer) (.+) than (.+)\?", more),
    ("compare", r"is (the .+) (larger|bigger|smaller) than (the .+)\?",
     lambda things, first, word, second: larger(things, word, first, second)),
    ("compare", r"(?:are|do) (the .+) and (the .+?) (?:have )?the same (shape|color)\?", same),
    ("exists", r"(?:is there|can you see|do you see|does the picture show) (an? .+?)(?: in the picture)?\?",
     lambda things, words: yes(kinds(things, words.split(" ", 1)[1]))),
    ("relation", rf"is (the .+?) ({one_of(RELATIONS)}) (the .+)\?", related),
    ("which", r"which is (.+), (the .+) or (the .+)\?", which),
]  # fmt: skip


def answer(scene, question):
    """The family of a question and its answer, from its words and the scene's record."""
    for family, pattern, read in READINGS:
        match = re.fullmatch(pattern, question)
        if match:
            return family, read(scene["things"], *match.groups())
    raise AssertionError(f"cannot be read: {question}")
