"""PyTorch: dense and sparse tensors, DTensors, and `gradclip.IndexedSlices` of tensors.

Tensors on the CPU go through the host's kernels where they lie; on other devices the same bits come
from PyTorch's own operations. Where autograd or a function transform looks on, the clip is one
`torch.autograd.Function`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import math
import operator
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from operator import is_
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from gradclip.core import exact
from gradclip.core.decide import check_clip_norm, check_use_norm
from gradclip.core.exact import FLOAT32, FLOAT64, WORDS, Part, Scaled, Total, total_of
from gradclip.core.protocol import Plain, Recorder
from gradclip.core.sparse import IndexedSlices, check_rows, merged_rows
from gradclip.core.tree import Tree
from gradclip.core.workers import Joint, Workers, workers_of
from gradclip.kernels import cpu, layout
from gradclip.kernels.cpu import leaves as host_leaves
from gradclip.kernels.cpu.leaves import Array, Float8
from gradclip.kernels.gpu.launch import is_run
from gradclip.kernels.layout import Layout
from gradclip.kernels.traced import norms, scaling, squares
from gradclip.kernels.traced.numbers import Number
from gradclip.torch import mesh
from gradclip.torch.derivative import pulled_back, pushed_forward, slope
from gradclip.torch.gpu import Memory
from gradclip.torch.operations import Operations

if TYPE_CHECKING:
    from gradclip.kernels.gpu import leaves as gpu_leaves

_ACCEPTED = "float16, bfloat16, float8, float32, float64 and complex tensors"
_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_OPERANDS = _PLAIN_TYPES | {FakeTensor, FunctionalTensor}
_FLOAT8 = {
    torch.float8_e4m3fn,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2,
    torch.float8_e5m2fnuz,
}
_HALVES = {torch.float16, torch.bfloat16, torch.complex32}
WIDE = {torch.float64, torch.complex128}
_DTYPES = _HALVES | _FLOAT8 | WIDE | {torch.float32, torch.complex64}
_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


class Held(NamedTuple):
    """Leaves that have passed every check."""

    leaves: Sequence[Any]  # of DTensors what this process holds of them
    host: host_leaves.Held | None  # their memory; None where the host's kernels do not reach it
    spread: Sequence[Any] | None = None  # the leaves as they are, where one is a DTensor
    writable: bool = False
    there: gpu_leaves.Leaves | None = None  # in a device's memory, if Triton's kernels reach all
    unread: Any = None  # `_operations.Leaves`, where there are no numbers to be read


F = TypeVar("F", bound=Callable[..., Any])


def looked_away_from(function: F) -> F:
    """Have torch.compile not look into a function where it has broken a graph."""
    hidden = _disable_dynamo(function)
    looks = torch._C._dynamo.eval_frame.get_eval_frame_callback

    @functools.wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        is_looked_into = torch.compiler.is_compiling() or looks() is not None
        return (hidden if is_looked_into else function)(*args, **options)

    return cast(F, run)


# ---- the backend ----


def hold(leaves: Sequence[Any], path: Callable[[int], str], *, writable: bool) -> Held:
    """Check the leaves and take hold of their memory.

    Raises:
        TypeError: a leaf is of another dtype or type than those clipped; with ``writable``,
            autograd records what becomes of one.
        ValueError: a sparse leaf is malformed, the memory of one has been given up, or there are
            more elements than an int64 counts; with ``writable``, elements of one or of two share
            memory.
    """
    if writable and torch.is_grad_enabled():
        _check_unrecorded(leaves, path)
    if _are_plain(leaves):
        memory = _taken(leaves, writable=writable)
        if memory is not None:
            host_leaves.check_apart(memory, path)
            return Held(leaves, host_leaves.Held(leaves, [], None, memory, writable, None))
        there = _there(leaves, path, writable=writable)
        if there is not None:
            return Held(leaves, None, writable=writable, there=there)
    elif mesh.any_spread(leaves):
        here = hold(mesh.locals_of(leaves), path, writable=writable)
        return here._replace(spread=leaves, writable=writable)
    if is_unread(leaves):
        check_operands(leaves, path)
        if writable:
            _check_writes(leaves, path)
        unread = _operations().Leaves(leaves, path)
        return Held(leaves, None, writable=writable, unread=unread)
    values = [_checked(leaf, partial(path, place)) for place, leaf in enumerate(leaves)]
    host_leaves.check_countable((each.numel() * (1 + each.is_complex()) for each in values), path)
    if not _on_host(values):
        if writable:
            _check_apart(values, path)
        return Held(distinct(leaves) if writable else leaves, None, writable=writable)
    return Held(leaves, _host_held(leaves, values, path, writable=writable))


def queue(held: Held) -> Any:
    """Who clips in the memory of a device, if that is where the leaves are; or where none is."""
    return held.unread or held.there


def check_there(held: Held) -> None:
    """Hold leaves against what the other workers of a group count on.

    Raises:
        ValueError: they have no memory.
    """
    if held.unread is not None:
        device = held.leaves[0].device
        raise ValueError(f"{held.unread.path(0)} has no memory (device {device})")


def written(leaves: Sequence[Any]) -> None:
    """Have autograd know that leaves may have been written, as the host does not know if."""
    torch.autograd.graph.increment_version(leaves)


def measure(held: Held) -> Scaled:
    """The global norm, correctly rounded."""
    if held.host is not None:
        return host_leaves.measure(held.host)
    if held.there is not None:
        return exact.norm(held.there.total(), FLOAT64 if held.there.wide else FLOAT32)
    devices = {_values(leaf).device for leaf in held.leaves}
    if len(devices) > 1:
        return host_leaves.measure(_on_the_host(held))
    norm = norms.measured(Operations(devices.pop()), list(map(_with_rows, held.leaves)))
    if norm.nan | norm.inf:
        return Scaled.of(np.nan if norm.nan else np.inf)
    significand, exponent = Scaled.of(float(norm.significand))
    return Scaled(significand, exponent + int(norm.exponent) if significand else 0)


def sums(tensors: Sequence[Tensor]) -> list[Part] | None:
    """Each thread's share of sum x^2 in float64; None if the C kernel cannot add that up."""
    memory = _taken(tensors, writable=False) if _are_plain(tensors) else None
    if memory is None or memory.has_f64:
        return None
    return cpu.sum_squares(memory)


