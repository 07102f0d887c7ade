"""Augmentation: image and targets stay together, and each recipe draws what it says."""

import colorsys
import re
import subprocess
import sys

import pytest
import torch
import yaml

from paths import ROOT
from proscale_hf.processing.packed_masks import pack_masks, unpack_masks


pytest.importorskip("torchvision")

from torchvision import tv_tensors
from torchvision.transforms import v2

from proscale_hf.data import augmentation as module
from proscale_hf.data.augmentation import (
    Augmentation,
    ColorJitter,
    LargeScaleJitter,
    ShortEdgeCrop,
    build_augmentation,
    resized_window,
)


DOCUMENT = ROOT / "docs" / "augmentation.md"
RECIPES = {
    "large_scale_jitter": {"name": "large_scale_jitter", "size": [96, 128]},
    "short_edge_crop": {
        "name": "short_edge_crop",
        "short_edge": [33, 64, 131],
        "longest_edge": 200,
        "crop": [48, 64],
        "color_jitter": False,
    },
    "resize": {"name": "resize", "short_edge": 70, "longest_edge": 90},
}


def half_planes(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An image whose channels show three half planes; they are objects 0, 7 and 8, which lie in two planes."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    halves = [
        (columns >= width // 3).expand(height, width),
        (rows >= height // 2).expand(height, width),
        (columns < 0.6 * width).expand(height, width),
    ]
    image = torch.stack(halves).to(torch.uint8) * 255
    masks = torch.ones((9, height, width), dtype=torch.uint8)
    masks[[0, 7, 8]] = torch.stack(halves).to(torch.uint8)
    return image, pack_masks(masks), torch.arange(9)


def image_of(height: int, width: int) -> tv_tensors.Image:
    return tv_tensors.Image(torch.zeros((3, height, width), dtype=torch.uint8))


def params_of(transform: v2.Transform, image: torch.Tensor, draws: int) -> list[dict]:
    torch.manual_seed(0)
    return [transform.make_params([image]) for _ in range(draws)]


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("size", [(60, 91), (77, 50), (200, 300)])
def test_masks_cover_exactly_what_the_image_shows(name, size):
    # A straight edge's bilinear value passes one half where the nearest pixel changes, at every scale.
    image, planes, class_labels = half_planes(*size)
    augmentation = build_augmentation(RECIPES[name])
    for seed in range(25):
        torch.manual_seed(seed)
        new_image, new_planes = augmentation(image, planes, class_labels)
        assert new_image.dtype == new_planes.dtype == torch.uint8
        assert new_image.shape[1:] == new_planes.shape[1:]
        assert type(new_image) is type(new_planes) is torch.Tensor
        masks = unpack_masks(new_planes, 9)
        assert masks[[1, 2, 3, 4, 5, 6]].all()
        undecided = (new_image.int() - 127).abs() <= 1  # ties
        assert (((masks[[0, 7, 8]] == 1) == (new_image > 127)) | undecided).all()


def test_void_moves_with_the_image():
    image, _, class_labels = half_planes(60, 91)
    masks = torch.zeros((9, 60, 91), dtype=torch.uint8)
    masks[:, image[0] > 0] = 255
    augmentation = build_augmentation({"name": "resize", "short_edge": 120, "longest_edge": 400, "flip": 1.0})
    new_image, new_planes = augmentation(image, pack_masks(masks), class_labels)
    undecided = (new_image[0].int() - 127).abs() <= 1
    voids = unpack_masks(new_planes, 9) == 255
    assert ((voids == (new_image[0] > 127)) | undecided).all()
    assert voids.any() and not voids.all()


@pytest.mark.parametrize(
    "size, window",
    [((96, 122), (13, 20, 64, 64)), ((17, 9), (0, 0, 17, 9)), ((601, 60), (599, 1, 2, 59)), ((1, 1), (0, 0, 1, 1))],
)
def test_a_window_is_a_part_of_the_resized_planes(size, window):
    planes = torch.randint(256, (3, 48, 61), dtype=torch.uint8)
    whole = torch.nn.functional.interpolate(planes[None], size, mode="nearest-exact")[0]
    top, left, height, width = window
    assert torch.equal(resized_window(planes, size, window), whole[:, top : top + height, left : left + width])


def test_large_scale_jitter_draws_its_scales_evenly():
    draws = params_of(LargeScaleJitter((0.1, 2.0), (1024, 1024)), image_of(480, 640), 4000)
    scales = torch.tensor([draw["size"][1] / 1024 for draw in draws])  # the width is what fills the box
    assert 0.1 <= scales.min() < 0.11 and 1.99 < scales.max() <= 2.0
    for share in (0.25, 0.5, 0.75):
        assert abs(scales.quantile(share) - (0.1 + 1.9 * share)) < 0.05
    for draw in draws:
        (height, width), (top, left, kept_height, kept_width) = draw["size"], draw["window"]
        assert abs(height - 0.75 * width) <= 1
        assert (kept_height, kept_width) == (min(height, 1024), min(width, 1024))
        assert 0 <= top <= height - kept_height and 0 <= left <= width - kept_width
        if height > 1100:  # one position for both axes
            assert abs(top / (height - 1024) - left / (width - 1024)) < 0.02


def test_large_scale_jitter_tells_height_from_width():
    (draw,) = params_of(LargeScaleJitter((1.0, 1.0), (100, 400)), image_of(50, 50), 1)
    assert draw["size"] == (100, 100)


def test_areas_of_objects():
    torch.manual_seed(0)
    masks = torch.randint(2, (17, 9, 11), dtype=torch.uint8)
    planes = pack_masks(masks)
    assert module.object_areas(planes, 17).tolist() == masks.sum((1, 2)).tolist()
    planes[0, 2] |= 1  # void
    assert module.object_areas(planes, 17).tolist() == (masks.sum((1, 2)) - masks[:, 2].sum(1)).tolist()


def test_thin_images_keep_a_pixel():
    image, planes, class_labels = half_planes(2, 900)
    new_image, new_planes = build_augmentation({"name": "large_scale_jitter", "scale": [0.1, 0.1]})(
        image, planes, class_labels
    )
    assert new_image.shape == (3, 1, 102) and new_planes.shape == (2, 1, 102)


@pytest.mark.parametrize("name, size", [("large_scale_jitter", (96, 128)), ("short_edge_crop", (48, 64))])
def test_small_images_are_filled_up(name, size):
    image, planes, class_labels = half_planes(60, 91)
    image = image.clamp(max=100)
    small, filled = (build_augmentation(RECIPES[name] | {"pad": pad}) for pad in (False, True))
    smaller = 0
    for seed in range(25):
        torch.manual_seed(seed)
        as_is, planes_as_is = small(image, planes, class_labels)
        torch.manual_seed(seed)
        new_image, new_planes = filled(image, planes, class_labels)
        assert new_image.dtype == new_planes.dtype == torch.uint8
        assert new_image.shape[1:] == new_planes.shape[1:] == size
        height, width = as_is.shape[1:]
        assert torch.equal(new_image[:, :height, :width], as_is)
        assert torch.equal(new_planes[:, :height, :width], planes_as_is)
        is_grey = (new_image == 128).all(0)
        assert not is_grey[:height, :width].any() and is_grey.sum() == size[0] * size[1] - height * width
        assert not new_planes[:, is_grey].any()  # background, not void
        smaller += bool(is_grey.any())
    assert 5 < smaller < 25


def test_short_edges_are_chosen_evenly_and_windows_lie_anywhere():
    transform = ShortEdgeCrop((40, 64, 100), 150, (48, 64))
    draws = params_of(transform, image_of(50, 100), 3000)
    sizes = [draw["size"] for draw in draws]
    assert set(sizes) == {(40, 80), (64, 128), (75, 150)}  # the last is held back by the longest edge
    assert all(abs(sizes.count(size) - 1000) < 100 for size in set(sizes))
    for size, kept in (((40, 80), (40, 64)), ((64, 128), (48, 64))):
        windows = [draw["window"] for draw in draws if draw["size"] == size]
        assert {window[2:] for window in windows} == {kept}
        for axis in (0, 1):
            assert {window[axis] for window in windows} == set(range(size[axis] - kept[axis] + 1))


@pytest.mark.parametrize("probability, least, most", [(0.0, 0, 0), (0.5, 160, 240), (1.0, 400, 400)])
@pytest.mark.parametrize("name", RECIPES)
def test_flips_as_often_as_told(name, probability, least, most):
    image, planes, class_labels = half_planes(6, 9)
    settings = {"name": name, "flip": probability}
    settings |= {"large_scale_jitter": {"size": [9, 9], "scale": [1, 1]}}.get(
        name, {"short_edge": 6, "longest_edge": 9}
    )
    if name == "short_edge_crop":
        settings |= {"short_edge": [6], "color_jitter": False}
    augmentation = build_augmentation(settings)
    torch.manual_seed(0)
    flipped = 0
    for _ in range(400):
        new_image, new_planes = augmentation(image, planes, class_labels)
        is_flipped = torch.equal(new_image, image.flip(-1))
        assert is_flipped or torch.equal(new_image, image)
        assert torch.equal(new_planes, planes.flip(-1) if is_flipped else planes)
        flipped += is_flipped
    assert least <= flipped <= most


def test_windows_of_one_category_are_drawn_again():
    # classes: 5 on the left quarter (two objects), 0 on the rest, void on the upper half
    masks = torch.zeros((3, 40, 80), dtype=torch.uint8)
    masks[0, :, :10], masks[1, :, 10:20], masks[2, :, 20:] = 1, 1, 1
    masks[:, :20] = 255
    image = torch.zeros((3, 40, 80), dtype=torch.uint8)
    settings = {"name": "short_edge_crop", "short_edge": [40], "crop": [30, 20], "color_jitter": False, "flip": 0.0}

    def shares(limit: float) -> torch.Tensor:
        augmentation = build_augmentation(settings | {"single_category_max_area": limit})
        torch.manual_seed(0)
        result = []
        for _ in range(300):
            _, planes = augmentation(image, pack_masks(masks), torch.tensor([5, 5, 0]))
            areas = (unpack_masks(planes, 3) == 1).sum((1, 2))
            result.append(max(areas[0] + areas[1], areas[2]) / areas.sum())
        return torch.tensor(result)

    free, limited = shares(1.0), shares(0.75)
    assert (free >= 0.75).float().mean() > 0.7
    assert (limited >= 0.75).float().mean() < 0.3  # a good window is 1 of 6, ten tries: all but 0.16
    assert torch.equal(shares(0.01), shares(0.01))  # cannot be met: the tenth window


@pytest.mark.parametrize("objects", [0, 1])
def test_category_constraint_without_a_choice(objects):
    settings = {"name": "short_edge_crop", "single_category_max_area": 0.5, "short_edge": [20], "crop": [10, 10]}
    planes = pack_masks(torch.ones((objects, 20, 20), dtype=torch.uint8))
    image, planes = build_augmentation(settings)(
        torch.zeros((3, 20, 20), dtype=torch.uint8), planes, torch.zeros(objects, dtype=torch.int64)
    )
    assert image.shape == (3, 10, 10) and planes.shape == (1, 10, 10)


def test_saturation_is_that_of_hsv():
    torch.manual_seed(0)
    image = torch.rand((3, 6, 5))
    image[:, 0], image[:, 1, 0] = 0, 1
    for factor in (0.5, 1.0, 1.5):
        result = module.scale_saturation(image, factor)
        for old, new in zip(image.flatten(1).T.tolist(), result.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*old)
            assert new == pytest.approx(colorsys.hsv_to_rgb(hue, min(1, factor * saturation), value), abs=1e-5)


def test_colours_are_drawn_as_in_ssd():
    transform, image = ColorJitter(), image_of(2, 2)
    draws = params_of(transform, image, 4000)
    limits = {"brightness": (-32 / 255, 32 / 255), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.1, 0.1)}
    for name, (low, high) in limits.items():
        amounts = torch.tensor([draw[name] for draw in draws if name in draw])
        assert 1850 < len(amounts) < 2150
        assert low <= amounts.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < amounts.max() <= high
    orders = [tuple(draw) for draw in draws if len(draw) == 4]
    assert set(orders) == {
        ("brightness", "contrast", "saturation", "hue"),
        ("brightness", "saturation", "hue", "contrast"),
    }


def test_colour_steps_compute_what_they_say():
    image = tv_tensors.Image(torch.randint(256, (3, 8, 8), dtype=torch.uint8))
    transform = ColorJitter()
    same = transform.transform(image, {})
    assert torch.equal(same, image) and isinstance(same, tv_tensors.Image)
    values = image.as_subclass(torch.Tensor).float()
    for params, expected in (
        ({"brightness": 20 / 255}, (values + 20).clamp(max=255)),
        ({"contrast": 1.5}, (values * 1.5).clamp(max=255)),
        ({"contrast": 0.5, "brightness": -10 / 255}, (values * 0.5 - 10).clamp(min=0)),
        ({"hue": 1 / 3}, values.roll(1, 0)),  # red becomes green
    ):
        result = transform.transform(image, params).as_subclass(torch.Tensor).float()
        assert (result - expected).abs().max() <= 1, params


def test_colours_leave_targets_alone():
    image, planes, class_labels = half_planes(30, 40)
    image = image // 2 + 40
    augmentation = build_augmentation(
        {"name": "short_edge_crop", "short_edge": [30], "longest_edge": 40, "crop": [30, 40], "flip": 0.0}
    )
    changed = 0
    for seed in range(20):
        torch.manual_seed(seed)
        new_image, new_planes = augmentation(image, planes, class_labels)
        assert torch.equal(new_planes, planes)
        changed += not torch.equal(new_image, image)
    assert changed > 10


@pytest.mark.parametrize("name", RECIPES)
def test_torchs_seed_decides(name):
    torch.manual_seed(3)
    image, planes, class_labels = half_planes(60, 90)
    settings = RECIPES[name] | ({"color_jitter": True} if name == "short_edge_crop" else {})
    results = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        results.append([build_augmentation(settings)(image, planes, class_labels) for _ in range(3)])
    flat = [[tensor for pair in result for tensor in pair] for result in results]
    assert all(map(torch.equal, flat[0], flat[1]))
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(flat[0], flat[2], strict=True))


