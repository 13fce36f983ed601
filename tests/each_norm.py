"""The norm of each leaf as `gradclip.norms` must give it, and leaves of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np

import gradclip
import oracle
from cases import DTYPES, WIDE, Array, numbers

SHAPES = [(), (0,), (7,), (3, 5), (33,), (2, 1, 16), (1,), (3, 0, 2), (16,)]


def expected(leaves: list[Any]) -> Array:
    """Each is rounded as that leaf alone, then put in a vector, where it may become inf."""
    dtype = np.float64 if any(map(oracle.is_wide, leaves)) else np.float32
    found = []
    for leaf in leaves:
        exact, _ = oracle.norm([leaf])
        found.append(exact if isinstance(exact, float) else oracle.as_float(exact))
    with np.errstate(over="ignore"):
        return np.array(found, np.float64).astype(dtype)


def assert_norms(found: gradclip.Norms, leaves: list[Any]) -> None:
    """Every bit of the vector and of the global norm."""
    values, norm = np.asarray(found.values), np.asarray(found.global_norm)
    wanted, (_, wanted_norm) = expected(leaves), oracle.norm(leaves)
    assert (values.dtype, values.shape) == (wanted.dtype, wanted.shape)
    np.testing.assert_array_equal(values, wanted)
    assert norm.dtype == wanted_norm.dtype
    np.testing.assert_array_equal(norm, wanted_norm)


def random_leaves(rng: np.random.Generator, names: list[str]) -> list[Array]:
    """Of these dtypes in turn, in shapes that stay the same: each list is compiled once."""
    found = []
    for place, shape in enumerate(SHAPES):
        dtype = DTYPES[names[place % len(names)]]
        found.append(numbers(rng, dtype, int(np.prod(shape))).reshape(shape))
    return found


def hard_leaves(name: str) -> list[Array]:
    """NaN, inf, squares that over- and underflow, subnormal numbers, nothing."""
    dtype = DTYPES[name]
    unit = 1 + 1j if dtype.kind == "c" else 1
    large, small = (1e300, 5e-324) if name in WIDE else (3e38, 1e-45)
    rows = [
        [np.nan, 1],
        [np.inf, 1],
        [large] * 3,
        [small] * 5,
        [0, -0.0],
        [],
        [3, 4],
        [np.nan, np.inf],
    ]
    with np.errstate(all="ignore"):
        return [(np.array(row, np.float64) * unit).astype(dtype) for row in rows]


def sparse_leaves(rng: np.random.Generator, name: str) -> list[gradclip.IndexedSlices]:
    """Rows of one index, which are added first; none of one; none at all."""
    dtype = DTYPES[name]
    rows = [[3, 0, 3, 3, 1], [4, 2, 0, 1, 3], [0, 0, 0, 0, 0]]
    leaves = [
        gradclip.IndexedSlices(numbers(rng, dtype, 10).reshape(5, 2), np.array(x)) for x in rows
    ]
    return [*leaves, gradclip.IndexedSlices(np.zeros((0, 2), dtype), np.zeros(0, np.int64))]
