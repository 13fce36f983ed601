"""What `test_distributed.py` runs on each rank: real process groups of gloo, real DTensors."""

from __future__ import annotations

import math
import os
import re
from datetime import timedelta
from typing import Any

import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gradclip
import gradclip.torch as gtorch

SHAPES = [(17, 6), (8,), (3, 4, 2), (1,), (5, 0), (40, 33)]


def start() -> tuple[int, int]:
    """Join the group, the first time; the rank and how many there are."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    return dist.get_rank(), dist.get_world_size()


def tensors(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * 3).to(dtype) for shape in SHAPES]


def mesh_of(*sizes: int) -> DeviceMesh:
    names = ("a", "b", "c")[: len(sizes)]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def spread(values: torch.Tensor, mesh: DeviceMesh, *placements: Any) -> DTensor:
    """A DTensor of values that every rank has."""
    with torch.no_grad():
        return distribute_tensor(values.clone(), mesh, list(placements))


def assert_same(clipped: list[Any], norm: Any, wanted: tuple[list[Any], Any]) -> None:
    """Every bit, of DTensors gathered, and the norm."""
    assert norm.dtype == wanted[1].dtype
    assert torch.equal(norm, wanted[1]), (norm, wanted[1])
    for new, expected in zip(clipped, wanted[0], strict=True):
        whole = new.full_tensor() if isinstance(new, DTensor) else new
        assert torch.equal(whole, expected)


# ---- the same gradients, however split ----


def splits() -> None:
    """By rows, by columns, unevenly, with empty shards, replicated, as sums, on meshes of two."""
    rank, size = start()
    world = dist.group.WORLD
    flat = mesh_of(size)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.complex64]
    # Eight share few cores: there, one dtype for each of the widths a norm is measured in.
    for dtype in dtypes if size < 8 else dtypes[::2]:
        whole = tensors(dtype=dtype)
        for limit in (1.0, 1e9):
            wanted = gradclip.clip_by_global_norm(whole, limit)

            def check(leaves: list[Any], limit: float = limit, wanted: Any = wanted) -> None:
                assert_same(*gradclip.clip_by_global_norm(leaves, limit), wanted)
                assert gradclip.global_norm(leaves) == wanted[1]
                norm = gradclip.clip_by_global_norm_(leaves, limit)
                assert_same(leaves, norm, wanted)

            check([spread(x, flat, Shard(0)) for x in whole])
            check([spread(x, flat, Shard(x.ndim - 1)) for x in whole])
            check([spread(x, flat, Replicate()) for x in whole])
            # Tensors beside DTensors are replicas.
            check([x.clone() if i % 2 else spread(x, flat, Shard(0)) for i, x in enumerate(whole)])
            if size in (4, 8):
                grid = mesh_of(2, size // 2)
                check([spread(x, grid, Replicate(), Shard(0)) for x in whole])  # HSDP
                check([spread(x, grid, Shard(0), Shard(x.ndim - 1)) for x in whole])
                check([spread(x, grid, Shard(0), Replicate()) for x in whole])
                rows, columns = grid["a"], grid["b"]
                ways = [(grid, Shard(0), Replicate()), (rows, Shard(0)), (columns, Replicate())]
                mixed = [spread(x, *ways[i % 3]) for i, x in enumerate(whole)]
                check([*mixed[:-1], whole[-1].clone()])
                other = mesh_of(size // 2, 2)  # another cut of the same ranks
                check(
                    [
                        spread(x, (grid, other)[i % 2], Shard(0), Replicate())
                        for i, x in enumerate(whole)
                    ]
                )
            # Parts of plain tensors, by a group: uneven, and empty on some.
            cuts = [torch.tensor_split(x.reshape(-1), size)[rank].clone() for x in whole]
            clipped, norm = gradclip.clip_by_global_norm(cuts, limit, group=world)
            assert torch.equal(norm, wanted[1])
            for new, expected in zip(clipped, wanted[0], strict=True):
                assert torch.equal(new, torch.tensor_split(expected.reshape(-1), size)[rank])
            # All of it on the last rank, nothing on the others.
            mine = [x.clone() for x in whole] if rank == size - 1 else []
            norm = gradclip.clip_by_global_norm_(mine, limit, group=flat)
            assert torch.equal(norm, wanted[1])
            assert all(map(torch.equal, mine, wanted[0]))
    whole = tensors()
    shard, replica = spread(whole[0], flat, Shard(0)), spread(whole[1], flat, Replicate())
    twice = [whole[0], whole[0], whole[1]]
    assert gradclip.global_norm([shard, shard, replica]) == gradclip.global_norm(twice)
    once = gradclip.clip_by_global_norm_([x.clone() for x in twice[1:]], math.inf)
    for leaf in (shard, DTensor.from_local(whole[0] / size, flat, [Partial()])):
        expected = once
        if leaf is not shard:
            expected = gradclip.global_norm([leaf, replica])
        assert gradclip.clip_by_global_norm_([leaf, leaf, replica], math.inf) == expected
        assert gtorch.get_total_norm([leaf, leaf, replica]) == expected
    late = shard.redistribute(placements=[Replicate()], async_op=True)
    assert gradclip.global_norm([late]) == gradclip.global_norm(whole[:1])
    terms = [x * 0.5 for x in tensors()]
    share = 2.0 if size == 1 else 1.0
    summed = [
        DTensor.from_local(x * share if rank < 2 else x * 0, flat, [Partial()]) for x in terms
    ]
    wanted = gradclip.clip_by_global_norm(tensors(), 1.0)
    norm = gradclip.global_norm(summed)
    assert torch.equal(norm, wanted[1])
    for order in (0.5, 1.0, 3.0, math.inf):
        shards = [spread(x, flat, Shard(0)) for x in tensors() if x.numel()]
        expected = gtorch.get_total_norm([x for x in tensors() if x.numel()], order)
        got = gtorch.get_total_norm(shards, order)
        torch.testing.assert_close(got, expected, rtol=2e-7, atol=0)
        every = [torch.zeros(()) for _ in range(size)]
        dist.all_gather(every, got)
        assert all(torch.equal(each, got) for each in every)


# ---- engines ----


class Network(nn.Module):
    """Two layers that can be spread by columns and by rows, and one more."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.down(torch.relu(self.up(x))))


