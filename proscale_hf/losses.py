"""Matching and losses of Mask2Former (https://arxiv.org/abs/2112.01527, section 3.3), for all predictions at once.

Masks are compared at random points only, where the labels are read from packed masks (`packed_masks.py`). Void pixels
count in neither matching nor loss: a point counts if all four pixels around it are labelled. With `mask_padding`,
points lie in the image alone. Everything is computed in float32, and the costs of all predictions and images go to the
host in one transfer. With several processes, all divide by the same totals, so that the mean of their gradients is the
gradient of the joint batch.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn
from transformers.utils import logging

from .configuration_proscale_mask2former import ProScaleMask2FormerConfig


logger = logging.get_logger(__name__)

CPU_PART_VALUES = 2**20  # float32 values of a mask's points that are worked on at once
CPU_GROUPS = 8  # in which masks are sampled at once
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
        mask_logits: torch.Tensor,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        image_extents: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            class_logits: (predictions, batch, queries, num_labels + 1).
            mask_logits: (predictions, batch, queries, height, width).
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

        with torch.autocast(device_type=device.type, enabled=False):
            class_logits, mask_logits = class_logits.float(), mask_logits.float()
            matches = self.match(class_logits, mask_logits, packed_masks, class_labels, image_extents)
            targets = self.class_targets(class_logits, class_labels, matches)
            weight = self.empty_weight.float()[targets].flatten(1).sum(1)
            num_masks, weight = totals_per_process(sum(map(len, class_labels)), weight)
            cross_entropy = self.class_loss(class_logits, targets) / weight
            mask, dice = self.mask_losses(mask_logits, packed_masks, class_labels, matches, image_extents) / num_masks
        terms = {"loss_cross_entropy": cross_entropy, "loss_mask": mask, "loss_dice": dice}
        last = class_logits.shape[0] - 1
        losses = {name: values[last] for name, values in terms.items()}
        losses.update({f"{name}_{i}": values[i] for i in range(last) for name, values in terms.items()})
        return losses

    @torch.no_grad()
    def match(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
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
                class_logits[:, i], mask_logits[:, i], packed_masks[i], class_labels[i], image_extents[i]
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
        mask_logits: torch.Tensor,
        planes: torch.Tensor,
        class_labels: torch.Tensor,
        image_extent: torch.Tensor,
    ) -> torch.Tensor:
        """Cost of giving each query each object, in one image.

        Args:
            class_logits: (predictions, queries, num_labels + 1).
            mask_logits: (predictions, queries, height, width).
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
        for masks in in_parts(mask_logits.flatten(0, 1), config.train_num_points):
            logits = sample_shared(masks, points)
            probabilities = logits.sigmoid()
            # binary cross-entropy: softplus(x) - x * target, summed over points as matrix products
            cross_entropy = (nn.functional.softplus(logits) @ counted).unsqueeze(1) - logits @ inside.T
            overlap = 2 * (probabilities @ inside.T)
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
        mask_logits: torch.Tensor,
        packed_masks: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        matches: list[torch.Tensor],
        image_extents: torch.Tensor,
    ) -> torch.Tensor:
        """(2, predictions): binary cross-entropy and dice loss, summed over the matched masks."""
        per_prediction = mask_logits.new_zeros((2, len(mask_logits)))
        # One indexing for all images: each would have a gradient of the size of all masks.
        predictions, queries, _ = torch.cat(matches, dim=1)
        lengths = [match.shape[1] for match in matches]
        images = torch.cat([queries.new_full((length,), i) for i, length in enumerate(lengths)])
        matched_masks = mask_logits[predictions, images, queries].split(lengths)  # (matches, height, width) each
        for i, ((prediction, _, target), masks) in enumerate(zip(matches, matched_masks, strict=True)):
            if len(masks) == 0:
                continue
            points, chosen = self.sample_points(masks.detach(), image_extents[i])
            logits = sample_maps(masks.unsqueeze(1), points[chosen]).squeeze(1)  # (matches, points)
            inside, counted = sample_labels(packed_masks[i], len(class_labels[i]), points)
            inside = inside.take(target[:, None] * len(points) + chosen)  # (matches, points)
            counted = counted[chosen]
            # binary cross-entropy: softplus(x) - x * target
            cross_entropy = (nn.functional.softplus(logits) * counted - logits * inside).sum(1)
            cross_entropy = cross_entropy / counted.sum(1).clamp(min=1)
            probabilities = logits.sigmoid()
            overlap = 2 * (probabilities * inside).sum(1)
            dice = 1 - (overlap + 1) / ((probabilities * counted).sum(1) + inside.sum(1) + 1)
            per_prediction = per_prediction.index_add(1, prediction, torch.stack((cross_entropy, dice)))
        if not per_prediction.requires_grad:  # nothing matched; keep the graph, so that every parameter gets a gradient
            per_prediction = per_prediction + mask_logits.flatten(1).sum(1) * 0
        return per_prediction

    @torch.no_grad()
    def sample_points(self, masks: torch.Tensor, extent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Random points, and for each mask a choice of them: most where the prediction is uncertain (PointRend).

        The masks of one image choose from the same points.

        Args:
            masks: (masks, height, width) logits.
            extent: (2,), share of height and width to draw from.

        Returns:
            (points, 2), (x, y) in the unit square, and (masks, train_num_points) int64, which of them.
        """
        config = self.config
        uncertain = int(config.importance_sample_ratio * config.train_num_points)
        candidates = int(config.oversample_ratio * config.train_num_points)
        others = config.train_num_points - uncertain
        points = torch.rand((candidates + others, 2), device=masks.device) * extent.flip(0)
        chosen = torch.arange(candidates - uncertain, candidates + others, device=masks.device).repeat(len(masks), 1)
        parts = (in_parts(rows, candidates) for rows in (chosen, masks))
        for chosen_part, part in zip(*parts, strict=True):
            certainty = sample_shared(part, points[:candidates]).abs_()
            chosen_part[:, :uncertain] = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
        return points, chosen


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


def in_parts(rows: torch.Tensor, values_per_row: int) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along its first axis, so that on the CPU what is made from a part stays in the cache."""
    on_cpu = rows.device.type == "cpu"
    return rows.split(max(1, CPU_PART_VALUES // values_per_row // CPU_GROUPS) * CPU_GROUPS) if on_cpu else (rows,)


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (n, channels, height, width) maps at (n, points, 2) points -> (n, channels, points)."""
    return nn.functional.grid_sample(maps, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)


def sample_shared(masks: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (n, height, width) masks, all at the same (points, 2) points -> (n, points).

    On the CPU, PyTorch samples in as many threads as there are items in the batch.
    """
    is_divisible = masks.device.type == "cpu" and len(masks) % CPU_GROUPS == 0
    groups = CPU_GROUPS if is_divisible else 1
    return sample_maps(masks.unflatten(0, (groups, -1)), points.expand(groups, -1, -1)).flatten(0, 1)


def sample_labels(planes: torch.Tensor, objects: int, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear values of packed masks at points, of which only the pixels around the points are unpacked.

    Args:
        planes: (planes, height, width) uint8, see `packed_masks.py`.
        objects: how many objects they hold.
        points: (points, 2), (x, y) in the unit square.

    Returns:
        (objects, points) float32, the values where no void pixel takes part, else 0; and (points,) float32, 1 there,
        else 0.
    """
    height, width = planes.shape[-2:]
    x, y = (points * points.new_tensor([width, height]) - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    index = torch.arange(1, objects + 1, device=planes.device)
    plane, bit = index // 8, (index % 8).to(torch.uint8).unsqueeze(1)
    values = torch.zeros((objects, len(points)), device=planes.device)
    counted = torch.ones(len(points), device=planes.device)
    for row, row_weight in ((top, 1 - lower_share), (top + 1, lower_share)):
        for column, column_weight in ((left, 1 - right_share), (left + 1, right_share)):
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = row_weight * column_weight * is_inside  # what lies outside of the map has none
            pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            corner = planes.flatten(1)[:, pixel]  # (planes, points)
            values += (corner[plane] >> bit & 1) * weight
            counted *= (corner[0] & 1 == 0) | (weight == 0)
    return values.mul_(counted), counted
