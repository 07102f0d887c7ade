"""Packed masks, an image's targets between file and loss: one bit per object and pixel, in planes of eight bits.

Packed, 200 objects at 1024 x 1024 take 27 MB. Planes are uint8 (planes, height, width), so nearest-neighbour resizing,
crops and flips work on them as on any image. Bit j of plane p, of value `1 << j`, says where index 8 p + j is: index 0
is void, the pixels that nobody has labelled, and index k is object k - 1, in the order of the class labels. Objects may
overlap. Where void is set, the other bits do not matter.
"""

import torch

from proscale_hf.files.text import few


VOID_VALUE = 255  # in masks that are not packed


def number_of_planes(objects: int) -> int:
    """How many planes hold void and this many objects."""
    return objects // 8 + 1


def pack_masks(masks: torch.Tensor, ignore_value: int = VOID_VALUE) -> torch.Tensor:
    """Pack one mask per object.

    Args:
        masks: (objects, height, width) of any type; 1 = object, 0 = not the object, `ignore_value` = void. A pixel that
            is void in one of the masks is void for all.
        ignore_value: the value of void pixels.

    Returns:
        (planes, height, width) uint8.

    Raises:
        ValueError: a mask has another value; not checked in a compiled graph.
    """
    planes = masks.new_zeros((number_of_planes(len(masks)), *masks.shape[1:]), dtype=torch.uint8)
    is_known = torch.ones((), dtype=torch.bool, device=masks.device)
    for index, mask in enumerate(masks, start=1):
        is_object, is_void = mask == 1, mask == ignore_value
        planes[index // 8] |= is_object.to(torch.uint8) << index % 8
        planes[0] |= is_void
        is_known &= (is_object | is_void | (mask == 0)).all()
    if not torch.compiler.is_compiling() and not is_known:
        wrong = masks[(masks != 0) & (masks != 1) & (masks != ignore_value)].unique().tolist()
        raise ValueError(f"masks must be 0 and 1, and {ignore_value} where void, but there is {few(wrong)}")
    return planes


def pack_segment_map(segment_map: torch.Tensor, segment_ids: list[int], void: torch.Tensor) -> torch.Tensor:
    """Pack a map of segments, without a mask for each.

    Args:
        segment_map: (height, width) integers, the segment each pixel belongs to.
        segment_ids: the segments that are objects, in order. Pixels of other ids belong to no object.
        void: (height, width) bool.

    Returns:
        (planes, height, width) uint8.

    Raises:
        ValueError: `segment_ids` holds an id more than once.
    """
    if len(set(segment_ids)) < len(segment_ids):
        twice = sorted({segment_id for segment_id in segment_ids if segment_ids.count(segment_id) > 1})
        raise ValueError(f"`segment_ids` holds {twice} more than once.")
    planes = torch.zeros(
        (number_of_planes(len(segment_ids)), *segment_map.shape), dtype=torch.uint8, device=segment_map.device
    )
    if segment_ids:
        ids, order = torch.tensor(segment_ids, dtype=torch.int64, device=planes.device).sort()
        pixels = segment_map.long()
        place = torch.bucketize(pixels, ids).clamp_(max=len(ids) - 1)
        index = (order[place] + 1).masked_fill_(ids[place] != pixels, 0)  # (height, width), 0 = no object
        bit = (index != 0).to(torch.uint8) << (index % 8).to(torch.uint8)
        planes.scatter_(0, (index // 8)[None], bit[None])
    planes[0] |= void
    return planes


def unpack_masks(planes: torch.Tensor, objects: int) -> torch.Tensor:
    """One mask per object: uint8 (objects, height, width); 1 = object, 0 = not, 255 = void."""
    masks = torch.stack([_pixels_of(planes, index) for index in range(objects + 1)])
    return masks[1:].masked_fill_(masks[0].bool(), VOID_VALUE)


def present_objects(planes: torch.Tensor, objects: int) -> torch.Tensor:
    """Which objects have at least one pixel, after a crop for example: (objects,) bool."""
    seen = planes.flatten(1)  # (planes, pixels)
    while seen.shape[1] > 1:  # one half is combined with the other; of an odd number both have the middle
        half = (seen.shape[1] + 1) // 2
        seen = seen[:, :half] | seen[:, -half:]
    bits = torch.arange(8, dtype=torch.uint8, device=planes.device)
    return (seen >> bits & 1).flatten().bool()[1 : objects + 1]


def select_objects(planes: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Planes with only the objects that are `kept`, (objects,) bool, and with void."""
    indices = [0, *(kept.nonzero().flatten() + 1).tolist()]
    selected = planes.new_zeros((number_of_planes(len(indices) - 1), *planes.shape[1:]))
    for new, old in enumerate(indices):
        selected[new // 8] |= _pixels_of(planes, old) << new % 8
    return selected


def _pixels_of(planes: torch.Tensor, index: int) -> torch.Tensor:
    """(height, width) uint8, 1 where the bit of an index is set."""
    return planes[index // 8] >> index % 8 & 1
