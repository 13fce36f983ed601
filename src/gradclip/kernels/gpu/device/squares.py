"""The sum of squares in float64: of exact squares, each addition rounded."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import BF16, F16, F32, chunk_of, read, tile_of
from gradclip.kernels.gpu.device.numbers import to_24_bits


@triton.jit
def _squares(
    sums, rest, address, length, KIND: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr
):
    """Each lane's sum of x^2 in float64: exact squares, each addition rounded."""
    whole = length // TILE * TILE
    for start in tl.range(0, whole, TILE, num_stages=4):
        pointers, inside = tile_of(address, start, length, KIND, True, TILE)
        x = read(pointers, inside, KIND, True).to(tl.float64)
        sums += x * x
    for start in range(whole, length, SMALL):
        pointers, inside = tile_of(address, start, length, KIND, False, SMALL)
        x = read(pointers, inside, KIND, False).to(tl.float64)
        rest += x * x
    return sums, rest


@triton.jit
def sum_squares(table, chunks, TILE: tl.constexpr, SMALL: tl.constexpr):
    """This program's share of the sum of squares."""
    sums = tl.zeros([TILE], tl.float64)
    rest = tl.zeros([SMALL], tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        sums, rest = _add_chunk(sums, rest, table, chunk, TILE, SMALL)
    return tl.sum(sums, 0) + tl.sum(rest, 0)


@triton.jit
def sum_chunk(table, chunk, TILE: tl.constexpr, SMALL: tl.constexpr):
    """The sum of squares of one chunk."""
    sums = tl.zeros([TILE], tl.float64)
    rest = tl.zeros([SMALL], tl.float64)
    sums, rest = _add_chunk(sums, rest, table, chunk, TILE, SMALL)
    return tl.sum(sums, 0) + tl.sum(rest, 0)


@triton.jit
def _add_chunk(sums, rest, table, chunk, TILE: tl.constexpr, SMALL: tl.constexpr):
    address, length, kind = chunk_of(table, chunk)
    if kind == F16:
        sums, rest = _squares(sums, rest, address, length, F16, TILE, SMALL)
    elif kind == BF16:
        sums, rest = _squares(sums, rest, address, length, BF16, TILE, SMALL)
    else:
        sums, rest = _squares(sums, rest, address, length, F32, TILE, SMALL)
    return sums, rest


@triton.jit
def ends(sum_of_squares, additions):
    """The float32 numbers between which the norm is: of a sum that so many additions have made.

    Each errs by 2^-53 of the sum at the most (Higham, section 4.2), whatever the order; what is
    added to their number is for what follows here.
    """
    bound = (additions + 32).to(tl.float64) * 1.1102230246251565e-16
    low = to_24_bits(tl.sqrt(sum_of_squares * (1 - bound)))
    high = to_24_bits(tl.sqrt(sum_of_squares * (1 + bound)))
    return low, high
