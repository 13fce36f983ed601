"""`gradclip bench`: that it runs and says all it should; no test looks at a time."""

from __future__ import annotations

import csv
import json
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cli_files import NO_REGULAR_FILES, no_regular_file
from gradclip.cli import bench, main
from gradclip.cli.bench import cases, fresh, jobs, measuring, ranks, timing
from gradclip.core.exact import merge

DRAW = Path(__file__).parent.parent / "bench" / "draw.py"
OTHERS = {"NumPy loop", "PyTorch", "TensorFlow", "optax, jit"}


# One of each kind: in a process of all threads, of one thread, of its own, and beside another.
SOME = ["norm-fp32", "exact-1-thread", "torch-small-keep", "merge", "first-call"]


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(SOME, marks=pytest.mark.slow, id="some"),
        pytest.param([*cases.CASES], marks=pytest.mark.long, id="all"),
    ],
)
def test_every_case_has_its_rows(framework: Any, names: list[str]) -> None:
    for name in ("torch", "tensorflow", "jax", "optax"):
        framework(name)
    chosen = {name: cases.CASES[name] for name in names}
    systems: dict[str, set[str]] = {name: set() for name in names}
    for rows in measuring.measured(chosen, quick=False, shrink=20):
        for row in rows:
            assert isinstance(row["value"], float)
            assert row["bar"] is row["met"] is None
            systems[row["case"]].add(row["system"])
    norms = {"gradclip", "R", "PyTorch"}
    timed = {
        "norm-fp32": norms | {"np.linalg.norm"},
        "norm-fp64": norms | {"np.linalg.norm"},
        "norm-bf16": norms,
        "norm-fp16": norms,
        "keep": {"gradclip", "R"} | OTHERS,
        "clip": {"gradclip", "R", "S"} | OTHERS,
        "clip-fp64": {"gradclip", "R", "S", "PyTorch"},
        "clip-bf16": {"gradclip", "R", "S", "PyTorch"},
        "exact": {"gradclip", "R"},
        "exact-1-thread": {"gradclip", "R"},
        "small-keep": {"gradclip"} | OTHERS,
        "small-clip": {"gradclip"} | OTHERS,
    }
    for prefix, more in {
        "tf-": {"TensorFlow"},
        "torch-": {"PyTorch"},
        "dtensor-": {"PyTorch", "all-reduce", "allowed"},
        "optax-": {"optax"},
        "busy-": {"one thread"},
        "busy-torch-": {"one thread", "PyTorch"},
        "limit-": {"a number", "a number + 20 us"},
        "each-": {"the global clip", "PyTorch, each"},
        "norms-": {"global_norm", "norm() of each", "_foreach_norm"},
    }.items():
        timed |= {name: {"gradclip"} | more for name in names if name.startswith(prefix)}
    timed |= {
        name: {"gradclip", "a number", "a number + 100 us"}
        for name in names
        if name.startswith("limit-") and name.endswith("-percentile")
    }
    assert systems == {name: timed.get(name, {"gradclip"}) for name in names}


@pytest.mark.long
def test_quick_shows_five_cases_and_their_bars() -> None:
    command = [sys.executable, "-m", "gradclip", "bench", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert {"date", "processor", "memory_gb", "threads", "kernel", "versions"} <= {
        *found["machine"]
    }
    ours = [row for row in found["rows"] if row["system"] == "gradclip"]
    assert [row["case"] for row in ours] == [*cases.cases_of(quick=True)]
    assert all(row["met"] is (row["value"] <= row["bar"]) for row in ours)


@pytest.mark.parametrize(
    ("installed", "beside"),
    [
        (["torch", "tensorflow", "optax"], "PyTorch"),
        (["tensorflow", "optax"], "TensorFlow"),
        (["optax"], "optax"),
        ([], None),
    ],
)
def test_quick_has_a_framework_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: list[str], beside: str | None
) -> None:
    monkeypatch.setattr(cases, "find_spec", lambda name: name in installed or None)
    found = cases.cases_of(quick=True)
    assert len(found) == (5 if beside else 4)
    assert beside is None or found["framework"].bar.of == beside


