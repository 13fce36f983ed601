"""The root of an exact sum of squares."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import DIGITS, MASK32, TOTAL, UNIT, WORDS, int64_at
from gradclip.kernels.gpu.device.numbers import split


@triton.jit
def carry(scratch, WIDE: tl.constexpr):
    """Write the total's words as digits in [0, 2^32); the highest and the lowest that is not 0.

    To a place of their own: every thread reads the words, and only one of them writes.
    """
    # Of narrow kinds only some words are used.
    FIRST: tl.constexpr = 0 if WIDE else 56
    LAST: tl.constexpr = 134 if WIDE else 86
    carry = tl.full([], 0, tl.int64)
    top = tl.full([], -1, tl.int32)
    bottom = tl.full([], 134, tl.int32)
    for place in range(FIRST, LAST):
        word = tl.load(int64_at(scratch, TOTAL + place), volatile=True) + carry
        digit = word & MASK32
        carry = word >> 32
        tl.store(int64_at(scratch, DIGITS + place), digit)
        top = tl.where(digit > 0, place, top)
        bottom = tl.where((digit > 0) & (bottom > place), place, bottom)
    tl.debug_barrier()
    return top, bottom


@triton.jit
def clear(total):
    """Have the total ready for the next call."""
    tl.debug_barrier()
    words = tl.arange(0, 256)
    tl.store(int64_at(total, words), tl.zeros([256], tl.int64), mask=words < WORDS + 2)


@triton.jit
def root_of_total(scratch, WIDE: tl.constexpr):
    """The norm of a total, rounded to float64 if it is ``WIDE``, else to float32."""
    LOWEST: tl.constexpr = -1074 if WIDE else -149
    root, unit, inexact = _cut_off(scratch, WIDE)
    drop = tl.minimum(tl.maximum(LOWEST - unit, 2), 62).to(tl.int64)
    one = tl.full([], 1, tl.int64)
    places = root >> drop
    rest = root & ((one << drop) - 1)
    half = one << (drop - 1)
    up = (rest > half) | ((rest == half) & (inexact | ((places & 1) > 0)))
    places += up.to(tl.int64)
    significand, exponent = split(places.to(tl.float64))
    total = scratch + 8 * TOTAL
    infs = tl.load(int64_at(total, WORDS), volatile=True)
    nans = tl.load(int64_at(total, WORDS + 1), volatile=True)
    significand = tl.where(infs > 0, float("inf"), significand)
    significand = tl.where(nans > 0, float("nan"), significand)
    clear(total)
    return significand, tl.where(places > 0, exponent + unit + drop, 0)


@triton.jit
def _cut_off(scratch, WIDE: tl.constexpr):
    """The root's bits, those of the result and two to round by; their unit; if more follow."""
    PLACES: tl.constexpr = 53 if WIDE else 24
    top, bottom = carry(scratch, WIDE)
    root = tl.full([], 0, tl.int64)
    remainder = tl.full([], 0, tl.int64)
    digit = tl.full([], 0, tl.int64)
    place = top + 1
    bit = tl.full([], -2, tl.int32)
    while (root < (1 << (PLACES + 1))) & (top >= 0):
        if bit < 0:
            place -= 1
            bit += 32
            digit = tl.load(int64_at(scratch, DIGITS + tl.maximum(place, 0)), volatile=True)
            digit = tl.where(place >= 0, digit, 0)
        # Two bits of the total make one of its root.
        remainder = (remainder << 2) | ((digit >> bit) & 3)
        trial = (root << 2) | 1
        more = remainder >= trial
        remainder = tl.where(more, remainder - trial, remainder)
        root = (root << 1) | more.to(tl.int64)
        bit -= 2
    one = tl.full([], 1, tl.int64)
    unread = digit & ((one << (bit + 2)) - 1)
    inexact = (remainder > 0) | (unread > 0) | (bottom < place)
    return root, (UNIT + 32 * place + bit + 2) // 2, inexact
