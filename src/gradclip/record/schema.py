"""The tables of the file, and how it is opened."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys
from pathlib import Path

VERSION = 1

_TABLES = """
CREATE TABLE runs (run INTEGER PRIMARY KEY, begun REAL NOT NULL);
CREATE TABLE steps (
    run INTEGER NOT NULL, step INTEGER NOT NULL, time REAL NOT NULL,
    norm REAL, "limit" REAL, factor REAL,
    action TEXT NOT NULL, skipped INTEGER NOT NULL, nonfinite INTEGER NOT NULL,
    PRIMARY KEY (run, step)
) WITHOUT ROWID;
CREATE TABLE tensors (
    layout INTEGER NOT NULL, place INTEGER NOT NULL, name TEXT NOT NULL,
    PRIMARY KEY (layout, place)
) WITHOUT ROWID;
CREATE TABLE norms (
    run INTEGER NOT NULL, step INTEGER NOT NULL, layout INTEGER NOT NULL, "values" BLOB NOT NULL,
    PRIMARY KEY (run, step)
);
"""


def open_to_write(path: Path) -> sqlite3.Connection:
    """The file, with its tables; made if there is none.

    Raises:
        OSError: it cannot be written here.
        ValueError: it is no record, or one of a later version.
    """
    check_writable(path)
    try:
        found = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            _begin(found, path)
        except BaseException:
            found.close()
            raise
    except sqlite3.OperationalError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(_NO_RECORD.format(path, error)) from error
    return found


def _begin(found: sqlite3.Connection, path: Path) -> None:
    if not check_version(found, path):
        # Readers are to see all tables or none.
        found.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
    found.execute("PRAGMA journal_mode = WAL")
    found.execute("PRAGMA synchronous = NORMAL")


def check_version(found: sqlite3.Connection, path: Path) -> bool:
    """If the tables are there; none are in a new file.

    Raises:
        ValueError: it is another's file, or of a later version.
    """
    (version,) = found.execute("PRAGMA user_version").fetchone()
    (tables,) = found.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if version == 0 and tables == 0:
        return False
    if version > VERSION:
        raise ValueError(
            f"{path} is a record of version {version}; this gradclip reads up to {VERSION}: "
            "install a later one, or write another file"
        )
    steps = found.execute("SELECT count(*) FROM sqlite_master WHERE name = 'steps'").fetchone()
    if version < 1 or steps != (1,):
        raise ValueError(_NO_RECORD.format(path, "it is a database of other tables"))
    return True


_NO_RECORD = "{} is no record of gradclip ({}); give a file that is one, or a new name"


def check_writable(path: Path) -> None:
    """Refuse early, in words, what SQLite would only be "unable to open".

    Raises:
        OSError: the path is a folder, in none, or not to be written.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a record is one file, as {path / 'run.db'}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for the record {path.name}")
    for place in (path.parent, path):
        if place.exists() and not os.access(place, os.W_OK):
            raise PermissionError(
                f"{place} may not be written; a record needs a folder for itself and the files "
                f"that SQLite keeps beside it ({path.name}-wal)"
            )


class Lock:
    """That one process alone writes a record, told by a lock of SQLite's on a file beside it.

    The system frees it whatever becomes of the process. On the record itself it would keep readers
    out too.

    Raises:
        RuntimeError: another has it.
        OSError: nobody can have it there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(f"{path.name}-writer")
        self._held = sqlite3.connect(
            self._path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            self._held.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            self._held.close()
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise OSError(f"{self._path} cannot be locked: {error}") from error
            raise RuntimeError(
                f"{path} is being written by another Record ({error}); close that one, or write "
                "another file"
            ) from error

    def free(self) -> None:
        """Let others write."""
        if sys.platform == "win32":
            self._held.close()
            with contextlib.suppress(PermissionError):  # another has it by now
                self._path.unlink(missing_ok=True)
        else:
            self._path.unlink(missing_ok=True)
            self._held.close()
