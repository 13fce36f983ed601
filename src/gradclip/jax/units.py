"""Arrays clipped unit by unit. Call it with float64 enabled."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradclip.core.units import limits_of_units
from gradclip.jax.traced import clip_values


def clipped_units(x: Any, weights: Any, clipping: Any, eps: Any, axes: tuple[int, ...]) -> Any:
    """An array with each unit clipped by the norm of its weights; a unit lies along ``axes``."""
    norms, _ = _clipped(_units(weights, axes), np.float64(math.inf), "keep")
    limits = limits_of_units(jnp.maximum, norms, clipping, eps)
    _, new = _clipped(_units(x, axes), limits, "nan")
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    order: Any = np.argsort([*kept, *axes]) if x.ndim else []
    lengths = [x.shape[axis] for axis in (*kept, *axes)]
    return new.reshape(lengths).transpose(order)


def _units(x: Any, axes: tuple[int, ...]) -> Any:
    """A row for each unit."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    count = math.prod(x.shape[axis] for axis in kept)
    return x.transpose([*kept, *axes]).reshape(count, math.prod(x.shape[axis] for axis in axes))


def _clipped(rows: Any, limits: Any, policy: str) -> tuple[Any, Any]:
    """The norm of each row, float64, and rows that are clipped by their limits."""

    def clip(row: Any, limit: Any) -> tuple[Any, Any]:
        found, (new,) = clip_values(None, policy, None, False, limit, None, [row], [None])
        return found.wide, new

    found: tuple[Any, Any] = jax.vmap(clip)(rows, jnp.broadcast_to(limits, rows.shape[:1]))
    return found
