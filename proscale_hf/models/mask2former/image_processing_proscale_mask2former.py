"""Image processors of PRO-SCALE Mask2Former: one that works on tensors, on the CPU or a GPU, and one with Pillow."""

from transformers.processing_utils import Unpack

from proscale_hf.models.image_processor import PillowPixels, TorchvisionPixels
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.segmentation_image_processor import SegmentationImageProcessorMixin, SegmentationImagesKwargs


class ProScaleMask2FormerImageProcessorKwargs(SegmentationImagesKwargs, total=False):
    __doc__ = SegmentationImagesKwargs.__doc__


class ProScaleMask2FormerImageProcessorMixin(SegmentationImageProcessorMixin):
    __doc__ = SegmentationImageProcessorMixin.__doc__
    valid_kwargs = ProScaleMask2FormerImageProcessorKwargs
    config_class = ProScaleMask2FormerConfig

    @staticmethod
    def backends() -> tuple[type, type]:
        """The image processors with Pillow and with torchvision."""
        return ProScaleMask2FormerImageProcessorPil, ProScaleMask2FormerImageProcessor


class ProScaleMask2FormerImageProcessorPil(ProScaleMask2FormerImageProcessorMixin, PillowPixels):
    __doc__ = SegmentationImageProcessorMixin.__doc__

    def __init__(self, **kwargs: Unpack[ProScaleMask2FormerImageProcessorKwargs]):
        super().__init__(**kwargs)


class ProScaleMask2FormerImageProcessor(ProScaleMask2FormerImageProcessorMixin, TorchvisionPixels):
    __doc__ = SegmentationImageProcessorMixin.__doc__

    def __init__(self, **kwargs: Unpack[ProScaleMask2FormerImageProcessorKwargs]):
        super().__init__(**kwargs)
