"""The votes of a study: one SQLite file that a killed server leaves whole.

    study       one row: the settings, fixed when the file is made
    pair        the pairs of videos, by file name
    assignment  what each rater is asked, in which order, and which method is on the left
    vote        at most one per assignment: its key is the assignment's token

Every vote is a transaction of its own, on disk (`synchronous = FULL`) before the next pair is handed out.
"""

import json
import random
import secrets
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from ..errors import RunError, StudyError
from ..files import write_atomic
from .videos import Pair

APPLICATION_ID = 0x41535354
FORMAT_VERSION = 1
CHOICES = ("left", "right", "none")
MAX_RATER_LENGTH = 64

SCHEMA = """
CREATE TABLE study (settings TEXT NOT NULL);
CREATE TABLE pair (
    name TEXT PRIMARY KEY, prompt TEXT NOT NULL, caption TEXT, dimensions TEXT NOT NULL,
    ours_digest TEXT NOT NULL, baseline_digest TEXT NOT NULL
);
CREATE TABLE assignment (
    token TEXT PRIMARY KEY, rater TEXT NOT NULL, position INTEGER NOT NULL, name TEXT NOT NULL REFERENCES pair(name),
    ours_left INTEGER NOT NULL CHECK (ours_left IN (0, 1)),
    left_token TEXT NOT NULL UNIQUE, right_token TEXT NOT NULL UNIQUE, shown_at TEXT,
    UNIQUE (rater, position), UNIQUE (rater, name)
);
CREATE TABLE vote (
    token TEXT PRIMARY KEY REFERENCES assignment(token),
    choice TEXT NOT NULL CHECK (choice IN ('left', 'right', 'none')), voted_at TEXT NOT NULL
);
"""

INSERT_PAIR = "INSERT INTO pair VALUES (:name, :prompt, :caption, :dimensions, :ours_digest, :baseline_digest)"

Outcome = Literal["ours", "tie", "baseline"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A pair as its rater may know it: opaque tokens, and the prompt if the study has prompts."""

    token: str
    left: str
    right: str
    caption: str | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a rater stands; `question` is None when all is answered."""

    rater: str
    done: int
    total: int
    question: Question | None


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One answer, unblinded."""

    rater: str
    name: str
    prompt: str
    dimensions: tuple[str, ...]
    outcome: Outcome
    side: Literal["left", "right", "none"]
    shown_at: str
    voted_at: str


class StudyStore:
    """A study's file. Safe to use from several threads and processes: each call opens a connection of its own."""

    def __init__(self, path: Path) -> None:
        """Open a study's file, after checking that it is one.

        Raises:
            StudyError: a file that is missing, empty, damaged, no study's, or of a newer format.
        """
        self.path = path
        _check_header(path)
        with self._connect() as connection:
            damage = connection.execute("PRAGMA integrity_check").fetchone()[0]
            if damage != "ok":
                raise StudyError(f"{path} is damaged: {damage}; restore a copy of it")
            self.settings: dict[str, Any] = json.loads(connection.execute("SELECT settings FROM study").fetchone()[0])
            rows = connection.execute("SELECT * FROM pair ORDER BY name").fetchall()
        self.pairs = [Pair(**{**dict(row), "dimensions": tuple(json.loads(row["dimensions"]))}) for row in rows]

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any], pairs: Sequence[Pair]) -> "StudyStore":
        """Make a study's file, whole or not at all. StudyError if it cannot be written, for example on a full disk."""
        try:
            with write_atomic(path) as temporary, closing(sqlite3.connect(temporary)) as connection:
                connection.executescript(
                    f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT_VERSION}; {SCHEMA}"
                )
                with connection:
                    connection.execute("INSERT INTO study VALUES (?)", (json.dumps(settings),))
                    connection.executemany(
                        INSERT_PAIR,
                        [{**asdict(pair), "dimensions": json.dumps(pair.dimensions)} for pair in pairs],
                    )
        except (sqlite3.DatabaseError, RunError) as error:
            raise StudyError(f"{path} cannot be written: {error}") from error
        return cls(path)

    def enter(self, rater: str) -> Progress:
        """Where `rater` stands, after giving a new one their pairs.

        Raises:
            StudyError: an id that is empty, too long, or has characters other than letters, digits and `. _ - @`.
        """
        rater = _normalise_rater(rater)
        with self._connect() as connection, _writing(connection):
            if not connection.execute("SELECT 1 FROM assignment WHERE rater = ?", (rater,)).fetchone():
                self._assign(connection, rater)
            return _progress(connection, rater)

    def vote(self, token: str, choice: str) -> Progress:
        """Keep an answer and go on; for a pair that has one, only go on: the first answer stands.

        Args:
            token: the question's.
            choice: "left", "right" or "none".

        Raises:
            StudyError: a token that was never handed out, or another choice.
        """
        if choice not in CHOICES:
            raise StudyError(f"the answer is {choice!r}; expected one of {', '.join(CHOICES)}")
        with self._connect() as connection, _writing(connection):
            row = connection.execute(
                "SELECT rater FROM assignment WHERE token = ? AND shown_at IS NOT NULL", (token,)
            ).fetchone()
            if row is None:
                raise StudyError("this pair is not of this study; reload the page")
            connection.execute("INSERT OR IGNORE INTO vote VALUES (?, ?, ?)", (token, choice, _now()))
            return _progress(connection, row["rater"])

    def find_video(self, token: str) -> tuple[Literal["ours", "baseline"], str] | None:
        """The method and the file name behind a video's token; None for a token that was never handed out."""
        with self._connect() as connection:
            row = connection.execute(
                "SELECT name, ours_left, left_token = :token AS is_left FROM assignment "
                "WHERE (left_token = :token OR right_token = :token) AND shown_at IS NOT NULL",
                {"token": token},
            ).fetchone()
        if row is None:
            return None
        return ("ours" if row["ours_left"] == row["is_left"] else "baseline"), row["name"]

    def votes(self) -> list[Vote]:
        """Every vote, in the order of rater and position."""
        with self._connect() as connection:
            rows = connection.execute(
                "SELECT * FROM vote JOIN assignment USING (token) JOIN pair USING (name) ORDER BY rater, position"
            ).fetchall()
        return [
            Vote(
                rater=row["rater"],
                name=row["name"],
                prompt=row["prompt"],
                dimensions=tuple(json.loads(row["dimensions"])),
                outcome=_outcome(row["choice"], bool(row["ours_left"])),
                side=row["choice"],
                shown_at=row["shown_at"],
                voted_at=row["voted_at"],
            )
            for row in rows
        ]

    def _assign(self, connection: sqlite3.Connection, rater: str) -> None:
        """Draw a rater's pairs, their order, and the sides: ours is on the left in half of them."""
        chance = random.Random(f"{self.settings['seed']}/{rater}")
        names = [pair.name for pair in self.pairs]
        chance.shuffle(names)
        if (wanted := self.settings["pairs_per_rater"]) is not None:
            counts = dict(connection.execute("SELECT name, count(*) FROM assignment GROUP BY name").fetchall())
            names = sorted(names, key=lambda name: counts.get(name, 0))[:wanted]
            chance.shuffle(names)
        first = chance.randrange(2)
        sides = [(first + place) % 2 for place in range(len(names))]
        chance.shuffle(sides)
        connection.executemany(
            "INSERT INTO assignment VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
            [
                (_token(), rater, position, name, side, _token(), _token())
                for position, (name, side) in enumerate(zip(names, sides, strict=True))
            ],
        )

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=rw", uri=True, timeout=30)
        try:
            connection.isolation_level = None
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA synchronous = FULL")
            yield connection
        except sqlite3.DatabaseError as error:
            raise StudyError(f"{self.path} cannot be used: {error}") from error
        finally:
            connection.close()


