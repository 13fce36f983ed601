"""What `test_norms_jax.py` runs in a process of four devices: the norms of the whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradclip
from each_norm import assert_norms
from gradclip.optax import clip_by_global_norm, norms_of

P = PartitionSpec
RNG = np.random.default_rng(0)
SHAPES = [((16, 8), "float32"), ((32,), "float32"), ((8, 6), jnp.bfloat16), ((4, 3), "complex64")]
ARRAYS = [
    (RNG.standard_normal(shape) * 10.0 ** RNG.integers(-9, 9)).astype(dtype)
    for shape, dtype in SHAPES
]


def divided(ways: int, axis_type: AxisType) -> Any:
    return jax.make_mesh((ways,), ("d",), devices=jax.devices()[:ways], axis_types=(axis_type,))


def xla_divides(ways: int) -> None:
    """Arrays that are sharded, eagerly and under jit, and shardings that are a part of the type."""
    placed = jax.device_put(ARRAYS, NamedSharding(divided(ways, AxisType.Auto), P("d")))
    for function in (gradclip.norms, jax.jit(gradclip.norms)):
        found = function(placed)
        assert_norms(found, ARRAYS)
        assert found.values.sharding.device_set == placed[0].sharding.device_set
    mesh = divided(ways, AxisType.Explicit)
    with jax.set_mesh(mesh):
        placed = jax.device_put(ARRAYS, NamedSharding(mesh, P("d")))
        assert_norms(jax.jit(gradclip.norms)(placed), ARRAYS)


def leaves_stay_where_they_are(ways: int) -> None:
    """What brings whole leaves to each device is in branches, for norms that sums do not prove."""
    placed = jax.device_put(ARRAYS, NamedSharding(divided(ways, AxisType.Auto), P("d")))
    text = jax.jit(gradclip.norms).lower(placed).compile().as_text()
    _, entry = text.split("\nENTRY ")
    assert ("all-gather(" in text) == (ways > 1)
    assert "all-gather(" not in entry


def each_device_has_a_part(ways: int, check_vma: bool) -> None:
    """`shard_map`: a leaf's norm is that of its parts; without a group that of what is there."""
    mesh = divided(ways, AxisType.Auto)
    parts = partial(jax.shard_map, mesh=mesh, in_specs=(P("d"),), check_vma=check_vma)
    whole = parts(partial(gradclip.norms, group="d"), out_specs=P())
    assert_norms(whole(ARRAYS), ARRAYS)
    assert_norms(jax.jit(whole)(ARRAYS), ARRAYS)

    def alone(arrays: Any) -> Any:
        return jax.tree.map(lambda x: x[None], gradclip.norms(arrays))

    found = jax.jit(parts(alone, out_specs=P("d")))(ARRAYS)
    pieces = [np.split(array, ways) for array in ARRAYS]
    for place, (values, norm) in enumerate(zip(found.values, found.global_norm, strict=True)):
        here = gradclip.Norms(values, norm, found.paths)
        assert_norms(here, [piece[place] for piece in pieces])


def in_a_state(ways: int) -> None:
    """`optax`: of updates in shards, with and without an axis to name."""
    updates = dict(zip("abcd", ARRAYS, strict=True))
    mesh = divided(ways, AxisType.Auto)
    one, clip = (clip_by_global_norm(1.0, axis_name=x, per_leaf=True) for x in (None, "d"))
    specs = jax.tree.map(lambda _: P(), one.init(updates))
    step = jax.shard_map(
        clip.update, mesh=mesh, in_specs=(P("d"), specs), out_specs=(P("d"), specs)
    )
    placed = jax.device_put(updates, NamedSharding(mesh, P("d")))
    for update, given in ((step, updates), (one.update, placed)):
        _, state = jax.jit(update)(given, one.init(updates))
        assert_norms(norms_of(state, updates), ARRAYS)


def elsewhere() -> None:
    """On a device that is not the first the norms are there; what is not bound stays so."""
    device = jax.devices()[3]
    found = gradclip.norms(jax.device_put(ARRAYS, device))
    assert_norms(found, ARRAYS)
    assert {found.values.device, found.global_norm.device} == {device}
    assert not gradclip.norms([jnp.ones(3)]).values.committed
    assert gradclip.norms([jax.device_put(np.ones(3), device)]).values.committed


def run(*each: int) -> None:
    """Over so many devices."""
    for ways in each:
        xla_divides(ways)
        leaves_stay_where_they_are(ways)
        for check_vma in (True, False):
            each_device_has_a_part(ways, check_vma)
        in_a_state(ways)
    elsewhere()
    print("ok")
