"""Folders of tiny videos for the study's tests."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attention_surgery.generation import write_video
from attention_surgery.study.config import StudyConfig

NAMES = ("a red kite-0.mp4", "a slow tram-0.mp4", "two owls-0.mp4", "wet snow-0.mp4")


def write_clip(path: Path, shade: int, *, frames: int = 6, size: tuple[int, int] = (48, 80), fps: int = 16) -> None:
    time, row, column = np.ogrid[:frames, : size[0], : size[1]]
    clip = np.stack(np.broadcast_arrays(3 * column + 9 * time, 3 * row + shade, shade), axis=-1)
    write_video(path, (clip % 256).astype(np.uint8), fps=fps)


def make_folders(root: Path, names: Sequence[str] = NAMES) -> tuple[Path, Path]:
    """`secret-hybrid` and `secret-teacher`, with the same names and other pictures."""
    folders = root / "secret-hybrid", root / "secret-teacher"
    for shade, folder in zip((40, 200), folders, strict=True):
        folder.mkdir(parents=True)
        for index, name in enumerate(names):
            write_clip(folder / name, shade + index)
    return folders


def make_config(root: Path, **options: object) -> StudyConfig:
    return StudyConfig(
        **{
            "ours": root / "secret-hybrid",
            "baseline": root / "secret-teacher",
            "database": root / "v.sqlite",
            **options,
        }
    )
