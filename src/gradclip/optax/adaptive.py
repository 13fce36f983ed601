"""Adaptive gradient clipping: each unit by the norm of its weights."""

from __future__ import annotations

from functools import partial
from typing import Any, SupportsFloat

import jax
import optax
from jax.core import Tracer

from gradclip.core.units import check_units
from gradclip.jax.leaf import checked
from gradclip.jax.units import clipped_units
from gradclip.optax.arrays import arrays_of, is_leaf


def adaptive_grad_clip(
    clipping: SupportsFloat, eps: SupportsFloat = 1e-3, axis: int | tuple[int, ...] | None = None
) -> optax.GradientTransformation:
    """Scale the update of each unit down to at most ``clipping`` times the norm of its weights.

    ::

        limit = clipping * max(norm of the unit's weights, eps)
        u     = u                               if norm of the unit's u <= limit
        u     = u * (limit / norm of its u)     otherwise

    =========================  ===============================================
    a leaf                     its units
    =========================  ===============================================
    of at most one dimension   all of it; so too where the others have length 1
    of 2 or 3 dimensions       along the first: columns of a layer (in, out)
    of 4 or 5 dimensions       along all but the last: filters of a convolution
    =========================  ===============================================

    Args:
        clipping: a number above 0, or a traced one.
        eps: the least norm of weights to reckon with, a number above 0, or a traced one.
        axis: the axis, or axes, along which units lie, if not as above.

    Returns:
        A transformation without a state; an update needs ``params``. Shapes and dtypes stay.

    Raises:
        TypeError, ValueError: an argument is out of range; in an update, a leaf is not of a dtype
            that `clip_by_global_norm` clips, has over five dimensions and there is no ``axis``, or
            has not the shape of its parameter; or there are no ``params``.

    Follows ``optax.adaptive_grad_clip`` and Brock et al., 2021 (arXiv:2102.06171). What differs:

    - Norms are correctly rounded; optax squares and sums in the dtype of the leaves, where finite
      elements overflow and underflow.
    - Each element is multiplied by one factor and rounded once; optax rounds the factor to the
      dtype of the leaf first, or widens the leaf where ``clipping`` is an array of a wider one.
    - A unit of a norm equal to its limit is bit for bit its input.
    - Optax divides by 1e-6 where the norm is less, so that a small unit above its limit is scaled
      down too far.
    - Of a unit in which an element is NaN or inf every element becomes NaN; optax makes 0 of those
      beside an inf.
    - ``clipping`` and ``eps`` of 0, below 0 or NaN are a ValueError, where they are known.

    >>> import jax.numpy as jnp
    >>> clip = adaptive_grad_clip(0.5)
    >>> params = jnp.array([[3.0, 0.3], [4.0, 0.4]])
    >>> updates, _ = clip.update(jnp.array([[6.0, 0.1], [8.0, 0.1]]), clip.init(params), params)
    >>> print(updates)
    [[1.5 0.1]
     [2.  0.1]]
    """
    if not isinstance(clipping, Tracer) and not isinstance(eps, Tracer):
        clipping, eps = check_units(clipping, eps)

    def init(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("params is None; each update is clipped by the norm of its weights")
        updates, params = arrays_of(updates, "updates"), arrays_of(params, "params")
        with jax.enable_x64(True):
            clip = partial(_clipped, axis=axis, clipping=clipping, eps=eps)
            new = jax.tree.map_with_path(clip, updates, params, is_leaf=is_leaf)
        return new, state

    return optax.GradientTransformation(init, update)


def _clipped(path: Any, x: Any, weights: Any, *, axis: Any, clipping: Any, eps: Any) -> Any:
    if getattr(x, "dtype", None) == jax.dtypes.float0:
        return x
    place = jax.tree_util.keystr(path)
    checked(x, lambda: f"updates{place}")
    checked(weights, lambda: f"params{place}")
    if x.shape != weights.shape:
        raise ValueError(
            f"updates{place} has the shape {x.shape}, and params{place} {weights.shape}; they must "
            "be the same"
        )
    return _clipped_units(x, weights, clipping, eps, _axes(x, axis, place))


_clipped_units = jax.jit(clipped_units, static_argnums=4)


def _axes(x: Any, axis: Any, place: str) -> tuple[int, ...]:
    """Along which axes a unit lies."""
    if axis is not None:
        axes = axis if isinstance(axis, tuple) else (axis,)
        return tuple(range(x.ndim)[each] for each in axes)
    if sum(length != 1 for length in x.shape) <= 1:
        return tuple(range(x.ndim))
    if x.ndim > 5:
        raise ValueError(f"updates{place} has the shape {x.shape}; of over 5 axes, give axis")
    return (0,) if x.ndim < 4 else tuple(range(x.ndim - 1))
