"""Masks from embeddings and features: the same product in every memory format, with its gradients."""

import pytest
import torch

from proscale_hf.models.mask2former.mask_decoder import predict_masks


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_products_of_embeddings_and_features(batch, memory_format, dtype):
    torch.manual_seed(0)
    features = torch.randn(batch, 16, 5, 7, dtype=dtype).contiguous(memory_format=memory_format).requires_grad_()
    embeddings = torch.randn(batch, 3, 16, dtype=dtype, requires_grad=True)
    expected = torch.einsum("bqc,bchw->bqhw", embeddings.double(), features.double())
    masks = predict_masks(embeddings, features)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(masks.double(), expected, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(predict_masks(embeddings, features), masks.detach(), rtol=1e-2, atol=1e-5)
    if dtype == torch.float32:
        weights = torch.randn_like(masks)
        for ours, theirs in zip(
            torch.autograd.grad(masks, (embeddings, features), weights),
            torch.autograd.grad(expected, (embeddings, features), weights.double()),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
