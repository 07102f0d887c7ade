"""Segments from results, and the picture drawn of them."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from proscale_hf.visualization import (
    Segment,
    _place_labels,
    draw_segments,
    instance_colors,
    segment_color,
    segment_colors,
    segments_from_boxes,
    segments_from_label_map,
    segments_from_result,
)


NAMES = {0: "digit", 1: "brick", 2: "grass"}


def info(number: int, label_id: int, score: float = 0.9) -> dict:
    return {"id": number, "label_id": label_id, "was_fused": False, "score": score}


def block(
    left: int, top: int, right: int, bottom: int, label: str = "digit", score: float | None = 0.9, label_id: int = 0
) -> Segment:
    return Segment(
        label, label_id, (left, top, right, bottom), np.ones((bottom - top, right - left), dtype=bool), score=score
    )


def test_panoptic_result():
    segmentation = torch.zeros((6, 8), dtype=torch.int32)
    segmentation[1:3, 2:7] = 1
    segmentation[4:, :] = 3
    segments = segments_from_result(
        {"segmentation": segmentation, "segments_info": [info(3, 1), info(2, 0), info(1, 0, 0.5)]}, NAMES, {1, 2}
    )
    # id 2 has no pixel; the order stays
    assert [(s.label, s.is_thing, s.score, s.box, s.area) for s in segments] == [
        ("brick", False, 0.9, (0, 4, 8, 6), 16),
        ("digit", True, 0.5, (2, 1, 7, 3), 10),
    ]
    assert np.array_equal(segments[0].full_mask(6, 8), (segmentation == 3).numpy())


def test_boxes_become_segments_inside_the_image():
    detections = {
        "scores": np.array([0.9, 0.4]),
        "labels": np.array([2, 7]),
        "boxes": np.array([[1.2, 2.0, 3.9, 4.0], [7.9, 5.9, 8.0, 6.0]]),
    }
    segments = segments_from_boxes(detections, NAMES, (6, 8))
    assert [(s.label, s.label_id, s.score, s.box, s.area) for s in segments] == [
        ("grass", 2, 0.9, (1, 2, 4, 4), 6),
        ("class 7", 7, 0.4, (7, 5, 8, 6), 1),
    ]


def test_the_inside_is_as_opaque_as_asked_for():
    image, segment = Image.new("RGB", (900, 600), "white"), block(100, 100, 800, 500)
    shades = [draw_segments(image, [segment], {0: (0, 0, 0)}, opacity).getpixel((450, 450)) for opacity in (0.1, 0.5)]
    assert shades == [(230, 230, 230), (128, 128, 128)]


@pytest.mark.parametrize("nothing", [0, -1])
def test_map_of_nothing(nothing):
    assert segments_from_result({"segmentation": torch.full((4, 4), nothing), "segments_info": []}, NAMES) == []


def test_ids_from_zero_with_minus_one_for_none():
    segmentation = torch.tensor([[-1, 0], [1, 1]])
    segments = segments_from_result({"segmentation": segmentation, "segments_info": [info(0, 0), info(1, 2)]}, NAMES)
    assert [(s.label, s.box) for s in segments] == [("digit", (1, 0, 2, 1)), ("grass", (0, 1, 2, 2))]


def test_overlapping_instances_keep_all_their_pixels():
    masks = torch.zeros((3, 5, 5), dtype=torch.bool)
    masks[0, :3], masks[1, 2:] = True, True
    segments = segments_from_result({"segmentation": masks, "segments_info": [info(i, 0) for i in range(3)]}, NAMES)
    assert [s.area for s in segments] == [15, 15]


def test_semantic_map_is_sorted_and_leaves_void_out():
    label_map = torch.tensor([[0, 2, 2], [255, 2, 1]])
    segments = segments_from_label_map(label_map, NAMES, {2})
    assert [(s.label, s.area, s.is_thing, s.score) for s in segments] == [
        ("grass", 3, False, None),
        ("digit", 1, True, None),
        ("brick", 1, True, None),
    ]


def test_names_cannot_control_the_terminal():
    segmentation = torch.ones((1, 1), dtype=torch.int32)
    result = {"segmentation": segmentation, "segments_info": [info(1, 0)]}
    assert segments_from_result(result, {0: "a\x1b[2J\nb"})[0].label == "a?[2J b"
    assert segments_from_result(result, {})[0].label == "class 0"


def test_colors_are_stable_and_distinct():
    colors = [segment_color(index) for index in range(12)]
    assert colors == [segment_color(index) for index in range(12)]
    distances = np.linalg.norm(np.array(colors)[:, None] - np.array(colors)[None], axis=-1)
    assert distances[np.triu_indices(12, 1)].min() > 40


def test_only_segments_change_color_and_each_gets_its_own():
    image = Image.new("RGB", (900, 700), (120, 120, 120))
    segments = [block(100, 100, 400, 600), block(500, 100, 800, 600)]
    picture = np.array(draw_segments(image, segments)).astype(int)
    assert picture.shape == (700, 900, 3)
    assert (picture[50, 50] == 120).all() and (picture[350, 450] == 120).all()
    for index, column in enumerate((110, 510)):
        assert np.abs(picture[110, column] - (0.5 * 120 + 0.5 * np.array(segment_color(index)))).max() <= 1
    assert tuple(picture[300, 100]) == segment_color(0)  # the outline


@pytest.mark.parametrize(
    "color", [(220, 20, 60), (0, 0, 70), (255, 77, 255), (128, 128, 128), (220, 220, 220), (0, 0, 0), (255, 255, 255)]
)
def test_instances_of_a_class_have_its_color_or_shades_of_it(color):
    colors = instance_colors(color, 8)
    assert colors[0] == color and colors[:3] == instance_colors(color, 3)
    distances = np.linalg.norm(np.array(colors)[:, None] - np.array(colors)[None], axis=-1)
    assert distances[np.triu_indices(8, 1)].min() > 25
    if max(color) - min(color) > 60:
        hue = colorsys.rgb_to_hls(*np.divide(color, 255))[0]
        for shade in colors:
            difference = abs(colorsys.rgb_to_hls(*np.divide(shade, 255))[0] - hue)
            assert min(difference, 1 - difference) < 0.05


def test_colors_of_classes_and_of_the_others():
    segments = [block(0, 0, 1, 1, label_id=label_id) for label_id in (7, 3, 7, 5, 3)]
    colors = segment_colors(segments, {3: (1, 2, 3), 7: (220, 20, 60)})
    assert colors == [
        (220, 20, 60),
        (1, 2, 3),
        instance_colors((220, 20, 60), 2)[1],
        segment_color(3),
        instance_colors((1, 2, 3), 2)[1],
    ]
    assert segment_colors(segments) == [segment_color(index) for index in range(5)]
    assert len(segment_colors([segments[0]] * 300, {7: (9, 9, 9)})) == 300


def test_class_colors_are_drawn():
    image = Image.new("RGB", (900, 700), (120, 120, 120))
    picture = np.array(draw_segments(image, [block(100, 100, 400, 600, label_id=4)], {4: (0, 0, 142)}))
    assert picture[300, 100].tolist() == [0, 0, 142]  # the outline
    assert picture[110, 110].tolist() == [60, 60, 131]


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (8000, 10), (10, 8000), (128, 128), (900, 600)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_size_leaves_room_for_text(size, mode):
    width, height = size
    picture = draw_segments(Image.new(mode, size), [block(0, 0, width, height, "a rather long name, as some are")])
    assert picture.mode == "RGB"
    assert picture.width >= max(width, 160) and picture.height >= max(height, 56)
    assert picture.width * picture.height < 3_000_000


def test_large_photos_are_reduced():
    picture = draw_segments(Image.new("RGB", (6000, 4000)), [block(0, 0, 6000, 2000)])
    assert picture.width * picture.height <= 16_100_000
    assert picture.width / picture.height == pytest.approx(1.5, rel=1e-3)


def test_no_segments_leave_the_photo_as_it_is():
    image = Image.effect_noise((900, 700), 50).convert("RGB")
    assert np.array_equal(draw_segments(image, []), image)


def overlap(first: tuple, second: tuple) -> int:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def placed(size: tuple[int, int], segments: list[Segment]) -> list[tuple]:
    colors = [segment_color(index) for index in range(len(segments))]
    labels = _place_labels(size, segments, colors, ImageFont.load_default(16))
    for label in labels:
        left, top, right, bottom = label.box
        assert min(left, top) >= 0 and right <= size[0] and bottom <= size[1]
    return [label.box for label in labels]


def test_a_label_lies_on_its_segment_if_it_fits():
    segments = [block(0, 0, 400, 600), block(400, 0, 800, 600)]
    for segment, box in zip(segments, placed((800, 600), segments), strict=True):
        assert overlap(segment.box, box) == (box[2] - box[0]) * (box[3] - box[1])


def test_labels_keep_off_each_other_and_off_small_segments():
    small = [block(60 + 12 * i, 280, 68 + 12 * i, 290) for i in range(20)]
    segments = [block(0, 0, 800, 600, "brick"), *small]
    boxes = placed((800, 600), segments)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[i + 1 :]]
    assert sum(overlap(a, b) for a, b in pairs) == 0
    assert sum(overlap(segment.box, box) for segment in small for box in boxes) == 0


def test_more_labels_than_room():
    segments = [block(0, 0, 10, 10, "name") for _ in range(80)]
    assert len(placed((120, 60), segments)) == 80
