"""One leaf of JAX: an array, `gradclip.IndexedSlices` of arrays, or a BCOO."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.sparse import BCOO

from gradclip.core.sparse import IndexedSlices
from gradclip.kernels.cpu import leaves as host

SPARSE = (BCOO, IndexedSlices)
_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex arrays"


def values_of(leaf: Any) -> Any:
    """What holds the elements of a leaf."""
    if isinstance(leaf, BCOO):
        return leaf.data
    return leaf.values if isinstance(leaf, IndexedSlices) else leaf


def checked(leaf: Any, path: Callable[[], str]) -> Any:
    """What holds the elements, of a dtype that is clipped."""
    values = values_of(leaf)
    if not isinstance(values, jax.Array):
        raise TypeError(f"{path()} is {type(leaf).__name__}; gradclip clips {_ACCEPTED}")
    if not isinstance(values.dtype, np.dtype) or host.code_dtype(values.dtype) is None:
        raise TypeError(f"{path()} is {values.dtype}; gradclip clips {_ACCEPTED}")
    return values


def with_values(leaf: Any, values: Any) -> Any:
    """The same leaf with other elements."""
    if isinstance(leaf, BCOO):
        return BCOO(
            (values, leaf.indices),
            shape=leaf.shape,
            indices_sorted=leaf.indices_sorted,
            unique_indices=leaf.unique_indices,
        )
    return leaf._replace(values=values) if isinstance(leaf, IndexedSlices) else values


def places_of(leaf: BCOO, indices: Any) -> tuple[Any, Any]:
    """The place of each row of a BCOO in the array it stands for, and if it is in there.

    As in `BCOO.todense` an index below 0 counts from the end, and one that is out of range is the
    way to say that a row is not used.
    """
    batch = leaf.shape[: leaf.n_batch]
    lengths = leaf.shape[leaf.n_batch : leaf.n_batch + leaf.n_sparse]
    if math.prod(batch + lengths) >= 2**63:
        raise ValueError(f"a BCOO of shape {leaf.shape} has more places than an int64 can number")
    places = np.arange(math.prod(batch)).reshape(*batch, 1).repeat(leaf.nse, -1)
    inside = places >= 0
    for axis, length in enumerate(lengths):
        index = indices[..., axis].astype("int64")
        index = index + length * (index < 0)
        inside = inside & (index >= 0) & (index < length)
        places = places * length + index
    return places, inside
