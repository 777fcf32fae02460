"""What a study refuses before anything is written: folders, videos, labels, settings."""

import json
import shutil
from pathlib import Path

import av
import pytest
from study_videos import NAMES, make_config, make_folders, write_clip

from attention_surgery.errors import StudyError
from attention_surgery.study import StudyConfig, serve
from attention_surgery.study.server import check_study
from attention_surgery.study.videos import read_labels, read_pairs


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    make_folders(root)
    return root


@pytest.fixture
def root(folders, tmp_path):
    """A copy that a test may spoil."""
    for name in ("secret-hybrid", "secret-teacher"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


def refusal(root: Path, **options: object) -> str:
    """What `serve` says; it must have written nothing."""
    before = sorted(root.rglob("*"))
    with pytest.raises(StudyError) as caught:
        serve(make_config(root, **options))
    assert sorted(root.rglob("*")) == before
    return str(caught.value)


def test_pairs_are_matched_by_name(folders):
    pairs = read_pairs(make_config(folders))
    assert [pair.name for pair in pairs] == sorted(NAMES)
    assert [pair.prompt for pair in pairs] == [name.removesuffix(".mp4") for name in sorted(NAMES)]
    assert all(pair.ours_digest != pair.baseline_digest for pair in pairs)
    assert check_study(make_config(folders)) == (pairs, None)


def test_a_folder_that_lacks_videos_is_named_with_them(root):
    (root / "secret-teacher" / NAMES[1]).unlink()
    (root / "secret-hybrid" / NAMES[2]).rename(root / "secret-hybrid" / "new.mp4")
    message = refusal(root)
    assert f"secret-teacher lacks '{NAMES[1]}', 'new.mp4'" in message
    assert f"secret-hybrid lacks '{NAMES[2]}'" in message


def test_missing_empty_and_equal_folders(root):
    assert "nowhere is not a folder" in refusal(root, ours=root / "nowhere")
    (root / "empty").mkdir()
    assert "holds no videos" in refusal(root, ours=root / "empty")
    assert "needs two" in refusal(root, baseline=root / "secret-teacher" / ".." / "secret-hybrid", baseline_name="x")
    shutil.copytree(root / "secret-hybrid", root / "copy")
    assert "byte for byte" in refusal(root, baseline=root / "copy")


@pytest.mark.parametrize("spoil", ["text", "cut", "middle"])
def test_an_unreadable_video_is_named(root, spoil):
    path = root / "secret-teacher" / NAMES[3]
    whole = path.read_bytes()
    half, most = len(whole) // 2, len(whole) * 4 // 5
    path.write_bytes(
        {"text": b"no video", "cut": whole[:half], "middle": whole[:800] + bytes(most - 800) + whole[most:]}[spoil]
    )
    message = refusal(root)
    assert str(path) in message
    assert "not a readable video" in message or "damaged" in message


def test_a_video_that_browsers_do_not_play_is_named(root):
    path = root / "secret-hybrid" / NAMES[0]
    with av.open(str(path)) as source:
        frames = [frame.to_ndarray(format="rgb24") for frame in source.decode(video=0)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=16)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    message = refusal(root)
    assert str(path) in message and "mpeg4" in message and "libx264" in message
    path.rename(path.with_suffix(".avi"))
    (root / "secret-teacher" / NAMES[0]).rename((root / "secret-teacher" / NAMES[0]).with_suffix(".avi"))
    assert "convert it to .mp4" in refusal(root)


@pytest.mark.parametrize("other", [{"frames": 13}, {"size": (48, 96)}, {"fps": 15}])
def test_a_pair_that_can_be_told_apart_by_its_format_is_named(root, other):
    write_clip(root / "secret-teacher" / NAMES[1], 9, **other)
    message = refusal(root)
    assert NAMES[1] in message and "80x48, 6 frames at 16 per second" in message


def test_links_that_leave_their_folder_are_named(root):
    shutil.move(root / "secret-hybrid" / NAMES[0], root / "elsewhere.mp4")
    (root / "secret-hybrid" / NAMES[0]).symlink_to(root / "elsewhere.mp4")
    message = refusal(root)
    assert NAMES[0] in message and "no file of that folder" in message


def test_seeds_pick_videos_and_group_them_by_prompt(root):
    for folder in ("secret-hybrid", "secret-teacher"):
        for shade, name in enumerate(NAMES):
            write_clip(root / folder / name.replace("-0", "-1"), 100 + shade + len(folder))
    pairs = read_pairs(make_config(root, seeds=(1, 0)))
    assert len(pairs) == 8 and {pair.prompt for pair in pairs} == {name.removesuffix("-0.mp4") for name in NAMES}
    assert {pair.name for pair in read_pairs(make_config(root, seeds=(1,)))} == {n.replace("-0", "-1") for n in NAMES}
    assert "'a red kite-2'" in refusal(root, seeds=(0, 2))
    for folder in ("secret-hybrid", "secret-teacher"):
        write_clip(root / folder / "seedless.mp4", 1)
    assert "'seedless.mp4' does not name a seed" in refusal(root, seeds=(0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0, 3, 0, 3)}, r"repeats: \[0, 3\]"),
        ({"seeds": ()}, "seeds is empty"),
        ({"seeds": (-1,)}, "none below 0"),
        ({"pairs_per_rater": 0}, "at least 1"),
        ({"margin": 0.0}, "between 0 and 1"),
        ({"margin": 10.0}, "between 0 and 1"),
        ({"port": 70000}, "0 to 65535"),
        ({"title": " "}, "title is empty"),
        ({"ours_name": "same", "baseline_name": "same"}, "different names"),
        ({"ours_name": "Hybrid", "title": "hybrid or not"}, "title names the method 'Hybrid'"),
        ({"baseline_name": "Wan2.1", "question": "Is it better than WAN2.1?"}, "question names the method 'Wan2.1'"),
    ],
)
def test_settings_out_of_range(tmp_path, options, message):
    with pytest.raises(StudyError, match=message):
        make_config(tmp_path, **options)


