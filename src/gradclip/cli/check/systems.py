"""What ``gradclip check`` judges: each installed backend, and the libraries beside it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from gradclip import IndexedSlices, clip_by_global_norm, clip_by_global_norm_
from gradclip.cli._tensorflow import import_tensorflow
from gradclip.cli.check.referee import Array, Leaf
from gradclip.core.rooms import backend_names

# A list and a limit in, the clipped list and its norm out, as a framework has them.
RawClip = Callable[[list[Any], float], tuple[list[Any], Any]]
# NumPy leaves and a limit in, the norm and the clipped leaves out, as NumPy arrays.
Clip = Callable[[list[Leaf], float], tuple[Any, list[Leaf]]]


class RefusedError(Exception):
    """A system raised: the name of its exception."""


class System(NamedTuple):
    """Something that clips, in one or more ways."""

    name: str
    what: str
    clips: list[Clip]
    ours: bool


class Framework(NamedTuple):
    """The way of a leaf from NumPy into a framework and back, and gradclip's ways to clip there."""

    to: Callable[[Leaf], Any]
    back: Callable[[Any], Leaf]
    ways: dict[str, RawClip]
    scope: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Incumbent(NamedTuple):
    """Another library's function, and the framework whose arrays it clips."""

    framework: str
    what: str
    load: Callable[[], RawClip]


def installed() -> tuple[list[System], list[str]]:
    """What is installed, gradclip's own first, and the names of what is not."""
    ours, others, missing = [], [], []
    loaded: dict[str, Framework] = {}
    for name, load in FRAMEWORKS.items():
        try:
            loaded[name] = load()
        except ImportError:
            missing.append(name)
    for name in backend_names():
        if name in loaded:
            ways = loaded[name].ways
            clips = [_between(loaded[name], way, contextlib.nullcontext) for way in ways.values()]
            ours.append(System(f"gradclip {name}", " and ".join(ways), clips, True))
    for name, incumbent in INCUMBENTS.items():
        if incumbent.framework not in loaded:
            continue
        try:
            clip = _between(loaded[incumbent.framework], incumbent.load(), _silence)
            others.append(System(name, incumbent.what, [clip], False))
        except ImportError:
            missing.append(name)
    return ours + others, missing


def _between(
    framework: Framework, clip: RawClip, around: Callable[[], AbstractContextManager[Any]]
) -> Clip:
    def between(leaves: list[Leaf], clip_norm: float) -> tuple[Any, list[Leaf]]:
        with framework.scope():
            given = [framework.to(leaf) for leaf in leaves]
            try:
                with around():
                    clipped, norm = clip(given, clip_norm)
            except Exception as error:
                raise RefusedError(type(error).__name__) from error
            return framework.back(norm), [framework.back(leaf) for leaf in clipped]

    return between


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield


def _in_place(leaves: list[Any], clip_norm: float) -> tuple[list[Any], Any]:
    norm = clip_by_global_norm_(leaves, clip_norm)
    return leaves, norm


_NEW: dict[str, RawClip] = {"clip_by_global_norm": clip_by_global_norm}
_NEW_AND_IN_PLACE: dict[str, RawClip] = {**_NEW, "clip_by_global_norm_": _in_place}


# ---- frameworks: one entry each, so that a backend with the same name is checked ----


def _numpy() -> Framework:
    def to(leaf: Leaf) -> Leaf:
        if isinstance(leaf, IndexedSlices):
            return leaf._replace(values=leaf.values.copy())
        return leaf.copy()

    return Framework(to, lambda leaf: leaf, _NEW_AND_IN_PLACE)


