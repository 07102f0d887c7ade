"""Packed masks: what goes in comes out, under the transforms of images too, and nothing big is made on the way."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from proscale_hf.processing.packed_masks import (
    number_of_planes,
    pack_masks,
    pack_segment_map,
    present_objects,
    select_objects,
    unpack_masks,
)


OBJECTS = [0, 1, 7, 8, 15, 16, 40]  # void and seven objects fill a plane


def overlapping_masks(objects: int, height: int = 13, width: int = 17) -> torch.Tensor:
    """Random masks, void in a corner."""
    generator = torch.Generator().manual_seed(objects)
    masks = (torch.rand((objects, height, width), generator=generator) > 0.5).to(torch.uint8)
    masks[:, :4, :5] = 255
    return masks


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_the_format():
    """Bit j of plane p is index 8 p + j; index 0 is void, index k object k - 1."""
    masks = torch.zeros(9, 1, 4, dtype=torch.uint8)
    masks[0, 0, 0] = 1
    masks[6, 0, 0] = 1
    masks[7, 0, 1] = 1
    masks[8, 0, 1] = 1
    masks[:, 0, 2] = 255
    assert pack_masks(masks).tolist() == [[[2 + 128, 0, 1, 0]], [[0, 1 + 2, 0, 0]]]


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_unpacking_undoes_packing(objects, dtype):
    masks = overlapping_masks(objects)
    planes = pack_masks(masks.to(dtype))
    assert planes.dtype == torch.uint8 and planes.shape == (-(-(objects + 1) // 8), 13, 17)
    assert len(planes) == number_of_planes(objects)
    unpacked = unpack_masks(planes, objects)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked, masks)


def test_another_value_can_mean_void():
    masks = torch.tensor([[[0, 1, 7]]])
    assert unpack_masks(pack_masks(masks, ignore_value=7), 1).tolist() == [[[0, 1, 255]]]


def test_void_in_one_mask_is_void_in_all():
    masks = torch.tensor([[[0, 255]], [[1, 1]]])
    assert unpack_masks(pack_masks(masks), 2).tolist() == [[[0, 255]], [[1, 255]]]


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_a_segment_map_gives_what_its_masks_give(objects, dtype):
    generator = torch.Generator().manual_seed(objects)
    segment_ids = (torch.randperm(300, generator=generator)[: objects + 2] * 100 + 1).tolist()  # in no order
    segment_map = torch.tensor([0, *segment_ids])[torch.randint(0, objects + 3, (13, 17), generator=generator)]
    void = torch.rand((13, 17), generator=generator) > 0.8
    wanted = segment_ids[:objects]  # the pixels of two segments belong to no object
    masks = torch.stack([(segment_map == i).to(torch.uint8) for i in [*wanted, 0]])[:-1].masked_fill_(void, 255)
    planes = pack_segment_map(segment_map.to(dtype), wanted, void)
    assert torch.equal(unpack_masks(planes, objects), masks)
    assert torch.equal(planes[0] & 1, void.to(torch.uint8))


def test_an_id_that_the_map_cannot_hold_is_not_there():
    planes = pack_segment_map(torch.zeros(2, 2, dtype=torch.uint8), [256], torch.zeros(2, 2, dtype=torch.bool))
    assert planes.tolist() == [[[0, 0], [0, 0]]]


def test_an_id_twice_is_refused():
    with pytest.raises(ValueError, match=r"\[5\] more than once"):
        pack_segment_map(torch.zeros(2, 2, dtype=torch.int32), [5, 3, 5], torch.zeros(2, 2, dtype=torch.bool))


def test_200_objects_at_1024_stay_small():
    """Neither the planes nor anything on the way to them; a mask for each would take 200 MiB."""
    segment_map = torch.arange(1024 * 1024, dtype=torch.int32).view(1024, 1024) % 201
    with LargestResult() as largest:
        planes = pack_segment_map(segment_map, list(range(1, 201)), segment_map == 0)
        present = present_objects(planes, 200)
        select_objects(planes, present)
    assert present.all()
    assert largest.bytes <= planes.numel() < 32 * 2**20


@pytest.mark.parametrize(
    "transform",
    [
        lambda maps: maps[:, 2:9, 3:],
        lambda maps: maps.flip(2),
        lambda maps: torch.nn.functional.interpolate(maps[None], size=(31, 9), mode="nearest")[0],
    ],
    ids=["crop", "flip", "resize"],
)
def test_planes_are_transformed_as_masks(transform):
    masks = overlapping_masks(11)
    assert torch.equal(unpack_masks(transform(pack_masks(masks)), 11), transform(masks))


@pytest.mark.parametrize("objects", OBJECTS)
@pytest.mark.parametrize("size", [(1, 1), (13, 17), (16, 16)])
def test_which_objects_are_there_and_only_those(objects, size):
    generator = torch.Generator().manual_seed(objects)
    there = torch.rand(objects, generator=generator) > 0.5
    masks = torch.zeros((objects, *size), dtype=torch.uint8)
    for mask, is_there in zip(masks, there, strict=True):
        pixel = int(torch.randint(0, mask.numel(), (), generator=generator))
        mask.view(-1)[pixel] = is_there
    planes = pack_masks(masks)
    planes[0, 0, 0] |= 1  # void is not an object
    present = present_objects(planes, objects)
    assert present.dtype == torch.bool and torch.equal(present, there)

    selected = select_objects(planes, present)
    assert selected.shape == (number_of_planes(int(there.sum())), *size)
    assert torch.equal(unpack_masks(selected, int(there.sum())), unpack_masks(planes, objects)[there])
    assert selected[0, 0, 0] & 1


@pytest.mark.parametrize(
    ("value", "dtype"), [(2, torch.uint8), (254, torch.uint8), (0.5, torch.float32), (-1, torch.int64)]
)
def test_other_values_than_object_and_void_are_refused(value, dtype):
    masks = torch.zeros((3, 4, 4), dtype=dtype)
    masks[0, 0, 0], masks[1, 1, 1], masks[2, 3, 3] = 1, 255, value
    with pytest.raises(ValueError, match=rf"must be 0 and 1, and 255 where void, but there is \[{value}\]"):
        pack_masks(masks)
    masks[2, 3, 3] = 0
    pack_masks(masks)
