"""The one flow: flatten, measure, decide, scale, rebuild."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from gradclip.core.decide import (
    Action,
    Fill,
    Keep,
    OnNonfinite,
    Raise,
    Scale,
    check_clip_norm,
    check_on_nonfinite,
    check_use_norm,
    decide,
)
from gradclip.core.dispatch import (
    backend_of,
    backend_of_group,
    backends_of,
    is_compiled,
    is_defined_by_framework,
)
from gradclip.core.exact import FLOAT32, FLOAT64, Scaled, Total, counts, merge, norm, square
from gradclip.core.protocol import Backend, Plain, Queue
from gradclip.core.tree import Tree, flatten
from gradclip.core.workers import Joint, Workers
from gradclip.kernels.cpu import ieee_arithmetic


def clip_by_global_norm(
    t_list: Any,
    clip_norm: Any,
    use_norm: Any = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[Any, Any]:
    """Scale arrays down together so that their global norm is at most ``clip_norm``.

    Takes arrays of NumPy, SciPy, CuPy and JAX, and tensors of TensorFlow and PyTorch; frameworks
    that differentiate do so through it, and those that compile take it whole.

    ::

        global_norm = sqrt(sum of |x|^2 over every element x of every leaf)
        t_clipped   = t                              if global_norm <= clip_norm
        t_clipped   = t * (clip_norm / global_norm)  otherwise

    The norm is the real-number sum rounded once, so it does not depend on the order of leaves,
    threads or kernels. With nothing to clip each output is bit for bit its input.

    Args:
        t_list: arrays in a list, tuple, dict or any nest of them; None keeps its place; an
            iterator is read once. float16, bfloat16, float8, float32, float64, complex64 and
            complex128, of any shape and layout, dense or sparse. Never modified.
        clip_norm: a real scalar above 0; ``inf`` clips nothing. Where it is traced it cannot be
            checked: NaN gives NaN, below 0 acts as 0.
        use_norm: the norm to scale by, if it is known already. The leaves are not read for it;
            workers still meet, so that an error on one is an error on all.
        name: names the operations where a framework has named ones; else without effect.
        on_nonfinite: what to make of a norm that is NaN or inf because an element is:
            ``"nan"`` every element NaN, ``"zero"`` every element 0, ``"keep"`` the inputs
            unchanged, ``"raise"`` FloatingPointError; in a graph or under jit, which cannot raise,
            ValueError.
        group: who else holds parts of the same gradient; the norm is that of all parts, on all
            workers the same. Every one has to call, with whatever leaves it has, also with none,
            and with the same limits and policy.
            For JAX the name of an axis of ``jax.shard_map``, ``pmap`` or ``vmap``, or a tuple of
            names. For PyTorch a ``ProcessGroup`` or ``DeviceMesh``; a DTensor needs none. For
            PyTorch, NumPy and CuPy a communicator of mpi4py.

    Returns:
        ``(list_clipped, global_norm)``: the same nest with new arrays of the same dtypes, shapes
        and layouts (those of TensorFlow and JAX, which cannot change, come back themselves where
        nothing is clipped); and a scalar, float64 if a leaf is float64 or complex128, else float32.

    Raises:
        TypeError: a leaf is not of a dtype or framework that is served, leaves are of two
            frameworks, or a limit is no real number.
        ValueError: a limit is out of range, a sparse leaf is malformed, or there are more elements
            than an int64 counts.
        FloatingPointError: with ``on_nonfinite="raise"``; on all workers of a group.
        RuntimeError: another worker has failed, or was given other arguments.

    Follows ``tf.clip_by_global_norm`` and Pascanu et al., 2012 (arXiv:1211.5063).

    >>> import numpy as np
    >>> clipped, norm = clip_by_global_norm([np.array([3.0]), np.array([4.0])], 2.5)
    >>> print(clipped, norm)
    [array([1.5]), array([2.])] 5.0
    """
    if is_compiled(t_list):
        from gradclip.torch import compiled

        return compiled.clip_by_global_norm(t_list, clip_norm, use_norm, on_nonfinite, group)
    return clipped(t_list, clip_norm, use_norm, name, on_nonfinite=on_nonfinite, group=group)


def clipped(
    t_list: Any,
    clip_norm: Any,
    use_norm: Any = None,
    name: Any = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
    called: str | Callable[[int], str] = "t_list",
) -> tuple[Any, Any]:
    """`clip_by_global_norm`, for doors that have a word of their own for what is clipped.

    ``called`` is as in `flatten`, and ``name`` whatever the recorder of the door's framework knows.
    """
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = _opened(t_list, group, opening, called)
            check_on_nonfinite(on_nonfinite)
            recorder = backend.recorder([*tree.leaves, clip_norm, use_norm], group)
        if recorder is None:
            with taking_part(opening.workers) as part:
                clip_norm, use_norm = limits_read(clip_norm, use_norm)
                held = backend.hold(tree.leaves, tree.path, writable=False)
                if part is None and backend.queue(held) is not None:
                    leaves = backend.copied(held)
                    held = backend.hold(leaves, tree.path, writable=True)
                    new = tree._replace(leaves=leaves)
                    norm = _queued_(new, backend, held, clip_norm, use_norm, on_nonfinite)
                else:
                    limit, given = _checked(clip_norm, use_norm)
                    leaves, norm, _ = _clipped(
                        tree, backend, held, limit, given, on_nonfinite, part
                    )
        else:
            plain = plain_of(tree, backend)
            leaves, norm = recorder.clip(tree, plain, clip_norm, use_norm, on_nonfinite, name)
        return tree.rebuild(leaves), norm


def clip_by_global_norm_(
    t_list: Any,
    clip_norm: Any,
    use_norm: Any = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> Any:
    """Scale arrays down together where they lie; see `clip_by_global_norm`.

    With nothing to clip no byte is written. An array that is listed twice, also in another shape
    or order of dimensions, counts once and is scaled once. Two that share only a part of their
    memory are refused; views of one array that lie apart, also alternately, are not.

    Args:
        t_list: as in `clip_by_global_norm`; every leaf must be writable.
        clip_norm: a real scalar above 0; ``inf`` clips nothing.
        use_norm: the norm to scale by, if it is known already.
        on_nonfinite: as in `clip_by_global_norm`.
        group: as in `clip_by_global_norm`.

    Returns:
        global_norm, as it was before clipping.

    Raises:
        TypeError, ValueError, FloatingPointError: as `clip_by_global_norm`, and ValueError for a
            leaf that is read-only or whose elements share memory, and for two that share a part
            of it. Nothing has been written then.

    >>> import numpy as np
    >>> gradient = np.array([3.0, 4.0])
    >>> print(clip_by_global_norm_([gradient], 2.5), gradient)
    5.0 [1.5 2. ]
    """
    if is_compiled(t_list):
        from gradclip.torch import compiled

        return compiled.clip_by_global_norm_(t_list, clip_norm, use_norm, on_nonfinite, group)
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = _opened(t_list, group, opening)
        with taking_part(opening.workers) as part:
            check_on_nonfinite(on_nonfinite)
            clip_norm, use_norm = limits_read(clip_norm, use_norm)
            held = backend.hold(tree.leaves, tree.path, writable=True)
            if part is None and backend.queue(held) is not None:
                return _queued_(tree, backend, held, clip_norm, use_norm, on_nonfinite)
            limit, given = _checked(clip_norm, use_norm)
            found, action = _decided(tree, backend, held, limit, given, on_nonfinite, part)
            carry_out_(backend, held, action)
            return backend.scalar(found.norm, held, wide=found.wide)


def global_norm(
    t_list: Any,
    name: str | None = None,
    *,
    group: Any = None,
) -> Any:
    """The square root of the sum of ``|x|^2`` over every element of every leaf.

    Correctly rounded: the real-number sum, rounded once, ties to even. NaN if any element is,
    else inf if any element is, or where the true norm does not fit the dtype.

    Args:
        t_list: as in `clip_by_global_norm`.
        name: names the operations where a framework has named ones; else without effect.
        group: as in `clip_by_global_norm`.

    Returns:
        A scalar: float64 if a leaf is float64 or complex128, else float32.

    Raises:
        TypeError: a leaf is not of a dtype or framework that is served.
        ValueError: a sparse leaf is malformed, or there are more elements than an int64 counts.

    Follows ``tf.linalg.global_norm``.

    >>> import numpy as np
    >>> print(global_norm({"w": np.float32([[3, 0], [0, 4]]), "b": None}))
    5.0
    """
    if is_compiled(t_list):
        from gradclip.torch import compiled

        return compiled.global_norm(t_list, group)
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = _opened(t_list, group, opening)
            recorder = backend.recorder(tree.leaves, group)
        if recorder is not None:
            return recorder.norm(tree, plain_of(tree, backend), name)
        with taking_part(opening.workers) as part:
            if part is not None:
                part.asked(clip_norm=None)
            held = backend.hold(tree.leaves, tree.path, writable=False)
            queue = backend.queue(held) if part is None else None
            if queue is not None:
                return queue.norm()
            found = measured(backend, held, part)
            return backend.scalar(found.norm, held, wide=found.wide)


for _function in (clip_by_global_norm, clipped, clip_by_global_norm_, global_norm):
    # Where a tf.function calls them, AutoGraph is not to rewrite them: they tell graphs themselves.
    vars(_function)["autograph_info__"] = {}


class Measured(NamedTuple):
    """A global norm."""

    norm: Scaled
    wide: bool = False  # if it is float64 because of a leaf that another worker has


def taking_part(workers: Workers | None) -> contextlib.AbstractContextManager[Joint | None]:
    """This worker's part in a measurement; none where it is alone."""
    return contextlib.nullcontext() if workers is None else Joint(workers)


