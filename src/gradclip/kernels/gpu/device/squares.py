"""The sum of squares in float64: of exact squares, each addition rounded."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import BF16, F16, F32, chunk_of, read, tile_of


@triton.jit
def _squares(
    sums, ends, address, length, KIND: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr
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
        ends += x * x
    return sums, ends


@triton.jit
def sum_squares(table, chunks, TILE: tl.constexpr, SMALL: tl.constexpr):
    """This program's share of the sum of squares."""
    sums = tl.zeros([TILE], tl.float64)
    ends = tl.zeros([SMALL], tl.float64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        address, length, kind = chunk_of(table, chunk)
        if kind == F16:
            sums, ends = _squares(sums, ends, address, length, F16, TILE, SMALL)
        elif kind == BF16:
            sums, ends = _squares(sums, ends, address, length, BF16, TILE, SMALL)
        else:
            sums, ends = _squares(sums, ends, address, length, F32, TILE, SMALL)
    return tl.sum(sums, 0) + tl.sum(ends, 0)
