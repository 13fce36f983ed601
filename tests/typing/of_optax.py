"""What `gradclip.optax` takes and returns.

To mypy optax has no types, and what is its own is Any; pyright reads its source.
"""

import jax.numpy as jnp
import optax
import pytest
from jax import Array
from told import assert_type

import gradclip
from gradclip import limits
from gradclip.optax import (
    ApplyClippedState,
    ClipByGlobalNormState,
    ClipByLimitState,
    ClipPerLeafState,
    adaptive_grad_clip,
    apply_clipped,
    clip_by_global_norm,
    norms_of,
    per_example_global_norm_clip,
)

params = {"w": jnp.array([3.0]), "b": jnp.array([4.0])}

# Limits are numbers, arrays, schedules, and objects that learn.
clip = clip_by_global_norm(1.0)
assert_type(clip, optax.GradientTransformation)
assert_type(clip_by_global_norm(jnp.array(1.0)), optax.GradientTransformation)
assert_type(clip_by_global_norm(optax.linear_schedule(1.0, 0.5, 10)), optax.GradientTransformation)
assert_type(clip_by_global_norm(lambda count: 1.0 / (count + 1)), optax.GradientTransformation)
assert_type(clip_by_global_norm(limits.ZScore(), per_leaf=True), optax.GradientTransformation)
held = apply_clipped(optax.sgd(0.1), limits.ZScore(beyond="skip"), on_nonfinite="skip")
assert_type(held, optax.GradientTransformationExtraArgs)
assert_type(adaptive_grad_clip(0.01, axis=(0, 1)), optax.GradientTransformation)
optimizer = optax.chain(clip_by_global_norm(1.0, per_leaf=True), optax.adam(1e-3))
assert_type(norms_of(optimizer.init(params), params), gradclip.Norms[Array, Array])

examples = {"w": jnp.ones((3, 2)), "b": jnp.ones((3, 1))}
assert_type(per_example_global_norm_clip(examples, 1.0), tuple[dict[str, Array], Array])


def told_of(state: ClipByGlobalNormState | ClipByLimitState) -> list[Array]:
    return [state.global_norm, state.factor, state.count, state.clipped_count]


state = clip.init(params)
assert isinstance(state, ClipByGlobalNormState)
assert_type(told_of(state), list[Array])
kept = held.init(params)
assert isinstance(kept, ApplyClippedState)
assert_type(kept.skipped_count, Array)
assert_type(kept.clip_state, ClipByGlobalNormState | ClipByLimitState | ClipPerLeafState)
each = clip_by_global_norm(1.0, per_leaf=True).init(params)
assert isinstance(each, ClipPerLeafState)
assert_type(each.norms, Array)

with pytest.raises(TypeError):
    clip_by_global_norm("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm(None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    clip_by_global_norm(1.0, "nan")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
with pytest.raises(ValueError, match="on_nonfinite"):
    clip_by_global_norm(1.0, on_nonfinite="skip")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
with pytest.raises(TypeError):
    per_example_global_norm_clip(examples, None)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
