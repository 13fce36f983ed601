"""PyTorch's own words: change the import, and clip by the right norm; or clip in `attach`.

``clip_grad_norm_``, ``get_total_norm`` and ``clip_grads_with_norm_`` take and return what
``torch.nn.utils``'s do. They differ in this, on purpose:

- The norm is correctly rounded (of order 2; of other orders, summed in float64), in float32, or
  float64 if a gradient is float64 or complex128. PyTorch sums in the dtype of the gradients,
  returns the norm in it, and is 4.8 % low on 2^27 values of 1.1 in float32.
- No 1e-6 is added to the norm. Where it is at most ``max_norm`` no gradient is written; PyTorch
  multiplies each, by a number that is 1.
- Finite gradients whose squares overflow are clipped rightly; PyTorch makes them 0.
- A gradient that is listed twice counts once and is scaled once.
- Sparse and float8 gradients are clipped; rows of one index are added first.
- ``max_norm`` is a number or a tensor of shape (). Zero, negative or NaN is a ValueError; with
  ``inf`` nothing is written, even where a gradient is inf, of which PyTorch makes all NaN.
- ``norm_type`` is above 0; PyTorch has 0 and below too.
- A gradient whose elements share memory, as ``expand`` makes, is a ValueError.
- An empty tensor counts 0 in a norm of any order.
- ``foreach`` is without effect: there is one way, whatever the dtypes.
- Parameters may come with their names, as ``model.named_parameters()`` or a dict: errors say them.
- A gradient is changed below autograd, as under ``torch.no_grad``; its version counter says so.
  Inference tensors are changed too, where PyTorch refuses after it has changed others.

DTensors are counted by their placements, on any mix of meshes, with tensors beside them: one
all-reduce, of one size. PyTorch takes one mesh, sums shards in their dtype, and returns the norm as
a DTensor; here it is a tensor, the same on every rank. Parameters of FullyShardedDataParallel are
counted as it has sharded them; PyTorch's function gives each rank a norm of its own.

Gradients on a GPU are clipped by two launches of Triton kernels, to the same bits, and the host
does not wait for them; ``max_norm`` and ``total_norm`` may be tensors there. docs/gpu.md has what
does wait. On other devices PyTorch's operations do the work.

``torch.compile`` takes each function whole, and a ``max_norm`` that changes takes no more graphs
than PyTorch's does. The norm of meta and fake gradients is meta or fake, so that memory can be
estimated under `patch`. docs/numerics.md has what else traces a clip.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar, Literal, SupportsFloat, overload

import torch
from torch import Tensor
from torch.nn import utils

from gradclip.core.versions import require

require("torch>=2.6", torch.__version__)

from gradclip import _clip
from gradclip.core.decide import OnNonfinite, check_clip_norm
from gradclip.core.limits import Limit
from gradclip.core.norms import Norms
from gradclip.core.opening import Opening
from gradclip.core.patch import Patch
from gradclip.torch import backend
from gradclip.torch.clipper import Clipper, clipper_of
from gradclip.torch.library import operand
from gradclip.torch.limits import by_limit
from gradclip.torch.norms import check_order, clip_, clip_with_norm_, total_norm
from gradclip.torch.parameters import (
    Named,
    gradients_of,
    keys_of_gradients,
    listed,
    path_of_gradient,
)
from gradclip.torch.units import adaptive_clip_grad_

__all__ = [
    "Clipper",
    "adaptive_clip_grad_",
    "attach",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "clipper_of",
    "get_total_norm",
    "patch",
]

attach = Clipper
Clipper.__module__ = __name__  # by which copies are pickled, wherever the code stands


@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: SupportsFloat | Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    group: Any = None,
    norms: Literal[False] = False,
) -> Tensor: ...
@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: SupportsFloat | Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    group: Any = None,
    norms: Literal[True],
) -> Norms[Tensor, Tensor]: ...
@overload
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: SupportsFloat | Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    group: Any = None,
    norms: bool,
) -> Tensor | Norms[Tensor, Tensor]: ...
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: SupportsFloat | Limit,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    group: Any = None,
    norms: bool = False,
) -> Tensor | Norms[Tensor, Tensor]:
    """Scale the gradients of parameters down together so that their norm is at most ``max_norm``.

    ::

        total_norm = (sum of |g|^p over every element g of every gradient)^(1/p)
        gradient  *= max_norm / total_norm    if total_norm > max_norm

    Args:
        parameters: parameters, or one, also with their names, as ``model.named_parameters()`` or
            a dict; those without a gradient are passed over. Gradients of float16, bfloat16,
            float8, float32, float64, complex; dense, or sparse.
        max_norm: above 0; ``inf`` only measures. Or a limit of `gradclip.limits`, which learns from
            each norm; where it would have a step skipped, all gradients become 0.
        norm_type: p, above 0; ``inf`` is the largest ``|g|``.
        error_if_nonfinite: RuntimeError if the norm is NaN or inf.
        foreach: without effect.
        on_nonfinite: what becomes of the gradients where an element is NaN or inf: ``"nan"``,
            ``"zero"``, ``"keep"`` or ``"raise"``, as in `gradclip.clip_by_global_norm`. None does
            as PyTorch: NaN makes all NaN; inf makes itself NaN and what is finite 0.
        group: a ``ProcessGroup``, ``DeviceMesh`` or mpi4py communicator of the workers that hold
            other parameters of the same model, as the stages of a pipeline do; each calls, with the
            same arguments but the parameters. None: those over whose meshes the DTensors among the
            parameters are spread, or with whom FullyShardedDataParallel has sharded them.
        norms: if the norm of each gradient is to be told as well, from the same pass.

    Returns:
        The norm before clipping, a scalar, float64 if a gradient is float64 or complex128, else
        float32; 0 if there is no gradient. With ``norms`` in its place a `gradclip.Norms`, which
        has it as ``global_norm``, by the names of parameters that came with them, else their
        places.

    Raises:
        TypeError, ValueError: a limit is no number or out of range, or a gradient is not of the
            dtypes and layouts that are clipped. Nothing has been written then.
        RuntimeError: with ``error_if_nonfinite``; or another worker has failed, or was given other
            arguments. Nothing has been written.
        FloatingPointError: with ``on_nonfinite="raise"``; it names the gradients.

    Follows ``torch.nn.utils.clip_grad_norm_``, with the differences that `gradclip.torch` lists.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> print(clip_grad_norm_([weight], 2.5), weight.grad)
    tensor(5.) tensor([1.5000, 2.0000])
    """
    del foreach
    with Opening(group) as opening:
        given = listed(parameters, "parameters", opening.seen)
        # Of the parameters, since a worker may have no gradient and still has to take part.
        workers = opening.workers = backend.workers(given.tensors, group)
        if isinstance(parameters, types.GeneratorType) and not given.tensors:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
        order, error_if_nonfinite = check_order(norm_type), bool(error_if_nonfinite)
        grads = gradients_of(given)
    learns = isinstance(max_norm, Limit)
    if workers is None and torch.compiler.is_compiling() and not learns and not norms:
        if on_nonfinite is not None:
            _clip.check_policy(on_nonfinite)
        limit = operand("max_norm", max_norm)
        policy = (on_nonfinite or "", error_if_nonfinite)
        return torch.ops.gradclip.clip_grads_(grads, limit, order, *policy)
    keys = keys_of_gradients(given, grads) if learns or norms else ()
    total_norm, each = clip_(
        grads,
        partial(path_of_gradient, given),
        max_norm,
        order,
        on_nonfinite,
        error_if_nonfinite,
        workers,
        keys,
        wants_each=norms,
    )
    if not norms:
        return total_norm
    assert each is not None, "it was wanted"
    return Norms(each, total_norm, keys)


def get_total_norm(
    tensors: Tensor | Iterable[Tensor] | Named,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    group: Any = None,
) -> Tensor:
    """The norm of tensors together: ``(sum of |x|^p over every element x)^(1/p)``.

    Args:
        tensors: tensors, or one, also with their names; one that is listed twice counts once.
        norm_type: p, above 0; ``inf`` is the largest ``|x|``.
        error_if_nonfinite: RuntimeError if the norm is NaN or inf.
        foreach: without effect.
        group: as in `clip_grad_norm_`; None: those over whose meshes DTensors are spread.

    Returns:
        A scalar, float64 if a tensor is float64 or complex128, else float32.

    Raises:
        TypeError, ValueError: a tensor is not of the dtypes and layouts that are clipped, or
            ``norm_type`` is out of range.
        RuntimeError: with ``error_if_nonfinite``; or another worker has failed, or was given other
            arguments.

    Follows ``torch.nn.utils.get_total_norm``, with the differences that `gradclip.torch` lists.

    >>> print(get_total_norm([torch.tensor([3.0, 0.0]), torch.tensor(4.0)]))
    tensor(5.)
    """
    del foreach
    with Opening(group) as opening:
        given = listed(tensors, "tensors", opening.seen)
        workers = opening.workers = backend.workers(given.tensors, group)
        order, error_if_nonfinite = check_order(norm_type), bool(error_if_nonfinite)
    if workers is None and torch.compiler.is_compiling():
        return torch.ops.gradclip.total_norm(given.tensors, order, error_if_nonfinite)
    return total_norm(given.tensors, given.path, order, error_if_nonfinite, workers)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: SupportsFloat | Limit,
    total_norm: SupportsFloat,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients of parameters by ``max_norm / total_norm`` if that is below 1.

    Args:
        parameters: as in `clip_grad_norm_`.
        max_norm: above 0; ``inf`` clips nothing. Or a limit of `gradclip.limits`, which learns from
            ``total_norm``.
        total_norm: the norm, a scalar. NaN makes every gradient NaN, inf makes it 0.
        foreach: without effect.

    Raises:
        TypeError, ValueError: a limit is no number or out of range, or a gradient is not of the
            dtypes and layouts that are clipped. Nothing has been written then.

    Follows ``torch.nn.utils.clip_grads_with_norm_``, with the differences that `gradclip.torch`
    lists.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_([weight], 2.5, torch.tensor(5.0))
    >>> weight.grad
    tensor([1.5000, 2.0000])
    """
    del foreach
    given = listed(parameters, "parameters", [])
    grads = gradients_of(given)
    if torch.compiler.is_compiling() and not isinstance(max_norm, Limit):
        limits = operand("max_norm", max_norm), operand("total_norm", total_norm)
        torch.ops.gradclip.clip_grads_with_norm_(grads, *limits)
    else:
        clip_with_norm_(grads, partial(path_of_gradient, given), max_norm, total_norm)


