"""Threads, forks, exits, leaks, imports, memory."""

from __future__ import annotations

import contextlib
import gc
import math
import mmap
import os
import shutil
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from scipy import sparse

import gradclip
import oracle
from cases import Case
from compare import assert_leaves, assert_norm, check, expected_of
from conftest import simple, some_quick
from gradclip.kernels import cpu
from gradclip.kernels.cpu import threads as team
from host import run_python

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def repeated(dtype: Any, count: int, seed: int) -> np.ndarray[Any, Any]:
    """A long array of few different numbers, which the oracle is quick with."""
    few = np.random.default_rng(seed).standard_normal(97).astype(dtype)
    return np.resize(few, count)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", "2")


# ---- threads ----


@pytest.mark.slow
@pytest.mark.parametrize("number_of_threads", [1, 2, 3])
def test_eight_python_threads_at_once(
    number_of_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADCLIP_NUM_THREADS", str(number_of_threads))
    dtypes = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
    work = [
        simple(repeated(dtype, 300_000, seed), repeated(dtype, 1000, seed), clip_norm=1.0 + seed)
        for seed, dtype in enumerate(2 * dtypes)
    ]
    expected = [expected_of(case) for case in work]
    monkeypatch.setattr(team, "BYTES_PER_THREAD", 1)
    start = threading.Barrier(8)

    def one(case: Case, wanted: oracle.Clipped) -> None:
        start.wait()
        for _ in range(4):
            check(case, wanted)

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(one, *job) for job in zip(work, expected, strict=True)]:
            done.result()


@pytest.mark.usefixtures("two_threads")
def test_eight_python_threads_read_one_list() -> None:
    values = [repeated(np.float32, 700_000, 1), repeated(np.float32, 700_000, 2)]
    wanted = expected_of(simple(*values, clip_norm=2.0))
    with ThreadPoolExecutor(8) as pool:
        for clipped, norm in pool.map(
            lambda _: gradclip.clip_by_global_norm(values, 2.0), range(16)
        ):
            assert_norm(norm, wanted.norm)
            assert_leaves(clipped, wanted)


@pytest.mark.usefixtures("two_threads")
def test_other_python_threads_run_while_a_kernel_does() -> None:
    leaves = [np.ones(1 << 24, np.float32)]
    finished = threading.Event()
    ticks = 0

    def measure() -> None:
        for _ in range(10):  # on a busy machine this thread may not get a turn during one
            gradclip.global_norm(leaves)
        finished.set()

    thread = threading.Thread(target=measure)
    thread.start()
    while not finished.is_set():
        ticks += 1
    thread.join()
    assert ticks > 100


@pytest.mark.usefixtures("two_threads")
@on_linux
def test_helpers_wake_on_other_processors_than_the_one_that_asks() -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("one processor")
    leaves = [np.ones(1 << 21, np.float32)]
    try:
        for here in sorted(everywhere)[:2]:
            gradclip.global_norm(leaves)  # starts the helpers
            os.sched_setaffinity(0, {here})
            os.sched_setaffinity(0, everywhere)
            gradclip.global_norm(leaves)
            helpers = cpu._cpu.helpers()
            assert helpers
            allowed = [os.sched_getaffinity(helper) for helper in helpers]
            assert all(len(processors) == len(everywhere) - 1 for processors in allowed)
    finally:
        os.sched_setaffinity(0, everywhere)


