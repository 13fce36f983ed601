"""The code of all pages runs as it is written; `pages` says how it is read."""

from __future__ import annotations

import doctest
import html
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import FRAMEWORKS, version
from pages import ROOT, Section, sections

SECTIONS = sections()
NOT_RUN = {"text", "sh", ""}
# Of the pages whose code needs no framework, these are enough for `make test`.
QUICK = {"docs/start/numpy.md", "docs/commands/norm.md"}
# What is not there without an extra, by the names that scripts import.
_IMPORTED = re.compile(rf"^ *(?:import|from) (?:gradclip\.)?({'|'.join(FRAMEWORKS)})\b", re.M)

# What a comment says that something prints, behind it or below.
_PRINTED = re.compile(r"^ *print\(.*\)(?:  |\n)# (.+)$", re.M)


def frameworks(code: str) -> set[str]:
    return {*_IMPORTED.findall(code)} - {"numpy"}


def that_run() -> list[object]:
    """Sections with code, each of which takes a process."""
    quick = {ROOT / page for page in QUICK}
    return [
        pytest.param(
            section,
            id=section.name,
            marks=pytest.mark.slow if section.page in quick else pytest.mark.long,
        )
        for section in SECTIONS
        if section.scripts or section.commands
    ]


@pytest.mark.parametrize("section", that_run())
def test_the_code_under_a_heading_runs(section: Section, tmp_path: Path) -> None:
    for name in frameworks("\n".join(section.scripts)):
        if version(name) is None:
            pytest.skip(f"{name} is not installed")
    for number, script in enumerate(section.scripts):
        folder = tmp_path / str(number)
        folder.mkdir()
        ran = run([sys.executable, "-W", "error", "-c", script], folder)
        assert not ran.returncode, ran.stdout
        lines = iter(ran.stdout.split("\n"))
        for expected in _PRINTED.findall(script):
            assert any(is_shown(line, expected) for line in lines), f"{expected}\n{ran.stdout}"
    for command, expected in section.commands:
        ran = run(["bash", "-c", command], folder if section.scripts else tmp_path)
        assert is_shown(ran.stdout, expected), f"$ {command}\n{ran.stdout}"
        # Where the page shows nothing, an error would pass for what it leaves out.
        assert expected.strip(".") or not ran.returncode, f"$ {command}\n{ran.stdout}"


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    bin_of = Path(sys.executable).parent
    return subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        cwd=folder,
        env={**os.environ, "PATH": f"{bin_of}:{os.environ['PATH']}"},
    )


def is_shown(printed: str, expected: str) -> bool:
    printed, expected = (
        "\n".join(line.rstrip() for line in text.strip("\n").split("\n")) + "\n"
        for text in (printed, expected)
    )
    return doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)


@pytest.mark.parametrize(
    ("printed", "expected", "shown"),
    [
        ("a  b \nc\n\n", "a  b\nc", True),
        ("a b\n", "a  b", False),
        ("", "", True),
        ("Traceback\n", "", False),
        ("one\ntwo\nthree\n", "one\n...\nthree", True),
    ],
)
def test_what_a_command_prints(printed: str, expected: str, shown: bool) -> None:
    assert is_shown(printed, expected) == shown


def test_each_block_says_what_it_is() -> None:
    languages = {(section.name, language) for section in SECTIONS for language, _ in section.blocks}
    known = {"python", "console", "diff", *NOT_RUN}
    assert {each for each in languages if each[1] not in known and each[1][:1] != "{"} == set()


def test_what_is_not_run_installs_or_makes_something() -> None:
    lines = [
        line
        for section in SECTIONS
        for language, text in section.blocks
        if language in ("sh", "")
        for line in text.split("\n")
    ]
    assert lines
    assert [line for line in lines if not re.match("pip install |make |git clone |cd ", line)] == []


def test_scripts_are_python() -> None:
    for section in SECTIONS:
        for script in section.scripts:
            compile(script, section.name, "exec")


def test_a_diff_is_two_scripts() -> None:
    section = Section(ROOT, "", 1, [("python", "x = 1"), ("diff", " a = x\n-b = 2\n+b = 3\n ")])
    assert section.scripts == ["x = 1\na = x\nb = 2\n", "x = 1\na = x\nb = 3\n"]


def test_the_page_of_limits_has_a_block_for_every_door() -> None:
    page = "\n".join(
        script
        for section in SECTIONS
        if section.page.stem == "limits" and section.page.parent.name == "docs"
        for script in section.scripts
    )
    for door in ("torch import clip_grad_norm_", "torch.attach", "optax.", "keras.", "tensorflow"):
        assert f"gradclip.{door}" in page


@pytest.mark.long
@pytest.mark.parametrize("name", ["torch", "tensorflow", "keras", "optax"])
def test_every_name_of_a_door_is_in_the_reference(name: str) -> None:
    pytest.importorskip(name)
    names = set(importlib.import_module(f"gradclip.{name}").__all__)
    if name == "keras":
        names -= {*vars(importlib.import_module("keras.optimizers"))}
    assert missing(name, names) == set()


@pytest.mark.parametrize("name", ["", "limits", "record"])
def test_every_public_name_is_in_the_reference(name: str) -> None:
    module = importlib.import_module(f"gradclip.{name}".rstrip("."))
    elsewhere = {"limits", "Record"}  # pages of their own
    inner = {"Lent", "Options"}  # of callbacks and their types
    assert missing(name or "gradclip", {*module.__all__} - elsewhere - inner) == set()


def missing(page: str, names: set[str]) -> set[str]:
    text = (ROOT / "docs" / "api" / f"{page}.md").read_text()
    told = re.findall(r"^\.\. (?:auto\w+|py:function):: (?:[\w.]*\.)?(\w+)", text, re.MULTILINE)
    return names - {*told}


@pytest.mark.parametrize("name", ["architecture", "gpu", "workers"])
def test_a_figure_has_what_its_source_says(name: str) -> None:
    figure = ROOT / "docs" / "figures" / name
    texts = re.findall(r">([^<]+)</text>", figure.with_suffix(".svg").read_text())
    shown = {html.unescape(text).strip() for text in texts}
    for label in re.findall(r'label="(.*?)"', figure.with_suffix(".dot").read_text()):
        for line in label.split("\\n"):
            assert line.strip() in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="b.html#there">b</a><a href="#here" id="here">me</a><img src="c.png">', ""),
        ('<a href="https://example.org/x">elsewhere</a>', ""),
        ('<a href="none.html">b</a>', "a.html has a broken link: none.html"),
        ('<a href="b.html#none">b</a>', "a.html has a broken link: b.html#none"),
        ('<img src="none.png">', "a.html has a broken link: none.png"),
        ('<script src="https://example.org/x"></script>', "a.html fetches https://example.org/x"),
        ('<link rel="stylesheet" href="//example.org/x">', "a.html fetches //example.org/x"),
    ],
)
def test_what_is_wrong_with_a_site(body: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(body)
    (tmp_path / "b.html").write_text('<h2 id="there">b</h2>')
    (tmp_path / "c.png").touch()
    ran = run([sys.executable, str(ROOT / "docs" / "check.py"), str(tmp_path)], tmp_path)
    wrong = [line for line in ran.stdout.split("\n") if line.startswith("a.html")]
    assert (wrong, ran.returncode) == ([said] if said else [], int(bool(said)))
