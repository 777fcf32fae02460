"""The judge's controls: what it must score high, at chance, and near zero."""

from collections import defaultdict

import numpy as np
import pytest
import scipy.ndimage

from attention_surgery import shapes
from attention_surgery.errors import DataError
from attention_surgery.generation import read_video
from attention_surgery.shapes import world
from attention_surgery.shapes.judging import QUALITY_WEIGHTS, SEMANTIC

PAIR_SHARE = 0.3  # of the clips, as in world.draw_scene


@pytest.fixture(scope="module")
def clips() -> list[shapes.Clip]:
    return shapes.render(200, seed=7)


def mean_scores(frames, captions) -> dict[str, float]:
    columns = defaultdict(list)
    for clip, caption in zip(frames, captions, strict=True):
        for name, value in shapes.judge(clip, caption).items():
            assert 0 <= value <= 1
            columns[name].append(value)
    return {name: float(np.mean(values)) for name, values in columns.items()}


def altered(clips, change) -> dict[str, float]:
    """Mean scores of clips after `change`, which maps float32 frames to frames in [0, 255]."""
    frames = [np.clip(change(clip.frames.astype(np.float32)).round(), 0, 255).astype(np.uint8) for clip in clips]
    return mean_scores(frames, [clip.caption for clip in clips])


def moving(clips) -> list[shapes.Clip]:
    return [clip for clip in clips if shapes.parse(clip.caption).motion != "stay"]


@pytest.mark.parametrize("split", world.SPLITS)
def test_true_renders_score_full_marks(split):
    clips = shapes.render(200, seed=11, split=split)
    scores = mean_scores([clip.frames for clip in clips], [clip.caption for clip in clips])
    assert set(scores) == {*SEMANTIC, *QUALITY_WEIGHTS, "semantic", "quality", "total"}
    assert min(scores.values()) >= 0.99, scores


def test_shuffled_captions_score_at_chance(clips):
    captions = [clip.caption for clip in clips]
    scores = mean_scores([clip.frames for clip in clips], captions[1:] + captions[:1])
    one, two = 1 - PAIR_SHARE, PAIR_SHARE
    motions, shared = len(world.MOTIONS), len(world.PAIR_MOTIONS)
    colors = len(world.COLORS)
    chance = {
        "object_class": one / len(world.SHAPES),
        "color": one / colors + two * 2 / colors,  # of two objects either may agree
        "size": 1 / len(world.SIZES),
        "motion": (one**2 + 2 * one * two) / motions + two**2 / shared,
        "scene": 1 / len(world.BACKGROUNDS),
    }
    for name, level in chance.items():
        assert scores[name] == pytest.approx(level, abs=0.09), name
    assert scores["multiple_objects"] <= two * 2 / len(world.SHAPES) ** 2 + 0.09
    assert scores["spatial_relationship"] <= 0.05  # both objects must be there to stand in a relation
    single = np.mean(list(chance.values()))
    pair = np.mean([chance["color"], chance["motion"], chance["scene"], two * 2 / len(world.SHAPES) ** 2, 0])
    assert scores["semantic"] == pytest.approx(one * single + two * pair, abs=0.06)  # about 0.22


def test_one_wrong_fact_costs_its_own_dimension_only():
    clip = next(clip for clip in shapes.render(400, seed=1) if shapes.parse(clip.caption).size == "small")
    scene = shapes.parse(clip.caption)
    words = {"color": (world.COLORS, scene.things[0].color), "scene": (world.BACKGROUNDS, scene.background)}
    for dimension, (values, said) in words.items():
        wrong = clip.caption.replace(said, values[values.index(said) - 1])
        scores = shapes.judge(clip.frames, wrong)
        assert {name for name in SEMANTIC if scores.get(name, 1) == 0} == {dimension}
    caption = clip.caption.replace("small", "large").replace("little", "large")
    assert shapes.judge(clip.frames, caption)["size"] == 0


def test_a_vae_s_blur_and_noise_are_forgiven(clips):
    rng = np.random.default_rng(0)
    blurred = altered(clips[:100], lambda frames: scipy.ndimage.gaussian_filter(frames, (0, 0.7, 0.7, 0)))
    noisy = altered(clips[:100], lambda frames: frames + rng.normal(0, 2, frames.shape))
    for scores in (blurred, noisy):
        assert scores["semantic"] >= 0.97
        assert scores["total"] >= 0.97


