"""What is in a scene: things with a shape, a color, a size and a place, and the rules by which they are drawn.

Lengths are in sides of the picture, x to the right and y downwards. A picture has three rows and three columns of
places, a thing stands well inside one of them, and no two stand in the same: so "on the left", "above" and "in the
middle" are never in doubt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "heart", "moon")
COLORS: Mapping[str, tuple[int, int, int]] = {
    "red": (214, 38, 40), "green": (40, 150, 62), "blue": (38, 88, 208), "yellow": (248, 218, 40),
    "orange": (247, 132, 22), "purple": (138, 60, 186), "pink": (247, 132, 188), "brown": (118, 72, 34),
    "gray": (128, 128, 128), "black": (18, 18, 20), "white": (252, 252, 252),
}  # fmt: skip
# Radius of the circle about a thing, from and to.
SIZES: Mapping[str, tuple[float, float]] = {"small": (0.075, 0.09), "large": (0.135, 0.16)}
COLUMNS = ("left", "middle", "right")
ROWS = ("top", "middle", "bottom")
# How likely a scene has one thing, two, ... five.
COUNTS = (0.10, 0.20, 0.25, 0.25, 0.20)

# Middle of a column or row, how far off it a thing may stand, and the least gap between things and to the border.
_MIDDLES, _OFF, _GAP = (0.19, 0.5, 0.81), 0.05, 0.012
# How likely a thing has the shape, or the color, of one that is there already: else there is little to count.
_SAME = 0.3
# A shape looks the same, or still upright, when turned by up to so many degrees.
_TURN = {"square": 12, "triangle": 14, "star": 18, "cross": 12, "heart": 14, "moon": 20}
_JITTER = 9

# Backgrounds: one of these, or two shades of it.
PATTERNS = ("plain", "shaded", "striped", "dotted", "checked")
TINTS = (
    (244, 240, 230), (232, 238, 245), (226, 240, 228), (246, 230, 232), (240, 236, 205), (214, 226, 240),
    (196, 216, 204), (222, 208, 228), (158, 186, 200), (172, 200, 214), (150, 196, 182), (184, 204, 168),
    (206, 184, 156), (44, 58, 84), (34, 66, 60), (62, 44, 66), (52, 52, 58), (30, 34, 40),
)  # fmt: skip
_FAR = 155.0

Pair = tuple[str, str]


@dataclass(frozen=True)
class Thing:
    """A thing in the picture.

    Attributes:
        x: of its middle, in sides of the picture.
        y: of its middle, downwards.
        radius: of the circle about it.
        turn: counter-clockwise, in degrees.
        rgb: its color's own shade.
    """

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    turn: float
    rgb: tuple[int, int, int]

    @property
    def pair(self) -> Pair:
        """Its shape and its color."""
        return self.shape, self.color

    @property
    def column(self) -> int:
        """0 on the left, 1, 2."""
        return int(3 * self.x)

    @property
    def row(self) -> int:
        """0 at the top, 1, 2."""
        return int(3 * self.y)

    @property
    def place(self) -> str:
        """Where it is: one of nine answers, such as "top left", "left" or "middle"."""
        words = [ROWS[self.row], COLUMNS[self.column]]
        return " ".join(word for word in words if word != "middle") or "middle"


@dataclass(frozen=True)
class Background:
    """What is behind the things.

    Attributes:
        pattern: one of `PATTERNS`.
        tints: its color, and the other one of its pattern.
        step: width of a stripe or a check, distance of dots.
        turn: of stripes and shading, in degrees.
    """

    pattern: str
    tints: tuple[tuple[int, int, int], tuple[int, int, int]]
    step: float
    turn: float

    @property
    def tone(self) -> str:
        """ "light", "dark", or nothing for what is neither."""
        light = _luma(self.tints[0])
        return "light" if light > 200 else "dark" if light < 90 else ""


@dataclass(frozen=True)
class Scene:
    """What is to be seen.

    Attributes:
        things: in no order.
        novel: whether one of them is of a held-out pair.
    """

    things: tuple[Thing, ...]
    background: Background
    novel: bool

    @property
    def key(self) -> tuple[tuple[str, str, str, str], ...]:
        """What two scenes share that are told apart only by shades, turns and hundredths of a side."""
        return tuple(sorted((thing.shape, thing.color, thing.size, thing.place) for thing in self.things))

    def described(self) -> dict[str, Any]:
        """The scene as a record."""
        behind = self.background
        return {
            "novel": self.novel,
            "background": {"pattern": behind.pattern, "tone": behind.tone, "rgb": list(behind.tints[0])},
            "things": [
                {
                    "shape": thing.shape, "color": thing.color, "size": thing.size, "place": thing.place,
                    "x": round(thing.x, 4), "y": round(thing.y, 4), "radius": round(thing.radius, 4),
                    "turn": round(thing.turn, 2), "rgb": list(thing.rgb),
                }
                for thing in self.things
            ],
        }  # fmt: skip


def held_out_pairs(seed: int, count: int) -> list[Pair]:
    """Pairs of a shape and a color that are kept for testing, spread over all shapes and colors.

    Args:
        seed: of the choice.
        count: how many, at most half of all.
    """
    rng = random.Random(f"scenes held out {seed}")
    shapes, colors = rng.sample(SHAPES, len(SHAPES)), rng.sample(list(COLORS), len(COLORS))
    # 8 and 11 have no divisor in common: all 88 pairs come before one comes again.
    return [(shapes[number % len(shapes)], colors[number % len(colors)]) for number in range(count)]


def draw(rng: random.Random, banned: Collection[Pair], wanted: Collection[Pair] = ()) -> Scene:
    """A scene.

    Args:
        rng: of all draws.
        banned: pairs of shape and color that do not occur.
        wanted: pairs of which at least one occurs; the scene is a novel one.
    """
    while True:
        count = rng.choices(range(1, len(COUNTS) + 1), COUNTS)[0]
        pairs = _pairs(rng, count, banned, wanted)
        things = _placed(rng, pairs)
        if things is not None:
            rng.shuffle(things)
            return Scene(tuple(things), _background(rng, {thing.color for thing in things}), bool(wanted))


def _pairs(rng: random.Random, count: int, banned: Collection[Pair], wanted: Collection[Pair]) -> list[Pair]:
    pairs: list[Pair] = [rng.choice(list(wanted))] if wanted else []
    colors = list(COLORS)
    while len(pairs) < count:
        shape, color = rng.choice(SHAPES), rng.choice(colors)
        if pairs and rng.random() < _SAME:
            shape = rng.choice(pairs)[0]
        if pairs and rng.random() < _SAME:
            color = rng.choice(pairs)[1]
        if (shape, color) not in banned:
            pairs.append((shape, color))
    return pairs


def _placed(rng: random.Random, pairs: list[Pair]) -> list[Thing] | None:
    """Things in different places that do not touch; None where two cannot be kept apart."""
    things: list[Thing] = []
    for (shape, color), place in zip(pairs, rng.sample(range(9), len(pairs)), strict=True):
        size = rng.choice(tuple(SIZES))
        radius = rng.uniform(*SIZES[size])
        inside = radius + _GAP
        for _ in range(20):
            x, y = (
                min(max(_MIDDLES[middle] + rng.uniform(-_OFF, _OFF), inside), 1 - inside)
                for middle in (place % 3, place // 3)
            )
            if all(math.hypot(x - other.x, y - other.y) >= radius + other.radius + _GAP for other in things):
                break
        else:
            return None
        most = _TURN.get(shape, 0)
        shade = tuple(min(max(level + rng.randint(-_JITTER, _JITTER), 0), 255) for level in COLORS[color])
        things.append(Thing(shape, color, size, x, y, radius, rng.uniform(-most, most), shade))
    return things


def _background(rng: random.Random, colors: set[str]) -> Background:
    """One that all the colors stand out from."""
    fit = [
        tint for tint in TINTS if all(stands_out(COLORS[color], shade) for color in colors for shade in shades(tint))
    ]
    tint = rng.choice(fit)
    return Background(rng.choice(PATTERNS), shades(tint), rng.uniform(0.07, 0.12), rng.uniform(0, 180))


def shades(tint: tuple[int, int, int]) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """A tint and the other one of its pattern: a little darker where it is light, lighter where it is dark."""
    toward, share = (0, 0.09) if _luma(tint) > 128 else (255, 0.11)
    return tint, tuple(round(level + share * (toward - level)) for level in tint)


def stands_out(color: tuple[int, int, int], behind: tuple[int, int, int]) -> bool:
    """Whether a color is easily seen before another, by a weighted distance that follows the eye roughly."""
    red, green, blue = (first - second for first, second in zip(color, behind, strict=True))
    mean = (color[0] + behind[0]) / 512
    return math.sqrt((2 + mean) * red**2 + 4 * green**2 + (3 - mean) * blue**2) > _FAR


def _luma(color: tuple[int, int, int]) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
