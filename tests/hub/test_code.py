"""The bundler: flat names, nothing but what is imported, the same bytes again, and refusals that name the import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import proscale_hf
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerImageProcessor,
    ProScaleMask2FormerImageProcessorPil,
    ProScaleMask2FormerPreTrainedModel,
)
from proscale_hf.hub import code
from proscale_hf.hub.code import CodeError, flat_code, flat_name, nearest_of_ours, reference, write_code


PACKAGE = Path(proscale_hf.__file__).parent
MODEL = (ProScaleMask2FormerPreTrainedModel,)
PROCESSORS = (ProScaleMask2FormerImageProcessorPil, ProScaleMask2FormerImageProcessor)
ALL = (*MODEL, *PROCESSORS)
ALWAYS_INSTALLED = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "scipy"}

WRITE_AGAIN = """
import importlib, sys
sys.modules["proscale_hf"] = None  # importing it is an error from here on
name, copy, *references = sys.argv[1:]
classes = []
for reference in references:
    module, class_name = reference.split(".")
    classes.append(getattr(importlib.import_module(f"{name}.{module}"), class_name))
importlib.import_module(f"{name}.hub_code").write_code(copy, *classes)
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """An empty package of the name that the bundler looks for; a function that adds a module with some text."""
    monkeypatch.setattr(code, "__file__", str(tmp_path / "hub" / "code.py"))
    return tmp_path


def add(package: Path, module: str, text: str) -> type:
    """Put a module into a package; returns a class that says to be from there."""
    path = package.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return type("Some", (), {"__module__": f"proscale_hf.{module}"})


def imports_of_ours(path: Path) -> set[str]:
    """The files of the package that a file of the package needs; it does without those that it tries to import."""
    tree = ast.parse(path.read_text())
    tried = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node not in tried}
    return {name for name in modules if name.startswith("proscale_hf.")}


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("proscale_hf.layers.linear", "layers_linear"),
        ("proscale_hf.models.mask2former.pixel_decoder", "models_mask2former_pixel_decoder"),
        ("proscale_hf.models.mask2former.modeling_proscale_mask2former", "modeling_proscale_mask2former"),
        ("proscale_hf.models.mask2former.configuration_proscale_mask2former", "configuration_proscale_mask2former"),
        ("proscale_hf.models.configuration", "models_configuration"),
        ("transformers_modules.me.model.layers_linear", "layers_linear"),
    ],
)
def test_flat_names(module, name):
    assert flat_name(module) == name


@pytest.mark.parametrize("classes", [(ProScaleMask2FormerConfig,), PROCESSORS, MODEL, ALL])
def test_what_is_imported_is_there_and_nothing_else(classes):
    expected, pending = set(), {defined.__module__ for defined in classes}
    while pending:
        module = pending.pop()
        expected.add(module)
        path = PACKAGE.joinpath(*module.split(".")[1:]).with_suffix(".py")
        pending |= imports_of_ours(path) - expected
    assert set(flat_code(*classes)) == {f"{flat_name(module)}.py" for module in expected}


def test_image_processors_and_configurations_leave_without_models():
    for classes in (PROCESSORS, (ProScaleMask2FormerConfig,)):
        parts = ("layers_", "encoders_", "backbones_", "losses_", "modeling_")
        settings = {"encoders_configuration.py", "backbones_presets.py"}
        assert not [name for name in flat_code(*classes) if name.startswith(parts) and name not in settings]


def test_what_only_the_package_does_stays_at_home():
    """Model cards, costs, presets and short names: nobody needs them to load, run, train or save a model."""
    stays = {"hub_card_file", "hub_model_card", "hub_names", "models_counting"}
    stays |= {"models_mask2former_cost", "models_mask2former_presets"}
    assert not stays & {name.removesuffix(".py") for name in flat_code(*ALL)}


def test_only_the_imports_are_changed():
    for name, text in flat_code(*ALL).items():
        original = next(path for path in PACKAGE.rglob("*.py") if f"{flat_name(module_of(path))}.py" == name)
        for line, before in zip(text.splitlines(), original.read_text().splitlines(), strict=True):
            assert line == before or (line.startswith("from .") and before.startswith("from proscale_hf."))


