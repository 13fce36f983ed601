"""The kernels for GPUs, in Triton's interpreter: the same source, on the memory of the CPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import gradclip
import oracle
from cases import DTYPES, Case, constants_on_boundaries, exact_ties, near_midpoints, random_case
from compare import assert_leaves, assert_norm, assert_raises, assert_untouched, expected_of
from conftest import _torch_read, _torch_tensor, lacks, some_quick
from host import run_python

if reason := lacks("torch", "triton"):
    pytest.skip(reason, allow_module_level=True)
if os.environ["TRITON_INTERPRET"] == "0":
    pytest.skip("the kernels are to run on a device", allow_module_level=True)
import torch

import gradclip.torch as gtorch
from gradclip.core import exact
from gradclip.kernels.gpu import runs as gpu_runs
from gradclip.kernels.gpu import triton as cuda
from gradclip.numpy import backend as numpy_backend
from gradclip.torch import backend, devices, gpu, pointers
from gradclip.torch.books import There
from host_torch import Counted, HostMemory, Moving, mutated, refuse_to_wait, torch_there

NAMES = ["float16", "bfloat16", "float32", "complex64", "float64", "complex128"]
NARROW = [DTYPES[name] for name in NAMES[:4]]
ALL = [DTYPES[name] for name in NAMES]


@pytest.fixture(autouse=True)
def _there() -> Iterator[None]:
    gpu_runs._scratch.clear()  # what tests of CuPy have left on the same host
    with torch_there():
        yield
    for scratch in gpu_runs._scratch.values():
        assert not scratch[:1].any(), "the ticket of the next call"
        assert not scratch[8:160].any(), "the total of the next call"


def tensors_of(case: Case) -> list[Any]:
    return [_torch_tensor(values) for values in case.values]


def check(case: Case) -> None:
    """Clip in place and not; hold every bit against the oracle."""
    check_in_place(case)
    leaves = tensors_of(case)
    check_clip(case, leaves, gradclip.clip_by_global_norm)
    assert_untouched(list(map(_torch_read, leaves)), case.values)


def check_in_place(case: Case) -> None:
    def clip(leaves: Any, *limits: Any, **options: Any) -> Any:
        return leaves, gradclip.clip_by_global_norm_(leaves, *limits, **options)

    leaves = tensors_of(case)
    if not check_clip(case, leaves, clip):
        assert_untouched(list(map(_torch_read, leaves)), case.values)


def check_clip(case: Case, leaves: list[Any], clip: Callable[..., Any]) -> bool:
    """What a clip returns; False where it had to raise."""
    expected = expected_of(case)
    options: Any = {"use_norm": case.use_norm, "on_nonfinite": case.on_nonfinite}
    if expected.leaves is None:
        assert_raises(clip, leaves, case.clip_norm, **options)
        return False
    new, norm = clip(leaves, case.clip_norm, **options)
    assert_norm(scalar(norm), expected.norm)
    assert_leaves(list(map(_torch_read, new)), expected)
    return True


def scalar(norm: Any) -> Any:
    """As a NumPy scalar; a list without tensors is NumPy's, or on the host."""
    return norm if isinstance(norm, np.generic) else norm.numpy()[()]


def norm_of(leaves: list[Any]) -> Any:
    return scalar(gradclip.global_norm(leaves))


# ---- bits ----


