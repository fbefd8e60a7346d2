"""The synthetic world: scenes of known factors, their rendering, and the judgement made from the factors.

A scene is a few *things* (body kind, limbs, heading, hue, texture, size) standing in cells of a 3x3 layout and looking
at, away from, along with or past each other. A *view* of it adds what a human judge ignores: background, light, jitter.
Rendering uses only correctly rounded operations per pixel (+ - * / sqrt) and scalars rounded to 12 digits, so that a seed
gives the same bytes on every platform.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

VERSION = 1  # raise it with any change that changes a picture or a vote

KINDS = ("disc", "bean", "clover", "cross", "star", "ring")
TEXTURES = ("plain", "stripes", "dots")
GAZES = ("together", "inward", "outward", "scattered")
PAIRINGS = ("alike", "odd one", "all different")
LIMBS = 4  # 0, 1, 2 or 3 limbs
HUES = 6
CELLS = 9
HEADINGS = 8  # of 45 degrees

LOBES = {"disc": (0, 0.0), "bean": (2, 0.30), "clover": (3, 0.30), "cross": (4, 0.30), "star": (5, 0.27), "ring": (0, 0.0)}
LIMB_ANGLES = {0: (), 1: (180,), 2: (125, 235), 3: (110, 180, 250)}  # degrees from the heading

# What the judge weighs: per matched pair of things, then for the scene as a whole. Views weigh nothing.
THING_WEIGHTS = {"kind": 1.0, "cell": 0.7, "heading": 0.4, "limbs": 0.5, "hue": 0.6, "texture": 0.4, "large": 0.3}
SCENE_WEIGHTS = {"gaze": 0.5, "pairing": 0.3}


class Stream:
    """Draw platform-independent uniform numbers from the raw bits of a PCG64 generator keyed by integers."""

    def __init__(self, *key: int):
        self._bits = np.random.PCG64(np.random.SeedSequence(key))

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * ((int(self._bits.random_raw()) >> 11) * 2.0**-53)

    def uniforms(self, n: int) -> np.ndarray:
        return (self._bits.random_raw(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, n: int) -> int:
        return int(self.uniform() * n)

    def choice(self, options: Sequence):
        return options[self.below(len(options))]

    def chance(self, probability: float) -> bool:
        return self.uniform() < probability


@dataclass(frozen=True)
class Thing:
    kind: int
    cell: int
    heading: int  # degrees, 0 = right, clockwise (y points down)
    limbs: int
    hue: int
    texture: int
    large: bool


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    gaze: int  # index into GAZES

    @property
    def pairing(self) -> int:
        """Return the index into PAIRINGS: how many of the things share a kind."""
        distinct = len({thing.kind for thing in self.things})
        return 0 if distinct == 1 else 2 if distinct == len(self.things) else 1


# ------------------------------------------------------------------------------------------------ drawing scenes


def _layouts() -> list[tuple[int, ...]]:
    """List the triples of cells of which no two touch along an edge: the things are distant parts."""
    apart = lambda a, b: abs(a // 3 - b // 3) + abs(a % 3 - b % 3) > 1  # noqa: E731
    cells = range(CELLS)
    return [(a, b, c) for a in cells for b in cells for c in cells if a < b < c and apart(a, b) and apart(a, c) and apart(b, c)]


LAYOUTS = _layouts()


def _centre(cell: int) -> tuple[float, float]:
    return (cell % 3 - 1) * 0.57, (cell // 3 - 1) * 0.57  # in half image widths


def _with_headings(things: Sequence[Thing], gaze: int, stream: Stream) -> tuple[Thing, ...]:
    """Turn the things so that the scene shows the gaze asked for."""
    centres = [_centre(thing.cell) for thing in things]
    middle = [sum(c[axis] for c in centres) / len(centres) for axis in (0, 1)]
    common = 45 * stream.below(HEADINGS)
    scattered = [(common + turn) % 360 for turn in stream.choice(((0, 135, 225), (0, 225, 90), (0, 90, 180), (0, 180, 270)))]
    headings = []
    for i, (x, y) in enumerate(centres):
        inward = round(math.degrees(math.atan2(middle[1] - y, middle[0] - x))) % 360
        headings.append({"together": common, "inward": inward, "outward": (inward + 180) % 360, "scattered": scattered[i % 3]}[GAZES[gaze]])
    return tuple(replace(thing, heading=heading) for thing, heading in zip(things, headings, strict=True))


def draw_thing(stream: Stream, *, cell: int) -> Thing:
    """Draw a thing with uniform factors in the given cell."""
    return Thing(
        kind=stream.below(len(KINDS)),
        cell=cell,
        heading=45 * stream.below(HEADINGS),
        limbs=stream.below(LIMBS),
        hue=stream.below(HUES),
        texture=stream.below(len(TEXTURES)),
        large=stream.chance(0.5),
    )


def draw_scene(stream: Stream) -> Scene:
    """Draw a scene of three things, with every gaze and every pairing frequent."""
    things = [draw_thing(stream, cell=cell) for cell in stream.choice(LAYOUTS)]
    pairing = stream.below(len(PAIRINGS))
    if pairing < 2:
        kind, odd = stream.below(len(KINDS)), stream.below(3) if pairing == 1 else None
        things = [thing if i == odd else replace(thing, kind=kind) for i, thing in enumerate(things)]
    gaze = stream.below(len(GAZES))
    return Scene(_with_headings(things, gaze, stream), gaze)


def edit_scene(scene: Scene, stream: Stream) -> Scene:
    """Change a random part of a scene's factors, from a touch to almost everything."""
    amount = stream.uniform(0.05, 0.75)
    things = list(scene.things)
    if stream.chance(amount):
        if stream.chance(0.5):  # the things change places
            order = stream.choice(((1, 0, 2), (0, 2, 1), (2, 1, 0), (1, 2, 0), (2, 0, 1)))
            things = [replace(thing, cell=scene.things[j].cell) for thing, j in zip(things, order, strict=True)]
        else:
            things = [replace(thing, cell=cell) for thing, cell in zip(things, stream.choice(LAYOUTS), strict=True)]
    for i, thing in enumerate(things):
        other = draw_thing(stream, cell=thing.cell)
        changed = {name: getattr(other, name) for name in ("kind", "limbs", "hue", "texture", "large") if stream.chance(amount)}
        things[i] = replace(thing, **changed)
    gaze = stream.below(len(GAZES)) if stream.chance(amount) else scene.gaze
    moved = any(a.cell != b.cell for a, b in zip(things, scene.things, strict=True))
    if gaze != scene.gaze or (moved and GAZES[gaze] in ("inward", "outward")):
        things = _with_headings(things, gaze, stream)
    return Scene(tuple(things), gaze)


