"""What `test_optax.py` runs in a process of eight devices."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gradclip.limits import ZScore
from gradclip.optax import (
    ClipByGlobalNormState,
    apply_clipped,
    clip_by_global_norm,
    per_example_global_norm_clip,
)

SHARDED, WHOLE = PartitionSpec("data"), PartitionSpec()


def run() -> None:
    """Updates in shards give the bits of those on one device."""
    rng = np.random.default_rng(0)
    updates = {
        "w": rng.normal(size=(16, 5)).astype("float32"),
        "b": rng.normal(size=8).astype("float32"),
    }
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    one = clip_by_global_norm(2.0)
    expected = one.update(updates, one.init(updates))
    assert int(expected[1].clipped_count) == 1

    clip = clip_by_global_norm(2.0, axis_name="data")
    specs = ClipByGlobalNormState(WHOLE, WHOLE, WHOLE, WHOLE)
    sharded = partial(
        jax.shard_map, mesh=mesh, in_specs=(SHARDED, specs), out_specs=(SHARDED, specs)
    )
    check_same(jax.jit(sharded(clip.update))(updates, clip.init(updates)), expected)

    # What a limit learns is the same on all, and so is a step that is skipped.
    learns = apply_clipped(optax.adam(0.1), ZScore(z=4, warmup=2, beyond="skip"))
    shared = apply_clipped(optax.adam(0.1), ZScore(z=4, warmup=2, beyond="skip"), axis_name="data")
    whole = learns.init(updates)
    placing = jax.tree.map(lambda x: SHARDED if x.ndim and x.dtype == "float32" else WHOLE, whole)
    step = jax.jit(
        jax.shard_map(
            shared.update,
            mesh=mesh,
            in_specs=(SHARDED, placing),
            out_specs=(SHARDED, placing),
        )
    )
    state = whole
    for size in (1.0, 1.1, 50.0, 0.9):
        some = jax.tree.map(lambda x, size=size: np.float32(size) * x, updates)
        wanted, whole = jax.jit(learns.update)(some, whole)
        found, state = step(some, state)
        check_same(found, wanted)
        check_same(state, whole)
    assert int(state.skipped_count) == 1

    def two(updates, state):  # type: ignore[no-untyped-def]
        """The state is the carry of a scan within the shards."""
        step = lambda state, _: clip.update(updates, state)[::-1]  # noqa: E731
        state, clipped = jax.lax.scan(step, state, length=2)
        return jax.tree.map(lambda x: x[1], clipped), state

    counted = expected[1]._replace(count=jnp.int32(2), clipped_count=jnp.int32(2))
    check_same(jax.jit(sharded(two))(updates, clip.init(updates)), (expected[0], counted))

    # XLA divides it by itself: no axis to name, eagerly and under jit.
    placed = jax.device_put(updates, NamedSharding(mesh, SHARDED))
    for update in (one.update, jax.jit(one.update)):
        check_same(update(placed, one.init(placed)), expected)

    # Examples in shards, each clipped by itself, and their sums added.
    def per_example(grads):  # type: ignore[no-untyped-def]
        return jax.lax.psum(per_example_global_norm_clip(grads, 2.0), "data")

    some = {"w": updates["w"], "b": rng.normal(size=(16, 2)).astype("float32")}
    sums, number = jax.shard_map(per_example, mesh=mesh, in_specs=SHARDED, out_specs=WHOLE)(some)
    expected_sums, expected_number = per_example_global_norm_clip(some, 2.0)
    assert number == expected_number > 0
    for key, wanted in expected_sums.items():
        np.testing.assert_allclose(sums[key], wanted, rtol=1e-5, atol=1e-6)
    print("ok")


def check_same(actual: object, expected: object) -> None:
    """The same bits in each leaf."""
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    for got, wanted in pairs:
        assert got.dtype == wanted.dtype
        assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes(), (got, wanted)
