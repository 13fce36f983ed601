"""Fixtures: backends and their variants, kernels, threads, frameworks that may be absent."""

from __future__ import annotations

import functools
import gc
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from scipy import sparse

import gradclip
from cases import Case, lay_out
from gradclip.cli import _pieces as pieces_of_files
from gradclip.core.rooms import backend_names
from gradclip.core.versions import is_below, too_old
from gradclip.kernels import cpu
from gradclip.kernels.cpu import threads as team
from gradclip.kernels.gpu.launch import TRITON
from machines import KERNELS, THREADS, machine
from toyarrays import Array

# Before the first look at the rooms: one of a framework that is in no package of ours.
gradclip.__path__.append(str(Path(__file__).parent / "rooms"))

FRAMEWORKS = {
    "numpy": "numpy",
    "scipy": "scipy",
    "ml_dtypes": "ml_dtypes",
    "torch": "torch",
    "tensorflow": "tensorflow-cpu",
    "keras": "keras",
    "tensorboard": "tensorboard",
    "sklearn": "scikit-learn",
    "jax": "jax",
    "optax": "optax",
    "cupy": "cupy-cuda13x",
    "triton": "triton",
    "equinox": "equinox",
    "flax": "flax",
    "orbax": "orbax-checkpoint",
    "mpi4py": "mpi4py",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "transformers": "transformers",
}
REQUIRE_ALL = os.environ.get("GRADCLIP_REQUIRE_ALL") == "1"


# The kernels for GPUs run in Triton's interpreter, on the memory of the CPU. With a GPU and
# TRITON_INTERPRET=0 those of CuPy's tests run there. To be said before Triton is loaded.
os.environ.setdefault("TRITON_INTERPRET", "1")


def some_quick(some: list[Any], rest: list[Any]) -> list[Any]:
    """Parameters of which `make test-quick` takes some."""
    return [*some, *(pytest.param(each, marks=pytest.mark.slow) for each in rest)]


# ---- frameworks ----


def version(name: str) -> str | None:
    """The version of a framework, None where it is not installed."""
    for distribution in (FRAMEWORKS[name], name):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def lacks(*names: str) -> str | None:
    """Why frameworks are not tested: one is not installed, or too old; None where all are."""
    for name in names:
        found = version(name)
        if found is None:
            return f"{name} is not installed"
        if name == "triton" and too_old(TRITON, found):
            return too_old(TRITON, found)
    return None


def since_torch(lowest: str, why: str) -> pytest.MarkDecorator:
    """Skips what older versions of PyTorch do not do."""
    is_old = is_below(lowest, version("torch") or lowest)
    return pytest.mark.skipif(is_old, reason=f"before PyTorch {lowest} {why}")


# What ranks do, and cannot without a GPU before PyTorch 2.7.
NEEDS_2_7 = "fully_shard, and DTensors of bfloat16 and complex numbers"
IS_OLD = is_below("2.7", version("torch") or "2.7")
ENGINES = [] if IS_OLD else ["engines"]
MORE_DTYPES = [] if IS_OLD else ["splits_of_more_dtypes"]


def pytest_collectstart() -> None:
    """Load PyTorch and Triton before TensorFlow: the other way round they do not load.

    Not when this file is read, as the process that only hands tests to others does too. And look
    for no garbage while frameworks are imported, which is half of the time that takes.
    """
    gc.disable()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "triton"):
            if version(name) is not None:
                importlib.import_module(name)


def pytest_collection_finish() -> None:
    """Look for garbage among what tests make alone, not in the frameworks' millions of objects."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter tear down what frameworks consist of; some count what is left at exit."""
    gc.unfreeze()


def pytest_report_header() -> list[str]:
    found = [f"{name} {version(name) or 'absent: its tests are skipped'}" for name in FRAMEWORKS]
    return [
        (
            f"gradclip {gradclip.__version__} on {sys.platform}, kernels: {', '.join(KERNELS)}; "
            f"in use: {cpu.kernel()}, {team.number()} threads"
        ),
        f"frameworks: {', '.join(found)}",
        *([f"PyTorch is older than 2.7: {NEEDS_2_7} are left out"] * IS_OLD),
    ]


def pytest_configure() -> None:
    """An absent framework or kernel is an error where all of them are demanded."""
    missing = [name for name in FRAMEWORKS if version(name) is None]
    if cpu._cpu is None:
        missing.append("the C kernel")
    if REQUIRE_ALL and missing:
        raise pytest.UsageError(f"GRADCLIP_REQUIRE_ALL=1, but absent: {', '.join(missing)}")


