"""The exact sum of squares, by integers."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import (
    BF16,
    F16,
    F32,
    F64,
    MASK32,
    UNIT,
    WORDS,
    chunk_of,
    int64_at,
    read,
    tile_of,
)
from gradclip.kernels.gpu.device.numbers import float64_of, power_of_2

# A chunk is scaled by a power of two so that its largest |x| is below 2. The square, split by
# adding and subtracting C1 and C2 (and C3 for float64), becomes multiples of u1 = 2^-49,
# u2 = 2^-99 and u3 = 2^-149, whose bit patterns add up as integers in any order. That takes the
# elements of a window of 26 binades (float64: 22). Those outside of it take further rounds.

_C1 = tl.constexpr(12.0)  # 1.5 * 2^52 u1
_C2 = tl.constexpr(1.5 * 2.0**-47)
_C3 = tl.constexpr(1.5 * 2.0**-97)


@triton.jit
def _magnitude(x, KIND: tl.constexpr):
    """The bits of |x|, which are in the order of |x|."""
    if KIND == F64:
        magnitude = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        magnitude = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return magnitude


@triton.jit
def _window(top, KIND: tl.constexpr):
    """The window whose largest magnitude this is: its exponent, from where and up to where."""
    if KIND == F64:
        # Not below 2^-1003: what is left of a smaller square would be below the total's unit.
        field = tl.maximum(top >> 52, 20)
        low, high = tl.maximum(field - 22, 0) << 52, (field + 1) << 52
        exponent = field - 1023
    else:
        field = tl.maximum(top >> 23, 1)
        low, high = tl.maximum(field - 26, 0) << 23, (field + 1) << 23
        exponent = field - 127
    return exponent, tl.maximum(low, 1), high


@triton.jit
def _limbs(x, exponent, KIND: tl.constexpr):
    """The bits of the multiples of u1, u2 and u3 that add up to (x / 2^exponent)^2, plus C1..C3."""
    if KIND == F64:
        half = exponent // 2
        y = x * power_of_2(-half) * power_of_2(half - exponent)
        # The upper 26 bits and the rest: their products are exact.
        a = float64_of((y.to(tl.int64, bitcast=True) + 0x4000000) & ~0x7FFFFFF)
        b = y - a
        square, product = a * a, 2.0 * a * b
        h = square + product
        rest = product - (h - square) + b * b
        t1 = h + _C1
        r1 = h - (t1 - _C1)
        t2, more = r1 + _C2, rest + _C2
        t3 = (r1 - (t2 - _C2)) + (rest - (more - _C2)) + _C3
        s2 = t2.to(tl.int64, bitcast=True) + more.to(tl.int64, bitcast=True)
        s3 = t3.to(tl.int64, bitcast=True)
    else:
        y = x.to(tl.float64) * power_of_2(-exponent)
        square = y * y
        t1 = square + _C1
        t2 = square - (t1 - _C1) + _C2
        s2 = t2.to(tl.int64, bitcast=True)
        s3 = s2 * 0
    return t1.to(tl.int64, bitcast=True), s2, s3


@triton.jit
def _add_tile(
    s1, s2, s3, outside, address, start, length, exponent, low, high, most,
    KIND: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pointers, inside = tile_of(address, start, length, KIND, WHOLE, TILE)
    x = read(pointers, inside, KIND, WHOLE)
    magnitude = _magnitude(x, KIND)
    magnitude = tl.where(magnitude <= most, magnitude, 0)
    within = (magnitude >= low) & (magnitude < high)
    m1, m2, m3 = _limbs(tl.where(within, x, 0.0), exponent, KIND)
    outside = tl.maximum(outside, tl.where(within, 0, magnitude))
    return s1 + m1, s2 + m2, s3 + m3, outside


@triton.jit
def _round(address, length, exponent, low, high, most, KIND: tl.constexpr, TILE: tl.constexpr):
    """A chunk's elements of one window, of those up to a magnitude; the largest that is left."""
    s1 = tl.zeros([TILE], tl.int64)
    s2 = tl.zeros([TILE], tl.int64)
    s3 = tl.zeros([TILE], tl.int64)
    outside = (s1 * 0).to(low.dtype)
    whole = length // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=8):
        s1, s2, s3, outside = _add_tile(
            s1, s2, s3, outside, address, start, length, exponent, low, high, most,
            KIND, True, TILE,
        )  # fmt: skip
    if whole < length:
        s1, s2, s3, outside = _add_tile(
            s1, s2, s3, outside, address, whole, length, exponent, low, high, most,
            KIND, False, TILE,
        )  # fmt: skip
    return s1, s2, s3, tl.max(outside, 0)


