"""``gradclip compare``: figures against integers, formats, names that do not match, text."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cli_files
from cli_files import random, run_main, save

INDEX = "model.safetensors.index.json"


def report(*arguments: Any, status: int = 0) -> dict[str, Any]:
    found_status, out, err = run_main("compare", "--json", *arguments)
    assert (found_status, err) == (status, "")
    found: dict[str, Any] = json.loads(out)
    return found


def root(square: Fraction) -> float:
    """The square root, correctly rounded to float64, of numbers that are no subnormals' squares."""
    if not square:
        return 0.0
    shift = 2 * (1200 - (square.numerator.bit_length() - square.denominator.bit_length()) // 2)
    scaled = square * Fraction(2) ** shift  # of some 2400 bits, and so the root of 1200
    whole = math.isqrt(scaled.numerator // scaled.denominator)
    # What is cut off lies far below half of the last place of a float64.
    return float(Fraction(whole, 2 ** (shift // 2)) if shift > 0 else whole << (-shift // 2))


def norm_of_difference(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """By its definition: each difference rounded to float64, the rest exact."""
    parts = [
        Fraction(float(x)) - Fraction(float(y))
        for one, other in ((a.real, b.real), (a.imag, b.imag))
        for x, y in zip(one.flat, other.flat, strict=True)
    ]
    return root(sum((Fraction(float(part)) ** 2 for part in parts), Fraction(0)))


PAIRS = [
    ("F32", "F32"),
    ("F32", "BF16"),
    ("BF16", "F32"),
    ("F16", "F64"),
    ("F64", "F64"),
    ("F8_E4M3", "BF16"),
    ("C64", "C64"),
    ("C64", "F32"),
]


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtypes", PAIRS)
def test_the_difference(tmp_path: Path, dtypes: tuple[str, str]) -> None:
    sides = []
    for seed, code in enumerate(dtypes):
        dtype = cli_files.numpy_dtype(code)
        sides.append({"w": random(dtype, 17, 31, seed=seed), "b": random(dtype, 5, seed=seed)})
    sides[1] = dict(reversed(sides[1].items()))
    first = save(tmp_path / "a.safetensors", sides[0])
    found = report(first, save(tmp_path / "b.safetensors", sides[1]))
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    wide = [{name: each.astype(np.complex128) for name, each in side.items()} for side in sides]
    for name, tensor in tensors.items():
        a, b = wide[0][name], wide[1][name]
        assert tensor["norm"] == norm_of_difference(a, b)
        assert tensor["largest"] == np.abs(a - b).max()
        assert (tensor["differ"], tensor["same"]) == ((a != b).sum(), False)
        assert tensor["relative"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a))
    both = [np.concatenate([side[name].ravel() for name in "wb"]) for side in wide]
    assert found["norm"] == norm_of_difference(*both)
    assert math.fsum(tensor["share"] for tensor in tensors.values()) == pytest.approx(1)
    measured = json.loads(run_main("norm", "--json", first)[1])
    assert found["norm_a"] == measured["norm"]


def test_a_difference_that_float64_cannot_hold_is_rounded_once(tmp_path: Path) -> None:
    a, b = np.float32([1e30, 1]), np.float32([1e-30, 1])
    found = report(save(tmp_path / "a.npy", {"w": a}), save(tmp_path / "b.npy", {"w": b}))
    assert found["norm"] == float(a[0])
    assert (found["differ"], found["same"]) == (1, False)


@pytest.mark.usefixtures("_pieces")
def test_the_same_numbers_in_every_format(tmp_path: Path, framework: Any) -> None:
    torch = framework("torch")
    arrays = {"layers.10.w": random("f4", 40, 30), "layers.2.w": random("f8", 7, seed=1)}
    arrays["step"] = np.array(7)
    paths = [save(tmp_path / name, arrays) for name in ("a.npz", "a.safetensors")]
    (tmp_path / "shards").mkdir()
    paths.append(save(tmp_path / "shards" / INDEX, arrays).parent)
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    turned = tensors | {"layers.10.w": tensors["layers.10.w"].t().contiguous().t()}
    for name, held in {"a.pt": tensors, "turned.pt": turned}.items():
        torch.save(held, tmp_path / name)
        paths.append(tmp_path / name)
    for first in paths:
        for second in paths:
            found = report(first, second)
            assert [t["name"] for t in found["tensors"]] == ["layers.2.w", "layers.10.w", "step"]
            assert (found["norm"], found["same"], found["differ"]) == (0, True, 0)
            assert all(t["same"] for t in found["tensors"])


@pytest.mark.usefixtures("_pieces")
def test_arrays_in_the_order_of_fortran(tmp_path: Path) -> None:
    array = random("f4", 7, 5, 3)
    first = save(tmp_path / "a.npy", {"w": array})
    second = save(tmp_path / "b.npy", {"w": np.asfortranarray(array)})
    assert report(first, second)["same"] is True
    array[2, 1, 0] += 1
    found = report(first, save(tmp_path / "b.npy", {"w": np.asfortranarray(array)}))
    assert (found["differ"], found["largest"]) == (1, pytest.approx(1, abs=1e-6))


def test_nan_and_inf(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    for a, b, norm, differ, both in [
        ([nan, 1], [nan, 3], 2, 1, 1),
        ([inf, -inf, 1], [inf, -inf, 1], 0, 0, 2),
        ([nan, 1], [1, 1], "nan", 1, 0),
        ([1, 1], [nan, 1], "nan", 1, 0),
        ([inf, 1], [1, 1], "inf", 1, 0),
        ([inf, 1], [-inf, 1], "inf", 1, 0),
        ([inf, 1], [nan, 1], "nan", 1, 0),
    ]:
        first = save(tmp_path / "a.npz", {"w": np.float32(a)})
        found = report(first, save(tmp_path / "b.npz", {"w": np.float32(b)}))["tensors"][0]
        assert (found["norm"], found["differ"], found["both_nonfinite"]) == (norm, differ, both)
        assert found["same"] is (not differ)


def test_equal_numbers_of_other_bits_are_not_the_same(tmp_path: Path) -> None:
    first = save(tmp_path / "a.npz", {"w": np.float32([0.0, 1.5])})
    for array in (np.float32([-0.0, 1.5]), np.float64([0.0, 1.5])):
        found = report(first, save(tmp_path / "b.npz", {"w": array}))
        assert (found["norm"], found["differ"], found["same"]) == (0, 0, False)


def test_a_first_of_zeros_has_no_relative_difference(tmp_path: Path) -> None:
    first = save(tmp_path / "a.npz", {"w": np.zeros(2), "e": np.zeros((0, 3))})
    found = report(first, save(tmp_path / "b.npz", {"w": np.ones(2), "e": np.zeros((0, 3))}))
    assert found["norm"] == math.sqrt(2)
    assert [t["relative"] for t in found["tensors"]] == [None, None]
    assert [t["same"] for t in found["tensors"]] == [True, False]


def test_integers_and_text_are_compared_bit_by_bit(tmp_path: Path) -> None:
    arrays = {"n": np.array([1, 2, 3]), "t": np.array(["ab", "c"]), "m": np.array([True, False])}
    first = save(tmp_path / "a.npz", arrays)
    arrays |= {"n": np.array([1, 5, 4]), "t": np.array(["ab", "d"])}
    found = report(first, save(tmp_path / "b.npz", arrays))
    assert {t["name"]: (t["counted"], t["same"], t["differ"]) for t in found["tensors"]} == {
        "m": (False, True, 0),
        "n": (False, False, 2),
        "t": (False, False, 1),
    }
    assert (found["norm"], found["same"]) == (0, False)


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("length", [3, 1000])
def test_text_is_compared_to_its_end_whatever_the_length_of_an_element(
    tmp_path: Path, length: int
) -> None:
    # 12 bytes, or 4000: a piece ends within an element, or holds none.
    texts = np.full((7, 50), "a" * length)
    first = save(tmp_path / "a.npy", {"t": texts})
    assert report(first, save(tmp_path / "b.npy", {"t": np.asfortranarray(texts)}))["same"] is True
    texts[5, 48] = texts[6, 49] = "b"
    for array in (texts, np.asfortranarray(texts)):
        (found,) = report(first, save(tmp_path / "b.npy", {"t": array}))["tensors"]
        assert (found["same"], found["differ"]) == (False, 2)


def test_text_of_several_pieces(tmp_path: Path) -> None:
    texts = np.full(300_000, "abc")  # 12 bytes each, which do not divide a piece
    first = save(tmp_path / "a.npz", {"t": texts})
    texts[-1] = "xyz"
    (found,) = report(first, save(tmp_path / "b.npz", {"t": texts}))["tensors"]
    assert (found["same"], found["differ"]) == (False, 1)


def test_what_does_not_match_is_named(tmp_path: Path) -> None:
    first = save(
        tmp_path / "a.npz",
        {"w": np.ones(4), "a10": np.ones(1), "a2": np.ones(1), "s": np.ones((2, 3)),
         "k": np.ones(2), "v": np.ones(2, ml_dtypes.bfloat16)},
    )  # fmt: skip
    second = save(
        tmp_path / "b.npz",
        {"w": np.zeros(4), "b": np.ones(1), "s": np.ones((3, 2)), "k": np.array([1, 2]),
         "v": np.ones(2)},
    )  # fmt: skip
    found = report(first, second, status=1)
    reasons = {
        "k": "is float64 in A and int64 in B",
        "s": "has shape 2x3 in A and 3x2 in B",
        "v": "is |V2, which gradclip cannot read",
    }
    assert (found["only_in_a"], found["only_in_b"]) == (["a2", "a10"], ["b"])
    assert found["not_compared"] == [{"name": k, "reason": v} for k, v in reasons.items()]
    assert (found["norm"], found["same"]) == (2, False)
    status, out, err = run_main("compare", first, second)
    assert (status, err) == (1, "")
    assert out.splitlines()[-5:] == [
        "only in A: a2, a10",
        "only in B: b",
        *(f"not compared: {name} {reason}" for name, reason in reasons.items()),
    ]


def test_folders_of_several_files_match_by_the_names_of_those(tmp_path: Path) -> None:
    for side in "ab":
        folder = tmp_path / side
        folder.mkdir()
        save(folder / "x.npz", {"w": np.ones(2)})
        save(folder / "y.npz", {"w": np.ones(3) * (2 if side == "b" else 1)})
        save(folder / "z.npy", {"w": np.ones(3)})
    status, out, err = run_main("compare", tmp_path / "a", tmp_path / "b", "--json")
    assert (status, err.count("has no index")) == (0, 2)
    names = {t["name"]: t["same"] for t in json.loads(out)["tensors"]}
    assert names == {"x.npz: w": True, "y.npz: w": False, "z.npy": True}


def test_two_tensors_of_one_name(tmp_path: Path, framework: Any) -> None:
    torch = framework("torch")
    path = tmp_path / "a.pt"
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, path)
    message = f"gradclip: {path}: has two tensors named a.b\n"
    assert run_main("compare", path, path) == (2, "", message)


def test_order_and_number(tmp_path: Path) -> None:
    zeros = {f"l.{n}": np.zeros(1) for n in range(11)}
    first = save(tmp_path / "a.npz", zeros)
    second = save(tmp_path / "b.npz", {f"l.{n}": np.full(1, n % 7.0) for n in range(11)})

    def names(*options: Any) -> list[str]:
        return [t["name"] for t in report(first, second, *options)["tensors"]]

    assert names()[-2:] == ["l.9", "l.10"]
    assert names("--top", 3) == ["l.6", "l.5", "l.4"]
    assert names("--sort", "share")[:3] == ["l.6", "l.5", "l.4"]
    assert names("--sort", "name", "--top", 2) == ["l.0", "l.1"]
    assert report(first, second, "--top", 3)["not_shown"] == 8


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = {"head": np.float32([[3, 0]]), "step": np.array(7), "tail": np.float32([4, 0])}
    save(Path("a.npz"), base)
    save(Path("b.npz"), base | {"head": np.float32([[3, 1]]), "tail": np.float64([4, 0])})
    assert run_main("compare", "a.npz", "b.npz") == (0, TABLE, "")


TABLE = """\

 tensor  dtype             norm of A  of A - B  relative  largest  differ
 ────────────────────────────────────────────────────────────────────────
 head    float32                 3.0         1    0.3333        1       1
 step    int64                     -         -         -        -    same
 tail    float32, float64        4.0         0         0        0       0

norm of the difference 1.0 (float64), relative 0.2
1 of 3 tensors are the same, bit for bit
"""


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    good = save(tmp_path / "a.npy", {"a": np.ones(3)})
    none = tmp_path / "none.npy"
    message = f"gradclip: {none}: No such file or directory\n"
    assert run_main("compare", good, none) == (2, "", message)
    assert run_main("compare", none, good) == (2, "", message)


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (save(tmp_path / f"{name}.npy", {"a": np.ones(3)}) for name in "ab")

    @contextlib.contextmanager
    def progress(_label: str, _total: float) -> Iterator[Callable[[float], None]]:
        yield lambda _amount: save(second, {"a": np.ones(4)})

    monkeypatch.setattr("gradclip.cli.compare.progress", progress)
    message = f"gradclip: {second}: has changed while gradclip read it\n"
    assert run_main("compare", first, second) == (2, "", message)


@pytest.mark.slow
def test_large_files_take_little_memory(tmp_path: Path) -> None:
    paths = [cli_files.sparse_npy(tmp_path / f"{name}.npy", 2**27) for name in "ab"]
    assert cli_files.peak_memory("compare", *paths) < 250e6
