"""Arrays of toyarrays: float32 and float64, in this machine's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradclip.core.exact import Scaled
from gradclip.core.workers import Workers, nobody, workers_of
from gradclip.kernels.cpu import leaves as host
from toyarrays import Array


def workers(leaves: Sequence[Any], group: Any) -> Workers | None:  # noqa: ARG001
    """Who holds parts of the same gradient: a communicator of mpi4py."""
    return workers_of(group)


everyone = nobody


def hold(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    *,
    writable: bool,
    beside: Any = None,  # noqa: ARG001  (nothing follows what becomes of an array)
) -> Leaves:
    """Check the leaves and take hold of their memory."""
    values = [_values(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    return host.hold(Leaves, leaves, values, None, path, writable=writable)


class Leaves(host.Leaves):
    """Arrays in this machine's memory."""

    __slots__ = ()

    def count_nonfinite(self, leaf: Array) -> tuple[int, int]:
        """How many elements are NaN, and how many are inf."""
        return host.nonfinite(_values(leaf, str))

    def scalar(self, norm: Scaled, *, wide: bool = False) -> Array:
        """The norm as an array of shape ()."""
        return _array(np.asarray(self.norm_of_numpy(norm, wide=wide)))

    def copied(self) -> list[Array]:
        """New leaves, bit for bit the old ones."""
        return self.rewrapped(self.values)

    def rewrapped(self, new: list[host.Array]) -> list[Array]:
        """The leaves again, with new elements."""
        return list(map(_array, new))


def _values(leaf: Array, path: Callable[[], str]) -> host.Array:
    """The elements as an array of the same memory."""
    if leaf.dtype not in ("float32", "float64"):
        raise TypeError(f"{path()} is {leaf.dtype}; gradclip clips float32 and float64 arrays")
    return np.ndarray(leaf.shape, leaf.dtype, leaf.memory)


def _array(values: host.Array) -> Array:
    return Array(bytearray(values.tobytes()), values.dtype.name, values.shape)
