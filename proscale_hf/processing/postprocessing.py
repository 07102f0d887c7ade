"""Post-processing: from query logits to panoptic, semantic and instance results. Pure tensor functions.

The rules are those of Mask2Former's own inference code: mask logits are upsampled to the size of the padded batch, the
padding is cropped, the rest is resized to the target, and then pixels are scored and merged. docs/differences.md says
where transformers' `Mask2FormerImageProcessor` departs from these rules.

Memory is bounded whatever the target size: there is never a tensor of (queries, target height, target width) floats.
Two bilinear resizes in a row are linear and separable, so one matrix gives the rows of the target from the rows of the
logits. The target is therefore worked out in strips of rows, each exactly what the whole would have been. Masks of
instances are made one by one, when they are asked for.
"""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from proscale_hf.processing.sizes import Size, as_sizes


Sizes = Sequence[Size] | Tensor

STRIP_VALUES = 2**22  # float32 values in one strip of (queries or classes, rows, width): 16 MB
COCO_DETECTIONS = 100  # instances of an image that COCO's average precision looks at
LOGIT_LIMIT = 1e30  # half precision can overflow to infinity, and a resize makes NaN of 0 * infinity


def _float32_inference(function: Callable) -> Callable:
    """Compute without gradients, and in float32 even under autocast, since masks lose their edges in bfloat16."""

    @functools.wraps(function)
    def wrapped(class_queries_logits: Tensor, masks_queries_logits: Tensor, **options):
        with torch.no_grad(), torch.autocast(masks_queries_logits.device.type, enabled=False):
            return function(class_queries_logits, masks_queries_logits, **options)

    return wrapped


@_float32_inference
def panoptic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    image_sizes: Sizes,
    target_sizes: Sizes,
    label_ids_to_fuse: Collection[int],
    object_mask_threshold: float = 0.8,
    overlap_threshold: float = 0.8,
    mask_threshold: float = 0.5,
) -> list[dict]:
    """
    Give each pixel to at most one segment (Mask2Former's panoptic inference).

    Args:
        class_queries_logits (`Tensor` of shape `(batch, queries, labels + 1)`): the last label is "no object".
        masks_queries_logits (`Tensor` of shape `(batch, queries, h, w)`): at any stride of the padded batch.
        padded_size: (height, width) of the padded batch that the model saw.
        image_sizes (`(batch, 2)`): true (height, width) of each image inside the padded batch.
        target_sizes (`(batch, 2)`): (height, width) of the wanted maps.
        label_ids_to_fuse: stuff labels; all segments of such a label in an image become one.
        object_mask_threshold: queries whose best class probability is not above it are dropped.
        overlap_threshold: a query that wins a smaller share of its own mask than this is dropped.
        mask_threshold: mask probability from which a pixel belongs to a query's mask.

    Returns:
        `list[dict]`: for each image `"segmentation"`, an int32 (height, width) map of segment ids with 0
        for no segment, and `"segments_info"`, for each segment `{"id", "label_id", "was_fused",
        "score"}` in query order. Ids count up from 1; a fused segment has the score of its first query.

    Raises:
        `ValueError`: for NaN logits, and for sizes that are impossible or not one per image.
    """
    return [
        _panoptic_map(
            class_logits,
            masks,
            set(label_ids_to_fuse),
            object_mask_threshold,
            overlap_threshold,
            mask_threshold,
        )
        for class_logits, masks in _images(
            class_queries_logits, masks_queries_logits, padded_size, image_sizes, target_sizes
        )
    ]


@_float32_inference
def semantic_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    image_sizes: Sizes,
    target_sizes: Sizes,
    return_scores: bool = False,
) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
    """
    Give each pixel the label with the highest sum over queries of class probability times mask probability.

    Args: as for [`panoptic_segmentation`], and
        return_scores: also return the sums. They take labels x height x width floats.

    Returns:
        for each image the int64 (height, width) label map; with `return_scores` a pair of the map and the
        float32 (labels, height, width) sums.

    Raises:
        `ValueError`: for NaN logits, and for sizes that are impossible or not one per image.
    """
    results = []
    for class_logits, masks in _images(
        class_queries_logits, masks_queries_logits, padded_size, image_sizes, target_sizes
    ):
        label_weights = class_logits.softmax(-1)[:, :-1].T  # (labels, queries)
        label_map = torch.empty(masks.target_size, dtype=torch.int64, device=masks.logits.device)
        if return_scores:
            scores = torch.empty((len(label_weights), *masks.target_size), device=masks.logits.device)
        for rows, logits in masks.strips(extra_channels=len(label_weights)):
            strip_scores = torch.tensordot(label_weights, logits.sigmoid_(), dims=1)  # (labels, rows, width)
            label_map[rows] = strip_scores.argmax(0)
            if return_scores:
                scores[:, rows] = strip_scores
        results.append((label_map, scores) if return_scores else label_map)
    return results


