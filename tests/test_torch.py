"""PyTorch: the backend, and the door `gradclip.torch` without `attach`."""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradclip
from cases import NARROW, WIDE, exact_ties, near_midpoints, random_case
from compare import assert_norm, assert_same_bits, assert_untouched, expected_of
from conftest import (
    _torch_elsewhere,
    _torch_read,
    _torch_tensor,
    since_torch,
    some_quick,
    version,
)
from host import flush_to_zero, run_python
from machines import KERNELS, machine

if version("torch") is None:
    pytest.skip("torch is not installed", allow_module_level=True)
import torch

import gradclip.torch as gtorch
from gradclip.torch import backend, pointers
from gradclip.torch.tensors import values_of
from host_torch import Moving

DTYPES = {name: dtype for name, dtype in (NARROW | WIDE).items() if hasattr(torch, name)}
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]


# PyTorch's own modules warn when they are first imported.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


def raises(error: type[Exception], text: str) -> Any:
    """The error with exactly this text."""
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def parameters_of(grads: list[Any]) -> list[Any]:
    """Parameters with these gradients; None for one without."""
    made = []
    for grad in grads:
        parameter = torch.nn.Parameter(torch.zeros(2 if grad is None else grad.shape))
        if grad is not None:
            parameter = torch.nn.Parameter(torch.zeros_like(grad), requires_grad=False)
            parameter.grad = grad
        made.append(parameter)
    return made


def is_fast(tensors: list[Any]) -> bool:
    """If the kernel takes the tensors by PyTorch's C interface."""
    return pointers.taken(tensors, writable=True) is not None


# ---- bits ----


def laid_out(tensor: Any, layout: str) -> Any:
    """The tensor, laid out in memory as nearly as PyTorch can."""
    match layout:
        case "strided" | "unaligned":
            room = torch.zeros((*tensor.shape, 3), dtype=torch.float32).to(tensor.dtype)
            room[..., 1] = tensor
            return room[..., 1]
        case "fortran" | "transposed":
            order = list(range(tensor.ndim))[::-1]
            return tensor.permute(order).contiguous().permute(order)
        case "broadcast" if tensor.ndim and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        case _:
            return tensor


def norm_of(norm: Any) -> Any:
    return norm.detach().numpy()[()]


WAYS: dict[str, Callable[..., Any]] = {
    "plain": gradclip.clip_by_global_norm,
    "elsewhere": _torch_elsewhere,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kernel_name", KERNELS)
@pytest.mark.parametrize("dtypes", [[name] for name in DTYPES] + [list(DTYPES)], ids="-".join)
@pytest.mark.slow
def test_random_lists(dtypes: list[str], kernel_name: str, way: str) -> None:
    rng = np.random.default_rng(len(dtypes) + 7)
    if way == "elsewhere" and kernel_name != KERNELS[0]:
        pytest.skip("PyTorch's operations are the same on every kernel")
    count = 60 if way == "elsewhere" else 150
    with machine(kernel_name):
        for _ in range(count):
            case = random_case(rng, [DTYPES[name] for name in dtypes])
            wanted = expected_of(case)
            options: Any = {"on_nonfinite": case.on_nonfinite, "use_norm": case.use_norm}
            leaves = [
                laid_out(_torch_tensor(values), layout)
                for values, layout in zip(case.values, case.layouts, strict=True)
            ]
            if not leaves:
                continue
            if wanted.leaves is None:
                with pytest.raises(FloatingPointError):
                    WAYS[way](leaves, case.clip_norm, **options)
                with pytest.raises((FloatingPointError, ValueError)):
                    gradclip.clip_by_global_norm_(leaves, case.clip_norm, **options)
                continue
            clipped, norm = WAYS[way](leaves, case.clip_norm, **options)
            assert_norm(norm_of(norm), wanted.norm)
            for new, expected in zip(map(_torch_read, clipped), wanted.leaves, strict=True):
                assert_same_bits(new, expected, nan_payload=False)
            assert_untouched(list(map(_torch_read, leaves)), case.values)
            if way == "plain":
                leaves = [leaf.clone() for leaf in leaves]
                norm = gradclip.clip_by_global_norm_(leaves, case.clip_norm, **options)
                assert_norm(norm_of(norm), wanted.norm)
                for new, expected in zip(map(_torch_read, leaves), wanted.leaves, strict=True):
                    assert_same_bits(new, expected, nan_payload=False)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", some_quick(["float32"], ["float64", "bfloat16", "float16"]))
def test_norms_between_two_numbers(dtype: str, way: str) -> None:
    rng = np.random.default_rng(3)
    lists = [*near_midpoints(rng, DTYPES[dtype], 8), *exact_ties(rng, DTYPES["float32"], 8)]
    for values in lists:
        tensors = list(map(_torch_tensor, values))
        assert_norm(norm_of(WAYS[way](tensors, math.inf)[1]), gradclip.global_norm(values))


@pytest.mark.parametrize("shape", [(1 << 21,), (700, 3000), (3, 5, 1 << 18)])
@pytest.mark.parametrize("dtype", [*FLOATS, torch.complex64])
@pytest.mark.slow
def test_large_tensors_on_pytorch_s_own_threads(dtype: Any, shape: tuple[int, ...]) -> None:
    tensors = [torch.randn(shape, dtype=torch.float32).to(dtype) for _ in range(2)]
    assert is_fast(tensors)
    assert backend.hold(tensors, str, writable=True).memory.most_threads == torch.get_num_threads()
    values = list(map(_torch_read, tensors))
    clipped, norm = gradclip.clip_by_global_norm(values, 1.0)
    assert_norm(norm_of(gtorch.get_total_norm(tensors)), norm)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        copies = [tensor.clone() for tensor in tensors]
        assert_norm(norm_of(gradclip.clip_by_global_norm_(copies, 1.0)), norm)
        for new, wanted in zip(map(_torch_read, copies), clipped, strict=True):
            assert_same_bits(new, wanted, nan_payload=False)


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
def test_complex_half() -> None:
    tensor = torch.tensor([3 + 4j, 0, 12j], dtype=torch.complex32)
    clipped, norm = gradclip.clip_by_global_norm([tensor], 6.5)
    assert norm == 13
    assert clipped[0].dtype == torch.complex32
    assert clipped[0].to(torch.complex64).tolist() == [1.5 + 2j, 0, 6j]
    gradclip.clip_by_global_norm_([tensor], 6.5)
    assert tensor.to(torch.complex64).tolist() == [1.5 + 2j, 0, 6j]


@pytest.mark.parametrize("lazy", [lambda x: x.conj(), lambda x: x.conj().imag])
def test_what_is_conjugated_or_negated_later(lazy: Callable[[Any], Any]) -> None:
    base = torch.tensor([3 + 1j, 2 - 4j], dtype=torch.complex64)
    wanted, _ = gradclip.clip_by_global_norm([lazy(base).resolve_conj().resolve_neg().clone()], 1.0)
    assert lazy(base).is_conj() or lazy(base).is_neg()
    new, _ = gradclip.clip_by_global_norm([lazy(base)], 1.0)
    assert torch.equal(new[0], wanted[0])
    assert not new[0].is_conj()
    kept, _ = gradclip.clip_by_global_norm([lazy(base)], math.inf)
    assert torch.equal(kept[0], lazy(base))
    leaf = lazy(base.clone())
    gradclip.clip_by_global_norm_([leaf], 1.0)
    assert torch.equal(leaf.resolve_conj().resolve_neg(), wanted[0])


def test_outputs_keep_memory_order_and_are_new() -> None:
    leaves = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(3, 4).t(),
        torch.randn(6)[::2],
    ]
    for limit in (1.0, math.inf):
        new, _ = gradclip.clip_by_global_norm(leaves, limit)
        assert [x.stride() for x in new] == [torch.empty_like(x).stride() for x in leaves]
        assert not {x.data_ptr() for x in new} & {x.data_ptr() for x in leaves}


