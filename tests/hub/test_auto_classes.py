"""Auto classes and pipelines find this package's classes, whatever is imported first."""

import subprocess
import sys

import pytest


def run(code: str) -> list[str]:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.split()


@pytest.mark.parametrize("first", ["import proscale_hf", "from transformers import AutoImageProcessor"])
def test_image_processors_are_registered_in_any_order(first, tmp_path):
    pytest.importorskip("torchvision", reason="AutoImageProcessor of transformers 5.17 needs it")
    code = f"""
{first}
import proscale_hf
from transformers import AutoImageProcessor, AutoConfig
proscale_hf.ProScaleMask2FormerImageProcessorPil(label_ids_to_fuse=[2]).save_pretrained({str(tmp_path)!r})
processor = AutoImageProcessor.from_pretrained({str(tmp_path)!r}, backend="pil")
print(type(processor).__name__, processor.label_ids_to_fuse)
"""
    assert run(code) == ["ProScaleMask2FormerImageProcessorPil", "[2]"]


def test_torchvision_backend_is_the_default(tmp_path):
    pytest.importorskip("torchvision")
    code = f"""
import proscale_hf
from transformers import AutoImageProcessor
proscale_hf.ProScaleMask2FormerImageProcessorPil().save_pretrained({str(tmp_path)!r})
print(type(AutoImageProcessor.from_pretrained({str(tmp_path)!r})).__name__)
"""
    assert run(code) == ["ProScaleMask2FormerImageProcessor"]


def test_models_can_be_imported_directly():
    module = "proscale_hf.models.mask2former.modeling_proscale_mask2former"
    code = f"from {module} import ProScaleMask2FormerModel as M; print(M.__name__)"
    assert run(code) == ["ProScaleMask2FormerModel"]


def test_unknown_names_are_no_attributes():
    assert run(
        "import proscale_hf; print(hasattr(proscale_hf, 'NoSuchName'), 'ProScaleMask2FormerModel' in dir(proscale_hf))"
    ) == [
        "False",
        "True",
    ]


def test_the_package_alone_imports_neither_torch_nor_transformers():
    assert run("import proscale_hf, sys; print({'torch', 'transformers'} & set(sys.modules))") == ["set()"]


@pytest.mark.parametrize(
    "first",
    [
        "",
        "from transformers import AutoConfig",
        "import transformers.models.auto.modeling_auto",
        "import proscale_hf.models.mask2former.configuration_proscale_mask2former",
        "from proscale_hf import ProScaleMask2FormerForUniversalSegmentation",
    ],
)
def test_configurations_and_models_are_registered_in_any_order(first):
    code = f"""
{first}
import proscale_hf
from transformers import AutoConfig, AutoModelForUniversalSegmentation
config = AutoConfig.for_model("proscale_mask2former")
print(type(config).__name__, AutoModelForUniversalSegmentation._model_mapping[type(config)].__name__)
"""
    assert run(code) == ["ProScaleMask2FormerConfig", "ProScaleMask2FormerForUniversalSegmentation"]
