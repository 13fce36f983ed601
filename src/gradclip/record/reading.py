"""The reader of a record."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gradclip.record import schema

_Floats = npt.NDArray[np.float64]
_Ints = npt.NDArray[np.int64]

# Of each run the steps before the first one of any later run; the others were told again.
_COUNTED = """
WITH firsts AS (SELECT run, (SELECT min(step) FROM steps WHERE run = runs.run) AS first FROM runs),
ends AS (
    SELECT run, coalesce(
        (SELECT min(later.first) FROM firsts AS later WHERE later.run > firsts.run),
        1e19
    ) AS stop FROM firsts
)
"""
_STEPS = f"""{_COUNTED}
SELECT step, time, norm, "limit", factor, action, skipped, nonfinite
FROM ends JOIN steps USING (run) WHERE step < stop AND step > ? ORDER BY run, step
"""
_TENSOR_STEPS = f"""{_COUNTED}
SELECT norms.rowid, step, layout
FROM ends JOIN norms USING (run) WHERE step < stop AND step > ? ORDER BY run, step
"""


class TensorNorms(NamedTuple):
    """Norms of tensors.

    Attributes:
        values: float64 [steps x names]; NaN too where there is none.
        present: bool [steps x names]: where a tensor had a norm in that step.
    """

    values: _Floats
    present: npt.NDArray[np.bool_]


class History:
    """What a record has, read while the run goes on too; as it was when it was opened.

    Steps that a resumed run has told again are left out.

    Attributes:
        path: the file.
        steps: int64, ascending; what follows has one element for each.
        time: float64, seconds since 1970.
        norm: float64, before clipping; NaN where it was NaN, or not measured (``nonfinite`` is 0).
        limit: float64; NaN where none is known.
        factor: float64, what gradients were multiplied by; NaN where it is not known.
        action: str: ``"keep"``, ``"clip"``, ``"skip"`` or ``"nonfinite"``.
        skipped: bool.
        nonfinite: int64: 0 finite, 1 inf, 2 NaN.
        names: of all tensors that have norms, in the order in which they were first seen.
        tensor_steps: int64, those of ``steps`` in which tensors' norms were written.

    A context manager, which closes the file.

    >>> import gradclip, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with gradclip.Record(f"{folder}/run.db") as record:
    ...         for step, norm in enumerate([1.0, 5.0, float("inf")]):
    ...             record(step, norm, limit=2.5)
    ...     with History.open(f"{folder}/run.db") as history:
    ...         print(history.steps, history.norm, history.factor, history.action)
    [0 1 2] [ 1.  5. inf] [1.  0.5 0. ] ['keep' 'clip' 'nonfinite']
    """

    path: Path
    time: _Floats
    norm: _Floats
    limit: _Floats
    factor: _Floats
    names: tuple[str, ...]
    tensor_steps: _Ints

    def __init__(self, file: sqlite3.Connection, path: Path, after: int) -> None:
        self.path, self._file = path, file
        rows = file.execute(_STEPS, (after,)).fetchall()
        columns: Any = list(zip(*rows, strict=True)) or [()] * 8
        self.steps: _Ints = np.array(columns[0], np.int64)
        # None, as SQLite has NaN, becomes NaN.
        self.time, self.norm, self.limit, self.factor = (
            np.array(each, np.float64) for each in columns[1:5]
        )
        self.action: npt.NDArray[np.str_] = np.array(columns[5], np.str_)
        self.skipped: npt.NDArray[np.bool_] = np.array(columns[6], np.bool_)
        self.nonfinite: _Ints = np.array(columns[7], np.int64)
        self.names, self._places = _names(file)
        found = np.array(file.execute(_TENSOR_STEPS, (after,)).fetchall(), np.int64).reshape(-1, 3)
        self._rows, self.tensor_steps, self._layouts = (found[:, column] for column in range(3))

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read a record.

        Raises:
            OSError: there is none, or it cannot be read.
            ValueError: the file is no record, or one of a later version.
        """
        return cls(_open(Path(path)), Path(path), -1)

    def after(self, step: int) -> Self:
        """The history of later steps alone, with what has been written since; the file is shared.

        Where a run has gone back behind ``step``, what it tells again is not in it: the first
        step of the latest run is `begun_at`.
        """
        return type(self)(self._file, self.path, step)

    def begun_at(self) -> int | None:
        """The first step of the latest run that has one, as the file is now; None if none has."""
        found = self._file.execute(
            "SELECT min(step) FROM steps WHERE run = (SELECT max(run) FROM steps)"
        ).fetchone()
        first: int | None = found[0]
        return first

    def tensor_norms(self, start: int = 0, stop: int | None = None) -> TensorNorms:
        """The tensors' norms in ``tensor_steps[start:stop]``, a slice as any other.

        Of long runs with many tensors, read some thousand steps at a time.
        """
        places = range(*slice(start, stop).indices(len(self.tensor_steps)))
        values = np.full((len(places), len(self.names)), np.nan)
        present = np.zeros(values.shape, np.bool_)
        for row, (layout, blob) in enumerate(self._blobs(places)):
            columns = self._places[layout]
            values[row, columns] = np.frombuffer(blob, "<f8")
            present[row, columns] = True
        return TensorNorms(values, present)

    def _blobs(self, places: range) -> Iterator[tuple[int, bytes]]:
        for place in places:
            (blob,) = self._file.execute(
                'SELECT "values" FROM norms WHERE rowid = ?', (int(self._rows[place]),)
            ).fetchone()
            yield int(self._layouts[place]), blob

    def close(self) -> None:
        """Close the file, of those that `after` has returned too; arrays stay."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        return f"History({str(self.path)!r}: {len(self.steps)} steps, {len(self.names)} tensors)"


def _names(file: sqlite3.Connection) -> tuple[tuple[str, ...], dict[int, Any]]:
    """All names, and the place of each layout's among them."""
    place_of: dict[str, int] = {}
    layouts: dict[int, list[int]] = {}
    for layout, name in file.execute("SELECT layout, name FROM tensors ORDER BY layout, place"):
        place = place_of.setdefault(name, len(place_of))
        layouts.setdefault(layout, []).append(place)
    return tuple(place_of), {layout: np.array(found) for layout, found in layouts.items()}


def _open(path: Path) -> sqlite3.Connection:
    if not path.exists():
        raise FileNotFoundError(f"there is no record {path}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; a record is one file")
    try:
        file = sqlite3.connect(_uri(path), uri=True)
        try:
            file.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not schema.check_version(file, path):
                raise ValueError(f"{path} is no record of gradclip: it is empty")
        except BaseException:
            file.close()
            raise
    except sqlite3.OperationalError as error:
        raise OSError(f"{path} cannot be read: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no record of gradclip: {error}") from error
    return file


def _uri(path: Path) -> str:
    uri = f"{path.absolute().as_uri()}?mode=ro"
    # In a folder that may not be written SQLite reads only what it is told that nobody writes.
    if not os.access(path.parent, os.W_OK) and not path.with_name(f"{path.name}-wal").exists():
        uri += "&immutable=1"
    return uri
