"""``gradclip clip``: bits, whole files or none, refusals, signals, full disks, memory."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random as chance
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cli_files
import gradclip
from cli_files import load, random, run_main, run_on_terminal, same, save

INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def _nothing_left(tmp_path: Path) -> Iterator[None]:
    """Whatever happens, no temporary file is left."""
    yield
    assert not list(tmp_path.glob(".gradclip-*"))


def clip(source: Path, out: Path, limit: float = 1.0, *options: str) -> dict[str, Any]:
    """Clip a file, see that the input stays what it is, and hand back the report."""
    before = source.read_bytes(), source.stat().st_mtime_ns
    status, text, err = run_main(
        "clip", source, "--clip-norm", limit, "-o", out, "--json", *options
    )
    assert (status, err) == (0, "")
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before
    found: dict[str, Any] = json.loads(text)
    return found


def check(source: Path, out: Path, limit: float = 1.0, on_nonfinite: Any = "nan") -> None:
    """Hold every bit of a clipped file against `gradclip.clip_by_global_norm`."""
    arrays = load(source)
    floating = {k: v for k, v in arrays.items() if v.dtype.kind not in "biU"}
    expected, norm = gradclip.clip_by_global_norm(floating, limit, on_nonfinite=on_nonfinite)
    found = clip(source, out, limit, "--on-nonfinite", on_nonfinite)
    assert found["norm"] == (float(norm) if math.isfinite(norm) else str(norm))
    changed = 0 if found["action"] == "keep" else len(expected)
    assert (found["clipped"], found["carried_over"]) == (changed, len(arrays) - len(expected))
    assert {t["name"]: t["clipped"] for t in found["tensors"]} == {
        name: bool(changed) and name in expected for name in arrays
    }
    written = load(out)
    if source.suffix == ".npy":
        written = {str(source): array for array in written.values()}
    assert list(written) == list(arrays)
    for name, array in {**arrays, **expected}.items():
        assert same(written[name], array), name


def refused(source: Path, out: Path, message: str, *options: str, status: int = 2) -> None:
    """Clip a file to see that it is refused with this message and nothing changes."""
    before = snapshot(source.parent)
    done = run_main("clip", source, "--clip-norm", "1", "-o", out, *options)
    assert done == (status, "", f"gradclip: {message}\n")
    assert snapshot(source.parent) == before


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


# ---- bits ----


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("dtype", cli_files.NUMPY_DTYPES)
def test_npy_and_npz(tmp_path: Path, dtype: str) -> None:
    array = random(dtype, 17, 31)
    for number, arrays in enumerate([array, np.asfortranarray(array)]):
        source, out = save(tmp_path / f"{number}.npy", {"a": arrays}), tmp_path / f"o{number}.npy"
        check(source, out)
        assert cli_files.header(out) == cli_files.header(source)
    arrays = {"a": array, "b/c": random(dtype, 5), "step": np.array(7), "d": random("f4", 7)}
    check(save(tmp_path / "a.npz", arrays), tmp_path / "o.npz")
    assert cli_files.members(tmp_path / "o.npz") == cli_files.members(tmp_path / "a.npz")


@pytest.mark.usefixtures("_pieces")
@pytest.mark.parametrize("code", cli_files.SAFETENSORS_DTYPES)
def test_safetensors(tmp_path: Path, code: str) -> None:
    dtype = cli_files.numpy_dtype(code)
    arrays = {"a": random(dtype, 17, 31), "step": np.array(7), "b": random(dtype, 5)}
    source = save(tmp_path / "a.safetensors", arrays, metadata={"format": "pt", "ä": "\n"})
    check(source, tmp_path / "o.safetensors")
    assert cli_files.header(tmp_path / "o.safetensors") == cli_files.header(source)


def test_shards(tmp_path: Path) -> None:
    arrays = {name: random("f4", 50, seed=seed) for seed, name in enumerate("abcd")}
    folder = tmp_path / "model"
    folder.mkdir()
    source = save(folder / INDEX, arrays)
    out = tmp_path / "clipped"
    check(source, out)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    assert (out / INDEX).read_bytes() == source.read_bytes()
    for shard in ("m-0.safetensors", "m-1.safetensors"):
        assert cli_files.header(out / shard) == cli_files.header(folder / shard)


def test_members_keep_their_order_compression_and_comments(tmp_path: Path) -> None:
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    plain = save(tmp_path / "plain.npy", {"a": random("f4", 1000)}).read_bytes()
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.comment = b"gradients"
        for method in methods:
            member = zipfile.ZipInfo(f"w{method}.npy", (2001, 2, 3, 4, 5, 6))
            member.compress_type, member.comment = method, b"weights"
            member.external_attr = 0o640 << 16
            archive.writestr(member, plain)
        archive.writestr("read me.txt", "no array")
    clip(tmp_path / "a.npz", tmp_path / "o.npz")
    assert cli_files.members(tmp_path / "o.npz") == cli_files.members(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "o.npz") as archive:
        assert archive.comment == b"gradients"
        assert archive.read("read me.txt") == b"no array"
    old, new = (dict(np.load(tmp_path / name)) for name in ("a.npz", "o.npz"))
    names = [f"w{method}" for method in methods]
    expected, _ = gradclip.clip_by_global_norm([old[name] for name in names], 1)
    assert all(same(new[name], array) for name, array in zip(names, expected, strict=True))


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", INDEX])
def test_with_nothing_to_clip_not_a_byte_changes(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    arrays = {"a": np.array([3.0, -0.0, 4.0])}
    source = save(folder / name, arrays)
    for limit in (5, math.inf):
        out = tmp_path / (f"out-{limit}" if name == INDEX else f"{limit}{name}")
        found = clip(source, out, limit)
        assert (found["action"], found["factor"]) == ("keep", 1)
        copies = [*out.iterdir()] if out.is_dir() else [out]
        for copy in copies:
            original = folder / copy.name if out.is_dir() else source
            assert copy.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("name", ["a.npz", "a.safetensors"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("policy", ["nan", "zero", "keep"])
def test_nan_and_inf(tmp_path: Path, name: str, value: float, policy: str) -> None:
    arrays = {"a": np.float32([3, value]), "c": np.complex64([3 + 4j]), "step": np.array([7])}
    check(save(tmp_path / name, arrays), tmp_path / f"o-{name}", 1.0, policy)


WAY_OUT = "nothing is written. --on-nonfinite nan, zero or keep writes a file all the same"


@pytest.mark.parametrize("options", [(), ("--on-nonfinite", "raise"), ("--json", "--force")])
def test_a_nan_stops_it_by_default(tmp_path: Path, options: tuple[str, ...]) -> None:
    arrays = {"a": np.float32([math.nan, math.inf]), "b": np.ones(3), "c": np.float16([math.inf])}
    source = save(tmp_path / "a.npz", arrays)
    message = (
        f"global norm nan (float64): {source}: a holds 1 NaN and 1 inf; "
        f"{source}: c holds 0 NaN and 1 inf; {WAY_OUT}"
    )
    refused(source, tmp_path / "o.npz", message, *options, status=1)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", INDEX])
def test_an_inf_in_any_format_stops_it(tmp_path: Path, name: str) -> None:
    source = save(tmp_path / name, {"w\n": np.float32([3, -math.inf])})
    out = tmp_path / ("out" if name == INDEX else f"o{source.suffix}")
    label = {"a.npy": f"{source}", INDEX: f"{tmp_path / 'm-0.safetensors'}: w\\n"}
    found = f"{label.get(name, f'{source}: w' + chr(92) + 'n')} holds 0 NaN and 1 inf"
    refused(source, out, f"global norm inf (float32): {found}; {WAY_OUT}", status=1)
    assert not out.exists()


def test_a_norm_too_large_for_its_dtype_still_clips(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.full(4, 3e38, np.float32)})
    check(source, tmp_path / "o.npy", 1.0, "keep")
    assert np.load(tmp_path / "o.npy").tolist() == [0.5] * 4


# ---- text ----


def test_what_it_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(Path("a.npz"), {"a": np.float32([3, 4]), "step": np.array(7)})
    save(Path("n.npy"), {"a": np.float32([math.nan])})
    for arguments, text in {
        (
            "a.npz",
            "2",
            "o.npz",
            "raise",
        ): "global norm 5.0 (float32), clipped to 2.0 by the factor 0.4\n"
        "o.npz: 1 tensor, 8 bytes; 1 tensor, 8 bytes, carried over\n",
        ("a.npz", "5", "p.npz", "raise"): "global norm 5.0 (float32), nothing to clip at 5.0\n"
        "p.npz: 1 tensor, 8 bytes; 1 tensor, 8 bytes, carried over\n",
        ("n.npy", "5", "o.npy", "nan"): "global norm nan (float32), every element set to nan\n"
        "o.npy: 1 tensor, 4 bytes\n",
        ("n.npy", "5", "p.npy", "keep"): "global norm nan (float32), every element kept as it is\n"
        "p.npy: 1 tensor, 4 bytes\n",
    }.items():
        source, limit, out, policy = arguments
        options = ("--clip-norm", limit, "-o", out, "--on-nonfinite", policy)
        assert run_main("clip", source, *options) == (0, text, "")


def test_the_report(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", {"a": np.float32([3, 4]), "step": np.array(7)})
    assert clip(source, tmp_path / "o.npz", 2) == {
        "version": 1,
        "file": str(source),
        "output": str(tmp_path / "o.npz"),
        "norm": 5.0,
        "norm_dtype": "float32",
        "largest": 4.0,
        "nan": 0,
        "inf": 0,
        "clip_norm": 2.0,
        "action": "scale",
        "factor": 0.4,
        "fill": None,
        "clipped": 1,
        "carried_over": 1,
        "tensors": [
            {
                "file": str(source),
                "name": "a",
                "dtype": "float32",
                "shape": [2],
                "counted": True,
                "norm": 5.0,
                "norm_dtype": "float32",
                "largest": 4.0,
                "nan": 0,
                "inf": 0,
                "share": 1.0,
                "clipped": True,
            },
            {
                "file": str(source),
                "name": "step",
                "dtype": "int64",
                "shape": [],
                "counted": False,
                "clipped": False,
            },
        ],
    }


def test_its_tensors_are_those_that_norm_reports(tmp_path: Path) -> None:
    arrays = {name: random("f4", 50, seed=seed) for seed, name in enumerate("abc")}
    source = save(tmp_path / INDEX, arrays)
    measured = json.loads(run_main("norm", source, "--json")[1])["tensors"]
    for limit, clipped in ((1, True), (100, False)):
        found = clip(source, tmp_path / f"out-{limit}", limit)
        assert found["tensors"] == [{**tensor, "clipped": clipped} for tensor in measured]


@pytest.mark.parametrize(("policy", "fill"), [("nan", "nan"), ("zero", 0), ("keep", None)])
def test_the_report_says_what_fills_the_elements(tmp_path: Path, policy: str, fill: Any) -> None:
    source = save(tmp_path / "a.npy", {"a": np.float32([3, math.inf])})
    found = clip(source, tmp_path / "o.npy", 1, "--on-nonfinite", policy)
    assert (found["fill"], found["clipped"]) == (fill, int(policy != "keep"))


def test_a_terminal_has_bars(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": random("f4", 10**6)})
    status, seen = run_on_terminal("clip", source, "--clip-norm", 1, "-o", tmp_path / "o.npy")
    assert status == 0
    assert "measuring" in seen
    assert "writing" in seen


# ---- refusals ----


def test_what_is_there_stays_without_force(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    out = save(tmp_path / "o.npy", {"a": np.ones(3)})
    refused(source, out, f"{out} exists; --force overwrites it")
    refused(source, source, f"{source} is the input itself; --force overwrites it")
    link = tmp_path / "link.npy"
    link.symlink_to(source)
    refused(source, link, f"{link} is the input itself; --force overwrites it")
    clip(source, out, 2.5, "--force")
    assert np.load(out).tolist() == [1.5, 2]
    status, _, _ = run_main("clip", source, "--clip-norm", 2.5, "-o", source, "--force")
    assert status == 0
    assert np.load(source).tolist() == [1.5, 2]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    link = tmp_path / "o.npy"
    link.symlink_to(tmp_path / "target.npy")
    clip(source, link, 2.5)
    assert link.is_symlink()
    assert np.load(tmp_path / "target.npy").tolist() == [1.5, 2]


def test_outputs_of_another_name(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    for name, message in {
        "o.npz": "{} must end in .npy, as {} does",
        "o": "{} must end in .npy, as {} does",
        "no/o.npy": "cannot write {}: No such file or directory",
        "a.npy/o.npy": "cannot write {}: Not a directory",
    }.items():
        refused(source, tmp_path / name, message.format(tmp_path / name, source), "--force")


@pytest.mark.parametrize("kind", cli_files.NO_REGULAR_FILES)
@pytest.mark.parametrize("options", [(), ("--force",)])
def test_only_regular_files_are_replaced(
    tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    out = tmp_path / "o.npy"
    with cli_files.no_regular_file(out, kind):
        before = out.lstat()
        refused(source, out, f"{out} is {kind}; only regular files are replaced", *options)
        assert (out.lstat().st_ino, out.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_shards_never_go_where_anything_is(tmp_path: Path) -> None:
    source = save(tmp_path / INDEX, {"a": np.ones(4), "b": np.ones(4)})
    empty, file = tmp_path / "empty", tmp_path / "file"
    empty.mkdir()
    file.touch()
    for out in (tmp_path, empty, file, Path(os.devnull)):
        message = f"{out} exists; the folder for clipped shards must be a new one"
        refused(source, out, message)
        refused(source, out, message, "--force")


@pytest.mark.parametrize("name", [INDEX, "model.safetensors"])
def test_a_folder_becomes_a_folder(tmp_path: Path, name: str) -> None:
    folder, out = tmp_path / "model", tmp_path / "out"
    folder.mkdir()
    source = save(folder / name, {"a": np.float32([3]), "b": np.float32([4])})
    (folder / "config.json").touch()
    files = {path.name for path in folder.iterdir()} - {"config.json"}
    done = run_main("clip", folder, "--clip-norm", 1, "-o", out)
    text = "global norm 5.0 (float32), clipped to 1.0 by the factor 0.2"
    assert done == (0, f"{text}\n{out}: 2 tensors, 8 bytes\n", "")
    assert {path.name for path in out.iterdir()} == files
    expected, _ = gradclip.clip_by_global_norm(load(source), 1)
    assert load(out) == expected


def test_a_folder_of_several_files_is_clipped_as_one(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    save(folder / "a.npz", {"w": np.float32([3])})
    save(folder / "b.npy", {"w": np.float32([4])})
    status, _, err = run_main("clip", folder, "--max-norm", 2.5, "-o", out)
    assert (status, err.count("\n")) == (0, 1)
    assert (load(out / "a.npz")["w"], np.load(out / "b.npy")) == ([1.5], [2])
    (folder / "c.npz").write_bytes(b"damaged")
    shutil.rmtree(out)
    status, _, err = run_main("clip", folder, "--max-norm", 2.5, "-o", out)
    assert (status, err.splitlines()[-1]) == (
        2,
        f"gradclip: {folder / 'c.npz'}: File is not a zip file",
    )
    assert not out.exists()


def test_a_file_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("measuring", "writing"):
        source = save(tmp_path / "a.npy", {"a": random("f4", 1000)})
        during(monkeypatch, label, lambda: save(tmp_path / "a.npy", {"a": random("f4", 1001)}))
        done = run_main("clip", source, "--clip-norm", 1, "-o", tmp_path / "o.npy")
        message = f"gradclip: {source}: has changed while gradclip read it\n"
        assert done == (2, "", message)
        assert not (tmp_path / "o.npy").exists()


def test_an_output_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = save(tmp_path / "a.npy", {"a": random("f4", 1000)}), tmp_path / "o.npy"
    during(monkeypatch, "writing", lambda: out.write_text("of another"))
    done = run_main("clip", source, "--clip-norm", 1, "-o", out)
    assert done == (2, "", f"gradclip: {out} exists; --force overwrites it\n")
    assert out.read_text() == "of another"


def during(monkeypatch: pytest.MonkeyPatch, label: str, happens: Callable[[], object]) -> None:
    """Let something happen, as another process would do it, before the first piece is counted."""

    @contextlib.contextmanager
    def progress(shown: str, total: float) -> Iterator[Callable[[float], None]]:
        assert total
        yield lambda _amount: happens() if shown == label else None

    for module in ("norm", "clip"):
        monkeypatch.setattr(f"gradclip.cli.{module}.progress", progress)


def test_a_dtype_that_cannot_be_clipped(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", {"w": np.ones(3), "v": np.ones(2, ml_dtypes.bfloat16)})
    message = f"{source}: v is |V2, which gradclip cannot clip"
    refused(source, tmp_path / "o.npz", message)


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("0", "clip_norm is 0.0; it must be above 0 (inf: only measure)"),
        ("-1", "clip_norm is -1.0; it must be above 0 (inf: only measure)"),
        ("nan", "clip_norm is nan; it must be above 0 (inf: only measure)"),
        ("two", "could not convert string to float: 'two'"),
    ],
)
def test_a_wrong_limit(tmp_path: Path, limit: str, message: str) -> None:
    source = save(tmp_path / "a.npy", {"a": np.ones(1)})
    done = run_main("clip", source, "--clip-norm", limit, "-o", tmp_path / "o.npy")
    expected = f"gradclip: argument --clip-norm/--max-norm: {message}; see gradclip clip --help\n"
    assert done == (2, "", expected)


def test_the_copy_is_no_more_readable_than_the_input(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    for mode in (0o600, 0o444):
        source.chmod(mode)
        out = tmp_path / f"{mode}.npy"
        clip(source, out)
        assert stat.S_IMODE(out.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o640, 0o666, 0o400, 0o200, 0])
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path: Path, mode: int) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    source.chmod(0o644)
    out = save(tmp_path / "o.npy", {"a": np.ones(3)})
    out.chmod(mode)
    before = os.umask(0o077)
    try:
        assert run_main("clip", source, "--clip-norm", 1, "-o", out, "--force")[0] == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert stat.S_IMODE(source.stat().st_mode) == 0o644


# ---- crashes ----

SIZE = 2**25  # elements: 128 MiB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes long enough to clip for a signal to come in between."""
    return save(tmp_path_factory.mktemp("large") / "a.npy", {"a": random("f4", SIZE)})


