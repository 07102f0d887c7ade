"""Image processor of PRO-SCALE Mask2Former, PIL backend: resizes like the original, needs no torchvision."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import Unpack

from .image_processing_common import SegmentationImageProcessorMixin, SegmentationImagesKwargs, Size


try:
    from PIL import Image
except ImportError:  # transformers' PilBackend says so when it is used
    Image = None


class ProScaleMask2FormerImageProcessorKwargs(SegmentationImagesKwargs, total=False):
    __doc__ = SegmentationImagesKwargs.__doc__


class ProScaleMask2FormerImageProcessorPil(SegmentationImageProcessorMixin, PilBackend):
    __doc__ = SegmentationImageProcessorMixin.__doc__
    valid_kwargs = ProScaleMask2FormerImageProcessorKwargs

    def __init__(self, **kwargs: Unpack[ProScaleMask2FormerImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _from_numpy(self, array: np.ndarray, device: Any) -> np.ndarray:
        return array

    def _normalized_batch(
        self,
        images: list[np.ndarray],
        sizes: list[Size],
        padded_size: Size,
        *,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        **_: Any,
    ) -> np.ndarray:
        """Resize, rescale, normalise and pad (channels, height, width) images, one after the other."""
        batch = np.zeros((len(images), len(images[0]), *padded_size), dtype=np.float32)
        for target, image, (height, width) in zip(batch, images, sizes, strict=True):
            if image.shape[1:] != (height, width):
                image = np.stack(
                    [np.asarray(Image.fromarray(channel).resize((width, height), resample)) for channel in image]
                )
            if do_rescale:
                image = self.rescale(image, rescale_factor)
            if do_normalize:
                image = self.normalize(image, image_mean, image_std)
            target[:, :height, :width] = image
        return batch
