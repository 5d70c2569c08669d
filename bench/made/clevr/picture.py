"""Pictures of scenes by casting rays: area lamps with soft shadows, dull rubber, metal that mirrors its surroundings.

No copy of CLEVR's own renderer, which traces many more paths: colours, places, sizes and occlusions are the same, the
play of light is simpler.
"""

from __future__ import annotations

import math

import numpy as np

from bench.made.clevr import shapes
from bench.made.clevr.scene import COLORS, HEIGHT, WIDTH, Scene, Thing

# Rays a pixel, along each side.
_GRID = 2
_GROUND = np.array([0.42, 0.42, 0.42], np.float32)
_SKY = np.array([0.46, 0.46, 0.47], np.float32)
_LAMP_COLORS = {
    "key": np.array([1.0, 0.96, 0.90], np.float32) * 20.0,
    "fill": np.array([0.90, 0.94, 1.0], np.float32) * 6.0,
    "back": np.array([1.0, 1.0, 1.0], np.float32) * 9.0,
}
_LAMP_SIDE = 1.0
_SUN = np.array([0.40, -0.23, 0.886], np.float32)
_SUN_COLOR = np.float32(0.30)
_AMBIENT = np.float32(0.22)
_OFF = np.float32(1e-3)


def visible_pixels(scene: Scene) -> np.ndarray:
    """How many pixels show each thing, one ray a pixel."""
    rays = _rays(scene, WIDTH, HEIGHT)
    owner, _ = _first(scene, rays)
    return np.bincount(owner[owner >= 0], minlength=len(scene.things))


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The picture.

    Args:
        scene: what is seen.
        rng: of the points on the lamps that shadow rays aim at.

    Returns:
        uint8, (HEIGHT, WIDTH, 3).
    """
    rays = _rays(scene, WIDTH * _GRID, HEIGHT * _GRID)
    owner, distance = (_by_pixel(found) for found in _first(scene, rays))
    rays = _by_pixel(rays)
    # Light changes slowly across a surface: only pixels with an edge in them are shaded ray by ray.
    sky = ~np.isfinite(distance)
    whole = (owner == owner[:, :1]).all(1) & (sky == sky[:, :1]).all(1)
    light = np.empty((HEIGHT * WIDTH, 3), np.float32)
    middle = rays[whole].mean(1)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    light[whole] = _cast(scene, owner[whole, 0], middle, distance[whole].mean(1), rng)
    parts = _cast(scene, owner[~whole].ravel(), rays[~whole].reshape(-1, 3), distance[~whole].ravel(), rng)
    light[~whole] = _encoded(parts).reshape(-1, _GRID**2, 3).mean(1)
    light[whole] = _encoded(light[whole])
    return np.rint(255 * light).astype(np.uint8).reshape(HEIGHT, WIDTH, 3)


def _by_pixel(values: np.ndarray) -> np.ndarray:
    """From a picture of rays to (pixels, rays a pixel, ...)."""
    values = values.reshape(HEIGHT, _GRID, WIDTH, _GRID, *values.shape[2:])
    return values.swapaxes(1, 2).reshape(HEIGHT * WIDTH, _GRID**2, *values.shape[4:])


def _cast(
    scene: Scene, owner: np.ndarray, rays: np.ndarray, distance: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Light along rays from the camera, (n, 3), given what each meets (n,) and where (n,)."""
    light = np.broadcast_to(_SKY, rays.shape).copy()
    there = np.flatnonzero(np.isfinite(distance))
    owner, rays = owner[there], rays[there]
    points = scene.camera.position.astype(np.float32) + rays * distance[there, None]
    upright, color, metal = _surfaces(scene, owner, points)
    shaded = color * _received(scene, points, upright, rng)
    facing = np.einsum("ij,ij->i", rays, upright)[:, None]
    mirrored = rays - 2 * facing * upright
    rubber = (owner >= 0) & ~metal
    shaded[rubber] += _glints(scene, points[rubber], mirrored[rubber], 12.0, 0.05)
    around = _reflection(scene, owner[metal], points[metal] + _OFF * upright[metal], mirrored[metal], rng)
    # Metals tint what they mirror, less so at grazing angles.
    tint = color[metal] + (1 - color[metal]) * (1 - np.clip(-facing[metal], 0, 1)) ** 5
    glints = _glints(scene, points[metal], mirrored[metal], 300.0, 1.6)
    shaded[metal] = 0.35 * shaded[metal] + 0.75 * tint * around + (0.5 + 0.5 * tint) * glints
    light[there] = shaded
    return light


