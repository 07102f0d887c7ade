"""A saved model has its code with it, as a Hub repository does, and loads where this package is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_imports

import proscale_hf
from helpers import detection_labels, labels, pixels, tiny_config, tiny_detection_config, tiny_detector, tiny_model
from paths import FIXTURES
from proscale_hf import (
    ProScaleDinoImageProcessorPil,
    ProScaleMask2FormerImageProcessorPil,
    ProScaleMask2FormerModel,
)


PACKAGE = Path(proscale_hf.__file__).parent
SETTINGS = {"config.json", "preprocessor_config.json", "model.safetensors", "README.md"}

HIDE_THE_PACKAGE = """
import sys
sys.modules["proscale_hf"] = None  # importing it is an error from here on
"""
IS_THERE_AN_AUTO_PROCESSOR = """
from transformers import AutoConfig, AutoModel, AutoModelForUniversalSegmentation, pipeline
from transformers.utils import is_torchvision_available
try:
    from transformers import AutoImageProcessor
    AutoImageProcessor.from_pretrained
    backends = ["pil", "torchvision"] if is_torchvision_available() else ["pil"]
except ImportError:  # transformers 5.17 without torchvision
    backends = []
"""

LOAD = """
import json
from pathlib import Path
import torch
from PIL import Image

folder, inputs, copy = sys.argv[1:]
given, expected = torch.load(inputs)


def check(model):
    with torch.no_grad():
        torch.testing.assert_close(model(given).masks_queries_logits, expected, rtol=1e-4, atol=1e-5)


model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
check(model)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
torch.testing.assert_close(base.state_dict(), model.model.state_dict())
model.save_pretrained(copy)
for backend in backends:
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend=backend)
    assert processor.label_ids_to_fuse == [2, 3] and processor.backend == backend
    assert "transformers_modules" in type(processor).__module__
    processor.save_pretrained(copy)
    if processor.backend == backends[-1]:
        assert type(AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)) is type(processor)
segmenter = pipeline("image-segmentation", model=folder, trust_remote_code=True)
check(segmenter.model)
assert isinstance(segmenter(Image.new("RGB", (50, 40), "teal"), threshold=0.0), list)
if backends:
    first, second = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in (folder, copy))
    assert first.keys() - {"README.md"} == second.keys(), first.keys() ^ second.keys()  # the package writes the card
    changed = {name for name in second if first[name] != second[name]}
    assert changed <= {"config.json"}, changed  # transformers notes there in which type the backbone was loaded
    assert json.loads(first["config.json"])["auto_map"] == json.loads(second["config.json"])["auto_map"]
check(AutoModelForUniversalSegmentation.from_pretrained(copy, trust_remote_code=True))
print(type(model).__module__)
"""

DETECT = """
import torch
from PIL import Image
from transformers import AutoModelForObjectDetection

folder, inputs = sys.argv[1:]
given, labels, expected = torch.load(inputs)
model = AutoModelForObjectDetection.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    torch.testing.assert_close(model(given).pred_boxes, expected, rtol=1e-4, atol=1e-5)
detector = pipeline("object-detection", model=folder, trust_remote_code=True)
assert len(detector(Image.new("RGB", (50, 40), "teal"), threshold=0.0)) == 36
model.train()(given, labels=labels).loss.backward()
print(type(model).__module__)
"""

TRAIN = """
import os
from pathlib import Path
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.distributed.fsdp import fully_shard

folder, batch, copies = sys.argv[1:]
batch = torch.load(batch)
files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
init_process_group("gloo", init_method=f"file://{copies}.rendezvous", rank=0, world_size=1)
for sharded in (False, True):
    model = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True).train()
    saved_class = type(model)
    assert saved_class.__module__.startswith("transformers_modules.")
    if sharded:
        fully_shard(model)
        assert type(model).__name__ == "FSDP" + saved_class.__name__
        assert type(model).__module__ != saved_class.__module__
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(**batch).loss.backward()
    optimizer.step()
    copy = f"{copies}/{sharded}"
    whole = {name: getattr(value, "full_tensor", lambda: value)() for name, value in model.state_dict().items()}
    model.save_pretrained(copy, state_dict=whole)
    for backend in backends:
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True, backend=backend)
        processor.save_pretrained(copy)
        processor.save_pretrained(f"{copy}-{backend}")
        assert AutoImageProcessor.from_pretrained(f"{copy}-{backend}", trust_remote_code=True).size == processor.size
    if backends:
        saved = {path.name: path.read_bytes() for path in Path(copy).iterdir()}
        assert saved.keys() == files.keys() - {"README.md"}, files.keys() ^ saved.keys()
        assert all(saved[name] == files[name] for name in saved if name.endswith(".py"))
    trained = AutoModelForUniversalSegmentation.from_pretrained(copy, trust_remote_code=True)
    assert type(trained).__name__ == saved_class.__name__
    torch.testing.assert_close(trained.class_predictor.weight, whole["class_predictor.weight"])
    untrained = AutoModelForUniversalSegmentation.from_pretrained(folder, trust_remote_code=True)
    assert not torch.equal(trained.class_predictor.weight, untrained.class_predictor.weight)