class patch(Patch):  # noqa: N801  (used as a function)
    """Put `gradclip` in place of the three functions in ``torch.nn.utils``.

    From the call on, or within the ``with`` statement, for all code that looks them up there when
    it clips, as Lightning, accelerate and transformers do. Code that has imported them by name
    before keeps PyTorch's. ``undo()`` puts back what was there before.

    Args:
        limit: what to clip by in place of the number that such code gives: a limit of
            `gradclip.limits`, or a number. One that learns is for the gradients of one list of
            parameters: ValueError where others are clipped.

    Raises:
        ValueError: a patch with another limit is in force; or the limit is out of range.

    >>> with patch():
    ...     utils.clip_grad_norm_ is clip_grad_norm_
    True
    >>> utils.clip_grad_norm_ is clip_grad_norm_
    False
    """

    _limit: ClassVar[Any] = None

    def __init__(self, *, limit: SupportsFloat | Limit | None = None) -> None:
        if limit is not None and not isinstance(limit, Limit):
            limit = check_clip_norm(limit, "limit")
        if patch._active and limit is not patch._limit:
            raise ValueError(
                f"gradclip.torch.patch is in force with limit {patch._limit!r}: undo() it first"
            )
        patch._limit = limit
        super().__init__()

    def _install(self) -> None:
        ours: tuple[Any, ...] = (clip_grad_norm_, get_total_norm, clip_grads_with_norm_)
        if self._limit is not None:
            ours = (*by_limit(self._limit, clip_grad_norm_, clip_grads_with_norm_), get_total_norm)
        for function in ours:
            for module in (utils, utils.clip_grad):
                if hasattr(module, function.__name__):
                    self._put(module, function.__name__, function)