def module_of(path: Path) -> str:
    return ".".join(("proscale_hf", *path.relative_to(PACKAGE).with_suffix("").parts))


def test_transformers_sees_every_import(tmp_path):
    write_code(tmp_path, *ALL)
    files = {path.name: path for path in tmp_path.iterdir()}
    for path in files.values():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        seen = set(get_relative_imports(path))
        assert seen == {node.module for node in nodes if node.level}
        assert {f"{name}.py" for name in seen} <= files.keys()
        assert set(get_imports(path)) - ALWAYS_INSTALLED - sys.stdlib_module_names == set()


def test_flat_code_writes_itself_again(tmp_path):
    folder, copy = tmp_path / "flat", tmp_path / "copy"
    folder.mkdir(), copy.mkdir()
    write_code(folder, *ALL)
    command = [sys.executable, "-c", WRITE_AGAIN, "flat", str(copy), *map(reference, ALL)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    written = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert written == {path.name: path.read_bytes() for path in copy.iterdir()}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("from proscale_hf.layers import linear", "`from proscale_hf.layers import` is from no file"),
        ("from proscale_hf import layers", "`from proscale_hf import` is from no file"),
        ("import proscale_hf", "`import proscale_hf` cannot be laid flat"),
        ("import proscale_hf.layers.linear as linear", "`import proscale_hf.layers.linear` cannot be laid flat"),
        ("from .linear import Linear", "`from .linear import` is relative"),
        ("from . import linear", "`from . import` is relative"),
        ("from ..layers.linear import Linear", "`from ..layers.linear import` is relative"),
        ("import importlib; importlib.import_module('x')", "`import_module` hides"),
        ("from importlib import import_module; import_module('x')", "`import_module` hides"),
        ("__import__('x')", "`__import__` hides"),
        ("x = 1; from proscale_hf.layers.linear import Linear", "write `from MODULE import` on one line"),
        ("from \\\n    proscale_hf.layers.linear import Linear", "write `from MODULE import` on one line"),
    ],
)
@pytest.mark.parametrize("place", ["{}", "def use():\n    {}"], ids=["at the top", "in a function"])
def test_what_cannot_be_laid_flat_is_refused_by_name(package, line, reason, place):
    add(package, "layers.linear", "class Linear: ...\n")
    some = add(package, "models.some", f'"""Text."""\n\n{place.format(line)}\n')
    with pytest.raises(CodeError) as error:
        flat_code(some)
    number = 4 if place.startswith("def") else 3
    assert str(error.value).startswith(f"proscale_hf.models.some, line {number}: {reason}")
    assert "\n" not in str(error.value)


def test_names_that_clash_are_refused(package):
    add(package, "layers.linear", "")
    add(package, "layers_linear", "")
    some = add(package, "some", "from proscale_hf.layers.linear import A\nfrom proscale_hf.layers_linear import B\n")
    both = r"proscale_hf\.layers.linear and proscale_hf\.layers.linear "
    with pytest.raises(CodeError, match=both + r"would both be written as layers_linear\.py"):
        flat_code(some)


def test_a_missing_file_is_named(package):
    with pytest.raises(CodeError, match=r"models\.some, line 1: `from proscale_hf\.layers\.nothing import`"):
        flat_code(add(package, "models.some", "from proscale_hf.layers.nothing import A\n"))


def test_other_people_s_modules_are_left_alone(package):
    text = "import proscale_hf_extras\nfrom proscale_hf_extras.tools import x\nfrom torch import nn\n"
    assert flat_code(add(package, "some", text)) == {"some.py": text}


def test_classes_that_users_derive_leave_with_ours():
    class Mine(ProScaleMask2FormerForUniversalSegmentation):
        pass

    assert nearest_of_ours(Mine) is ProScaleMask2FormerForUniversalSegmentation
    assert nearest_of_ours(ProScaleMask2FormerConfig) is ProScaleMask2FormerConfig
