"""The one flow: open the nest, hold the leaves, have them clipped, rebuild.

The file is long for the docstrings and overloads of the public functions, which users see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from gradclip import _compiler
from gradclip.core.decide import (
    Action,
    OnNonfinite,
    check_clip_norm,
    check_on_nonfinite,
    check_use_norm,
)
from gradclip.core.dispatch import is_inert, may_be_followed
from gradclip.core.exact import FLOAT32, FLOAT64, Scaled, Total, counts, merge, norm, square
from gradclip.core.held import Clip, Held
from gradclip.core.limits import Limit
from gradclip.core.memory import Lesson
from gradclip.core.norms import Norms
from gradclip.core.opening import Opening, taking_part
from gradclip.core.protocol import Backend, Beside
from gradclip.core.tree import Tree
from gradclip.kernels.cpu import kinds
from gradclip.kernels.cpu.arithmetic import ieee_arithmetic

if TYPE_CHECKING:
    import jax
    import numpy.typing as npt
    import tensorflow as tf
    import torch

    from gradclip import _types
    from gradclip._types import ClipNorm, NumPyNorm, Scalar


@overload
def clip_by_global_norm(
    t_list: _types.Untold,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.Untold, Any]: ...
@overload
def clip_by_global_norm(
    t_list: _types.NumPyNest,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.NumPyNest, NumPyNorm]: ...
@overload
def clip_by_global_norm(
    t_list: _types.TorchNest,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.TorchNest, torch.Tensor]: ...
@overload
def clip_by_global_norm(
    t_list: _types.JaxNest,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.JaxNest, jax.Array]: ...
@overload
def clip_by_global_norm(
    t_list: _types.TensorFlowNest,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.TensorFlowNest, tf.Tensor]: ...
@overload
def clip_by_global_norm(
    t_list: _types.Read[_types.Leaf],
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[list[_types.Leaf], Any]: ...
@overload
def clip_by_global_norm(
    t_list: _types.AnyNest,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    name: str | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tuple[_types.AnyNest, Any]: ...
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
            checked: NaN gives NaN, below 0 acts as 0. Or a limit that sets itself, of
            `gradclip.limits`, which learns from each norm; where it would have a step skipped, all
            elements become 0.
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
        compiled: tuple[Any, Any] = _compiler.compiled.clip_by_global_norm(
            t_list, clip_norm, use_norm, on_nonfinite, group
        )
        return compiled
    return clipped(t_list, clip_norm, use_norm, name, on_nonfinite=on_nonfinite, group=group)[:2]


def clipped(
    t_list: Any,
    clip_norm: Any,
    use_norm: Any = None,
    name: Any = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
    called: str | Callable[[int], str] = "t_list",
    wants_each: bool = False,
) -> tuple[Any, Any, Any]:
    """`clip_by_global_norm`, for doors that have a word of their own for what is clipped.

    ``called`` is as in `flatten`, and ``name`` whatever the room of the door's framework knows.
    Third comes the norm of each leaf from the same pass, a vector as `Norms` has it, if it
    ``wants_each``; else None.

    Raises:
        NotImplementedError: leaves are of a kind whose norms are not told apart.
    """
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = opening.opened(t_list, called, kinds_of=kinds)
        with taking_part(opening.workers) as part:
            check_policy(on_nonfinite)
            clip_norm = lesson_of(clip_norm, tree.places)
            held, limits = _held_to_be_read(tree, backend, clip_norm, use_norm, group)
            clip = Clip(
                tree.leaves,
                tree.path,
                *limits,
                on_nonfinite,
                part=part,
                places=tree.places,
                name=name,
                wants_each=wants_each,
            )
            leaves, norm = held.clipped(clip)
            if wants_each and clip.each is None:
                raise NotImplementedError(
                    f"each one's norm beside a clip is not there for what {type(held)} holds"
                )
        learn(clip_norm)
        return tree.rebuild(leaves), norm, clip.each


@overload
def clip_by_global_norm_(
    t_list: _types.UntoldLeaves,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> Any: ...
@overload
def clip_by_global_norm_(
    t_list: _types.NumPyLeaves,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> NumPyNorm: ...
@overload
def clip_by_global_norm_(
    t_list: _types.TorchLeaves,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> torch.Tensor: ...
@overload
def clip_by_global_norm_(
    t_list: _types.TensorFlowLeaves,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> tf.Tensor: ...
@overload
def clip_by_global_norm_(
    t_list: Any,
    clip_norm: ClipNorm,
    use_norm: Scalar | None = None,
    *,
    on_nonfinite: OnNonfinite = "nan",
    group: Any = None,
) -> Any: ...
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
        clip_norm: a real scalar above 0; ``inf`` clips nothing; or a limit of `gradclip.limits`.
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
        return _compiler.compiled.clip_by_global_norm_(
            t_list, clip_norm, use_norm, on_nonfinite, group
        )
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = opening.opened(t_list, kinds_of=kinds)
        with taking_part(opening.workers) as part:
            check_policy(on_nonfinite)
            clip_norm = lesson_of(clip_norm, tree.places)
            limits = limits_read(clip_norm, use_norm)
            held = backend.hold(tree.leaves, tree.path, writable=True)
            norm = held.clip_(Clip(tree.leaves, tree.path, *limits, on_nonfinite, part=part))
        learn(clip_norm)
        return norm


@overload
def global_norm(
    t_list: _types.UntoldLeaves, name: str | None = None, *, group: Any = None
) -> Any: ...
@overload
def global_norm(
    t_list: _types.NumPyLeaves, name: str | None = None, *, group: Any = None
) -> NumPyNorm: ...
@overload
def global_norm(
    t_list: _types.TorchLeaves, name: str | None = None, *, group: Any = None
) -> torch.Tensor: ...
@overload
def global_norm(
    t_list: _types.JaxLeaves, name: str | None = None, *, group: Any = None
) -> jax.Array: ...
@overload
def global_norm(
    t_list: _types.TensorFlowLeaves, name: str | None = None, *, group: Any = None
) -> tf.Tensor: ...
@overload
def global_norm(t_list: Any, name: str | None = None, *, group: Any = None) -> Any: ...
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
        A scalar, float64 if a leaf is float64 or complex128, else float32.

    Raises:
        TypeError: a leaf is not of a dtype or framework that is served.
        ValueError: a sparse leaf is malformed, or there are more elements than an int64 counts.

    Follows ``tf.linalg.global_norm``.

    >>> import numpy as np
    >>> print(global_norm({"w": np.float32([[3, 0], [0, 4]]), "b": None}))
    5.0
    """
    if is_compiled(t_list):
        return _compiler.compiled.global_norm(t_list, group)
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = opening.opened(t_list, kinds_of=kinds)
        with taking_part(opening.workers) as part:
            if part is not None:
                part.asked(clip_norm=None)
            beside = Beside(group=group)
            held = backend.hold(tree.leaves, tree.path, writable=False, beside=beside)
            clip = Clip(tree.leaves, tree.path, part=part, places=tree.places, name=name)
            return held.norm(clip)


