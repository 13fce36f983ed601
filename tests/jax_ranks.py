"""What `test_distributed.py` runs on each rank: one mesh of JAX over several processes."""

from __future__ import annotations

import os
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradclip

P = PartitionSpec


def run() -> None:
    """The bits of one process, by a named axis, and where XLA divides by itself."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, size, rank)
    devices = jax.device_count()
    assert devices > jax.local_device_count()
    mesh = jax.make_mesh((devices,), ("d",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    whole = [rng.standard_normal((devices * 3, n)).astype("float32") for n in (5, 1, 7)]
    wanted, norm = gradclip.clip_by_global_norm(whole, 1.0)

    sharding = NamedSharding(mesh, P("d"))
    leaves = [
        jax.make_array_from_process_local_data(sharding, np.split(x, size)[rank], x.shape)
        for x in whole
    ]
    clip = partial(gradclip.clip_by_global_norm, clip_norm=1.0)
    by_axis = jax.shard_map(
        partial(clip, group="d"), mesh=mesh, in_specs=P("d"), out_specs=(P("d"), P())
    )
    for function in (jax.jit(by_axis), jax.jit(clip), clip):
        clipped, found = function(leaves)
        assert float(found) == norm
        for new, expected in zip(clipped, wanted, strict=True):
            mine = np.concatenate([np.asarray(each.data) for each in new.addressable_shards])
            assert mine.tobytes() == np.split(expected, size)[rank].tobytes()
