"""Triton: two launches measure, decide and scale in a device's memory, and the host never waits.

`measure` reads the leaves once. Its last program to finish rounds the norm, decides, and writes
both to the device. `rewrite` reads the decision there, and returns at once where there is nothing
to do.

Leaves come as a table of chunks, (address, elements, kind) in int64 each; see `_device`. Addresses
are integers, so the kernels know no framework, and one launch takes any number of tensors of any
kinds. Nothing here is NVIDIA's alone.

Every product below is exact, or rounded for good: it does not matter if a compiler contracts it
with the addition that follows.
"""

import triton
import triton.language as tl

# Elements that one program takes at a time; fewer at a chunk's end, and for exact sums, which need
# many registers.
TILE, SMALL = 4096, 512

# Kinds of elements, as `cpu.h` has them. Those of bfloat16 are taken as their codes.
F32 = tl.constexpr(0)
F64 = tl.constexpr(1)
F16 = tl.constexpr(2)
BF16 = tl.constexpr(3)

# Programs that a processor of the device runs at once, as far as registers go.
MEASURES, REWRITES = 2, 5

# What is to be done to the elements.
KEEP = tl.constexpr(0)
SCALE = tl.constexpr(1)
FILL = tl.constexpr(2)

# What becomes of the elements where the norm is NaN or inf.
POLICIES = {"nan": 0, "zero": 1, "keep": 2, "raise": 2, "torch": 3, "skip": 4}
_NAN = tl.constexpr(0)
_ZERO = tl.constexpr(1)
_TORCH = tl.constexpr(3)  # as its factor: NaN makes all NaN; inf makes what is finite 0
_SKIP = tl.constexpr(4)  # as to keep, and in an optimizer's books the step is not taken

# Where a scalar is: nowhere, in the argument itself as bits of float64, or at an address.
NONE, BITS, AT_F32, AT_F64 = 0, 1, 2, 3
_AT_F32 = tl.constexpr(2)

# Scratch, in words of 8 bytes. The ticket and the total are 0 between calls.
_TICKET = tl.constexpr(0)
_ACTION = tl.constexpr(1)
_SIGNIFICAND = tl.constexpr(2)
_EXPONENT = tl.constexpr(3)
_TOTAL = tl.constexpr(8)
_DIGITS = tl.constexpr(160)
_PARTIALS = tl.constexpr(304)
MOST_PROGRAMS = 2048
SCRATCH = 304 + MOST_PROGRAMS

# The exact total, as in `_exact`: words of 32 bits from 2^-2176 up, then counts of inf and NaN.
_WORDS = tl.constexpr(134)
_UNIT = tl.constexpr(-2176)
_MASK32 = tl.constexpr(0xFFFFFFFF)


# ---- memory ----


@triton.jit
def _at(address, dtype: tl.constexpr):
    """The pointer of an address, which the interpreter takes for an int32 where it is small."""
    return address.to(tl.int64).to(tl.pointer_type(dtype))


@triton.jit
def _word(scratch, place):
    return _at(scratch + 8 * place, tl.int64)


@triton.jit
def _float_word(scratch, place):
    return _at(scratch + 8 * place, tl.float64)


