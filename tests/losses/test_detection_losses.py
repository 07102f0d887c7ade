"""Matching and losses of boxes without masks."""

import pytest
import torch
from torch import nn

from proscale_hf.losses.boxes import generalized_iou, matched_box_losses
from proscale_hf.losses.detection import DenoisingTargets, DetectionLoss, Detections, focal_loss


def loss(**changes) -> DetectionLoss:
    settings = {
        "num_labels": 3,
        "class_cost": 2.0,
        "bbox_cost": 5.0,
        "giou_cost": 2.0,
        "class_weight": 1.0,
        "bbox_weight": 5.0,
        "giou_weight": 2.0,
        "two_stage_weight": 1.0,
        "focal_alpha": 0.25,
        **changes,
    }
    return DetectionLoss(**settings)


def some_detections(predictions: int = 2, queries: int = 5, seed: int = 0) -> Detections:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((predictions, 2, queries, 3), generator=generator)
    boxes = torch.rand((predictions, 2, queries, 4), generator=generator) * 0.5 + 0.2
    return Detections(logits.requires_grad_(), boxes.requires_grad_())


CLASSES = [torch.tensor([2, 0]), torch.tensor([1])]
BOXES = [torch.tensor([[0.3, 0.4, 0.2, 0.2], [0.6, 0.6, 0.3, 0.4]]), torch.tensor([[0.5, 0.5, 0.4, 0.2]])]


def test_generalized_iou_of_known_boxes():
    box = torch.tensor([0.0, 0.0, 0.2, 0.2])
    others = torch.tensor(
        [
            [0.0, 0.0, 0.2, 0.2],  # the same
            [0.1, 0.0, 0.3, 0.2],  # a third in common, nothing around
            [0.8, 0.8, 1.0, 1.0],  # far away: 0.92 of the square around both is empty
            [0.5, 0.5, 0.5, 0.5],  # without size
        ]
    )
    expected = torch.tensor([1.0, 1 / 3, -0.92, -(0.25 - 0.04) / 0.25])
    torch.testing.assert_close(generalized_iou(box, others), expected, rtol=1e-4, atol=1e-4)
    assert generalized_iou(others[:, None], others).shape == (4, 4)


def test_matched_boxes_know_both_distances():
    first, second = torch.tensor([[0.5, 0.5, 0.2, 0.2]]), torch.tensor([[0.6, 0.5, 0.2, 0.3]])
    difference, overlap = matched_box_losses(first, second)
    torch.testing.assert_close(difference, torch.tensor([0.2]))
    assert 0 < overlap.item() < 1


def test_focal_loss_is_weighted_cross_entropy():
    logits, targets = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0])
    p = torch.tensor(2.0).sigmoid()
    expected = torch.stack((0.25 * (1 - p) ** 2 * -p.log(), 0.75 * p**2 * -(1 - p).log()))
    torch.testing.assert_close(focal_loss(logits, targets, 0.25), expected)


def test_the_terms_are_those_of_the_best_assignment():
    """Queries that say exactly what the objects are get them, in every prediction, wherever they are in the row."""
    detections = some_detections()
    logits, boxes = detections.logits.detach().clone(), detections.boxes.detach().clone()
    logits[:] = -20
    for prediction, queries in enumerate([(4, 1), (0, 3)]):
        for image in range(2):
            for query, label, box in zip(queries, CLASSES[image], BOXES[image], strict=False):
                logits[prediction, image, query, label] = 20
                boxes[prediction, image, query] = box
    perfect = loss()(Detections(logits, boxes), Detections(logits[:1], boxes[:1]), CLASSES, BOXES)
    assert all(value < 1e-4 for value in perfect.values())
    logits[1, 0, 0, 2] = -20  # the last prediction misses one of three objects
    worse = loss()(Detections(logits, boxes), Detections(logits[:1], boxes[:1]), CLASSES, BOXES)
    assert worse["loss_ce"].item() == pytest.approx(0.25 * 20 / 3, rel=1e-3) and worse["loss_ce_0"] < 1e-4


def test_names_and_weights():
    criterion = loss(class_weight=3.0, bbox_weight=7.0, giou_weight=11.0, two_stage_weight=0.5)
    terms = {"loss_ce": 1.0, "loss_bbox_dn_0": 10.0, "loss_giou_1": 100.0, "loss_bbox_interm": 1000.0}
    assert criterion.weighted_sum(terms) == 3 + 70 + 1100 + 3500
    names = criterion(some_detections(3), some_detections(1), CLASSES, BOXES)
    suffixes = ["", "_1", "_0", "_interm"]
    assert list(names) == [f"loss_{term}{suffix}" for suffix in suffixes for term in ("ce", "bbox", "giou")]


def test_denoising_queries_are_not_matched_but_know_their_objects():
    denoising = some_detections(2, queries=8, seed=3)
    matches = [torch.tensor([[0, 1, 4, 5], [0, 1, 0, 1]]), torch.tensor([[0, 4], [0, 0]])]
    losses = loss()(some_detections(), some_detections(1), CLASSES, BOXES, denoising, DenoisingTargets(matches, 2))
    chosen = denoising.boxes[-1, 0, [0, 1, 4, 5]], denoising.boxes[-1, 1, [0, 4]]
    wanted = torch.cat((BOXES[0], BOXES[0], BOXES[1], BOXES[1]))
    expected = nn.functional.l1_loss(torch.cat(chosen), wanted, reduction="sum") / (3 * 2)
    torch.testing.assert_close(losses["loss_bbox_dn"], expected)
    targets = torch.zeros_like(denoising.logits[0])
    for image, (queries, objects) in enumerate(matches):
        targets[image, queries, CLASSES[image][objects]] = 1
    torch.testing.assert_close(losses["loss_ce_dn_0"], focal_loss(denoising.logits[0], targets, 0.25).sum() / 6)


def test_without_objects_everything_keeps_its_graph():
    detections, two_stage = some_detections(), some_detections(1)
    nothing = [torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0, 4)] * 2
    losses = loss()(detections, two_stage, *nothing)
    sum(losses.values()).backward()
    assert losses["loss_bbox"] == losses["loss_giou_interm"] == 0 and losses["loss_ce"] > 0
    assert not detections.boxes.grad.any() and detections.logits.grad.any()


def test_more_objects_than_queries_leave_some_without():
    boxes = [BOXES[0].repeat(4, 1), BOXES[1]]
    losses = loss()(some_detections(), some_detections(1), [CLASSES[0].repeat(4), CLASSES[1]], boxes)
    assert all(value.isfinite() for value in losses.values())


def test_a_class_that_the_model_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"holds \[3\], but this model has classes 0 to 2"):
        loss()(some_detections(), some_detections(1), [torch.tensor([2, 3]), CLASSES[1]], BOXES)
