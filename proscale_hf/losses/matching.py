"""Bipartite matching (DETR, https://arxiv.org/abs/2005.12872, section 3.1): each object gets a query of its own.

What a pairing costs is a sum of terms, one object of this file or of a family's for each, and is made where the tensors
are. The costs of all predictions and images go to the host in one transfer, where the assignment is found.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers.utils import logging

from proscale_hf.layers.boxes import to_corners
from proscale_hf.layers.linear import linear
from proscale_hf.losses.boxes import generalized_iou
from proscale_hf.losses.point_sampling import mask_products, row_parts, sample_labels, sample_shared


logger = logging.get_logger(__name__)

LOG_EPSILON = 1e-8  # keeps logarithms of probabilities finite
UNMATCHABLE = 1e6  # cost in place of a NaN or an infinity: matched last, but never infeasible


class ImagePredictions(NamedTuple):
    """All predictions of one image; those that a model does not make are None, and no term of its cost reads them.

    Attributes:
        class_logits: (predictions, queries, classes).
        mask_embeddings: (predictions, queries, channels).
        mask_features: (channels, height, width), the per-pixel embedding.
        boxes: (predictions, queries, 4), centre and size as shares of the image.
    """

    class_logits: torch.Tensor
    mask_embeddings: torch.Tensor | None = None
    mask_features: torch.Tensor | None = None
    boxes: torch.Tensor | None = None


class ImageObjects(NamedTuple):
    """The objects of one image; None is what a model does not learn.

    Attributes:
        class_labels: (objects,) int64.
        planes: (planes, height, width) uint8, their masks, see `packed_masks.py`.
        extent: (2,), the share of height and width that is image.
        boxes: (objects, 4), centre and size as shares of the image.
    """

    class_labels: torch.Tensor
    planes: torch.Tensor | None = None
    extent: torch.Tensor | None = None
    boxes: torch.Tensor | None = None


CostTerm = Callable[[ImagePredictions, ImageObjects], torch.Tensor]  # (predictions, queries, objects) float32


class ClassCost:
    """The negative probability of the object's class.

    Args:
        weight: of the term.
        num_labels: classes, without "no object".
    """

    def __init__(self, weight: float, num_labels: int):
        self.weight = weight
        self.num_labels = num_labels

    def __call__(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """See `CostTerm`."""
        classes = objects.class_labels.clamp(0, self.num_labels - 1)  # [`Matcher`] refuses wrong ones on the host
        return -self.weight * predictions.class_logits.softmax(-1)[..., classes]


class MaskCost:
    """Binary cross-entropy and dice loss of masks, at random points that all queries and objects share.

    Args:
        mask_weight: of the cross-entropy.
        dice_weight: of the dice loss.
        num_points: how many.
    """

    def __init__(self, mask_weight: float, dice_weight: float, num_points: int):
        self.mask_weight = mask_weight
        self.dice_weight = dice_weight
        self.num_points = num_points

    def __call__(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """See `CostTerm`."""
        embeddings, features = predictions.mask_embeddings, predictions.mask_features
        points = torch.rand((self.num_points, 2), device=features.device) * objects.extent.flip(0)
        inside, counted = sample_labels(objects.planes, len(objects.class_labels), points)
        costs = []
        for rows in row_parts(embeddings.flatten(0, 1), self.num_points):
            logits = sample_shared(mask_products(rows, features), points)
            probabilities = logits.sigmoid()
            # binary cross-entropy: softplus(x) - x * target, summed over points as matrix products
            cross_entropy = (nn.functional.softplus(logits) @ counted).unsqueeze(1) - linear(logits, inside)
            overlap = 2 * linear(probabilities, inside)
            dice = 1 - (overlap + 1) / ((probabilities @ counted).unsqueeze(1) + inside.sum(1) + 1)
            costs.append(self.mask_weight * cross_entropy / counted.sum().clamp(min=1) + self.dice_weight * dice)
        return torch.cat(costs).view(*embeddings.shape[:2], -1)


class FocalClassCost:
    """How the focal loss of the object's class would change if the query had the object (Deformable DETR).

    Args:
        weight: of the term.
        num_labels: classes.
        alpha: of the focal loss, the weight of an object; 1 - alpha is that of "none".
        gamma: of the focal loss.
    """

    def __init__(self, weight: float, num_labels: int, alpha: float, gamma: float):
        self.weight = weight
        self.num_labels = num_labels
        self.alpha = alpha
        self.gamma = gamma

    def __call__(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """See `CostTerm`."""
        classes = objects.class_labels.clamp(0, self.num_labels - 1)  # [`Matcher`] refuses wrong ones on the host
        probabilities = predictions.class_logits[..., classes].sigmoid()
        with_object = self.alpha * (1 - probabilities) ** self.gamma * -(probabilities + LOG_EPSILON).log()
        without = (1 - self.alpha) * probabilities**self.gamma * -(1 - probabilities + LOG_EPSILON).log()
        return self.weight * (with_object - without)


class BoxCost:
    """The sum of the differences between the four numbers of two boxes.

    Args:
        weight: of the term.
    """

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """See `CostTerm`."""
        return self.weight * (predictions.boxes[:, :, None] - objects.boxes).abs().sum(-1)


class GIoUCost:
    """The negative generalised intersection over union of two boxes.

    Args:
        weight: of the term.
    """

    def __init__(self, weight: float):
        self.weight = weight

    def __call__(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """See `CostTerm`."""
        return -self.weight * generalized_iou(to_corners(predictions.boxes)[:, :, None], to_corners(objects.boxes))


class Matcher:
    """Gives each object a query, for each prediction, at the least total cost.

    Args:
        terms: of the cost, which is their sum.
        num_labels: classes, without "no object".

    Attributes:
        non_finite_costs: how many costs were NaN or infinite so far, in this process.
    """

    def __init__(self, terms: Sequence[CostTerm], num_labels: int):
        self.terms = terms
        self.num_labels = num_labels
        self.non_finite_costs = 0

    @torch.no_grad()
    def __call__(self, predictions: Sequence[ImagePredictions], objects: Sequence[ImageObjects]) -> list[torch.Tensor]:
        """
        Args:
            predictions: of each image.
            objects: of each image.

        Returns:
            Per image (3, matches) int64: prediction, query and object of each match.

        Raises:
            ValueError: a class that the model does not have.
        """
        costs = [self.cost(*image) for image in zip(predictions, objects, strict=True)]
        classes = torch.cat([image.class_labels for image in objects])  # checked on the host, so they travel along
        on_host = torch.cat([*(cost.flatten() for cost in costs), classes.float()]).cpu()
        all_costs, classes_on_host = on_host.tensor_split([len(on_host) - len(classes)])
        self.check_classes(classes_on_host)
        self.replace_non_finite(all_costs)
        matches = []
        for cost, flat in zip(costs, all_costs.split([cost.numel() for cost in costs]), strict=True):
            triples = [
                torch.stack((torch.full((len(queries),), prediction), *map(torch.as_tensor, (queries, matched))))
                for prediction, matrix in enumerate(flat.view(cost.shape).numpy())
                for queries, matched in [linear_sum_assignment(matrix)]
            ]
            matches.append(torch.cat(triples, dim=1))
        lengths = [match.shape[1] for match in matches]
        return list(torch.cat(matches, dim=1).to(classes.device).split(lengths, dim=1))

    def cost(self, predictions: ImagePredictions, objects: ImageObjects) -> torch.Tensor:
        """(predictions, queries, objects) float32: what it costs to give each query each object of one image."""
        return sum(term(predictions, objects) for term in self.terms)

    def check_classes(self, classes: torch.Tensor) -> None:
        """Refuse classes that the model does not have.

        Raises:
            ValueError: see there.
        """
        wrong = classes[(classes < 0) | (classes >= self.num_labels)].int().unique().tolist()
        if wrong:
            raise ValueError(
                f"`class_labels` holds {wrong}, but this model has classes 0 to {self.num_labels - 1}; "
                "check `num_labels` or `id2label` of its configuration."
            )

    def replace_non_finite(self, costs: torch.Tensor) -> None:
        """Give costs that are NaN or infinite the value `UNMATCHABLE`, in place; count them, and warn of the first."""
        non_finite = costs.numel() - int(costs.isfinite().sum())
        if non_finite and not self.non_finite_costs:
            logger.warning(
                f"{non_finite} of {costs.numel()} matching costs are NaN or infinite: the predictions are, or float32 "
                "overflows. Their queries are matched last. `criterion.matcher.non_finite_costs` goes on counting."
            )
        self.non_finite_costs += non_finite
        costs.nan_to_num_(nan=UNMATCHABLE, posinf=UNMATCHABLE, neginf=UNMATCHABLE)
