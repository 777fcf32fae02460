"""The small world: deterministic clips, captions that are read back as they were meant, held-out combinations."""

from collections import Counter

import numpy as np
import pytest

from attention_surgery import shapes
from attention_surgery.errors import DataError
from attention_surgery.shapes import captions, world


def scenes(n: int, split: world.Split, seed: int = 0) -> list[shapes.Scene]:
    rng = np.random.default_rng(seed)
    return [world.draw_scene(rng, split) for _ in range(n)]


def test_clips_have_the_size_that_wan_takes():
    clip = shapes.render(1, seed=0)[0]
    assert clip.frames.shape == (shapes.FRAMES, shapes.HEIGHT, shapes.WIDTH, 3) == (17, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert shapes.FRAMES % 4 == 1
    assert shapes.render(0, seed=0) == []


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (shapes.render(6, seed=seed) for seed in (3, 3, 4))
    for clip, same, different in zip(first, again, other, strict=True):
        assert clip.caption == same.caption
        assert clip.frames.tobytes() == same.frames.tobytes()
        assert clip.frames.tobytes() != different.frames.tobytes()
    heldout = shapes.render(6, seed=3, split="heldout")
    assert all(a.frames.tobytes() != b.frames.tobytes() for a, b in zip(first, heldout, strict=True))


def test_a_longer_render_begins_with_the_shorter():
    shorter, longer = shapes.render(4, seed=9), shapes.render(7, seed=9)
    for few, many in zip(shorter, longer, strict=False):
        assert few.caption == many.caption
        np.testing.assert_array_equal(few.frames, many.frames)


def test_objects_stay_inside_the_picture():
    for clip in shapes.render(200, seed=1) + shapes.render(100, seed=1, split="heldout"):
        border = np.concatenate(
            [clip.frames[:, [0, -1]].reshape(-1, 3), clip.frames[:, :, [0, -1]].reshape(-1, 3)]
        ).astype(int)
        assert (border.max(1) - border.min(1)).max() < 45, clip.caption
        assert border.max() < 140, clip.caption


def test_every_caption_is_read_back_as_its_scene():
    rng = np.random.default_rng(2)
    said = Counter()
    for split in world.SPLITS:
        for scene in scenes(1500, split, seed=5):
            caption = captions.say(scene, rng)
            assert shapes.parse(caption) == scene, caption
            said.update(caption.split())
    assert set(said) == set(shapes.VOCABULARY)
    assert len(shapes.VOCABULARY) == len(set(shapes.VOCABULARY))


def test_a_caption_may_be_written_as_a_sentence_and_leave_the_size_out():
    scene = shapes.parse("A red circle moves left, on a plain background.")
    assert scene == shapes.Scene(things=(shapes.Thing(shape="circle", color="red"),), motion="left", background="plain")


def test_training_never_shows_a_heldout_combination_and_heldout_nothing_else():
    for clip in shapes.render(300, seed=6):
        scene = shapes.parse(clip.caption)
        assert not any(world.is_heldout(thing, scene.motion) for thing in scene.things), clip.caption
    for clip in shapes.render(300, seed=6, split="heldout"):
        scene = shapes.parse(clip.caption)
        assert all(world.is_heldout(thing, scene.motion) for thing in scene.things), clip.caption
    for motion in world.MOTIONS:
        train, heldout = set(world.THINGS["train", motion]), set(world.THINGS["heldout", motion])
        assert not train & heldout
        assert len(train | heldout) == 24 - 6 * (motion == "rotate")
        assert len({thing.color for thing in heldout}) >= 2  # so that two objects can be told apart


def test_training_covers_every_value_and_every_pair_of_values():
    drawn = scenes(6000, "train")
    things = [(thing, scene) for scene in drawn for thing in scene.things]
    for values, wanted in (
        (Counter(thing.shape for thing, _ in things), world.SHAPES),
        (Counter(thing.color for thing, _ in things), world.COLORS),
        (Counter(scene.motion for scene in drawn), world.MOTIONS),
        (Counter(scene.background for scene in drawn), world.BACKGROUNDS),
        (Counter(scene.relation for scene in drawn if scene.relation), world.RELATIONS),
        (Counter(scene.size for scene in drawn if scene.size), world.SIZES),
    ):
        assert set(values) == set(wanted)
        assert min(values.values()) >= 0.4 * sum(values.values()) / len(wanted)
    pairs = Counter((thing.shape, thing.color) for thing, _ in things)
    assert len(pairs) == 24
    moves = Counter((thing.shape, scene.motion) for thing, scene in things)
    assert set(moves) == {(s, m) for s in world.SHAPES for m in world.MOTIONS} - {("circle", "rotate")}
    assert len(Counter((thing.color, scene.motion) for thing, scene in things)) == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1, "seed": 0}, "n >= 0 and seed >= 0; got n=-1"),
        ({"n": 1, "seed": -2}, "seed=-2"),
        ({"n": 1, "seed": 0, "split": "test"}, "split 'test' does not exist; expected one of"),
    ],
)
def test_render_refuses(arguments, message):
    with pytest.raises(DataError, match=message):
        shapes.render(**arguments)


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a small red dog moves left on a plain background", "says 'dog'"),
        ("a small orange circle moves left on a plain background", "says 'orange'"),
        ("circle red left", "no sentence"),
        ("a small red blue circle moves left on a plain background", "no sentence"),
        ("a small red circle moves left", "no sentence"),
        ("", "no sentence"),
        ("a red circle rotates on a plain background", "a circle cannot be seen to rotate"),
        ("a small red square grows on a plain background", "leave the size out"),
        ("a red circle is above a red square and both move left on a plain background", "both are red"),
        ("there is a red cross above a blue square both rotating on a plain background", "can share the motions"),
        (7, "a caption is a string; got int"),
    ],
)
def test_parse_refuses(caption, message):
    with pytest.raises(DataError, match=message):
        shapes.parse(caption)


def test_a_scene_has_a_relation_exactly_if_it_has_two_objects():
    thing = shapes.Thing(shape="cross", color="red")
    with pytest.raises(DataError, match="one object, or two and a relation; got 1 and relation 'above'"):
        shapes.Scene(things=(thing,), motion="stay", background="plain", relation="above")
    with pytest.raises(DataError, match="got 2 and relation None"):
        shapes.Scene(things=(thing, thing), motion="stay", background="plain")
