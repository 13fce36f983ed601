"""Arrays times a factor, rounded once."""

from __future__ import annotations

import math
from typing import Any

from gradclip.kernels.traced.numbers import (
    ONE,
    Number,
    codes_of,
    float64_of,
    is_inf,
    is_nan,
    normal,
    split,
    to_places,
)
from gradclip.kernels.traced.operations import Operations, by_parts


def scaled(ops: Operations, x: Any, factor: Number) -> Any:
    """An array times a factor of 53 bits, or 24 for leaves of 32 bits or fewer."""

    def new(x: Any) -> Any:
        return (_scaled_wide if ops.dtype(x) == "float64" else _scaled_narrow)(ops, x, factor)

    return by_parts(ops, new, x)


def _scaled_narrow(ops: Operations, x: Any, factor: Number) -> Any:
    """X of 32 bits or fewer times the factor in float32: the product is exact in float64."""
    places, last = to_places(ops, factor, 24, -(1 << 21))
    # A factor below 2^-1000 takes every float32 to zero; it stays above zero, as inf does times it.
    scaled = ops.cast(places, "float64") * _power(ops, ops.maximum(last, -1000))
    scaled = ops.where(factor.nan, math.nan, ops.maximum(scaled, 2.0**-1000))
    codes = codes_of(ops, x)
    sign = codes & -(1 << 31)
    product = float64_of(ops, codes) * scaled
    return narrowed(ops, product, sign, ops.dtype(x))


def narrowed(ops: Operations, wide: Any, sign: Any, dtype: str) -> Any:
    """Float64 numbers as float32, and that as a dtype; ``sign`` has the bit of a float32's."""
    subnormal = ops.cast(ops.round(abs(wide) * 2.0**149), "int32") | sign
    rounded = ops.cast(wide, "float32")
    result = ops.where(abs(wide) < 2.0**-126, ops.bitcast(subnormal, "float32"), rounded)
    if dtype == "float32":
        return result
    if dtype != "bfloat16":
        return ops.cast(result, dtype)
    magnitude = ops.bitcast(result, "int32") & 0x7FFFFFFF
    nearest = ops.right(magnitude + 0x7FFF + (ops.right(magnitude, 16) & 1), 16)
    nearest = ops.where(magnitude > 0x7F800000, ops.right(magnitude, 16) | 0x40, nearest)
    return ops.bitcast(ops.cast(nearest | (ops.right(sign, 16) & 0x8000), "uint16"), "bfloat16")


def _power(ops: Operations, exponent: Any) -> Any:
    """2^exponent as float64, of normal size."""
    return ops.bitcast(ops.left(exponent + 1023, 52), "float64")


def _scaled_wide(ops: Operations, x: Any, factor: Number) -> Any:
    """float64 x times the factor, in integers."""
    bits = ops.bitcast(x, "int64")
    significand, exponent = normal(ops, *split(ops, bits))
    a, b = ops.right(significand, 26), significand & ((1 << 26) - 1)
    c, d = ops.right(factor.significand, 26), factor.significand & ((1 << 26) - 1)
    mixed = a * d + b * c
    low = ops.left(mixed & ((1 << 26) - 1), 26) + b * d
    high = a * c + ops.right(mixed, 26) + ops.right(low, 52)
    low = low & (ONE - 1)
    # The product is (high + low 2^-52) 2^unit; high has 53 or 54 bits.
    unit = exponent + factor.exponent + 52
    drop = ops.maximum(ops.where(high < 2 * ONE, 0 * high, 1), -1074 - unit)
    drop = ops.minimum(drop, 60)
    kept = ops.right(high, drop)
    # Twice the rest, so that its half is an integer: against 2^drop.
    rest = 2 * (high - ops.left(kept, drop)) + ops.right(low, 51)
    more = (low & ((1 << 51) - 1)) > 0
    whole = ops.left(0 * drop + 1, drop)
    up = (rest > whole) | ((rest == whole) & (more | ((kept & 1) > 0)))
    kept = kept + ops.cast(up, "int64")
    last = unit + drop
    code = ops.where(kept < ONE, kept, ops.left(last + 1075, 52) + kept - ONE)
    result = ops.bitcast(code | (bits & -(1 << 63)), "float64")
    result = ops.where(is_nan(x) | is_inf(x), x, result)
    return ops.where(factor.nan, math.nan, result)
