"""What `test_limits_distributed.py` runs on each rank: limits that learn, of sharded gradients."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

import gradclip
import gradclip.torch as gtorch
from gradclip import limits
from torch_ranks import SHAPES, mesh_of, network_of, spread, start

KINDS = {
    "z": limits.ZScore(warmup=5),
    "log z": limits.ZScore(z=4, warmup=5, log=True, beyond="skip", learn_from="raw"),
    "percentile": limits.Percentile(10, 50),
    "average": limits.Average(1.5, warmup=5),
    "each average": limits.PerTensor(limits.Average(1.05, warmup=5)),
    "each z": limits.PerTensor(limits.ZScore(warmup=5, beyond="edge")),
    "each percentile": limits.PerTensor(limits.Percentile(50, 20, 2.0)),
}


def gradients(step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The same on every rank: now and then one spikes, vanishes or is NaN."""
    generator = torch.Generator().manual_seed(step)
    found = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    found[step % 6] *= 1 + 30 * (step % 7 == 6)
    if step % 11 == 10:
        found[0] *= 0
    if step % 13 == 12:
        found[1][0] = float("nan")
    return found


def everyones(value: Any) -> list[Any]:
    """What each rank has."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def whole(tensors: list[Any]) -> list[torch.Tensor]:
    return [each.full_tensor() if isinstance(each, DTensor) else each for each in tensors]


def same(ones: list[Any], others: list[Any]) -> bool:
    pairs = zip(whole(ones), others, strict=True)
    return all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


def learning() -> None:
    """However gradients are sharded, every rank learns what one process learns of all."""
    _, size = start()
    mesh = mesh_of(size)
    for name, kind in KINDS.items():
        alone, shared = copy.deepcopy(kind), copy.deepcopy(kind)
        # The most where there is time for it: on one rank and on four.
        for step in range(1000 if name == "z" and size != 2 else 40):
            dtype = torch.float64 if step % 5 == 0 else torch.float32
            wanted = gradients(step, dtype)
            placements = [Shard(0), Shard(0), Shard(0), Replicate(), None, Shard(0)]
            pairs = zip(gradients(step, dtype), placements, strict=True)
            given = [x if how is None else spread(x, mesh, how) for x, how in pairs]
            norm = gradclip.clip_by_global_norm_(wanted, alone)
            found = gradclip.clip_by_global_norm_(given, shared)
            assert torch.equal(norm.nan_to_num(7), found.nan_to_num(7)), (name, step)
            assert same(given, wanted), (name, step)
        state = alone.state_dict()
        assert all(each == state for each in everyones(shared.state_dict())), name


def communication() -> None:
    """A tensor that lies wholly on one rank costs none; spread ones one more sum for all."""
    rank, size = start()
    mesh = mesh_of(size)
    limit = limits.PerTensor(limits.Percentile(50))
    own = [torch.full((3,), 1.0 + rank), torch.full((2 + rank,), 2.0)]
    with CommDebugMode() as counted:
        gradclip.clip_by_global_norm_(own, limit, group=dist.group.WORLD)
    assert counted.get_total_counts() == 1
    assert limit.last_limit.tolist() == [float(gradclip.global_norm([each])) for each in own]
    # The same memory in another shape is the same tensor, and counts once.
    several = [own[0], own[1], own[0].view(3, 1)]
    wanted = gradclip.clip_by_global_norm_([x.clone() for x in own], 1e9, group=dist.group.WORLD)
    kind = limits.PerTensor(limits.Average(2.0, limit=1e9))
    found = gradclip.clip_by_global_norm_(several, kind, group=dist.group.WORLD)
    assert torch.equal(found, wanted)
    every = [spread(each, mesh, Shard(0)) for each in gradients(0)]
    with CommDebugMode() as counted:
        gradclip.clip_by_global_norm_(every, limits.PerTensor(limits.Percentile(50)))
    assert counted.get_total_counts() == 2


def engines() -> None:
    """In an attached clipper over fully_shard and DistributedDataParallel, and saved from there."""
    _, size = start()
    for kind in (KINDS["log z"], KINDS["each average"]):
        states = []
        for way in ("alone", "fsdp2", "ddp"):
            network = network_of(way, size)
            optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
            clipper = gtorch.attach(optimizer, copy.deepcopy(kind))
            for step in range(30):
                batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                (network(batch * (1 + 20 * (step % 9 == 8))) ** 2).mean().backward()
                optimizer.step()
            everyone = everyones(clipper.state_dict())
            assert all(each == everyone[0] for each in everyone), way
            states.append(everyone[0])
        if size == 1:
            assert states[1:] == states[:1] * 2
        counts = [{x: y for x, y in each.items() if x != "limits"} for each in states]
        assert counts[0]["skipped_steps"] == 3 * kind.skips
        assert counts[1:] == counts[:1] * 2


def diverged() -> None:
    """A rank that has learnt something else, or has other tensors, is an error on all of them."""
    rank, size = start()
    if size == 1:
        return

    def refused(limit: str, more: str = "") -> Any:
        text = (
            "the workers were not asked for the same, and all have to clip alike; rank "
            f"{rank} of {size} has clip_norm='{limit}', use_norm=None, on_nonfinite='nan'{more}. "
            "Nothing has been written"
        )
        pattern = re.escape(text).replace("DIGEST", "[0-9a-f]{8}")
        return pytest.raises(RuntimeError, match=f"^{pattern}$")

    limit: Any = limits.Percentile(50, 1)
    if rank == 1:
        gradclip.clip_by_global_norm_([torch.ones(1)], limit)
    learnt = "DIGEST" if rank == 1 else "nothing"
    given = [torch.ones(3)]
    with refused(f"{limit!r} that has learnt {learnt}"):
        gradclip.clip_by_global_norm_(given, limit, group=dist.group.WORLD)
    assert given[0].tolist() == [1, 1, 1]

    mesh = mesh_of(size)
    limit = limits.PerTensor(limits.Percentile(50, 1))
    several = [spread(torch.ones(4), mesh, Shard(0)) for _ in range(2)][: 1 + (rank == 1)]
    shapes = [(4,)] * len(several)
    with refused(repr(limit), f", spread={shapes}, learnt='nothing'"):
        gradclip.clip_by_global_norm_(several, limit)
    if rank == 1:
        gradclip.clip_by_global_norm_([torch.ones(1)], limit)
    with refused(repr(limit), f", spread=[(4,)], learnt='{learnt}'"):
        gradclip.clip_by_global_norm_(several[:1], limit)
