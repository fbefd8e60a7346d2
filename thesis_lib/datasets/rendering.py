"""Render views of scenes: known factors to pixels, the same bytes on every platform.

A view adds what the judge of scenes.py ignores: background, light, jitter of place and colour. Only correctly rounded
operations (+ - * / sqrt) touch pixels, and scalars that need more are rounded to 12 digits.
"""

import math
from dataclasses import dataclass

import numpy as np

from thesis_lib.datasets.scenes import HUES, KINDS, TEXTURES, Scene, Stream, centre

LOBES = {
    "disc": (0, 0.0),
    "bean": (2, 0.30),
    "clover": (3, 0.30),
    "cross": (4, 0.30),
    "star": (5, 0.27),
    "ring": (0, 0.0),
}
LIMB_ANGLES = {0: (), 1: (180,), 2: (125, 235), 3: (110, 180, 250)}  # degrees from the heading


@dataclass(frozen=True)
class Placement:
    """Where a thing lies in a view: half image widths, degrees."""

    x: float
    y: float
    radius: float
    heading: float
    spin: float  # of the body under the head: nuisance


def place(scene: Scene, view: int) -> tuple[Placement, ...]:
    """Return where each thing of a scene lies in a view (also what key-points are computed from)."""
    stream = Stream(view, 1)
    shift = stream.uniform(-0.12, 0.12), stream.uniform(-0.12, 0.12)
    zoom = stream.uniform(0.95, 1.05)
    placements = []
    for thing in scene.things:
        x, y = centre(thing.cell)
        radius = (0.30 if thing.large else 0.22) if len(scene.things) > 1 else (0.50 if thing.large else 0.38)
        placements.append(
            Placement(
                x=zoom * (x + stream.uniform(-0.05, 0.05)) + shift[0],
                y=zoom * (y + stream.uniform(-0.05, 0.05)) + shift[1],
                radius=zoom * radius * stream.uniform(0.95, 1.05),
                heading=thing.heading + stream.uniform(-10, 10),
                spin=stream.uniform(0, 360),
            )
        )
    return tuple(placements)


def direction(degrees: float) -> tuple[float, float]:
    return round(math.cos(math.radians(degrees)), 12), round(math.sin(math.radians(degrees)), 12)


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """Convert hue (turns), saturation and value in [0, 1] to RGB in [0, 1]."""
    wheel = np.abs((np.array([hue, hue + 2 / 3, hue + 1 / 3]) % 1.0) * 6 - 3) - 1
    return (value * (1 - saturation * (1 - np.clip(wheel, 0, 1)))).astype(np.float32)


def _background(stream: Stream, size: int, axis: np.ndarray) -> np.ndarray:
    """Paint a two-colour gradient with soft blotches: (3, size, size)."""
    hue = stream.uniform()
    first = _rgb(hue, stream.uniform(0.05, 0.5), stream.uniform(0.45, 0.95))
    second = _rgb(hue + stream.uniform(-0.2, 0.2), stream.uniform(0.05, 0.5), stream.uniform(0.35, 0.9))
    dx, dy = direction(stream.uniform(0, 360))
    mix = 0.5 + 0.35 * (axis[None, :] * dx + axis[:, None] * dy)
    for cells, amplitude in ((3, stream.uniform(0.1, 0.5)), (7, stream.uniform(0.0, 0.3))):
        lattice = stream.uniforms((cells + 1) ** 2).astype(np.float32).reshape(cells + 1, cells + 1) - 0.5
        position = (axis + 1) * (cells / 2)
        low = np.minimum(np.floor(position).astype(int), cells - 1)
        t = position - low
        t = t * t * (3 - 2 * t)
        rows = lattice[low] + (lattice[low + 1] - lattice[low]) * t[:, None]
        mix = mix + amplitude * (rows[:, low] + (rows[:, low + 1] - rows[:, low]) * t[None, :])
    mix = np.clip(mix, 0, 1)
    return first[:, None, None] + (second - first)[:, None, None] * mix


def body(u: np.ndarray, v: np.ndarray, kind: str, spin: float) -> np.ndarray:
    """Return the signed distance (roughly, in radii) to a body of radius 1 at the origin."""
    radius = np.sqrt(u * u + v * v)
    lobes, depth = LOBES[kind]
    edge = radius - 1.0
    if lobes:
        inverse = 1 / np.maximum(radius, 1e-6)
        c, s = direction(spin)
        re, im = (u * c + v * s) * inverse, (v * c - u * s) * inverse
        cos, sin = re, im
        for _ in range(lobes - 1):  # cos(n a) by repeated complex multiplication: no transcendental per pixel
            cos, sin = cos * re - sin * im, cos * im + sin * re
        edge = (radius - 0.92 * (1 + depth * cos)) * 0.85
    return np.maximum(edge, 0.42 - radius) if kind == "ring" else edge


def _distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v)