def random_cases(seed: int, count: int) -> Iterator[Case]:
    """Lists of all dtypes in turn, without float64, and long ones."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        case = random_case(rng, NARROW if number % 2 else ALL)
        yield case._replace(values=[np.array(values) for values in case.values])


@pytest.mark.parametrize(
    ("seed", "count"),
    [
        pytest.param(0, 20, marks=pytest.mark.slow),
        *(pytest.param(seed, 100, marks=pytest.mark.long) for seed in range(5)),
    ],
)
def test_many_random_lists(seed: int, count: int) -> None:
    for case in random_cases(seed, count):
        check_in_place(case)


@pytest.mark.slow
def test_random_lists() -> None:
    for case in random_cases(9, 10):
        check(case)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "float32",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("float64", "float16", "bfloat16")
        ),
    ],
)
def test_norms_between_two_numbers(name: str) -> None:
    """The certificate fails: one program adds up exactly."""
    rng = np.random.default_rng(3)
    lists = [
        *near_midpoints(rng, DTYPES[name], 4),
        *list(constants_on_boundaries(DTYPES[name]))[::5],
    ]
    if name in ("float32", "float64"):
        lists += exact_ties(rng, DTYPES[name], 5)
    for leaves in lists:
        assert_norm(norm_of([_torch_tensor(each) for each in leaves]), oracle.norm(leaves)[1])


def wide_values(name: str, size: int, *, binades: float = 0) -> Any:
    """Numbers that spread over so many binades."""
    rng = np.random.default_rng(size)
    values = rng.standard_normal(size) * 2.0 ** rng.uniform(-binades, 0, size)
    return (values * 2.0**10).astype(DTYPES[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "float32",
        "float64",
        *(pytest.param(name, marks=pytest.mark.long) for name in ("float16", "bfloat16")),
    ],
)
@pytest.mark.parametrize(
    "binades", [200, *(pytest.param(binades, marks=pytest.mark.long) for binades in (0, 20))]
)
def test_long_leaves_of_many_tiles_and_chunks(name: str, binades: int) -> None:
    leaves = [
        wide_values(name, size, binades=binades) for size in (3 * cuda.TILE + 77, cuda.TILE, 5, 0)
    ]
    check(Case(leaves, ["contiguous"] * len(leaves), 2.0, on_nonfinite="keep"))


@pytest.mark.parametrize("name", some_quick(["bfloat16"], ["float32", "float64"]))
@pytest.mark.parametrize("offset", [1, 3])
def test_leaves_that_begin_anywhere(name: str, offset: int) -> None:
    values = wide_values(name, 2 * cuda.TILE + 9)
    room = _torch_tensor(np.concatenate([values[:offset], values]))
    leaf = room[offset:]
    expected = expected_of(Case([values], ["contiguous"], 2.0))
    assert_norm(scalar(gradclip.clip_by_global_norm_([leaf], 2.0)), expected.norm)
    assert_leaves([_torch_read(leaf)], expected)
    assert_untouched([_torch_read(room[:offset])], [values[:offset]])


def test_layouts_without_gaps_are_taken_as_they_lie() -> None:
    dense = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).transpose(0, 3)
    assert isinstance(backend.hold([dense], str, writable=True), gpu.Leaves)
    values = dense.numpy().copy()
    expected = expected_of(Case([values], ["contiguous"], 0.5))
    assert_norm(scalar(gradclip.clip_by_global_norm_([dense], 0.5)), expected.norm)
    assert_leaves([dense.numpy()], expected)


def test_what_has_gaps_goes_by_pytorchs_operations() -> None:
    with mock.patch.object(backend, "on_host", return_value=False):
        leaf = torch.randn(4, 6)[:, ::2]
        assert not isinstance(backend.hold([leaf], str, writable=True), gpu.Leaves)
        values = leaf.numpy().copy()
        expected = expected_of(Case([values], ["strided"], 0.5))
        assert_norm(scalar(gradclip.clip_by_global_norm_([leaf], 0.5)), expected.norm)
        assert_leaves([leaf.numpy()], expected)
        with pytest.raises(ValueError, match=r"t_list\[0\] has elements that share memory"):
            gradclip.clip_by_global_norm_([torch.ones(1).expand(3)], 0.5)


@pytest.mark.parametrize("tensors", [[], [None], [torch.zeros(0)], [torch.zeros(3)]])
def test_nothing_to_measure(tensors: list[Any]) -> None:
    assert norm_of(tensors) == 0
    assert gradclip.clip_by_global_norm_(tensors, 1.0) == 0


def test_a_tensor_listed_twice_counts_once_in_place() -> None:
    leaf = torch.tensor([3.0, 4.0])
    assert gradclip.clip_by_global_norm_([leaf, leaf], 2.5) == 5
    assert leaf.tolist() == [1.5, 2.0]
    assert gradclip.global_norm([leaf, leaf]) == torch.tensor(12.5).sqrt()


def test_by_pytorchs_methods_where_there_is_no_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(5, 7).T, torch.randn(3, dtype=torch.complex64), torch.zeros(0)]
    by_c = gpu._runs([*leaves, leaves[0]], str, writable=True)
    monkeypatch.setattr(pointers.cpu, "kernel", lambda: "numpy")
    by_python = gpu._runs([*leaves, leaves[0]], str, writable=True)
    rows = [np.frombuffer(runs.spans, np.int64).reshape(-1, 3) for runs in (by_c, by_python)]
    rows = [{tuple(row) for row in each.tolist() if row[1]} for each in rows]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert gpu._runs([torch.ones(4)[::2]], str, writable=False) is None


@pytest.mark.parametrize(
    "bits", some_quick([0x7FFFFFFF], [0x7FC00000, 0xFFFFFFFF, 0x7F800001]), ids=hex
)
def test_a_nan_of_any_bits_is_counted(bits: int) -> None:
    """0x7FFFFFFF is what NVIDIA's GPUs make."""
    nan = torch.from_numpy(np.full(3, bits, np.uint32).view(np.float32))
    assert math.isnan(gradclip.global_norm([nan]))
    assert math.isnan(gradclip.global_norm([nan, torch.ones(1, dtype=torch.float64)]))
    held = backend.hold([nan], str, writable=False)
    assert held.sum_of_squares()[-2:].tolist() == [0, 3]
    all_ones = torch.full((3,), -1, dtype=torch.int64).view(torch.float64)
    assert math.isnan(gradclip.global_norm([all_ones]))


