"""Clips on disk: real mp4 files, captions beside them, and a write that goes on where it stopped."""

import json

import datasets
import numpy as np
import pytest

from attention_surgery import shapes
from attention_surgery.errors import DataError
from attention_surgery.generation import read_video


@pytest.fixture(scope="module")
def clips() -> list[shapes.Clip]:
    return shapes.render(5, seed=13)


def rows(folder) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_writes_files_that_decode_to_the_clips(clips, tmp_path):
    shapes.write(tmp_path / "new" / "world", clips)
    folder = tmp_path / "new" / "world"
    assert [row["text"] for row in rows(folder)] == [clip.caption for clip in clips]
    for row, clip in zip(rows(folder), clips, strict=True):
        decoded = read_video(folder / row["file_name"]).astype(float)
        assert decoded.shape == clip.frames.shape
        assert 10 * np.log10(255**2 / np.mean((decoded - clip.frames) ** 2)) > 28
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{index:06d}.mp4" for index in range(5)),
        "metadata.jsonl",
    ]


def test_is_a_video_folder_for_the_datasets_library(clips, tmp_path):
    shapes.write(tmp_path / "world", clips)
    table = datasets.load_dataset(
        "videofolder", data_dir=str(tmp_path / "world"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert table["text"][:] == [clip.caption for clip in clips]


def test_a_write_that_was_cut_off_goes_on(clips, tmp_path):
    shapes.write(tmp_path, clips[:2])
    with open(tmp_path / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "0000')  # what a kill leaves
    (tmp_path / "000000.mp4").write_bytes(b"kept")
    shapes.write(tmp_path, clips)
    assert [row["text"] for row in rows(tmp_path)] == [clip.caption for clip in clips]
    assert (tmp_path / "000000.mp4").read_bytes() == b"kept"
    assert len(read_video(tmp_path / "000004.mp4")) == shapes.FRAMES


def test_refuses_a_folder_of_other_clips(clips, tmp_path):
    shapes.write(tmp_path, clips[:3])
    with pytest.raises(DataError, match="lists 3 clips that are not the first of the 5"):
        shapes.write(tmp_path, shapes.render(5, seed=14))
    with pytest.raises(DataError, match="lists 3 clips that are not the first of the 2"):
        shapes.write(tmp_path, clips[:2])
    assert [row["text"] for row in rows(tmp_path)] == [clip.caption for clip in clips[:3]]
