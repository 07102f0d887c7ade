"""Auto classes and pipelines find this package's classes, whatever is imported first."""

import subprocess
import sys

import pytest
from transformers.image_processing_backends import PilBackend, TorchvisionBackend

from proscale_hf.hub.families import FAMILIES


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


def test_mappings_hold_the_classes_themselves():
    """Trainer, pipelines and users ask `issubclass`, look at signatures, and derive classes of their own."""
    code = """
import inspect, pickle
import proscale_hf
from transformers import AutoModel, PreTrainedModel
config_class = proscale_hf.ProScaleMask2FormerConfig
for auto_class, name in config_class.auto_classes.items():
    mapping = getattr(__import__("transformers"), auto_class)._model_mapping
    real = getattr(proscale_hf, name)
    assert dict(mapping._extra_content)[config_class] is real
    assert mapping[config_class] is real and mapping.get(config_class, None) is real and config_class in mapping
    assert real in mapping._extra_content.values()
    assert pickle.loads(pickle.dumps(mapping))[config_class] is real
    assert issubclass(mapping[config_class], PreTrainedModel)
    assert list(inspect.signature(mapping[config_class].__init__).parameters) == ["self", "config"]
Mine = type("Mine", (AutoModel._model_mapping[config_class],), {})
AutoModel.register(config_class, Mine, exist_ok=True)
assert AutoModel._model_mapping[config_class] is Mine
print(len(config_class.auto_classes))
"""
    assert run(code) == ["4"]


def test_no_model_is_loaded_before_it_is_asked_for():
    code = """
import proscale_hf, sys
from transformers import AutoModel, AutoConfig
config = AutoConfig.for_model("proscale_mask2former")
assert type(config) in AutoModel._model_mapping
modeling = "proscale_hf.models.mask2former.modeling_proscale_mask2former"
print(modeling in sys.modules, end=" ")
AutoModel._model_mapping[type(config)]
print(modeling in sys.modules)
"""
    assert run(code) == ["False", "True"]


@pytest.mark.parametrize("first", ["", "from transformers import AutoModel; AutoModel"])
def test_registration_survives_a_reload(first):
    code = f"""
import importlib, sys
import proscale_hf
{first}
importlib.reload(proscale_hf)
importlib.reload(proscale_hf)
finders = [finder.name for finder in sys.meta_path if type(finder).__name__ == "AfterImport"]
assert len(finders) == len(set(finders)), finders
from transformers import AutoConfig, AutoModelForUniversalSegmentation
config = AutoConfig.for_model("proscale_mask2former")
model_class = AutoModelForUniversalSegmentation._model_mapping[type(config)]
assert model_class is proscale_hf.ProScaleMask2FormerForUniversalSegmentation
print(model_class.__name__)
"""
    assert run(code) == ["ProScaleMask2FormerForUniversalSegmentation"]


@pytest.mark.parametrize("first", ["", "import transformers.models.auto.modeling_auto"])
def test_registration_survives_a_reload_of_transformers_modules(first):
    code = f"""
import importlib
{first}
import proscale_hf
from transformers.models.auto import configuration_auto, modeling_auto
for module in (modeling_auto, configuration_auto, modeling_auto, modeling_auto):
    importlib.reload(module)
    config = configuration_auto.AutoConfig.for_model("proscale_mask2former")
    model_class = modeling_auto.AutoModelForUniversalSegmentation._model_mapping[type(config)]
    assert model_class is proscale_hf.ProScaleMask2FormerForUniversalSegmentation
print(model_class.__name__)
"""
    assert run(code) == ["ProScaleMask2FormerForUniversalSegmentation"]


def test_image_processors_survive_a_reload(tmp_path):
    pytest.importorskip("torchvision")
    code = f"""
import importlib
import proscale_hf
from transformers.models.auto import image_processing_auto
proscale_hf.ProScaleMask2FormerImageProcessorPil().save_pretrained({str(tmp_path)!r})
importlib.reload(image_processing_auto)
print(type(image_processing_auto.AutoImageProcessor.from_pretrained({str(tmp_path)!r})).__name__)
"""
    assert run(code) == ["ProScaleMask2FormerImageProcessor"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_table_has_the_right_names(model_type):
    family = FAMILIES[model_type]
    assert family.config_class.model_type == model_type
    for auto_class in family.config_class.auto_classes:
        assert family.model_class(auto_class).config_class is family.config_class
    processors = family.image_processor_classes
    assert issubclass(processors["pil"], PilBackend) and issubclass(processors["torchvision"], TorchvisionBackend)
