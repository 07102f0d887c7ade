"""Which kernel runs deformable attention: what is tried, in which order, and what happens when nothing can be had."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from helpers import FOUR_LEVELS, pixels, tiny_model
from paths import ROOT
from proscale_hf.encoders.choice import ENCODER_CLASSES
from proscale_hf.layers import kernels as kernel
from proscale_hf.layers.ms_deform_attn import FusedMultiScaleDeformableAttention, MultiScaleDeformableAttention


KERNEL_FOLDER = ROOT / "kernels" / "ms_deform_attn"
needs_library = pytest.mark.skipif(kernel.kernelize is None, reason="kernels is not installed")


class Zeros(nn.Module):
    """Stands for a compiled layer: zeros, so that it can be told from the real thing."""

    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        reference_points,
        offsets,
        logits,
    ):
        return value.new_zeros(*offsets.shape[:2], value.shape[2] * value.shape[3])


class Repository:
    """What `kernels` calls a layer repository, without a Hub."""

    def __init__(self, layer=None, error=None):
        self.layer, self.error = layer, error

    def load(self):
        if self.error:
            raise self.error
        return self.layer


class KernelConfig:
    """The part of transformers' class that is read."""

    use_local_kernel = False

    def __init__(self, mapping):
        self.kernel_mapping = mapping


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(kernel, "kernelize", None)
    model = tiny_model()
    with pytest.raises(ImportError, match="pip install"):
        model.set_use_kernels(True)
    assert model.deformable_attention_backend == "pytorch"
    assert kernel.replaceable("Any")(Zeros) is Zeros


@needs_library
def test_the_first_that_loads_is_taken(monkeypatch, caplog):
    offered = [
        ("broken", {kernel.FUSED_LAYER: Repository(error=OSError("no build for this PyTorch\nsecond line"))}),
        ("good", {kernel.FUSED_LAYER: Repository(Zeros)}),
        ("later", {kernel.FUSED_LAYER: Repository(error=AssertionError("must not be asked"))}),
    ]
    monkeypatch.setattr(kernel, "candidates", lambda *_: iter(offered))
    model = tiny_model()
    before = model(pixels()).masks_queries_logits
    model.set_use_kernels(True)
    assert model.use_kernels and model.deformable_attention_backend == "good"
    layer = kernel.modules_named(model, kernel.FUSED_LAYER)[0]
    given = torch.ones(1, 6, 2, 8), None, [(2, 3)], None, None, torch.zeros(1, 5, 2, 1, 4, 2), None
    assert torch.equal(layer(*given), torch.zeros(1, 5, 16))
    assert not torch.equal(model(pixels()).masks_queries_logits, before)
    offered.clear()
    model.train().eval()  # transformers asks for kernels again; the one in place serves both
    assert model.use_kernels and model.deformable_attention_backend == "good"


@needs_library
def test_if_nothing_loads_pytorch_stays_and_one_line_says_why(monkeypatch, caplog):
    offered = [("some/repo", {kernel.FUSED_LAYER: Repository(error=OSError("no build for this PyTorch\nmore"))})]
    monkeypatch.setattr(kernel, "candidates", lambda *_: iter(offered))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny_model()
    before = model(pixels()).masks_queries_logits
    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(kernel, "logger", logging.getLogger("kernel-test"))
        model.set_use_kernels(True)
    monkeypatch.setattr(kernel, "candidates", None)  # nobody asks again
    model.train().eval()
    assert model.deformable_attention_backend == "pytorch" and not model.use_kernels
    assert [record.getMessage() for record in caplog.records] == [
        "Deformable attention runs in PyTorch: no kernel could be loaded (some/repo: no build for this PyTorch)."
    ]
    assert torch.equal(model(pixels()).masks_queries_logits, before)


@needs_library
def test_a_kernel_that_cannot_train_is_passed_over(monkeypatch):
    layer = type("Zeros", (Zeros,), {"has_backward": False})
    monkeypatch.setattr(kernel, "candidates", lambda *_: iter([("one-way", {kernel.FUSED_LAYER: Repository(layer)})]))
    model = tiny_model()
    model.set_use_kernels(True)
    assert model.deformable_attention_backend == "pytorch"


@needs_library
def test_no_kernel_is_looked_for_where_there_is_nothing_to_run(monkeypatch):
    monkeypatch.setattr(kernel, "candidates", lambda *_: pytest.fail("must not be asked"))
    model = tiny_model(encoder="rt")
    model.set_use_kernels(True)
    assert model.deformable_attention_backend == "pytorch" and not model.use_kernels


