"""NumPy arrays and scalars, `gradclip.IndexedSlices` of them, and scipy.sparse."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from gradclip.core.exact import Scaled, ScaledArray
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.workers import Workers, nobody, workers_of
from gradclip.kernels.cpu import leaves as host
from gradclip.kernels.cpu.leaves import Array

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex arrays"
_IN_PLACE_FORMATS = ("bsr", "coo", "csc", "csr", "dia")


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
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped.
        ValueError: a sparse leaf is malformed, or there are more elements than an int64 counts;
            with ``writable``, a leaf is read-only, or elements of one or of two share memory.
    """
    values = list(leaves)
    if not values or type(values[0]) is np.ndarray:
        held = host.hold_plain(Leaves, leaves, values, path, writable=writable)
        if held is not None:
            return held
    for place, leaf in enumerate(leaves):
        values[place] = _values(leaf, partial(path, place), writable=writable)
    merged = _merged if any(map(_is_sparse, leaves)) else None
    return host.hold(Leaves, leaves, values, merged, path, writable=writable)


class Leaves(host.Leaves):
    """Arrays, and sparse ones, in this machine's memory."""

    __slots__ = ()

    def count_nonfinite(self, leaf: Any) -> tuple[int, int]:
        return host.nonfinite(_values(leaf, str, writable=False))

    def scalar(self, norm: Scaled, *, wide: bool = False) -> np.floating[Any]:
        return self.norm_of_numpy(norm, wide=wide)

    def vector(self, norms: ScaledArray, *, wide: bool = False) -> Array:
        return self.vector_of_numpy(norms, wide=wide)

    def copied(self) -> list[Any]:
        return self.rewrapped([values.copy(order="K") for values in self.values])

    def rewrapped(self, new: list[Array]) -> list[Any]:
        return [_rewrap(leaf, values) for leaf, values in zip(self.leaves, new, strict=True)]


# ---- one leaf ----


def _is_sparse(leaf: Any) -> bool:
    return isinstance(leaf, IndexedSlices) or not isinstance(leaf, np.ndarray | np.generic)


def _values(leaf: Any, path: Callable[[], str], *, writable: bool) -> Array:
    """The elements of a leaf as a plain array of an accepted dtype."""
    if isinstance(leaf, IndexedSlices):
        values = leaf.values
        if not isinstance(values, np.ndarray):
            raise TypeError(f"{path()}.values is {type(values).__name__}; it must be an array")
        check_rows(leaf, path)
    elif _is_sparse(leaf):
        values = _scipy_values(leaf, path, writable=writable)
    else:
        values = leaf
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{path()} is a masked array; fill it first: array.filled(0)")
    if host.code_dtype(values.dtype) is None:
        raise TypeError(f"{path()} is {values.dtype}; gradclip clips {_ACCEPTED}")
    if writable and isinstance(values, np.generic):
        raise ValueError(f"{path()} is a NumPy scalar, which cannot be written in place")
    return np.asarray(values)


# ---- sparse leaves ----


def _merged(leaf: Any, values: Array) -> Iterator[Array] | None:
    """The rows of a sparse leaf, those with one index added; None if each has its own."""
    if not _is_sparse(leaf):
        return None
    if isinstance(leaf, IndexedSlices):
        return merged_rows(values, np.asarray(leaf.indices))
    coordinates = leaf.tocoo(copy=False)
    shape = coordinates.shape
    if math.prod(shape) < 2**63:
        index = np.ravel_multi_index(coordinates.coords, shape)
    else:
        index = np.unique(np.stack(coordinates.coords), axis=1, return_inverse=True)[1]
    sums = merged_rows(coordinates.data, index)
    # A dia matrix stores values outside of the matrix too: only those that tocoo keeps count.
    return iter([coordinates.data]) if sums is None and leaf.format == "dia" else sums


def _scipy_values(leaf: Any, path: Callable[[], str], *, writable: bool) -> Array:
    if not hasattr(leaf, "tocoo"):  # SciPy has more than arrays
        raise TypeError(f"{path()} is {type(leaf).__name__}; gradclip clips {_ACCEPTED}")
    if leaf.format in _IN_PLACE_FORMATS:
        _check_scipy_indices(leaf, path)
        return np.asarray(leaf.data)
    if writable:
        raise TypeError(
            f"{path()} is a {type(leaf).__name__}, which cannot be scaled in place; "
            f"convert it with .tocsr(), or use clip_by_global_norm"
        )
    return np.asarray(leaf.tocoo().data)


def _check_scipy_indices(leaf: Any, path: Callable[[], str]) -> None:
    """Hold the index arrays against the shape; SciPy's own code takes them on trust."""
    if leaf.format == "dia":
        return
    if leaf.format == "coo":
        axes = dict(enumerate(leaf.coords))
    else:
        axes = {0 if leaf.format == "csc" else len(leaf.shape) - 1: leaf.indices}
        begins = leaf.indptr
        stored = min(len(leaf.indices), len(leaf.data))
        if begins[0] != 0 or (np.diff(begins) < 0).any() or begins[-1] > stored:
            raise ValueError(f"{path()}.indptr does not rise from 0 to at most {stored}")
    for axis, index in axes.items():
        length = leaf.shape[axis] // (leaf.blocksize[axis] if leaf.format == "bsr" else 1)
        if index.size and (index.min() < 0 or index.max() >= length):
            raise ValueError(
                f"{path()} has an index out of range on axis {axis} of length {length}"
            )


def _rewrap(leaf: Any, values: Array) -> Any:
    if isinstance(leaf, np.ndarray):
        return values
    if isinstance(leaf, np.generic):
        return values[()]
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=values)
    if leaf.format in _IN_PLACE_FORMATS:
        new = leaf.copy()
        new.data = values
        return new
    coordinates = leaf.tocoo()
    coordinates.data = values
    return coordinates.asformat(leaf.format)
