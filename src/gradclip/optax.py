"""Optax's own words: change the import, clip by the right norm, and read it from the state.

`clip_by_global_norm` differs from ``optax.clip_by_global_norm`` in this, on purpose:

- The norm is correctly rounded, in float32, or float64 if a leaf is float64 or complex128. Optax
  sums in the dtype of the leaves; its norm of 500 bfloat16 leaves of 256 ones is 28 % low.
- Finite updates whose squares overflow or underflow are clipped rightly; optax makes
  ``[1e20, 1e20]`` in float32 zeros, and lets ``[1e-30, 1e-30]`` pass at ``max_norm=1e-31``.
- Each element is multiplied by one factor and rounded once. Optax divides and multiplies in the
  leaf's dtype, which it changes where ``max_norm`` is an array of a wider one.
- At a norm equal to ``max_norm`` each leaf is bit for bit its input; optax scales there.
- A NaN anywhere makes every leaf NaN, as in optax; so does an inf, of which optax makes NaN in its
  own place and 0 elsewhere. `on_nonfinite` has three other ways.
- ``max_norm`` of 0, below 0 or NaN is a ValueError, where it is known. Traced, what is below 0
  acts as 0, where optax turns the updates around. Updates of norm 0 are kept there; optax makes
  them NaN.
- ``max_norm`` may be a schedule, and the state is a `ClipByGlobalNormState`; optax's is empty. So
  ``optax.tree.get(state, "count")`` may find a second count, and needs ``filtering``. Of several
  clips in a chain, ``optax.tree.get_all_with_path(state, "ClipByGlobalNormState")`` has all.
- A float0 leaf, the gradient of an integer, keeps its place; optax fails on it. Integers are a
  TypeError. None and ``optax.MaskedNode`` keep their places in both.
- ``axis_name`` takes the norm over the shards of a gradient.

`per_example_global_norm_clip` lists its own.

A state that ``optax.clip_by_global_norm`` has left, alone or in a chain, is taken over: where an
update finds ``optax.EmptyState()`` or None it begins as `init` does, a schedule at 0 too. The state
that comes back has another structure, for which ``jax.jit`` compiles once more and ``lax.scan``,
``optax.MultiSteps`` and ``optax.apply_if_finite`` fail. For them, put the states in first::

    state = jax.tree.map(
        lambda new, old: new if isinstance(new, ClipByGlobalNormState) else old,
        optimizer.init(params), state,
        is_leaf=lambda node: isinstance(node, ClipByGlobalNormState),
    )

Orbax and ``flax.serialization`` restore into a state of the structure that was saved: give them the
one of optax's own optimizer, and go on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.core import Tracer
from jax.experimental.sparse import JAXSparse

from gradclip import _clip
from gradclip.core.decide import OnNonfinite, check_clip_norm, check_use_norm
from gradclip.core.sparse import IndexedSlices
from gradclip.jax.examples import clipped_sum
from gradclip.jax.leaf import checked
from gradclip.jax.traced import limit_of

__all__ = ["ClipByGlobalNormState", "clip_by_global_norm", "per_example_global_norm_clip"]


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


def clip_by_global_norm(
    max_norm: Any | Callable[[Any], Any],
    *,
    on_nonfinite: OnNonfinite = "nan",
    axis_name: Any = None,
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
            count of the updates before; or a traced value, as ``optax.inject_hyperparams`` passes.
        on_nonfinite: what to make of updates in which an element is NaN or inf: ``"nan"`` every
            element NaN, ``"zero"`` every element 0, ``"keep"`` as they are, ``"raise"``
            FloatingPointError, not under jit.
        axis_name: the name, or a tuple of names, of the axes of ``jax.shard_map`` or ``jax.vmap``
            along which lie other parts of the same updates. What is replicated along them counts
            once for each device.

    Returns:
        A transformation whose state is a `ClipByGlobalNormState`. Its updates keep shapes and
        dtypes: float16, bfloat16, float8, float32, float64, complex64, complex128. NumPy arrays
        and Python numbers become JAX arrays.

    Raises:
        TypeError: ``max_norm`` is no real number; in an update, a leaf is of another dtype, or the
            state is another's.
        ValueError: ``max_norm`` or ``on_nonfinite`` is out of range; in an update under jit,
            ``on_nonfinite`` is ``"raise"``.
        FloatingPointError: in an update, with ``on_nonfinite="raise"``.

    Follows ``optax.clip_by_global_norm``, with the differences that `gradclip.optax` lists.

    >>> clip = clip_by_global_norm(2.5)
    >>> updates = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> clipped, state = clip.update(updates, clip.init(updates))
    >>> print(clipped["w"], clipped["b"], optax.tree.get(state, "global_norm"), state.factor)
    [1.5] [2.] 5.0 0.5
    """
    _clip.check_policy(on_nonfinite)
    fixed = None if callable(max_norm) else _limit(max_norm)

    def init(params: Any) -> ClipByGlobalNormState:
        dtype = _norm_dtype(params)
        with jax.enable_x64(True):
            start = (jnp.zeros((), dtype), jnp.ones((), dtype))
            return ClipByGlobalNormState(*start, *jnp.zeros((2,), "int32"))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ClipByGlobalNormState]:
        if state is None or isinstance(state, optax.EmptyState):
            state = init(updates if params is None else params)
        elif not isinstance(state, ClipByGlobalNormState):
            raise TypeError(_WRONG_STATE.format(type(state).__name__))
        limit = _limit(max_norm(state.count)) if fixed is None else fixed
        clipped, norm = _clipped(updates, limit, on_nonfinite, axis_name, "updates")
        with jax.enable_x64(True):
            return clipped, _after(state, norm, limit)

    return optax.GradientTransformation(init, update)


