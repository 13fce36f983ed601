"""Triton: two launches measure, decide and scale in a device's memory, and the host never waits.

`measure` reads the leaves once. Its last program to finish rounds the norm, decides, and writes
both to the device. `rewrite` reads the decision there, and returns at once where there is nothing
to do.

Leaves come as a table of chunks, (address, elements, kind) in int64 each; see `runs`. Addresses
are integers, so the kernels know no framework, and one launch takes any number of tensors of any
kinds. Nothing here is NVIDIA's alone.

Every product below is exact, or rounded for good: it does not matter if a compiler contracts it
with the addition that follows.
"""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.decision import KEEP, decide, unscaled
from gradclip.kernels.gpu.device.exact import add_exactly
from gradclip.kernels.gpu.device.ledger import begin, keep_books, stay
from gradclip.kernels.gpu.device.limits import copy_rule, judge
from gradclip.kernels.gpu.device.memory import (
    ACTION,
    DIGITS,
    EXPONENT,
    PARTIALS,
    SIGNIFICAND,
    TICKET,
    TOTAL,
    WORDS,
    float64_at,
    int64_at,
    pointer,
)
from gradclip.kernels.gpu.device.numbers import float64_of, joined, scalar, split
from gradclip.kernels.gpu.device.root import carry, clear, root_of_total
from gradclip.kernels.gpu.device.scaling import rewrite_chunks
from gradclip.kernels.gpu.device.squares import ends, sum_squares

# Elements that one program takes at a time; fewer at a chunk's end, and for exact sums, which need
# many registers.
TILE, SMALL = 4096, 512

# Programs that a processor of the device runs at once, as far as registers go.
MEASURES, REWRITES = 2, 5

MOST_PROGRAMS = 2048
SCRATCH = PARTIALS.value + MOST_PROGRAMS


