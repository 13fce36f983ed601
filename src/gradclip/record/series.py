"""What is usual for a series of norms: its recent past, jumps out of it, slow growth in it.

All is done in logarithms, in which a norm that doubles moves as far from 0.01 as from 100.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Logs = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

WINDOW = 128  # values of the past that tell what is usual
FEWEST = 16  # with fewer of them nothing is said
WANDER = 7.0  # a growth of fewer deviations may be one of the ups and downs before it
QUARTERS = 1.349  # the quarters of a normal distribution are this many deviations apart


def logarithms(norms: npt.NDArray[np.floating]) -> Logs:
    """The logarithms, NaN for what has none: 0, NaN and inf."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs: Logs = np.log(norms).astype(np.float32)
    logs[np.isinf(logs)] = np.nan
    return logs


class Past:
    """The last values of several series, and what is usual among them."""

    def __init__(self, series: int):
        self._logs = np.full((series, WINDOW), np.nan, np.float32)
        self._end = 0

    def add(self, logs: Logs) -> None:
        """Take in rows of one value for each series."""
        logs = logs[-WINDOW:]
        places = (self._end + np.arange(len(logs))) % WINDOW
        self._logs[:, places] = logs.T
        self._end = int(self._end + len(logs)) % WINDOW

    def bound(self, least: float, deviations: float) -> Logs:
        """The logarithm above which a value of each series is a jump; inf where nothing is known.

        That is ``deviations`` of the series' own beyond its median, more where few values are
        known, and at least ``least`` times the median. Quartiles tell the deviation, of which a
        few values far out do not change much.
        """
        ordered = np.sort(self._logs, axis=1)  # NaN last
        known = np.isfinite(ordered).sum(1)
        low, median, high = (_at(ordered, known, part) for part in (0.25, 0.5, 0.75))
        few = 1 + 8 / np.maximum(known, 1)
        room = np.maximum(np.log(least), deviations * few * (high - low) / QUARTERS)
        return np.where(known < FEWEST, np.inf, median + room).astype(np.float32)


def _at(ordered: Logs, known: npt.NDArray[np.intp], part: float) -> Logs:
    place = (part * np.maximum(known - 1, 0)).astype(np.intp)
    return np.take_along_axis(ordered, place[:, None], axis=1)[:, 0]


class Cells(NamedTuple):
    """Equal parts of a run, each long enough that nearly all of them have a value."""

    first: int  # step
    width: int  # in steps
    number: int

    def of(self, steps: Ints) -> Ints:
        """The cell of each step."""
        return (steps - self.first) // self.width

    @property
    def middles(self) -> Floats:
        """The step in the middle of each cell."""
        starts: Ints = self.first + np.arange(self.number) * self.width
        return starts.astype(np.float64) + (self.width - 1) / 2


