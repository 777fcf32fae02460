"""Reading a clip: the facts that its pixels show, without its caption."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d

from ..errors import DataError
from .drawing import AREA
from .tracking import Backdrop, Floats, Track, fit_backdrop, track_objects
from .world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    FRAMES,
    HEIGHT,
    PALETTE,
    RADIUS,
    SHAPES,
    SLATE,
    TRANSLATIONS,
    WIDTH,
    Background,
    Color,
    Motion,
    Relation,
    Shape,
    Size,
)

_LIKENESS = 0.86
"""Least overlap of an object with a shape to be one; renders have 0.94 and more, random blobs 0.85 at most."""
_COLOR_DISTANCE = 80.0
"""Most distance in RGB from a colour of the palette to be it; the two nearest colours are 160 apart."""
_SIZE_BORDER = float(np.sqrt(RADIUS["small"] * RADIUS["large"]))
_SEEN = 0.7
"""Least share of the frames in which an object must be found for its motion to be read."""

STILL, MOVED = 4.0, 8.0
"""Pixels: displacement up to the first is none, from the second on it is a motion; the world's are 14 and more."""
_GROWN_LITTLE, _GROWN = 1.3, 1.8
"""The same for the ratio of areas at the end and at the start; the world's is 4.6."""
_TURNED_LITTLE, _TURNED = np.deg2rad(25.0), np.deg2rad(60.0)
"""The same for the angle; the world's is 135 degrees."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """One object as read: what it is (None: like nothing in the world) and how it moves."""

    shape: Shape | None
    color: Color | None
    size: Size
    motion: Motion | None
    moves: bool
    track: Track


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a clip's pixels show.

    Args:
        sights: the objects.
        background: its kind; None if it is none of the world's.
        backdrop: the fitted background; None if the clip has none.
        video: the clip as (3, f, h, w) in [0, 255].
    """

    sights: tuple[Sight, ...]
    background: Background | None
    backdrop: Backdrop | None
    video: Floats

    @property
    def motion(self) -> Motion | None:
        """The motion that all objects share; None if there is none, or it is like nothing in the world."""
        motions: set[Motion | None] = {sight.motion for sight in self.sights}
        return motions.pop() if len(motions) == 1 else None


def read(frames: NDArray[np.uint8] | NDArray[np.floating]) -> Reading:
    """Read a clip back from its pixels.

    Args:
        frames: (FRAMES, HEIGHT, WIDTH, 3), uint8, or floating point in [0, 1].

    Raises:
        DataError: another shape, dtype or range.
    """
    video = _check_clip(frames)
    backdrop = fit_backdrop(video)
    if backdrop is None:
        return Reading(sights=(), background=None, backdrop=None, video=video)
    sights = tuple(_recognize(track) for track in track_objects(video, backdrop))
    return Reading(sights=sights, background=_background(backdrop), backdrop=backdrop, video=video)


def relation(first: Sight, second: Sight) -> Relation | None:
    """Where the first object is, seen from the second, over the frames that show both; None if it is askew."""
    x, y = (
        np.nanmean(getattr(first.track, axis) - getattr(second.track, axis))
        if (first.track.present & second.track.present).any()
        else 0.0
        for axis in ("x", "y")
    )
    if max(abs(x), abs(y)) < 1.5 * min(abs(x), abs(y)) + 1:
        return None
    return next(name for name, (right, down) in DIRECTIONS.items() if right * x + down * y >= max(abs(x), abs(y)))


def _check_clip(frames: NDArray[np.uint8] | NDArray[np.floating]) -> Floats:
    expected = (FRAMES, HEIGHT, WIDTH, 3)
    if not isinstance(frames, np.ndarray):
        raise DataError(f"a clip is a numpy array (f, h, w, 3); got {type(frames).__name__}")
    if frames.shape != expected:
        raise DataError(f"a clip of the small world is {expected} (f, h, w, 3); got {frames.shape}")
    if frames.dtype == np.uint8:
        levels = frames.astype(np.float32)
    elif np.issubdtype(frames.dtype, np.floating):
        if not (frames.min() >= 0 and frames.max() <= 1):
            raise DataError(
                f"a floating-point clip lies in [0, 1]; got [{frames.min():.4g}, {frames.max():.4g}]; "
                "rescale it, or pass uint8 in [0, 255]"
            )
        levels = frames.astype(np.float32) * 255
    else:
        raise DataError(f"a clip is uint8 in [0, 255] or floating point in [0, 1]; got {frames.dtype}")
    return np.ascontiguousarray(np.moveaxis(levels, -1, 0))


