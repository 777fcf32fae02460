"""Folders of videos with captions, and a video as the clip that training wants."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError

VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"}
FILE_COLUMNS = ("file_name", "video", "path", "video_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")


@dataclass(frozen=True)
class Entry:
    """One video file and its caption."""

    path: Path
    caption: str


def read_dataset(folder: str | Path) -> list[Entry]:
    """List the videos of a folder with their captions, in the order of its index, or by name.

    Accepted, in this order: `metadata.csv`, `.jsonl` or `.parquet` (the datasets library's VideoFolder: `file_name` and
    a caption column), another single `.csv` with such columns, `videos2caption.json`, `videos.txt` with `prompt.txt`
    or `prompts.txt`, and videos with a `.txt` of the same name beside each.

    Raises:
        DataError: no such folder or layout, a missing file or an empty caption, each named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with videos and captions")
    entries = list(_entries(folder))
    if not entries:
        raise DataError(
            f"{folder} holds no captioned videos; expected metadata.csv, .jsonl or .parquet, videos2caption.json, "
            "videos.txt with prompt.txt, or a .txt beside each video"
        )
    missing = [entry.path.name for entry in entries if not entry.path.is_file()]
    if missing:
        raise DataError(f"{folder}: {len(missing)} of {len(entries)} videos do not exist, such as {missing[0]}")
    silent = [entry.path.name for entry in entries if not entry.caption.strip()]
    if silent:
        raise DataError(f"{folder}: {len(silent)} of {len(entries)} captions are empty, such as that of {silent[0]}")
    return entries


def _entries(folder: Path) -> Iterator[Entry]:
    tables = [folder / f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    tables = [table for table in tables if table.exists()] or sorted(folder.glob("*.csv"))[:1]
    if tables:
        for row in _read_table(tables[0]):
            yield Entry(
                folder / str(_column(row, FILE_COLUMNS, tables[0])), str(_column(row, CAPTION_COLUMNS, tables[0]))
            )
    elif (folder / "videos2caption.json").exists():
        for row in json.loads((folder / "videos2caption.json").read_text(encoding="utf-8")):
            caption = _column(row, CAPTION_COLUMNS, folder / "videos2caption.json")
            yield Entry(folder / row["path"], caption[0] if isinstance(caption, list) else caption)
    elif (folder / "videos.txt").exists():
        prompts = folder / ("prompt.txt" if (folder / "prompt.txt").exists() else "prompts.txt")
        videos, captions = _lines(folder / "videos.txt"), _lines(prompts)
        if len(videos) != len(captions):
            raise DataError(f"{folder}: videos.txt has {len(videos)} lines and {prompts.name} {len(captions)}")
        yield from (Entry(folder / video, caption) for video, caption in zip(videos, captions, strict=True))
    else:
        for video in sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES):
            text = video.with_suffix(".txt")
            if not text.exists():
                raise DataError(f"{video} has no caption; expected {text.name} beside it")
            yield Entry(video, text.read_text(encoding="utf-8").strip())


def _read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pyarrow.parquet.read_table(path).to_pylist()
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return list(csv.DictReader(text.splitlines()))


def _column(row: dict[str, Any], names: tuple[str, ...], where: Path) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise DataError(f"{where} has a row with the columns {sorted(map(str, row))}; expected one of {names}")


def _lines(path: Path) -> list[str]:
    if not path.exists():
        raise DataError(f"{path} does not exist")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


@dataclass(frozen=True)
class Clip:
    """Frames that training takes from a video, and what was left out of it."""

    frames: NDArray[np.uint8]
    dropped_seconds: float


def load_clip(path: Path, *, num_frames: int, height: int, width: int, fps: int) -> Clip:
    """Decode the first `num_frames` frames of a video at `fps`, scaled to cover `height`×`width` and cropped centrally.

    A frame is the one shown at its time, so slower videos repeat frames and faster ones skip some.

    Returns:
        uint8 frames (f, h, w, 3), and how many seconds of the video follow them unused.

    Raises:
        DataError: the video does not decode, or is shorter than `num_frames` at `fps`.
    """
    wanted = [index / fps for index in range(num_frames)]
    frames: list[NDArray[np.uint8]] = []
    end = 0.0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or fps)
            shown: NDArray[np.uint8] | None = None
            for number, frame in enumerate(container.decode(stream)):
                start = frame.time if frame.time is not None else number / rate
                while shown is not None and len(frames) < num_frames and wanted[len(frames)] < start - 1e-6:
                    frames.append(shown)
                end = start + 1 / rate
                if len(frames) < num_frames:
                    shown = _fit(frame.to_image(), height, width)
            while shown is not None and len(frames) < num_frames and wanted[len(frames)] < end - 1e-6:
                frames.append(shown)
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path} does not decode as a video: {error}") from error
    if len(frames) < num_frames:
        raise DataError(f"{path} gives {len(frames)} frames at {fps} per second; {num_frames} are wanted")
    return Clip(np.stack(frames), max(0.0, end - num_frames / fps))


def _fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
