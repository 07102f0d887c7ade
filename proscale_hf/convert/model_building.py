"""Builds a model around existing tensors, so that its weights are in memory only once."""

from collections import defaultdict

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation


def expected_tensors(
    config: PreTrainedConfig, model_class: type[PreTrainedModel] = ProScaleMask2FormerForUniversalSegmentation
) -> dict[str, Tensor]:
    """Names, shapes and types of a model's state dict, as tensors on the meta device."""
    with torch.device("meta"):
        return model_class(config).state_dict()


def to_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors of other types in place: each once, and freed before the next one."""
    names_of = defaultdict(list)  # a tensor may have several names
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            names_of[id(tensor)].append(name)
    for names in names_of.values():
        tensors.update(dict.fromkeys(names, tensors[names[0]].float()))
    return tensors


def build_model(
    config: PreTrainedConfig,
    state: dict[str, Tensor],
    model_class: type[PreTrainedModel] = ProScaleMask2FormerForUniversalSegmentation,
) -> PreTrainedModel:
    """
    Build a model whose weights are, where possible, the given tensors and not copies of them.

    Args:
        config: The model's configuration.
        state: The model's state dict or a part of it, in float32. It is emptied, so that a large tensor is freed as
            soon as its parts are copied. Tensors on the meta device count as absent.
        model_class: The model's class.

    Returns:
        The model in evaluation mode. Absent weights are initialised as in a new model.
    """
    used: set[int] = set()
    own = {name: _of_its_own(state.pop(name), used) for name in list(state)}
    own = {name: tensor for name, tensor in own.items() if not tensor.is_meta}
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # the caller knows what is absent
    try:
        return model_class.from_pretrained(None, config=config, state_dict=own, dtype=torch.float32)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _of_its_own(tensor: Tensor, used: set[int]) -> Tensor:
    """The tensor, or a copy of it if it is a part of a larger one, or is in use already; `used` has the addresses."""
    if tensor.nbytes != tensor.untyped_storage().nbytes() or tensor.data_ptr() in used:
        tensor = tensor.clone()
    used.add(tensor.data_ptr())
    return tensor
