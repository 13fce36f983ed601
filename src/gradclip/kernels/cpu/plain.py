"""The walks of `cpu.h` in NumPy, for where no C compiler is found: the same bits, slower."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gradclip.core.exact import Part, ScaledArray, certified_norm
from gradclip.kernels.layout import Layout, layout

# Elements taken at a time: a block of the certificate's bound, and less than _square_sum can add.
_CHUNK = 4096
_LIMB = 18
_SPARE = 128  # the limbs of a number reach below its last bit, by zeros
_NARROW_WORDS = 22
_WIDE_WORDS, _WIDE_UNIT = 134, -2176


def take(arrays: list[Any], writable: bool, decode: list[bytes | None] | None) -> Any:
    """As `_cpu.take`: Leaves, or None where an array needs care or there are too many elements."""
    kinds = "efdFD" if decode is None else "efdFDHB"
    for array in arrays:
        if type(array) is not np.ndarray or array.dtype.char not in kinds:
            return None
        if writable and (not array.flags.writeable or _overlaps_itself(array)):
            return None
    if sum(array.size * (1 + (array.dtype.kind == "c")) for array in arrays) > 2**63 - 1:
        return None
    return Leaves(arrays, writable, decode or [None] * len(arrays))


def _layout(array: npt.NDArray[Any]) -> Layout:
    address, parts = array.__array_interface__["data"][0], 1 + (array.dtype.kind == "c")
    return layout(address, array.itemsize // parts, array.shape, array.strides, parts)


def _overlaps_itself(array: npt.NDArray[Any]) -> bool:
    _, span, steps = _layout(array)
    for stride, length in reversed(steps):
        if stride < span and array.size:
            return True
        span += (length - 1) * stride
    return False


class Leaves:
    """As `_cpu.Leaves`, but one thread does the whole walk."""

    most_threads = 1

    def __init__(
        self, arrays: list[npt.NDArray[Any]], writable: bool, decode: list[bytes | None]
    ) -> None:
        first: dict[Any, int] = {}
        self._arrays: list[npt.NDArray[Any] | None] = []
        for place, array in enumerate(arrays):
            real = _real(array)
            again = False
            if writable and array.size:
                again = first.setdefault((_layout(array), real.dtype), place) != place
            self._arrays.append(None if again else real)
        self._layouts = {place: found for (found, _), place in first.items()} if writable else None
        self._decode = [
            None if table is None else np.frombuffer(table, np.float32) for table in decode
        ]
        present = [array for array in self._arrays if array is not None]
        self.nbytes = 0  # no work for a second thread
        self.has_f64 = any(array.dtype.char == "d" for array in present)

    def crowded(self) -> list[tuple[int, int, int, Any]] | None:
        """As `_cpu.Leaves.crowded`, but of all that are to be written."""
        if self._layouts is None:
            return None
        return [(place, *found) for place, found in self._layouts.items()]

    def sum_squares(self, _threads: int) -> list[Part]:
        """As `_cpu.Leaves.sum_squares`."""
        high, low, has_inf, has_nan = 0.0, 0.0, False, False
        for chunk in self._chunks(narrow=True):
            block = float(np.dot(chunk, chunk))
            has_nan |= math.isnan(block)
            has_inf |= math.isinf(block)
            if math.isfinite(block):
                total = high + block  # TwoSum
                part = total - high
                low += (high - (total - part)) + (block - part)
                high = total
        return [(high, low, has_inf, has_nan)]

    def exact_squares(self, _threads: int) -> list[tuple[bytes, bytes, float]]:
        """As `_cpu.Leaves.exact_squares`; every type goes into the wide words."""
        total, infs, nans, largest = 0, 0, 0, 0.0
        for chunk in self._chunks(narrow=False):
            magnitude = np.abs(chunk)
            nans += int(np.isnan(magnitude).sum())
            infs += int(np.isinf(magnitude).sum())
            finite = magnitude[np.isfinite(magnitude)]
            if finite.size:
                largest = max(largest, float(finite.max()))
                total += _square_sum(finite)
        words = [total >> 32 * place & 0xFFFFFFFF for place in range(_WIDE_WORDS)]
        wide = np.array([*words, infs, nans], np.int64)
        narrow = np.zeros(_NARROW_WORDS + 2, np.int64)
        return [(narrow.tobytes(), wide.tobytes(), largest)]

    def norms(self, threads: int) -> tuple[bytes, bytes, list[int], list[Part]]:
        """As `_cpu.Leaves.norms`."""
        count = len(self._arrays)
        each, unsure = ScaledArray(np.zeros(count), np.zeros(count, np.int64)), []
        for number in range(count):
            only = self.only(number)
            found = None if only.has_f64 else certified_norm(only.sum_squares(threads))
            if found is None:
                unsure.append(number)
            else:
                each.significand[number], each.exponent[number] = found
        return (
            each.significand.tobytes(),
            each.exponent.tobytes(),
            unsure,
            self.sum_squares(threads),
        )

    def only(self, number: int) -> Leaves:
        """As `_cpu.Leaves.only`."""
        new = copy.copy(self)
        new._arrays, new._decode = [self._arrays[number]], [self._decode[number]]
        new._layouts = None
        array = self._arrays[number]
        new.has_f64 = array is not None and array.dtype.char == "d" and array.size > 0
        return new

    def rows(self, counts: bytes) -> Leaves | None:
        """As `_cpu.Leaves.rows`."""
        numbers = np.frombuffer(counts, np.int64).tolist()
        arrays: list[Any] = []
        decode = []
        for array, table, count in zip(self._arrays, self._decode, numbers, strict=True):
            if array is None or not array.flags.c_contiguous or array.size % count:
                return None
            arrays += list(array.reshape(count, -1))
            decode += [table] * count
        new = copy.copy(self)
        new._arrays, new._decode, new._layouts = arrays, decode, None
        return new

    def scale_each(
        self,
        source: Leaves,
        significands: bytes,
        exponents: bytes,
        recode: list[bytes | None] | None,
        threads: int,
    ) -> None:
        """As `_cpu.Leaves.scale_each`."""
        factors = np.frombuffer(significands).tolist(), np.frombuffer(exponents, np.int64).tolist()
        for number, factor in enumerate(zip(*factors, strict=True)):
            if source is not self or factor != (0.5, 1):
                table = None if recode is None else [recode[number]]
                self.only(number).scale(source.only(number), *factor, table, threads)

    def scale(
        self,
        source: Leaves,
        significand: float,
        exponent: int,
        recode: list[bytes | None] | None,
        _threads: int,
    ) -> None:
        """As `_cpu.Leaves.scale`."""
        narrow, shift, wide = _factor(significand, exponent)
        direct = narrow >= np.finfo(np.float32).smallest_normal
        tables = recode or [None] * len(self._arrays)
        for old, new, table in zip(source._arrays, self._arrays, tables, strict=True):
            if new is None or not new.size:
                continue
            walk: Any = np.nditer(
                [old, new],
                ["external_loop", "buffered"],
                [["readonly"], ["writeonly"]],
                [new.dtype.newbyteorder("=")] * 2,
                buffersize=_CHUNK,
            )
            with walk, np.errstate(all="ignore"):
                for x, out in walk:
                    if table is not None:
                        out[...] = np.frombuffer(table, np.uint8)[x]
                    elif x.dtype == np.float64:
                        out[...] = x * shift * shift * wide
                    elif direct:
                        out[...] = _encode(_decode(x, None) * np.float32(narrow), out.dtype)
                    else:
                        product = _decode(x, None).astype(np.float64) * narrow
                        out[...] = _encode(product.astype(np.float32), out.dtype)

    def _chunks(self, *, narrow: bool) -> Iterator[npt.NDArray[np.float64]]:
        """All elements as float64, which holds every type exactly."""
        for array, table in zip(self._arrays, self._decode, strict=True):
            if array is None or not array.size or (narrow and array.dtype.char == "d"):
                continue
            walk: Any = np.nditer(
                [array],
                ["external_loop", "buffered"],
                [["readonly"]],
                [array.dtype.newbyteorder("=")],
                buffersize=_CHUNK,
            )
            with walk:
                for x in walk:
                    with np.errstate(invalid="ignore"):  # a signalling NaN
                        chunk = _decode(x, table).astype(np.float64)
                    yield chunk


def _real(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A complex array as its real numbers, in the same memory."""
    if array.dtype.kind != "c":
        return array
    return np.lib.stride_tricks.as_strided(
        array.real, (*array.shape, 2), (*array.strides, array.itemsize // 2)
    )


def _decode(x: npt.NDArray[Any], table: npt.NDArray[np.float32] | None) -> npt.NDArray[Any]:
    if table is not None:
        return np.take(table, x)
    if x.dtype == np.uint16:
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x if x.dtype == np.float64 else x.astype(np.float32)


def _factor(significand: float, exponent: int) -> tuple[float, float, float]:
    """The factor of narrow dtypes, of 24 bits; and of float64 its shift and the rest of it."""
    rounded = float(np.float32(significand))
    # Below the float64 range a factor takes every float32 to zero; unless it is zero it stays above
    # zero itself, so that inf * factor is inf.
    narrow = math.ldexp(rounded, exponent) or (5e-324 if rounded else 0.0)
    # Where a factor is too small for float64, powers of two are split off: x * shift is exact, or
    # else the product rounds to zero anyway.
    halves = min(exponent + 1021, 0) // 2
    return narrow, math.ldexp(1.0, halves), math.ldexp(significand, exponent - 2 * halves)


def _encode(x: npt.NDArray[np.float32], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if dtype != np.uint16:
        return x.astype(dtype)
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _square_sum(x: npt.NDArray[np.float64]) -> int:
    """The sum of squares of finite float64 numbers, exactly, in units of 2^-2176.

    Each x is an integer of 54 bits times a power of two; its three limbs of 18 bits multiply to
    integers below 2^38, of which float64 adds up 2^14 without rounding.
    """
    significand, exponent = np.frexp(x)
    integer = np.ldexp(significand, 3 * _LIMB).astype(np.int64)
    mask = (1 << _LIMB) - 1
    a, b, c = integer >> 2 * _LIMB, integer >> _LIMB & mask, integer & mask
    lowest = int(exponent.min())
    total = 0
    for place, product in enumerate((c * c, 2 * b * c, 2 * a * c + b * b, 2 * a * b, a * a)):
        sums = np.bincount(exponent - lowest, product)
        for step in np.flatnonzero(sums).tolist():
            shift = 2 * (lowest + step - 3 * _LIMB) + _LIMB * place - _WIDE_UNIT
            total += int(sums[step]) << shift + _SPARE
    return total >> _SPARE
