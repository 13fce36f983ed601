"""Elements and words in a device's memory, by their addresses."""

import triton
import triton.language as tl

# Kinds of elements, as `cpu.h` has them. Those of bfloat16 are taken as their codes.
F32 = tl.constexpr(0)
F64 = tl.constexpr(1)
F16 = tl.constexpr(2)
BF16 = tl.constexpr(3)

# Scratch, in words of 8 bytes. The ticket and the total are 0 between calls.
TICKET = tl.constexpr(0)
ACTION = tl.constexpr(1)
SIGNIFICAND = tl.constexpr(2)
EXPONENT = tl.constexpr(3)
TOTAL = tl.constexpr(8)
DIGITS = tl.constexpr(160)
PARTIALS = tl.constexpr(304)

# The exact total, as in `core.exact`: words of 32 bits from 2^-2176 up, then counts of inf and NaN.
WORDS = tl.constexpr(134)
UNIT = tl.constexpr(-2176)
MASK32 = tl.constexpr(0xFFFFFFFF)


@triton.jit
def pointer(address, dtype: tl.constexpr):
    """The pointer of an address, which the interpreter takes for an int32 where it is small."""
    return address.to(tl.int64).to(tl.pointer_type(dtype))


@triton.jit
def int64_at(words, place):
    """The pointer of one of several words, as an integer."""
    return pointer(words + 8 * place, tl.int64)


@triton.jit
def float64_at(words, place):
    """The pointer of one of several words, as a floating-point number."""
    return pointer(words + 8 * place, tl.float64)


@triton.jit
def tile_of(address, start, length, KIND: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr):
    """Pointers to a tile of a chunk, and which of them are within it."""
    if KIND == F64:
        first = pointer(address, tl.float64)
    elif KIND == F32:
        first = pointer(address, tl.float32)
    elif KIND == F16:
        first = pointer(address, tl.float16)
    else:
        first = pointer(address, tl.uint16)
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
def read(pointers, inside, KIND: tl.constexpr, WHOLE: tl.constexpr):
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
def write(pointers, inside, x, KIND: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of the type that `read` gives, rounded to their kind."""
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
def chunk_of(table, chunk):
    """A chunk's address, number of elements and kind."""
    row = table + 24 * chunk
    return tl.load(int64_at(row, 0)), tl.load(int64_at(row, 1)), tl.load(int64_at(row, 2))
