"""Interpreters beside the main one of a process, and those without its lock: what holds there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import builds
from host import run_python

pytestmark = pytest.mark.slow

RUN = """
import sys
import warnings

CODE = '''
import warnings
warnings.simplefilter("ignore")  # NumPy warns in any but the main one
try:
    import gradclip
except ImportError as error:
    print(error, flush=True)
else:
    import numpy
    from gradclip.kernels import cpu
    print(gradclip.global_norm([numpy.array([3.0, 4.0])]), cpu.why_numpy(), flush=True)
'''

def run_in_another(*, own_lock):
    if sys.version_info >= (3, 13):
        import _interpreters as interpreters
        another = interpreters.create("isolated" if own_lock else "legacy")
        interpreters.exec(another, CODE)
    else:
        warnings.simplefilter("ignore")
        import _xxsubinterpreters as interpreters
        another = interpreters.create(isolated=own_lock)
        interpreters.run_string(another, CODE)
    interpreters.destroy(another)
"""
WAY_OUT = "import gradclip in the main interpreter, or give each worker a process"
REFUSED = (
    f"Python 3.11 imports optree in the main interpreter alone; {WAY_OUT}"
    if sys.version_info < (3, 12)
    else "NumPy loads in one interpreter of a process, which shares the main one's lock, and this "
    f"is another; {WAY_OUT}"
)


def printed(call: str) -> str:
    done = run_python(RUN + call)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_with_a_lock_of_its_own_is_told_in_one_line() -> None:
    assert printed("run_in_another(own_lock=True)") == f"{REFUSED}\n"


def test_one_after_the_main_one_is_told_in_one_line() -> None:
    code = "import numpy, gradclip\nrun_in_another(own_lock=False)\n"
    code += "print(gradclip.global_norm([numpy.array([3.0, 4.0])]))"
    assert printed(code) == f"{REFUSED}\n5.0\n"


def test_one_that_alone_has_numpy_can_clip() -> None:
    expected = REFUSED if sys.version_info < (3, 12) else "5.0 None"
    assert printed("run_in_another(own_lock=False)") == f"{expected}\n"


def test_a_python_without_other_interpreters_can_clip() -> None:
    name = "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters"
    code = f"sys.modules[{name!r}] = None\n"
    code += "import numpy, gradclip\nprint(gradclip.global_norm([numpy.array([3.0, 4.0])]))"
    done = run_python(code)
    assert done.stdout == "5.0\n", done.stderr


FREE_THREADED = """
import sysconfig, sys
found = sysconfig.get_config_var
sysconfig.get_config_var = lambda name: 1 if name == "Py_GIL_DISABLED" else found(name)
sys.argv = ["setup.py", "bdist_wheel"]
exec(open("setup.py").read())
"""


@pytest.mark.long
def test_a_free_threaded_python_gets_a_wheel_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    builds.copy_tree(tmp_path)
    command = [sys.executable, "-c", FREE_THREADED]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    tag = f"cp3{sys.version_info.minor}"
    assert f"-{tag}-{tag}-" in wheel.name
    kernel = f"gradclip/kernels/cpu/_cpu.cpython-3{sys.version_info.minor}"
    assert any(name.startswith(kernel) for name in zipfile.ZipFile(wheel).namelist())
