"""Where the compute goes (paper, figure 1): a bar for each model, cut into backbone, encoder, mask decoder and rest."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from PIL import Image

from proscale_hf.cost import Cost
from proscale_hf.paper.figures.plotting import COLORS, plot_style, shortened, to_picture


TEXT_COLORS = ("white", "black", "white", "black")  # on the first of COLORS
SMALLEST_SHARE_WITH_A_NUMBER = 0.06  # of the longest bar


def parts_of(cost: Cost) -> dict[str, float]:
    """GFLOPs of the parts that add up to the total."""
    parts = {
        "backbone": cost.backbone_gflops,
        "encoder": cost.encoder_gflops,
        "mask decoder": cost.mask_decoder_gflops,
    }
    return {**parts, "rest": cost.total_gflops - sum(parts.values())}


def draw_compute_distribution(costs: Mapping[str, Cost], height: int, width: int) -> Image.Image:
    """
    Draw figure 1.

    Args:
        costs: results of `measure_cost`, by name of the model.
        height: of the image that the costs are for, in pixels.
        width: as `height`.

    Returns:
        The figure. "Encoder" is the pixel decoder, as in the paper.
    """
    longest = max(cost.total_gflops for cost in costs.values())
    with plot_style():
        figure = Figure(figsize=(8, 1.7 + 0.6 * len(costs)))
        axes = figure.add_subplot()
        for row, cost in enumerate(costs.values()):
            start = 0.0
            for (name, gflops), color, text_color in zip(parts_of(cost).items(), COLORS, TEXT_COLORS, strict=False):
                axes.barh(row, gflops, left=start, height=0.62, color=color, label=name if row == 0 else None)
                if gflops >= SMALLEST_SHARE_WITH_A_NUMBER * longest:
                    share = f"{gflops / cost.total_gflops:.0%}"
                    axes.text(start + gflops / 2, row, share, ha="center", va="center", color=text_color)
                start += gflops
            axes.text(start + 0.01 * longest, row, f"{start:.4g}", va="center")
        axes.set_yticks(range(len(costs)), [shortened(name) for name in costs])
        axes.set_ylim(len(costs) - 0.5, -0.5)
        axes.set_xlim(0, 1.1 * longest)
        axes.set_xlabel(f"GFLOPs of one {height} x {width} image (a multiply-add counts 1)")
        figure.legend(loc="outside upper center", ncols=4)
        return to_picture(figure)
