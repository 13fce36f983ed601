"""Who else holds parts of the same gradient: one integer sum, after which all decide alike.

Each worker hands in its exact total, so the sum over workers is exact whatever its order, and every
worker rounds the same integers to the same norm. What went wrong on one travels in the same sum.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import FLOAT32, FLOAT64, Scaled, Total, norm, normalised, total_of

Array = npt.NDArray[np.float64]

# In the words that count Inf and NaN, one worker adds 1 if it has any, and this for its flag.
_FLAG = 1 << 32
# The square of the least float64 is 2^-2148, and the lowest word counts 2^-2176: of its 32 bits
# these are free, for a digest of what a worker was asked for. All have to add the same.
_FREE = (1 << 28) - 1


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


def nobody(leaves: Sequence[Any]) -> None:
    """Nobody: no leaf says by itself who has other parts of the same gradient."""


class Joint:
    """One worker's part in a measurement in which all take part, also those that fail.

    Within ``with`` each worker says what it was `asked` for, and calls `norm`, `gathered` or `meet`
    once. One that raises before tells the others, so that none waits for it: they raise, too. The
    first sum is of as many words in all three: one that fails need not know which it is.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._is_due = True
        self._asked = ""
        self._digest = 0

    def __enter__(self) -> Joint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and self._is_due:
            self.fail()

    def fail(self) -> None:
        """Tell the others that this one has failed."""
        vector = total_of()
        vector[-1] = _FLAG
        self._is_due = False
        self.workers.sum(vector)

    def asked(self, **settings: object) -> None:
        """What has to be the same on all workers: numbers, words and None, by name."""
        self._asked = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        self._digest = zlib.crc32(self._asked.encode()) & _FREE

    def asked_too(self, **settings: object) -> None:
        """What has to be the same beside that."""
        more = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        self._asked = f"{self._asked}, {more}"
        self._digest = zlib.crc32(self._asked.encode()) & _FREE

    def meet(self) -> None:
        """In place of a measurement, where the norm is known.

        Raises:
            RuntimeError: another worker has failed, or was asked for something else.
        """
        self._sum(total_of(), wide=False)

    def agree(self) -> None:
        """Go on if all workers do, before something else that all have to take part in.

        Raises:
            RuntimeError: another worker has failed, or does not come here, or was asked for
                something else.
        """
        digest = self._digest
        self._digest = ~digest & _FREE  # of one that measures without coming here it is another
        self._sum(total_of(), wide=False)
        self._digest, self._is_due = digest, True

    def norm(self, total: Any, *, wide: bool) -> tuple[Scaled, bool]:
        """The norm of the parts of all workers, and if it is float64, as one of them may ask.

        Raises:
            RuntimeError: another worker has failed, or was asked for something else.
        """
        # What a device has added up is carried there, and stays there until the workers' sum.
        vector: Any = normalised(total) if isinstance(total, np.ndarray) else total
        vector[-2:] = vector[-2:] > 0
        together, is_wide = self._sum(vector, wide=wide)
        return norm(together, FLOAT64 if is_wide else FLOAT32), is_wide

    def gathered(self, values: Sequence[float], *, wide: bool) -> tuple[Array, bool]:
        """The float64 values of all workers, one row each, and if one of them says ``wide``.

        Raises:
            RuntimeError: another worker has failed, or was asked for something else.
        """
        rows = np.zeros((self.workers.size, len(values)), np.int64)
        rows[self.workers.rank] = np.array(values, np.float64).view(np.int64)
        # Many workers have more of them than there are words beside the flags and the digest.
        vector, mine = total_of(), rows.ravel()
        room = len(vector) - 3
        vector[1:-2][: len(mine)] = mine[:room]
        together, is_wide = self._sum(vector, wide=wide)
        every = together[1:-2][: len(mine)]
        if len(mine) > room:
            every = np.concatenate([every, self.workers.sum(mine[room:])])
        return every.view(np.float64).reshape(rows.shape), is_wide

    def _sum(self, vector: Any, *, wide: bool) -> tuple[Total, bool]:
        """The sum, without what its first word and its last two say of other things."""
        vector[0] += self._digest
        vector[-2] += wide * _FLAG
        self._is_due = False
        together = self.workers.sum(vector)
        failed, is_wide = together[-1] // _FLAG, together[-2] >= _FLAG
        if failed:
            raise RuntimeError(
                f"{failed} of {self.workers.size} workers failed before their norms were added "
                "up; the reason is in the error of each. Nothing has been written"
            )
        together[0] -= self.workers.size * self._digest
        if together[0] & _FREE:
            raise RuntimeError(
                "the workers were not asked for the same, and all have to clip alike; rank "
                f"{self.workers.rank} of {self.workers.size} has {self._asked}. Nothing has been "
                "written"
            )
        together[-2:] %= _FLAG
        return together, bool(is_wide)
