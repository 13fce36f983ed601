"""Records made by hand: files of the schema of ``gradclip.Record``, with faults planted in them."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA user_version = 1;
CREATE TABLE runs(run INTEGER PRIMARY KEY, begun REAL);
CREATE TABLE steps(run, step, time REAL, norm REAL, "limit" REAL, factor REAL, action TEXT,
                   skipped INTEGER, nonfinite INTEGER, PRIMARY KEY(run, step)) WITHOUT ROWID;
CREATE TABLE tensors(layout INTEGER, place INTEGER, name TEXT, PRIMARY KEY(layout, place));
CREATE TABLE norms(run, step, layout, "values" BLOB, PRIMARY KEY(run, step));
"""

Norms = npt.NDArray[np.float64]


def names(number: int) -> list[str]:
    """Names as a transformer has them, six to a layer."""
    parts = ("ln.weight", "attn.c_attn.weight", "attn.c_proj.weight")
    parts += ("ln_2.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    return [f"h.{place // 6}.{parts[place % 6]}" for place in range(number)]


def quiet(steps: int, tensors: int, seed: int = 0, noise: float = 0.25) -> Norms:
    """Norms of a run in which nothing happens: high at first, then noise that tensors share."""
    draw = np.random.default_rng(seed)
    scale = np.exp(draw.normal(-1, 1, tensors))
    start = 1 + 4 * np.exp(-np.arange(steps) / 60)
    common = draw.normal(0, noise / 2, (steps, 1))
    own = draw.normal(0, noise, (steps, tensors))
    return np.asarray(scale * start[:, None] * np.exp(common + own))


def write(
    path: Path,
    norms: Norms,
    *,
    limit: float | None = 1.0,
    every: int = 1,
    skipped: Iterable[int] = (),
    first: int = 0,
    run: int = 1,
    named: Sequence[str] | None = None,
) -> Path:
    """Write the steps of one run, tensors at multiples of ``every`` (0: never), near faults.

    Row ``i`` of ``norms`` is step ``first + i``; a step whose norm is NaN or inf is skipped.
    """
    with np.errstate(all="ignore"):
        total = np.sqrt(np.square(norms).sum(1))
        factor = np.ones(len(norms)) if limit is None else np.minimum(1, limit / total)
    skip = ~np.isfinite(total) | np.isin(np.arange(len(norms)) + first, list(skipped))
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        if not file.execute("PRAGMA user_version").fetchone()[0]:
            file.executescript(SCHEMA)
        file.execute("INSERT INTO runs VALUES (?, ?)", (run, 1.7e9 + first))
        file.executemany(
            "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                (run, at, 1.7e9 + 0.25 * at, float(total[row]), limit, *decided)
                for row, decided in enumerate(map(_decided, total, factor, skip))
                for at in [first + row]
            ),
        )
        if every:
            hard = np.flatnonzero(skip | (factor < 0.1))
            wanted = {row for row in range(len(norms)) if (first + row) % every == 0}
            wanted.update(near for row in hard for near in range(max(0, row - 32), row + 1))
            layout = _layout(file, named or names(norms.shape[1]))
            file.executemany(
                "INSERT INTO norms VALUES (?, ?, ?, ?)",
                (
                    (run, first + row, layout, norms[row].astype("<f8").tobytes())
                    for row in sorted(wanted)
                ),
            )
    return path


def _decided(total: float, factor: float, skip: np.bool_) -> tuple[float, str, int, int]:
    """Factor, action, skipped, nonfinite."""
    if not np.isfinite(total):
        return 0.0, "skip", 1, 2 if np.isnan(total) else 1
    return float(factor), "skip" if skip else "clip" if factor < 1 else "keep", int(skip), 0


def _layout(file: sqlite3.Connection, named: Sequence[str]) -> int:
    layout = int(file.execute("SELECT coalesce(max(layout), 0) + 1 FROM tensors").fetchone()[0])
    rows = ((layout, place, name) for place, name in enumerate(named))
    file.executemany("INSERT INTO tensors VALUES (?, ?, ?)", rows)
    return layout


EXPLODES, BAD, DRIFTS = 13, (4, 5), 22


def planted(steps: int = 6000, tensors: int = 36, seed: int = 0) -> Norms:
    """A quiet run with three faults: one explosion, one NaN, one drift.

    Tensor 13 explodes for four steps from a quarter of the run on, tensors 4 and 5 are NaN in the
    step at its half, and tensor 22 grows by 0.1 % a step over the last 40 %.
    """
    norms = quiet(steps, tensors, seed)
    explosion = steps // 4
    norms[explosion : explosion + 4, EXPLODES] *= [300, 9000, 4000, 200]
    norms[steps // 2, BAD] = np.nan
    begin = steps * 6 // 10
    norms[begin:, DRIFTS] *= 1.001 ** np.arange(steps - begin)
    return norms
