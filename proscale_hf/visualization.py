"""Segments drawn over a photograph: translucent masks, outlines, and a name and score at each segment.

`segments_from_result`, `segments_from_label_map` and `segments_from_boxes` make `Segment`s of the results of
post-processing; `draw_segments` draws them. This file needs Pillow, numpy and scipy only.
"""

import colorsys
import functools
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage


FILL_OPACITY = 0.5
SMALLEST_LONG_SIDE = 800  # pixels; smaller photos are enlarged by a whole factor so that text fits in
MOST_PIXELS = 16_000_000  # larger photos are drawn reduced
SMALLEST_FONT = 14  # pixels
STRIP_ROWS = 256  # of a map that are looked at in one go
MARGIN_COLOR = (32, 32, 32)

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are exclusive
NO_COLORS: Mapping[int, Color] = MappingProxyType({})


@dataclass(frozen=True)
class Segment:
    """One segment of an image.

    Args:
        label: the class's name.
        label_id: the class's number.
        box: the smallest box around the segment: left, top, right, bottom in pixels, the last two exclusive.
        region: a map of what is in the box, (bottom - top, right - left): bool, or ids of segments. It may be a view of
            the map of the whole image, so that many segments of a large image share its memory.
        is_thing: a countable object (True) or amorphous stuff such as grass (False).
        score: confidence in 0..1; None where there is none (semantic segmentation).
        number: the value in `region` that stands for the segment.
    """

    label: str
    label_id: int
    box: Box
    region: np.ndarray
    is_thing: bool = True
    score: float | None = None
    number: int = 1

    @property
    def mask(self) -> np.ndarray:
        """Which pixels of the box belong to the segment: bool, (bottom - top, right - left)."""
        return self.region == self.number

    @functools.cached_property
    def area(self) -> int:
        """The number of pixels."""
        return int(np.count_nonzero(self.mask))

    def full_mask(self, height: int, width: int) -> np.ndarray:
        """The mask over the whole image: bool, (height, width)."""
        mask = np.zeros((height, width), dtype=bool)
        left, top, right, bottom = self.box
        mask[top:bottom, left:right] = self.mask
        return mask


def segments_from_result(
    result: Mapping, id2label: Mapping[int, str], stuff_label_ids: Collection[int] = ()
) -> list[Segment]:
    """Segments of one image from panoptic or instance post-processing.

    Args:
        result: "segments_info", a list of {"id", "label_id", "score"}, and "segmentation", either an (H, W) map of
            segment ids, or (N, H, W) binary masks in the order of "segments_info" (these may overlap).
        id2label: the names of the classes, as in the model's config.
        stuff_label_ids: classes that are not countable.

    Returns:
        The segments in the order of "segments_info", without those that have no pixel.
    """
    segmentation = np.asarray(result["segmentation"])
    infos = result["segments_info"]
    if segmentation.ndim == 3:
        found = [(mask, True, _boxes(mask, [True]).get(True)) for mask in segmentation.astype(bool, copy=False)]
    else:
        boxes = _boxes(segmentation, [info["id"] for info in infos])
        found = [(segmentation, info["id"], boxes.get(info["id"])) for info in infos]
    return [
        Segment(
            label=_clean_label(id2label, info["label_id"]),
            label_id=info["label_id"],
            box=box,
            region=_inside(segment_map, box),
            is_thing=info["label_id"] not in stuff_label_ids,
            score=float(info["score"]),
            number=number,
        )
        for info, (segment_map, number, box) in zip(infos, found, strict=True)
        if box is not None
    ]


def segments_from_label_map(
    label_map, id2label: Mapping[int, str], stuff_label_ids: Collection[int] = ()
) -> list[Segment]:
    """One segment per class from semantic post-processing, largest first.

    Args:
        label_map: (H, W) class numbers; numbers that are not in `id2label` (void) are left out.
        id2label: the names of the classes.
        stuff_label_ids: classes that are not countable.
    """
    label_map = np.asarray(label_map)
    segments = [
        Segment(
            label=_clean_label(id2label, label_id),
            label_id=label_id,
            box=box,
            region=_inside(label_map, box),
            is_thing=label_id not in stuff_label_ids,
            number=label_id,
        )
        for label_id, box in sorted(_boxes(label_map, id2label).items())
    ]
    return sorted(segments, key=lambda segment: -segment.area)