def per_example_global_norm_clip(grads: Any, l2_norm_clip: Any) -> tuple[Any, Any]:
    """Clip the gradient of each example by its own global norm, and add them up.

    ::

        sum over i of g_i * min(1, l2_norm_clip / norm(g_i)),   g_i = example i of every leaf

    No example adds more than ``l2_norm_clip`` to the sum, up to the rounding of its elements, as
    differential privacy needs. ``grads`` are read twice, for all norms and for all sums, and no
    clipped example is written: beside ``grads`` there is memory for the sum. Where the C kernel
    does not reach, examples are clipped one after the other, in memory for one of them.

    ======================================  =======================================
    an example or limit                     what it adds
    ======================================  =======================================
    norm 0                                  zeros, not counted as clipped
    norm equal to the limit                 itself to the bit, not counted
    finite, its squares over- or underflow  what the formula says
    an element NaN or inf                   zeros, counted
    limit 0                                 zeros, counted if its norm is above 0
    limit inf                               itself; zeros, not counted, of norm inf
    limit below 0 or NaN                    ValueError; traced: as limit 0
    ======================================  =======================================

    Args:
        grads: a tree of arrays, the examples along the first axis of each; None keeps its place.
        l2_norm_clip: a real scalar, 0 or above; or a traced one.

    Returns:
        ``(clipped_sum, num_clipped)``: the tree without the first axis, in its dtypes, summed in
        float64 in the order of the examples and rounded once; and how many norms were not at most
        the limit, int32. With no leaves or no examples the sum is empty or 0.

    Raises:
        TypeError: a leaf is not of a dtype that `clip_by_global_norm` clips, or the limit no
            number.
        ValueError: the leaves are not of one length along a first axis, or the limit is out of
            range.

    Follows ``optax.per_example_global_norm_clip`` (Abadi et al., 2016, arXiv:1607.00133) and the
    edge cases of ``jax_privacy.clipping.clipped_fun`` with its ``nan_safe=True``. What differs:

    - Both square in the dtype of the leaves, so that large finite examples become 0, and small
      ones are not clipped.
    - In optax an element that is NaN or inf makes NaN of its place in the sum, and is not counted
      if NaN. A limit below 0 turns examples around; one of NaN clips nothing.
    - Optax rounds the factors to the dtype of the leaves, or widens the sum to that of the norm.
    - Optax fails on a tree without leaves, and makes float32 of integers. jax_privacy cuts their
      fractions off.
    - jax_privacy takes a limit of NaN for 0. It also takes a tree of limits, scales to a norm of
      1, and can leave out examples that pad a batch.

    >>> grads = [jnp.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])]
    >>> clipped_sum, num_clipped = per_example_global_norm_clip(grads, 2.5)
    >>> print(clipped_sum[0], num_clipped)
    [1.8 2.4] 1
    """
    if isinstance(l2_norm_clip, Tracer):
        limit_of("l2_norm_clip", l2_norm_clip, check_use_norm)
    else:
        given = l2_norm_clip
        l2_norm_clip = np.float64(float(check_use_norm(given, "l2_norm_clip")))
        if math.isnan(l2_norm_clip):
            raise ValueError(f"l2_norm_clip is {given!r}; it must be 0 or above")
    grads = _arrays(grads, "grads")
    count = _examples(grads)
    with jax.enable_x64(True):
        clipped_sum, num_clipped = _clipped_sum(grads, l2_norm_clip, count)
    return clipped_sum, num_clipped


# ---- one tree ----