def limb(u: np.ndarray, v: np.ndarray, direction: tuple[float, float]) -> np.ndarray:
    """Return the signed distance to a rounded limb that leaves the body."""
    along = np.clip(u * direction[0] + v * direction[1], 0.75, 1.40)
    du, dv = u - along * direction[0], v - along * direction[1]
    return np.sqrt(du * du + dv * dv) - 0.15


def _texture(u: np.ndarray, v: np.ndarray, texture: str, spin: float, edge: float) -> np.ndarray | None:
    """Return how dark the pattern is, 0 to 1; None for a plain body."""
    if texture == "plain":
        return None
    c, s = direction(spin)
    a, b = (u * c + v * s) * 1.6, (v * c - u * s) * 1.6
    if texture == "stripes":
        wave = np.abs(a - np.floor(a) - 0.5) * 4 - 1  # triangle wave in [-1, 1]
        return np.clip(wave / (6.4 * edge) + 0.5, 0, 1)
    da, db = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
    return np.clip((0.28 - np.sqrt(da * da + db * db)) / (1.6 * edge) + 0.5, 0, 1)


def _paint(patch: np.ndarray, cover: np.ndarray, colour: np.ndarray | float) -> None:
    patch += cover * (colour - patch)


def _around(u: np.ndarray, v: np.ndarray, x: float, y: float, reach: float) -> tuple[slice, slice]:
    """Return the rows and columns of a window that lie within `reach` of a point: what is painted there is small."""
    return tuple(slice(*np.searchsorted(axis.ravel(), (c - reach, c + reach))) for axis, c in ((v, y), (u, x)))


def render(scene: Scene, view: int, size: int) -> np.ndarray:
    """Render a view of a scene: (size, size, 3) uint8, the same bytes on every platform."""
    stream = Stream(view, 2)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    image = _background(stream, size, axis)
    light = direction(stream.uniform(0, 360))
    strength = stream.uniform(0.10, 0.30)
    tint = _rgb(stream.uniform(0.05, 0.65), stream.uniform(0.0, 0.18), 1.0) * stream.uniform(0.8, 1.05)
    for thing, at in zip(scene.things, place(scene, view), strict=True):
        reach = 1.75 * at.radius
        columns, rows = (slice(*np.searchsorted(axis, (c - reach, c + reach))) for c in (at.x, at.y))
        patch = image[:, rows, columns]
        u = ((axis[columns] - at.x) / at.radius)[None, :]
        v = ((axis[rows] - at.y) / at.radius)[:, None]
        if not (u.size and v.size):
            continue
        edge = 2 / (size * at.radius)  # one pixel in radii: the width of an anti-aliased border
        ahead = direction(at.heading)
        limbs = [direction(at.heading + angle) for angle in LIMB_ANGLES[thing.limbs]]
        kind, texture = KINDS[thing.kind], TEXTURES[thing.texture]
        hue = (thing.hue + stream.uniform(-0.25, 0.25)) / HUES
        colour = _rgb(hue, stream.uniform(0.65, 0.9), stream.uniform(0.75, 0.98)) * tint

        us, vs = u + 0.22 * light[0], v + 0.22 * light[1]  # the shadow falls away from the light
        _paint(patch, 0.45 * np.clip(0.5 - body(us, vs, kind, at.spin) / 0.35, 0, 1), patch * 0.35)
        for x, y in limbs:
            near = _around(u, v, 1.075 * x, 1.075 * y, 0.5 + edge)
            distance = limb(u[:, near[1]], v[near[0]], (x, y))
            _paint(patch[:, *near], np.clip(0.5 - distance / edge, 0, 1), (colour * 0.6)[:, None, None])

        near = _around(u, v, 0.0, 0.0, 1.3 + edge)
        un, vn = u[:, near[1]], v[near[0]]
        surface = (1 + strength * (un * light[0] + vn * light[1])) * colour[:, None, None]
        pattern = _texture(un, vn, texture, at.spin, edge)
        if pattern is not None:
            surface = surface * (1 - 0.55 * pattern)
        distance = body(un, vn, kind, at.spin)
        surface = surface * np.where(distance > -0.10, 0.75, 1.0)
        _paint(patch[:, *near], np.clip(0.5 - distance / edge, 0, 1), surface)

        near = _around(u, v, 1.02 * ahead[0], 1.02 * ahead[1], 0.40 + edge)
        head = _distance(u[:, near[1]] - 1.02 * ahead[0], v[near[0]] - 1.02 * ahead[1])
        pale = (0.35 * colour + 0.65 * tint)[:, None, None] * (1 - 0.35 * (head > 0.33))
        _paint(patch[:, *near], np.clip(0.5 - (head - 0.40) / edge, 0, 1), pale)
        near = _around(u, v, 1.20 * ahead[0], 1.20 * ahead[1], 0.16 + edge)
        eye = _distance(u[:, near[1]] - 1.20 * ahead[0], v[near[0]] - 1.20 * ahead[1])
        _paint(patch[:, *near], np.clip(0.5 - (eye - 0.16) / edge, 0, 1), np.float32(0.08))
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
