"""Elements multiplied by a factor, or filled."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.decision import FILL
from gradclip.kernels.gpu.device.memory import BF16, F16, F32, F64, chunk_of, read, tile_of, write
from gradclip.kernels.gpu.device.numbers import power_of_2


@triton.jit
def _rewrite_tile(
    address, start, length, action, significand, exponent,
    KIND: tl.constexpr, USUAL: tl.constexpr, WHOLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    pointers, inside = tile_of(address, start, length, KIND, WHOLE, TILE)
    x = read(pointers, inside, KIND, WHOLE)
    filling = significand
    if KIND == F64:
        # The first two products are exact, or the result is 0.
        shift = tl.maximum(exponent, -1000)
        rest = tl.maximum(exponent - shift, -1200)
        half = rest // 2
        x = x * power_of_2(half) * power_of_2(rest - half) * (significand * power_of_2(shift))
    elif USUAL:
        filling = significand.to(tl.float32)
        x = x * (filling * power_of_2(exponent).to(tl.float32))
    else:  # a float32 factor would lose bits
        filling = significand.to(tl.float32)
        by = filling.to(tl.float64) * power_of_2(tl.maximum(exponent, -900))
        x = (x.to(tl.float64) * by).to(tl.float32)
    write(pointers, inside, tl.where(action == FILL, filling, x), KIND, WHOLE)


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
def rewrite_chunks(
    table, chunks, action, significand, exponent,
    USUAL: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Scale or fill this program's chunks."""
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        rewrite_chunk(table, chunk, action, significand, exponent, USUAL, TILE, SMALL)


@triton.jit
def rewrite_chunk(
    table, chunk, action, significand, exponent,
    USUAL: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Scale or fill a chunk."""
    # Tiles of as many bytes whatever the kind: each thread writes 16.
    address, length, kind = chunk_of(table, chunk)
    if kind == F16:
        _rewrite_chunk(address, length, action, significand, exponent, F16, USUAL, TILE // 2, SMALL)
    elif kind == BF16:
        _rewrite_chunk(
            address, length, action, significand, exponent, BF16, USUAL, TILE // 2, SMALL
        )
    elif kind == F32:
        _rewrite_chunk(address, length, action, significand, exponent, F32, USUAL, TILE // 4, SMALL)
    else:
        _rewrite_chunk(address, length, action, significand, exponent, F64, USUAL, TILE // 8, SMALL)