# ---- what a call costs ----


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> type[Counted]:
    monkeypatch.setattr(gpu, "Memory", Counted)
    Counted.launched.clear()
    Counted.sent_rows.clear()
    gpu_runs._tables.clear()
    return Counted


def test_two_launches_and_one_table_for_as_long_as_the_pointers_stay(
    counted: type[Counted],
) -> None:
    leaves = [torch.randn(n % 7 + 1) for n in range(50)]
    for _ in range(3):
        gradclip.clip_by_global_norm_(leaves, 1.0)
    assert counted.launched == ["measure", "rewrite"] * 3
    assert counted.sent_rows == [50]
    leaves[7] = leaves[7].clone()
    gradclip.clip_by_global_norm_(leaves, 1.0)
    assert counted.sent_rows == [50, 50]
    gradclip.global_norm(leaves)
    assert counted.launched[8:] == ["measure"]


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_to_wait(monkeypatch)


@pytest.mark.usefixtures("_no_waiting")
def test_the_host_never_waits() -> None:
    leaves = [torch.ones(4), torch.ones(4, 3)]
    parameters = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf
    limit = torch.tensor(0.5)
    gradclip.clip_by_global_norm(leaves, limit)
    norm = gradclip.global_norm(leaves)
    gradclip.clip_by_global_norm_(leaves, 1.0, norm)
    gtorch.clip_grad_norm_(parameters, 1.0)
    norm = gtorch.get_total_norm(leaves)
    gtorch.clip_grads_with_norm_(parameters, limit, norm)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    clipper = gtorch.attach(optimizer, 0.25)
    optimizer.step()
    _ = clipper.norm, clipper.factor, clipper.steps, clipper.clipped_steps
    with pytest.raises(AssertionError, match="waits"):
        gradclip.clip_by_global_norm(leaves, 1.0, on_nonfinite="raise")
    with pytest.raises(AssertionError, match="waits"):
        gtorch.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)


