"""What a pickle of PyTorch's holds, read without PyTorch and without running anything.

A name in such a pickle stands for one of the few inert functions below, or is refused: nothing is
imported, and no object's own code is called. So PyTorch's own reader does with ``weights_only``.
Storages stay where they are; of tensors the pickle says where in one they lie.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

_STORAGES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
}
_MOST_AXES = 64  # of an array of NumPy
_ITEMSIZES = {"bool": 1, "bytes": 1, "complex32": 4}


class Dtype(str):
    """The name of a dtype."""

    __slots__ = ()

    @property
    def itemsize(self) -> int:
        """Bytes of an element: as many as its name says, in those that hold several too."""
        bits = re.fullmatch(r"[a-z]*?(?:float|int|complex|bits)(\d+).*", self)
        if self in _ITEMSIZES or bits is None:
            return _ITEMSIZES.get(self, 1)
        return max(1, int(bits[1]) // 8)


class Storage(NamedTuple):
    """Bytes that tensors lie in."""

    key: str
    dtype: Dtype
    nbytes: int


class Strided(NamedTuple):
    """A tensor that lies in a storage; offset and strides count elements."""

    storage: Storage
    dtype: Dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Other(NamedTuple):
    """A tensor of a kind that gradclip does not read."""

    kind: str
    shape: tuple[int, ...]


Found = Strided | Other


class Unpickled(NamedTuple):
    """The object in a pickle, each tensor as `Strided` or `Other`, and the storages it names."""

    held: Any
    storages: dict[str, Storage]


def unpickled(stream: IO[bytes]) -> Unpickled:
    """What the next pickle of a stream holds.

    Raises:
        Exception: it holds anything but tensors, numbers, text and containers, or is damaged.
    """
    reader = _Inert(stream)
    try:
        return Unpickled(reader.load(), reader.storages)
    except _RefusedError:
        raise
    except Exception as error:
        raise ValueError(f"has a damaged pickle ({type(error).__name__}: {error})") from None


def tensors_in(
    held: Any, name: str = "", around: tuple[int, ...] = ()
) -> Iterator[tuple[str, Found]]:
    """Each tensor in nested dicts and lists, under the keys that lead to it, joined by dots.

    Raises:
        ValueError: a container holds itself.
    """
    if isinstance(held, Strided | Other):
        yield name, held
    elif isinstance(held, Storage):
        count = held.nbytes // held.dtype.itemsize
        yield name, Strided(held, held.dtype, 0, (count,), (1,))
    elif isinstance(held, dict | list | tuple):
        if id(held) in around:
            raise ValueError(f"has a container that holds itself at {name!r}")
        items = held.items() if isinstance(held, dict) else enumerate(held)
        for key, item in items:
            yield from tensors_in(item, f"{name}.{key}" if name else f"{key}", (*around, id(held)))


class _RefusedError(ValueError):
    """A pickle that holds what is not loaded."""


# ---- what names in a pickle stand for ----


class _Mark(str):
    """A name that stands for itself: of a class of storages, of tensors, of a layout."""

    __slots__ = ()


def _rebuilt(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: Any = None,
    _hooks: Any = None,
    metadata: Any = None,
) -> Found:
    return _placed(storage, storage.dtype, offset, shape, strides, metadata)


def _rebuilt_as(
    storage: Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    _requires_grad: Any,
    _hooks: Any,
    dtype: Dtype,
    metadata: Any = None,
) -> Found:
    return _placed(storage, dtype, offset, shape, strides, metadata)


def _placed(
    storage: Storage, dtype: Dtype, offset: int, shape: Any, strides: Any, metadata: Any
) -> Found:
    if not isinstance(storage, Storage) or not isinstance(dtype, Dtype):
        raise _RefusedError("has a tensor without a storage or dtype")
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _RefusedError(f"has a tensor of shape {shape}, strides {strides}, offset {offset}")
    if len(shape) > _MOST_AXES or math.prod(shape) * dtype.itemsize >= 2**63:
        raise _RefusedError(f"has a tensor of shape {shape}, which no array can have")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    if 0 not in shape and (last + 1) * dtype.itemsize > storage.nbytes:
        raise _RefusedError(f"has a tensor that ends beyond its storage {storage.key}")
    if metadata:
        return Other(f"lazily changed {dtype}", tuple(shape))
    return Strided(storage, dtype, offset, tuple(shape), tuple(strides))


def _other(kind: str, shape: Any) -> Other:
    return Other(kind, tuple(shape) if isinstance(shape, tuple | list) else ())


def _parameter(data: Any, *_state: Any) -> Any:
    return data


def _from_type(function: Any, _type: Any, arguments: Any, _state: Any = None) -> Any:
    return function(*arguments)


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": dict,
    "collections.Counter": dict,
    "builtins.set": list,
    "builtins.complex": complex,
    "builtins.bytearray": _parameter,
    "_codecs.encode": _parameter,
    "torch.Size": tuple,
    "torch.device": _Mark,
    "torch.serialization._get_layout": _Mark,
    "torch._utils._rebuild_tensor": _rebuilt,
    "torch._utils._rebuild_tensor_v2": _rebuilt,
    "torch._utils._rebuild_tensor_v3": _rebuilt_as,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch._utils._rebuild_sparse_tensor": lambda layout, data: _other(
        f"{layout}".removeprefix("torch."), data[-1] if layout != "torch.sparse_coo" else data[2]
    ),
    "torch._utils._rebuild_qtensor": lambda storage, _offset, shape, *_rest: _other(
        storage.dtype, shape
    ),
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, shape, *_rest: _other(
        f"meta {dtype}", shape
    ),
}
_MARKS = re.compile(
    r"torch\.(?:cuda\.)?\w+Storage|torch\.storage\.(?:Untyped|Typed)Storage|torch\.Tensor"
    r"|torch\.nn\.parameter\.Parameter|torch\.per_\w+"
)
_DTYPE = re.compile(r"torch\.((?:b?float|complex|q?u?int|bits)\d+\w*|bool)")


def _refuse(_unpickler: Any) -> None:
    raise _RefusedError("holds pickled Python objects, which gradclip does not load")


# Of the two readers of the standard library that of Python: the other takes as much memory as a
# damaged index of its memo says.
_Reader: Any = vars(pickle)["_Unpickler"]


class _Inert(_Reader):  # type: ignore[misc]
    """A reader of pickles that makes containers, text, numbers and `Found`, and nothing else."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream, encoding="utf-8")  # as PyTorch reads what Python 2 has written
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name stands for."""
        full = f"{module}.{name}".replace("__builtin__.", "builtins.")
        if full in _FUNCTIONS:
            return _FUNCTIONS[full]
        if dtype := _DTYPE.fullmatch(full):
            return Dtype(dtype[1])
        if _MARKS.fullmatch(full):
            return _Mark(name)
        raise _RefusedError(
            f"holds {full}, which is no tensor, number, text or container of them, and gradclip "
            "loads no other Python objects; save the tensors alone, as model.state_dict() has them"
        )

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a pickle names."""
        kind, of, key, _location, count, *view = pid
        if kind != "storage" or type(count) is not int or count < 0 or any(view):
            raise _RefusedError("has a storage of an unknown kind")
        dtype = Dtype(_STORAGES.get(str(of).removesuffix("Storage"), "bytes"))
        storage = Storage(str(key), dtype, count * dtype.itemsize)
        if self.storages.setdefault(storage.key, storage) != storage:
            raise _RefusedError(f"has two storages {storage.key}")
        return storage

    def set_state(self) -> None:
        """Drop the state of an object, which says nothing of its tensors."""
        self.stack.pop()

    dispatch = {  # noqa: RUF012  (as the standard library has it)
        **_Reader.dispatch,
        pickle.BUILD[0]: set_state,
        **{
            code[0]: _refuse
            for code in (
                pickle.INST,
                pickle.OBJ,
                pickle.NEWOBJ,
                pickle.NEWOBJ_EX,
                pickle.EXT1,
                pickle.EXT2,
                pickle.EXT4,
                pickle.PERSID,
                pickle.BYTEARRAY8,
                pickle.NEXT_BUFFER,
            )
        },
    }
