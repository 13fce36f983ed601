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

import math
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import utils

from gradclip import _clip
from gradclip.core.decide import OnNonfinite, check_clip_norm, check_on_nonfinite, check_use_norm
from gradclip.core.exact import Scaled
from gradclip.core.patch import Patch
from gradclip.core.workers import Joint, Workers
from gradclip.kernels.cpu import ieee_arithmetic
from gradclip.torch import backend
from gradclip.torch.clipper import Clipper, clipper_of
from gradclip.torch.library import number, operand

__all__ = [
    "Clipper",
    "attach",
    "clip_grad_norm_",
    "clip_grads_with_norm_",
    "clipper_of",
    "get_total_norm",
    "patch",
]

attach = Clipper


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    on_nonfinite: OnNonfinite | None = None,
    group: Any = None,
) -> Tensor:
    """Scale the gradients of parameters down together so that their norm is at most ``max_norm``.

    ::

        total_norm = (sum of |g|^p over every element g of every gradient)^(1/p)
        gradient  *= max_norm / total_norm    if total_norm > max_norm

    Args:
        parameters: parameters, or one, also with their names, as ``model.named_parameters()`` or
            a dict; those without a gradient are passed over. Gradients of float16, bfloat16,
            float8, float32, float64, complex; dense, or sparse.
        max_norm: above 0; ``inf`` only measures.
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

    Returns:
        total_norm before clipping, a scalar: float64 if a gradient is float64 or complex128, else
        float32; 0 if there is no gradient.

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
    with _clip.Opening(group) as opening:
        given = _listed(parameters, "parameters", opening.seen)
        # Of the parameters, since a worker may have no gradient and still has to take part.
        workers = opening.workers = backend.workers(given.tensors, group)
        if isinstance(parameters, types.GeneratorType) and not given.tensors:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.",
                stacklevel=2,
            )
        order, error_if_nonfinite = _order(norm_type), bool(error_if_nonfinite)
        grads = _gradients(given)
    if workers is None and torch.compiler.is_compiling():
        if on_nonfinite is not None:
            check_on_nonfinite(on_nonfinite)
        limit = operand("max_norm", max_norm)
        policy = (on_nonfinite or "", error_if_nonfinite)
        return torch.ops.gradclip.clip_grads_(grads, limit, order, *policy)
    return _clip_grads_(
        grads,
        partial(_path_of_gradient, given),
        max_norm,
        order,
        on_nonfinite,
        error_if_nonfinite,
        workers,
    )


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
        A scalar: float64 if a tensor is float64 or complex128, else float32.

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
    with _clip.Opening(group) as opening:
        given = _listed(tensors, "tensors", opening.seen)
        workers = opening.workers = backend.workers(given.tensors, group)
        order, error_if_nonfinite = _order(norm_type), bool(error_if_nonfinite)
    if workers is None and torch.compiler.is_compiling():
        return torch.ops.gradclip.total_norm(given.tensors, order, error_if_nonfinite)
    return _total_norm(given.tensors, given.path, order, error_if_nonfinite, workers)


def clip_grads_with_norm_(
    parameters: Tensor | Iterable[Tensor] | Named,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    """Scale the gradients of parameters by ``max_norm / total_norm`` if that is below 1.

    Args:
        parameters: as in `clip_grad_norm_`.
        max_norm: above 0; ``inf`` clips nothing.
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
    given = _listed(parameters, "parameters", [])
    grads = _gradients(given)
    if torch.compiler.is_compiling():
        limits = operand("max_norm", max_norm), operand("total_norm", total_norm)
        torch.ops.gradclip.clip_grads_with_norm_(grads, *limits)
    else:
        _clip_grads_with_norm_(grads, partial(_path_of_gradient, given), max_norm, total_norm)


class patch(Patch):  # noqa: N801  (used as a function)
    """Put `gradclip` in place of the three functions in ``torch.nn.utils``.

    From the call on, or within the ``with`` statement, for all code that looks them up there when
    it clips, as Lightning, accelerate and transformers do. Code that has imported them by name
    before keeps PyTorch's. ``undo()`` puts back what was there before.

    >>> with patch():
    ...     utils.clip_grad_norm_ is clip_grad_norm_
    True
    >>> utils.clip_grad_norm_ is clip_grad_norm_
    False
    """

    def _install(self) -> None:
        for function in (clip_grad_norm_, get_total_norm, clip_grads_with_norm_):
            for module in (utils, utils.clip_grad):
                if hasattr(module, function.__name__):
                    self._put(module, function.__name__, function)


