"""Writing a checkpoint's directory as one: whole or not at all."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, RunError
from ..files import read_json

OWN_FILES = re.compile(r"config\.json|README\.md|modeling_hybrid_wan\.py|.*\.safetensors|.*\.index\..*json")


@contextmanager
def replaced(directory: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside `directory`; on success it is flushed to disk and takes its place.

    On any error it is removed, and what stood there still stands. A kill between the two renames leaves the earlier
    checkpoint whole, under the name `.<directory>.old`.

    Raises:
        CheckpointError: `directory` exists and is neither empty nor a hybrid checkpoint with nothing else in it; or it
            cannot be written, for example on a full disk.
    """
    directory = Path(directory)
    _check_replaceable(directory)
    staging = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        staging.chmod(0o755)
        yield staging
        for path in staging.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        if directory.exists():
            old = directory.with_name(f".{directory.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.rename(directory, old)
            os.rename(staging, directory)
            shutil.rmtree(old)
        else:
            os.rename(staging, directory)
    except (OSError, SafetensorError, RunError) as error:
        raise CheckpointError(f"{directory} cannot be written: {error}; what stood there still stands") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; a checkpoint is a directory")
    names = sorted(path.name for path in directory.iterdir())
    if not names:
        return
    if not _says_hybrid(directory / "config.json"):
        raise CheckpointError(f"{directory} is not empty and holds no hybrid checkpoint; give another directory")
    if foreign := [name for name in names if not OWN_FILES.fullmatch(name)]:
        raise CheckpointError(
            f"{directory} holds {foreign[0]} beside a hybrid checkpoint, which would be deleted; give another directory"
        )


def _says_hybrid(config: Path) -> bool:
    try:
        return "hybrid" in read_json(config)
    except (OSError, ValueError):
        return False
