"""Image processors: pixels against the original's, labels in all forms, and transformers' contracts."""

import json
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.utils import ModelOutput, is_torchvision_available

from helpers import tiny_model
from paths import FIXTURES, ROOT
from proscale_hf.models import segmentation_image_processor
from proscale_hf.models.mask2former.image_processing_proscale_mask2former import (
    ProScaleMask2FormerImageProcessor,
    ProScaleMask2FormerImageProcessorPil,
)
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation


BACKENDS = [ProScaleMask2FormerImageProcessorPil]
if is_torchvision_available():
    BACKENDS.append(ProScaleMask2FormerImageProcessor)
needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="needs torchvision")


@pytest.fixture(params=BACKENDS, ids=lambda backend: "pil" if backend is BACKENDS[0] else "torchvision")
def backend(request):
    return request.param


def photos():
    return [Image.open(FIXTURES / "postprocess_pixels" / f"image_{index}.png") for index in range(2)]


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def plain(backend, **settings):
    """Without resizing and padding, so that results can be read off."""
    return backend(**{"do_resize": False, "size_divisor": 1, "return_tensors": "pt", **settings})


def labels_of(backend, maps, image_size=(2, 3), size_divisor=1, **arguments):
    """Masks and classes as lists for one image of the given size."""
    processor = backend(do_resize=False, size_divisor=size_divisor)
    batch = processor(np.zeros((*image_size, 3), np.uint8), maps, return_tensors="pt", **arguments)
    assert batch["mask_labels"][0].dtype == torch.uint8
    assert batch["class_labels"][0].dtype == torch.int64
    return batch["mask_labels"][0].tolist(), batch["class_labels"][0].tolist()


# pixels


def test_pixels_equal_the_original(backend):
    batch = backend(do_resize=False)(photos(), return_tensors="pt")
    expected = np.load(FIXTURES / "postprocess_pixels" / "expected.npz")["every_seventh_row"]
    assert batch["pixel_values"].shape == (2, 3, 160, 224)
    assert batch["pixel_values"].dtype == torch.float32
    np.testing.assert_allclose(batch["pixel_values"][:, :, ::7].numpy(), expected, atol=1e-5)
    assert batch["pixel_mask"].dtype == torch.int64
    for mask, (height, width) in zip(batch["pixel_mask"], [(150, 205), (128, 170)], strict=True):
        assert mask.sum() == height * width
        assert mask[:height, :width].all()


def test_pil_backend_resizes_like_the_original():
    (image, _) = photos()
    batch = ProScaleMask2FormerImageProcessorPil()(image)
    resized = np.asarray(image.convert("RGB").resize((1093, 800), Image.Resampling.BILINEAR)) / 255
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(batch["pixel_values"][0, :, :800, :1093].transpose(1, 2, 0), expected, atol=1e-5)
    assert batch["pixel_values"].shape == (1, 3, 800, 1120)
    assert (batch["pixel_values"][..., 1093:] == 0).all()


@needs_torchvision
@pytest.mark.parametrize("settings", [{}, {"size": {"height": 333, "width": 200}}, {"size": 90}])
def test_backends_agree(settings):
    maps = [np.random.default_rng(index).integers(0, 5, image.size[::-1]) for index, image in enumerate(photos())]
    first, second = (backend(**settings)(photos(), maps, return_tensors="pt") for backend in BACKENDS)
    assert (first["pixel_values"] - second["pixel_values"]).abs().mean() <= 5e-3
    assert (first["pixel_values"] - second["pixel_values"]).abs().max() <= 0.1
    assert torch.equal(first["pixel_mask"], second["pixel_mask"])
    for name in ("mask_labels", "class_labels"):
        for one, other in zip(first[name], second[name], strict=True):
            assert torch.equal(one, other)


def test_unknown_size_is_an_error(backend):
    with pytest.raises(ValueError, match="shortest_edge"):
        backend(size={"min_pixels": 10, "max_pixels": 20})(noise(4, 4))


def test_padding_is_zero_after_normalising(backend):
    batch = backend(do_resize=False)([noise(30, 33), noise(40, 20)], return_tensors="pt")
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    padding = (batch["pixel_mask"] == 0)[:, None].expand_as(batch["pixel_values"])
    assert (batch["pixel_values"][padding] == 0).all()


def test_pad_size_fixes_the_batch_size(backend):
    processor = backend(do_resize=False, pad_size={"height": 64, "width": 96})
    assert processor(noise(10, 20), return_tensors="pt")["pixel_mask"].shape == (1, 64, 96)
    with pytest.raises(ValueError, match=r"64 x 96 is too small.*65 x 20"):
        processor(noise(65, 20))


