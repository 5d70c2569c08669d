"""Scenes drawn to CLEVR's rules: what stands where, seen from where, and what counts as too close or too hidden.

The rules and constants are those of Johnson et al., "CLEVR: A Diagnostic Dataset for Compositional Language and
Elementary Visual Reasoning" (2017), and of its published generator's defaults. Lengths are in the scene's unit, z is
up, and the ground is z = 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

WIDTH, HEIGHT = 480, 320
COLORS = {
    "gray": (87, 87, 87), "red": (173, 35, 35), "blue": (42, 75, 215), "green": (29, 105, 20),
    "brown": (129, 74, 25), "purple": (129, 38, 192), "cyan": (41, 208, 208), "yellow": (255, 238, 51),
}  # fmt: skip
SHAPES = ("cube", "sphere", "cylinder")
MATERIALS = ("rubber", "metal")
SIZES = {"large": 0.7, "small": 0.35}
COUNTS = range(3, 11)

CAMERA = (7.48113, -6.50764, 5.34367)
LAMPS = {"key": (6.44671, -2.90517, 4.2584), "fill": (-4.67112, -4.0136, 3.01122), "back": (-1.1685, 2.64602, 5.81574)}
_LENS, _SENSOR = 35.0, 32.0
_CAMERA_JITTER, _LAMP_JITTER = 0.5, 1.0
_REACH = 3.0
_MIN_DISTANCE, _MARGIN, _MIN_PIXELS = 0.25, 0.4, 200
_TRIES = 50


@dataclass(frozen=True)
class Thing:
    """An object on the ground.

    Attributes:
        radius: half of its height; a cube's is its size over the square root of two.
        x: of its centre.
        y: of its centre.
        turn: about its vertical axis, in radians.
    """

    shape: str
    size: str
    material: str
    color: str
    x: float
    y: float
    radius: float
    turn: float

    @property
    def center(self) -> np.ndarray:
        """Its middle, (3,)."""
        return np.array([self.x, self.y, self.radius])


@dataclass(frozen=True)
class Camera:
    """A 35 mm lens before a 32 mm sensor, turned to the origin.

    Attributes:
        position: (3,).
    """

    position: np.ndarray

    @property
    def axes(self) -> np.ndarray:
        """Unit vectors to the right, up and into the picture, (3, 3), one a row."""
        ahead = -self.position / np.linalg.norm(self.position)
        right = np.cross(ahead, (0.0, 0.0, 1.0))
        right /= np.linalg.norm(right)
        return np.stack([right, np.cross(right, ahead), ahead])

    @staticmethod
    def focal(width: int = WIDTH) -> float:
        """Focal length in pixels of a picture so wide."""
        return width * _LENS / _SENSOR

    def view(self, points: np.ndarray, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
        """Column, row and depth, (n, 3), of points (n, 3); the depth is along the camera's axis."""
        across, up, depth = ((np.asarray(points) - self.position) @ self.axes.T).T
        focal = self.focal(width)
        return np.stack([width / 2 + focal * across / depth, height / 2 - focal * up / depth, depth], axis=1)


@dataclass(frozen=True)
class Scene:
    """What there is to see.

    Attributes:
        lamps: positions by name, (3,) each.
    """

    camera: Camera
    lamps: dict[str, np.ndarray]
    things: tuple[Thing, ...]

    @property
    def depths(self) -> np.ndarray:
        """Of the things' centres along the camera's axis."""
        return self.camera.view(np.stack([thing.center for thing in self.things]))[:, 2]

    def described(self) -> dict[str, Any]:
        """The scene in the fields of CLEVR's scene files."""
        seen = self.camera.view(np.stack([thing.center for thing in self.things]))
        return {
            "camera": self.camera.position.tolist(),
            "objects": [
                {
                    "shape": thing.shape,
                    "size": thing.size,
                    "material": thing.material,
                    "color": thing.color,
                    "3d_coords": thing.center.tolist(),
                    "rotation": thing.turn,
                    "pixel_coords": [round(column), round(row), depth],
                }
                for thing, (column, row, depth) in zip(self.things, seen.tolist(), strict=True)
            ],
        }


def draw(rng: np.random.Generator, pixels: Callable[[Scene], np.ndarray]) -> Scene:
    """A scene with 3 to 10 things, every number as likely.

    Camera and lamps are drawn once; the things are drawn again until all stand apart and all are seen, so that the
    number of things does not depend on how easily they are placed.

    Args:
        rng: of all draws.
        pixels: how many pixels of each thing are seen.
    """
    camera = Camera(np.array(CAMERA) + rng.uniform(-_CAMERA_JITTER, _CAMERA_JITTER, 3))
    lamps = {name: np.array(at) + rng.uniform(-_LAMP_JITTER, _LAMP_JITTER, 3) for name, at in LAMPS.items()}
    count = int(rng.integers(COUNTS.start, COUNTS.stop))
    while True:
        things = _place(rng, count)
        if things is None:
            continue
        scene = Scene(camera, lamps, things)
        if pixels(scene).min() >= _MIN_PIXELS:
            return scene


def _place(rng: np.random.Generator, count: int) -> tuple[Thing, ...] | None:
    """Things that stand apart; None where one found no place."""
    things: list[Thing] = []
    for _ in range(count):
        size = _one_of(rng, tuple(SIZES))
        for _ in range(_TRIES):
            x, y = rng.uniform(-_REACH, _REACH, 2)
            if all(_apart(x, y, SIZES[size], other) for other in things):
                break
        else:
            return None
        shape, color, material = (_one_of(rng, names) for names in (SHAPES, tuple(COLORS), MATERIALS))
        radius = SIZES[size] / math.sqrt(2) if shape == "cube" else SIZES[size]
        things.append(Thing(shape, size, material, color, float(x), float(y), radius, rng.uniform(0, 2 * math.pi)))
    return tuple(things)


def _apart(x: float, y: float, radius: float, other: Thing) -> bool:
    """Whether a place is far enough from a thing, and clearly beside or behind it.

    "Behind" and "beside" are as from the camera's place before it is moved, as in the published scenes.
    """
    offset = np.array([x - other.x, y - other.y])
    if np.linalg.norm(offset) - radius - other.radius < _MIN_DISTANCE:
        return False
    behind = -np.array(CAMERA[:2]) / np.linalg.norm(CAMERA[:2])
    beside = np.array([behind[1], -behind[0]])
    return min(abs(offset @ behind), abs(offset @ beside)) >= _MARGIN


def _one_of(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]
