"""Numbers as ``significand * 2**exponent``, two int64 of which the first is not negative."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from gradclip.core.exact import FLOAT32, FLOAT64
from gradclip.kernels.traced.operations import Operations

ONE = 1 << 52  # the hidden bit of a float64


class Number(NamedTuple):
    """``significand * 2**exponent``, or what is no finite number."""

    significand: Any
    exponent: Any
    inf: Any
    nan: Any


def number_of(ops: Operations, x: Any) -> Number:
    """A scalar, its significand of 53 bits unless it is 0.

    What is traced cannot be refused: below 0 it acts as 0.
    """
    wide = x if ops.dtype(x) == "float64" else float64_of(ops, codes_of(ops, x))
    bits = ops.bitcast(wide, "int64")  # a comparison would take a subnormal number for 0
    significand, exponent = normal(ops, *split(ops, ops.where(bits < 0, 0, bits)))
    return Number(significand, exponent, x == math.inf, is_nan(x))


def is_nan(x: Any) -> Any:
    """Which elements are NaN."""
    return x != x  # noqa: PLR0124


def is_inf(x: Any) -> Any:
    """Which elements are inf, of either sign."""
    return (x == math.inf) | (x == -math.inf)


def codes_of(ops: Operations, x: Any) -> Any:
    """The bits of x as float32."""
    if ops.dtype(x) == "bfloat16":
        return ops.left(ops.cast(ops.bitcast(x, "uint16"), "int32"), 16)
    return ops.bitcast(x if ops.dtype(x) == "float32" else ops.cast(x, "float32"), "int32")


def float64_of(ops: Operations, codes: Any) -> Any:
    """The number of float32 bits as float64."""
    magnitude = codes & 0x7FFFFFFF
    subnormal = ops.cast(ops.where(codes < 0, -magnitude, magnitude), "float64") * 2.0**-149
    usual = ops.cast(ops.bitcast(codes, "float32"), "float64")
    return ops.where(magnitude < 0x00800000, subnormal, usual)


def split(ops: Operations, bits: Any) -> tuple[Any, Any]:
    """The significand and exponent of float64 bits without their sign; 0 of NaN and inf."""
    field = ops.right(bits, 52) & 0x7FF
    finite = ops.where(field < 0x7FF, bits & (ONE - 1), 0)
    hidden = ops.where((field > 0) & (field < 0x7FF), ONE, 0 * field)
    return finite | hidden, ops.maximum(field, 1) - 1075


def normal(ops: Operations, significand: Any, exponent: Any) -> tuple[Any, Any]:
    """With a significand of 53 bits; 0 stays."""
    bits = ops.bitcast(ops.cast(significand, "float64"), "int64")
    places, shift = split(ops, bits)
    return places, ops.where(significand > 0, exponent + shift, -(1 << 20))


def compared(ops: Operations, norm: Number, limit: Number) -> tuple[Any, Number]:
    """If leaves of this norm are to be scaled down, and by what factor."""
    return _is_above(norm, limit), _factor(ops, norm, limit)


def _is_above(norm: Number, limit: Number) -> Any:
    """If a finite norm is to be scaled down."""
    larger = (norm.exponent > limit.exponent) | (
        (norm.exponent == limit.exponent) & (norm.significand > limit.significand)
    )
    finite = ~(norm.inf | norm.nan)
    return finite & (((norm.significand > 0) & larger & ~limit.inf) | limit.nan)


def _factor(ops: Operations, norm: Number, limit: Number) -> Number:
    """``limit / norm`` to 53 bits, for a norm that is above."""
    divisor = ops.cast(ops.where(norm.significand > 0, norm.significand, 1), "float64")
    quotient = ops.cast(limit.significand, "float64") / divisor
    significand, exponent = split(ops, ops.bitcast(quotient, "int64"))
    exponent = ops.where(
        limit.significand > 0, exponent + limit.exponent - norm.exponent, -(1 << 20)
    )
    return Number(significand, exponent, limit.inf, limit.nan)


def to_places(ops: Operations, number: Number, precision: int, lowest: int) -> tuple[Any, Any]:
    """A significand of 53 bits rounded to so many, its last place not below ``lowest``."""
    drop = ops.minimum(ops.maximum(53 - precision, lowest - number.exponent), 55)
    odd = ops.right(number.significand, drop) & 1
    half = ops.right(ops.left(ops.cast(odd * 0 + 1, "int64"), drop), 1)
    # Ties go to even; with nothing to drop, half is 0 and nothing is added.
    more = ops.where(drop > 0, half - 1 + odd, 0)
    return ops.right(number.significand + more, drop), number.exponent + drop


def rounded(ops: Operations, number: Number, *, wide: bool) -> Any:
    """As a scalar: float64, or else float32."""
    precision, lowest = FLOAT64 if wide else FLOAT32
    bits, top = ("int64", 2047) if wide else ("int32", 255)
    hidden = 1 << (precision - 1)
    places, last = to_places(ops, number, precision, lowest)
    field = last - lowest + 1
    # A carry out of the significand goes to the exponent by itself.
    code = ops.left(field, precision - 1) + places - hidden
    code = ops.where(places < hidden, places, code)
    largest = top << (precision - 1)
    code = ops.where((field >= top) | (code > largest) | number.inf, largest, code)
    code = ops.where(number.nan, largest | (hidden >> 1), code)
    return ops.bitcast(ops.cast(code, bits), "float64" if wide else "float32")