def test_rescale_and_normalise_can_be_left_out(backend):
    image = noise(4, 5)
    pixels = plain(backend, do_rescale=False, do_normalize=False)(image, return_tensors="pt")["pixel_values"]
    assert pixels[0].permute(1, 2, 0).tolist() == image.tolist()
    pixels = plain(backend, do_normalize=False)(image, return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(pixels[0].permute(1, 2, 0), image / 255, rtol=1e-6)


def raw(backend, image, **settings):
    """(height, width, channels) values between 0 and 255 that reach the model."""
    processor = plain(backend, do_rescale=False, do_normalize=False, **settings)
    return processor(image, return_tensors="pt")["pixel_values"][0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("L", (3, 2), 77), 77),
        (Image.new("1", (3, 2), 1), 255),
        (Image.new("I;16", (3, 2), 77 * 257), 77),
        (Image.new("I;16", (3, 2), 65535), 255),
        (Image.new("RGBA", (3, 2), (77, 77, 77, 255)), 77),
        (Image.new("RGBA", (3, 2), (77, 77, 77, 0)), 255),
        (Image.new("LA", (3, 2), (77, 255)), 77),
        (Image.new("CMYK", (3, 2), (0, 0, 0, 255 - 77)), 77),
        (Image.new("RGB", (3, 2), (77, 77, 77)).quantize(4), 77),
        (Image.new("YCbCr", (3, 2), (77, 128, 128)), 77),
        (np.full((2, 3), 77, np.uint8), 77),
        (np.full((2, 3, 1), 77, np.uint8), 77),
        (np.full((1, 2, 3), 77, np.uint8), 77),
        (np.full((2, 3, 3), 77.0), 77),
        (np.full((2, 3, 3), 77 * 257, np.uint16), 77),
        (np.full((2, 3, 4), [77, 77, 77, 255], np.uint8), 77),
        (np.full((2, 3, 4), [77, 77, 77, 0], np.uint8), 77),
        (np.full((2, 3), True), 255),
        (torch.full((3, 2, 3), 77, dtype=torch.uint8), 77),
        (torch.full((3, 2, 3), 77, dtype=torch.bfloat16), 77),
    ],
    ids=lambda value: f"{value.mode}" if isinstance(value, Image.Image) else None,
)
def test_every_kind_of_image(backend, image, expected):
    pixels = raw(backend, image)
    shape = {(1, 2, 3): (1, 2, 3)}.get(getattr(image, "shape", None), (2, 3, 3))
    assert pixels.shape == shape
    assert (np.abs(pixels - expected) <= 1).all()


