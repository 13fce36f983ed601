"""What happened in a run: spikes, NaN and inf, skipped steps, slow drifts, the tensors behind them.

Norms are held against their own past alone (`series.py`), each tensor's and the global one, so that
a tensor that is 100 times what it was is seen where it changes the global norm by little.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from gradclip.record.series import (
    WINDOW,
    Bools,
    Floats,
    Ints,
    Means,
    Past,
    cells,
    drifts,
    logarithms,
    means,
)

Seen = Callable[[int, int, Floats, Bools], None]

LARGEST = 10  # tensors named in an event
NEAR = 32  # steps between two faults of one event
SPIKE = (3.0, 8.0)  # a spike of the global norm: this many times the median, deviations beyond it
TENSOR_SPIKE = (5.0, 10.0)  # of a tensor's norm: there are more of them to be wrong about
DRIFT = 4.0  # a drift: growth to this many times the norm
SLOW = 500  # steps that a drift takes at least
SMALL = 1e-3  # of the usual global norm: what a tensor's norm must reach to make an event
_PIECE = 1 << 20  # norms read at once
_BLOCKS = 1024  # in which drifts are looked for


class Run(Protocol):
    """What of a run's record events are found in; see ``History``, which is one."""

    steps: Ints
    norm: Floats
    limit: Floats
    factor: Floats
    skipped: Bools
    nonfinite: Ints
    names: tuple[str, ...]
    tensor_steps: Ints

    def tensor_norms(self, start: int = 0, stop: int | None = None) -> tuple[Floats, Bools]:
        """The norms in ``tensor_steps[start:stop]``, and which of them there are."""


@dataclass(frozen=True)
class Jump:
    """A tensor's norm before an event and in it.

    Attributes:
        name: the tensor's.
        before: the median of its last norms before the event; NaN if there are none.
        within: its largest norm in the event; NaN if it was NaN there.
    """

    name: str
    before: float
    within: float

    @property
    def ratio(self) -> float:
        """How many times its norm before; NaN if that is not known or the norm was NaN.

        >>> Jump("weight", 2.0, 6.0).ratio
        3.0
        """
        return _times(self.within, self.before)


def _times(norm: float, before: float) -> float:
    if before:
        return norm / before
    return math.inf if norm > 0 else math.nan


@dataclass(frozen=True)
class Event:
    """Neighbouring steps in which one thing happened.

    Attributes:
        kind: ``"NaN"``, ``"inf"``, ``"spike"``, ``"skip"`` or ``"drift"``.
        first: its first step.
        last: its last step.
        steps: in how many of them it happened; of a drift, all.
        norm_before: the median of the global norm before it; NaN if not known.
        norm_in: the largest global norm in it; NaN if it was NaN.
        limit: the lowest limit in it; NaN if there was none.
        factor: the smallest factor in it; NaN if none is known.
        clipped: how many of its steps were clipped.
        skipped: how many of its steps were skipped.
        jumps: the ten tensors with the largest jump, the largest first, NaN before all.
        nonfinite: the names of all tensors that were NaN or inf in it, in the model's order.
        rate: of a drift, by how much the first of ``jumps`` grew per step: 0.001 is 0.1 %.
    """

    kind: str
    first: int
    last: int
    steps: int
    norm_before: float
    norm_in: float
    limit: float
    factor: float
    clipped: int
    skipped: int
    jumps: tuple[Jump, ...] = ()
    nonfinite: tuple[str, ...] = ()
    rate: float = math.nan

    @property
    def ratio(self) -> float:
        """How many times its norm before the first of ``jumps`` is; without them the global one."""
        return self.jumps[0].ratio if self.jumps else _times(self.norm_in, self.norm_before)


def find(history: Run, seen: Seen | None = None) -> list[Event]:
    """Find the events of a run, in order of their first steps.

    Args:
        history: the record.
        seen: called with each piece of the tensors' norms as it is read: the places of its first
            row and of the one after its last among ``history.tensor_steps``, the norms
            [rows x names], and which of them there are.
    """
    tensors = _Tensors(history)
    for start, stop, norms, present in _pieces(history, 0, len(history.tensor_steps)):
        tensors.look(start, norms)
        if seen is not None:
            seen(start, stop, norms, present)
    found = [*_faults(history, tensors.spikes()), *_drifts(history, tensors)]
    return sorted(found, key=lambda event: (event.first, event.last))


