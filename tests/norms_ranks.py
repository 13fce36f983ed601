"""What `test_norms.py` runs on each rank: the norm of each tensor, however it is sharded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import gradclip
import gradclip.torch as gtorch
from torch_ranks import mesh_of, network_of, spread, start, tensors


def assert_same(found: gradclip.Norms, wanted: gradclip.Norms) -> None:
    """Every bit."""
    assert type(found.values) is torch.Tensor
    assert torch.equal(found.values, wanted.values), (found.values, wanted.values)
    assert torch.equal(found.global_norm, wanted.global_norm)


def partial(values: torch.Tensor, mesh: Any) -> DTensor:
    """A DTensor of which each rank has a term: they add up to the values."""
    from torch.distributed.tensor import Partial

    last = dist.get_rank() == dist.get_world_size() - 1
    return DTensor.from_local(values if last else torch.zeros_like(values), mesh, [Partial()])


def sharded() -> None:
    """By placements, and beside tensors that are not spread."""
    _, size = start()
    mesh = mesh_of(size)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        whole = tensors(1, dtype)
        wanted = gradclip.norms(whole)
        for how in (Shard(0), Replicate()):
            parts = [spread(x, mesh, how) for x in whole[:-1]]
            assert_same(gradclip.norms([*parts, whole[-1]]), wanted)
        assert_same(gradclip.norms([partial(x, mesh) for x in whole]), wanted)
        # Clipped, they are told as they were before.
        parameters = {str(i): nn.Parameter(spread(x, mesh, Shard(0))) for i, x in enumerate(whole)}
        for parameter, x in zip(parameters.values(), whole, strict=True):
            parameter.grad = spread(x, mesh, Shard(0))
        assert_same(gtorch.clip_grad_norm_(parameters, 1.0, norms=True), wanted)
    assert float(gtorch.get_total_norm([p.grad for p in parameters.values()])) == 1.0
    parts = [spread(x, mesh, Shard(0)) for x in tensors()]
    with CommDebugMode() as counted:
        gradclip.norms(parts)
    assert counted.get_total_counts() == 2
    own = gradclip.norms(tensors(dist.get_rank()), group=dist.group.WORLD)
    assert torch.equal(own.values, gradclip.norms(tensors(dist.get_rank())).values)
    every = [x for rank in range(size) for x in tensors(rank)]
    assert torch.equal(own.global_norm, gradclip.global_norm(every))


def engines() -> None:
    """In an attached clipper over fully_shard and DistributedDataParallel."""
    _, size = start()
    known = []
    for way in ("alone", "fsdp2", "ddp"):
        network = network_of(way, size)
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        clipper = gtorch.attach(optimizer, 0.01, per_tensor=True)
        # Of integers, so that the order in which ranks are averaged does not matter.
        (network(torch.ones(4, 6)) * 4).sum().backward()
        optimizer.step()
        known.append(clipper.norms)
    for found in known[1:]:
        if size == 1:
            assert_same(found, known[0])
        else:
            assert torch.allclose(found.values, known[0].values, rtol=1e-6)
            everyone: list[Any] = [None] * size
            dist.all_gather_object(everyone, found.values.tolist())
            assert everyone == everyone[:1] * size


def refused() -> None:
    """Flat parameters; one rank that asks for norms where another does not."""
    rank, size = start()
    if size == 1:
        return
    mesh = mesh_of(size)
    network = FullyShardedDataParallel(nn.Linear(6, 8), device_id=torch.device("cpu"))
    network(torch.ones(2, 6)).sum().backward()
    with pytest.raises(NotImplementedError, match="or the norm of each tensor, under FullySharded"):
        gtorch.clip_grad_norm_(network.parameters(), 1.0, norms=True)
    parts = [spread(x, mesh, Shard(0)) for x in tensors()]
    with pytest.raises(RuntimeError, match="the workers were not asked for the same"):
        (gradclip.norms if rank == 0 else gradclip.global_norm)(parts)
    parameter = nn.Parameter(parts[0])
    parameter.grad = parts[0]
    with pytest.raises(RuntimeError, match="the workers were not asked for the same"):
        gtorch.clip_grad_norm_([parameter], 1.0, norms=rank == 0)