def test_inputs_are_not_changed():
    image, planes, class_labels = half_planes(60, 90)
    before = image.clone(), planes.clone()
    for settings in (*RECIPES.values(), {"name": "short_edge_crop"}):
        build_augmentation(settings)(image, planes, class_labels)
    assert torch.equal(image, before[0]) and torch.equal(planes, before[1])


def test_takes_any_transform():
    image, planes, class_labels = half_planes(60, 90)
    transform = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.RandomGrayscale(1.0), v2.CenterCrop(20)])
    new_image, new_planes = Augmentation(transform)(image, planes, class_labels)
    assert torch.equal(new_planes, planes.flip(-1)[:, 20:40, 35:55])
    assert new_image.shape == (3, 20, 20) and torch.equal(new_image[0], new_image[1])


def test_documented_recipes_are_the_published_ones():
    blocks = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.S)
    coco, cityscapes, ade20k, ade20k_semantic, fine_tuning = map(yaml.safe_load, blocks)
    for settings, base, longest_edge, crop in (
        (cityscapes, 1024, 4096, [512, 1024]),
        (ade20k, 640, 2560, [640, 640]),
        (ade20k_semantic, 512, 2048, [512, 512]),
    ):
        assert settings["short_edge"] == [int(x * 0.1 * base) for x in range(5, 21)]
        assert (
            settings["longest_edge"] == longest_edge and settings["crop"] == crop and settings["color_jitter"] is True
        )
    jitter = build_augmentation(coco).transform.transforms[1]
    assert (jitter.scale, jitter.size) == ((0.1, 2.0), (1024, 1024))
    edges = build_augmentation({"name": "short_edge_crop"}).transform.transforms[1]
    assert edges.__dict__.keys() == build_augmentation(cityscapes).transform.transforms[1].__dict__.keys()
    assert list(edges.short_edge) == cityscapes["short_edge"] and edges.longest_edge == 4096
    assert fine_tuning == {"name": "resize", "short_edge": 800, "longest_edge": 1333, "flip": 0.5}
    for settings in (ade20k, ade20k_semantic, fine_tuning):
        build_augmentation(settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (None, "give `name`, one of large_scale_jitter, short_edge_crop, resize"),
        ({"scale": [1, 2]}, "give `name`"),
        ({"name": "large_scale_jiter"}, "did you mean 'large_scale_jitter'"),
        ({"name": 7}, "there is no 7; choose of large_scale_jitter"),
        ({"name": "resize", "shortest_edge": 7}, "did you mean 'short_edge'"),
        ({"name": "resize", "short_edge": [7]}, "short_edge must be a positive whole number"),
        ({"name": "resize", "short_edge": 0}, "short_edge must be a positive whole number, got 0"),
        ({"name": "resize", "longest_edge": 1.5}, "longest_edge must be a positive whole number, got 1.5"),
        ({"name": "resize", "flip": 1.5}, "flip must be a number from 0 to 1"),
        ({"name": "resize", "flip": "often"}, "flip must be a number from 0 to 1, got 'often'"),
        ({"name": "resize", "flip": True}, "flip must be a number from 0 to 1"),
        ({"name": "large_scale_jitter", "scale": [2.0, 0.1]}, r"scale must be \[least, largest\], got \[2.0, 0.1\]"),
        ({"name": "large_scale_jitter", "scale": [0, 1]}, "scale must be a positive number, got 0"),
        ({"name": "large_scale_jitter", "scale": [0.1, float("inf")]}, "scale must be a positive number, got inf"),
        ({"name": "large_scale_jitter", "scale": [0.1]}, "scale must be"),
        ({"name": "large_scale_jitter", "scale": "12"}, "scale must be"),
        ({"name": "large_scale_jitter", "size": 1024}, r"size must be \[height, width\], got 1024"),
        ({"name": "short_edge_crop", "short_edge": []}, "short_edge must be a list of lengths, got"),
        ({"name": "short_edge_crop", "short_edge": [512, "640"]}, "short_edge must be a positive whole number"),
        ({"name": "short_edge_crop", "crop": [512]}, r"crop must be \[height, width\]"),
        ({"name": "short_edge_crop", "single_category_max_area": -1}, "single_category_max_area must be a number"),
        ({"name": "short_edge_crop", "color_jitter": "yes"}, "color_jitter must be true or false"),
        ({"name": "large_scale_jitter", "pad": 1}, "pad must be true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        build_augmentation(settings)
    assert "\n" not in str(error.value)


def test_without_torchvision_the_extra_is_named():
    code = "import sys; sys.modules['torchvision'] = None; import proscale_hf.data.augmentation"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.strip().endswith('augmentation needs torchvision: pip install "proscale-hf[train]"')
