"""An optimizer whose updates are clipped, and whose steps can be skipped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, SupportsFloat

import jax
import jax.numpy as jnp
import optax

from gradclip.core.decide import OnNonfiniteStep, check_on_nonfinite
from gradclip.core.limits import Limit
from gradclip.optax.clipping import Clipping, State


class ApplyClippedState(NamedTuple):
    """What `apply_clipped` keeps.

    Attributes:
        clip_state: of the clip, which sees every update.
        inner_state: of the optimizer, which sees those that are not skipped.
        skipped_count: how many were skipped, int32, stops at its largest value.
    """

    clip_state: State
    inner_state: Any
    skipped_count: jax.Array


def apply_clipped(
    inner: optax.GradientTransformation,
    max_norm: SupportsFloat | Callable[[Any], Any] | Limit,
    *,
    on_nonfinite: OnNonfiniteStep = "nan",
    axis_name: Any = None,
    per_leaf: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Clip updates, hand them to an optimizer, and hold it still in steps that are skipped.

    It is ``optax.chain(clip_by_global_norm(max_norm), inner)``, but for updates that a limit with
    ``beyond="skip"`` has skipped, and with ``on_nonfinite="skip"`` for those in which an element is
    NaN or inf. Then all updates are 0 and the state of ``inner`` is what it was, to the bit, as
    ``optax.apply_if_finite`` has it: in a chain momentum would go on and moments would fade.
    ``inner`` is to hold all that follows the clip.

    Args:
        inner: an optimizer. It is called in every step, and what it makes of one that is skipped is
            dropped: so nothing of it has to be copied or compiled twice.
        max_norm: as in `clip_by_global_norm`.
        on_nonfinite: as in `clip_by_global_norm`, or ``"skip"``.
        axis_name: as in `clip_by_global_norm`.
        per_leaf: as in `clip_by_global_norm`.

    Returns:
        A transformation whose state is an `ApplyClippedState`. It hands further arguments of an
        update on to ``inner``.

    Raises:
        TypeError, ValueError, FloatingPointError: as `clip_by_global_norm`.

    >>> from gradclip import limits
    >>> limit = limits.ZScore(z=4, warmup=2, beyond="skip")
    >>> optimizer = apply_clipped(optax.sgd(1.0, momentum=0.5), limit)
    >>> params = jnp.zeros(2)
    >>> state = optimizer.init(params)
    >>> for size in (1.0, 1.1, 100.0):
    ...     updates, state = optimizer.update(size * jnp.array([3.0, 4.0]), state)
    >>> print(updates, state.clip_state.global_norm, state.skipped_count)
    [0. 0.] 500.0 1
    """
    check_on_nonfinite(on_nonfinite, steps=True)
    skips_nonfinite = on_nonfinite == "skip"
    policy = "nan" if on_nonfinite == "skip" else on_nonfinite
    clipping = Clipping(max_norm, policy, axis_name, per_leaf=per_leaf)
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ApplyClippedState:
        with jax.enable_x64(True):
            none = jnp.zeros((), "int32")
        return ApplyClippedState(clipping.init(params), inner.init(params), none)

    def update(
        updates: Any, state: ApplyClippedState, params: Any = None, **extra: Any
    ) -> tuple[Any, ApplyClippedState]:
        clipped, clip_state, skip = clipping.step(updates, state.clip_state, params)
        if skips_nonfinite:
            skip = skip | _are_nan(clipped)
        new, inner_state = inner.update(clipped, state.inner_state, params, **extra)
        skipped_count = state.skipped_count
        if clipping.skips or skips_nonfinite:
            with jax.enable_x64(True):
                new, inner_state, skipped_count = _unless(
                    skip, new, inner_state, state.inner_state, skipped_count
                )
        return new, ApplyClippedState(clip_state, inner_state, skipped_count)

    return optax.GradientTransformationExtraArgs(init, update)


def _are_nan(clipped: Any) -> Any:
    """If all elements have become NaN, as they do where one was NaN or inf."""
    for leaf in jax.tree.leaves(clipped):
        if isinstance(leaf, jax.Array) and leaf.size:
            return jnp.isnan(leaf.ravel()[0])
    return False


@jax.jit
def _unless(skip: Any, new: Any, state: Any, before: Any, count: Any) -> tuple[Any, Any, Any]:
    """What a step makes: unless it is skipped, what is new. Call it with float64 enabled."""
    state = jax.tree.map(lambda new, old: jnp.where(skip, old, new), state, before)
    new = jax.tree.map(lambda x: jnp.where(skip, jnp.zeros_like(x), x), new)
    return new, state, jnp.where(skip, optax.safe_increment(count), count)
