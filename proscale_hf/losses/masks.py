"""Binary cross-entropy and dice loss of masks that are matched to objects, at points of which most are uncertain.

A mask is the product of its query's embedding with the per-pixel embedding. Masks, and what is computed at their
points, are large: they are made part by part, and nothing of them is kept for the backward pass but their logits at
their own points.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from proscale_hf.layers.linear import linear
from proscale_hf.losses.point_sampling import mask_products, row_parts, sample_maps_backward, sample_shared


class Points(NamedTuple):
    """Points of one image that its masks choose from, and the labels there.

    Attributes:
        positions: (candidates + others, 2), (x, y) in the unit square.
        inside: (objects, candidates + others) float32, the objects' masks, 0 where it does not count.
        counted: (candidates + others,) float32, 1 where labels are known, else 0.
        uncertain: how many of the candidates a mask chooses.
        others: how many points at the end all masks have in common.
    """

    positions: torch.Tensor
    inside: torch.Tensor
    counted: torch.Tensor
    uncertain: int
    others: int


def matched_mask_losses(
    embeddings: torch.Tensor, features: torch.Tensor, objects: torch.Tensor, points: Points
) -> torch.Tensor:
    """
    Losses of one image's masks.

    Args:
        embeddings: (matches, channels).
        features: (channels, height, width), the per-pixel embedding, of the embeddings' type.
        objects: (matches,) int64, the object of each.
        points: where masks and objects are compared.

    Returns:
        (2, matches) float32: binary cross-entropy and dice loss.
    """
    return MatchedMaskLosses.apply(embeddings, features, objects, points)


class MatchedMaskLosses(torch.autograd.Function):
    """[`matched_mask_losses`] with its gradients."""

    @staticmethod
    def forward(
        ctx: Any, embeddings: torch.Tensor, features: torch.Tensor, objects: torch.Tensor, points: Points
    ) -> torch.Tensor:
        """Arguments and result as there."""
        terms, all_logits, all_chosen = [], [], []
        for rows, targets in parts((embeddings, objects), points):
            values = sample_shared(mask_products(rows, features), points.positions)
            chosen = choose_points(values, points.uncertain, points.others)
            logits = values.gather(1, chosen)
            terms.append(point_losses(logits, *labels_at(chosen, targets, points)))
            all_logits.append(logits)
            all_chosen.append(chosen.int())  # half the memory
        ctx.save_for_backward(embeddings, features, objects, *points[:3], torch.cat(all_logits), torch.cat(all_chosen))
        ctx.numbers = points[3:]
        return torch.cat(terms, dim=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients for embeddings and features."""
        embeddings, features, objects, *labelled, all_logits, all_chosen = ctx.saved_tensors
        points = Points(*labelled, *ctx.numbers)
        for_embeddings = torch.empty_like(embeddings)
        for_features = torch.zeros_like(features, dtype=torch.float32).flatten(1)
        rows_and_results = parts((embeddings, objects, all_logits, all_chosen, gradient.T, for_embeddings), points)
        for rows, targets, logits, chosen, of_terms, result in rows_and_results:
            chosen = chosen.long()
            with torch.enable_grad():
                logits = logits.detach().requires_grad_()
                terms = point_losses(logits, *labels_at(chosen, targets, points))
            (of_logits,) = torch.autograd.grad(terms, logits, of_terms.T)
            masks = features.new_empty((1, 1, 1, 1), dtype=torch.float32).expand(len(rows), 1, *features.shape[1:])
            of_masks = sample_maps_backward(of_logits.unsqueeze(1), masks, positions_of(chosen, points))
            of_masks = of_masks.flatten(1).to(features.dtype)
            result.copy_(linear(of_masks, features.flatten(1)))
            for_features += rows.T @ of_masks
        return for_embeddings, for_features.to(features.dtype).view_as(features), None, None


def parts(tensors: tuple[torch.Tensor, ...], points: Points) -> zip:
    """Tensors with a row for each match, a part of each at a time."""
    return zip(*(row_parts(tensor, points.uncertain + points.others) for tensor in tensors), strict=True)


def choose_points(values: torch.Tensor, uncertain: int, others: int) -> torch.Tensor:
    """Each mask's points: of the candidates those where its logit is nearest to 0, and all of the others (PointRend).

    Args:
        values: (masks, candidates + others) float32 logits.
        uncertain: how many of the candidates.
        others: how many others.

    Returns:
        (masks, uncertain + others) int64.
    """
    candidates = values.shape[1] - others
    certainty = values[:, :candidates].abs().view(torch.int32)  # in the same order as integers, which are faster
    nearest = certainty.topk(uncertain, dim=1, largest=False, sorted=False).indices
    rest = torch.arange(candidates, candidates + others, device=values.device).expand(len(values), -1)
    return torch.cat((nearest, rest), dim=1)


def labels_at(chosen: torch.Tensor, objects: torch.Tensor, points: Points) -> tuple[torch.Tensor, torch.Tensor]:
    """Each mask's object at its points, and whether they count: both (masks, points) float32."""
    of_all_objects = points.inside.flatten().expand(len(chosen), -1)  # instead of a copied row for each mask
    inside = of_all_objects.gather(1, chosen + objects.unsqueeze(1) * points.inside.shape[1])
    return inside, points.counted.expand(len(chosen), -1).gather(1, chosen)


def positions_of(chosen: torch.Tensor, points: Points) -> torch.Tensor:
    """(masks, points) of [`choose_points`] -> (masks, points, 2), (x, y) in the unit square."""
    pairs = points.positions.view(torch.int64).T.expand(len(chosen), -1)  # two float32 each, to be fetched as one
    return pairs.gather(1, chosen).view(torch.float32).unflatten(1, (-1, 2))


def point_losses(logits: torch.Tensor, inside: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy and dice loss of each row.

    Args:
        logits: (masks, points).
        inside: (masks, points), 1 in the object, 0 outside of it and where it does not count.
        counted: (masks, points), 1 where it counts, else 0.

    Returns:
        (2, masks).
    """
    # binary cross-entropy: softplus(x) - x * target
    cross_entropy = (nn.functional.softplus(logits) * counted - logits * inside).sum(1)
    cross_entropy = cross_entropy / counted.sum(1).clamp(min=1)
    probabilities = logits.sigmoid()
    overlap = 2 * (probabilities * inside).sum(1)
    dice = 1 - (overlap + 1) / ((probabilities * counted).sum(1) + inside.sum(1) + 1)
    return torch.stack((cross_entropy, dice))
