"""The paper's optimisation: groups of parameters, schedules, and how a batch is divided."""

import pytest
import torch
from torch import nn

from helpers import tiny_config
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation


pytest.importorskip("datasets")

from proscale_hf.training.optimization import (
    count_steps,
    create_optimizer,
    create_scheduler,
    learning_rate_factor,
    parameter_groups,
    split_batch,
)
from proscale_hf.training.recipe import OptimizationSection, RecipeError


def settings_by_name(model, optimization):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in parameter_groups(model, optimization)
        for parameter in group["params"]
    }


def test_groups_hold_each_trained_parameter_once():
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config())
    frozen = model.class_predictor.bias.requires_grad_(False)
    groups = parameter_groups(model, OptimizationSection())
    grouped = [parameter for group in groups for parameter in group["params"]]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped)) == len(trained)
    assert set(grouped) == set(trained)
    assert frozen not in set(grouped)
    assert len(groups) == 4


def test_learning_rates_and_weight_decay_are_mask2formers():
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config())
    settings = settings_by_name(model, OptimizationSection())
    for name, (learning_rate, weight_decay) in settings.items():
        in_backbone = name.startswith("model.pixel_level_module.encoder.")
        assert learning_rate == pytest.approx(1e-5 if in_backbone else 1e-4), name
        module = model.get_submodule(name.rpartition(".")[0])
        is_norm = isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d)
        is_embedding = (
            isinstance(module, nn.Embedding) or "relative_position_bias_table" in name or "level_embed" in name
        )
        assert weight_decay == (0.0 if is_norm or is_embedding else 0.05), name
    assert settings["class_predictor.bias"] == (1e-4, 0.05)  # biases decay
    assert settings["model.pixel_level_module.decoder.level_embed"][1] == 0.0
    assert any("relative_position_bias_table" in name for name in settings)
    assert any("hidden_states_norms" in name for name in settings)


def test_positions_of_mvit_do_not_decay():
    pytest.importorskip("timm")
    backbone = {"model_type": "timm_backbone", "backbone": "mvitv2_tiny", "out_indices": [0, 1, 2, 3]}
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config(backbone_config=backbone))
    settings = settings_by_name(model, OptimizationSection())
    positions = [decay for name, (_, decay) in settings.items() if "rel_pos" in name]
    assert len(positions) == 20 and set(positions) == {0.0}


def test_a_shared_parameter_comes_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert sum(len(group["params"]) for group in parameter_groups(model, OptimizationSection())) == 3


def test_steps_of_the_schedule():
    optimization = OptimizationSection(max_steps=1000)
    factors = [learning_rate_factor(step, optimization, 1000) for step in (0, 899, 900, 949, 950, 999)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    optimization.schedule = "polynomial"
    factors = [learning_rate_factor(step, optimization, 1000) for step in (0, 500, 1000)]
    assert factors == pytest.approx([1, 0.5**0.9, 0])


def test_warmup_grows_linearly_and_never_is_zero():
    optimization = OptimizationSection(warmup_steps=4)
    factors = [learning_rate_factor(step, optimization, 1000) for step in range(6)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])


def test_the_scheduler_keeps_the_backbones_share():
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config())
    optimization = OptimizationSection(max_steps=10)
    optimizer = create_optimizer(model, optimization)
    scheduler = create_scheduler(optimizer, optimization, 10)
    rates = []
    for _ in range(10):
        rates.append(sorted({group["lr"] for group in optimizer.param_groups}))
        optimizer.step()
        scheduler.step()
    assert rates[0] == pytest.approx([1e-5, 1e-4])
    assert rates[9] == pytest.approx([1e-6, 1e-5])
    assert isinstance(optimizer, torch.optim.AdamW)


def test_number_of_steps():
    assert count_steps(OptimizationSection(max_steps=7), images=100) == 7
    assert count_steps(OptimizationSection(epochs=50.0), images=118_000) == 368_750  # Mask2Former's number for COCO
    assert count_steps(OptimizationSection(epochs=0.1, batch_size=10), images=10) == 1
    with pytest.raises(RecipeError, match="how long to train"):
        count_steps(OptimizationSection(), images=100)
    with pytest.raises(RecipeError, match="9 images, but"):
        count_steps(OptimizationSection(max_steps=7, batch_size=10), images=9)


def test_a_batch_is_divided_among_processes_and_passes():
    assert split_batch(OptimizationSection(batch_size=16), 8) == (2, 1)
    assert split_batch(OptimizationSection(batch_size=16, device_batch_size=1), 8) == (1, 2)
    assert split_batch(OptimizationSection(batch_size=16, device_batch_size=4), 1) == (4, 4)
    for batch_size, device_batch_size, processes in ((16, None, 3), (16, 3, 1), (4, None, 8), (4, 8, 1)):
        optimization = OptimizationSection(batch_size=batch_size, device_batch_size=device_batch_size)
        with pytest.raises(RecipeError, match="is no multiple of"):
            split_batch(optimization, processes)
