"""Losses of Mask2Former (https://arxiv.org/abs/2112.01527, section 3.3), for all predictions at once.

Masks are compared at random points only, where the labels are read from packed masks (`packed_masks.py`). Void pixels
count in neither matching nor loss: a point counts if all four pixels around it are labelled. Points lie in the image
alone, where the model says what is padding. Everything is computed in float32, and masks are made from their embeddings
part by part. With several processes, all divide by the same totals, so that the mean of their gradients is the gradient
of the joint batch.
"""

import torch
from torch import nn
from transformers import initialization as init

from proscale_hf.losses.masks import Points, matched_mask_losses
from proscale_hf.losses.matching import ClassCost, ImageObjects, ImagePredictions, MaskCost, Matcher
from proscale_hf.losses.point_sampling import sample_labels
from proscale_hf.losses.totals import sum_over_processes


class UniversalSegmentationLoss(nn.Module):
    """Bipartite matching, then cross-entropy on classes, and binary cross-entropy and dice loss on masks.

    Args:
        num_labels: classes, without "no object".
        no_object_weight: of the class "no object" in the cross-entropy; the others have 1.
        class_weight: of the cross-entropy.
        mask_weight: of the binary cross-entropy.
        dice_weight: of the dice loss.
        num_points: points of a mask at which it is compared, in matching and loss.
        oversample_ratio: candidates per point in the search for uncertain ones, at least 1.
        importance_sample_ratio: share of the loss' points taken where the prediction is most uncertain, 0 to 1.
    """

    def __init__(
        self,
        num_labels: int,
        no_object_weight: float,
        class_weight: float,
        mask_weight: float,
        dice_weight: float,
        num_points: int,
        oversample_ratio: float,
        importance_sample_ratio: float,
    ):
        super().__init__()
        self.num_labels = num_labels
        self.no_object_weight = no_object_weight
        self.weights = {"loss_cross_entropy": class_weight, "loss_mask": mask_weight, "loss_dice": dice_weight}
        self.num_points = num_points
        self.num_candidates = int(oversample_ratio * num_points)
        self.num_uncertain = int(importance_sample_ratio * num_points)
        self.matcher = Matcher(
            [MaskCost(mask_weight, dice_weight, num_points), ClassCost(class_weight, num_labels)], num_labels
        )
        self.register_buffer("empty_weight", torch.empty(num_labels + 1))
        self.reset_parameters()

    @property
    def non_finite_costs(self) -> int:
        """How many matching costs were NaN or infinite so far, in this process."""
        return self.matcher.non_finite_costs

    def reset_parameters(self) -> None:
        """Class weights: 1, and `no_object_weight` for "no object"."""
        weight = torch.ones_like(self.empty_weight)
        weight[-1] = self.no_object_weight
        init.copy_(self.empty_weight, weight)

    def weighted_sum(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """() the training loss: each term of [`forward`] times its weight."""
        return sum(
            weight * value
            for name, weight in self.weights.items()
            for key, value in losses.items()
            if key.startswith(name)
        )

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
        """Arguments as in [`forward`]; returns what [`Matcher`] does."""
        predictions = map(ImagePredictions, class_logits.unbind(1), mask_embeddings.unbind(1), mask_features)
        objects = map(ImageObjects, class_labels, packed_masks, image_extents)
        return self.matcher(list(predictions), list(objects))

    def class_targets(
        self, class_logits: torch.Tensor, class_labels: list[torch.Tensor], matches: list[torch.Tensor]
    ) -> torch.Tensor:
        """(predictions, batch, queries) int64 classes; queries without an object should say "no object"."""
        targets = torch.full(class_logits.shape[:3], self.num_labels, device=class_logits.device)
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
        others = self.num_points - self.num_uncertain
        positions = torch.rand((self.num_candidates + others, 2), device=extent.device) * extent.flip(0)
        return Points(positions, *sample_labels(planes, objects, positions), self.num_uncertain, others)


def totals_per_process(num_masks: int, total_weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the losses are divided by: totals over all processes, divided by their number.

    So the mean of the losses and gradients over the processes is that of the joint batch.

    Args:
        num_masks: objects in this process's batch.
        total_weight: (predictions,), the sum of the class weights of this process's queries.

    Returns:
        () and (predictions,), both above 0.
    """
    totals, processes = sum_over_processes(torch.cat((total_weight.new_tensor([num_masks]), total_weight)))
    # without any object, or any weight on "no object", there is nothing to divide
    return totals[0].clamp(min=1) / processes, (totals[1:] / processes).clamp(min=torch.finfo(totals.dtype).tiny)
