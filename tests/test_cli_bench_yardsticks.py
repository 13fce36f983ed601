"""What `gradclip bench` holds gradclip to: memory, read and written, and one thread of its own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gradclip.cli.bench import busy, cases, jobs, measuring, timing

DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_yardsticks_have_every_byte(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    arrays = jobs.normal(2**16, dtype, 1)
    before = [array.tobytes() for array in arrays]
    assert sum(map(len, before)) == 2**16
    seen: list[Any] = []
    monkeypatch.setattr(np, "dot", lambda left, right: seen.append((left, right)))
    (read,) = jobs.reading(arrays).values()
    read()
    for array, (left, right) in zip(arrays, seen, strict=True):
        for each in (left, right):
            assert each.dtype == np.float64
            assert (each.ctypes.data, each.nbytes) == (array.ctypes.data, array.nbytes)
    seen.clear()
    monkeypatch.setattr(np, "multiply", lambda words, _, out: seen.append((words, out)))
    (write,) = jobs.writing(arrays, float).values()
    write()
    assert all(words is out for words, out in seen)
    places = sorted((words.ctypes.data, words.nbytes) for words, _ in seen)
    whole = sorted((array.ctypes.data, array.nbytes) for array in arrays)
    assert [place for place, _ in places][:: len(places) // 4] == [place for place, _ in whole]
    assert sum(size for _, size in places) == 2**16
    monkeypatch.undo()
    write()
    assert [array.tobytes() for array in arrays] == before


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    not HUGE.exists() or "[never]" in HUGE.read_text(), reason="the system has no huge pages"
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_arrays_ask_for_huge_pages(dtype: str) -> None:
    for array in jobs.normal(2**24 + 2**16, dtype, 1):
        assert "hg" in flags_at(array.ctypes.data + array.nbytes // 2)


def flags_at(address: int) -> list[str]:
    """What the system says of the mapping that has this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping has the address")


# ---- a busy machine ----


def is_running(process: subprocess.Popen[Any]) -> bool:
    return process.poll() is None


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_spinners_end_with_their_case(error: type[BaseException] | None) -> None:
    expected = contextlib.nullcontext() if error is None else pytest.raises(error)
    with expected, busy.spinning(2) as spinners:
        assert [is_running(process) for process in spinners] == [True, True]
        if error is not None:
            raise error
    assert [process.returncode for process in spinners] == 2 * [-signal.SIGKILL]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_spinners_end_with_a_process_that_is_killed() -> None:
    code = (
        "import os, signal; from gradclip.cli.bench.busy import spinning\n"
        "with spinning(1) as spinners:\n"
        "    print(spinners[0].pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    spinner = int(done.stdout)
    give_up = time.monotonic() + 20
    try:
        while is_there(spinner):
            assert time.monotonic() < give_up
            time.sleep(0.01)
    except AssertionError:  # else its number may be another's by now
        os.kill(spinner, signal.SIGKILL)
        raise


def is_there(process: int) -> bool:
    """If a process runs; one that has ended may stay, where nobody asks how."""
    try:
        state = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return state.rpartition(")")[2].split()[0] != "Z"


def test_a_busy_case_spins_while_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "3")
    happened: list[str] = []

    @contextlib.contextmanager
    def spinning(count: int) -> Iterator[None]:
        happened.append(f"{count} spin")
        yield
        happened.append("end")

    monkeypatch.setattr(measuring, "spinning", spinning)
    monkeypatch.setattr(timing, "PAUSE", 0.0)
    monkeypatch.setattr(timing, "BATCH", 0.0)
    call = lambda: happened.append(os.environ["GRADCLIP_NUM_THREADS"])  # noqa: E731
    case = cases.CASES["busy-small"]._replace(systems=lambda _: busy.beside_one_thread(call))
    rows = measuring.measure("busy-small", case, shrink=20)
    assert happened == [*"3311", "3 spin", *"31", *"13", *"31", "end"]
    assert [row["system"] for row in rows] == ["gradclip", "one thread"]
    assert {row["unit"] for row in rows} == {"one thread"}
    assert os.environ["GRADCLIP_NUM_THREADS"] == "3"


def test_a_worker_that_ends_is_an_error(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    framework("optax")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ChildProcessError, match=r"^a process that clips under XLA ended before"):
        next(busy.clips_under_xla([(10,)]))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads /proc")
def test_one_worker_has_one_thread_of_xla(framework: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    framework("optax")
    workers: list[Any] = []
    start = busy._started
    monkeypatch.setattr(busy, "_started", lambda *at: workers.append(start(*at)) or workers[-1])
    turns = busy.clips_under_xla([(1000,)])
    assert next(turns).keys() == {"gradclip", "one thread"}
    threads = [
        [path.read_text() for path in Path(f"/proc/{worker.pid}/task").glob("*/comm")]
        for worker in workers
    ]
    many, one = (sum("XLAEigen" in name for name in each) for each in threads)
    assert (many, one) == (len(os.sched_getaffinity(0)), 1)
    turns.close()
    assert [worker.returncode for worker in workers] == 2 * [-signal.SIGKILL]
