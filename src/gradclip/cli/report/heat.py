"""Each tensor's norms over a run, in few enough cells to be drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gradclip.record.series import Bools, Floats, Ints, cells

CELLS = 300_000  # of 4 bytes each in the page
MOST_TENSORS = 1000  # a screen has no more lines
_LARGEST = np.float32(3e38)  # that is drawn
NAN = float(np.float32(3.3e38))  # stands for NaN, which itself means "not there"; inf is more


class Heat:
    """The largest norm of each tensor in each part of a run, taken in piece by piece."""

    def __init__(self, steps: Ints, names: Sequence[str]):
        self.names = list(names)
        most = min(600, max(100, CELLS // max(1, min(len(self.names), MOST_TENSORS))))
        self.cells = cells(steps, most)
        self._steps = steps
        self._largest = np.full((self.cells.number, len(self.names)), -1, np.float64)

    def add(self, start: int, stop: int, norms: Floats, present: Bools) -> None:
        """Take in rows ``start`` to ``stop`` of the tensors' norms."""
        at, starts = np.unique(self.cells.of(self._steps[start:stop]), return_index=True)
        there = norms if present.all() else np.where(present, norms, -1)
        largest = np.maximum.reduceat(there, starts, axis=0)
        self._largest[at] = np.maximum(self._largest[at], largest)

    def image(self) -> tuple[list[str], npt.NDArray[np.float32]]:
        """The names, the first to be drawn at the top, and the cells as [names x parts].

        Of more than 1,000 tensors those are left whose norm moved most.
        """
        norms = self._largest.T
        places = np.arange(len(norms))
        if len(norms) > MOST_TENSORS:
            moved = np.array([_moved(line) for line in norms])
            places = np.sort(np.argsort(-moved, kind="stable")[:MOST_TENSORS])
        return [self.names[place] for place in places], _encoded(norms[places])


def _moved(line: Floats) -> float:
    if not np.isfinite(line).all():
        return np.inf
    there = line[line > 0]
    return float(there.max() / np.median(there)) if len(there) else 0.0


def _encoded(norms: Floats) -> npt.NDArray[np.float32]:
    coded = np.minimum(norms, _LARGEST).astype(np.float32)
    coded[np.isnan(norms)] = NAN
    coded[norms == np.inf] = np.inf
    coded[norms == -1] = np.nan
    return coded