@contextmanager
def _writing(connection: sqlite3.Connection) -> Iterator[None]:
    """One transaction that holds the file's write lock from its start."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _progress(connection: sqlite3.Connection, rater: str) -> Progress:
    rows = connection.execute(
        "SELECT assignment.*, caption, choice FROM assignment JOIN pair USING (name) LEFT JOIN vote USING (token) "
        "WHERE rater = ? ORDER BY position",
        (rater,),
    ).fetchall()
    waiting = [row for row in rows if row["choice"] is None]
    question = None
    if waiting:
        row = waiting[0]
        if row["shown_at"] is None:
            connection.execute("UPDATE assignment SET shown_at = ? WHERE token = ?", (_now(), row["token"]))
        question = Question(
            token=row["token"], left=row["left_token"], right=row["right_token"], caption=row["caption"]
        )
    return Progress(rater=rater, done=len(rows) - len(waiting), total=len(rows), question=question)


def _outcome(choice: str, ours_left: bool) -> Outcome:
    if choice == "none":
        return "tie"
    return "ours" if (choice == "left") == ours_left else "baseline"


def _check_header(path: Path) -> None:
    """Refuse whatever is not a study's file by its first 100 bytes (SQLite's file format, §1.3)."""
    if not path.is_file():
        raise StudyError(f"{path} does not exist; `study serve` makes it")
    with open(path, "rb") as file:
        header = file.read(100)
    if not header:
        raise StudyError(f"{path} is an empty file, not a study's; delete it or name another")
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise StudyError(f"{path} is not an SQLite file; name another")
    if int.from_bytes(header[68:72]) != APPLICATION_ID:
        raise StudyError(f"{path} is an SQLite file of another program, not a study's; name another")
    if (version := int.from_bytes(header[60:64])) != FORMAT_VERSION:
        raise StudyError(
            f"{path} is a study of format {version}; this version reads {FORMAT_VERSION}: update the library"
        )


def _normalise_rater(rater: str) -> str:
    rater = rater.strip().casefold()
    if not rater or len(rater) > MAX_RATER_LENGTH or not all(char.isalnum() or char in "._-@" for char in rater):
        raise StudyError(
            f"A name has 1 to {MAX_RATER_LENGTH} letters, digits or . _ - @, and no spaces; please choose another."
        )
    return rater


def _token() -> str:
    return secrets.token_urlsafe(16)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