def cells(steps: Ints, most: int) -> Cells:
    """Part a run into at most so many cells.

    Near a fault each step has values, elsewhere maybe one in a hundred: nine tenths of the run lie
    between values that are at most ``spacing`` apart.
    """
    if not len(steps):
        return Cells(0, 1, 0)
    first, span = int(steps[0]), int(steps[-1] - steps[0]) + 1
    gaps = np.sort(np.diff(steps, append=steps[-1] + 1))
    spacing = int(gaps[np.searchsorted(np.cumsum(gaps), 0.9 * gaps.sum())])
    width = spacing * -(-span // (most * spacing))
    return Cells(first, width, -(-span // width))


class Means:
    """The mean logarithm of several series in each cell of a run."""

    def __init__(self, parts: Cells, series: int):
        self.cells = parts
        self._total = np.zeros((parts.number, series))
        self._known = np.zeros((parts.number, series), np.int64)

    def add(self, steps: Ints, logs: Logs) -> None:
        """Take in rows of one value for each series, in the order of their steps."""
        if not len(steps):
            return
        at, starts = np.unique(self.cells.of(steps), return_index=True)
        known = ~np.isnan(logs)
        self._total[at] += np.add.reduceat(np.where(known, logs, 0), starts, dtype=np.float64)
        self._known[at] += np.add.reduceat(known, starts, dtype=np.int64)

    @property
    def values(self) -> Floats:
        """The means, [cells x series]; NaN where nothing is known."""
        nothing = np.full_like(self._total, np.nan)
        return np.divide(self._total, self._known, out=nothing, where=self._known > 0)


def means(rows: Floats) -> Floats:
    """The mean of each column over what is known; NaN where nothing is."""
    known = np.isfinite(rows)
    total = np.where(known, rows, 0).sum(0)
    mean = np.full(len(total), np.nan)
    np.divide(total, known.sum(0), out=mean, where=known.any(0))
    return mean


class Drift(NamedTuple):
    """A steady growth of one series, from one block to another."""

    series: int
    first: float  # a position among the blocks
    last: float


def drifts(blocks: Floats, least: float) -> list[Drift]:
    """The steady growths, one for each series at most, to ``least`` times its norm or more.

    Args:
        blocks: mean logarithms, [blocks x series]; NaN where nothing is known.
        least: how many times the norm a growth must reach.
    """
    settled = len(blocks) // 100 + 1  # a run's first steps are like no others
    width = 5 if len(blocks) >= 64 else 3
    smooth = _smoothed(_filled(blocks[settled:]), width)
    if len(smooth) < 2 * width:
        return []
    rises = smooth - np.fmin.accumulate(smooth, axis=0)
    rises[np.isnan(rises)] = 0
    shift = settled + width // 2
    found = []
    for series in np.flatnonzero(rises.max(0, initial=0) >= np.log(least)):
        span = _steady(smooth[:, series], int(rises[:, series].argmax()), width)
        if span is not None:
            found.append(Drift(int(series), span[0] + shift, span[1] + shift))
    return found


def _steady(line: Floats, top: int, width: int) -> tuple[float, float] | None:
    """Where the rise to ``top`` begins and ends; None if it is in one go."""
    bottom = int(np.nanargmin(line[: top + 1]))
    rise = float(line[top] - line[bottom])
    height = (line[bottom : top + 1] - line[bottom]) / rise
    noise = _deviation(line[width:] - line[:-width]) / math.sqrt(2)
    if rise < WANDER * max(_deviation(line[:bottom]), noise):
        return None
    begin = int(np.flatnonzero(height <= 0.2)[-1])
    end = begin + int(np.flatnonzero(height[begin:] >= 0.8)[0])
    middle = height[begin : end + 1]
    if len(middle) < width + 2 or _straightness(middle) < 0.8:
        return None
    # Smoothing makes a step as long as its width.
    if (middle[width:] - middle[:-width]).max() > 0.5:
        return None
    beyond = (end - begin) / 3
    return max(0.0, bottom + begin - beyond), min(float(top), bottom + end + beyond)


def _deviation(line: Floats) -> float:
    """How far the values lie from each other; 0 if there are too few to tell."""
    known = line[np.isfinite(line)]
    if len(known) < FEWEST:
        return 0.0
    low, high = np.quantile(known, (0.25, 0.75))
    return float(high - low) / QUARTERS


def _straightness(line: Floats) -> float:
    """The square of the correlation with a straight line."""
    return float(np.corrcoef(line, np.arange(len(line)))[0, 1] ** 2)


def _filled(blocks: Floats) -> Floats:
    """The blocks, those without a value with that of the last one before."""
    known = np.isfinite(blocks)
    last = np.maximum.accumulate(np.where(known, np.arange(len(blocks))[:, None], 0), axis=0)
    return np.take_along_axis(blocks, last, axis=0)


def _smoothed(blocks: Floats, width: int) -> Floats:
    if len(blocks) < width:
        return blocks[:0]
    windows: Floats = np.lib.stride_tricks.sliding_window_view(blocks, width, axis=0)
    return np.asarray(windows.mean(-1))
