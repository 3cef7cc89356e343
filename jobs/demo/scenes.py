"""Samples scenes: which objects stand where on which background, as a function of a seed."""

import json
from dataclasses import dataclass, fields
from itertools import combinations
from math import hypot

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

SHAPES = ("circle", "square", "triangle", "star", "heart", "plus")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "big")
BACKGROUNDS = ("white", "gray", "beige", "navy")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}

_RADII = {"small": (0.13, 0.145), "big": (0.21, 0.235)}  # of the picture's shorter side
_BORDER = 0.05  # free rim, so that a square crop cuts nothing off
_REACH = 1.12  # how far a shape's tips reach beyond its radius
_GAP = 0.03  # least distance between two objects
_CLEAR = 0.6  # offset across / offset along, above which a relation would be arguable
_TRIES_PER_RADIUS = 40


class SceneConfig(BaseModel):
    """How much a scene may hold."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_objects: int = Field(default=2, ge=1, le=3)
    lone_share: float = Field(default=0.35, ge=0, le=1)  # of scenes that hold just one

    def num_objects(self, rng: np.random.Generator) -> int:
        """Draw how many objects a scene holds; above one, all numbers are equally likely."""
        if self.max_objects == 1 or rng.random() < self.lone_share:
            return 1
        return int(rng.integers(2, self.max_objects + 1))


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object. Lengths are fractions of the scene's side, y grows downwards."""

    shape: str
    colour: str
    texture: str
    size: str
    x: float
    y: float
    radius: float
    tilt_degrees: float


_OBJECT_FIELDS = tuple(each.name for each in fields(SceneObject))


@dataclass(frozen=True, slots=True)
class Scene:
    """A square world: objects of which no two share both colour and shape, on a background."""

    objects: tuple[SceneObject, ...]
    background: str

    def relation(self, first: int, second: int) -> str | None:
        """Return where object `first` stands, seen from `second`; None when it is arguable."""
        here, there = self.objects[first], self.objects[second]
        return _relation(here.x - there.x, here.y - there.y)

    def to_json(self) -> str:
        """Return one line of JSON that `scene_from_json` reads back to an equal scene."""
        objects = [{name: getattr(each, name) for name in _OBJECT_FIELDS} for each in self.objects]
        content = {"objects": objects, "background": self.background}
        return json.dumps(content, separators=(",", ":"))


def scene_from_json(text: str) -> Scene:
    """Return the scene that `Scene.to_json` wrote."""
    content = json.loads(text)
    return Scene(tuple(SceneObject(**each) for each in content["objects"]), content["background"])


def sample_scene(seed: int, index: int, config: SceneConfig | None = None) -> Scene:
    """Return scene number `index` of the world `seed`: the same one always and everywhere."""
    rng = np.random.default_rng((seed, index))
    num_objects = (config or SceneConfig()).num_objects(rng)
    named = rng.choice(len(SHAPES) * len(COLOURS), size=num_objects, replace=False)
    sizes = [SIZES[int(rng.integers(len(SIZES)))] for _ in range(num_objects)]
    places = _places([float(rng.uniform(*_RADII[size])) for size in sizes], rng)
    objects = tuple(
        SceneObject(
            shape=SHAPES[int(name) % len(SHAPES)],
            colour=COLOURS[int(name) // len(SHAPES)],
            texture=TEXTURES[int(rng.integers(len(TEXTURES)))],
            size=size,
            x=round(x, 4),  # short in the truth file, and equal after a round trip
            y=round(y, 4),
            radius=round(radius, 4),
            tilt_degrees=round(float(rng.uniform(-12, 12)), 1),
        )
        for name, size, (x, y, radius) in zip(named, sizes, places, strict=True)
    )
    return Scene(objects, BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])


def _places(radii: list[float], rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Draw (x, y, radius) until no objects touch and every relation is clear."""
    while True:
        low = np.array(radii) + _BORDER
        tries = rng.uniform(low, 1 - low, size=(_TRIES_PER_RADIUS, 2, len(radii))).tolist()
        for xs, ys in tries:
            if _is_clear(xs, ys, radii):
                return list(zip(xs, ys, radii, strict=True))
        radii = [
            radius * 0.95 for radius in radii
        ]  # too crowded: shrink all, sizes keep their rank


def _is_clear(xs: list[float], ys: list[float], radii: list[float]) -> bool:
    for i, j in combinations(range(len(radii)), 2):
        dx, dy = xs[i] - xs[j], ys[i] - ys[j]
        if hypot(dx, dy) < _REACH * (radii[i] + radii[j]) + _GAP or not _relation(dx, dy):
            return False
    return True


def _relation(dx: float, dy: float) -> str | None:
    if abs(dy) <= _CLEAR * abs(dx):
        return "left" if dx < 0 else "right"
    if abs(dx) <= _CLEAR * abs(dy):
        return "above" if dy < 0 else "below"
    return None