# ---- the arguments ----


Named = Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]


class _Listed(NamedTuple):
    """What was given, in a row."""

    tensors: list[Any]
    called: str  # what the function calls it
    names: Sequence[str] | None = None

    def path(self, place: int) -> str:
        """What an error calls one of them."""
        return f"{self.called}[{place}]" if self.names is None else self.names[place]


def _listed(given: Tensor | Iterable[Tensor] | Named, called: str, seen: list[Tensor]) -> _Listed:
    """Tensors in a row, with their names if they have some; in ``seen`` too, as far as it goes.

    Raises:
        TypeError: what is given holds no tensors, or others than those meant.
    """
    if isinstance(given, _MAPPINGS):
        seen.extend(given.values())
        known = called != "parameters" or any(map(_may_have_gradient, seen))
        if not known and seen and all(isinstance(each, Tensor) for each in seen):
            raise TypeError(_no_tensors(given, called))
        return _Listed(seen, called, list(map(str, given)))
    if isinstance(given, _HOLDERS):
        seen.extend(_tensors_in(given))  # which tell who is to hear of an error
        if not hasattr(given, "__iter__") or not all(isinstance(x, Tensor) for x in given):
            raise TypeError(_no_tensors(given, called))
        seen.clear()
    try:
        items: Any = iter([given] if isinstance(given, Tensor) else given)
    except TypeError:
        raise TypeError(_no_tensors(given, called)) from None
    if isinstance(given, str):
        raise TypeError(_no_tensors(given, called))
    names = None
    try:
        seen.extend(items)
    finally:
        pairs: Any = seen
        if pairs and all(map(_is_named, pairs)):
            names = [name for name, _ in pairs]
            seen[:] = [tensor for _, tensor in pairs]
    return _Listed(seen, called, names)


_HOLDERS = (torch.nn.Module, torch.optim.Optimizer)
_MAPPINGS = (dict, Mapping, torch.nn.ParameterDict)


def _is_named(pair: Any) -> bool:
    return type(pair) is tuple and len(pair) == 2 and isinstance(pair[0], str)


def _tensors_in(holder: Any) -> list[Any]:
    """The parameters that a model or an optimizer holds."""
    if isinstance(holder, torch.optim.Optimizer):
        return [parameter for group in holder.param_groups for parameter in group["params"]]
    return list(holder.parameters())


def _may_have_gradient(tensor: Any) -> bool:
    """If it is no weight of a ``state_dict``."""
    if isinstance(tensor, torch.nn.Parameter):
        return True
    return isinstance(tensor, Tensor) and (tensor.requires_grad or tensor.grad is not None)


def _no_tensors(given: Any, called: str) -> str:
    what = type(given).__name__
    if isinstance(given, _MAPPINGS):
        what += " of tensors that have no gradients, as a state_dict is"
    hint = f"{called} are tensors, as model.parameters() gives them"
    if called == "tensors":
        hint = "tensors are [p.grad for p in model.parameters() if p.grad is not None], or others"
    if isinstance(given, torch.optim.Optimizer):
        hint += "; gradclip.torch.attach takes an optimizer"
    return f"{called} is {what}; {hint}"


def _gradients(given: _Listed) -> list[Tensor]:
    try:
        grads = [each.grad for each in given.tensors]
    except AttributeError:
        _check_tensors(given)
        raise
    return [gradient for gradient in grads if gradient is not None]


def _check_tensors(given: _Listed) -> None:
    for place, tensor in enumerate(given.tensors):
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{given.path(place)} is {type(tensor).__name__}; {given.called} are tensors, or "
                "pairs of a name and a tensor, as model.named_parameters() gives them"
            )


def _path_of_gradient(given: _Listed, place: int) -> str:
    places = [i for i, parameter in enumerate(given.tensors) if parameter.grad is not None]
    return f"{given.path(places[place])}.grad"


