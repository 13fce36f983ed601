"""The right answer in Python integers, for ``gradclip check``: apart from all that it judges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip import IndexedSlices

Array = npt.NDArray[Any]
Leaf = Array | IndexedSlices


class Format(NamedTuple):
    """A binary format: the bits of a significand, the exponents of its ends."""

    precision: int
    lowest: int  # of the last place of the smallest number
    highest: int  # every number is below 2^highest


FORMATS = {
    "float16": Format(11, -24, 16),
    "bfloat16": Format(8, -133, 128),
    "float32": Format(24, -149, 128),
    "float64": Format(53, -1074, 1024),
}


class Truth(NamedTuple):
    """What is right for a list and a limit."""

    square: Fraction  # the sum of |x|^2
    norm_dtype: str
    limit: Fraction
    clipped: bool
    outputs: list[Array]


def truth(leaves: Sequence[Leaf], clip_norm: float) -> Truth:
    """What clipping finite leaves must give, by gradclip's definition."""
    given = [values(leaf) for leaf in leaves]
    wide = any(array.dtype.char in "dD" for array in given)
    norm_dtype = "float64" if wide else "float32"
    square = exact_square(leaves)
    norm = rounded_root(square, FORMATS[norm_dtype])
    limit = Fraction(clip_norm)
    if norm <= limit:
        return Truth(square, norm_dtype, limit, False, given)
    factor = rounded(limit / norm, 53)
    outputs = [_product(array, factor) for array in given]
    return Truth(square, norm_dtype, limit, True, outputs)


def exact_square(leaves: Sequence[Leaf]) -> Fraction:
    """The sum of ``|x|^2`` over the tensors that finite leaves stand for."""
    return sum((_exact_square(_dense(leaf)) for leaf in leaves), Fraction(0))


def _exact_square(array: Array) -> Fraction:
    magnitudes, count = np.unique(np.abs(_reals(array)), return_counts=True)
    significand, exponent = np.frexp(magnitudes.astype(np.float64))
    lowest = int(exponent.min(initial=0))
    integers = np.ldexp(significand, 53).astype(np.int64).astype(object)
    integers <<= (exponent - lowest).astype(object)
    return int(np.dot(integers * integers, count.astype(object))) * Fraction(4) ** (lowest - 53)


def rounded_root(square: Fraction, to: Format) -> Fraction:
    """``sqrt(square)`` rounded once, ties to even; the largest exponent has no limit."""
    if not square:
        return square
    exponent = (square.numerator.bit_length() - square.denominator.bit_length()) // 2 + 1
    while Fraction(4) ** exponent > square:
        exponent -= 1
    place = max(exponent - to.precision + 1, to.lowest)
    scaled = square / Fraction(4) ** place
    below = math.isqrt(math.floor(scaled))
    midpoint = (below + Fraction(1, 2)) ** 2
    up = scaled > midpoint or (scaled == midpoint and below % 2 == 1)
    return (below + up) * Fraction(2) ** place


def rounded(value: Fraction, precision: int) -> Fraction:
    """A positive number to ``precision`` bits, ties to even; the exponent has no limit."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > value
    place = Fraction(2) ** (exponent - precision + 1)
    return round(value / place) * place


def error(norm: Any, square: Fraction) -> tuple[float, float]:
    """How far a norm is off, in units of its last place and relative to the true one.

    The norm is held against the true one rounded to its own dtype.
    """
    to = FORMATS[norm.dtype.name]
    right = rounded_root(square, to)
    if right >= Fraction(2) ** to.highest:
        return (0.0, 0.0) if norm == math.inf else (math.nan, math.nan)
    if not math.isfinite(norm):
        return math.inf, math.inf
    off = Fraction(float(norm)) - right
    exponent = math.frexp(float(right))[1]
    place = Fraction(2) ** max(exponent - to.precision, to.lowest)
    return float(off / place), float(off / right) if right else float(off)


def norm_over_limit(limit: Fraction, outputs: Sequence[Leaf]) -> float:
    """The true norm of finite clipped values, as a multiple of the limit."""
    return float(rounded_root(exact_square(outputs), FORMATS["float64"]) / limit)


def same_bits(some: Sequence[Array], others: Sequence[Array]) -> bool:
    """If arrays have the same dtypes, shapes and bits."""
    return len(some) == len(others) and all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(some, others, strict=True)
    )


def values(leaf: Leaf) -> Array:
    """The values that a leaf stores."""
    return np.asarray(leaf.values if isinstance(leaf, IndexedSlices) else leaf)


def _product(array: Array, factor: Fraction) -> Array:
    reals = _reals(array)
    if reals.dtype == np.float64:
        product = np.array([float(Fraction(x) * factor) for x in reals.tolist()])
    else:
        # Two numbers of 24 bits: float64 holds their product.
        narrow = float(rounded(factor, 24))
        product = (reals.astype(np.float64) * narrow).astype(np.float32).astype(reals.dtype)
    return product.view(array.dtype).reshape(array.shape)


def _dense(leaf: Leaf) -> Array:
    if not isinstance(leaf, IndexedSlices):
        return leaf
    dense = np.zeros(leaf.dense_shape or (), np.float64)
    np.add.at(dense, leaf.indices, leaf.values)
    return dense


def _reals(array: Array) -> Array:
    """The elements in a row; of complex ones both parts."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(flat.real.dtype) if flat.dtype.kind == "c" else flat