def test_decoded_mp4s_score_like_renders(clips, tmp_path):
    shapes.write(tmp_path, clips[:60])
    frames = [read_video(tmp_path / f"{index:06d}.mp4") for index in range(60)]
    scores = mean_scores(frames, [clip.caption for clip in clips[:60]])
    assert scores["semantic"] >= 0.98
    assert scores["total"] >= 0.98


def test_white_noise_scores_zero(clips):
    rng = np.random.default_rng(0)
    scores = altered(clips[:30], lambda frames: rng.uniform(0, 255, frames.shape))
    assert max(scores.values()) <= 0.01


@pytest.mark.parametrize("color", [(0, 0, 0), (128, 128, 128), (255, 255, 255), world.SLATE])
def test_blanks_show_nothing(clips, color):
    scores = altered(clips[:100], lambda frames: np.zeros_like(frames) + np.float32(color))
    assert scores["subject_consistency"] == scores["motion_smoothness"] == scores["dynamic_degree"] == 0
    nothing = [name for name in SEMANTIC if name in scores and name != "scene"]
    assert max(scores[name] for name in nothing) == 0
    assert scores["semantic"] <= 0.06  # slate is a plain background, which a quarter of the captions ask for


def test_frozen_clips_do_not_move(clips):
    scores = altered(moving(clips)[:80], lambda frames: np.repeat(frames[:1], len(frames), axis=0))
    assert scores["motion"] == scores["dynamic_degree"] == 0
    assert min(scores["subject_consistency"], scores["temporal_flickering"], scores["color"]) >= 0.99


def test_moving_clips_do_not_stay():
    still = next(clip for clip in shapes.render(200, seed=2) if shapes.parse(clip.caption).motion == "stay")
    assert "dynamic_degree" not in shapes.judge(still.frames, still.caption)
    wandering = np.stack(
        [np.roll(frame, 2 * index, axis=1) for index, frame in enumerate(still.frames[:1].repeat(17, 0))]
    )
    assert shapes.judge(wandering, still.caption)["motion"] == 0


def test_reversed_clips_move_the_other_way(clips):
    wanted = ("left", "right", "up", "down", "grow")
    directed = [clip for clip in clips if shapes.parse(clip.caption).motion in wanted]
    assert altered(directed[:60], lambda frames: frames[::-1])["motion"] == 0


def test_flicker_is_seen(clips):
    rng = np.random.default_rng(0)
    scores = altered(clips[:60], lambda frames: frames + rng.normal(0, 20, (len(frames), 1, 1, 1)))
    assert scores["temporal_flickering"] <= 0.05
    assert scores["background_consistency"] <= 0.05
    speckled = altered(clips[:30], lambda frames: frames + rng.normal(0, 15, frames.shape))
    assert speckled["temporal_flickering"] <= 0.05


def test_frames_out_of_order_are_not_smooth(clips):
    rng = np.random.default_rng(0)
    travelling = [clip for clip in clips if shapes.parse(clip.caption).motion in (*world.TRANSLATIONS, "bounce")]
    scores = altered(travelling[:60], lambda frames: frames[rng.permutation(len(frames))])
    assert scores["motion_smoothness"] <= 0.2
    assert scores["motion"] <= 0.05


def test_a_jerky_path_costs_smoothness_and_is_still_its_kind_of_motion(clips):
    rng = np.random.default_rng(0)

    def jerk(frames):
        steps = rng.normal(0, 0.8, (len(frames), 2))
        shifted = [
            scipy.ndimage.shift(f, (*step, 0), order=1, mode="nearest") for f, step in zip(frames, steps, strict=True)
        ]
        return np.stack(shifted)

    scores = altered(clips[:60], jerk)
    assert scores["motion"] >= 0.95
    assert scores["motion_smoothness"] <= 0.8


def test_a_subject_that_vanishes_or_changes_is_not_consistent(clips):
    def vanish(frames):
        return np.concatenate([frames[:9], np.zeros_like(frames[9:]) + np.float32(world.SLATE)])

    def recolor(frames):
        return np.concatenate([frames[:9], frames[9:, ..., [1, 2, 0]]])

    colorful = [clip for clip in clips if "white" not in clip.caption][:40]
    assert altered(clips[:40], vanish)["subject_consistency"] <= 0.6
    assert altered(colorful, recolor)["subject_consistency"] <= 0.6