@needs_library
def test_what_is_tried_in_which_order(monkeypatch, tmp_path):
    monkeypatch.delenv(kernel.FOLDER_VARIABLE, raising=False)
    names = [name for name, _ in kernel.candidates("cuda")]
    assert names == [kernel.HUB_REPOSITORY, kernel.DEFAULT_REPOSITORY]
    assert [name for name, _ in kernel.candidates("cpu")] == [kernel.HUB_REPOSITORY]
    assert list(kernel.candidates("mps")) == []
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, str(tmp_path))
    config = KernelConfig({kernel.FUSED_LAYER: f"{tmp_path}:{kernel.FUSED_LAYER}", kernel.LAYER: "me/kernel:Layer"})
    names = [name for name, _ in kernel.candidates("cpu", config)]
    assert names == [str(tmp_path), "me/kernel", str(tmp_path), kernel.HUB_REPOSITORY]


@needs_library
@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"RMSNorm": "me/kernel:RMSNorm"}, "has a kernel for 'RMSNorm'; this model has FusedMulti"),
        ({kernel.LAYER: "me/kernel"}, "must be given as 'repo/id:Layer' or '/path:Layer', not 'me/kernel'"),
    ],
)
def test_kernel_configs_that_cannot_be_meant(mapping, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().set_use_kernels(True, KernelConfig(mapping))


@needs_library
@pytest.mark.skipif(not list(KERNEL_FOLDER.glob("build/torch*")), reason="the kernel is not built: make kernel")
@pytest.mark.parametrize("levels", [{}, FOUR_LEVELS], ids=["three levels", "four levels"])
@pytest.mark.parametrize("encoder", sorted(set(ENCODER_CLASSES) - {"rt"}))
def test_the_built_kernel_gives_what_pytorch_gives(monkeypatch, encoder, levels):
    monkeypatch.setenv(kernel.FOLDER_VARIABLE, str(KERNEL_FOLDER))
    reference, model = (tiny_model(encoder=encoder, **levels) for _ in range(2))
    model.set_use_kernels(True)
    assert model.deformable_attention_backend == str(KERNEL_FOLDER)
    for name in ("masks_queries_logits", "class_queries_logits"):
        torch.testing.assert_close(
            getattr(model(pixels()), name), getattr(reference(pixels()), name), atol=1e-4, rtol=1e-4
        )
    for each in (reference, model):
        each(pixels()).masks_queries_logits.square().mean().backward()
    for (name, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        if "pixel_level_module.decoder.encoder" in name:
            torch.testing.assert_close(parameter.grad, expected.grad, atol=1e-5, rtol=1e-3)


FROM_THE_HUB = """
import logging
import torch
logging.basicConfig(level=logging.INFO)
from helpers import pixels, tiny_model
model = tiny_model()
with torch.no_grad():
    expected = model(pixels()).masks_queries_logits
    model.set_use_kernels(True)
    found = model(pixels()).masks_queries_logits
print(model.deformable_attention_backend, float((found - expected).abs().max()) < 1e-3)
"""


def run_with(environment):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**environment, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([sys.executable, "-c", FROM_THE_HUB], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


@needs_library
@pytest.mark.slow
@pytest.mark.skipif(not list(KERNEL_FOLDER.glob("build/torch*")), reason="the kernel is not built: make kernel")
def test_from_the_hub(tmp_path):
    """Downloaded from a server over HTTP; PyTorch, with one line that says so, where there is none."""
    from hub_server import HubServer

    files = {
        str(path.relative_to(KERNEL_FOLDER)): path.read_bytes()
        for path in KERNEL_FOLDER.glob("build/**/*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with HubServer() as hub:
        missing = run_with(hub.environment(tmp_path / "empty"))
        assert missing.stdout == "pytorch True\n"
        assert missing.stderr.count("Deformable attention runs in PyTorch: no kernel could be loaded") == 1
        hub.create(kernel.HUB_REPOSITORY, files, type="kernel")
        hub.commit(kernel.HUB_REPOSITORY, files, type="kernel", branch=f"v{kernel.HUB_VERSION}")
        found = run_with(hub.environment(tmp_path / "home"))
        assert found.stdout == f"{kernel.HUB_REPOSITORY} True\n", found.stderr
        assert found.stderr.count("Deformable attention runs in the kernel") == 1


def test_the_layers_agree():
    """The fused layer is the plain one behind a softmax and a change of units."""
    torch.manual_seed(0)
    shapes = [(4, 6), (2, 3)]
    value, offsets, logits = torch.randn(1, 30, 2, 8), torch.randn(1, 5, 2, 2, 3, 2), torch.randn(1, 5, 2, 6)
    points = torch.rand(1, 5, 1, 2)
    sizes, starts = torch.tensor(shapes), torch.tensor([0, 24])
    fused = FusedMultiScaleDeformableAttention()(value, sizes, shapes, starts, points, offsets, logits)
    locations = points[:, :, None, :, None] + offsets / sizes.flip(-1)[:, None]
    weights = logits.softmax(-1).view(1, 5, 2, 2, 3)
    plain = MultiScaleDeformableAttention()(value, sizes, shapes, starts, locations, weights, 64)
    torch.testing.assert_close(fused, plain)
