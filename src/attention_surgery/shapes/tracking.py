"""From pixels to tracks: fit the background, find the objects in every frame, measure them, follow them over time."""

from dataclasses import dataclass

import numpy as np
import scipy.ndimage
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from .drawing import AREA, signed_distance
from .world import CHECKER_PERIOD, FRAMES, HEIGHT, SHAPES, STRIPE_PERIOD, WIDTH, Shape

Floats = NDArray[np.float32]
Masks = NDArray[np.bool_]

_WINDOW = 24
"""Half the side of the square, in pixels, in which an object is measured."""
_MOST = 4
"""Objects followed in one frame; no caption has more than two, so more than that is wrong already."""
_PLAUSIBLE_AREA = (50.0, 1000.0)
"""Pixels; the world's objects have 93 (a triangle about to grow) to 635 (a square that has grown)."""
_SMOOTHING, _SHARPEN, _SOFTNESS = 0.6, 2.0, 1.25
"""An object's coverage is smoothed by so many pixels, made steeper around one half, and compared with outlines that
fade over so many pixels: a blurred object is judged by its half-way contour, as the eye does it, not by its blur; and
the two-pixel steps of an mp4's colours do not count as corners."""
_OUT = 45.0
"""Distance in RGB from the background of a pixel that is (partly) an object's; the palette's nearest colour has 118."""
_LONGEST_STEP = 14.0
"""Pixels that an object may move from one frame to the next and still be the same; the world's fastest makes 4.4."""

_Y, _X = (axis.astype(np.float32) + 0.5 for axis in np.mgrid[0:HEIGHT, 0:WIDTH])
_OFFSETS = np.arange(-_WINDOW, _WINDOW)


def _texture_basis() -> dict[str, Floats]:
    """Smooth textures that a background is fitted with, each (terms, h, w)."""
    stripe, turn = 2 * np.pi * _Y / STRIPE_PERIOD, 2 * np.pi / CHECKER_PERIOD
    waves_x, waves_y = (np.sin(turn * _X), np.cos(turn * _X)), (np.sin(turn * _Y), np.cos(turn * _Y))
    return {
        "plain": np.ones((1, HEIGHT, WIDTH), np.float32),
        "gradient": (1 - 2 * _Y / HEIGHT)[None],
        "striped": np.stack([np.sin(stripe), np.cos(stripe)]),
        "checkered": np.stack([x * y for x in waves_x for y in waves_y]),
    }


_BASIS = _texture_basis()
_TERMS = np.concatenate(list(_BASIS.values())).reshape(-1, HEIGHT * WIDTH).T.astype(np.float64)


@dataclass(frozen=True, kw_only=True)
class Backdrop:
    """The background of a clip.

    Args:
        visible: (f, h, w), where no object hides it.
        mean: (3, h, w), over the frames where it is visible; zero where it never is.
        fit: (3, h, w), the combination of smooth textures nearest to the mean.
        strength: by kind, the RMS in grey levels of that texture's part of the fit; of "plain", its mean level.
        residual: RMS in grey levels of what the fit leaves over.
    """

    visible: Masks
    mean: Floats
    fit: Floats
    strength: dict[str, float]
    residual: float


@dataclass(frozen=True, kw_only=True)
class Track:
    """One object over time; NaN in the frames where it is not found.

    Args:
        x, y, area: (f,), centre in pixels, area in pixels.
        color: (f, 3), mean RGB of its inside.
        likeness: (f, 4), its overlap (intersection over union) with each of SHAPES at its own place, area and angle.
        angle: (f, 4), radians clockwise from upright, if it were that shape.
    """

    x: Floats
    y: Floats
    area: Floats
    color: Floats
    likeness: Floats
    angle: Floats

    @property
    def present(self) -> Masks:
        """(f,), in which frames the object is found."""
        return ~np.isnan(self.x)


