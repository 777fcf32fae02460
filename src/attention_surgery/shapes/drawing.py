"""Rendering: from a seed to clips with captions, by signed distances in numpy."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .captions import say
from .world import (
    CHECKER_PERIOD,
    DIRECTIONS,
    FRAMES,
    GROWTH,
    HEIGHT,
    PAIR_RADIUS,
    PALETTE,
    RADIUS,
    SLATE,
    SPLITS,
    STRIPE_PERIOD,
    TRANSLATIONS,
    WIDTH,
    Background,
    Scene,
    Shape,
    Split,
    draw_scene,
)

Floats = NDArray[np.float32]

SQUARE_HALF, TRIANGLE_REACH, CROSS_REACH, CROSS_HALF = 0.9, 1.3, 1.1, 0.4
"""A shape of radius 1: half a side, centre to corner, centre to an arm's end, half an arm's width."""

AREA: dict[Shape, float] = {
    "circle": np.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 0.75 * np.sqrt(3) * TRIANGLE_REACH**2,
    "cross": 8 * CROSS_REACH * CROSS_HALF - 4 * CROSS_HALF**2,
}
"""Area of a shape of radius 1."""

TURN = np.deg2rad(135.0)
"""How far a rotating object turns in a clip, clockwise."""

_MARGIN = 1.5
_Y, _X = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[0:HEIGHT, 0:WIDTH])


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A rendered clip: `frames` uint8 (f, h, w, 3), FPS frames per second, and the `caption` that states its facts."""

    frames: NDArray[np.uint8]
    caption: str


def render(n: int, *, seed: int, split: Split = "train") -> list[Clip]:
    """Render `n` captioned clips, the same for the same seed and split; a larger `n` appends clips.

    Args:
        n: how many.
        seed: any integer >= 0; another seed gives other clips.
        split: "train" never shows a held-out combination of shape, colour and motion, "heldout" shows nothing else.

    Raises:
        DataError: n or seed negative, or another split.
    """
    if n < 0 or seed < 0:
        raise DataError(f"render needs n >= 0 and seed >= 0; got n={n}, seed={seed}")
    if split not in SPLITS:
        raise DataError(f"split {split!r} does not exist; expected one of {SPLITS}")
    return [_render_clip(np.random.default_rng([seed, SPLITS.index(split), index]), split) for index in range(n)]


def _render_clip(rng: np.random.Generator, split: Split) -> Clip:
    scene = draw_scene(rng, split)
    caption = say(scene, rng)
    frames = np.broadcast_to(_background(scene.background, rng), (FRAMES, HEIGHT, WIDTH, 3)).copy()
    for thing, (x, y, radius, angle) in zip(scene.things, _paths(scene, rng), strict=True):
        color = np.asarray(PALETTE[thing.color], np.float32) + rng.uniform(-8, 8, 3).astype(np.float32)
        alpha = coverage(thing.shape, x, y, radius, angle)[..., None]
        frames += alpha * (color - frames)
    return Clip(frames=(np.clip(frames, 0, 255) + 0.5).astype(np.uint8), caption=caption)


def coverage(shape: Shape, x: Floats, y: Floats, radius: Floats, angle: Floats) -> Floats:
    """How much of each pixel a shape covers, (f, HEIGHT, WIDTH) in [0, 1], from its signed distance.

    Args:
        shape: which.
        x, y, radius, angle: (f,), centre and radius in pixels, angle in radians, clockwise.
    """
    x, y, radius, angle = (np.asarray(value, np.float32)[:, None, None] for value in (x, y, radius, angle))
    dx, dy = _X - x, _Y - y
    distance = signed_distance(shape, dx, dy, radius, angle)
    return np.clip(0.5 - distance / 1.25, 0, 1)


def signed_distance(shape: Shape, dx: Floats, dy: Floats, radius: Floats, angle: Floats) -> Floats:
    """Distance in pixels from points (dx, dy) off the centre to a shape's outline, negative inside."""
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    if shape == "triangle":  # the three sides' half-planes; one corner points up
        slanted = np.float32(np.sqrt(0.75)) * np.abs(u) - np.float32(0.5) * v
        return np.maximum(v, slanted) - TRIANGLE_REACH / 2 * radius
    u, v = np.abs(u), np.abs(v)
    if shape == "square":
        return np.maximum(u, v) - SQUARE_HALF * radius
    return np.maximum(np.maximum(u, v) - CROSS_REACH * radius, np.minimum(u, v) - CROSS_HALF * radius)