def watch(parameter: Tensor) -> Any:
    """Have a parameter's gradient measured whenever backward has written it, while it is warm.

    Returns:
        The watch and the handle of its hook; None where it is not worth it, or cannot be done.
    """
    large = parameter.numel() * parameter.element_size() >= _LARGE
    here = parameter.device.type == "cpu" and parameter.is_leaf
    if not large or not here or cpu.kernel() == "numpy" or not _c_interface():
        return None
    watch = cpu.watch()
    return watch, parameter.register_post_accumulate_grad_hook(watch)


# Gradients of fewer bytes are in some cache at the step too, where one call measures them all.
_LARGE = 1 << 16


def total(held: Held) -> tuple[Total, float, bool]:
    """The exact sum, the largest finite |x| (of a complex x, of its parts), if any is wide."""
    return host_leaves.total(held.host or _on_the_host(held))


def powers_of_order(held: Held, order: float) -> tuple[float, float]:
    """The largest ``|x|``, and ``sum of (|x| / largest)^order`` in float64; 1 for an order of inf.

    NaN if any element is, else inf if any element is.
    """
    largest = 0.0
    for piece in _magnitudes(held):
        top = float(piece.max())
        largest = top if math.isnan(top) else max(largest, top)
        if math.isnan(largest):
            break
    if math.isinf(order) or not 0 < largest < math.inf:
        return largest, 1.0
    # Parts of the largest: neither a sum nor its root overflows.
    parts = (float((piece / largest).pow(order).sum()) for piece in _magnitudes(held))
    return largest, math.fsum(parts)


def norm_of_order(powers: Sequence[Sequence[float]], order: float, *, wide: bool) -> Scaled:
    """``(sum of |x|^order)^(1/order)``, or for inf the largest |x|; in float64, rounded once more.

    Of one or more `powers_of_order`; to float64 if it is ``wide``, else to float32.
    """
    tops = [top for top, _ in powers]
    largest = math.nan if any(map(math.isnan, tops)) else max(tops)
    norm = Scaled.of(largest)
    if math.isfinite(order) and 0 < largest < math.inf:
        total = math.fsum(part * (top / largest) ** order for top, part in powers)
        if math.log2(total) / order > 1000:
            return Scaled.of(math.inf)
        significand, exponent = math.frexp(norm.significand * total ** (1 / order))
        norm = Scaled(significand, norm.exponent + exponent)
    rounded = norm if wide else norm._replace(significand=float(np.float32(norm[0])))
    significand, exponent = math.frexp(rounded.significand)
    return Scaled(significand, norm.exponent + exponent)


def _magnitudes(held: Held) -> Iterator[Tensor]:
    """``|x|`` of the leaves in float64, rows of one index added; some at a time, never none."""
    for leaf in distinct(held.leaves):
        values, rows = _with_rows(leaf)
        merged = None if rows is None else _merged(leaf, np.empty(0))
        parts = [values] if merged is None else map(torch.from_numpy, merged)
        for part in parts:
            for piece in torch.split(part.reshape(-1), 1 << 16):
                if piece.numel():
                    wide = torch.complex128 if piece.is_complex() else torch.float64
                    yield piece.to(wide).abs()


def is_wide(held: Held) -> bool:
    """If the norm is float64."""
    if held.host is not None:
        return held.host.memory.has_f64
    if held.there is not None:
        return held.there.wide
    return any(_values(leaf).dtype in WIDE for leaf in held.leaves)


def share(held: Held, joint: Joint) -> tuple[Any, bool]:
    """What this worker adds to the sum of squares of all, and if a leaf is float64."""
    wide, held = is_wide(held), counted(held, joint)
    if held.host is not None:
        return host_leaves.total(held.host)[0], wide
    if held.there is not None:
        stays = isinstance(joint.workers, mesh.Ring)
        return held.there.share() if stays else held.there.total(), wide
    return _total_elsewhere(held), wide


def counted(held: Held, joint: Joint) -> Held:
    """What this worker counts of the leaves: not what another counts.

    Raises:
        ValueError: leaves have no memory, and another worker waits for what is in it.
        RuntimeError: another worker has failed, and terms are to be added up.
    """
    check_there(held)
    if not isinstance(joint.workers, mesh.Ring):
        return held
    leaves = held.leaves if held.spread is None else held.spread
    if mesh.any_terms(leaves):
        joint.agree()  # adding up is a collective, for which one that has failed would be missed
    else:
        found = mesh.counted(leaves, joint.workers)
        if len(found) == len(held.leaves) and all(map(is_, found, held.leaves)):
            return held
    # One memory listed twice counts once where it is written once.
    once = distinct(leaves) if held.writable else leaves
    return hold(mesh.counted(once, joint.workers), str, writable=False)