def fit_backdrop(video: Floats) -> Backdrop | None:
    """Fit the background of a clip (3, f, h, w) in [0, 255]; None where hardly any of it could be one.

    Every background of the world is dark and nearly grey, every object bright or strongly coloured.
    """
    brightest, darkest = video.max(0), video.min(0)
    objects = (brightest - darkest > 45) | (darkest > 130)
    visible = scipy.ndimage.maximum_filter(objects.view(np.uint8), size=(1, 5, 5)) == 0
    weight = visible.sum(0).astype(np.float32)
    known = weight.reshape(-1) > 0
    if known.mean() < 0.3:
        return None
    mean = np.einsum("cfhw,fhw->chw", video, visible.astype(np.float32)) / np.maximum(weight, 1)
    terms, values = _TERMS[known], mean.reshape(3, -1)[:, known].T
    coefficients = np.linalg.solve(terms.T @ terms + 1e-6 * np.eye(terms.shape[1]), terms.T @ values)
    fit = (_TERMS @ coefficients).T.reshape(3, HEIGHT, WIDTH).astype(np.float32)
    strength, start = {}, 0
    for kind, textures in _BASIS.items():
        part = np.tensordot(coefficients[start : start + len(textures)].mean(1), textures, 1)
        strength[kind] = float(np.sqrt(np.mean(part**2)))
        start += len(textures)
    residual = float(np.sqrt(np.mean((terms @ coefficients - values) ** 2)))
    return Backdrop(visible=visible, mean=mean, fit=fit, strength=strength, residual=residual)


def track_objects(video: Floats, backdrop: Backdrop) -> list[Track]:
    """Follow the objects of a clip (3, f, h, w) in [0, 255]: as many as most of its frames show, left to right."""
    frame, columns = _measure_objects(video, backdrop)
    counts = np.bincount(frame, minlength=FRAMES)
    number = int(np.bincount(counts).argmax())
    if number == 0:
        return []
    start = int(np.argmax(counts == number))
    rows = np.full((FRAMES, number), -1)
    rows[start] = sorted(np.flatnonzero(frame == start), key=lambda row: columns["x"][row])
    for order in (range(start + 1, FRAMES), range(start - 1, -1, -1)):
        last = rows[start].copy()
        for now in order:
            found = np.flatnonzero(frame == now)
            step = np.hypot(*(columns[axis][last][:, None] - columns[axis][found] for axis in ("x", "y")))
            change = np.linalg.norm(columns["color"][last][:, None] - columns["color"][found], axis=-1)
            for which, match in zip(*linear_sum_assignment(step / _LONGEST_STEP + change / 100), strict=True):
                if step[which, match] <= _LONGEST_STEP:
                    rows[now, which] = last[which] = found[match]
    return [
        Track(**{name: np.where(_found(row, values), values[row], np.nan) for name, values in columns.items()})
        for row in rows.T
    ]


def _found(row: NDArray[np.int64], values: Floats) -> Masks:
    """Whether a row is there, shaped to choose among the rows of `values`."""
    return (row >= 0).reshape(-1, *(1,) * (values.ndim - 1))


