"""Sums of arrays in float64, one after the other, rounded once."""

from __future__ import annotations

from functools import partial
from typing import Any

from gradclip.kernels.traced.numbers import ONE, codes_of, float64_of
from gradclip.kernels.traced.operations import Operations, by_parts
from gradclip.kernels.traced.scaling import narrowed

_MAGNITUDE = (1 << 63) - 1
_PARTS = {"complex64": "float32", "complex128": "float64"}

# Float64 numbers that are all below 2^-800 are added times 2^120, where none is subnormal.
_SMALL, _RAISE = (1023 - 800) << 52, 120 << 52
_LAST_PLACE = 2.0**-954  # of a subnormal number, raised


def added(ops: Operations, total: Any, x: Any) -> Any:
    """``total + x``, of which the total is float64 or complex128."""
    return by_parts(ops, partial(_added, ops), total, x)


def rounded(ops: Operations, total: Any, dtype: str) -> Any:
    """A total of numbers of a dtype as that dtype."""
    return by_parts(ops, partial(_rounded, ops, dtype=_PARTS.get(dtype, dtype)), total)


def _added(ops: Operations, total: Any, x: Any) -> Any:
    if ops.dtype(x) != "float64":
        return total + float64_of(ops, codes_of(ops, x))
    bits = [ops.bitcast(each, "int64") for each in (total, x)]
    small = ((bits[0] & _MAGNITUDE) < _SMALL) & ((bits[1] & _MAGNITUDE) < _SMALL)
    both = _raised(ops, bits[0]) + _raised(ops, bits[1])
    lowered = ops.bitcast(_lowered(ops, both), "float64")
    # Where one is larger, a subnormal number beside it makes no difference.
    return ops.where(small, lowered, total + x)


def _raised(ops: Operations, bits: Any) -> Any:
    """Float64 bits, of a number that is small, as it is times 2^120."""
    magnitude = bits & _MAGNITUDE
    subnormal = ops.cast(magnitude, "float64") * _LAST_PLACE
    raised = ops.where(magnitude < ONE, subnormal, ops.bitcast(magnitude + _RAISE, "float64"))
    return ops.where(bits < 0, -raised, raised)


def _lowered(ops: Operations, raised: Any) -> Any:
    """The bits of a number that was raised."""
    bits = ops.bitcast(raised, "int64")
    magnitude = bits & _MAGNITUDE
    subnormal = ops.cast(abs(raised) * (1 / _LAST_PLACE), "int64")
    return ops.where(magnitude < ONE + _RAISE, subnormal, magnitude - _RAISE) | (bits & ~_MAGNITUDE)


def _rounded(ops: Operations, total: Any, *, dtype: str) -> Any:
    if dtype == "float64":
        return total
    bits = ops.bitcast(total, "int64")
    if dtype != "float32":
        # To odd, to the 24 bits of a float32: those are rounded once more.
        cut = bits & ((1 << 29) - 1)
        bits = (bits - cut) | ops.left(ops.cast(cut > 0, "int64"), 29)
    sign = ops.cast(ops.right(bits, 32), "int32") & -(1 << 31)
    return narrowed(ops, ops.bitcast(bits, "float64"), sign, dtype)
