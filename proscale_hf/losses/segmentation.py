"""Matching and losses of Mask2Former (https://arxiv.org/abs/2112.01527, section 3.3), for all predictions at once.

Masks are compared at random points only, where the labels are read from packed masks (`packed_masks.py`). Void pixels
count in neither matching nor loss: a point counts if all four pixels around it are labelled. With `mask_padding`,
points lie in the image alone. Everything is computed in float32, masks are made from their embeddings part by part, and
the costs of all predictions and images go to the host in one transfer. With several processes, all divide by the same
totals, so that the mean of their gradients is the gradient of the joint batch.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers.utils import logging

from proscale_hf.layers.linear import linear
from proscale_hf.losses.masks import Points, matched_mask_losses
from proscale_hf.losses.point_sampling import in_parts, mask_products, sample_labels, sample_shared
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig


logger = logging.get_logger(__name__)

UNMATCHABLE = 1e6  # cost in place of a NaN or an infinity: matched last, but never infeasible


class UniversalSegmentationLoss(nn.Module):
    """Bipartite matching, then cross-entropy on classes and binary cross-entropy and dice on masks.

    Args:
        config: the model's configuration.

    Attributes:
        non_finite_costs: how many matching costs were NaN or infinite so far, in this process.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        self.config = config
        self.non_finite_costs = 0
        self.register_buffer("empty_weight", self.initial_empty_weight())

    def initial_empty_weight(self) -> torch.Tensor:
        """(num_labels + 1,) class weights: 1, and `no_object_weight` for "no object"."""
        weight = torch.ones(self.config.num_labels + 1)
        weight[-1] = self.config.no_object_weight
        return weight

    def forward(
        self,
        class_logits: torch.Tensor,
        mask_embeddings: torch.Tensor,
        mask_features: torch.Tensor,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        image_extents: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            class_logits: (predictions, batch, queries, num_labels + 1).
            mask_embeddings: (predictions, batch, queries, channels).
            mask_features: (batch, channels, height, width), the per-pixel embedding; its products with the mask
                embeddings are the masks' logits.
            packed_masks: per image (planes, H, W) uint8, the objects' masks as `packed_masks.py` packs them.
            class_labels: per image (objects,) integers.
            image_extents: (batch, 2), share of the height and width that is image; everything if None.

        Returns:
            Unweighted terms `loss_cross_entropy`, `loss_mask` and `loss_dice` of the last prediction, and of the
            earlier ones with `_0`, `_1`, ... behind the name.

        Raises:
            ValueError: a class that the model does not have.
        """
        device = class_logits.device
        packed_masks = [planes.to(device) for planes in packed_masks]
        class_labels = [classes.to(device, torch.int64) for classes in class_labels]
        if image_extents is None:
            image_extents = torch.ones((len(class_labels), 2), device=device)

        dtype = mask_features.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        masks = mask_embeddings.to(dtype), mask_features.to(dtype)
        with torch.autocast(device_type=device.type, enabled=False):
            class_logits = class_logits.float()
            matches = self.match(class_logits, *masks, packed_masks, class_labels, image_extents)
            targets = self.class_targets(class_logits, class_labels, matches)
            weight = self.empty_weight.float()[targets].flatten(1).sum(1)
            num_masks, weight = totals_per_process(sum(map(len, class_labels)), weight)
            cross_entropy = self.class_loss(class_logits, targets) / weight
            mask, dice = self.mask_losses(*masks, packed_masks, class_labels, matches, image_extents) / num_masks
        terms = {"loss_cross_entropy": cross_entropy, "loss_mask": mask, "loss_dice": dice}
        last = class_logits.shape[0] - 1
        losses = {name: values[last] for name, values in terms.items()}
        losses.update({f"{name}_{i}": values[i] for i in range(last) for name, values in terms.items()})
        return losses

    @torch.no_grad()
    def match(
        self,
        class_logits: torch.Tensor,
        mask_embeddings: torch.Tensor,
        mask_features: torch.Tensor,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        image_extents: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Assign each object a query of its own, for each prediction, at the least total cost.

        Returns:
            Per image (3, matches) int64: prediction, query and object of each match.

        Raises:
            ValueError: a class that the model does not have.
        """
        costs = [
            self.matching_cost(
                class_logits[:, i],
                mask_embeddings[:, i],
                mask_features[i],
                packed_masks[i],
                class_labels[i],
                image_extents[i],
            )
            for i in range(class_logits.shape[1])
        ]
        classes = torch.cat(class_labels)  # checked on the host, so they travel along
        on_host = torch.cat([*(cost.flatten() for cost in costs), classes.float()]).cpu()
        all_costs, classes = on_host.tensor_split([len(on_host) - len(classes)])
        self.check_classes(classes)
        self.replace_non_finite(all_costs)
        matches = []
        for cost, flat in zip(costs, all_costs.split([cost.numel() for cost in costs]), strict=True):
            triples = [
                torch.stack((torch.full((len(queries),), prediction), *map(torch.as_tensor, (queries, objects))))
                for prediction, matrix in enumerate(flat.view(cost.shape).numpy())
                for queries, objects in [linear_sum_assignment(matrix)]
            ]
            matches.append(torch.cat(triples, dim=1))
        return list(torch.cat(matches, dim=1).to(class_logits.device).split([m.shape[1] for m in matches], dim=1))

    def check_classes(self, classes: torch.Tensor) -> None:
        """Refuse classes that the model does not have.

        Raises:
            ValueError: see there.
        """
        num_labels = self.config.num_labels
        wrong = classes[(classes < 0) | (classes >= num_labels)].int().unique().tolist()
        if wrong:
            raise ValueError(
                f"`class_labels` holds {wrong}, but this model has classes 0 to {num_labels - 1}; "
                "check `num_labels` or `id2label` of its configuration."
            )

    def replace_non_finite(self, costs: torch.Tensor) -> None:
        """Give costs that are NaN or infinite the value `UNMATCHABLE`, in place; count them, and warn of the first."""
        non_finite = costs.numel() - int(costs.isfinite().sum())
        if non_finite and not self.non_finite_costs:
            logger.warning(
                f"{non_finite} of {costs.numel()} matching costs are NaN or infinite: the predictions are, or float32 "
                "overflows; these queries are matched last. `criterion.non_finite_costs` goes on counting."
            )
        self.non_finite_costs += non_finite
        costs.nan_to_num_(nan=UNMATCHABLE, posinf=UNMATCHABLE, neginf=UNMATCHABLE)

    def matching_cost(
        self,
        class_logits: torch.Tensor,
        mask_embeddings: torch.Tensor,
        mask_features: torch.Tensor,
        planes: torch.Tensor,
        class_labels: torch.Tensor,
        image_extent: torch.Tensor,
    ) -> torch.Tensor:
        """Cost of giving each query each object, in one image.

        Args:
            class_logits: (predictions, queries, num_labels + 1).
            mask_embeddings: (predictions, queries, channels).
            mask_features: (channels, height, width).
            planes: (planes, H, W).
            class_labels: (objects,).
            image_extent: (2,).

        Returns:
            (predictions, queries, objects) float32.
        """
        config = self.config
        predictions, queries = class_logits.shape[:2]
        points = torch.rand((config.train_num_points, 2), device=class_logits.device) * image_extent.flip(0)
        inside, counted = sample_labels(planes, len(class_labels), points)

        mask_costs = []
        for embeddings in in_parts(mask_embeddings.flatten(0, 1), config.train_num_points):
            logits = sample_shared(mask_products(embeddings, mask_features), points)
            probabilities = logits.sigmoid()
            # binary cross-entropy: softplus(x) - x * target, summed over points as matrix products
            cross_entropy = (nn.functional.softplus(logits) @ counted).unsqueeze(1) - linear(logits, inside)
            overlap = 2 * linear(probabilities, inside)
            dice = 1 - (overlap + 1) / ((probabilities @ counted).unsqueeze(1) + inside.sum(1) + 1)
            mask_costs.append(
                config.mask_weight * cross_entropy / counted.sum().clamp(min=1) + config.dice_weight * dice
            )
        classes = class_labels.clamp(0, config.num_labels - 1)  # `match` refuses wrong ones when it is on the host
        cost_class = -class_logits.softmax(-1)[..., classes]  # (predictions, queries, objects)
        return torch.cat(mask_costs).view(predictions, queries, -1) + config.class_weight * cost_class

    def class_targets(
        self, class_logits: torch.Tensor, class_labels: list[torch.Tensor], matches: list[torch.Tensor]
    ) -> torch.Tensor:
        """(predictions, batch, queries) int64 classes; queries without an object should say "no object"."""
        targets = torch.full(class_logits.shape[:3], self.config.num_labels, device=class_logits.device)
        for i, (labels, (prediction, query, target)) in enumerate(zip(class_labels, matches, strict=True)):
            targets[prediction, i, query] = labels[target]
        return targets

    def class_loss(self, class_logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(predictions,) weighted cross-entropy, summed over the queries of all images."""
        losses = nn.functional.cross_entropy(
            class_logits.flatten(0, 2), targets.flatten(), weight=self.empty_weight.float(), reduction="none"
        )
        return losses.view(len(class_logits), -1).sum(1)

    def mask_losses(
        self,
        mask_embeddings: torch.Tensor,
        mask_features: torch.Tensor,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        matches: list[torch.Tensor],
        image_extents: torch.Tensor,
    ) -> torch.Tensor:
        """(2, predictions): binary cross-entropy and dice loss, summed over the matched masks."""
        # One indexing for all images: each would have a gradient of the size of all embeddings.
        predictions, queries, objects = torch.cat(matches, dim=1)
        lengths = [match.shape[1] for match in matches]
        images = torch.cat([queries.new_full((length,), i) for i, length in enumerate(lengths)])
        matched = zip(
            mask_embeddings[predictions, images, queries].split(lengths),
            mask_features.unbind(),
            objects.split(lengths),
            strict=True,
        )
        losses = [
            matched_mask_losses(*masks, self.draw_points(packed_masks[i], len(class_labels[i]), image_extents[i]))
            for i, masks in enumerate(matched)
            if lengths[i]
        ]
        if not losses:  # nothing matched; keep the graph, so that every parameter gets a gradient
            nothing = (mask_embeddings.float().sum() + mask_features.float().sum()) * 0
            return nothing.expand(2, len(mask_embeddings))
        per_prediction = losses[0].new_zeros((2, len(mask_embeddings)))
        return per_prediction.index_add(1, predictions, torch.cat(losses, dim=1))

    def draw_points(self, planes: torch.Tensor, objects: int, extent: torch.Tensor) -> Points:
        """Random points of one image, for its masks to choose from, with the labels there.

        Args:
            planes: (planes, H, W), its objects.
            objects: how many.
            extent: (2,), share of height and width to draw from.
        """
        config = self.config
        uncertain = int(config.importance_sample_ratio * config.train_num_points)
        candidates = int(config.oversample_ratio * config.train_num_points)
        others = config.train_num_points - uncertain
        positions = torch.rand((candidates + others, 2), device=extent.device) * extent.flip(0)
        return Points(positions, *sample_labels(planes, objects, positions), uncertain, others)


def totals_per_process(num_masks: int, total_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the losses are divided by: totals over all processes, divided by their number.

    So the mean of the losses and gradients over the processes is that of the joint batch.

    Args:
        num_masks: objects in this process's batch.
        total_weight: (predictions,), the sum of the class weights of this process's queries.

    Returns:
        () and (predictions,), both above 0.
    """
    totals = torch.cat((total_weight.new_tensor([num_masks]), total_weight))
    processes = 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
        processes = torch.distributed.get_world_size()
    # without any object, or any weight on "no object", there is nothing to divide
    return totals[0].clamp(min=1) / processes, (totals[1:] / processes).clamp(min=torch.finfo(totals.dtype).tiny)