@triton.jit
def _survey(total, address, length, infinity, KIND: tl.constexpr, TILE: tl.constexpr):
    """The largest finite magnitude of a chunk; counts its inf and NaN."""
    top = (tl.zeros([TILE], tl.int64)).to(infinity.dtype)
    infs = tl.zeros([TILE], tl.int32)
    nans = tl.zeros([TILE], tl.int32)
    for start in range(0, length, TILE):
        pointers, inside = tile_of(address, start, length, KIND, False, TILE)
        magnitude = _magnitude(read(pointers, inside, KIND, False), KIND)
        infs += (magnitude == infinity).to(tl.int32)
        nans += (magnitude > infinity).to(tl.int32)
        top = tl.maximum(top, tl.where(magnitude < infinity, magnitude, 0))
    tl.atomic_add(int64_at(total, WORDS), tl.sum(infs, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(int64_at(total, WORDS + 1), tl.sum(nans, 0).to(tl.int64), sem="relaxed")
    return tl.max(top, 0)


@triton.jit
def _add(total, value, position):
    """Add ``value * 2^position``, in units of the total."""
    word, shift = position >> 5, position & 31
    low, high = (value & MASK32) << shift, (value >> 32) << shift
    # The ticket that a program takes when it has finished puts these in order.
    tl.atomic_add(int64_at(total, word), low & MASK32, sem="relaxed")
    tl.atomic_add(int64_at(total, word + 1), (low >> 32) + (high & MASK32), sem="relaxed")
    tl.atomic_add(int64_at(total, word + 2), high >> 32, sem="relaxed")


@triton.jit
def _flush(total, sums, count, each, position):
    """Add every lane's sum of bits, ``each`` taken off it ``count`` times."""
    bits = tl.zeros([1], tl.float64) + each
    lanes = sums - count * bits.to(tl.int64, bitcast=True)
    # Two halves: all lanes together would not fit 64 bits.
    _add(total, tl.sum(lanes & MASK32, 0), position)
    _add(total, tl.sum(lanes >> 32, 0), position + 32)


@triton.jit
def _chunk_exactly(total, guess, address, length, KIND: tl.constexpr, TILE: tl.constexpr):
    """Add a chunk's squares to the total; its largest magnitude is a guess for the next one."""
    if KIND == F64:
        infinity = tl.full([], 0x7FF0000000000000, tl.int64)
        most = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)  # a NaN may have all bits set
    else:
        infinity = tl.full([], 0x7F800000, tl.int32)
        most = tl.full([], 0x7FFFFFFF, tl.int32)
    top = guess.to(infinity.dtype)
    best = guess.to(infinity.dtype)
    tiles = (length + TILE - 1) // TILE
    again = 1
    while again > 0:
        exponent, low, high = _window(top, KIND)
        s1, s2, s3, left = _round(address, length, exponent, low, high, most, KIND, TILE)
        if left >= high:  # the guess was too low
            top = _survey(total, address, length, infinity, KIND, TILE)
            best = top
            most = infinity - 1
            again = (top > 0).to(tl.int32)
        else:
            position = 2 * exponent.to(tl.int64) - UNIT
            _flush(total, s1, tiles, _C1, position - 49)
            if KIND == F64:
                _flush(total, s2, 2 * tiles, _C2, position - 99)
                _flush(total, s3, tiles, _C3, position - 149)
            else:
                _flush(total, s2, tiles, _C2, position - 99)
            top = left
            most = low - 1
            again = (left > 0).to(tl.int32)
    return best.to(tl.int64)


@triton.jit
def add_chunk_exactly(table, total, chunk, guess, last, TILE: tl.constexpr):
    """Add the squares of a chunk; for the next one, this one's largest magnitude and its kind."""
    address, length, kind = chunk_of(table, chunk)
    guess = tl.where(kind == last, guess, 0)
    if kind == F16:
        guess = _chunk_exactly(total, guess, address, length, F16, TILE)
    elif kind == BF16:
        guess = _chunk_exactly(total, guess, address, length, BF16, TILE)
    elif kind == F32:
        guess = _chunk_exactly(total, guess, address, length, F32, TILE)
    else:
        guess = _chunk_exactly(total, guess, address, length, F64, TILE)
    return guess, kind


@triton.jit
def add_exactly(table, total, first, step, chunks, TILE: tl.constexpr):
    """Add the squares of every so many chunks to the total."""
    guess = tl.full([], 0, tl.int64)
    last = tl.full([], -1, tl.int64)
    for chunk in range(first, chunks, step):
        guess, last = add_chunk_exactly(table, total, chunk, guess, last, TILE)
