"""PyTorch without numbers: torch.compile, export, make_fx, functionalize, meta and fake tensors.

And what has memory of another kind than it seems: inference tensors, lazy copies.
"""

from __future__ import annotations

import collections
import gc
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import gradclip
from conftest import since_torch, some_quick, version
from gradclip.core.versions import is_below
from host import run_python

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import gradclip.torch as gtorch

# PyTorch's own modules warn when they are first imported.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings(
        "ignore:Skipping serialization of skipfiles_inline_module:UserWarning"
    ),
]
# There the compiler does not take PyTorch's own clip whole, nor, in some, tell what was raised.
IS_OLD = is_below("2.11", torch.__version__)

Pair = collections.namedtuple("Pair", ["a", "b"])
NESTS: dict[str, Callable[[Any, Any], Any]] = {
    "bare": lambda x, y: x,  # noqa: ARG005
    "list": lambda x, y: [x, y],
    "tuple": lambda x, y: (x, y),
    "dict": lambda x, y: {"b": x, "a": y},
    "nested": lambda x, y: {"w": [x, None, (y,)], "b": {"c": x}},
    "named": lambda x, y: Pair(x, [y]),
    "ordered": lambda x, y: collections.OrderedDict(b=x, a=y),
    "values": lambda x, y: {"b": x, "a": y}.values(),
    "generator": lambda x, y: (each for each in (x, y)),
}


DENSE = "float16, bfloat16, float8, float32, float64 and complex tensors"


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text, to which PyTorch may add where in a graph it came up."""
    return pytest.raises(error, match=f"^{re.escape(text)}($|\n\nWhile executing)")


def whole(function: Callable[..., Any], **options: Any) -> Any:
    """The function, compiled without a break."""
    return torch.compile(function, fullgraph=True, **{"backend": "aot_eager", **options})


def flat(x: Any) -> list[Any]:
    """Tensors as (dtype, strides, bytes), containers as their types, in the order of both."""
    if isinstance(x, torch.Tensor):
        x = x.detach()
        data = (torch.view_as_real(x) if x.is_complex() else x).contiguous().reshape(-1)
        return [x.dtype, x.shape, x.stride(), data.view(torch.uint8).numpy().tobytes()]
    if isinstance(x, dict):
        return [type(x), *x, *itertools.chain(*map(flat, x.values()))]
    if isinstance(x, list | tuple):
        return [type(x), *itertools.chain(*map(flat, x))]
    return [x]


def copies(tensors: Any) -> list[Any]:
    return [each.clone() for each in tensors]


def assert_as_eager(function: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Compiled whole it gives the same bits, and leaves the same in its arguments."""
    ours, theirs = copies(tensors), copies(tensors)
    found, wanted = whole(function, **options)(*ours), function(*theirs)
    assert flat(found) == flat(wanted)
    assert flat(ours) == flat(theirs)


def weight_of(gradient: Any) -> Any:
    parameter = torch.nn.Parameter(torch.zeros_like(gradient))
    parameter.grad = gradient.clone()
    return parameter


# ---- torch.compile: limits ----


def clip_gradients(module: Any, weight: Any, limit: Any) -> Any:
    return module.clip_grad_norm_([weight], limit)


def clip_by_given_norm(module: Any, weight: Any, limit: Any) -> Any:
    return module.clip_grads_with_norm_([weight], limit, torch.linalg.vector_norm(weight.grad))


def graphs(module: Any, clip: Any, limits: Any, **options: Any) -> tuple[int, list[Any]]:
    """How many graphs a clip by changing limits takes, and the gradients."""
    torch._dynamo.reset()
    counters.clear()
    weight, found = weight_of(torch.zeros(100)), []
    compiled = torch.compile(
        lambda limit: clip(module, weight, limit), backend="aot_eager", **options
    )
    for limit in limits:
        weight.grad = torch.arange(100.0)
        compiled(limit)
        found.append(weight.grad)
    return counters["stats"]["unique_graphs"], found


