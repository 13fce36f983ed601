"""Clipping inside of an optimizer's step: measured while gradients are warm, folded into the step.

A large gradient is measured in the hook that runs when autograd has just written it, so much of it
is read from the processor's caches. The step adds the parts up. Fused optimizers divide gradients
by a number that they are given, so clipping takes no pass of its own.

The file is long since all that users see of a clipper is one class, and its docstrings say it.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradclip.core.decide import OnNonfiniteStep, check_on_nonfinite
from gradclip.core.norms import Norms
from gradclip.core.opening import Opening, taking_part
from gradclip.core.reading import Reading
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic
from gradclip.torch import books, hooks
from gradclip.torch.backend import workers as workers_among
from gradclip.torch.following import looked_away_from
from gradclip.torch.frames import is_under_way, is_within_another
from gradclip.torch.limits import Limit, Limits
from gradclip.torch.places import Places
from gradclip.torch.step import (
    HOOKS,
    KEY,
    Outcome,
    Step,
    StepSkippedError,
    check_arguments,
    check_unrecorded,
)


class Clipper(hooks.Hooked):
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

    A copy of the optimizer, by ``copy.deepcopy``, ``pickle`` or ``torch.save``, has a clipper of
    its own, with the same limit and counts: `clipper_of` finds it. The optimizer's ``state_dict``
    stays as it is, and the clipper has one too.

    Args:
        optimizer: any optimizer, or one that accelerate has prepared, whose step is given no
            closure.
        max_norm: a number above 0 (``inf`` only measures); a schedule, which is called with how
            many steps were begun before, 0 in the first (one that a fused optimizer skips for
            GradScaler is begun, too); a limit of `gradclip.limits`, which learns from the norms
            of the steps that are taken; or a list of these, one for each parameter group: then
            each group is clipped by a norm of its own, and learns by an object of its own.
        on_nonfinite: what becomes of the gradients where an element is NaN or inf, as in
            `gradclip.clip_by_global_norm`; or ``"skip"``: the step is not taken, and neither
            weights nor anything that the optimizer keeps change (``optimizer.step`` is replaced by
            one that may end so). ``"zero"`` takes it: momentum, the averages of Adam and weight
            decay still move the weights.
        group: as in `gradclip.torch.clip_grad_norm_`; every worker attaches, and steps. With it,
            what GradScaler finds to be inf has to be made known to all before, or they do not step
            alike.
        per_tensor: if ``norms`` is to tell that of each gradient, too, found in the same pass.

    On a GPU gradients are clipped before the step, by two launches for which the host does not
    wait, or three with `gradclip.limits.PerTensor`; a fused optimizer divides by the factor only
    where it divides by GradScaler's scale. It also skips by itself, if it has one limit; for others
    that are to skip, the host waits.

    ``norm``, ``limit``, ``factor``, ``steps``, ``clipped_steps`` and ``skipped_steps`` tell of it,
    in tensors; the first three of one element for each group if ``max_norm`` has. A step is counted
    when it has been taken, and as clipped if its norm was not at most the limit: above it, as inf
    is above every finite limit, or NaN.

    Raises:
        TypeError: what is given is no optimizer, or one whose step runs no hooks or needs a
            closure; a limit is no number; a copy is made that would not be clipped.
        ValueError: a limit is out of range, there are not as many as groups, or the optimizer has
            a clipper already.
        RuntimeError: from a step that is given a closure or gradients, or is to be differentiated;
            another worker has failed.
        FloatingPointError: from a step, with ``on_nonfinite="raise"``; nothing has been written.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> optimizer = torch.optim.SGD([weight], lr=1.0)
    >>> clipper = Clipper(optimizer, max_norm=2.5)
    >>> (weight @ torch.tensor([3.0, 4.0])).backward()
    >>> optimizer.step()
    >>> print(clipper.norm, weight.data)
    tensor(5.) tensor([-1.5000, -2.0000])
    """

    __slots__ = (
        "__weakref__",
        "_args",
        "_books",
        "_finalizer",
        "_group",
        "_limits",
        "_on_nonfinite",
        "_outcome",
        "_per_tensor",
        "_places",
        "_thread",
    )

    # Of the step that is under way, or has failed: on which thread, what it was given in place of
    # its arguments, and what is to become of it.
    _thread: int
    _args: tuple[Any, ...] | None
    _outcome: Outcome

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        max_norm: Limit | Sequence[Limit],
        *,
        on_nonfinite: OnNonfiniteStep = "nan",
        group: Any = None,
        per_tensor: bool = False,
    ) -> None:
        workers = None if group is None else workers_among([], group)
        with taking_part(workers) as part:
            check_on_nonfinite(on_nonfinite, steps=True)
            self._optimizer = hooks.that_steps(optimizer)
            self._limits = Limits.of(max_norm)
            self._limits.check_number(self._optimizer)
            if clipper_of(self._optimizer) is not None:
                raise ValueError(
                    "the optimizer has a clipper already, as a copy of an attached one has; "
                    "gradclip.torch.clipper_of(optimizer).remove() takes it off"
                )
            if part is not None:
                part.asked(limits=len(self._limits.every), on_nonfinite=on_nonfinite)
                part.meet()
        self._on_nonfinite: OnNonfiniteStep = on_nonfinite
        self._group = group
        self._per_tensor = per_tensor
        self._claim(self._limits)
        self._begin(books.Known.nothing(len(self._limits.every)))
        self._hook_on(skips=self._may_skip)
        try:
            self._places.find(self._optimizer)
        except BaseException:
            self.remove()
            raise

    def _claim(self, limits: Limits) -> None:
        """Have limits that learn learn from this optimizer alone.

        Raises:
            ValueError: one does from another, which is still clipped; none is claimed then.
        """
        memories = [limit._memory for limit in limits.learning]
        for limit, memory in zip(limits.learning, memories, strict=True):
            user = memory.user and memory.user()
            if user not in (None, self) and clipper_of(user._optimizer) is user:
                raise ValueError(
                    f"max_norm has {limit!r}, which learns from the gradients of another optimizer "
                    "already; each learns by an object of its own"
                )
        for memory in memories:
            memory.user = weakref.ref(self)

    def _begin(self, known: books.Known) -> None:
        """Begin with no step, no place, and books that the host keeps."""
        self._books: books.Books = books.Here(known)
        self._places = Places()
        self._end_step()
        # The watches go with the optimizer, though parameters may outlive it.
        self._finalizer = weakref.finalize(self._optimizer, self._places.leave)

    def remove(self) -> None:
        """Clip no more; what was counted stays."""
        if clipper_of(self._optimizer) is self:
            self._hook_off()
        self._finalizer()

    # ---- what it tells, and is told ----

    # To type checkers each is first what it is with one limit that is a number. What else it may be
    # is Any: whoever has such a limit knows it, and nobody else has to rule it out.

    def __repr__(self) -> str:
        names = ("norm", "factor", "steps", "clipped_steps", "skipped_steps")
        told = [f"{name}={getattr(self, name).tolist()}" for name in names]
        return f"Clipper(max_norm={self.max_norm}, {', '.join(told)})"

    @property
    def max_norm(self) -> float | Any:
        """The limit, or the schedule; a tuple if each parameter group has one. May be set.

        Raises:
            TypeError, ValueError: it is set to what is none, or to another number of them.
        """
        return self._limits.given

    @max_norm.setter
    def max_norm(self, max_norm: Limit | Sequence[Limit]) -> None:
        new = self._limits.replaced_by(max_norm)
        if new.may_skip and not self._may_skip:
            raise ValueError(
                f"max_norm is {max_norm!r}, which may skip steps; this clipper was attached "
                "without a way to: attach another"
            )
        self._claim(new)
        self._limits = new

    @property
    def _may_skip(self) -> bool:
        return self._on_nonfinite == "skip" or self._limits.may_skip

    @property
    def norm(self) -> Tensor:
        """The global norm of the latest step, as it was before clipping."""
        return self._books.norm(per_group=self._limits.per_group)

    @property
    def norms(self) -> Norms[Tensor, Tensor] | Any:
        """A `gradclip.Norms` of each gradient in the latest step, and the global one.

        As they were before clipping, by the parameters' names where the optimizer has them. A tuple
        of them if each parameter group has a limit; None before the first step.

        Raises:
            AttributeError: the clipper was attached without ``per_tensor=True``.
        """
        if not self._per_tensor:
            raise AttributeError(
                "norms are told by a clipper that was attached with per_tensor=True"
            )
        found = self._books.each()
        if self._limits.per_group:
            return tuple(found) or None
        return found[0] if found else None

    @property
    def limit(self) -> Tensor | Any:
        """The limit that was in force in the latest step, float64; NaN before the first.

        With `gradclip.limits.PerTensor` that of each gradient there was, in the optimizer's order;
        where several groups have limits and one of them is such, a tuple.
        """
        return self._books.limit(per_group=self._limits.per_group)

    @property
    def factor(self) -> Tensor:
        """What gradients were multiplied by in the latest step, float64; of several the least."""
        return self._books.factor(per_group=self._limits.per_group)

    @property
    def steps(self) -> Tensor:
        """How many steps were taken, int64."""
        return self._settled().count("steps")

    @property
    def clipped_steps(self) -> Tensor:
        """In how many of them a norm was above its limit, or NaN; int64."""
        return self._settled().count("clipped_steps")

    @property
    def skipped_steps(self) -> Tensor:
        """How many were not taken, with ``on_nonfinite="skip"``, int64."""
        return self._settled().count("skipped_steps")

    def _reading(self) -> Reading:
        """What `gradclip.Record` writes of the latest step."""
        return self._settled().reading()

    def state_dict(self) -> dict[str, Any]:
        """The counts, and under ``"limits"`` what limits have learnt, to be saved.

        Beside the optimizer's; a number or a schedule is for `attach` to say.
        """
        counts: dict[str, Any] = dict(self._settled().state())
        learnt = [limit.state_dict() for limit in self._limits.learning]
        return {**counts, "limits": learnt} if learnt else counts

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`; a schedule goes on, too.

        Where the state has no ``"limits"``, those that learn begin anew.

        Raises:
            ValueError: it is none, or of other limits.
        """
        counts = {name: x for name, x in dict(state).items() if name != "limits"}
        known = [x for x in counts.values() if type(x) is int and x >= 0]
        if set(counts) != set(books.COUNTS) or len(known) != len(books.COUNTS):
            raise ValueError(f"the state is {state!r}; it must be of Clipper.state_dict()")
        learning, learnt = self._limits.learning, state.get("limits", [])
        if learnt and len(learnt) != len(learning):
            raise ValueError(
                f"the state has {len(learnt)} limits that have learnt; this clipper has "
                f"{len(learning)}"
            )
        tried = copy.deepcopy(learning)  # so that an error leaves all as they were
        for limits in (tried, learning):
            for limit, each in zip(
                limits, learnt or [limit.blank() for limit in limits], strict=True
            ):
                limit.load_state_dict(each)
        self._books = books.on_host(self._settled())
        self._books.counts.update(counts)

    # ---- copies ----

    def _state(self) -> dict[str, Any]:
        """What a copy of the clipper begins with."""
        kept = {name: getattr(self, name) for name in _KEPT}
        attached = clipper_of(self._optimizer) is self
        return {**kept, "known": self._settled().known(), "attached": attached}

    def __getstate__(self) -> dict[str, Any]:
        if self._group is not None:
            raise TypeError(f"a clipper over a group cannot be pickled: {hooks.AGAIN}")
        if any("<" in getattr(limit, "__qualname__", "") for limit in self._limits.every):
            raise TypeError(
                f"the schedule of a clipper is a function within another, or a lambda, and cannot "
                f"be pickled: {hooks.AGAIN}"
            )
        return self._state()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            setattr(self, name, state[name])
        self._claim(self._limits)
        self._begin(state["known"])
        if state["attached"]:
            self._hook_on(skips=self._may_skip)
        else:
            self._finalizer()

    def __copy__(self) -> Clipper:
        raise TypeError("a clipper is copied with its optimizer, by copy.deepcopy")

    def __deepcopy__(self, memo: dict[int, Any]) -> Clipper:
        new: Clipper = object.__new__(type(self))
        memo[id(self)] = new
        memo[id(self._group)] = self._group  # the workers are the same
        new.__setstate__(copy.deepcopy(self._state(), memo))
        return new

    # ---- the step ----

    # What torch.compile would make of these depended on every number that they see.

    @looked_away_from
    def _before_step(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._finalizer.alive or is_within_another(optimizer):
            return None  # removed; or a step that calls its base class's: it has been clipped
        self._take_back()
        self._thread = threading.get_ident()
        follows = torch.is_grad_enabled()
        with torch.no_grad(), ieee_arithmetic():
            try:
                self._outcome = self._clipped(optimizer, args, kwargs, follows)
            except StepSkippedError:
                self._places.forget()
                raise
        stand_in = self._outcome.stand_in
        self._args = (optimizer if stand_in is None else stand_in.optimizer, *args[1:])
        return self._args, kwargs

    @looked_away_from
    def _after_step(self, optimizer: Any, args: tuple[Any, ...], *_: Any) -> None:
        if self._args is None or (args is not self._args and is_within_another(optimizer)):
            return  # removed; or of the base class: the step goes on
        outcome = self._outcome
        self._end_step()
        self._books.note(outcome)
        for lesson in outcome.lessons:
            lesson.learn()
        if outcome.stand_in is not None:
            outcome.stand_in.leave(optimizer)
        self._places.forget()
        getattr(optimizer, HOOKS).move_to_end(KEY)  # those that came after it come before it now

    def _settled(self) -> books.Books:
        """The books, once it is seen if a step has failed: it does not count."""
        here = sys._getframe()
        if self._thread == threading.get_ident() and not is_under_way(self._optimizer, here):
            self._take_back()
        return self._books

    def _take_back(self) -> None:
        self._books.take_back()
        self._end_step()

    def _end_step(self) -> None:
        """Note that no step is under way."""
        self._thread, self._args, self._outcome = 0, None, Outcome()

    def _clipped(
        self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], follows: bool
    ) -> Outcome:
        """Clip, and say what is to become of the step.

        Raises:
            StepSkippedError: nothing is.
        """
        with Opening(self._group) as opening:
            everyone = opening.seen = self._places.find(optimizer)
            workers = opening.workers = workers_among(everyone, self._group)
        # The same for all lists, so that an error in one is told to whoever waits.
        with taking_part(workers) as part:
            check_arguments(args, kwargs)
            self._limits.check_number(optimizer)
            lists = self._places.gradients(self._limits)
            if follows:
                check_unrecorded(optimizer, lists)
            step = Step(
                optimizer,
                lists,
                self._limits,
                self._on_nonfinite,
                begun=self._books.counts["begun"],
                part=part,
                device=everyone[0].device if everyone else None,
                wants_each=self._per_tensor,
            )
            self._books = books.kept_for(step, self._books)
            return self._books.clip(step)


_KEPT = ("_optimizer", "_limits", "_on_nonfinite", "_group", "_per_tensor")


def clipper_of(optimizer: torch.optim.Optimizer) -> Clipper | None:
    """The clipper that is attached to an optimizer; None if none is.

    A copy of an attached optimizer has a clipper of its own, which this finds.
    """
    hook = getattr(optimizer, HOOKS, {}).get(KEY)
    return None if hook is None else hook.__self__
