"""Losses of matched masks: the formulas and their gradients written out, the choice of points, what is kept."""

import pytest
import torch
from torch import nn

from proscale_hf.losses import point_sampling
from proscale_hf.losses.masks import Points, choose_points, matched_mask_losses, positions_of
from proscale_hf.losses.point_sampling import sample_maps


MATCHES, CHANNELS, HEIGHT, WIDTH = 19, 6, 10, 12
UNCERTAIN, OTHERS, CANDIDATES = 30, 10, 120


def masks_and_points(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Points]:
    """Embeddings, features and objects of some masks; four objects, and a tenth of the points without labels."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn((MATCHES, CHANNELS), generator=generator)
    features = torch.randn((CHANNELS, HEIGHT, WIDTH), generator=generator)
    objects = torch.randint(0, 4, (MATCHES,), generator=generator)
    counted = (torch.rand(CANDIDATES + OTHERS, generator=generator) > 0.1).float()
    inside = torch.rand((4, CANDIDATES + OTHERS), generator=generator) * counted
    positions = torch.rand((CANDIDATES + OTHERS, 2), generator=generator)
    return embeddings, features, objects, Points(positions, inside, counted, UNCERTAIN, OTHERS)


def written_out(
    embeddings: torch.Tensor, features: torch.Tensor, objects: torch.Tensor, points: Points
) -> torch.Tensor:
    """The same losses mask by mask, by autograd, without a word about memory."""
    losses = []
    for embedding, target in zip(embeddings, objects, strict=True):
        mask = torch.einsum("c,chw->hw", embedding, features)
        logits = sample_maps(mask[None, None], points.positions[None])[0, 0]
        nearest = logits[:CANDIDATES].detach().abs().argsort()[:UNCERTAIN]
        chosen = torch.cat((nearest, torch.arange(CANDIDATES, CANDIDATES + OTHERS)))
        chosen = chosen[points.counted[chosen] == 1]
        logits, label = logits[chosen], points.inside[target, chosen]
        cross_entropy = nn.functional.binary_cross_entropy_with_logits(logits, label)
        p = logits.sigmoid()
        losses.append(torch.stack((cross_entropy, 1 - (2 * (p * label).sum() + 1) / (p.sum() + label.sum() + 1))))
    return torch.stack(losses, dim=1)


@pytest.mark.parametrize("rows_at_once", [8, 1000])
def test_losses_and_gradients_are_those_written_out(rows_at_once, monkeypatch):
    monkeypatch.setattr(point_sampling, "CPU_PART_VALUES", rows_at_once * (UNCERTAIN + OTHERS))
    embeddings, features, objects, points = masks_and_points()
    leaves = embeddings.requires_grad_(), features.requires_grad_()
    weights = torch.rand(2, MATCHES)
    results = []
    for function in (matched_mask_losses, written_out):
        losses = function(*leaves, objects, points)
        results.append((losses, *torch.autograd.grad((losses * weights).sum(), leaves)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_masks_have_float32_losses_and_bfloat16_gradients():
    embeddings, features, objects, points = masks_and_points()
    leaves = [tensor.bfloat16().requires_grad_() for tensor in (embeddings, features)]
    losses = matched_mask_losses(*leaves, objects, points)
    losses.sum().backward()
    assert losses.dtype == torch.float32
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    written_out(*exact, objects, points).sum().backward()
    for leaf, expected in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == torch.bfloat16
        # other points are the uncertain ones where logits are rounded, so it is the direction that has to agree
        assert nn.functional.cosine_similarity(leaf.grad.flatten().float(), expected.grad.flatten(), dim=0) > 0.99


def test_only_the_logits_at_the_points_are_kept_for_the_backward_pass():
    embeddings, features, objects, points = masks_and_points()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        matched_mask_losses(embeddings.requires_grad_(), features.requires_grad_(), objects, points)
    assert sorted(tuple(tensor.shape) for tensor in kept if tensor.shape[0] == MATCHES) == [
        (MATCHES,),
        (MATCHES, CHANNELS),
        (MATCHES, UNCERTAIN + OTHERS),  # logits
        (MATCHES, UNCERTAIN + OTHERS),  # which points
    ]
    assert len(kept) == 8


def test_points_of_a_mask_are_the_uncertain_ones():
    values = torch.randn(3, CANDIDATES + OTHERS)
    chosen = choose_points(values, UNCERTAIN, OTHERS)
    for row, indices in zip(values, chosen, strict=True):
        nearest = row[:CANDIDATES].abs().argsort()[:UNCERTAIN]
        assert sorted(indices[:UNCERTAIN].tolist()) == sorted(nearest.tolist())
        assert indices[UNCERTAIN:].tolist() == list(range(CANDIDATES, CANDIDATES + OTHERS))


def test_logits_that_are_not_numbers_are_no_masks_uncertain_points():
    values = torch.tensor([[float("nan"), -float("inf"), 3.0, -1.0, float("inf"), 0.0]])
    assert sorted(choose_points(values, 3, 0)[0].tolist()) == [2, 3, 5]


def test_positions_are_those_of_the_chosen_points():
    points = masks_and_points()[3]
    chosen = torch.randint(0, CANDIDATES, (5, 9))
    assert torch.equal(positions_of(chosen, points), points.positions[chosen])
