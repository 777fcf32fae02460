"""The table of results: one row per variant of a case, as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from ..errors import DataError
from ..files import write_text

Status = Literal["measured", "not measured", "does not run", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one case. What does not apply or was not measured is None, in the file empty.

    Args:
        case: number of the case, whose variants took turns.
        level: op, block, transformer or rates.
        shape, title: of the model and video.
        tokens, heads, head_dim, blocks: of the model; one sample.
        dtype: of inputs and weights.
        passes: "forward" or "forward + backward".
        variant: name of the way of computing attention.
        rate: R, 1 for dense; for the level rates how many blocks have which.
        normalizer, pattern, backend: of hybrid attention.
        kernel: of dense attention, or of the softmax part.
        compiled: whether it runs under `torch.compile`.
        graphed: whether its kernels are launched as one CUDA graph.
        status: whether it was measured; note says why not.
        rounds: how often it had its turn.
        p20_ms, p50_ms, p80_ms: quantiles over the rounds, in ms per call.
        baseline: the variant that was the fastest dense one of its case.
        speedup, speedup_low, speedup_high: how many times faster than that: median of the rounds' ratios and its 95 %
            interval.
        flops: of one forward, for the level that is timed; of models the blocks alone.
        limit: speed-up if every FLOP took as long as dense attention's.
        limit_share: speedup / limit.
        peak_mib: GPU memory that a call needs above what is there before it.
        budget, unit, error, predicted_ms: of the level rates: the budget, what it counts, the summed error of the
            chosen rates, and the forward time that was expected of them.
        device, versions, command, date: of the run.
    """

    case: int
    level: str
    shape: str
    title: str
    tokens: int
    heads: int
    head_dim: int
    blocks: int
    dtype: str
    passes: str
    variant: str
    rate: str
    normalizer: str
    pattern: str
    backend: str
    kernel: str
    compiled: bool
    graphed: bool
    status: Status
    note: str = ""
    rounds: int | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    baseline: str = ""
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    flops: int | None = None
    limit: float | None = None
    limit_share: float | None = None
    peak_mib: float | None = None
    budget: float | None = None
    unit: str = ""
    error: float | None = None
    predicted_ms: float | None = None
    device: str
    torch: str
    triton: str
    diffusers: str
    cudnn: str
    attention_surgery: str
    command: str
    date: str


COLUMNS = tuple(field.name for field in fields(Row))
_TYPES = get_type_hints(Row)
_ADDED = {"graphed": "False"}
"""Columns that files of earlier versions lack, and what those would have said."""


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Write `rows` as CSV, atomically."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: _to_text(value) for name, value in asdict(row).items()} for row in rows)
    write_text(path, text.getvalue())


def read_rows(*paths: str | Path) -> list[Row]:
    """Read the rows of CSV files. DataError for a file that is missing, or has other columns or a bad value."""
    return [row for path in paths for row in _read(Path(path))]


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path} does not exist; expected a CSV file that `attention-surgery benchmark` has written")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        names = tuple(reader.fieldnames or ())
        added = {name: text for name, text in _ADDED.items() if name not in names}
        expected = tuple(name for name in COLUMNS if name not in added)
        if names != expected:
            differing = sorted(set(names) ^ set(expected))
            raise DataError(f"{path} does not have the columns of a benchmark; differing: {differing or 'their order'}")
        rows = []
        for number, line in enumerate(reader, start=2):
            try:
                rows.append(Row(**{name: _from_text(name, (line | added)[name]) for name in COLUMNS}))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    return rows


def _to_text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _from_text(name: str, text: str) -> Any:
    kinds: Sequence[Any] = get_args(_TYPES[name]) or (_TYPES[name],)
    if name == "status":
        if text not in kinds:
            raise ValueError(f"status is {text!r}; expected one of {kinds}")
        return text
    if text == "" and type(None) in kinds:
        return None
    if kinds[0] is bool:
        if text not in ("True", "False"):
            raise ValueError(f"{name} is {text!r}; expected True or False")
        return text == "True"
    return kinds[0](text)
