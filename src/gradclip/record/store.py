"""Rows to the file."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from gradclip.record import schema


class Row(NamedTuple):
    """A step, as the table ``steps`` has it; ``run`` counts from this opening, 0 first."""

    run: int
    step: int
    time: float
    norm: float | None
    limit: float | None
    factor: float | None
    action: str
    skipped: int
    nonfinite: int


class Vector(NamedTuple):
    """The norms of the tensors in a step."""

    run: int
    step: int
    names: tuple[str, ...]
    values: bytes


class Store:
    """The file, open to write.

    Raises:
        OSError, ValueError, RuntimeError: it cannot be, is no record, or is another's to write.
    """

    def __init__(self, path: Path) -> None:
        schema.check_writable(path)
        self._lock = schema.Lock(path)
        try:
            self._file = schema.open_to_write(path)
        except BaseException:
            self._lock.free()
            raise
        latest, count = self._file.execute("SELECT max(run), count(*) FROM runs").fetchone()
        self._first = latest + 1 if count else 0
        self._runs = 0  # of this opening, that are in the file
        self._layouts = self._known_layouts()
        self.write([])

    def _known_layouts(self) -> dict[tuple[str, ...], int]:
        every: dict[int, list[str]] = {}
        for layout, name in self._file.execute(
            "SELECT layout, name FROM tensors ORDER BY layout, place"
        ):
            every.setdefault(layout, []).append(name)
        return {tuple(names): layout for layout, names in every.items()}

    def write(self, writes: Iterable[Row | Vector]) -> None:
        """Write all of these, or none.

        Raises:
            sqlite3.Error: none is.
        """
        file, layouts, runs = self._file, dict(self._layouts), self._runs
        file.execute("BEGIN IMMEDIATE")
        try:
            runs = self._begin_run(0, runs)
            for each in writes:
                runs = self._begin_run(each.run, runs)
                if isinstance(each, Row):
                    self._write_row(each)
                else:
                    self._write_vector(each, layouts)
            file.execute("COMMIT")
        except BaseException:
            if file.in_transaction:
                file.execute("ROLLBACK")
            raise
        self._layouts, self._runs = layouts, runs

    def _begin_run(self, run: int, runs: int) -> int:
        """Have a run in the table; how many of this opening are."""
        while runs <= run:
            self._file.execute("INSERT INTO runs VALUES (?, ?)", (self._first + runs, time.time()))
            runs += 1
        return runs

    def _write_row(self, row: Row) -> None:
        key = self._first + row.run, row.step
        self._file.execute("DELETE FROM norms WHERE run = ? AND step = ?", key)
        self._file.execute(
            "INSERT OR REPLACE INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", (*key, *row[2:])
        )

    def _write_vector(self, vector: Vector, layouts: dict[tuple[str, ...], int]) -> None:
        layout = layouts.get(vector.names)
        if layout is None:
            layout = layouts[vector.names] = max(layouts.values(), default=-1) + 1
            self._file.executemany(
                "INSERT INTO tensors VALUES (?, ?, ?)",
                ((layout, place, name) for place, name in enumerate(vector.names)),
            )
        self._file.execute(
            "INSERT OR REPLACE INTO norms VALUES (?, ?, ?, ?)",
            (self._first + vector.run, vector.step, layout, vector.values),
        )

    def close(self) -> None:
        """Close the file, and let others write it."""
        try:
            self._make_one_file()
        finally:
            self._file.close()
            self._lock.free()

    def _make_one_file(self) -> None:
        """Leave nothing beside it, so that it can be read where nothing may be written."""
        self._file.execute("PRAGMA busy_timeout = 0")
        # Where somebody reads, or the disk is full, two files stay beside it, as while it is
        # written: nothing is lost.
        with contextlib.suppress(sqlite3.OperationalError):
            self._file.execute("PRAGMA journal_mode = DELETE")
