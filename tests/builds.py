"""Other builds of the C kernel: of changed sources, with other flags, as an install makes them."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src/gradclip/kernels/cpu"
CC = sysconfig.get_config_var("CC").split()
INCLUDE = f"-I{sysconfig.get_path('include')}"
DEFINE = "-DPy_LIMITED_API=0x030B0000"
FLAGS = (
    *("-shared", "-fPIC", "-std=c11", "-O1", "-g", "-fopenmp-simd", "-w"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno", "-fvisibility=hidden"),
    DEFINE,
)


def build(folder: Path, *flags: str, change: tuple[str, str, str] | None = None) -> Path:
    """Compile the extension in a folder; ``change`` is (file, old text, new text)."""
    write_sources(folder, change)
    library = folder / "_cpu.so"
    sources = map(str, folder.glob("*.c"))
    command = [*CC, *FLAGS, *flags, INCLUDE, *sources, "-lm", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def write_sources(folder: Path, change: tuple[str, str, str] | None = None) -> None:
    """Copy the C sources to a folder; ``change`` as in `build`."""
    for source in [*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]:
        text = source.read_text()
        if change and source.name == change[0]:
            assert change[1] in text, f"{source.name} has changed: mend this mutation"
            text = text.replace(change[1], change[2])
        (folder / source.name).write_text(text)


def copy_tree(folder: Path) -> None:
    """Copy what an install is made from."""
    built = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT / "src", folder / "src", ignore=built)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)


def install(folder: Path, **environment: str) -> list[Path]:
    """Build the kernel of a `copy_tree` beside its sources, as an editable install does."""
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
    )
    return [*folder.rglob("*.so")]


def load_instead(library: str) -> ModuleType:
    """Put a build in the place of gradclip's own kernel, before gradclip is imported."""
    name = "gradclip.kernels.cpu._cpu"
    loader = importlib.machinery.ExtensionFileLoader(name, library)
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
