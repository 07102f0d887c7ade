"""Image processor of PRO-SCALE Mask2Former, torchvision backend: works on tensors, on the CPU or a GPU."""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import requires_backends

from .image_processing_common import SegmentationImageProcessorMixin, SegmentationImagesKwargs, Size


class ProScaleMask2FormerImageProcessorKwargs(SegmentationImagesKwargs, total=False):
    __doc__ = SegmentationImagesKwargs.__doc__


class ProScaleMask2FormerImageProcessor(SegmentationImageProcessorMixin, TorchvisionBackend):
    __doc__ = SegmentationImageProcessorMixin.__doc__
    valid_kwargs = ProScaleMask2FormerImageProcessorKwargs

    def __init__(self, **kwargs: Unpack[ProScaleMask2FormerImageProcessorKwargs]):
        requires_backends(self, ["torchvision"])
        super().__init__(**kwargs)

    def _from_numpy(self, array: np.ndarray, device: Any) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    def _normalized_batch(
        self,
        images: list[np.ndarray],
        sizes: list[Size],
        padded_size: Size,
        *,
        device: Any,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **_: Any,
    ) -> torch.Tensor:
        """Resize, rescale, normalise and pad (channels, height, width) images, one after the other."""
        batch = torch.zeros((len(images), len(images[0]), *padded_size), device=device)
        for target, image, (height, width) in zip(batch, images, sizes, strict=True):
            image = self._from_numpy(image, device)
            if image.shape[1:] != (height, width):
                image = self.resize(image, SizeDict(height=height, width=width), resample=resample)
            target[:, :height, :width] = self.rescale_and_normalize(
                image, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        return batch
