"""`gradclip.Record` among crashes, full disks, forks, others' files and wrong words."""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradclip
from gradclip.record import History
from host import run_python
from ranks import run_ranks
from record_files import check_whole, query, raises, rows

NAN = math.nan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.db"


# ---- crashes ----

# Trains for ever, told to print each step that was flushed.
TRAINS = """
import gradclip, numpy as np, sys
record = gradclip.Record(sys.argv[1], per_tensor_every=3)
told = gradclip.norms({f"w{n}": np.ones(2) for n in range(50)})
first = int(sys.argv[2])
for step in range(first, 10**9):
    record(step, told, limit=100.0, skipped=step % 97 == 0)
    if step % 1000 == 0:
        record.flush()
        print(step, flush=True)
"""


def killed(path: Path, first: int, after: float) -> int:
    """Train from a step on, kill -9 so long after the first flush; the last step of a flush."""
    command = [sys.executable, "-c", TRAINS, str(path), str(first)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        begun = process.stdout.readline()
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        flushed = begun + process.stdout.read()
    return int(flushed.split("\n")[-2])


def check_kills(path: Path, times: int) -> None:
    generator = random.Random(times)
    for _ in range(times):
        # The first flush is of a step that a thousand divides.
        flushed = killed(path, 1000, generator.uniform(0, 0.3))
        check_whole(path)
        with History.open(path) as history:
            steps = history.steps
            assert steps.tolist() == list(range(1000, 1000 + len(steps)))
            assert steps[-1] >= flushed
            expected = np.flatnonzero((steps % 3 == 0) | (steps % 97 == 0))
            assert set(steps[expected]) <= set(history.tensor_steps.tolist())
            assert (history.tensor_norms(0, 100).values == math.sqrt(2)).all()


@pytest.mark.slow
def test_kill_9_loses_the_last_batch_alone(path: Path) -> None:
    check_kills(path, 4)


@pytest.mark.long
def test_kill_9_fifty_times(path: Path) -> None:
    check_kills(path, 50)


@pytest.mark.slow
def test_after_a_kill_it_is_gone_on_with(path: Path) -> None:
    flushed = killed(path, 0, 0.1)
    with gradclip.Record(path) as record:
        record(flushed, 7.0)
    check_whole(path)
    with History.open(path) as history:
        assert history.steps.tolist() == list(range(flushed + 1))
        assert history.norm[-1] == 7.0
        assert (history.tensor_steps < flushed).all()


# ---- full disks ----


@pytest.mark.slow
def test_a_full_disk_ends_no_training(path: Path) -> None:
    code = f"""
    import gradclip, resource, sys, warnings
    warnings.simplefilter("always")
    record = gradclip.Record({str(path)!r})
    def train(first, last):
        for step in range(first, last):
            record(step, 1.0)
        record.flush()
    with warnings.catch_warnings(record=True) as told:
        train(0, 1000)
        assert not told
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        for first in range(1000, 6000, 1000):
            train(first, first + 1000)
    (warning,) = told
    print(warning.category.__name__, warning.message)
    if sys.argv[1] == "room":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        train(6000, 7000)
    """
    done = run_python(code, "room")
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        rf"RuntimeWarning {re.escape(str(path))} cannot be written: .*\. The training goes on; the "
        r"latest 64 MB are kept, and written once that is possible\n",
        done.stdout,
    )
    assert done.stderr == ""
    assert check_whole(path) == 7000
    path.unlink()
    done = run_python(code, "none")
    assert done.returncode == 0, done.stderr
    kept = check_whole(path)
    assert 1000 <= kept < 6000
    assert f"RuntimeWarning: {path}: {6000 - kept} steps are not in it" in done.stderr