def stopped(source: Path, out: Path, number: int, after: float | None) -> int:
    """Send a signal to a process that clips: some seconds after its start, or as it writes."""
    with subprocess.Popen(
        cli_files.command("clip", source, "--clip-norm", 1, "-o", out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        if after is None:
            while process.poll() is None and not list(out.parent.glob(".gradclip-*/*")):
                time.sleep(0.001)
        else:
            time.sleep(after)
        process.send_signal(number)
    return process.returncode


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_a_whole_file_or_none(tmp_path: Path, large: Path) -> None:
    expected, _ = gradclip.clip_by_global_norm(np.load(large), 1)
    before = large.read_bytes()
    out = tmp_path / "o.npy"
    generator = chance.Random(0)
    ended = 0
    for attempt in range(12):
        after = None if attempt % 2 else generator.uniform(0.1, 1.0)
        ended += stopped(large, out, signal.SIGKILL, after) == -signal.SIGKILL
        if out.exists():
            assert same(np.load(out), expected)
            out.unlink()
        for left in tmp_path.glob(".gradclip-*"):
            shutil.rmtree(left)
    assert ended
    assert large.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_interrupted_it_leaves_nothing(
    tmp_path: Path, large: Path, number: int, status: int
) -> None:
    out = tmp_path / "o.npy"
    with cli_files.heeded(signal.SIGINT, signal.SIGHUP):
        assert stopped(large, out, number, None) == status
    assert not list(tmp_path.iterdir())


# Run with a limit on the size of files, which the system reports as an error to the writer.
LIMITED = """
import resource, signal, sys
from gradclip.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", INDEX])
@pytest.mark.parametrize("limit", [1, math.inf])
def test_a_file_that_grows_too_large(tmp_path: Path, name: str, limit: float) -> None:
    source = save(tmp_path / name, {"a": random("f4", 10**5)})
    before = snapshot(tmp_path)
    out = tmp_path / ("o" + source.suffix)
    arguments = ("clip", source, "--clip-norm", limit, "-o", out)
    done = cli_files.run([sys.executable, "-c", LIMITED, *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gradclip: cannot write {out}: File too large\n"
    assert snapshot(tmp_path) == before
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", INDEX])
def test_a_full_disk(tmp_path: Path, name: str) -> None:
    unshare = shutil.which("unshare")
    script = 'mount -t tmpfs -o size=100k none "$0" && "$@"; status=$?; ls -A "$0"; exit $status'
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = [unshare or "unshare", "--mount", "sh", "-c", script, str(disk)]
    if unshare is None or cli_files.run([*alone, "true"]).returncode:
        pytest.skip("mounting a small file system is not permitted")
    source = save(tmp_path / name, {"a": random("f4", 10**5)})
    out = disk / ("o" + source.suffix)
    arguments = cli_files.command("clip", source, "--clip-norm", 1, "-o", out)
    done = cli_files.run([*alone, *arguments])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"gradclip: cannot write {out}: No space left on device\n"


# ---- memory ----


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/status tells the peak")
@pytest.mark.parametrize("limit", [2.5, 5])
def test_a_large_file_takes_little_memory(tmp_path: Path, limit: float) -> None:
    source, out = cli_files.sparse_npy(tmp_path / "a.npy", 2**27), tmp_path / "o.npy"
    arguments = ("clip", source, "--clip-norm", limit, "-o", out)
    assert cli_files.peak_memory(*arguments) < 200e6
    written = np.load(out, mmap_mode="r")
    assert (written[0], written[-1]) == (3 * limit / 5, 4 * limit / 5)
    assert os.path.getsize(out) == os.path.getsize(source)