def _order(norm_type: Any) -> float:
    try:
        order = float(norm_type)
    except (TypeError, ValueError):
        raise TypeError(f"norm_type is {norm_type!r}; it must be a number") from None
    if not order > 0:
        raise ValueError(f"norm_type is {norm_type!r}; it must be above 0 (inf: the largest |x|)")
    return order


# ---- the flow ----


def _measured(
    held: Any, order: float, error_if_nonfinite: bool, part: Joint | None
) -> _clip.Measured:
    if order == 2:
        found = _clip.measured(backend, held, part)
    else:
        found = _measured_of_order(held, order, part)
    if error_if_nonfinite and not math.isfinite(found.norm.significand):
        _refuse(order)
    return found


def _refuse(order: float) -> None:
    raise RuntimeError(
        f"The total norm of order {order} for gradients from `parameters` is non-finite, so it "
        "cannot be clipped. To disable this error and scale the gradients by the non-finite "
        "norm anyway, set `error_if_nonfinite=False`"
    )


def _measured_of_order(held: Any, order: float, part: Joint | None) -> _clip.Measured:
    wide = backend.is_wide(held)
    if part is None:
        powers = [backend.powers_of_order(held, order)]
        return _clip.Measured(backend.norm_of_order(powers, order, wide=wide))
    mine = backend.powers_of_order(backend.counted(held, part), order)
    every, wide = part.gathered(mine, wide=wide)
    return _clip.Measured(backend.norm_of_order(every.tolist(), order, wide=wide), wide)


@backend.looked_away_from
def _total_norm(
    tensors: list[Tensor],
    path: Callable[[int], str],
    order: float,
    error_if_nonfinite: bool,
    workers: Workers | None = None,
) -> Tensor:
    with ieee_arithmetic(), _clip.taking_part(workers) as part:
        if part is not None:
            part.asked(norm_type=order, error_if_nonfinite=error_if_nonfinite)
        held = backend.hold(tensors, path, writable=False)
        if held.unread is not None and part is None:
            norm = _total_norm_op(held.leaves, order, error_if_nonfinite)
            return _asked(norm, error_if_nonfinite)
        if len(once := backend.distinct(tensors)) < len(tensors):
            held = backend.hold(once, str, writable=False)
        queue = backend.queue(held) if part is None and order == 2 else None
        if queue is not None:
            norm = queue.norm()
            if (
                error_if_nonfinite
                and not math.isfinite(norm)
                and _clip.any_nonfinite(backend, tensors)
            ):
                _refuse(order)
            return norm
        found = _measured(held, order, error_if_nonfinite, part)
        return backend.scalar(found.norm, held, wide=found.wide)


@backend.looked_away_from
def _clip_grads_(
    grads: list[Tensor],
    path: Callable[[int], str],
    max_norm: Any,
    order: float,
    on_nonfinite: OnNonfinite | None,
    error_if_nonfinite: bool,
    workers: Workers | None = None,
) -> Tensor:
    with torch.no_grad(), ieee_arithmetic(), _clip.taking_part(workers) as part:
        if on_nonfinite is not None:
            check_on_nonfinite(on_nonfinite)
        max_norm, _ = _clip.limits_read(max_norm, None, "max_norm")
        held = backend.hold(grads, path, writable=True)
        if held.unread is not None and part is None:
            backend.check_not_functionalized()
            limit, _ = _clip.limits_there(held.unread, max_norm, None, "max_norm")
            policy = (on_nonfinite or "", error_if_nonfinite)
            norm = _clip_grads_op(held.leaves, operand("max_norm", limit), order, *policy)
            return _asked(norm, error_if_nonfinite)
        queue = backend.queue(held) if part is None and order == 2 else None
        if queue is not None:
            refuse = partial(_refuse, order) if error_if_nonfinite else None
            return _queued_(grads, path, queue, max_norm, None, on_nonfinite, refuse)
        limit = check_clip_norm(max_norm, "max_norm")
        if part is not None:
            part.asked(
                max_norm=limit,
                norm_type=order,
                on_nonfinite=on_nonfinite,
                error_if_nonfinite=error_if_nonfinite,
            )
        found = _measured(held, order, error_if_nonfinite, part)
        _act_(grads, path, held, found.norm, limit, on_nonfinite, part)
        return backend.scalar(found.norm, held, wide=found.wide)


