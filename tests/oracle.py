"""The specification in Python integers: exact, slow, and apart from gradclip's own code.

A finite number is an integer times a power of two, ``(integer, exponent)``. Nothing here imports
gradclip but the type of its sparse leaf, which has no arithmetic in it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gradclip import IndexedSlices

Array = npt.NDArray[Any]


class Format(NamedTuple):
    """A binary format: the bits of its significand, and the exponent of its last place of all."""

    precision: int
    lowest: int


FLOAT32 = Format(24, -149)
FLOAT64 = Format(53, -1074)
FORMATS = {
    "float16": Format(11, -24),
    "bfloat16": Format(8, -133),
    "float32": FLOAT32,
    "float64": FLOAT64,
    "float8_e3m4": Format(5, -6),
    "float8_e4m3": Format(4, -9),
    "float8_e4m3b11fnuz": Format(4, -13),
    "float8_e4m3fn": Format(4, -9),
    "float8_e4m3fnuz": Format(4, -10),
    "float8_e5m2": Format(3, -16),
    "float8_e5m2fnuz": Format(3, -17),
}
UNLIMITED = -(10**9)
UNIT = 2 * FLOAT64.lowest  # every product of two float64 numbers is a multiple of 2^UNIT


class Clipped(NamedTuple):
    """What a call must return; ``leaves`` is None where it must raise FloatingPointError."""

    norm: np.floating[Any]
    leaves: list[Array] | None
    kept: bool  # if every output must be bit for bit its input


def round_to(number: tuple[int, int], to: Format) -> tuple[int, int]:
    """Round to nearest, ties to even; the largest exponent has no limit."""
    integer, exponent = number
    last_place = max(integer.bit_length() + exponent - to.precision, to.lowest)
    dropped = last_place - exponent
    if dropped <= 0:
        return number
    half = 1 << dropped - 1
    whole, rest = integer >> dropped, integer & (2 * half - 1)
    return whole + (rest > half or (rest == half and whole & 1)), last_place


def parts(array: Array) -> list[float]:
    """The real numbers in an array, exactly, as Python floats; a complex element holds two."""
    if array.dtype.kind == "c":
        flat = array.astype(np.complex128).ravel()
        return [part for x in flat.tolist() for part in (x.real, x.imag)]
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return array.astype(np.float64).ravel().tolist()


def split(x: float) -> tuple[int, int]:
    """A finite float as (integer, exponent)."""
    numerator, denominator = x.as_integer_ratio()
    return numerator, 1 - denominator.bit_length()


def square_sum(numbers: list[float]) -> int:
    """The sum of squares of finite floats, in units of 2^UNIT."""
    total = 0
    for x, times in Counter(map(abs, numbers)).items():
        integer, exponent = split(x)
        total += times * integer * integer << 2 * exponent - UNIT
    return total


def root(square: int, to: Format) -> tuple[int, int]:
    """``sqrt(square * 2^UNIT)``, rounded once."""
    spare = 2 * max(0, 200 - square.bit_length())
    whole = math.isqrt(square << spare)
    below = whole * whole != square << spare
    return round_to((2 * whole + below, (UNIT - spare) // 2 - 1), to)


def quotient(over: tuple[int, int], under: tuple[int, int], to: Format) -> tuple[int, int]:
    """``over / under``, rounded once."""
    spare = 100 + under[0].bit_length()
    whole, rest = divmod(over[0] << spare, under[0])
    return round_to((2 * whole + (rest != 0), over[1] - under[1] - spare - 1), to)


def as_float(number: tuple[int, int]) -> float:
    """A number that a float64 holds exactly, or that is too large for one."""
    try:
        return math.ldexp(*number)
    except OverflowError:
        return math.inf


def is_less_or_equal(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Compare two numbers."""
    lowest = min(a[1], b[1])
    return a[0] << a[1] - lowest <= b[0] << b[1] - lowest


def stored(leaf: Any) -> Array:
    """The values that a leaf stores."""
    if isinstance(leaf, IndexedSlices):
        return np.asarray(leaf.values)
    if hasattr(leaf, "tocoo"):
        return np.asarray(leaf.tocoo().data if leaf.format in ("dok", "lil") else leaf.data)
    return np.asarray(leaf)