@pytest.mark.slow
@pytest.mark.parametrize("clip", [clip_gradients, clip_by_given_norm])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("kind", [float, int])
def test_a_limit_that_changes_takes_no_more_graphs_than_pytorchs(
    clip: Any, dynamic: Any, fullgraph: bool, kind: Any
) -> None:
    limits = [1 / (i + 1) for i in range(12)] if kind is float else list(range(2, 14))
    options = {"dynamic": dynamic, "fullgraph": fullgraph}
    ours, found = graphs(gtorch, clip, limits, **options)
    theirs = 2 if IS_OLD else graphs(torch.nn.utils, clip, limits, **options)[0]
    assert 1 <= ours <= theirs
    for limit, gradient in zip(limits, found, strict=True):
        weight = weight_of(torch.arange(100.0))
        clip(gtorch, weight, limit)
        assert torch.equal(weight.grad, gradient)


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_both_limits_of_every_function_may_change(compiler: str) -> None:
    def step(weights: list[Any], limit: Any, norm: Any) -> Any:
        gtorch.clip_grads_with_norm_([weights[0]], limit, norm)
        gradclip.clip_by_global_norm_([weights[1].grad], limit, norm)
        return gradclip.clip_by_global_norm([weights[1].grad], limit, norm)

    compiled = whole(step, backend=compiler)
    for i in range(12):
        limits = 1 / (i + 3), 1 / (i + 2)
        ours, theirs = (
            [weight_of(torch.arange(5.0, dtype=torch.float64)) for _ in range(2)] for _ in range(2)
        )
        assert flat(compiled(ours, *limits)) == flat(step(theirs, *limits))
        assert flat([each.grad for each in ours]) == flat([each.grad for each in theirs])
    assert counters["stats"]["unique_graphs"] <= 2


FRACTION = pytest.param(
    Fraction(1, 3), marks=since_torch("2.11", "the compiler makes no number of a Fraction")
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "limit",
    [1 / 3, 5e-324, 2, 2**53 + 1, math.inf, np.float64(0.3), np.float32(0.3), FRACTION],
    ids=repr,
)
def test_no_bit_of_a_limit_is_lost(limit: Any) -> None:
    def clip(weight: Any, limit: Any) -> Any:
        new = gradclip.clip_by_global_norm([weight.grad], limit)
        return new, gtorch.clip_grad_norm_([weight], limit)

    ours, theirs = (weight_of(torch.tensor([1.0, 2, 3], dtype=torch.float64)) for _ in range(2))
    assert flat(whole(clip)(ours, limit)) == flat(clip(theirs, limit))
    assert flat(ours.grad) == flat(theirs.grad)


@pytest.mark.parametrize("limit", some_quick([0.0], [-1.0, math.nan]))
def test_limits_out_of_range_are_errors_when_they_are_there(limit: float) -> None:
    weight = weight_of(torch.ones(3))
    for name, clip in {
        "max_norm": lambda limit: gtorch.clip_grad_norm_([weight], limit),
        "clip_norm": lambda limit: gradclip.clip_by_global_norm_([weight.grad], limit),
    }.items():
        with raises(ValueError, f"{name} is {limit}; it must be above 0 (inf: only measure)"):
            whole(clip)(limit)
    with raises(ValueError, "total_norm is -1.0; a norm is never negative"):
        whole(lambda norm: gtorch.clip_grads_with_norm_([weight], 1.0, norm))(-1.0)
    with raises(ValueError, "max_norm is tensor(-1.); it must be above 0 (inf: only measure)"):
        whole(lambda limit: gtorch.clip_grad_norm_([weight], limit))(torch.tensor(-1.0))
    assert weight.grad.tolist() == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("limit", ["x", True, None, 1j, [1.0]], ids=repr)
def test_what_is_no_limit_is_an_error_where_it_is_compiled(limit: Any) -> None:
    weight = weight_of(torch.ones(3))
    text = f"max_norm is {limit!r}; it must be a real number"

    def clip() -> Any:
        return gtorch.clip_grad_norm_([weight], limit)

    unsupported = torch._dynamo.exc.Unsupported
    untold = "|Observed exception" * IS_OLD
    with pytest.raises(unsupported, match=re.escape(text) + untold):
        whole(clip)()
    with raises(TypeError, text):
        torch.compile(clip, backend="aot_eager")()
    with pytest.raises(unsupported, match=re.escape("on_nonfinite is 'no'") + untold):
        whole(lambda: gtorch.clip_grad_norm_([weight], 1.0, on_nonfinite="no"))()  # type: ignore[arg-type]


# ---- torch.compile: the functions for nests ----


@pytest.mark.slow
@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_nests_are_taken_whole(nest: Callable[[Any, Any], Any]) -> None:
    def step(x: Any, y: Any) -> Any:
        return (
            gradclip.clip_by_global_norm(nest(x, y), 1.5),
            gradclip.clip_by_global_norm_(nest(x, y), 0.5),
            gradclip.global_norm(nest(x, y)),
        )

    assert_as_eager(step, torch.randn(5) * 10, torch.randn(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64],
    ids=str,
)
def test_dtypes_and_layouts_are_taken_whole(dtype: Any) -> None:
    def step(x: Any, y: Any) -> Any:
        leaves = [x, y.t()[:, ::2], y[1, 0]]
        return gradclip.clip_by_global_norm(leaves, 0.7), gradclip.clip_by_global_norm_(leaves, 0.3)

    assert_as_eager(step, (torch.randn(5) * 10).to(dtype), torch.randn(4, 6))