@pytest.mark.slow
def test_with_nothing_to_clip_not_a_byte_is_written() -> None:
    """In memory that cannot be written."""
    program = """
import mmap, torch, gradclip
from host_torch import torch_there
room = mmap.mmap(-1, 1 << 16)
room.write(torch.ones(1 << 14).numpy().tobytes())
import ctypes
place = ctypes.addressof(ctypes.c_char.from_buffer(room))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(place), 1 << 16, mmap.PROT_READ) == 0
leaf = torch.frombuffer(room, dtype=torch.float32)
with torch_there():
    assert gradclip.clip_by_global_norm_([leaf], 128.0) == 128
    print("kept", flush=True)
    gradclip.clip_by_global_norm_([leaf], 127.0)
"""
    done = run_python(program)
    assert done.stdout.strip().endswith("kept")
    assert done.returncode < 0, "SIGSEGV where something is to be clipped"


def test_a_captured_call_replayed_gives_fresh_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is launched while capturing is only recorded, and run by each replay."""
    graph: list[Callable[[], Any]] = []

    class Capturing(HostMemory):
        is_capturing = property(lambda _: True)  # type: ignore[assignment]

        def zeros(self, words: int) -> Any:
            new = super().zeros(words)
            graph.append(new.zero_)
            return new

        def launch(self, kernel: Any, programs: int, args: Any, **constants: int) -> None:
            launch = super().launch
            graph.append(lambda: launch(kernel, programs, args, **constants))

    leaf = torch.tensor([0.0, 0.0])
    monkeypatch.setattr(gpu, "Memory", Capturing)
    norm = gradclip.clip_by_global_norm_([leaf], 2.5)
    monkeypatch.undo()
    for values, wanted in (([3.0, 4.0], 5.0), ([6.0, 8.0], 10.0), ([0.6, 0.8], 1.0)):
        leaf.copy_(torch.tensor(values))
        for each in graph:
            each()
        assert norm == wanted
        assert torch.equal(leaf, torch.tensor(values) * min(1.0, 2.5 / wanted))


# ---- chunks ----


@pytest.mark.parametrize("programs", [1, 7, 400])
def test_chunks_cover_every_element_once_and_long_ones_are_aligned(programs: int) -> None:
    rng = np.random.default_rng(programs)
    item = np.array([4, 8, 2, 2])
    spans, at = [], 1 << 40
    for length in (0, 1, 5, 4095, 4096, 4097, 70_000, 3_000_000, (1 << 31) + 5):
        kind = int(rng.integers(4))
        at += -at % 16 + int(rng.integers(9)) * int(item[kind])
        spans.append((at, length, kind))
        at += length * 8 + 64
    rows, leaf, size = gpu_runs.chunked(np.array(spans, np.int64), programs)
    assert size % cuda.TILE == 0
    assert rows[:, 1].max() <= size
    assert (rows[:, 1] > 0).all()
    long = rows[rows[:, 1] >= cuda.TILE]
    assert not (long[:, 0] % 16).any()
    for number, (at, length, kind) in enumerate(spans):
        within = (rows[:, 0] >= at) & (rows[:, 0] < at + max(length, 1) * item[kind])
        assert (leaf[within] == number).all()
        mine = rows[within]
        assert mine[:, 1].sum() == length
        mine = mine[mine[:, 0].argsort()]
        ends = mine[:, 0] + mine[:, 1] * item[kind]
        assert (ends[:-1] == mine[1:, 0]).all()
        assert (mine[:, 2] == kind).all()


# ---- PyTorch's door ----


def test_the_door_of_pytorch() -> None:
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    parameters = [torch.nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()
    versions = [parameter.grad._version for parameter in parameters]
    norm = gtorch.clip_grad_norm_(parameters, 2.5)
    assert norm == 5
    assert norm.dtype is torch.float32
    assert [p.grad.tolist() for p in parameters] == [[1.5, 0.0], [[2.0]]]
    assert all(p.grad._version > v for p, v in zip(parameters, versions, strict=True))
    gtorch.clip_grads_with_norm_(parameters, 1.0, torch.tensor(2.0, dtype=torch.float64))
    assert [p.grad.tolist() for p in parameters] == [[0.75, 0.0], [[1.0]]]
    assert gtorch.get_total_norm([g.double() for g in grads]).dtype is torch.float64


@pytest.mark.parametrize(
    ("values", "limit", "wanted"),
    [
        ([math.inf, 1.0], 2.0, [math.nan, 0.0]),
        ([math.nan, 1.0], 2.0, [math.nan, math.nan]),
        ([math.inf, 1.0], math.inf, [math.inf, 1.0]),
    ],
)
def test_what_is_not_finite_as_pytorch_has_it(values: Any, limit: float, wanted: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor(values)
    norm = gtorch.clip_grad_norm_([parameter], limit)
    assert math.isnan(norm) == math.isnan(values[0])
    assert str(parameter.grad.tolist()) == str(wanted)


def test_a_norm_that_must_be_finite() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([math.inf, 1.0])
    with pytest.raises(RuntimeError, match="is non-finite"):
        gtorch.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="is non-finite"):
        gtorch.get_total_norm([parameter.grad], error_if_nonfinite=True)
    text = "the global norm is inf: parameters[0].grad holds 0 NaN and 1 inf"
    with pytest.raises(FloatingPointError, match=f"^{re.escape(text)}$"):
        gtorch.clip_grad_norm_([parameter], 1.0, on_nonfinite="raise")
    assert parameter.grad.tolist() == [math.inf, 1.0]
    parameter = torch.nn.Parameter(torch.zeros(4))
    parameter.grad = torch.full((4,), 3e38)  # a norm that is only too large for float32
    norm = gtorch.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
    assert norm == math.inf
    assert parameter.grad.tolist() == [0.5] * 4


@pytest.mark.parametrize(
    ("given", "wanted"),
    [(10.0, 0.3), (-10.0, 3.0), (-1e308, 3.0), (-math.inf, 3.0), (math.nan, math.nan)],
)
def test_a_norm_on_the_device_cannot_be_refused(given: float, wanted: float) -> None:
    """Below 0 it acts as 0: nothing is above the limit."""
    leaf = torch.tensor([3.0])
    norm = gradclip.clip_by_global_norm_([leaf], 1.0, torch.tensor(given, dtype=torch.float64))
    assert str(leaf.item()) == str(torch.tensor(wanted).item())
    assert str(norm.item()) == str(max(given, 0.0))


def test_autograd_is_told_that_a_tensor_has_changed() -> None:
    weight, factor = torch.ones(2, requires_grad=True), torch.tensor([3.0, 4.0])
    product = (weight * factor).sum()
    gradclip.clip_by_global_norm_([factor], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize(("limit", "wanted"), [(math.nan, math.nan), (-1.0, 0.0), (0.0, 0.0)])
def test_a_limit_on_the_device_cannot_be_refused(limit: float, wanted: float) -> None:
    leaf = torch.tensor([3.0, 4.0])
    assert gradclip.clip_by_global_norm_([leaf], torch.tensor(limit)) == 5
    assert str(leaf.tolist()) == str([wanted, wanted])


# ---- workers ----


@pytest.mark.slow
def test_limits_that_are_read_are_read_before_memory_is_held() -> None:
    leaf = torch.full((4,), 16.0)
    weight = torch.nn.Parameter(torch.zeros(4))
    weight.grad = leaf
    limit = Moving(1.0, leaf)
    gradclip.clip_by_global_norm_([leaf], limit)
    assert leaf.tolist() == [0.5] * 4
    gtorch.clip_grad_norm_([weight], limit)
    assert leaf.tolist() == [0.5] * 4
    gtorch.clip_grads_with_norm_([weight], 1.0, Moving(4.0, leaf))
    assert leaf.tolist() == [0.5] * 4
    assert limit.old.tolist() == [16.0] * 4


@pytest.mark.slow
def test_a_share_is_the_exact_total() -> None:
    for case in random_cases(4, 12):
        leaves = tensors_of(case)
        held = backend.hold(leaves, str, writable=False)
        if not isinstance(held, gpu.Leaves):
            continue
        wanted, *_ = numpy_backend.hold(case.values, str, writable=False).total()
        found = held.sum_of_squares()
        assert exact.square(found) == exact.square(wanted)
        assert found[-2:].tolist() == wanted[-2:].tolist()


def test_a_factor_that_the_host_knows() -> None:
    leaf = torch.tensor([3.0, 4.0])
    held = backend.hold([leaf], str, writable=True)
    held.scale_(exact.Scaled.of(0.25))
    assert leaf.tolist() == [0.75, 1.0]


# ---- attach ----


def trained(optimizer_of: Any, *, scaler: bool, limit: Any, policy: Any, there: bool) -> Any:
    """Books and parameters after each of some steps; of two the gradients are infinite or NaN."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 33), torch.nn.Tanh(), torch.nn.Linear(33, 3))
    groups: Any = model.parameters()
    if isinstance(limit, list):
        groups = [{"params": part.parameters()} for part in (model[0], model[2])]
    optimizer = optimizer_of(groups)
    clipper = gtorch.attach(optimizer, limit, on_nonfinite=policy)
    amp = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2) if scaler else None
    books = []
    for step in range(6):
        inputs = torch.randn(16, 7) * (10 if step % 2 else 0.1)
        loss = (model(inputs) ** 2).mean()
        if amp is None:
            loss.backward()
            if step in (2, 4):
                model[step - 2].weight.grad[0, 0] = math.inf if step == 2 else math.nan
            optimizer.step()
        else:
            amp.scale(loss * (math.inf if step == 2 else 1)).backward()
            amp.step(optimizer)
            amp.update()
        optimizer.zero_grad()
        counts = [*clipper.state_dict().values()]
        books.append(np.hstack([clipper.norm.numpy(), clipper.factor.numpy(), counts]))
    assert isinstance(clipper._books, There) == there
    return books, [parameter.detach() for parameter in model.parameters()]


