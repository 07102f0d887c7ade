"""What token recalibration does to an image's maps (paper, appendix C and figure 8).

For each recalibrated map this shows the attention map, sigmoid(temperature * projection(resized finest map)), and the
map's strength, the mean absolute value of the channels, before and after.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from proscale_hf.paper.figures.observation import Observation
from proscale_hf.paper.figures.plotting import plot_style, scale_name, to_picture


OVERLAY_OPACITY = 0.65
FLATTEST, TALLEST = 0.4, 2.5  # height over width of a panel; a panorama is stretched, for the numbers beside it


@dataclass(frozen=True)
class Recalibration:
    """One map of one image, without padding.

    Attributes:
        stride: of the map.
        attention: (height, width), in 0..1. With the layout "original" and a convolution its positions are mixed up,
            as they are in the model.
        before: (height, width), the mean absolute value of the channels.
        after: the same, after the map was multiplied with `attention`.
        extent: (left, right, bottom, top) of the map in units of the image's size.
    """

    stride: int
    attention: np.ndarray
    before: np.ndarray
    after: np.ndarray
    extent: tuple[float, float, float, float]


def measure_recalibration(model: Any, image_processor: Any, image: Image.Image) -> list[Recalibration]:
    """
    Watch the token recalibration of one image.

    Args:
        model: the segmentation model.
        image_processor: its image processor.
        image: what to look at.

    Returns:
        One result for each recalibrated map, coarse to fine.

    Raises:
        ValueError: the model has no token recalibration.
    """
    module = getattr(model.model.pixel_level_module.decoder.encoder, "token_recalibration", None)
    if module is None:
        raise ValueError(
            f"this model has no token recalibration (encoder={model.config.encoder!r}, "
            f"token_recalibration={model.config.token_recalibration!r}), so there is no effect to show"
        )
    observation = Observation(model, image_processor, image, [module, module.projection])
    calls, projections = observation.calls
    recalibrations = []
    for stride, ((coarse, _), weighted), (_, logits) in zip(
        model.config.encoder_strides, calls, projections, strict=False
    ):
        # one logit per position, whether the projection is a linear layer or a convolution
        attention = (module.temperature * logits.float()).sigmoid().reshape(coarse.shape[-2:])
        maps = (attention, coarse[0].float().abs().mean(dim=0), weighted[0].float().abs().mean(dim=0))
        valid = [observation.without_padding(feature_map, stride).cpu().numpy() for feature_map in maps]
        (rows, columns), (height, width) = valid[0].shape, observation.size
        extent = (0.0, columns * stride / width, rows * stride / height, 0.0)
        recalibrations.append(Recalibration(stride, *valid, extent))
    return recalibrations


def draw_recalibration(images: Sequence[Image.Image], recalibrations: Sequence[Sequence[Recalibration]]) -> Image.Image:
    """
    Draw figure 8.

    Args:
        images: the pictures.
        recalibrations: for each picture the result of `measure_recalibration`.

    Returns:
        The figure, with a row for each map of each picture. Attention has its own scale. "After" is divided by the mean
        attention: so it has the scale of "before", and differs from it only where attention differs.
    """
    rows = [(image, found) for image, maps in zip(images, recalibrations, strict=True) for found in maps]
    heights = [min(max(image.height / image.width, FLATTEST), TALLEST) for image, _ in rows]
    with plot_style():
        figure = Figure(figsize=(10.5, 0.5 + 0.15 * len(rows) + 1.95 * sum(heights)), layout="compressed")
        grid = figure.subplots(len(rows), 4, squeeze=False, height_ratios=heights)
        for axes, title in zip(grid[0], ("picture", "attention", "before", "after / mean attention"), strict=True):
            axes.set_title(title)
        for line, (image, found), height in zip(grid, rows, heights, strict=True):
            after = found.after / found.attention.mean()
            limits = min(found.before.min(), after.min()), max(found.before.max(), after.max())
            panels = ((None, None), (found.attention, None), (found.before, limits), (after, limits))
            for axes, (values, scale) in zip(line, panels, strict=True):
                axes.imshow(
                    np.asarray(image.convert("RGB" if values is None else "L")), cmap="gray", extent=(0, 1, 1, 0)
                )
                if values is not None:
                    low, high = scale or (None, None)
                    heat = axes.imshow(
                        values, extent=found.extent, alpha=OVERLAY_OPACITY, vmin=low, vmax=high, interpolation="nearest"
                    )
                    figure.colorbar(heat, ax=axes, shrink=0.8)
                axes.spines[:].set_visible(False)
                axes.set(xlim=(0, 1), ylim=(1, 0), xticks=[], yticks=[], aspect=height)
            line[0].set_ylabel(scale_name(found.stride))
        return to_picture(figure)
