"""Other builds of the C kernel: of changed sources, or with other flags."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parent.parent / "src/gradclip/kernels"
CC = sysconfig.get_config_var("CC").split()
FLAGS = (
    *("-shared", "-fPIC", "-std=c11", "-O1", "-g", "-fopenmp-simd", "-w"),
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    "-DPy_LIMITED_API=0x030B0000",
)


def build(folder: Path, *flags: str, change: tuple[str, str, str] | None = None) -> Path:
    """Compile the extension in a folder; ``change`` is (file, old text, new text)."""
    for source in [*SOURCES.glob("*.c"), *SOURCES.glob("*.h")]:
        text = source.read_text()
        if change and source.name == change[0]:
            assert change[1] in text, f"{source.name} has changed: mend this mutation"
            text = text.replace(change[1], change[2])
        (folder / source.name).write_text(text)
    library = folder / "_cpu.so"
    include = f"-I{sysconfig.get_path('include')}"
    sources = map(str, folder.glob("*.c"))
    command = [*CC, *FLAGS, *flags, include, *sources, "-lm", "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True)
    return library


def load_instead(library: str) -> ModuleType:
    """Put a build in the place of gradclip's own kernel, before gradclip is imported."""
    name = "gradclip.kernels._cpu"
    loader = importlib.machinery.ExtensionFileLoader(name, library)
    spec = importlib.util.spec_from_file_location(name, library, loader=loader)
    assert spec is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