@backend.looked_away_from
def _clip_grads_with_norm_(
    grads: list[Tensor], path: Callable[[int], str], max_norm: Any, total_norm: Any
) -> None:
    with torch.no_grad(), ieee_arithmetic():
        limits = _clip.limits_read(max_norm, total_norm, "max_norm", "total_norm")
        max_norm, total_norm = limits
        held = backend.hold(grads, path, writable=True)
        if held.unread is not None:
            backend.check_not_functionalized()
            names = "max_norm", "total_norm"
            limits = _clip.limits_there(held.unread, max_norm, total_norm, *names)
            _clip_grads_with_norm_op(held.leaves, *map(operand, names, limits))
            return
        queue = backend.queue(held)
        if queue is not None:
            _queued_(grads, path, queue, max_norm, total_norm, None)
            return
        limit = check_clip_norm(max_norm, "max_norm")
        norm = check_use_norm(total_norm, "total_norm")
        _act_(grads, path, held, norm, limit, None)


def _asked(norm: Tensor, error_if_nonfinite: bool) -> Tensor:
    """A norm that may be without a value: if it is finite PyTorch refuses to say, as in its own."""
    if error_if_nonfinite and not backend.is_written_down():
        bool(norm.isfinite())
    return norm


def _queued_(
    grads: list[Tensor],
    path: Callable[[int], str],
    queue: Any,
    max_norm: Any,
    total_norm: Any,
    on_nonfinite: OnNonfinite | None,
    refuse: Callable[[], None] | None = None,
) -> Tensor:
    """Clip in a device's memory, without waiting unless a norm may have to be refused."""
    limits = _clip.limits_there(queue, max_norm, total_norm, "max_norm", "total_norm")
    policy = on_nonfinite or "factor"
    norm: Tensor = _clip.queued_(backend, queue, grads, path, *limits, policy, refuse)
    return norm


def _act_(
    grads: list[Tensor],
    path: Callable[[int], str],
    held: Any,
    norm: Scaled,
    limit: float,
    on_nonfinite: OnNonfinite | None,
    part: Joint | None = None,
) -> None:
    if on_nonfinite is None and math.isinf(limit):
        return  # only measured, whatever the norm
    if on_nonfinite is None and math.isinf(norm.significand):
        backend.scale_(held, Scaled(0.0, 0))  # PyTorch's factor: what is inf becomes NaN
    else:
        action = _clip.decided(backend, grads, path, norm, limit, on_nonfinite or "nan", part=part)
        _clip.carry_out_(backend, held, action)


# ---- operations that torch.compile takes as they are ----


def _float64_of(grads: list[Tensor]) -> Tensor:
    wide = any(grad.dtype in (torch.float64, torch.complex128) for grad in grads)
    device = grads[0].device if grads else "cpu"
    return torch.empty((), dtype=torch.float64 if wide else torch.float32, device=device)


@torch.library.custom_op("gradclip::clip_grads_", mutates_args=("grads",))
def _clip_grads_op(
    grads: list[Tensor],
    max_norm: Tensor,
    norm_type: float,
    on_nonfinite: str,
    error_if_nonfinite: bool,
) -> Tensor:
    policy: Any = on_nonfinite or None
    path = "gradients[{}]".format
    return _clip_grads_(grads, path, number(max_norm), norm_type, policy, error_if_nonfinite)


@torch.library.custom_op("gradclip::clip_grads_with_norm_", mutates_args=("grads",))
def _clip_grads_with_norm_op(grads: list[Tensor], max_norm: Tensor, total_norm: Tensor) -> None:
    limits = number(max_norm), number(total_norm)
    _clip_grads_with_norm_(grads, "gradients[{}]".format, *limits)


@torch.library.custom_op("gradclip::total_norm", mutates_args=())
def _total_norm_op(tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool) -> Tensor:
    return _total_norm(tensors, "tensors[{}]".format, norm_type, error_if_nonfinite)


_clip_grads_op.register_fake(lambda grads, *_: _float64_of(grads))
_clip_grads_with_norm_op.register_fake(lambda *_: None)
_total_norm_op.register_fake(lambda tensors, *_: _float64_of(tensors))