# ------------------------------------------------------------------------------------------------ judging scenes


def _thing_distance(a: Thing, b: Thing) -> float:
    (ax, ay), (bx, by) = _centre(a.cell), _centre(b.cell)
    turn = abs(a.heading - b.heading) % 360
    hue = abs(a.hue - b.hue) % HUES
    apart = {
        "kind": float(a.kind != b.kind),
        "cell": min(1.0, math.sqrt((ax - bx) ** 2 + (ay - by) ** 2) / 1.2),
        "heading": min(turn, 360 - turn) / 180,
        "limbs": abs(a.limbs - b.limbs) / (LIMBS - 1),
        "hue": min(hue, HUES - hue) / (HUES // 2),
        "texture": float(a.texture != b.texture),
        "large": float(a.large != b.large),
    }
    return sum(THING_WEIGHTS[name] * value for name, value in apart.items())


def dissimilarity(a: Scene, b: Scene) -> float:
    """Return how unlike two scenes are to the judge: things matched at least cost, plus the relations between them."""
    pairs = [[_thing_distance(p, q) for q in b.things] for p in a.things]
    matched = min(sum(pairs[i][j] for i, j in enumerate(order)) for order in permutations(range(len(b.things)))) / len(a.things)
    return matched + SCENE_WEIGHTS["gaze"] * (a.gaze != b.gaze) + SCENE_WEIGHTS["pairing"] * (a.pairing != b.pairing)


# ------------------------------------------------------------------------------------------------ rendering


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
        x, y = _centre(thing.cell)
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


def _direction(degrees: float) -> tuple[float, float]:
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
    dx, dy = _direction(stream.uniform(0, 360))
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


def _body(u: np.ndarray, v: np.ndarray, kind: str, spin: float) -> np.ndarray:
    """Return the signed distance (roughly, in radii) to a body of radius 1 at the origin."""
    radius = np.sqrt(u * u + v * v)
    lobes, depth = LOBES[kind]
    edge = radius - 1.0
    if lobes:
        inverse = 1 / np.maximum(radius, 1e-6)
        c, s = _direction(spin)
        re, im = (u * c + v * s) * inverse, (v * c - u * s) * inverse
        cos, sin = re, im
        for _ in range(lobes - 1):  # cos(n a) by repeated complex multiplication: no transcendental per pixel
            cos, sin = cos * re - sin * im, cos * im + sin * re
        edge = (radius - 0.92 * (1 + depth * cos)) * 0.85
    return np.maximum(edge, 0.42 - radius) if kind == "ring" else edge


def _limb(u: np.ndarray, v: np.ndarray, direction: tuple[float, float]) -> np.ndarray:
    """Return the signed distance to a rounded limb that leaves the body."""
    along = np.clip(u * direction[0] + v * direction[1], 0.75, 1.40)
    du, dv = u - along * direction[0], v - along * direction[1]
    return np.sqrt(du * du + dv * dv) - 0.15


def _texture(u: np.ndarray, v: np.ndarray, texture: str, spin: float, edge: float) -> np.ndarray | None:
    """Return how dark the pattern is, 0 to 1; None for a plain body."""
    if texture == "plain":
        return None
    c, s = _direction(spin)
    a, b = (u * c + v * s) * 1.6, (v * c - u * s) * 1.6
    if texture == "stripes":
        wave = np.abs(a - np.floor(a) - 0.5) * 4 - 1  # triangle wave in [-1, 1]
        return np.clip(wave / (6.4 * edge) + 0.5, 0, 1)
    da, db = a - np.floor(a) - 0.5, b - np.floor(b) - 0.5
    return np.clip((0.28 - np.sqrt(da * da + db * db)) / (1.6 * edge) + 0.5, 0, 1)


def _paint(image: np.ndarray, window: tuple[slice, slice], cover: np.ndarray, colour: np.ndarray) -> None:
    patch = image[:, window[0], window[1]]
    patch += cover * (colour - patch)


def render(scene: Scene, view: int, size: int) -> np.ndarray:
    """Render a view of a scene: (size, size, 3) uint8, the same bytes on every platform."""
    stream = Stream(view, 2)
    axis = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    image = _background(stream, size, axis)
    light = _direction(stream.uniform(0, 360))
    strength = stream.uniform(0.10, 0.30)
    tint = _rgb(stream.uniform(0.05, 0.65), stream.uniform(0.0, 0.18), 1.0) * stream.uniform(0.8, 1.05)
    for thing, at in zip(scene.things, place(scene, view), strict=True):
        reach = 1.75 * at.radius
        columns, rows = (slice(*np.searchsorted(axis, (c - reach, c + reach))) for c in (at.x, at.y))
        window = rows, columns
        u = ((axis[columns] - at.x) / at.radius)[None, :]
        v = ((axis[rows] - at.y) / at.radius)[:, None]
        if not (u.size and v.size):
            continue
        edge = 2 / (size * at.radius)  # one pixel in radii: the width of an anti-aliased border
        ahead = _direction(at.heading)
        limbs = [_direction(at.heading + angle) for angle in LIMB_ANGLES[thing.limbs]]
        kind, texture = KINDS[thing.kind], TEXTURES[thing.texture]
        hue = (thing.hue + stream.uniform(-0.25, 0.25)) / HUES
        colour = _rgb(hue, stream.uniform(0.65, 0.9), stream.uniform(0.75, 0.98)) * tint

        us, vs = u + 0.22 * light[0], v + 0.22 * light[1]  # the shadow falls away from the light
        shade = 0.45 * np.clip(0.5 - _body(us, vs, kind, at.spin) / 0.35, 0, 1)
        _paint(image, window, shade, image[:, rows, columns] * 0.35)
        for limb in limbs:
            _paint(image, window, np.clip(0.5 - _limb(u, v, limb) / edge, 0, 1), (colour * 0.6)[:, None, None])
        relief = 1 + strength * (u * light[0] + v * light[1])
        body = relief * colour[:, None, None]
        pattern = _texture(u, v, texture, at.spin, edge)
        if pattern is not None:
            body = body * (1 - 0.55 * pattern)
        distance = _body(u, v, kind, at.spin)
        _paint(image, window, np.clip(0.5 - distance / edge, 0, 1), body * np.where(distance > -0.10, 0.75, 1.0))
        hu, hv = u - 1.02 * ahead[0], v - 1.02 * ahead[1]
        head = np.sqrt(hu * hu + hv * hv)
        pale = (0.35 * colour + 0.65 * tint)[:, None, None]
        _paint(image, window, np.clip(0.5 - (head - 0.40) / edge, 0, 1), pale * (1 - 0.35 * (head > 0.33)))
        eu, ev = u - 1.20 * ahead[0], v - 1.20 * ahead[1]
        _paint(image, window, np.clip(0.5 - (np.sqrt(eu * eu + ev * ev) - 0.16) / edge, 0, 1), np.full((3, 1, 1), 0.08, np.float32))
    return np.floor(np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8).transpose(1, 2, 0)
