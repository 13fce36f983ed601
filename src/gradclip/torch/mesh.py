"""PyTorch's process groups, device meshes and DTensors: who the workers are, and what each counts.

A DTensor says by its placements what a worker holds of it: a shard, which is counted where it is; a
replica, which is counted by one of those that have it; or a term of a sum, which is added up first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip.core.exact import Total
from gradclip.kernels.cpu import distinct, kinds
from gradclip.torch import flat

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]


def spread_by() -> Any:
    """The class of DTensors; None where nobody has imported it, which takes most of a second."""
    return getattr(getattr(dist, "tensor", None), "DTensor", None)


class Ring(NamedTuple):
    """The workers of a process group."""

    group: Any
    ranks: Ranks  # of all processes, those that are in it
    parts: bool  # if what is not spread by a mesh is a part of its own on each, and no replica
    whole: Sequence[Tensor] = ()  # parameters of which each has the whole gradient all the same
    flat: bool = False  # if one tensor, of which each has a part, is of many parameters (FSDP1)

    @property
    def rank(self) -> int:
        """Of this process, in the group."""
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.ranks)

    def sum(self, vector: Any) -> Total:
        """By all_reduce, where the group's backend can: on the CPU, else on its device.

        Not where the vector is: that of another worker may be elsewhere, and all have to meet.
        """
        kinds = {device.type for device in self.group._device_types}
        tensor = torch.as_tensor(vector).to("cpu" if "cpu" in kinds else kinds.pop())
        dist.all_reduce(tensor, group=self.group)
        result: Total = tensor.cpu().numpy()
        return result


def ring_of(group: Any) -> Ring:
    """The workers of a ProcessGroup or DeviceMesh that a user names: each holds parts of its own.

    Raises:
        TypeError: it is neither.
        ValueError: this process is not in it.
    """
    if hasattr(group, "mesh_dim_names"):
        return _ring(_ranks(group), parts=True)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {group!r}; for tensors it is a ProcessGroup, a DeviceMesh or a communicator "
            "of mpi4py"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    return Ring(group, tuple(dist.get_process_group_ranks(group)), True)


def check_meshes(leaves: Sequence[Any], ring: Ring) -> None:
    """Hold the meshes of DTensors against the workers that are to take part.

    Raises:
        ValueError: one has other ranks, which would not know of the norm.
    """
    kind = spread_by()
    for leaf in leaves:
        if kind is not None and isinstance(leaf, kind):
            ranks = _ranks(leaf._spec.mesh)
            if not set(ranks) <= set(ring.ranks):
                raise ValueError(
                    f"the group has the ranks {ring.ranks}, and a DTensor lies on {ranks}; name a "
                    "group that has all of them"
                )


def ring_of_leaves(leaves: Sequence[Any]) -> Ring | None:
    """The workers over which DTensors, or parameters of FSDP1, are spread; None if none is.

    Those of the mesh that has the ranks of all others, or else of what these were cut from.
    """
    meshes, shards = _spread(leaves)
    if shards is not None and meshes:
        raise ValueError(
            "parameters are sharded by FullyShardedDataParallel, and others beside them are "
            "DTensors; say by `group` who takes part"
        )
    if shards is not None:
        ranks = tuple(dist.get_process_group_ranks(shards.group))
        return Ring(shards.group, ranks, True, shards.whole, flat=True)
    if not meshes:
        return None
    every = set(map(_ranks, meshes))
    if not _has_all(max(every, key=len), every):
        every = {_ranks(root) for root in map(_root, meshes)}
    widest = max(every, key=len)
    if not _has_all(widest, every):
        raise ValueError(
            f"DTensors are on meshes of the ranks {sorted(every)}, none of which has all; say by "
            "`group` who takes part"
        )
    return _ring(widest, parts=False)


def ring_of_all(leaves: Sequence[Any]) -> Ring | None:
    """All processes, if one of the leaves is spread over all: then no other leaf brings more."""
    meshes, shards = _spread(leaves)
    every = set(map(_ranks, meshes))
    if shards is not None:
        every.add(tuple(dist.get_process_group_ranks(shards.group)))
    whole = max(every, key=len, default=())
    is_all = every and len(whole) == dist.get_world_size()
    return _ring(whole, parts=False) if is_all else None


def _spread(leaves: Sequence[Any]) -> tuple[list[DeviceMesh], flat.Shards | None]:
    """The meshes of DTensors, and what there is of FSDP1: of both only where somebody has any."""
    kind, is_flat = spread_by(), flat.module() is not None
    if (kind is None and not is_flat) or not (dist.is_available() and dist.is_initialized()):
        return [], None
    return _meshes(leaves), flat.shards(leaves) if is_flat else None


def _meshes(leaves: Sequence[Any]) -> list[DeviceMesh]:
    """The meshes of DTensors, each once."""
    if not any_spread(leaves):
        return []
    spread = leaves if are_spread(leaves) else [each for each in leaves if any_spread([each])]
    return distinct(list(map(_mesh_of, spread)))


# Read of thousands of leaves, without a loop of Python's.
_mesh_of, _placements_of = attrgetter("_spec.mesh"), attrgetter("_spec.placements")
_local_of = attrgetter("_local_tensor")


def is_fake() -> bool:
    """If processes are only made believe, as where the memory of many is estimated in one."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "fake"


