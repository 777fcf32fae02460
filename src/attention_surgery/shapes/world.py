"""The small world: what it holds, what may stand together, and which combinations are kept for tests.

A scene is one object, or two beside or above each other, over a dark textured background. Everything that a caption
states is an attribute here, with few values that are far apart, so that a small model can learn them and a judge can
read them back from pixels without doubt.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar, get_args

import numpy as np

from ..errors import DataError

_T = TypeVar("_T")

FRAMES, HEIGHT, WIDTH = 17, 64, 64
FPS = 8

Shape: TypeAlias = Literal["circle", "square", "triangle", "cross"]
Color: TypeAlias = Literal["red", "yellow", "green", "blue", "purple", "white"]
Size: TypeAlias = Literal["small", "large"]
Motion: TypeAlias = Literal["left", "right", "up", "down", "bounce", "rotate", "grow", "stay"]
Relation: TypeAlias = Literal["left of", "right of", "above", "below"]
Background: TypeAlias = Literal["plain", "gradient", "striped", "checkered"]
Split: TypeAlias = Literal["train", "heldout"]

SHAPES: tuple[Shape, ...] = get_args(Shape)
COLORS: tuple[Color, ...] = get_args(Color)
SIZES: tuple[Size, ...] = get_args(Size)
MOTIONS: tuple[Motion, ...] = get_args(Motion)
RELATIONS: tuple[Relation, ...] = get_args(Relation)
BACKGROUNDS: tuple[Background, ...] = get_args(Background)
SPLITS: tuple[Split, ...] = get_args(Split)

PAIR_MOTIONS: tuple[Motion, ...] = ("left", "right", "up", "down", "stay")
"""Two objects share one motion, so that their relation holds in every frame."""

TRANSLATIONS: dict[Motion, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Unit steps (x, y) in pixels; y points down."""

DIRECTIONS: dict[Relation, tuple[int, int]] = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first object stands, seen from the second."""

PALETTE: dict[Color, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "yellow": (240, 210, 40),
    "green": (30, 185, 70),
    "blue": (40, 90, 235),
    "purple": (200, 60, 215),
    "white": (240, 240, 240),
}
SLATE = (70, 74, 84)
"""The colour that every background varies around."""

RADIUS: dict[Size, float] = {"small": 8.5, "large": 13.0}
PAIR_RADIUS = 8.0
GROWTH = (6.5, 14.0)
"""Radii in pixels; a growing object goes from the first to the second."""

STRIPE_PERIOD, CHECKER_PERIOD = 16, 32
"""Pixels from one crest of the background's texture to the next."""


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One object: its shape and its colour."""

    shape: Shape
    color: Color


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The facts that a caption states.

    Args:
        things: one object, or two in the order of the caption.
        motion: of every object in the scene.
        background: the kind of texture.
        size: of a single object that does not grow; None where the caption does not state it.
        relation: of the first of two objects to the second.

    Raises:
        DataError: for a scene that the world never shows, because no picture could settle it.
    """

    things: tuple[Thing, ...]
    motion: Motion
    background: Background
    size: Size | None = None
    relation: Relation | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2) or (len(self.things) == 2) != (self.relation is not None):
            raise DataError(
                f"a scene has one object, or two and a relation; got {len(self.things)} and relation {self.relation!r}"
            )
        if self.motion == "rotate" and self.things[0].shape == "circle":
            raise DataError("a circle cannot be seen to rotate; choose another shape or another motion")
        if self.size is not None and (self.motion == "grow" or len(self.things) == 2):
            raise DataError("a size is stated of a single object that does not grow; leave the size out of the caption")
        if len(self.things) == 2:
            if self.things[0].color == self.things[1].color:
                raise DataError(f"two objects differ in colour in this world; both are {self.things[0].color}")
            if self.motion not in PAIR_MOTIONS:
                raise DataError(f"two objects can share the motions {PAIR_MOTIONS}; got {self.motion!r}")


def is_heldout(thing: Thing, motion: Motion) -> bool:
    """Whether this shape, colour and motion are never shown together in training (one in eight).

    Diagonal planes of the cube of triples: every pair of values is still seen in training, with other thirds.
    """
    return (SHAPES.index(thing.shape) + COLORS.index(thing.color) + MOTIONS.index(motion)) % len(MOTIONS) == 0


THINGS: dict[tuple[Split, Motion], tuple[Thing, ...]] = {
    (split, motion): tuple(
        thing
        for thing in (Thing(shape=shape, color=color) for shape in SHAPES for color in COLORS)
        if is_heldout(thing, motion) == (split == "heldout") and not (thing.shape == "circle" and motion == "rotate")
    )
    for split in SPLITS
    for motion in MOTIONS
}
"""The objects that may show a motion, by split."""


def draw_scene(rng: np.random.Generator, split: Split) -> Scene:
    """Draw the facts of one scene: two objects in three of ten, every motion equally often among those that may be."""

    def pick(values: tuple[_T, ...]) -> _T:
        return values[int(rng.integers(len(values)))]

    pair = rng.random() < 0.3
    motion: Motion = pick(PAIR_MOTIONS if pair else MOTIONS)
    first = pick(THINGS[split, motion])
    if pair:
        second = pick(tuple(thing for thing in THINGS[split, motion] if thing.color != first.color))
        return Scene(things=(first, second), motion=motion, background=pick(BACKGROUNDS), relation=pick(RELATIONS))
    size: Size | None = None if motion == "grow" else pick(SIZES)
    return Scene(things=(first,), motion=motion, background=pick(BACKGROUNDS), size=size)