def test_the_host_s_flush_to_zero_changes_nothing() -> None:
    tiny = [torch.full((1000,), 1e-40), torch.full((3,), 1e-42)]
    wanted, norm = gradclip.clip_by_global_norm(tiny, 1e-41)
    assert norm > 0
    torch.set_flush_denormal(True)
    try:
        new, flushed = gradclip.clip_by_global_norm(tiny, 1e-41)
    finally:
        torch.set_flush_denormal(False)
    assert norm_of(norm).tobytes() == norm_of(flushed).tobytes()
    for one, other in zip(new, wanted, strict=True):
        assert_same_bits(one.numpy(), other.numpy(), nan_payload=True)
    with flush_to_zero():
        assert norm_of(gradclip.global_norm(tiny)).tobytes() == norm_of(norm).tobytes()


@pytest.mark.slow
def test_where_no_function_tells_the_layout_the_attribute_does() -> None:
    code = """
        import torch
        from gradclip.torch import pointers
        pointers._MAY_LACK = "aoti_torch_get_what_none_has"
        pointers._FUNCTIONS = tuple(
            pointers._MAY_LACK if name.endswith("layout") else name for name in pointers._FUNCTIONS
        )
        dense = torch.tensor([3.0, 4.0])
        for leaf in (dense, dense.to_sparse(), dense.to_mkldnn(), dense):
            print(pointers.taken([leaf], writable=True) is not None)
    """
    done = run_python(code)
    assert done.stdout.split() == ["True", "False", "False", "True"], done.stderr


@pytest.mark.slow
def test_a_c_interface_that_lacks_something_is_told_once() -> None:
    code = """
        import warnings
        import torch, gradclip
        from gradclip.torch import pointers
        pointers._FUNCTIONS = (*pointers._FUNCTIONS, "aoti_torch_get_what_none_has")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for _ in range(2):
                print(float(gradclip.global_norm([torch.tensor([3.0, 4.0])])))
        print(*(each.message for each in told))
    """
    done = run_python(code)
    told = (
        f"PyTorch {torch.__version__} has no aoti_torch_get_what_none_has, so gradclip reads "
        "tensors as NumPy arrays: the same bits, slower for small ones, and gradients are not "
        "measured while backward makes them"
    )
    assert done.stdout.splitlines() == ["5.0", "5.0", told], done.stderr


def test_without_pytorch_s_c_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [torch.randn(50, dtype=torch.float64), torch.randn(3, 4).bfloat16(), torch.randn(7)]
    wanted = gradclip.clip_by_global_norm(leaves, 1.0)
    monkeypatch.setattr(pointers, "_c_interface", lambda: False)
    assert not is_fast(leaves)
    got = gradclip.clip_by_global_norm(leaves, 1.0)
    assert torch.equal(got[1], wanted[1])
    assert all(map(torch.equal, got[0], wanted[0]))
    gradclip.clip_by_global_norm_(leaves, 1.0)
    assert all(map(torch.equal, leaves, wanted[0]))


# ---- sparse ----


