"""The videos of an evaluation: which prompt, which seed, which file; made once, resumed, shared out, checked."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError
from ..files import write_atomic
from ..generation import write_video
from ..progress import progress
from .prompts import Prompt
from .suite import Suite

Sampler = Callable[[Sequence[str], Sequence[int]], Sequence[NDArray[np.uint8]]]
"""From prompts and seeds, of equal number, to one video each: uint8 (f, h, w, 3)."""


@dataclass(frozen=True, kw_only=True)
class Video:
    """One video to make.

    Args:
        prompt: what the model is given.
        seed: of its noise.
        files: where it goes, relative to the folder: under each dimension's name where the tools want that.
    """

    prompt: str
    seed: int
    files: tuple[str, ...]


def check_seeds(seeds: Sequence[int], *, stride: int, needed: int) -> None:
    """Raise EvaluationError for too few seeds, repeated ones, or ones that two prompts would share by accident."""
    if repeated := sorted({seed for seed in seeds if seeds.count(seed) > 1}):
        raise EvaluationError(f"seed {repeated[0]} is there more than once in {tuple(seeds)}; each video needs its own")
    if len(seeds) < needed:
        raise EvaluationError(f"{len(seeds)} seeds do not do for {needed} videos per prompt; give {needed}")
    if any(seed < 0 for seed in seeds) or stride < 0:
        raise EvaluationError(f"seeds {tuple(seeds)} with stride {stride}: expected none below 0")
    if stride and max(seeds) >= stride:
        raise EvaluationError(
            f"seed {max(seeds)} reaches into the next prompt's, {stride} further on; "
            "use smaller seeds, a larger stride, or stride 0 for the same seeds at every prompt"
        )


def plan_videos(
    suite: Suite,
    prompts: Iterable[Prompt],
    *,
    seeds: Sequence[int] | None = None,
    stride: int = 100_000,
    samples: Mapping[str, int] | None = None,
) -> list[Video]:
    """What has to be made, and under which names the official tools look for it.

    Video number j of the prompt at place i has the seed `stride`·i + `seeds`[j], as the VBench team sampled Wan 2.1.
    A prompt that several dimensions share is made once.

    Args:
        seeds: by default 0, 1, 2, …
        stride: distance between the seeds of two prompts; 0 gives every prompt the same ones.
        samples: videos per prompt of single dimensions, where it is not the suite's own number.

    Raises:
        EvaluationError: `check_seeds`'s, or two prompts that would get the same file.
    """
    prompts = list(prompts)
    counts = {name: (samples or {}).get(name, suite.samples_of(name)) for name in suite.dimensions}
    needed = max(counts[name] for prompt in prompts for name in prompt.dimensions)
    chosen = list(seeds) if seeds is not None else list(range(needed))
    check_seeds(chosen, stride=stride, needed=needed)
    files: dict[tuple[str, int], dict[str, None]] = {}
    owner: dict[str, tuple[str, str]] = {}
    for prompt in prompts:
        for name in prompt.dimensions:
            for j in range(counts[name]):
                file = suite.video_name(prompt.text, j)
                file = f"{name}/{file}" if suite.folder_per_dimension else file
                if owner.setdefault(file, (prompt.text, prompt.sampled)) != (prompt.text, prompt.sampled):
                    raise EvaluationError(f"two prompts would be written to {file!r}; remove one from the list")
                files.setdefault((prompt.sampled, stride * prompt.index + chosen[j]), {})[file] = None
    return [Video(prompt=text, seed=seed, files=tuple(names)) for (text, seed), names in files.items()]


def generate_videos(
    sample: Callable[[], Sampler],
    plan: Sequence[Video],
    folder: str | Path,
    *,
    fps: int,
    batch_size: int = 1,
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Make this process's share of `plan` in `folder`, leaving whole files as they are.

    Files appear under their name only when they are whole, so any number of processes may work on one folder, each on
    its own share, and any of them may be stopped and started again. The noise of a video depends on its own seed only,
    not on the batch or the share.

    Args:
        sample: makes the sampler; called only if a video is missing, so that nothing is loaded in vain.
        batch_size: videos made at once.
        rank, world_size: this process's number, from 0, and how many there are.

    Returns:
        How many videos were made now.

    Raises:
        EvaluationError: a file that is there does not decode, or a rank outside the world.
    """
    if not 0 <= rank < world_size:
        raise EvaluationError(f"rank {rank} of {world_size} processes does not exist; expected 0 to {world_size - 1}")
    folder = Path(folder)
    share = plan[rank::world_size]
    missing = []
    for video in share:
        present = [file for file in video.files if (folder / file).exists()]
        for file in present:
            count_frames(folder / file)
        if not present:
            missing.append(video)
        elif len(present) < len(video.files):
            _copy(folder, video, present[0])
    if not missing:
        return 0
    sampler = sample()
    with progress(f"generate {folder}", len(share), done=len(share) - len(missing)) as advance:
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            clips = sampler([video.prompt for video in part], [video.seed for video in part])
            for video, clip in zip(part, clips, strict=True):
                write_video(folder / video.files[0], clip, fps=fps)
                _copy(folder, video, video.files[0])
                advance("")
    return len(missing)


def missing_videos(plan: Iterable[Video], folder: str | Path) -> list[str]:
    """The planned files that `folder` lacks."""
    return [file for video in plan for file in video.files if not (Path(folder) / file).exists()]


def check_videos(plan: Iterable[Video], folder: str | Path, *, num_frames: int | None = None) -> None:
    """Require that `folder` holds exactly the planned videos, whole, of `num_frames` frames each if that is given.

    The official tools judge what they find: one video less, or a stray file, changes a score with at most a warning.

    Raises:
        EvaluationError: naming a missing, a surplus or an unreadable file, or one of another length.
    """
    folder = Path(folder)
    plan = list(plan)
    if missing := missing_videos(plan, folder):
        raise EvaluationError(
            f"{folder} lacks {len(missing)} of {sum(len(v.files) for v in plan)} videos, the first of them "
            f"{missing[0]!r}; generate them"
        )
    expected = {file for video in plan for file in video.files}
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    if surplus := sorted(found - expected):
        raise EvaluationError(
            f"{folder} holds {len(surplus)} files that are no videos of this evaluation, the first of them "
            f"{surplus[0]!r}; the official tools read whatever is there: move them away"
        )
    for file in sorted(expected):
        frames = count_frames(folder / file)
        if num_frames is not None and frames != num_frames:
            raise EvaluationError(f"{folder / file} has {frames} frames; expected {num_frames}")


def count_frames(path: str | Path) -> int:
    """Frames of a video, without decoding them. EvaluationError, naming the file, if it is no whole video."""
    try:
        with av.open(str(path)) as container:
            frames = sum(packet.pts is not None for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError) as error:
        raise EvaluationError(f"{path} is no readable video ({error}); delete it and generate it again") from error
    if not frames:
        raise EvaluationError(f"{path} holds no frames; delete it and generate it again")
    return frames


def _copy(folder: Path, video: Video, source: str) -> None:
    """Put the video under its other names too."""
    for file in video.files:
        if not (folder / file).exists():
            with write_atomic(folder / file) as temporary:
                shutil.copyfile(folder / source, temporary)
