"""Running the official tools, which pin old libraries, in a Python environment of their own."""

import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import EvaluationError
from ..files import digest, read_json, write_json
from ..progress import progress
from .results import read_results
from .suite import Suite

PROGRAM = """
import importlib, sys
import torch
package, evaluator, info, output, name, videos, dimension = sys.argv[1:]
judge = getattr(importlib.import_module(package), evaluator)(torch.device("cuda"), info, output)
judge.evaluate(videos_path=videos, name=name, dimension_list=[dimension])
"""
"""The documented Python entry. The packages' own command lines end with status 0 when the evaluation inside failed."""

FILTER_PROGRAM = """
import sys
from vbench.cli.vbench import main
sys.argv = ["vbench", "static_filter", "--videos_path", sys.argv[1], "--result_path", sys.argv[2]]
main()
"""

SETUP = {
    "vbench": """\
# VBench 0.1.5 in an environment of its own: Python 3.10, a GPU, CUDA 12.1
conda create -y -p {environment} python=3.10
{environment}/bin/pip install torch==2.5.1 torchvision==0.20.1 --index-url https://download.pytorch.org/whl/cu121
{environment}/bin/pip install 'setuptools<70' wheel vbench==0.1.5
{environment}/bin/pip install --no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'
# weights are fetched on first use into ~/.cache/vbench, or $VBENCH_CACHE_DIR
""",
    "vbench2": """\
# VBench-2.0 0.1.1 in an environment of its own: Python 3.10, a GPU, CUDA 11.8, gcc 11; vbench 0.1.5 is imported by it
conda create -y -p {environment} python=3.10 psutil ninja
{environment}/bin/pip install torch==2.5.1 torchvision==0.20.1 torchaudio==2.5.1 \\
    --index-url https://download.pytorch.org/whl/cu118
{environment}/bin/pip install 'git+https://github.com/Dao-AILab/flash-attention.git@v2.7.2.post1'
{environment}/bin/pip install vbench2==0.1.1
{environment}/bin/pip install 'git+https://github.com/openai/CLIP.git@dcba3cb2e2827b402d2701e7e1c7d9fed8a20ef1'
{environment}/bin/pip install 'git+https://github.com/LLaVA-VL/LLaVA-NeXT@79ef45a6d8b89b92d7a8525f077c3a3a9894a87d'
{environment}/bin/pip install 'git+https://github.com/AILab-CVC/YOLO-World.git@4826695a84ce370dad7fe4cb555a6c7162f3751d'
{environment}/bin/pip install mmcv==2.2.0 -f https://download.openmmlab.com/mmcv/dist/cu118/torch2.4/index.html
{environment}/bin/pip install retinaface_pytorch==0.0.8 --no-deps
# mmdet and mmyolo refuse mmcv above 2.1; the authors raise their limit
sed -i "s/^mmcv_maximum_version = .*/mmcv_maximum_version = '2.3.0'/" \\
    {environment}/lib/python3.10/site-packages/mmdet/__init__.py \\
    {environment}/lib/python3.10/site-packages/mmyolo/__init__.py
# weights: see VBench-2.0/pretrained/*/download.sh of Vchitect/VBench, into ~/.cache/vbench2
""",
}
"""From the packages' own documents, with their versions pinned."""


def setup_commands(suite: Suite, environment: str | Path) -> str:
    """The shell commands that make the official tool's environment in the folder `environment`."""
    return SETUP[suite.name].format(environment=environment)


