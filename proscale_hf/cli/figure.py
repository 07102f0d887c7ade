"""`proscale figure NAME`: the paper's analyses as pictures, of any model and images."""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from proscale_hf.cli.command_line import Subcommand
from proscale_hf.cli.console import CommandError, needed_libraries, progress, user_errors
from proscale_hf.cli.device import add_device_options, place_model
from proscale_hf.cli.loading import load_config, load_model
from proscale_hf.cli.numbers import image_size, positive


MODEL_HELP = "a folder, a Hub id or a short name (default: the small demo model that comes with the package)"


def add_images(parser: argparse.ArgumentParser) -> None:
    """Adds the images to look at."""
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")


def add_size(parser: argparse.ArgumentParser, required: bool) -> None:
    """Adds the size that costs are counted for."""
    purpose = "the image's, in pixels" if required else "of an image: count GFLOPs that the files lack, by model"
    parser.add_argument("--size", type=image_size, required=required, metavar="HxW", help=purpose)


def add_compute_distribution_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "configs",
        nargs="+",
        metavar="[LABEL=]MODEL",
        help='a preset, a folder, a config.json, a Hub id, or "demo"; LABEL is what stands beside the bar',
    )
    add_size(parser, required=True)


def add_token_similarity_options(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    parser.add_argument("--model", metavar="DIR-OR-HUB-ID", help=MODEL_HELP)
    parser.add_argument(
        "--distance", type=positive, default=100, metavar="TOKENS", help="how far to look (default: %(default)s)"
    )
    add_device_options(parser)


def add_recalibration_options(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    parser.add_argument("--model", metavar="DIR-OR-HUB-ID", help=MODEL_HELP)
    add_device_options(parser)


def add_cost_and_quality_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results",
        nargs="+",
        metavar="FILE",
        help="CSV or JSON with name, gflops and pq; also results.json of `proscale evaluate`",
    )
    parser.add_argument("--baseline", metavar="NAME", help="the model to compare with (default: the first)")
    add_size(parser, required=False)


def add_panoptic_maps_options(parser: argparse.ArgumentParser) -> None:
    add_images(parser)
    parser.add_argument(
        "--model",
        action="append",
        metavar="[LABEL=]MODEL",
        help=f"{MODEL_HELP}; can be given several times; LABEL is what stands above the column",
    )
    add_device_options(parser)


def figure_command(
    name: str,
    text: str,
    add_options: Callable[[argparse.ArgumentParser], None],
    draw: Callable[[argparse.Namespace, Any], Any],
) -> Subcommand:
    """The command of one figure.

    Args:
        name: the figure's.
        text: says what the figure shows.
        add_options: adds its own arguments.
        draw: makes a Pillow image of the parsed command line, with the module of that name in `paper/figures`.
    """

    def add_all_options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--output", required=True, metavar="FILE", help="the picture to write, such as figure.png")
        add_options(parser)

    run = partial(draw_figure, draw, name.replace("-", "_"))
    return Subcommand(name, help=text, description=f"Draw {text}.", add_options=add_all_options, run=run)


def draw_figure(draw: Callable[[argparse.Namespace, Any], Any], module: str, options: argparse.Namespace) -> None:
    """Draws a figure and writes it.

    Args:
        draw: see `figure_command`.
        module: the figure's, in `paper/figures`.
        options: the parsed command line.
    """
    from proscale_hf.files.whole import check_writable
    from proscale_hf.processing.pictures import check_picture_name, save_image

    with user_errors(exit_code=2):
        check_picture_name(options.output)
        check_writable(options.output)
    read = getattr(options, "images", getattr(options, "results", ()))
    if Path(options.output).resolve() in {Path(path).resolve() for path in read}:
        raise CommandError(f"{options.output} is read and to be written; give --output another name", exit_code=2)
    with needed_libraries("figures"):
        figure = importlib.import_module(f"proscale_hf.paper.figures.{module}")
    with needed_libraries("timm"):  # the backbone's
        picture = draw(options, figure)
    with user_errors():
        save_image(picture, options.output)
    print(f"wrote {options.output}")


def draw_compute_distribution(options: argparse.Namespace, figure: Any) -> Any:
    """Counts each model's cost, and draws it."""
    from proscale_hf.cost import measure_cost

    configs = {}
    for text in options.configs:
        label, model = split_label(text)
        configs[new_label(label, configs)] = load_config(model)
    with working("counting"):
        costs = {label: measure_cost(config, *options.size) for label, config in configs.items()}
        return figure.draw_compute_distribution(costs, *options.size)


def draw_token_similarity(options: argparse.Namespace, figure: Any) -> Any:
    """Measures token similarity on the images, and draws it."""
    from proscale_hf.processing.pictures import load_image

    model, image_processor = prepared_model(options.model, options)
    with working("looking at the images"):
        images = map(load_image, options.images)
        similarity = figure.measure_token_similarity(model, image_processor, images, options.distance)
        return figure.draw_token_similarity(similarity)


def draw_recalibration(options: argparse.Namespace, figure: Any) -> Any:
    """Runs the model on the images, and draws what recalibration does in it."""
    from proscale_hf.processing.pictures import load_image

    with user_errors():
        images = [load_image(path) for path in options.images]
    model, image_processor = prepared_model(options.model, options)
    with working("looking at the images"):
        found = [figure.measure_recalibration(model, image_processor, image) for image in images]
        return figure.draw_recalibration(images, found)


def draw_cost_and_quality(options: argparse.Namespace, figure: Any) -> Any:
    """Reads the results, counts GFLOPs that they lack if a size is given, and draws them."""
    from proscale_hf.cost import measure_cost

    def count_gflops(model: str) -> float:
        return measure_cost(load_config(model), *options.size).total_gflops

    with working("reading results"):
        results = figure.read_results(options.results, count_gflops if options.size else None)
        return figure.draw_cost_and_quality(results, options.baseline)


def draw_panoptic_maps(options: argparse.Namespace, figure: Any) -> Any:
    """Runs each model on all images, and puts the maps side by side."""
    from proscale_hf.processing.pictures import load_image

    with user_errors():
        images = [load_image(path) for path in options.images]
    segments, configs = {}, {}
    for text in options.model or ["demo"]:
        label, name = split_label(text)
        label = new_label(label, segments)
        model, image_processor = prepared_model(None if name == "demo" else name, options)
        with working(f"{label}: segmenting the images"):
            segments[label] = [figure.find_panoptic_segments(model, image_processor, image) for image in images]
        configs[label] = model.config
    with progress("drawing"), user_errors():
        return figure.draw_panoptic_maps(images, segments, figure.class_colors(configs))


def split_label(text: str) -> tuple[str, str]:
    """`"LABEL=MODEL"`, where the label may be missing: it is then the model's name, or its folder's."""
    label, separator, model = text.partition("=")
    if separator and label and model and not Path(text).exists():
        return label, model
    return Path(text).name or text, text


def new_label(label: str, labels: Any) -> str:
    """The label, if it is not among those before."""
    if label in labels:
        raise CommandError(f"two models are called {label}; tell them apart with LABEL=MODEL", exit_code=2)
    return label


def prepared_model(name: str | None, options: argparse.Namespace) -> tuple[Any, Any]:
    """The model where the options say, and its image processor."""
    with progress("loading the model"):
        model, image_processor = load_model(name)
        place_model(model, options)
    return model, image_processor


@contextlib.contextmanager
def working(message: str) -> Iterator[None]:
    """Says what a model is doing, and why it failed if it does."""
    from proscale_hf.files.text import one_line

    try:
        with progress(message), user_errors():
            yield
    except (RuntimeError, MemoryError) as error:  # torch says so when memory does not suffice
        raise CommandError(f"the model failed: {one_line(error)}") from error


FIGURES = (
    figure_command(
        "compute-distribution",
        "what backbone, encoder and mask decoder cost (figure 1)",
        add_compute_distribution_options,
        draw_compute_distribution,
    ),
    figure_command(
        "token-similarity",
        "how alike neighbouring tokens are, for each scale (figure 9)",
        add_token_similarity_options,
        draw_token_similarity,
    ),
    figure_command(
        "recalibration",
        "maps before and after token recalibration (figure 8)",
        add_recalibration_options,
        draw_recalibration,
    ),
    figure_command(
        "cost-and-quality", "GFLOPs against PQ (figure 10)", add_cost_and_quality_options, draw_cost_and_quality
    ),
    figure_command(
        "panoptic-maps",
        "panoptic maps of several models side by side (figures 6 and 11)",
        add_panoptic_maps_options,
        draw_panoptic_maps,
    ),
)
FIGURE = Subcommand(
    name="figure",
    help="draw an analysis of the paper",
    description="Draw one of the paper's analyses. `proscale figure NAME --help` says more about each.",
    add_options=lambda parser: parser.add_subcommands("NAME", FIGURES),
)