_WRONG_STATE = (
    "the state is {}; gradclip.optax.clip_by_global_norm goes on from a ClipByGlobalNormState and "
    "begins from None or optax.EmptyState(): restore a checkpoint into the state that init returns"
)


def _limit(max_norm: Any) -> Any:
    """A limit, checked where its value is known."""
    if isinstance(max_norm, Tracer):
        return max_norm
    return np.float64(check_clip_norm(max_norm, "max_norm"))


def _clipped(
    updates: Any, limit: Any, on_nonfinite: OnNonfinite, axis_name: Any, called: str
) -> Any:
    """The clipped updates and their norm; ``called`` is the argument that holds them."""
    updates = _arrays(updates, called)
    if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(updates)):
        return updates, jnp.zeros((), "float32")
    return _clip.clipped(updates, limit, on_nonfinite=on_nonfinite, group=axis_name, called=called)


def _arrays(tree: Any, called: str) -> Any:
    """The tree with every leaf an array of JAX, but those that the core has to see as they are.

    Raises:
        TypeError: a leaf is none, and cannot become one.
    """
    try:
        return jax.tree.map(_array, tree, is_leaf=_is_leaf)
    except TypeError:
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=_is_leaf):
            try:
                _array(leaf)
            except TypeError as error:
                where = f"{called}{jax.tree_util.keystr(path)}"
                raise TypeError(f"{where} is {type(leaf).__name__}: {error}") from None
        raise


def _array(leaf: Any) -> Any:
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=jnp.asarray(leaf.values))
    return leaf if _is_leaf(leaf) else jnp.asarray(leaf)


def _is_leaf(node: Any) -> bool:
    """What is an array, sparse ones, which are no container here, and float0."""
    return (
        isinstance(node, jax.Array | IndexedSlices | JAXSparse)
        or getattr(node, "dtype", None) == jax.dtypes.float0
    )


def _norm_dtype(params: Any) -> str:
    """The dtype of the norm of updates for these parameters."""
    wide = "float64", "complex128"
    may_be = [
        leaf
        for leaf in jax.tree.leaves(params)  # of which some may be functions or names
        if isinstance(leaf, float | complex) or str(getattr(leaf, "dtype", None)) in wide
    ]
    return "float64" if any(str(jnp.result_type(leaf)) in wide for leaf in may_be) else "float32"


@jax.jit
def _after(state: ClipByGlobalNormState, norm: Any, limit: Any) -> ClipByGlobalNormState:
    """The state after an update of this norm. Call it with float64 enabled."""
    dtype = state.global_norm.dtype
    above, factor = _compared(*lax.stop_gradient((norm, limit)))
    return ClipByGlobalNormState(
        norm.astype(dtype),
        factor.astype(dtype),
        optax.safe_increment(state.count),
        jnp.where(above, optax.safe_increment(state.clipped_count), state.clipped_count),
    )


def _compared(norm: Any, limit: Any) -> tuple[Any, Any]:
    """If a norm is not at most the limit, and the factor."""
    norm, limit = norm.astype("float64"), jnp.maximum(limit.astype("float64"), 0.0)
    above = ~(norm <= limit)
    return above, jnp.where(above, limit / norm, 1.0)


# ---- a batch of trees ----


def _examples(grads: Any) -> int:
    """How many examples there are."""
    shapes = {}
    found = jax.tree.leaves_with_path(grads, is_leaf=_is_leaf)
    for path, leaf in found:
        if not isinstance(leaf, jax.Array) or not isinstance(leaf.dtype, np.dtype):
            kind = getattr(leaf, "dtype", None) if isinstance(leaf, jax.Array) else type(leaf)
            raise TypeError(
                f"grads{jax.tree_util.keystr(path)} is {getattr(kind, '__name__', kind)}; each "
                "leaf is to be a dense array of numbers"
            )
        shapes[jax.tree_util.keystr(path)] = leaf.shape
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) > 1 or () in lengths:
        raise ValueError(
            f"the shapes of grads are {shapes}; each needs a first axis, of the examples, "
            "of the same length"
        )
    for path, leaf in found:
        checked(leaf, partial("grads{}".format, jax.tree_util.keystr(path)))
    return lengths.pop()[0] if lengths else 0


@partial(jax.jit, static_argnums=2)
def _clipped_sum(grads: Any, limit: Any, count: int) -> tuple[Any, Any]:
    """The sum of the clipped examples, and how many were clipped. Call it with float64 enabled."""
    leaves, spec = jax.tree.flatten(grads)
    with jax.named_scope("per_example_global_norm_clip"):
        sums, number = clipped_sum(leaves, limit, count)
    return jax.tree.unflatten(spec, sums), number