@overload
def norms(t_list: _types.UntoldLeaves, *, group: Any = None) -> Norms: ...
@overload
def norms(
    t_list: _types.NumPyLeaves, *, group: Any = None
) -> Norms[npt.NDArray[NumPyNorm], NumPyNorm]: ...
@overload
def norms(
    t_list: _types.TorchLeaves, *, group: Any = None
) -> Norms[torch.Tensor, torch.Tensor]: ...
@overload
def norms(t_list: _types.JaxLeaves, *, group: Any = None) -> Norms[jax.Array, jax.Array]: ...
@overload
def norms(t_list: _types.TensorFlowLeaves, *, group: Any = None) -> Norms[tf.Tensor, tf.Tensor]: ...
@overload
def norms(t_list: Any, *, group: Any = None) -> Norms: ...
def norms(t_list: Any, *, group: Any = None) -> Norms:
    """The norm of each leaf, and the global norm, from one pass over the leaves.

    Args:
        t_list: as in `clip_by_global_norm`. Names in a dict, or attributes, become the leaves'
            `Norms.paths`: ``{name: p.grad for name, p in model.named_parameters()}``.
        group: as in `clip_by_global_norm`. The global norm is that of the parts of all workers. A
            leaf's own is that of what this worker passes, of a DTensor that of the whole, and under
            a JAX axis that of its parts along the axis.

    Returns:
        `Norms`: a vector and a scalar, where the leaves are; the host waits for no device. A leaf
        that is listed twice counts twice. Under ``jax.jit`` and in a ``tf.function`` it is of
        traced values, and both may return it. JAX differentiates it; PyTorch's autograd and
        TensorFlow's tapes see nothing of the vector.

    Raises:
        TypeError, ValueError: as `global_norm`.
        NotImplementedError: leaves are of a kind whose norms are not told apart: PyTorch's flat
            parameters (FSDP1), and what ``torch.func`` and fake tensors follow.

    >>> import numpy as np
    >>> found = norms([np.float32([3.0]), np.float32([[4.0]])])
    >>> print(found.values, found.global_norm)
    [3. 4.] 5.0
    """
    if is_compiled(t_list):
        found: Norms = _compiler.compiled.norms(t_list, group)
        return found
    with ieee_arithmetic():
        with Opening(group) as opening:
            tree, backend = opening.opened(t_list, kinds_of=kinds)
        with taking_part(opening.workers) as part:
            if part is not None:
                part.asked(clip_norm=None, norms=True)
            beside = Beside(group=group)
            held = backend.hold(tree.leaves, tree.path, writable=False, beside=beside)
            clip = Clip(tree.leaves, tree.path, part=part, places=tree.places, name="norms")
            return Norms(*held.norms(clip), tree.names)