def sparse_ones(dtype: Any) -> dict[str, Any]:
    """The matrix [[0, 3], [4, 0]] in each layout; coo with 3 in two parts."""
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]]).to(dtype)
    values = torch.tensor([1.0, 4.0, 2.0]).to(dtype)
    rows = torch.tensor([[0, 1, 0], [1, 0, 1]])
    made = {
        "coo": torch.sparse_coo_tensor(rows, values, (2, 2), check_invariants=True),
        "hybrid": torch.sparse_coo_tensor(
            torch.tensor([[0, 1, 0]]),
            torch.tensor([[0.0, 1.0], [4.0, 0.0], [0.0, 2.0]]).to(dtype),
            (2, 2),
            check_invariants=True,
        ),
        "slices": gradclip.IndexedSlices(
            torch.tensor([[0.0, 1.0], [4.0, 0.0], [0.0, 2.0]]).to(dtype),
            torch.tensor([0, 1, 0]),
            (2, 2),
        ),
    }
    if dtype not in FLOAT8:
        made["coalesced"] = dense.to_sparse_coo()
    if dtype in (torch.float32, torch.float64, torch.complex64):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # compressed layouts are in beta
            made |= {
                "csr": dense.to_sparse_csr(),
                "csc": dense.to_sparse_csc(),
                "bsr": dense.to_sparse_bsr((1, 1)),
                "bsc": dense.to_sparse_bsc((1, 1)),
            }
    return made


def stored(leaf: Any) -> Any:
    return values_of(leaf)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("dtype", [*FLOATS, *FLOAT8, torch.complex64], ids=str)
def test_sparse_layouts_count_what_they_stand_for(dtype: Any, elsewhere: bool) -> None:
    clip = _torch_elsewhere if elsewhere else gradclip.clip_by_global_norm
    for name, leaf in sparse_ones(dtype).items():
        before = stored(leaf).clone()
        new, norm = clip([leaf], 2.5)
        assert norm == 5, name
        assert type(new[0]) is type(leaf)
        assert torch.equal(stored(new[0]).to(torch.complex64), before.to(torch.complex64) / 2)
        assert torch.equal(stored(leaf).to(torch.complex64), before.to(torch.complex64))
        if isinstance(leaf, torch.Tensor):
            assert (new[0].layout, new[0].shape) == (leaf.layout, leaf.shape)
            if leaf.layout is torch.sparse_coo:
                assert new[0].is_coalesced() == leaf.is_coalesced()
        assert clip([leaf], 5.0)[1] == 5
        assert gradclip.clip_by_global_norm_([leaf], 2.5) == 5
        assert torch.equal(stored(leaf).to(torch.complex64), before.to(torch.complex64) / 2)


def test_a_sparse_embedding_s_gradient() -> None:
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.zipf(1.3, 8192) % 1000)
    table = torch.nn.Embedding(1000, 8, sparse=True)
    (table(ids) * torch.randn(8)).sum().backward()
    dense = table.weight.grad.double().to_dense()
    norm = gtorch.clip_grad_norm_(table.parameters(), 1.0)
    assert float(norm) == pytest.approx(float(dense.norm()), rel=1e-6)
    assert float(table.weight.grad.double().to_dense().norm()) == pytest.approx(1, abs=1e-6)


BAD_SPARSE = [
    (
        lambda: torch.sparse_coo_tensor([[0, 5]], [1.0, 2.0], (2,), check_invariants=False),
        "t_list[0] has an index out of range on axis 0 of length 2",
    ),
    (
        lambda: gradclip.IndexedSlices(torch.ones(2, 2), torch.tensor([0, 7]), (3, 2)),
        "t_list[0].indices holds 7; dense_shape has 3 rows",
    ),
    (
        lambda: gradclip.IndexedSlices(torch.ones(2, 2), torch.tensor([0.0, 1.0])),
        "t_list[0].indices is float32; indices are integers",
    ),
]


@pytest.mark.parametrize(("make", "text"), BAD_SPARSE)
def test_malformed_sparse_leaves(make: Callable[[], Any], text: str) -> None:
    with raises(ValueError, text):
        gradclip.global_norm([make()])


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_a_malformed_compressed_leaf() -> None:
    leaf = torch.sparse_csr_tensor([0, 1, 2], [0, 9], [1.0, 2.0], (2, 2), check_invariants=False)
    with pytest.raises(ValueError, match=r"^t_list\[1\] is malformed: "):
        gradclip.clip_by_global_norm_([torch.ones(2), leaf], 1.0)


# ---- what is refused ----


def nested() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


