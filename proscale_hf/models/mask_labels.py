"""Masks and classes of objects as models that segment take them: checked, and packed."""

import warnings

import torch

from proscale_hf.processing.packed_masks import number_of_planes, pack_masks


def packed_labels(
    mask_labels: list[torch.Tensor] | None,
    packed_masks: list[torch.Tensor] | None,
    class_labels: list[torch.Tensor] | None,
    pixel_values: torch.Tensor,
    ignore_value: int,
) -> list[torch.Tensor] | None:
    """
    The masks of a batch, packed, in whichever of the two forms they were given.

    Args:
        mask_labels: per image (objects, height, width); 1 = object, 0 = not, `ignore_value` = void.
        packed_masks: instead, per image (planes, height, width) uint8, see `packed_masks.py`.
        class_labels: per image (objects,) integers.
        pixel_values: (batch, channels, height, width), whose sizes the labels have.
        ignore_value: of void pixels.

    Returns:
        Per image (planes, height, width) uint8; None without labels.

    Raises:
        ValueError: see [`check_labels`].
    """
    check_labels(mask_labels, packed_masks, class_labels, pixel_values)
    if mask_labels is None:
        return packed_masks
    return [_packed(f"Image {i}", masks, ignore_value) for i, masks in enumerate(mask_labels)]


def _packed(name: str, masks: torch.Tensor, ignore_value: int) -> torch.Tensor:
    """The masks of an image, packed. A word is said where white was meant for the object, and stands for void."""
    try:
        planes = pack_masks(masks, ignore_value)
    except ValueError as error:
        raise ValueError(f"{name}: `mask_labels`: {error}.") from None
    if not torch.compiler.is_compiling() and planes[0].any() and (planes[0] <= 1).all() and not planes[1:].any():
        warnings.warn(
            f"{name}: no pixel of `mask_labels` is 1, so nothing is learned from its objects; {ignore_value} is void, "
            "and objects are 1.",
            stacklevel=4,
        )
    return planes


def check_labels(
    mask_labels: list[torch.Tensor] | None,
    packed_masks: list[torch.Tensor] | None,
    class_labels: list[torch.Tensor] | None,
    pixel_values: torch.Tensor,
) -> None:
    """Refuse labels that do not fit each other or the batch. Which classes there are is checked by the loss.

    Raises:
        ValueError: see there.
    """
    if mask_labels is not None and packed_masks is not None:
        raise ValueError("Give `mask_labels` or `packed_masks`, not both.")
    name, masks = ("mask_labels", mask_labels) if packed_masks is None else ("packed_masks", packed_masks)
    if (masks is None) != (class_labels is None):
        raise ValueError(f"`{name}` and `class_labels` belong together: give both or neither.")
    if masks is None:
        return
    if not len(masks) == len(class_labels) == len(pixel_values):
        raise ValueError(
            f"`{name}` and `class_labels` need one entry per image: got {len(masks)} and {len(class_labels)} "
            f"for a batch of {len(pixel_values)}."
        )
    for i, (image_masks, classes) in enumerate(zip(masks, class_labels, strict=True)):
        if classes.ndim != 1 or classes.is_floating_point() or classes.dtype == torch.bool:
            raise ValueError(
                f"Image {i}: `class_labels` must be integers of shape (objects,), "
                f"got {classes.dtype} of shape {tuple(classes.shape)}."
            )
        if packed_masks is None:
            is_right, wanted = len(image_masks) == len(classes), f"({len(classes)} objects, height, width)"
        else:
            planes = number_of_planes(len(classes))
            is_right = len(image_masks) == planes and image_masks.dtype == torch.uint8
            wanted = f"uint8 ({planes} planes for {len(classes)} objects, height, width)"
        if image_masks.ndim != 3 or not is_right:
            raise ValueError(
                f"Image {i}: `{name}` must be {wanted} to go with `class_labels`, "
                f"got {image_masks.dtype} of shape {tuple(image_masks.shape)}."
            )
        if image_masks.shape[-2:] != pixel_values.shape[-2:]:
            raise ValueError(
                f"Image {i}: `{name}` are {image_masks.shape[-2]} x {image_masks.shape[-1]}, but the padded batch is "
                f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]}: resize and pad masks as the images."
            )
