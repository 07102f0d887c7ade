"""Image processors of PRO-SCALE Mask2Former: one that works on tensors, on the CPU or a GPU, and one with Pillow."""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_backends import PilBackend, TorchvisionBackend
from transformers.image_utils import SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import requires_backends

from proscale_hf.models.image_processor import SegmentationImageProcessorMixin, SegmentationImagesKwargs
from proscale_hf.processing.sizes import Size


try:
    from PIL import Image
except ImportError:  # transformers' PilBackend says so when it is used
    Image = None


class ProScaleMask2FormerImageProcessorKwargs(SegmentationImagesKwargs, total=False):
    __doc__ = SegmentationImagesKwargs.__doc__


class ProScaleMask2FormerImageProcessorMixin(SegmentationImageProcessorMixin):
    __doc__ = SegmentationImageProcessorMixin.__doc__
    valid_kwargs = ProScaleMask2FormerImageProcessorKwargs

    @staticmethod
    def backends() -> tuple[type, type]:
        """The image processors with Pillow and with torchvision."""
        return ProScaleMask2FormerImageProcessorPil, ProScaleMask2FormerImageProcessor


class ProScaleMask2FormerImageProcessorPil(ProScaleMask2FormerImageProcessorMixin, PilBackend):
    __doc__ = SegmentationImageProcessorMixin.__doc__

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


class ProScaleMask2FormerImageProcessor(ProScaleMask2FormerImageProcessorMixin, TorchvisionBackend):
    __doc__ = SegmentationImageProcessorMixin.__doc__

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