ACCEPTED = "gradclip clips float16, bfloat16, float8, float32, float64 and complex tensors"


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: torch.ones(2, dtype=torch.int64), TypeError, f"is int64; {ACCEPTED}"),
        (lambda: torch.ones(2, dtype=torch.bool), TypeError, f"is bool; {ACCEPTED}"),
        pytest.param(
            lambda: torch.zeros(2, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            TypeError,
            f"is float8_e8m0fnu; {ACCEPTED}",
            marks=since_torch("2.7", "there is no float8_e8m0fnu"),
        ),
        (
            nested,
            TypeError,
            f"is a tensor that is nested, quantized or of mkldnn; {ACCEPTED}",
        ),
        (
            lambda: torch.ones(2, 2).to_mkldnn(),
            TypeError,
            f"is a tensor that is nested, quantized or of mkldnn; {ACCEPTED}",
        ),
        (lambda: torch.ones(2, device="meta"), ValueError, "has no memory (device meta)"),
    ],
)
def test_what_is_refused_is_named_and_nothing_is_written(
    make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    good = torch.tensor([3.0, 4.0])
    for function in (gradclip.clip_by_global_norm, gradclip.clip_by_global_norm_):
        with raises(error, f"t_list['b'] {text}"):
            function({"a": good, "b": make()}, 1.0)
    assert good.tolist() == [3, 4]


def test_memory_that_has_been_given_up() -> None:
    leaf = torch.ones(1000)
    leaf.untyped_storage().resize_(0)
    for function in (gradclip.clip_by_global_norm, gradclip.clip_by_global_norm_):
        with raises(ValueError, "t_list[0] has no memory (device cpu)"):
            function([leaf], 1.0)


def test_a_tensor_of_zeros_that_has_no_memory() -> None:
    for function in (gradclip.global_norm, gradclip.clip_by_global_norm_):
        with pytest.raises(ValueError, match=r"^t_list\[0\] has no memory \(device cpu\)$"):
            function([torch._efficientzerotensor((3,))], *[1.0][function is gradclip.global_norm :])


def test_in_place_elements_that_share_memory() -> None:
    leaf = torch.ones(1).expand(5)
    with pytest.raises(ValueError, match=r"^t_list\[1\] has elements that share memory"):
        gradclip.clip_by_global_norm_([torch.ones(2), leaf], 1.0)
    assert gradclip.global_norm([leaf]) == np.float32(math.sqrt(5))


def test_tensors_and_arrays_do_not_mix() -> None:
    with pytest.raises(TypeError, match="one call clips leaves of one framework"):
        gradclip.global_norm([torch.ones(2), np.ones(2)])


def test_a_tensor_subclass_that_hides_its_memory() -> None:
    from torch.masked import masked_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        masked = masked_tensor(torch.ones(2), torch.tensor([True, False]))
    with raises(TypeError, f"t_list[0] is MaskedTensor; {ACCEPTED}"):
        gradclip.global_norm([masked])


def test_a_plain_subclass_is_a_tensor() -> None:
    class Named(torch.Tensor):
        pass

    leaf = torch.tensor([3.0, 4.0]).as_subclass(Named)
    assert float(gradclip.clip_by_global_norm_([leaf], 2.5)) == 5
    assert torch.Tensor(leaf).tolist() == [1.5, 2]


# ---- autograd sees what is written ----


def test_in_place_changes_are_counted_and_only_those() -> None:
    leaves = [torch.randn(5), torch.randn(3).half(), torch.randn(2, dtype=torch.complex64).conj()]
    before = [leaf._version for leaf in leaves]
    gradclip.clip_by_global_norm_(leaves, math.inf)
    assert [leaf._version for leaf in leaves] == before
    gradclip.clip_by_global_norm_(leaves, 0.1)
    assert all(leaf._version > version for leaf, version in zip(leaves, before, strict=True))
    weight = torch.ones(2, requires_grad=True)
    saved = torch.tensor([3.0, 4.0])
    loss = (weight * saved).sum()
    gradclip.clip_by_global_norm_([saved], 1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_tensors() -> None:
    with torch.inference_mode():
        leaf = torch.tensor([3.0, 4.0])
        assert gradclip.clip_by_global_norm_([leaf], 2.5) == 5
    assert leaf.tolist() == [1.5, 2]


# ---- derivatives ----


def reference(values: list[Any], limit: Any, given: Any = None) -> tuple[list[Any], Any]:
    """The formula, for autograd to differentiate."""
    squares = [(x.abs() ** 2 if x.is_complex() else x * x).sum() for x in values]
    norm = sum(squares).sqrt() if given is None else given
    factor = torch.where(norm > limit, limit / norm, 1.0)
    return [x * factor for x in values], norm


def clip_one(x: Any, limit: Any = 1.0) -> Any:
    return gradclip.clip_by_global_norm([x], limit)[0][0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize("given", [False, True])
def test_gradients_are_those_of_the_formula(dtype: Any, scale: float, given: bool) -> None:
    torch.manual_seed(0)
    values = [(torch.randn(n, dtype=dtype) * scale).requires_grad_() for n in (3, 4)]
    limit = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    use = torch.tensor(2.0, dtype=torch.float64, requires_grad=True) if given else None
    inputs = [*values, limit, *([use] if given else [])]
    weights = [torch.randn_like(x) for x in values]

    def loss(new: list[Any], norm: Any) -> Any:
        terms = [(w.conj() * x).sum() for w, x in zip(weights, new, strict=True)]
        total = sum(term.real if term.is_complex() else term for term in terms)
        return total**2 + norm**3

    def derivatives(clip: Callable[..., Any]) -> list[Any]:
        first = torch.autograd.grad(loss(*clip()), inputs, create_graph=True, allow_unused=True)
        first = [
            torch.zeros_like(x) if g is None else g for x, g in zip(inputs, first, strict=True)
        ]
        again = sum((g.abs() ** 2).sum() for g in first)
        second = torch.autograd.grad(again, inputs, allow_unused=True)
        return [*first, *second]

    ours = derivatives(lambda: gradclip.clip_by_global_norm(values, limit, use))
    theirs = derivatives(lambda: reference(values, limit, use))
    for one, other in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if one is None else one,
            zero.to(one) if other is None else other,
            rtol=1e-10,
            atol=1e-12,
        ) if one is not None else None
        assert (one is None) <= (other is None or not other.abs().sum())


@pytest.mark.parametrize("limit", [1.0, 100.0, math.inf])
def test_gradcheck(limit: float) -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, dtype=torch.complex128, requires_grad=True)

    def function(x: Any, y: Any) -> Any:
        new, norm = gradclip.clip_by_global_norm([x, y], limit)
        return (*new, norm)

    assert torch.autograd.gradcheck(function, (x, y), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, (x, y))


def test_the_derivative_where_an_output_is_not_used() -> None:
    x = torch.tensor([3.0, -0.0, -4.0], requires_grad=True)
    gradclip.global_norm([x]).backward()
    assert str(x.grad.tolist()[1]) == "-0.0"
    y = torch.tensor([1.0], requires_grad=True)
    (new, _), _ = gradclip.clip_by_global_norm([x, y], 1.0, use_norm=math.inf)
    used, unused = torch.autograd.grad(new.sum(), [x, y])
    assert used.isnan().all()
    assert unused.tolist() == [0]
    x = torch.tensor([math.nan], requires_grad=True)
    (new, _), _ = gradclip.clip_by_global_norm([x, y], 1.0)
    assert torch.autograd.grad(new.sum(), [y])[0].isnan().all()


def test_at_a_norm_of_zero_the_jacobian_is_the_identity() -> None:
    zero = torch.zeros(3, requires_grad=True)
    new, norm = gradclip.clip_by_global_norm([zero], 1.0)
    (new[0].sum() + norm).backward()
    assert zero.grad.tolist() == [1, 1, 1]
    assert torch.func.jacrev(clip_one)(torch.zeros(2)).tolist() == [[1, 0], [0, 1]]


def test_function_transforms() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, dtype=torch.float64) * 5
    wanted = torch.autograd.functional.jacobian(lambda x: reference([x], 1.0)[0][0], x)
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(transform(clip_one)(x), wanted)
    hessian = torch.func.hessian(lambda x: clip_one(x)[0])(x)
    other = torch.func.hessian(lambda x: reference([x], torch.tensor(1.0))[0][0][0])(x)
    torch.testing.assert_close(hessian, other)
    rows = torch.randn(5, 3) * 3
    each = torch.stack([clip_one(row) for row in rows])
    assert torch.equal(torch.func.vmap(clip_one)(rows), each)
    assert torch.equal(torch.func.vmap(clip_one, in_dims=1)(rows.T), each)
    grads = torch.func.vmap(torch.func.grad(lambda x: clip_one(x).sum()))(rows)
    torch.testing.assert_close(
        grads, torch.stack([torch.func.grad(lambda x: clip_one(x).sum())(row) for row in rows])
    )
    limits = torch.tensor([0.5, 1.0, 2.0, 3.0, 100.0])
    each = torch.stack([clip_one(row, limit) for row, limit in zip(rows, limits, strict=True)])
    assert torch.equal(torch.func.vmap(clip_one)(rows, limits), each)


