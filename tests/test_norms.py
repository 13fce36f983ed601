"""The norm of each leaf beside the global one: every bit against integers, in every memory."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import gradclip
import gradclip.limits
import oracle
import test_bits
from cases import DTYPES, Case, near_midpoints
from compare import build
from conftest import ENGINES, _torch_read, _torch_tensor, lacks, version
from host import run_python
from ranks import run_ranks

Array = npt.NDArray[Any]


def norm_of(values: Array) -> np.floating[Any]:
    """The oracle's norm of one leaf in its own dtype."""
    return oracle.clip([values], math.inf, None, "keep").norm


def wanted(values: list[Array]) -> tuple[Array, np.floating[Any]]:
    """The vector and the global norm that there have to be."""
    whole = oracle.clip(values, math.inf, None, "keep").norm
    with np.errstate(over="ignore"):
        each = np.array([norm_of(leaf) for leaf in values], np.float64)
        return each.astype(whole.dtype), whole


def check(values: Any, norm: Any, case: list[Array]) -> None:
    """The dtype and the bits."""
    each, whole = wanted(case)
    values, norm = np.asarray(values), np.asarray(norm)
    assert values.dtype == norm.dtype == whole.dtype
    np.testing.assert_array_equal(values, each)
    np.testing.assert_array_equal(norm, whole)


def drawn(name: str, count: int) -> list[Case]:
    return list(test_bits.random_cases(name, count))


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e5m2", "float64", "mixed"])
@pytest.mark.usefixtures("threads")
def test_numpy(name: str) -> None:
    for case in drawn(name, 30):
        found = gradclip.norms(build(case, writable=False))
        check(found.values, found.global_norm, case.values)


def hostile() -> list[list[Array]]:
    """Norms that overflow float32, underflow it, are NaN, inf or of nothing."""
    f32, f64 = np.float32, np.float64
    return [
        [f32([3e38] * 4), f32([1e-45, 0]), f32([])],
        [f32([np.inf, 1]), f32([np.nan, np.inf]), f32([1])],
        [f64([1.5e308] * 3), f32([3]), f64([5e-324])],
        [f32(3).reshape(()), np.float16([65504] * 9)],
        *near_midpoints(np.random.default_rng(5), DTYPES["float32"], 5),
    ]


def test_hostile_numbers() -> None:
    for case in hostile():
        found = gradclip.norms([*case])
        check(found.values, found.global_norm, case)


def test_sparse_rows_of_one_index_are_added_first() -> None:
    rows = gradclip.IndexedSlices(np.float32([[1], [2], [4]]), np.array([1, 1, 0]), (2, 1))
    found = gradclip.norms({"embedding": rows, "bias": np.float32([12])})
    assert dict(zip(found.paths, found.values.tolist(), strict=True)) == {
        "bias": 12,
        "embedding": 5,
    }
    assert found.global_norm == 13


# ---- what Norms tells ----


def test_names_and_numbers() -> None:
    tree = {"b": [np.float32([2]), None, np.float32([np.inf])], "a": np.float32([np.nan])}
    found = gradclip.norms(tree)
    assert found.paths == ("a", "b/0", "b/2")
    assert len(found) == 3
    assert found.nonfinite() == ["a", "b/2"]
    (first, nan), *rest = found.largest(2)
    assert (first, rest) == ("a", [("b/2", math.inf)])
    assert math.isnan(nan)
    assert found.floats().dtype == np.float64
    assert list(found.as_dict("g/")) == ["g/a", "g/b/0", "g/b/2", "g"]
    assert found.as_dict("")["global_norm"] != 0
    for other in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert other.paths == found.paths
        np.testing.assert_array_equal(other.values, found.values)


def test_names_that_would_be_one_are_told_apart() -> None:
    one = np.float32([1])
    found = gradclip.norms({"a/b": one, "a": {"b": one}})
    assert found.paths == ("a/b (0)", "a/b (1)")
    assert len(found.as_dict()) == 3
    clash = gradclip.norms({"global_norm": one})
    with pytest.raises(ValueError, match=re.escape("two of these have one key under prefix ''")):
        clash.as_dict("")


