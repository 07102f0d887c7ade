"""Train a new backbone to name each pixel's class on the demo scenes, before it trains in a segmentation model.

Segmentation models start from backbones that were trained to classify. Without that, a small model takes long to tell
the ten digits apart. This takes two minutes.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import nn
from transformers import AutoBackbone, PreTrainedConfig, Trainer, TrainingArguments

from demo_scenes import ID2LABEL, STUFF_LABEL_IDS, DemoScenes, Scene


IGNORED = -100
PRETRAINING_ARGUMENTS = {
    "learning_rate": 2e-3,
    "per_device_train_batch_size": 16,
    "eval_strategy": "no",
    "save_strategy": "no",
}
STUFF_WEIGHT = 0.1  # there are about ten times as many pixels of stuff


class PixelClassifier(nn.Module):
    """A backbone with a linear classifier of pixels on each of its maps."""

    def __init__(self, backbone_config: PreTrainedConfig):
        super().__init__()
        self.backbone = AutoBackbone.from_config(backbone_config)
        self.heads = nn.ModuleList(nn.Conv2d(channels, len(ID2LABEL), 1) for channels in self.backbone.channels)
        weights = torch.ones(len(ID2LABEL))
        weights[STUFF_LABEL_IDS] = STUFF_WEIGHT
        self.loss = nn.CrossEntropyLoss(weights, ignore_index=IGNORED)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Loss of `pixel_values` (batch, 3, height, width) for `labels` (batch, height / 4, width / 4) int64."""
        feature_maps = self.backbone(pixel_values).feature_maps
        logits = [
            nn.functional.interpolate(head(feature_map), size=labels.shape[-2:], mode="bilinear")
            for head, feature_map in zip(self.heads, feature_maps, strict=True)
        ]
        return {"loss": sum(self.loss(level_logits, labels) for level_logits in logits)}


def pretrain_backbone(
    config: PreTrainedConfig, collate_scenes, training_arguments: TrainingArguments, scenes: DemoScenes
) -> dict[str, torch.Tensor]:
    """Train a backbone to classify the pixels of scenes; returns its weights.

    `collate_scenes` makes `pixel_values`, `mask_labels` and `class_labels` of a list of scenes.
    """
    classifier = PixelClassifier(config)
    trainer = Trainer(
        model=classifier,
        args=replace(training_arguments, **PRETRAINING_ARGUMENTS),
        train_dataset=scenes,
        data_collator=partial(collate_pixels, collate_scenes=collate_scenes),
    )
    trainer.train()
    return classifier.backbone.state_dict()


def collate_pixels(scenes: list[Scene], collate_scenes) -> dict[str, torch.Tensor]:
    """`pixel_values` (batch, 3, height, width), and `labels` of every fourth pixel, without padding."""
    batch = collate_scenes(scenes)
    batch_size, _, height, width = batch["pixel_values"].shape
    labels = torch.full((batch_size, height, width), IGNORED)
    for image_labels, masks, class_labels in zip(labels, batch["mask_labels"], batch["class_labels"], strict=True):
        for mask, label_id in zip(masks, class_labels, strict=True):
            image_labels[mask == 1] = label_id
    return {"pixel_values": batch["pixel_values"], "labels": labels[:, 2::4, 2::4]}