def test_gradients_of_numbers_near_the_ends_of_their_range() -> None:
    for dtype, size in ((torch.float64, 1e200), (torch.float64, 1e-200), (torch.float32, 3e38)):
        x = torch.full((2,), size, dtype=dtype, requires_grad=True)
        (clip_one(x, size / 1e3) * torch.tensor([1.0, 0.0])).sum().backward()
        expected = 1e-3 / 2**1.5
        np.testing.assert_allclose(x.grad.double().numpy(), [expected, -expected], rtol=1e-6)


def test_slices_of_rows_that_add_up_are_differentiated() -> None:
    values = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([1, 0, 1])

    def ours(values: Any) -> Any:
        new, norm = gradclip.clip_by_global_norm([gradclip.IndexedSlices(values, rows)], 0.5)
        return new[0].values, norm

    assert torch.autograd.gradcheck(ours, (values,), check_forward_ad=True)
    coo = torch.sparse_coo_tensor(
        rows[None], values.detach(), (2, 2), check_invariants=True
    ).requires_grad_()
    with raises(
        ValueError, "t_list[0] requires a gradient and is not coalesced: coalesce it first"
    ):
        gradclip.clip_by_global_norm([coo], 1.0)


@pytest.mark.parametrize(("policy", "slope"), [("nan", math.nan), ("zero", 0.0), ("keep", 1.0)])
def test_gradients_where_an_element_is_inf(policy: Any, slope: float) -> None:
    x = torch.tensor([1.0, math.inf], requires_grad=True)
    new, _ = gradclip.clip_by_global_norm([x], 1.0, on_nonfinite=policy)
    new[0].sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), [slope, slope])
    with pytest.raises(FloatingPointError, match=r"t_list\[0\] holds 0 NaN and 1 inf"):
        gradclip.clip_by_global_norm([x], 1.0, on_nonfinite="raise")


def test_no_gradient_is_recorded_where_none_is_wanted() -> None:
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    with torch.no_grad():
        new, norm = gradclip.clip_by_global_norm([x], 1.0)
    assert not new[0].requires_grad
    assert not norm.requires_grad


# ---- torch.nn.utils' words ----


@pytest.mark.parametrize("name", ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"])
def test_the_signature_begins_as_that_of_pytorch(name: str) -> None:
    theirs = inspect.signature(getattr(torch.nn.utils, name)).parameters.values()
    ours = inspect.signature(getattr(gtorch, name)).parameters.values()
    assert [(p.name, p.default, p.kind) for p in theirs] == [
        (p.name, p.default, p.kind) for p in ours if p.kind is not p.KEYWORD_ONLY
    ]


@pytest.mark.parametrize("norm_type", [0.5, 1, 2, 2.0, 3, "inf", math.inf, 7.5])
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_as_pytorch_in_float64(norm_type: Any, limit: float) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(
        torch.nn.Linear(7, 5), torch.nn.Conv1d(1, 2, 3), torch.nn.Linear(2, 2)
    )
    ours, theirs = [], []
    for parameter in model.double().parameters():
        parameter.grad = torch.randn_like(parameter)
        ours.append(torch.nn.Parameter(parameter.detach().clone()))
        theirs.append(torch.nn.Parameter(parameter.detach().clone()))
        ours[-1].grad, theirs[-1].grad = parameter.grad.clone(), parameter.grad.clone()
    norm = gtorch.clip_grad_norm_(iter(ours), limit, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, limit, norm_type)
    torch.testing.assert_close(norm, wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        gtorch.get_total_norm([p.grad for p in model.parameters()], norm_type), wanted
    )
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=3e-6, atol=0)  # their 1e-6


