"""Files that are whole or absent: a killed process never leaves half of one under its final name."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@contextmanager
def write_atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed over `path`.

    On any error (a full disk among them) the temporary file is removed and what stood at `path` still stands.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
        safetensors.torch.save_file(contiguous, temporary, metadata=metadata)


def write_torch(path: str | Path, state: Any) -> None:
    """Write a `torch.save` file (optimizer and RNG states), atomically."""
    import torch

    with write_atomic(path) as temporary:
        torch.save(state, temporary)


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line to a JSONL log, in one write, after cutting off what a kill left of an unfinished line."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row).encode() + b"\n"
    with open(path, "a+b") as file:
        if size := file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read(size).rfind(b"\n") + 1)
        file.write(line)


def read_jsonl(path: str | Path, *, keep: Callable[[dict[str, Any]], bool] = lambda row: True) -> list[dict[str, Any]]:
    """Read a JSONL log; a last line cut off by a kill is dropped, since a resumed run writes it again."""
    lines = Path(path).read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line]
    return [row for row in rows if keep(row)]


def digest(value: Any) -> str:
    """SHA-256 of a JSON value's canonical form, to tell two configurations apart."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