def _background(kind: Background, rng: np.random.Generator) -> Floats:
    """(h, w, 3): slate, jittered, with the kind's smooth texture."""
    phase = rng.uniform(0, 2 * np.pi, 2)
    if kind == "plain":
        texture = np.zeros_like(_X)
    elif kind == "gradient":  # lighter above
        texture = 26 * (1 - 2 * _Y / HEIGHT)
    elif kind == "striped":
        texture = 18 * np.sin(2 * np.pi * _Y / STRIPE_PERIOD + phase[0])
    else:
        turns = 2 * np.pi / CHECKER_PERIOD
        texture = 22 * np.sin(turns * _X + phase[0]) * np.sin(turns * _Y + phase[1])
    base = np.asarray(SLATE) + rng.uniform(-6, 6, 3)
    return (base + texture[..., None]).astype(np.float32)


def _reach(shape: Shape, radius: float, *, turning: bool) -> tuple[float, float, float, float]:
    """How far a shape extends from its centre to the left, right, up and down, in pixels."""
    if shape == "triangle" and not turning:
        side = np.sqrt(0.75) * TRIANGLE_REACH * radius
        return side, side, TRIANGLE_REACH * radius, TRIANGLE_REACH / 2 * radius
    corner = np.sqrt(2) * SQUARE_HALF, TRIANGLE_REACH, np.hypot(CROSS_REACH, CROSS_HALF)
    square, triangle, cross = corner if turning else (SQUARE_HALF, TRIANGLE_REACH, CROSS_REACH)
    reach = float({"circle": 1.0, "square": square, "triangle": triangle, "cross": cross}[shape] * radius)
    return reach, reach, reach, reach


def _paths(scene: Scene, rng: np.random.Generator) -> list[tuple[Floats, Floats, Floats, Floats]]:
    """Centre x, y, radius and angle over time, each (f,), per object, wholly inside the picture."""
    time = np.linspace(0, 1, FRAMES, dtype=np.float32)
    still = np.zeros_like(time)
    pair = len(scene.things) == 2
    radius, angle, move_x, move_y = still, still, still, still
    if pair:
        radius = still + PAIR_RADIUS
    elif scene.size is not None:
        radius = still + np.float32(RADIUS[scene.size] * rng.uniform(0.96, 1.04))
    if scene.motion in TRANSLATIONS:
        step_x, step_y = TRANSLATIONS[scene.motion]
        distance = np.float32(rng.uniform(14, 17) if pair else rng.uniform(22, 26))
        move_x, move_y = step_x * distance * time, step_y * distance * time
    elif scene.motion == "bounce":  # down and up again
        move_y = np.float32(rng.uniform(18, 22)) * (1 - np.cos(2 * np.pi * time)) / 2
    elif scene.motion == "rotate":
        angle = TURN * time
    elif scene.motion == "grow":
        radius = GROWTH[0] + (GROWTH[1] - GROWTH[0]) * time

    offsets = [(0.0, 0.0)]
    if scene.relation is not None:
        step_x, step_y = DIRECTIONS[scene.relation]
        apart, aside = rng.uniform(23, 25), rng.uniform(-2, 2)
        x, y = step_x * apart + abs(step_y) * aside, step_y * apart + abs(step_x) * aside
        offsets = [(x / 2, y / 2), (-x / 2, -y / 2)]

    turning = scene.motion == "rotate"
    reaches = [_reach(thing.shape, float(radius.max()), turning=turning) for thing in scene.things]
    around = list(zip(offsets, reaches, strict=True))
    low_x = max(left - x for (x, _), (left, _, _, _) in around) - move_x.min() + _MARGIN
    high_x = WIDTH - max(right + x for (x, _), (_, right, _, _) in around) - move_x.max() - _MARGIN
    low_y = max(up - y for (_, y), (_, _, up, _) in around) - move_y.min() + _MARGIN
    high_y = HEIGHT - max(down + y for (_, y), (_, _, _, down) in around) - move_y.max() - _MARGIN
    x, y = rng.uniform(low_x, high_x), rng.uniform(low_y, high_y)
    return [
        ((x + dx + move_x).astype(np.float32), (y + dy + move_y).astype(np.float32), radius, angle)
        for dx, dy in offsets
    ]
