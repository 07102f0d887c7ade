"""Puts a compiled kernel in the place of the PyTorch deformable attention, by Hugging Face's `kernels` library.

Nothing is loaded before it is asked for, by `use_kernels=True`. What is tried, in this order: a path or repository that
a `KernelConfig` names, the folder in `PROSCALE_KERNEL_DIR`, the project's kernel on the Hub (CPU and CUDA), and the one
that transformers uses by default (CUDA). If none can be had, the PyTorch path stays.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from proscale_hf.files.text import one_line


try:
    from kernels import (
        LayerRepository,
        LocalLayerRepository,
        Mode,
        kernelize,
        register_kernel_mapping,
        use_kernel_forward_from_hub,
        use_kernel_mapping,
    )
except ImportError:  # also where a folder of that name, and not the library, is found
    kernelize = None

FUSED_LAYER = "FusedMultiScaleDeformableAttention"
LAYER = "MultiScaleDeformableAttention"
HUB_REPOSITORY, HUB_VERSION = "proscale-hf/ms-deform-attn", 1
DEFAULT_REPOSITORY, DEFAULT_VERSION = "kernels-community/deformable-detr", 1  # transformers' own choice
FOLDER_VARIABLE = "PROSCALE_KERNEL_DIR"
PYTORCH = "pytorch"

logger = logging.get_logger(__name__)


def replaceable(layer_name: str) -> Any:
    """Decorates a layer whose forward `kernels` may replace; without that library the layer stays as it is."""
    return (lambda layer: layer) if kernelize is None else use_kernel_forward_from_hub(layer_name)


def use_kernel(model: nn.Module, device: torch.device, kernel_config: Any = None) -> str:
    """
    Give every deformable attention in a model the first kernel that can be had, and log which one that is.

    Args:
        model: holds the layers.
        device: where it runs.
        kernel_config: transformers' `KernelConfig`, whose `kernel_mapping` may name a kernel for these layers:
            `{"FusedMultiScaleDeformableAttention": "/path/or/repo:FusedMultiScaleDeformableAttention"}`.

    Returns:
        What runs now: the repository or folder of the kernel, or `"pytorch"`, also if there is nothing to run.

    Raises:
        ImportError: `kernels` is not installed.
        ValueError: the `KernelConfig` names other layers, or no repository.
    """
    if kernelize is None:
        raise ImportError('`use_kernels=True` needs the library `kernels`: pip install "transformers[kernels]"')
    if not modules_named(model, FUSED_LAYER):  # RT-DETR's encoder
        logger.info("There is no deformable attention in this model, and nothing for a kernel to do.")
        return PYTORCH
    device_type = "rocm" if device.type == "cuda" and torch.version.hip else device.type
    failures = []
    for name, layers in candidates(device_type, kernel_config):
        try:
            for repository in layers.values():
                if not getattr(repository.load(), "has_backward", True):
                    raise ValueError("it has no backward pass")
            mapping = {layer: {device_type: repository} for layer, repository in layers.items()}
            with use_kernel_mapping(mapping, inherit_mapping=False):
                for module in modules_named(model, FUSED_LAYER if FUSED_LAYER in layers else LAYER):
                    kernelize(module, mode=Mode.TRAINING, device=device_type)
        except Exception as error:  # no network, no such repository, no build for this PyTorch: each has its own type
            failures.append(f"{name}: {one_line(error)}")
        else:
            logger.info(f"Deformable attention runs in the kernel {name}.")
            return name
    reason = "; ".join(failures) or f"there is none for {device_type}"
    logger.warning(f"Deformable attention runs in PyTorch: no kernel could be loaded ({reason}).")
    return PYTORCH


def candidates(device_type: str, kernel_config: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Args:
        device_type: "cpu", "cuda", ...
        kernel_config: see `use_kernel`.

    Yields:
        (name, repositories by the layer that they are for), the best first.
    """
    if kernel_config is not None:
        yield from configured(kernel_config)
    layers = (FUSED_LAYER, LAYER)
    if folder := os.environ.get(FOLDER_VARIABLE):
        yield (
            folder,
            {layer: LocalLayerRepository(Path(folder).resolve(), layer_name=layer) for layer in layers},
        )
    if device_type in ("cpu", "cuda"):
        yield HUB_REPOSITORY, {layer: hub_repository(layer) for layer in layers}
    if device_type == "cuda":
        repository = LayerRepository(DEFAULT_REPOSITORY, layer_name=LAYER, version=DEFAULT_VERSION)
        yield DEFAULT_REPOSITORY, {LAYER: repository}


def hub_repository(layer: str) -> Any:
    """The project's kernel on the Hub; that the user asks for kernels is the word that it may be loaded."""
    return LayerRepository(HUB_REPOSITORY, layer_name=layer, version=HUB_VERSION, trust_remote_code=[HUB_REPOSITORY])


def configured(kernel_config: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a `KernelConfig` says about these layers: "repo/id:Layer", or "/path:Layer"."""
    for layer, source in kernel_config.kernel_mapping.items():
        if layer not in (FUSED_LAYER, LAYER):
            raise ValueError(
                f"The `KernelConfig` has a kernel for {layer!r}; this model has {FUSED_LAYER} and {LAYER}."
            )
        source, options = source if isinstance(source, tuple) else (source, {"version": 1})
        place, separator, name = source.rpartition(":") if isinstance(source, str) else ("", "", "")
        if not separator:
            raise ValueError(
                f"The kernel for {layer} must be given as 'repo/id:Layer' or '/path:Layer', not {source!r}."
            )
        if kernel_config.use_local_kernel or Path(place).is_dir():
            yield place, {layer: LocalLayerRepository(Path(place).resolve(), layer_name=name)}
        else:
            yield place, {layer: LayerRepository(place, layer_name=name, **options)}


def modules_named(model: nn.Module, layer_name: str) -> list[nn.Module]:
    """The modules that were decorated with this name."""
    return [module for module in model.modules() if getattr(type(module), "kernel_layer_name", None) == layer_name]


if kernelize is not None:  # for those who call `kernelize` themselves; loads nothing
    register_kernel_mapping({FUSED_LAYER: {device: hub_repository(FUSED_LAYER) for device in ("cpu", "cuda")}})
