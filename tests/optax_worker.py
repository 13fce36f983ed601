"""What `test_optax.py` runs in a process of eight devices."""

from __future__ import annotations

import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradclip
from gradclip.limits import Average, Percentile, PerTensor, ZScore
from gradclip.optax import (
    ClipByGlobalNormState,
    apply_clipped,
    clip_by_global_norm,
    per_example_global_norm_clip,
)

AXES = (None, "data")
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

    # Each tensor by itself: one sum over the shards for all of them.
    alone, split = (clip_by_global_norm(PerTensor(Percentile(30)), axis_name=axis) for axis in AXES)
    whole, state = alone.init(updates), split.init(updates)
    placing = jax.tree.map(lambda _: WHOLE, whole)
    step = jax.jit(
        jax.shard_map(
            split.update, mesh=mesh, in_specs=(SHARDED, placing), out_specs=(SHARDED, placing)
        )
    )
    for sizes in ((1.0, 2.0), (3.0, 1.0), (0.5, 9.0)):
        some = {key: np.float32(size) * updates[key] for key, size in zip("wb", sizes, strict=True)}
        wanted, whole = jax.jit(alone.update)(some, whole)
        found, state = step(some, state)
        check_same((found, state), (wanted, whole))
    assert int(state.clipped_count) > 0

    # An object learns from arrays that XLA divides by itself as from those on one device.
    for kind in (Average(2.0), PerTensor(Average(2.0, warmup=1))):
        here, there = (pickle.loads(pickle.dumps(kind)) for _ in range(2))
        for size in (1.0, 5.0, 0.1):
            some = jax.tree.map(lambda x, size=size: np.float32(size) * x, updates)
            wanted = gradclip.clip_by_global_norm(jax.tree.map(jnp.asarray, some), here)
            placed = jax.device_put(some, NamedSharding(mesh, SHARDED))
            check_same(gradclip.clip_by_global_norm(placed, there), wanted)
            assert here.state_dict() == there.state_dict()
        np.testing.assert_array_equal(here.last_limit, np.asarray(there.last_limit))

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
