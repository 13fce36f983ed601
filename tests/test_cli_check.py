"""`gradclip check`: its verdicts, its exit status, and its referee."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import oracle
from gradclip.cli import check, main
from gradclip.cli.check import referee, systems
from gradclip.core import exact
from gradclip.core.exact import Scaled
from gradclip.core.rooms import backend_names

SHORT = 10**5


@pytest.fixture
def only_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No framework but NumPy, and none of the longer lists."""

    def absent() -> Any:
        raise ImportError

    frameworks = {**dict.fromkeys(systems.FRAMEWORKS, absent), "numpy": systems._numpy}
    monkeypatch.setattr(systems, "FRAMEWORKS", frameworks)
    short = [
        hard
        for hard in check.hard_lists(10)
        if sum(referee.values(leaf).size for leaf in hard.make()) < SHORT
    ]
    monkeypatch.setattr(check, "hard_lists", lambda _log2_size: short)


def results(output: str) -> dict[tuple[str, str], dict[str, Any]]:
    parsed = json.loads(output)
    return {(result["list"], result["system"]): result for result in parsed["results"]}


def test_every_backend_is_checked() -> None:
    assert set(backend_names()) <= {*systems.FRAMEWORKS, "toyarrays"}


@pytest.mark.usefixtures("only_numpy")
def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 0
    out, err = capsys.readouterr()
    assert "gradclip is exact on every list" in out
    assert [line for line in out.splitlines() if line.startswith("not to be had here: ")] == [
        "not to be had here: torch",
        "not to be had here: tensorflow",
        "not to be had here: jax",
        "not to be had here: cupy",
    ]
    assert "refused rows listed twice (ValueError)" in out
    assert max(map(len, out.splitlines())) <= 80
    assert not err


@pytest.mark.usefixtures("only_numpy")
def test_passes_without_the_c_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradclip.kernels.cpu._cpu", None)
    monkeypatch.setattr("gradclip.kernels.cpu._warned", True)
    assert main(["check", "--json"]) == 0


@pytest.mark.usefixtures("only_numpy")
def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out)["exact"] is True
    assert json.loads(out)["not_installed"] == ["torch", "tensorflow", "jax", "cupy"]
    found = results(out)
    assert found["3-4-5", "gradclip numpy"]["norm"] == 5.0
    assert all(result["exact"] for result in found.values() if result["ours"])
    assert {result["ours"] for result in found.values()} == {True, False}


