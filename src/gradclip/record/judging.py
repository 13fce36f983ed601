"""What becomes of each step: its row, and whose tensors' norms are written."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradclip.core.norms import Norms
from gradclip.core.reading import Reading
from gradclip.record.store import Row, Vector
from gradclip.record.values import Reader, least, whole

Log = Callable[[dict[str, float], int], Any]


class Entry(NamedTuple):
    """A step as the training's thread has left it."""

    step: int
    time: float
    reading: Reading
    mark: Any


class Judged(NamedTuple):
    """A step, and all that is to be written of it, the norms of those before it too."""

    row: Row
    vectors: list[Vector]
    own: Vector | None  # of the step itself


class _Ringed(NamedTuple):
    """A step whose tensors' norms are not written, unless something comes of it."""

    run: int
    step: int
    norms: Norms
    mark: Any


class Judge:
    """Judges steps in their order.

    Args:
        every: the tensors' norms are written in steps that are multiples of it; 0 for none.
        hard: and in those of a factor below this, skipped or not finite,
        ring: with those of so many steps before.
    """

    def __init__(self, every: int, hard: float, ring: int) -> None:
        self._every, self._hard = every, hard
        self._ring: deque[_Ringed] = deque(maxlen=ring)
        self._reader = Reader()
        self._run = 0
        self._latest: int | None = None
        self._skipped: float | None = None

    def judge(self, entries: Sequence[Entry]) -> list[Judged]:
        """What is to be written of steps; it waits for devices."""
        numbers = self._reader.read(
            (x for entry in entries for x in _numbers_of(entry.reading)),
            (entry.mark for entry in entries),
        )
        return [
            self._judge(entry, *numbers[place * _NUMBERS : (place + 1) * _NUMBERS])
            for place, entry in enumerate(entries)
        ]

    def _judge(self, entry: Entry, *numbers: Any) -> Judged:
        row, reading = self._row(entry, *numbers), entry.reading
        clipped_hard = row.factor is not None and row.factor < self._hard
        is_event = row.skipped or row.nonfinite or clipped_hard
        vectors: list[Vector] = []
        if is_event:
            vectors = [self._vector(each) for each in self._ring if each.step != row.step]
            self._ring.clear()
        if reading.norms is None:
            return Judged(row, vectors, None)
        here = _Ringed(row.run, row.step, reading.norms, entry.mark)
        if not is_event and (not self._every or row.step % self._every):
            self._ring.append(here)
            return Judged(row, vectors, None)
        vector = self._vector(here)
        return Judged(row, [*vectors, vector], vector)

    def _vector(self, of: _Ringed) -> Vector:
        (values,) = self._reader.read([of.norms.values], [of.mark])
        return Vector(of.run, of.step, of.norms.paths, np.array(values, "<f8").tobytes())

    def _row(
        self, entry: Entry, norm: Any, limit: Any, factor: Any, taken: Any, counts: Any
    ) -> Row:
        self._follow(entry.step)
        skipped = not taken[0] or self._has_skipped(counts)
        is_measured = entry.reading.norm is not None and any(taken)
        size = whole(norm) if is_measured else math.nan
        bound = whole(limit) if limit and is_measured else math.nan
        share = least(factor) if factor and is_measured else _factor_of(size, bound)
        nonfinite = 0 if not is_measured or math.isfinite(size) else 1 + math.isnan(size)
        return Row(
            self._run,
            entry.step,
            entry.time,
            _or_none(size),
            _or_none(bound),
            _or_none(share),
            _action(skipped=skipped, nonfinite=nonfinite, factor=share),
            int(skipped),
            nonfinite,
        )

    def _follow(self, step: int) -> None:
        """Begin another run where steps have gone back: to a checkpoint, within one process."""
        if self._latest is not None and step < self._latest:
            self._run += 1
        if step == self._latest and self._ring and self._ring[-1].step == step:
            self._ring.pop()  # told again
        self._latest = step

    def _has_skipped(self, counts: list[float]) -> bool:
        """If more steps are skipped than in the record before; in the first, if all are."""
        if not counts:
            return False
        skipped, steps = counts
        before, self._skipped = self._skipped, skipped
        return skipped > before if before is not None else skipped == steps > 0


_NUMBERS = 5


def _numbers_of(reading: Reading) -> list[Any]:
    taken = _TAKEN[reading.taken] if isinstance(reading.taken, bool) else reading.taken
    told = (reading.norm, reading.limit, reading.factor, taken, reading.skipped_of)
    return [[] if each is None else each for each in told]


_TAKEN = {True: [1.0, 0.0], False: [0.0, 1.0]}


def _factor_of(norm: float, limit: float) -> float:
    """By the formula of a clip, where only norm and limit are known."""
    if math.isnan(limit):
        return math.nan
    return 1.0 if norm <= limit else limit / norm if norm != math.inf else 0.0


def _action(*, skipped: bool, nonfinite: int, factor: float) -> str:
    if skipped:
        return "skip"
    if nonfinite:
        return "nonfinite"
    return "clip" if factor < 1 else "keep"


def _or_none(number: float) -> float | None:
    """SQLite has no NaN."""
    return None if math.isnan(number) else number


def log_of(row: Row, tensors: Vector | None) -> dict[str, float]:
    """What a logger is told of a step."""
    found = {"grad_norm": math.nan if row.norm is None else row.norm}
    if row.limit is not None:
        found["grad_limit"] = row.limit
    if row.factor is not None:
        found["grad_factor"] = row.factor
    if tensors is not None:
        values = np.frombuffer(tensors.values, "<f8").tolist()
        names = (f"grad_norm/{name}" for name in tensors.names)
        found |= zip(names, values, strict=True)
    return found
