"""The derivative of a clip in JAX, also of norms beyond float64. Call it with float64 enabled."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from gradclip.jax.operations import Operations
from gradclip.kernels.traced import derivative

LOWER = 2.0**-64
_OPS = Operations()


def pushed_forward(
    axes: Any, policy: str, norm: Any, lowered: Any, primals: Any, tangents: Any
) -> tuple[Any, list[Any]]:
    """The change of the norm and of the outputs, from that of the inputs.

    JAX transposes it for reverse mode. Inputs are (limit, given norm or None, values, rows);
    ``lowered`` is the norm times `LOWER`, finite where the norm itself is beyond float64.
    """
    limit, given, values, rows = primals
    d_limit, d_given, d_values, _ = tangents
    beyond = jnp.isinf(norm) & jnp.isfinite(lowered)
    unit = jnp.where(beyond, LOWER, 1.0)
    bound = jnp.maximum(limit.astype("float64"), 0.0) * unit
    at = derivative.slope(_OPS, jnp.where(beyond, lowered, norm), bound, policy)
    at = at._replace(unit=unit)
    if given is None:
        d_norm = _change_of_norm(values, rows, at, d_values)
        d_norm = d_norm if axes is None else lax.psum(d_norm, axes)
    else:
        d_norm = _float64(d_given)
    d_limit = jnp.where(limit > 0, _float64(d_limit), 0.0)
    return d_norm, derivative.pushed_forward(
        _OPS, values, at, d_limit=d_limit, d_norm=d_norm, d_values=d_values
    )


def pushed_forward_each(
    axes: Any, policy: str, held: Any, primals: Any, tangents: Any
) -> tuple[Any, list[Any]]:
    """The same where each leaf has a limit of its own, which is a constant.

    ``held`` is the norm of all leaves, and of each what its limit is held against, the limit, and
    if it is against a norm of its own.
    """
    whole, against, limits, own = held
    _, _, values, rows = primals
    _, _, d_values, _ = tangents
    none = derivative.slope(_OPS, whole, math.inf, policy)
    at = [
        derivative.slope(_OPS, norm, limit, policy)
        for norm, limit in zip(against, limits, strict=True)
    ]
    parts = zip(values, rows, at, d_values, strict=True)
    changes = [_change_of_norm(values, rows, none, d_values)]
    changes += [_change_of_norm([x], [places], slope, [dx]) for x, places, slope, dx in parts]
    d_norms = jnp.stack(changes)
    d_norms = d_norms if axes is None else lax.psum(d_norms, axes)
    d_whole, d_held = d_norms[0], jnp.where(own, d_norms[1:], d_norms[0])
    new = []
    for x, slope, d_norm, dx in zip(values, at, d_held, d_values, strict=True):
        new += derivative.pushed_forward(
            _OPS, [x], slope, d_limit=0.0, d_norm=d_norm, d_values=[dx]
        )
    return d_whole, new


def change_of_each(
    axes: Any, norms: Any, values: list[Any], rows: list[Any], d_values: list[Any]
) -> Any:
    """The change of the norm of each leaf, from the norms as float64."""
    changes = [jnp.zeros(0)]
    for norm, x, places, dx in zip(norms, values, rows, d_values, strict=True):
        at = derivative.slope(_OPS, norm, math.inf, "keep")
        changes.append(_change_of_norm([x], [places], at, [dx])[None])
    found = jnp.concatenate(changes)
    return found if axes is None else lax.psum(found, axes)


def _change_of_norm(values: list[Any], rows: list[Any], at: Any, d_values: list[Any]) -> Any:
    leaves, changes = [], []
    for x, places, dx in zip(values, rows, d_values, strict=True):
        leaves.append((x, None) if places is None else rows_of(x, places))
        changes.append(dx if places is None else rows_of(dx, places)[0])
    return derivative.change_of_norm(_OPS, leaves, at, changes)


def rows_of(x: Any, places: Any) -> tuple[Any, Any]:
    """The rows of a sparse leaf as a matrix, those without a place zero, and their places."""
    inner = x.shape[places.ndim :]
    rows = jnp.broadcast_to(x, (*places.shape, *inner)).reshape(places.size, math.prod(inner))
    places = places.reshape(-1)
    return jnp.where(places[:, None] >= 0, rows, 0), places


def _float64(tangent: Any) -> Any:
    """The tangent of a scalar; that of an integer is none."""
    return 0.0 if tangent.dtype == jax.dtypes.float0 else tangent.astype("float64")