def segments_from_boxes(
    detections: Mapping[str, np.ndarray], id2label: Mapping[int, str], size: tuple[int, int]
) -> list[Segment]:
    """
    Segments that fill the boxes of detections.

    Args:
        detections: `scores` and `labels`, (detections,), and `boxes`, (detections, 4) left, top, right, bottom in
            pixels.
        id2label: names of the classes.
        size: height and width of the image.

    Returns:
        One for each detection, in their order.
    """
    height, width = size
    segments = []
    for score, label_id, box in zip(*(detections[name] for name in ("scores", "labels", "boxes")), strict=True):
        left, top = (
            min(max(math.floor(value), 0), side - 1) for value, side in zip(box[:2], (width, height), strict=True)
        )
        right, bottom = (
            min(max(math.ceil(value), start + 1), side)
            for value, start, side in zip(box[2:], (left, top), (width, height), strict=True)
        )
        mask = np.ones((bottom - top, right - left), dtype=bool)
        label = _clean_label(id2label, int(label_id))
        segments.append(Segment(label, int(label_id), (left, top, right, bottom), mask, score=float(score)))
    return segments


def segment_color(index: int) -> Color:
    """The colour of the segment at a position in the list: always the same, and far from its neighbours'."""
    hue = 0.58 + index * (math.sqrt(5) - 1) / 2  # golden-ratio steps never come back close
    lightness = (0.55, 0.42, 0.66)[index % 3]
    return _color_from_hls(hue, lightness, 0.8)


def instance_colors(class_color: Color, number: int) -> list[Color]:
    """Colours for instances of one class: its own, then shades of it, each as far as possible from the earlier ones.

    Args:
        class_color: red, green, blue in 0..255.
        number: how many colours; beyond about 40 some are equal.
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*(value / 255 for value in class_color))
    middle = min(max(lightness, 0.4), 0.65)  # black and white have shades on one side only
    shades = np.array(
        [
            _color_from_hls(hue + hue_step, middle + lightness_step, shade_saturation)
            for shade_saturation in (saturation, min(saturation + 0.25, 1.0), max(saturation - 0.25, 0.0))
            for hue_step in (0.0, 0.04, -0.04)
            for lightness_step in (-0.2, -0.1, 0.0, 0.1, 0.2)
        ]
    )
    colors = [class_color]
    distances = np.full(len(shades), np.inf)  # from each shade to the nearest colour
    while len(colors) < number:
        distances = np.minimum(distances, np.linalg.norm(shades - colors[-1], axis=1))
        red, green, blue = shades[distances.argmax()].tolist()
        colors.append((red, green, blue))
    return colors


def segment_colors(segments: Sequence[Segment], class_colors: Mapping[int, Color] = NO_COLORS) -> list[Color]:
    """A colour for each segment.

    Args:
        segments: what to draw.
        class_colors: colours by class number; the colour of another class depends on the segment's place in the list.

    Returns:
        Colours in the order of the segments.
    """
    numbers = Counter(segment.label_id for segment in segments if segment.label_id in class_colors)
    remaining = {label: iter(instance_colors(class_colors[label], number)) for label, number in numbers.items()}
    return [
        next(remaining[segment.label_id]) if segment.label_id in remaining else segment_color(index)
        for index, segment in enumerate(segments)
    ]


def draw_segments(
    image: Image.Image,
    segments: Sequence[Segment],
    class_colors: Mapping[int, Color] = NO_COLORS,
    opacity: float = FILL_OPACITY,
) -> Image.Image:
    """Draw segments over their photograph.

    So that names can be read, small photographs are enlarged and very large ones reduced, and a photograph too thin to
    write on gets a strip beside it.

    Args:
        image: the photograph, of the size that the segments' boxes refer to.
        segments: what to draw.
        class_colors: colours by class number, see `segment_colors`.
        opacity: of the colour inside of an outline, 0 to 1.

    Returns:
        A new RGB picture.
    """
    scale = _drawing_scale(*image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    rgb = image if image.mode == "RGB" else image.convert("RGB")  # which copies, also where there is nothing to do
    pixels = np.array(rgb.resize(size, Image.Resampling.BICUBIC))
    font_size = max(SMALLEST_FONT, round(math.sqrt(size[0] * size[1]) / 45))
    colors = segment_colors(segments, class_colors)
    segments = [_resized(segment, scale, size) for segment in segments]
    largest_first = sorted(range(len(segments)), key=lambda index: -segments[index].area)
    for index in largest_first:
        _paint(pixels, segments[index], colors[index], max(1, font_size // 8), opacity)

    canvas = Image.new("RGB", (max(size[0], 12 * font_size), max(size[1], 4 * font_size)), MARGIN_COLOR)
    canvas.paste(Image.fromarray(pixels))
    _write_labels(canvas, segments, colors, font_size)
    return canvas


def _color_from_hls(hue: float, lightness: float, saturation: float) -> Color:
    red, green, blue = colorsys.hls_to_rgb(hue % 1.0, lightness, saturation)
    return round(red * 255), round(green * 255), round(blue * 255)


def _drawing_scale(width: int, height: int) -> float:
    if max(width, height) < SMALLEST_LONG_SIDE:
        return math.ceil(SMALLEST_LONG_SIDE / max(width, height))
    return min(1.0, math.sqrt(MOST_PIXELS / (width * height)))


def _boxes(segment_map: np.ndarray, numbers: Collection[int]) -> dict[int, Box]:
    """The boxes of those of the numbers that are in the map. Read in strips, since a copy may be large."""
    places = {number: place for place, number in enumerate(sorted(numbers), start=1)}
    known = np.array(sorted(numbers))
    boxes: dict[int, Box] = {}
    for top in range(0, len(segment_map) if places else 0, STRIP_ROWS):
        strip = segment_map[top : top + STRIP_ROWS]
        place = np.searchsorted(known, strip).clip(max=len(known) - 1)
        windows = ndimage.find_objects(np.where(known[place] == strip, place + 1, 0))
        for number, place in places.items():
            if place <= len(windows) and windows[place - 1] is not None:
                rows, columns = windows[place - 1]
                left, upper, right, _ = boxes.get(number, (columns.start, top + rows.start, columns.stop, 0))
                boxes[number] = (min(left, columns.start), upper, max(right, columns.stop), top + rows.stop)
    return boxes


def _inside(segment_map: np.ndarray, box: Box) -> np.ndarray:
    """The part of a map in a box, as a view."""
    left, top, right, bottom = box
    return segment_map[top:bottom, left:right]


def _clean_label(id2label: Mapping[int, str], label_id: int) -> str:
    """A name on one line without control characters, since it comes from a file and goes to a terminal."""
    name = " ".join(str(id2label.get(label_id, f"class {label_id}")).split())
    return "".join(character if character.isprintable() else "?" for character in name)


def _resized(segment: Segment, scale: float, size: tuple[int, int]) -> Segment:
    left, top, right, bottom = (round(edge * scale) for edge in segment.box)
    left, top = min(left, size[0] - 1), min(top, size[1] - 1)
    right, bottom = min(max(right, left + 1), size[0]), min(max(bottom, top + 1), size[1])
    mask = Image.fromarray(segment.mask).resize((right - left, bottom - top), Image.Resampling.NEAREST)
    return Segment(
        segment.label,
        segment.label_id,
        (left, top, right, bottom),
        np.array(mask, dtype=bool),
        segment.is_thing,
        segment.score,
    )


def _paint(pixels: np.ndarray, segment: Segment, color: Color, line_width: int, opacity: float) -> None:
    """Tint the segment's pixels and draw its outline, in place."""
    left, top, right, bottom = segment.box
    view = pixels[top:bottom, left:right]
    framed = np.pad(segment.mask, line_width)  # so that the outline closes where the segment meets its box
    inner = ndimage.minimum_filter(framed, size=2 * line_width + 1)[line_width:-line_width, line_width:-line_width]
    outline = segment.mask & ~inner
    tinted = view[inner] * (1 - opacity) + np.array(color) * opacity
    view[inner] = tinted.round().astype(np.uint8)
    view[outline] = color


