"""Hooks, adapters, parametrisations and offloaded weights work on every module, although fast paths exist."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from helpers import pixels, tiny_model
from proscale_hf.backbones import swin_strips
from proscale_hf.backbones.swin_mlp import LeanSwinMLP
from proscale_hf.backbones.swin_strips import SwinLayerInStrips, SwinPatchMergingInStrips
from proscale_hf.layers import deformable_encoder, ms_deform_attn
from proscale_hf.layers.table import Table
from proscale_hf.layers.untouched import is_untouched, mark_as_built


PIXELS = pixels(batch=1, height=32, width=64)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def many_strips(monkeypatch):
    monkeypatch.setattr(swin_strips, "CPU_TOKENS", 40)
    monkeypatch.setattr(ms_deform_attn, "CPU_TOKENS", 40)


def run(model, is_training: bool = False) -> torch.Tensor:
    with torch.set_grad_enabled(is_training):
        return model(PIXELS).masks_queries_logits.detach()


def calls(model, names, is_training: bool = False) -> Counter:
    """How often each of the modules is called in a forward pass, in which all of them have a hook."""
    seen, modules = Counter(), dict(model.named_modules())
    hooks = [modules[name].register_forward_hook(lambda *_, name=name: seen.update([name])) for name in names]
    run(model, is_training)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
def test_a_hook_on_any_module_is_called_as_if_there_were_no_fast_path(model, is_training, monkeypatch):
    names = [name for name, _ in model.named_modules() if ".layers.0." in name and "transformer_module" not in name]
    with monkeypatch.context() as without_fast_paths:
        for ours in (SwinLayerInStrips, SwinPatchMergingInStrips, LeanSwinMLP):
            without_fast_paths.setattr(ours, "forward", ours.__base__.forward)
        without_fast_paths.setattr(deformable_encoder, "token_parts", lambda tokens: (tokens,))
        expected = calls(model, names, is_training)
    assert len(expected) >= 30
    for name in expected:
        assert calls(model, [name], is_training)[name] == expected[name], name


def test_a_hook_changes_no_value(model):
    expected = run(model)
    hooks = [module.register_forward_hook(lambda *_: None) for module in model.modules()]
    found = run(model)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(run(model), expected)


class Doubled(nn.Module):
    """An adapter around a layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(inputs)


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def test_what_counts_as_touched():
    block = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    assert not is_untouched(block)  # nobody marked it
    mark_as_built(block)
    assert is_untouched(block) and is_untouched(block[0][0], block[1])
    for touch in (
        lambda layer: layer.register_forward_hook(print),
        lambda layer: layer.register_forward_pre_hook(print),
        lambda layer: layer.register_full_backward_hook(print),
        lambda layer: layer.register_full_backward_pre_hook(print),
    ):
        handle = touch(block[0][0])
        assert not is_untouched(block) and is_untouched(block[1])
        handle.remove()
        assert is_untouched(block)
    block[0][0].forward = block[0][0].forward
    assert not is_untouched(block)
    del block[0][0].forward
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not is_untouched(block)
    handle.remove()
    parametrize.register_parametrization(block[1], "weight", Twice())
    assert not is_untouched(block) and is_untouched(block[0])
    parametrize.remove_parametrizations(block[1], "weight")
    assert is_untouched(block)
    block[0][0].to("meta")
    assert not is_untouched(block)
    block[0][0] = Doubled(nn.Linear(2, 2))
    assert not is_untouched(block)


def test_adapters_and_parametrisations_count(model):
    """In inference as in training, where the paths are others."""
    layer = model.model.pixel_level_module.encoder.get_submodule("swin.encoder.layers.0.blocks.0.mlp")
    before, fc2 = run(model), layer.fc2
    layer.fc2 = Doubled(fc2)
    adapted = run(model)
    torch.testing.assert_close(adapted, run(model, is_training=True), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(adapted, before)
    layer.fc2 = fc2
    parametrize.register_parametrization(fc2, "weight", Twice())
    parametrize.register_parametrization(fc2, "bias", Twice())
    torch.testing.assert_close(run(model), adapted, rtol=1e-4, atol=1e-4)
    for name in ("weight", "bias"):
        parametrize.remove_parametrizations(fc2, name, leave_parametrized=False)
    assert torch.equal(run(model), before)


@pytest.mark.parametrize("is_training", [False, True], ids=["inference", "training"])
def test_offloaded_weights(is_training):
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model()
    expected = run(model, is_training)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    torch.testing.assert_close(run(model, is_training), expected, rtol=1e-4, atol=1e-4)


def test_a_table_is_an_embedding_that_gives_all_it_has():
    table = Table(3, 2)
    assert isinstance(table, nn.Embedding) and list(table.state_dict()) == ["weight"]
    assert table() is table.weight