@triton.jit
def _tile(address, start, length, KIND: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Pointers to a tile of a chunk, and which of them are within it."""
    if KIND == F64:
        first = _at(address, tl.float64)
    elif KIND == F32:
        first = _at(address, tl.float32)
    elif KIND == F16:
        first = _at(address, tl.float16)
    else:
        first = _at(address, tl.uint16)
    if WHOLE:  # it begins at a multiple of 16 bytes, and so do its tiles
        first = tl.multiple_of(first + start, [16])
        pointers = first + tl.arange(0, TILE)
        inside = tl.full([TILE], True, tl.int1)
    else:
        places = start + tl.arange(0, TILE)
        pointers = first + places
        inside = places < length
    return pointers, inside


@triton.jit
def _read(pointers, inside, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Elements as float32, or float64 where they are; 0 outside."""
    if WHOLE:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=inside, other=0)
    if KIND == BF16:
        x = (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == F16:
        x = x.to(tl.float32)
    return x


@triton.jit
def _write(pointers, inside, x, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of the type that `_read` gives, rounded to their kind."""
    if KIND == BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        x = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded).to(tl.uint16)
    elif KIND == F16:
        x = x.to(tl.float16)
    if WHOLE:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=inside)


@triton.jit
def _row(table, chunk):
    """A chunk's address, number of elements and kind."""
    row = table + 24 * chunk
    return tl.load(_word(row, 0)), tl.load(_word(row, 1)), tl.load(_word(row, 2))


# ---- scalars ----


@triton.jit
def _float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _power(exponent):
    """2^exponent, of a normal float64."""
    return _float64((exponent.to(tl.int64) + 1023) << 52)


@triton.jit
def _scalar(where, value):
    """A scalar from the argument or from memory, as float64."""
    x = _float64(value)
    if where == _AT_F32:
        x = tl.load(_at(value, tl.float32)).to(tl.float64)
    elif where > _AT_F32:
        x = tl.load(_at(value, tl.float64))
    return x


@triton.jit
def _split(x):
    """Significand in [0.5, 1) and exponent of a float64 above 0; 0, inf and NaN as they are."""
    small = x < 2.2250738585072014e-308
    bits = tl.where(small, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
    field = (bits >> 52) & 0x7FF
    number = (field > 0) & (field < 0x7FF)
    significand = _float64((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000)
    exponent = tl.where(number, field - 1022 - tl.where(small, 54, 0), 0)
    return tl.where(number, significand, x), exponent


@triton.jit
def _joined(significand, exponent):
    """The float64 that is nearest; inf where it is too large, what is too small 0."""
    exponent = tl.minimum(tl.maximum(exponent, -3000), 3000)
    third = exponent // 3
    return significand * _power(third) * _power(third) * _power(exponent - 2 * third)


@triton.jit
def _to_24_bits(x):
    """To the nearest float32, its largest exponent lifted, its smallest kept."""
    large = x > 1.0
    down = tl.where(large, 1.3552527156068805e-20, 1.0)  # 2^-66
    up = tl.where(large, 73786976294838206464.0, 1.0)
    return (x * down).to(tl.float32).to(tl.float64) * up


# ---- the certified sum ----


@triton.jit
def _squares(
    sums, ends, address, length, KIND: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr
):
    """Each lane's sum of x^2 in float64: exact squares, each addition rounded."""
    whole = length // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=4):
        pointers, inside = _tile(address, start, length, KIND, True, TILE)
        x = _read(pointers, inside, KIND, True).to(tl.float64)
        sums += x * x
    for start in range(whole, length, SMALL):
        pointers, inside = _tile(address, start, length, KIND, False, SMALL)
        x = _read(pointers, inside, KIND, False).to(tl.float64)
        ends += x * x
    return sums, ends


@triton.jit
def _sum(table, chunks, TILE: tl.constexpr, SMALL: tl.constexpr):
    """This program's share of the sum of squares."""
    sums = tl.zeros([TILE], tl.float64)
    ends = tl.zeros([SMALL], tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, length, kind = _row(table, chunk)
        if kind == F16:
            sums, ends = _squares(sums, ends, address, length, F16, TILE, SMALL)
        elif kind == BF16:
            sums, ends = _squares(sums, ends, address, length, BF16, TILE, SMALL)
        else:
            sums, ends = _squares(sums, ends, address, length, F32, TILE, SMALL)
    return tl.sum(sums, 0) + tl.sum(ends, 0)


# ---- the exact sum ----
#
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
        y = x * _power(-half) * _power(half - exponent)
        # The upper 26 bits and the rest: their products are exact.
        a = _float64((y.to(tl.int64, bitcast=True) + 0x4000000) & ~0x7FFFFFF)
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
        y = x.to(tl.float64) * _power(-exponent)
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
    pointers, inside = _tile(address, start, length, KIND, WHOLE, TILE)
    x = _read(pointers, inside, KIND, WHOLE)
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
        pointers, inside = _tile(address, start, length, KIND, False, TILE)
        magnitude = _magnitude(_read(pointers, inside, KIND, False), KIND)
        infs += (magnitude == infinity).to(tl.int32)
        nans += (magnitude > infinity).to(tl.int32)
        top = tl.maximum(top, tl.where(magnitude < infinity, magnitude, 0))
    tl.atomic_add(_word(total, _WORDS), tl.sum(infs, 0).to(tl.int64), sem="relaxed")
    tl.atomic_add(_word(total, _WORDS + 1), tl.sum(nans, 0).to(tl.int64), sem="relaxed")
    return tl.max(top, 0)


@triton.jit
def _add(total, value, position):
    """Add ``value * 2^position``, in units of the total."""
    word, shift = position >> 5, position & 31
    low, high = (value & _MASK32) << shift, (value >> 32) << shift
    # The ticket that a program takes when it has finished puts these in order.
    tl.atomic_add(_word(total, word), low & _MASK32, sem="relaxed")
    tl.atomic_add(_word(total, word + 1), (low >> 32) + (high & _MASK32), sem="relaxed")
    tl.atomic_add(_word(total, word + 2), high >> 32, sem="relaxed")


@triton.jit
def _flush(total, sums, count, each, position):
    """Add every lane's sum of bits, ``each`` taken off it ``count`` times."""
    bits = tl.zeros([1], tl.float64) + each
    lanes = sums - count * bits.to(tl.int64, bitcast=True)
    # Two halves: all lanes together would not fit 64 bits.
    _add(total, tl.sum(lanes & _MASK32, 0), position)
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
            position = 2 * exponent.to(tl.int64) - _UNIT
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
def _sum_exactly(table, total, first, step, chunks, TILE: tl.constexpr):
    """Add the squares of every so many chunks to the total."""
    guess = tl.full([], 0, tl.int64)
    last = tl.full([], -1, tl.int64)
    for chunk in range(first, chunks, step):
        address, length, kind = _row(table, chunk)
        guess = tl.where(kind == last, guess, 0)
        if kind == F16:
            guess = _chunk_exactly(total, guess, address, length, F16, TILE)
        elif kind == BF16:
            guess = _chunk_exactly(total, guess, address, length, BF16, TILE)
        elif kind == F32:
            guess = _chunk_exactly(total, guess, address, length, F32, TILE)
        else:
            guess = _chunk_exactly(total, guess, address, length, F64, TILE)
        last = kind


@triton.jit
def _carry(scratch, WIDE: tl.constexpr):
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
        word = tl.load(_word(scratch, _TOTAL + place), volatile=True) + carry
        digit = word & _MASK32
        carry = word >> 32
        tl.store(_word(scratch, _DIGITS + place), digit)
        top = tl.where(digit > 0, place, top)
        bottom = tl.where((digit > 0) & (bottom > place), place, bottom)
    tl.debug_barrier()
    return top, bottom


@triton.jit
def _clear(total):
    """Have the total ready for the next call."""
    tl.debug_barrier()
    words = tl.arange(0, 256)
    tl.store(_word(total, words), tl.zeros([256], tl.int64), mask=words < _WORDS + 2)


@triton.jit
def _root(scratch, WIDE: tl.constexpr):
    """The norm of a total, rounded to float64 if it is ``WIDE``, else to float32."""
    top, bottom = _carry(scratch, WIDE)
    # Two bits of the total make one of its root: those of the result, and two to round by.
    PLACES: tl.constexpr = 53 if WIDE else 24
    LOWEST: tl.constexpr = -1074 if WIDE else -149
    root = tl.full([], 0, tl.int64)
    remainder = tl.full([], 0, tl.int64)
    digit = tl.full([], 0, tl.int64)
    place = top + 1
    bit = tl.full([], -2, tl.int32)
    while (root < (1 << (PLACES + 1))) & (top >= 0):
        if bit < 0:
            place -= 1
            bit += 32
            digit = tl.load(_word(scratch, _DIGITS + tl.maximum(place, 0)), volatile=True)
            digit = tl.where(place >= 0, digit, 0)
        remainder = (remainder << 2) | ((digit >> bit) & 3)
        trial = (root << 2) | 1
        more = remainder >= trial
        remainder = tl.where(more, remainder - trial, remainder)
        root = (root << 1) | more.to(tl.int64)
        bit -= 2
    one = tl.full([], 1, tl.int64)
    unread = digit & ((one << (bit + 2)) - 1)
    inexact = (remainder > 0) | (unread > 0) | (bottom < place)
    unit = (_UNIT + 32 * place + bit + 2) // 2

    drop = tl.minimum(tl.maximum(LOWEST - unit, 2), 62).to(tl.int64)
    places = root >> drop
    rest = root & ((one << drop) - 1)
    half = one << (drop - 1)
    up = (rest > half) | ((rest == half) & (inexact | ((places & 1) > 0)))
    places += up.to(tl.int64)
    significand, exponent = _split(places.to(tl.float64))
    total = scratch + 8 * _TOTAL
    infs = tl.load(_word(total, _WORDS), volatile=True)
    nans = tl.load(_word(total, _WORDS + 1), volatile=True)
    significand = tl.where(infs > 0, float("inf"), significand)
    significand = tl.where(nans > 0, float("nan"), significand)
    _clear(total)
    return significand, tl.where(places > 0, exponent + unit + drop, 0)


# ---- the decision ----


@triton.jit
def _decide(significand, exponent, limit, policy):
    """What is to be done to leaves of this norm, and the factor, its exponent without a limit.

    As `core.decide` has it. A limit in memory cannot be refused: NaN makes all NaN, below 0 acts as
    0.
    """
    bound, bound_exponent = _split(tl.where(limit > 0, limit, 0.0))
    bound_exponent = tl.where(bound > 0, bound_exponent, -(1 << 20))
    is_nan = significand != significand
    is_inf = significand == float("inf")
    finite = (is_nan | is_inf) == 0
    larger = (exponent > bound_exponent) | ((exponent == bound_exponent) & (significand > bound))
    above = finite & (significand > 0) & larger & (limit != float("inf"))

    quotient, shift = _split(bound / tl.where(above, significand, 1.0))
    shift += bound_exponent - exponent
    action = tl.where(above, SCALE, KEEP)
    # The value to fill with takes the place of the factor.
    as_torch = (policy == _TORCH) & (limit != float("inf"))
    zeros = is_inf & as_torch
    nans = tl.where(finite, limit != limit, (policy == _NAN) | (is_nan & as_torch))
    fill = nans | ((finite == 0) & (policy == _ZERO))
    action = tl.where(fill, FILL, tl.where(zeros, SCALE, action))
    significand = tl.where(nans, float("nan"), tl.where(fill | zeros, 0.0, quotient))
    return action, significand, tl.where(significand > 0, shift, 0)


@triton.jit
def _unscaled(significand, exponent, scale, WIDE: tl.constexpr):
    """The norm of gradients that a GradScaler has multiplied by ``scale``, rounded once more."""
    by, by_exponent = _split(scale)
    quotient = significand / by
    if not WIDE:
        quotient = quotient.to(tl.float32).to(tl.float64)
    quotient, shift = _split(quotient)
    scales = (significand > 0) & (significand < 1) & (scale != 1.0)
    return (
        tl.where(scales, quotient, significand),
        tl.where(scales, exponent + shift - by_exponent, exponent),
    )


@triton.jit
def _begin(ledger):
    """Note how an optimizer's books stand before a step: it may be taken back, or skipped."""
    tl.store(_word(ledger, 6), tl.load(_word(ledger, 0)))
    tl.store(_word(ledger, 7), tl.load(_word(ledger, 1)))
    tl.store(_word(ledger, 8), tl.load(_word(ledger, 2)))
    tl.store(_word(ledger, 9), tl.load(_word(ledger, 4)))
    tl.store(_at(ledger + 40, tl.float32), 0.0)
    tl.debug_barrier()


@triton.jit
def _skip(ledger):
    """Have an optimizer take no step, and say so in its books."""
    tl.store(_word(ledger, 0), tl.load(_word(ledger, 6)))
    tl.store(_word(ledger, 1), tl.load(_word(ledger, 7)))
    tl.store(_word(ledger, 2), tl.load(_word(ledger, 8)))
    tl.store(_word(ledger, 4), tl.load(_word(ledger, 9)) + 1)
    tl.store(_at(ledger + 40, tl.float32), 1.0)


@triton.jit
def _enter(ledger, begins, above):
    """Keep an optimizer's books of a step that is taken."""
    steps = tl.load(_word(ledger, 0)) + begins
    tl.store(_word(ledger, 0), steps)
    if above & (tl.load(_word(ledger, 2)) < steps):
        tl.store(_word(ledger, 1), tl.load(_word(ledger, 1)) + 1)
        tl.store(_word(ledger, 2), steps)


@triton.jit
def _folded(ledger, folds, scale, action, factor):
    """Say what a fused optimizer is to divide by; 1 where the factor is in it."""
    # Where the divisor is too large for float32, elements are scaled.
    divisor = scale / tl.where(factor > 0, factor, 4.9406564584124654e-324)
    divides = (folds > 0) & (action == SCALE) & (divisor < 3.4028234663852886e38)
    tl.store(_at(ledger + 24, tl.float32), tl.where(divides, divisor, scale).to(tl.float32))
    return divides


@triton.jit
def _finish(
    significand, exponent, scratch, norm_at, limit, policy,
    ledger, factor_at, begins, folds, scale_at, found_inf_at, WIDE: tl.constexpr,
):  # fmt: skip
    """Write the norm and the decision, and keep an optimizer's books, if there is one."""
    scale = tl.full([], 1.0, tl.float64)
    if scale_at != 0:
        scale = tl.load(_at(scale_at, tl.float32)).to(tl.float64)
    significand, exponent = _unscaled(significand, exponent, scale, WIDE)
    action, factor, shift = _decide(significand, exponent, limit, policy)
    if (ledger != 0) & (begins > 0):
        _begin(ledger)
    steps = True  # unless a GradScaler has found an inf: then the optimizer does nothing
    if found_inf_at != 0:
        steps = tl.load(_at(found_inf_at, tl.float32)) == 0
    if steps:
        norm = _joined(significand, exponent)
        if WIDE:
            tl.store(_at(norm_at, tl.float64), norm)
        else:
            tl.store(_at(norm_at, tl.float32), norm.to(tl.float32))
        if ledger != 0:
            whole = _joined(factor, shift)
            tl.store(_float_word(factor_at, 0), tl.where(action == KEEP, 1.0, whole))
            infinite = significand == float("inf")
            is_nan = significand != significand
            if (policy == _SKIP) & (infinite | is_nan):
                _skip(ledger)
            elif tl.load(_at(ledger + 40, tl.float32)) == 0:
                unordered = is_nan | (limit != limit)
                above = (action == SCALE) | unordered | (infinite & (limit != float("inf")))
                _enter(ledger, begins, above)
            divides = _folded(ledger, folds, scale, action, whole)
            action = tl.where(divides, KEEP, action)
    else:
        action = action * 0 + KEEP
        tl.store(_at(ledger + 24, tl.float32), scale.to(tl.float32))
        tl.store(_at(ledger + 40, tl.float32), 1.0)
    tl.store(_word(scratch, _ACTION), action.to(tl.int64))
    tl.store(_float_word(scratch, _SIGNIFICAND), factor)
    tl.store(_word(scratch, _EXPONENT), shift.to(tl.int64))


@triton.jit
def _is_last(scratch):
    """If all other programs have finished; then the ticket is ready for the next call."""
    tl.debug_barrier()
    last = tl.atomic_add(_word(scratch, _TICKET), 1) == tl.num_programs(0) - 1
    if last:
        tl.store(_word(scratch, _TICKET), tl.full([], 0, tl.int64))
    return last


# ---- the kernels ----
#
# None is compiled anew for an argument that is 1 or a multiple of 16.


@triton.jit(do_not_specialize=list(range(16)))
def measure(
    table: tl.int64, chunks: tl.int64, depth: tl.int64, scratch: tl.int64, norm_at: tl.int64,
    limit_at: tl.int64, limit: tl.int64, given_at: tl.int64, given: tl.int64, policy: tl.int64,
    ledger: tl.int64, factor_at: tl.int64, begins: tl.int64, folds: tl.int64,
    scale_at: tl.int64, found_inf_at: tl.int64,
    WIDE: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Measure the leaves of a table and decide about them; `rewrite` carries it out.

    Args:
        table: address of the chunks, of which there are ``chunks``.
        depth: how many tiles a program reads at the most.
        scratch: address of SCRATCH words.
        norm_at: where the norm goes: float64 if it is ``WIDE``, else float32.
        limit_at, limit: where clip_norm is; see `BITS`.
        given_at, given: where the norm is, if it is known already.
        policy: of POLICIES.
        ledger: address of an optimizer's, or 0. Words: 0 steps; 1 those in which a norm was not at
            most its limit; 2 the latest of these; 3 the float32 that a fused optimizer divides by;
            4 steps that were skipped; 5 a float32 that is 1 where this one is, else 0; 6 to 9 what
            words 0, 1, 2 and 4 were before it.
        factor_at: where the factor goes, float64, if there is a ledger.
        begins: 1 if a step begins, 0 if it goes on with more leaves.
        folds: 1 if the optimizer is to divide by scale / factor, and elements are not scaled.
        scale_at, found_inf_at: addresses of what a GradScaler has, in float32, or 0.
        WIDE: if a leaf is of float64.
        TILE, SMALL: elements that a program takes at a time, and at a chunk's end.
        PROGRAMS: a power of two, not below the number of programs.
    """
    total = scratch + 8 * _TOTAL
    if WIDE:
        _sum_exactly(table, total, tl.program_id(0), tl.num_programs(0), chunks, SMALL)
    else:
        share = _sum(table, chunks, TILE, SMALL)
        tl.store(_float_word(scratch, _PARTIALS + tl.program_id(0)), share)
    if _is_last(scratch):
        if given_at != 0:
            norm = _scalar(given_at, given)
            norm = tl.where((norm > 0) | (norm != norm), norm, 0.0)
            significand, exponent = _split(norm)
        elif WIDE:
            significand, exponent = _root(scratch, WIDE)
        else:
            programs = tl.arange(0, PROGRAMS)
            shares = tl.load(
                _float_word(scratch, _PARTIALS + programs),
                mask=programs < tl.num_programs(0),
                other=0.0,
                volatile=True,
            )
            # An addition errs by 2^-53 of the sum at the most (Higham, section 4.2), whatever the
            # order: in a lane, of the lanes, of the programs; the rest is for what follows here.
            sum_of_squares = tl.sum(shares, 0)
            bound = (depth + TILE + SMALL + PROGRAMS + 32).to(tl.float64) * 1.1102230246251565e-16
            low = _to_24_bits(tl.sqrt(sum_of_squares * (1 - bound)))
            high = _to_24_bits(tl.sqrt(sum_of_squares * (1 + bound)))
            significand, exponent = _split(high)
            if low < high:
                _sum_exactly(table, total, 0, 1, chunks, SMALL)
                tl.debug_barrier()
                significand, exponent = _root(scratch, WIDE)
        _finish(
            significand, exponent, scratch, norm_at, _scalar(limit_at, limit), policy,
            ledger, factor_at, begins, folds, scale_at, found_inf_at, WIDE,
        )  # fmt: skip


@triton.jit(do_not_specialize=list(range(4)))
def share(
    table: tl.int64, chunks: tl.int64, scratch: tl.int64, vector: tl.int64, SMALL: tl.constexpr
):
    """Write the exact total of the leaves, carried, to a vector of 136 words: to be added up."""
    total = scratch + 8 * _TOTAL
    _sum_exactly(table, total, tl.program_id(0), tl.num_programs(0), chunks, SMALL)
    if _is_last(scratch):
        _carry(scratch, True)
        words = tl.arange(0, 256)
        used = words < _WORDS + 2
        # The counts are no digits.
        source = tl.where(words < _WORDS, _DIGITS + words, _TOTAL + words)
        values = tl.load(_word(scratch, source), mask=used, other=0, volatile=True)
        tl.store(_word(vector, words), values, mask=used)
        _clear(total)


@triton.jit
def _rewrite_tile(
    address, start, length, action, significand, exponent,
    KIND: tl.constexpr, USUAL: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pointers, inside = _tile(address, start, length, KIND, WHOLE, TILE)
    x = _read(pointers, inside, KIND, WHOLE)
    filling = significand
    if KIND == F64:
        # The first two products are exact, or the result is 0.
        shift = tl.maximum(exponent, -1000)
        rest = tl.maximum(exponent - shift, -1200)
        half = rest // 2
        x = x * _power(half) * _power(rest - half) * (significand * _power(shift))
    elif USUAL:
        filling = significand.to(tl.float32)
        x = x * (filling * _power(exponent).to(tl.float32))
    else:  # a float32 factor would lose bits
        filling = significand.to(tl.float32)
        by = filling.to(tl.float64) * _power(tl.maximum(exponent, -900))
        x = (x.to(tl.float64) * by).to(tl.float32)
    _write(pointers, inside, tl.where(action == FILL, filling, x), KIND, WHOLE)


@triton.jit
def _rewrite_chunk(
    address, length, action, significand, exponent,
    KIND: tl.constexpr, USUAL: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    whole = length // TILE * TILE
    for start in range(0, whole, TILE):
        _rewrite_tile(
            address, start, length, action, significand, exponent, KIND, USUAL, True, TILE
        )
    for start in range(whole, length, SMALL):
        _rewrite_tile(
            address, start, length, action, significand, exponent, KIND, USUAL, False, SMALL
        )


@triton.jit
def _rewrite_chunks(
    table, chunks, action, significand, exponent,
    USUAL: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    # Tiles of as many bytes whatever the kind: each thread writes 16.
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, length, kind = _row(table, chunk)
        if kind == F16:
            _rewrite_chunk(
                address, length, action, significand, exponent, F16, USUAL, TILE // 2, SMALL
            )
        elif kind == BF16:
            _rewrite_chunk(
                address, length, action, significand, exponent, BF16, USUAL, TILE // 2, SMALL
            )
        elif kind == F32:
            _rewrite_chunk(
                address, length, action, significand, exponent, F32, USUAL, TILE // 4, SMALL
            )
        else:
            _rewrite_chunk(
                address, length, action, significand, exponent, F64, USUAL, TILE // 8, SMALL
            )


@triton.jit(do_not_specialize=list(range(6)))
def rewrite(
    table: tl.int64, chunks: tl.int64, scratch: tl.int64,
    action: tl.int64, significand: tl.int64, exponent: tl.int64,
    TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Scale or fill the leaves of a table, or leave them alone.

    Args:
        table: address of the chunks, of which there are ``chunks``.
        scratch: where `measure` has left what it decided.
        action: -1 to do that; else what to do, by a ``significand``, in bits of float64, and an
            ``exponent``.
        TILE: bytes that a program takes at a time.
        SMALL: elements that it takes at a chunk's end.
    """
    todo, by, shift = action, _float64(significand), exponent
    if action < 0:
        todo = tl.load(_word(scratch, _ACTION))
        by = tl.load(_float_word(scratch, _SIGNIFICAND))
        shift = tl.load(_word(scratch, _EXPONENT))
    if todo != KEEP:
        if shift > -120:
            _rewrite_chunks(table, chunks, todo, by, shift, True, TILE, SMALL)
        else:
            _rewrite_chunks(table, chunks, todo, by, shift, False, TILE, SMALL)