@pytest.mark.parametrize("size", [(1, 1), (8000, 10), (10, 8000), (3, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F"])
def test_extreme_sizes(backend, size, mode):
    batch = backend()(Image.new(mode, size), return_tensors="pt")
    assert batch["pixel_mask"].sum() > 0
    assert batch["pixel_values"].isfinite().all()
    assert max(batch["pixel_values"].shape) <= 1344


def test_tiny_arrays_are_channels_last_and_tensors_channels_first(backend):
    assert raw(backend, np.array([[[1, 2, 3]]], np.uint8)).tolist() == [[[1, 2, 3]]]
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert raw(backend, cube).tolist() == cube.tolist()
    assert raw(backend, torch.from_numpy(cube)).tolist() == cube.transpose(1, 2, 0).tolist()
    assert raw(backend, cube, input_data_format="channels_first").tolist() == cube.transpose(1, 2, 0).tolist()


def test_float_images_resize(backend):
    image = noise(40, 50)
    processor = backend(size=20, do_rescale=False)
    as_float = processor(image.astype(np.float64), return_tensors="pt")["pixel_values"]
    as_bytes = processor(image, return_tensors="pt")["pixel_values"]
    assert (as_float - as_bytes).abs().max() <= 1.1 / 0.224  # two roundings


def test_four_channels_pass_where_the_statistics_have_four(backend):
    pixels = plain(backend, image_mean=[0.0] * 4, image_std=[1.0] * 4)(np.ones((5, 6, 4), np.uint8))
    assert pixels["pixel_values"].shape == (1, 4, 5, 6)


def test_exif_orientation_is_applied(backend, tmp_path):
    upright = Image.fromarray(noise(8, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    expected = np.asarray(upright)
    assert (raw(backend, Image.open(tmp_path / "turned.png")) == expected).all()
    assert (raw(backend, str(tmp_path / "turned.png")) == expected).all()


def test_paths_nested_lists_and_batches(backend, tmp_path):
    image = noise(4, 5)
    Image.fromarray(image).save(tmp_path / "image.png")
    path = tmp_path / "image.png"
    for images in ([str(path), path], [[image], [Image.fromarray(image)]], np.stack([image, image])):
        pixels = plain(backend, do_rescale=False, do_normalize=False)(images, return_tensors="pt")["pixel_values"]
        assert pixels.permute(0, 2, 3, 1).tolist() == [image.tolist()] * 2


@pytest.mark.parametrize("images", [[], (), np.zeros((0, 3, 4, 4), np.uint8)])
def test_no_images_is_an_error(backend, images):
    with pytest.raises(ValueError, match="no images"):
        backend()(images)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), "image 0 is empty"),
        (np.zeros((5, 5, 7), np.uint8), "image 0 has shape"),
        (np.zeros((1, 2, 3, 4, 5), np.uint8), "5 dimensions"),
        (3.5, "image 0 is a float"),
        ("no_such_file.png", "image 0 cannot be read"),
    ],
)
def test_impossible_images_are_one_line_errors(backend, image, message):
    with pytest.raises(ValueError, match=message) as caught:
        backend()(image)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cut", [0, 10, 3000])
def test_corrupt_files_are_one_line_errors(backend, cut, tmp_path):
    content = (FIXTURES / "postprocess_pixels" / "image_0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(content[:cut])
    with pytest.raises(ValueError, match="image 1 cannot be read") as caught:
        backend()([noise(4, 4), str(tmp_path / "broken.png")])
    assert "\n" not in str(caught.value)


def test_return_types(backend):
    maps = np.ones((4, 5), np.uint8)
    native = np.ndarray if backend is ProScaleMask2FormerImageProcessorPil else torch.Tensor
    for return_tensors, kind in ((None, native), ("pt", torch.Tensor), ("np", np.ndarray)):
        batch = plain(backend)(noise(4, 5), maps, return_tensors=return_tensors)
        for values in (
            batch["pixel_values"],
            batch["pixel_mask"],
            batch["mask_labels"][0],
            batch["class_labels"][0],
        ):
            assert isinstance(values, kind)


# labels


def test_semantic_map(backend):
    masks, classes = labels_of(backend, np.array([[0, 2, 2], [0, 0, 7]]))
    assert classes == [0, 2, 7]
    assert masks == [[[1, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 1]]]


def test_semantic_map_with_void(backend):
    masks, classes = labels_of(backend, np.array([[0, 2, 2], [0, 0, 255]], np.uint8))
    assert classes == [0, 2]
    assert masks == [[[1, 0, 0], [1, 1, 255]], [[0, 1, 1], [0, 0, 255]]]


def test_reduced_semantic_map_makes_background_void(backend):
    maps = np.array([[0, 2, 2], [1, 0, 255]], np.uint8)
    masks, classes = labels_of(backend, maps, do_reduce_labels=True)
    assert classes == [0, 1]
    assert masks == [[[255, 0, 0], [1, 255, 255]], [[255, 1, 1], [0, 255, 255]]]
    assert (masks, classes) == labels_of(backend, maps, reduce_labels=True)


def test_other_void_id(backend):
    masks, classes = labels_of(backend, np.array([[-1, 255, 255], [3, 3, 3]]), ignore_index=-1)
    assert classes == [3, 255]
    assert masks == [[[255, 0, 0], [1, 1, 1]], [[255, 1, 1], [0, 0, 0]]]
    _, classes = labels_of(backend, np.array([[255, 255, 255], [3, 3, 3]]), ignore_index=None)
    assert classes == [3, 255]


@pytest.mark.parametrize("kind", ["numpy", "torch", "pil", "list"])
def test_instance_map(backend, kind):
    maps = np.array([[1, 2, 2], [1, 5, 255]], np.uint8)
    maps = {"numpy": maps, "torch": torch.from_numpy(maps), "pil": Image.fromarray(maps), "list": [maps]}[kind]
    mapping = {1: 4, 2: 0, 5: 4, 99: 1}
    masks, classes = labels_of(backend, maps, instance_id_to_semantic_id=mapping)
    assert classes == [4, 0, 4]
    assert masks == [[[1, 0, 0], [1, 0, 255]], [[0, 1, 1], [0, 0, 255]], [[0, 0, 0], [0, 1, 255]]]


def test_reduced_instance_map_keeps_background_a_negative(backend):
    # ids 0 and 3 are background: places without objects, not unknown places
    maps = np.array([[0, 2, 2], [1, 3, 255]], np.uint8)
    mapping = {np.uint8(0): np.uint8(0), 1: 4, 2: 1, 3: 0}
    masks, classes = labels_of(backend, maps, instance_id_to_semantic_id=mapping, do_reduce_labels=True)
    assert classes == [3, 0]
    assert masks == [[[0, 0, 0], [1, 0, 255]], [[0, 1, 1], [0, 0, 255]]]
    without_zero = labels_of(backend, maps, instance_id_to_semantic_id={1: 4, 2: 1, 3: 0}, do_reduce_labels=True)
    assert without_zero == (masks, classes)


def test_many_instances(backend):
    maps = np.arange(600).reshape(20, 30)
    mapping = {index: index % 7 for index in range(600)}
    masks, classes = labels_of(backend, maps, (20, 30), instance_id_to_semantic_id=mapping, ignore_index=-1)
    assert classes == [index % 7 for index in range(600)]
    assert (np.argmax(np.array(masks), 0) == maps).all()


def test_one_mapping_for_each_image(backend):
    maps = [np.array([[1, 2]]), np.array([[1], [1]])]
    batch = plain(backend)(
        [noise(1, 2), noise(2, 1)],
        maps,
        instance_id_to_semantic_id=[{1: 5, 2: 6}, {1: 7}],
        return_tensors="pt",
    )
    assert [labels.tolist() for labels in batch["class_labels"]] == [[5, 6], [7]]
    assert batch["mask_labels"][0].tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 0]]]
    assert batch["mask_labels"][1].tolist() == [[[1, 0], [1, 0]]]


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_instance_masks_may_overlap(backend, dtype):
    instances = np.array([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [0, 1, 0]]], dtype)
    for maps, classes in ((instances, [3, 3]), ([torch.from_numpy(instances)], [torch.tensor([3, 3])])):
        masks, labels = labels_of(backend, maps, class_labels=classes)
        assert masks == instances.astype(int).tolist()
        assert labels == [3, 3]


def test_reduced_instance_masks_leave_background_out(backend):
    instances = np.ones((2, 2, 3), bool)
    masks, classes = labels_of(backend, instances, class_labels=[0, 3], do_reduce_labels=True)
    assert classes == [2]
    assert masks == [[[1, 1, 1], [1, 1, 1]]]