@_float32_inference
def instance_segmentation(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    *,
    padded_size: Size,
    image_sizes: Sizes,
    target_sizes: Sizes,
    thing_label_ids: Collection[int],
    top_k: int | None = None,
    score_threshold: float = 0.0,
    mask_threshold: float = 0.5,
) -> list[dict]:
    """
    Best (query, label) pairs with their masks, which may overlap (Mask2Former's instance inference).

    Args: as for [`panoptic_segmentation`], and
        thing_label_ids: labels that have instances; pairs of other labels are dropped after the best were taken.
        top_k: how many pairs are taken, by class probability; `None`: as many as there are queries, but at least 100,
            which is COCO's number.
        score_threshold: pairs with a lower final score are dropped.
        mask_threshold: mask probability above which a pixel belongs to an instance.

    Returns:
        `list[dict]`: for each image, best first, `"scores"` (float32, class probability times the mean mask
        probability inside the mask), `"labels"` (int64) and `"masks"`, [`InstanceMasks`].

    Raises:
        `ValueError`: for NaN logits, and for sizes that are impossible or not one per image.
    """
    return [
        _instances(class_logits, masks, sorted(thing_label_ids), top_k, score_threshold, mask_threshold)
        for class_logits, masks in _images(
            class_queries_logits, masks_queries_logits, padded_size, image_sizes, target_sizes
        )
    ]


