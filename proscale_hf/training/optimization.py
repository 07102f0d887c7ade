"""The paper's optimisation (appendix A, which follows Mask2Former): AdamW, a smaller learning rate for the backbone.

Norms and embeddings do not decay, the positions of Swin and MViTv2 among them; biases do, as in Mask2Former. It also
lets the pixel decoder's level embedding decay, for no reason but that it is no `nn.Embedding`; here it does not.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from proscale_hf.training.recipe import OptimizationSection, RecipeError


BACKBONE = "model.pixel_level_module.encoder."
NORMS = (
    nn.modules.batchnorm._NormBase,  # batch and instance norms
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    nn.RMSNorm,
)
# Embeddings that are bare parameters: of levels here, of positions in transformers' and timm's backbones.
EMBEDDING_NAMES = (
    "level_embed",
    "relative_position_bias_table",
    "rel_pos_h",
    "rel_pos_w",
    "position_embeddings",
    "absolute_pos_embed",
    "pos_embed",
    "cls_token",
)
POLYNOMIAL_POWER = 0.9


def parameter_groups(model: nn.Module, optimization: OptimizationSection) -> list[dict]:
    """
    Sort a model's parameters by learning rate and weight decay.

    Args:
        model: a `ProScaleMask2FormerForUniversalSegmentation`, not wrapped for several processes.
        optimization: of the recipe.

    Returns:
        At most four groups for an optimizer, with `params`, `lr` and `weight_decay`. Parameters without gradient, such
        as those of frozen batch norms, are in none.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter, decays in _trained_parameters(model):
        groups.setdefault((name.startswith(BACKBONE), decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optimization.learning_rate * (optimization.backbone_factor if in_backbone else 1.0),
            "weight_decay": optimization.weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    ]


def create_optimizer(model: nn.Module, optimization: OptimizationSection) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`."""
    return torch.optim.AdamW(parameter_groups(model, optimization))


def learning_rate_factor(step: int, optimization: OptimizationSection, total_steps: int) -> float:
    """
    Args:
        step: updates done so far.
        optimization: of the recipe.
        total_steps: updates of the whole training.

    Returns:
        The learning rate over the recipe's.
    """
    warmup = min(1.0, (step + 1) / (optimization.warmup_steps + 1))
    if optimization.schedule == "polynomial":
        return warmup * max(0.0, 1 - step / total_steps) ** POLYNOMIAL_POWER
    decays = sum(step >= round(share * total_steps) for share in optimization.decay_at)
    return warmup * optimization.decay_factor**decays


class Schedule(LambdaLR):
    """A schedule that goes on, in a resumed training, with the learning rates of its own optimizer's recipe."""

    def load_state_dict(self, state_dict: dict) -> None:
        base_rates = self.base_lrs
        super().load_state_dict({**state_dict, "base_lrs": base_rates})
        self._last_lr = [
            base * factor(self.last_epoch) for base, factor in zip(base_rates, self.lr_lambdas, strict=True)
        ]
        for group, base, rate in zip(self.optimizer.param_groups, base_rates, self._last_lr, strict=True):
            group["initial_lr"], group["lr"] = base, rate


def create_scheduler(optimizer: torch.optim.Optimizer, optimization: OptimizationSection, total_steps: int) -> Schedule:
    """The recipe's schedule; to be stepped once per update, whatever the number of processes."""
    return Schedule(optimizer, lambda step: learning_rate_factor(step, optimization, total_steps))


def count_steps(optimization: OptimizationSection, images: int) -> int:
    """
    Args:
        optimization: of the recipe.
        images: in the training set.

    Returns:
        Updates of the whole training, at least 1.

    Raises:
        RecipeError: the recipe does not say how long to train, or there are fewer images than one update needs.
    """
    if images < optimization.batch_size:
        raise RecipeError(f"data.train has {images} images, but optimization.batch_size is {optimization.batch_size}")
    if optimization.max_steps is not None:
        return optimization.max_steps
    if optimization.epochs is None:
        raise RecipeError("the recipe does not say how long to train: give optimization.max_steps or .epochs")
    return max(1, round(optimization.epochs * images / optimization.batch_size))


def split_batch(optimization: OptimizationSection, processes: int) -> tuple[int, int]:
    """
    Divide the recipe's batch among processes and forward passes.

    Args:
        optimization: of the recipe.
        processes: how many train together.

    Returns:
        Images per process and forward pass, and forward passes per update, whose gradients are averaged.

    Raises:
        RecipeError: it cannot be divided evenly.
    """
    batch_size = optimization.batch_size
    device_batch_size = optimization.device_batch_size or max(1, batch_size // processes)
    passes, rest = divmod(batch_size, device_batch_size * processes)
    if rest or not passes:
        raise RecipeError(
            f"optimization.batch_size {batch_size} is no multiple of {device_batch_size} images x {processes} "
            "processes: change batch_size, device_batch_size or the number of processes"
        )
    return device_batch_size, passes


def _trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, parameter and whether it decays, of each parameter that has a gradient; shared ones come once."""
    seen = set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                decays = not isinstance(module, (*NORMS, nn.Embedding)) and name not in EMBEDDING_NAMES
                yield f"{module_name}.{name}", parameter, decays
