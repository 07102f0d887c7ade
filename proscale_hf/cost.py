"""What one image costs: multiply-adds by stage, parameters and activations, in the convention of the papers' tables.

How it is counted is in `models/counting.py`, and for each family in a `cost.py` of its own.
"""

from transformers import PreTrainedConfig, PreTrainedModel

from proscale_hf.hub.families import FAMILIES
from proscale_hf.models.counting import Cost


def measure_cost(config_or_model: PreTrainedConfig | PreTrainedModel, height: int, width: int) -> Cost:
    """
    Count what a model takes for one image. It takes about half a second, and is remembered.

    Args:
        config_or_model: a configuration, or a model, whose configuration is taken.
        height: of the image as the model gets it, in pixels; padding to a multiple of the largest stride is added.
        width: as `height`.

    Raises:
        ValueError: `height` or `width` is not at least 1.
    """
    config = getattr(config_or_model, "config", config_or_model)
    return FAMILIES[config.model_type].model_class("AutoModel").measure_cost(config, height, width)


__all__ = ["Cost", "measure_cost"]
