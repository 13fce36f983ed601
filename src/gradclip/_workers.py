"""Who else holds parts of the same gradient: one integer sum, after which all decide alike.

Each worker hands in its exact total, so the sum over workers is exact whatever its order, and every
worker rounds the same integers to the same norm. What went wrong on one travels in the same sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip._exact import FLOAT32, FLOAT64, Scaled, Total, norm, normalised, total_of

Array = npt.NDArray[np.float64]

# In the words that count Inf and NaN, one worker adds 1 if it has any, and this for its flag.
_FLAG = 1 << 32


class Workers(Protocol):
    """The workers of a group, from one of them."""

    @property
    def rank(self) -> int:
        """Of this process, in the group."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum(self, vector: Any) -> Total:
        """The sum of the int64 vectors of all workers, on all of them."""


class Mpi(NamedTuple):
    """The workers of a communicator of mpi4py."""

    communicator: Any

    @property
    def rank(self) -> int:
        """Of this process."""
        return int(self.communicator.Get_rank())

    @property
    def size(self) -> int:
        """How many there are."""
        return int(self.communicator.Get_size())

    def sum(self, vector: Total) -> Total:
        """By Allreduce."""
        result = np.empty_like(vector)
        self.communicator.Allreduce(vector, result)
        return result


def workers_of(group: Any) -> Workers | None:
    """The workers of a group that no framework has a word of its own for; None for no group.

    Raises:
        TypeError: the group is no communicator.
    """
    if group is None:
        return None
    if type(group).__module__.partition(".")[0] != "mpi4py":
        raise TypeError(f"group is {group!r}; for these leaves it is a communicator of mpi4py")
    return Mpi(group)


class Joint:
    """One worker's part in a measurement in which all take part, also those that fail.

    Within ``with`` each worker calls `norm`, or `gathered`, once. One that raises before tells the
    others, so that none waits for it: they raise, too.
    """

    def __init__(self, workers: Workers, gathers: int = 0) -> None:
        """``gathers``: how many values are to be `gathered`, where it is not the `norm`."""
        self.workers = workers
        self._is_due = True
        self._shape = (workers.size + 1, max(gathers, 2)) if gathers else (len(total_of()),)

    def __enter__(self) -> Joint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._is_due:
            vector = np.zeros(self._shape, np.int64).ravel()
            vector[-1] = _FLAG
            self.workers.sum(vector)

    def agree(self) -> None:
        """Go on if all workers do, before something else that all have to take part in.

        Raises:
            RuntimeError: another worker has failed.
        """
        self._sum(np.zeros(self._shape, np.int64).ravel(), wide=False)
        self._is_due = True

    def norm(self, total: Any, *, wide: bool) -> tuple[Scaled, bool]:
        """The norm of the parts of all workers, and if it is float64, as one of them may ask.

        Raises:
            RuntimeError: another worker has failed.
        """
        # What a device has added up is carried there, and stays there until the workers' sum.
        vector: Any = normalised(total) if isinstance(total, np.ndarray) else total
        vector[-2:] = vector[-2:] > 0
        together, is_wide = self._sum(vector, wide=wide)
        return norm(together, FLOAT64 if is_wide else FLOAT32), is_wide

    def gathered(self, values: Sequence[float], *, wide: bool) -> tuple[Array, bool]:
        """The float64 values of all workers, one row each, and if one of them says ``wide``.

        Raises:
            RuntimeError: another worker has failed.
        """
        vector = np.zeros(self._shape, np.int64)
        vector[self.workers.rank, : len(values)] = np.array(values, np.float64).view(np.int64)
        together, is_wide = self._sum(vector.ravel(), wide=wide)
        rows = together.reshape(vector.shape)[:-1, : len(values)]
        return np.ascontiguousarray(rows).view(np.float64), is_wide

    def _sum(self, vector: Any, *, wide: bool) -> tuple[Total, bool]:
        """The sum, what it says of flags taken off its last two words."""
        vector[-2] += wide * _FLAG
        self._is_due = False
        together = self.workers.sum(vector)
        failed, is_wide = together[-1] // _FLAG, together[-2] >= _FLAG
        if failed:
            raise RuntimeError(
                f"{failed} of {self.workers.size} workers failed before their norms were added "
                "up; the reason is in the error of each. Nothing has been written"
            )
        together[-2:] %= _FLAG
        return together, bool(is_wide)
