"""From samples to batches: normalisation, dropped objects, padding, random numbers, memory."""

import inspect

import numpy as np
import pytest
import torch
from PIL import Image

from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.data.collate import TrainingTransform, TransformedDataset, collate
from proscale_hf.data.sample import Sample
from proscale_hf.processing.packed_masks import unpack_masks


def sample_of(height: int, width: int, objects: int = 3, seed: int = 0) -> Sample:
    """Vertical stripes on a random picture; the first is void."""
    numbers = np.random.default_rng(seed)
    picture = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
    segment_map = np.broadcast_to(np.arange(width) * (objects + 1) // width, (height, width)).astype(
        np.int32, order="C"
    )
    segments = [{"id": index + 1, "label_id": 2 * index, "iscrowd": 0} for index in range(objects)]
    return Sample(Image.fromarray(picture), seed, f"{seed}.png", segments, segment_map=segment_map)


def crop(top: int, left: int, height: int, width: int):
    def augmentation(image, planes, class_labels):
        window = slice(top, top + height), slice(left, left + width)
        return image[(..., *window)], planes[(..., *window)]

    return augmentation


def random_crop(image, planes, class_labels):
    left = int(torch.randint(image.shape[-1] - 8, ()))
    return image[..., left : left + 8], planes[..., left : left + 8]


def processors() -> list[type]:
    """Both backends, or the one that works without torchvision."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return [ProScaleMask2FormerImageProcessorPil]
    from proscale_hf import ProScaleMask2FormerImageProcessor

    return [ProScaleMask2FormerImageProcessorPil, ProScaleMask2FormerImageProcessor]


@pytest.mark.parametrize("processor_class", processors())
@pytest.mark.parametrize(
    "settings", [{}, {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.1] * 3}, {"do_rescale": False}]
)
def test_without_augmentation_pixels_are_those_of_inference(processor_class, settings):
    processor = processor_class(do_resize=False, **settings)
    sample = sample_of(40, 61)
    example = TrainingTransform(None, processor)(sample)
    expected = processor(sample.image, return_tensors="pt")
    batch = collate([example])
    assert example["pixel_values"].shape == (3, 40, 61) and example["pixel_values"].dtype == torch.float32
    for name in ("pixel_values", "pixel_mask"):
        assert torch.equal(batch[name], expected[name]) and batch[name].dtype == expected[name].dtype


@pytest.mark.parametrize("processor_class", processors())
def test_resize_recipe_gives_the_pixels_of_inference(processor_class):
    pytest.importorskip("torchvision")
    from proscale_hf.data.augmentation import build_augmentation

    processor = processor_class(size={"shortest_edge": 50, "longest_edge": 90}, do_normalize=False)
    augmentation = build_augmentation({"name": "resize", "short_edge": 50, "longest_edge": 90, "flip": 0.0})
    for size in ((40, 61), (70, 31), (100, 300)):
        sample = sample_of(*size)
        batch = collate([TrainingTransform(augmentation, processor)(sample)])
        expected = processor(sample.image, return_tensors="pt")
        assert torch.equal(batch["pixel_mask"], expected["pixel_mask"])
        difference = (batch["pixel_values"] - expected["pixel_values"]).abs().max()
        # Pillow and torchvision round to 8 bits differently
        assert difference <= (1.01 / 255 if processor_class is ProScaleMask2FormerImageProcessorPil else 0)


@pytest.mark.parametrize("processor_class", processors())
def test_settings_of_size_are_left_to_the_augmentation(processor_class):
    processor = processor_class(size_divisor=64, pad_size={"height": 128, "width": 128})
    example = TrainingTransform(crop(0, 0, 3, 30), processor)(sample_of(40, 61))
    assert example["pixel_values"].shape == (3, 3, 30)


def test_objects_without_pixels_are_dropped():
    transform = TrainingTransform(crop(5, 30, 20, 28), ProScaleMask2FormerImageProcessorPil())
    example = transform(sample_of(40, 80))  # void, and stripes from 20, 40 and 60
    assert example["class_labels"].tolist() == [0, 2]
    columns = unpack_masks(example["packed_masks"], 2)[:, 3]
    assert columns.tolist() == [[1] * 10 + [0] * 18, [0] * 10 + [1] * 18]
    assert {name: value.shape[-2:] for name, value in example.items() if name != "class_labels"} == {
        "pixel_values": (20, 28),
        "packed_masks": (20, 28),
    }


def test_an_image_without_objects_stays():
    transform = TrainingTransform(crop(5, 2, 20, 10), ProScaleMask2FormerImageProcessorPil())
    example = transform(sample_of(40, 80))
    assert example["class_labels"].shape == (0,) and example["class_labels"].dtype == torch.int64
    assert (example["packed_masks"] == 1).all() and example["packed_masks"].shape == (1, 20, 10)  # void
    assert collate([example])["class_labels"][0].shape == (0,)


def examples_of(*sizes: tuple[int, int]) -> list[dict]:
    transform = TrainingTransform(None, ProScaleMask2FormerImageProcessorPil())
    return [transform(sample_of(*size, objects=9, seed=index)) for index, size in enumerate(sizes)]


def test_batches_are_padded_right_and_at_the_bottom():
    examples = examples_of((40, 61), (33, 70))
    batch = collate(examples)
    assert batch["pixel_values"].shape == (2, 3, 64, 96) and batch["pixel_mask"].shape == (2, 64, 96)
    assert batch["pixel_mask"].dtype == torch.int64 and batch["pixel_mask"].sum((1, 2)).tolist() == [40 * 61, 33 * 70]
    for index, example in enumerate(examples):
        height, width = example["pixel_values"].shape[1:]
        assert batch["pixel_mask"][index, :height, :width].all()
        for name in ("pixel_values", "packed_masks"):
            padded = batch[name][index].clone()
            assert torch.equal(padded[:, :height, :width], example[name])
            padded[:, :height, :width] = 0
            assert not padded.any()
        assert batch["packed_masks"][index].shape == (2, 64, 96) and batch["packed_masks"][index].dtype == torch.uint8
        assert torch.equal(batch["class_labels"][index], example["class_labels"])


def test_divisor_and_fixed_size():
    examples = examples_of((40, 61), (33, 70))
    assert collate(examples, size_divisor=1)["pixel_values"].shape[2:] == (40, 70)
    assert collate(examples, pad_size=(50, 70))["pixel_mask"].shape == (2, 50, 70)
    with pytest.raises(ValueError, match="images of up to 40 x 70 pixels do not fit pad_size 50 x 69"):
        collate(examples, pad_size=(50, 69))


def test_batches_hold_what_the_model_takes():
    parameters = inspect.signature(ProScaleMask2FormerForUniversalSegmentation.forward).parameters
    assert set(collate(examples_of((40, 61)))) <= set(parameters)


class Samples:
    """Ten samples of different width."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        return sample_of(12, 40 + index, seed=index)


