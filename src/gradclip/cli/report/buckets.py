"""The steps of a run in few enough buckets to be drawn, each with its smallest and largest."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gradclip.record.series import Floats, Ints

if TYPE_CHECKING:
    from gradclip.record.events import Run

MOST = 2000  # a screen is not wider
SHARES = 120  # bars of the share of clipped steps


class Buckets:
    """Neighbouring steps, as many in each bucket."""

    def __init__(self, run: Run, most: int = MOST):
        self._run = run
        self.size = max(1, -(-len(run.steps) // most))
        self._starts = np.arange(0, len(run.steps), self.size)
        self._counts = np.diff(self._starts, append=len(run.steps))

    @property
    def first(self) -> Ints:
        """The first step of each."""
        return self._run.steps[self._starts]

    @property
    def last(self) -> Ints:
        """The last step of each."""
        return self._run.steps[self._starts + self._counts - 1]

    def largest(self, values: Floats) -> Floats:
        """The largest that is known; NaN where none is."""
        return np.fmax.reduceat(values, self._starts)

    def smallest(self, values: Floats) -> Floats:
        """The smallest that is known; NaN where none is."""
        return np.fmin.reduceat(values, self._starts)

    def share(self, which: npt.NDArray[np.bool_]) -> Floats:
        """In what part of the steps something was so."""
        return np.add.reduceat(which, self._starts, dtype=np.float64) / self._counts


def where(values: Floats, which: npt.NDArray[np.bool_]) -> Floats:
    """The values where something is so, NaN elsewhere."""
    return np.where(which, values, np.nan)
