"""Where the tables stand in README.md and docs/performance.md, and writing them there.

A table stands between two HTML comments. The first names the CSV files that it is from, so that anyone can write it
again and a test can tell whether it is true.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import DataError
from ..files import write_text
from .floors import counts_table, floors_table, limits_table
from .rows import Row, read_rows
from .tables import newest, results_table, speed_table

PAGES = ("README.md", "docs/performance.md")
MARKED = re.compile(r"<!-- benchmark (?P<name>\w+)(?P<sources>[^>]*) -->\n.*?<!-- end -->", re.DOTALL)
MEASURED: dict[str, Callable[[Sequence[Row]], list[str]]] = {"speed": speed_table, "results": results_table}
COUNTED: dict[str, Callable[[], list[str]]] = {
    "counts": counts_table,
    "floors": floors_table,
    "limits": limits_table,
}


def publish_results(sources: Sequence[Path], root: Path) -> list[Path]:
    """Draw the figures of the CSV files `sources` beside them, write the tables under `root`; returns what it wrote.

    DataError as `write_tables`.
    """
    from .plots import draw_figures  # matplotlib is not needed for anything else here

    return [*write_tables(sources, root), *(figure for source in sources for figure in draw_figures(source))]


def write_tables(sources: Sequence[Path], root: Path) -> list[Path]:
    """Write every marked table of `PAGES` under `root` from the CSV files `sources`; returns the pages.

    Raises:
        DataError: a CSV file that cannot be read, or a page that is missing or has no marks. Nothing is written then.
    """
    pages = {}
    for name in PAGES:
        path = root / name
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not MARKED.search(text):
            raise DataError(f"{path} has no marks <!-- benchmark NAME --> … <!-- end -->; run this in the repository")
        pages[path] = fill_page(text, root, [source.as_posix() for source in sources])
    for path, text in pages.items():
        write_text(path, text)
    return list(pages)


def fill_page(page: str, root: Path, sources: Sequence[str] | None = None) -> str:
    """`page` with its tables written anew from `sources`, or from those that each mark names, relative to `root`."""

    def renew(match: re.Match[str]) -> str:
        name = match["name"]
        if name in COUNTED:
            words, lines = [name], COUNTED[name]()
        elif name in MEASURED:
            named = match["sources"].split() if sources is None else sources
            words, lines = [name, *named], MEASURED[name](newest(read_rows(*(root / source for source in named))))
        else:
            raise DataError(f"there is no table {name!r}; expected one of {[*MEASURED, *COUNTED]}")
        return "\n".join([f"<!-- benchmark {' '.join(words)} -->", *lines, "<!-- end -->"])

    return MARKED.sub(renew, page)
