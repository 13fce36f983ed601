"""A machine that is busy with other work, and what one thread of gradclip makes of it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from gradclip import global_norm
from gradclip.cli.bench import contenders, jobs
from gradclip.cli.bench.contenders import Call
from gradclip.cli.bench.jobs import Shapes
from gradclip.cli.bench.timing import BATCH, seconds_of
from gradclip.kernels.cpu import threads as team

_VARIABLE = "GRADCLIP_NUM_THREADS"
# It ends with the process that has started it, however that one ends.
_SPIN = """
import os, sys
while os.getppid() == int(sys.argv[1]):
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def spinning(count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Have so many other processes spin meanwhile."""
    command = [sys.executable, "-c", _SPIN, str(os.getpid())]
    spinners: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            # Ctrl-C is for the one that ends them, and so is its output.
            spinner = subprocess.Popen(command, stdout=subprocess.DEVNULL, process_group=0)
            spinners.append(spinner)
        yield spinners
    finally:
        for process in spinners:
            process.kill()
            process.wait()


def beside_one_thread(call: Call) -> dict[str, Call]:
    """A call of gradclip on all threads, and the same call on one."""
    return {"gradclip": _on_threads(call, team.number()), "one thread": _on_threads(call, 1)}


def _on_threads(call: Call, count: int) -> Call:
    """The same call, that takes as many threads at the most: gradclip reads that in every call."""
    usual = str(team.number())

    def limited() -> object:
        os.environ[_VARIABLE] = str(count)
        try:
            return call()
        finally:
            os.environ[_VARIABLE] = usual

    return limited


# ---- under XLA, whose number of threads is that of its process ----


def clips_under_xla(shapes: Shapes) -> Iterator[dict[str, float]]:
    """Seconds of a jitted clip while other processes spin: on all of XLA's threads, and on one."""
    if not find_spec("optax"):
        return
    workers: dict[str, subprocess.Popen[str]] = {}
    try:
        for system, variables in (("gradclip", {}), ("one thread", {"NPROC": "1"})):
            workers[system] = _started(shapes, variables)
            _answer(workers[system])  # one has warmed up before another begins
        with spinning(team.number()):
            while True:
                yield {system: _asked(worker) for system, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()


def _started(shapes: Shapes, variables: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", f"from gradclip.cli.bench.busy import serve; serve({shapes!r})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        process_group=0,
    )


def _asked(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    return _answer(worker)


def _answer(worker: subprocess.Popen[str]) -> float:
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        raise ChildProcessError("a process that clips under XLA ended before its time")
    return float(line)


def serve(shapes: Shapes) -> None:
    """Be one of the workers: answer each line by the seconds of a clip, until there are no more."""
    arrays = jobs.random(shapes)
    limit = 0.5 * float(global_norm(arrays))
    call = contenders.optax_updates(arrays, limit, jit=True)["gradclip"]
    call()  # compiles
    alone = seconds_of(call, 3)
    print(alone, flush=True)
    for _ in sys.stdin:
        print(seconds_of(call, max(1, int(BATCH / alone))), flush=True)
