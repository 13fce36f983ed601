"""The rules of limits that learn. `core.limits` has the formulas, and the tests hold both together.

A rule judges a norm, or a block of those of as many tensors. What it goes by lies in words of
memory: RULE numbers of the kind, in float64; of each tensor the limit in force; then the state, as
the NamedTuples of `core.limits` list its parts, each part of all tensors. It is read before and
written after, to another place: who takes a step back goes on from the first.
"""

import triton
import triton.language as tl

from gradclip.kernels.gpu.device.memory import float64_at, int64_at

# Kinds; 0 is a number.
Z_SCORE = tl.constexpr(1)
Z_SCORE_OF_LOG = tl.constexpr(2)
AVERAGE = tl.constexpr(3)
PERCENTILE = tl.constexpr(4)

# The numbers of a kind, by their places.
WARMUP = tl.constexpr(0)  # not below 1
CONSTANT = tl.constexpr(1)
DECAY = tl.constexpr(2)
FACTOR = tl.constexpr(3)
Z = tl.constexpr(3)
BEYOND = tl.constexpr(4)
RAW = tl.constexpr(5)  # 1 if it learns from norms as they are
HISTORY = tl.constexpr(0)
PART = tl.constexpr(1)  # p / 100
RULE = tl.constexpr(6)

BEYONDS = {"shrink": 0, "edge": 1, "mean": 2, "skip": 3}
_SHRINK = tl.constexpr(0)
_MEAN = tl.constexpr(2)
_SKIP = tl.constexpr(3)

# As there. A literal that is a power of two, or is told its type, is no rounded float32.
_LEAST = tl.constexpr(2.0**-400)
_MOST = tl.constexpr(2.0**400)
_HUGE = tl.constexpr(2.0**1000)
_TINY = tl.constexpr(2.0**-1022)
_MICRO = tl.constexpr(1e-6)
_LAST_PLACE = tl.constexpr(2.0**-52)
_TILE = tl.constexpr(1024)


