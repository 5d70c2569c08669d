"""Pictures of scenes: drawn four times as large and reduced, so that outlines are smooth."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np

from bench.made.scenes.scene import Background, Scene, Thing

# Pixels drawn for one of the picture, along each side.
FINE = 4
# A ring's band, the arm of a cross from its middle and a star's inner corners, in radii.
_BAND, _ARM, _INNER = 0.36, 0.3, 0.42


def render(scene: Scene, size: int) -> np.ndarray:
    """The picture.

    Args:
        scene: what is seen.
        size: pixels along a side.

    Returns:
        uint8, (size, size, 3).
    """
    from PIL import Image, ImageDraw

    side = FINE * size
    image = Image.new("RGB", (side, side), scene.background.tints[0])
    _PATTERNS[scene.background.pattern](image, scene.background)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw(pen, thing, side)
    return np.asarray(image.reduce(FINE))


def _draw(pen, thing: Thing, side: int) -> None:
    x, y, radius = (side * length for length in (thing.x, thing.y, thing.radius))
    around = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(around, fill=thing.rgb)
    elif thing.shape == "ring":
        pen.ellipse(around, outline=thing.rgb, width=round(_BAND * radius))
    else:
        cosine, sine = math.cos(math.radians(thing.turn)), math.sin(math.radians(thing.turn))
        turned = _outline(thing.shape) @ np.array([[cosine, -sine], [sine, cosine]])
        pen.polygon((turned * radius + (x, y)).ravel().tolist(), fill=thing.rgb)


@functools.cache
def _outline(shape: str) -> np.ndarray:
    """Corners in a circle of radius 1 about the origin, y downwards, (n, 2)."""
    return {"square": _square, "triangle": _triangle, "star": _star, "cross": _cross, "heart": _heart, "moon": _moon}[
        shape
    ]()


def _ray(angles: np.ndarray, lengths: float | np.ndarray = 1.0) -> np.ndarray:
    """Points at angles in degrees, counter-clockwise from the right."""
    angles = np.radians(angles)
    return np.stack([lengths * np.cos(angles), -lengths * np.sin(angles)], axis=1)


def _square() -> np.ndarray:
    return _ray(np.array([45, 135, 225, 315]))


def _triangle() -> np.ndarray:
    return _ray(np.array([90, 210, 330]))


def _star() -> np.ndarray:
    return _ray(90 + 36.0 * np.arange(10), np.where(np.arange(10) % 2, _INNER, 1.0))


def _cross() -> np.ndarray:
    end = math.sqrt(1 - _ARM**2)
    arm = np.array([[_ARM, -_ARM], [end, -_ARM], [end, _ARM]])
    quarter = np.array([[0, 1], [-1, 0]])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, turns) for turns in range(4)])


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    across = 16 * np.sin(t) ** 3
    up = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    points = np.stack([across, -up], axis=1)
    points -= (points.max(0) + points.min(0)) / 2
    return points / np.linalg.norm(points, axis=1).max()


def _moon() -> np.ndarray:
    # The circle without another one, a little to the right and smaller.
    shift, inner = 0.45, 0.8
    horn = (1 + shift**2 - inner**2) / (2 * shift)
    outside = math.degrees(math.acos(horn))
    inside = math.degrees(math.atan2(math.sqrt(1 - horn**2), horn - shift))
    back = _ray(np.linspace(outside, 360 - outside, 40))
    front = _ray(np.linspace(360 - inside, inside, 30), inner) + np.array([shift, 0])
    return np.concatenate([back, front])


def _plain(image, behind: Background) -> None:
    pass


def _shaded(image, behind: Background) -> None:
    from PIL import Image

    ramp = Image.linear_gradient("L").rotate(90 * round(behind.turn / 45)).resize(image.size)
    image.paste(behind.tints[1], (0, 0), ramp)


def _striped(image, behind: Background) -> None:
    from PIL import ImageDraw

    pen, side = ImageDraw.Draw(image), image.width
    step = behind.step * side
    angle = math.radians(behind.turn)
    along, across = np.array([math.cos(angle), math.sin(angle)]), np.array([-math.sin(angle), math.cos(angle)])
    for number in range(-int(0.75 * side / step) - 1, int(0.75 * side / step) + 2, 2):
        start = np.array([side / 2, side / 2]) + number * step * across
        corners = [start - side * along, start + side * along]
        corners += [corner + step * across for corner in reversed(corners)]
        pen.polygon([tuple(corner) for corner in corners], fill=behind.tints[1])


def _dotted(image, behind: Background) -> None:
    from PIL import ImageDraw

    pen, side = ImageDraw.Draw(image), image.width
    step = behind.step * side
    radius = 0.2 * step
    for row in range(int(side / step) + 2):
        for column in range(int(side / step) + 2):
            x, y = (column - (row % 2) / 2) * step, row * step
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=behind.tints[1])


def _checked(image, behind: Background) -> None:
    from PIL import ImageDraw

    pen, side = ImageDraw.Draw(image), image.width
    step = behind.step * side
    for row in range(int(side / step) + 1):
        for column in range(row % 2, int(side / step) + 1, 2):
            x, y = column * step, row * step
            pen.rectangle((x, y, x + step, y + step), fill=behind.tints[1])


_PATTERNS: dict[str, Callable[..., None]] = {
    "plain": _plain,
    "shaded": _shaded,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
}
