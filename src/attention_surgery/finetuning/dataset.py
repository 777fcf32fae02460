"""Folders of videos with captions, and a video as the clip that training wants."""

import csv
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError

logger = logging.getLogger("attention_surgery")
VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".gif"}
FILE_COLUMNS = ("file_name", "video", "path", "video_path")
CAPTION_COLUMNS = ("text", "caption", "prompt", "cap")


@dataclass(frozen=True)
class Entry:
    """One video file and its caption."""

    path: Path
    caption: str


def read_dataset(folder: str | Path, *, skip_bad: bool = False) -> list[Entry]:
    """List the videos of a folder with their captions, in the order of its index, or by name.

    Accepted, in this order: `metadata.csv`, `.jsonl` or `.parquet` (the datasets library's VideoFolder: `file_name` and
    a caption column), another single `.csv` with such columns, `videos2caption.json`, `videos.txt` with `prompt.txt`
    or `prompts.txt`, and videos with a `.txt` of the same name beside each.

    Args:
        skip_bad: leave out videos that are not there or have no caption, with a warning that names and counts them.

    Raises:
        DataError: no such folder or layout, an index that cannot be read, or (without `skip_bad`) videos that are not
            there or have no caption, all of them named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected one with videos and captions")
    found = [_checked(item) for item in _entries(folder)]
    if not found:
        raise DataError(
            f"{folder} holds no captioned videos; expected metadata.csv, .jsonl or .parquet, videos2caption.json, "
            "videos.txt with prompt.txt, or a .txt beside each video"
        )
    faults = [item for item in found if isinstance(item, str)]
    entries = [item for item in found if isinstance(item, Entry)]
    if faults and (not skip_bad or not entries):
        raise DataError(f"{folder}: {len(faults)} of {len(found)} videos cannot be used: {'; '.join(faults)}")
    if faults:
        logger.warning("skipped %d of %d videos that cannot be used: %s", len(faults), len(found), "; ".join(faults))
    return entries


def _checked(item: Entry | str) -> Entry | str:
    """The entry, or what is wrong with it."""
    if isinstance(item, str):
        return item
    if not item.path.is_file():
        return f"{item.path.name} does not exist"
    return item if item.caption.strip() else f"the caption of {item.path.name} is empty"


def _entries(folder: Path) -> Iterator[Entry | str]:
    """What the folder's index names: entries, and in the place of others what is wrong with them."""
    tables = [folder / f"metadata.{suffix}" for suffix in ("csv", "jsonl", "parquet")]
    tables = [table for table in tables if table.exists()] or sorted(folder.glob("*.csv"))[:1]
    if tables:
        yield from _rows(folder, tables[0])
    elif (folder / "videos2caption.json").exists():
        yield from _rows(folder, folder / "videos2caption.json")
    elif (folder / "videos.txt").exists():
        prompts = folder / ("prompt.txt" if (folder / "prompt.txt").exists() else "prompts.txt")
        videos, captions = _lines(folder / "videos.txt"), _lines(prompts)
        if len(videos) != len(captions):
            raise DataError(f"{folder}: videos.txt has {len(videos)} lines and {prompts.name} {len(captions)}")
        yield from (Entry(folder / video, caption) for video, caption in zip(videos, captions, strict=True))
    else:
        for video in sorted(path for path in folder.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES):
            text = video.with_suffix(".txt")
            if not text.exists():
                yield f"{video.name} has no caption; expected {text.name} beside it"
                continue
            try:
                yield Entry(video, text.read_text(encoding="utf-8").strip())
            except UnicodeDecodeError as error:
                yield f"{text.name} is no UTF-8 text ({error})"


def _rows(folder: Path, table: Path) -> Iterator[Entry | str]:
    for number, row in enumerate(_read_table(table), start=1):
        values = {str(name): value for name, value in row.items()} if isinstance(row, dict) else {}
        file = next((values[name] for name in FILE_COLUMNS if values.get(name) is not None), None)
        caption = next((values[name] for name in CAPTION_COLUMNS if values.get(name) is not None), None)
        if isinstance(caption, list) and caption:
            caption = caption[0]
        if isinstance(file, str) and isinstance(caption, str):
            yield Entry(folder / file, caption)
            continue
        what, names = ("video", FILE_COLUMNS) if not isinstance(file, str) else ("caption", CAPTION_COLUMNS)
        yield f"row {number} of {table.name} names no {what}: it has {sorted(values)}, expected text in one of {names}"


def _read_table(path: Path) -> list[Any]:
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        rows = json.loads(text) if path.suffix == ".json" else list(csv.DictReader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read as a table of videos and captions: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds a {type(rows).__name__}; expected a list of objects with path and cap")
    return rows


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


@dataclass(frozen=True)
class Clip:
    """Frames that training takes from a video, and what was left out or added.

    Attributes:
        frames: uint8 (f, h, w, 3).
        dropped_seconds: of the video after the last of them.
        skipped_frames: of the video before that, which fall between two that are taken, at a lower rate than its own.
        repeated_frames: taken again, at a higher rate than the video's.
        cropped: share of the picture that is cut off, after scaling.
    """

    frames: NDArray[np.uint8]
    dropped_seconds: float
    skipped_frames: int
    repeated_frames: int
    cropped: float


def load_clip(path: Path, *, num_frames: int, height: int, width: int, fps: int) -> Clip:
    """Decode the first `num_frames` frames of a video at `fps`, scaled to cover `height`×`width` and cropped centrally.

    A frame is the one shown at its time, so slower videos repeat frames and faster ones skip some.

    Raises:
        DataError: the video does not decode, or is shorter than `num_frames` at `fps`.
    """
    wanted = [index / fps for index in range(num_frames)]
    frames: list[NDArray[np.uint8]] = []
    sources: list[int] = []  # of each frame, which one of the video it is
    end = cropped = 0.0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or fps)
            shown: NDArray[np.uint8] | None = None
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                start = frame.time if frame.time is not None else number / rate
                while shown is not None and len(frames) < num_frames and wanted[len(frames)] < start - 1e-6:
                    frames.append(shown)
                    sources.append(number - 1)
                end = start + 1 / rate
                if len(frames) < num_frames:
                    image = frame.to_image()
                    shown, cropped = _fit(image, height, width), _cut_off(image, height, width)
            while shown is not None and len(frames) < num_frames and wanted[len(frames)] < end - 1e-6:
                frames.append(shown)
                sources.append(number)
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path} does not decode as a video: {error}") from error
    if len(frames) < num_frames:
        raise DataError(f"{path} gives {len(frames)} frames at {fps} per second; {num_frames} are wanted")
    used = len(set(sources))
    return Clip(
        frames=np.stack(frames),
        dropped_seconds=max(0.0, end - num_frames / fps),
        skipped_frames=sources[-1] + 1 - used,
        repeated_frames=num_frames - used,
        cropped=cropped,
    )


def _cut_off(image: Image.Image, height: int, width: int) -> float:
    scale = max(height / image.height, width / image.width)
    return 1 - height * width / (image.height * image.width * scale**2)


def _fit(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    scale = max(height / image.height, width / image.width)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if size != image.size:
        image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))
