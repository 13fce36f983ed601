"""The norms of leaves in a state, by their names."""

from __future__ import annotations

from typing import Any

import jax

from gradclip.core.norms import Norms
from gradclip.core.tree import flatten
from gradclip.optax.arrays import is_clipped
from gradclip.optax.clipping import ClipPerLeafState


def norms_of(state: Any, params: Any) -> Norms[jax.Array, jax.Array]:
    """The norm of each leaf of the latest updates, before clipping, from an optimizer's state.

    Args:
        state: one that holds a `ClipPerLeafState`, as ``clip_by_global_norm(..., per_leaf=True)``
            has it, alone or in any chain or wrapper.
        params: the parameters, or whatever has their tree, as the clip is given them.

    Returns:
        `gradclip.Norms`, its paths the keys that lead to each leaf of ``params``, joined by "/".
        Nothing is read from a device; under jit it is of traced values.

    Raises:
        ValueError: there is no `ClipPerLeafState` or more than one, or it is for other parameters.

    >>> import jax.numpy as jnp, optax
    >>> from gradclip.optax import clip_by_global_norm
    >>> params = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}
    >>> optimizer = optax.chain(clip_by_global_norm(2.5, per_leaf=True), optax.adam(1e-3))
    >>> _, state = optimizer.update(params, optimizer.init(params))
    >>> norms_of(state, params).as_dict()
    {'grad_norm/b': 4.0, 'grad_norm/w': 3.0, 'grad_norm': 5.0}
    """
    found = [node for node in jax.tree.leaves(state, is_leaf=_is_one) if _is_one(node)]
    if len(found) != 1:
        raise ValueError(
            f"the state holds {len(found)} of ClipPerLeafState; pass the part of it that holds the "
            "one of a clip_by_global_norm with per_leaf=True"
        )
    (one,), tree = found, flatten(params, "params")
    pairs = zip(tree.leaves, tree.names(), strict=True)
    names = [name for leaf, name in pairs if is_clipped(leaf)]
    if one.norms.shape[-1:] != (len(names),):
        raise ValueError(
            f"the state has norms of shape {one.norms.shape}, and params {len(names)} leaves that "
            "have a gradient; pass the parameters that the clip is given"
        )
    return Norms(one.norms, one.clip_state.global_norm, names)


def _is_one(node: Any) -> bool:
    return isinstance(node, ClipPerLeafState)
