"""Losses of DINO (https://arxiv.org/abs/2203.03605): focal loss of classes, differences and overlap of boxes.

There is no class "no object": each class has a probability of its own, and a query without an object should have none.
All predictions are matched at once, the two-stage one, from tokens, among them. Denoising queries know their objects.
With several processes, all divide by the same number of objects.
"""

from typing import NamedTuple

import torch
from torch import nn

from proscale_hf.losses.boxes import matched_box_losses
from proscale_hf.losses.matching import (
    BoxCost,
    FocalClassCost,
    GIoUCost,
    ImageObjects,
    ImagePredictions,
    Matcher,
)
from proscale_hf.losses.totals import sum_over_processes


FOCAL_GAMMA = 2.0
TWO_STAGE, DENOISING = "_interm", "_dn"  # behind the names of their terms, as in the original


class Detections(NamedTuple):
    """
    Attributes:
        logits: (predictions, batch, queries, classes).
        boxes: (predictions, batch, queries, 4), centre and size as shares of the image.
    """

    logits: torch.Tensor
    boxes: torch.Tensor


class DenoisingTargets(NamedTuple):
    """What denoising queries should find.

    Attributes:
        matches: per image (2, matches) int64, query and object.
        groups: how many queries each object has.
    """

    matches: list[torch.Tensor]
    groups: int


