"""Adaptive gradient clipping: the gradient of each unit by its norm against that of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip.core.decide import factors
from gradclip.core.units import check_units, limits_of_units
from gradclip.kernels import cpu
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.kernels.cpu.leaves import norms_of
from gradclip.torch import host, mesh, pointers
from gradclip.torch.backend import hold
from gradclip.torch.following import looked_away_from
from gradclip.torch.overlap import first_places
from gradclip.torch.parameters import Named, listed
from gradclip.torch.tensors import PLAIN_TYPES


@looked_away_from
def adaptive_clip_grad_(
    parameters: Tensor | Iterable[Tensor] | Named, clip_factor: float = 0.01, eps: float = 1e-3
) -> None:
    """Scale the gradient of each unit down so that it is small against the unit's weights.

    ::

        limit = clip_factor * max(norm(w), eps)
        g    *= limit / norm(g)                    if norm(g) > limit

    of the weights w and the gradient g of each unit: a row of the first axis, which is the output
    of ``torch.nn.Linear`` and ``ConvNd``; of a vector or number, all of it. The authors leave out
    the last, linear layer: do not pass its parameters.

    On the CPU both norms are correctly rounded, and no norm of what is narrower than float64
    overflows. On other devices they are summed in float64, and the host does not wait. A gradient
    that is listed twice is clipped once. A unit whose norm is NaN or inf becomes NaN. Where nothing
    is to be clipped no gradient is written.

    Args:
        parameters: parameters, or one, also with their names; those without a gradient are passed
            over.
        clip_factor: above 0.
        eps: above 0, the least norm that a unit counts with: else weights that begin at 0 stay so.

    Raises:
        TypeError, ValueError: an argument is out of range, or a gradient is not of those clipped.
            Nothing has been written then.
        NotImplementedError: a weight or gradient is sparse or a DTensor.

    Follows Brock et al. (arXiv:2102.06171) and ``timm.utils.agc.adaptive_clip_grad``, which sums
    in the dtype of the tensors, so that large ones become 0, multiplies by a factor below 1 also
    where both norms are equal, keeps a floor of 1e-6 on the gradient's norm, and takes norms of
    other orders. ``gradclip.optax.adaptive_grad_clip`` has the units of optax, where the output
    comes last.

    >>> weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    >>> weight.grad = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    >>> adaptive_clip_grad_([weight], 0.5, eps=1.0)
    >>> weight.grad
    tensor([[1.5000, 2.0000],
            [0.0000, 0.5000]])
    """
    clip_factor, eps = check_units(clip_factor, eps, "clip_factor")
    given = listed(parameters, "parameters", [])
    some = [i for i, weight in enumerate(given.tensors) if weight.grad is not None]
    # Each memory is clipped once.
    places = [some[i] for i in first_places([given.tensors[i].grad for i in some])]
    weights = [given.tensors[i].detach() for i in places]
    grads = [given.tensors[i].grad for i in places]

    def path(number: int) -> str:
        return f"{given.path(places[number])}.grad"

    with torch.no_grad(), ieee_arithmetic():
        _check_dense([*weights, *grads], lambda i: path(i % len(grads)))
        hold(weights, path, writable=False)
        hold(grads, path, writable=True)  # both for what they refuse
        if {tensor.device.type for tensor in (*weights, *grads)} <= {"cpu"}:
            _clip_here_(weights, grads, clip_factor, eps)
        else:
            for weight, grad in zip(weights, grads, strict=True):
                _clip_there_(weight, grad, clip_factor, eps)


def _check_dense(tensors: Sequence[Any], path: Callable[[int], str]) -> None:
    for number, tensor in enumerate(tensors):
        if mesh.any_spread([tensor]) or tensor.layout is not torch.strided:
            raise NotImplementedError(
                f"{path(number)}, or its parameter, is sparse or a DTensor, of whose units no "
                "norms are taken; limits.PerTensor clips each tensor by its own history"
            )
        if type(tensor) not in PLAIN_TYPES:
            raise TypeError(f"{path(number)} is {type(tensor).__name__}, and no plain tensor")


def _clip_here_(
    weights: Sequence[Tensor], grads: Sequence[Tensor], clip_factor: float, eps: float
) -> None:
    """In this machine's memory: a walk for the norms of all units, and one to scale them."""
    pairs = [(w, g) for w, g in zip(weights, grads, strict=True) if g.numel()]
    memory = _units_of([g for _, g in pairs])
    norms, *_ = norms_of(memory)
    sizes = norms_of(_units_of([w for w, _ in pairs]))[0].floats()
    found = factors(norms, limits_of_units(np.maximum, sizes, clip_factor, eps))
    found.significand[~np.isfinite(norms.significand) | np.isnan(sizes)] = np.nan
    if not found.are_one():
        cpu.scale_each(memory, memory, found, None)
        torch.autograd.graph.increment_version(list(grads))


def _units_of(tensors: Sequence[Tensor]) -> cpu.Leaves:
    """The memory of the units of tensors."""
    counts = [each.shape[0] if each.dim() > 1 else 1 for each in tensors]
    in_order = all(map(Tensor.is_contiguous, tensors))  # of axes, else a row is no run of memory
    whole = pointers.taken(tensors, writable=False) if in_order else None
    found = None if whole is None else cpu.rows(whole, counts)
    if found is not None:
        return found
    rows = [row for each in tensors for row in (each.unbind(0) if each.dim() > 1 else [each])]
    return host.hold(rows, rows, str, writable=False).memory


def _clip_there_(weight: Tensor, grad: Tensor, clip_factor: float, eps: float) -> None:
    """On another device, by PyTorch's operations."""
    limit = limits_of_units(torch.clamp_min, _norms(weight), clip_factor, eps)
    norm = _norms(grad)
    factor = torch.where(norm <= limit, torch.ones_like(norm), limit / norm)
    factor = torch.where(norm.isinf(), torch.full_like(norm, torch.nan), factor)
    grad.copy_(grad * factor if grad.is_complex() else grad.double() * factor)


def _norms(tensor: Tensor) -> Tensor:
    """The norm of each unit in float64, to be broadcast."""
    wide = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
    axes = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    return torch.linalg.vector_norm(wide, dim=axes, keepdim=axes is not None)