@dataclass
class _Label:
    text: str
    color: Color
    anchor: tuple[float, float]  # (x, y) in pixels: the point of the segment the label belongs to
    box: Box


def _write_labels(canvas: Image.Image, segments: Sequence[Segment], colors: Sequence[Color], font_size: int) -> None:
    font = ImageFont.load_default(font_size)
    draw = ImageDraw.Draw(canvas)
    labels = _place_labels(canvas.size, segments, colors, font)
    for label in labels:
        nearest = _nearest_point(label.box, label.anchor)
        if math.dist(nearest, label.anchor) > font_size / 2:
            _draw_leader(draw, nearest, label.anchor, label.color, width=max(1, font_size // 8))
    for label in labels:
        draw.rounded_rectangle(
            _inclusive(label.box), radius=font_size // 4, fill=label.color, outline=_text_color(label.color)
        )
        left, top, right, bottom = label.box
        draw.text(
            ((left + right) / 2, (top + bottom) / 2),
            label.text,
            _text_color(label.color),
            font=font,
            anchor="mm",
        )


def _draw_leader(
    draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], color: Color, width: int
) -> None:
    """Draw a line that ends in a dot. Both have a rim, since the end lies on a mask of the same colour."""
    for stroke, rim in ((_text_color(color), 1), (color, 0)):
        draw.line([start, end], fill=stroke, width=width + 2 * rim)
        draw.circle(end, 2 * width + rim, fill=stroke)


def _place_labels(
    canvas_size: tuple[int, int],
    segments: Sequence[Segment],
    colors: Sequence[Color],
    font: ImageFont.FreeTypeFont,
) -> list[_Label]:
    """Find a place for each label: on its own segment where there is room, else beside it, and off the other labels.

    The search tries all cells of a grid. A cell is a fifth of the text's height wide.
    """
    cell = max(1, int(font.size) // 5)
    grid_width, grid_height = (side // cell for side in canvas_size)
    taken = np.zeros((grid_height, grid_width))
    masks = [_on_grid(segment, cell, grid_height, grid_width) for segment in segments]
    texts = [_label_text(segment, font, canvas_size[0]) for segment in segments]
    text_boxes = [_text_box(text, font, cell) for text in texts]
    roomy = [mask.sum() >= 4 * height * width for mask, (height, width) in zip(masks, text_boxes, strict=True)]
    # In each cell, the share of small segments that a label there would hide.
    hidden = sum(
        (mask / mask.sum() for mask, room in zip(masks, roomy, strict=True) if not room),
        np.zeros(taken.shape),
    )

    labels: list[_Label | None] = [None] * len(segments)
    for index in sorted(range(len(segments)), key=lambda index: masks[index].sum()):  # small ones have less choice
        mask, (height, width) = masks[index], text_boxes[index]
        anchor_row, anchor_column = _anchor(mask)
        rows, columns = np.ogrid[: grid_height - height + 1, : grid_width - width + 1]
        cost = np.hypot(rows + height / 2 - anchor_row, columns + width / 2 - anchor_column) / height
        cost = cost + 1000 * _window_sums(taken, height, width) / (height * width)
        cost = cost + 20 * _window_sums(hidden, height, width)
        if roomy[index]:
            cost = cost - 20 * _window_sums(mask, height, width) / (height * width)
        row, column = np.unravel_index(np.argmin(cost), cost.shape)
        taken[row : row + height, column : column + width] = 1
        box = (column * cell, row * cell, (column + width) * cell, (row + height) * cell)
        anchor = ((anchor_column + 0.5) * cell, (anchor_row + 0.5) * cell)
        labels[index] = _Label(texts[index], colors[index], anchor, box)
    return labels


def _on_grid(segment: Segment, cell: int, height: int, width: int) -> np.ndarray:
    """The share of each grid cell that the segment covers: float, (height, width); never all zero."""
    left, top, right, bottom = segment.box
    left, right = min(left // cell, width - 1), min(-(-right // cell), width)
    top, bottom = min(top // cell, height - 1), min(-(-bottom // cell), height)
    crop = Image.fromarray(segment.mask.astype(np.float32))
    grid = np.zeros((height, width))
    shares = crop.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BOX)
    grid[top : top + shares.height, left : left + shares.width] = np.maximum(shares, 1e-3)
    return grid


def _anchor(mask: np.ndarray) -> tuple[int, int]:
    """The cell deepest inside a segment: (row, column)."""
    depth = ndimage.distance_transform_edt(np.pad(mask >= min(0.5, mask.max()), 1))[1:-1, 1:-1]
    row, column = np.unravel_index(np.argmax(depth), depth.shape)
    return int(row), int(column)


def _window_sums(grid: np.ndarray, height: int, width: int) -> np.ndarray:
    """The sum of `grid` under a height x width window at each position: (rows - height + 1, columns - width + 1)."""
    sums = np.pad(grid.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]


def _label_text(segment: Segment, font: ImageFont.FreeTypeFont, canvas_width: int) -> str:
    """Name and score, the name shortened until both fit on the canvas."""
    score = "" if segment.score is None else f" {segment.score:.0%}"
    for length in range(len(segment.label), 0, -1):
        name = segment.label if length == len(segment.label) else segment.label[:length] + "…"
        if font.getlength(name + score) <= min(canvas_width, 24 * font.size) - 2 * font.size:
            return name + score
    return score.strip()


def _text_box(text: str, font: ImageFont.FreeTypeFont, cell: int) -> tuple[int, int]:
    """The (height, width) in cells of a label with its padding."""
    width = font.getlength(text) + 0.8 * font.size
    height = 1.4 * font.size
    return math.ceil(height / cell), math.ceil(width / cell)


def _text_color(background: Color) -> str:
    """Black or white, whichever has more contrast by the luminance formula of WCAG."""
    linear = [
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in np.divide(background, 255)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "white"


def _nearest_point(box: Box, point: tuple[float, float]) -> tuple[float, float]:
    left, top, right, bottom = box
    return min(max(point[0], left), right - 1), min(max(point[1], top), bottom - 1)


def _inclusive(box: Box) -> Box:
    left, top, right, bottom = box
    return left, top, right - 1, bottom - 1
