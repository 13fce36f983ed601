"""What `test_record_hostile.py` runs on each rank: all record, one alone writes."""

from __future__ import annotations

import os

import gradclip


def of_torch() -> None:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    os.environ["RANK"] = str(1 - rank)  # which says nothing any more
    with gradclip.Record(os.environ["RECORD"]) as record:
        record(rank, 1.0)
    dist.barrier()
    dist.destroy_process_group()


def of_jax() -> None:
    import jax
    import optax
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import gradclip.optax

    rank = int(os.environ.pop("RANK"))
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, rank)
    mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(AxisType.Auto,))
    params = jax.device_put(jax.numpy.ones(4), NamedSharding(mesh, PartitionSpec()))
    optimizer = optax.chain(gradclip.optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    state = jax.jit(lambda x: optimizer.update(x, optimizer.init(x))[1])(params)
    assert not state[0].global_norm.is_fully_addressable
    with gradclip.Record(os.environ["RECORD"]) as record:
        record(rank, gradclip.Record.of_state(state))
