"""Check what `build.py` has built: what each file says of itself, and what a library asks for."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import lief
from packaging.utils import parse_wheel_filename

# All that a library may want from others: the system's own, and Python's for good.
SYSTEMS = {
    "manylinux": ("ld-linux-", "libc.so.6", "libm.so.6", "libpthread.so.0"),
    "musllinux": ("libc.musl-",),
    "macosx": ("/usr/lib/libSystem.B.dylib",),
    "win": ("KERNEL32.dll", "api-ms-win-crt-", "python3.dll"),
}


class WrongError(Exception):
    """What is wrong with a file."""


class Library(NamedTuple):
    """What stands in the header of a library."""

    machine: str
    needed: list[str]
    exported: list[str]
    oldest: str = ""
    """The earliest system that it is for, where the file says so."""


def check(files: list[Path]) -> None:
    """Check each file and print what it is.

    Raises:
        SystemExit: one is not as it should be.
    """
    lief.logging.disable()  # it prints what is wrong with files; here that is an error
    print(f"\n| {'file':<81} | {'KB':>5} | passed")
    print(f"|{'-' * 83}|{'-' * 6}:|---")
    for file in files:
        try:
            passed = check_file(file)
        except WrongError as wrong:
            raise SystemExit(f"{file.name}: {wrong}") from None
        print(f"| {file.name:<81} | {round(file.stat().st_size / 1000):>5} | {passed}")


def check_file(file: Path) -> str:
    """What a file has passed."""
    say("twine", "check", "--strict", file)
    if file.suffix != ".whl":
        return "twine"
    tags = {str(tag) for tag in parse_wheel_filename(file.name)[3]}
    with zipfile.ZipFile(file) as wheel:
        (about,) = (name for name in wheel.namelist() if name.endswith(".dist-info/WHEEL"))
        lines = wheel.read(about).decode().splitlines()
        libraries = {
            name: wheel.read(name) for name in wheel.namelist() if name.endswith((".so", ".pyd"))
        }
    pure = tags == {"py3-none-any"}
    expect("its tags", {line[5:] for line in lines if line.startswith("Tag: ")}, tags)
    expect("that it is pure", f"Root-Is-Purelib: {pure}".lower() in map(str.lower, lines), True)
    if pure:
        expect("its libraries", [*libraries], [])
        return "twine"
    platforms = {tag.removeprefix("cp311-abi3-") for tag in tags}
    system = next(name for name in SYSTEMS if min(platforms).startswith(name))
    suffix = "pyd" if system == "win" else "abi3.so"
    expect("its libraries", [*libraries], [f"gradclip/kernels/cpu/_cpu.{suffix}"])
    (content,) = libraries.values()
    check_library(read_library(content), system, min(platforms))
    say("abi3audit", "--strict", file)
    if system in ("macosx", "win"):
        return "twine, abi3audit, imports"
    # Of other libraries than the wheel's own none is wanted, so none is looked for on this machine.
    show = ("auditwheel", "show", "--json", "--ldpaths", Path(__file__).parent)
    policy = json.loads(say(*show, file))["overall_tag"]
    expect("what auditwheel calls it is in its name", policy in platforms, True)
    return f"twine, abi3audit, imports, auditwheel: {policy}"


def check_library(library: Library, system: str, platform: str) -> None:
    """Hold a library to the platform that its wheel is for."""
    expect(f"its machine, {library.machine}, in its name", library.machine in platform, True)
    expect("what it exports", library.exported, ["PyInit__cpu"])
    others = [name for name in library.needed if not name.startswith(SYSTEMS[system])]
    expect("what it needs beside the system", others, [])
    if system == "macosx":
        expect("the earliest macOS", platform.startswith(f"macosx_{library.oldest}_"), True)


def read_library(content: bytes) -> Library:
    """Read the header of a library of any system."""
    binary = lief.parse(content)
    if isinstance(binary, lief.PE.Binary):
        return Library(
            binary.header.machine.name.lower(),
            [library.name for library in binary.imports],
            [entry.name for entry in binary.get_export().entries],
        )
    if isinstance(binary, lief.MachO.Binary):
        intel = binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.X86_64
        versions = (
            binary.build_version.minos if binary.has_build_version else binary.version_min.version
        )
        loads = lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
        return Library(
            "x86_64" if intel else "arm64",
            [library.name for library in binary.libraries if library.command == loads],
            [
                symbol.name[1:]
                for symbol in binary.exported_symbols
                if symbol.name.startswith("_Py")
            ],
            f"{versions[0]}_{versions[1]}",
        )
    return Library(
        binary.header.machine_type.name.lower(),
        [str(library) for library in binary.libraries],
        sorted({str(symbol.name) for symbol in binary.exported_symbols}),
    )


def expect(what: str, found: object, wanted: object) -> None:
    """Raise `WrongError` where they differ."""
    if found != wanted:
        raise WrongError(f"{what}: {found}; it must be {wanted}")


def say(*words: str | Path) -> str:
    """What a tool prints."""
    command = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WrongError(f"{words[0]} refuses it: {done.stdout}{done.stderr}")
    return done.stdout
