"""Two folders of videos as the pairs of a study: matched, playable in a browser, and labelled."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av

from ..errors import StudyError
from .config import StudyConfig

VIDEO_SUFFIXES = frozenset({".mp4", ".webm", ".mov", ".mkv", ".avi", ".gif"})
MEDIA_TYPES = {".mp4": "video/mp4", ".webm": "video/webm"}
PLAYABLE_CODECS = frozenset({"h264", "vp8", "vp9", "av1"})
PLAYABLE_PIXELS = frozenset({"yuv420p", "yuvj420p"})


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One question of a study: the two videos of this file name.

    Args:
        name: the file name, equal in both folders.
        prompt: what the name was generated from; the votes of a prompt are not independent of one another.
        caption: the prompt's text as raters read it, or None.
        dimensions: those the prompt belongs to.
        ours_digest, baseline_digest: SHA-256 of the files.
    """

    name: str
    prompt: str
    caption: str | None
    dimensions: tuple[str, ...]
    ours_digest: str
    baseline_digest: str


def read_pairs(config: StudyConfig) -> list[Pair]:
    """Match the two folders and digest their files; none is decoded.

    Raises:
        StudyError: a missing folder, the same folder twice, names that do not match, a link that leads out of its
            folder, a seed that a prompt lacks, labels that leave a video out, or folders of equal content.
    """
    if config.ours.resolve() == config.baseline.resolve():
        raise StudyError(f"both folders are {config.ours}; a comparison needs two")
    names = _list_videos(config.ours)
    others = _list_videos(config.baseline)
    problems = [
        f"{folder} lacks {_quote(missing)}"
        for folder, missing in ((config.baseline, names - others), (config.ours, others - names))
        if missing
    ]
    if problems:
        raise StudyError(f"the folders do not match: {'; '.join(problems)}. Every video needs its namesake")
    prompts = _prompts(sorted(names), config.seeds)
    labels = read_labels(config.labels, prompts) if config.labels else {}
    pairs = [
        Pair(
            name=name,
            prompt=prompt,
            caption=labels[name].caption if labels else None,
            dimensions=labels[name].dimensions if labels else (),
            ours_digest=_digest(config.ours / name),
            baseline_digest=_digest(config.baseline / name),
        )
        for name, prompt in prompts.items()
    ]
    if all(pair.ours_digest == pair.baseline_digest for pair in pairs):
        raise StudyError(f"{config.ours} and {config.baseline} hold the same videos, byte for byte; one is a copy")
    return pairs


def check_playable(config: StudyConfig, pair: Pair) -> None:
    """Decode both videos of a pair to their end and compare them.

    Raises:
        StudyError: naming the file, when it does not decode, when browsers would not play it, or when the two differ
            in size, frame rate or number of frames, which would tell them apart.
    """
    ours, baseline = (_inspect(folder / pair.name) for folder in (config.ours, config.baseline))
    if ours != baseline:
        raise StudyError(
            f"{pair.name} is {ours} in {config.ours} but {baseline} in {config.baseline}; "
            "the two must have the same size, frame rate and length, or raters can tell which is which"
        )


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a labels file says of one video."""

    caption: str | None
    dimensions: tuple[str, ...]


def read_labels(path: Path, prompts: dict[str, str]) -> dict[str, Label]:
    """Read the dimensions and prompts of videos.

    A CSV has the columns `name` and `dimension` or `prompt` or both, and one row per name and dimension. A JSON file is
    an object `{name: dimension}` or `{name: [dimension, ...]}`, or a list of objects with the CSV's columns, among them
    VBench's own list, whose `prompt_en` is name and prompt at once. A name is the file's name, the same without its
    suffix, or the prompt. Names of other videos are passed over.

    Args:
        path: the file.
        prompts: prompt of each file name.

    Raises:
        StudyError: another layout, two prompts for one name, or a video without a label that others have.
    """
    captions: dict[str, str] = {}
    dimensions: dict[str, list[str]] = {}
    for row in _label_rows(path):
        key = row["name"]
        if caption := row.get("prompt"):
            if captions.setdefault(key, caption) != caption:
                raise StudyError(f"{path} has two prompts for {key!r}: {captions[key]!r} and {caption!r}")
        for dimension in row.get("dimension", []):
            dimensions.setdefault(key, []).append(dimension)

    def of(table: dict[str, Any], name: str) -> Any:
        return next((table[key] for key in (name, Path(name).stem, prompts[name]) if key in table), None)

    for table, word in ((captions, "prompt"), (dimensions, "dimension")):
        missing = [name for name in prompts if of(table, name) is None]
        if table and missing:
            raise StudyError(f"{path} has no {word} for {_quote(missing)}; label every video or none")
    return {
        name: Label(caption=of(captions, name), dimensions=tuple(sorted(set(of(dimensions, name) or ()))))
        for name in prompts
    }


def _label_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a labels file, as {"name": str, "prompt": str, "dimension": list of str}."""
    if path.suffix.lower() not in (".csv", ".json"):
        raise StudyError(f"labels are {path}; expected a .csv or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
        document = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(text.splitlines()))
    except (OSError, ValueError, csv.Error) as error:
        raise StudyError(f"the labels {path} cannot be read: {error}") from error
    if isinstance(document, dict):
        document = [{"name": name, "dimension": dimension} for name, dimension in document.items()]
    if not isinstance(document, list) or not document:
        raise StudyError(f"{path} holds no labels; expected name and dimension or prompt of each video")
    rows = []
    for number, given in enumerate(document, start=1):
        if not isinstance(given, dict):
            raise StudyError(f"entry {number} of {path} is {given!r}; expected an object with a name")
        row = {key: value for key, value in given.items() if value not in (None, "")}
        if "name" not in row and "prompt_en" in row:
            row |= {"name": row["prompt_en"], "prompt": row["prompt_en"]}
        if isinstance(row.get("dimension"), str):
            row["dimension"] = [row["dimension"]]
        texts = [row.get("name"), row.get("prompt", ""), *row.get("dimension", [])]
        if not all(isinstance(value, str) for value in texts) or not ("prompt" in row or "dimension" in row):
            raise StudyError(f"entry {number} of {path} is {given}; expected text under name and dimension or prompt")
        rows.append(row)
    return rows


