"""Builds the models that a benchmark compares, with random weights: the cost of a step does not depend on them."""

import math
from typing import Any

import torch
from transformers import (
    EomtConfig,
    EomtForUniversalSegmentation,
    EomtImageProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessor,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessor,
    PreTrainedModel,
    ResNetConfig,
    SwinConfig,
)

from proscale_hf.benchmarking.workload import Candidate, Workload
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.image_processing_proscale_mask2former import ProScaleMask2FormerImageProcessor
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation


def build(candidate: Candidate, workload: Workload) -> tuple[PreTrainedModel, Any]:
    """
    Build one model.

    Args:
        candidate: which model, with which backend.
        workload: its size, and the device that it runs on.

    Returns:
        The model, on its device and in its type (float32 in training), and its image processor.
    """
    torch.manual_seed(0)
    build_model = {"mask2former": _mask2former, "maskformer": _maskformer, "eomt": _eomt}.get(candidate.model, _ours)
    model, processor = build_model(candidate, workload)
    training = workload.mode == "training"
    dtype = torch.float32 if training else getattr(torch, candidate.dtype)
    model = model.to(workload.device, dtype).train(training)
    if "kernel" in candidate.backend:
        model.set_use_kernels(True)
    if "compile" in candidate.backend:
        model.compile()
    return model, processor


def _size(workload: Workload) -> dict[str, int]:
    if workload.mixed:
        edges = sorted((workload.height, workload.width))
        return {"shortest_edge": edges[0], "longest_edge": edges[1]}
    return {"height": workload.height, "width": workload.width}


def _backbone(workload: Workload) -> SwinConfig | ResNetConfig:
    stages = ["stage1", "stage2", "stage3", "stage4"]
    if workload.backbone == "resnet-50":
        return ResNetConfig(out_features=stages)
    return SwinConfig(
        depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7, drop_path_rate=0.3, out_features=stages
    )


def _ours(candidate: Candidate, workload: Workload) -> tuple[PreTrainedModel, Any]:
    changes = {"encoder": "mask2former", "token_recalibration": "none", "pixel_embedding": "conv"}
    config = ProScaleMask2FormerConfig(
        backbone_config=_backbone(workload),
        encoder_stage_layers=workload.stages,
        num_labels=workload.labels,
        num_queries=workload.queries,
        **(changes if candidate.model == "proscale-mask2former" else {}),
    )
    processor = ProScaleMask2FormerImageProcessor(
        size=_size(workload), label_ids_to_fuse=sorted(workload.stuff_label_ids)
    )
    return ProScaleMask2FormerForUniversalSegmentation(config), processor


def _mask2former(candidate: Candidate, workload: Workload) -> tuple[PreTrainedModel, Any]:
    config = Mask2FormerConfig(
        backbone_config=_backbone(workload), num_labels=workload.labels, num_queries=workload.queries
    )
    return Mask2FormerForUniversalSegmentation(config), Mask2FormerImageProcessor(size=_size(workload))


def _maskformer(candidate: Candidate, workload: Workload) -> tuple[PreTrainedModel, Any]:
    config = MaskFormerConfig(backbone_config=_backbone(workload), num_labels=workload.labels)
    config.decoder_config.num_queries = workload.queries
    return MaskFormerForInstanceSegmentation(config), MaskFormerImageProcessor(size=_size(workload))


def _eomt(candidate: Candidate, workload: Workload) -> tuple[PreTrainedModel, Any]:
    config = EomtConfig(
        num_labels=workload.labels,
        num_queries=workload.queries,
        patch_size=16,
        image_size=16 * round(math.sqrt(workload.height * workload.width) / 16),
    )
    size = {"shortest_edge": config.image_size, "longest_edge": config.image_size}
    return EomtForUniversalSegmentation(config), EomtImageProcessor(size=size, do_pad=True)