def count_nonfinite(leaf: Any) -> tuple[int, int]:
    """How many elements are NaN, and how many are inf."""
    values = _values(mesh.local(leaf))
    if values.dtype in _FLOAT8 | {torch.complex32}:
        values = values.to(torch.complex64 if values.is_complex() else torch.float32)
    return int(values.isnan().sum()), int(values.isinf().sum())


def scalar(norm: Scaled, held: Held, *, wide: bool = False) -> Tensor:
    """The norm as a 0-d tensor, where the first leaf is."""
    dtype = torch.float64 if wide or is_wide(held) else torch.float32
    device = "cpu" if held.host is not None else _values(held.leaves[0]).device
    return torch.tensor(float(norm), dtype=dtype, device=device)


def copied(held: Held) -> list[Any]:
    """New leaves, bit for bit the old ones."""
    return _rewrapped(held, [_copy(_values(leaf)) for leaf in held.leaves])


def filled(held: Held, value: float) -> list[Any]:
    """New leaves, every element ``value``."""
    new = [torch.empty_like(_values(leaf).detach()) for leaf in held.leaves]
    _fill(new, value)
    return _rewrapped(held, new)


def scaled(held: Held, factor: Scaled) -> list[Any]:
    """New leaves, every element multiplied."""
    if held.there is not None:
        new = list(map(_copy, held.leaves))
        copies = _there(new, str, writable=False)
        assert copies is not None, "laid out as those that are there"
        copies.scale_(factor)
        return _rewrapped(held, new)
    old = [_values(leaf).detach() for leaf in held.leaves]
    if held.host is None:
        new = [_scaled_elsewhere(values, factor) for values in old]
    else:
        new = [torch.empty_like(values) for values in old]
        # The kernel walks memory: what is conjugated later, or lies in another order, is copied.
        sources = [
            values
            if values.stride() == target.stride() and not _is_lazy(values)
            else target.copy_(values)
            for values, target in zip(old, new, strict=True)
        ]
        host_leaves.scale_to(_held_plain(sources), _held_plain(new), factor)
    return _rewrapped(held, new)


def _rewrapped(held: Held, new: list[Tensor]) -> list[Any]:
    """Leaves like those that are held, of new elements."""
    leaves = list(map(_with_values, held.leaves, new))
    return leaves if held.spread is None else list(map(mesh.like, held.spread, leaves))


def fill_(held: Held, value: float) -> None:
    """Put ``value`` into every element."""
    _fill(map(_values, held.leaves), value)


def scale_(held: Held, factor: Scaled) -> None:
    """Multiply every element where it lies; autograd sees that it has changed."""
    if held.host is not None:
        host_leaves.scale_(held.host, factor)
        as_they_are = held.host.codes is None
        torch.autograd.graph.increment_version(
            held.leaves if as_they_are else map(_values, held.leaves)
        )
        return
    if held.there is not None:
        held.there.scale_(factor)
        torch.autograd.graph.increment_version(held.leaves)
        return
    with torch.inference_mode():
        for tensor in map(_values, held.leaves):
            tensor.copy_(_scaled_elsewhere(tensor, factor))


def _fill(tensors: Iterable[Tensor], value: float) -> None:
    # In which inference tensors are written as all others are, and versions are counted.
    with torch.inference_mode():
        for tensor in tensors:
            if tensor.dtype in _FLOAT8:  # which has no fill_
                tensor.copy_(torch.tensor(value, device=tensor.device))
            else:
                tensor.fill_(complex(value, value) if tensor.is_complex() else value)


def _copy(values: Tensor) -> Tensor:
    return torch.empty_like(values.detach()).copy_(values.detach())


def _is_lazy(values: Tensor) -> bool:
    """If the elements are the conjugates, or negatives, of what lies in memory."""
    return values.is_conj() or values.is_neg()


def distinct(leaves: Sequence[Any]) -> list[Any]:
    """The leaves, those whose elements are in one memory once."""
    return list({_key(leaf): leaf for leaf in reversed(leaves)}.values())[::-1]


def _key(leaf: Any) -> Any:
    values = _values(mesh.local(leaf))
    if not values.numel() or not values.data_ptr():
        return id(leaf)
    return values.device, values.dtype.to_real(), _layout(values)


def _layout(values: Tensor) -> Layout:
    parts, item = 1 + values.is_complex(), values.element_size()
    address, real = values.data_ptr(), item // parts
    if values.is_contiguous():
        return Layout(address, real, ((real, values.numel() * parts),))
    strides = [step * item for step in values.stride()]
    return layout.layout(address, real, values.shape, strides, parts)


# ---- one leaf ----


def _values(leaf: Any) -> Tensor:
    """The tensor of a leaf's elements: of a sparse one, those it stores; the same memory."""
    if isinstance(leaf, IndexedSlices):
        values: Tensor = leaf.values
        return values
    if leaf.layout is torch.sparse_coo:
        return leaf._values()
    return leaf.values() if leaf.layout in _COMPRESSED else leaf