def _list_videos(folder: Path) -> set[str]:
    """File names of a folder's videos, each of which is really inside it."""
    if not folder.is_dir():
        raise StudyError(f"{folder} is not a folder")
    files = [file for file in folder.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES and file.name[0] != "."]
    if not files:
        raise StudyError(f"{folder} holds no videos; expected files such as name.mp4")
    root = folder.resolve()
    if astray := [file.name for file in files if file.resolve().parent != root or not file.is_file()]:
        raise StudyError(f"{_quote(astray)} in {folder} is no file of that folder; copy links' targets into it")
    return {file.name for file in files}


def _prompts(names: Sequence[str], seeds: tuple[int, ...] | None) -> dict[str, str]:
    """The prompt of each name to show."""
    if seeds is None:
        return {name: Path(name).stem for name in names}
    found: dict[tuple[str, int], str] = {}
    for name in names:
        match = re.fullmatch(r"(.+)-(\d+)", Path(name).stem)
        if match is None:
            raise StudyError(f"{name!r} does not name a seed; with seeds, expected {{prompt}}-{{seed}}.mp4")
        key = match[1], int(match[2])
        if key in found:
            raise StudyError(f"{found[key]!r} and {name!r} are the same prompt and seed; keep one")
        found[key] = name
    every = sorted({prompt for prompt, _ in found})
    if missing := [f"{prompt}-{seed}" for prompt in every for seed in seeds if (prompt, seed) not in found]:
        raise StudyError(f"the folders lack {_quote(missing)}; every prompt needs the seeds {list(seeds)}")
    return {found[prompt, seed]: prompt for prompt in every for seed in sorted(seeds)}


def _inspect(path: Path) -> str:
    """Size, frame rate and length of a video, decoded to its end."""
    if path.suffix.lower() not in MEDIA_TYPES:
        raise StudyError(f"{path} cannot be played by browsers; convert it to .mp4 (H.264, yuv420p) or .webm")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise StudyError(f"{path} holds no video")
            stream = container.streams.video[0]
            codec, pixels = stream.codec.canonical_name, stream.codec_context.pix_fmt
            frames, promised = sum(1 for _ in container.decode(stream)), stream.frames
            size, rate = f"{stream.width}x{stream.height}", stream.average_rate
    except av.FFmpegError as error:
        raise StudyError(f"{path} is not a readable video: {error}") from error
    if not frames or (promised and frames != promised):
        raise StudyError(f"{path} is damaged: {frames} frames decode of {promised or 'at least one'}; make it again")
    if codec not in PLAYABLE_CODECS or pixels not in PLAYABLE_PIXELS:
        raise StudyError(
            f"{path} is {codec} in {pixels}, which browsers do not all play; convert it to H.264 in yuv420p "
            "(ffmpeg -i in.mp4 -c:v libx264 -pix_fmt yuv420p -crf 12 out.mp4)"
        )
    return f"{size}, {frames} frames at {float(rate) if rate else 0:g} per second"


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _quote(names: Iterable[str], limit: int = 5) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
