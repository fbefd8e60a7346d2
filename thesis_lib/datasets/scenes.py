"""The synthetic world: scenes of known factors, how they are drawn at random, and the judgement made from the factors.

A scene is a few *things* (body kind, limbs, heading, hue, texture, size) in cells of a 3x3 layout that look
at, away from, along with or past each other. What a picture shows beyond that is its view: see rendering.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np

VERSION = 2  # raise it with any change that changes a picture or a vote

KINDS = ("disc", "bean", "clover", "cross", "star", "ring")
TEXTURES = ("plain", "stripes", "dots")
GAZES = ("together", "inward", "outward", "scattered")
PAIRINGS = ("alike", "odd one", "all different")
LIMBS = 4  # 0, 1, 2 or 3 limbs
HUES = 6
CELLS = 9
HEADINGS = 8  # of 45 degrees


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
    return [
        (a, b, c)
        for a in cells
        for b in cells
        for c in cells
        if a < b < c and apart(a, b) and apart(a, c) and apart(b, c)
    ]


LAYOUTS = _layouts()


def centre(cell: int) -> tuple[float, float]:
    return (cell % 3 - 1) * 0.57, (cell // 3 - 1) * 0.57  # in half image widths


def _with_headings(things: Sequence[Thing], gaze: int, stream: Stream) -> tuple[Thing, ...]:
    """Turn the things so that the scene shows the gaze asked for."""
    centres = [centre(thing.cell) for thing in things]
    middle = [sum(c[axis] for c in centres) / len(centres) for axis in (0, 1)]
    common = 45 * stream.below(HEADINGS)
    scattered = [
        (common + turn) % 360 for turn in stream.choice(((0, 135, 225), (0, 225, 90), (0, 90, 180), (0, 180, 270)))
    ]
    headings = []
    for i, (x, y) in enumerate(centres):
        inward = round(math.degrees(math.atan2(middle[1] - y, middle[0] - x))) % 360
        headings.append(
            {"together": common, "inward": inward, "outward": (inward + 180) % 360, "scattered": scattered[i % 3]}[
                GAZES[gaze]
            ]
        )
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
        changed = {
            name: getattr(other, name) for name in ("kind", "limbs", "hue", "texture", "large") if stream.chance(amount)
        }
        things[i] = replace(thing, **changed)
    gaze = stream.below(len(GAZES)) if stream.chance(amount) else scene.gaze
    moved = any(a.cell != b.cell for a, b in zip(things, scene.things, strict=True))
    if gaze != scene.gaze or (moved and GAZES[gaze] in ("inward", "outward")):
        things = _with_headings(things, gaze, stream)
    return Scene(tuple(things), gaze)


# ------------------------------------------------------------------------------------------------ judging scenes


def _thing_distance(a: Thing, b: Thing) -> float:
    (ax, ay), (bx, by) = centre(a.cell), centre(b.cell)
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
    matched = min(sum(pairs[i][j] for i, j in enumerate(order)) for order in permutations(range(len(b.things)))) / len(
        a.things
    )
    return matched + SCENE_WEIGHTS["gaze"] * (a.gaze != b.gaze) + SCENE_WEIGHTS["pairing"] * (a.pairing != b.pairing)
