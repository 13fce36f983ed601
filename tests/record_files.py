"""What is in the file of a record, by SQLite alone."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def norms(*values: float) -> gradclip.Norms:
    """Those of as many tensors."""
    return gradclip.norms({f"w{place}": np.float64([x]) for place, x in enumerate(values)})


def query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as file:
        return file.execute(sql).fetchall()


def rows(
    path: Path, columns: str = 'step, norm, "limit", factor, action, skipped, nonfinite'
) -> Any:
    """The table of steps."""
    return query(path, f"SELECT {columns} FROM steps ORDER BY run, step")


def tensor_steps(path: Path) -> list[int]:
    return [step for (step,) in query(path, "SELECT step FROM norms ORDER BY run, step")]


def check_whole(path: Path) -> int:
    """How many steps there are: of each run from its first one on, without a gap."""
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    counts = query(path, "SELECT run, min(step), max(step), count(*) FROM steps GROUP BY run")
    for _, first, last, count in counts:
        assert count == last - first + 1
    lost = "SELECT count(*) FROM norms LEFT JOIN steps USING (run, step) WHERE action IS NULL"
    assert query(path, lost) == [(0,)]
    return sum(count for *_, count in counts)