def coco_picture(ids):
    ids = np.asarray(ids)
    return np.stack([ids % 256, ids // 256 % 256, ids // 256**2], -1).astype(np.uint8)


@pytest.mark.parametrize("wrap", [lambda picture: picture, Image.fromarray, torch.from_numpy])
def test_coco_panoptic(backend, wrap):
    picture = coco_picture([[70000, 300, 300], [0, 9, 70000]])
    segments = [
        {"id": 70000, "category_id": 4, "iscrowd": 0},
        {"id": 300, "category_id": 2},
        {"id": 9, "category_id": 2, "iscrowd": "1"},
        {"id": 11, "category_id": 3},
    ]
    masks, classes = labels_of(backend, wrap(picture), segments_info=segments)
    assert classes == [2, 4]
    assert masks == [[[0, 1, 1], [255, 255, 0]], [[1, 0, 0], [255, 255, 1]]]
    assert (masks, classes) == labels_of(backend, [wrap(picture)], segments_info=[segments])


def test_images_without_objects(backend):
    for arguments in (
        {"maps": np.full((2, 3), 255)},
        {"maps": np.zeros((2, 3), int), "do_reduce_labels": True},
        {"maps": np.zeros((2, 3), int), "instance_id_to_semantic_id": {0: 0}, "do_reduce_labels": True},
        {"maps": np.zeros((0, 2, 3), bool), "class_labels": []},
        {"maps": np.zeros((2, 3, 3), np.uint8), "segments_info": []},
    ):
        processor = backend(do_resize=False)
        batch = processor(noise(2, 3), arguments.pop("maps"), return_tensors="pt", **arguments)
        assert batch["mask_labels"][0].shape == (0, 32, 32)
        assert batch["mask_labels"][0].dtype == torch.uint8
        assert batch["class_labels"][0].shape == (0,)
        assert batch["class_labels"][0].dtype == torch.int64


def test_padding_of_masks_is_not_void(backend):
    sizes = [(2, 3), (5, 4)]
    maps = [np.zeros(size, int) for size in sizes]
    batch = plain(backend)([noise(*size) for size in sizes], maps, return_tensors="pt")
    for masks, (height, width) in zip(batch["mask_labels"], sizes, strict=True):
        assert masks.shape == (1, 5, 4)
        assert masks.sum() == height * width


def test_labels_are_resized_with_the_image(backend):
    quadrants = np.kron([[1, 2], [3, 255]], np.ones((20, 30), int))
    processor = backend(size={"shortest_edge": 64, "longest_edge": 80}, size_divisor=32)
    batch = processor(noise(40, 60), quadrants, return_tensors="pt")
    assert batch["pixel_mask"].sum() == 53 * 80
    masks = batch["mask_labels"][0]
    assert masks.shape == (3, 64, 96)
    rows, columns = (np.arange(53) + 0.5) * 40 / 53 >= 20, (np.arange(80) + 0.5) * 60 / 80 >= 30
    expected = np.where(rows[:, None] & columns, 255, ~rows[:, None] & ~columns)
    assert (masks[0, :53, :80].numpy() == expected).all()
    assert (masks[:, 53:] == 0).all()
    assert (masks[:, :, 80:] == 0).all()


def test_masks_that_vanish_in_resizing_are_left_out(backend):
    instances = np.zeros((2, 40, 40), bool)
    instances[0, 0, 0] = instances[1, 10:, 10:] = True
    processor = backend(size={"height": 4, "width": 4})
    batch = processor(noise(40, 40), instances, class_labels=[5, 6], return_tensors="pt")
    assert batch["class_labels"][0].tolist() == [6]
    maps = np.where(instances[0], 1, 2)
    assert processor(noise(40, 40), maps, return_tensors="pt")["class_labels"][0].tolist() == [2]


@pytest.mark.parametrize(
    ("maps", "arguments", "message"),
    [
        (np.ones((3, 2), int), {}, "segmentation map 0 is 3 x 2, but its image is 2 x 3"),
        (
            np.ones((2, 3), int),
            {"instance_id_to_semantic_id": {2: 0}},
            r"ids \[1\].*instance_id_to_semantic_id",
        ),
        (np.ones((2, 3), int) * 7, {"num_labels": 7}, r"labels \[7\] are out of range.*0 to 6"),
        (-np.ones((2, 3), int), {}, r"labels \[-1\] are out of range.*at least 0"),
        (np.ones((2, 3), int), {"instance_id_to_semantic_id": {1: 9}, "num_labels": 9}, r"labels \[9\]"),
        ([np.ones((2, 3), int)] * 2, {}, "1 images, but 2 segmentation maps"),
        (
            np.ones((2, 3), int),
            {"instance_id_to_semantic_id": [{1: 1}, {1: 1}]},
            "1 images, but 2 sets of classes",
        ),
        (np.ones((2, 3, 3), int), {}, r"shape \(2, 3, 3\), expected \(height, width\).*segments_info"),
        (np.ones((2, 3)) / 2, {}, "must hold integers"),
        (np.ones((1, 2, 3), int), {"class_labels": [1, 2]}, "1 instance masks, but 2 `class_labels`"),
        (np.ones((1, 2, 3), int) * 255, {"class_labels": [1]}, "0 and 1 only, got values up to 255"),
        (np.ones((1, 3, 2), int), {"class_labels": [1]}, "is 3 x 2, but its image is 2 x 3"),
        (np.ones((1, 2, 3), int), {"class_labels": [4], "num_labels": 4}, r"labels \[4\]"),
        (np.ones((2, 3), int), {"class_labels": [4]}, "expected .objects, height, width"),
        (np.ones((2, 3, 3), int), {"segments_info": []}, r"ids \[65793\].*segments_info"),
        (np.ones((2, 3, 3), int), {"segments_info": [{"id": 65793}]}, "category_id"),
        (
            np.ones((2, 3, 3), int),
            {"segments_info": [{"id": 65793, "category_id": 1, "iscrowd": "no"}]},
            '"iscrowd" must be 0 or 1',
        ),
        (
            np.ones((2, 3, 3), int),
            {"segments_info": [{"id": 65793, "category_id": 1.5}]},
            "`category_id` .* whole number",
        ),
        (np.ones((2, 3, 3), int), {"segments_info": [{"id": "65793", "category_id": 1}]}, "`id` .* whole number"),
        (np.ones((1, 2, 3), int), {"class_labels": [1.5]}, "`class_labels` must be a whole number"),
        (np.ones((2, 3), int), {"instance_id_to_semantic_id": {1: 2.5}}, "`class` must be a whole number"),
        (np.ones((2, 3), int), {"segments_info": []}, "expected .height, width, 3"),
        (np.ones((1, 2, 3), int), {"class_labels": [1], "segments_info": []}, "give one of"),
    ],
)
def test_impossible_labels_are_one_line_errors(backend, maps, arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        plain(backend)(noise(2, 3), maps, **arguments)
    assert "\n" not in str(caught.value)


def test_labels_can_train_the_model(backend):
    model = tiny_model().train()
    batch = backend(size={"shortest_edge": 48, "longest_edge": 64})(
        [noise(40, 60), noise(60, 40)],
        [np.full((40, 60), 255), np.kron([[1, 3]], np.ones((60, 20), int))],
        return_tensors="pt",
    )
    loss = model(**batch).loss
    loss.backward()
    assert loss.isfinite()


# post-processing


def outputs_of(queries=6, labels=4, batch=2, size=(16, 24), stride=4, seed=0, **extra):
    """What a model gives whose masks have this size and stride."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 3, 4, generator=generator) * 8
    return ModelOutput(
        class_queries_logits=torch.randn(batch, queries, labels + 1, generator=generator) * 5,
        masks_queries_logits=torch.nn.functional.interpolate(coarse, size=size, mode="bicubic"),
        padded_sizes=torch.tensor([[stride * length for length in size]] * batch),
        **extra,
    )


def logits_of(outputs):
    return outputs["class_queries_logits"], outputs["masks_queries_logits"]


def test_panoptic_uses_the_true_sizes_and_the_own_stuff_labels(backend):
    image_sizes = torch.tensor([[64, 90], [50, 96]])
    targets = [(100, 140), (31, 60)]
    outputs = outputs_of(image_sizes=image_sizes)
    results = backend(label_ids_to_fuse=[2, 1]).post_process_panoptic_segmentation(
        outputs, threshold=0.4, overlap_mask_area_threshold=0.5, target_sizes=targets
    )
    expected = panoptic_segmentation(
        *logits_of(outputs),
        padded_size=(64, 96),
        image_sizes=image_sizes,
        target_sizes=targets,
        label_ids_to_fuse=[1, 2],
        object_mask_threshold=0.4,
        overlap_threshold=0.5,
    )
    assert sum(len(result["segments_info"]) for result in results) >= 3
    assert any(info["was_fused"] for result in results for info in result["segments_info"])
    for result, wanted in zip(results, expected, strict=True):
        assert result["segments_info"] == wanted["segments_info"]
        assert torch.equal(result["segmentation"], wanted["segmentation"])


def test_labels_to_fuse_can_be_given(backend):
    outputs = outputs_of()
    results = backend(label_ids_to_fuse=[0, 1]).post_process_panoptic_segmentation(
        outputs, threshold=0.2, overlap_mask_area_threshold=0.0, label_ids_to_fuse=set()
    )
    infos = [info for result in results for info in result["segments_info"]]
    assert infos
    assert not any(info["was_fused"] for info in infos)


def post_processing(processor) -> tuple[Callable, ...]:
    return (
        processor.post_process_panoptic_segmentation,
        processor.post_process_semantic_segmentation,
        processor.post_process_instance_segmentation,
    )


@pytest.mark.parametrize("settings", [{}, {"do_resize": False}, {"pad_size": {"height": 64, "width": 96}}])
def test_the_size_of_an_image_is_not_guessed_from_settings(backend, settings):
    """They may have been others when the batch was made."""
    for method in post_processing(backend(**settings)):
        with pytest.raises(ValueError, match=r"`pixel_mask`.*`image_sizes=inputs\['image_sizes'\]`") as caught:
            method(outputs_of(), target_sizes=[(60, 90), (90, 60)])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("target", [(60, 90), (512, 512), (25, 100)])
@pytest.mark.parametrize("is_stride_known", [True, False])
def test_a_single_image_of_which_nothing_is_known_fills_its_batch(backend, target, is_stride_known):
    outputs = dict(outputs_of(batch=1))
    if not is_stride_known:
        del outputs["padded_sizes"]
    outputs["masks_queries_logits"] = torch.full((1, 6, 16, 24), -20.0)
    outputs["masks_queries_logits"][0, 0, :, 16:] = 20.0  # its right third
    outputs["class_queries_logits"] = torch.eye(5)[[0] + [4] * 5][None] * 20
    with pytest.warns(UserWarning, match="do not say which part of the batch is the image"):
        [result] = backend().post_process_panoptic_segmentation(outputs, target_sizes=[target])
    assert (result["segmentation"] > 0).float().mean() == pytest.approx(1 / 3, abs=0.02)


@pytest.mark.parametrize(
    "call", [{}, {"size": {"shortest_edge": 40, "longest_edge": 96}}, {"do_resize": False}, {"pad_size": (128, 160)}]
)
def test_sizes_travel_with_the_batch(backend, call):
    """Whatever the call says: those who run a graph elsewhere hand them on, and the model takes them for the mask."""
    if "pad_size" in call:
        call = {"pad_size": dict(zip(("height", "width"), call["pad_size"], strict=True))}
    processor = backend(size={"shortest_edge": 64, "longest_edge": 96})
    images = [np.full((*size, 3), 200, dtype=np.uint8) for size in ((60, 90), (90, 60))]
    inputs = processor(images, return_tensors="pt", **call)
    sizes = inputs["image_sizes"]
    assert sizes.dtype == torch.int64 and sizes.device == inputs["pixel_values"].device
    for mask, (height, width) in zip(inputs["pixel_mask"], sizes.tolist(), strict=True):
        assert mask.sum() == mask[:height, :width].sum() == height * width
    padded = tuple(inputs["pixel_values"].shape[-2:])
    masks = torch.full((2, 6, padded[0] // 4, padded[1] // 4), -20.0)
    for mask, (_, width) in zip(masks, sizes.tolist(), strict=True):
        mask[0, :, round(width / 8) :] = 20.0  # the right half
    outputs = {
        "class_queries_logits": torch.eye(5)[[0] + [4] * 5].expand(2, -1, -1) * 20,
        "masks_queries_logits": masks,
    }
    options = {"target_sizes": [(60, 90), (33, 22)], "padded_size": padded, "image_sizes": sizes}
    for result in processor.post_process_panoptic_segmentation(outputs, **options):
        assert (result["segmentation"] > 0).float().mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("image_sizes", [None, [(50, 96), (64, 30)]])
def test_the_sizes_come_from_the_outputs_or_are_given(stride, image_sizes):
    """Whatever the stride of the masks, and in whatever form they are said."""
    processor = ProScaleMask2FormerImageProcessorPil()
    outputs = outputs_of(size=(64 // stride, 96 // stride), stride=stride)
    targets = [(50, 96), (64, 30)]
    [*expected] = semantic_segmentation(
        *logits_of(outputs), padded_size=(64, 96), image_sizes=targets, target_sizes=targets
    )
    logits = dict(zip(("class_queries_logits", "masks_queries_logits"), logits_of(outputs), strict=True))
    known, said = ({}, {"image_sizes": targets}) if image_sizes is None else ({"image_sizes": image_sizes}, {})
    arrays = {name: np.asarray(values) for name, values in {**logits, **known}.items()}
    padded_sizes = [(64, 96)] * 2
    for given, options in (
        ({**logits, **known, "padded_sizes": padded_sizes}, {}),
        ({**logits, **known, "padded_sizes": torch.tensor(padded_sizes)}, {}),
        (SimpleNamespace(**arrays, padded_sizes=np.array(padded_sizes)), {}),
        ({**logits, **known}, {"padded_size": (64, 96)}),
        (SimpleNamespace(**arrays), {"padded_size": torch.Size((64, 96))}),
        ({**logits, **known, "padded_sizes": [(640, 960)] * 2}, {"padded_size": [64, 96]}),
    ):
        results = processor.post_process_semantic_segmentation(given, target_sizes=targets, **options, **said)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_an_unknown_padded_size_is_not_guessed(backend):
    outputs = dict(outputs_of())
    del outputs["padded_sizes"]
    for method in post_processing(backend()):
        for image_sizes in (None, [(60, 90)] * 2, [(64, 96), (32, 48)], [(64, 97)] * 2, [(65, 96)] * 2):
            with pytest.raises(ValueError, match="pass `padded_size`") as caught:
                method(outputs, target_sizes=image_sizes and [(10, 20)] * 2, image_sizes=image_sizes)
            assert "\n" not in str(caught.value)
    outputs["padded_sizes"] = torch.tensor([[64, 96], [64, 128]])
    for method in post_processing(backend()):
        with pytest.raises(ValueError, match=r"\[\(64, 96\), \(64, 128\)\].*one batch at a time"):
            method(outputs)


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_targets_of_a_multiple_of_the_masks_are_the_whole_batch(backend, stride):
    """transformers' example scripts keep logits alone, and compare with `mask_labels`, which have the batch's size."""
    outputs = dict(outputs_of())
    targets = [(16 * stride, 24 * stride)] * 2
    del outputs["padded_sizes"]
    results = backend().post_process_semantic_segmentation(outputs, target_sizes=targets)
    expected = semantic_segmentation(
        *logits_of(outputs), padded_size=targets[0], image_sizes=targets, target_sizes=targets
    )
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_classes_without_maps_are_refused(backend):
    with pytest.raises(ValueError, match="segmentation_maps"):
        backend()(np.zeros((8, 8, 3), np.uint8), class_labels=[1])


def test_targets_of_the_padded_size_are_not_cropped(backend):
    """An evaluation that compares with `mask_labels` asks for their size, which is the padded batch's."""
    outputs = outputs_of()
    processor = backend(size={"height": 50, "width": 90})
    results = processor.post_process_semantic_segmentation(outputs, target_sizes=[(64, 96)] * 2)
    expected = semantic_segmentation(
        *logits_of(outputs), padded_size=(64, 96), image_sizes=[(64, 96)] * 2, target_sizes=[(64, 96)] * 2
    )
    assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


@pytest.mark.parametrize("default", [None, 3])
def test_as_many_instances_as_the_model_has_queries(backend, default):
    outputs = dict(outputs_of(queries=150, batch=1))
    outputs["class_queries_logits"] = torch.eye(5)[[0] * 150][None] * 20
    outputs["masks_queries_logits"] = torch.full((1, 150, 16, 24), 20.0)
    processor = backend(top_k=default)
    assert processor.to_dict().get("top_k") == default
    for top_k in (None, 5, 200):
        [result] = processor.post_process_instance_segmentation(outputs, return_binary_maps=True, top_k=top_k)
        assert len(result["segments_info"]) == min(150, top_k or default or 150)


@pytest.mark.parametrize("top_k", [0, -1, 2.5, "all"])
def test_an_impossible_number_of_instances_is_refused(backend, top_k):
    with pytest.raises(ValueError, match="`top_k` must be a whole number of at least 1"):
        backend().post_process_instance_segmentation(outputs_of(batch=1), top_k=top_k)
    with pytest.raises(ValueError, match="`top_k` must be a whole number of at least 1"):
        backend(top_k=top_k)


def test_stuff_is_what_the_model_says(backend, recwarn):
    """The image processor's list may be that of another model."""
    outputs = dict(outputs_of(queries=4, batch=1))
    outputs["class_queries_logits"] = torch.eye(5)[[0, 1, 2, 3]][None] * 20
    outputs["masks_queries_logits"] = torch.full((1, 4, 16, 24), 20.0)
    processor = backend(label_ids_to_fuse=[1, 3])

    def found(outputs, **options):
        [result] = processor.post_process_instance_segmentation(outputs, **options)
        return {info["label_id"] for info in result["segments_info"]}

    flags = {"stuff_labels": torch.tensor([[False, True, False, True]])}
    assert found(outputs) == found({**outputs, **flags}) == {0, 2}
    assert not recwarn.list
    for flags, things in (([False] * 4, {0, 1, 2, 3}), ([True, False, False, False], {1, 2, 3})):
        with pytest.warns(UserWarning, match="stuff labels are those of the model.*`categories`"):
            assert found({**outputs, "stuff_labels": np.array([flags])}) == things
        assert found({**outputs, "stuff_labels": np.array([flags])}, label_ids_to_fuse=[2]) == {0, 1, 3}
    del outputs["padded_sizes"]
    with pytest.warns(UserWarning, match=r"do not say which labels are stuff.*\[1, 3\]"):
        assert found(outputs, padded_size=(64, 96)) == {0, 2}


def test_without_targets_results_have_the_size_of_the_input(backend):
    processor = backend()
    assert [m.shape for m in processor.post_process_semantic_segmentation(outputs_of())] == [(64, 96)] * 2
    known = outputs_of(image_sizes=torch.tensor([[64, 90], [50, 96]]))
    maps = processor.post_process_semantic_segmentation(known)
    assert [tuple(m.shape) for m in maps] == [(64, 90), (50, 96)]


def test_semantic_scores(backend):
    outputs = outputs_of(image_sizes=[(64, 96), (50, 90)])
    plain_maps = backend().post_process_semantic_segmentation(outputs, target_sizes=[(20, 30)] * 2)
    results = backend().post_process_semantic_segmentation(
        outputs, target_sizes=[(20, 30)] * 2, return_segmentation_scores=True
    )
    for result, label_map in zip(results, plain_maps, strict=True):
        assert result.segmentation_scores.shape == (4, 20, 30)
        assert torch.equal(result.segmentation, label_map)
        assert torch.equal(result.segmentation_scores.argmax(0), label_map)


@pytest.mark.parametrize("kind", [dict, BatchFeature, "object", ModelOutput])
def test_any_kind_of_outputs(backend, kind):
    outputs = outputs_of(image_sizes=torch.tensor([[64, 90], [50, 96]]))
    other = type("Outputs", (), dict(outputs))() if kind == "object" else kind(dict(outputs))
    for first, second in zip(
        backend().post_process_semantic_segmentation(outputs),
        backend().post_process_semantic_segmentation(other),
        strict=True,
    ):
        assert torch.equal(first, second)


def test_instances(backend):
    targets = [(60, 90), (20, 30)]
    outputs = outputs_of(image_sizes=targets)
    processor = backend(label_ids_to_fuse=[0])
    options = {"threshold": 0.3, "target_sizes": targets}
    expected = instance_segmentation(
        *logits_of(outputs),
        padded_size=(64, 96),
        image_sizes=targets,
        target_sizes=targets,
        thing_label_ids=[1, 2, 3],
        score_threshold=0.3,
    )
    maps = processor.post_process_instance_segmentation(outputs, **options)
    binary = processor.post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
    for id_map, masks, wanted in zip(maps, binary, expected, strict=True):
        assert len(wanted["scores"]) > 1
        assert id_map["segments_info"] == masks["segments_info"]
        wanted["masks"] = wanted["masks"].stacked()
        assert torch.equal(masks["segmentation"], wanted["masks"])
        for index, info in enumerate(id_map["segments_info"]):
            assert info == {
                "id": index,
                "label_id": wanted["labels"][index].item(),
                "was_fused": False,
                "score": wanted["scores"][index].item(),
            }
        # the best score is on top
        covered = wanted["masks"].any(0)
        top = torch.where(covered, wanted["masks"].int().argmax(0), -1)
        assert id_map["segmentation"].dtype == torch.int32
        assert torch.equal(id_map["segmentation"], top.int())


def test_coco_run_lengths(backend):
    coco_mask = pytest.importorskip("pycocotools.mask")
    outputs = outputs_of(image_sizes=[(64, 96), (50, 90)])
    options = {"threshold": 0.3, "target_sizes": [(60, 90), (20, 30)]}
    encoded = backend().post_process_instance_segmentation(outputs, return_coco_annotation=True, **options)
    binary = backend().post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
    for rle, masks, size in zip(encoded, binary, options["target_sizes"], strict=True):
        json.dumps(rle)
        assert len(rle["segmentation"]) == len(rle["segments_info"]) > 0
        for annotation, mask in zip(rle["segmentation"], masks["segmentation"], strict=True):
            assert annotation["size"] == list(size)
            assert (coco_mask.decode(annotation) == mask.numpy()).all()


def test_missing_pycocotools_is_a_clear_error(backend, monkeypatch):
    monkeypatch.setattr(segmentation_image_processor, "coco_mask", None)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        backend().post_process_instance_segmentation(outputs_of(), return_coco_annotation=True)


def test_empty_results_keep_types_and_shapes(backend):
    outputs = outputs_of(image_sizes=[(64, 96), (50, 90)])
    outputs["class_queries_logits"][..., :-1] = -50
    options = {"target_sizes": [(60, 90), (20, 30)]}
    for result, size in zip(
        backend().post_process_panoptic_segmentation(outputs, **options), options["target_sizes"], strict=True
    ):
        assert result["segmentation"].dtype == torch.int32
        assert torch.equal(result["segmentation"], torch.zeros(size, dtype=torch.int32))
    for threshold in (0.0, 0.5):
        options["threshold"] = threshold
        outputs["masks_queries_logits"][:] = -1.0
        maps = backend().post_process_instance_segmentation(outputs, **options)
        assert torch.equal(maps[0]["segmentation"], torch.full((60, 90), -1, dtype=torch.int32))
        binary = backend().post_process_instance_segmentation(outputs, return_binary_maps=True, **options)
        assert binary[1]["segmentation"].shape == (0, 20, 30)
        assert binary[1]["segmentation"].dtype == torch.bool
        assert maps[0]["segments_info"] == binary[0]["segments_info"] == []


def test_impossible_requests_are_errors(backend):
    processor = backend()
    for method in (
        processor.post_process_panoptic_segmentation,
        processor.post_process_semantic_segmentation,
        processor.post_process_instance_segmentation,
    ):
        with pytest.raises(ValueError, match="1 `target_sizes` for a batch of 2"):
            method(outputs_of(), target_sizes=[(4, 4)])
        with pytest.raises(ValueError, match="class_queries_logits"):
            method({"logits": torch.zeros(1)})
    with pytest.raises(ValueError, match="choose one"):
        processor.post_process_instance_segmentation(outputs_of(), return_coco_annotation=True, return_binary_maps=True)


# contracts of transformers


def test_save_and_load(backend, tmp_path):
    processor = backend(
        label_ids_to_fuse={9, 3, np.int64(5)},
        size={"shortest_edge": 64, "longest_edge": 100},
        num_labels=12,
        pad_size={"height": 128, "width": 128},
    )
    assert processor.label_ids_to_fuse == [3, 5, 9]
    processor.save_pretrained(tmp_path)
    for other in BACKENDS:
        loaded = other.from_pretrained(tmp_path)
        assert loaded.to_dict() == processor.to_dict()
        assert loaded.label_ids_to_fuse == [3, 5, 9]
        assert loaded.size == {"shortest_edge": 64, "longest_edge": 100}
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "ProScaleMask2FormerImageProcessor"
    assert (saved["size_divisor"], saved["ignore_index"], saved["num_labels"]) == (32, 255, 12)


def test_processors_do_not_share_settings(backend):
    first = backend()
    first.label_ids_to_fuse.append(3)
    assert backend().label_ids_to_fuse == []


def test_names_of_older_processors_are_understood(backend, tmp_path):
    assert backend(max_size=500).size == {"shortest_edge": 800, "longest_edge": 500}
    assert backend(size=400, max_size=500).size == {"shortest_edge": 400, "longest_edge": 500}
    assert backend(reduce_labels=True).do_reduce_labels is True
    backend().save_pretrained(tmp_path)
    loaded = backend.from_pretrained(
        tmp_path, do_reduce_labels=True, reduce_labels=True, size={"height": 8, "width": 9}
    )
    assert loaded.do_reduce_labels is True
    assert loaded.size == {"height": 8, "width": 9}


def test_kwargs_class_stands_in_the_same_module(backend):
    assert backend.valid_kwargs.__name__ == "ProScaleMask2FormerImageProcessorKwargs"
    assert backend.valid_kwargs.__module__ == backend.__module__
    assert "label_ids_to_fuse" in backend.valid_kwargs.__annotations__


def test_settings_can_be_given_for_one_call(backend):
    processor = backend()
    batch = processor(noise(40, 60), return_tensors="pt", size={"height": 64, "width": 32}, size_divisor=0)
    assert batch["pixel_values"].shape == (1, 3, 64, 32)
    assert processor.size == {"shortest_edge": 800, "longest_edge": 1333}


def test_pipeline_merges_stuff_and_crops_padding(backend):
    from transformers import pipeline

    model = tiny_model()
    processor = backend(
        size={"shortest_edge": 64, "longest_edge": 128},
        pad_size={"height": 128, "width": 128},
        label_ids_to_fuse=[0, 1, 2, 3],
    )
    segmenter = pipeline("image-segmentation", model=model, image_processor=processor, device="cpu")
    images = [Image.fromarray(noise(40, 60)), Image.fromarray(noise(60, 40))]
    options = {"threshold": 0.1, "overlap_mask_area_threshold": 0.0}
    for batch_size in (1, 2):
        results = segmenter(images, batch_size=batch_size, **options)
        for segments, image in zip(results, images, strict=True):
            labels = [segment["label"] for segment in segments]
            assert segments
            assert len(set(labels)) == len(labels)
            assert all(segment["mask"].size == image.size for segment in segments)
    for subtask in ("instance", "semantic"):
        assert isinstance(segmenter(images[0], subtask=subtask), list)


def test_pil_backend_works_without_torchvision():
    code = """
import sys
sys.modules["torchvision"] = None
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if "torchvision" in name else find_spec(name, *rest)
import numpy as np
from proscale_hf import ProScaleMask2FormerImageProcessor, ProScaleMask2FormerImageProcessorPil
print(ProScaleMask2FormerImageProcessorPil(size=32)(np.zeros((8, 8, 3), np.uint8))["pixel_values"].shape)
try:
    ProScaleMask2FormerImageProcessor()
except ImportError as error:
    print(" ".join(str(error).split()))
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "(1, 3, 32, 32)" in process.stdout, process.stderr
    assert "requires the Torchvision library" in process.stdout