def test_nothing_and_one() -> None:
    found = gradclip.norms([None, []])
    assert (found.values.tolist(), found.values.dtype, found.global_norm) == ([], np.float32, 0)
    assert gradclip.norms(np.float32([3, 4])).as_dict() == {
        "grad_norm/t_list": 5.0,
        "grad_norm": 5.0,
    }


def test_norms_keep_no_leaf_alive() -> None:
    class Watched(np.ndarray):
        pass

    import weakref

    leaf = np.float32([3, 4]).view(Watched)
    gone = weakref.ref(leaf)
    found = gradclip.norms({"a": leaf})
    del leaf
    assert gone() is None
    assert found.paths == ("a",)


# ---- PyTorch ----

if version("torch") is None:
    torch = None
else:
    import torch

    import gradclip.torch as gtorch
    from gradclip.torch import devices
    from gradclip.torch.books import Here, There
    from gradclip.torch.overlap import at_every_place

needs_torch = pytest.mark.skipif(torch is None, reason="torch is not installed")


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest) -> Any:
    """The host's, and a device's, of which Triton's interpreter runs the kernels."""
    if torch is None:
        pytest.skip("torch is not installed")
    if request.param == "host":
        yield "host"
        return
    if reason := lacks("triton"):
        pytest.skip(reason)
    from host_torch import torch_there

    with torch_there():
        yield "device"


def drawn_for_torch(name: str, count: int) -> list[list[Array]]:
    """Of the dtypes that PyTorch has."""
    every = (case.values for case in drawn(name, 4 * count))
    known = [case for case in every if all(hasattr(torch, x.dtype.name) for x in case)]
    assert len(known) >= count
    return known[:count]


def tensors(case: list[Array]) -> list[Any]:
    return [_torch_tensor(values) for values in case]


def parameters_of(case: list[Array]) -> list[Any]:
    found = []
    for values in case:
        grad = _torch_tensor(values)
        found.append(torch.nn.Parameter(torch.zeros_like(grad)))
        found[-1].grad = grad
    return found


def few(memory: str) -> int:
    return 4 if memory == "device" else 20


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64", "mixed"])
def test_torch(memory: str, name: str) -> None:
    for case in drawn_for_torch(name, few(memory)):
        found = gradclip.norms(tensors(case))
        check(found.values, found.global_norm, case)


def test_torch_hostile_numbers(memory: str) -> None:
    del memory
    for case in hostile():
        found = gradclip.norms(tensors(case))
        check(found.values, found.global_norm, case)
        whole = gtorch.clip_grad_norm_(parameters_of(case), 1.0, norms=True)
        check(whole.values, whole.global_norm, case)


@pytest.mark.parametrize(
    "policy", [None, "zero", *(pytest.param(x, marks=pytest.mark.long) for x in ("nan", "keep"))]
)
def test_a_clip_is_the_same_with_norms_and_without(memory: str, policy: Any) -> None:
    cases = [*drawn_for_torch("mixed", few(memory)), *hostile()]
    for case in cases[:: 2 if memory == "device" else 1]:
        limit = min(float(wanted(case)[1]) / 3, 1e300) or 1.0
        limit = limit if math.isfinite(limit) else 1.0
        ones, others = parameters_of(case), parameters_of(case)
        norm = gtorch.clip_grad_norm_(ones, limit, on_nonfinite=policy)
        found = gtorch.clip_grad_norm_(others, limit, on_nonfinite=policy, norms=True)
        check(found.values, found.global_norm, case)
        np.testing.assert_array_equal(norm, found.global_norm)
        for one, other in zip(ones, others, strict=True):
            np.testing.assert_array_equal(_torch_read(one.grad), _torch_read(other.grad))


def test_one_listed_twice_has_its_norm_at_both_places(memory: str) -> None:
    first, second, third = parameters_of([np.float32([3, 4]), np.float32([12]), np.float32([0])])
    view = torch.nn.Parameter(torch.zeros(2, 1))
    view.grad = first.grad.view(2, 1)
    listed = {"a": first, "b": second, "again": view, "zero": third}
    found = gtorch.clip_grad_norm_(listed, 6.5, norms=True)
    assert found.as_dict("") == {"a": 5, "b": 12, "again": 5, "zero": 0, "global_norm": 13}
    assert first.grad.tolist() == [1.5, 2]
    optimizer = torch.optim.SGD([first, second, third], lr=0.0)
    clipper = gtorch.attach(optimizer, 100.0, per_tensor=True)
    third.data, third.grad = torch.zeros(2), first.grad
    optimizer.step()
    assert clipper.norms.values.tolist() == [2.5, 6, 2.5]
    assert (memory == "device") == isinstance(clipper._books, There)


