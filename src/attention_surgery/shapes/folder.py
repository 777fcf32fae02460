"""Clips as a folder of mp4 files with their captions, in the layout of the datasets library's VideoFolder."""

from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..files import append_jsonl, read_jsonl
from ..generation import write_video
from .drawing import Clip
from .world import FPS


def write(folder: str | Path, clips: Sequence[Clip]) -> None:
    """Write clips to `folder`: 000000.mp4, 000001.mp4, ... and metadata.jsonl with their `file_name` and `text`.

    A clip enters metadata.jsonl once its file is whole, so a write that was cut off goes on where it stopped.

    Raises:
        DataError: the folder holds other clips, or more.
    """
    metadata = Path(folder) / "metadata.jsonl"
    done = read_jsonl(metadata) if metadata.exists() else []
    rows = [{"file_name": f"{index:06d}.mp4", "text": clip.caption} for index, clip in enumerate(clips)]
    if done != rows[: len(done)]:
        raise DataError(
            f"{metadata} lists {len(done)} clips that are not the first of the {len(rows)} to be written; "
            "choose an empty folder, or render with the seed and split that it was begun with"
        )
    for clip, row in list(zip(clips, rows, strict=True))[len(done) :]:
        write_video(Path(folder) / row["file_name"], clip.frames, fps=FPS)
        append_jsonl(metadata, row)