@pytest.mark.slow
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("limit", [0.1, [0.05, 0.2]])
@pytest.mark.parametrize(
    ("fused", "policy"),
    [
        (False, "zero"),
        (True, "skip"),
        pytest.param(False, "keep", marks=pytest.mark.long),
        pytest.param(True, "zero", marks=pytest.mark.long),
    ],
)
def test_attach_keeps_the_same_books_as_on_the_host(
    scaler: bool, limit: Any, fused: bool, policy: str
) -> None:
    def optimizer_of(parameters: Any) -> Any:
        return torch.optim.AdamW(parameters, lr=1e-2, fused=fused)

    there = policy != "skip" or not isinstance(limit, list)  # of several norms the host decides
    books, parameters = trained(
        optimizer_of, scaler=scaler, limit=limit, policy=policy, there=there
    )
    with (
        mock.patch.object(devices, "has_triton", return_value=False),
        mock.patch.object(pointers, "taken", pointers_taken),
    ):
        wanted, others = trained(
            optimizer_of, scaler=scaler, limit=limit, policy=policy, there=False
        )
    folded = fused and not scaler  # on the host the factor is folded into the step, and divides
    np.testing.assert_allclose(books, wanted, rtol=1e-5 if folded else 0)
    for parameter, other in zip(parameters, others, strict=True):
        if folded:
            torch.testing.assert_close(parameter, other, equal_nan=True)
        else:
            np.testing.assert_array_equal(parameter.numpy(), other.numpy())


