"""README and docs are true: Python snippets run, commands exist with their options, and all that is named exists."""

import ast
import itertools
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest

from paths import ROOT


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OPTION = re.compile(r"--[\w-]+")


NEED_TORCHVISION = re.compile(r"AutoImageProcessor|proscale_hf\.(data\.augmentation|training)")
without_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="the snippet needs torchvision")


def blocks(language: str) -> list:
    return [
        pytest.param(
            code, id=f"{page.name}-{number}", marks=[without_torchvision] if NEED_TORCHVISION.search(code) else []
        )
        for page in PAGES
        for number, (found, code) in enumerate(FENCE.findall(page.read_text()))
        if found == language
    ]


@pytest.mark.parametrize("code", blocks("python"))
def test_python_snippets_run(code, tmp_path, monkeypatch):
    for name in ("examples", "proscale_hf", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a snippet may change it
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("code", blocks("bash"))
def test_commands_exist_with_their_options(code):
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if not words:
            continue
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[0] == "git":
            assert words[1] == "clone"
        elif words[0] == "pip":
            extras = re.findall(r"\[([\w,]+)\]", line)
            assert all(
                f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for e in extras for extra in e.split(",")
            )
        else:
            check_options(words)


def check_options(words: list[str]) -> None:
    """The command's own help must know every option, and the files that it reads must be there."""
    if words[0] == "proscale":
        depth = 3 if words[1] == "figure" else 2  # each figure is a command of its own
        command, arguments = [sys.executable, "-m", "proscale_hf", *words[1:depth]], words[depth:]
    elif words[:2] == ["python", "-m"]:
        command, arguments = [sys.executable, "-m", words[2]], words[3:]
    else:
        assert words[0] == "python"
        command, arguments = [sys.executable, words[1]], words[2:]
        for library in ("skimage", "sklearn", "torchvision"):  # the examples' own
            pytest.importorskip(library)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, "--help"], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    known = set(OPTION.findall(result.stdout))
    assert {word.split("=")[0] for word in arguments if word.startswith("--")} <= known
    read = [
        word
        for option, word in itertools.pairwise(["", *arguments])
        if "/" in word
        and not word.startswith("--")
        and option not in ("--model", "--push-to-hub")  # names on the Hub
        and "=" not in word
        and not word.startswith("data/")  # what test_fine_tuning_page.py makes and reads
    ]
    assert all((ROOT / word).exists() for word in read)


each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
PATH = re.compile(r"(?:proscale_hf|tests|examples|docs|convert|kernels)(?:/[\w.-]+)+/?")
RECIPE = re.compile(r"\w+\.yaml")
DOTTED_NAME = re.compile(r"\b(?:proscale_hf|convert)(?:\.[A-Za-z_]\w*)+")
IMPORT = re.compile(r"^from (proscale_hf[\w.]*) import (\([^)]*\)|.*)$", re.MULTILINE)
OF_OTHERS = {"Trainer", "TrainingArguments", "Mask2FormerForUniversalSegmentation"}


@each_page
def test_named_files_exist(page):
    text = page.read_text()
    for name in re.findall(r"`([^`\n]+)`", text):
        if PATH.fullmatch(name):
            assert (ROOT / name).exists(), name
        if RECIPE.fullmatch(name):
            assert list((ROOT / "examples" / "configs").rglob(name)), name
    for name, path in re.findall(r"`(\w+)` in `(proscale_hf/[\w/]+\.py)`", text):
        assert re.search(rf"\b(class|def) {name}\b", (ROOT / path).read_text()), f"{name} in {path}"


@each_page
def test_named_classes_modules_and_functions_exist(page):
    text = page.read_text()
    sources = "".join(path.read_text() for path in (ROOT / "proscale_hf").rglob("*.py"))
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*)`", text):
        assert name in OF_OTHERS or re.search(rf"\b{name}\b", sources), name
    imported = [
        f"{module}.{name}" for module, names in IMPORT.findall(text) for name in re.findall(r"\w+", names.split("#")[0])
    ]
    for name in [*DOTTED_NAME.findall(text), *imported]:
        assert is_defined(name), name


def is_defined(name: str) -> bool:
    """Whether a dotted name leads to a module, or to something that a module defines. Nothing is imported."""
    path, names = ROOT, name.split(".")
    while names and (path / names[0]).is_dir():
        path /= names.pop(0)
    path /= f"{names.pop(0)}.py" if names and (path / f"{names[0]}.py").exists() else "__init__.py"
    scope = ast.parse(path.read_text()) if path.exists() else None
    for name in names:
        scope = scope and next((node for node in ast.walk(scope) if name in names_of(node)), None)
    return scope is not None


def names_of(node: ast.AST) -> set[str | None]:
    """What a definition, an import or an assignment calls its object."""
    is_assigned = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    return {getattr(node, "name", None), getattr(node, "asname", None), node.id if is_assigned else None}


@each_page
def test_links_lead_to_a_file_and_a_heading(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked.read_text()), f"{target}#{anchor}"


def anchors(page: str) -> set[str]:
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_has_the_numbers_of_the_performance_page():
    """Each row of the README's table on speed: seconds and megabytes stand together on the page, too."""
    table = (ROOT / "README.md").read_text().partition("## How fast it is")[2].partition("## ")[0]
    numbers = re.findall(r"\| ([\d.]+ s) \| (\d+ MB) \|", table)
    rows = (ROOT / "docs" / "performance.md").read_text().splitlines()
    assert len(numbers) == 3
    for seconds, megabytes in numbers:
        assert any(f"| {seconds} |" in row and f"| {megabytes} |" in row for row in rows), seconds
