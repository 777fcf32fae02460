"""Files are whole or absent, also when the system refuses to write them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import no_room

from attention_surgery import files
from attention_surgery.errors import CheckpointError, RunError
from attention_surgery.generation import write_video

ROOM = 2048


def write_noise(path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)
    write_video(path, frames, fps=8)


WRITERS = {
    "text": lambda path: files.write_text(path, "x" * 2 * ROOM),
    "json": lambda path: files.write_json(path, ["x"] * ROOM),
    "tensors": lambda path: files.write_tensors(path, {"x": torch.randn(ROOM)}),
    "torch": lambda path: files.write_torch(path, {"x": torch.randn(ROOM)}),
    "video": write_noise,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path, kind):
    path = tmp_path / "file.mp4"
    path.write_bytes(b"before")
    with no_room(ROOM), pytest.raises(RunError, match=rf"{path} cannot be written: .*still stands"):
        WRITERS[kind](path)
    assert [found.name for found in tmp_path.iterdir()] == ["file.mp4"] and path.read_bytes() == b"before"
    WRITERS[kind](path)
    assert path.stat().st_size > ROOM


def test_a_log_on_a_full_disk_keeps_its_whole_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    files.append_jsonl(log, {"step": 1})
    with no_room(ROOM), pytest.raises(RunError, match="cannot be written"):
        files.append_jsonl(log, {"step": 2, "text": "x" * 2 * ROOM})
    files.append_jsonl(log, {"step": 2})
    assert files.read_jsonl(log) == [{"step": 1}, {"step": 2}]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "below.txt", "x")


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_states_are_named(tmp_path, damage):
    path = tmp_path / "state.pt"
    files.write_torch(path, {"x": torch.randn(1000)})
    assert files.read_torch(path, device="cpu")["x"].shape == (1000,)
    path.write_bytes({"truncated": path.read_bytes()[:2000], "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(CheckpointError, match=rf"{path} is damaged"):
        files.read_torch(path, device="cpu")