pointers_taken = pointers.taken  # before a fixture has replaced it


def test_a_divisor_too_large_for_float32_is_not_folded() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    clipper = gtorch.attach(optimizer, 1e-30)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    parameter.grad = torch.tensor([3e30, 4e30])
    optimizer.step()
    assert clipper.norm == torch.tensor(1.25e30)
    assert parameter.tolist() == pytest.approx([-0.6e-30, -0.8e-30], rel=1e-6)


def test_an_error_in_one_group_is_one_for_all() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": [parameter]} for parameter in parameters]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    clipper = gtorch.attach(optimizer, [1.0, 1.0], on_nonfinite="raise")
    parameters[0].grad = torch.tensor([3.0, 4.0])
    parameters[1].grad = torch.tensor([math.nan, 4.0])
    with pytest.raises(FloatingPointError, match="holds 1 NaN"):
        optimizer.step()
    assert parameters[0].grad.tolist() == [3.0, 4.0]
    assert (clipper.steps, clipper.norm.tolist()) == (0, [0.0, 0.0])


def test_the_books_before_the_first_step_that_counts() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    clipper = gtorch.attach(optimizer, 1.0)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(1.0)
    parameter.grad = torch.tensor([3.0, math.inf])
    optimizer.step()
    assert isinstance(clipper._books, There)
    assert (clipper.norm, clipper.factor, clipper.steps) == (0, 1, 0)
    assert parameter.grad.tolist() == [3.0, math.inf]