def test_tensors_that_overlap_in_part_are_refused_when_they_are_there() -> None:
    x = torch.ones(5)

    def clip(x: Any) -> Any:
        return gradclip.clip_by_global_norm_({"a": x[:-1], "b": x[1:]}, 1.0)

    with pytest.raises(ValueError, match="share a part of their memory") as wanted:
        clip(x)
    for compiled in (whole(clip), make_fx(clip, tracing_mode="fake")(x)):
        with raises(ValueError, str(wanted.value)):
            compiled(x)
    assert x.tolist() == [1] * 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "policy"),
    [
        (1.0, "raise"),
        (math.inf, "raise"),
        (math.nan, "nan"),
        (math.inf, "zero"),
        (math.nan, "keep"),
        *(pytest.param(1.0, policy, marks=pytest.mark.long) for policy in ("nan", "zero", "keep")),
        pytest.param(math.inf, "nan", marks=pytest.mark.long),
        pytest.param(math.nan, "zero", marks=pytest.mark.long),
        pytest.param(math.inf, "keep", marks=pytest.mark.long),
        pytest.param(math.nan, "raise", marks=pytest.mark.long),
    ],
)
def test_policies_are_taken_whole(policy: Any, value: float) -> None:
    def clip(x: Any, y: Any) -> Any:
        return gradclip.clip_by_global_norm({"w": [x, None, y]}, 0.7, on_nonfinite=policy)

    def clip_(x: Any, y: Any) -> Any:
        return gradclip.clip_by_global_norm_({"w": [x, None, y]}, 0.7, on_nonfinite=policy)

    leaves = torch.tensor([3.0]), torch.tensor([value, 4.0])
    for function in (clip, clip_):
        if policy != "raise" or math.isfinite(value):
            assert_as_eager(function, *leaves)
            continue
        count = "1 NaN and 0 inf" if math.isnan(value) else "0 NaN and 1 inf"
        text = f"the global norm is {value}: t_list['w'][2] holds {count}"
        with raises(FloatingPointError, text):
            whole(function)(*leaves)
        assert leaves[0].item() == 3


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1.0, torch.tensor(0.5), torch.tensor(0.5).double()], ids=repr)
@pytest.mark.parametrize("norm", [None, 3.0, torch.tensor(9.0)], ids=repr)
def test_numbers_and_tensors_limit_what_is_taken_whole(limit: Any, norm: Any) -> None:
    assert_as_eager(
        lambda x, y: gradclip.clip_by_global_norm([x, y], limit, norm), torch.ones(5), torch.ones(2)
    )


@pytest.mark.slow
def test_inductor_and_a_symbolic_shape() -> None:
    def step(x: Any, y: Any) -> Any:
        new, norm = gradclip.clip_by_global_norm([x * 2, y.sin()], 1.0)
        y.mul_(2)
        return new[0] + 1, gradclip.clip_by_global_norm_([y, x], norm / 8), gradclip.global_norm(x)

    for length in (5, 7, 9):
        assert_as_eager(step, torch.randn(length), torch.randn(2, 3), backend="inductor")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_tensors_that_need_a_gradient_are_taken_whole(compiler: str) -> None:
    def loss(x: Any, y: Any, limit: Any) -> Any:
        new, norm = gradclip.clip_by_global_norm({"a": x * 2, "b": [y]}, limit)
        return new["a"].sum() + new["b"][0].square().sum() + norm * 3 + gradclip.global_norm([x, y])

    compiled = whole(loss, backend=compiler)
    for scale in (1, 1e-3, 1e25):
        ours, theirs = (
            [torch.linspace(1, 2, 5) * scale, torch.linspace(2, 3, 3).double(), torch.tensor(0.7)]
            for _ in range(2)
        )
        values = [
            function(*(each.requires_grad_() for each in leaves))
            for function, leaves in ((compiled, ours), (loss, theirs))
        ]
        for value in values:
            value.backward()
        assert torch.equal(*values)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=0)


def test_the_derivative_where_the_norm_is_too_large_for_its_dtype() -> None:
    def first(x: Any) -> Any:
        return gradclip.clip_by_global_norm([x], 1.0)[0][0][0]

    ours, theirs = (torch.full((4,), 3e38).requires_grad_() for _ in range(2))
    whole(first)(ours).backward()
    first(theirs).backward()
    assert ours.grad[0] > 0
    assert torch.equal(ours.grad, theirs.grad)