def test_more_pairs_per_rater_than_pairs(root):
    assert "there are 4 pairs" in refusal(root, pairs_per_rater=5)


def test_a_port_in_use_is_refused_before_the_file_is_made(root):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "choose another port" in refusal(root, port=taken.getsockname()[1])


PROMPTS = {name: name.removesuffix("-0.mp4") for name in NAMES}


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_every_form_of_labels(tmp_path):
    plain = "name,dimension\n" + "".join(f"{stem},scene\n{name},color\n" for name, stem in PROMPTS.items())
    labels = read_labels(write(tmp_path / "a.csv", plain), PROMPTS)
    assert {label.dimensions for label in labels.values()} == {("color",)}  # the full file name comes first
    rows = "name,dimension,prompt\n" + "".join(
        f'{p},scene,"Say, {p}"\n{p},color,"Say, {p}"\n' for p in PROMPTS.values()
    )
    label = read_labels(write(tmp_path / "b.csv", rows), PROMPTS)[NAMES[0]]
    assert label.dimensions == ("color", "scene") and label.caption == "Say, a red kite"
    by_name = {name.removesuffix(".mp4"): ["scene", "color"] for name in NAMES} | {"unused": "x"}
    assert read_labels(write(tmp_path / "c.json", by_name), PROMPTS)[NAMES[1]].dimensions == ("color", "scene")
    vbench = [{"prompt_en": prompt, "dimension": ["scene"], "auxiliary_info": {}} for prompt in PROMPTS.values()]
    label = read_labels(write(tmp_path / "d.json", vbench), PROMPTS)[NAMES[2]]
    assert label.caption == "two owls" and label.dimensions == ("scene",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", "x", "expected a .csv or .json"),
        ("l.json", "{", "cannot be read"),
        ("l.json", [], "holds no labels"),
        ("l.json", [3], "entry 1"),
        ("l.json", [{"name": "x"}], "entry 1"),
        ("l.json", {"x": [["nested"]]}, "entry 1"),
        ("l.csv", "video,dimension\nx,y\n", "entry 1"),
        ("l.csv", "name,dimension\na red kite,scene\n", "no dimension for 'a slow tram-0.mp4', 'two owls-0.mp4'"),
        ("l.csv", "name,prompt\na red kite,one\na red kite,two\n", "two prompts for 'a red kite'"),
    ],
)
def test_labels_that_cannot_be_used(root, name, content, message):
    path = write(root / name, content)
    assert message in refusal(root, labels=path, seeds=(0,))


def test_missing_labels_file(root):
    assert "cannot be read" in refusal(root, labels=root / "none.csv")


def test_config_defaults_stay_local(tmp_path):
    assert StudyConfig(ours=tmp_path / "a", baseline=tmp_path / "b").host == "127.0.0.1"
