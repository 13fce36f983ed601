"""PyTorch's process groups, device meshes and DTensors: who the workers are, and what each counts.

A DTensor says by its placements what a worker holds of it: a shard, which is counted where it is; a
replica, which is counted by one of those that have it; or a term of a sum, which is added up first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from gradclip._exact import Total

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Ranks = tuple[int, ...]


def spread_by() -> Any:
    """The class of DTensors; None where nobody has imported it, which takes most of a second."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)


class Ring(NamedTuple):
    """The workers of a process group."""

    group: Any
    ranks: Ranks  # of all processes, those that are in it
    parts: bool  # if what is not spread by a mesh is a part of its own on each, and no replica

    @property
    def rank(self) -> int:
        """Of this process, in the group."""
        return int(dist.get_rank(self.group))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self.ranks)

    def sum(self, vector: Total) -> Total:
        """By all_reduce, where the group's backend can: on the CPU, else on its device."""
        kinds = {device.type for device in self.group._device_types}
        device = "cpu" if "cpu" in kinds else kinds.pop()
        tensor = torch.from_numpy(vector).to(device)
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
        return _ring(_ranks(group), group, parts=True)
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"group is {group!r}; for tensors it is a ProcessGroup, a DeviceMesh or a communicator "
            "of mpi4py"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("this process is not in the group")
    return Ring(group, tuple(dist.get_process_group_ranks(group)), True)


def ring_of_leaves(leaves: Sequence[Any]) -> Ring | None:
    """The workers over which DTensors are spread; None where no leaf is one.

    Those of the one mesh of all leaves, or where meshes differ of the mesh they were cut from.
    """
    kind = spread_by()
    if kind is None or not (dist.is_available() and dist.is_initialized()):
        return None
    found = [leaf._spec.mesh for leaf in leaves if isinstance(leaf, kind)]
    if not found:
        return None
    meshes = {id(mesh): mesh for mesh in found}.values()
    every = {_ranks(mesh): mesh for mesh in meshes}
    if len(every) > 1:
        every = {_ranks(root): root for root in map(_root, meshes)}
    widest = max(every, key=len)
    if not all(set(ranks) <= set(widest) for ranks in every):
        raise ValueError(
            f"DTensors are on meshes of the ranks {sorted(every)}, none of which has all; say by "
            "`group` who takes part"
        )
    return _ring(widest, every[widest], parts=False)


def any_spread(leaves: Sequence[Any]) -> bool:
    """If a leaf is a DTensor."""
    kind = spread_by()
    return kind is not None and any(isinstance(leaf, kind) for leaf in leaves)


def local(leaf: Any) -> Any:
    """What this process holds of a leaf."""
    return leaf._local_tensor if any_spread([leaf]) else leaf


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
    return [leaf._local_tensor if isinstance(leaf, kind) else leaf for leaf in leaves]


def counted(leaves: Sequence[Any], ring: Ring) -> list[Any]:
    """What this process adds of the leaves to the sum of squares of all."""
    found = []
    kind = spread_by()
    known: dict[Any, tuple[bool, bool]] = {}  # one question per mesh and kinds of placement
    for leaf in leaves:
        if kind is not None and isinstance(leaf, kind):
            spec = leaf._spec
            key = (id(spec.mesh), *map(type, spec.placements))
            answer = known.get(key)
            if answer is None:
                is_sum = any(each.is_partial() for each in spec.placements)
                answer = known[key] = is_sum, _is_first(leaf, ring)
            is_sum, is_first = answer
            whole = _added_up(leaf) if is_sum else leaf
            if is_first:
                found.append(whole._local_tensor)
        elif ring.parts or ring.rank == 0:
            found.append(leaf)
    return found


def _added_up(leaf: DTensor) -> DTensor:
    """A DTensor whose terms have been added up."""
    from torch.distributed.tensor import Replicate

    whole = [Replicate() if each.is_partial() else each for each in leaf.placements]
    with torch.no_grad():
        added_up: DTensor = leaf.redistribute(placements=whole)
    return added_up


def _is_first(leaf: DTensor, ring: Ring) -> bool:
    """If of all that hold the same elements this process is the one that counts them."""
    place = leaf.device_mesh.get_coordinate()
    if place is None:
        return False
    among = zip(place, leaf.placements, strict=True)
    if any(at > 0 for at, each in among if each.is_replicate() or each.is_partial()):
        return False
    # A mesh that is cut from a larger one has its like there, with the same elements.
    return ring.parts or min(ring.ranks) in _ranks(leaf.device_mesh)


@functools.lru_cache(maxsize=64)
def _ranks(mesh: DeviceMesh) -> Ranks:
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def _root(mesh: DeviceMesh) -> DeviceMesh:
    root: DeviceMesh = mesh._get_root_mesh()
    return root


def _ring(ranks: Ranks, mesh: DeviceMesh, *, parts: bool) -> Ring:
    if ranks == tuple(range(dist.get_world_size())):
        return Ring(dist.group.WORLD, ranks, parts)
    if mesh.ndim == 1:
        return Ring(mesh.get_group(), ranks, parts)
    return Ring(_group_of(ranks, dist.group.WORLD), ranks, parts)


@functools.lru_cache(maxsize=16)
def _group_of(ranks: Ranks, _: Any) -> Any:
    """A group of these ranks, which alone have to ask for it; made once for a world."""
    return dist.new_group(list(ranks), use_local_synchronization=True)
