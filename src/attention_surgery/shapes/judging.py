"""Scoring a clip against its caption, per dimension, from pixels alone.

Dimensions carry VBench's names where they mean the same. Each lies in [0, 1], 1 is best; those that a caption does
not settle (the relation of a single object, the size of two, the dynamic degree of one that stays) are left out of the
result and of the means.
"""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from .captions import parse
from .reading import Reading, Sight, read, relation
from .world import Scene, Thing

SEMANTIC = ("object_class", "multiple_objects", "color", "size", "motion", "spatial_relationship", "scene")
QUALITY_WEIGHTS = {
    "subject_consistency": 1.0,
    "background_consistency": 1.0,
    "temporal_flickering": 1.0,
    "motion_smoothness": 1.0,
    "dynamic_degree": 0.5,  # as in VBench
}
"""The dimensions of quality, with their weights in its mean."""

_FLICKER = (2.0, 12.0)  # grey levels from frame to frame: full marks, none
_DRIFT = (2.0, 12.0)  # grey levels away from the clip's mean background
_JERK = (1.2, 5.0)  # pixels per frame squared; bouncing takes 1.1
_RECOLOR = (8.0, 60.0)  # RGB distance from the object's usual colour
_RESHAPE = (0.06, 0.3)  # change of its overlap with the four shapes


def judge(frames: NDArray[np.uint8] | NDArray[np.floating], caption: str) -> dict[str, float]:
    """Score a clip against its caption.

    Args:
        frames: (FRAMES, HEIGHT, WIDTH, 3), uint8, or floating point in [0, 1].
        caption: a sentence of the grammar.

    Returns:
        A score in [0, 1] per dimension that applies, and
        "semantic", the mean of `SEMANTIC`'s;
        "quality", the mean of `QUALITY_WEIGHTS`', weighted by them;
        "total", (4 quality + semantic) / 5, as in VBench.

    Raises:
        DataError: a caption outside the grammar (the word is named), or a clip of another shape, dtype or range.
    """
    scene = parse(caption)
    reading = read(frames)
    semantic, quality = _semantic(reading, scene), _quality(reading, scene)
    scores = {**semantic, **quality}
    scores["semantic"] = float(np.mean(list(semantic.values())))
    scores["quality"] = float(np.average(list(quality.values()), weights=[QUALITY_WEIGHTS[name] for name in quality]))
    scores["total"] = (4 * scores["quality"] + scores["semantic"]) / 5
    return scores


def _semantic(reading: Reading, scene: Scene) -> dict[str, float]:
    pairs = _pair_up(reading.sights, scene.things)
    complete = len(reading.sights) == len(scene.things)
    shapes = complete and all(sight.shape == thing.shape for sight, thing in pairs)
    colors = [sight.color == thing.color for sight, thing in pairs]
    scores = {
        "color": sum(colors) / len(scene.things),
        "motion": float(reading.motion == scene.motion),
        "scene": float(reading.background == scene.background),
    }
    if scene.relation is None:
        scores["object_class"] = float(shapes)
    else:
        scores["multiple_objects"] = float(shapes)
        told_apart = complete and all(colors)
        scores["spatial_relationship"] = float(told_apart and relation(pairs[0][0], pairs[1][0]) == scene.relation)
    if scene.size is not None:
        scores["size"] = float(any(sight.size == scene.size for sight, _ in pairs))
    return {name: scores[name] for name in SEMANTIC if name in scores}


def _pair_up(sights: tuple[Sight, ...], things: tuple[Thing, ...]) -> list[tuple[Sight, Thing]]:
    """Pair what is seen with what is said, so that colours, then shapes, agree as often as they can."""
    if len(sights) >= len(things):
        choices = [list(zip(order, things, strict=True)) for order in permutations(sights, len(things))]
    else:
        choices = [list(zip(sights, order, strict=True)) for order in permutations(things, len(sights))]
    return max(choices, key=lambda pairs: sum(2 * (s.color == t.color) + (s.shape == t.shape) for s, t in pairs))


def _quality(reading: Reading, scene: Scene) -> dict[str, float]:
    scores = {
        "subject_consistency": _subject_consistency(reading),
        "background_consistency": _background_consistency(reading),
        "temporal_flickering": _temporal_flickering(reading),
        "motion_smoothness": _motion_smoothness(reading),
    }
    if scene.motion != "stay":
        scores["dynamic_degree"] = float(bool(reading.sights) and all(sight.moves for sight in reading.sights))
    return scores


def _marks(value: NDArray[np.floating] | float, limits: tuple[float, float]) -> NDArray[np.floating]:
    """1 up to the first limit, falling in a line to 0 at the second; 0 for NaN."""
    full, none = limits
    return np.nan_to_num(np.clip((none - np.asarray(value, np.float64)) / (none - full), 0, 1), nan=0.0)


def _subject_consistency(reading: Reading) -> float:
    """How much the objects keep their colour and outline, over frames; a frame without the object counts 0."""
    kept = [
        _marks(np.linalg.norm(track.color - np.nanmedian(track.color, axis=0), axis=1), _RECOLOR)
        * _marks(np.abs(track.likeness - np.nanmedian(track.likeness, axis=0)).max(1), _RESHAPE)
        for track in (sight.track for sight in reading.sights)
    ]
    return float(np.mean(kept)) if kept else 0.0


def _background_consistency(reading: Reading) -> float:
    """How little 8x8 patches of the background leave their mean over the clip."""
    if reading.backdrop is None:
        return 0.0
    visible = reading.backdrop.visible.astype(np.float32)
    away = (reading.video - reading.backdrop.mean[:, None]) * visible
    frames, height, width = visible.shape
    shape = (frames, height // 8, 8, width // 8, 8)
    seen = visible.reshape(shape).sum((2, 4))
    patches = away.reshape(3, *shape).sum((3, 5)) / np.maximum(seen, 1)
    return float(_marks(np.sqrt((patches**2).mean(0)[seen > 0].mean()), _DRIFT))


def _temporal_flickering(reading: Reading) -> float:
    """How little the background's pixels change from frame to frame."""
    if reading.backdrop is None:
        return 0.0
    both = reading.backdrop.visible[1:] & reading.backdrop.visible[:-1]
    change = np.abs(np.diff(reading.video, axis=1)).mean(0)
    return float(_marks(change[both].mean(), _FLICKER)) if both.any() else 0.0


def _motion_smoothness(reading: Reading) -> float:
    """How little the objects' centres and radii jerk; a frame without the object counts 0."""
    smooth = [
        _marks(np.sqrt(sum(np.diff(values, 2) ** 2 for values in (t.x, t.y, np.sqrt(t.area / np.pi)))), _JERK)
        for t in (sight.track for sight in reading.sights)
    ]
    return float(np.mean(smooth)) if smooth else 0.0