def factor_one_ulp_off(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradclip.core import decide

    right = decide.factor

    def wrong(norm: Scaled, clip_norm: float) -> Scaled:
        significand, exponent = right(norm, clip_norm)
        return Scaled(math.nextafter(significand, 0), exponent)

    monkeypatch.setattr(decide, "factor", wrong)


def certificate_without_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_BOUND", 0.0)


def in_place_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradclip.numpy.backend.Leaves.scale_", lambda *_args: None)


@pytest.mark.usefixtures("only_numpy")
@pytest.mark.parametrize(
    ("break_it", "found_by"),
    [
        (factor_one_ulp_off, "fp64 2 of 1e200"),
        (certificate_without_bound, "just above a tie"),
        (in_place_does_nothing, "3-4-5"),
    ],
)
def test_fails_where_gradclip_is_wrong(
    break_it: Any,
    found_by: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    break_it(monkeypatch)
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert f"NOT EXACT: gradclip numpy, {found_by}: " in out
    assert "gradclip is exact" not in out


@pytest.mark.usefixtures("only_numpy")
def test_fails_where_gradclip_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_args: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr("gradclip.numpy.backend.Leaves.measure", broken)
    assert main(["check", "--json"]) == 1
    found = results(capsys.readouterr().out)
    assert found["3-4-5", "gradclip numpy"]["fate"] == "refused: ZeroDivisionError"


@pytest.fixture
def only_jax(framework: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One list, and nothing traced before or left behind: jit would not look at it again."""
    jax = framework("jax")
    hard = [hard for hard in check.hard_lists(10) if hard.name == "3-4-5"]
    monkeypatch.setattr(systems, "FRAMEWORKS", {"jax": systems._jax})
    monkeypatch.setattr(check, "hard_lists", lambda _log2_size: hard)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.mark.usefixtures("only_jax")
@pytest.mark.parametrize(
    ("broken", "status"),
    [
        (None, 0),
        ("gradclip.jax.backend.Leaves.scaled", 1),
        ("gradclip.jax.xla.carry_out", 1),
    ],
)
def test_jax_is_judged_eager_and_under_jit(
    broken: str | None,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def unscaled(given: Any, *_: Any) -> list[Any]:
        return list(getattr(given, "leaves", given))

    if broken:
        monkeypatch.setattr(broken, unscaled)
    assert main(["check"]) == status
    out = capsys.readouterr().out
    assert "gradclip jax: clip_by_global_norm and clip_by_global_norm under jit\n" in out
    assert ("NOT EXACT: gradclip jax, 3-4-5: x5.0000, norm 5.0" in out) is bool(status)


@pytest.mark.long
def test_known_faults_of_others_show(framework: Any) -> None:
    for name in ("torch", "tensorflow", "jax", "optax"):
        framework(name)
    command = [sys.executable, "-m", "gradclip", "check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = results(done.stdout)
    assert json.loads(done.stdout)["not_installed"] in ([], ["cupy"])  # which may have no device
    fates = {
        (name, system): found[name, system]["fate"]
        for name in ("[1e20, 1e20]", "3-4-5, limit 5", "nothing to clip", "rows listed twice")
        for system in ("NumPy loop", "PyTorch", "TensorFlow", "optax")
    }
    assert fates["[1e20, 1e20]", "NumPy loop"] == "zeroed"
    assert fates["[1e20, 1e20]", "PyTorch"] == "zeroed"
    assert fates["[1e20, 1e20]", "TensorFlow"] == "NaN"
    assert fates["[1e20, 1e20]", "optax"] == "zeroed"
    assert fates["3-4-5, limit 5", "PyTorch"] == "changed"
    assert fates["nothing to clip", "TensorFlow"] == "changed"
    assert fates["rows listed twice", "PyTorch"] == "refused: NotImplementedError"
    assert found["bf16 500 x 256", "optax"]["relative"] < -0.05
    assert abs(found["2^24 of 1.1", "PyTorch"]["relative"]) > 1e-3
    assert found["rows listed twice", "TensorFlow"]["relative"] < -0.1
    assert not any(result["ulp"] for result in found.values() if result["ours"])


# ---- the referee ----


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_referee_agrees_with_the_oracle(name: str) -> None:
    generator = np.random.default_rng(5)
    for scale in (1e-44, 1e-20, 1.0, 1e15):
        array = (generator.standard_normal(50) * scale).astype(name)
        _, expected = oracle.norm([array])
        square = referee.exact_square([array])
        assert float(referee.rounded_root(square, referee.FORMATS[name])) == expected
        limit = float(expected) / 3
        truth = referee.truth([array], limit)
        clipped = oracle.clip([array], limit)
        assert clipped.leaves is not None
        assert referee.same_bits(truth.outputs, clipped.leaves)
        assert truth.clipped is not clipped.kept


def test_referee_rounds_ties_to_even() -> None:
    single = referee.FORMATS["float32"]
    ulp = Fraction(1, 2**23)
    for below in (Fraction(1), 1 + ulp):
        midpoint = below + ulp / 2
        even = below if below == 1 else below + ulp
        assert referee.rounded_root(midpoint**2, single) == even
        assert referee.rounded_root(midpoint**2 + Fraction(1, 2**400), single) == below + ulp
        assert referee.rounded_root(midpoint**2 - Fraction(1, 2**400), single) == below


def test_error_counts_units_of_the_last_place() -> None:
    assert referee.error(np.float32(1 + 3 * 2.0**-23), Fraction(1)) == (3.0, 3 * 2.0**-23)
    assert referee.error(np.float64(1 - 2.0**-53), Fraction(1)) == (-0.5, -(2.0**-53))
    assert referee.error(np.float32(math.inf), Fraction(1)) == (math.inf, math.inf)
    assert referee.error(np.float32(math.inf), Fraction(2) ** 300) == (0.0, 0.0)
    assert referee.error(np.float16(0), Fraction(0)) == (0.0, 0.0)
