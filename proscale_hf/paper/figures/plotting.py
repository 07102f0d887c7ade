"""The plots' common parts: fonts, colours that the colour-blind can tell apart, names, and the final picture."""

import contextlib
import math
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image


# Okabe and Ito's palette, without its yellow, which is too pale for lines.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "image.cmap": "viridis",
    "legend.frameon": False,
    "text.parse_math": False,  # names are shown as they are
}


@contextlib.contextmanager
def plot_style() -> Iterator[None]:
    """Plots that are drawn inside a `with` block look the same, whatever the user's settings of matplotlib are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def to_picture(figure: Figure) -> Image.Image:
    """The figure's pixels, RGB. This needs no display and opens no window."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB")


def scale_name(stride: int) -> str:
    """The paper's name of a map, where it has one: `"s4, 1/32"` for stride 32."""
    index = math.log2(stride) - 1
    return f"s{index:.0f}, 1/{stride}" if index.is_integer() else f"1/{stride}"


def shortened(name: str, longest: int = 32) -> str:
    """A name that fits on a plot: its end, which tells models apart better than its beginning."""
    return name if len(name) <= longest else "…" + name[1 - longest :]