destroy_process_group()
"""

LOAD_0_1_0 = """
import torch
from safetensors.torch import load_file
from PIL import Image

folder, expected, origin = sys.argv[1:]
expected = load_file(expected)
settings = {"trust_remote_code": origin == "transformers_modules"}
model = AutoModelForUniversalSegmentation.from_pretrained(folder, **settings)
objects = [model]
with torch.no_grad():
    outputs = model(expected["pixel_values"])
for name in ("class_queries_logits", "masks_queries_logits"):
    torch.testing.assert_close(outputs[name], expected[name], rtol=1e-4, atol=1e-5)
for backend in backends:
    processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **settings)
    assert processor.label_ids_to_fuse == [2, 3] and dict(processor.size) == {"height": 64, "width": 96}
    assert processor(Image.new("RGB", (50, 40)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 96)
    objects.append(processor)
assert all(type(item).__module__.startswith(f"{origin}.") for item in objects), objects
"""

REFUSE = """
import builtins
builtins.input = lambda prompt: ""  # the answer is no
loaders = [AutoConfig, AutoModel, AutoModelForUniversalSegmentation, *([AutoImageProcessor] if backends else [])]
for loader in loaders:
    for trust_remote_code in (None, False):
        try:
            loader.from_pretrained(sys.argv[1], trust_remote_code=trust_remote_code)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise AssertionError(f"{loader} ran code that nobody trusts")
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
"""

PREFER_THE_PACKAGE = """
import builtins
import sys
import proscale_hf

def refuse(prompt):
    raise AssertionError(f"asked: {prompt}")

builtins.input = refuse
for trust_remote_code in (None, False, True):
    settings = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(sys.argv[1], **settings)
    model = AutoModelForUniversalSegmentation.from_pretrained(sys.argv[1], **settings)
    segmenter = pipeline("image-segmentation", model=sys.argv[1], **settings)
    objects = [
        config,
        model,
        AutoModel.from_pretrained(sys.argv[1], **settings),
        AutoModelForUniversalSegmentation.from_config(config, **settings),
        segmenter.model,
        segmenter.image_processor,
        *(AutoImageProcessor.from_pretrained(sys.argv[1], backend=backend, **settings) for backend in backends),
    ]
    assert all(type(item).__module__.startswith("proscale_hf.") for item in objects), objects
assert not any(name.startswith("transformers_modules.") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model and its image processor, saved."""
    folder = tmp_path_factory.mktemp("saved") / "my-model.v2"  # a name that is no Python module's
    tiny_model().save_pretrained(folder)
    ProScaleMask2FormerImageProcessorPil(label_ids_to_fuse=[2, 3], size={"height": 64, "width": 96}).save_pretrained(
        folder
    )
    return folder


def run(code: str, folder: Path, workspace: Path, *arguments: object) -> str:
    """In a process of its own, where nothing can be downloaded and nothing was loaded before."""
    environment = {
        **os.environ,
        "HF_HOME": str(workspace / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(workspace),
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", code, str(folder), *map(str, arguments)],
        cwd=workspace if code.startswith(HIDE_THE_PACKAGE) else PACKAGE.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def code_named_in(folder: Path) -> set[str]:
    """The files that `auto_map` points to; each has the class."""
    files = set()
    for settings in folder.glob("*config.json"):
        for reference in json.loads(settings.read_text())["auto_map"].values():
            for name in reference if isinstance(reference, list) else [reference]:
                module, class_name = name.split(".")
                assert f"class {class_name}(" in (folder / f"{module}.py").read_text()
                files.add(f"{module}.py")
    return files


def test_the_folder_has_the_code_and_nothing_else(folder):
    code = {path.name for path in folder.glob("*.py")}
    assert {path.name for path in folder.iterdir()} == SETTINGS | code
    imported = {f"{name}.py" for file in code for name in get_relative_imports(folder / file)}
    assert code == imported | code_named_in(folder)


@pytest.mark.parametrize(
    "make",
    [
        tiny_config,
        tiny_model,
        lambda: ProScaleMask2FormerModel(tiny_config()),
        ProScaleMask2FormerImageProcessorPil,
        tiny_detection_config,
        tiny_detector,
        ProScaleDinoImageProcessorPil,
    ],
    ids=[
        "configuration",
        "model",
        "model without heads",
        "image processor",
        "detection configuration",
        "detector",
        "detection image processor",
    ],
)
def test_each_part_alone_has_the_code_it_needs(make, tmp_path):
    make().save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    imported = {f"{name}.py" for file in code for name in get_relative_imports(tmp_path / file)}
    assert code_named_in(tmp_path) | imported == code != set()


def test_auto_map_is_what_the_package_registers(folder):
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    segmentation = [f"AutoModelFor{kind}Segmentation" for kind in ("Universal", "Instance", "Image")]
    assert set(auto_map) == {"AutoConfig", "AutoModel", *segmentation}
    assert len({auto_map[name] for name in segmentation}) == 1
    assert auto_map["AutoModel"].endswith(".ProScaleMask2FormerModel")
    pil, torchvision = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
    assert pil == torchvision + "Pil"


def test_the_code_asks_for_nothing_but_what_is_always_installed(folder):
    """transformers refuses to load code if a package that it imports, other than in a `try`, is missing."""
    imported = {name for path in folder.glob("*.py") for name in get_imports(path)}
    always = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "scipy"}
    assert imported - always - sys.stdlib_module_names == set()


def test_code_of_another_repository_is_not_handed_on(tmp_path):
    """Else whoever trusts the new repository would run the other one's code."""
    model = tiny_model()
    model.config.auto_map = {"AutoConfig": "mallory/code--evil.Config", "AutoTokenizer": "mallory/code--evil.Tokenizer"}
    model.save_pretrained(tmp_path)
    processor = ProScaleMask2FormerImageProcessorPil(auto_map={"AutoImageProcessor": "mallory/code--evil.Processor"})
    processor.save_pretrained(tmp_path)
    for name in ("config.json", "preprocessor_config.json"):
        assert "mallory" not in (tmp_path / name).read_text()


@pytest.mark.slow
def test_it_loads_without_the_package_and_saves_completely_again(folder, tmp_path):
    with torch.no_grad():
        torch.save((pixels(), tiny_model()(pixels()).masks_queries_logits), tmp_path / "inputs.pt")
    code = HIDE_THE_PACKAGE + IS_THERE_AN_AUTO_PROCESSOR + LOAD
    module = run(code, folder, tmp_path, tmp_path / "inputs.pt", tmp_path / "copy")
    assert module.startswith("transformers_modules.")


@pytest.mark.slow
def test_a_detector_loads_and_trains_without_the_package(tmp_path):
    pytest.importorskip("torchvision", reason="AutoImageProcessor of transformers 5.17 needs it")
    model, given = tiny_detector(), detection_labels()
    model.save_pretrained(tmp_path / "saved")
    size = {"shortest_edge": 64, "longest_edge": 96}
    ProScaleDinoImageProcessorPil(size=size).save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.save((pixels(), given, model(pixels()).pred_boxes), tmp_path / "inputs.pt")
    code = HIDE_THE_PACKAGE + IS_THERE_AN_AUTO_PROCESSOR + DETECT
    assert run(code, tmp_path / "saved", tmp_path, tmp_path / "inputs.pt").startswith("transformers_modules.")


@pytest.mark.slow
def test_it_trains_without_the_package_and_saves_completely_again(folder, tmp_path):
    torch.save({"pixel_values": pixels(), **labels()}, tmp_path / "batch.pt")
    code = HIDE_THE_PACKAGE + IS_THERE_AN_AUTO_PROCESSOR + TRAIN
    run(code, folder, tmp_path, tmp_path / "batch.pt", tmp_path / "copies")


@pytest.mark.slow
@pytest.mark.parametrize("origin", ["proscale_hf", "transformers_modules"])
def test_what_version_0_1_0_saved_still_loads(origin, tmp_path):
    start = "import sys\nimport proscale_hf\n" if origin == "proscale_hf" else HIDE_THE_PACKAGE
    expected = FIXTURES / "saved_by_0_1_0_expected.safetensors"
    run(start + IS_THERE_AN_AUTO_PROCESSOR + LOAD_0_1_0, FIXTURES / "saved_by_0_1_0", tmp_path, expected, origin)


@pytest.mark.slow
def test_its_code_does_not_run_without_trust(folder, tmp_path):
    run(HIDE_THE_PACKAGE + IS_THERE_AN_AUTO_PROCESSOR + REFUSE, folder, tmp_path)


@pytest.mark.slow
def test_the_installed_package_comes_first_and_nobody_is_asked(folder, tmp_path):
    run(IS_THERE_AN_AUTO_PROCESSOR + PREFER_THE_PACKAGE, folder, tmp_path)
