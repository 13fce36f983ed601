"""The rules of DESIGN.md that can be read off the source: imports, doctests, one version."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import gradclip
from conftest import ADAPTERS
from gradclip.core import dispatch, rooms

PACKAGE = Path(gradclip.__file__).parent
ROOT = Path(__file__).parent.parent

# Who may import what of ours. A name ending in "." stands for everything below it; the room of
# NumPy is the model of a framework's.
ARROWS = {
    "gradclip": {
        "_clip",
        "limits",
        "core.interpreters",
        "core.norms:Norms",
        "core.sparse:IndexedSlices",
        "record:Record",
    },
    "_clip": {"_compiler", "_types", "core.", "kernels.cpu.arithmetic", "kernels.cpu:kinds"},
    "_compiler": set(),
    "_types": {"core.limits"},
    "limits": {"core.limits"},
    "core.": {"core."},
    "record.": {"_types", "core.", "record."},
    "lightning": {"record", "torch", "torch.observing"},
    "transformers": {"record", "torch.observing"},
    "kernels.": {"kernels.", "core.exact", "core.held", "core.workers"},
    "kernels.gpu.leaves": {"kernels.", "core.exact", "core.held", "core.memory", "core.workers"},
    "kernels.gpu.runs": {"kernels.", "core.exact", "core.memory"},
    "kernels.gpu.learning": {"kernels.", "core.limits", "core.memory"},
    "numpy.": {"core.", "kernels.", "numpy."},
    "cupy.": {"core.", "kernels.", "cupy."},
    "jax.": {"core.", "kernels.", "jax."},
    "tensorflow.": {"core.", "kernels.", "tensorflow."},
    "torch.": {"core.", "kernels.", "torch."},
    # Doors, and what PyTorch calls back, stand on the flow too.
    "tensorflow": {"_clip", "_types", "core.", "tensorflow.", "keras.patch"},
    "torch": {"_clip", "core.", "torch."},
    "torch.compiled": {"_clip", "core.", "torch."},
    "torch.library": {"_clip", "core.", "torch."},
    "torch.observing": {"core.", "torch", "torch."},
    "torch.norms": {"_clip", "core.", "kernels.cpu.arithmetic", "torch."},
    "optax.": {"_clip", "core.", "jax.", "optax."},
    "keras.": {"_clip", "core.", "keras."},
    "keras.callback": {"core.", "keras.", "record"},
    "cli.": {
        "gradclip",
        "_clip",
        "core.",
        "kernels.cpu",
        "kernels.cpu.threads",
        "kernels.cpu._cpu",
        "limits",
        "optax",
        "record",
        "record.",
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
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            # A name that is put together is no arrow: the core finds rooms by theirs.
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str) and name.partition(".")[0] == "gradclip":
                yield name.removeprefix("gradclip.")
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
    return ARROWS[module if module in ARROWS else group]


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
        ("jax/xla.py", 'importlib.import_module("gradclip.numpy")', "jax.xla -> numpy"),
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


def test_no_files_import_each_other_in_a_circle() -> None:
    assert circles(PACKAGE) == []


def test_a_circle_would_be_seen(tmp_path: Path) -> None:
    built = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path, ignore=built, dirs_exist_ok=True)
    with (tmp_path / "torch/tensors.py").open("a") as changed:
        changed.write("\ndef f():\n    from gradclip.torch.overlap import distinct\n")
    assert circles(tmp_path) == ["torch.overlap", "torch.tensors"]


def circles(package: Path) -> list[str]:
    """The files that import each other, however far around."""
    files = {module_of(file, package): file for file in package.rglob("*.py")}
    imports = {
        module: {name.partition(":")[0] for name in imports_of(file, package)} & files.keys()
        for module, file in files.items()
    }
    while True:  # what imports nothing that is left, and what nothing that is left imports
        imported = set().union(*imports.values())
        ends = {module for module, of in imports.items() if not of or module not in imported}
        if not ends:
            return sorted(imports)
        imports = {module: of - ends for module, of in imports.items() if module not in ends}


def test_every_file_has_its_arrows() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert isinstance(allowed(module_of(file, PACKAGE)), set)


# ---- no framework in what all of them use ----

FRAMEWORK = re.compile(r"\w*(?:torch|tensorflow|jax|keras|optax|cupy|aoti)\w*", re.IGNORECASE)
# A comment, or what looks like one in a string.
C_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|/\*.*?\*/|//[^\n]*', re.DOTALL)


def said(file: Path) -> str:
    """A file without its comments and docstrings."""
    if file.suffix in (".c", ".h"):
        return C_COMMENT.sub(lambda found: found[1] or " ", file.read_text())
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        for field, statements in ast.iter_fields(node):
            if field in ("body", "orelse", "finalbody") and isinstance(statements, list):
                statements[:] = [each for each in statements if not is_text(each)] or [ast.Pass()]
    return ast.unparse(tree)


def is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def frameworks_named(package: Path) -> list[str]:
    """Each word of a framework that the core or a kernel says."""
    files = [file for folder in ("core", "kernels") for file in (package / folder).rglob("*")]
    sources = sorted(file for file in files if file.suffix in (".py", ".pyi", ".c", ".h"))
    words = {(file, word) for file in sources for word in FRAMEWORK.findall(said(file))}
    return sorted(f"{file.relative_to(package)}: {word}" for file, word in words)


def test_the_core_and_the_kernels_name_no_framework() -> None:
    assert frameworks_named(PACKAGE) == []


@pytest.mark.parametrize(
    ("file", "code", "words"),
    [
        ("core/a.py", '"""Of jax."""\n# torch\ndef f():\n    """Keras."""', []),
        ("core/a.py", "class A:\n    b: int\n    'As in optax.'\nif A:\n    ...", []),
        ("core/a.py", 'x = "torch.nn"', ["torch"]),
        ("core/a.py", "def f():\n    return f'in {f} of JAX'", ["JAX"]),
        ("core/a.py", "import cupyx", ["cupyx"]),
        ("core/inner/a.py", "use_torch(1)", ["use_torch"]),
        ("kernels/a.pyi", "def f(): ...\nTensorFlowCall: int", ["TensorFlowCall"]),
        ("kernels/a.c", "/* PyTorch's\n own */ int a; // keras\n", []),
        ("kernels/a.c", 'char *x = "/* PyTorch */";', ["PyTorch"]),
        ("kernels/a.h", "int aoti_torch_get(void); /* no */", ["aoti_torch_get"]),
        ("cli/a.py", "import torch", []),
    ],
)
def test_a_framework_that_is_named_would_be_seen(
    file: str, code: str, words: list[str], tmp_path: Path
) -> None:
    place = tmp_path / file
    place.parent.mkdir(parents=True)
    place.write_text(code)
    assert frameworks_named(tmp_path) == [f"{file}: {word}" for word in words]


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
    assert rooms.backend_names() == sorted(ADAPTERS)


def test_a_backend_defines_what_the_protocol_asks_for() -> None:
    from gradclip.core.protocol import Backend

    wanted = {name for name in vars(Backend) if not name.startswith("_")}
    for name in rooms.backend_names():
        assert wanted <= set(vars(dispatch.load(name)))
