"""Clipping inside of an optimizer's step: measured while gradients are warm, folded into the step.

A large gradient is measured in the hook that runs when autograd has just written it, so much of it
is read from the processor's caches. The step adds the parts up. Fused optimizers divide gradients
by a number that they are given, so clipping takes no pass of its own.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Sequence
from operator import is_
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradclip import _clip
from gradclip._decide import Fill, Keep, OnNonfinite, Scale, check_clip_norm, check_on_nonfinite
from gradclip._exact import Part, Scaled, certified_norm
from gradclip._workers import Joint
from gradclip.backends import torch as backend
from gradclip.kernels.cpu import ieee_arithmetic

_attached: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


class Clipper:
    """Clips gradients inside of ``optimizer.step()`` by the global norm of its parameters.

    ::

        norm   = sqrt(sum of |g|^2 over every element g of every gradient)
        factor = max_norm / norm    if norm > max_norm, else 1

    Gradients are measured as backward writes them, so the step reads them no second time. Fused
    Adam, AdamW, SGD and Adagrad divide by the factor as they step; for others gradients are scaled
    before the step, if there is anything to clip. After a step in which a fused optimizer clipped,
    ``grad`` holds what it made of it: divided by ``norm / max_norm`` in its own dtype.

    With ``torch.amp.GradScaler``, fused or not, the limit is on the gradients without its scale,
    and a step that the scaler skips is not counted. Gradients that are changed after backward are
    measured again, as their version counters tell. A change that those do not count, through
    ``.data``, ``.numpy()`` or DLPack, is seen only if it changes one of eight numbers that are
    looked at. With ``torch.distributed`` in use every gradient is measured in the step.

    Args:
        optimizer: any optimizer, or one that accelerate has prepared, whose step is given no
            closure. Its ``state_dict`` stays as it is.
        max_norm: a number above 0 (``inf`` only measures), or one for each parameter group: then
            each group is clipped by a norm of its own.
        on_nonfinite: what becomes of the gradients where an element is NaN or inf, as in
            `gradclip.clip_by_global_norm`.
        group: as in `gradclip.torch.clip_grad_norm_`; every worker steps. With it, what GradScaler
            finds to be inf has to be made known to all before, or they do not step alike.

    On a GPU gradients are clipped before the step, by two launches for which the host does not
    wait; a fused optimizer divides by the factor only where it divides by GradScaler's scale.

    ``norm``, ``factor``, ``steps`` and ``clipped_steps`` tell of it, in tensors; the first two of
    one element for each group if ``max_norm`` has.

    Raises:
        TypeError, ValueError: a limit is no number or out of range, there are not as many as
            groups, or the optimizer has a clipper already.
        RuntimeError: from a step that is given a closure.
        FloatingPointError: from a step, with ``on_nonfinite="raise"``; nothing has been written.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> clipper = Clipper(optimizer, max_norm=2.5)
    >>> (weight @ torch.tensor([3.0, 4.0])).backward()
    >>> optimizer.step()
    >>> print(clipper.norm, weight.data)
    tensor(5.) tensor([-1.5000, -2.0000])
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: float | Sequence[float],
        *,
        on_nonfinite: OnNonfinite = "nan",
        group: Any = None,
    ) -> None:
        check_on_nonfinite(on_nonfinite)
        while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(
            optimizer, "optimizer"
        ):
            optimizer = optimizer.optimizer  # it wraps the one that steps
        self._per_group = isinstance(max_norm, Sequence) and not isinstance(max_norm, str)
        limits: Any = max_norm if self._per_group else [max_norm]
        self._limits = [check_clip_norm(limit, "max_norm") for limit in limits]
        if self._per_group and len(self._limits) != len(optimizer.param_groups):
            raise ValueError(_number_of_limits(self._limits, optimizer))
        if optimizer in _attached:
            raise ValueError("the optimizer has a clipper already; remove() that one first")
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._group = group
        self._optimizer = optimizer
        self._places: list[_Place] = []
        self._folded: Tensor | None = None
        self._instead_of: Any = None
        self._norms = [Scaled(0.0, 0)] * len(self._limits)
        self._actions: list[Keep | Fill | Scale] = [Keep()] * len(self._limits)
        self._wide = False
        self._step: FrameType | None = None  # the one that is under way
        self._steps = self._clipped_steps = 0
        self._there: _There | None = None  # where the latest step was clipped in a device's memory
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)
        # The watches go with the optimizer, though parameters may outlive it.
        self._finalizer = weakref.finalize(optimizer, _leave, self._places)
        try:
            self._find_places()
        except BaseException:
            self.remove()
            raise

    @property
    def norm(self) -> Tensor:
        """The global norm of the latest step, as it was before clipping."""
        if self._there is not None:
            return self._there.told(self._there.norms, per_group=self._per_group)
        dtype = torch.float64 if self._wide else torch.float32
        return self._tensor(list(map(float, self._norms)), dtype)

    @property
    def factor(self) -> Tensor:
        """What gradients were multiplied by in the latest step, float64."""
        if self._there is not None:
            return self._there.told(self._there.factors, per_group=self._per_group)
        return self._tensor(list(map(_factor, self._actions)), torch.float64)

    @property
    def steps(self) -> Tensor:
        """How many steps there were, int64."""
        return self._count(self._steps, 0)

    @property
    def clipped_steps(self) -> Tensor:
        """In how many of them a norm was above its limit, int64."""
        return self._count(self._clipped_steps, 1)

    def _count(self, here: int, word: int) -> Tensor:
        if self._there is None:
            return _cpu_tensor(here, torch.int64)
        return self._there.words[word] + here

    def _tensor(self, values: list[float], dtype: torch.dtype) -> Tensor:
        with ieee_arithmetic():
            return _cpu_tensor(values if self._per_group else values[0], dtype)

    def remove(self) -> None:
        """Clip no more; what was counted stays."""
        self._unfold()
        for handle in self._handles:
            handle.remove()
        self._finalizer()
        _attached.discard(self._optimizer)

    # ---- the step ----

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _calls(self._step):
            return  # a step that calls its base class's: it has been clipped
        self._step = sys._getframe(1)
        # The optimizer itself is the first of args.
        if any(each is not None for each in (*args[1:], kwargs.get("closure"))):
            raise RuntimeError(
                "optimizer.step(closure) under gradclip.torch.attach: the closure would make the "
                "gradients inside of the step. Call it before step(), or clip at its end by "
                "gradclip.torch.clip_grad_norm_"
            )
        if self._per_group and len(self._limits) != len(optimizer.param_groups):
            raise ValueError(_number_of_limits(self._limits, optimizer))
        self._unfold()  # after a step that has failed
        self._find_places()
        if self._clips_there(optimizer):
            return
        if getattr(optimizer, "found_inf", None):
            return  # a gradient overflowed under GradScaler's scale, so nothing is stepped
        self._come_here()
        scale = float(getattr(optimizer, "grad_scale", None) or 1.0)
        lists = self._gradients()
        with ieee_arithmetic():
            # The same for all lists, so that an error in one is told to whoever waits.
            everyone = [place.parameter for place in self._places]
            workers = backend.workers(everyone, self._group)
            norms, actions = [], []
            for each, limit in zip(lists, self._limits, strict=True):
                with _clip.taking_part(workers) as part:
                    norm, wide = _norm(each, part)
                    each.wide = each.wide or wide
                    norms.append(_unscaled(norm, scale, each.wide))
                    actions.append(self._decided(each, norms[-1], limit, part))
            self._carry_out(lists, actions, scale)
        self._norms, self._actions = norms, actions
        self._wide = any(each.wide for each in lists)
        self._steps += 1
        self._clipped_steps += any(isinstance(action, Scale) for action in actions)

    def _clips_there(self, optimizer: Any) -> bool:
        """Clip in a device's memory, without waiting for it, if that is where all gradients are."""
        everyone = [place.parameter for place in self._places]
        if not everyone or not backend.has_triton(everyone[0].device):
            return False
        if self._on_nonfinite == "raise":
            return False  # the host waits in any case: for all lists, before one is written
        if backend.workers(everyone, self._group) is not None:
            return False
        lists = self._gradients()
        queues: list[Any] = [backend.queue(each.held()) for each in lists]
        amp = [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]
        if None in queues:
            return False
        devices = [queue.memory.device for queue in queues]
        devices += [each.device for each in amp if each is not None]
        if len(set(devices)) > 1:
            return False
        if self._there is not None and self._there.words.device != devices[0]:
            self._come_here()
        if self._there is None:
            self._there = _There(queues[0].memory, len(lists))
        # A fused optimizer that divides by the scale divides by the factor at no cost. Without a
        # scale it would write each gradient back for it, clipped or not.
        folds = amp[0] is not None and len(lists) == 1 and not lists[0].repeated
        with ieee_arithmetic():
            for place, (each, queue, limit) in enumerate(
                zip(lists, queues, self._limits, strict=True)
            ):
                into = self._there.into(place, queue.wide, amp, folds=folds)
                policy = self._on_nonfinite
                _clip.queued_(backend, queue, each.tensors, each.path, limit, None, policy, **into)
        if folds:
            self._divide_by(self._there.divisor)
        return True

    def _come_here(self) -> None:
        """Have the books on the host, if the latest step was clipped elsewhere."""
        if self._there is not None:
            self._steps += int(self._there.words[0])
            self._clipped_steps += int(self._there.words[1])
            self._there = None

    def _find_places(self) -> None:
        """See which parameters the optimizer has, and have each watched once it is trained."""
        groups = [group["params"] for group in self._optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        known = [place.parameter for place in self._places]
        if len(parameters) != len(known) or not all(map(is_, parameters, known)):
            old = {id(place.parameter): place for place in self._places}
            self._places[:] = [
                (old.pop(id(parameter), None) or _Place(parameter)).moved_to(group, number)
                for group, members in enumerate(groups)
                for number, parameter in enumerate(members)
            ]
            for place in old.values():
                place.leave()
        for place in self._places:
            trained = place.waits and place.parameter.requires_grad
            if trained and not torch.nn.parameter.is_lazy(place.parameter):
                place.watch()

    def _gradients(self) -> list[_Gradients]:
        """The gradients there are, in lists of those that are clipped together."""
        lists = [_Gradients() for _ in self._limits]
        for place in self._places:
            gradient = place.parameter.grad
            if gradient is not None:
                lists[place.group if self._per_group else 0].add(place, gradient)
        return lists

    def _decided(
        self, gradients: _Gradients, norm: Scaled, limit: float, part: Joint | None
    ) -> Keep | Fill | Scale:
        return _clip.decided(
            backend,
            gradients.tensors,
            gradients.path,
            norm,
            limit,
            self._on_nonfinite,
            part=part,
        )

    def _carry_out(
        self, lists: list[_Gradients], actions: list[Keep | Fill | Scale], scale: float
    ) -> None:
        match actions:
            case [Scale(factor)] if not lists[0].repeated and self._fold(scale, factor):
                return
        todo = [
            (each.held(), action)
            for each, action in zip(lists, actions, strict=True)
            if not isinstance(action, Keep)
        ]
        for held, action in todo:
            _clip.carry_out_(backend, held, action)

    def _fold(self, scale: float, factor: Scaled) -> bool:
        """Have the optimizer divide by ``scale / factor``; False if it is not one that does."""
        optimizer: Any = self._optimizer
        fused = all(group.get("fused") for group in optimizer.param_groups)
        if not fused or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return False
        divisor = scale / (float(factor) or math.ulp(0.0))
        if not divisor < torch.finfo(torch.float32).max:
            return False
        self._divide_by(_cpu_tensor(divisor, torch.float32))
        return True

    def _divide_by(self, divisor: Tensor) -> None:
        """Have a fused optimizer divide gradients by this in place of GradScaler's scale."""
        optimizer: Any = self._optimizer
        self._instead_of = vars(optimizer).get("grad_scale", _ABSENT)
        self._folded = optimizer.grad_scale = divisor

    def _after_step(self, *_: Any) -> None:
        if sys._getframe(1) is not self._step and _calls(self._step):
            return  # of the base class: the step goes on
        self._step = None
        self._unfold()
        for place in self._places:
            if place.watching is not None:
                place.watching.forget()

    def _unfold(self) -> None:
        optimizer: Any = self._optimizer
        if self._folded is not None and getattr(optimizer, "grad_scale", None) is self._folded:
            if self._instead_of is _ABSENT:
                del optimizer.grad_scale
            else:
                optimizer.grad_scale = self._instead_of
        self._folded = None


_ABSENT = object()


def _cpu_tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def _calls(step: FrameType | None) -> bool:
    """If a step is under way that has led to where we are: it is not one that has failed."""
    frame = sys._getframe(1) if step is not None else None
    while frame is not None and frame is not step:
        frame = frame.f_back
    return frame is not None


def _leave(places: list[_Place]) -> None:
    for place in places:
        place.leave()
    places.clear()


class _Place:
    """A parameter, its place in the optimizer, and the watch on its gradient."""

    __slots__ = ("_handle", "group", "number", "parameter", "waits", "watching")

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        self.waits = True  # to be watched: it may be frozen, or have no shape yet
        self.watching: Any = None
        self._handle: Any = None

    def moved_to(self, group: int, number: int) -> _Place:
        """The place, at its place among the parameter groups."""
        self.group, self.number = group, number
        return self

    def watch(self) -> None:
        """Have the gradient measured when it is written, if that is worth it."""
        self.waits = False
        self.watching, self._handle = backend.watch(self.parameter) or (None, None)

    def leave(self) -> None:
        """Watch no more."""
        if self._handle is not None:
            self._handle.remove()


class _There:
    """What a clipper knows of its steps, where it is a device that knows it."""

    def __init__(self, memory: Any, lists: int) -> None:
        self._memory = memory
        self.words: Tensor = memory.zeros(4)
        self.factors: list[Tensor] = list(memory.zeros(lists).view(torch.float64).fill_(1.0))
        self.norms: list[Tensor] = [memory.scalar(wide=False).zero_() for _ in range(lists)]

    @property
    def divisor(self) -> Tensor:
        """What a fused optimizer divides by."""
        return self.words.view(torch.float32)[6]

    def into(
        self, place: int, wide: bool, amp: Sequence[Tensor | None], *, folds: bool
    ) -> dict[str, Any]:
        """Where the norm of one list, and all that comes with it, are to be written."""
        if wide != (self.norms[place].dtype is torch.float64):
            self.norms[place] = self._memory.scalar(wide=wide).zero_()
        from gradclip._device import Ledger  # of which nobody has need without a device

        scale, found_inf = (0 if each is None else each.data_ptr() for each in amp)
        ledger = Ledger(
            words=self.words.data_ptr(),
            factor=self.factors[place].data_ptr(),
            begins=int(place == 0),
            folds=int(folds),
            scale=scale,
            found_inf=found_inf,
        )
        return {"norm": self.norms[place], "ledger": ledger}

    def told(self, scalars: Sequence[Tensor], *, per_group: bool) -> Tensor:
        """A copy that later steps leave alone."""
        wide = any(each.dtype is torch.float64 for each in scalars)
        every = [each.double() if wide else each for each in scalars]
        return torch.stack(every) if per_group else every[0].clone()


class _Gradients:
    """Gradients that are clipped together, and what is known of their sum of squares."""

    def __init__(self) -> None:
        self._places: list[_Place] = []
        self.tensors: list[Tensor] = []
        self.parts: list[Part] = []
        self.cold: list[Tensor] = []
        self.wide = self.repeated = False
        self._keys: set[int] = set()

    def add(self, place: _Place, gradient: Tensor) -> None:
        """One more."""
        self._places.append(place)
        self.tensors.append(gradient)
        dense = type(gradient) is Tensor and gradient.layout is torch.strided
        key = (dense and gradient.data_ptr()) or id(gradient)
        self.repeated = self.repeated or key in self._keys
        self._keys.add(key)
        warm = None if place.watching is None else place.watching.sums(gradient)
        if warm is not None:
            self.parts += warm
            return
        self.cold.append(gradient)
        self.wide = self.wide or gradient.dtype in backend.WIDE

    def held(self) -> Any:
        """Their memory."""
        return backend.hold(self.tensors, self.path, writable=True)

    def path(self, number: int) -> str:
        """What an error calls one of them."""
        place = self._places[number]
        return f"param_groups[{place.group}]['params'][{place.number}].grad"


def _norm(gradients: _Gradients, part: Joint | None) -> _clip.Measured:
    """The global norm: by what was measured while it was warm, if that is all there is to it."""
    alone = part is None and not _is_distributed()
    if alone and not gradients.wide and not gradients.repeated:
        more = backend.sums(gradients.cold)
        norm = None if more is None else certified_norm([*gradients.parts, *more])
        if norm is not None:
            return _clip.Measured(norm)
    return _clip.measured(backend, gradients.held(), part)


def _unscaled(norm: Scaled, scale: float, wide: bool) -> Scaled:
    """The norm of gradients that GradScaler has multiplied by ``scale``."""
    if scale == 1 or not math.isfinite(norm.significand):
        return norm
    by = Scaled.of(scale)
    quotient = norm.significand / by.significand
    significand, exponent = math.frexp(quotient if wide else float(np.float32(quotient)))
    return Scaled(significand, exponent + norm.exponent - by.exponent)


def _factor(action: Keep | Fill | Scale) -> float:
    match action:
        case Scale(factor):
            return float(factor)
        case Fill(value):
            return value
    return 1.0


def _is_distributed() -> bool:
    """If other processes' gradients may be reduced into these, which no version counter shows."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized()


def _number_of_limits(limits: Sequence[float], optimizer: torch.optim.Optimizer) -> str:
    groups = len(optimizer.param_groups)
    return f"max_norm has {len(limits)} limits, and the optimizer {groups} parameter groups"
