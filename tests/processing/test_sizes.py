"""Sizes: the resize rule, the padded size of a batch, and where its images are."""

import numpy as np
import pytest
import torch
from transformers.image_utils import SizeDict

from proscale_hf.processing.sizes import ImageSizes, as_sizes, pixel_mask, resized_size, sizes_in_batch


@pytest.mark.parametrize(
    ("image_size", "size", "expected"),
    [
        ((480, 640), {"shortest_edge": 800, "longest_edge": 1333}, (800, 1067)),
        ((427, 640), {"shortest_edge": 800, "longest_edge": 1333}, (800, 1199)),
        ((640, 425), {"shortest_edge": 800, "longest_edge": 1333}, (1205, 800)),
        ((300, 640), {"shortest_edge": 800, "longest_edge": 1333}, (625, 1333)),
        ((2160, 3840), {"shortest_edge": 800, "longest_edge": 1333}, (750, 1333)),
        ((1, 1), {"shortest_edge": 800, "longest_edge": 1333}, (800, 800)),
        ((10, 8000), {"shortest_edge": 800, "longest_edge": 1333}, (2, 1333)),
        ((8000, 1), {"shortest_edge": 800, "longest_edge": 1333}, (1333, 1)),
        ((480, 640), {"shortest_edge": 800}, (800, 1067)),
        ((480, 640), {"longest_edge": 320}, (240, 320)),
        ((480, 640), {"max_height": 100, "max_width": 100}, (75, 100)),
        ((480, 640), {"height": 30, "width": 20}, (30, 20)),
    ],
)
def test_resize_rule(image_size, size, expected):
    assert resized_size(image_size, SizeDict(**size)) == expected


def test_an_incomplete_size_is_an_error():
    with pytest.raises(ValueError, match="shortest_edge, longest_edge, height"):
        resized_size((4, 5), SizeDict(height=30))


ORIGINALS = [(40, 60), (30, 90)]


@pytest.mark.parametrize(
    ("size", "pad_size", "divisor", "resized", "padded"),
    [
        (None, None, 1, ORIGINALS, (40, 90)),
        (None, None, 32, ORIGINALS, (64, 96)),
        (SizeDict(shortest_edge=60, longest_edge=120), None, 32, [(60, 90), (40, 120)], (64, 128)),
        (SizeDict(height=32, width=64), None, 32, [(32, 64)] * 2, (32, 64)),
        (None, SizeDict(height=40, width=101), 32, ORIGINALS, (40, 101)),
    ],
)
def test_sizes_in_a_batch(size, pad_size, divisor, resized, padded):
    expected = [ImageSizes(*sizes, padded) for sizes in zip(ORIGINALS, resized, strict=True)]
    assert sizes_in_batch(ORIGINALS, size, pad_size, divisor) == expected


@pytest.mark.parametrize("pad_size", [SizeDict(height=39, width=90), SizeDict(height=40, width=89)])
def test_images_must_fit_into_a_fixed_batch(pad_size):
    with pytest.raises(ValueError, match=r"too small: after resizing, images have up to 40 x 90 pixels"):
        sizes_in_batch(ORIGINALS, None, pad_size, 1)


def test_the_mask_is_1_where_images_are():
    masks = pixel_mask([ImageSizes((9, 9), (1, 3), (2, 4)), ImageSizes((9, 9), (2, 1), (2, 4))])
    assert masks.dtype == np.int64
    assert masks.tolist() == [[[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 0, 0, 0], [1, 0, 0, 0]]]


@pytest.mark.parametrize(
    "sizes",
    [
        [(3, 4), [5, 6]],
        ((3.0, 4.0), (5.0, 6.0)),
        np.array([[3, 4], [5, 6]]),
        torch.tensor([[3, 4], [5, 6]]),
        [torch.tensor([3, 4]), torch.Size((5, 6))],
    ],
)
def test_sizes_of_any_kind(sizes):
    pairs = as_sizes(sizes)
    assert pairs == [(3, 4), (5, 6)]
    assert all(type(length) is int for pair in pairs for length in pair)
