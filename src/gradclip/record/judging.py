"""What becomes of each step: its row, and whose tensors' norms are written."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from gradclip.core.norms import Norms, told_apart
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
    norms: Sequence[Norms | Callable[[], Norms]]
    mark: Any


class _Numbers(NamedTuple):
    """Those of a reading, once they are read; empty where it has none."""

    norm: list[float]
    limit: list[float]
    factor: list[float]
    taken: list[float]
    skipped_of: list[float]

    @classmethod
    def of(cls, reading: Reading) -> Sequence[Any]:
        """Those that are still to be read."""
        taken = reading.taken
        if isinstance(taken, bool):
            taken = [float(taken), float(not taken)]
        told = (reading.norm, reading.limit, reading.factor, taken, reading.skipped_of)
        return [[] if each is None else each for each in told]

    @property
    def are_measured(self) -> bool:
        """If they are of this step: it was taken, or the clip has had it skipped."""
        return bool(self.norm) and any(self.taken)


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
        read = iter(
            self._reader.read(
                (x for entry in entries for x in _Numbers.of(entry.reading)),
                (entry.mark for entry in entries),
            )
        )
        size = len(_Numbers._fields)
        return [self._judge(entry, _Numbers(*islice(read, size))) for entry in entries]

    def _judge(self, entry: Entry, numbers: _Numbers) -> Judged:
        row, norms = self._row(entry, numbers), entry.reading.norms
        if self._ring and self._ring[-1][:2] == (row.run, row.step):
            self._ring.pop()  # the step is told again
        clipped_hard = row.factor is not None and row.factor < self._hard
        is_event = row.skipped or row.nonfinite or clipped_hard
        vectors: list[Vector] = []
        if is_event:
            vectors = list(map(self._vector, self._ring))
            self._ring.clear()
        if not norms or not numbers.are_measured:
            return Judged(row, vectors, None)
        here = _Ringed(row.run, row.step, norms, entry.mark)
        if not is_event and (not self._every or row.step % self._every):
            self._ring.append(here)
            return Judged(row, vectors, None)
        vector = self._vector(here)
        return Judged(row, [*vectors, vector], vector)

    def _vector(self, of: _Ringed) -> Vector:
        norms = [each() if callable(each) else each for each in of.norms]
        (values,) = self._reader.read([[each.values for each in norms]], [of.mark])
        every = [name for each in norms for name in each.paths]
        # Those of several lists may have no names of their own.
        names = tuple(told_apart(every, range(len(every))))
        return Vector(of.run, of.step, names, np.array(values, "<f8").tobytes())

    def _row(self, entry: Entry, numbers: _Numbers) -> Row:
        self._follow(entry.step)
        skipped = not numbers.taken[0] or self._has_skipped(numbers.skipped_of)
        size = bound = share = math.nan
        nonfinite = 0
        if numbers.are_measured:
            size = whole(numbers.norm)
            bound = whole(numbers.limit) if numbers.limit else math.nan
            share = least(numbers.factor) if numbers.factor else _factor_of(size, bound)
            nonfinite = math.isinf(size) + 2 * math.isnan(size)
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
        self._latest = step

    def _has_skipped(self, counts: list[float]) -> bool:
        """If more steps are skipped than in the record before; in the first, if all are."""
        if not counts:
            return False
        skipped, steps = counts
        before, self._skipped = self._skipped, skipped
        return skipped > before if before is not None else skipped == steps > 0


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