def pixels_of(dataset: TransformedDataset, **options) -> list[torch.Tensor]:
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, collate_fn=collate, **options)
    return [pixels for batch in loader for pixels in batch["pixel_values"]]


def dataset_of(seed: int = 0) -> TransformedDataset:
    return TransformedDataset(Samples(), TrainingTransform(random_crop, ProScaleMask2FormerImageProcessorPil()), seed)


def all_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


def test_random_numbers_depend_on_seed_epoch_and_index_alone():
    dataset = dataset_of()
    assert len(dataset) == 10
    first = pixels_of(dataset)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = [collate([dataset[index]])["pixel_values"][0] for index in reversed(range(10))]
    assert torch.equal(torch.get_rng_state(), state)
    assert all_equal(first, again[::-1])
    assert not all_equal(first, pixels_of(dataset_of(seed=1)))
    dataset.set_epoch(1)
    second = pixels_of(dataset)
    assert sum(map(torch.equal, first, second)) < 3
    dataset.set_epoch(0)
    assert all_equal(first, pixels_of(dataset))


def test_workers_that_live_on_hear_of_the_epoch():
    dataset = dataset_of()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=3, collate_fn=collate, num_workers=2, persistent_workers=True, prefetch_factor=4
    )
    for epoch in range(3):
        dataset.set_epoch(epoch)
        seen = [pixels for batch in loader for pixels in batch["pixel_values"]]
        assert all_equal(seen, pixels_of(dataset))


def test_indices_get_numbers_of_their_own():
    dataset = TransformedDataset([None] * 50, lambda sample: torch.rand(4))
    assert len({tuple(dataset[index].tolist()) for index in range(50)}) == 50


def test_the_generator_is_put_back_after_an_error():
    def fails(sample):
        torch.rand(1)
        raise KeyError

    state = torch.get_rng_state()
    with pytest.raises(KeyError):
        TransformedDataset([None], fails)[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_targets_of_200_objects_stay_below_32_mb():
    pytest.importorskip("torchvision")
    from proscale_hf.data.augmentation import build_augmentation

    settings = {"name": "large_scale_jitter", "scale": [2.0, 2.0], "flip": 1.0}
    height, width = 480, 640
    segment_map = np.arange(height * width, dtype=np.int32).reshape(height, width) % 200 + 1
    segments = [{"id": index + 1, "label_id": 0, "iscrowd": 0} for index in range(200)]
    sample = Sample(Image.new("RGB", (width, height)), 0, "0.png", segments, segment_map=segment_map)
    example = TrainingTransform(build_augmentation(settings), ProScaleMask2FormerImageProcessorPil())(sample)
    batch = collate([example])
    assert len(batch["class_labels"][0]) == 200 and batch["pixel_values"].shape == (1, 3, 1024, 1024)
    for planes in (example["packed_masks"], batch["packed_masks"][0]):
        assert planes.untyped_storage().nbytes() < 32e6
    assert torch.equal(unpack_masks(example["packed_masks"], 200).sum(0), torch.ones((1024, 1024), dtype=torch.int64))