class DetectionLoss(nn.Module):
    """Bipartite matching, then focal loss on classes, and L1 and generalised IoU loss on boxes.

    Args:
        num_labels: classes.
        class_cost, bbox_cost, giou_cost: weights of the matching's terms.
        class_weight, bbox_weight, giou_weight: weights of the losses.
        two_stage_weight: factor for the losses of the two-stage prediction.
        focal_alpha: weight of an object in the focal loss; 1 - alpha is that of "none".
    """

    def __init__(
        self,
        num_labels: int,
        class_cost: float,
        bbox_cost: float,
        giou_cost: float,
        class_weight: float,
        bbox_weight: float,
        giou_weight: float,
        two_stage_weight: float,
        focal_alpha: float,
    ):
        super().__init__()
        self.weights = {"loss_ce": class_weight, "loss_bbox": bbox_weight, "loss_giou": giou_weight}
        self.two_stage_weight = two_stage_weight
        self.focal_alpha = focal_alpha
        self.matcher = Matcher(
            [
                FocalClassCost(class_cost, num_labels, focal_alpha, FOCAL_GAMMA),
                BoxCost(bbox_cost),
                GIoUCost(giou_cost),
            ],
            num_labels,
        )

    @property
    def non_finite_costs(self) -> int:
        """How many matching costs were NaN or infinite so far, in this process."""
        return self.matcher.non_finite_costs

    def weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """() the training loss: each term of [`forward`] times its weight."""
        return sum(
            weight * (self.two_stage_weight if key.endswith(TWO_STAGE) else 1) * value
            for name, weight in self.weights.items()
            for key, value in losses.items()
            if key.startswith(name)
        )

    def forward(
        self,
        detections: Detections,
        two_stage: Detections,
        class_labels: list[torch.Tensor],
        boxes: list[torch.Tensor],
        denoising: Detections | None = None,
        denoising_targets: DenoisingTargets | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            detections: the decoder's predictions, first to last.
            two_stage: the one prediction from tokens, with as many queries.
            class_labels: per image (objects,) integers.
            boxes: per image (objects, 4), centre and size as shares of the image.
            denoising: the predictions of denoising queries, first to last.
            denoising_targets: what these should find.

        Returns:
            Unweighted terms `loss_ce`, `loss_bbox` and `loss_giou` of the last prediction, of the earlier ones with
            `_0`, `_1`, ... behind the name, of the two-stage one with `_interm`, and of denoising queries with `_dn`,
            `_dn_0`, ...

        Raises:
            ValueError: a class that the model does not have.
        """
        device = detections.logits.device
        class_labels = [classes.to(device, torch.int64) for classes in class_labels]
        with torch.autocast(device_type=device.type, enabled=False):
            boxes = [image_boxes.to(device, torch.float32) for image_boxes in boxes]
            totals, processes = sum_over_processes(torch.tensor(float(sum(map(len, class_labels))), device=device))
            num_boxes = totals.clamp(min=1) / processes
            matched = Detections(*(torch.cat(parts).float() for parts in zip(two_stage, detections, strict=True)))
            terms = self.terms(matched, class_labels, boxes, self.match(matched, class_labels, boxes))
            earlier = [f"_{i}" for i in range(len(detections.logits) - 1)]
            losses = named(terms / num_boxes, [TWO_STAGE, *earlier, ""])
            if denoising is not None:
                count = len(denoising.logits)
                matches = [for_each_prediction(pairs, count) for pairs in denoising_targets.matches]
                terms = self.terms(Detections(*(part.float() for part in denoising)), class_labels, boxes, matches)
                suffixes = [f"{DENOISING}{suffix}" for suffix in (*earlier, "")]
                losses |= named(terms / (num_boxes * denoising_targets.groups), suffixes)
        return losses

    @torch.no_grad()
    def match(
        self, detections: Detections, class_labels: list[torch.Tensor], boxes: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """What [`Matcher`] returns for all predictions."""
        predictions = [
            ImagePredictions(logits, boxes=predicted)
            for logits, predicted in zip(detections.logits.unbind(1), detections.boxes.unbind(1), strict=True)
        ]
        objects = [
            ImageObjects(classes, boxes=image_boxes) for classes, image_boxes in zip(class_labels, boxes, strict=True)
        ]
        return self.matcher(predictions, objects)

    def terms(
        self,
        detections: Detections,
        class_labels: list[torch.Tensor],
        boxes: list[torch.Tensor],
        matches: list[torch.Tensor],
    ) -> torch.Tensor:
        """(3, predictions): losses of classes, differences and overlap, summed over the batch.

        Args:
            detections: all predictions.
            class_labels: per image (objects,) int64.
            boxes: per image (objects, 4).
            matches: per image (3, matches) int64, prediction, query and object, see [`Matcher`].
        """
        predictions, queries, objects = torch.cat(matches, dim=1)
        lengths = torch.tensor([match.shape[1] for match in matches], device=queries.device)
        sizes = torch.tensor([len(classes) for classes in class_labels], device=queries.device)
        total = queries.shape[0]
        images = torch.arange(len(matches), device=queries.device).repeat_interleave(lengths, output_size=total)
        objects = objects + (sizes.cumsum(0) - sizes)[images]  # among those of all images
        targets = torch.zeros_like(detections.logits)
        targets[predictions, images, queries, torch.cat(class_labels)[objects]] = 1
        class_loss = focal_loss(detections.logits, targets, self.focal_alpha).flatten(1).sum(1)
        box_losses = matched_box_losses(detections.boxes[predictions, images, queries], torch.cat(boxes)[objects])
        per_prediction = box_losses.new_zeros((2, len(detections.logits))).index_add(1, predictions, box_losses)
        return torch.cat((class_loss[None], per_prediction))


def focal_loss(logits: torch.Tensor, targets: torch.Tensor, alpha: float) -> torch.Tensor:
    """
    Binary cross-entropy that counts less where it is small (https://arxiv.org/abs/1708.02002).

    Args:
        logits: of any shape.
        targets: of the same shape and type, 0 or 1.
        alpha: weight of the ones; 1 - alpha is that of the zeros.

    Returns:
        The loss of each number.
    """
    cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    probabilities = logits.sigmoid()
    wrong = probabilities + targets - 2 * probabilities * targets  # 1 - the probability of the target
    return (1 - alpha + (2 * alpha - 1) * targets) * wrong**FOCAL_GAMMA * cross_entropy


def for_each_prediction(pairs: torch.Tensor, predictions: int) -> torch.Tensor:
    """(2, matches) query and object -> (3, predictions * matches) prediction, query and object."""
    number = torch.arange(predictions, device=pairs.device).repeat_interleave(pairs.shape[1])
    return torch.cat((number[None], pairs.repeat(1, predictions)))


def named(terms: torch.Tensor, suffixes: list[str]) -> dict[str, torch.Tensor]:
    """(3, predictions) terms by name, the last prediction's first."""
    names = ("loss_ce", "loss_bbox", "loss_giou")
    order = [*reversed(range(len(suffixes)))]
    return {f"{name}{suffixes[i]}": terms[row, i] for i in order for row, name in enumerate(names)}
