"""Converts a checkpoint of the original DINO into a folder for `from_pretrained`.

Usage: `proscale convert dino --checkpoint FILE.pth --output FOLDER`
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.dino_config import model_settings, read_settings
from proscale_hf.convert.dino_names import rename_state_dict
from proscale_hf.convert.dino_verification import compare_with_recorded
from proscale_hf.convert.model_building import build_model, expected_tensors, to_float32
from proscale_hf.convert.options import add_comparison_options, add_output_options, given_categories
from proscale_hf.convert.output import check_output, check_shard_size, write_model_folder
from proscale_hf.convert.publishing import add_publishing_options, check_publishing, publish
from proscale_hf.convert.rename import without_wrapper
from proscale_hf.convert.safe_pickle import load_checkpoint_and_settings
from proscale_hf.data.categories import load_categories
from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.models.dino.configuration_proscale_dino import ProScaleDinoConfig
from proscale_hf.models.dino.modeling_proscale_dino import ProScaleDinoForObjectDetection


COCO_LABELS = 91  # the largest of COCO's category ids, and 0; the original's labels are ids


def convert_checkpoint(
    checkpoint_path: str | Path,
    config_path: str | Path | None = None,
    categories: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[ProScaleDinoForObjectDetection, BaseImageProcessor]:
    """
    Build the model and the image processor that a checkpoint of DINO stands for.

    Args:
        checkpoint_path: The `.pth` file. Of averaged weights (`ema_model`) and others, the averaged ones are taken.
        config_path: The training's configuration, `.py` or `.json`, for a checkpoint without `args`.
        categories: The classes in label order. By default they are COCO's for a checkpoint with 91 classes, whose
            labels are COCO's ids, and otherwise none.

    Returns:
        The model in float32 and evaluation mode, and the image processor.

    Raises:
        ConversionError: a file is missing, damaged or unsafe, the settings have a value without an equivalent, or
            checkpoint, settings and categories do not fit each other.
    """
    tensors, settings = load_checkpoint_and_settings(checkpoint_path)
    if config_path is not None:
        settings = read_settings(Path(config_path))
    if settings is None:
        raise ConversionError(f"{checkpoint_path} has no settings (args); give the training's with --config.")
    tensors = to_float32(dict(without_wrapper(tensors)))
    model_fields = model_settings(settings, tensors)
    num_labels = model_fields.pop("num_labels")
    if categories is not None and len(categories) != num_labels:
        raise ConversionError(f"{len(categories)} labels are given, but the checkpoint has {num_labels}.")
    try:
        config = ProScaleDinoConfig(**model_fields, **label_settings(num_labels, categories))
    except ValueError as error:
        raise ConversionError(f"{checkpoint_path} describes no possible model: {error}") from error
    state = rename_state_dict(
        tensors,
        expected_tensors(config, ProScaleDinoForObjectDetection),
        config.num_feature_levels,
        config.num_attention_heads,
    )
    del tensors
    return build_model(config, state, ProScaleDinoForObjectDetection), image_processor_class(config.model_type)()


def label_settings(num_labels: int, categories: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """The configuration's fields about classes: the given ones, COCO's, or only their number."""
    if categories is not None:
        names = {label: category["name"] for label, category in enumerate(categories)}
        extra = {"categories": [dict(category) for category in categories]}
    elif num_labels == COCO_LABELS:
        names = dict.fromkeys(range(num_labels), "N/A")  # ids that COCO does not use
        names |= {category["id"]: category["name"] for category in load_categories("coco_instance")}
        extra = {}
    else:
        return {"num_labels": num_labels}
    return {"id2label": names, "label2id": {name: label for label, name in names.items()}, **extra}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the converter's arguments."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="the .pth file")
    parser.add_argument(
        "--config", type=Path, help="the .py or .json file it was trained with; by default, what the checkpoint says"
    )
    add_output_options(parser)
    add_comparison_options(parser)
    add_publishing_options(parser)


def run(options: argparse.Namespace) -> None:
    """Convert, verify, write and publish; a failure leaves nothing behind."""
    check_output(options.output)
    check_shard_size(options.max_shard_size)
    check_publishing(options)
    if options.expected is not None and not options.expected.is_file():
        raise ConversionError(f"There is no file {options.expected}.")
    model, image_processor = convert_checkpoint(options.checkpoint, options.config, given_categories(options))
    check_publishing(options, model.config)
    if options.expected is not None:
        print(compare_with_recorded(model, options.expected, options.tolerance))
    write_model_folder(model, image_processor, options.output, options.max_shard_size)
    print(summary(model, options))
    publish(options)


def summary(model: ProScaleDinoForObjectDetection, options: argparse.Namespace) -> str:
    """What a person should know after the conversion."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return "\n".join(
        [
            f"Wrote {options.output}: {config.backbone_config.model_type} backbone, {config.encoder} encoder, "
            f"{config.num_feature_levels} scales, {config.num_labels} labels, {parameters / 1e6:.2f} M parameters.",
            "A batch is padded as in the original (batch_padding 'original'), so results depend a little on the batch; "
            "with 'per_image' in config.json they are those of each image alone.",
        ]
    )