def test_blobs_are_no_shape():
    y, x = np.mgrid[: world.HEIGHT, : world.WIDTH] + 0.5 - world.HEIGHT / 2
    angle, distance = np.arctan2(y, x), np.hypot(x, y)
    rng = np.random.default_rng(0)
    margins = [rng_blob(rng, angle) - distance for _ in range(20)]  # > 0 inside, in pixels
    margins += [4 - np.abs(distance - 11), np.minimum(12 - distance, -y), 10 - np.hypot(x / 1.6, y * 1.6)]
    for margin in margins:
        alpha = np.clip(margin + 0.5, 0, 1)[..., None]
        frame = np.float32(world.SLATE) * (1 - alpha) + np.float32(world.PALETTE["red"]) * alpha
        reading = shapes.read(frame.round().astype(np.uint8)[None].repeat(shapes.FRAMES, 0))
        assert [(sight.shape, sight.color) for sight in reading.sights] == [(None, "red")]


def rng_blob(rng: np.random.Generator, angle: np.ndarray) -> np.ndarray:
    """Outline of a random blob: its radius by angle, in pixels."""
    waves = [rng.normal(0, 2.0) * np.cos(order * angle + rng.uniform(0, 7)) for order in range(2, 6)]
    return 11 + sum(waves) + 2.5 * np.cos(2 * angle + rng.uniform(0, 7))


def test_total_is_weighted_as_vbench_s(clips):
    for clip in clips[:20]:
        scores = shapes.judge(clip.frames[::-1], clip.caption)
        semantic = [scores[name] for name in SEMANTIC if name in scores]
        weights = {name: weight for name, weight in QUALITY_WEIGHTS.items() if name in scores}
        quality = sum(weight * scores[name] for name, weight in weights.items()) / sum(weights.values())
        assert scores["semantic"] == pytest.approx(np.mean(semantic))
        assert scores["quality"] == pytest.approx(quality)
        assert scores["total"] == pytest.approx((4 * quality + np.mean(semantic)) / 5)


def test_dimensions_that_do_not_apply_are_left_out():
    scene_words = "on a plain background"
    clip = shapes.render(1, seed=0)[0].frames
    single = shapes.judge(clip, f"a small red circle moves left {scene_words}")
    pair = shapes.judge(clip, f"a red circle is above a blue square and both stay still {scene_words}")
    assert {"multiple_objects", "spatial_relationship"}.isdisjoint(single)
    assert {"object_class", "size", "dynamic_degree"}.isdisjoint(pair)
    assert "size" not in shapes.judge(clip, f"a red circle moves left {scene_words}")


def test_floating_point_clips_score_alike(clips):
    for clip in clips[:10]:
        floats = shapes.judge(clip.frames.astype(np.float32) / 255, clip.caption)
        assert floats == pytest.approx(shapes.judge(clip.frames, clip.caption), abs=1e-3)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((17, 64, 64), np.uint8), r"\(17, 64, 64, 3\) \(f, h, w, 3\); got \(17, 64, 64\)"),
        (np.zeros((16, 64, 64, 3), np.uint8), r"got \(16, 64, 64, 3\)"),
        (np.zeros((17, 3, 64, 64), np.uint8), r"got \(17, 3, 64, 64\)"),
        (np.zeros((17, 64, 64, 3), np.int64), r"uint8 in \[0, 255\] or floating point in \[0, 1\]; got int64"),
        (np.full((17, 64, 64, 3), 255.0), r"lies in \[0, 1\]; got \[255, 255\]"),
        (np.full((17, 64, 64, 3), -0.5), r"lies in \[0, 1\]; got \[-0.5, -0.5\]"),
        (np.full((17, 64, 64, 3), np.nan), r"lies in \[0, 1\]; got \[nan, nan\]"),
        ([[0]], "a clip is a numpy array .* got list"),
    ],
)
def test_judge_refuses_other_clips(frames, message):
    with pytest.raises(DataError, match=message):
        shapes.judge(frames, "a small red circle moves left on a plain background")


def test_judge_names_the_word_it_does_not_know(clips):
    with pytest.raises(DataError, match="says 'dog'"):
        shapes.judge(clips[0].frames, "a small red dog moves left on a plain background")