def any_spread(leaves: Sequence[Any]) -> bool:
    """If a leaf is a DTensor."""
    kind = spread_by()
    return kind is not None and any(isinstance(leaf, kind) for leaf in leaves)


def are_spread(leaves: Sequence[Any]) -> bool:
    """If all leaves are DTensors, and of no type that is derived from theirs."""
    return kinds(leaves) == {spread_by()}


def local(leaf: Any) -> Any:
    """What this process holds of a leaf."""
    return locals_of([leaf])[0]


def like(leaf: Any, values: Tensor) -> Any:
    """A leaf that is spread as another, with other elements here."""
    if not any_spread([leaf]):
        return values
    return spread_by().from_local(
        values,
        leaf.device_mesh,
        leaf.placements,
        run_check=False,
        shape=leaf.shape,
        stride=leaf.stride(),
    )


def locals_of(leaves: Sequence[Any]) -> list[Any]:
    """What this process holds of leaves."""
    kind = spread_by()
    if kind is None:
        return list(leaves)
    if are_spread(leaves):
        found = list(map(_local_of, leaves))
    else:
        found = [leaf._local_tensor if isinstance(leaf, kind) else leaf for leaf in leaves]
    return found if kinds(found) == {Tensor} else list(map(_arrived, found))


def _arrived(tensor: Any) -> Any:
    """A tensor that is no longer waited for."""
    return tensor if type(tensor) is Tensor or not hasattr(tensor, "wait") else tensor.wait()


class Alike(NamedTuple):
    """Leaves that are spread alike: on one mesh, by placements of the same types; or not at all."""

    first: Any
    places: Sequence[int]
    is_spread: bool

    is_sum: bool  # if they are to be added up first


def alike(leaves: Sequence[Any]) -> list[Alike]:
    """Leaves by how they are spread, of which there are few ways for thousands of them."""
    kind = spread_by()
    places: dict[Any, Any] = {}
    if are_spread(leaves) and _are_one_kind(leaves):
        places["spread"] = range(len(leaves))
    elif not any_spread(leaves):
        places[None] = range(len(leaves))
    else:
        for place, leaf in enumerate(leaves):
            spec = leaf._spec if isinstance(leaf, kind) else None
            key = None if spec is None else (id(spec.mesh), *map(type, spec.placements))
            places.setdefault(key, []).append(place)
    return [
        _alike(leaves[of[0]], of, is_spread=key is not None) for key, of in places.items() if of
    ]


def _alike(first: Any, places: Sequence[int], *, is_spread: bool) -> Alike:
    is_sum = is_spread and any(each.is_partial() for each in first._spec.placements)
    return Alike(first, places, is_spread, is_sum)


def _are_one_kind(leaves: Sequence[Any]) -> bool:
    """If DTensors are on one mesh, by placements of the same types."""
    if len(distinct(list(map(_mesh_of, leaves)))) > 1:
        return False
    by_dimension = zip(*map(_placements_of, leaves), strict=True)
    return all(len(kinds(list(placements))) == 1 for placements in by_dimension)


