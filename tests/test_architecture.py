"""The rules of the house, over the imports of every module: see docs/architecture.md."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from paths import ROOT


PACKAGE = "proscale_hf"
FLOORS = (  # from the ground up; rooms on one floor do not know each other
    {"version", "files"},
    {"endings"},
    {"layers"},
    {"backbones", "encoders", "losses", "processing"},
    {"hub"},
    {"models"},  # what the families share
    {"models.mask2former"},
    {"models.dino"},
    {"cost", "visualization"},
    {"data"},
    {"benchmarking", "convert", "evaluation", "paper"},
    {"training"},
    {"cli"},
    {"__init__", "__main__"},
)


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package in a folder, by its whole name."""
    paths = sorted((root / PACKAGE).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """What a file imports, wherever it does so: module and name; without a name for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (("." * node.level + (node.module or ""), alias.name) for alias in node.names)


def graph_of(root: Path) -> dict[str, set[str]]:
    """For each module of the package those that it imports."""
    modules = modules_of(root)
    graph = {}
    for module, path in modules.items():
        imported = {
            f"{source}.{name}" if f"{source}.{name}" in modules else source for source, name in imports_of(path)
        }
        graph[module] = {source for source in imported if source in modules} - {module}
    return graph


def place_of(module: str) -> tuple[str, int]:
    """The room that a module is in, the longest of those that its name begins with, and the room's floor."""
    name = module.removeprefix(PACKAGE).removeprefix(".") or "__init__"
    floors = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    rooms = [room for room in floors if f"{name}.".startswith(f"{room}.")]
    assert rooms, f"{module} is in no room: give its folder a floor here, and a line in docs/architecture.md"
    room = max(rooms, key=len)
    return room, floors[room]


def complaints(root: Path) -> list[str]:
    """A line for each import that breaks a rule."""
    lines = []
    graph = graph_of(root)
    for module, imported in graph.items():
        room, floor = place_of(module)
        for other in sorted(imported):
            other_room, other_floor = place_of(other)
            if other_room != room and other_floor >= floor:
                lines.append(f"{module} imports {other}, which is not on a floor below")
    for module, path in modules_of(root).items():
        lines += [f"{module} imports {source} by a relative name" for source, _ in imports_of(path) if source[0] == "."]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        lines.append(f"a circle: {' -> '.join(error.args[1])}")
    return lines


def test_the_rules_are_kept():
    assert complaints(ROOT) == []


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"layers/linear": "from proscale_hf.models.base import X"}, "not on a floor below"),
        ({"layers/linear": "def f():\n    from proscale_hf.hub.names import X"}, "not on a floor below"),
        ({"losses/masks": "from proscale_hf.models.mask2former.configuration_x import X"}, "not on a floor below"),
        ({"losses/masks": "from proscale_hf.encoders.choice import X"}, "not on a floor below"),
        ({"models/base": "from proscale_hf.models.mask2former.modeling_x import X"}, "not on a floor below"),
        ({"hub/code": "import proscale_hf.models.base"}, "not on a floor below"),
        ({"layers/linear": "from .kernels import X"}, "relative"),
        (
            {
                "layers/linear": "from proscale_hf.layers.kernels import X",
                "layers/kernels": "from proscale_hf.layers.linear import X",
            },
            "circle",
        ),
    ],
)
def test_a_broken_rule_is_noticed(files, complaint, tmp_path):
    known = ["models/base", "models/mask2former/configuration_x", "models/mask2former/modeling_x", "hub/names"]
    for name in [*known, "encoders/choice", "layers/kernels", "layers/linear", *files]:
        path = tmp_path / PACKAGE / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files.get(name, ""))
    lines = complaints(tmp_path)
    assert len(lines) == 1 and complaint in lines[0]


def test_the_page_shows_every_folder_and_no_other():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = re.search(r"```text\nproscale_hf/\n(.*?)```", page, flags=re.DOTALL)[1]
    shown, parents = set(), []
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        parents = [*parents[: len(indent) // 2 - 1], name.rstrip("/")]
        if name.endswith("/"):
            shown.add("/".join(parents))
    folders = {
        str(path.parent.relative_to(ROOT / PACKAGE))
        for path in (ROOT / PACKAGE).rglob("__init__.py")
        if path.parent != ROOT / PACKAGE
    }
    assert shown == folders