@pytest.mark.filterwarnings("ignore:ComplexHalf support:UserWarning")
@pytest.mark.parametrize("norm_type", [0.5, 1, 3, math.inf, 2])
@pytest.mark.parametrize("dtype", some_quick(FLOATS[:1], [*FLOATS[1:], *FLOAT8, *COMPLEX]), ids=str)
def test_norms_of_every_order_against_float64(dtype: Any, norm_type: float) -> None:
    rng = np.random.default_rng(2)
    for scale in (1.0, 1e-3):
        values = [rng.standard_normal(n) * scale for n in (1, 70_000, 0, 33)]
        tensors = [torch.tensor(x).to(dtype) for x in values]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        every = torch.cat([x.to(wide).reshape(-1).abs() for x in tensors]).numpy()
        wanted = np.linalg.norm(every, norm_type) if every.any() else 0.0
        norm = gtorch.get_total_norm(tensors, norm_type)
        assert norm.dtype is (
            torch.float64 if wide is dtype or dtype is torch.float64 else torch.float32
        )
        assert float(norm) == pytest.approx(
            wanted, rel=1e-7 if norm.dtype is torch.float32 else 1e-13
        )


def test_norms_of_other_orders_neither_overflow_nor_miss() -> None:
    large = float(np.float32(1e30))
    norm = gtorch.get_total_norm([torch.tensor([large, large])], 3.0)
    assert float(norm) == pytest.approx(large * 2 ** (1 / 3), rel=1e-7)
    assert gtorch.get_total_norm([torch.tensor([3.0]), torch.tensor([])], math.inf) == 3
    assert math.isnan(gtorch.get_total_norm([torch.tensor([math.nan, math.inf])], 1.0))
    assert math.isnan(
        gtorch.get_total_norm([torch.tensor([math.inf]), torch.tensor([math.nan])], 1.0)
    )
    assert gtorch.get_total_norm([torch.tensor([math.inf, 1.0])], 1.0) == math.inf
    assert gtorch.get_total_norm([sparse_ones(torch.float32)["coo"]], 1.0) == 7
    assert gtorch.get_total_norm([torch.ones(10**6)], 0.01) == math.inf


def test_no_gradients() -> None:
    for parameters in ([], [torch.nn.Parameter(torch.ones(2))]):
        norm = gtorch.clip_grad_norm_(parameters, 1.0)
        assert (norm.item(), norm.dtype, norm.shape) == (0, torch.float32, ())
    assert gtorch.get_total_norm([]) == 0


def test_an_empty_generator_is_warned_of() -> None:
    text = "`parameters` is an empty generator, no gradient clipping will occur."
    with pytest.warns(UserWarning, match=f"^{re.escape(text)}$") as seen:
        gtorch.clip_grad_norm_((p for p in ()), 1.0)
    assert seen[0].filename == __file__


def test_one_tensor_in_place_of_a_list() -> None:
    parameter = parameters_of([torch.tensor([3.0, 4.0])])[0]
    assert gtorch.clip_grad_norm_(parameter, 2.5) == 5
    assert parameter.grad.tolist() == [1.5, 2]
    gtorch.clip_grads_with_norm_(parameter, 1.25, torch.tensor(2.5))
    assert parameter.grad.tolist() == [0.75, 1]
    assert gtorch.get_total_norm(parameter.grad) == 1.25


def test_parameters_without_gradient_are_passed_over() -> None:
    parameters = parameters_of([None, torch.tensor([3.0]), None, torch.tensor([4.0])])
    assert gtorch.clip_grad_norm_(parameters, 2.5) == 5
    assert [p.grad if p.grad is None else p.grad.item() for p in parameters] == [None, 1.5, None, 2]


def test_error_if_nonfinite_has_pytorch_s_text() -> None:
    for norm_type in (2.0, 1.0, math.inf):
        parameters = parameters_of([torch.tensor([1.0, math.nan])])
        with pytest.raises(RuntimeError) as theirs:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
        with raises(RuntimeError, str(theirs.value)):
            gtorch.clip_grad_norm_(parameters, 1.0, norm_type, error_if_nonfinite=True)
        assert parameters[0].grad[0] == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_and_inf_do_as_in_pytorch(bad: float, norm_type: float, dtype: Any) -> None:
    def made() -> Any:
        return parameters_of(
            [torch.tensor([1.0, bad, -2.0]).to(dtype), torch.tensor([3.0]).to(dtype)]
        )

    ours, theirs = made(), made()
    norm = gtorch.clip_grad_norm_(ours, 1.0, norm_type)
    wanted = torch.nn.utils.clip_grad_norm_(theirs, 1.0, norm_type)
    np.testing.assert_array_equal(norm.item(), wanted.item())
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.grad.double().numpy(), other.grad.double().numpy())


@pytest.mark.parametrize("dtype", [*FLOAT8, torch.complex64], ids=str)
def test_inf_makes_finite_gradients_zero_in_dtypes_that_pytorch_cannot_clip(dtype: Any) -> None:
    finite = torch.tensor([1.0, -2.0]).to(dtype)
    parameters = parameters_of([finite, torch.tensor([math.inf])])
    assert gtorch.clip_grad_norm_(parameters, 1.0) == math.inf
    assert parameters[0].grad.to(torch.complex64).tolist() == [0, 0]
    assert parameters[1].grad.isnan().all()


@pytest.mark.parametrize(
    ("policy", "wanted"), [("nan", [math.nan] * 2), ("zero", [0, 0]), ("keep", [1, math.inf])]
)
def test_policies_by_keyword(policy: Any, wanted: list[float]) -> None:
    parameters = parameters_of([torch.tensor([1.0, math.inf])])
    gtorch.clip_grad_norm_(parameters, 1.0, on_nonfinite=policy)
    np.testing.assert_array_equal(parameters[0].grad.numpy(), wanted)


def test_raise_names_the_gradient() -> None:
    parameters = parameters_of([None, torch.ones(2), torch.tensor([math.nan, math.inf, 1.0])])
    text = "the global norm is nan: parameters[2].grad holds 1 NaN and 1 inf"
    with raises(FloatingPointError, text):
        gtorch.clip_grad_norm_(parameters, 1.0, on_nonfinite="raise")
    assert parameters[1].grad.tolist() == [1, 1]