class Opening:
    """The first look at what was passed, until it is known who the other workers are.

    Within ``with`` an error is told to them as soon as there is a way: to those of a group from the
    start; where none is named, to the `workers` once they are known, and before to those whom the
    leaves that have been `seen` leave no doubt about.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self.seen: list[Any] = []
        self.workers: Workers | None = None

    def __enter__(self) -> Opening:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        workers = self._reached() if isinstance(error, Exception) else None
        if workers is not None:
            Joint(workers).fail()

    def _reached(self) -> Workers | None:
        if self.workers is not None:
            return self.workers
        if self._group is not None:
            served = backend_of_group(self._group)
            return None if served is None else served.workers([], self._group)
        sure = (served.everyone(self.seen) for served in backends_of(self.seen))
        return next((workers for workers in sure if workers is not None), None)


def measured(backend: Backend, held: Any, part: Joint | None) -> Measured:
    """The global norm of leaves, and of those that other workers have.

    Raises:
        RuntimeError: another worker has failed.
    """
    if part is None:
        return Measured(backend.measure(held))
    total, wide = backend.share(held, part)
    return Measured(*part.norm(total, wide=wide))


def limits_read(clip_norm: Any, use_norm: Any, *names: str) -> tuple[Any, Any]:
    """The limits, those read whose reading may run anyone's code, as it may change the leaves.

    So it comes before their memory is held. Arrays of a framework have no such code, and the host
    need not wait for one that is on the leaves' device.
    """
    if not _is_inert(clip_norm):
        clip_norm = check_clip_norm(clip_norm, *names[:1])
    if not _is_inert(use_norm):
        use_norm = float(check_use_norm(use_norm, *names[1:]))
    return clip_norm, use_norm


def _is_inert(limit: Any) -> bool:
    kind = type(limit)
    return limit is None or kind is float or kind is int or is_defined_by_framework(kind)


def limits_there(queue: Queue, clip_norm: Any, use_norm: Any, *names: str) -> tuple[Any, Any]:
    """The limit, and the norm if it was given: floats, or what is on the device and not read."""
    limit = clip_norm if queue.knows(clip_norm) else check_clip_norm(clip_norm, *names[:1])
    if use_norm is None or queue.knows(use_norm):
        return limit, use_norm
    return limit, float(check_use_norm(use_norm, *names[1:]))


def queued_(
    backend: Backend,
    queue: Queue,
    leaves: Sequence[Any],
    path: Callable[[int], str],
    limit: Any,
    given: Any,
    policy: str,
    refuse: Callable[[], None] | None = None,
    **into: Any,
) -> Any:
    """Clip leaves where they lie in a device's memory; the norm, as a scalar there.

    The host waits for it only where it may have to ``refuse`` a norm that is NaN or inf.

    Raises:
        FloatingPointError: it is, and the policy is "raise"; the text names each leaf.
    """

    def check(norm: Any) -> None:
        was_given = given is not None
        value = float(given if was_given else norm)
        # A measured norm may also be inf since it is too large for float32.
        if math.isfinite(value) or not (was_given or any_nonfinite(backend, leaves)):
            return
        if refuse is not None:
            refuse()
        measured = Scaled.of(value)
        raise FloatingPointError(
            _offenders(backend, leaves, path, measured, given=was_given, part=None)
        )

    waits = refuse is not None or policy == "raise"
    norm = queue.clip_(limit, policy, given=given, check=check if waits else None, **into)
    backend.written(leaves)
    return norm


def _queued_(
    tree: Tree,
    backend: Backend,
    held: Any,
    clip_norm: Any,
    use_norm: Any,
    on_nonfinite: OnNonfinite,
) -> Any:
    """Clip what is held where it lies in a device's memory; errors show the tree's leaves."""
    queue = backend.queue(held)
    assert queue is not None, "leaves in a device's memory"
    limits = limits_there(queue, clip_norm, use_norm)
    return queued_(backend, queue, tree.leaves, tree.path, *limits, on_nonfinite)


def any_nonfinite(backend: Backend, leaves: Sequence[Any]) -> bool:
    """If an element is NaN or inf."""
    return any(any(backend.count_nonfinite(leaf)) for leaf in leaves)


class Survey(NamedTuple):
    """What one pass over some leaves finds; surveys of parts add up with `together`."""

    total: Total
    largest: float  # the largest finite |x|
    wide: bool  # if a leaf is float64 or complex128

    @property
    def norm(self) -> Scaled:
        """The global norm, correctly rounded."""
        return norm(self.total, FLOAT64 if self.wide else FLOAT32)

    @property
    def square(self) -> int:
        """The sum of squares of the finite elements, in units of 2^-2176."""
        return square(self.total)

    @property
    def nonfinite(self) -> tuple[int, int]:
        """How many NaN and how many inf; a complex element counts as two numbers."""
        infs, nans = counts(self.total)
        return nans, infs


def survey(t_list: Any) -> Survey:
    """Measure leaves in one pass."""
    with ieee_arithmetic():
        tree, backend = _opened(t_list)
        return Survey(*backend.total(backend.hold(tree.leaves, tree.path, writable=False)))


def together(surveys: Iterable[Survey]) -> Survey:
    """The survey of all leaves, from those of parts of them."""
    parts = list(surveys)
    return Survey(
        merge(part.total for part in parts),
        max((part.largest for part in parts), default=0.0),
        any(part.wide for part in parts),
    )


def act_(t_list: Any, action: Action) -> None:
    """Carry out what has been decided for the whole on some of its leaves, where they lie."""
    with ieee_arithmetic():
        tree, backend = _opened(t_list)
        carry_out_(backend, backend.hold(tree.leaves, tree.path, writable=True), action)


def carry_out_(backend: Backend, held: Any, action: Action) -> None:
    """Do to leaves, where they lie, what has been decided."""
    match action:
        case Scale(factor):
            backend.scale_(held, factor)
        case Fill(value):
            backend.fill_(held, value)


def decided(
    backend: Backend,
    leaves: Sequence[Any],
    path: Callable[[int], str],
    norm: Scaled,
    limit: float,
    on_nonfinite: OnNonfinite,
    *,
    given: bool = False,
    part: Joint | None = None,
) -> Keep | Fill | Scale:
    """What is to be done to leaves of this norm.

    Raises:
        FloatingPointError: they are to be refused; the text names each that holds NaN or inf.
    """
    action = decide(norm, limit, on_nonfinite)
    if isinstance(action, Raise):
        raise FloatingPointError(_offenders(backend, leaves, path, norm, given=given, part=part))
    return action


def _opened(
    t_list: Any,
    group: Any = None,
    opening: Opening | None = None,
    called: str | Callable[[int], str] = "t_list",
) -> tuple[Tree, Backend]:
    """Take a nest apart, and find who serves its leaves; of no leaves, who serves the group."""
    tree = flatten(t_list, called, None if opening is None else opening.seen)
    if opening is not None:
        opening.seen = tree.leaves
    served = None if tree.leaves else backend_of_group(group)
    backend = served or backend_of(tree.leaves, tree.kinds, tree.path)
    if opening is not None:
        opening.workers = backend.workers(tree.leaves, group)
    return tree, backend


def _checked(clip_norm: Any, use_norm: Any) -> tuple[float, Scaled | None]:
    """The limit, and the norm if it was given."""
    return check_clip_norm(clip_norm), None if use_norm is None else check_use_norm(use_norm)


def _decided(
    tree: Tree,
    backend: Backend,
    held: Any,
    limit: float,
    given: Scaled | None,
    on_nonfinite: OnNonfinite,
    part: Joint | None,
) -> tuple[Measured, Keep | Fill | Scale]:
    """The norm, and what is to be done: everything up to the first write."""
    if part is not None:
        known = None if given is None else float(given)
        part.asked(clip_norm=limit, use_norm=known, on_nonfinite=on_nonfinite)
    if given is None:
        found = measured(backend, held, part)
    else:
        found = Measured(given)
        if part is not None:
            backend.check_there(held)
            part.meet()  # for an error of another, and for one that has not been given it
    return found, decided(
        backend,
        tree.leaves,
        tree.path,
        found.norm,
        limit,
        on_nonfinite,
        given=given is not None,
        part=part,
    )


def _clipped(
    tree: Tree,
    backend: Backend,
    held: Any,
    limit: float,
    given: Scaled | None,
    on_nonfinite: OnNonfinite,
    part: Joint | None,
) -> tuple[list[Any], Any, Scaled]:
    """New leaves, and the norm: as a scalar of their framework, and without a limit."""
    found, action = _decided(tree, backend, held, limit, given, on_nonfinite, part)
    match action:
        case Scale(factor):
            leaves = backend.scaled(held, factor)
        case Fill(value):
            leaves = backend.filled(held, value)
        case Keep():
            leaves = backend.copied(held)
    return leaves, backend.scalar(found.norm, held, wide=found.wide), found.norm


def plain_of(tree: Tree, backend: Backend) -> Plain:
    """Clipping as it is done where nothing records it, for a recorder to call."""

    def clip(
        leaves: list[Any], limit: float, use_norm: float | None, on_nonfinite: OnNonfinite
    ) -> tuple[list[Any], Any, float]:
        with ieee_arithmetic():
            given = None if use_norm is None else Scaled.of(use_norm)
            held = backend.hold(leaves, tree.path, writable=False)
            clipped, norm, measured = _clipped(
                tree._replace(leaves=leaves), backend, held, limit, given, on_nonfinite, None
            )
            return clipped, norm, float(measured)

    return clip


def _offenders(
    backend: Backend,
    leaves: Sequence[Any],
    path: Callable[[int], str],
    norm: Scaled,
    *,
    given: bool,
    part: Joint | None,
) -> str:
    """Each leaf that holds NaN or inf, with its counts; of workers, those of this one."""
    found = []
    for place, leaf in enumerate(leaves):
        nans, infs = backend.count_nonfinite(leaf)
        if nans or infs:
            found.append(f"{path(place)} holds {nans} NaN and {infs} inf")
    if not found and given:
        found.append("given as use_norm, every leaf is finite")
    elif not found and part is not None:
        found.append("every leaf is finite; those of another are not")
    elif not found:
        found.append("rows with the same index add up to more than float64 holds")
    on = "" if part is None else f"on rank {part.workers.rank} of {part.workers.size} "
    return f"the global norm is {float(norm)}: {on}" + "; ".join(found)
