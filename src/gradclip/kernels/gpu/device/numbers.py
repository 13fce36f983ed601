"""Scalars: from memory, taken apart, and put together."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import pointer

# Where a scalar is: nowhere, in the argument itself as bits of float64, or at an address.
NONE, BITS, AT_F32, AT_F64 = 0, 1, 2, 3
_AT_F32 = tl.constexpr(2)


@triton.jit
def float64_of(bits):
    """The float64 of these bits."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def power_of_2(exponent):
    """2^exponent, of a normal float64."""
    return float64_of((exponent.to(tl.int64) + 1023) << 52)


@triton.jit
def scalar(where, value):
    """A scalar from the argument or from memory, as float64."""
    x = float64_of(value)
    if where == _AT_F32:
        x = tl.load(pointer(value, tl.float32)).to(tl.float64)
    elif where > _AT_F32:
        x = tl.load(pointer(value, tl.float64))
    return x


@triton.jit
def split(x):
    """Significand in [0.5, 1) and exponent of a float64 above 0; 0, inf and NaN as they are."""
    small = x < 2.2250738585072014e-308
    bits = tl.where(small, x * 18014398509481984.0, x).to(tl.int64, bitcast=True)
    field = (bits >> 52) & 0x7FF
    number = (field > 0) & (field < 0x7FF)
    significand = float64_of((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000)
    exponent = tl.where(number, field - 1022 - tl.where(small, 54, 0), 0)
    return tl.where(number, significand, x), exponent


@triton.jit
def joined(significand, exponent):
    """The float64 that is nearest; inf where it is too large, what is too small 0."""
    exponent = tl.minimum(tl.maximum(exponent, -3000), 3000)
    third = exponent // 3
    return significand * power_of_2(third) * power_of_2(third) * power_of_2(exponent - 2 * third)


@triton.jit
def to_24_bits(x):
    """To the nearest float32, its largest exponent lifted, its smallest kept."""
    large = x > 1.0
    down = tl.where(large, 1.3552527156068805e-20, 1.0)  # 2^-66
    up = tl.where(large, 73786976294838206464.0, 1.0)
    return (x * down).to(tl.float32).to(tl.float64) * up
