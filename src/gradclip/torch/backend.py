"""PyTorch: dense and sparse tensors, DTensors, and `gradclip.IndexedSlices` of tensors.

Tensors on the CPU go through the host's kernels where they lie (`host`), those on a GPU through
Triton's (`gpu`); on other devices the same bits come from PyTorch's own operations (`elsewhere`).
Where autograd or a function transform looks on, the clip is one `torch.autograd.Function`
(`autograd`), and where operations are written down, or there is nothing to read, one operation
(`library`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gradclip.core.protocol import Beside
from gradclip.core.sparse import IndexedSlices
from gradclip.core.workers import Workers, workers_of
from gradclip.kernels.cpu import kinds
from gradclip.kernels.cpu.leaves import check_countable
from gradclip.torch import devices, elsewhere, host, mesh
from gradclip.torch.autograd import Followed
from gradclip.torch.following import (
    check_not_traced,
    check_operands,
    check_writes,
    has_no_memory,
    is_differentiated,
    is_functionalized,
    is_mapped,
    is_transformed,
    is_unread,
    is_written_down,
    looked_away_from,
)
from gradclip.torch.overlap import check_apart, distinct
from gradclip.torch.spread import Spread, Tensors
from gradclip.torch.tensors import are_plain, check_unrecorded, checked
from gradclip.torch.unread import Unread


def hold(
    leaves: Sequence[Any],
    path: Callable[[int], str],
    *,
    writable: bool,
    beside: Beside | None = None,
) -> Any:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped; with ``writable``,
            autograd records what becomes of one.
        ValueError: a sparse leaf is malformed, the memory of one has been given up, or there are
            more elements than an int64 counts; with ``writable``, elements of one or of two share
            memory.
        NotImplementedError: what is followed is spread over several workers.
    """
    if beside is not None:
        followed = _followed(leaves, path, beside)
        if followed is not None:
            return followed
    if writable and torch.is_grad_enabled():
        check_unrecorded(leaves, path)
    if are_plain(leaves):
        held = host.hold_plain(leaves, path, writable=writable) or _held_there(
            leaves, path, writable=writable
        )
        if held is not None:
            return held
    elif mesh.any_spread(leaves):
        return Spread(leaves, hold(mesh.locals_of(leaves), path, writable=writable))
    if is_unread(leaves):
        check_operands(leaves, path)
        if writable:
            check_writes(leaves, path)
        return Unread(leaves, path, writable=writable)
    return _held_with_care(leaves, path, writable=writable)


# What a process counts, and what is followed, is held anew.
Tensors.hold = staticmethod(hold)


def _held_there(tensors: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Any:
    """Plain tensors in the memory of a GPU; None where PyTorch's own operations have to do."""
    if not tensors or is_transformed() or is_written_down():
        return None
    if not devices.has_triton(tensors[0].device):
        return None
    from gradclip.torch import gpu  # which loads Triton

    return gpu.hold(tensors, path, writable=writable)


def _held_with_care(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Any:
    values = [checked(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    check_countable((each.numel() * (1 + each.is_complex()) for each in values), path)
    if on_host(values):
        return host.hold(leaves, values, path, writable=writable)
    if writable:
        check_apart(values, path)
    return elsewhere.Leaves(distinct(leaves) if writable else leaves, writable=writable)


def on_host(values: Sequence[Tensor]) -> bool:
    """If the host's kernels reach all tensors."""
    return all(tensor.device.type == "cpu" for tensor in values)


# ---- where autograd, a function transform or a tracer looks on ----


def _followed(leaves: Sequence[Any], path: Callable[[int], str], beside: Beside) -> Any:
    values = [*leaves, *beside.limits]
    kind = _kind_of_following(values)
    if kind is None:
        return None
    alone = beside.group is None and not mesh.any_spread(values) and workers(leaves, None) is None
    if not alone:
        check_not_traced()
        raise NotImplementedError(
            "a clip over several workers cannot be differentiated; detach the tensors, or use "
            "torch.no_grad()"
        )
    if kind is Followed:
        return Followed(leaves, path)
    check_operands(leaves, path)
    return Unread(leaves, path, writable=False)


def _kind_of_following(values: Sequence[Any]) -> type | None:
    """Who holds leaves, if what becomes of these values is followed."""
    if is_functionalized():
        return Unread
    if is_mapped():
        return Followed
    if is_written_down():
        return Unread
    tensors = [
        value.values if isinstance(value, IndexedSlices) else value
        for value in values
        if isinstance(value, Tensor | IndexedSlices)
    ]
    if is_differentiated(tensors):
        return Unread if any(map(has_no_memory, tensors)) else Followed
    return None


# ---- who takes part ----


def workers(leaves: Sequence[Any], group: Any) -> Workers | None:
    """Who holds parts of the same gradient: a group that is named, or those of DTensors.

    Raises:
        TypeError: the group is none of PyTorch's or mpi4py's, or mpi4py's for DTensors.
        ValueError: DTensors are on meshes none of which has all the workers, and no group is named.
        NotImplementedError: what would be asked of the workers is written down, to be run later.
    """
    if group is not None or mesh.any_spread(leaves):
        return _workers(leaves, group)
    ring = mesh.ring_of_leaves(leaves)  # of parameters that FSDP1 has sharded
    return None if ring is None or _are_estimated(leaves) else ring


@looked_away_from
def _workers(leaves: Sequence[Any], group: Any) -> Workers | None:
    if _are_estimated(leaves):
        return None
    if group is None:
        return mesh.ring_of_leaves(leaves)
    if type(group).__module__.partition(".")[0] == "mpi4py":
        if mesh.any_spread(leaves):
            raise TypeError("DTensors are spread over process groups, not over a communicator")
        return workers_of(group)
    ring = mesh.ring_of(group)
    mesh.check_meshes(leaves, ring)
    return ring


def _are_estimated(leaves: Sequence[Any]) -> bool:
    """If it is only asked what memory a step takes: without numbers there are none to add up."""
    check_not_traced()
    here = mesh.locals_of(leaves)
    fake = any(issubclass(each, FakeTensor) for each in kinds(here))
    return fake or (mesh.is_fake() and any(map(has_no_memory, here)))


def everyone(leaves: Sequence[Any]) -> Workers | None:
    """All processes, where one of the leaves is spread over all of them."""
    return mesh.ring_of_all(leaves)
