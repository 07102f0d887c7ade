"""Converts a detectron2 checkpoint of Mask2Former or PRO-SCALE into a folder for `from_pretrained`.

Usage: `proscale convert detectron2 --config FILE.yaml --checkpoint FILE.pth --output FOLDER`
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.image_processing_utils import BaseImageProcessor

from proscale_hf.convert import ConversionError
from proscale_hf.convert.backbone import check_training_conditions, rename_backbone
from proscale_hf.convert.detectron2_config import (
    Detectron2Config,
    dataset_of,
    image_processor_settings,
    model_settings,
    read_config,
    reads_bgr,
)
from proscale_hf.convert.model_building import build_model, expected_tensors, to_float32
from proscale_hf.convert.options import add_comparison_options, add_output_options, given_categories
from proscale_hf.convert.output import check_output, check_shard_size, write_model_folder
from proscale_hf.convert.publishing import add_publishing_options, check_publishing, publish
from proscale_hf.convert.rename import IMAGE_CONVOLUTION, rename_state_dict
from proscale_hf.convert.safe_pickle import load_checkpoint
from proscale_hf.convert.verification import compare_with_recorded, report_on_image
from proscale_hf.data.categories import load_categories
from proscale_hf.files.reading import reading
from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation


# Every checkpoint of the original PRO-SCALE code gets this: the code's licence covers the released weights.
PROSCALE_WEIGHTS_LICENSE = "other: non-commercial evaluation, without redistribution"


def convert_checkpoint(
    config_path: str | Path,
    checkpoint_path: str | Path,
    categories: Sequence[Mapping[str, Any]] | None = None,
    backbone_only: bool = False,
) -> tuple[ProScaleMask2FormerForUniversalSegmentation, BaseImageProcessor]:
    """
    Build the model and the image processor that a detectron2 checkpoint stands for.

    Args:
        config_path: The checkpoint's YAML configuration: a full dump, or a file with a `_BASE_` chain.
        checkpoint_path: The `.pth` or `.pkl` file.
        categories: The classes in label order, as COCO-panoptic categories. By default they are those of the
            configuration's data set if that is COCO, ADE20K, Cityscapes or Mapillary Vistas, otherwise none.
        backbone_only: The checkpoint is an ImageNet backbone; the rest of the model is freshly initialised.

    Returns:
        The model in float32 and evaluation mode, and the image processor.

    Raises:
        ConversionError: a file is missing, damaged or unsafe, the configuration has a value without an
            equivalent, or checkpoint, configuration and categories do not fit each other.
    """
    config = read_config(config_path)
    processor_settings = image_processor_settings(config)
    settings = model_settings(config)
    if categories is None:
        categories = known_categories(config)
    elif backbone_only:
        settings["num_labels"] = len(categories)
    elif len(categories) != settings["num_labels"]:
        raise ConversionError(f"{len(categories)} labels are given, but the checkpoint has {settings['num_labels']}.")
    if categories:
        settings["id2label"] = {label: category["name"] for label, category in enumerate(categories)}
        settings["label2id"] = {name: label for label, name in settings["id2label"].items()}
        settings["categories"] = [dict(category) for category in categories]
        del settings["num_labels"]
    if settings["encoder"] == "proscale" and not backbone_only:
        settings["weights_license"] = PROSCALE_WEIGHTS_LICENSE
    stuff_ids = [label for label, category in enumerate(categories or ()) if not category.get("isthing", 1)]
    with reading(config_path, "describes no possible model", ConversionError):
        image_processor = image_processor_class()(label_ids_to_fuse=stuff_ids, **processor_settings)
        model_config = ProScaleMask2FormerConfig(**settings)
        expected = expected_tensors(model_config)

    tensors = to_float32(load_checkpoint(checkpoint_path))
    if backbone_only:
        check_training_conditions(tensors, config)
    rename = rename_backbone if backbone_only else rename_state_dict
    state = rename(tensors, expected)
    del tensors  # so that tensors that are cut in parts can be freed one by one
    if reads_bgr(config):
        state.update({name: state[name].flip(1) for name in state if IMAGE_CONVOLUTION.fullmatch(name)})
    return build_model(model_config, state), image_processor


def known_categories(config: Detectron2Config) -> list[dict[str, Any]] | None:
    """The classes of the configuration's data set; None if it is unknown or has another number of classes."""
    dataset = dataset_of(config)
    categories = load_categories(dataset) if dataset else []
    return categories if len(categories) == config["MODEL.SEM_SEG_HEAD.NUM_CLASSES"] else None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the converter's arguments."""
    parser.add_argument("--config", type=Path, required=True, help="the YAML file it was trained with")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the .pth or .pkl file")
    add_output_options(parser)
    parser.add_argument(
        "--backbone-only",
        action="store_true",
        help="the checkpoint is an ImageNet backbone; the rest of the model is initialised for training",
    )
    parser.add_argument(
        "--verify", type=Path, metavar="IMAGE", help="run the converted model on a picture and print what it found"
    )
    add_comparison_options(parser)
    add_publishing_options(parser)


def run(options: argparse.Namespace) -> None:
    """Convert, verify, write and publish; a failure leaves nothing behind."""
    check_output(options.output)
    check_shard_size(options.max_shard_size)
    check_publishing(options)
    for path in (options.verify, options.expected):
        if path is not None and not path.is_file():
            raise ConversionError(f"There is no file {path}.")
    model, image_processor = convert_checkpoint(
        options.config, options.checkpoint, given_categories(options), options.backbone_only
    )
    check_publishing(options, model.config)
    if options.expected is not None:
        print(compare_with_recorded(model, image_processor, options.expected, options.tolerance))
    if options.verify is not None:
        print(report_on_image(model, image_processor, options.verify))
    write_model_folder(model, image_processor, options.output, options.max_shard_size)
    print(summary(model, image_processor, options))
    publish(options)


def summary(
    model: ProScaleMask2FormerForUniversalSegmentation,
    image_processor: BaseImageProcessor,
    options: argparse.Namespace,
) -> str:
    """What a person should know after the conversion."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stuff = [config.id2label[label] for label in image_processor.label_ids_to_fuse]
    lines = [
        f"Wrote {options.output}: {config.backbone_config.model_type} backbone, {config.encoder} encoder, "
        f"{config.num_labels} labels, {parameters / 1e6:.2f} M parameters.",
        f"{len(stuff)} stuff labels, merged in panoptic results: {shortened(stuff)}."
        if stuff
        else "No stuff labels; if some classes have no instances, convert again with --labels.",
        "Thresholds of post-processing are the image processor's own, not the configuration's.",
    ]
    if options.backbone_only:
        lines.append("Only the backbone is trained; fine-tune the model before you use it.")
    if config.weights_license:
        lines.append(f"Licence of the original weights: {config.weights_license.partition(': ')[2]}.")
    return "\n".join(lines)


def shortened(names: Sequence[str], length: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:length]) + (", ..." if len(names) > length else "")