def there() -> None:
    """The same in the memory of a device: totals stay there until they are added up."""
    from host_torch import torch_there

    rank, size = start()
    flat = mesh_of(size)
    for dtype in (torch.bfloat16, torch.float64):
        whole = tensors(dtype=dtype)
        wanted = gradclip.clip_by_global_norm(whole, 1.0)
        with torch_there():
            leaves = [spread(x, flat, Shard(0)) for x in whole]
            assert_same(*gradclip.clip_by_global_norm(leaves, 1.0), wanted)
            cuts = [torch.tensor_split(x.reshape(-1), size)[rank].clone() for x in whole]
            norm = gradclip.clip_by_global_norm_(cuts, 1.0, group=flat)
        assert torch.equal(norm, wanted[1])
        for new, expected in zip(cuts, wanted[0], strict=True):
            assert torch.equal(new, torch.tensor_split(expected.reshape(-1), size)[rank])
    if rank == 0:
        whole[0][0] = math.nan
    with torch_there():
        norm = gradclip.clip_by_global_norm_(whole, 1.0, on_nonfinite="zero", group=flat)
    assert math.isnan(norm)
    assert not whole[1].any()


def gradients_of(network: nn.Module) -> list[torch.Tensor]:
    """The whole gradients, cloned."""
    grads = [parameter.grad for parameter in network.parameters()]
    return [
        (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
        for grad in grads
        if grad is not None
    ]


def train_step(network: nn.Module) -> None:
    torch.manual_seed(1)
    (network(torch.randn(16, 12)).square().sum() * 10).backward()


def check_engine(network: nn.Module) -> None:
    """The gradients it has are clipped as the same in one process are."""
    train_step(network)
    whole = gradients_of(network)
    wanted, wanted_norm = gradclip.clip_by_global_norm(whole, 0.5)
    with CommDebugMode() as communication:
        norm = gtorch.clip_grad_norm_(network.parameters(), 0.5)
    assert communication.get_total_counts() == 1
    assert torch.equal(norm, wanted_norm)
    assert all(map(torch.equal, gradients_of(network), wanted))
    # The same inside of a step.
    network.zero_grad()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    clipper = gtorch.attach(optimizer, 0.5)
    train_step(network)
    optimizer.step()
    assert torch.equal(clipper.norm, wanted_norm)
    assert all(map(torch.equal, gradients_of(network), wanted))


def engines() -> None:
    """FSDP2, tensor parallel, both on a mesh of two dimensions, HSDP, DDP."""
    _, size = start()
    flat = mesh_of(size)

    def tensor_parallel(network: nn.Module, mesh: DeviceMesh) -> nn.Module:
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        return parallelize_module(network, mesh, plan)

    network = Network()
    for part in (network.up, network.down, network):
        fully_shard(part, mesh=flat)
    check_engine(network)
    check_engine(tensor_parallel(Network(), flat))
    if size == 4:
        grid = mesh_of(2, 2)
        both = tensor_parallel(Network(), grid["b"])
        fully_shard(both, mesh=grid["a"])
        check_engine(both)
        hybrid = Network()
        fully_shard(hybrid, mesh=grid)  # replicated along the first, sharded along the second
        check_engine(hybrid)
    # A fused optimizer divides as it steps, on shards as on the whole.
    networks = [Network(), Network()]
    fully_shard(networks[0], mesh=flat)
    for network in networks:
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
        gtorch.attach(optimizer, 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            train_step(network)
            optimizer.step()
    for one, other in zip(*(each.parameters() for each in networks), strict=True):
        assert isinstance(one, DTensor)
        torch.testing.assert_close(one.full_tensor(), other)
    network = nn.parallel.DistributedDataParallel(Network())
    train_step(network)
    with CommDebugMode() as communication:
        gtorch.clip_grad_norm_(network.parameters(), 0.5)
    assert communication.get_total_counts() == 0


# ---- what goes wrong on one ----


def raises(error: type[Exception], text: str) -> Any:
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def failures() -> None:
    """A NaN on one rank, an error on one, no gradients on one, one that dies."""
    rank, size = start()
    world = dist.group.WORLD
    bad = [torch.ones(3), torch.ones(2)]
    if rank == 1:
        bad[0][2] = math.nan
    before = [x.clone() for x in bad]
    where = (
        "t_list[0] holds 1 NaN and 0 inf"
        if rank == 1
        else "every leaf is finite; those of another are not"
    )
    with raises(FloatingPointError, f"the global norm is nan: on rank {rank} of {size} {where}"):
        gradclip.clip_by_global_norm_(bad, 1.0, group=world, on_nonfinite="raise")
    assert all(torch.equal(x, y) or rank == 1 for x, y in zip(bad, before, strict=True))
    norm = gradclip.clip_by_global_norm_(bad, 1.0, group=world, on_nonfinite="zero")
    assert norm.isnan()
    assert not torch.cat(bad).any()

    failed = (
        f"1 of {size} workers failed before their norms were added up; the reason is in the error "
        "of each. Nothing has been written"
    )
    good = torch.full((4,), 3.0)
    calls: list[tuple[Any, type[Exception]]] = [
        (lambda: gradclip.clip_by_global_norm_([good.int()], 1.0, group=world), TypeError),
        (lambda: gradclip.clip_by_global_norm_([good], -1.0, group=world), ValueError),
        (lambda: gradclip.clip_by_global_norm_(["x"], 1.0, group=world), TypeError),
        (lambda: gradclip.global_norm([good.int()], group=world), TypeError),
        (lambda: gradclip.clip_by_global_norm([good.expand(4), "x"], 1.0, group=world), TypeError),
    ]
    for call, error in calls:
        if rank == 0:
            with pytest.raises(error):
                call()
        else:
            with raises(RuntimeError, failed):
                gradclip.clip_by_global_norm_([good], 1.0, group=world)
    assert good.tolist() == [3.0] * 4
    term = DTensor.from_local(good.clone(), mesh_of(size), [Partial()])
    with pytest.raises(ValueError if rank == 0 else RuntimeError):
        gradclip.clip_by_global_norm_([term], -1.0 if rank == 0 else 1.0)
    policy: Any = "x" if rank == 0 else "nan"
    with pytest.raises(ValueError if rank == 0 else RuntimeError):
        gradclip.clip_by_global_norm([good], 1.0, group=world, on_nonfinite=policy)
    alone = dist.new_group([rank], use_local_synchronization=True)
    with pytest.raises(ValueError, match="name a group that has all of them"):
        gradclip.global_norm([spread(good, mesh_of(size), Replicate())], group=alone)
    product = DTensor.from_local(good.clone(), mesh_of(size), [Partial("product")])
    with pytest.raises(TypeError, match="product"):
        gradclip.global_norm([product])
    for order in (2.0, 3.0):  # parameters of which one rank has no gradient
        parameter = nn.Parameter(torch.zeros(4))
        parameter.grad = good.clone() if rank else None
        norm = gtorch.clip_grad_norm_([parameter], 1.0, order, group=world)
        assert norm == torch.tensor(3.0 * (4 * (size - 1)) ** (1 / order), dtype=torch.float32)

    if rank == size - 1:
        os._exit(0)  # without a word, as one that is killed
    with pytest.raises(RuntimeError):
        gradclip.clip_by_global_norm([good], 1.0, group=world)
    print("told", flush=True)
    os._exit(0)


# ---- pipelines and experts ----


def stages() -> None:
    """Two stages of a pipeline, each sharded on its own half of the mesh; a tied parameter."""
    rank, _ = start()
    grid = mesh_of(2, 2)
    stage, shards = rank // 2, grid["b"]
    mine = [tensors(seed=stage), tensors(seed=stage, dtype=torch.float64)][stage]
    wanted = gradclip.clip_by_global_norm([*tensors(0), *tensors(1, torch.float64)], 1.0)
    half = wanted[0][stage * len(SHAPES) :][: len(SHAPES)]
    for group in (grid, dist.group.WORLD):
        parts = [spread(x, shards, Shard(0)) for x in mine]
        assert_same(*gradclip.clip_by_global_norm(parts, 1.0, group=group), (half, wanted[1]))
    # By stages alone each has a norm of its own.
    alone = gradclip.global_norm([spread(x, shards, Shard(0)) for x in mine])
    assert torch.equal(alone, gradclip.global_norm(mine))

    tied = torch.arange(6.0)
    parameters = [nn.Parameter(spread(x, shards, Shard(0))) for x in [*tensors(stage), tied]]
    for parameter, x in zip(parameters, [*tensors(stage), tied], strict=True):
        parameter.grad = spread(x, shards, Shard(0))
    counted = parameters if stage == 0 else parameters[:-1]
    norm = gtorch.get_total_norm([p.grad for p in counted if p.grad is not None], group=grid)
    gtorch.clip_grads_with_norm_(parameters, 1.0, norm)
    expected = gradclip.global_norm([*tensors(0), *tensors(1), tied])
    assert torch.equal(norm, expected)
    assert parameters[-1].grad is not None
    torch.testing.assert_close(parameters[-1].grad.full_tensor(), tied / expected)

    # No gradient on one rank, and its parameters still say with whom it is.
    for parameter in parameters if rank == 0 else []:
        parameter.grad = None
    norm = gtorch.clip_grad_norm_(parameters, math.inf)
    assert math.isfinite(norm)

    # A leaf on a part of what others of its stage are on is counted once in each stage.
    cube = mesh_of(2, 2, 1)
    both, part = cube["b", "c"], cube["b"]
    leaves = [spread(mine[0], both, Shard(0), Replicate()), spread(mine[1], part, Shard(0))]
    assert gradclip.global_norm(leaves) == gradclip.global_norm(mine[:2])
    wide = mesh_of(2, 1, 2)
    leaves = [
        spread(mine[0], wide["b", "c"], Replicate(), Shard(0)),
        spread(mine[1], wide["b"], Replicate()),
    ]
    assert gradclip.global_norm(leaves) == gradclip.global_norm(mine[:2])
    of_both = [*tensors(0)[:2], *tensors(1, torch.float64)[:2]]
    assert gradclip.global_norm(leaves, group=wide) == gradclip.global_norm(of_both)

    dense = spread(tensors()[0], grid, Shard(0), Shard(1))
    experts = spread(tensors()[5], shards, Shard(0))  # the same on both rows of the mesh
    other = spread(tensors()[1], mesh_of(4), Shard(0))
    every = [dense, experts, other, tensors()[2]]
    with CommDebugMode() as communication:
        norm = gradclip.global_norm(every)
    assert communication.get_total_counts() == 1
    assert torch.equal(norm, gradclip.global_norm([tensors()[i] for i in (0, 5, 1, 2)]))

    recorded = spread(tensors()[1], shards, Shard(0)).requires_grad_()
    text = (
        "a clip over several workers cannot be differentiated; detach the tensors, or use "
        "torch.no_grad()"
    )
    with raises(NotImplementedError, text):
        gradclip.clip_by_global_norm([recorded], 1.0)