def _pieces(history: Run, start: int, stop: int) -> Iterator[tuple[int, int, Floats, Bools]]:
    rows = max(1, _PIECE // max(1, len(history.names)))
    for begin in range(start, stop, rows):
        end = min(begin + rows, stop)
        yield (begin, end, *history.tensor_norms(begin, end))


class _Tensors:
    """What one pass over the tensors' norms finds: which rows have a jump, and mean logarithms."""

    def __init__(self, history: Run):
        self._steps = history.tensor_steps
        self._past = Past(len(history.names))
        self._stride = min(max(len(self._steps) // 1000, 1), WINDOW)
        self._least = _least(history)
        self._jumps: list[Ints] = []
        self._means = Means(cells(self._steps, _BLOCKS), len(history.names))

    def look(self, start: int, norms: Floats) -> None:
        """Look at the next rows, of which ``start`` is the place of the first."""
        logs = logarithms(norms)
        steps = self._steps[start : start + len(logs)]
        for at in range(0, len(logs), self._stride):
            part = logs[at : at + self._stride]
            over = part > np.maximum(self._past.bound(*TENSOR_SPIKE), self._least)
            self._jumps.append(steps[at : at + self._stride][over.any(1)])
            self._past.add(part)
        self._means.add(steps, logs)

    def spikes(self) -> Ints:
        """The steps in which a tensor's norm jumped."""
        return np.concatenate([*self._jumps, np.empty(0, np.int64)])

    def blocks(self) -> tuple[Floats, Floats]:
        """The step in the middle of each block, and each tensor's mean logarithm in it."""
        return self._means.cells.middles, self._means.values


# ---- faults: spikes, NaN and inf, skipped steps ----


def _faults(history: Run, spikes: Ints) -> Iterator[Event]:
    nonfinite = history.steps[history.nonfinite > 0]
    spikes = np.union1d(spikes, _global_spikes(history))
    spikes = np.setdiff1d(spikes, nonfinite)
    skipped = history.steps[history.skipped]
    skipped = np.setdiff1d(skipped, np.union1d(spikes, nonfinite))
    spacing = np.median(np.diff(history.tensor_steps)) if len(history.tensor_steps) > 1 else 0
    near = {"spike": max(NEAR, int(1.5 * spacing)), "skip": NEAR, "nonfinite": NEAR}
    for kind, steps in (("nonfinite", nonfinite), ("spike", spikes), ("skip", skipped)):
        for group in _groups(steps, near[kind]):
            yield _fault(history, kind, group)


def _global_spikes(history: Run) -> Ints:
    logs = logarithms(history.norm)[:, None]
    past = Past(1)
    stride = min(max(len(logs) // 5000, 1), WINDOW // 4)
    over = np.zeros(len(logs), bool)
    for start in range(0, len(logs), stride):
        part = logs[start : start + stride]
        over[start : start + stride] = (part > past.bound(*SPIKE))[:, 0]
        past.add(part)
    return history.steps[over]


def _groups(steps: Ints, near: int) -> list[Ints]:
    """The steps, apart where more than ``near`` lie between two."""
    if not len(steps):
        return []
    return np.split(steps, np.flatnonzero(np.diff(steps) > near) + 1)


def _fault(history: Run, kind: str, steps: Ints) -> Event:
    first, last = int(steps[0]), int(steps[-1])
    before, within = _tensors_before_and_in(history, first, last)
    if kind == "nonfinite":
        where = np.isin(history.steps, steps)
        kind = "NaN" if (history.nonfinite[where] == 2).any() else "inf"
    broken = [name for name, norm in zip(history.names, within, strict=True) if _is_broken(norm)]
    return _event(
        history,
        kind,
        (first, last, len(steps)),
        jumps=_largest(history.names, before, within),
        nonfinite=tuple(broken),
    )


def _is_broken(norm: float) -> bool:
    return math.isnan(norm) or norm == math.inf


def _event(
    history: Run,
    kind: str,
    steps: tuple[int, int, int],
    jumps: tuple[Jump, ...],
    nonfinite: tuple[str, ...] = (),
    rate: float = math.nan,
) -> Event:
    first, last, _ = steps
    start, stop = np.searchsorted(history.steps, [first, last + 1])
    limit, factor = history.limit[start:stop], history.factor[start:stop]
    skipped = history.skipped[start:stop]
    return Event(
        kind,
        *steps,
        _median(history.norm[max(0, start - WINDOW) : start]),
        float(history.norm[start:stop].max(initial=-math.inf)) if stop > start else math.nan,
        _smallest(limit),
        _smallest(factor),
        int(((np.nan_to_num(factor, nan=1) < 1) & ~skipped).sum()),
        int(skipped.sum()),
        jumps,
        nonfinite,
        rate,
    )


def _least(history: Run) -> float:
    """The logarithm that a tensor's norm must reach to make an event."""
    small = SMALL * _median(history.norm)
    return math.log(small) if small > 0 else -math.inf


def _median(norms: Floats) -> float:
    known = norms[np.isfinite(norms)]
    return float(np.median(known)) if len(known) else math.nan


def _smallest(values: Floats) -> float:
    return float(np.fmin.reduce(values, initial=math.nan))


def _tensors_before_and_in(history: Run, first: int, last: int) -> tuple[Floats, Floats]:
    """The median of each tensor's norms before, and its largest in it: -1 where there is none."""
    start, stop = map(int, np.searchsorted(history.tensor_steps, [first, last + 1]))
    norms, _ = history.tensor_norms(max(0, start - WINDOW), start)
    within = np.full(len(history.names), -1.0)
    for _, _, piece, present in _pieces(history, start, stop):
        np.maximum(within, np.where(present, piece, -1).max(0, initial=-1), out=within)
    norms = np.sort(np.where(np.isfinite(norms), norms, np.nan), axis=0)
    known = np.isfinite(norms).sum(0)
    if not len(norms):
        return np.full(len(history.names), np.nan), within
    middle = np.maximum(known - 1, 0) // 2
    return np.take_along_axis(norms, middle[None], axis=0)[0], within


def _largest(names: Sequence[str], before: Floats, within: Floats) -> tuple[Jump, ...]:
    jumps = [
        Jump(name, float(old), float(new))
        for name, old, new in zip(names, before, within, strict=True)
        if new != -1  # not there
    ]
    return tuple(sorted(jumps, key=_alarm, reverse=True)[:LARGEST])


def _alarm(jump: Jump) -> tuple[bool, bool, float]:
    """NaN first, then inf, then by how many times; last those without a past."""
    ratio = jump.ratio
    return math.isnan(jump.within), jump.within == math.inf, -1 if math.isnan(ratio) else ratio


# ---- slow drifts ----


def _drifts(history: Run, tensors: _Tensors) -> Iterator[Event]:
    steps, blocks = tensors.blocks()
    found = _spans(steps, blocks, _least(history))
    for group in _together(found):
        first, last = min(start for start, _ in group), max(stop for _, stop in group)
        before, within = (np.exp(_near(steps, blocks, step)) for step in (first, last))
        jumps = _largest(history.names, before, np.nan_to_num(within, nan=-1))
        yield _drift(history, first, last, jumps)
    whole = Means(cells(history.steps, _BLOCKS), 1)
    whole.add(history.steps, logarithms(history.norm)[:, None])
    for span in _spans(whole.cells.middles, whole.values):
        if not any(_overlap(span, other) for other in found):
            yield _drift(history, *span, ())


def _spans(steps: Floats, blocks: Floats, least: float = -math.inf) -> list[tuple[int, int]]:
    """The first and last step of each drift that reaches a logarithm of ``least``."""
    spans = []
    for each in drifts(blocks, DRIFT):
        first, last = (round(float(np.interp(at, np.arange(len(steps)), steps))) for at in each[1:])
        reached = np.nanmax(blocks[: math.ceil(each.last) + 1, each.series])
        if last - first >= SLOW and not reached < least:
            spans.append((first, last))
    return spans


def _near(steps: Floats, blocks: Floats, step: int) -> Floats:
    """The mean over the few blocks around a step."""
    at = int(np.abs(steps - step).argmin())
    return means(blocks[max(0, at - 2) : at + 3])


def _drift(history: Run, first: int, last: int, jumps: tuple[Jump, ...]) -> Event:
    event = _event(history, "drift", (first, last, last - first + 1), jumps)
    stop = int(np.searchsorted(history.steps, last + 1))
    event = replace(event, norm_in=_median(history.norm[max(0, stop - WINDOW) : stop]))
    rate = math.expm1(math.log(event.ratio) / (last - first)) if event.ratio > 0 else math.nan
    return replace(event, rate=rate)


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether they share half of the shorter one."""
    shared = min(one[1], other[1]) - max(one[0], other[0])
    return 2 * shared >= min(one[1] - one[0], other[1] - other[0])


def _together(spans: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The spans in groups of those that overlap with the one before."""
    groups: list[list[tuple[int, int]]] = []
    for span in sorted(spans):
        if groups and _overlap(groups[-1][-1], span):
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups
