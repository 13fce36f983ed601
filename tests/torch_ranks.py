"""What `test_distributed.py` runs on each rank: real process groups of gloo, real DTensors."""

from __future__ import annotations

import itertools
import math
import os
import re
from datetime import timedelta
from typing import Any

import numpy as np
import pytest

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
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
from gradclip.core.versions import is_below

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
    if not values.numel() and is_below("2.7", torch.__version__):  # which makes no shards of it
        placements = (Replicate(),) * mesh.ndim
    with torch.no_grad():
        return distribute_tensor(values.clone(), mesh, list(placements))


def network_of(way: str, size: int) -> Any:
    """The same small network on each call: alone, or within an engine over all ranks."""
    torch.manual_seed(0)
    network: Any = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    if way == "fsdp2":
        fully_shard(network, mesh=mesh_of(size))
    return nn.parallel.DistributedDataParallel(network) if way == "ddp" else network


def assert_same(clipped: list[Any], norm: Any, wanted: tuple[list[Any], Any]) -> None:
    """Every bit, of DTensors gathered, and the norm."""
    assert norm.dtype == wanted[1].dtype
    assert torch.equal(norm, wanted[1]), (norm, wanted[1])
    for new, expected in zip(clipped, wanted[0], strict=True):
        whole = new.full_tensor() if isinstance(new, DTensor) else new
        assert torch.equal(whole, expected)


# ---- the same gradients, however split ----


def splits_of(*dtypes: torch.dtype) -> None:
    """By rows, by columns, unevenly, with empty shards, replicated, as sums, on meshes of two."""
    rank, size = start()
    world = dist.group.WORLD
    flat = mesh_of(size)
    for dtype in dtypes:
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


def splits_of_more_dtypes() -> None:
    splits_of(torch.bfloat16, torch.complex64)


def splits() -> None:
    """A dtype for each of the widths that a norm is measured in, and leaves of several kinds."""
    splits_of(torch.float32, torch.float64)
    rank, size = start()
    flat = mesh_of(size)
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


# ---- FSDP1 ----


