"""Converts a detectron2 checkpoint of Mask2Former or PRO-SCALE into a folder for `from_pretrained`.

Usage: `python -m convert.detectron2 --config FILE.yaml --checkpoint FILE.pth --output FOLDER`
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import is_torchvision_available

import proscale_hf
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation

from . import ConversionError
from .detectron2_config import (
    image_processor_settings,
    known_stuff_ids,
    model_settings,
    read_config,
    reads_bgr,
)
from .rename import IMAGE_CONVOLUTION, rename_state_dict
from .safe_pickle import load_checkpoint


def convert_checkpoint(
    config_path: str | Path, checkpoint_path: str | Path, stuff_ids: Sequence[int] | None = None
) -> tuple[ProScaleMask2FormerForUniversalSegmentation, BaseImageProcessor]:
    """
    Build the model and the image processor that a detectron2 checkpoint stands for.

    Args:
        config_path: Its YAML configuration: a full dump, or a file with a `_BASE_` chain.
        checkpoint_path: Its `.pth` or `.pkl` file.
        stuff_ids: Label ids of the classes without instances. By default those of the configuration's data
            set if that is COCO, ADE20K or Cityscapes, and otherwise none.

    Returns:
        The model in float32 and evaluation mode, and the image processor.

    Raises:
        ConversionError: a file is missing, damaged or unsafe, the configuration has a value without an
            equivalent, or checkpoint and configuration do not fit each other.
    """
    config = read_config(config_path)
    processor_settings = image_processor_settings(config)
    try:
        model_config = ProScaleMask2FormerConfig(**model_settings(config))
    except ValueError as error:
        raise ConversionError(f"{config_path} describes no possible model: {error}") from error
    if stuff_ids is None:
        stuff_ids = known_stuff_ids(config) or ()
    last_label = model_config.num_labels - 1
    foreign_ids = [label for label in stuff_ids if not 0 <= label <= last_label]
    if foreign_ids:
        raise ConversionError(f"Stuff ids {foreign_ids} are no labels; labels are 0 to {last_label}.")

    checkpoint = load_checkpoint(checkpoint_path)
    model = ProScaleMask2FormerForUniversalSegmentation(model_config)
    state = rename_state_dict(checkpoint, model.state_dict())
    if reads_bgr(config):
        state.update({name: state[name].flip(1) for name in state if IMAGE_CONVOLUTION.fullmatch(name)})
    model.load_state_dict(state)

    processor_class = (
        proscale_hf.ProScaleMask2FormerImageProcessor
        if is_torchvision_available()
        else proscale_hf.ProScaleMask2FormerImageProcessorPil
    )
    return model.eval(), processor_class(label_ids_to_fuse=list(stuff_ids), **processor_settings)


def save(model: ProScaleMask2FormerForUniversalSegmentation, image_processor: BaseImageProcessor, output: Path) -> None:
    """Write both into the folder `output`, completely or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as workspace:
        folder = Path(workspace) / output.name
        model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        folder.rename(output)


def check_output(output: Path) -> None:
    """Raise if there is something in the place of the new folder, other than an empty folder."""
    if output.is_symlink():
        raise ConversionError(f"{output} is a symbolic link; give the folder itself.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists already; give a new or an empty folder.")


def parse_label_ids(text: str) -> list[int]:
    """`"0,2,7-10"` as a list of numbers."""
    if not re.fullmatch(r"(\d{1,6}(-\d{1,6})?(,|$))*", text):
        raise argparse.ArgumentTypeError(f"label ids look like 7-10 or 7,8,9, not like {text!r}")
    ids: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        ids.extend(range(int(first), int(last or first) + 1))
    return ids


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m convert.detectron2", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="the YAML file it was trained with")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the .pth or .pkl file")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, new or empty")
    parser.add_argument(
        "--stuff-ids",
        type=parse_label_ids,
        metavar="IDS",
        help="label ids of classes without instances: 7-10 or 7,8,9 (known for COCO, ADE20K, Cityscapes)",
    )
    options = parser.parse_args(arguments)
    try:
        check_output(options.output)
        model, image_processor = convert_checkpoint(options.config, options.checkpoint, options.stuff_ids)
        save(model, image_processor, options.output)
    except (ConversionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(summary(model, image_processor, options.output))
    return 0


def summary(
    model: ProScaleMask2FormerForUniversalSegmentation, image_processor: BaseImageProcessor, output: Path
) -> str:
    """What a person should know after the conversion."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stuff_ids = image_processor.label_ids_to_fuse
    return "\n".join(
        (
            f"Wrote {output}: {config.backbone_config.model_type} backbone, {config.encoder} encoder, "
            f"{config.num_labels} labels, {parameters / 1e6:.2f} M parameters.",
            f"Stuff labels, merged in panoptic results: {stuff_ids}."
            if stuff_ids
            else "Stuff labels: none; if some classes have no instances, convert again with --stuff-ids.",
            "Thresholds of post-processing are the image processor's own, not the configuration's.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
