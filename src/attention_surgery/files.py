"""Files that are whole or absent: a killed process never leaves half of one under its final name."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, RunError

if TYPE_CHECKING:
    import torch


@contextmanager
def write_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    On any error the temporary file is removed and what stood at `path` still stands.

    Raises:
        RunError: the system refuses, for example on a full disk.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _refused(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} cannot be written: {error}; what stood there still stands: make room, or name another place"
    )


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused (ValueError): JSON has none."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read one JSON document."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_tensors(path: str | Path, tensors: "dict[str, torch.Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, atomically."""
    import safetensors.torch  # with PyTorch seconds to import, which JSON and text do not need

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with write_atomic(path) as temporary:
        try:
            safetensors.torch.save_file(contiguous, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # its form of the system's errors
            raise OSError(str(error)) from error


def write_torch(path: str | Path, state: Any) -> None:
    """Write a `torch.save` file (optimizer and RNG states), atomically."""
    import torch

    with write_atomic(path) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # its form of the system's errors
            raise OSError(str(error)) from error


def read_torch(path: str | Path, *, device: "torch.device | str") -> Any:
    """Read what `write_torch` wrote. CheckpointError if the file is damaged."""
    import torch

    try:
        return torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # damage may look like anything to an unpickler
        raise CheckpointError(f"{path} is damaged: {error}; delete it, and its work is done again") from error


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line to a JSONL log, in one write, after cutting off what a kill left of an unfinished line.

    Raises:
        RunError: the system refuses, for example on a full disk.
    """
    path = Path(path)
    line = json.dumps(row).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            if size := file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read(size).rfind(b"\n") + 1)
            file.write(line)
    except OSError as error:
        raise _refused(path, error) from error


def read_jsonl(path: str | Path, *, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """Read a JSONL log; a last line cut off by a kill is dropped, since a resumed run writes it again."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    return [row for row in rows if keep(row)]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form, to tell two configurations apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
