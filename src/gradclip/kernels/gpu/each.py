"""Triton: three launches measure, decide and scale each leaf by itself, and the host never waits.

`measure_each` reads the leaves once, and adds the squares of each up apart. `decide_each`, a single
program, rounds the norms, judges them, and writes what is to be done to each leaf, which
`rewrite_each` does.

The table has more than that of `triton`: after the chunks, in the order of leaves, the number of
each one's leaf, then of each leaf its first chunk and, at the end, how many chunks there are, then
of each leaf if it is of float64. A room has, of each leaf, the significand of its norm, later of
its factor; the exponent of it; what is to be done; then both of the global norm; then of each leaf
its sum of squares, as a float64, or, if a leaf is of float64, as an exact total. These are 0
between calls.
"""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.decision import KEEP, SCALE, SKIP, decide, unscaled
from gradclip.kernels.gpu.device.exact import add_chunk_exactly, add_exactly
from gradclip.kernels.gpu.device.ledger import begin, keep_books, stay
from gradclip.kernels.gpu.device.limits import PERCENTILE, RULE, copy_rule, judge
from gradclip.kernels.gpu.device.memory import (
    ACTION,
    TOTAL,
    WORDS,
    float64_at,
    int64_at,
    pointer,
)
from gradclip.kernels.gpu.device.numbers import joined, split
from gradclip.kernels.gpu.device.root import root_of_total
from gradclip.kernels.gpu.device.scaling import rewrite_chunk
from gradclip.kernels.gpu.device.squares import ends, sum_chunk

BLOCK = 256  # leaves that are judged at a time

# Words of a room, of each leaf and then of all.
OF_LEAF, OF_ALL, TOTAL_WORDS = 3, 2, WORDS.value + 2
_OF_LEAF, _OF_ALL = tl.constexpr(OF_LEAF), tl.constexpr(OF_ALL)
_TOTAL_WORDS = tl.constexpr(TOTAL_WORDS)


@triton.jit
def _leaf_of(table, chunks, chunk):
    return tl.load(int64_at(table + 24 * chunks, chunk))


@triton.jit
def _first_chunks(table, chunks):
    """Where the first chunk of each leaf is told."""
    return table + 32 * chunks


@triton.jit
def _sums(room, leaves):
    """Where the sums of squares are."""
    return room + 8 * (_OF_LEAF * leaves + _OF_ALL)


