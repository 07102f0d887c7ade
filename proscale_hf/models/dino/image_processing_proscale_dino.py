"""Image processors of PRO-SCALE DINO: one that works on tensors, on the CPU or a GPU, and one with Pillow."""

from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput
from transformers.processing_utils import Unpack

from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.image_processor import (
    ImageProcessorMixin,
    PaddedImagesKwargs,
    PillowPixels,
    TorchvisionPixels,
    output_field,
)
from proscale_hf.processing.detection import best_detections, detection_labels
from proscale_hf.processing.sizes import ImageSizes, as_sizes, resized_size_in_detr


class ProScaleDinoImageProcessorKwargs(PaddedImagesKwargs, total=False):
    """
    Settings beyond those of every image processor; all are saved in `preprocessor_config.json`.

    size_divisor (`int`, *optional*, defaults to 1):
        The padded height and width are multiples of it; 0 or 1 for any size. `pad_size` is taken as it is.
    """


class ProScaleDinoImageProcessorMixin(ImageProcessorMixin):
    """
    Makes a padded batch of images, with boxes as labels, and detections of a model's outputs.

    Images: PIL images of any mode, paths, URLs, arrays and tensors. An EXIF orientation is applied (sizes in
    `target_sizes` and boxes of annotations are those of the upright image), transparency is laid over white, 16-bit
    values are brought to 8 bits, and grey becomes RGB.
    """

    valid_kwargs = ProScaleDinoImageProcessorKwargs
    config_class = ProScaleDinoConfig
    size_divisor = 1
    resize_rule = staticmethod(resized_size_in_detr)

    @staticmethod
    def backends() -> tuple[type, type]:
        """The image processors with Pillow and with torchvision."""
        return ProScaleDinoImageProcessorPil, ProScaleDinoImageProcessor

    def preprocess(self, images: ImageInput, annotations: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Make a padded batch, and with `annotations` the labels for training.

        Args:
            images: see the class.
            annotations: COCO's, one mapping for an image, or a list of one for each: `annotations`, a list of objects
                with `bbox` (left, top, width, height, in pixels of the image as it is given), `category_id`, and
                perhaps `area` and `iscrowd`; and perhaps `image_id`.
            kwargs: settings of the processor, for this call.

        Returns:
            `BatchFeature`: `pixel_values` float32 (batch, channels, height, width); `pixel_mask` int64
            (batch, height, width), 1 where the image is; with annotations `labels`, for each image a `BatchFeature`
            with `class_labels`, `boxes` and more, see [`~processing.detection.detection_labels`]. Tensors or arrays as
            `return_tensors` says, by default what the backend works with.

        Raises:
            `ValueError`: one line that names the image, and the box.
        """
        return super().preprocess(images, annotations, **kwargs)

    def post_process_object_detection(
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None, top_k: int = 300
    ) -> list[dict[str, torch.Tensor]]:
        """
        Detections of a batch, see [`~processing.detection.best_detections`].

        Args:
            outputs: of the model; or an object or a dict with `logits` and `pred_boxes`.
            threshold: detections with a score up to this are dropped.
            target_sizes: (height, width) for each image, a list or a (batch, 2) tensor; `None`: boxes are shares of the
                image.
            top_k: how many detections to keep of an image, at most; the original's number.

        Returns:
            For each image `scores`, highest first, `labels`, and `boxes`, (left, top, right, bottom) inside the image.

        Raises:
            `ValueError`: logits or boxes are missing, or there are sizes for another number of images.
        """
        logits, boxes = output_field(outputs, "logits"), output_field(outputs, "pred_boxes")
        if logits is None or boxes is None:
            raise ValueError("the outputs need `logits` and `pred_boxes`")
        logits, boxes = torch.as_tensor(logits), torch.as_tensor(boxes)
        if target_sizes is not None:
            target_sizes = as_sizes(target_sizes)
            if len(target_sizes) != len(logits):
                raise ValueError(f"got {len(target_sizes)} `target_sizes` for a batch of {len(logits)} images")
        return best_detections(logits, boxes, target_sizes, threshold, top_k)

    def _preprocess_image_like_inputs(self, images: ImageInput, *annotations: Any, **settings: Any) -> BatchFeature:
        batch = super()._preprocess_image_like_inputs(images, *annotations, **settings)
        names = [name for name in batch if name not in self.model_input_names]
        if names:
            columns = [batch.pop(name) for name in names]
            batch["labels"] = [BatchFeature(dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
        return batch

    def _labels(
        self, annotations: Any, *, sizes: list[ImageSizes], settings: dict[str, Any]
    ) -> dict[str, list[np.ndarray]]:
        if annotations is None:
            return {}
        labels = detection_labels(annotations, sizes)
        names = [name for name in labels[0] if all(name in image for image in labels)]  # not every image has an id
        return {name: [image[name] for image in labels] for name in names}


class ProScaleDinoImageProcessorPil(ProScaleDinoImageProcessorMixin, PillowPixels):
    __doc__ = ProScaleDinoImageProcessorMixin.__doc__

    def __init__(self, **kwargs: Unpack[ProScaleDinoImageProcessorKwargs]):
        super().__init__(**kwargs)


class ProScaleDinoImageProcessor(ProScaleDinoImageProcessorMixin, TorchvisionPixels):
    __doc__ = ProScaleDinoImageProcessorMixin.__doc__

    def __init__(self, **kwargs: Unpack[ProScaleDinoImageProcessorKwargs]):
        super().__init__(**kwargs)
