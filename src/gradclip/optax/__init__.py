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
  own place and 0 elsewhere. ``on_nonfinite`` has three other ways.
- ``max_norm`` of 0, below 0 or NaN is a ValueError, where it is known. Traced, what is below 0
  acts as 0, where optax turns the updates around. Updates of norm 0 are kept there; optax makes
  them NaN.
- ``max_norm`` may be a schedule, and the state is a `ClipByGlobalNormState`; optax's is empty. So
  ``optax.tree.get(state, "count")`` may find a second count, and needs ``filtering``. Of several
  clips in a chain, ``optax.tree.get_all_with_path(state, "ClipByGlobalNormState")`` has all.
- A float0 leaf, the gradient of an integer, keeps its place; optax fails on it. Integers are a
  TypeError. None and ``optax.MaskedNode`` keep their places in both.
- ``axis_name`` takes the norm over the shards of a gradient.

`per_example_global_norm_clip` and `adaptive_grad_clip` list their own; `apply_clipped` has no model
in optax.

A state that ``optax.clip_by_global_norm`` has left, alone or in a chain, is taken over: where an
update finds ``optax.EmptyState()`` or None it begins as by ``init``, a schedule at 0 too. The state
that comes back has another structure, for which ``jax.jit`` compiles once more and ``lax.scan``,
``optax.MultiSteps`` and ``optax.apply_if_finite`` fail. For them, put the states in first::

    state = jax.tree.map(
        lambda new, old: new if isinstance(new, ClipByGlobalNormState) else old,
        optimizer.init(params), state,
        is_leaf=lambda node: isinstance(node, ClipByGlobalNormState),
    )

Orbax and ``flax.serialization`` restore into a state of the structure that was saved: give them the
one of optax's own optimizer, and go on from there. All of this holds too where ``per_leaf=True`` is
new: a state that was saved without it is what an update goes on from, and the other way round.
"""

import jax
import optax

from gradclip.core.versions import require

require("jax>=0.8.2", jax.__version__)
require("optax>=0.2.5", optax.__version__)

from gradclip.optax.adaptive import adaptive_grad_clip
from gradclip.optax.clipping import (
    ClipByGlobalNormState,
    ClipByLimitState,
    ClipPerLeafState,
    clip_by_global_norm,
)
from gradclip.optax.examples import per_example_global_norm_clip
from gradclip.optax.leaves import norms_of
from gradclip.optax.steps import ApplyClippedState, apply_clipped

__all__ = [
    "ApplyClippedState",
    "ClipByGlobalNormState",
    "ClipByLimitState",
    "ClipPerLeafState",
    "adaptive_grad_clip",
    "apply_clipped",
    "clip_by_global_norm",
    "norms_of",
    "per_example_global_norm_clip",
]

for _state in (ApplyClippedState, ClipByGlobalNormState, ClipByLimitState, ClipPerLeafState):
    _state.__module__ = __name__  # by which states are pickled, wherever the code stands