def _background(backdrop: Backdrop) -> Background | None:
    mean = backdrop.fit.mean((1, 2))
    if np.abs(mean - np.asarray(SLATE)).max() > 40 or backdrop.residual > 8:
        return None
    kind = max(BACKGROUNDS[1:], key=lambda name: backdrop.strength[name])
    strength = backdrop.strength[kind]
    if strength < 5:
        return "plain"
    second = max(backdrop.strength[name] for name in BACKGROUNDS[1:] if name != kind)
    return kind if second <= 0.6 * strength else None


def _recognize(track: Track) -> Sight:
    likeness = np.nanmean(track.likeness, axis=0)
    shape = SHAPES[int(likeness.argmax())] if likeness.max() >= _LIKENESS else None
    colors = np.linalg.norm(np.nanmedian(track.color, axis=0) - np.array([PALETTE[name] for name in COLORS]), axis=1)
    color = COLORS[int(colors.argmin())] if colors.min() <= _COLOR_DISTANCE else None
    radius = np.sqrt(np.nanmedian(track.area) / (np.mean(list(AREA.values())) if shape is None else AREA[shape]))
    motion, moves = _motion(track, shape)
    return Sight(
        shape=shape,
        color=color,
        size="small" if radius < _SIZE_BORDER else "large",
        motion=motion,
        moves=moves,
        track=track,
    )


def _motion(track: Track, shape: Shape | None) -> tuple[Motion | None, bool]:
    """The kind of motion (None: none of the world's), and whether there is any at all."""
    seen = track.present
    if seen.mean() < _SEEN:
        return None, False
    # Jerks cost motion_smoothness; they do not make another kind of motion.
    x, y, area = (uniform_filter1d(values[seen], 3, mode="nearest") for values in (track.x, track.y, track.area))
    ends = [values[-2:].mean() - values[:2].mean() for values in (x, y)]
    spans = [np.ptp(values) for values in (x, y)]
    way, span = np.hypot(*ends), max(spans)
    path = np.hypot(np.diff(x), np.diff(y)).sum()
    growth = area[-2:].mean() / area[:2].mean()
    turned = 0.0
    if shape is not None and shape != "circle":
        period = 2 * np.pi / (3 if shape == "triangle" else 4)
        angle = np.unwrap(track.angle[seen, SHAPES.index(shape)], period=period)
        turned = abs(angle[-2:].mean() - angle[:2].mean())

    grown = max(growth, 1 / growth)
    moves = bool(span > STILL or grown > _GROWN_LITTLE or turned > _TURNED_LITTLE)
    kinds: list[Motion] = []
    if way >= MOVED and way >= 0.7 * path and min(map(abs, ends)) <= 0.5 * max(map(abs, ends)):
        kinds.extend(name for name, step in TRANSLATIONS.items() if np.dot(step, ends) >= max(map(abs, ends)))
    if spans[1] >= MOVED and spans[0] <= 0.5 * spans[1] and way <= 0.4 * span and _falls_and_rises(y):
        kinds.append("bounce")
    if growth >= _GROWN and way < MOVED:
        kinds.append("grow")
    if turned >= _TURNED and span < MOVED:
        kinds.append("rotate")
    if not moves:
        kinds.append("stay")
    return (kinds[0] if len(kinds) == 1 else None), moves


def _falls_and_rises(y: NDArray[np.floating]) -> bool:
    """Whether the lowest point (the largest y) lies in the middle half of the time, far below both ends."""
    lowest = int(y.argmax())
    quarter = len(y) // 4
    return quarter <= lowest < len(y) - quarter and y.max() - max(y[:2].mean(), y[-2:].mean()) >= 0.6 * np.ptp(y)