@pytest.mark.long
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        record = gradclip.Record(disk / "run.db")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(10_000):
                record(step, 1.0)
                if step % 500 == 0:
                    record.flush()
        assert len(told) == 1
        assert "cannot be written: database or disk is full" in str(told[0].message)
        with pytest.warns(RuntimeWarning, match="steps are not in it"):
            record.close()
        assert 0 < check_whole(disk / "run.db") < 10_000
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_what_is_kept_meanwhile_is_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradclip.record.writing._MOST_KEPT", 200 * 100)
    record = gradclip.Record(path)
    record(0, 1.0)
    record.flush()
    with closing(sqlite3.connect(path, isolation_level=None)) as another:
        record._writer._store._file.execute("PRAGMA busy_timeout = 0")
        another.execute("BEGIN IMMEDIATE")
        for step in range(1, 501):
            record(step, 1.0)
        with pytest.warns(RuntimeWarning, match="cannot be written: database is locked"):
            record.flush()
        another.execute("ROLLBACK")
    with pytest.warns(RuntimeWarning, match="400 steps are not in it"):
        record.close()
    assert rows(path, "step") == [(step,) for step in (0, *range(401, 501))]


# ---- who may write ----


def test_a_second_writer_is_refused(path: Path) -> None:
    text = (
        f"{path} is being written by another Record (database is locked); close that one, or "
        "write another file"
    )
    with gradclip.Record(path) as record:
        record(0, 1.0)
        with raises(RuntimeError, text):
            gradclip.Record(path)
        link = path.with_name("link.db")
        link.symlink_to(path)
        with raises(RuntimeError, text):
            gradclip.Record(link)
        done = run_python(f"import gradclip; gradclip.Record({str(path)!r})")
        assert f"RuntimeError: {text}" in done.stderr
    with gradclip.Record(path) as record:
        record(1, 1.0)
    assert rows(path, "run, step") == [(0, 0), (1, 1)]


def test_other_ranks_write_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with gradclip.Record(path) as record:
        record(0, 1.0)
        record.flush()
    assert not path.exists()
    with gradclip.Record(path, rank=0) as record:
        record(0, 1.0)
    assert len(rows(path)) == 1
    monkeypatch.setenv("RANK", "one")
    text = "the environment's RANK is 'one'; it must be a number, or give rank="
    with raises(ValueError, text):
        gradclip.Record(path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), [("torch", 1.0), ("jax", 2.0)])
