"""The transformation that clips, and its states."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer

from gradclip import _clip
from gradclip.core.decide import OnNonfinite, check_clip_norm
from gradclip.core.limits import Limit
from gradclip.jax import judging
from gradclip.optax.arrays import arrays_of, norm_dtype, number_of_leaves


class ClipByGlobalNormState(NamedTuple):
    """What `clip_by_global_norm` has measured; ``optax.tree.get`` finds each by its name.

    Attributes:
        global_norm: of the latest updates, before clipping; 0 before the first.
        factor: ``max_norm / global_norm`` if they were above ``max_norm``, else exactly 1. So it is
            0 where the norm is inf and NaN where it is NaN, whatever ``on_nonfinite`` made of the
            updates. Where XLA flushes subnormal numbers, such a norm counts as 0 here. A record:
            no gradient flows through it.
        count: how many updates there were, int32, stops at its largest value.
        clipped_count: how many were clipped. An update counts as clipped if its norm was not at
            most the limit: above it, as inf is above every finite limit, or NaN.

    ``global_norm`` and ``factor`` are float64 if a parameter is float64 or complex128, else
    float32.
    """

    global_norm: jax.Array
    factor: jax.Array
    count: jax.Array  # type: ignore[assignment]  # over tuple.count, as in optax's own states
    clipped_count: jax.Array


class ClipByLimitState(NamedTuple):
    """What `clip_by_global_norm` has measured and learnt, by a limit of `gradclip.limits`.

    Attributes:
        global_norm: as in `ClipByGlobalNormState`.
        factor: as there; 0 in a step that is to be skipped.
        count: as there.
        clipped_count: as there; a step that is to be skipped counts as clipped.
        limit: that was in force in the latest update, of the dtype of ``global_norm``; inf before
            the first. Of `gradclip.limits.PerTensor` this and ``factor`` are vectors, in the order
            of ``jax.tree.leaves``; an update counts as clipped if one of its leaves was.
        limit_state: what the limit has learnt: of each float64 or int64 the two halves as uint32,
            the lower one first, which all keep that copy, restore or accumulate states without
            ``jax_enable_x64``. ``learnt`` has the numbers.
    """

    global_norm: jax.Array
    factor: jax.Array
    count: jax.Array  # type: ignore[assignment]  # over tuple.count, as in optax's own states
    clipped_count: jax.Array
    limit: jax.Array
    limit_state: Any

    @property
    def learnt(self) -> Any:
        """What the limit has learnt, as numbers and arrays of the host, by their names."""
        return judging.numbers_of(self.limit_state)


class ClipPerLeafState(NamedTuple):
    """What `clip_by_global_norm` has measured with ``per_leaf=True``.

    Attributes:
        norms: of each leaf of the latest updates, before clipping; 0 before the first. A vector of
            the dtype of ``global_norm``, in the order of ``jax.tree.leaves``; `norms_of` has their
            names. What gradient flows through it is that of norms.
        clip_state: all else, as without ``per_leaf``.
    """

    norms: jax.Array
    clip_state: ClipByGlobalNormState | ClipByLimitState


Inner = ClipByGlobalNormState | ClipByLimitState
State = Inner | ClipPerLeafState


def clip_by_global_norm(
    max_norm: SupportsFloat | Callable[[Any], Any] | Limit,
    *,
    on_nonfinite: OnNonfinite = "nan",
    axis_name: Any = None,
    per_leaf: bool = False,
) -> optax.GradientTransformation:
    """Scale updates down together so that their global norm is at most ``max_norm``.

    ::

        global_norm = sqrt(sum of |u|^2 over every element u of every leaf)
        u           = u                             if global_norm <= max_norm
        u           = u * (max_norm / global_norm)  otherwise

    The norm is the real-number sum rounded once, so jit, the order of leaves and sharding do not
    change a bit of it.

    Args:
        max_norm: a number or 0-d array above 0, ``inf`` clips nothing; a schedule, called with the
            count of the updates before; a traced value, as ``optax.inject_hyperparams`` passes; or
            a limit of `gradclip.limits`, which learns from each norm. What it has learnt is in the
            state alone: the object keeps nothing. No gradient flows through it. Updates that it
            would have skipped become 0; `apply_clipped` skips them.
        on_nonfinite: what to make of updates in which an element is NaN or inf: ``"nan"`` every
            element NaN, ``"zero"`` every element 0, ``"keep"`` as they are, ``"raise"``
            FloatingPointError, not under jit.
        axis_name: the name, or a tuple of names, of the axes of ``jax.shard_map`` or ``jax.vmap``
            along which lie other parts of the same updates. What is replicated along them counts
            once for each device.
        per_leaf: keep the norm of each leaf too, from the same pass, in a `ClipPerLeafState`. An
            optimizer takes this up, or leaves it, in the midst of a training: an update goes on
            from the state of either.

    Returns:
        A transformation whose state is a `ClipByGlobalNormState`, or of a limit that learns a
        `ClipByLimitState`, which with ``per_leaf`` is in a `ClipPerLeafState`. Its updates keep
        shapes and dtypes: float16, bfloat16, float8, float32, float64, complex64, complex128. NumPy
        arrays and Python numbers become JAX arrays.

    Raises:
        TypeError: ``max_norm`` is no real number; in an update, a leaf is of another dtype, or the
            state is another's.
        ValueError: ``max_norm`` or ``on_nonfinite`` is out of range; in an update under jit,
            ``on_nonfinite`` is ``"raise"``; with ``per_leaf``, updates have not as many leaves as
            the parameters that the state was made for.
        FloatingPointError: in an update, with ``on_nonfinite="raise"``.

    Follows ``optax.clip_by_global_norm``, with the differences that `gradclip.optax` lists.

    >>> clip = clip_by_global_norm(2.5)
    >>> updates = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> clipped, state = clip.update(updates, clip.init(updates))
    >>> print(clipped["w"], clipped["b"], optax.tree.get(state, "global_norm"), state.factor)
    [1.5] [2.] 5.0 0.5
    """
    clipping = Clipping(max_norm, on_nonfinite, axis_name, per_leaf=per_leaf)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, State]:
        clipped, state, _ = clipping.step(updates, state, params)
        return clipped, state

    return optax.GradientTransformation(clipping.init, update)


class Clipping:
    """What clips, and says if a step is to be skipped."""

    def __init__(
        self, max_norm: Any, on_nonfinite: OnNonfinite, axis_name: Any, *, per_leaf: bool
    ) -> None:
        _clip.check_policy(on_nonfinite)
        self._on_nonfinite = on_nonfinite
        self._axis_name = axis_name
        self._per_leaf = per_leaf
        self._schedule: Callable[[Any], Any] | None = None
        self._learner: Limit | None = None
        if isinstance(max_norm, Limit):
            self._learner = max_norm
        elif callable(max_norm):
            self._schedule = max_norm
        else:
            self._fixed = _limit(max_norm)

    @property
    def skips(self) -> bool:
        """If a step may have to be skipped."""
        return self._learner is not None and self._learner.skips

    def init(self, params: Any) -> State:
        """The state before the first update."""
        first = self._first(params)
        return ClipPerLeafState(_no_norms(params, first), first) if self._per_leaf else first

    def _first(self, params: Any) -> Inner:
        dtype = norm_dtype(params)
        with jax.enable_x64(True):
            counts = jnp.zeros((2,), "int32")
            first = ClipByGlobalNormState(jnp.zeros((), dtype), jnp.ones((), dtype), *counts)
            if self._learner is None:
                return first
            shape = self._shape(params)
            first = first._replace(factor=jnp.ones(shape, dtype))
            limit = jnp.full(shape, math.inf, dtype)
            return ClipByLimitState(*first, limit, judging.begun_bits(self._learner, shape))

    def step(self, updates: Any, state: Any, params: Any) -> tuple[Any, State, Any]:
        """The clipped updates, the state after them, and if the step is to be skipped."""
        like = updates if params is None else params
        known = state if isinstance(state, ClipPerLeafState) else None
        inner = self._state(state if known is None else known.clip_state, like)
        clipped, inner, skip, each = self._step(updates, inner)
        if not self._per_leaf:
            return clipped, inner, skip
        norms = _no_norms(like, inner) if known is None else known.norms
        if each is not None:  # there was something to clip
            _check_norms(norms, each)
            with jax.enable_x64(True):
                norms = each.astype(norms.dtype)
        return clipped, ClipPerLeafState(norms, inner), skip

    def _step(self, updates: Any, state: Any) -> tuple[Any, Inner, Any, Any]:
        """The same, and the norm of each leaf."""
        if self._learner is None:
            limit = self._fixed if self._schedule is None else _limit(self._schedule(state.count))
            clipped, norm, each = self._clipped(updates, limit)
            with jax.enable_x64(True):
                return clipped, _after(state, norm, limit), False, each
        judging.check_bits(self._learner, state.limit_state, self._shape(updates))
        lesson = judging.PassedLesson(self._learner, state.limit_state)
        clipped, norm, each = self._clipped(updates, lesson)
        if lesson.after is None:  # there was nothing to clip
            return clipped, state._replace(count=optax.safe_increment(state.count)), False, each
        with jax.enable_x64(True):
            limits = lesson.in_force, lesson.against, lesson.skip
            new = _learnt(state, norm, *limits, lesson.after)
        return clipped, new, lesson.skip if self.skips else False, each

    def _shape(self, tree: Any) -> tuple[int, ...]:
        """That of limits: of tensors, one for each."""
        per_tensor = self._learner is not None and self._learner.per_tensor
        return (number_of_leaves(tree),) if per_tensor else ()

    def _state(self, state: Any, params: Any) -> Any:
        """The state to go on from: one that begins, or has been left by another kind of limit.

        Raises:
            TypeError: it is another's.
        """
        wanted = ClipByGlobalNormState if self._learner is None else ClipByLimitState
        if isinstance(state, wanted):
            return state
        if state is None or isinstance(state, optax.EmptyState):
            return self._first(params)
        if not isinstance(state, Inner):
            raise TypeError(_WRONG_STATE.format(type(state).__name__))
        known = ("global_norm", "count", "clipped_count")
        return self._first(params)._replace(**{name: getattr(state, name) for name in known})

    def _clipped(self, updates: Any, limit: Any) -> tuple[Any, Any, Any]:
        """The clipped updates, their norm, and that of each leaf, if it is wanted."""
        updates = arrays_of(updates, "updates")
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(updates)):
            return updates, jnp.zeros((), "float32"), None
        return _clip.clipped(
            updates,
            limit,
            on_nonfinite=self._on_nonfinite,
            group=self._axis_name,
            called="updates",
            wants_each=self._per_leaf,
        )


_WRONG_STATE = (
    "the state is {}; gradclip.optax.clip_by_global_norm goes on from a ClipByGlobalNormState and "
    "begins from None or optax.EmptyState(): restore a checkpoint into the state that init returns"
)


def _limit(max_norm: Any) -> Any:
    """A limit, checked where its value is known."""
    if isinstance(max_norm, Tracer):
        return max_norm
    return np.float64(check_clip_norm(max_norm, "max_norm"))


def _no_norms(params: Any, state: Inner) -> Any:
    with jax.enable_x64(True):
        return jnp.zeros(number_of_leaves(params), state.global_norm.dtype)


def _check_norms(norms: Any, each: Any) -> None:
    if norms.shape != each.shape:
        raise ValueError(
            f"the updates have {each.shape[0]} leaves, and the state was made for parameters of "
            f"{norms.shape[0]}: with per_leaf=True they have to be as many"
        )


@jax.jit
def _after(state: Inner, norm: Any, limit: Any, against: Any = None) -> ClipByGlobalNormState:
    """The state after an update of this norm. Call it with float64 enabled."""
    dtype = state.global_norm.dtype
    held = norm if against is None else against
    above, factor = _compared(*lax.stop_gradient((held, limit)))
    clipped = jnp.any(above)
    return ClipByGlobalNormState(
        norm.astype(dtype),
        factor.astype(dtype),
        optax.safe_increment(state.count),
        jnp.where(clipped, optax.safe_increment(state.clipped_count), state.clipped_count),
    )


@jax.jit
def _learnt(
    state: Inner, norm: Any, limit: Any, against: Any, skip: Any, bits: Any
) -> ClipByLimitState:
    """The same of a limit that learns."""
    held = norm if jnp.ndim(limit) == 0 else against
    bound = jnp.where(skip, 0.0, limit)
    after: ClipByGlobalNormState = _after(state, norm, bound, held)
    return ClipByLimitState(*after, limit.astype(after.global_norm.dtype), bits)


def _compared(norm: Any, limit: Any) -> tuple[Any, Any]:
    """If a norm is not at most the limit, and the factor."""
    norm, limit = norm.astype("float64"), jnp.maximum(limit.astype("float64"), 0.0)
    above = ~(norm <= limit)
    return above, jnp.where(above, limit / norm, 1.0)
