"""Where rays meet spheres, cubes and cylinders, and how the surfaces stand there."""

from __future__ import annotations

import math

import numpy as np

from bench.made.clevr.scene import Thing

# Edges are drawn round: within this share of the radius normals turn from one face to the next.
_BEVEL = 0.08
_NEVER = np.float32(np.inf)


def bound(thing: Thing) -> float:
    """Radius of a sphere about the thing's centre that holds it."""
    return thing.radius * {"sphere": 1.0, "cylinder": math.sqrt(2), "cube": math.sqrt(3)}[thing.shape]


def near(thing: Thing, origins: np.ndarray, rays: np.ndarray, more: float = 0.0) -> np.ndarray:
    """Which rays come within `bound` of the thing, and `more`, ahead of their origins; (n,) bool.

    Args:
        thing: any.
        origins: (n, 3).
        rays: unit vectors, (n, 3).
        more: what is added to the bound.
    """
    toward = thing.center.astype(np.float32) - origins
    along = np.einsum("ij,ij->i", toward, rays)
    radius = np.float32(bound(thing) + more)
    return (np.einsum("ij,ij->i", toward, toward) - along * along < radius * radius) & (along > -radius)


def meet(thing: Thing, origins: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Distances along rays to a thing's surface, infinite where they miss; (n,).

    Args:
        thing: any.
        origins: (3,) or (n, 3), outside the thing.
        rays: unit vectors, (n, 3).
    """
    start, way = _local(thing, origins - thing.center.astype(np.float32)), _local(thing, rays)
    # A zero component makes infinite distances to the slabs, which is what a parallel ray has.
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = {"sphere": _sphere, "cube": _cube, "cylinder": _cylinder}[thing.shape](start, way, way.dtype.type)
    # Scaled down with the thing, a ray's unit vector has the length 1 / radius, so distances stay as they are.
    return np.where(distance > 0, distance, _NEVER)


def normals(thing: Thing, points: np.ndarray) -> np.ndarray:
    """Unit vectors out of the surface at points (n, 3) on it."""
    local = _local(thing, points - thing.center.astype(np.float32))
    if thing.shape == "sphere":
        outward = local
    elif thing.shape == "cube":
        outward = _beyond(local)
    else:
        ring = np.hypot(local[:, 0], local[:, 1])[:, None]
        outward = np.concatenate([local[:, :2] / np.maximum(ring, 1e-6) * _beyond(ring), _beyond(local[:, 2:])], axis=1)
    outward = outward / np.maximum(np.linalg.norm(outward, axis=1, keepdims=True), 1e-6)
    return _turned(outward, thing.turn)


def _beyond(values: np.ndarray) -> np.ndarray:
    """How far into the bevel, with the sign of the side."""
    return np.sign(values) * np.maximum(np.abs(values) - np.float32(1 - _BEVEL), 0)


def _local(thing: Thing, vectors: np.ndarray) -> np.ndarray:
    """Into the frame in which the thing has radius 1 and no turn."""
    return _turned(vectors, -thing.turn) / np.float32(thing.radius)


def _turned(vectors: np.ndarray, angle: float) -> np.ndarray:
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y, z = vectors[..., 0], vectors[..., 1], vectors[..., 2]
    return np.stack([cosine * x - sine * y, sine * x + cosine * y, z], axis=-1)


def _roots(a: np.ndarray, half_b: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entry and exit of a quadric; infinite and minus infinite where there are none."""
    under = half_b * half_b - a * c
    root = np.sqrt(np.maximum(under, 0))
    missed = under < 0
    return np.where(missed, np.inf, (-half_b - root) / a), np.where(missed, -np.inf, (-half_b + root) / a)


def _slab(start: np.ndarray, way: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Entry and exit of the layer between -1 and 1."""
    first, second = (-1 - start) / way, (1 - start) / way
    return np.minimum(first, second), np.maximum(first, second)


def _inside(parts: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Entry into what several bodies share."""
    enter = np.maximum.reduce([part[0] for part in parts])
    leave = np.minimum.reduce([part[1] for part in parts])
    return np.where(enter < leave, enter, np.inf)


def _sphere(start: np.ndarray, way: np.ndarray, number: type) -> np.ndarray:
    enter, _ = _roots((way * way).sum(-1), (start * way).sum(-1), (start * start).sum(-1) - number(1))
    return enter


def _cube(start: np.ndarray, way: np.ndarray, number: type) -> np.ndarray:
    return _inside([_slab(start[..., axis], way[..., axis]) for axis in range(3)])


def _cylinder(start: np.ndarray, way: np.ndarray, number: type) -> np.ndarray:
    flat_start, flat_way = start[..., :2], way[..., :2]
    wall = _roots(
        (flat_way * flat_way).sum(-1), (flat_start * flat_way).sum(-1), (flat_start * flat_start).sum(-1) - number(1)
    )
    return _inside([wall, _slab(start[..., 2], way[..., 2])])
