"""What the image processors of segmentation share: labels are masks, and logits become maps."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers.image_processing_outputs import SemanticSegmentationPostProcessorOutput
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import ImageInput

from proscale_hf.files.text import few
from proscale_hf.models.image_processor import ImageProcessorMixin, PaddedImagesKwargs, output_field
from proscale_hf.processing.batch_sizes import batch_sizes
from proscale_hf.processing.labels import Annotations, LabelRules, make_labels
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation
from proscale_hf.processing.run_length import coco_mask, encode_mask
from proscale_hf.processing.settings import check_settings
from proscale_hf.processing.sizes import ImageSizes, Size


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
        The stuff classes, for outputs of a model that does not say which they are. Panoptic results have at most one
        segment of each; instance results have none.
    top_k (`int`, *optional*):
        How many instances an image has at most. Without it: as many as the model has queries, but at least 100.
    """

    ignore_index: int | None
    do_reduce_labels: bool
    num_labels: int | None
    label_ids_to_fuse: list[int] | tuple[int, ...] | set[int] | None
    top_k: int | None


class SegmentationImageProcessorMixin(ImageProcessorMixin):
    """
    Makes a padded batch of images, with masks as labels, and panoptic, semantic and instance maps of a model's outputs.

    Images: PIL images of any mode, paths, URLs, arrays and tensors. An EXIF orientation is applied (sizes in
    `target_sizes` and of labels are those of the upright image), transparency is laid over white, and grey becomes RGB.
    Values become 0 to 255 by the rule of `processing/value_range.py`, before `rescale_factor` is applied.
    """

    ignore_index = 255
    do_reduce_labels = False
    label_ids_to_fuse = ()
    top_k = None

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.label_ids_to_fuse = sorted(int(label_id) for label_id in self.label_ids_to_fuse or ())

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
            (batch, height, width), 1 where the image is; `image_sizes` int64 (batch, 2), height and width of each
            image in the batch, without padding; with labels the lists `mask_labels`, uint8 (objects, height, width)
            with 1 = object, 0 = not, 255 = void, and `class_labels`, int64 (objects,). Tensors or arrays as
            `return_tensors` says, by default what the backend works with.

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
        image_sizes: Any = None,
    ) -> list[dict]:
        """
        Panoptic results of a batch, see [`~postprocessing.panoptic_segmentation`]. The defaults are the
        original's.

        Args:
            outputs: of the model; or an object or a dict with `class_queries_logits` and `masks_queries_logits`, as
                tensors or arrays. It may also have what the model's outputs have: (batch, 2) `padded_sizes`, the size
                of the batch that the model saw; (batch, 2) `image_sizes`, those of the images in it, if the model was
                given them or a `pixel_mask`; (batch, labels) bool `stuff_labels`.
            threshold: queries whose best class probability is not above it are dropped.
            mask_threshold: mask probability from which a pixel belongs to a query's mask.
            overlap_mask_area_threshold: queries that win a smaller share of their masks are dropped.
            label_ids_to_fuse: stuff classes; `None`: those that the model's outputs name, or else those of the
                processor.
            target_sizes: (height, width) for each image, a list or a (batch, 2) tensor; `None`: as the model
                saw it.
            padded_size: (height, width) of the batch that the model saw, for outputs without `padded_sizes`. Neither is
                needed where all `target_sizes` are one multiple of the masks' size: then the maps are of the whole
                batch, as its labels are.
            image_sizes: (height, width) of each image in the batch, as preprocessing returns them, for outputs without
                `image_sizes`. Without both, a single image is taken to fill its batch, with a warning.

        Returns:
            `list[dict]`: `"segmentation"`, int32 (height, width) with 0 for none, and `"segments_info"`,
            dicts of `"id"`, `"label_id"`, `"was_fused"`, `"score"`.

        Raises:
            `ValueError`: logits are missing or hold NaN, sizes do not fit, or a size is not known.
        """
        return panoptic_segmentation(
            **_facts(outputs, target_sizes, padded_size, image_sizes),
            label_ids_to_fuse=self._stuff(outputs, label_ids_to_fuse),
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
        image_sizes: Any = None,
    ) -> list[torch.Tensor] | list[SemanticSegmentationPostProcessorOutput]:
        """
        Semantic maps of a batch, see [`~postprocessing.semantic_segmentation`].

        Args:
            outputs, target_sizes, padded_size, image_sizes: as in [`post_process_panoptic_segmentation`].
            return_segmentation_scores: give for each image an object with `segmentation` and
                `segmentation_scores`, float32 (labels, height, width), which take much memory at large sizes.

        Returns:
            for each image the int64 (height, width) label map, or the said object.

        Raises:
            `ValueError`: as in [`post_process_panoptic_segmentation`].
        """
        results = semantic_segmentation(
            **_facts(outputs, target_sizes, padded_size, image_sizes), return_scores=return_segmentation_scores
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
        image_sizes: Any = None,
        top_k: int | None = None,
        label_ids_to_fuse: Iterable[int] | None = None,
    ) -> list[dict]:
        """
        Instances of a batch, see [`~postprocessing.instance_segmentation`]: of all classes but stuff.

        Args:
            outputs, target_sizes, padded_size, image_sizes, label_ids_to_fuse: as in
                [`post_process_panoptic_segmentation`].
            threshold: instances with a lower score are dropped.
            mask_threshold: mask probability above which a pixel belongs to an instance.
            overlap_mask_area_threshold: not used, instances may overlap; transformers' signature has it.
            return_coco_annotation: give masks as COCO run-length encodings (needs pycocotools).
            return_binary_maps: give masks as one bool tensor. It takes instances x height x width bytes; the other
                forms do not.
            top_k: how many pairs of query and label are looked at, the surest first, before stuff is dropped; so it is
                the largest number of instances. `None`: the processor's `top_k`.

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
        check_settings({"top_k": top_k})
        facts = _facts(outputs, target_sizes, padded_size, image_sizes)
        num_labels = facts["class_queries_logits"].shape[-1] - 1
        predictions = instance_segmentation(
            **facts,
            thing_label_ids=set(range(num_labels)) - self._stuff(outputs, label_ids_to_fuse),
            top_k=self.top_k if top_k is None else top_k,
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
                segmentation = prediction["masks"].stacked()
            elif return_coco_annotation:
                segmentation = [encode_mask(mask.cpu().numpy()) for mask in prediction["masks"]]
            else:
                segmentation = prediction["masks"].id_map()
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

    def _stuff(self, outputs: Any, label_ids_to_fuse: Iterable[int] | None) -> set[int]:
        """The stuff labels: as the caller says, else as the model says, else as this processor says."""
        if label_ids_to_fuse is not None:
            return set(label_ids_to_fuse)
        own, flags = set(self.label_ids_to_fuse), output_field(outputs, "stuff_labels")
        if flags is None:
            if own and output_field(outputs, "padded_sizes") is None:  # not a model's outputs: whose labels are they?
                warnings.warn(
                    f"the outputs do not say which labels are stuff, so `label_ids_to_fuse` of the image processor is "
                    f"taken: {few(own)}; it holds for the labels of the model that it was saved with",
                    stacklevel=3,
                )
            return own
        stuff = set(np.flatnonzero(np.asarray(torch.as_tensor(flags)[0].cpu())).tolist())
        if own and own != stuff:
            warnings.warn(
                f"the stuff labels are those of the model, {few(stuff)}, and not "
                f"`label_ids_to_fuse` of the image processor, {few(own)}; correct `categories` of the "
                "model's configuration, or pass `label_ids_to_fuse`",
                stacklevel=3,
            )
        return stuff


def _facts(outputs: Any, target_sizes: Any, padded_size: Any, image_sizes: Any) -> dict[str, Any]:
    """Logits and sizes for post-processing, from the outputs and from what the caller says."""
    classes, masks = _logits(outputs)
    sizes = batch_sizes(
        len(masks),
        tuple(masks.shape[-2:]),
        padded_sizes=output_field(outputs, "padded_sizes") if padded_size is None else padded_size,
        image_sizes=output_field(outputs, "image_sizes") if image_sizes is None else image_sizes,
        target_sizes=target_sizes,
    )
    return {"class_queries_logits": classes, "masks_queries_logits": masks, **sizes}


def _logits(outputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logits = output_field(outputs, "class_queries_logits"), output_field(outputs, "masks_queries_logits")
    if logits[0] is None or logits[1] is None:
        raise ValueError("the outputs need `class_queries_logits` and `masks_queries_logits`")
    return torch.as_tensor(logits[0]), torch.as_tensor(logits[1])