def run_official(
    suite: Suite,
    python: str | Path,
    entries: Sequence[dict[str, Any]],
    videos: Mapping[str, Path],
    results: str | Path,
    *,
    gpus: Sequence[str] = (),
) -> None:
    """Judge every dimension that has no result yet, one process each.

    `results` then holds `{dimension}_eval_results.json` and, in `logs`, what the tool said. A finished dimension is
    kept when the call is repeated, as long as prompts and videos (their names and sizes) are the same.

    Args:
        python: interpreter of the official tool's environment.
        entries: the prompts, as `select_entries` gives them; they are handed to the tool as its list.
        videos: folder of the videos of every dimension to judge, in the order to judge them in.
        gpus: values of CUDA_VISIBLE_DEVICES; a dimension runs on each at a time. Empty: one at a time, where it is.

    Raises:
        EvaluationError: the tool failed (with its status and the end of its output) or wrote no valid result, or a
            kept result is of other videos.
    """
    results = Path(results).resolve()
    results.mkdir(parents=True, exist_ok=True)
    keys = {
        name: _identity(folder, [entry for entry in entries if name in entry["dimension"]])
        for name, folder in videos.items()
    }
    todo = [name for name in videos if not _is_done(results, name, keys[name])]
    info = results / "prompts.json"
    write_json(info, list(entries))
    free: queue.Queue[str | None] = queue.Queue()
    for gpu in gpus or (None,):
        free.put(gpu)
    failed = threading.Event()
    with progress(f"judge {results}", len(videos), done=len(videos) - len(todo)) as advance:

        def judge(name: str) -> None:
            if failed.is_set():
                return
            gpu = free.get()
            try:
                _judge(suite, Path(python), info, videos[name].resolve(), results, name, gpu)
            except EvaluationError:
                failed.set()
                raise
            finally:
                free.put(gpu)
            write_json(results / f"{name}.identity.json", keys[name])
            advance(name)

        with ThreadPoolExecutor(max(1, len(gpus))) as pool:
            running = [pool.submit(judge, name) for name in todo]
        for future in running:
            future.result()


def filter_static(python: str | Path, videos: str | Path, results: str | Path) -> Path:
    """Let VBench copy the first five static videos of each temporal-flickering prompt, renumbered, to a folder.

    It needs RAFT's weights, which judging `dynamic_degree` fetches. A finished filter is not run again.

    Returns:
        The folder of the copies.

    Raises:
        EvaluationError: the filter failed.
    """
    results = Path(results).resolve()
    final = results / "static"
    if not final.exists():
        partial = results / ".static"
        shutil.rmtree(partial, ignore_errors=True)
        command = [str(python), "-c", FILTER_PROGRAM, str(Path(videos).resolve()), str(partial)]
        _run(command, results / "logs" / "static_filter.log", None)
        copies = partial / "filtered_videos"
        if not copies.is_dir() or not any(copies.iterdir()):
            raise EvaluationError(f"VBench's static filter kept none of the videos in {videos}; make more per prompt")
        copies.rename(final)
        shutil.rmtree(partial)
    return final


def _judge(suite: Suite, python: Path, info: Path, videos: Path, results: Path, name: str, gpu: str | None) -> None:
    partial = results / f".{name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    arguments = [suite.package, suite.evaluator, str(info), str(partial), name, str(videos), name]
    log = results / "logs" / f"{name}.log"
    _run([str(python), "-c", PROGRAM, *arguments], log, gpu)
    file = partial / f"{name}_eval_results.json"
    if not file.exists():
        raise EvaluationError(
            f"{suite.title} ended without an error but wrote no {file.name}; see {log}:\n{_tail(log)}"
        )
    if name not in read_results(file, suite):
        raise EvaluationError(f"{suite.title} wrote {file.name} without {name!r}; see {log}")
    os.replace(file, results / file.name)
    shutil.rmtree(partial)


def _run(command: Sequence[str], log: Path, gpu: str | None) -> None:
    """Run a command with its output in `log`. EvaluationError with the end of it unless the status is 0."""
    environment: Mapping[str, str] = os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        try:
            status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
        except OSError as error:
            raise EvaluationError(f"{command[0]} cannot be run: {error}; give the environment's interpreter") from error
    if status:
        raise EvaluationError(f"the official tool failed with status {status}; the end of {log}:\n{_tail(log)}")


def _tail(log: Path, *, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _identity(folder: Path, entries: Sequence[dict[str, Any]]) -> dict[str, str]:
    """What a result belongs to: the prompts, and the videos' names and sizes."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    return {"prompts": digest(list(entries)), "videos": digest(sizes)}


def _is_done(results: Path, name: str, key: Mapping[str, str]) -> bool:
    file, identity = results / f"{name}_eval_results.json", results / f"{name}.identity.json"
    if not file.exists() or not identity.exists():
        return False
    try:
        kept = read_json(identity)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{identity} is damaged; delete it and {file.name}") from error
    if kept != key:
        raise EvaluationError(f"{file} was judged on other prompts or videos; delete it, or take another folder")
    return True
