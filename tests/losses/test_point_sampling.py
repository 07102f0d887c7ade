"""Sampling at points: masks, and labels of packed masks, against plain bilinear sampling."""

import pytest
import torch

from proscale_hf.losses.point_sampling import (
    mask_products,
    sample_labels,
    sample_maps,
    sample_maps_backward,
    sample_shared,
)
from proscale_hf.processing.packed_masks import pack_masks


def test_sample_labels_is_bilinear_sampling():
    masks = (torch.rand(9, 10, 14) > 0.5).to(torch.uint8)
    points = torch.rand(50, 2)
    values, counted = sample_labels(pack_masks(masks), 9, points)
    torch.testing.assert_close(values, sample_maps(masks.float()[None], points[None])[0])
    assert counted.all()


def test_points_next_to_void_do_not_count():
    masks = torch.ones(1, 4, 4, dtype=torch.uint8)
    masks[0, :, 2:] = 255
    points = torch.tensor([[0.125, 0.5], [0.3, 0.5], [0.5, 0.5], [0.9, 0.5]])
    values, counted = sample_labels(pack_masks(masks), 1, points)
    assert counted.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert values.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_void_without_weight_does_not_discard_a_point():
    masks = torch.zeros(1, 4, 4, dtype=torch.uint8)
    masks[0, :, 2:] = 255
    exactly_on_a_pixel = torch.tensor([[1.5 / 4, 0.5]])  # its right neighbour is void, but has no part in it
    _, counted = sample_labels(pack_masks(masks), 1, exactly_on_a_pixel)
    assert counted.tolist() == [1.0]


@pytest.mark.parametrize("masks", [1, 7, 16])
def test_masks_that_share_points(masks):
    maps, points = torch.randn(masks, 5, 6), torch.rand(11, 2)
    torch.testing.assert_close(sample_shared(maps, points), sample_maps(maps[None], points[None])[0])


def test_the_gradient_of_sampling_is_autograds():
    maps, points = torch.randn(3, 2, 5, 6, requires_grad=True), torch.rand(3, 11, 2)
    gradient = torch.randn(3, 2, 11)
    (expected,) = torch.autograd.grad(sample_maps(maps, points), maps, gradient)
    without_values = torch.full((1, 1, 1, 1), float("nan")).expand(3, 2, 5, 6)
    torch.testing.assert_close(sample_maps_backward(gradient, without_values, points), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_products_in_float32(dtype):
    embeddings, features = torch.randn(4, 8, dtype=dtype), torch.randn(8, 5, 6, dtype=dtype)
    masks = mask_products(embeddings, features)
    expected = torch.einsum("qc,chw->qhw", embeddings.double(), features.double())
    torch.testing.assert_close(
        masks, expected.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5 if dtype == torch.float32 else 0.03
    )
