"""The sizes that post-processing needs: of the padded batch, of the images in it, and of the results.

Preprocessing decides the first two, so they have to come from there: the model's outputs have them, or the caller says
them. What follows from what is known is filled in here. Nothing is worked out from a processor's settings, since those
of the call may have been others.
"""

import warnings
from typing import Any

from proscale_hf.processing.sizes import Size, as_sizes


HOW_TO_SAY = "give the model `pixel_mask`, or pass `image_sizes=inputs['image_sizes']`"


def batch_sizes(
    batch: int, mask_size: Size, *, padded_sizes: Any, image_sizes: Any, target_sizes: Any
) -> dict[str, Size | list[Size]]:
    """
    Args:
        batch: how many images.
        mask_size: (height, width) of the logits.
        padded_sizes: (batch, 2) or (2,) height and width of the padded batch; `None` if nobody says.
        image_sizes: (batch, 2) of the images in it, without padding; `None` if nobody says.
        target_sizes: (batch, 2) of the wanted results; `None` for those of the images.

    Returns:
        `padded_size`, and lists of `image_sizes` and `target_sizes`.

    Raises:
        ValueError: there is another number of sizes than images, the batch was not one, or a size is missing that only
            a guess could give; the message says what to pass.
    """
    targets = _one_for_each(target_sizes, batch, "target_sizes")
    images = _one_for_each(image_sizes, batch, "image_sizes")
    padded = _one_size(padded_sizes)
    if padded is None:  # of a batch without padding, masks have one stride
        padded = _whole_multiple(images or targets, mask_size)
    if images is None:
        if targets is None or (padded is not None and set(targets) == {padded}):
            images = None if padded is None else [padded] * batch  # results for the whole batch, as labels are
        elif batch == 1:
            warnings.warn(
                f"the outputs do not say which part of the batch is the image, so all of it is taken; {HOW_TO_SAY}",
                stacklevel=4,  # the caller of post-processing
            )
            padded = padded or mask_size
            images = [padded]
        else:
            raise ValueError(f"the outputs do not say which part of the padded batch each image is: {HOW_TO_SAY}")
    if padded is None:
        raise ValueError(
            "the outputs do not say how large the batch was: pass `padded_size`, height and width of `pixel_values`"
        )
    return {"padded_size": padded, "image_sizes": images, "target_sizes": images if targets is None else targets}


def _one_for_each(sizes: Any, batch: int, name: str) -> list[Size] | None:
    if sizes is None:
        return None
    sizes = as_sizes(sizes)
    if len(sizes) != batch:
        raise ValueError(f"got {len(sizes)} `{name}` for a batch of {batch} images")
    return sizes


def _one_size(padded_sizes: Any) -> Size | None:
    if padded_sizes is None:
        return None
    values = padded_sizes.tolist() if hasattr(padded_sizes, "tolist") else list(padded_sizes)
    sizes = sorted(set(as_sizes([values] if isinstance(values[0], int) else values)))
    if len(sizes) > 1:
        raise ValueError(f"the outputs are of batches of the sizes {sizes}: post-process one batch at a time")
    return sizes[0]


def _whole_multiple(sizes: list[Size] | None, mask_size: Size) -> Size | None:
    """The size that all have, if height and width are the same whole multiple of the masks'."""
    if sizes is None or len(set(sizes)) > 1:
        return None
    height, width = sizes[0]
    stride = height // mask_size[0]
    return (height, width) if (height, width) == (stride * mask_size[0], stride * mask_size[1]) else None