def measured(leaf: Any) -> list[float]:
    """The real numbers of the tensor a leaf stands for: rows with one index are added first."""
    if isinstance(leaf, IndexedSlices):
        values, rows = leaf.values, np.asarray(leaf.indices).tolist()
    elif hasattr(leaf, "tocoo"):
        coordinates = leaf.tocoo()
        values = coordinates.data
        rows = list(zip(*(axis.tolist() for axis in coordinates.coords), strict=True))
    else:
        return parts(np.asarray(leaf))
    sums: dict[Any, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        new = parts(np.asarray(value))
        old = sums.setdefault(row, [0.0] * len(new))
        sums[row] = [a + b for a, b in zip(old, new, strict=True)]
    return [x for row in sums.values() for x in row]


def is_wide(leaf: Any) -> bool:
    """If the leaf makes the norm float64 and is scaled in float64."""
    return stored(leaf).dtype.newbyteorder("=") in (np.float64, np.complex128)


def norm(leaves: list[Any]) -> tuple[tuple[int, int] | float, np.floating[Any]]:
    """The global norm with no limit on its exponent (or inf or NaN), and as it is returned."""
    wide = any(map(is_wide, leaves))
    scalar = np.float64 if wide else np.float32
    numbers = [x for leaf in leaves for x in measured(leaf)]
    if any(map(math.isnan, numbers)):
        return math.nan, scalar(math.nan)
    if any(map(math.isinf, numbers)):
        return math.inf, scalar(math.inf)
    exact = root(square_sum(numbers), FLOAT64 if wide else FLOAT32)
    value = as_float(exact)
    too_large = not wide and value >= 2.0**128
    return exact, scalar(math.inf if too_large else value)


def scaled(leaf: Any, factor: tuple[int, int]) -> Array:
    """``RN_dtype(RN_work(x * c))`` for every stored x."""
    values = stored(leaf)
    work = FLOAT64 if is_wide(leaf) else FLOAT32
    if work is FLOAT32:
        factor = round_to(factor, Format(24, UNLIMITED))
    real = {"complex64": "float32", "complex128": "float64"}
    to = FORMATS[real.get(values.dtype.name, values.dtype.name)]
    numbers = parts(values)
    products = {
        x: _product(x, factor, work, to) for x in set(map(abs, numbers)) if math.isfinite(x)
    }
    new = np.array([math.copysign(products.get(abs(x), x), x) for x in numbers], np.float64)
    if values.dtype.kind == "c":
        new = new.view(np.complex128)
    return new.astype(values.dtype).reshape(values.shape)


def _product(x: float, factor: tuple[int, int], work: Format, to: Format) -> float:
    integer, exponent = split(x)
    product = round_to((integer * factor[0], exponent + factor[1]), work)
    return math.ldexp(*round_to(product, to))


def clip(
    leaves: list[Any],
    clip_norm: float,
    use_norm: float | None = None,
    on_nonfinite: str = "nan",
) -> Clipped:
    """What ``clip_by_global_norm`` must return for these leaves."""
    if use_norm is None:
        exact, returned = norm(leaves)
    else:
        scalar = np.float64 if any(map(is_wide, leaves)) else np.float32
        with np.errstate(over="ignore", under="ignore"):
            returned = scalar(use_norm)
        exact = split(use_norm) if math.isfinite(use_norm) else use_norm
    values = [stored(leaf) for leaf in leaves]
    if isinstance(exact, float):
        if on_nonfinite == "raise":
            return Clipped(returned, None, False)
        if on_nonfinite == "keep":
            return Clipped(returned, values, True)
        fill = math.nan if on_nonfinite == "nan" else 0.0
        return Clipped(returned, [_full_like(array, fill) for array in values], False)
    if not exact[0] or math.isinf(clip_norm) or is_less_or_equal(exact, split(clip_norm)):
        return Clipped(returned, values, True)
    factor = quotient(split(clip_norm), exact, Format(53, UNLIMITED))
    return Clipped(returned, [scaled(leaf, factor) for leaf in leaves], False)


def _full_like(array: Array, value: float) -> Array:
    both = complex(value, value) if array.dtype.kind == "c" else value
    return np.full(array.shape, both, array.dtype)