@triton.jit
def _finish(
    significand, exponent, scratch, norm_at, limit, policy,
    ledger, factor_at, begins, folds, scale_at, found_inf_at, before, after,
    WIDE: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Write the norm and the decision, and keep an optimizer's books, if there is one."""
    scale = tl.full([], 1.0, tl.float64)
    if scale_at != 0:
        scale = tl.load(pointer(scale_at, tl.float32)).to(tl.float64)
    significand, exponent = unscaled(significand, exponent, scale, WIDE)
    norm = joined(significand, exponent)
    if (ledger != 0) & (begins > 0):
        begin(ledger)
    # Unless an inf was found in scaled gradients: then the optimizer does nothing.
    steps = tl.full([], True, tl.int1)
    if found_inf_at != 0:
        steps = tl.load(pointer(found_inf_at, tl.float32)) == 0
    skip = tl.full([], False, tl.int1)
    if KIND > 0:
        copy_rule(before, after)
        first = tl.full([], 0, tl.int64)
        limit, _, skip = judge(before, after, 1, first, True, norm, norm, steps, KIND, False)
        skip = skip & (significand < 1)  # what is not finite goes by the policy
    bound = tl.where(skip, 0.0, limit)
    if KIND > 0:
        bound = tl.where(significand < 1, bound, 1.0)  # inf would only measure
    action, factor, shift = decide(significand, exponent, bound, policy)
    if steps:
        if WIDE:
            tl.store(pointer(norm_at, tl.float64), norm)
        else:
            tl.store(pointer(norm_at, tl.float32), norm.to(tl.float32))
        if ledger != 0:
            action = keep_books(
                ledger, factor_at, significand, limit, skip, policy,
                action, joined(factor, shift), begins, folds, scale,
            )  # fmt: skip
    else:
        action = action * 0 + KEEP
        stay(ledger, scale)
    tl.store(int64_at(scratch, ACTION), action.to(tl.int64))
    tl.store(float64_at(scratch, SIGNIFICAND), factor)
    tl.store(int64_at(scratch, EXPONENT), shift.to(tl.int64))


@triton.jit
def _is_last(scratch):
    """If all other programs have finished; then the ticket is ready for the next call."""
    tl.debug_barrier()
    last = tl.atomic_add(int64_at(scratch, TICKET), 1) == tl.num_programs(0) - 1
    if last:
        tl.store(int64_at(scratch, TICKET), tl.full([], 0, tl.int64))
    return last


@triton.jit
def _certified(
    table, chunks, depth, scratch, TILE: tl.constexpr, SMALL: tl.constexpr, PROGRAMS: tl.constexpr
):
    """The float32 norm of the programs' shares; of the exact sum where their error leaves two."""
    programs = tl.arange(0, PROGRAMS)
    shares = tl.load(
        float64_at(scratch, PARTIALS + programs),
        mask=programs < tl.num_programs(0),
        other=0.0,
        volatile=True,
    )
    # Additions in a lane, of the lanes, of the programs.
    low, high = ends(tl.sum(shares, 0), depth + TILE + SMALL + PROGRAMS)
    significand, exponent = split(high)
    if low < high:
        add_exactly(table, scratch + 8 * TOTAL, 0, 1, chunks, SMALL)
        tl.debug_barrier()
        significand, exponent = root_of_total(scratch, False)
    return significand, exponent


@triton.jit(do_not_specialize=list(range(18)))
def measure(
    table: tl.int64, chunks: tl.int64, depth: tl.int64, scratch: tl.int64, norm_at: tl.int64,
    limit_at: tl.int64, limit: tl.int64, given_at: tl.int64, given: tl.int64, policy: tl.int64,
    ledger: tl.int64, factor_at: tl.int64, begins: tl.int64, folds: tl.int64,
    scale_at: tl.int64, found_inf_at: tl.int64, before: tl.int64, after: tl.int64,
    WIDE: tl.constexpr, KIND: tl.constexpr,
    TILE: tl.constexpr, SMALL: tl.constexpr, PROGRAMS: tl.constexpr,
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
        factor_at: where the factor goes, and then the limit, float64, if there is a ledger.
        begins: 1 if a step begins, 0 if it goes on with more leaves.
        folds: 1 if the optimizer is to divide by scale / factor, and elements are not scaled.
        scale_at, found_inf_at: addresses, or 0: of what gradients have been multiplied by, and if
            that made an inf, both in float32.
        before, after: addresses of what a limit that learns goes by; see `device.limits`.
        WIDE: if a leaf is of float64.
        KIND: of a limit that learns; else 0.
        TILE, SMALL: elements that a program takes at a time, and at a chunk's end.
        PROGRAMS: a power of two, not below the number of programs.
    """
    total = scratch + 8 * TOTAL
    if WIDE:
        add_exactly(table, total, tl.program_id(0), tl.num_programs(0), chunks, SMALL)
    else:
        share = sum_squares(table, chunks, TILE, SMALL)
        tl.store(float64_at(scratch, PARTIALS + tl.program_id(0)), share)
    if _is_last(scratch):
        if given_at != 0:
            norm = scalar(given_at, given)
            norm = tl.where((norm > 0) | (norm != norm), norm, 0.0)
            significand, exponent = split(norm)
        elif WIDE:
            significand, exponent = root_of_total(scratch, WIDE)
        else:
            significand, exponent = _certified(table, chunks, depth, scratch, TILE, SMALL, PROGRAMS)
        _finish(
            significand, exponent, scratch, norm_at, scalar(limit_at, limit), policy,
            ledger, factor_at, begins, folds, scale_at, found_inf_at, before, after, WIDE, KIND,
        )  # fmt: skip


@triton.jit(do_not_specialize=list(range(4)))
def share(
    table: tl.int64, chunks: tl.int64, scratch: tl.int64, vector: tl.int64, SMALL: tl.constexpr
):
    """Write the exact total of the leaves, carried, to a vector of 136 words: to be added up."""
    total = scratch + 8 * TOTAL
    add_exactly(table, total, tl.program_id(0), tl.num_programs(0), chunks, SMALL)
    if _is_last(scratch):
        carry(scratch, True)
        words = tl.arange(0, 256)
        used = words < WORDS + 2
        # The counts are no digits.
        source = tl.where(words < WORDS, DIGITS + words, TOTAL + words)
        values = tl.load(int64_at(scratch, source), mask=used, other=0, volatile=True)
        tl.store(int64_at(vector, words), values, mask=used)
        clear(total)


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
    todo, by, shift = action, float64_of(significand), exponent
    if action < 0:
        todo = tl.load(int64_at(scratch, ACTION))
        by = tl.load(float64_at(scratch, SIGNIFICAND))
        shift = tl.load(int64_at(scratch, EXPONENT))
    if todo != KEEP:
        if shift > -120:
            rewrite_chunks(table, chunks, todo, by, shift, True, TILE, SMALL)
        else:
            rewrite_chunks(table, chunks, todo, by, shift, False, TILE, SMALL)
