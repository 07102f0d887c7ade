"""README and docs are true: Python snippets run, commands exist with their options, and files named are there."""

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


NEED_TORCHVISION = {"augmentation.md", "fine_tuning.md", "training.md"}
without_torchvision = pytest.mark.skipif(find_spec("torchvision") is None, reason="training needs torchvision")


def blocks(language: str) -> list:
    return [
        pytest.param(
            code, id=f"{page.name}-{number}", marks=[without_torchvision] if page.name in NEED_TORCHVISION else []
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
        pytest.importorskip("skimage")
        pytest.importorskip("sklearn")
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_and_classes_exist(page):
    text = page.read_text()
    for name in re.findall(r"`((?:proscale_hf|tests|examples|docs|convert)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    sources = "".join(path.read_text() for path in (ROOT / "proscale_hf").rglob("*.py"))
    for name in re.findall(r"`([A-Z]\w*[a-z]\w*)`", text):
        known = re.search(rf"\b{name}\b", sources)
        assert known or name in ("Trainer", "TrainingArguments", "Mask2FormerForUniversalSegmentation"), name


def test_the_readme_has_the_numbers_of_the_performance_page():
    """Each row of the README's table on speed: seconds and megabytes stand together on the page, too."""
    table = (ROOT / "README.md").read_text().partition("## How fast it is")[2].partition("## ")[0]
    numbers = re.findall(r"\| ([\d.]+ s) \| (\d+ MB) \|", table)
    rows = (ROOT / "docs" / "performance.md").read_text().splitlines()
    assert len(numbers) == 3
    for seconds, megabytes in numbers:
        assert any(f"| {seconds} |" in row and f"| {megabytes} |" in row for row in rows), seconds