@triton.jit(do_not_specialize=list(range(4)))
def measure_each(
    table: tl.int64, chunks: tl.int64, leaves: tl.int64, room: tl.int64,
    WIDE: tl.constexpr, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Add the squares of each leaf to its sum in a room.

    Args:
        table: address of the chunks of so many leaves, of which there are ``chunks``.
        leaves: how many.
        room: address of it.
        WIDE: if a leaf is of float64.
        TILE, SMALL: elements that a program takes at a time, and at a chunk's end.
    """
    sums = _sums(room, leaves)
    guess = tl.full([], 0, tl.int64)
    last = tl.full([], -1, tl.int64)
    for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
        leaf = _leaf_of(table, chunks, chunk)
        if WIDE:
            total = sums + 8 * _TOTAL_WORDS * leaf
            guess, last = add_chunk_exactly(table, total, chunk, guess, last, SMALL)
        else:
            share = sum_chunk(table, chunk, TILE, SMALL)
            tl.atomic_add(float64_at(sums, leaf), share, sem="relaxed")


@triton.jit
def _exactly(table, scratch, first, end, SMALL: tl.constexpr):
    """The float32 norm of some chunks."""
    add_exactly(table, scratch + 8 * TOTAL, first, 1, end, SMALL)
    tl.debug_barrier()
    return root_of_total(scratch, False)


@triton.jit
def _put(room, leaves, leaf, significand, exponent):
    tl.store(float64_at(room, leaf), significand)
    tl.store(int64_at(room, leaves + leaf), exponent.to(tl.int64))


@triton.jit
def _certified_each(
    table, chunks, leaves, depth, scratch, room, SMALL: tl.constexpr, BLOCK: tl.constexpr
):
    """Write the float32 norm of each leaf; the global one."""
    firsts, sums_at = _first_chunks(table, chunks), _sums(room, leaves)
    whole = tl.full([], 0.0, tl.float64)
    for start in range(0, leaves, BLOCK):
        leaf = start + tl.arange(0, BLOCK)
        inside = leaf < leaves
        sums = tl.load(float64_at(sums_at, leaf), mask=inside, other=0.0)
        tl.debug_barrier()  # several threads may have read the same
        tl.store(float64_at(sums_at, leaf), tl.zeros([BLOCK], tl.float64), mask=inside)
        first = tl.load(int64_at(firsts, leaf), mask=inside, other=0)
        end = tl.load(int64_at(firsts, leaf + 1), mask=inside, other=0)
        low, high = ends(sums, depth + end - first)
        significand, exponent = split(high)
        unsure = (low < high).to(tl.int64)
        tl.store(float64_at(room, leaf), significand, mask=inside)
        tl.store(int64_at(room, leaves + leaf), exponent.to(tl.int64), mask=inside)
        tl.store(int64_at(room, 2 * leaves + leaf), unsure, mask=inside)
        whole += tl.sum(sums, 0)
        if tl.max(unsure, 0) > 0:
            tl.debug_barrier()
            for each in range(start, tl.minimum(start + BLOCK, leaves)):
                if tl.load(int64_at(room, 2 * leaves + each), volatile=True) > 0:
                    begins = tl.load(int64_at(firsts, each))
                    significand_of, exponent_of = _exactly(
                        table, scratch, begins, tl.load(int64_at(firsts, each + 1)), SMALL
                    )
                    _put(room, leaves, each, significand_of, exponent_of)
    low, high = ends(whole, depth + chunks + leaves)
    significand, exponent = split(high)
    if high > low:
        significand, exponent = _exactly(table, scratch, 0, chunks, SMALL)
    return significand, exponent


@triton.jit
def _taken(total):
    """The words of a total, which is 0 then."""
    words = tl.arange(0, 256)
    used = words < _TOTAL_WORDS
    values = tl.load(int64_at(total, words), mask=used, other=0)
    tl.debug_barrier()  # several threads may have read the same
    tl.store(int64_at(total, words), tl.zeros([256], tl.int64), mask=used)
    return values


@triton.jit
def _root(scratch, values, WIDE: tl.constexpr):
    """The norm of a total, of which these are the words."""
    words = tl.arange(0, 256)
    tl.store(int64_at(scratch, TOTAL + words), values, mask=words < _TOTAL_WORDS)
    tl.debug_barrier()
    significand, exponent = root_of_total(scratch, WIDE)
    tl.debug_barrier()
    return significand, exponent


@triton.jit
def _rooted_each(table, chunks, leaves, scratch, room):
    """Write the norm of each leaf, of which one is of float64; the global one."""
    wide = _first_chunks(table, chunks) + 8 * (leaves + 1)
    totals = _sums(room, leaves)
    whole = tl.zeros([256], tl.int64)
    for each in range(leaves):
        values = _taken(totals + 8 * _TOTAL_WORDS * each)
        whole += values
        if tl.load(int64_at(wide, each)) > 0:
            significand, exponent = _root(scratch, values, True)
            _put(room, leaves, each, significand, exponent)
        else:
            significand, exponent = _root(scratch, values, False)
            _put(room, leaves, each, significand, exponent)
    return _root(scratch, whole, True)


@triton.jit
def _norm_of(room, leaves, leaf, inside, scale, WIDE: tl.constexpr):
    significand = tl.load(float64_at(room, leaf), mask=inside, other=0.0)
    exponent = tl.load(int64_at(room, leaves + leaf), mask=inside, other=0)
    return unscaled(significand, exponent, scale, WIDE)


@triton.jit
def _judge_all(
    leaves, room, before, after, significand, exponent, policy, scale, steps,
    KIND: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write what is to be done to each leaf; the same for all in one, and the least factor."""
    whole = joined(significand, exponent)
    # Where the global norm is NaN or inf all leaves go its way: with any limit but inf.
    action, factor, shift = decide(significand, exponent, tl.full([], 1.0, tl.float64), policy)
    action = tl.where(steps, action, KEEP)
    finite = significand < 1
    copy_rule(before, after)
    if KIND == PERCENTILE:
        for each in range(leaves):
            place = tl.full([], 0, tl.int64) + each
            one, its = _norm_of(room, leaves, place, True, scale, WIDE)
            judge(before, after, leaves, place, True, joined(one, its), whole, steps, KIND, True)
        tl.debug_barrier()

    least = tl.full([], 1.0, tl.float64)
    for start in range(0, leaves, BLOCK):
        leaf = start + tl.arange(0, BLOCK)
        inside = leaf < leaves
        own, its = _norm_of(room, leaves, leaf, inside, scale, WIDE)
        if KIND == PERCENTILE:
            limit = tl.load(float64_at(after, RULE + leaf), mask=inside, other=1.0)
        else:
            limit, learnt, _ = judge(
                before, after, leaves, leaf, inside, joined(own, its), whole, steps, KIND, True
            )
            own = tl.where(learnt, own, significand)
            its = tl.where(learnt, its, exponent)
        todo, by, places = decide(own, its, limit, tl.full([BLOCK], SKIP, tl.int64))
        todo = tl.where(steps, todo, KEEP)
        scales = inside & (todo == SCALE)
        least = tl.minimum(least, tl.min(tl.where(scales, joined(by, places), 1.0), 0))
        todo = tl.where(finite, todo, action)
        by = tl.where(finite, by, factor)
        places = tl.where(finite, places, shift)
        tl.debug_barrier()  # several threads may have read the norm
        tl.store(float64_at(room, leaf), by, mask=inside)
        tl.store(int64_at(room, leaves + leaf), places.to(tl.int64), mask=inside)
        tl.store(int64_at(room, 2 * leaves + leaf), todo.to(tl.int64), mask=inside)
    any_action = tl.where(least < 1, SCALE, KEEP)
    return (
        tl.where(finite, any_action, action),
        tl.where(finite, least, joined(factor, shift)),
    )


@triton.jit(do_not_specialize=list(range(15)))
def decide_each(
    table: tl.int64, chunks: tl.int64, leaves: tl.int64, depth: tl.int64, scratch: tl.int64,
    room: tl.int64, norm_at: tl.int64, policy: tl.int64,
    ledger: tl.int64, factor_at: tl.int64, begins: tl.int64,
    scale_at: tl.int64, found_inf_at: tl.int64, before: tl.int64, after: tl.int64,
    WIDE: tl.constexpr, KIND: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide about each leaf in one program; `rewrite_each` carries it out.

    Args:
        table, chunks, leaves, room: as `measure_each` has them.
        depth: how many additions make the sum of a chunk.
        KIND: of a limit that learns, by which leaves are judged; 0: only their norms are written.
        BLOCK: leaves that are judged at a time.
        scratch, norm_at, policy, ledger, factor_at, begins, scale_at, found_inf_at, before, after,
        WIDE, SMALL: as in `triton.measure`.
    """
    if WIDE:
        significand, exponent = _rooted_each(table, chunks, leaves, scratch, room)
    else:
        significand, exponent = _certified_each(
            table, chunks, leaves, depth, scratch, room, SMALL, BLOCK
        )
    tl.debug_barrier()
    scale = tl.full([], 1.0, tl.float64)
    if scale_at != 0:
        scale = tl.load(pointer(scale_at, tl.float32)).to(tl.float64)
    significand, exponent = unscaled(significand, exponent, scale, WIDE)
    tl.store(float64_at(room, _OF_LEAF * leaves), significand)
    tl.store(int64_at(room, _OF_LEAF * leaves + 1), exponent.to(tl.int64))
    steps = tl.full([], True, tl.int1)
    if found_inf_at != 0:
        steps = tl.load(pointer(found_inf_at, tl.float32)) == 0
    if (ledger != 0) & (begins > 0):
        begin(ledger)
    if KIND > 0:
        action, factor = _judge_all(
            leaves, room, before, after, significand, exponent, policy, scale, steps,
            KIND, WIDE, BLOCK,
        )  # fmt: skip
        if steps:
            norm = joined(significand, exponent)
            if WIDE:
                tl.store(pointer(norm_at, tl.float64), norm)
            else:
                tl.store(pointer(norm_at, tl.float32), norm.to(tl.float32))
            if ledger != 0:
                limit, skip = tl.full([], 1.0, tl.float64), tl.full([], False, tl.int1)
                folds = tl.full([], 0, tl.int64)
                action = keep_books(
                    ledger, factor_at, significand, limit, skip, policy,
                    action, factor, begins, folds, scale,
                )  # fmt: skip
        else:
            stay(ledger, scale)
        tl.store(int64_at(scratch, ACTION), action.to(tl.int64))


@triton.jit(do_not_specialize=list(range(6)))
def tell_each(
    leaves: tl.int64, room: tl.int64, values_at: tl.int64, norm_at: tl.int64, whole_at: tl.int64,
    scale_at: tl.int64, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write as numbers what norms `decide_each` has left in a room.

    Args:
        leaves, room: as `measure_each` has them.
        values_at: where the norm of each goes: float64 if it is ``WIDE``, else float32.
        norm_at: where the global norm goes, of the same dtype.
        whole_at: where that goes in float64, as `triton.measure` takes one that is given.
        scale_at: as in `triton.measure`.
        WIDE: if a leaf is of float64.
        BLOCK: leaves that are taken at a time.
    """
    significand = tl.load(float64_at(room, _OF_LEAF * leaves))
    exponent = tl.load(int64_at(room, _OF_LEAF * leaves + 1))
    tl.store(pointer(whole_at, tl.float64), joined(significand, exponent))
    scale = tl.full([], 1.0, tl.float64)
    if scale_at != 0:
        scale = tl.load(pointer(scale_at, tl.float32)).to(tl.float64)
    significand, exponent = unscaled(significand, exponent, scale, WIDE)
    norm = joined(significand, exponent)
    if WIDE:
        tl.store(pointer(norm_at, tl.float64), norm)
    else:
        tl.store(pointer(norm_at, tl.float32), norm.to(tl.float32))
    for start in range(0, leaves, BLOCK):
        leaf = start + tl.arange(0, BLOCK)
        inside = leaf < leaves
        own, its = _norm_of(room, leaves, leaf, inside, scale, WIDE)
        value = joined(own, its)
        if WIDE:
            tl.store(float64_at(values_at, leaf), value, mask=inside)
        else:
            tl.store(pointer(values_at, tl.float32) + leaf, value.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=list(range(6)))
def rewrite_each(
    table: tl.int64, chunks: tl.int64, leaves: tl.int64, scratch: tl.int64, room: tl.int64,
    action: tl.int64, TILE: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Scale or fill each leaf, or leave it alone.

    Args:
        table, chunks, leaves: as `measure_each` has them.
        scratch: where `decide_each` has left if there is anything to do, if ``action`` is -1.
        room: address of what is to be done to each.
        action: other than -1 if there is, whatever is left there.
        TILE, SMALL: as in `triton.rewrite`.
    """
    todo = action
    if action < 0:
        todo = tl.load(int64_at(scratch, ACTION))
    if todo != KEEP:
        for chunk in range(tl.program_id(0), chunks, tl.num_programs(0)):
            leaf = _leaf_of(table, chunks, chunk)
            its = tl.load(int64_at(room, 2 * leaves + leaf))
            if its != KEEP:
                by = tl.load(float64_at(room, leaf))
                shift = tl.load(int64_at(room, leaves + leaf))
                if shift > -120:
                    rewrite_chunk(table, chunk, its, by, shift, True, TILE, SMALL)
                else:
                    rewrite_chunk(table, chunk, its, by, shift, False, TILE, SMALL)
