"""Sparse leaves: rows with an index each, and adding the rows that share one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt


class IndexedSlices(NamedTuple):
    """Rows of a tensor that is zero elsewhere; rows with the same index add up.

    It stands for the dense tensor ``D`` with ``D[i] = sum of values[j] where indices[j] == i``.
    For frameworks that have no such type of their own; the fields are those of
    ``tf.IndexedSlices``.

    Attributes:
        values: array of shape (n, ...), floating or complex.
        indices: integer array of shape (n,).
        dense_shape: the shape of D, or None where it is not known.

    >>> import numpy as np
    >>> slices = IndexedSlices(np.float32([[1.5], [4], [1.5]]), np.array([7, 2, 7]), (9, 1))
    >>> import gradclip
    >>> print(gradclip.global_norm([slices]))
    5.0
    """

    values: Any
    indices: Any
    dense_shape: tuple[int, ...] | None = None


def check_rows(slices: IndexedSlices, path: Callable[[], str]) -> npt.NDArray[np.integer[Any]]:
    """The indices of slices, found to fit their values and their dense shape.

    Raises:
        ValueError: they do not.
    """
    indices = np.asarray(slices.indices)
    values_shape = tuple(np.shape(slices.values))
    if indices.dtype.kind not in "iu":
        raise ValueError(f"{path()}.indices is {indices.dtype}; indices are integers")
    if indices.ndim != 1 or not values_shape or values_shape[0] != indices.size:
        raise ValueError(
            f"{path()} has indices of shape {indices.shape} and values of shape {values_shape}; "
            "each row of values needs one index"
        )
    if indices.size and indices.min() < 0:
        raise ValueError(f"{path()}.indices holds {indices.min()}; no row has a negative index")
    if slices.dense_shape is None:
        return indices
    dense_shape = np.asarray(slices.dense_shape)
    if dense_shape.dtype.kind not in "iu" or dense_shape.ndim != 1 or not dense_shape.size:
        raise ValueError(
            f"{path()}.dense_shape is {slices.dense_shape!r}; it must be None or a tuple of lengths"
        )
    if tuple(dense_shape[1:]) != values_shape[1:]:
        raise ValueError(
            f"{path()} has dense_shape {tuple(dense_shape.tolist())} and values of shape "
            f"{values_shape}; they must agree after the first dimension"
        )
    if indices.size and indices.max() >= dense_shape[0]:
        raise ValueError(
            f"{path()}.indices holds {indices.max()}; dense_shape has {dense_shape[0]} rows"
        )
    return indices


def merged_rows(
    values: npt.NDArray[Any], indices: npt.NDArray[np.integer[Any]]
) -> Iterator[npt.NDArray[Any]] | None:
    """The rows with those of the same index added, a few at a time; None if no two share one.

    Added in float64, in the order in which they are listed: the result is defined to the bit.
    """
    order = np.argsort(indices, kind="stable")
    in_order = indices[order]
    begins = np.concatenate([[True], in_order[1:] != in_order[:-1]])
    if begins.all():
        return None
    return _sums(values, order, np.cumsum(begins) - 1)


def _sums(
    values: npt.NDArray[Any], order: npt.NDArray[np.intp], group: npt.NDArray[np.intp]
) -> Iterator[npt.NDArray[Any]]:
    """The sum of each group of rows, about 2^14 numbers at a time; group[j] is that of order[j]."""
    dtype = np.complex128 if values.dtype.kind == "c" else np.float64
    rows_at_a_time = max(1, 2**14 // max(1, values[0].size))
    for first in range(0, int(group[-1]) + 1, rows_at_a_time):
        begin, end = np.searchsorted(group, [first, first + rows_at_a_time])
        sums = np.zeros((group[end - 1] - first + 1, *values.shape[1:]), dtype)
        for at in range(begin, end, rows_at_a_time):
            some = slice(at, min(at + rows_at_a_time, end))
            with np.errstate(over="ignore", invalid="ignore"):
                # Unbuffered: each row is added in its turn.
                np.add.at(sums, group[some] - first, values[order[some]].astype(dtype))
        yield sums