class Scaled(nn.Module):
    """A network, and a number beside it that each rank has."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 3), nn.Linear(3, 1))
        self.scale = nn.Parameter(torch.tensor([1.5, -0.5]))
        self.inner[2].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x) * self.scale


def flat_model(
    strategy: ShardingStrategy, *, orig: bool, nested: bool, **more: Any
) -> FullyShardedDataParallel:
    network = Scaled()
    ignored = [network.scale]
    policy = ModuleWrapPolicy({nn.Linear}) if nested else None
    if not orig and not nested:  # all in one flat parameter are trained, or none
        network.inner[2].requires_grad_(True)
    return FullyShardedDataParallel(
        network,
        sharding_strategy=strategy,
        use_orig_params=orig,
        ignored_states=ignored,
        auto_wrap_policy=policy,
        device_id=torch.device("cpu"),
        **more,
    )


def flat_gradients(model: FullyShardedDataParallel, count: int) -> list[torch.Tensor]:
    """All there is of the gradients, from the ``count`` ranks that have parts."""
    held = [
        (name.endswith("scale"), parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, held)
    first = dist.get_rank() // count * count
    parts = every[first : first + count]
    alike = count == 1
    return [
        grad
        for rank, part in enumerate(parts)
        for replicated, grad in part
        if rank == 0 or not (replicated or alike)
    ]


def flat_step(model: nn.Module) -> None:
    torch.manual_seed(1)
    (model(torch.randn(16, 12)).square().sum() * 10).backward()


def check_flat(model: FullyShardedDataParallel, count: int, *, all_trained: bool = False) -> None:
    """Its gradients, parts of which ``count`` ranks have, are clipped as the whole is."""
    flat_step(model)
    wanted, wanted_norm = gradclip.clip_by_global_norm(flat_gradients(model, count), 0.5)
    if dist.get_world_size() in (2, 4):  # the mean of so many equal gradients is one of them
        network = Scaled()
        network.inner[2].requires_grad_(all_trained)
        flat_step(network)
        assert torch.equal(wanted_norm, gradclip.global_norm(gradients_of(network)))
    order = gtorch.clip_grad_norm_(model.parameters(), math.inf, 3.0)
    alone = gtorch.get_total_norm(flat_gradients(model, count), 3.0)
    torch.testing.assert_close(order, alone)
    # The same inside of a step, and by the function.
    for attached in (True, False):
        model.zero_grad()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        clipper = gtorch.attach(optimizer, 0.5) if attached else None
        flat_step(model)
        if clipper is None:
            norm = gtorch.clip_grad_norm_(model.parameters(), 0.5)
        else:
            optimizer.step()
            norm = clipper.norm
            clipper.remove()
        assert torch.equal(norm, wanted_norm), (norm, wanted_norm)
        for new, expected in zip(flat_gradients(model, count), wanted, strict=True):
            assert torch.equal(new, expected)


def flat() -> None:
    """FullyShardedDataParallel, whose parameters do not say who has the other parts."""
    rank, size = start()
    if size == 4:
        for orig in (False, True):
            way = ShardingStrategy.HYBRID_SHARD
            model = flat_model(way, orig=orig, nested=True, device_mesh=mesh_of(2, 2))
            check_flat(model, 2)
        over_other_ranks(flat_model(ShardingStrategy.FULL_SHARD, orig=True, nested=True))
        return
    ways = [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP, ShardingStrategy.NO_SHARD]
    for way, orig, nested in itertools.product(ways, (False, True), (False, True)):
        model = flat_model(way, orig=orig, nested=nested)
        count = 1 if way is ShardingStrategy.NO_SHARD else size
        check_flat(model, count, all_trained=not orig and not nested)
        with CommDebugMode() as communication:
            gtorch.clip_grad_norm_(model.parameters(), 0.5)
        assert communication.get_total_counts() == (count > 1)
    model = flat_model(ways[0], orig=True, nested=True)
    flat_step(model)
    limit = -1.0 if rank == 1 else 1.0
    with pytest.raises(ValueError if rank == 1 else RuntimeError):
        gtorch.clip_grad_norm_(model.parameters(), limit)
    parameters: Any = list(model.parameters())[::-1]  # beginning with one that is sharded
    with pytest.raises(ZeroDivisionError if rank == 1 else RuntimeError):
        gtorch.clip_grad_norm_(first_of(parameters) if rank == 1 else parameters, 1.0)
    weights = list(model.parameters())  # which autograd follows: no derivative goes to other ranks
    text = (
        "a clip over several workers cannot be differentiated; detach the tensors, or use "
        "torch.no_grad()"
    )
    with raises(NotImplementedError, text):
        gradclip.clip_by_global_norm(weights, 1.0)
    with torch.no_grad():
        gradclip.clip_by_global_norm(weights, 1.0)
    text = (
        "within FullyShardedDataParallel.summon_full_params, and after a backward pass within "
        "no_sync(), gradients may be parts or whole; clip after a backward pass without them"
    )
    with model.no_sync():
        flat_step(model)
    with raises(RuntimeError, text):
        gtorch.clip_grad_norm_(model.parameters(), 1.0)
    flat_step(model)
    gtorch.clip_grad_norm_(model.parameters(), 1.0)
    with FullyShardedDataParallel.summon_full_params(model), raises(RuntimeError, text):
        gtorch.clip_grad_norm_(model.parameters(), 1.0)
    beside = nn.Parameter(spread(torch.ones(3), mesh_of(size), Shard(0)))
    text = (
        "parameters are sharded by FullyShardedDataParallel, and others beside them are DTensors; "
        "say by `group` who takes part"
    )
    with raises(ValueError, text):
        gtorch.clip_grad_norm_([*model.parameters(), beside], 1.0)
    if size > 2:
        over_other_ranks(model)
    lost = nn.Parameter(torch.ones(3))
    lost._fsdp_flattened = True  # type: ignore[attr-defined]
    text = (
        "a parameter is sharded by FullyShardedDataParallel, and the model that knows with whom is "
        "not found (gc.freeze() hides it); say by `group` who takes part: model.process_group"
    )
    with raises(ValueError, text):
        gtorch.clip_grad_norm_([lost], 1.0)


def over_other_ranks(model: FullyShardedDataParallel) -> None:
    """Parameters of all ranks beside those of two of them."""
    rank, size = start()
    pair = dist.new_group([0, 1])
    if rank < 2:
        way = ShardingStrategy.FULL_SHARD
        other = flat_model(way, orig=True, nested=True, process_group=pair)
        text = (
            "parameters are sharded by FullyShardedDataParallel over the ranks [(0, 1), "
            f"{tuple(range(size))}]; say by `group` who takes part"
        )
        with raises(ValueError, text):
            gtorch.clip_grad_norm_([*model.parameters(), *other.parameters()], 1.0)


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


class NoFloat(float):
    """A number whose user finds out too late what it was."""

    def __float__(self) -> float:
        raise ZeroDivisionError

    __bool__ = __float__  # type: ignore[assignment]


class NoGradient(nn.Parameter):
    @property
    def grad(self) -> Any:
        raise ZeroDivisionError


def first_of(values: list[Any]) -> Any:
    """An iterator that raises half way."""
    yield values[0]
    raise ZeroDivisionError


WRONG_LIMITS = ["x", -1, math.nan, torch.ones(2), NoFloat(1.0), True]
FAILED = (
    "1 of {} workers failed before their norms were added up; the reason is in the error of each. "
    "Nothing has been written"
)


def wrong_arguments(call: Any, good: dict[str, Any], wrong: dict[str, list[Any]]) -> None:
    """Each on the last rank alone is an error on all, and the next call finds nothing left over."""
    rank, size = start()
    last = rank == size - 1
    expected = call(**good)
    for name, values in wrong.items():
        for make in values:
            # Iterators serve once.
            value = make() if callable(make) else make
            if last:
                with pytest.raises((TypeError, ValueError, ZeroDivisionError, AttributeError)):
                    call(**{**good, name: value})
            else:
                with raises(RuntimeError, FAILED.format(size)):
                    call(**good)
            assert torch.equal(call(**good), expected), (name, value)


def different_arguments(call: Any, good: dict[str, Any], other: dict[str, list[Any]]) -> None:
    """What is right by itself, and not the same on all, is an error on all."""
    rank, size = start()
    expected = call(**good)
    text = "the workers were not asked for the same, and all have to clip alike; rank "
    for name, values in other.items():
        for value in values:
            given = {**good, name: value} if rank == size - 1 else good
            with pytest.raises(RuntimeError, match=f"^{text}{rank} of {size} has .*Nothing has"):
                call(**given)
            assert torch.equal(call(**good), expected), (name, value)


def errors() -> None:
    """Every argument of every function with a group, wrong on one rank."""
    rank, size = start()
    world = dist.group.WORLD
    leaf = torch.full((4,), 3.0)
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = leaf.clone()

    leaves = [
        3,
        [leaf, 3],
        [leaf, np.ones(3)],
        [leaf.int()],
        [leaf.to("meta")],
        lambda: first_of([leaf]),
    ]
    numbers = {"clip_norm": WRONG_LIMITS, "use_norm": ["x", -1, torch.ones(2), NoFloat(1.0)]}
    policies = {"on_nonfinite": ["x", None, 3]}
    t_list = {"t_list": leaves}

    def new(**arguments: Any) -> Any:
        return gradclip.clip_by_global_norm(**arguments)[1]

    measured = {"t_list": [leaf], "group": world}
    clipped = {**measured, "clip_norm": math.inf, "on_nonfinite": "nan"}
    wrong_arguments(gradclip.global_norm, measured, t_list)
    for call in (new, gradclip.clip_by_global_norm_):
        more = {"t_list": [leaf.expand(3, 4)]} if call is not new else {}
        wrong_arguments(call, clipped, {**numbers, **policies, **t_list})
        wrong_arguments(call, clipped, more)
        wrong_arguments(call, {**clipped, "use_norm": 1.0}, {**numbers, **policies, **t_list})
        other = {
            "clip_norm": [1e9],
            "use_norm": [1.0, math.nan],
            "on_nonfinite": ["zero", "keep", "raise"],
        }
        different_arguments(call, clipped, other)
        different_arguments(call, {**clipped, "use_norm": 1.0}, {"use_norm": [2.0, None]})

    total = {"tensors": [leaf], "norm_type": 2.0, "group": world}
    orders = {"norm_type": [0.0, -1, math.nan, "x", None, NoFloat(1.0)]}
    tensors = {"tensors": [None, *leaves]}
    every = [None, 3, [weight, 3], lambda: first_of([weight]), [NoGradient(torch.zeros(2))]]
    whole = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
    whole.grad = torch.zeros(4, dtype=torch.int32)
    parameters = {"parameters": [*every, [whole]]}
    limits = {"max_norm": [None, *WRONG_LIMITS], "on_nonfinite": ["x", 3]}
    flags = {"error_if_nonfinite": [NoFloat(1.0)]}
    good = {"parameters": [weight], "max_norm": math.inf, "group": world}
    for order in (2.0, 3.0, math.inf):
        total["norm_type"] = good["norm_type"] = order
        wrong_arguments(gtorch.get_total_norm, total, {**orders, **tensors, **flags})
        wrong_arguments(gtorch.clip_grad_norm_, good, {**orders, **parameters, **limits, **flags})
        others = {"norm_type": [1.0], "error_if_nonfinite": [True]}
        different_arguments(gtorch.get_total_norm, total, others)
        others |= {"max_norm": [1e9], "on_nonfinite": ["zero", "raise"]}
        different_arguments(gtorch.clip_grad_norm_, good, others)

    # DTensors say with whom a rank is that has failed, as far as it has come.
    flat = mesh_of(size)
    spread_one = spread(leaf, flat, Shard(0))
    some: dict[str, Any] = {"t_list": [spread_one], "clip_norm": math.inf, "on_nonfinite": "nan"}
    mixed = {"t_list": [[spread_one, 3], [spread_one.int()], lambda: first_of([spread_one])]}
    for call in (new, gradclip.clip_by_global_norm_):
        wrong_arguments(call, some, {**numbers, **policies, **mixed})
    weight = nn.Parameter(spread(leaf, flat, Shard(0)))
    weight.grad = spread_one
    good = {"parameters": [weight], "max_norm": math.inf, "norm_type": 3.0}
    model = nn.Module()
    model.weight = weight
    descent = torch.optim.SGD([weight])
    mixed = {
        "parameters": [
            *([weight, 3], lambda: first_of([weight])),
            *(lambda: model, model.state_dict(), descent),
        ]
    }
    wrong_arguments(gtorch.clip_grad_norm_, good, {**orders, **mixed, **limits})
    # Terms are added up by collectives, which are not begun.
    term = DTensor.from_local(leaf.clone(), flat, [Partial()])
    some["t_list"] = [term]
    wrong_arguments(new, some, numbers)
    different_arguments(new, some, {"t_list": [[spread_one]]})
    # A mesh that is not in the group.
    grid = dist.new_group([0, 1])
    whole_world = spread(leaf, flat, Replicate())
    if size > 2 and rank < 2:
        with (
            raises(RuntimeError, FAILED.format(2))
            if rank == 0
            else pytest.raises(ValueError, match="name a group that has all of them")
        ):
            gradclip.global_norm([whole_world if rank else leaf], group=grid)
        assert gradclip.global_norm([leaf], group=grid) == torch.tensor(6 * 2**0.5)
    # One rank's NaN.
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = leaf.clone()
    weight.grad[0] = math.nan if rank == 0 else 3.0
    with pytest.raises(RuntimeError, match=r"^The total norm of order 2\.0 for gradients"):
        gtorch.clip_grad_norm_([weight], 1.0, error_if_nonfinite=True, group=world)
    assert weight.grad[1:].tolist() == leaf[1:].tolist() == [3.0] * 3


def attached_errors() -> None:
    """What goes wrong in one rank's step is an error in every one's; the next step is right."""
    rank, size = start()
    last = rank == size - 1
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.full((4,), 3.0)
    optimizer = torch.optim.SGD([weight], lr=0.0)
    limit: list[Any] = [1e9]
    clipper = gtorch.attach(optimizer, lambda _: limit[0], group=dist.group.WORLD)
    expected = gradclip.global_norm([torch.full((4 * size,), 3.0)])

    def next_step(steps: int) -> None:
        limit[0] = 1e9
        optimizer.step()
        assert torch.equal(clipper.norm.squeeze(), expected)
        assert weight.grad is not None
        assert weight.grad.tolist() == [3.0] * 4
        assert clipper.steps == steps

    next_step(1)
    for steps, wrong in enumerate([*WRONG_LIMITS, None, lambda: 1.0], start=2):
        limit[0] = wrong if last and not callable(wrong) else 1e9
        errors = (TypeError, ValueError, ZeroDivisionError, RuntimeError)
        with pytest.raises(errors) if last else raises(RuntimeError, FAILED.format(size)):
            optimizer.step(wrong if last and callable(wrong) else None)
        next_step(steps)
    limit[0] = 1e9 if last else 2e9
    with pytest.raises(RuntimeError, match=r"^the workers were not asked for the same"):
        optimizer.step()
    next_step(steps + 1)
    clipper.remove()
    clipper = gtorch.attach(optimizer, [1e9], group=dist.group.WORLD)
    if last:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(ValueError) if last else raises(RuntimeError, FAILED.format(size)):  # noqa: PT011
        optimizer.step()
    if last:
        del optimizer.param_groups[1]
    next_step(1)
    # As many limits as groups, and not as many as on the others, who would not wait as often.
    clipper.remove()
    if last:
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    with pytest.raises(RuntimeError, match=r"^the workers were not asked for the same"):
        gtorch.attach(optimizer, [1e9] * (1 + last), group=dist.group.WORLD)
    if last:
        del optimizer.param_groups[1]
    clipper = gtorch.attach(optimizer, 1e9, group=dist.group.WORLD)
    next_step(1)
    # A parameter on a mesh that is not in the group.
    clipper.remove()
    pair = dist.new_group([0, 1])
    beyond = nn.Parameter(spread(torch.zeros(2), mesh_of(size), Replicate()))
    if size > 2 and rank < 2:
        if rank == 1:
            optimizer.add_param_group({"params": [beyond]})
        gtorch.attach(optimizer, 1e9, group=pair)
        with pytest.raises(ValueError) if rank else raises(RuntimeError, FAILED.format(2)):  # noqa: PT011
            optimizer.step()


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

    # An error of one rank of a stage is one of the other, and not of the other stage.
    order = -1.0 if rank == 1 else 2.0
    if stage:
        gtorch.clip_grad_norm_(parameters, math.inf, order)
    else:
        wrong = pytest.raises(ValueError, match=r"^norm_type is -1\.0")
        with wrong if rank == 1 else raises(RuntimeError, FAILED.format(2)):
            gtorch.clip_grad_norm_(parameters, math.inf, order)

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
