"""What is to be done to leaves of a norm."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.numbers import split

# What is to be done to the elements.
KEEP = tl.constexpr(0)
SCALE = tl.constexpr(1)
FILL = tl.constexpr(2)

# What becomes of the elements where the norm is NaN or inf.
POLICIES = {"nan": 0, "zero": 1, "keep": 2, "raise": 2, "factor": 3, "skip": 4}
NAN = tl.constexpr(0)
ZERO = tl.constexpr(1)
FACTOR = tl.constexpr(3)  # limit / norm in any case: NaN makes all NaN; inf makes what is finite 0
SKIP = tl.constexpr(4)  # as to keep, and in an optimizer's books the step is not taken


@triton.jit
def decide(significand, exponent, limit, policy):
    """What is to be done to leaves of this norm, and the factor, its exponent without a limit.

    As `core.decide` has it. A limit in memory cannot be refused: NaN makes all NaN, below 0 acts as
    0.
    """
    bound, bound_exponent = split(tl.where(limit > 0, limit, 0.0))
    bound_exponent = tl.where(bound > 0, bound_exponent, -(1 << 20))
    is_nan = significand != significand
    is_inf = significand == float("inf")
    finite = (is_nan | is_inf) == 0
    larger = (exponent > bound_exponent) | ((exponent == bound_exponent) & (significand > bound))
    above = finite & (significand > 0) & larger & (limit != float("inf"))

    quotient, shift = split(bound / tl.where(above, significand, 1.0))
    shift += bound_exponent - exponent
    action = tl.where(above, SCALE, KEEP)
    # The value to fill with takes the place of the factor.
    by_factor = (policy == FACTOR) & (limit != float("inf"))
    zeros = is_inf & by_factor
    nans = tl.where(finite, limit != limit, (policy == NAN) | (is_nan & by_factor))
    fill = nans | ((finite == 0) & (policy == ZERO))
    action = tl.where(fill, FILL, tl.where(zeros, SCALE, action))
    significand = tl.where(nans, float("nan"), tl.where(fill | zeros, 0.0, quotient))
    return action, significand, tl.where(significand > 0, shift, 0)


@triton.jit
def unscaled(significand, exponent, scale, WIDE: tl.constexpr):
    """The norm of gradients that have been multiplied by ``scale``, rounded once more."""
    by, by_exponent = split(scale)
    quotient = significand / by
    if not WIDE:
        quotient = quotient.to(tl.float32).to(tl.float64)
    quotient, shift = split(quotient)
    scales = (significand > 0) & (significand < tl.where(scale != 1.0, 1.0, 0.0))
    return (
        tl.where(scales, quotient, significand),
        tl.where(scales, exponent + shift - by_exponent, exponent),
    )