def row(case: str, system: str, value: float, **more: Any) -> dict[str, Any]:
    bar = cases.CASES[case].bar._replace(limit=None)
    times = {"median_s": 0.001, "min_s": 0.001}
    return measuring._row(case, system, value, bar) | times | more


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up figures, in no time."""
    rows = {
        "norm-fp32": [
            row("norm-fp32", "gradclip", 0.98, bar=1.1, met=True),
            row("norm-fp32", "R", 1.0),
        ],
        "small-keep": [row("small-keep", "gradclip", 0.5, bar=0.15, met=False)],
    }
    monkeypatch.setattr(bench, "measured", lambda names, **_: [rows[name] for name in names])


ARGUMENTS = ["bench", "--case", "small-keep", "norm-fp32"]


@pytest.mark.usefixtures("measured")
def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ARGUMENTS) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "norm, 400 MB fp32" in lines
    assert "gradclip 1.000 1.000 0.98 R 1.1 R met" in lines
    assert "gradclip 1.000 1.000 0.5 NumPy loop 0.15 NumPy loop MISSED" in lines
    assert lines.index("norm, 400 MB fp32") < lines.index("in place, nothing to clip, 1000 x 1000")
    assert any(line.startswith("processor: ") for line in lines)
    explained = bench.COLUMNS | {unit: bench.UNITS[unit] for unit in ("R", "NumPy loop")}
    assert lines[-len(explained) :] == [f"{word}: {means}" for word, means in explained.items()]
    assert not err


def test_every_unit_is_explained_here_and_in_the_docs() -> None:
    units = {part for case in cases.CASES.values() for part in case.bar.of.split(" + ")}
    assert units - {"PyTorch", "TensorFlow", "optax", "ms", "MB", "kB"} == {*bench.UNITS}
    docs = (DRAW.parent.parent / "docs" / "benchmarks.md").read_text()
    for word, means in (bench.COLUMNS | bench.UNITS).items():
        assert f"| {word} | {means} |" in docs


@pytest.mark.usefixtures("measured")
def test_csv_is_appended_to_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, picture = tmp_path / "results.csv", tmp_path / "bench.png"
    for _ in range(2):
        assert main([*ARGUMENTS, "--csv", str(results), "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["rows"]) == 3
    with results.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["system"] for row in rows] == 2 * ["gradclip", "R", "gradclip"]
    with (DRAW.parent / "results.csv").open(newline="") as file:
        assert csv.DictReader(file).fieldnames == [*rows[0]]
    assert rows[0]["value"] == "0.98"
    assert rows[0]["processor"]
    assert "numpy" in rows[0]["versions"]
    monkeypatch.setattr(sys, "argv", [str(DRAW), str(results), str(picture)])
    runpy.run_path(str(DRAW), run_name="__main__")
    assert picture.read_bytes().startswith(b"\x89PNG")


QUICK_ALONE = "--quick has cases of its own, to look at; leave out --case and --csv"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick", "--csv", "x.csv"], QUICK_ALONE),
        (["--quick", "--case", "exact"], QUICK_ALONE),
        (["--csv", "/nowhere/x.csv"], "/nowhere/x.csv: No such file or directory"),
        (["--case", "speed"], "argument --case: invalid choice: 'speed'"),
    ],
)
def test_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"gradclip: {message}")
    assert err.count("\n") == 1
    assert not out


@pytest.mark.parametrize("kind", NO_REGULAR_FILES)
def test_figures_are_appended_to_regular_files_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "results.csv"
    with no_regular_file(path, kind):
        assert main(["bench", "--case", "exact", "--csv", str(path)]) == 2
    message = f"{path} is {kind}; --csv appends to regular files"
    assert capsys.readouterr() == ("", f"gradclip: {message}\n")


def test_a_dead_process_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert main(["bench", "--case", "exact"]) == 1
    assert capsys.readouterr().err == "gradclip: the measuring process ended with status 1\n"


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")
@pytest.mark.parametrize(("limit", "expected"), [(1e9, "0"), (1.0, "4096")])
def test_pages_written_are_seen(limit: float, expected: str) -> None:
    code = fresh.written(2**22, limit=limit)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected


def shrunk(name: str) -> list[dict[str, Any]]:
    return measuring.measure(name, cases.CASES[name], shrink=20)


def test_a_framework_that_is_absent_has_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("busy", "contenders", "ranks"):
        monkeypatch.setattr(f"gradclip.cli.bench.{module}.find_spec", lambda _: None)
    for name in (
        "busy-torch-small",
        "busy-jit-small",
        "dtensor-100",
        "optax-examples-3",
        "tf-eager-keep",
        "tf-trace",
        "optax-bf16-clip",
        "optax-donated-clip",
        "optax-compile",
    ):
        assert shrunk(name) == []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[str]]:
    """The ranks that a test starts."""
    found: list[subprocess.Popen[str]] = []
    start = ranks._started
    monkeypatch.setattr(ranks, "_started", lambda *at: found.append(start(*at)) or found[-1])
    return found


@pytest.mark.long
def test_ranks_end_with_their_case(framework: Any, started: list[subprocess.Popen[str]]) -> None:
    framework("torch")
    rows = shrunk("dtensor-100")
    assert [row["system"] for row in rows] == ["gradclip", "PyTorch", "all-reduce", "allowed"]
    assert all(row["median_s"] > 0 for row in rows)
    assert [process.returncode for process in started] == 2 * [-signal.SIGKILL]


@pytest.mark.slow
def test_ranks_end_where_their_case_is_broken_off(
    framework: Any, started: list[subprocess.Popen[str]]
) -> None:
    framework("torch")
    turns = ranks.clips_of_dtensors(5)
    turn = next(turns)
    assert turn.keys() == {"gradclip", "PyTorch", "all-reduce", "allowed"}
    assert turn["allowed"] == 1.2 * turn["all-reduce"] + 1e-4 + 5e-6
    assert [process.poll() for process in started] == [None, None]
    with pytest.raises(KeyboardInterrupt):
        turns.throw(KeyboardInterrupt)
    assert [process.returncode for process in started] == 2 * [-signal.SIGKILL]


def test_a_rank_that_ends_is_an_error(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    framework("torch")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match=r"^a rank ended before its time$"):
        next(ranks.clips_of_dtensors(5))


def test_merge_is_told_without_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = shrunk("merge")
    assert row["value"] == row["median_s"] / 1e-3 > 0  # 1e3 times it may be one bit away
    row = measuring._row("merge", "gradclip", 3.0, cases.CASES["merge"].bar)
    assert (row["value"], row["unit"], row["bar"], row["met"]) == (3.0, "ms", None, None)
    monkeypatch.setattr(jobs, "merge", lambda totals: merge(totals[1:]))
    with pytest.raises(AssertionError):
        shrunk("merge")


def test_one_turn_of_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def turns(asked: Iterable[int]) -> Iterator[dict[str, float]]:
        for count in asked:
            counts.append(count)
            yield {"gradclip": count / 10, "optax": float(count)}

    monkeypatch.setattr("gradclip.cli.bench.contenders.optax_compilations", turns)
    ours, theirs = measuring.measure("optax-compile", cases.CASES["optax-compile"])
    assert counts == [2, 3000]
    assert (ours["value"], ours["bar"], ours["met"]) == (0.1, 0.2, True)
    assert (ours["median_s"], theirs["median_s"], theirs["value"]) == (300.0, 3000.0, 1.0)


def test_systems_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "BATCH", 0.0)
    calls: list[str] = []
    systems = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.timings(systems, 3)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3, "c": 3}
