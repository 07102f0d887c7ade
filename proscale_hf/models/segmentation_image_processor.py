"""What the image processors of segmentation share: labels are masks, and logits become maps."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput

from proscale_hf.models.image_processor import ImageProcessorMixin, PaddedImagesKwargs
from proscale_hf.processing.labels import Annotations, LabelRules, make_labels
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation
from proscale_hf.processing.run_length import coco_mask, encode_mask
from proscale_hf.processing.sizes import ImageSizes, Size, as_sizes, resized_size


class SegmentationImagesKwargs(PaddedImagesKwargs, total=False):
    """
    Settings beyond those of every image processor; all are saved in `preprocessor_config.json`.

    size_divisor (`int`, *optional*, defaults to 32):
        The padded height and width are multiples of it; 0 or 1 for any size. `pad_size` is taken as it is.
    ignore_index (`int`, *optional*, defaults to 255):
        Id of void pixels in segmentation maps that hold ids.
    do_reduce_labels (`bool`, *optional*, defaults to `False`):
        Class 0 of the labels means background, and the other classes are shifted down by one. In maps of classes
        background becomes void. In instance data (a mapping, instance masks, COCO panoptic) it is a place without
        objects, which masks must not cover.
    num_labels (`int`, *optional*):
        Number of classes; labels beyond it raise an error.
    label_ids_to_fuse (`list[int]`, *optional*, defaults to `[]`):
        The stuff classes. Panoptic results have at most one segment of each; instance results have none.
    """

    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    label_ids_to_fuse: list[int] | tuple[int, ...] | set[int] | None


class SegmentationImageProcessorMixin(ImageProcessorMixin):
    """
    Makes a padded batch of images, with masks as labels, and panoptic, semantic and instance maps of a model's outputs.

    Images: PIL images of any mode, paths, URLs, arrays and tensors. An EXIF orientation is applied (sizes in
    `target_sizes` and of labels are those of the upright image), transparency is laid over white, 16-bit
    values are brought to 8 bits, and grey becomes RGB.
    """

    ignore_index = 255
    do_reduce_labels = False
    label_ids_to_fuse = ()

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.label_ids_to_fuse = sorted(int(label_id) for label_id in self.label_ids_to_fuse)

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
        padded_size: Size | None = None,
    ) -> list[dict]:
        """
        Panoptic results of a batch, see [`~postprocessing.panoptic_segmentation`]. The defaults are the
        original's.

        Args:
            outputs: of the model; or an object or a dict with `class_queries_logits` and `masks_queries_logits`, as
                tensors or arrays. It may also have (batch, 2) `padded_sizes`, the size of the batch that the model saw,
                and `image_sizes`, those of the images in it. The model's outputs have both, if it got a `pixel_mask`.
                Without `image_sizes` they are worked out from `target_sizes` and this processor's `size`.
            threshold: queries whose best class probability is not above it are dropped.
            mask_threshold: mask probability from which a pixel belongs to a query's mask.
            overlap_mask_area_threshold: queries that win a smaller share of their masks are dropped.
            label_ids_to_fuse: stuff classes; `None`: those of the processor.
            target_sizes: (height, width) for each image, a list or a (batch, 2) tensor; `None`: as the model
                saw it.
            padded_size: (height, width) of the batch that the model saw, for outputs without `padded_sizes`. Neither is
                needed where all `target_sizes` are one multiple of the masks' size: then the maps are of the whole
                batch, as its labels are.

        Returns:
            `list[dict]`: `"segmentation"`, int32 (height, width) with 0 for none, and `"segments_info"`,
            dicts of `"id"`, `"label_id"`, `"was_fused"`, `"score"`.

        Raises:
            `ValueError`: logits are missing or hold NaN, sizes do not fit, or that of the batch is not known.
        """
        if label_ids_to_fuse is None:
            label_ids_to_fuse = self.label_ids_to_fuse
        logits = _logits(outputs)
        return panoptic_segmentation(
            *logits,
            **self._sizes(outputs, logits[1], target_sizes, padded_size),
            label_ids_to_fuse=label_ids_to_fuse,
            object_mask_threshold=threshold,
            overlap_threshold=overlap_mask_area_threshold,
            mask_threshold=mask_threshold,
        )

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Any = None,
        return_segmentation_scores: bool = False,
        padded_size: Size | None = None,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Semantic maps of a batch, see [`~postprocessing.semantic_segmentation`].

        Args:
            outputs, target_sizes, padded_size: as in [`post_process_panoptic_segmentation`].
            return_segmentation_scores: give for each image an object with `segmentation` and
                `segmentation_scores`, float32 (labels, height, width), which take much memory at large sizes.

        Returns:
            for each image the int64 (height, width) label map, or the said object.

        Raises:
            `ValueError`: as in [`post_process_panoptic_segmentation`].
        """
        logits = _logits(outputs)
        results = semantic_segmentation(
            *logits,
            **self._sizes(outputs, logits[1], target_sizes, padded_size),
            return_scores=return_segmentation_scores,
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
        padded_size: Size | None = None,
    ) -> list[dict]:
        """
        Instances of a batch, see [`~postprocessing.instance_segmentation`]: all classes but
        `label_ids_to_fuse`.

        Args:
            outputs, target_sizes, padded_size: as in [`post_process_panoptic_segmentation`].
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

        Raises:
            `ValueError`: as in [`post_process_panoptic_segmentation`], or for two forms of masks at a time.
            `ImportError`: pycocotools is needed, and is not installed.
        """
        if return_coco_annotation and return_binary_maps:
            raise ValueError("choose one of `return_coco_annotation` and `return_binary_maps`, not both")
        if return_coco_annotation and coco_mask is None:
            raise ImportError("`return_coco_annotation` needs pycocotools: pip install pycocotools")
        logits = _logits(outputs)
        num_labels = logits[0].shape[-1] - 1
        predictions = instance_segmentation(
            *logits,
            **self._sizes(outputs, logits[1], target_sizes, padded_size),
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
                segmentation = [encode_mask(mask.cpu().numpy()) for mask in prediction["masks"]]
            else:
                segmentation = _id_map(prediction["masks"])
            results.append({"segmentation": segmentation, "segments_info": segments_info})
        return results

    def _translate_old_names(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Understand also `reduce_labels`."""
        kwargs = super()._translate_old_names(kwargs)
        reduce_labels = kwargs.pop("reduce_labels", None)
        if reduce_labels is not None:
            kwargs.setdefault("do_reduce_labels", reduce_labels)
        return kwargs

    def _labels(
        self, *annotations: Any, sizes: list[ImageSizes], settings: dict[str, Any]
    ) -> dict[str, list[np.ndarray]]:
        annotations = Annotations(*annotations)
        if annotations.segmentation_maps is None:
            return {}
        rules = LabelRules(settings["ignore_index"], bool(settings["do_reduce_labels"]), settings["num_labels"])
        masks, classes = zip(*make_labels(annotations, sizes, rules), strict=True)
        return {"mask_labels": list(masks), "class_labels": list(classes)}

    def _sizes(
        self, outputs: Any, masks_queries_logits: torch.Tensor, target_sizes: Any, padded_size: Size | None
    ) -> dict[str, Any]:
        """The sizes for post-processing: of the padded batch, of the images in it, and of the results."""
        batch, _, *mask_size = masks_queries_logits.shape
        if target_sizes is not None:
            target_sizes = as_sizes(target_sizes)
            if len(target_sizes) != batch:
                raise ValueError(f"got {len(target_sizes)} `target_sizes` for a batch of {batch} images")
        if padded_size is None:
            padded_size = _padded_size(_field(outputs, "padded_sizes"), target_sizes, mask_size)
        image_sizes = _field(outputs, "image_sizes")
        if image_sizes is not None:
            image_sizes = as_sizes(image_sizes)
        elif target_sizes is not None:
            image_sizes = [self._size_in_batch(target_size, padded_size) for target_size in target_sizes]
        else:
            image_sizes = [padded_size] * batch
        return {
            "padded_size": padded_size,
            "image_sizes": image_sizes,
            "target_sizes": image_sizes if target_sizes is None else target_sizes,
        }

    def _size_in_batch(self, target_size: Size, padded_size: Size) -> Size:
        """The size that an image of the target's size has in the batch; all of it, if that cannot be."""
        if target_size == tuple(padded_size):  # of the batch's own labels, which are padded as it is
            return padded_size
        size = resized_size(target_size, self.size) if self.do_resize else target_size
        return size if size[0] <= padded_size[0] and size[1] <= padded_size[1] else padded_size


def _padded_size(padded_sizes: Any, target_sizes: list[Size] | None, mask_size: Size) -> Size:
    """The size of the batch, from what is known of it."""
    if padded_sizes is not None:
        sizes = sorted(set(as_sizes(padded_sizes)))
        if len(sizes) > 1:
            raise ValueError(f"the outputs are of batches of the sizes {sizes}: post-process one batch at a time")
        return sizes[0]
    # Evaluation loops such as those of transformers' scripts keep the logits alone, and ask for the labels' size.
    if target_sizes is not None and len(set(target_sizes)) == 1:
        height, width = target_sizes[0]
        stride = height // mask_size[0]
        if (height, width) == (stride * mask_size[0], stride * mask_size[1]):
            return height, width
    raise ValueError(
        "the outputs do not say how large the padded batch was: pass `padded_size=(height, width)` of `pixel_values`"
    )


def _field(outputs: Any, name: str) -> Any:
    return outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)


def _logits(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = _field(outputs, "class_queries_logits"), _field(outputs, "masks_queries_logits")
    if logits[0] is None or logits[1] is None:
        raise ValueError("the outputs need `class_queries_logits` and `masks_queries_logits`")
    return torch.as_tensor(logits[0]), torch.as_tensor(logits[1])


def _id_map(masks: torch.Tensor) -> torch.Tensor:
    """int32 (height, width) map of the masks' indices, -1 where there is none; earlier masks are on top."""
    id_map = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    for index in reversed(range(len(masks))):
        id_map[masks[index]] = index
    return id_map
