"""The exact accumulator: merge totals, round their root correctly; and the certificate.

A *total* is a fixed number of int64 words that hold a sum of squares exactly,

    sum of |x|^2 = sum over j of words[j] * 2^(32 j - 2176),

followed by the count of Inf and the count of NaN among the x. Totals merge by integer addition,
which no order or grouping can change. Every finite float64 squared, 2^64 times over, fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Total = npt.NDArray[np.int64]

WORDS = 134
UNIT = -2176
_NARROW_WORDS = 22
_NARROW_UNIT = -384
_NARROW_AT = (_NARROW_UNIT - UNIT) // 32
_COUNTS = 2
NARROW = slice(_NARROW_AT, _NARROW_AT + _NARROW_WORDS)  # the words of float32 and narrower


class Scaled(NamedTuple):
    """A real number as ``significand * 2**exponent``, the exponent without a limit.

    The significand lies in [0.5, 1), or is 0, inf or NaN.
    """

    significand: float
    exponent: int

    @classmethod
    def of(cls, value: float) -> Scaled:
        """Split a float, exactly."""
        return cls(*math.frexp(value))

    def __float__(self) -> float:
        """The nearest float64; inf where it is too large for one."""
        try:
            return math.ldexp(self.significand, self.exponent)
        except OverflowError:
            return math.inf


class ScaledArray(NamedTuple):
    """Several numbers as `Scaled` has one."""

    significand: npt.NDArray[np.float64]
    exponent: npt.NDArray[np.int64]

    @classmethod
    def of(cls, numbers: Iterable[Scaled]) -> ScaledArray:
        """Numbers, one after the other."""
        pairs = list(numbers)
        return cls(
            np.array([each.significand for each in pairs], np.float64),
            np.array([each.exponent for each in pairs], np.int64),
        )

    def singly(self) -> list[Scaled]:
        """The numbers, one by one."""
        pairs = zip(self.significand.tolist(), self.exponent.tolist(), strict=True)
        return [Scaled(*each) for each in pairs]

    def are_one(self) -> bool:
        """If each of them is exactly 1."""
        significand, exponent = Scaled.of(1.0)
        return bool((self.significand == significand).all() and (self.exponent == exponent).all())

    def floats(self) -> npt.NDArray[np.float64]:
        """The nearest float64 numbers; inf where one is too large."""
        with np.errstate(over="ignore", under="ignore"):
            found: npt.NDArray[np.float64] = np.ldexp(
                self.significand, np.clip(self.exponent, -(1 << 20), 1 << 20).astype(np.int32)
            )
        return found

    def rounded(self, *, wide: bool) -> npt.NDArray[Any]:
        """The nearest numbers of float64 if ``wide``, else of float32."""
        with np.errstate(over="ignore", under="ignore"):
            return self.floats().astype(np.float64 if wide else np.float32)


class Format(NamedTuple):
    """What rounding to a binary format needs to know: bits, and the exponent of the last place."""

    precision: int
    lowest: int


FLOAT32 = Format(24, -149)
FLOAT64 = Format(53, -1074)


def total_of(narrow: bytes = b"", wide: bytes = b"") -> Total:
    """The total of a kernel's words: unit 2^-384 for float32 and narrower, 2^-2176 for float64."""
    total = np.zeros(WORDS + _COUNTS, np.int64)
    if wide:
        total += np.frombuffer(wide, np.int64)
    if narrow:
        words = np.frombuffer(narrow, np.int64)
        total[_NARROW_AT : _NARROW_AT + _NARROW_WORDS] += words[:_NARROW_WORDS]
        total[WORDS:] += words[_NARROW_WORDS:]
    return total


def merge(totals: Iterable[Total]) -> Total:
    """Add totals: of threads, pieces or workers, in any order; 2^31 of them at the most."""
    return sum(totals, start=total_of())


def normalised(total: Total) -> Total:
    """The same total, each word but the last below 2^32: 2^31 of them add up without overflow."""
    new = total.copy()
    digits = square(total).to_bytes(4 * WORDS, "little")
    new[:WORDS] = np.frombuffer(digits, "<u4")
    return new


def counts(total: Total) -> tuple[int, int]:
    """How many Inf and how many NaN were met."""
    return int(total[WORDS]), int(total[WORDS + 1])


def square(total: Total) -> int:
    """The sum of squares in units of 2^-2176."""
    words = total[:WORDS]
    low = (words & 0xFFFFFFFF).astype("<u4").tobytes()
    high = (words >> 32).astype("<u4").tobytes()
    return int.from_bytes(low, "little") + (int.from_bytes(high, "little") << 32)


def norm(total: Total, to: Format) -> Scaled:
    """The root of a total, rounded once, ties to even; NaN or inf if an element was."""
    infs, nans = counts(total)
    if nans or infs:
        return Scaled(math.nan if nans else math.inf, 0)
    return root(square(total), UNIT, to)


def root(integer: int, unit: int, to: Format) -> Scaled:
    """``sqrt(integer * 2**unit)`` to the nearest number of a format, ties to even.

    The format's smallest exponent is kept to, its largest is not. ``unit`` is even.
    """
    if not integer:
        return Scaled(0.0, 0)
    exponent = (integer.bit_length() + 1) // 2 + unit // 2  # 2^(exponent-1) <= root < 2^exponent
    last_place = max(exponent - to.precision, to.lowest)
    # The root is wanted in half units of the last place: one bit to round on.
    shift = unit - 2 * last_place + 2
    scaled = integer << shift if shift >= 0 else integer >> -shift
    inexact = shift < 0 and scaled << -shift != integer
    halves = math.isqrt(scaled)
    inexact = inexact or halves * halves != scaled
    places, half = divmod(halves, 2)
    if half and (inexact or places % 2):
        places += 1
    significand, exponent = math.frexp(places)
    return Scaled(significand, exponent + last_place)


# What one thread adds up in float64, high + low, and if there was an inf, and a NaN.
Part = tuple[float, float, bool, bool]


# A block of 4096 squares, each exact, added in any order errs by less than 4095 u, u = 2^-53
# (Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2). The double-double
# sum of up to 2^25 blocks errs by less than u; rounding S, S (1 - e), S (1 + e) and the two roots
# by less than 8 u more.
_BOUND = (4096 + 16) * 2.0**-53


def certified_norm(parts: Sequence[Part]) -> Scaled | None:
    """The correctly rounded float32 norm, if float64 sums prove it; else None.

    The true sum lies within ``S (1 - e)`` and ``S (1 + e)``. Rounding is monotone: where the roots
    of both ends round to one number, the true root does too.
    """
    if any(has_nan for _, _, _, has_nan in parts):
        return Scaled(math.nan, 0)
    if any(has_inf for _, _, has_inf, _ in parts):
        return Scaled(math.inf, 0)
    total = math.fsum(term for high, low, _, _ in parts for term in (high, low))
    low = _round24(math.sqrt(total * (1 - _BOUND)))
    high = _round24(math.sqrt(total * (1 + _BOUND)))
    return low if low == high else None


# The last place of a float64 of this size is that of a float32 below 1.
_AT_24_BITS = 1.5 * 2.0**28


def _round24(value: float) -> Scaled:
    """To the nearest float32, its largest exponent lifted, its smallest kept."""
    significand, exponent = math.frexp(value)
    if exponent < -125:
        return Scaled.of(float(np.float32(value)))
    # Ties go to even, as everywhere: the size itself is even in that place.
    significand, carry = math.frexp(significand + _AT_24_BITS - _AT_24_BITS)
    return Scaled(significand, exponent + carry)