@needs_torch
def test_norms_of_those_held_once_are_put_at_every_place() -> None:
    first, second = torch.tensor([3.0, 4.0]), torch.tensor([12.0])
    listed = [first, first.view(2, 1), second, first]
    for norms in ([5.0, 12.0], [5.0, 0.0, 12.0, 0.0]):
        assert at_every_place(torch.tensor(norms), listed).tolist() == [5, 5, 12, 5]


def test_names_of_parameters(memory: str) -> None:
    del memory
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model(torch.ones(1, 2)).sum().backward()
    model[0].bias.grad = None
    names = ("0.weight", "1.weight", "1.bias")
    assert gtorch.clip_grad_norm_(model.named_parameters(), 1.0, norms=True).paths == names
    places = gtorch.clip_grad_norm_(model.parameters(), 1.0, norms=True).paths
    assert places == ("0", "2", "3")
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert set(gradclip.norms(grads).paths) == set(names)
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1)
    clipper = gtorch.attach(optimizer, 1.0, per_tensor=True)
    assert clipper.norms is None
    optimizer.step()
    assert clipper.norms.paths == names


def trained(limit: Any, *, per_tensor: bool, scaler: bool = False, **options: Any) -> Any:
    """Some steps of a network; at each the clipper and the gradients' norms before."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(150, 120), torch.nn.ReLU(), torch.nn.Linear(120, 2))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.01, fused=scaler or None)
    if isinstance(limit, list):
        groups = [{"params": list(part.named_parameters())} for part in (model[0], model[2])]
        optimizer = torch.optim.SGD(groups, lr=0.01)
    clipper = gtorch.attach(optimizer, limit, per_tensor=per_tensor, **options)
    amp = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaler)
    seen = []
    for step in range(6):
        optimizer.zero_grad()
        batch = torch.randn(4, 150) * (math.inf if step == 3 and not scaler else 1 + step)
        amp.scale((model(batch) ** 2).mean()).backward()
        grads = [p.grad.clone() / amp.get_scale() for p in model.parameters()]
        amp.step(optimizer)
        amp.update()
        found = clipper.norms if per_tensor else None
        seen.append((clipper.norm, clipper.factor, found, gradclip.norms(grads)))
    return seen, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("kind", ["number", "zscore", "each", "groups"])
def test_attach(memory: str, kind: str, scaler: bool) -> None:
    limit: Any = {
        "number": lambda: 0.5,
        "zscore": lambda: gradclip.limits.ZScore(warmup=2),
        "each": lambda: gradclip.limits.PerTensor(gradclip.limits.Average(1.05, warmup=1)),
        "groups": lambda: [0.5, 0.25],
    }[kind]
    if kind == "groups" and scaler:
        pytest.skip("a fused step is of one list")
    seen, weights = trained(limit(), per_tensor=True, scaler=scaler, on_nonfinite="skip")
    others, same = trained(limit(), per_tensor=False, scaler=scaler, on_nonfinite="skip")
    for one, other in zip(weights, same, strict=True):
        assert torch.equal(one, other)
    for (norm, factor, found, right), (norm2, factor2, _, _) in zip(seen, others, strict=True):
        np.testing.assert_array_equal(norm, norm2)
        np.testing.assert_array_equal(factor, factor2)
        every = found if kind == "groups" else (found,)
        values = torch.cat([each.values for each in every])
        np.testing.assert_array_equal(values, right.values)
        whole = torch.stack([each.global_norm for each in every])
        np.testing.assert_array_equal(whole, np.atleast_1d(norm))
    del memory


@needs_torch
def test_a_clipper_that_was_not_asked_says_so() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(AttributeError, match="norms are told by a clipper that was attached with"):
        _ = gtorch.attach(optimizer, 1.0).norms


@needs_torch
def test_a_copy_tells_norms_too() -> None:
    (parameter,) = parameters_of([np.float32([3, 4])])
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    gtorch.attach(optimizer, 1.0, per_tensor=True)
    other = copy.deepcopy(optimizer)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = torch.tensor([6.0, 8.0])
    other.step()
    clipper = gtorch.clipper_of(other)
    assert clipper is not None
    assert clipper.norms.values.tolist() == [10]


@needs_torch
def test_books_that_move_begin_without_norms() -> None:
    if reason := lacks("triton"):
        pytest.skip(reason)
    from host_torch import torch_there

    (parameter,) = parameters_of([np.float32([3, 4])])
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    clipper = gtorch.attach(optimizer, 100.0, per_tensor=True)
    optimizer.step()
    assert isinstance(clipper._books, Here)
    with torch_there():
        optimizer.step()
        assert clipper.norms.values.tolist() == [5]
    optimizer.step()
    assert clipper.norms.values.tolist() == [5]
    assert not devices.has_triton(parameter.device)


@needs_torch
def test_a_device_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := lacks("triton"):
        pytest.skip(reason)
    from host_torch import Counted, refuse_to_wait, torch_there

    leaves = [torch.randn(5, 7), torch.randn(300)]
    parameters = [torch.nn.Parameter(torch.zeros_like(leaf)) for leaf in leaves]
    for parameter, leaf in zip(parameters, leaves, strict=True):
        parameter.grad = leaf
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    measured = ["measure_each", "decide_each", "tell_each"]
    with torch_there(), monkeypatch.context() as patched:
        patched.setattr("gradclip.torch.gpu.Memory", Counted)
        clipper = gtorch.attach(optimizer, 0.5, per_tensor=True)
        refuse_to_wait(patched)
        for call, launches in (
            (lambda: gradclip.norms(leaves), measured),
            (
                lambda: gtorch.clip_grad_norm_(parameters, 1.0, norms=True),
                [*measured, "measure", "rewrite"],
            ),
            (optimizer.step, [*measured, "measure", "rewrite"]),
        ):
            Counted.launched.clear()
            call()
            assert Counted.launched == launches
        assert len(clipper.norms) == 2


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.long) for n in (1, 4))])
def test_norms_of_what_is_sharded_are_those_of_the_whole(count: int) -> None:
    run_ranks("norms_ranks", ["sharded", *ENGINES, "refused"], count)


@needs_torch
def test_autograd_sees_nothing_and_what_follows_is_refused() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    found = gradclip.norms([weight * 1])
    assert not found.values.requires_grad
    assert found.values.tolist() == [5]
    with pytest.raises(NotImplementedError, match=re.escape("under a transform of torch.func")):
        torch.func.vmap(lambda x: gradclip.norms([x]).values)(torch.ones(2, 3))
    meta = torch.nn.Parameter(torch.zeros(2, device="meta"))
    meta.grad = torch.zeros(2, device="meta")
    text = "is meta, fake or traced, and the norm of each tensor is not there"
    with pytest.raises(NotImplementedError, match=text):
        gradclip.norms([meta.grad])
    with pytest.raises(NotImplementedError, match=text):
        gtorch.clip_grad_norm_([meta], 1.0, norms=True)
    with pytest.raises(ValueError, match=re.escape("norm_type is 1.0; tensor by tensor")):
        gtorch.clip_grad_norm_(parameters_of([np.float32([1])]), 1.0, 1.0, norms=True)


@pytest.mark.slow
@needs_torch
def test_torch_compile_runs_it_between_graphs() -> None:
    @torch.compile(backend="eager")
    def double(x: Any) -> Any:
        return gradclip.norms({"a": x * 2}).values + 1

    assert double(torch.tensor([3.0, 4.0])).tolist() == [11]


@needs_torch
def test_cupy() -> None:
    if reason := lacks("cupy", "triton"):
        pytest.skip(reason)
    import host_cupy

    if host_cupy.HAS_DEVICE:
        pytest.skip("the kernels run on a device")
    with host_cupy.no_driver():
        for case in ([np.float32([3, 4]), np.float32([12])], [np.float64([3, 4]), np.float16([1])]):
            found = gradclip.norms([host_cupy.make(values) for values in case])
            each, whole = wanted(case)
            np.testing.assert_array_equal(host_cupy.view(found.values), each)
            np.testing.assert_array_equal(host_cupy.view(found.global_norm), whole)


@pytest.mark.slow
def test_importing_gradclip_loads_no_framework_for_it() -> None:
    done = run_python("import sys, gradclip; gradclip.norms; print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
