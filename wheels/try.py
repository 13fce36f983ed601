"""Install a wheel as a user does, with no compiler in reach; run README's first lines and tests.

python wheels/try.py dist/NAME.whl [more arguments for pytest]
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
# What needs no framework: the arithmetic, the kernel, processes, records.
TESTS = (
    *("arrays", "bits", "each", "limits", "norms", "oracle", "overlap", "process", "record"),
    *("record_hostile", "rooms", "spec"),
)
NEEDED = ("hypothesis", "ml_dtypes", "pytest", "scipy")
FIRST_USE = """
import gradclip, sys
from gradclip.kernels import cpu
print("gradclip", gradclip.__version__, "on", sys.platform, sys.version.split()[0], cpu.kernel())
assert sys.argv[1] == "pure" or cpu.why_numpy() is None, cpu.why_numpy()
"""


def main(wheel: Path, *options: str) -> None:
    """Use a wheel in a new environment."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has Python code"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        venv.create(name, with_pip=True)
        programs = Path(name) / ("Scripts" if os.name == "nt" else "bin")

        def python(*words: str, cwd: Path | str = ROOT) -> None:
            command = [str(programs / "python"), *words]
            subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": str(programs)}, check=True)

        pip = ("-m", "pip", "install", "--quiet", "--only-binary", ":all:")
        python(*pip, str(wheel.absolute()))
        kind = "pure" if wheel.name.endswith("-none-any.whl") else "native"
        python("-c", FIRST_USE + block[1] + "print(norm, clipped)", kind, cwd=name)
        if kind == "pure":
            return  # many of the tests are about the kernel
        python(*pip, *NEEDED)
        tests = [str(ROOT / f"tests/test_{name}.py") for name in TESTS]
        quick = ("-m", "not slow and not long", "-p", "no:cacheprovider")
        python("-m", "pytest", *quick, *tests, *options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
