"""Boxes as shares of the image: their forms, and how they are refined."""

import torch

from proscale_hf.layers.boxes import box_logits, refined, to_centre_and_size, to_corners


def test_corners_and_back():
    boxes = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    torch.testing.assert_close(to_corners(boxes), torch.tensor([[0.4, 0.1, 0.6, 0.7]]))
    torch.testing.assert_close(to_centre_and_size(to_corners(boxes)), boxes)


def test_logits_are_the_inverse_of_the_sigmoid_and_finite():
    numbers = torch.tensor([-0.5, 0.0, 0.0005, 0.2, 0.9999, 1.0, 3.0])
    logits = box_logits(numbers)
    torch.testing.assert_close(logits[3], torch.tensor(0.2).logit())
    torch.testing.assert_close(logits.sigmoid()[[0, 1, -1]], torch.tensor([0.001, 0.001, 1.0]) / 1.001)


def test_refinement_is_of_logits_in_float32():
    boxes = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
    torch.testing.assert_close(refined(boxes, torch.zeros(1, 4)), boxes)
    changed = refined(boxes, torch.full((1, 4), 2.0, dtype=torch.bfloat16))
    assert changed.dtype == torch.float32
    torch.testing.assert_close(changed[0, 0], torch.tensor(2.0).sigmoid())
