"""Matching and losses of Mask2Former (https://arxiv.org/abs/2112.01527, section 3.3), for all predictions at once.

Masks are compared at random points only. Void pixels (`ignore_value` in `mask_labels`) count in neither matching nor
loss: a point counts if all four pixels around it are labelled. With `mask_padding`, points lie in the image alone.
Everything is computed in float32, and the costs of all predictions and images go to the host in one transfer.
"""

import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from .configuration_proscale_mask2former import ProScaleMask2FormerConfig


CPU_PART_VALUES = 2**20  # float32 values of a mask's points that are worked on at once
UNMATCHABLE = 1e6  # cost in place of a NaN or an infinity: matched last, but never infeasible


class UniversalSegmentationLoss(nn.Module):
    """Bipartite matching, then cross-entropy on classes and binary cross-entropy and dice on masks.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: ProScaleMask2FormerConfig):
        super().__init__()
        self.config = config
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
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        image_extents: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """
        Args:
            class_logits: (predictions, batch, queries, num_labels + 1).
            mask_logits: (predictions, batch, queries, height, width).
            mask_labels: per image (objects, H, W), 1 = object, 0 = not, `ignore_value` = void.
            class_labels: per image (objects,) int64.
            image_extents: (batch, 2), share of the height and width that is image; everything if None.

        Returns:
            Unweighted terms `loss_cross_entropy`, `loss_mask` and `loss_dice` of the last prediction, and of the
            earlier ones with `_0`, `_1`, ... behind the name.

        Raises:
            ValueError: labels that do not fit the batch, each other, or the number of classes.
        """
        batch = class_logits.shape[1]
        check_labels(mask_labels, class_labels, batch, self.config.num_labels)
        device = class_logits.device
        mask_labels = [masks.to(device) for masks in mask_labels]
        class_labels = [classes.to(device, torch.int64) for classes in class_labels]
        if image_extents is None:
            image_extents = torch.ones((batch, 2), device=device)

        with torch.autocast(device_type=device.type, enabled=False):
            class_logits, mask_logits = class_logits.float(), mask_logits.float()
            matches = self.match(class_logits, mask_logits, mask_labels, class_labels, image_extents)
            num_masks = self.mean_masks_per_rank(class_labels, device)
            cross_entropy = self.class_loss(class_logits, class_labels, matches)
            mask, dice = self.mask_losses(mask_logits, mask_labels, matches, image_extents, num_masks)
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
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        image_extents: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Assign each object a query of its own, for each prediction, at the least total cost.

        Returns:
            Per image (3, matches) int64: prediction, query and object of each match.
        """
        costs = [
            self.matching_cost(class_logits[:, i], mask_logits[:, i], mask_labels[i], class_labels[i], image_extents[i])
            for i in range(class_logits.shape[1])
        ]
        on_host = torch.cat([cost.flatten() for cost in costs]).cpu()
        matches = []
        for cost, flat in zip(costs, on_host.split([cost.numel() for cost in costs]), strict=True):
            triples = [
                torch.stack((torch.full((len(queries),), prediction), *map(torch.as_tensor, (queries, objects))))
                for prediction, matrix in enumerate(flat.view(cost.shape).numpy())
                for queries, objects in [linear_sum_assignment(matrix)]
            ]
            matches.append(torch.cat(triples, dim=1).to(class_logits.device))
        return matches

    def matching_cost(
        self,
        class_logits: torch.Tensor,
        mask_logits: torch.Tensor,
        mask_labels: torch.Tensor,
        class_labels: torch.Tensor,
        image_extent: torch.Tensor,
    ) -> torch.Tensor:
        """Cost of giving each query each object, in one image.

        Args:
            class_logits: (predictions, queries, num_labels + 1).
            mask_logits: (predictions, queries, height, width).
            mask_labels: (objects, H, W).
            class_labels: (objects,).
            image_extent: (2,).

        Returns:
            (predictions, queries, objects) float32, finite.
        """
        config = self.config
        predictions, queries = class_logits.shape[:2]
        points = torch.rand((config.train_num_points, 2), device=class_logits.device) * image_extent.flip(0)
        objects = torch.arange(len(class_labels), device=points.device)
        labels = sample_labels(mask_labels, objects, points, config.ignore_value)
        inside, counted = (values.T for values in labels)  # (points, objects)

        mask_costs = []
        for masks in in_parts(mask_logits.flatten(0, 1), config.train_num_points):
            logits = sample_maps(masks.unsqueeze(0), points[None])[0]  # (masks, points)
            probabilities = logits.sigmoid()
            # binary cross-entropy: softplus(x) - x * target, summed over points as matrix products
            cross_entropy = (nn.functional.softplus(logits) @ counted - logits @ inside) / counted.sum(0).clamp(min=1)
            overlap = 2 * (probabilities @ inside)
            dice = 1 - (overlap + 1) / (probabilities @ counted + inside.sum(0) + 1)
            mask_costs.append(config.mask_weight * cross_entropy + config.dice_weight * dice)
        cost_class = -class_logits.softmax(-1)[..., class_labels]  # (predictions, queries, objects)
        cost = torch.cat(mask_costs).view(predictions, queries, -1) + config.class_weight * cost_class
        return cost.nan_to_num(nan=UNMATCHABLE, posinf=UNMATCHABLE, neginf=UNMATCHABLE)

    def class_loss(
        self, class_logits: torch.Tensor, class_labels: list[torch.Tensor], matches: list[torch.Tensor]
    ) -> torch.Tensor:
        """(predictions,) weighted cross-entropy; queries without an object should say "no object"."""
        targets = torch.full(class_logits.shape[:3], self.config.num_labels, device=class_logits.device)
        for i, (labels, (prediction, query, target)) in enumerate(zip(class_labels, matches, strict=True)):
            targets[prediction, i, query] = labels[target]
        weight = self.empty_weight.float()
        losses = nn.functional.cross_entropy(
            class_logits.flatten(0, 2), targets.flatten(), weight=weight, reduction="none"
        ).view(len(class_logits), -1)  # (predictions, batch * queries)
        total_weight = weight[targets].flatten(1).sum(1)  # 0 if nothing matched and "no object" weighs nothing
        return losses.sum(1) / total_weight.clamp(min=torch.finfo(torch.float32).tiny)

    def mask_losses(
        self,
        mask_logits: torch.Tensor,
        mask_labels: list[torch.Tensor],
        matches: list[torch.Tensor],
        image_extents: torch.Tensor,
        num_masks: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(predictions,) binary cross-entropy and (predictions,) dice loss of the matched masks."""
        per_prediction = mask_logits.new_zeros((2, len(mask_logits)))
        for i, (prediction, query, target) in enumerate(matches):
            masks = mask_logits[prediction, i, query]  # (matches, height, width)
            if len(masks) == 0:
                continue
            points, chosen = self.sample_points(masks.detach(), image_extents[i])
            logits = sample_maps(masks.unsqueeze(1), points[chosen]).squeeze(1)  # (matches, points)
            objects, object_of_match = target.unique(return_inverse=True)
            place = object_of_match[:, None] * len(points) + chosen  # of each mask's points in its object's labels
            inside, counted = (
                labels.take(place)
                for labels in sample_labels(mask_labels[i], objects, points, self.config.ignore_value)
            )
            # binary cross-entropy: softplus(x) - x * target
            cross_entropy = (nn.functional.softplus(logits) * counted - logits * inside).sum(1)
            cross_entropy = cross_entropy / counted.sum(1).clamp(min=1)
            probabilities = logits.sigmoid()
            overlap = 2 * (probabilities * inside).sum(1)
            dice = 1 - (overlap + 1) / ((probabilities * counted).sum(1) + inside.sum(1) + 1)
            per_prediction = per_prediction.index_add(1, prediction, torch.stack((cross_entropy, dice)))
        if not per_prediction.requires_grad:  # nothing matched; keep the graph, so that every parameter gets a gradient
            per_prediction = per_prediction + mask_logits.flatten(1).sum(1) * 0
        return (per_prediction / num_masks).unbind()

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
            certainty = sample_maps(part.unsqueeze(0), points[None, :candidates])[0].abs_()  # (masks, candidates)
            chosen_part[:, :uncertain] = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
        return points, chosen

    @staticmethod
    def mean_masks_per_rank(class_labels: list[torch.Tensor], device: torch.device) -> torch.Tensor:
        """Objects in the whole batch divided by the number of processes, at least 1."""
        num_masks = torch.tensor(float(sum(map(len, class_labels))), device=device)
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(num_masks)
            num_masks = num_masks / distributed.get_world_size()
        return num_masks.clamp(min=1)


def check_labels(
    mask_labels: list[torch.Tensor], class_labels: list[torch.Tensor], batch: int, num_labels: int
) -> None:
    """Refuse labels that cannot be right, in one line.

    Raises:
        ValueError: wrong number of entries, masks and classes that disagree, or a class out of range.
    """
    if len(mask_labels) != batch or len(class_labels) != batch:
        raise ValueError(
            f"`mask_labels` and `class_labels` need one entry per image: got {len(mask_labels)} and "
            f"{len(class_labels)} for a batch of {batch}."
        )
    for i, (masks, classes) in enumerate(zip(mask_labels, class_labels, strict=True)):
        if masks.ndim != 3 or classes.ndim != 1 or len(masks) != len(classes):
            raise ValueError(
                f"Image {i}: `mask_labels` must be (objects, height, width) and `class_labels` (objects,), "
                f"got {tuple(masks.shape)} and {tuple(classes.shape)}."
            )
    if len({tuple(masks.shape[-2:]) for masks in mask_labels}) > 1:
        raise ValueError("All `mask_labels` of a batch must have the same height and width: those of the padded batch.")
    classes = torch.cat([c.reshape(-1).cpu() for c in class_labels])
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"`class_labels` must be integers, got {classes.dtype}.")
    if len(classes) and not 0 <= classes.min() <= classes.max() < num_labels:
        wrong = sorted({int(c) for c in classes if not 0 <= c < num_labels})
        raise ValueError(
            f"`class_labels` holds {wrong}, but this model has classes 0 to {num_labels - 1}; "
            "check `num_labels` or `id2label` of its configuration."
        )


def in_parts(rows: torch.Tensor, values_per_row: int) -> tuple[torch.Tensor, ...]:
    """Cut a tensor along its first axis, so that on the CPU what is made from a part stays in the cache."""
    on_cpu = rows.device.type == "cpu"
    return rows.split(max(1, CPU_PART_VALUES // values_per_row)) if on_cpu else (rows,)


def sample_maps(maps: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Bilinear values of (n, channels, height, width) maps at (n, points, 2) points -> (n, channels, points)."""
    return nn.functional.grid_sample(maps, 2 * points.unsqueeze(2) - 1, align_corners=False).squeeze(3)


def sample_labels(
    mask_labels: torch.Tensor, objects: torch.Tensor, points: torch.Tensor, ignore_value: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bilinear values of label masks at points, read straight from the masks: no float copy of them is made.

    Args:
        mask_labels: (masks, height, width), 1 = object, 0 = not, `ignore_value` = void.
        objects: (n,) int64, which masks to read.
        points: (points, 2), (x, y) in the unit square.
        ignore_value: the value of void pixels.

    Returns:
        Both (n, points) float32: the values where no void pixel takes part, else 0; and 1 there, else 0.
    """
    height, width = mask_labels.shape[-2:]
    x, y = (points * points.new_tensor([width, height]) - 0.5).unbind(-1)
    left, top = x.floor(), y.floor()
    right_share, lower_share = x - left, y - top
    corners = []  # (pixel, weight) of the four around each point; what lies outside of the map has no weight
    for row, row_weight in ((top, 1 - lower_share), (top + 1, lower_share)):
        for column, column_weight in ((left, 1 - right_share), (left + 1, right_share)):
            is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            pixel = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
            corners.append((pixel, row_weight * column_weight * is_inside))

    values = torch.zeros((len(objects), len(points)), device=points.device)
    counted = torch.ones_like(values)
    for part, values_part, counted_part in zip(
        *(in_parts(rows, len(points)) for rows in (objects, values, counted)), strict=True
    ):
        labels = mask_labels.flatten(1)[part]
        for pixel, weight in corners:
            label = labels[:, pixel]  # (masks, points)
            values_part += label * weight
            counted_part *= (label != ignore_value) | (weight == 0)
        values_part *= counted_part
    return values, counted