# Their tests are each a process or several that take long: begun last, one would be waited for.
FIRST = ("test_keras.py", "test_cli_bench.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in FIRST)


@pytest.fixture(params=[300, pytest.param(2000, marks=pytest.mark.long)], ids="{} lists".format)
def lists(request: pytest.FixtureRequest) -> int:
    """How many random lists to draw; the few are the first of the many."""
    return int(request.param)


@pytest.fixture
def framework() -> Callable[[str], Any]:
    """Import a framework, or skip the test."""

    def load(name: str) -> Any:
        if version(name) is None:
            pytest.skip(f"{name} is not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)

    return load


# ---- backends ----


class Adapter(NamedTuple):
    """How tests make leaves of a backend from NumPy arrays, and read them back."""

    make: Callable[[np.ndarray[Any, Any]], Any]
    read: Callable[[Any], np.ndarray[Any, Any]]
    writable: bool = True
    clip: Callable[..., Any] = gradclip.clip_by_global_norm
    new_type: Callable[[Any], type] = type  # of what comes back for a leaf
    norm: Callable[[Any], np.floating[Any]] = np.float32  # as a NumPy scalar


def _slices(values: np.ndarray[Any, Any]) -> gradclip.IndexedSlices:
    return gradclip.IndexedSlices(values.copy(), np.arange(len(values))[::-1].copy())


def _numpy_layout(layout: str) -> Adapter:
    make = functools.partial(lay_out, layout=layout)
    return Adapter(make, np.asarray, writable=layout not in ("readonly", "broadcast"))


def _tensorflow() -> Any:
    return importlib.import_module("tensorflow")


def _tensor(values: np.ndarray[Any, Any]) -> Any:
    return _tensorflow().constant(values)


def _tensor_slices(values: np.ndarray[Any, Any]) -> Any:
    tf = _tensorflow()
    return tf.IndexedSlices(tf.constant(values), tf.range(len(values))[::-1])


@functools.cache
def _in_a_graph(jit_compile: bool, on_nonfinite: str) -> Any:
    tf = _tensorflow()
    clip = functools.partial(gradclip.clip_by_global_norm, on_nonfinite=on_nonfinite)
    return tf.function(clip, jit_compile=jit_compile, autograph=False)


def _graph(jit_compile: bool) -> Callable[..., Any]:
    def clip(leaves: list[Any], clip_norm: float, on_nonfinite: str = "nan") -> Any:
        limit = _tensorflow().constant(clip_norm, "float64")
        return _in_a_graph(jit_compile, on_nonfinite)(leaves, limit)

    return clip


def _tensor_values(leaf: Any) -> np.ndarray[Any, Any]:
    return np.asarray(getattr(leaf, "values", leaf).numpy())


def _type_of_a_tensor(_: Any) -> type:
    return type(_tensor(np.float32(0)))


def _torch() -> Any:
    return importlib.import_module("torch")


def _torch_tensor(values: np.ndarray[Any, Any]) -> Any:
    """A new tensor: of the dtypes of ml_dtypes by their codes."""
    torch = _torch()
    if values.dtype.type.__module__.partition(".")[0] != "ml_dtypes":
        return torch.from_numpy(np.array(values, values.dtype.newbyteorder("="), order="K"))
    code = np.int16 if values.itemsize == 2 else np.uint8
    codes = torch.from_numpy(np.array(values).view(code))
    if not hasattr(torch, values.dtype.name):
        pytest.skip(f"PyTorch has no {values.dtype.name}")
    return codes.view(getattr(torch, values.dtype.name))


def _torch_read(leaf: Any) -> np.ndarray[Any, Any]:
    torch = _torch()
    leaf = getattr(leaf, "values", leaf) if isinstance(leaf, gradclip.IndexedSlices) else leaf
    if leaf.layout is not torch.strided:
        leaf = leaf.to_dense()
    leaf = leaf.detach().resolve_conj().resolve_neg()
    name = str(leaf.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        codes = leaf.contiguous().view(torch.int16 if leaf.itemsize == 2 else torch.uint8)
        return np.asarray(codes.numpy()).view(np.dtype(name))
    return np.asarray(leaf.numpy())


def _torch_strided(values: np.ndarray[Any, Any]) -> Any:
    tensor = _torch_tensor(values)
    wide = tensor.new_zeros((*tensor.shape, 2))
    wide[..., 1] = tensor
    return wide[..., 1]


def _torch_recorded(*args: Any, **options: Any) -> Any:
    clipped, norm = gradclip.clip_by_global_norm(*args, **options)
    assert norm.requires_grad
    return clipped, norm.detach()


def _torch_elsewhere(*args: Any, **options: Any) -> Any:
    """As on a device that the host's kernels do not reach."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("gradclip.torch.backend.on_host", lambda _: False)
        patched.setattr("gradclip.torch.pointers.taken", lambda *_, **__: None)
        return gradclip.clip_by_global_norm(*args, **options)


def _torch_triton(*args: Any, **options: Any) -> Any:
    if reason := lacks("triton"):
        pytest.skip(reason)
    with importlib.import_module("host_torch").torch_there():
        return gradclip.clip_by_global_norm(*args, **options)


def _torch_slices(values: np.ndarray[Any, Any]) -> Any:
    tensor = _torch_tensor(values)
    return gradclip.IndexedSlices(tensor, _torch().arange(len(tensor)).flip(0))


def _torch_coo(values: np.ndarray[Any, Any]) -> Any:
    tensor = _torch_tensor(values)
    rows = _torch().arange(len(tensor))[None]
    return _torch().sparse_coo_tensor(rows, tensor, tensor.shape, check_invariants=False)


def _jax() -> Any:
    return importlib.import_module("jax")


def _jax_array(values: np.ndarray[Any, Any]) -> Any:
    jax = _jax()
    with jax.enable_x64(True):
        return jax.numpy.array(values)


def _jax_slices(values: np.ndarray[Any, Any]) -> Any:
    rows = _jax().numpy.arange(len(values))[::-1]
    return gradclip.IndexedSlices(_jax_array(values), rows)


def _jax_bcoo(values: np.ndarray[Any, Any]) -> Any:
    rows = _jax().numpy.arange(len(values))[:, None]
    sparse_of_jax = importlib.import_module("jax.experimental.sparse")
    return sparse_of_jax.BCOO((_jax_array(values), rows), shape=values.shape)


def _jax_read(leaf: Any) -> np.ndarray[Any, Any]:
    if isinstance(leaf, gradclip.IndexedSlices):
        leaf = leaf.values
    return np.asarray(getattr(leaf, "data", leaf) if hasattr(leaf, "nse") else leaf)


@functools.cache
def _jitted(on_nonfinite: str) -> Any:
    clip = functools.partial(gradclip.clip_by_global_norm, on_nonfinite=on_nonfinite)
    return _jax().jit(clip)


def _jax_jit(leaves: list[Any], clip_norm: float, on_nonfinite: str = "nan") -> Any:
    with _jax().enable_x64(True):
        return _jitted(on_nonfinite)(leaves, clip_norm)


def _host_cupy() -> Any:
    return importlib.import_module("host_cupy")


def _cupy_strided(values: np.ndarray[Any, Any]) -> Any:
    room = np.zeros((*values.shape, 2), values.dtype)
    room[..., 1] = values
    return _host_cupy().make(room)[..., 1]


def _cupy_slices(values: np.ndarray[Any, Any]) -> Any:
    rows = np.arange(len(values))[::-1].copy()
    return gradclip.IndexedSlices(_host_cupy().make(values), _host_cupy().make(rows))


def _cupy_read(leaf: Any) -> np.ndarray[Any, Any]:
    leaf = leaf.values if isinstance(leaf, gradclip.IndexedSlices) else leaf
    return np.asarray(_host_cupy().read(leaf))


def _cupy_adapter(make: Callable[[np.ndarray[Any, Any]], Any]) -> Adapter:
    return Adapter(make, _cupy_read, norm=lambda norm: _cupy_read(norm)[()])


def _toy(values: np.ndarray[Any, Any]) -> Any:
    return Array(bytearray(values.tobytes()), values.dtype.name, values.shape)


def _toy_read(leaf: Any) -> np.ndarray[Any, Any]:
    return np.frombuffer(leaf.memory, leaf.dtype).reshape(leaf.shape)


ADAPTERS: dict[str, dict[str, Adapter]] = {
    "toyarrays": {"toyarrays": Adapter(_toy, _toy_read, norm=lambda norm: _toy_read(norm)[()])},
    "cupy": {
        "cupy": _cupy_adapter(lambda values: _host_cupy().make(values)),
        "cupy:strided": _cupy_adapter(_cupy_strided),
        "cupy:slices": _cupy_adapter(_cupy_slices),
    },
    "jax": {
        "jax": Adapter(_jax_array, _jax_read, False),
        "jax:slices": Adapter(_jax_slices, _jax_read, False),
        "jax:bcoo": Adapter(_jax_bcoo, _jax_read, False),
        "jax:jit": Adapter(_jax_array, _jax_read, False, _jax_jit),
        "jax:jit-slices": Adapter(_jax_slices, _jax_read, False, _jax_jit),
        "jax:jit-bcoo": Adapter(_jax_bcoo, _jax_read, False, _jax_jit),
    },
    "torch": {
        "torch": Adapter(_torch_tensor, _torch_read),
        "torch:parameter": Adapter(
            lambda values: _torch().nn.Parameter(_torch_tensor(values), requires_grad=False),
            _torch_read,
            new_type=lambda _: _torch().Tensor,
        ),
        "torch:strided": Adapter(_torch_strided, _torch_read),
        "torch:autograd": Adapter(
            lambda values: _torch_tensor(values).requires_grad_(),
            _torch_read,
            writable=False,
            clip=_torch_recorded,
        ),
        "torch:slices": Adapter(_torch_slices, _torch_read),
        "torch:coo": Adapter(_torch_coo, _torch_read),
        "torch:elsewhere": Adapter(_torch_tensor, _torch_read, clip=_torch_elsewhere),
        "torch:triton": Adapter(_torch_tensor, _torch_read, clip=_torch_triton),
    },
    "tensorflow": {
        "tensorflow": Adapter(_tensor, _tensor_values, writable=False),
        "tensorflow:variable": Adapter(
            lambda values: _tensorflow().Variable(values),
            _tensor_values,
            new_type=_type_of_a_tensor,
        ),
        "tensorflow:slices": Adapter(_tensor_slices, _tensor_values, writable=False),
        "tensorflow:graph": Adapter(_tensor, _tensor_values, False, _graph(jit_compile=False)),
        "tensorflow:graph-slices": Adapter(
            _tensor_slices, _tensor_values, False, _graph(jit_compile=False)
        ),
        "tensorflow:xla": Adapter(_tensor, _tensor_values, False, _graph(jit_compile=True)),
        "tensorflow:xla-slices": Adapter(
            _tensor_slices, _tensor_values, False, _graph(jit_compile=True)
        ),
    },
    "numpy": {
        "numpy": _numpy_layout("contiguous"),
        "numpy:readonly": _numpy_layout("readonly"),
        "numpy:strided": _numpy_layout("strided"),
        "numpy:reversed": _numpy_layout("reversed"),
        "numpy:bigendian": _numpy_layout("bigendian"),
        "numpy:fortran": _numpy_layout("fortran"),
        "numpy:unaligned": _numpy_layout("unaligned"),
        "numpy:slices": Adapter(_slices, lambda leaf: leaf.values),
        "numpy:scipy": Adapter(sparse.coo_array, lambda leaf: leaf.toarray()),
    },
}


# Of a framework's variants one for each way that is taken is quick; XLA takes seconds to compile.
QUICK = {"cupy", "jax", "jax:jit", "tensorflow", "tensorflow:graph", "toyarrays"}
QUICK |= {"torch", "torch:autograd", "torch:elsewhere", *ADAPTERS["numpy"]}
MARKS = {
    **{
        name: pytest.mark.slow
        for all_of in ADAPTERS.values()
        for name in all_of
        if name not in QUICK
    },
    "tensorflow:xla-slices": pytest.mark.long,
}


def variants() -> list[Any]:
    """Every variant of every room; one without an adapter is one that fails."""
    names = [variant for name in backend_names() for variant in ADAPTERS.get(name, [name])]
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


@pytest.fixture
def on_cupy(framework: Callable[[str], Any]) -> Iterator[Any]:
    """Arrays of CuPy: on the device, or where there is none over this machine's memory.

    What is replaced there is said in `host_cupy.no_driver`.
    """
    framework("cupy")
    if reason := lacks("triton"):
        pytest.skip(reason)
    host_cupy = _host_cupy()
    if host_cupy.HAS_DEVICE:
        yield host_cupy
    elif not host_cupy.IS_INTERPRETED:
        pytest.skip("there is no device, and the kernels were loaded without TRITON_INTERPRET=1")
    else:
        with host_cupy.no_driver():
            yield host_cupy


@pytest.fixture(params=variants())
def xp(request: pytest.FixtureRequest) -> Adapter:
    backend = request.param.partition(":")[0]
    if backend not in ADAPTERS:
        pytest.fail(f"{backend}/backend.py has no adapter in {Path(__file__).name}")
    if backend in FRAMEWORKS and version(backend) is None:
        pytest.skip(f"{backend} is not installed")
    if backend == "cupy":
        request.getfixturevalue("on_cupy")
    return ADAPTERS[backend][request.param]


# ---- kernels and threads ----


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each kernel that this processor has, and the fallback in NumPy."""
    with machine(request.param):
        yield request.param


@pytest.fixture(params=THREADS, ids="{} threads".format)
def threads(request: pytest.FixtureRequest, kernel: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """One thread and two, on each kernel."""
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", str(request.param))
    assert cpu.kernel() == kernel
    return int(request.param)


# ---- cases ----


def simple(*values: Any, clip_norm: float = 1.0, **options: Any) -> Case:
    """A case of contiguous arrays."""
    arrays = [np.asarray(array) for array in values]
    return Case(arrays, ["contiguous"] * len(arrays), clip_norm, **options)


# ---- files ----


@pytest.fixture(params=[pieces_of_files.PIECE, 64], ids="pieces of {}".format)
def _pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces_of_files, "PIECE", request.param)