def test_a_step_there_that_fails_is_not_counted() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clipper = gtorch.attach(optimizer, 2.5)
    failing = []
    for fails in (False, True, False, True, True):
        if fails:
            failing = [optimizer.register_step_pre_hook(lambda *_: 1 / 0)]
        parameter.grad = torch.tensor([3.0, 4.0])
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            optimizer.step()
        for hook in failing:
            hook.remove()
    assert isinstance(clipper._books, There)
    assert [*clipper.state_dict().values()] == [2, 2, 2, 0]


def test_a_skip_there_is_for_the_device_to_decide() -> None:
    """The host reads nothing; of an optimizer that cannot skip by itself it waits for the norm."""
    for fused in (True, False):
        parameter = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([parameter], lr=1.0, momentum=0.9, fused=fused)
        clipper = gtorch.attach(optimizer, 2.5, on_nonfinite="skip")
        for gradient in ([3.0, 4.0], [math.nan, 4.0]):
            parameter.grad = torch.tensor(gradient)
            optimizer.step()
        assert isinstance(clipper._books, There) == fused
        assert not hasattr(optimizer, "found_inf")
        assert [*clipper.state_dict().values()] == [2, 1, 1, 1]
        assert parameter.tolist() == [-1.5, -2.0]


def test_books_go_on_where_steps_come_back_to_the_host() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    clipper = gtorch.attach(optimizer, 2.5)
    for there in (True, True, False):
        parameter.grad = torch.tensor([3.0, 4.0])
        with mock.patch.object(devices, "has_triton", return_value=there):
            optimizer.step()
    assert (clipper.steps, clipper.clipped_steps, clipper.norm) == (3, 3, 5)


# ---- the kernels, compiled ----


BENCH = Path(__file__).parent.parent / "bench"


@pytest.mark.slow
def test_the_kernels_compile_for_gpus_of_nvidia_and_amd() -> None:
    """No device is needed: subnormals kept, divisions rounded correctly, 16 bytes at a time."""
    program = """
import json, os, sys
os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, sys.argv[1])
import gpu
from triton.backends.compiler import GPUTarget
from gradclip.kernels.gpu import each
from gradclip.kernels.gpu import triton as cuda
of_each = (each.measure_each, each.decide_each, each.tell_each, each.rewrite_each)
for kernel in (cuda.measure, cuda.share, cuda.rewrite, *of_each):  # else some compile anew
    passed = [each for each in kernel.params if not each.is_constexpr]
    assert all(each.annotation_type == "i64" and each.do_not_specialize for each in passed)
amd = [name for name, *_ in gpu.binaries(GPUTarget("hip", "gfx942", 64))]
print(json.dumps([amd, gpu.compiled()]))
"""
    done = run_python(program, str(BENCH))
    assert done.returncode == 0, done.stderr
    amd, loops = json.loads(done.stdout.splitlines()[-1])
    assert amd[:4] == ["measure", "measure", "share", "rewrite"]
    of_each = ["measure_each", "decide_each", "decide_each", "tell_each", "rewrite_each"]
    assert amd[4:] == ["measure", *of_each]
    for sm in (80, 90):
        mine = [loop for loop in loops if loop["sm"] == sm]
        read = {loop["elements"] for loop in mine if loop["kernel"] == "measure"}
        written = {loop["elements"] for loop in mine if loop["kernel"] == "rewrite"}
        assert read == written == {"float16", "bfloat16", "float32", "float64"}


