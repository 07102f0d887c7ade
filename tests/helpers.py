"""Tiny models and labels for the tests."""

from typing import Any

import torch
from torch import nn

from proscale_hf import (
    ProScaleDinoConfig,
    ProScaleDinoForObjectDetection,
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
)


TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "num_heads": [1, 2, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "bottleneck",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
FOUR_LEVELS = {
    "feature_size": 64,  # groups of more than one channel, for the norm of a coarsest map of one token
    "encoder_stage_layers": (3, 3, 3, 3),
    "feature_strides": (4, 8, 16, 32, 64),
    "backbone_config": {
        **TINY_RESNET,
        "hidden_sizes": [8, 16, 24, 32, 32],
        "depths": [1, 1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4", "stage5"],
    },
}


def tiny_config(**changes: Any) -> ProScaleMask2FormerConfig:
    """A configuration with three stages, five predictions and four classes."""
    settings = {
        "backbone_config": dict(TINY_SWIN),
        "encoder_stage_layers": (1, 2, 1),
        "encoder_layers": 2,
        "encoder_feedforward_dim": 48,
        "feature_size": 32,
        "mask_feature_size": 16,
        "hidden_dim": 32,
        "num_attention_heads": 4,
        "dim_feedforward": 48,
        "decoder_layers": 5,
        "num_queries": 7,
        "train_num_points": 64,
        "num_labels": 4,
        **changes,
    }
    return ProScaleMask2FormerConfig(**settings)


def tiny_model(seed: int = 0, **changes: Any) -> ProScaleMask2FormerForUniversalSegmentation:
    """A model in evaluation mode, with weights so far from their initial values that every part has an effect."""
    torch.manual_seed(seed)
    return shaken(ProScaleMask2FormerForUniversalSegmentation(tiny_config(**changes)))


def shaken(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with noise added to its weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def tiny_detection_config(**changes: Any) -> ProScaleDinoConfig:
    """A configuration with four levels, three decoder layers and four classes."""
    settings = {
        "backbone_config": {**TINY_RESNET, "out_features": ["stage2", "stage3", "stage4"]},
        "encoder_stage_layers": (1, 1, 2, 1),
        "encoder_layers": 2,
        "encoder_feedforward_dim": 48,
        "feature_size": 64,  # groups of more than one channel, for the norm of a coarsest map of one token
        "num_attention_heads": 4,
        "decoder_layers": 3,
        "decoder_feedforward_dim": 48,
        "num_queries": 9,
        "num_denoising": 6,
        "num_labels": 4,
        **changes,
    }
    return ProScaleDinoConfig(**settings)


def tiny_detector(seed: int = 0, **changes: Any) -> ProScaleDinoForObjectDetection:
    """As `tiny_model`, for detection."""
    torch.manual_seed(seed)
    return shaken(ProScaleDinoForObjectDetection(tiny_detection_config(**changes)))


def pixels(batch: int = 2, height: int = 64, width: int = 96, seed: int = 1) -> torch.Tensor:
    """(batch, 3, height, width) noise."""
    return torch.randn((batch, 3, height, width), generator=torch.Generator().manual_seed(seed))


def labels(
    objects: tuple[int, ...] = (3, 1), height: int = 64, width: int = 96, num_labels: int = 4, seed: int = 2
) -> dict[str, list[torch.Tensor]]:
    """Rectangles with random classes, `objects[i]` of them in image i."""
    generator = torch.Generator().manual_seed(seed)
    mask_labels, class_labels = [], []
    for number in objects:
        masks = torch.zeros((number, height, width), dtype=torch.uint8)
        for mask in masks:
            top = int(torch.randint(0, height - 16, (), generator=generator))
            left = int(torch.randint(0, width - 16, (), generator=generator))
            mask[top : top + 16, left : left + 16] = 1
        mask_labels.append(masks)
        class_labels.append(torch.randint(0, num_labels, (number,), generator=generator))
    return {"mask_labels": mask_labels, "class_labels": class_labels}


def detection_labels(
    objects: tuple[int, ...] = (3, 1), num_labels: int = 4, seed: int = 2
) -> list[dict[str, torch.Tensor]]:
    """Boxes inside the image with random classes, `objects[i]` of them in image i."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for number in objects:
        sizes = 0.1 + 0.3 * torch.rand((number, 2), generator=generator)
        centres = sizes / 2 + (1 - sizes) * torch.rand((number, 2), generator=generator)
        classes = torch.randint(0, num_labels, (number,), generator=generator)
        labels.append({"class_labels": classes, "boxes": torch.cat((centres, sizes), dim=1)})
    return labels


def as_products(mask_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(predictions, batch, queries, height, width) logits as products of mask embeddings with a per-pixel embedding."""
    predictions, batch, queries = mask_logits.shape[:3]
    embeddings = torch.eye(predictions * queries).view(predictions, 1, queries, -1).repeat(1, batch, 1, 1)
    return embeddings.to(mask_logits.dtype), mask_logits.transpose(0, 1).flatten(1, 2)