def _find_objects(distance: Floats) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Label what stands out in each frame: labels (f, h, w), and those of object size (k,), each at (frame, y, x)."""
    within_frames = np.zeros((3, 3, 3), bool)
    within_frames[1] = True
    labels = np.zeros(distance.shape, np.int32)
    scipy.ndimage.label(distance > _OUT, within_frames, output=labels)
    size = np.bincount(labels.reshape(-1))
    smallest, largest = _PLAUSIBLE_AREA
    by_frame: dict[int, list[int]] = {}
    places = {}
    for label, box in enumerate(scipy.ndimage.find_objects(labels), start=1):
        if smallest <= size[label] <= 1.6 * largest:  # a region holds every pixel that the object touches
            by_frame.setdefault(box[0].start, []).append(label)
            places[label] = [box[0].start, *((side.start + side.stop) // 2 for side in box[1:])]
    kept = [label for here in by_frame.values() for label in sorted(here, key=lambda label: -size[label])[:_MOST]]
    return labels, np.array(kept, np.int64), np.array([places[label] for label in kept], np.int64).reshape(-1, 3)


def _measure_objects(video: Floats, backdrop: Backdrop) -> tuple[NDArray[np.int64], dict[str, Floats]]:
    """Find and measure every object in every frame: frame numbers (k,) and `Track`'s columns, each (k, ...)."""
    away = video - backdrop.fit[:, None]
    distance = np.sqrt(np.einsum("cfhw,cfhw->fhw", away, away))
    labels, kept, places = _find_objects(distance)
    if not len(kept):
        return kept, {name: np.zeros((0, *shape), np.float32) for name, shape in _COLUMNS.items()}

    # Windows around every object, (k, window, window); what lies outside the picture belongs to nothing.
    frame, rows, cols = places[:, :, None, None].swapaxes(0, 1)
    rows, cols = rows + _OFFSETS[:, None], cols + _OFFSETS
    inside = (rows >= 0) & (rows < HEIGHT) & (cols >= 0) & (cols < WIDTH)
    at = (frame, np.clip(rows, 0, HEIGHT - 1), np.clip(cols, 0, WIDTH - 1))
    own = (labels[at] == kept[:, None, None]) & inside

    # The colour of an object's inside, and from it how much of each pixel is the object's.
    far = np.where(own, distance[at], 0)
    core = (far > 0.8 * np.quantile(far, 0.995, axis=(1, 2), keepdims=True)).astype(np.float32)
    core /= core.sum((1, 2), keepdims=True)
    pixels, ground = video[:, *at], backdrop.fit[:, *at[1:]]
    color = np.einsum("ckhw,khw->kc", pixels, core)
    contrast = color.T[:, :, None, None] - ground
    full = np.maximum(np.einsum("ckhw,ckhw->khw", contrast, contrast), 1)
    alpha = np.einsum("ckhw,ckhw->khw", pixels - ground, contrast) / full
    near = scipy.ndimage.maximum_filter(own.view(np.uint8), size=(1, 5, 5)) > 0
    alpha = np.clip(alpha, 0, 1) * (near & inside)

    area = alpha.sum((1, 2))
    px, py = cols + np.float32(0.5), rows + np.float32(0.5)
    x, y = ((alpha * axis).sum((1, 2)) / area for axis in (px, py))
    dx, dy = (px - x[:, None, None]).astype(np.float32), (py - y[:, None, None]).astype(np.float32)
    angle = _angles(alpha, dx, dy)
    smooth = scipy.ndimage.gaussian_filter(alpha, _SMOOTHING, axes=(1, 2), truncate=2)
    outline = np.clip((smooth - 0.5) * _SHARPEN + 0.5, 0, 1)
    likeness = [_overlap(outline, shape, dx, dy, angle[:, index]) for index, shape in enumerate(SHAPES)]
    plausible = (area >= _PLAUSIBLE_AREA[0]) & (area <= _PLAUSIBLE_AREA[1])
    columns = {"x": x, "y": y, "area": area, "color": color, "likeness": np.stack(likeness, axis=1), "angle": angle}
    return places[plausible, 0], {name: values[plausible].astype(np.float32) for name, values in columns.items()}


_COLUMNS: dict[str, tuple[int, ...]] = {
    "x": (),
    "y": (),
    "area": (),
    "color": (3,),
    "likeness": (len(SHAPES),),
    "angle": (len(SHAPES),),
}


def _angles(alpha: Floats, dx: Floats, dy: Floats) -> Floats:
    """(k, 4): the angle of each object if it were each of SHAPES, from the moments sum of alpha (dx + i dy)^m.

    The third moment turns with a triangle's corners, the fourth with a square's and a cross's.
    """
    spot = dx + 1j * dy
    squared = spot * spot
    third = np.angle((alpha * squared * spot).sum((1, 2)))
    fourth = np.angle((alpha * squared * squared).sum((1, 2)))
    turned = {
        "circle": np.zeros_like(third),
        "square": np.remainder(fourth, 2 * np.pi) / 4 - np.pi / 4,
        "triangle": (third - np.pi / 2) / 3,
        "cross": fourth / 4,
    }
    return np.stack([turned[shape] for shape in SHAPES], axis=1)


def _overlap(outline: Floats, shape: Shape, dx: Floats, dy: Floats, angle: Floats) -> Floats:
    """(k,): intersection over union of each object and the shape of its area at its angle."""
    radius = np.sqrt(np.maximum(outline.sum((1, 2)), 1) / AREA[shape])[:, None, None]
    template = np.clip(0.5 - signed_distance(shape, dx, dy, radius, angle[:, None, None]) / _SOFTNESS, 0, 1)
    return np.minimum(outline, template).sum((1, 2)) / np.maximum(outline, template).sum((1, 2))
