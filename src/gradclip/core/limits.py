"""Limits that learn from the norms that they have seen: the formula of each kind, once.

A kind is a pure function ``(state, norm) -> (limit, state)`` over a few operations that NumPy,
PyTorch, JAX and TensorFlow share (`Arithmetic`), in float64. With a vector of norms it judges as
many tensors, each with a state of its own. Whoever clips keeps the state; `memory` has the objects
that keep it for those who have no place for it.

The file is long for its docstrings, which are what users read of each kind.

In what follows n is the norm before clipping, and m the smaller one of n and what the rule allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import numpy as np

from gradclip.core.arithmetic import Arithmetic
from gradclip.core.decide import check_clip_norm, real_number
from gradclip.core.memory import Memory, Remembers

Beyond = Literal["shrink", "edge", "mean", "skip"]
LearnFrom = Literal["clipped", "raw"]

# Moments are of norms within these: their squares, and those of their last places, fit float64.
_LEAST, _MOST = 2.0**-400, 2.0**400
# No limit is less: 0 would let nothing through for ever.
_TINY = 2.0**-1022


class Ruling(NamedTuple):
    """What a kind makes of a norm."""

    limit: Any  # what the norm may be
    skip: Any  # if the step is not to be taken
    learnt: Any  # if the limit is of what was learnt, and of this norm; else it is the constant
    state: Any  # after it


@dataclass(frozen=True, repr=False)
class Limit(Remembers):
    """A limit that learns: the base of all kinds; see `gradclip.limits`.

    Two are equal that say the same, whatever they have learnt.
    """

    _memory: Memory = field(default_factory=Memory, init=False, repr=False, compare=False)
    State: ClassVar[Any]  # of its states, a NamedTuple
    skips: ClassVar[bool] = False  # if it may have a step skipped
    per_tensor: ClassVar[bool] = False  # if each tensor is judged by itself

    def begin(self, ops: Arithmetic, shape: tuple[int, ...] = ()) -> Any:
        """The state before the first norm; of tensors, a first axis of so many."""
        raise NotImplementedError

    def judge(self, ops: Arithmetic, state: Any, norm: Any, whole: Any = None) -> Ruling:
        """The limit for a norm, float64, and the state after it.

        Args:
            ops: of the framework that the state and the norm are of.
            state: as `begin`, or the latest of these, has left it.
            norm: n; a vector of those of tensors, each judged by itself.
            whole: the global norm, if these are of tensors.
        """
        raise NotImplementedError

    def kept(self, state: Any) -> dict[str, Any]:
        """What is saved of a state, by names: what cannot be made of the rest."""
        found: dict[str, Any] = state._asdict()
        return found

    def restored(self, **kept: Any) -> Any:
        """The state of which this was `kept`; None if none can be."""
        raise NotImplementedError

    def __repr__(self) -> str:
        told = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.repr and value != each.default:
                shown = repr(value) if value != math.inf else "float('inf')"
                told.append(f"{each.name}={shown}")
        return f"{type(self).__name__}({', '.join(told)})"


# ---- the kinds ----


class ZScoreState(NamedTuple):
    """What a `ZScore` has learnt."""

    mean: Any
    var: Any
    count: Any


@dataclass(frozen=True, repr=False)
class ZScore(Limit):
    """Clips the norms that stand out from a moving average, by how many deviations they do.

    ::

        s     = (n - mean) / (std + 1e-6)
        limit = limit                       if s <= z
                mean + z * std * (z / s)    above, with beyond="shrink"
                mean + z * std                          beyond="edge"
                mean                                    beyond="mean"
        mean  = decay * mean + (1 - decay) * m
        var   = decay * var + (1 - decay) * (m - mean)^2

    and never more than ``limit``, which is all that clips in the warm-up; mean and variance begin
    with those of the warm-up's norms. Where the mean is below 1e-3, a thousandth of it takes the
    place of 1e-6, so that small norms can stand out too. With ``log`` the same is done of log n,
    and the limit is the exponential.

    Args:
        z: how many deviations a norm may stand out by.
        decay: of the averages, from 0 to below 1: 0.97 looks back over some 33 steps.
        warmup: how many norms to learn from first.
        limit: a constant beside it; it does not change what is learnt.
        beyond: what becomes of a norm that stands out; with ``"skip"`` its step is not taken (a
            call that takes none makes zeros), and it teaches nothing.
        log: of the logarithms of norms, which are spread more evenly.
        learn_from: ``"clipped"``: m; ``"raw"``: n.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Follows ZClip (arXiv:2504.02507), of which these are the defaults; with
    ``z=4, log=True, beyond="skip"`` Chen et al. (arXiv:1804.09849).

    >>> import numpy as np, gradclip
    >>> limit = ZScore(warmup=2)
    >>> for size in (3.0, 5.0, 40.0):
    ...     gradient = np.array([size])
    ...     norm = gradclip.clip_by_global_norm_([gradient], limit)
    >>> print(gradient.round(3))
    [4.174]
    """

    State: ClassVar[Any] = ZScoreState

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    limit: float = math.inf
    beyond: Beyond = "shrink"
    log: bool = False
    learn_from: LearnFrom = "clipped"

    def __post_init__(self) -> None:
        _set(self, z=_above_zero("z", self.z), decay=_decay(self.decay))
        _set(self, warmup=_count("warmup", self.warmup, 0), log=bool(self.log))
        _set(self, limit=check_clip_norm(self.limit, "limit"))
        _one_of("beyond", self.beyond, get_args(Beyond))
        _one_of("learn_from", self.learn_from, get_args(LearnFrom))

    @property
    def skips(self) -> bool:  # type: ignore[override]
        return self.beyond == "skip"

    def begin(self, ops: Arithmetic, shape: tuple[int, ...] = ()) -> ZScoreState:
        zero = ops.full(shape, 0, "float64")
        return ZScoreState(zero, zero, ops.full(shape, 0, "int64"))

    def restored(self, **kept: Any) -> Any:
        state = ZScoreState(**kept)
        is_one = state.var >= 0 and (self.log or state.mean > 0 or not state.count)
        return state if is_one else None

    def judge(self, ops: Arithmetic, state: ZScoreState, norm: Any, whole: Any = None) -> Ruling:
        mean, var, count = state
        learnt = count >= max(self.warmup, 1)
        x = ops.minimum(ops.maximum(_positive(ops, norm), _LEAST), _MOST)
        if self.log:
            x = ops.log(x)
        std = ops.sqrt(var)
        size = ops.maximum(mean, -mean)
        more = 1e-6 if self.log else ops.minimum(size / 1000, 1e-6)
        score = (x - mean) / ops.where(learnt, std + more, 1.0)
        # Of a mean that is rounded the next number above is none that stands out.
        outlier = (norm > 0) & learnt & (score > self.z) & (x > mean + size * 2.0**-52)
        if self.beyond == "shrink":
            bound = mean + self.z * std * (self.z / ops.where(outlier, score, self.z))
        else:
            bound = mean if self.beyond == "mean" else mean + self.z * std
        allowed = ops.exp(bound) if self.log else bound
        teaches = _teaches(norm, whole)
        if self.skips:
            teaches = teaches & (outlier == False)  # noqa: E712  (of arrays, too)

        m = x if self.learn_from == "raw" else ops.where(outlier, bound, x)
        later_mean = self.decay * mean + (1 - self.decay) * m
        later_var = self.decay * var + (1 - self.decay) * (m - later_mean) * (m - later_mean)
        # The warm-up's mean and population variance so far (Welford, 1962).
        seen = ops.cast(count + 1, "float64")
        early_mean = mean + (x - mean) / seen
        early_var = var + ((x - mean) * (x - early_mean) - var) / seen
        after = ZScoreState(
            ops.where(learnt, later_mean, early_mean),
            ops.where(learnt, later_var, early_var),
            count + 1,
        )
        limit = ops.where(outlier, ops.minimum(allowed, self.limit), self.limit)
        return Ruling(limit, outlier & self.skips, learnt, _if(ops, teaches, after, state))


class PercentileState(NamedTuple):
    """What a `Percentile` has seen."""

    ring: Any  # the latest norms, the next one's place being `count` modulo their number
    ordered: Any  # the same in order; inf where there are none yet
    count: Any


@dataclass(frozen=True, repr=False)
class Percentile(Limit):
    """Clips to a percentile of the norms so far.

    ::

        limit = factor * (p-th percentile of the last history norms n, this one among them)

    with linear interpolation between two, as ``numpy.percentile``.

    Args:
        p: from 0 to 100.
        history: how many norms to look back over; each takes 16 bytes.
        factor: above 0.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Follows AutoClip (Seetharaman et al., 2020, arXiv:2007.14469), where p is 10 and the history is
    all there was. ``Percentile(50, 100, 2.0)`` is the rule of ScaledAdam: twice the median.

    >>> import numpy as np, gradclip
    >>> limit = Percentile(50)
    >>> for size in (3.0, 5.0, 40.0):
    ...     gradient = np.array([size])
    ...     norm = gradclip.clip_by_global_norm_([gradient], limit)
    >>> print(gradient)
    [5.]
    """

    State: ClassVar[Any] = PercentileState

    p: float = 10.0
    history: int = 10_000
    factor: float = 1.0

    def __post_init__(self) -> None:
        _set(self, p=real_number("p", self.p), history=_count("history", self.history, 1))
        if not 0 <= self.p <= 100:
            raise ValueError(f"p is {self.p!r}; it must be from 0 to 100")
        _set(self, factor=_above_zero("factor", self.factor))

    def begin(self, ops: Arithmetic, shape: tuple[int, ...] = ()) -> PercentileState:
        none = ops.full((*shape, self.history), math.inf, "float64")
        return PercentileState(none, none, ops.full(shape, 0, "int64"))

    def kept(self, state: Any) -> dict[str, Any]:
        return {"ring": state.ring, "count": state.count}

    def restored(self, **kept: Any) -> Any:
        ring, count = kept["ring"], kept["count"]
        known, none = ring[:count], ring[count:]
        is_one = (known > 0).all() and (known < math.inf).all() and (none == math.inf).all()
        return PercentileState(ring, np.sort(ring), count) if is_one else None

    def judge(
        self, ops: Arithmetic, state: PercentileState, norm: Any, whole: Any = None
    ) -> Ruling:
        ring, ordered, count = state
        x = _positive(ops, norm)
        place = count % self.history
        # In order, without the oldest if there are enough: those from its place on move up. Then
        # with this one: what is above it moves on.
        oldest = ops.column(ops.pick(ring, place))
        rest = ops.where(ordered < oldest, ordered, ops.earlier(ordered, math.inf))
        new = ops.minimum(rest, ops.maximum(ops.later(rest, -math.inf), ops.column(x)))

        last = ops.minimum(count, self.history - 1)
        at = ops.cast(last, "float64") * (self.p / 100)
        below = ops.cast(at, "int64")
        low, high = ops.pick(new, below), ops.pick(new, ops.minimum(below + 1, last))
        percentile = low + (high - low) * (at - ops.cast(below, "float64"))
        after = PercentileState(ops.put(ring, place, x), new, count + 1)
        teaches = _teaches(norm, whole)
        limit = ops.where(norm > 0, ops.maximum(self.factor * percentile, _TINY), math.inf)
        return Ruling(limit, count < 0, count >= 0, _if(ops, teaches, after, state))


class AverageState(NamedTuple):
    """What an `Average` has learnt."""

    average: Any
    count: Any


@dataclass(frozen=True, repr=False)
class Average(Limit):
    """Clips to so many times the moving average of the norms.

    ::

        limit   = factor * average          in the warm-up: limit
        average = decay * average + (1 - decay) * m

    The average begins with the mean of the warm-up's norms. In `PerTensor` it begins with the
    smallest norm that a tensor had there, once all were scaled by the global norm and ``limit``.

    Args:
        factor: above 1, or with ``learn_from="raw"`` above 0: an average of norms that are clipped
            to less than itself would only ever fall.
        decay: of the average, from 0 to below 1.
        warmup: how many norms to learn from first.
        limit: of the warm-up.
        learn_from: ``"clipped"``: m; ``"raw"``: n.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Follows Pascanu et al. (arXiv:1211.5063), section 3.2; per tensor, AdaGC (arXiv:2502.11034).

    >>> import numpy as np, gradclip
    >>> limit = Average(2.0, warmup=2, limit=10.0)
    >>> for size in (3.0, 5.0, 40.0):
    ...     gradient = np.array([size])
    ...     norm = gradclip.clip_by_global_norm_([gradient], limit)
    >>> print(gradient)
    [8.]
    """

    State: ClassVar[Any] = AverageState

    factor: float
    decay: float = 0.98
    warmup: int = 100
    limit: float = 1.0
    learn_from: LearnFrom = "clipped"

    def __post_init__(self) -> None:
        _set(self, factor=_above_zero("factor", self.factor), decay=_decay(self.decay))
        _set(self, warmup=_count("warmup", self.warmup, 0))
        _set(self, limit=check_clip_norm(self.limit, "limit"))
        _one_of("learn_from", self.learn_from, get_args(LearnFrom))
        if self.factor <= 1 and self.learn_from == "clipped":
            raise ValueError(
                f"factor is {self.factor!r}; an average of norms that are clipped to no more than "
                'itself only ever falls: it must be above 1, or learn_from="raw"'
            )

    def begin(self, ops: Arithmetic, shape: tuple[int, ...] = ()) -> AverageState:
        return AverageState(ops.full(shape, 0, "float64"), ops.full(shape, 0, "int64"))

    def restored(self, **kept: Any) -> Any:
        state = AverageState(**kept)
        return state if state.average > 0 or not state.count else None

    def judge(self, ops: Arithmetic, state: AverageState, norm: Any, whole: Any = None) -> Ruling:
        average, count = state
        learnt = count >= max(self.warmup, 1)
        x = _positive(ops, norm)
        allowed = ops.maximum(self.factor * average, _TINY)
        m = x if self.learn_from == "raw" else ops.minimum(x, allowed)
        later = self.decay * average + (1 - self.decay) * m
        if whole is None:
            early = average + (x - average) / ops.cast(count + 1, "float64")
        else:
            clipped = x
            if self.learn_from == "clipped":
                clipped = x * ops.minimum(self.limit / _positive(ops, whole), 1.0)
                clipped = ops.maximum(clipped, _TINY)
            early = ops.where(count > 0, ops.minimum(average, clipped), clipped)
        after = AverageState(ops.where(learnt, later, early), count + 1)
        limit = ops.where(learnt, allowed, self.limit)
        teaches = _teaches(norm, whole)
        return Ruling(limit, count < 0, learnt, _if(ops, teaches, after, state))


@dataclass(frozen=True, repr=False)
class PerTensor(Limit):
    """Clips each tensor by a norm, a limit and a factor of its own.

    Each has a state of its own, as ``kind`` has it, kept by the parameter's name where
    `gradclip.torch` knows one, else by the tensor's place in the list. As long as a tensor is in
    the kind's warm-up it is scaled with all others, by the global norm and the kind's constant
    ``limit``. Where the global norm is NaN or inf all tensors go the way of ``on_nonfinite``, and
    none learns.

    Args:
        kind: a `ZScore`, `Percentile` or `Average`. Its ``beyond`` is not ``"skip"``: a step is of
            all tensors.

    Raises:
        TypeError, ValueError: the kind is none of these.

    ``PerTensor(Average(1.05))`` follows AdaGC (arXiv:2502.11034).

    >>> import numpy as np, gradclip
    >>> limit = PerTensor(Percentile(0))
    >>> for size in (3.0, 5.0):
    ...     gradients = [np.array([size]), np.array([1.0])]
    ...     norm = gradclip.clip_by_global_norm_(gradients, limit)
    >>> print(gradients)
    [array([3.]), array([1.])]
    """

    kind: ZScore | Percentile | Average
    per_tensor: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.kind, Limit) or isinstance(self.kind, PerTensor):
            raise TypeError(
                f"kind is {self.kind!r}; it must be a ZScore, a Percentile or an Average"
            )
        if self.kind.skips:
            raise ValueError(
                f"kind is {self.kind!r}; one tensor that stands out cannot have a step of all "
                'skipped: beyond is "shrink", "edge" or "mean"'
            )

    @property
    def State(self) -> Any:  # noqa: N802
        """That of its kind."""
        return self.kind.State

    def begin(self, ops: Arithmetic, shape: tuple[int, ...] = ()) -> Any:
        return self.kind.begin(ops, shape)

    def kept(self, state: Any) -> dict[str, Any]:
        return self.kind.kept(state)

    def restored(self, **kept: Any) -> Any:
        return self.kind.restored(**kept)

    def judge(self, ops: Arithmetic, state: Any, norm: Any, whole: Any = None) -> Ruling:
        return self.kind.judge(ops, state, norm, whole)


# ---- what they share ----


def _positive(ops: Arithmetic, norm: Any) -> Any:
    """A norm to reckon with: of inf, NaN and 0, which teach nothing, some number above 0."""
    return ops.minimum(ops.where(norm > 0, norm, 1.0), 2.0**1000)


def _teaches(norm: Any, whole: Any) -> Any:
    """If there is something to learn from a norm: it is no NaN, inf or 0, nor are others NaN."""
    teaches = (norm > 0) & (norm < math.inf)
    return teaches if whole is None else teaches & (whole < math.inf)


def _if(ops: Arithmetic, teaches: Any, after: Any, before: Any) -> Any:
    """The state after a norm, if that teaches anything."""
    wide = ops.column(teaches)
    return type(before)(
        *(
            ops.where(wide if name in ("ring", "ordered") else teaches, new, old)
            for name, new, old in zip(before._fields, after, before, strict=True)
        )
    )


# ---- arguments ----


def _set(given: Limit, /, **values: Any) -> None:
    for name, value in values.items():
        object.__setattr__(given, name, value)


def _above_zero(name: str, value: Any) -> float:
    number = real_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be above 0, and finite")
    return number


def _decay(value: Any) -> float:
    number = real_number("decay", value)
    if not 0 <= number < 1:
        raise ValueError(f"decay is {value!r}; it must be from 0 to below 1")
    return number


def _count(name: str, value: Any, least: int) -> int:
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    if value < least:
        raise ValueError(f"{name} is {value!r}; it must be {least} or more")
    return int(value)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, known))}")