for _function in (clip_by_global_norm, clipped, clip_by_global_norm_, global_norm, norms):
    # Where a tf.function calls them, AutoGraph is not to rewrite them: they tell graphs themselves.
    vars(_function)["autograph_info__"] = {}


def is_compiled(t_list: Any) -> bool:
    """If the compiler of PyTorch looks into a call, and no operation of ours has made it."""
    # While another thread imports PyTorch not all of it is there; its compiler comes last.
    if _compiler.dynamo is None or type(t_list) is Tree:
        return False
    import torch

    # Where it has broken a graph it looks into each function that is called next.
    looks = torch._C._dynamo.eval_frame.get_eval_frame_callback
    return torch.compiler.is_compiling() or looks() is not None


def check_policy(on_nonfinite: Any) -> None:
    """Hold ``on_nonfinite`` against the policies of what has no step to skip.

    Raises:
        ValueError: it is none of them.
    """
    check_on_nonfinite(on_nonfinite, skipped_by="gradclip.torch.attach")


def _held_to_be_read(
    tree: Tree, backend: Backend, clip_norm: Any, use_norm: Any, group: Any
) -> tuple[Held, tuple[Any, Any]]:
    """Leaves, and limits: of types derived from a framework's as they are, if it follows them."""
    limits = limits_read(clip_norm, use_norm, unless=may_be_followed)
    held = backend.hold(tree.leaves, tree.path, writable=False, beside=Beside(limits, group))
    if held.follows or all(map(is_inert, limits)):
        return held, limits
    del held  # for no memory is held while they are read
    limits = limits_read(*limits)
    held = backend.hold(tree.leaves, tree.path, writable=False, beside=Beside(limits, group))
    return held, limits


def lesson_of(clip_norm: Any, keys: Sequence[Any]) -> Any:
    """The lesson of a limit that learns, ``keys`` telling its tensors apart; any other as it is."""
    return clip_norm.lesson(keys) if isinstance(clip_norm, Limit) else clip_norm


def learn(clip_norm: Any) -> None:
    """Once leaves are clipped: have a limit that learns keep what it has learnt."""
    if isinstance(clip_norm, Lesson):
        clip_norm.learn()


def limits_read(
    clip_norm: Any, use_norm: Any, *names: str, unless: Callable[[Any], bool] = is_inert
) -> tuple[Any, Any]:
    """The limits, those read whose reading may run anyone's code, as it may change the leaves.

    So it comes before their memory is held. Arrays of a framework have no such code, and the host
    need not wait for one that is on the leaves' device.
    """
    if isinstance(clip_norm, Lesson) and clip_norm.per_tensor and use_norm is not None:
        called = names[1] if len(names) > 1 else "use_norm"
        raise ValueError(
            f"{called} is {use_norm!r}, and {clip_norm!r} clips each tensor by a norm of its own"
        )
    if not unless(clip_norm):
        clip_norm = check_clip_norm(clip_norm, *names[:1])
    if not unless(use_norm):
        use_norm = float(check_use_norm(use_norm, *names[1:]))
    return clip_norm, use_norm


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
        tree, backend = Opening(None).opened(t_list, kinds_of=kinds)
        return Survey(*backend.hold(tree.leaves, tree.path, writable=False).total())


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
        tree, backend = Opening(None).opened(t_list, kinds_of=kinds)
        backend.hold(tree.leaves, tree.path, writable=True).act_(action)