def test_the_first_rank_writes(
    name: str, norm: float, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optax" if name == "jax" else name)
    monkeypatch.setenv("RECORD", str(path))
    run_ranks("record_ranks", [f"of_{name}"], 2)
    assert rows(path, "step, norm") == [(0, norm)]


@pytest.mark.slow
def test_a_fork_is_refused_and_harms_nothing(path: Path) -> None:
    code = f"""
    import gradclip, os, sys
    record = gradclip.Record({str(path)!r})
    record(0, 1.0)
    child = os.fork()
    if not child:
        for call in (lambda: record(1, 1.0), record.flush):
            try:
                call()
            except RuntimeError as error:
                print(error)
        record.close()
        sys.exit()
    assert os.waitpid(child, 0)[1] == 0
    for step in range(1, 1000):
        record(step, 1.0)
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    text = (
        f"the record {path} was opened in another process, of which this one is a fork; open one "
        "here, of another file, or record there"
    )
    assert done.stdout.splitlines() == [text, text]
    assert len(rows(path)) == 1000


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"per_tensor_every": -1}, ValueError, "per_tensor_every is -1; it must be 0 or above"),
        ({"per_tensor_every": 1.0}, TypeError, "per_tensor_every is 1.0; it must be an int"),
        ({"ring": True}, TypeError, "ring is True; it must be an int"),
        ({"hard": "x"}, TypeError, "hard is 'x'; it must be a number"),
        ({"hard": 1.5}, ValueError, "hard is 1.5; it must be from 0 to 1"),
        ({"hard": NAN}, ValueError, "hard is nan; it must be from 0 to 1"),
        ({"rank": -1}, ValueError, "rank is -1; it must be 0 or above"),
        ({"rank": "0"}, TypeError, "rank is '0'; it must be an int, or None to find out"),
        ({"log": 3}, TypeError, "log is 3; it must be a function of a dict and a step, or None"),
    ],
)
def test_wrong_options(
    options: dict[str, Any], error: type[Exception], text: str, path: Path
) -> None:
    with raises(error, text):
        gradclip.Record(path, **options)
    assert not path.exists()


NUMBER = "it must be a number or a scalar of a framework"
EACH = "it must be a number, or a vector of one for each group or tensor"


@pytest.mark.parametrize(
    ("args", "given", "error", "text"),
    [
        ((1.0, 1.0), {}, TypeError, "step is 1.0; it must be an int"),
        ((True, 1.0), {}, TypeError, "step is True; it must be an int"),
        ((-1, 1.0), {}, ValueError, "step is -1; it must be from 0 to below 2**63"),
        ((2**63, 1.0), {}, ValueError, f"step is {2**63}; it must be from 0 to below 2**63"),
        ((0, "1"), {}, TypeError, "norm is '1'; it must be a real number"),
        ((0, True), {}, TypeError, "norm is True; it must be a real number"),
        ((0, 1j), {}, TypeError, "norm is 1j; it must be a real number"),
        ((0, None), {}, TypeError, f"norm is NoneType; {NUMBER}"),
        ((0, 1.0), {"limit": [1.0]}, TypeError, f"limit is list; {NUMBER}"),
        ((0, np.ones(2)), {}, TypeError, "norm has the shape (2,); it must be a number"),
        ((0, 1.0), {"limit": np.ones((1, 2))}, TypeError, f"limit has the shape (1, 2); {EACH}"),
        ((0, 1.0), {"factor": "1"}, TypeError, "factor is '1'; it must be a real number"),
        ((0, 1.0), {"skipped": 1}, TypeError, "skipped is 1; it must be True, False or None"),
    ],
)  # fmt: skip
def test_wrong_steps(
    args: Any, given: dict[str, Any], error: type[Exception], text: str, path: Path
) -> None:
    with gradclip.Record(path) as record, raises(error, text):
        record(*args, **given)


def test_after_it_was_closed(path: Path) -> None:
    record = gradclip.Record(path)
    record.close()
    record.close()
    for call in (lambda: record(0, 1.0), record.flush):
        with raises(ValueError, f"the record {path} has been closed"):
            call()


def test_it_is_not_copied(path: Path) -> None:
    with gradclip.Record(path) as record:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="a Record is neither copied nor pickled"):
                make(record)


def other_tables(path: Path) -> None:
    with closing(sqlite3.connect(path)) as file:
        file.executescript("CREATE TABLE steps (a); PRAGMA user_version = 0")


def later_version(path: Path) -> None:
    with gradclip.Record(path):
        pass
    query(path, "PRAGMA user_version = 2")


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda path: path.write_text("x" * 5000), ValueError, "is no record of gradclip"),
        (other_tables, ValueError, "it is a database of other tables"),
        (later_version, ValueError, "is a record of version 2; this gradclip reads up to 1"),
        (lambda path: path.mkdir(), IsADirectoryError, "is a folder; a record is one file"),
    ],
    ids=["text", "tables", "version", "folder"],
)
def test_a_file_that_is_no_record(make: Any, error: type[Exception], text: str, path: Path) -> None:
    make(path)
    for opened in (gradclip.Record, History.open):
        with pytest.raises(error, match=re.escape(text)):
            opened(path)
    assert not path.with_name("run.db-writer").exists()


def test_where_there_is_no_file(path: Path, tmp_path: Path) -> None:
    with raises(FileNotFoundError, f"there is no record {path}"):
        History.open(path)
    path.touch()
    with raises(ValueError, f"{path} is no record of gradclip: it is empty"):
        History.open(path)
    with raises(FileNotFoundError, f"there is no folder {tmp_path / 'a'} for the record run.db"):
        gradclip.Record(tmp_path / "a" / "run.db")


AS_NOBODY = """
import os, sys
import gradclip
from gradclip.record import History
if os.getuid() == 0:  # whom no mode keeps out
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
if sys.argv[2] == "read":
    print(len(History.open(sys.argv[1])))
else:
    gradclip.Record(sys.argv[1])
"""


@pytest.fixture
def shown() -> Iterator[Path]:
    """A folder that everybody may read and nobody but its owner may write."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        yield Path(folder)
        os.chmod(folder, 0o755)


@pytest.mark.slow
def test_a_folder_that_may_not_be_written(shown: Path) -> None:
    os.chmod(shown, 0o755)
    with gradclip.Record(shown / "run.db") as record:
        record(0, 1.0)
    os.chmod(shown, 0o555)
    done = run_python(AS_NOBODY, str(shown / "run.db"), "read")
    assert done.stdout == "1\n", done.stderr
    done = run_python(AS_NOBODY, str(shown / "run.db"), "write")
    assert f"PermissionError: {shown} may not be written; a record needs a folder" in done.stderr


# ---- what it costs ----


@pytest.mark.slow
def test_import_loads_no_database() -> None:
    done = run_python("import gradclip, sys; print('sqlite3' in sys.modules, gradclip.Record)")
    assert done.stdout == "False <class 'gradclip.Record'>\n", done.stderr


def test_the_room_has_no_other_name() -> None:
    with raises(AttributeError, "module 'gradclip' has no attribute 'Recorder'"):
        gradclip.Recorder  # noqa: B018


@pytest.mark.slow
def test_memory_does_not_grow(path: Path) -> None:
    code = f"""
    import gradclip, numpy as np
    from leaks import resident
    told = gradclip.norms({{f"w{{n}}": np.ones(2) for n in range(100)}})
    with gradclip.Record({str(path)!r}) as record:
        memory = []
        for step in range(100_001):
            record(step, gradclip.Norms(told.values + 1, 2.0, told.paths), limit=1.0)
            if step % 20_000 == 0:
                record.flush()
                memory.append(resident())
    print(max(memory[2:]) - memory[1])
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 4_000_000
    assert len(rows(path)) == 100_001


def test_a_record_that_is_dropped_ends_its_thread(path: Path) -> None:
    record = gradclip.Record(path)
    record(0, 1.0)
    del record
    assert not any(each.name == "gradclip.Record" for each in threading.enumerate())
    assert len(rows(path)) == 1


def test_a_record_that_its_own_thread_drops(path: Path) -> None:
    held: list[Any] = []

    def log(values: dict[str, float], step: int) -> None:
        del values, step
        held.clear()

    held.append(gradclip.Record(path, log=log))
    (thread,) = (each for each in threading.enumerate() if each.name == "gradclip.Record")
    held[0](0, 1.0)
    thread.join(10)
    assert not thread.is_alive()
    assert len(rows(path)) == 1


def test_a_thread_that_is_stuck_holds_the_training_up_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradclip.record.writing._PATIENCE", 0.2)
    hangs = threading.Event()

    def log(values: dict[str, float], step: int) -> None:
        del values, step
        hangs.wait()

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        record = gradclip.Record(path, log=log)
        started = time.perf_counter()
        for step in range(10_000):
            record(step, 1.0)
        assert time.perf_counter() - started < 3
        hangs.set()
        record.close()
    first, second = (str(each.message) for each in told)
    assert first == f"{path}: the thread that writes is stuck, and steps are lost"
    lost = int(re.fullmatch(rf"{path}: (\d+) steps are not in it", second)[1])
    assert 0 < lost < 10_000
    assert len(rows(path)) == 10_000 - lost


def test_names_that_are_no_text(path: Path) -> None:
    names = ("\ud800", "\x00", "line\nbreak", "\u2603", "'; DROP TABLE steps; --")
    with gradclip.Record(path, per_tensor_every=1) as record:
        record(0, gradclip.norms({name: np.ones(1) for name in names}))
    with History.open(path) as history:
        assert sorted(history.names) == sorted(("\\ud800", *names[1:]))
