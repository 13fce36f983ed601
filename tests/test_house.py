"""The rules of DESIGN.md that can be read off the source: imports, doctests, one version."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradclip
from conftest import ADAPTERS
from gradclip.core import dispatch

PACKAGE = Path(gradclip.__file__).parent
ROOT = Path(__file__).parent.parent

# Who may import what of ours. A name ending in "." stands for everything below it; the room of
# NumPy is the model of a framework's.
ARROWS = {
    "gradclip": {"_clip", "core.sparse:IndexedSlices"},
    "_clip": {"core.", "kernels.cpu:ieee_arithmetic", "torch.compiled"},
    "_loaded": set(),
    "core.": {"core.", "_loaded"},
    "kernels.": {"kernels.", "core.exact", "core.workers"},
    "numpy.": {"core.", "kernels.", "numpy."},
    "cupy.": {"core.", "kernels.", "cupy."},
    "jax.": {"core.", "kernels.", "jax."},
    "tensorflow.": {"_clip", "core.", "kernels.", "tensorflow.", "keras"},
    "torch.": {"_clip", "core.", "kernels.", "torch."},
    "optax": {"_clip", "core.", "jax."},
    "keras": {"_clip", "core."},
    "cli.": {
        "gradclip",
        "_clip",
        "core.",
        "kernels.cpu",
        "kernels.cpu._cpu",
        "optax",
        "tensorflow",
        "torch",
        "cli.",
    },
    "__main__": {"cli"},
}


def module_of(file: Path, package: Path) -> str:
    """The name of a file within the package: ``kernels.cpu``; ``gradclip`` for the top."""
    parts = file.relative_to(package).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "gradclip"


def is_module(name: str, package: Path) -> bool:
    place = package.joinpath(*name.split("."))
    return place.is_dir() or any(place.parent.glob(place.name + ".*"))


def imports_of(file: Path, package: Path) -> Iterator[str]:
    """What of the package a file imports, anywhere in it: ``module`` or ``module:name``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "gradclip":
                    yield alias.name.removeprefix("gradclip.")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            root, _, rest = (node.module or "").partition(".")
            if root != "gradclip":
                continue
            for alias in node.names:
                inner = f"{rest}.{alias.name}".lstrip(".")
                if is_module(inner, package):
                    yield inner
                else:
                    yield f"{rest}:{alias.name}" if rest else "gradclip"


def allowed(module: str) -> set[str]:
    group = module.partition(".")[0] + "."
    return ARROWS[group if group in ARROWS else module]


def is_allowed(imported: str, targets: set[str]) -> bool:
    module = imported.partition(":")[0]
    return bool({imported, module} & targets) or any(
        target.endswith(".") and f"{module}.".startswith(target) for target in targets
    )


def wrong_arrows(package: Path) -> list[str]:
    """Imports that the house does not have."""
    return [
        f"{module_of(file, package)} -> {imported}"
        for file in sorted(package.rglob("*.py"))
        for imported in imports_of(file, package)
        if not is_allowed(imported, allowed(module_of(file, package)))
    ]


def test_imports_follow_the_arrows_and_no_others() -> None:
    assert wrong_arrows(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "line", "arrow"),
    [
        ("kernels/layout.py", "from gradclip.core import tree", "kernels.layout -> core.tree"),
        ("kernels/layout.py", "import gradclip", "kernels.layout -> gradclip"),
        ("core/tree.py", "import gradclip.numpy", "core.tree -> numpy"),
        ("core/tree.py", "from gradclip import cli", "core.tree -> cli"),
        ("core/exact.py", "def f():\n    from gradclip import cli", "core.exact -> cli"),
        ("_clip.py", "from gradclip.kernels.cpu import take", "_clip -> kernels.cpu:take"),
        ("_clip.py", "from gradclip.numpy import backend", "_clip -> numpy.backend"),
        ("jax/xla.py", "from gradclip.numpy import backend", "jax.xla -> numpy.backend"),
        ("jax/xla.py", "from gradclip import _clip", "jax.xla -> _clip"),
    ],
)
def test_an_import_against_the_arrows_would_be_seen(
    file: str, line: str, arrow: str, tmp_path: Path
) -> None:
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path, ignore=built, dirs_exist_ok=True)
    with (tmp_path / file).open("a") as changed:
        changed.write(f"\n{line}\n")
    assert wrong_arrows(tmp_path) == [arrow]


def test_every_file_has_its_arrows() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert isinstance(allowed(module_of(file, PACKAGE)), set)


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(PACKAGE)], "gradclip.")
    names = [module.name for module in found if not module.name.endswith(("__main__", "._cpu"))]
    return ["gradclip", *names]


@pytest.mark.parametrize("name", modules())
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", ["clip_by_global_norm", "clip_by_global_norm_", "global_norm"])
def test_every_public_function_shows_the_triangle(name: str) -> None:
    function = getattr(gradclip, name)
    examples = [
        example
        for test in doctest.DocTestFinder().find(function, name)
        for example in test.examples
    ]
    assert any("5.0" in example.want for example in examples)
    for section in ("Args:", "Returns:", "Raises:"):
        assert section in function.__doc__


def test_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == gradclip.__version__
    assert f"{gradclip.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_backend_has_an_adapter() -> None:
    assert dispatch.backend_names() == sorted(ADAPTERS)


def test_a_backend_defines_what_the_protocol_asks_for() -> None:
    from gradclip.core.protocol import Backend

    wanted = {name for name in vars(Backend) if not name.startswith("_")}
    for name in dispatch.backend_names():
        assert wanted <= set(vars(dispatch.load(name)))
