"""The code that leaves with a model: what the package has in folders, laid flat as transformers' remote code must be.

`trust_remote_code=True` reads Python files that lie beside the weights in one folder and import each other as
`from .name import ...`. This file makes them of the package's modules: of those that define the saved classes, and of
all that these import. Each is named by its path, joined with "_": `layers/linear.py` becomes `layers_linear.py`. Files
that transformers expects by name keep it: `configuration_...`, `modeling_...`, `image_processing_...`. Nothing but the
imports is changed. Code that was loaded from such a folder is flat already, and is written again byte for byte.

An import in a `try` that goes on after an `ImportError` stays as it is: the file that it names does not leave with the
model, and is there only if the package is installed.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path


PREFIX = "proscale_hf."
NAMED_BY_CONVENTION = ("configuration_", "modeling_", "image_processing_")
HIDDEN_IMPORTS = ("import_module", "__import__")


class CodeError(ValueError):
    """A module cannot be laid flat; the text is one line that names it and says why."""


def write_code(folder: str | os.PathLike, *classes: type) -> None:
    """
    Write the code of some classes into a folder.

    Args:
        folder: there already; files of the same names are replaced.
        classes: of this package, or loaded from a folder that this function wrote.

    Raises:
        CodeError: something that the classes need cannot be laid flat.
    """
    for name, source in flat_code(*classes).items():
        Path(folder, name).write_text(source, encoding="utf-8", newline="\n")


def reference(defined: type) -> str:
    """What `auto_map` calls a class: the name of its flat module, and its own."""
    return f"{flat_name(defined.__module__)}.{defined.__name__}"


def nearest_of_ours(defined: type) -> type:
    """The class itself if its code is ours, or else the nearest class of ours that it derives from.

    Users derive classes from ours, and so does FSDP while it trains; what is saved loads with ours.
    """
    here = __name__.rpartition(".")[0]  # of a flat folder
    return next(
        base
        for base in defined.__mro__
        if base.__module__.startswith(PREFIX) or base.__module__.rpartition(".")[0] == here
    )


def flat_code(*classes: type) -> dict[str, str]:
    """
    The flat files of some classes, and of what they import.

    Returns:
        The text of each by its name, in alphabetical order.

    Raises:
        CodeError: see [`write_code`].
    """
    files, origins = {}, {}
    pending = [defined.__module__ for defined in classes]
    while pending:
        module = pending.pop()
        name = f"{flat_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise CodeError(f"{module} and {origins[name]} would both be written as {name}; rename one of them.")
        if name not in files:
            files[name], imported = flattened(module)
            pending += imported
    return dict(sorted(files.items()))


def flat_name(module: str) -> str:
    """The name of a module when it is laid flat; one that is flat keeps its name."""
    last = module.rpartition(".")[2]
    if not module.startswith(PREFIX) or last.startswith(NAMED_BY_CONVENTION):
        return last
    return module.removeprefix(PREFIX).replace(".", "_")


def flattened(module: str) -> tuple[str, list[str]]:
    """
    Args:
        module: that is imported, or lies beside one that is.

    Returns:
        Its text with flat imports, and the modules of ours that it imports.
    """
    source = source_file(module).read_text(encoding="utf-8")
    lines = source.split("\n")
    tree = ast.parse(source)
    imported, stay = [], set(imports_that_stay(tree))
    for node in ast.walk(tree):
        if node not in stay and (other := imported_module(node, module)) is not None:
            imported.append(other)
            index = node.lineno - 1
            written = re.compile(rf"(\s*)from\s+{re.escape('.' * node.level + node.module)}\s+import\b")
            lines[index], found = written.subn(rf"\1from .{flat_name(other)} import", lines[index], count=1)
            if not found or node.col_offset != len(lines[index]) - len(lines[index].lstrip()):
                raise CodeError(f"{module}, line {node.lineno}: write `from MODULE import` on one line of its own.")
    return "\n".join(lines), imported


def imports_that_stay(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """The imports that may fail, since an `ImportError` is caught around them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(
            isinstance(handler.type, ast.Name) and handler.type.id == "ImportError" for handler in node.handlers
        ):
            yield from (statement for statement in node.body if isinstance(statement, ast.ImportFrom))


def imported_module(node: ast.AST, module: str) -> str | None:
    """The module of ours that a statement of a module imports from; None if it is no import, or of somebody else's.

    Raises:
        CodeError: the import cannot be laid flat.
    """
    place = f"{module}, line {getattr(node, 'lineno', 0)}: "
    if isinstance(node, ast.Import):
        ours = [alias.name for alias in node.names if f"{alias.name}.".startswith(PREFIX)]
        if ours:
            raise CodeError(f"{place}`import {ours[0]}` cannot be laid flat; write `from MODULE import NAME`.")
    if isinstance(node, ast.Call) and (hidden := set(names_called(node)) & set(HIDDEN_IMPORTS)):
        raise CodeError(f"{place}`{hidden.pop()}` hides what it imports; write `from MODULE import NAME`.")
    if not isinstance(node, ast.ImportFrom):
        return None
    written = "." * node.level + (node.module or "")
    if node.level:
        if module.startswith(PREFIX):
            raise CodeError(f"{place}`from {written} import` is relative; write the module's whole name.")
        if node.level > 1 or not node.module or "." in node.module:
            raise CodeError(f"{place}`from {written} import` leaves the folder; only `from .NAME import` is flat.")
        return f"{module.rpartition('.')[0]}.{node.module}"
    if not f"{written}.".startswith(PREFIX):
        return None
    if not module.startswith(PREFIX) or not source_file(written).is_file():
        raise CodeError(f"{place}`from {written} import` is from no file of the package; name the module itself.")
    return written


def names_called(node: ast.Call) -> Iterator[str]:
    """`f` of `f()` and of `module.f()`."""
    if isinstance(node.func, ast.Name):
        yield node.func.id
    elif isinstance(node.func, ast.Attribute):
        yield node.func.attr


def source_file(module: str) -> Path:
    """Where a module of ours lies: in the package, or beside this file when that was laid flat."""
    if module.startswith(PREFIX):
        return Path(__file__).parents[1].joinpath(*module.removeprefix(PREFIX).split(".")).with_suffix(".py")
    return Path(__file__).with_name(f"{module.rpartition('.')[2]}.py")
