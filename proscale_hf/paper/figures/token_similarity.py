"""How alike neighbouring tokens are, for each scale (paper, figure 9): the redundancy that PRO-SCALE saves on.

The measure is the cosine similarity of each token and the token `distance` further on, row after row, in the maps that
enter the encoder, before positions are added. It is averaged over tokens, then over images.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from proscale_hf.paper.figures.observation import Observation
from proscale_hf.paper.figures.plotting import COLORS, plot_style, scale_name, to_picture


def similarity_by_distance(feature_map: torch.Tensor, longest_distance: int) -> np.ndarray:
    """
    Compare the tokens of one map.

    Args:
        feature_map: (channels, height, width).
        longest_distance: in tokens; at most half of the number of tokens is used, so that each mean has many pairs.

    Returns:
        (distances,) float64, the mean cosine similarity at distance 1, 2, ...
    """
    tokens = torch.nn.functional.normalize(feature_map.flatten(1).double(), dim=0)  # (channels, tokens)
    distances = range(1, min(longest_distance, tokens.shape[1] // 2) + 1)
    return np.array([(tokens[:, d:] * tokens[:, :-d]).sum(dim=0).mean().item() for d in distances])


def measure_token_similarity(
    model: Any, image_processor: Any, images: Iterable[Image.Image], longest_distance: int = 100
) -> dict[int, np.ndarray]:
    """
    Compare the tokens of a model's maps.

    Args:
        model: the segmentation model.
        image_processor: its image processor.
        images: the images to average over.
        longest_distance: in tokens.

    Returns:
        For each stride (distances,), the mean similarity at distance 1, 2, ..., as far as the smallest image's map
        allows.

    Raises:
        ValueError: there are no images.
    """
    curves: dict[int, list[np.ndarray]] = {stride: [] for stride in model.config.encoder_strides}
    for image in images:
        observation = Observation(model, image_processor, image, [model.model.pixel_level_module.decoder.encoder])
        [[((feature_maps, *_), _)]] = observation.calls
        for stride, feature_map in zip(curves, feature_maps, strict=True):
            valid = observation.without_padding(feature_map[0], stride)
            curves[stride].append(similarity_by_distance(valid, longest_distance))
    if not any(curves.values()):
        raise ValueError("token similarity needs at least one image")
    return {
        stride: np.mean([curve[: min(map(len, found))] for curve in found], axis=0) for stride, found in curves.items()
    }


def draw_token_similarity(similarity: Mapping[int, np.ndarray]) -> Image.Image:
    """
    Draw figure 9.

    Args:
        similarity: result of `measure_token_similarity`.

    Returns:
        The figure, with one curve for each scale.
    """
    with plot_style():
        figure = Figure(figsize=(7, 4))
        axes = figure.add_subplot()
        for (stride, curve), color in zip(sorted(similarity.items()), COLORS, strict=False):
            marker = "o" if len(curve) < 3 else None  # no line to see
            axes.plot(range(1, len(curve) + 1), curve, color=color, label=scale_name(stride), lw=2, marker=marker)
        axes.set_xlabel("distance along the token dimension (tokens)")
        axes.set_ylabel("cosine similarity (mean)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=4)
        return to_picture(figure)