def test_a_parameter_listed_twice_counts_once() -> None:
    parameter = parameters_of([torch.tensor([3.0, 4.0])])[0]
    assert gtorch.clip_grad_norm_([parameter, parameter], 2.5) == 5
    assert parameter.grad.tolist() == [1.5, 2]
    assert gtorch.get_total_norm([parameter.grad] * 3) == 2.5
    gtorch.clip_grads_with_norm_([parameter] * 2, 1.0, 2.0)
    assert parameter.grad.tolist() == [0.75, 1]


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_listed_twice_with_other_norms(norm_type: float) -> None:
    parameters = parameters_of([torch.tensor([3.0, 4.0])]) * 2
    parameters += parameters_of([parameters[0].grad.view(-1)])
    once = gtorch.get_total_norm(parameters[0].grad, norm_type)
    assert gtorch.clip_grad_norm_(parameters, 1e9, norm_type) == once
    assert gtorch.get_total_norm([p.grad for p in parameters], norm_type) == once


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_limit_of_inf_only_measures(bad: float) -> None:
    parameter = parameters_of([torch.tensor([3.0, bad])])[0]
    np.testing.assert_equal(float(gtorch.clip_grad_norm_([parameter], math.inf)), bad)
    gtorch.clip_grads_with_norm_([parameter], math.inf, torch.tensor(bad))
    np.testing.assert_array_equal(parameter.grad.numpy(), np.float32([3, bad]))


def test_no_eps_and_nothing_is_written_at_the_limit() -> None:
    parameter = parameters_of([torch.tensor([3.0, 4.0])])[0]
    version = parameter.grad._version
    assert gtorch.clip_grad_norm_([parameter], 5.0) == 5
    assert parameter.grad._version == version
    assert parameter.grad.tolist() == [3, 4]


def test_the_norm_is_never_rounded_to_half_precision() -> None:
    parameters = parameters_of([torch.full((3,), 100.0).half(), torch.ones(1000).bfloat16()])
    norm = gtorch.clip_grad_norm_(parameters, 1e9)
    assert norm.dtype is torch.float32
    assert norm == np.float32(math.sqrt(31000))


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, -0.0])
def test_limits_out_of_range(limit: float) -> None:
    parameters = parameters_of([torch.ones(2)])
    text = f"max_norm is {limit!r}; it must be above 0 (inf: only measure)"
    with raises(ValueError, text):
        gtorch.clip_grad_norm_(parameters, limit)
    with raises(ValueError, text):
        gtorch.clip_grads_with_norm_(parameters, limit, torch.tensor(1.0))


def test_other_arguments_out_of_range() -> None:
    parameters = parameters_of([torch.ones(2)])
    for order in (0, -1, math.nan):
        with raises(
            ValueError, f"norm_type is {order!r}; it must be above 0 (inf: the largest |x|)"
        ):
            gtorch.clip_grad_norm_(parameters, 1.0, order)
    with raises(ValueError, "total_norm is -1.0; a norm is never negative"):
        gtorch.clip_grads_with_norm_(parameters, 1.0, -1.0)
    with raises(TypeError, "max_norm is 'x'; it must be a real number"):
        gtorch.clip_grad_norm_(parameters, "x")
    with raises(TypeError, f"parameters[0].grad is int64; {ACCEPTED}"):
        parameter = torch.nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
        parameter.grad = torch.ones(2, dtype=torch.int64)
        gtorch.clip_grad_norm_([parameter], 1.0)
    text = (
        "group is 'x'; for tensors it is a ProcessGroup, a DeviceMesh or a communicator of mpi4py"
    )
    with raises(TypeError, text):
        gtorch.clip_grad_norm_(parameters, 1.0, group="x")


@pytest.mark.parametrize("name", ["clip_norm", "use_norm", "max_norm", "total_norm", "clip_grad"])
def test_limits_are_read_before_memory_is_held(name: str) -> None:
    leaf = torch.full((4,), 16.0)
    (weight,) = parameters_of([leaf])
    limit = Moving(4.0 if name in ("use_norm", "total_norm") else 1.0, leaf)
    if name in ("clip_norm", "use_norm"):
        arguments = {"clip_norm": 1.0, "use_norm": 4.0, name: limit}
        (new,), _ = gradclip.clip_by_global_norm([leaf], **arguments)
        assert new.tolist() == [0.5] * 4
        leaf.set_(limit.old)
        gradclip.clip_by_global_norm_([leaf], **arguments)
    elif name == "clip_grad":
        gtorch.clip_grad_norm_([weight], limit)
    else:
        arguments = {"max_norm": 1.0, "total_norm": 4.0, name: limit}
        gtorch.clip_grads_with_norm_([weight], **arguments)
    assert leaf.tolist() == [0.5] * 4
    assert limit.old.tolist() == [16.0] * 4