def _checked(leaf: Any, path: Callable[[], str]) -> Tensor:
    """The tensor of a leaf's elements, once the leaf has been found to be one that is clipped."""
    tensor = leaf.values if isinstance(leaf, IndexedSlices) else leaf
    kind = type(tensor)
    served = isinstance(tensor, Tensor) and (
        kind in _PLAIN_TYPES
        or kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl
        or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    )
    if not served or tensor.is_nested or tensor.is_quantized or tensor.is_mkldnn:
        name = kind.__name__
        if served:
            name = "a tensor that is nested, quantized or of mkldnn"
        raise TypeError(f"{path()} is {name}; gradclip clips {_ACCEPTED}")
    _check_dtype(tensor, path)
    values = _values(leaf)
    short = not values.is_meta and _needed(values) > values.untyped_storage().nbytes()
    if values.is_meta or values._is_zerotensor() or short:
        raise ValueError(f"{path()} has no memory (device {values.device})")
    if values is not leaf:
        _check_indices(leaf, path)
    return values


def _check_dtype(tensor: Tensor, path: Callable[[], str]) -> None:
    if tensor.dtype not in _DTYPES:
        name = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{path()} is {name}; gradclip clips {_ACCEPTED}")


def _check_unrecorded(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Refuse to write to parameters, which are no gradients, and to what a graph has read."""
    if _are_plain(leaves) and not any(map(_requires_grad, leaves)):
        return
    for place, leaf in enumerate(leaves):
        tensor = leaf.values if isinstance(leaf, IndexedSlices) else leaf
        if getattr(tensor, "requires_grad", False):
            raise TypeError(
                f"{path(place)} requires a gradient, and autograd would not see that it changes. "
                "Weights are no gradients: those of parameters are clipped by "
                "gradclip.torch.clip_grad_norm_. To write to this tensor itself use "
                "torch.no_grad(); clip_by_global_norm returns new ones"
            )


_requires_grad = operator.attrgetter("requires_grad")


def _needed(values: Tensor) -> int:
    """How many bytes of its storage a tensor reaches over."""
    if not values.numel():
        return 0
    extent = sum((n - 1) * step for n, step in zip(values.shape, values.stride(), strict=True)) + 1
    return int((values.storage_offset() + extent) * values.element_size())


def _check_indices(leaf: Any, path: Callable[[], str]) -> None:
    if isinstance(leaf, IndexedSlices):
        shape = leaf.dense_shape
        rows = IndexedSlices(_Shape(tuple(leaf.values.shape)), _array(leaf.indices), shape)
        check_rows(rows, path)
    elif leaf.layout in _COMPRESSED:
        try:
            torch._validate_sparse_compressed_tensor_args(
                *_compressed_indices(leaf), leaf.values(), leaf.shape, leaf.layout
            )
        except RuntimeError as error:
            raise ValueError(f"{path()} is malformed: {error}") from None
    elif leaf._indices().numel():
        indices = leaf._indices()
        lengths = indices.new_tensor(leaf.shape[: leaf.sparse_dim()])[:, None]
        wrong = ((indices < 0) | (indices >= lengths)).any(1)
        if wrong.any():
            axis = int(wrong.to(torch.int8).argmax())
            raise ValueError(
                f"{path()} has an index out of range on axis {axis} of length {leaf.shape[axis]}"
            )


class _Shape(NamedTuple):
    """What `check_rows` asks of values."""

    shape: tuple[int, ...]


def _array(indices: Any) -> Any:
    return indices.detach().cpu().numpy() if isinstance(indices, Tensor) else np.asarray(indices)


def _compressed_indices(leaf: Tensor) -> tuple[Tensor, Tensor]:
    if leaf.layout in (torch.sparse_csr, torch.sparse_bsr):
        return leaf.crow_indices(), leaf.col_indices()
    return leaf.ccol_indices(), leaf.row_indices()


def _rows(leaf: Any) -> Tensor | None:
    """One index for each of a leaf's values; None if no two can share one."""
    if isinstance(leaf, IndexedSlices):
        return torch.as_tensor(leaf.indices, device=leaf.values.device)
    if leaf.layout is not torch.sparse_coo or leaf.is_coalesced():
        return None
    indices = leaf._indices()
    rows = indices.new_zeros(leaf._nnz())
    for axis, length in enumerate(leaf.shape[: leaf.sparse_dim()]):
        rows = rows * length + indices[axis]
    return rows


def _with_rows(leaf: Any) -> tuple[Tensor, Tensor | None]:
    return _values(leaf).detach(), _rows(leaf)


def _with_values(leaf: Any, values: Tensor) -> Any:
    """A leaf with other elements."""
    if isinstance(leaf, IndexedSlices):
        return leaf._replace(values=values)
    if leaf.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(
            leaf._indices(),
            values,
            leaf.shape,
            is_coalesced=leaf.is_coalesced(),
            check_invariants=False,
        )
    if leaf.layout in _COMPRESSED:
        return torch.sparse_compressed_tensor(
            *_compressed_indices(leaf),
            values,
            leaf.shape,
            layout=leaf.layout,
            check_invariants=False,
        )
    return values


# ---- on the CPU ----


def _on_host(values: Sequence[Tensor]) -> bool:
    """If the host's kernels reach all tensors."""
    return all(tensor.device.type == "cpu" for tensor in values)


def _held_plain(values: list[Tensor]) -> host_leaves.Held:
    """Hold tensors that have passed every check, or are new."""
    held = hold(values, str, writable=False).host
    assert held is not None, "tensors on the CPU"
    return held


def _host_held(
    leaves: Sequence[Any], values: Sequence[Tensor], path: Callable[[int], str], *, writable: bool
) -> host_leaves.Held:
    """Hold the memory of tensors as that of arrays."""
    merged = _merged if any(_values(leaf) is not leaf for leaf in leaves) else None
    arrays = list(map(_memory, values))
    codes = [_float8(tensor.dtype) if tensor.dtype in _FLOAT8 else None for tensor in values]
    return host_leaves.hold_codes(leaves, arrays, codes, merged, path, writable=writable)


def _memory(values: Tensor) -> Array:
    """The memory of a tensor as an array: uint16 for bfloat16, uint8 for float8."""
    values = values.detach()
    if values.is_conj():
        values = values.conj()
    if values.is_neg():
        values = torch._neg_view(values)
    if values.dtype is torch.bfloat16:
        codes: Array = values.view(torch.int16).numpy()
        return codes.view(np.uint16)
    if values.dtype is torch.complex32:
        values = torch.view_as_real(values)
    array: Array = (values.view(torch.uint8) if values.dtype in _FLOAT8 else values).numpy()
    return array


def _merged(leaf: Any, _: Array) -> Iterator[Array] | None:
    rows = _rows(leaf)
    if rows is None:
        return None
    values = _values(leaf).detach()
    if values.dtype in _HALVES | _FLOAT8:
        values = values.to(torch.complex64 if values.is_complex() else torch.float32)
    return merged_rows(values.resolve_conj().resolve_neg().numpy(), _array(rows))


_float8s: dict[torch.dtype, Float8] = {}


def _float8(dtype: torch.dtype) -> Float8:
    if dtype not in _float8s:

        def encode(values: Array) -> bytes:
            new: Array = torch.from_numpy(values).to(dtype).view(torch.uint8).numpy()
            return new.tobytes()

        codes = torch.arange(256, dtype=torch.uint8, device="cpu")
        numbers: Array = codes.view(dtype).float().numpy()
        _float8s[dtype] = Float8(numbers.tobytes(), encode)
    return _float8s[dtype]


def _are_plain(leaves: Sequence[Any]) -> bool:
    return _PLAIN_TYPES.issuperset(map(type, leaves))


def _taken(tensors: Sequence[Any], *, writable: bool) -> cpu.Leaves | None:
    """The memory of plain tensors, by PyTorch's C interface; None where one needs care."""
    if _is_transformed() or is_written_down() or cpu.kernel() == "numpy" or not _c_interface():
        return None
    return cpu.take_handles(tensors, writable=writable)


# ---- in the memory of a device that Triton compiles for ----


def _there(
    tensors: Sequence[Any], path: Callable[[int], str], *, writable: bool
) -> gpu_leaves.Leaves | None:
    """Plain tensors on one device; None where PyTorch's own operations have to do.

    Raises:
        ValueError: with ``writable``, two share a part of their memory.
    """
    if not tensors or _is_transformed() or is_written_down():
        return None
    device = tensors[0].device
    if not has_triton(device):
        return None
    found = _spans(tensors, device, path, writable=writable)
    if found is None:
        return None
    from gradclip.kernels.gpu import leaves as gpu_leaves

    return gpu_leaves.Leaves(Memory.now(device), *found)


def has_triton(device: torch.device) -> bool:
    """If the kernels of `kernels.cuda` run on a device: NVIDIA's or AMD's, which are "cuda" too."""
    if device.type != "cuda":
        return False
    missing = _without_triton(device)
    if missing is not None:
        _warn_once(missing)
    return missing is None


@functools.cache
def _without_triton(device: torch.device) -> str | None:
    """Why Triton is not to be had for a device; None where it is."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if "tensorflow" in sys.modules and "triton" not in sys.modules:
        # Each brings an LLVM, and loading the second one would abort the process.
        return "TensorFlow was imported before Triton, which no longer loads: import triton first"
    import triton

    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton is {triton.__version__}, and older than 3.6"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler, by which it builds its launcher"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "Triton compiles for NVIDIA's GPUs of compute capability 8.0 or newer"
    return None


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(
        f"{reason}. So PyTorch's own operations clip what is on the GPU: the same bits, slower, "
        "and the host waits for them",
        RuntimeWarning,
        stacklevel=2,
    )


def _spans(
    tensors: Sequence[Any], device: torch.device, path: Callable[[int], str], *, writable: bool
) -> tuple[bytes, bool] | None:
    """Where tensors lie, and if one is wide; None where one is not in one run on the device.

    Raises:
        ValueError: with ``writable``, two share a part of their memory.
    """
    if cpu.kernel() != "numpy" and _c_interface():
        number = -1 if device.type == "cpu" else _cuda_number()
        place = number, device.index or 0
        memory = cpu.take_handles(tensors, writable=writable, device=place)
        spans = None if memory is None else memory.spans()
        if memory is None or spans is None:
            return None
        host_leaves.check_apart(memory, path)
        return spans, memory.has_f64
    if any(
        tensor.device != device
        or tensor.layout is not torch.strided
        or tensor.dtype not in _KINDS
        or not is_run(tensor.shape, tensor.stride(), 1)
        or _needed(tensor) > tensor.untyped_storage().nbytes()
        for tensor in tensors
    ):
        return None
    if writable:
        _check_pairs(tensors, path)
    rows = [
        (t.data_ptr(), t.numel() * (1 + t.is_complex()), _KINDS[t.dtype])
        for t in (distinct(tensors) if writable else tensors)
    ]
    wide = any(tensor.dtype in WIDE for tensor in tensors)
    return np.array(rows, np.int64).tobytes(), wide


# The numbers of `cpu.h`.
_KINDS = {
    torch.float32: 0,
    torch.complex64: 0,
    torch.float64: 1,
    torch.complex128: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
}


def _check_writes(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to have it written down that tensors are written to, where that cannot be done."""
    if _trace_of_jit() is not None:
        raise NotImplementedError(
            "torch.jit.trace loses what an operation writes where tensors lie; "
            "clip_by_global_norm returns new tensors, and torch.export takes both"
        )
    _check_steps(tensors, path)


def _check_apart(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to tensors of which elements share memory."""
    _check_steps(tensors, path)
    _check_pairs(tensors, path)


def _check_steps(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to a tensor whose own elements share memory."""
    for place, tensor in enumerate(tensors):
        if any(n > 1 and not step for n, step in zip(tensor.shape, tensor.stride(), strict=True)):
            raise ValueError(
                f"{path(place)} has elements that share memory (strides {tensor.stride()}); "
                "clip_by_global_norm returns new arrays instead"
            )


def _check_pairs(tensors: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Refuse to write to tensors that share a part of their memory; all of it is no trouble."""
    places = {_key(tensor): place for place, tensor in reversed([*enumerate(tensors)])}
    on: dict[torch.device, dict[int, Layout]] = {}
    for key, place in places.items():
        if isinstance(key, tuple):  # else it has no memory
            device, _, where = key
            on.setdefault(device, {})[place] = where
    for found in on.values():
        layout.check_apart(found, path)


@functools.cache
def _cuda_number() -> int:
    """PyTorch's number for this type of device."""
    return int(_shim().aoti_torch_device_type_cuda())


_FUNCTIONS = (
    "get_data_ptr",
    "get_dim",
    "get_sizes",
    "get_strides",
    "get_storage_offset",
    "get_storage_size",
    "get_dtype",
    "get_device_type",
    "get_layout",
    "get_device_index",
)
_NUMBERS = (
    "dtype_float16",
    "dtype_bfloat16",
    "dtype_float32",
    "dtype_float64",
    "dtype_complex64",
    "dtype_complex128",
    "device_type_cpu",
    "layout_strided",
)


@functools.cache
def _c_interface() -> bool:
    """If this PyTorch has the C interface that the C kernel knows; it is told where."""
    shim, place = _shim(), _place_of_a_tensor()
    if shim is None or place is None:
        return False
    names = [f"aoti_torch_{name}" for name in (*_FUNCTIONS, *_NUMBERS)]
    if not all(hasattr(shim, name) for name in names):
        return False
    functions = [getattr(shim, name) for name in names]
    addresses = [_address(function) for function in functions[: len(_FUNCTIONS)]]
    for name in ("GOMP_parallel", "omp_get_max_threads"):
        addresses.append(_address(getattr(shim, name)) if hasattr(shim, name) else 0)
    numbers = [number() for number in functions[len(_FUNCTIONS) :]]
    cpu.use_handles(tuple(addresses), (*numbers, place), Tensor)
    return True


@functools.cache
def _shim() -> Any:
    library = next((Path(torch.__file__).parent / "lib").glob("*torch_cpu.*"), None)
    return None if library is None else ctypes.CDLL(str(library))


def _address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _place_of_a_tensor() -> int | None:
    """Where in the memory of a Python tensor its at::Tensor lies, if all kinds agree."""
    with torch.inference_mode(False), torch.enable_grad():
        owned_by_python = torch.zeros(2, device="cpu")
        parameter = torch.nn.Parameter(torch.zeros(2, device="cpu"))
        parameter.sum().backward()  # its gradient belongs to PyTorch
    samples: tuple[Any, ...] = (owned_by_python, parameter, parameter.grad)
    word = ctypes.sizeof(ctypes.c_void_p)
    header, size = object.__basicsize__, Tensor.__basicsize__
    for place in range(header, size - word + 1, word):
        if all(
            ctypes.c_void_p.from_address(id(tensor) + place).value == tensor._cdata
            for tensor in samples
        ):
            return place
    return None


# ---- on other devices ----


def _on_the_host(held: Held) -> host_leaves.Held:
    """Copies of leaves, to be measured."""
    leaves = [
        leaf._replace(values=leaf.values.cpu()) if isinstance(leaf, IndexedSlices) else leaf.cpu()
        for leaf in held.leaves
    ]
    return _host_held(leaves, list(map(_values, leaves)), str, writable=False)


def _total_elsewhere(held: Held) -> Total:
    """The exact sum by PyTorch's operations; of leaves on several devices, one after the other."""
    found = total_of()
    for leaf in held.leaves:
        values, rows = _with_rows(leaf)
        ops = Operations(values.device)
        addends = norms.addends(ops, [(values, rows)])
        if addends:
            words = squares.total(ops, addends).cpu().numpy()
            found[:WORDS] += words[:WORDS]
            found[WORDS:] += words[-2:]
    return found


def _scaled_elsewhere(values: Tensor, factor: Scaled) -> Tensor:
    if not factor.significand:
        return values * 0
    ops = Operations(values.device)
    significand = ops.constant(int(factor.significand * 2**53), "int64")
    exponent = ops.constant(factor.exponent - 53, "int64")
    never = significand < 0
    number = Number(significand, exponent, never, never)
    if values.dtype is torch.complex32:
        parts = torch.view_as_real(values.resolve_conj())
        return torch.view_as_complex(scaling.scaled(ops, parts, number))
    return torch.empty_like(values).copy_(scaling.scaled(ops, values, number))


# ---- where no number is to be read: `gradclip.torch.library` ----

_MODES = torch._C._TorchDispatchModeKey.FUNCTIONAL, torch._C._TorchDispatchModeKey.PROXY
_is_on = torch._C._dispatch_tls_is_dispatch_key_included
_BY_MODES, _BEFORE_DISPATCH = torch._C.DispatchKey.Python, torch._C.DispatchKey.PreDispatch
_trace_of_jit = torch._C._get_tracing_state
_transform = torch._C._functorch.peek_interpreter_stack


def _operations() -> Any:
    # By name, as the flow loads this file: it stands on the flow.
    return importlib.import_module("gradclip.torch.library")


def is_unread(leaves: Sequence[Any]) -> bool:
    """If an operation stands for a clip: it is written down, or leaves have no memory to read."""
    return is_written_down() or is_functionalized() or any(map(_has_no_memory, leaves))


def is_written_down() -> bool:
    """If something writes down what operations there are, to run them later."""
    if _is_on(_BEFORE_DISPATCH) or _trace_of_jit() is not None:
        return True
    return _is_on(_BY_MODES) and any(
        torch._C._get_dispatch_mode(mode) is not None for mode in _MODES
    )


def is_functionalized() -> bool:
    """If `torch.func.functionalize` makes functional what is done.

    Raises:
        NotImplementedError: another transform does so too, of which it knows no operation.
    """
    if not _is_transformed():
        return False
    stack = torch._C._functorch.get_interpreter_stack()
    if all(each.key() != torch._C._functorch.TransformType.Functionalize for each in stack):
        return False
    if len(stack) > 1:
        raise NotImplementedError(
            "a clip under torch.func.functionalize together with another transform of torch.func; "
            "clip outside of functionalize"
        )
    return True


def check_not_functionalized() -> None:
    """Where gradients are written that `torch.func.functionalize` would have to know of.

    Raises:
        NotImplementedError: it is at work.
    """
    if is_functionalized():
        raise NotImplementedError(
            "gradients are clipped where they lie, which torch.func.functionalize does not follow; "
            "gradclip.clip_by_global_norm returns new tensors"
        )


def _is_transformed() -> bool:
    return _transform() is not None


def _has_no_memory(leaf: Any) -> bool:
    leaf = leaf.values if isinstance(leaf, IndexedSlices) else leaf
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, Tensor) and leaf.is_meta)


def is_operand(leaf: Any) -> bool:
    """If an operation takes a leaf: a dense tensor, of no type that PyTorch's users have made."""
    return type(leaf) in _OPERANDS and leaf.layout is torch.strided


def check_operands(leaves: Sequence[Any], path: Callable[[int], str]) -> None:
    """Hold leaves against what an operation takes.

    Raises:
        TypeError: a leaf is no dense tensor, or of another dtype than those clipped.
        ValueError: some have memory and some have none.
    """
    empty = [_has_no_memory(leaf) for leaf in leaves]
    for place, leaf in enumerate(leaves):
        if not is_operand(leaf):
            raise TypeError(
                f"{path(place)} is {type(leaf).__name__} of layout "
                f"{getattr(leaf, 'layout', None)}; where a clip is traced, or has no memory, "
                "gradclip clips dense tensors"
            )
        if empty[place] and not all(empty):
            raise ValueError(f"{path(place)} has no memory (device {leaf.device})")
    check_dtypes(leaves, path)


def check_dtypes(leaves: Sequence[Tensor], path: Callable[[int], str]) -> None:
    """Hold the dtypes of leaves against those that are clipped.

    Raises:
        TypeError: one is not.
    """
    for place, leaf in enumerate(leaves):
        _check_dtype(leaf, partial(path, place))


def norm_dtype(leaves: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the norm of dense leaves."""
    return torch.float64 if any(leaf.dtype in WIDE for leaf in leaves) else torch.float32


# ---- where autograd or a function transform looks on ----


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
    _check_not_traced()
    here = mesh.locals_of(leaves)
    fake = any(isinstance(leaf, FakeTensor) for leaf in here)
    return fake or (mesh.is_fake() and any(map(_has_no_memory, here)))


def _check_not_traced() -> None:
    if is_written_down() or is_functionalized():
        raise NotImplementedError(
            "a clip over several workers cannot be traced; clip outside of what is traced"
        )


def everyone(leaves: Sequence[Any]) -> Workers | None:
    """All processes, where one of the leaves is spread over all of them."""
    return mesh.ring_of_all(leaves)


def recorder(values: Sequence[Any], group: Any) -> Recorder | None:
    """Who clips where autograd, a transform of `torch.func` or a tracer follows what is done."""
    found = _recorder(values)
    if found is not None and (group is not None or mesh.any_spread(values)):
        _check_not_traced()
        raise NotImplementedError(
            "a clip over several workers cannot be differentiated; detach the tensors, or use "
            "torch.no_grad()"
        )
    return found


def _recorder(values: Sequence[Any]) -> Recorder | None:
    if is_functionalized():
        return _operation()
    if _is_transformed() or torch.autograd.forward_ad._current_level >= 0:
        return _Recorder()
    if is_written_down():
        return _operation()
    tensors = [
        value.values if isinstance(value, IndexedSlices) else value
        for value in values
        if isinstance(value, Tensor | IndexedSlices)
    ]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _operation() if any(map(_has_no_memory, tensors)) else _Recorder()
    return None


def _operation() -> Recorder:
    found: Recorder = _operations().Recorder()
    return found


class _Recorder:
    """Clips by a `torch.autograd.Function`."""

    def clip(
        self,
        tree: Tree,
        plain: Plain,
        clip_norm: Any,
        use_norm: Any,
        on_nonfinite: Any,
        name: str | None,  # noqa: ARG002  (PyTorch names no operations)
    ) -> tuple[list[Any], Any]:
        """New leaves and the norm."""
        call = _Call(plain, tree.leaves, tree.path, on_nonfinite)
        tensors = [_recordable(leaf, partial(tree.path, i)) for i, leaf in enumerate(tree.leaves)]
        limits = [_limit("clip_norm", clip_norm), _limit("use_norm", use_norm)]
        norm, _, *new = _Clip.apply(call, *limits, *tensors)
        return list(map(_with_values, tree.leaves, new)), norm

    def norm(self, tree: Tree, plain: Plain, name: str | None) -> Any:
        """The global norm."""
        return self.clip(tree, plain, np.inf, None, "keep", name)[1]


class _Call(NamedTuple):
    """What does not change where a clip is differentiated or mapped."""

    plain: Plain
    leaves: Sequence[Any]
    path: Callable[[int], str]
    on_nonfinite: Any

    def clip(self, clip_norm: Any, use_norm: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The norm, rounded and in float64, and new values, of tensors that nobody follows."""
        if is_unread(tensors):
            check_operands(self.leaves, self.path)
            norm, wide, new = _operations().clip(
                tensors, self.path, clip_norm, use_norm, self.on_nonfinite
            )
            return norm, wide, *new
        limit = check_clip_norm(clip_norm)
        given = None if use_norm is None else float(check_use_norm(use_norm))
        leaves = list(map(_with_values, self.leaves, tensors))
        new, norm, wide = self.plain(leaves, limit, given, self.on_nonfinite)
        return (norm, norm.new_tensor(wide, dtype=torch.float64), *map(_values, new))

    @property
    def rows(self) -> list[Tensor | None]:
        return [
            None if isinstance(leaf, Tensor) and leaf.layout is torch.strided else _rows(leaf)
            for leaf in self.leaves
        ]


def _recordable(leaf: Any, path: Callable[[], str]) -> Tensor:
    """The elements of a leaf, as a tensor that autograd connects to it."""
    if isinstance(leaf, Tensor) and leaf.layout is torch.sparse_coo:
        if leaf.requires_grad and not leaf.is_coalesced():
            raise ValueError(
                f"{path()} requires a gradient and is not coalesced: coalesce it first"
            )
        return leaf.values() if leaf.is_coalesced() else leaf._values()
    return _values(leaf)


def _limit(name: str, value: Any) -> Any:
    """A limit, checked if it is a number; a tensor is checked when its value is there."""
    if not isinstance(value, Tensor) and value is not None:
        return check_clip_norm(value) if name == "clip_norm" else float(check_use_norm(value))
    return value


class _Clip(torch.autograd.Function):
    """(call, clip_norm, use_norm, *values) to (norm, norm in float64, *new values)."""

    @staticmethod
    def forward(call: _Call, clip_norm: Any, use_norm: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return call.clip(clip_norm, use_norm, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, clip_norm, use_norm, *values = inputs
        ctx.limits = [None if isinstance(x, Tensor) else x for x in (clip_norm, use_norm)]
        tensors = [x if isinstance(x, Tensor) else None for x in (clip_norm, use_norm)]
        ctx.norm_dtype = output[0].dtype
        ctx.save_for_backward(output[1], *tensors, *values)
        ctx.save_for_forward(output[1], *tensors, *values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def _parts(ctx: Any) -> tuple[Any, ...]:
        norm, limit, given, *values = ctx.saved_tensors
        is_given = given is not None or ctx.limits[1] is not None
        norm = norm if given is None else given
        if limit is None:
            limit = torch.full_like(norm, ctx.limits[0], dtype=torch.float64)
        return slope(norm, limit, ctx.call.on_nonfinite), is_given, values

    @staticmethod
    def backward(ctx: Any, d_norm: Any, d_wide: Any, *d_values: Any) -> tuple[Any, ...]:
        at, given, values = _Clip._parts(ctx)
        new, d_limit, d_given = pulled_back(
            values, ctx.call.rows, at, given=given, d_norms=[d_norm, d_wide], d_values=d_values
        )
        limits = [d_limit, d_given if given else None]
        wanted = ctx.needs_input_grad[1:3]
        d_limits = [
            None if not want or each is None else each.to(saved.dtype)
            for each, want, saved in zip(limits, wanted, ctx.saved_tensors[1:3], strict=True)
        ]
        return (None, *d_limits, *new)

    @staticmethod
    def jvp(ctx: Any, _: Any, d_limit: Any, d_given: Any, *d_values: Any) -> tuple[Any, ...]:
        at, given, values = _Clip._parts(ctx)
        d_norm, new = pushed_forward(
            values,
            ctx.call.rows,
            at,
            d_limit=d_limit,
            d_given=d_given,
            given=given,
            d_values=d_values,
        )
        return (d_norm.to(ctx.norm_dtype), d_norm, *new)

    @staticmethod
    def vmap(info: Any, in_dims: Any, call: _Call, *inputs: Any) -> tuple[Any, Any]:
        """One after the other: each has a norm of its own."""
        outputs = [
            _Clip.apply(
                call,
                *(
                    x if dim is None else x.select(dim, place)
                    for x, dim in zip(inputs, in_dims[1:], strict=True)
                ),
            )
            for place in range(info.batch_size)
        ]
        stacked = tuple(map(torch.stack, zip(*outputs, strict=True)))
        return stacked, (0,) * len(stacked)
