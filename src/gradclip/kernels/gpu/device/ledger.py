"""An optimizer's books: words in memory, as `measure` lists them."""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.decision import KEEP, SCALE, SKIP
from gradclip.kernels.gpu.device.memory import float64_at, int64_at, pointer


@triton.jit
def begin(ledger):
    """Note how the books stand before a step: it may be taken back, or skipped."""
    tl.store(int64_at(ledger, 6), tl.load(int64_at(ledger, 0)))
    tl.store(int64_at(ledger, 7), tl.load(int64_at(ledger, 1)))
    tl.store(int64_at(ledger, 8), tl.load(int64_at(ledger, 2)))
    tl.store(int64_at(ledger, 9), tl.load(int64_at(ledger, 4)))
    tl.store(pointer(ledger + 40, tl.float32), 0.0)
    tl.debug_barrier()


@triton.jit
def _skip(ledger):
    """No step is to be taken."""
    tl.store(int64_at(ledger, 0), tl.load(int64_at(ledger, 6)))
    tl.store(int64_at(ledger, 1), tl.load(int64_at(ledger, 7)))
    tl.store(int64_at(ledger, 2), tl.load(int64_at(ledger, 8)))
    tl.store(int64_at(ledger, 4), tl.load(int64_at(ledger, 9)) + 1)
    tl.store(pointer(ledger + 40, tl.float32), 1.0)


@triton.jit
def _enter(ledger, begins, above):
    """A step is taken."""
    steps = tl.load(int64_at(ledger, 0)) + begins
    tl.store(int64_at(ledger, 0), steps)
    if above & (tl.load(int64_at(ledger, 2)) < steps):
        tl.store(int64_at(ledger, 1), tl.load(int64_at(ledger, 1)) + 1)
        tl.store(int64_at(ledger, 2), steps)


@triton.jit
def _folded(ledger, folds, scale, action, factor):
    """Say what a fused optimizer is to divide by; 1 where the factor is in it."""
    # Where the divisor is too large for float32, elements are scaled.
    divisor = scale / tl.where(factor > 0, factor, 4.9406564584124654e-324)
    divides = (folds > 0) & (action == SCALE) & (divisor < 3.4028234663852886e38)
    tl.store(pointer(ledger + 24, tl.float32), tl.where(divides, divisor, scale).to(tl.float32))
    return divides


@triton.jit
def stay(ledger, scale):
    """Have the optimizer do nothing, but undo a scale if it is called all the same."""
    tl.store(pointer(ledger + 24, tl.float32), scale.to(tl.float32))
    tl.store(pointer(ledger + 40, tl.float32), 1.0)


@triton.jit
def keep_books(
    ledger, factor_at, norm, limit, skip, policy, action, factor, begins, folds, scale
):  # fmt: skip
    """Enter what is decided; what is left to be done to the elements."""
    infinite = norm == float("inf")
    is_nan = norm != norm
    skips = skip | ((policy == SKIP) & (infinite | is_nan))
    action = tl.where(skips, KEEP, action)
    tl.store(float64_at(factor_at, 0), tl.where(action == KEEP, 1.0, factor))
    tl.store(float64_at(factor_at, 1), limit)
    if skips:
        _skip(ledger)
    elif tl.load(pointer(ledger + 40, tl.float32)) == 0:
        unordered = is_nan | (limit != limit)
        above = (action == SCALE) | unordered | (infinite & (limit != float("inf")))
        _enter(ledger, begins, above)
    divides = _folded(ledger, folds, scale, action, factor)
    return tl.where(divides, KEEP, action)