@triton.jit
def judge(
    before, after, tensors, place, inside, norm, whole, steps,
    KIND: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """The limits of norms, if they are of what was learnt, and if the step is to be skipped.

    Args:
        before, after: addresses of the words.
        tensors: how many there are.
        place, inside: which of them these are, a block for all kinds but PERCENTILE.
        norm: of each.
        whole: the global norm.
        steps: if there is a step; else the state and the limits stay what they are.
        KIND: of the kinds.
        EACH: if tensors are judged by themselves.
    """
    # Triton's interpreter takes no "and" of one truth and a block of them.
    below = tl.where(steps & (whole < float("inf")), float("inf"), 0.0)
    teaches = (norm > 0) & (norm < below)
    if KIND == PERCENTILE:
        limit = _percentile(before, after, tensors, place, norm, teaches)
        learnt = tl.full([], True, tl.int1)
        skip = tl.full([], False, tl.int1)
    elif KIND == AVERAGE:
        limit, learnt, skip = _average(
            before, after, tensors, place, inside, norm, whole, teaches, EACH
        )
    else:
        limit, learnt, skip = _z_score(
            before, after, tensors, place, inside, norm, teaches, KIND == Z_SCORE_OF_LOG
        )
    old = tl.load(float64_at(before, RULE + place), mask=inside, other=0.0)
    tl.store(float64_at(after, RULE + place), tl.where(steps, limit, old), mask=inside)
    return limit, learnt, skip


@triton.jit
def copy_rule(before, after):
    """Have the numbers of the kind after a step, too."""
    places = tl.arange(0, 8)
    numbers = tl.load(int64_at(before, places), mask=places < RULE, other=0)
    tl.store(int64_at(after, places), numbers, mask=places < RULE)


@triton.jit
def _number(before, place):
    return tl.load(float64_at(before, place))


@triton.jit
def _part(words, part, tensors, place):
    """Where one part of the state of a tensor is, if it is a number."""
    return words + 8 * (RULE + (part + 1) * tensors + place)


@triton.jit
def _positive(norm):
    return tl.minimum(tl.where(norm > 0, norm, 1.0), tl.full([], _HUGE, tl.float64))


@triton.jit
def _z_score(before, after, tensors, place, inside, norm, teaches, LOG: tl.constexpr):
    z, decay, constant = _number(before, Z), _number(before, DECAY), _number(before, CONSTANT)
    beyond, raw = _number(before, BEYOND), _number(before, RAW)
    mean = tl.load(float64_at(_part(before, 0, tensors, place), 0), mask=inside, other=0.0)
    var = tl.load(float64_at(_part(before, 1, tensors, place), 0), mask=inside, other=0.0)
    count = tl.load(int64_at(_part(before, 2, tensors, place), 0), mask=inside, other=0)

    learnt = count.to(tl.float64) >= _number(before, WARMUP)
    x = tl.maximum(_positive(norm), tl.full([], _LEAST, tl.float64))
    x = tl.minimum(x, tl.full([], _MOST, tl.float64))
    micro = tl.full([], _MICRO, tl.float64)
    size = tl.maximum(mean, -mean)
    if LOG:
        x = tl.log(x)
        more = micro
    else:
        more = tl.minimum(size / 1000, micro)
    std = tl.sqrt(var)
    score = (x - mean) / tl.where(learnt, std + more, 1.0)
    outlier = (norm > 0) & learnt & (score > z) & (x > mean + size * _LAST_PLACE)
    shrunk = mean + z * std * (z / tl.where(outlier, score, z))
    edge = tl.where(beyond == _MEAN, mean, mean + z * std)
    bound = tl.where(beyond == _SHRINK, shrunk, edge)
    allowed = bound
    if LOG:
        allowed = tl.exp(bound)
    skip = outlier & (score > tl.where(beyond == _SKIP, z, float("inf")))
    teaches = teaches & (skip == 0)

    m = tl.where(outlier, tl.where(raw == 0, bound, x), x)
    later_mean = decay * mean + (1 - decay) * m
    later_var = decay * var + (1 - decay) * (m - later_mean) * (m - later_mean)
    seen = (count + 1).to(tl.float64)
    early_mean = mean + (x - mean) / seen
    early_var = var + ((x - mean) * (x - early_mean) - var) / seen
    new_mean = tl.where(teaches, tl.where(learnt, later_mean, early_mean), mean)
    new_var = tl.where(teaches, tl.where(learnt, later_var, early_var), var)
    tl.store(float64_at(_part(after, 0, tensors, place), 0), new_mean, mask=inside)
    tl.store(float64_at(_part(after, 1, tensors, place), 0), new_var, mask=inside)
    tl.store(
        int64_at(_part(after, 2, tensors, place), 0), count + teaches.to(tl.int64), mask=inside
    )
    limit = tl.where(outlier, tl.minimum(allowed, constant), constant)
    return limit, learnt, skip


@triton.jit
def _average(
    before, after, tensors, place, inside, norm, whole, teaches, EACH: tl.constexpr
):  # fmt: skip
    factor, decay = _number(before, FACTOR), _number(before, DECAY)
    constant, raw = _number(before, CONSTANT), _number(before, RAW)
    average = tl.load(float64_at(_part(before, 0, tensors, place), 0), mask=inside, other=0.0)
    count = tl.load(int64_at(_part(before, 1, tensors, place), 0), mask=inside, other=0)

    learnt = count.to(tl.float64) >= _number(before, WARMUP)
    x = _positive(norm)
    allowed = tl.maximum(factor * average, tl.full([], _TINY, tl.float64))
    m = tl.where(raw == 0, tl.minimum(x, allowed), x)
    later = decay * average + (1 - decay) * m
    if EACH:
        clipped = x * tl.minimum(constant / _positive(whole), tl.full([], 1.0, tl.float64))
        clipped = tl.maximum(clipped, tl.full([], _TINY, tl.float64))
        clipped = tl.where(raw == 0, clipped, x)
        early = tl.where(count > 0, tl.minimum(average, clipped), clipped)
    else:
        early = average + (x - average) / (count + 1).to(tl.float64)
    new = tl.where(teaches, tl.where(learnt, later, early), average)
    tl.store(float64_at(_part(after, 0, tensors, place), 0), new, mask=inside)
    tl.store(
        int64_at(_part(after, 1, tensors, place), 0), count + teaches.to(tl.int64), mask=inside
    )
    return tl.where(learnt, allowed, constant), learnt, learnt & (count < 0)


@triton.jit
def _percentile(before, after, tensors, place, norm, teaches):
    history = _number(before, HISTORY).to(tl.int64)
    rings = RULE + tensors + place * history
    orders = rings + tensors * history
    counts = RULE + tensors + 2 * tensors * history + place
    count = tl.load(int64_at(before, counts))
    next_place = count % history
    oldest = tl.load(float64_at(before, rings + next_place))
    ordered = before + 8 * orders
    x = _positive(norm)

    for start in range(0, history, _TILE):
        k = start + tl.arange(0, _TILE)
        inside = k < history
        ring = tl.load(float64_at(before, rings + k), mask=inside, other=0.0)
        ring = tl.where(k == next_place, tl.where(teaches, x, ring), ring)
        tl.store(float64_at(after, rings + k), ring, mask=inside)
        new = _with_latest(ordered, k, history, oldest, x)
        old = tl.load(float64_at(ordered, k), mask=inside, other=0.0)
        tl.store(float64_at(after, orders + k), tl.where(teaches, new, old), mask=inside)
    tl.store(int64_at(after, counts), count + teaches.to(tl.int64))

    last = tl.minimum(count, history - 1)
    at = last.to(tl.float64) * _number(before, PART)
    below = at.to(tl.int64)
    low = _with_latest(ordered, below, history, oldest, x)
    high = _with_latest(ordered, tl.minimum(below + 1, last), history, oldest, x)
    percentile = low + (high - low) * (at - below.to(tl.float64))
    limit = tl.maximum(_number(before, FACTOR) * percentile, tl.full([], _TINY, tl.float64))
    return tl.where(norm > 0, limit, float("inf"))


@triton.jit
def _with_latest(ordered, k, history, oldest, x):
    """What is at places in the order of norms, without the oldest one, and with the latest."""
    below = tl.where(k > 0, _without_oldest(ordered, k - 1, history, oldest), -float("inf"))
    return tl.minimum(_without_oldest(ordered, k, history, oldest), tl.maximum(below, x))


@triton.jit
def _without_oldest(ordered, k, history, oldest):
    here = tl.load(float64_at(ordered, k), mask=(k >= 0) & (k < history), other=float("inf"))
    above = tl.load(
        float64_at(ordered, k + 1), mask=(k >= -1) & (k + 1 < history), other=float("inf")
    )
    return tl.where(here < oldest, here, above)