def _torch() -> Framework:
    import torch

    def to(leaf: Leaf) -> Any:
        if isinstance(leaf, IndexedSlices):
            indices = torch.from_numpy(leaf.indices)[None]
            return torch.sparse_coo_tensor(
                indices, to(leaf.values), leaf.dense_shape, check_invariants=True
            )
        if leaf.dtype.name == "bfloat16":
            return torch.from_numpy(leaf.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(leaf.copy())

    def back(leaf: Any) -> Any:
        if leaf.is_sparse:
            return IndexedSlices(back(leaf._values()), leaf._indices()[0].numpy(), leaf.shape)
        if leaf.dtype == torch.bfloat16:
            from ml_dtypes import bfloat16

            return back(leaf.view(torch.int16)).view(bfloat16)
        return np.asarray(leaf.detach().cpu())

    return Framework(to, back, _NEW_AND_IN_PLACE)


def _tensorflow() -> Framework:
    tf = import_tensorflow()

    def to(leaf: Leaf) -> Any:
        if isinstance(leaf, IndexedSlices):
            return tf.IndexedSlices(*map(tf.constant, leaf))
        return tf.constant(leaf)

    def back(leaf: Any) -> Leaf:
        if isinstance(leaf, tf.IndexedSlices):
            return IndexedSlices(
                leaf.values.numpy(), leaf.indices.numpy(), tuple(leaf.dense_shape.numpy())
            )
        return np.asarray(leaf.numpy())

    return Framework(to, back, _NEW)


def _jax() -> Framework:
    import jax
    from jax.experimental import sparse

    def to(leaf: Leaf) -> Any:
        if isinstance(leaf, IndexedSlices):
            indices = to(leaf.indices)[:, None]
            return sparse.BCOO((to(leaf.values), indices), shape=leaf.dense_shape or ())
        return jax.numpy.asarray(leaf)

    def back(leaf: Any) -> Leaf:
        if isinstance(leaf, sparse.BCOO):
            return IndexedSlices(back(leaf.data), np.asarray(leaf.indices)[:, 0], leaf.shape)
        return np.asarray(leaf)

    @jax.jit
    def under_jit(leaves: list[Any], clip_norm: float) -> tuple[list[Any], Any]:
        return clip_by_global_norm(leaves, clip_norm)

    ways: dict[str, RawClip] = {**_NEW, "clip_by_global_norm under jit": under_jit}
    return Framework(to, back, ways, scope=lambda: jax.enable_x64(True))


def _cupy() -> Framework:
    import cupy

    if not cupy.cuda.is_available():
        raise ImportError("CuPy finds no device")

    def to(leaf: Leaf) -> Any:
        if isinstance(leaf, IndexedSlices):
            return leaf._replace(values=to(leaf.values))
        return cupy.asarray(leaf)

    def back(leaf: Any) -> Any:
        if isinstance(leaf, IndexedSlices):
            return leaf._replace(values=back(leaf.values))
        return leaf.get()

    return Framework(to, back, _NEW_AND_IN_PLACE)


FRAMEWORKS: dict[str, Callable[[], Framework]] = {
    "numpy": _numpy,
    "torch": _torch,
    "tensorflow": _tensorflow,
    "jax": _jax,
    "cupy": _cupy,
}


# ---- other libraries, each with the framework whose arrays it clips ----


def _numpy_loop() -> RawClip:
    def clip(leaves: list[Array], clip_norm: float) -> tuple[list[Array], Any]:
        norm = np.sqrt(sum(np.vdot(leaf, leaf).real for leaf in leaves))
        if norm > clip_norm:
            for leaf in leaves:
                np.multiply(leaf, clip_norm / norm, out=leaf)
        return leaves, norm

    return clip


def _torch_utils() -> RawClip:
    import torch

    def clip(leaves: list[Any], clip_norm: float) -> tuple[list[Any], Any]:
        parameters = [torch.nn.Parameter(torch.empty_like(leaf)) for leaf in leaves]
        for parameter, leaf in zip(parameters, leaves, strict=True):
            parameter.grad = leaf
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
        return [parameter.grad for parameter in parameters], norm

    return clip


def _tf_clip() -> RawClip:
    clip: RawClip = import_tensorflow().clip_by_global_norm
    return clip


def _optax() -> RawClip:
    import optax

    def clip(leaves: list[Any], clip_norm: float) -> tuple[list[Any], Any]:
        clipped, _ = optax.clip_by_global_norm(clip_norm).update(leaves, optax.EmptyState())
        return clipped, optax.tree.norm(leaves)

    return clip


INCUMBENTS = {
    "NumPy loop": Incumbent("numpy", "np.vdot in each array's dtype, and *=", _numpy_loop),
    "PyTorch": Incumbent("torch", "torch.nn.utils.clip_grad_norm_", _torch_utils),
    "TensorFlow": Incumbent("tensorflow", "tf.clip_by_global_norm", _tf_clip),
    "optax": Incumbent("jax", "optax.clip_by_global_norm", _optax),
}
