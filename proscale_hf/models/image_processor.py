"""What the two image processors share: everything but resizing, normalising and padding of pixels.

The facts follow the original (detectron2's test-time resize and Mask2Former's padding): shortest edge 800,
longest 1333, then normalise, then pad with zeros at the right and the bottom to a multiple of 32 and to the
largest of the batch.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ImageInput,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from proscale_hf.hub.code import reference, write_code
from proscale_hf.hub.names import resolved
from proscale_hf.hub.repository import Upload, split_hub_arguments, write_card
from proscale_hf.processing.labels import make_labels
from proscale_hf.processing.pixels import read_pixels
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation
from proscale_hf.processing.sizes import Size, _padded_size, resized_size


try:
    from pycocotools import mask as coco_mask
except ImportError:  # needed for `return_coco_annotation` only
    coco_mask = None

MASK_STRIDE = 4  # of the model's mask logits, in pixels of the padded input


class SegmentationImagesKwargs(ImagesKwargs, total=False):
    """
    Settings beyond those of every image processor; all are saved in `preprocessor_config.json`.

    size_divisor (`int`, *optional*, defaults to 32):
        The padded height and width are multiples of it; 0 or 1 for any size. `pad_size` is taken as it is.
    ignore_index (`int`, *optional*, defaults to 255):
        Id of void pixels in segmentation maps that hold ids.
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Class 0 of the labels is background, and no class: the others are shifted down by one. In maps of
            classes
        background then is void. In instance data (a mapping, instance masks, COCO panoptic) it stays what it
        is there: a place without objects, which masks must not cover.
    num_labels (`int`, *optional*):
        Number of classes; labels beyond it raise an error.
    label_ids_to_fuse (`list[int]`, *optional*, defaults to `[]`):
        The stuff classes. Panoptic results have at most one segment of each; instance results have none.
    """

    size_divisor: int
    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    label_ids_to_fuse: list[int] | tuple[int, ...] | set[int] | None


class SegmentationImageProcessorMixin:
    """
    The common part of the image processors. A backend adds `_normalized_batch` and `_from_numpy`.

    Images: PIL images of any mode, paths, URLs, arrays and tensors. An EXIF orientation is applied (sizes in
    `target_sizes` and of labels are those of the upright image), transparency is laid over white, 16-bit
    values are brought to 8 bits, and grey becomes RGB.
    """

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": 1333}  # noqa: RUF012 - transformers copies class defaults
    default_to_square = False
    do_convert_rgb = True
    do_resize = True
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    size_divisor = 32
    ignore_index = 255
    do_reduce_labels = False
    label_ids_to_fuse = ()
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012

    def __init__(self, **kwargs: Any):
        super().__init__(**self._translate_old_names(kwargs))
        self.label_ids_to_fuse = sorted(int(label_id) for label_id in self.label_ids_to_fuse)

    @staticmethod
    def backends() -> tuple[type, type]:
        """The image processors of the family with Pillow and with torchvision, in the order `auto_map` has them."""
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> "SegmentationImageProcessorMixin":
        """As in transformers, and also by the short name of a published model, see `model_names.py`."""
        with resolved(pretrained_model_name_or_path) as source:
            return super().from_pretrained(source, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The settings, as in transformers, and where the code for both backends is."""
        settings = super().to_dict()
        settings["auto_map"] = {"AutoImageProcessor": [reference(backend) for backend in self.backends()]}
        return settings

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """As in transformers, with the code; a model card that was made for the folder's model gets the input size."""
        hub_arguments = {"commit_message": "Upload image processor", **split_hub_arguments(kwargs)}
        upload = Upload(save_directory, self, **hub_arguments) if push_to_hub else None
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        write_code(save_directory, *self.backends())
        files = super().save_pretrained(save_directory, **kwargs)
        write_card(save_directory)
        if upload is not None:
            upload.send()
        return files

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Upload image processor",
        max_shard_size: int | str | None = None,
        tags: list[str] | str | None = None,
        **hub_arguments: Any,
    ) -> CommitInfo:
        """As in transformers, with the code, and without a model card: that is the model's (so `tags` is not read)."""
        with tempfile.TemporaryDirectory() as folder:
            upload = Upload(folder, self, repo_id, commit_message=commit_message, **hub_arguments)
            self.save_pretrained(folder)
            return upload.send()

    def preprocess(
        self,
        images: ImageInput,
        segmentation_maps: Any = None,
        instance_id_to_semantic_id: Mapping[int, int] | list[Mapping[int, int]] | None = None,
        class_labels: Any = None,
        segments_info: list | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Make a padded batch, and with `segmentation_maps` the labels for training. One item or a list of them;
        arrays may have a leading batch dimension.

        Args:
            images: see the class.
            segmentation_maps: labels, as PIL images, arrays or tensors of the images' heights and widths, in
                one of three forms:
                  - on their own: (height, width) ids, see `instance_id_to_semantic_id`;
                  - with `class_labels`: (objects, height, width) masks of 0 and 1, which may overlap;
                  - with `segments_info`: COCO-panoptic RGB (height, width, 3).
            instance_id_to_semantic_id: class of each id, one mapping for all images or a list of one for
                each. Without it each id is a class. `ignore_index` is void in both cases.
            class_labels: for each image the classes of its masks.
            segments_info: for each image the list of its COCO segments ("id", "category_id", optionally
                "iscrowd"). Id 0 and crowds are void.
            kwargs: settings of the processor, for this call.

        Returns:
            `BatchFeature`: `pixel_values` float32 (batch, channels, height, width); `pixel_mask` int64
            (batch, height, width), 1 where the image is; with labels the lists `mask_labels`, uint8 (objects,
            height, width) with 1 = object, 0 = not, 255 = void, and `class_labels`, int64 (objects,). Tensors
            or arrays as `return_tensors` says, by default what the backend works with.

        Raises:
            `ValueError`: one line that names the image, ids or sizes at fault.
        """
        if segmentation_maps is None and (class_labels is not None or segments_info is not None):
            raise ValueError("`class_labels` and `segments_info` belong to `segmentation_maps`: give those too")
        kwargs = self._translate_old_names(kwargs)
        return super().preprocess(
            images, segmentation_maps, instance_id_to_semantic_id, class_labels, segments_info, **kwargs
        )

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.8,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: Iterable[int] | None = None,
        target_sizes: Any = None,
    ) -> list[dict]:
        """
        Panoptic results of a batch, see [`~postprocessing.panoptic_segmentation`]. The defaults are the
        original's.

        Args:
            outputs: of the model; anything with `class_queries_logits` and `masks_queries_logits`, also a
                dict. `image_sizes`, which models give when they get a `pixel_mask`, says what is padding.
                Without it that is worked out from `target_sizes` and this processor's `size`.
            threshold: queries whose best class probability is not above it are dropped.
            mask_threshold: mask probability from which a pixel belongs to a query's mask.
            overlap_mask_area_threshold: queries that win a smaller share of their masks are dropped.
            label_ids_to_fuse: stuff classes; `None`: those of the processor.
            target_sizes: (height, width) for each image, a list or a (batch, 2) tensor; `None`: as the model
                saw it.

        Returns:
            `list[dict]`: `"segmentation"`, int32 (height, width) with 0 for none, and `"segments_info"`,
            dicts of `"id"`, `"label_id"`, `"was_fused"`, `"score"`.
        """
        if label_ids_to_fuse is None:
            label_ids_to_fuse = self.label_ids_to_fuse
        return panoptic_segmentation(
            *_logits(outputs),
            **self._sizes(outputs, target_sizes),
            label_ids_to_fuse=label_ids_to_fuse,
            object_mask_threshold=threshold,
            overlap_threshold=overlap_mask_area_threshold,
            mask_threshold=mask_threshold,
        )

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Any = None, return_segmentation_scores: bool = False
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Semantic maps of a batch, see [`~postprocessing.semantic_segmentation`].

        Args:
            outputs, target_sizes: as in [`post_process_panoptic_segmentation`].
            return_segmentation_scores: give for each image an object with `segmentation` and
                `segmentation_scores`, float32 (labels, height, width), which take much memory at large sizes.

        Returns:
            for each image the int64 (height, width) label map, or the said object.
        """
        results = semantic_segmentation(
            *_logits(outputs), **self._sizes(outputs, target_sizes), return_scores=return_segmentation_scores
        )
        if not return_segmentation_scores:
            return results
        return [
            SemanticSegmentationPostProcessorOutput({"segmentation": label_map, "segmentation_scores": scores})
            for label_map, scores in results
        ]

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any = None,
        return_coco_annotation: bool | None = False,
        return_binary_maps: bool | None = False,
    ) -> list[dict]:
        """
        Instances of a batch, see [`~postprocessing.instance_segmentation`]: all classes but
        `label_ids_to_fuse`.

        Args:
            outputs, target_sizes: as in [`post_process_panoptic_segmentation`].
            threshold: instances with a lower score are dropped.
            mask_threshold: mask probability above which a pixel belongs to an instance.
            overlap_mask_area_threshold: not used, instances may overlap; transformers' signature has it.
            return_coco_annotation: give masks as COCO run-length encodings (needs pycocotools).
            return_binary_maps: give masks as one bool tensor.

        Returns:
            `list[dict]`: `"segments_info"`, dicts of `"id"` (0, 1, ...), `"label_id"`, `"was_fused"`,
            `"score"`, best first, and `"segmentation"`: an int32 (height, width) map of ids with -1 for none,
            where the better score is on top; or a list of `{"size", "counts"}`, or a bool (instances, height,
            width) tensor, in the order of `"segments_info"`.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("choose one of `return_coco_annotation` and `return_binary_maps`, not both")
        if return_coco_annotation and coco_mask is None:
            raise ImportError("`return_coco_annotation` needs pycocotools: pip install pycocotools")
        logits = _logits(outputs)
        num_labels = logits[0].shape[-1] - 1
        predictions = instance_segmentation(
            *logits,
            **self._sizes(outputs, target_sizes),
            thing_label_ids=set(range(num_labels)) - set(self.label_ids_to_fuse),
            score_threshold=max(threshold, torch.finfo(torch.float32).tiny),  # empty masks have the score 0
            mask_threshold=mask_threshold,
        )
        results = []
        for prediction in predictions:
            pairs = zip(prediction["labels"].tolist(), prediction["scores"].tolist(), strict=True)
            segments_info = [
                {"id": index, "label_id": label_id, "was_fused": False, "score": score}
                for index, (label_id, score) in enumerate(pairs)
            ]
            if return_binary_maps:
                segmentation = prediction["masks"]
            elif return_coco_annotation:
                segmentation = [_run_length_encoding(mask) for mask in prediction["masks"]]
            else:
                segmentation = _id_map(prediction["masks"])
            results.append({"segmentation": segmentation, "segments_info": segments_info})
        return results

    def _translate_old_names(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Understand `max_size` and `reduce_labels`, which older configurations and scripts still use."""
        kwargs = dict(kwargs)
        max_size = kwargs.pop("max_size", None)
        if max_size is not None and not isinstance(kwargs.get("size"), dict | SizeDict | list | tuple):
            shortest_edge = kwargs.get("size") or self.size["shortest_edge"]
            kwargs["size"] = {"shortest_edge": shortest_edge, "longest_edge": max_size}
        reduce_labels = kwargs.pop("reduce_labels", None)
        if reduce_labels is not None:
            kwargs.setdefault("do_reduce_labels", reduce_labels)
        return kwargs

    def _preprocess_image_like_inputs(
        self,
        images: ImageInput,
        segmentation_maps: Any,
        instance_id_to_semantic_id: Any,
        class_labels: Any,
        segments_info: Any,
        *,
        do_convert_rgb: bool | None,
        input_data_format: Any,
        do_resize: bool | None,
        size: SizeDict,
        pad_size: SizeDict | None,
        size_divisor: int | None,
        ignore_index: int | None,
        do_reduce_labels: bool | None,
        num_labels: int | None,
        return_tensors: Any,
        device: Any = None,
        **pixel_kwargs: Any,
    ) -> BatchFeature:
        images = _flat_list(images)
        if not images:
            raise ValueError("got no images: give at least one")
        if device is None and isinstance(images[0], torch.Tensor):
            device = images[0].device
        image_mean = pixel_kwargs["image_mean"]
        channels = None
        if do_convert_rgb:
            channels = len(image_mean) if isinstance(image_mean, Sequence) else 3
        images = [
            read_pixels(image, channels, input_data_format, name=f"image {index}") for index, image in enumerate(images)
        ]
        original_sizes = [image.shape[1:] for image in images]
        sizes = [resized_size(original, size) if do_resize else original for original in original_sizes]
        padded_size = _padded_size(sizes, pad_size, size_divisor or 1)

        pixel_mask = np.zeros((len(images), *padded_size), dtype=np.int64)
        for mask, (height, width) in zip(pixel_mask, sizes, strict=True):
            mask[:height, :width] = 1
        tensor_type = return_tensors or ("np" if self.backend == "pil" else "pt")
        batch = BatchFeature(
            {
                "pixel_values": self._normalized_batch(images, sizes, padded_size, device=device, **pixel_kwargs),
                "pixel_mask": self._from_numpy(pixel_mask, device),
            },
            tensor_type=tensor_type,
        )
        if segmentation_maps is None:
            return batch

        labels = make_labels(
            segmentation_maps,
            instance_id_to_semantic_id,
            class_labels,
            segments_info,
            original_sizes=original_sizes,
            sizes=sizes,
            padded_size=padded_size,
            ignore_index=ignore_index,
            do_reduce_labels=bool(do_reduce_labels),
            num_labels=num_labels,
        )
        for name, arrays in zip(("mask_labels", "class_labels"), zip(*labels, strict=True), strict=True):
            if tensor_type == "pt":
                arrays = (torch.from_numpy(array).to(batch["pixel_values"].device) for array in arrays)
            batch[name] = list(arrays)
        return batch

    def _sizes(self, outputs: Any, target_sizes: Any) -> dict[str, Any]:
        """The sizes for post-processing: of the padded batch, of the images in it, and of the results."""
        masks_queries_logits = _logits(outputs)[1]
        batch, _, height, width = masks_queries_logits.shape
        padded_size = (MASK_STRIDE * height, MASK_STRIDE * width)
        image_sizes = _field(outputs, "image_sizes")
        if target_sizes is not None:
            target_sizes = [(int(height), int(width)) for height, width in target_sizes]
            if len(target_sizes) != batch:
                raise ValueError(f"got {len(target_sizes)} `target_sizes` for a batch of {batch} images")
        if image_sizes is None:
            image_sizes = [padded_size] * batch
            if target_sizes is not None:
                image_sizes = [self._size_in_batch(target_size, padded_size) for target_size in target_sizes]
        return {
            "padded_size": padded_size,
            "image_sizes": image_sizes,
            "target_sizes": image_sizes if target_sizes is None else target_sizes,
        }

    def _size_in_batch(self, target_size: Size, padded_size: Size) -> Size:
        """The size that an image of the target's size has in the batch; all of it, if that cannot be."""
        if target_size == padded_size:  # the size of the batch's own labels, which are padded as it is
            return padded_size
        size = resized_size(target_size, self.size) if self.do_resize else target_size
        return size if size[0] <= padded_size[0] and size[1] <= padded_size[1] else padded_size


def _flat_list(images: Any) -> list:
    if isinstance(images, list | tuple):
        return [image for item in images for image in _flat_list(item)]
    return list(images) if getattr(images, "ndim", 0) == 4 else [images]


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _logits(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _field(outputs, "class_queries_logits"), _field(outputs, "masks_queries_logits")
    if logits[0] is None or logits[1] is None:
        raise ValueError("the outputs need `class_queries_logits` and `masks_queries_logits`")
    return logits


def _id_map(masks: torch.Tensor) -> torch.Tensor:
    """int32 (height, width) map of the masks' indices, -1 where there is none; earlier masks are on top."""
    id_map = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    for index in reversed(range(len(masks))):
        id_map[masks[index]] = index
    return id_map


def _run_length_encoding(mask: torch.Tensor) -> dict[str, Any]:
    encoding = coco_mask.encode(np.asfortranarray(mask.cpu().numpy().astype(np.uint8)))
    return {
        "size": [int(length) for length in encoding["size"]],
        "counts": encoding["counts"].decode("ascii"),
    }
