"""Panoptic maps of several models side by side (paper, figures 6 and 11): a row for an image, a column for a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.paper.figures.observation import Observation
from proscale_hf.visualization import Color, Segment, draw_segments, segment_color, segments_from_result


COLUMN_WIDTH = 640  # pixels
TALLEST = 960  # pixels
GAP = 8  # pixels between pictures
FONT_SIZE = 26
PICTURE_COLUMN = "picture"


def find_panoptic_segments(model: Any, image_processor: Any, image: Image.Image) -> list[Segment]:
    """
    Segment one image.

    Args:
        model: the segmentation model.
        image_processor: its image processor.
        image: what to segment.

    Returns:
        The segments that the model finds.
    """
    outputs = Observation(model, image_processor, image).outputs
    sizes = [(image.height, image.width)]
    stuff = model.config.stuff_label_ids(image_processor.label_ids_to_fuse)
    result = image_processor.post_process_panoptic_segmentation(outputs, target_sizes=sizes, label_ids_to_fuse=stuff)[0]
    return segments_from_result(result, model.config.id2label, stuff)


def class_colors(configs: Mapping[str, ProScaleMask2FormerConfig]) -> dict[str, dict[int, Color]]:
    """
    Choose the colours of all models' classes.

    Args:
        configs: configurations of the models, by name.

    Returns:
        For each model a colour for each of its labels. Labels of one name have one colour: the one in a model's
        categories, if there is one.
    """
    labels = dict.fromkeys(label for config in configs.values() for label in config.id2label.values())
    colors = {label: segment_color(index) for index, label in enumerate(labels)}
    for config in configs.values():
        for label_id, label in config.id2label.items():
            category = config.category(label_id) or {}
            if "color" in category:
                colors[label] = tuple(category["color"])
    return {
        name: {label_id: colors[label] for label_id, label in config.id2label.items()}
        for name, config in configs.items()
    }


def draw_panoptic_maps(
    images: Sequence[Image.Image],
    segments: Mapping[str, Sequence[Sequence[Segment]]],
    colors: Mapping[str, Mapping[int, Color]],
) -> Image.Image:
    """
    Draw figures 6 and 11.

    Args:
        images: the pictures, for the first column.
        segments: by name of the model, the segments that it found in each picture.
        colors: result of `class_colors`.

    Returns:
        The figure, with the models' names above the columns.
    """
    columns = {PICTURE_COLUMN: list(images)}
    for name, found in segments.items():
        columns[name] = [draw_segments(*pair, colors[name]) for pair in zip(images, found, strict=True)]
    cells = [[_fit(picture) for picture in row] for row in zip(*columns.values(), strict=True)]
    heights = [max(cell.height for cell in row) for row in cells]
    header = 2 * FONT_SIZE
    canvas = Image.new(
        "RGB",
        (len(columns) * (COLUMN_WIDTH + GAP) - GAP, header + sum(heights) + GAP * (len(heights) - 1)),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_SIZE)
    for column, name in enumerate(columns):
        left = column * (COLUMN_WIDTH + GAP)
        draw.text((left + COLUMN_WIDTH / 2, header / 2), _fitting(name, font), "black", font, anchor="mm")
        top = header
        for row, height in zip(cells, heights, strict=True):
            canvas.paste(row[column], (left + (COLUMN_WIDTH - row[column].width) // 2, top))
            top += height + GAP
    return canvas


def _fit(picture: Image.Image) -> Image.Image:
    """The picture, as wide as a column if it is not too tall then."""
    scale = min(COLUMN_WIDTH / picture.width, TALLEST / picture.height)
    width, height = (max(1, round(scale * side)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _fitting(name: str, font: ImageFont.FreeTypeFont) -> str:
    """The end of the name, as long as fits above a column."""
    for start in range(len(name)):
        text = name if start == 0 else "…" + name[start:]
        if font.getlength(text) <= COLUMN_WIDTH:
            return text
    return ""