@dataclass(frozen=True)
class _QueryMasks:
    """The low-resolution mask logits of one image, and the way to the target's size."""

    logits: Tensor  # (queries, h, w), float32
    padded_size: Size
    image_size: Size
    target_size: Size

    def select(self, queries: Tensor | list[int]) -> "_QueryMasks":
        selected = replace(self, logits=self.logits[queries])
        selected.__dict__["row_weights"] = self.row_weights  # the same for all queries
        return selected

    @functools.cached_property
    def row_weights(self) -> Tensor:
        """(target height, height) what each row of the logits adds to the rows of the target, on the CPU."""
        return self._resize(torch.eye(self.logits.shape[1])[None], axis=0)[0]

    def strips(self, extra_channels: int = 0, above: float | None = None) -> Iterator[tuple[slice, Tensor]]:
        """
        Yield `(rows, logits)`: a slice of the target's rows and the fresh (queries, rows, target width)
        logits there.

        Args:
            extra_channels: values per pixel that the caller makes beside the logits; they make strips
                thinner.
            above: leave out the rows at the top and at the bottom where no logit can be above this.
        """
        queries, row_weights = len(self.logits), self.row_weights
        first, end = 0, self.target_size[0]
        if above is not None:
            wanted = row_weights[:, (self.logits > above).any(2).any(0).cpu()].any(1).nonzero()
            first, end = (wanted[0].item(), wanted[-1].item() + 1) if len(wanted) else (0, 0)
        strip_height = max(1, STRIP_VALUES // ((queries + extra_channels) * self.target_size[1]))
        for top in range(first, end, strip_height):
            rows = slice(top, min(top + strip_height, end))
            sources = row_weights[rows].any(0).nonzero()
            band = slice(sources[0].item(), sources[-1].item() + 1)  # the logits' rows that these rows are made of
            weights = row_weights[rows, band].to(self.logits.device)
            yield rows, self._resize(torch.matmul(weights, self.logits[:, band]), axis=1)  # (queries, rows, width)

    def _resize(self, images: Tensor, axis: int) -> Tensor:
        """Upsample to the padded size, crop, resize to the target: along one axis of (channels, height,
        width)."""

        def along_axis(length: int) -> list[int]:
            size = list(images.shape[-2:])
            size[axis] = length
            return size

        images = images[None]
        for length, crop in (
            (self.padded_size[axis], self.image_size[axis]),
            (self.target_size[axis], self.target_size[axis]),
        ):
            if length != images.shape[axis + 2]:
                images = functional.interpolate(images, size=along_axis(length), mode="bilinear", align_corners=False)
            images = images.narrow(axis + 2, 0, crop)
        return images[0]


def _images(
    class_queries_logits: Tensor,
    masks_queries_logits: Tensor,
    padded_size: Size,
    image_sizes: Sizes,
    target_sizes: Sizes,
) -> Iterator[tuple[Tensor, _QueryMasks]]:
    """Check the arguments, and yield the (queries, labels + 1) class logits and the masks of each image."""
    batch = len(masks_queries_logits)
    padded_size = _checked_sizes([padded_size], 1, "padded_size")[0]
    image_sizes = _checked_sizes(image_sizes, batch, "image_sizes")
    target_sizes = _checked_sizes(target_sizes, batch, "target_sizes")
    for image_size in image_sizes:
        if image_size[0] > padded_size[0] or image_size[1] > padded_size[1]:
            raise ValueError(f"image size {image_size} does not fit into the padded size {padded_size}")
    if class_queries_logits.isnan().any() or masks_queries_logits.isnan().any():
        raise ValueError("the model's logits hold NaN: check its weights (or its precision) before post-processing")

    for class_logits, mask_logits, image_size, target_size in zip(
        class_queries_logits, masks_queries_logits, image_sizes, target_sizes, strict=True
    ):
        class_logits, mask_logits = (
            logits.float().clamp(-LOGIT_LIMIT, LOGIT_LIMIT) for logits in (class_logits, mask_logits)
        )
        yield class_logits, _QueryMasks(mask_logits, padded_size, image_size, target_size)


def _checked_sizes(sizes: Sizes, count: int, name: str) -> list[Size]:
    """Check that there is one possible size for each image."""
    sizes = as_sizes(sizes)
    if len(sizes) != count:
        raise ValueError(f"{name} has {len(sizes)} entries for a batch of {count}: give one (height, width) per image")
    if any(min(size) < 1 for size in sizes):
        raise ValueError(f"{name} must be at least 1 x 1, got {sizes}")
    return sizes


def _panoptic_map(
    class_logits: Tensor,
    masks: _QueryMasks,
    label_ids_to_fuse: set[int],
    object_mask_threshold: float,
    overlap_threshold: float,
    mask_threshold: float,
) -> dict:
    scores, labels = class_logits.softmax(-1).max(-1)
    no_object = class_logits.shape[-1] - 1
    kept = ((labels != no_object) & (scores > object_mask_threshold)).nonzero().flatten()
    owner = torch.zeros(masks.target_size, dtype=torch.int32, device=class_logits.device)  # 1 + the winning query
    if len(kept) == 0:
        return {"segmentation": owner, "segments_info": []}

    scores, labels = scores[kept], labels[kept]
    mask_area, won_area, segment_area = torch.zeros((3, len(kept)), dtype=torch.int64, device=owner.device)
    for rows, logits in masks.select(kept).strips(extra_channels=len(kept)):
        probabilities = logits.sigmoid_()
        inside = probabilities >= mask_threshold
        winner = probabilities.mul_(scores[:, None, None]).max(0).indices  # (rows, width); argmax is slower
        mask_area += inside.flatten(1).sum(1, dtype=torch.int32)  # much faster than int64
        won_area += winner.flatten().bincount(minlength=len(kept))
        strip_owner = (winner + 1) * inside.gather(0, winner[None])[0]
        segment_area += strip_owner.flatten().bincount(minlength=len(kept) + 1)[1:]
        owner[rows] = strip_owner

    segment_ids = [0]  # of owner 0 (nobody), 1, 2, ...
    fused_ids: dict[int, int] = {}  # label id -> segment id
    segments_info: list[dict] = []
    per_query = (scores, labels, segment_area, won_area, mask_area)
    for score, label_id, area, won, mask in zip(*(values.tolist() for values in per_query), strict=True):
        # pixels that are won outside the query's own mask count in the overlap test, as in the original
        if area == 0 or won / mask < overlap_threshold:
            segment_ids.append(0)
        elif label_id in fused_ids:
            segment_ids.append(fused_ids[label_id])
        else:
            segment_id = len(segments_info) + 1
            segment_ids.append(segment_id)
            was_fused = label_id in label_ids_to_fuse
            if was_fused:
                fused_ids[label_id] = segment_id
            segments_info.append({"id": segment_id, "label_id": label_id, "was_fused": was_fused, "score": score})
    ids = torch.tensor(segment_ids, dtype=torch.int32, device=owner.device)
    for strip in owner.split(max(1, STRIP_VALUES // owner.shape[1])):  # in place: an index of the whole map is large
        strip.copy_(ids[strip.long()])
    return {"segmentation": owner, "segments_info": segments_info}


def _instances(
    class_logits: Tensor,
    masks: _QueryMasks,
    thing_label_ids: list[int],
    top_k: int | None,
    score_threshold: float,
    mask_threshold: float,
) -> dict:
    probabilities = class_logits.softmax(-1)[:, :-1]  # (queries, labels)
    top_k = max(COCO_DETECTIONS, len(probabilities)) if top_k is None else top_k
    scores, pairs = probabilities.flatten().topk(min(top_k, probabilities.numel()))
    queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
    # the final score is never above the class score: pairs below the threshold now are below it in the end
    kept = torch.isin(labels, labels.new_tensor(thing_label_ids)) & (scores >= score_threshold)
    scores, labels, queries = scores[kept], labels[kept], queries[kept]
    logit_threshold = torch.tensor(mask_threshold).logit().item()
    scores = scores * _mask_scores(masks, queries, logit_threshold)
    best_first = scores.argsort(descending=True, stable=True)
    best_first = best_first[scores[best_first] >= score_threshold]
    found = InstanceMasks(masks, queries[best_first].tolist(), logit_threshold)
    return {"scores": scores[best_first], "labels": labels[best_first], "masks": found}


def _mask_scores(masks: _QueryMasks, queries: Tensor, logit_threshold: float) -> Tensor:
    """(instances,) mean probability inside the mask of each query in `queries`; 0 for an empty mask."""
    queries, query_of_instance = queries.unique(return_inverse=True)
    area, probability_sum = torch.zeros((2, len(queries)), device=queries.device)
    if len(queries) == 0:
        return area
    for _, logits in masks.select(queries).strips(extra_channels=len(queries)):
        inside = logits > logit_threshold
        area += inside.flatten(1).sum(1, dtype=torch.int32)  # much faster than int64
        probability_sum += (logits.sigmoid_() * inside).flatten(1).sum(1)
    return (probability_sum / (area + 1e-6))[query_of_instance]


class InstanceMasks(Sequence):
    """
    The masks of an image's instances, best first: bool tensors (height, width).

    Each is made when it is asked for. So whoever takes one after the other, to encode it or to draw it, needs the
    memory of one, whatever their number.
    """

    def __init__(self, masks: _QueryMasks, queries: list[int], logit_threshold: float):
        self._masks, self._queries, self._logit_threshold = masks, queries, logit_threshold

    def __len__(self) -> int:
        return len(self._queries)

    def __getitem__(self, index: int) -> Tensor:
        mask = torch.zeros(self._masks.target_size, dtype=torch.bool, device=self._masks.logits.device)
        query = self._masks.select([self._queries[index]])
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
            for rows, logits in query.strips(above=self._logit_threshold):
                torch.gt(logits[0], self._logit_threshold, out=mask[rows])
        return mask

    def stacked(self) -> Tensor:
        """All of them: bool (instances, height, width)."""
        stack = torch.empty((len(self), *self._masks.target_size), dtype=torch.bool, device=self._masks.logits.device)
        for mask, target in zip(self, stack, strict=True):
            target.copy_(mask)
        return stack

    def id_map(self) -> Tensor:
        """int32 (height, width) map of their indices, -1 where there is none; better ones are on top."""
        ids = torch.full(self._masks.target_size, -1, dtype=torch.int32, device=self._masks.logits.device)
        for index in reversed(range(len(self))):
            ids[self[index]] = index
        return ids