class MovingTensor(torch.Tensor):
    """A limit that gives a tensor other memory when it is read, though it looks like PyTorch's."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.Tensor.__float__ and hasattr(args[0], "leaf"):
            args[0].leaf.set_(torch.full((4,), 2.0))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("in_place", [False, True])
def test_a_limit_of_a_type_of_somebody_s_own_is_read_before_memory_is_held(in_place: bool) -> None:
    leaf = torch.full((4,), 16.0)
    old, limit = leaf.data, torch.tensor(1.0).as_subclass(MovingTensor)
    limit.leaf = leaf
    if in_place:
        gradclip.clip_by_global_norm_([leaf], limit)
        assert leaf.tolist() == [0.5] * 4
    else:
        assert gradclip.clip_by_global_norm([leaf], limit)[0][0].tolist() == [0.5] * 4
    assert old.tolist() == [16.0] * 4


def test_the_gradient_in_a_limit_of_a_type_of_somebody_s_own() -> None:
    limit = torch.tensor(1.0, requires_grad=True)
    (new,), _ = gradclip.clip_by_global_norm(
        [torch.tensor([3.0, 4.0])], limit.as_subclass(MovingTensor)
    )
    new.sum().backward()
    assert limit.grad == pytest.approx(1.4)


def test_max_norm_may_be_a_tensor() -> None:
    parameter = parameters_of([torch.tensor([3.0, 4.0])])[0]
    assert gtorch.clip_grad_norm_(parameter, torch.tensor(2.5)) == 5
    assert parameter.grad.tolist() == [1.5, 2]


def test_what_pytorch_gets_wrong() -> None:
    overflowing = parameters_of([torch.tensor([1e20, 1e20])])
    gtorch.clip_grad_norm_(overflowing, 1.0)
    np.testing.assert_allclose(overflowing[0].grad.numpy(), [math.sqrt(0.5)] * 2, rtol=1e-6)
    constant = torch.full((1 << 24,), 1.1)
    exact = float(np.float32(1.1)) * 2.0**12
    assert gtorch.get_total_norm([constant]) == np.float32(exact)
    assert torch.nn.utils.get_total_norm([constant]) != np.float32(exact)


# ---- patch ----


NAMES = ["clip_grad_norm_", "get_total_norm", "clip_grads_with_norm_"]


def test_patch_puts_ours_in_place_and_takes_it_back() -> None:
    theirs = [getattr(torch.nn.utils, name) for name in NAMES]
    with gtorch.patch():
        for module in (torch.nn.utils, torch.nn.utils.clip_grad):
            assert module.clip_grad_norm_ is gtorch.clip_grad_norm_
        assert [getattr(torch.nn.utils, name) for name in NAMES] == [
            getattr(gtorch, name) for name in NAMES
        ]
        first = gtorch.patch()
        first.undo()
        assert torch.nn.utils.clip_grad_norm_ is gtorch.clip_grad_norm_
    assert [getattr(torch.nn.utils, name) for name in NAMES] == theirs
    patched = gtorch.patch()
    for _ in range(2):
        patched.undo()
    assert [getattr(torch.nn.utils, name) for name in NAMES] == theirs


# ---- torch.compile ----


def gradients() -> list[Any]:
    torch.manual_seed(0)
    return parameters_of(
        [torch.randn(5) * 10, torch.randn(2, 3).double(), torch.randn(4).bfloat16()]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.long)]
)
def test_compiled_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()

    def step(parameters: list[Any], limit: Any, rate: float) -> Any:
        norm = gtorch.clip_grad_norm_(parameters, limit)
        again = gtorch.get_total_norm([p.grad for p in parameters])
        gtorch.clip_grads_with_norm_(parameters, limit, norm * 2)
        with torch.no_grad():
            for parameter in parameters:
                parameter.sub_(parameter.grad * rate)
        return norm, again

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for limit in (1.0, 1e9, torch.tensor(0.5)):
        ours, theirs = gradients(), gradients()
        norms, wanted = compiled(ours, limit, 0.5), step(theirs, limit, 0.5)
        assert all(map(torch.equal, norms, wanted))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(one.grad, other.grad)
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.compile(
            lambda p: gtorch.clip_grad_norm_(p, 1.0, error_if_nonfinite=True),
            fullgraph=True,
            backend=compiler,
        )(parameters_of([torch.tensor([math.nan])]))


# ---- processes and threads ----


@pytest.mark.slow
def test_after_a_fork_and_in_threads() -> None:
    code = """
        import os, threading
        import torch, gradclip
        leaves = [torch.ones(1 << 20) for _ in range(4)]
        wanted = gradclip.global_norm(leaves)       # on PyTorch's threads
        (torch.ones(1 << 22) * 2).sum()
        child = os.fork()
        if not child:
            os._exit(0 if gradclip.global_norm(leaves) == wanted else 1)
        assert os.waitpid(child, 0)[1] == 0
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(gradclip.global_norm(leaves)))
            for _ in range(4)
        ]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        print(all(norm == wanted for norm in found), len(found))
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True 4", "")


@pytest.mark.slow
def test_a_child_that_is_the_first_to_clip() -> None:
    code = """
        import os
        import torch, gradclip.torch
        leaf = torch.ones(1 << 22)
        leaf.exp()  # the parent's threads have worked, and it has not clipped
        child = os.fork()
        if not child:
            os._exit(0 if gradclip.torch.get_total_norm([leaf]) == 2048 else 1)
        print(os.waitpid(child, 0)[1])
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "0", "")


def test_clipping_allocates_nothing_that_grows() -> None:
    parameters = parameters_of([torch.randn(1 << 22)])
    gtorch.clip_grad_norm_(parameters, 1.0)

    def most_resident() -> int:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))

    before = most_resident()
    gtorch.clip_grad_norm_(parameters, 0.5)
    gtorch.get_total_norm([parameters[0].grad], 3.0)
    assert most_resident() - before < 4096  # of 16384 kB


@pytest.mark.slow
def test_clipping_tensors_imports_no_dtensors() -> None:
    """They take most of a second."""
    code = """
        import sys, torch, gradclip.torch
        gradclip.torch.get_total_norm([torch.ones(3)])
        print("torch.distributed.tensor" in sys.modules)
    """
    ended = run_python(code)
    assert (ended.stdout, ended.returncode) == ("False\n", 0), ended.stderr


def test_importing_gradclip_imports_no_torch() -> None:
    code = "import sys, gradclip; print('torch' in sys.modules)"
    assert run_python(code).stdout.strip() == "False"
