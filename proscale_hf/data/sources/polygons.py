"""The forms of polygons in JSON files: COCO's, and the one that other tools write in its place."""

from proscale_hf.files.text import shown


POLYGON_FORM = "[x, y, x, y, ...]"
MIN_COORDINATES = 6  # of a polygon: three points


def polygons_of(shape: list) -> list[list]:
    """The polygons of a "segmentation", as COCO has them: [x, y, x, y, ...]. Numbers are not checked.

    Args:
        shape: polygons in COCO's form, or as lists of [x, y] pairs, which LabelMe and others write. Those of fewer than
            three points are left out.

    Raises:
        ValueError: it has another form.
    """
    is_pairs = len(shape) > 2 and all(_is_pair(point) for point in shape)  # a polygon without a list around it
    if is_pairs or not all(isinstance(polygon, list) for polygon in shape):
        raise ValueError(f"must be a list of polygons, each {POLYGON_FORM}, got {shown(shape)}")
    polygons = [_flat(polygon) for polygon in shape]
    return [polygon for polygon in polygons if len(polygon) >= MIN_COORDINATES]


def _flat(polygon: list) -> list:
    if not any(isinstance(point, list | dict) for point in polygon):
        return polygon
    if not all(_is_pair(point) for point in polygon):
        raise ValueError(f"must have polygons {POLYGON_FORM}, or pairs [x, y], got {shown(polygon)}")
    return [coordinate for point in polygon for coordinate in point]


def _is_pair(point: object) -> bool:
    return isinstance(point, list) and len(point) == 2 and not any(isinstance(value, list | dict) for value in point)