@on_linux
def test_a_helper_takes_no_signal_that_a_program_waits_for() -> None:
    code = """
        import os, signal
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of NumPy's threads one could take it
        os.environ["GRADCLIP_NUM_THREADS"] = "2"
        import workers
        assert workers.big_call() == workers.ANSWER
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        print(signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1)
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.parametrize("function", some_quick(["clip"], ["measure", "clip in place"]))
def test_memory_is_let_go_when_a_call_returns(function: str) -> None:
    """A mapping cannot be closed while anybody, on any thread, holds a view of it."""
    for _ in range(100):
        mapping = mmap.mmap(-1, 4 << 20)
        leaves = [np.frombuffer(mapping, np.float32)]
        if function == "measure":
            gradclip.global_norm(leaves)
        elif function == "clip":
            gradclip.clip_by_global_norm(leaves, 1.0, 2.0)
        else:
            gradclip.clip_by_global_norm_(leaves, 1.0, 2.0)
        leaves.clear()
        mapping.close()


def test_memory_is_let_go_after_an_error() -> None:
    mapping = mmap.mmap(-1, 4096)
    with contextlib.suppress(TypeError):
        gradclip.global_norm([np.frombuffer(mapping, np.float32), np.arange(3)])
    gc.collect()
    mapping.close()


# ---- processes ----

FORK = """
    import os, threading, time, warnings
    import workers
    warnings.simplefilter("ignore", DeprecationWarning)
    os.environ["GRADCLIP_NUM_THREADS"] = "2"
    assert workers.big_call() == workers.ANSWER
    stop = threading.Event()
    def keep_busy():
        while not stop.is_set():
            workers.big_call()
    others = [threading.Thread(target=keep_busy) for _ in range(2 * {busy})]
    for other in others:
        other.start()
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(0 if workers.big_call() == workers.ANSWER else 1)
        deadline = time.monotonic() + 30
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, "the child hangs"
            time.sleep(0.01)
        assert workers.big_call() == workers.ANSWER
    stop.set()
    for other in others:
        other.join()