BROKEN: dict[str, Callable[[Any], Any]] = {
    "slices": lambda x: gradclip.global_norm([gradclip.IndexedSlices(x, torch.tensor([0, 0]))]),
    "empty": lambda x: gradclip.clip_by_global_norm([None], 1.0)[0] + [x],
    "once": lambda x: gradclip.global_norm(map(gradclip.IndexedSlices, [x], [torch.arange(2)])),
    "sparse": lambda x: gradclip.clip_by_global_norm_([x.to_sparse()], 1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("function", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_graph_is_clipped_nevertheless(function: Callable[[Any], Any]) -> None:
    x = torch.tensor([3.0, 4.0])
    assert flat(torch.compile(function, backend="aot_eager")(x)) == flat(function(x))


@pytest.mark.slow
@pytest.mark.parametrize("function", BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_graph_beside_jax(
    function: Callable[[Any], Any], framework: Callable[[str], Any]
) -> None:
    framework("jax")  # which is asked about what may be a container of its own
    test_what_breaks_the_graph_is_clipped_nevertheless(function)


def test_an_error_of_what_breaks_the_graph_is_the_one_without_a_compiler() -> None:
    def text(value: Any) -> Any:
        return gradclip.clip_by_global_norm([value, "no"], 1.0)

    def integers(value: Any) -> Any:
        return gradclip.clip_by_global_norm({"w": value.long()}, 1.0)

    for function in (text, integers):
        with pytest.raises(TypeError) as wanted:
            function(torch.ones(2))
        with raises(TypeError, str(wanted.value)):
            torch.compile(function, backend="aot_eager")(torch.ones(2))


@pytest.mark.slow
def test_the_first_clip_of_a_process_may_be_compiled() -> None:
    code = """
        import torch, gradclip
        x = torch.tensor([3.0, 4.0])
        clip = lambda x: gradclip.clip_by_global_norm({"w": [x, None]}, 2.5)
        print(torch.compile(clip, fullgraph=True, backend="eager")(x))
    """
    done = run_python(code)
    assert done.stdout == "({'w': [tensor([1.5000, 2.0000]), None]}, tensor(5.))\n", done.stderr


@pytest.mark.slow
def test_the_compiler_is_not_imported_to_clip() -> None:
    """It takes seconds."""
    code = """
        import sys, torch, gradclip.torch
        gradclip.clip_by_global_norm_([torch.ones(3)], 1.0)
        print("torch._dynamo" in sys.modules, "gradclip.torch.compiled" in sys.modules)
    """
    assert run_python(code).stdout == "False False\n"


def test_arrays_are_clipped_while_another_thread_imports_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    half = type(torch)("torch")
    monkeypatch.setitem(sys.modules, "torch", half)
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert gradclip.global_norm([np.float32([3, 4])]) == 5


@pytest.fixture
def _imports_at_any_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules come while the compiler works: whenever garbage is collected."""
    modules = dict(sys.modules)
    monkeypatch.setattr(sys, "modules", modules)

    def come(*_: Any) -> None:
        modules[f"come.{len(modules)}"] = type(sys)("come")

    thresholds = gc.get_threshold()
    gc.callbacks.append(come)
    gc.set_threshold(200)
    yield
    gc.set_threshold(*thresholds)
    gc.callbacks.remove(come)


@pytest.mark.usefixtures("_imports_at_any_time")
def test_modules_may_come_while_a_clip_is_compiled() -> None:
    weight = weight_of(torch.tensor([3.0, 4.0]))

    def step() -> Any:
        norm = gtorch.clip_grad_norm_([weight], 2.5)
        return norm, gtorch.get_total_norm([weight.grad]), gradclip.global_norm((weight.grad, None))

    assert whole(step)() == (5, 2.5, 2.5)


# ---- what is written down ----


def new(x: Any) -> Any:
    return gradclip.clip_by_global_norm({"w": x}, 2.5)


def norms(x: Any) -> Any:
    return gradclip.global_norm([x]), gtorch.get_total_norm([x]), gtorch.get_total_norm([x], 1.0)


def in_place(x: Any) -> Any:
    y = x * 1
    view = y[:1]
    gradclip.clip_by_global_norm_([y], 2.5)
    return y, view


def gradients(x: Any) -> Any:
    weight = x.clone()
    weight.grad = x * 1
    norm = gtorch.clip_grad_norm_([weight], 2.5)
    gtorch.clip_grads_with_norm_([weight], 1.0, norm)
    return weight.grad


class Module(torch.nn.Module):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)


@pytest.mark.parametrize("function", [new, norms, in_place, gradients])
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic", "before dispatch"])
def test_make_fx_keeps_the_clip_and_not_its_outcome(
    function: Callable[[Any], Any], mode: Any
) -> None:
    options = {"pre_dispatch": True} if mode == "before dispatch" else {"tracing_mode": mode}
    x = torch.tensor([3.0, 4.0])
    traced = make_fx(function, **options)(x)
    assert flat(traced(x * 2)) == flat(function(x * 2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "strict"),
    [
        *itertools.product([new, norms, in_place], [False, True]),
        (gradients, False),
        pytest.param(
            *(gradients, True), marks=since_torch("2.8", "a strict export sets no gradient")
        ),
    ],
)
def test_export_keeps_the_clip(function: Callable[[Any], Any], strict: bool) -> None:
    x = torch.tensor([3.0, 4.0])
    program = torch.export.export(Module(function), (x,), strict=strict)
    assert flat(program.module()(x * 2)) == flat(function(x * 2))


def test_make_fx_of_what_is_differentiated_and_mapped() -> None:
    def first(x: Any) -> Any:
        return gradclip.clip_by_global_norm([x], 2.5)[0][0]

    x = torch.tensor([3.0, 4.0])
    jacobian = torch.func.jacrev(first)
    assert flat(make_fx(jacobian)(x)(x * 2)) == flat(jacobian(x * 2))
    mapped = torch.vmap(first)
    rows = torch.stack([x, x * 2])
    assert flat(make_fx(mapped)(rows)(rows * 2)) == flat(mapped(rows * 2))
    recorded = make_fx(first)(x.clone().requires_grad_())
    assert flat(recorded(x * 2)) == flat(first(x * 2))


def test_sparse_leaves_are_not_written_down() -> None:
    text = (
        "t_list[0] is IndexedSlices of layout None; where a clip is traced, or has no memory, "
        "gradclip clips dense tensors"
    )
    with raises(TypeError, text):
        make_fx(lambda x: gradclip.global_norm([gradclip.IndexedSlices(x, torch.arange(2))]))(
            torch.ones(2)
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_keeps_the_clip_or_refuses() -> None:
    x = torch.tensor([3.0, 4.0])
    for function in (new, norms):
        traced = torch.jit.trace(function, (x,), check_trace=False, strict=False)
        assert flat(traced(x * 2)) == flat(function(x * 2))
    text = (
        "torch.jit.trace loses what an operation writes where tensors lie; "
        "clip_by_global_norm returns new tensors, and torch.export takes both"
    )
    for function in (in_place, gradients):
        with raises(NotImplementedError, text):
            torch.jit.trace(function, (x,), check_trace=False)


# ---- functional tensors ----


@pytest.mark.parametrize("function", [new, norms, in_place])
def test_functional_tensors_are_clipped(function: Callable[[Any], Any]) -> None:
    x = torch.full((1 << 16,), 3.0)
    functional = torch.func.functionalize(function)
    assert flat(functional(x)) == flat(function(x))
    assert flat(make_fx(functional)(x)(x * 2)) == flat(function(x * 2))


def test_the_argument_of_a_functional_function_is_clipped() -> None:
    x = torch.tensor([3.0, 4.0])
    norm = torch.func.functionalize(lambda x: gradclip.clip_by_global_norm_([x], 2.5))(x)
    assert (norm, x.tolist()) == (5, [1.5, 2])


def test_what_functionalize_does_not_follow_is_refused() -> None:
    x = torch.tensor([3.0, 4.0])
    text = (
        "gradients are clipped where they lie, which torch.func.functionalize does not follow; "
        "gradclip.clip_by_global_norm returns new tensors"
    )

    def given(x: Any) -> Any:
        weight = x.clone()
        weight.grad = x * 1
        gtorch.clip_grads_with_norm_([weight], 1.0, 5.0)

    for function in (gradients, given):
        with raises(NotImplementedError, text):
            torch.func.functionalize(function)(x)
    text = (
        "a clip under torch.func.functionalize together with another transform of torch.func; "
        "clip outside of functionalize"
    )
    for function in (new, norms, in_place):
        for transform in (torch.func.jacrev, torch.vmap):
            if (function, transform) == (in_place, torch.func.jacrev):
                continue  # refused since it requires a gradient
            rows = torch.stack([x, x])
            for both in (
                torch.func.functionalize(transform(function)),
                transform(torch.func.functionalize(function)),
            ):
                with raises(NotImplementedError, text):
                    both(rows)


# ---- tensors without memory ----


@pytest.fixture(params=["meta", "fake"])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "meta":
        yield "meta"
        return
    with FakeTensorMode():
        yield "cpu"


def is_empty(tensor: Any) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def trained(device: str, dtype: Any = torch.float32) -> list[Any]:
    model = torch.nn.Linear(3, 3, device=device, dtype=dtype)
    model(torch.ones(2, 3, device=device, dtype=dtype)).sum().backward()
    return list(model.parameters())


@pytest.mark.parametrize("order", [2.0, 1.0, math.inf])
def test_a_norm_without_memory_is_a_scalar_as_in_pytorch(device: str, order: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        parameters = trained(device, dtype)
        found = [
            gtorch.clip_grad_norm_(parameters, 1.0, order),
            gtorch.get_total_norm([each.grad for each in parameters], order),
        ]
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        for norm in found:
            assert is_empty(norm)
            assert (norm.shape, norm.dtype) == ((), wide)
        gtorch.clip_grads_with_norm_(parameters, 1.0, found[0])
        assert all(is_empty(each.grad) for each in parameters)
    for module in (gtorch, torch.nn.utils):
        with pytest.raises(RuntimeError, match=r"item|_local_scalar_dense"):
            module.clip_grad_norm_(parameters, 1.0, order, error_if_nonfinite=True)
        with pytest.raises(RuntimeError, match=r"item|_local_scalar_dense"):
            module.get_total_norm([parameters[0].grad], order, error_if_nonfinite=True)


@pytest.mark.parametrize("recorded", [False, True])
def test_nests_without_memory(device: str, recorded: bool) -> None:
    x = torch.ones(4, 3, device=device).t()
    y = torch.ones(2, device=device, dtype=torch.float64, requires_grad=recorded)
    for limits in ((1.0,), (1.0, 2.0), (torch.ones((), device=device), x[0, 0])):
        new, norm = gradclip.clip_by_global_norm({"w": [x, None], "b": y}, *limits)
        assert all(map(is_empty, (new["w"][0], new["b"], norm)))
        assert (new["w"][0].stride(), new["b"].dtype, norm.dtype) == ((1, 3), y.dtype, y.dtype)
        assert new["w"][1] is None
    assert norm.requires_grad is recorded
    assert is_empty(gradclip.global_norm([x, y]))
    assert is_empty(gradclip.clip_by_global_norm_([x, y.detach()], 1.0, on_nonfinite="raise"))
    assert gradclip.clip_by_global_norm([x.half()], 1.0)[1].dtype is torch.float32


def test_transforms_of_tensors_without_memory(device: str) -> None:
    x = torch.ones(2, 3, device=device)
    new, norm = torch.vmap(lambda row: gradclip.clip_by_global_norm([row], 1.0))(x)
    assert (new[0].shape, norm.shape) == ((2, 3), (2,))
    assert torch.func.grad(lambda x: gradclip.global_norm([x]))(x).shape == (2, 3)


def test_what_is_wrong_without_memory_too(device: str) -> None:
    x = torch.ones(3, device=device)
    parameters = trained(device)
    with raises(ValueError, "max_norm is -1.0; it must be above 0 (inf: only measure)"):
        gtorch.clip_grad_norm_(parameters, -1.0)
    with raises(ValueError, "total_norm is -1.0; a norm is never negative"):
        gtorch.clip_grads_with_norm_(parameters, 1.0, -1.0)  # type: ignore[arg-type]
    with raises(TypeError, "clip_norm is 'x'; it must be a real number"):
        gradclip.clip_by_global_norm([x.requires_grad_()], "x")
    x = x.detach()
    with raises(TypeError, f"t_list[1] is int64; gradclip clips {DENSE}"):
        gradclip.global_norm([x, x.long()])
    text = (
        "t_list[0] has elements that share memory (strides (0,)); "
        "clip_by_global_norm returns new arrays instead"
    )
    with raises(ValueError, text):
        gradclip.clip_by_global_norm_([x[0].expand(3)], 1.0)


def test_memory_that_some_have_and_some_have_not() -> None:
    there, meta = torch.full((3,), 3.0), torch.ones(3, device="meta")
    for function in (
        lambda leaves: gradclip.clip_by_global_norm(leaves, 1.0),
        lambda leaves: gradclip.clip_by_global_norm_(leaves, 1.0),
        gradclip.global_norm,
    ):
        with raises(ValueError, "t_list[1] has no memory (device meta)"):
            function([there, meta])
    with raises(ValueError, "t_list[1] has no memory (device meta)"):
        gradclip.clip_by_global_norm([there.requires_grad_(), meta], 1.0)
    assert there.tolist() == [3, 3, 3]


@pytest.fixture
def world() -> Iterator[Any]:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_what_others_wait_for_has_memory(world: Any) -> None:
    there, meta = weight_of(torch.tensor([3.0, 4.0])), torch.ones(3, device="meta")
    frozen = torch.nn.Parameter(meta)
    assert gtorch.clip_grad_norm_([frozen, there], 2.5, group=world) == 5
    assert there.grad.tolist() == [1.5, 2]
    frozen.grad = meta
    for order in (2.0, 1.0):
        with raises(ValueError, "parameters[0].grad has no memory (device meta)"):
            gtorch.clip_grad_norm_([frozen], 2.5, order, group=world)
        with raises(ValueError, "tensors[0] has no memory (device meta)"):
            gtorch.get_total_norm([meta], order, group=world)
    for options in ({}, {"use_norm": 5.0}):
        for clip in (gradclip.clip_by_global_norm, gradclip.clip_by_global_norm_):
            with raises(ValueError, "t_list[0] has no memory (device meta)"):
                clip([meta], 2.5, group=world, **options)
    with raises(ValueError, "t_list[0] has no memory (device meta)"):
        gradclip.global_norm([meta], group=world)
    text = "a clip over several workers cannot be traced; clip outside of what is traced"
    for trace in (make_fx, torch.func.functionalize):
        with raises(NotImplementedError, text):
            trace(lambda x: gradclip.global_norm([x], group=world))(torch.ones(2))


@pytest.mark.slow
def test_a_clip_over_workers_breaks_the_graph_and_works(world: Any) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))

    def step(weight: Any, group: Any) -> Any:
        norm = gtorch.clip_grad_norm_([weight], 2.5, group=group)
        gradclip.clip_by_global_norm_([weight.grad], 2.0, group=group)
        again = gtorch.get_total_norm([weight.grad], group=group)
        return norm, again, gradclip.clip_by_global_norm([weight.grad], 1.0, group=group)[1]

    for spread in (False, True):
        weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        grads = [torch.tensor([3.0, 4.0]) for _ in range(2)]
        if spread:
            weights = [torch.nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])) for x in weights]
            grads = [distribute_tensor(x, mesh, [Shard(0)]) for x in grads]
        for weight, grad in zip(weights, grads, strict=True):
            weight.grad = grad
        group = None if spread else world
        torch._dynamo.reset()
        found = torch.compile(step, backend="aot_eager")(weights[0], group)
        assert (
            flat(found)
            == flat(step(weights[1], group))
            == flat(tuple(map(torch.tensor, (5.0, 2.0, 2.0))))
        )
        local = [x.grad.to_local() if spread else x.grad for x in weights]
        assert flat(local[0]) == flat(local[1])


@pytest.mark.slow
@since_torch("2.7", "fully_shard needs a GPU")
def test_memory_is_estimated_under_patch() -> None:
    code = """
        import contextlib
        import torch, torch.distributed as dist, gradclip, gradclip.torch
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.distributed._tools.mem_tracker import MemTracker
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
        mesh = init_device_mesh("cpu", (4,))

        def peak(sharded):
            model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
            if sharded:
                fully_shard(model, mesh=mesh)
            optimizer = torch.optim.Adam(model.parameters())
            if sharded:
                tracker = FSDPMemTracker(model, optimizer)
            else:
                tracker = MemTracker()
                tracker.track_external(model, optimizer)
            with tracker:
                model(torch.ones(4, 64)).sum().backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm)
                optimizer.step()
            grads = [each.grad for each in model.parameters()]
            return grads, tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]

        with FakeTensorMode():
            for sharded in (False, True):
                _, theirs = peak(sharded)
                with gradclip.torch.patch():
                    grads, ours = peak(sharded)
                print(ours <= theirs, gradclip.global_norm(grads).shape)
                print(gradclip.clip_by_global_norm(grads, 1.0)[1].shape)
                print(gradclip.clip_by_global_norm_(grads, 1.0, group=dist.group.WORLD).shape)
    """
    done = run_python(code)
    scalar = "torch.Size([])"
    assert done.stdout == f"True {scalar}\n{scalar}\n{scalar}\n" * 2, done.stderr


# ---- memory of another kind ----


def inferred(values: list[float], dtype: Any = torch.float32) -> Any:
    with torch.inference_mode():
        return torch.tensor(values).to(dtype)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("policy", ["nan", "zero", "keep"])
@pytest.mark.parametrize("value", [1.0, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_inference_tensors_are_written_as_all_others(
    inside: bool, policy: Any, value: float, dtype: Any
) -> None:
    def leaves(make: Any) -> list[Any]:
        slices = gradclip.IndexedSlices(make([2.0, 1.0]), torch.tensor([0, 1]))
        return [torch.ones(3), make([3.0] * 4, dtype), make([1.0] * 8)[::2], slices, make([value])]

    ours = leaves(inferred)
    theirs = leaves(lambda values, dtype=torch.float32: torch.tensor(values).to(dtype))
    with torch.inference_mode(inside):
        norm = gradclip.clip_by_global_norm_(ours, 1.0, on_nonfinite=policy)
    wanted = gradclip.clip_by_global_norm_(theirs, 1.0, on_nonfinite=policy)
    assert flat(norm) == flat(wanted)
    assert flat(ours) == flat(theirs)
    written = policy != "keep" or not math.isnan(value)
    assert ours[0]._version == int(written)


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_inference_gradients_are_written_as_all_others(value: float) -> None:
    weights = [weight_of(torch.full((2,), 3.0)) for _ in range(2)]
    weights[1].grad = inferred([4.0, value])
    others = [weight_of(weight.grad) for weight in weights]
    assert flat(gtorch.clip_grad_norm_(weights, 1.0)) == flat(gtorch.clip_grad_norm_(others, 1.0))
    assert flat([each.grad for each in weights]) == flat([each.grad for each in others])


def test_a_lazy_copy_is_written_without_its_original() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e5m2):
        original = torch.full((4,), 3.0).to(dtype)
        copy = torch._lazy_clone(original)
        gradclip.clip_by_global_norm_([copy], 1.0)
        assert (original.float().tolist(), copy.float()[0] < 1) == ([3.0] * 4, True)
        both = [torch._lazy_clone(original), original]
        gradclip.clip_by_global_norm_(both, 1.0)
        assert flat(both[0]) == flat(both[1])
    weight = weight_of(torch.zeros(4))
    original = torch.full((4,), 3.0)
    weight.grad = torch._lazy_clone(original)
    gtorch.clip_grad_norm_([weight], 1.0)
    assert (original.tolist(), weight.grad.tolist()) == ([3] * 4, [0.5] * 4)


def given_up(left: int) -> Any:
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(left)
    return tensor


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch._efficientzerotensor((3,)),
        lambda: given_up(0),
        lambda: given_up(8),
    ],
    ids=["zeros", "given up", "too short"],
)
def test_memory_that_is_not_there(make: Any) -> None:
    tensor = make()
    for function in (
        gradclip.global_norm,
        lambda leaves: gradclip.clip_by_global_norm(leaves, 1.0),
        lambda leaves: gradclip.clip_by_global_norm_(leaves, 1.0),
    ):
        with raises(ValueError, "t_list[1] has no memory (device cpu)"):
            function([torch.ones(3), tensor])


# ---- `attach` ----

OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


def trained_by(
    make: Callable[[Any], Any], clip: str, *, policy: Any = "nan", scales: Any
) -> tuple[list[Any], int]:
    """The weights after steps that are compiled, and how many graphs they took."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(160, 160), torch.nn.Linear(160, 2))
    optimizer = make(model.parameters())
    clipper = gtorch.attach(optimizer, 1.0, on_nonfinite=policy) if clip == "attach" else None
    step = torch.compile(optimizer.step, backend="aot_eager")
    for scale in scales:
        optimizer.zero_grad()
        model(torch.ones(8, 160)).mean().backward()
        for parameter in model.parameters():
            parameter.grad.mul_(scale)
        if clip == "before":
            gtorch.clip_grad_norm_(model.parameters(), 1.0, on_nonfinite=policy)
        step()
    assert clipper is None or clipper.steps == len(scales)
    return list(model.parameters()), counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_attached_step_is_compiled_as_often_as_one_that_is_not(make: Any) -> None:
    scales = [1e-3, 1e3, 10.0, 1e-2, 1e5, 3.0, 1e-4, 7.0]
    _, alone = trained_by(make, "no", scales=scales)
    ours, graphs = trained_by(make, "attach", scales=scales)
    theirs, _ = trained_by(make, "before", scales=scales)
    assert graphs == alone
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["zero", "keep"])
def test_what_is_not_finite_compiles_no_attached_step_again(policy: Any) -> None:
    scales = [1e-3, 1e3, math.nan, 10.0, math.inf, 1.0]
    _, finite = trained_by(OPTIMIZERS["adamw"], "attach", policy=policy, scales=[1e3] * 6)
    ours, graphs = trained_by(OPTIMIZERS["adamw"], "attach", policy=policy, scales=scales)
    theirs, _ = trained_by(OPTIMIZERS["adamw"], "before", policy=policy, scales=scales)
    assert graphs == finite
    assert flat(ours) == flat(theirs)


@pytest.mark.slow
def test_compiled_autograd_knows_of_attached_gradients() -> None:
    def train(compiled: bool) -> tuple[list[Any], Any, int]:
        torch._dynamo.reset()
        counters.clear()
        torch.manual_seed(0)
        model = torch.nn.Linear(160, 160)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clipper = gtorch.attach(optimizer, 1.0)
        backward = torch.compile(backend="aot_eager")
        for scale in (1e-3, 1e3, 10.0, 1.0):
            optimizer.zero_grad()
            loss = model(torch.ones(8, 160)).mean() * scale
            with torch._dynamo.compiled_autograd._enable(backward) if compiled else nullcontext():
                loss.backward()
            optimizer.step()
        return list(model.parameters()), clipper.clipped_steps, counters["stats"]["unique_graphs"]

    ours, theirs = train(compiled=True), train(compiled=False)
    assert flat(ours[:2]) == flat(theirs[:2])
    assert ours[2] <= 2  # of gradients that there are none of yet, and of those that are zeros