@pytest.mark.slow
def test_the_checks_that_a_device_is_to_pass_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(BENCH)
    gpu = importlib.import_module("gpu")

    def on_the_host(leaves: Any, limit: Any) -> Any:
        with (
            mock.patch.object(devices, "has_triton", return_value=False),
            mock.patch.object(pointers, "taken", pointers_taken),
        ):
            return gradclip.clip_by_global_norm_(leaves, limit)

    assert gpu.check_bits(torch.device("cpu"), lists=8, here=on_the_host) == 8
    gpu.check_limits(torch.device("cpu"), steps=6, here=on_the_host)


# ---- mutations ----


def check_midpoints() -> None:
    for leaves in near_midpoints(np.random.default_rng(3), DTYPES["float32"], 4):
        assert_norm(norm_of([_torch_tensor(each) for each in leaves]), oracle.norm(leaves)[1])


def check_two_calls() -> None:
    leaves = [wide_values("float32", 3 * cuda.TILE)]
    for _ in range(2):
        check(Case(leaves, ["contiguous"], 2.0))


def check_a_tail() -> None:
    room = _torch_tensor(np.ones(600, np.float32))
    assert norm_of([room[:9]]) == 3
    gradclip.clip_by_global_norm_([room[:9]], 1.5)
    assert room[9:].eq(1).all()


def check_wide_spread() -> None:
    for name in ("float32", "float64"):
        held = backend.hold(
            [_torch_tensor(wide_values(name, 500, binades=60))], str, writable=False
        )
        values = [wide_values(name, 500, binades=60)]
        wanted, *_ = numpy_backend.hold(values, str, writable=False).total()
        assert exact.square(held.sum_of_squares()) == exact.square(wanted)


def check_bfloat16_ties() -> None:
    check(Case([wide_values("bfloat16", 3000)], ["contiguous"], 0.75, use_norm=1.0))


def check_ties() -> None:
    for leaves in exact_ties(np.random.default_rng(1), DTYPES["float32"], 6):
        assert_norm(norm_of([_torch_tensor(each) for each in leaves]), oracle.norm(leaves)[1])


MUTATIONS = {
    "no certificate": ("if low < high:", "if low > high:", check_midpoints),
    "no bound": (
        "* 1.1102230246251565e-16\n",
        "* 0.0\n",
        check_midpoints,
    ),
    "the ticket not reset": (
        "    if last:\n        tl.store(int64_at(scratch, TICKET), tl.full([], 0, tl.int64))\n",
        "",
        check_two_calls,
    ),
    "no mask at the end": ("(pointers, mask=inside, other=0)", "(pointers)", check_a_tail),
    "no mask at the end, writing": (
        "tl.store(pointers, x, mask=inside)",
        "tl.store(pointers, x)",
        check_a_tail,
    ),
    "a wider window for float32": ("field - 26", "field - 60", check_wide_spread),
    "a wider window for float64": ("field - 22", "field - 50", check_wide_spread),
    "bfloat16 ties away": (
        "bits + 0x7FFF + ((bits >> 16) & 1)",
        "bits + 0x8000",
        check_bfloat16_ties,
    ),
    "the total not cleared": (
        "    tl.store(int64_at(total, words), tl.zeros([256], tl.int64), mask=words < WORDS + 2)\n",
        "",
        check_wide_spread,
    ),
    "ties away from zero": ("(inexact | ((places & 1) > 0))", "True", check_ties),
}


SOME_MUTATIONS = ("no bound", "no mask at the end", "the total not cleared")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SOME_MUTATIONS else pytest.mark.long)
        for name in MUTATIONS
    ],
)
def test_a_mutation_of_the_kernels_is_seen(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new, noticing = MUTATIONS[name]
    noticing()
    kernels = mutated(tmp_path, old, new, monkeypatch)
    with mock.patch.object(gpu_runs, "cuda", kernels), pytest.raises(AssertionError):
        twice(noticing)
    gpu_runs._scratch.clear()


def twice(noticing: Callable[[], None]) -> None:
    """The second call finds what the first has left."""
    noticing()
    noticing()