"""


@pytest.mark.slow
@pytest.mark.parametrize("busy", [False, True], ids=["idle parent", "parent busy on two threads"])
def test_after_a_fork(busy: bool) -> None:
    done = run_python(FORK.format(busy=busy))
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_in_a_worker_of_multiprocessing(method: str) -> None:
    code = """
        import multiprocessing, os, warnings
        import workers
        warnings.simplefilter("ignore", DeprecationWarning)
        os.environ["GRADCLIP_NUM_THREADS"] = "2"
        workers.big_call()
        with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
            assert pool.map(workers.big_call, range(6)) == [workers.ANSWER] * 6
    """
    done = run_python(code, method)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_at_the_exit_of_the_interpreter(warm: bool) -> None:
    code = """
        import atexit, os
        import workers
        os.environ["GRADCLIP_NUM_THREADS"] = "2"
        if sys.argv[1] == "True":
            workers.big_call()
        atexit.register(lambda: print(workers.big_call() == workers.ANSWER))
    """
    done = run_python(code, str(warm))
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


@pytest.mark.slow
def test_in_a_thread_that_outlives_the_main_one() -> None:
    code = """
        import os, threading, time
        import workers
        os.environ["GRADCLIP_NUM_THREADS"] = "2"
        def late():
            threading.main_thread().join()
            print(workers.big_call() == workers.ANSWER)
        threading.Thread(target=late).start()
    """
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "True", "")


# ---- leaks ----


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number_of_threads", "calls"), [(2, 50_000), pytest.param(1, 100_000, marks=pytest.mark.long)]
)
def test_many_calls_leak_nothing(number_of_threads: int, calls: int) -> None:
    done = run_python(f"import leaks; leaks.check_many_calls({number_of_threads}, {calls})")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_memory_that_python_counts_does_not_grow() -> None:
    done = run_python("import leaks; leaks.check_what_python_counts()")
    assert (done.returncode, done.stderr) == (0, "")


# ---- memory ----

PEAK = r"""
    import ml_dtypes, os, re, traceback, warnings
    import numpy as np
    import gradclip
    warnings.simplefilter("ignore")
    os.environ["GRADCLIP_NUM_THREADS"] = "2"

    def status(field):
        return int(re.search(field + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) << 10

    dtype, layout = sys.argv[1:]
    dtype = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    def make(count):
        room = np.ones(2 * count if layout == "strided" else count, dtype)
        return room[::2] if layout == "strided" else room
    def beyond_outputs(call, limit):
        def run(leaf):
            if call == "in place":
                return gradclip.clip_by_global_norm_([leaf], limit)
            return gradclip.clip_by_global_norm([leaf], limit)
        run(make(4 << 20))
        leaf = make(20 << 20)
        before = status("VmHWM")
        assert before - status("VmRSS") < 1 << 19
        kept = run(leaf)
        return status("VmHWM") - before - (0 if call == "in place" else leaf.nbytes)

    for call in ("in place", "out of place"):
        for limit in (1.0, float("inf")):
            child = os.fork()  # whose mark begins where its memory does: marks only rise
            if child == 0:
                try:
                    print(beyond_outputs(call, limit), call, limit, flush=True)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
"""


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "layout"),
    [
        ("float32", "contiguous"),
        ("bfloat16", "contiguous"),
        ("float32", "strided"),
        *(
            pytest.param(dtype, "contiguous", marks=pytest.mark.long)
            for dtype in ("float64", "float16", "float8_e4m3fn", "complex64", ">f4")
        ),
    ],
)
def test_a_call_takes_under_one_megabyte_beyond_its_outputs(dtype: str, layout: str) -> None:
    """In place and not, with something to clip and with nothing."""
    done = run_python(PEAK, dtype, layout)
    assert done.returncode == 0, done.stderr
    calls = done.stdout.splitlines()
    assert len(calls) == 4
    for call in calls:
        assert int(call.split()[0]) < 1 << 20, call


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    "dtype", some_quick([np.float32], [np.float64, np.float16, ml_dtypes.bfloat16])
)
def test_what_python_counts_is_the_outputs(dtype: Any) -> None:
    leaf = np.ones(3 << 20, dtype)
    for call, most in (
        (lambda: gradclip.clip_by_global_norm_([leaf], 1.0), 0),
        (lambda: gradclip.clip_by_global_norm([leaf], 1.0), leaf.nbytes),
        (lambda: gradclip.clip_by_global_norm([leaf], math.inf), leaf.nbytes),
        (lambda: gradclip.global_norm([leaf]), 0),
    ):
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < most + (1 << 20)


def test_a_long_sparse_leaf_with_rows_to_add_takes_little_memory() -> None:
    rows = np.arange(200_000) % 1000
    values = np.ones((rows.size, 16), np.float32)
    slices = gradclip.IndexedSlices(values, rows)
    tracemalloc.start()
    try:
        gradclip.clip_by_global_norm_([slices], 1.0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes


def test_a_sparse_matrix_is_copied_once() -> None:
    matrix = sparse.csr_array(np.ones((1000, 1000), np.float32))
    tracemalloc.start()
    try:
        kept = gradclip.clip_by_global_norm([matrix], 1.0)
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept[1] == 1000
    assert left < matrix.data.nbytes + matrix.indices.nbytes + matrix.indptr.nbytes + (1 << 20)


# ---- imports ----

HEAVY = (
    "torch",
    "tensorflow",
    "jax",
    "jaxlib",
    "scipy",
    "ml_dtypes",
    "rich",
    "matplotlib",
    "keras",
    "cupy",
    "triton",
)


def heavy_modules_after(code: str, path: Path | None = None) -> list[str]:
    """Which of the heavy modules a new interpreter has imported."""
    env = {**os.environ, "PYTHONPATH": str(path)} if path else None
    done = run_python(f"{code}\nprint(*[name for name in {HEAVY} if name in sys.modules])", env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


USE = """
import numpy as np, gradclip
leaf = np.float32([3, 4])
gradclip.clip_by_global_norm([leaf, gradclip.IndexedSlices(leaf, np.array([1, 1]))], 1.0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", ["import gradclip", USE], ids=["import", "use"])
def test_no_framework_is_imported(code: str) -> None:
    assert heavy_modules_after(code) == []


@pytest.mark.slow
def test_a_framework_that_gradclip_imported_would_be_seen(tmp_path: Path) -> None:
    copy = tmp_path / "gradclip"
    shutil.copytree(Path(gradclip.__file__).parent, copy)
    code = f"import gradclip; assert gradclip.__file__.startswith({str(tmp_path)!r})"
    assert heavy_modules_after(code, tmp_path) == []
    with (copy / "core/tree.py").open("a") as source:
        source.write("\nimport scipy\n")
    assert heavy_modules_after(code, tmp_path) == ["scipy"]