def _rays(scene: Scene, width: int, height: int) -> np.ndarray:
    """Unit vectors from the camera through the middles of pixels, (height, width, 3)."""
    right, up, ahead = scene.camera.axes.astype(np.float32)
    focal = np.float32(scene.camera.focal(width))
    across = (np.arange(width, dtype=np.float32) + 0.5 - width / 2)[None, :, None] / focal
    down = (np.arange(height, dtype=np.float32) + 0.5 - height / 2)[:, None, None] / focal
    ways = ahead + across * right - down * up
    return ways / np.linalg.norm(ways, axis=-1, keepdims=True)


def _first(scene: Scene, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each ray from the camera meets first: number of a thing or -1, and the distance, infinite for the sky."""
    height, width = rays.shape[:2]
    eye = scene.camera.position.astype(np.float32)
    distance = np.where(rays[..., 2] < 0, -eye[2] / np.minimum(rays[..., 2], -_OFF), np.inf).astype(np.float32)
    owner = np.full((height, width), -1, np.int64)
    for number, thing in enumerate(scene.things):
        window = _window(scene, thing, width, height)
        found = shapes.meet(thing, eye, rays[window])
        closer = found < distance[window]
        distance[window] = np.where(closer, found, distance[window])
        owner[window] = np.where(closer, number, owner[window])
    return owner, distance


def _window(scene: Scene, thing: Thing, width: int, height: int) -> tuple[slice, slice]:
    """Rows and columns outside of which a thing cannot be seen."""
    column, row, depth = scene.camera.view(thing.center[None], width, height)[0]
    radius = shapes.bound(thing)
    # A little more than the sphere's outline, which perspective stretches away from the middle of the picture.
    reach = 1.3 * scene.camera.focal(width) * radius / (depth - radius) + 2

    def part(middle: float, size: int) -> slice:
        return slice(max(0, math.floor(middle - reach)), min(size, math.ceil(middle + reach)))

    return part(row, height), part(column, width)


def _surfaces(scene: Scene, owner: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How the surface stands at points (n, 3) of things, or of the ground where the owner is -1.

    Returns:
        Unit vectors out of it, (n, 3), its colors, (n, 3), and where it is metal, (n,).
    """
    upright = np.broadcast_to(np.array([0, 0, 1], np.float32), points.shape).copy()
    color = np.broadcast_to(_GROUND, points.shape).copy()
    metal = np.zeros(len(points), bool)
    for number, thing in enumerate(scene.things):
        own = np.flatnonzero(owner == number)
        upright[own] = shapes.normals(thing, points[own])
        color[own] = np.array(COLORS[thing.color], np.float32) / 255
        metal[own] = thing.material == "metal"
    return upright, color, metal


def _received(scene: Scene, points: np.ndarray, upright: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light that falls on points, (n, 3): lamps with soft shadows, a weak sun, and some from everywhere."""
    # Surfaces that look down get less of the sky.
    total = _AMBIENT * (0.65 + 0.35 * upright[:, 2]) + _SUN_COLOR * np.maximum(upright @ _SUN, 0)
    total = np.repeat(total[:, None], 3, axis=1)
    start = points + upright * _OFF
    for name, position in scene.lamps.items():
        toward = position.astype(np.float32) - start
        squared = np.einsum("ij,ij->i", toward, toward)
        length = np.sqrt(squared)
        cosine = np.maximum(np.einsum("ij,ij->i", upright, toward) / length, 0)
        # A lamp is a square that faces the origin and shines as such.
        cosine *= np.maximum(toward @ position.astype(np.float32) / length, 0) / np.float32(np.linalg.norm(position))
        share = _open(scene, start, position.astype(np.float32), toward, cosine > 0, rng)
        total += (cosine / squared * share)[:, None] * _LAMP_COLORS[name]
    return total


def _open(
    scene: Scene, start: np.ndarray, lamp: np.ndarray, toward: np.ndarray, asked: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Share of a lamp that points see past the things, (n,); of those not asked for 1."""
    share = np.ones(len(start), np.float32)
    ways = toward / np.linalg.norm(toward, axis=1, keepdims=True)
    close = np.zeros(len(start), bool)
    for thing in scene.things:
        close |= shapes.near(thing, start, ways, _LAMP_SIDE / 2)
    close = np.flatnonzero(close & asked)
    clear = np.zeros(len(close), np.float32)
    # One point of each quarter of the lamp.
    for corner in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        spot = rng.random((len(close), 3), np.float32)
        spot[:, :2] = 0.5 * spot[:, :2] + np.array(corner, np.float32)
        aim = lamp + _LAMP_SIDE * (spot - 0.5) - start[close]
        length = np.linalg.norm(aim, axis=1)
        clear += ~_blocked(scene, start[close], aim / length[:, None], length)
    share[close] = clear / 4
    return share


def _blocked(scene: Scene, start: np.ndarray, ways: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Whether a thing stands within some length of points along rays, (n,) bool."""
    blocked = np.zeros(len(start), bool)
    for thing in scene.things:
        still = np.flatnonzero(~blocked)
        close = still[shapes.near(thing, start[still], ways[still])]
        blocked[close] = shapes.meet(thing, start[close], ways[close]) < length[close]
    return blocked


def _reflection(
    scene: Scene, own: np.ndarray, start: np.ndarray, ways: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """What mirrors on the things `own` show along rays, (n, 3): the ground, other things as if dull, or the sky."""
    down = ways[:, 2] < -_OFF
    distance = np.where(down, -start[:, 2] / np.minimum(ways[:, 2], -_OFF), np.inf).astype(np.float32)
    owner = np.full(len(start), -1)
    for number, thing in enumerate(scene.things):
        close = np.flatnonzero(shapes.near(thing, start, ways) & (own != number))
        found = shapes.meet(thing, start[close], ways[close])
        closer = found < distance[close]
        distance[close[closer]] = found[closer]
        owner[close[closer]] = number
    light = np.broadcast_to(_SKY, start.shape) * (0.45 + 0.55 * (1 - np.clip(ways[:, 2:], 0, 1)))
    there = np.flatnonzero(np.isfinite(distance))
    points = start[there] + ways[there] * distance[there, None]
    upright, color, _ = _surfaces(scene, owner[there], points)
    light[there] = color * _received(scene, points, upright, rng)
    return light


def _glints(scene: Scene, points: np.ndarray, mirrored: np.ndarray, sharpness: float, strength: float) -> np.ndarray:
    """Highlights of the lamps, (n, 1)."""
    total = np.zeros((len(points), 1), np.float32)
    for name, position in scene.lamps.items():
        toward = position.astype(np.float32) - points
        toward /= np.linalg.norm(toward, axis=1, keepdims=True)
        aligned = np.maximum((toward * mirrored).sum(1, keepdims=True), 0)
        total += np.float32(strength * _LAMP_COLORS[name][1] / 20.0) * aligned**sharpness
    return total


def _encoded(light: np.ndarray) -> np.ndarray:
    """Linear light as sRGB, in [0, 1]."""
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