def any_terms(leaves: Sequence[Any], groups: Iterable[Alike]) -> bool:
    """If a leaf is a DTensor that is to be added up first.

    Raises:
        TypeError: a DTensor is a product of what the processes hold, which no factor scales.
    """
    sums = [leaves[place] for group in groups if group.is_sum for place in group.places]
    terms = {each for leaf in sums for each in leaf._spec.placements if each.is_partial()}
    if any(each.reduce_op == "product" for each in terms):
        raise TypeError("a DTensor is Partial('product'); gradclip clips sums")
    return bool(sums)


def counted(leaves: Sequence[Any], groups: Sequence[Alike], ring: Ring) -> list[Any]:
    """What this process adds of the leaves, grouped by `alike`, to the sum of squares of all."""
    if len(groups) == 1 and groups[0].is_spread and not groups[0].is_sum:
        first = groups[0].first
        return locals_of(leaves) if _is_first(first, ring, {_ranks(first._spec.mesh)}) else []
    return list(counted_at(leaves, groups, ring).values())


def counted_at(leaves: Sequence[Any], groups: Sequence[Alike], ring: Ring) -> dict[int, Any]:
    """As `counted`, by the place of each leaf."""
    every = {_ranks(group.first._spec.mesh) for group in groups if group.is_spread}
    is_first = [group.is_spread and _is_first(group.first, ring, every) for group in groups]
    whole = {id(parameter.grad) for parameter in ring.whole}
    group_of = {place: number for number, group in enumerate(groups) for place in group.places}
    found = {}
    for place, leaf in enumerate(leaves):  # in this order, which is that of all who add up
        group = groups[group_of[place]]
        if group.is_spread:
            local = (_added_up(leaf) if group.is_sum else leaf)._local_tensor
            if is_first[group_of[place]]:
                found[place] = _arrived(local)
        elif (ring.parts and id(leaf) not in whole) or ring.rank == 0:
            found[place] = leaf
    return found


def _added_up(leaf: DTensor) -> DTensor:
    """A DTensor whose terms have been added up."""
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if each.is_partial() else each for each in leaf.placements]
    with torch.no_grad():
        added_up: DTensor = leaf.redistribute(placements=whole)
    return added_up


def _is_first(leaf: DTensor, ring: Ring, every: Iterable[Ranks]) -> bool:
    """If of all that hold the same elements this process is the one that counts them."""
    place = leaf.device_mesh.get_coordinate()
    if place is None:
        return False
    among = zip(place, leaf.placements, strict=True)
    if any(at > 0 for at, each in among if each.is_replicate() or each.is_partial()):
        return False
    # A mesh that is cut from one that other leaves are on has its like there, with the same
    # elements. Where no group is named all of the ranks are such a one.
    ranks = _ranks(leaf.device_mesh)
    around = [each for each in every if set(ranks) <= set(each)] if ring.parts else [ring.ranks]
    widest: Ranks = max(around, key=len)
    return min(widest) in ranks


@functools.lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh) -> Ranks:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _root(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh = mesh._get_root_mesh()
    return root


def _has_all(ranks: Ranks, every: Iterable[Ranks]) -> bool:
    return all(set(each) <= set(ranks) for each in every)


_groups: dict[Ranks, tuple[Any, Any]] = {}  # made for a world, and which


def _ring(ranks: Ranks, *, parts: bool) -> Ring:
    """The workers of these ranks, in one group whatever the mesh that has led to them."""
    world = dist.group.WORLD
    if dist.get_rank() not in ranks:
        raise ValueError(f"this process is rank {dist.get_rank()}, and not in the mesh of {ranks}")
    if ranks == tuple(range(dist.get_world_size())):
        return Ring(world, ranks, parts)
    if ranks not in _groups or _groups[ranks][0] is not world:
        _groups[ranks] = world, dist.new_group(list(ranks), use_local_synchronization=True)
    return Ring(_groups[ranks][1], ranks, parts)
