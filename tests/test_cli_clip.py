"""``gradclip clip``: bits, whole files or none, refusals, signals, full disks, memory."""

from __future__ import annotations

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
from collections.abc import Iterator
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
    assert (found["clipped"], found["carried_over"]) == (
        len(expected),
        len(arrays) - len(expected),
    )
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


def test_raise_names_the_tensors_and_writes_nothing(tmp_path: Path) -> None:
    arrays = {"a": np.float32([math.nan, math.inf]), "b": np.ones(3), "c": np.float16([math.inf])}
    source = save(tmp_path / "a.npz", arrays)
    message = (
        f"global norm nan (float64): {source}: a holds 1 NaN and 1 inf; "
        f"{source}: c holds 0 NaN and 1 inf; nothing is written"
    )
    out = tmp_path / "o.npz"
    refused(source, out, message, "--on-nonfinite", "raise", status=1)


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
        ("a.npz", "2", "o.npz"): "global norm 5.0 (float32), clipped to 2.0 by the factor 0.4\n"
        "o.npz: 1 tensor, 8 bytes; 1 tensor, 8 bytes, carried over\n",
        ("a.npz", "5", "p.npz"): "global norm 5.0 (float32), nothing to clip at 5.0\n"
        "p.npz: 1 tensor, 8 bytes; 1 tensor, 8 bytes, carried over\n",
        ("n.npy", "5", "o.npy"): "global norm nan (float32), every element set to nan\n"
        "o.npy: 1 tensor, 4 bytes\n",
    }.items():
        source, limit, out = arguments
        assert run_main("clip", source, "--clip-norm", limit, "-o", out) == (0, text, "")


def test_the_report(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", {"a": np.float32([3, 4]), "step": np.array(7)})
    assert clip(source, tmp_path / "o.npz", 2) == {
        "file": str(source),
        "output": str(tmp_path / "o.npz"),
        "norm": 5.0,
        "norm_dtype": "float32",
        "clip_norm": 2.0,
        "action": "scale",
        "factor": 0.4,
        "clipped": 1,
        "carried_over": 1,
    }


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


def test_outputs_of_another_kind(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    (tmp_path / "d.npy").mkdir()
    for name, message in {
        "o.npz": "{} must end in .npy, as {} does",
        "o": "{} must end in .npy, as {} does",
        "d.npy": "{} is a folder",
        "no/o.npy": "cannot write {}: No such file or directory",
    }.items():
        refused(source, tmp_path / name, message.format(tmp_path / name, source), "--force")


def test_shards_never_go_where_files_are(tmp_path: Path) -> None:
    source = save(tmp_path / INDEX, {"a": np.ones(4), "b": np.ones(4)})
    message = f"{tmp_path} exists; the folder for clipped shards must be a new one"
    refused(source, tmp_path, message, "--force")
    out = tmp_path / "out"
    out.mkdir()
    refused(source, out, f"{out} exists; the folder for clipped shards must be a new one")
    clip(source, out, 1, "--force")
    assert len(load(out)) == 2


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
    expected = f"gradclip: argument --clip-norm: {message}; see gradclip clip --help\n"
    assert done == (2, "", expected)


def test_the_copy_is_no_more_readable_than_the_input(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npy", {"a": np.array([3.0, 4])})
    for mode in (0o600, 0o444):
        source.chmod(mode)
        clip(source, tmp_path / "o.npy", 1, "--force")
        assert stat.S_IMODE((tmp_path / "o.npy").stat().st_mode) == mode


# ---- crashes ----

SIZE = 2**25  # elements: 128 MiB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that takes long enough to clip for a signal to come in between."""
    return save(tmp_path_factory.mktemp("large") / "a.npy", {"a": random("f4", SIZE)})


def _stopped(source: Path, out: Path, number: int, after: float | None) -> int:
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
    stopped = 0
    for attempt in range(12):
        after = None if attempt % 2 else generator.uniform(0.1, 1.0)
        stopped += _stopped(large, out, signal.SIGKILL, after) == -signal.SIGKILL
        if out.exists():
            assert same(np.load(out), expected)
            out.unlink()
        for left in tmp_path.glob(".gradclip-*"):
            shutil.rmtree(left)
    assert stopped
    assert large.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_leaves_nothing(
    tmp_path: Path, large: Path, number: int, status: int
) -> None:
    out = tmp_path / "o.npy"
    # Tests that run in the background of a shell inherit that SIGINT is ignored, and so would it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        stopped = _stopped(large, out, number, None)
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert stopped == status
    assert not list(tmp_path.iterdir())


# Run with a limit on the size of files, which the system reports as an error to the writer.
LIMITED = """
import resource, signal, sys
from gradclip.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10**5, 10**5))
sys.exit(main(sys.argv[1:]))
"""


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
