"""Converts a Mask2Former model of transformers into a folder for `from_pretrained`: as it is, or with another encoder.

Usage: `proscale convert transformers-mask2former --model FOLDER-OR-ID --output FOLDER
[--encoder proscale --encoder-stage-layers 3,3,3]`

Tensors have the same names in both, so every tensor that the new model has too is taken over. The early stages of the
PRO-SCALE encoder attend only to the coarser maps, and take over the parts for these maps. All other tensors start anew.
"""

import argparse
import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from torch import Tensor
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
    PreTrainedConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import (
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from proscale_hf.convert import ConversionError
from proscale_hf.convert.model_building import build_model, expected_tensors
from proscale_hf.convert.options import add_output_options, given_categories
from proscale_hf.convert.output import check_output, check_shard_size, write_model_folder
from proscale_hf.data.categories import CATEGORY_SETS, load_categories
from proscale_hf.encoders.configuration import TOKEN_RECALIBRATIONS, check_extent
from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.reading import reading
from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.hub.errors import explain
from proscale_hf.models.base import check_parameters
from proscale_hf.models.mask2former.configuration_proscale_mask2former import (
    PIXEL_EMBEDDINGS,
    ProScaleMask2FormerConfig,
)
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation


SEED = 0  # of tensors that start anew: the same command gives the same file
LEVELS = 3  # of feature maps that each layer of transformers' encoder attends to, coarse to fine

# The settings that make this package's model the same as transformers'.
SAME_MODEL = {
    "encoder": "mask2former",
    "token_recalibration": "none",
    "pixel_embedding": "conv",
    "mask_padding": False,  # transformers takes padding for image
}
# The choices of the command line for each encoder; with Mask2Former's, the model is the same as in transformers.
SETTINGS_OF_ENCODERS = {
    "proscale": ("encoder_stage_layers", "token_recalibration", "pixel_embedding"),
    "lite": ("pixel_embedding",),
    "rt": ("pixel_embedding",),
    "mask2former": (),
}
PROCESSOR_SETTINGS = (
    "do_convert_rgb",
    "do_normalize",
    "do_reduce_labels",
    "do_rescale",
    "do_resize",
    "ignore_index",
    "image_mean",
    "image_std",
    "num_labels",
    "pad_size",
    "resample",
    "rescale_factor",
    "size",
    "size_divisor",
    # names of earlier releases, which this package's processors understand
    "max_size",
    "reduce_labels",
)

# Tensors of an encoder layer that have rows for each level: (heads, levels, ...) along the first axis.
OF_LEVELS = re.compile(r".*\.encoder\.layers\.\d+\.self_attn\.(sampling_offsets|attention_weights)\.(weight|bias)")
DECODER = "model.pixel_level_module.decoder."
LAYER = re.compile(re.escape(DECODER) + r"encoder\.layers\.(\d+)\.(.*)")


class Source(NamedTuple):
    """A saved model of transformers. `left_out` names the tensors that are in its files but not in the model."""

    config: Mask2FormerConfig
    state: dict[str, Tensor]
    processor_settings: dict[str, Any] | None
    left_out: list[str]


class Conversion(NamedTuple):
    """
    Attributes:
        model: In float32 and evaluation mode.
        image_processor: The model's.
        taken: Names of the tensors that are taken from the source.
        in_part: Names of the tensors of which the part for the coarser maps is taken.
        new: Names of the freshly initialised tensors.
        left_out: Names of the source's tensors that have no place in the model.
        notes: Sentences about anything else that a person should know.
    """

    model: ProScaleMask2FormerForUniversalSegmentation
    image_processor: BaseImageProcessor
    taken: list[str]
    in_part: list[str]
    new: list[str]
    left_out: list[str]
    notes: list[str]


def convert_model(
    model: str | Path, categories: Sequence[Mapping[str, Any]] | None = None, **settings: Any
) -> Conversion:
    """
    Build the model and the image processor that a Mask2Former model of transformers stands for.

    Args:
        model: A folder, or an id on the Hub. Only safetensors are read.
        categories: The classes in label order, as COCO-panoptic categories. By default they are those of a known data
            set with the same names, otherwise none.
        settings: Fields of [`ProScaleMask2FormerConfig`] that should differ, such as `encoder="proscale"` and its
            stages. By default the model is the same as in transformers.

    Returns:
        The model, the image processor, and what happened to each tensor.

    Raises:
        ConversionError: the model cannot be loaded, is no Mask2Former, or does not fit the settings or categories.
    """
    source = load_source(str(model))
    notes = []
    if source.processor_settings is None:
        notes.append("The model came without image processor settings; these are the defaults.")
    labels = _label_settings(source.config, categories, notes)
    with reading(model, "cannot be converted with these settings", ConversionError, _one_line):
        config = ProScaleMask2FormerConfig(**_model_settings(source.config, notes) | labels | settings)
        expected = expected_tensors(config)

    state, in_part, left_out = _take_over(source.state, expected, config.num_attention_heads)
    source.state.clear()
    taken = [name for name in state if name not in in_part]
    new = [name for name in expected if name not in state]
    without_source = [name for name in new if config.encoder == "mask2former" or not name.startswith(DECODER)]
    if without_source:
        raise ConversionError(f"The weights of {model} do not fit its configuration: {_some(without_source)} missing.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        converted = build_model(config, state)
    return Conversion(
        converted,
        _image_processor(source.processor_settings or {}, config.categories),
        taken=taken,
        in_part=in_part,
        new=new,
        left_out=[*left_out, *source.left_out],
        notes=notes,
    )


def load_source(name: str) -> Source:
    """
    Load a Mask2Former model of transformers.

    Args:
        name: A folder, or an id on the Hub.

    Returns:
        Its configuration, its tensors in float32 with their current names, and its image processor's settings.

    Raises:
        ConversionError: there is no such model, it is of another type, or its files are damaged or incomplete.
    """
    is_folder = _check_name(name)
    try:
        values, _ = PreTrainedConfig.get_config_dict(name)
        model_type = values.get("model_type")
        if model_type != Mask2FormerConfig.model_type:
            raise ConversionError(f"{name} is no Mask2Former model of transformers: its model_type is {model_type!r}.")
        if not any(_has_file(name, file) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
            raise ConversionError(
                f"{name} has no {SAFE_WEIGHTS_NAME}. Weights in pickles (.bin) are not read; load them with "
                "transformers, if you trust them, and save them again by `save_pretrained`."
            )
        check_extent(values)
        with torch.device("meta"):
            check_parameters(Mask2FormerForUniversalSegmentation(Mask2FormerConfig.from_dict(values)))
        model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            name, use_safetensors=True, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except ConversionError:
        raise
    except Exception as error:  # damaged files, no network, no such repository: each library has its own types
        if is_out_of_memory(error):
            raise
        why = _one_line(error) if is_folder else explain(error)
        raise ConversionError(f"{name} cannot be loaded: {why.rstrip('.')}.") from error
    unusable = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if unusable:
        raise ConversionError(
            f"The weights of {name} do not fit its configuration: {_some(unusable)} missing or of another shape."
        )
    return Source(model.config, model.state_dict(), _processor_settings(name), sorted(report["unexpected_keys"]))


def _processor_settings(name: str) -> dict[str, Any] | None:
    """The settings of the model's image processor; None if it was not saved."""
    try:
        if not _has_file(name, IMAGE_PROCESSOR_NAME):
            return None
        return Mask2FormerImageProcessorPil.get_image_processor_dict(name)[0]
    except Exception as error:
        raise ConversionError(f"{IMAGE_PROCESSOR_NAME} of {name} cannot be read: {_one_line(error)}.") from error


def _check_name(name: str) -> bool:
    """Whether this is a folder; raise if it is no usable folder and can be no id on the Hub."""
    folder = Path(name)
    if not folder.exists():
        try:
            validate_repo_id(name)
        except HFValidationError:
            raise ConversionError(f"There is no folder {name}; give a model's folder, or its id on the Hub.") from None
        return False
    if not folder.is_dir():
        raise ConversionError(f"{name} is a file; give the folder that holds the model.")
    if not (folder / CONFIG_NAME).is_file():
        raise ConversionError(f"The folder {name} has no {CONFIG_NAME}; give one that `save_pretrained` wrote.")
    return True


def _has_file(name: str, file: str) -> bool:
    """Whether a folder or a repository on the Hub has a file; from the Hub the file is downloaded."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False) is not None


def _model_settings(source: Mask2FormerConfig, notes: list[str]) -> dict[str, Any]:
    """The fields of Mask2Former's configuration, all of which have the same name and meaning here."""
    general = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field.name for field in dataclasses.fields(source) if field.name not in general]
    settings = {name: getattr(source, name) for name in own} | SAME_MODEL
    if not 2 <= source.ignore_value <= 255:
        del settings["ignore_value"]
        notes.append(f"ignore_value {source.ignore_value}, which transformers never reads, is replaced by 255.")
    return settings


def _label_settings(
    source: Mask2FormerConfig, categories: Sequence[Mapping[str, Any]] | None, notes: list[str]
) -> dict[str, Any]:
    names = [source.id2label[label] for label in sorted(source.id2label)]
    if categories is None:
        data_set = _known_set(names)
        if data_set is None:
            notes.append("Which labels are stuff is not known; if some are, convert again with --labels.")
            return _names_of_labels(names)
        notes.append(f"The labels are those of the category set {data_set}; if they are others, use --labels.")
        known = load_categories(data_set)
        categories = [{**category, "name": name} for category, name in zip(known, names, strict=True)]
    elif len(categories) != len(names):
        raise ConversionError(f"{len(categories)} labels are given, but the model has {len(names)}.")
    names = [category["name"] for category in categories]
    return {**_names_of_labels(names), "categories": [dict(category) for category in categories]}


def _names_of_labels(names: Sequence[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: label for label, name in enumerate(names)}}


def _known_set(names: Sequence[str]) -> str | None:
    """The first category set with these names; case and synonyms behind a comma are ignored."""

    def plain(name: str) -> str:
        return re.split("[,;]", name)[0].strip().casefold()

    for data_set in CATEGORY_SETS:
        if [plain(category["name"]) for category in load_categories(data_set)] == [plain(name) for name in names]:
            return data_set
    return None


def _take_over(
    source: Mapping[str, Tensor], expected: Mapping[str, Tensor], heads: int
) -> tuple[dict[str, Tensor], list[str], list[str]]:
    """The tensors to take over, the names of those that are taken in part, and the names of those that are left out."""
    state, in_part, left_out = {}, [], []
    for name, tensor in source.items():
        if name not in expected:
            left_out.append(name)
        elif tensor.shape == expected[name].shape:
            state[name] = tensor
        elif OF_LEVELS.fullmatch(name):
            by_level = tensor.unflatten(0, (heads, LEVELS, -1))  # (heads, levels, points or their coordinates, ...)
            levels = len(expected[name]) * LEVELS // len(tensor)
            state[name] = by_level[:, :levels].flatten(0, 2)
            in_part.append(name)
        else:
            raise ConversionError(f"{name} has shape {tuple(tensor.shape)}, but needs {tuple(expected[name].shape)}.")
    return state, in_part, left_out


def _image_processor(settings: Mapping[str, Any], categories: Sequence[Mapping[str, Any]] | None) -> BaseImageProcessor:
    stuff = [label for label, category in enumerate(categories or ()) if not category.get("isthing", 1)]
    carried = {name: settings[name] for name in PROCESSOR_SETTINGS if settings.get(name) is not None}
    with reading(IMAGE_PROCESSOR_NAME, "has impossible settings", ConversionError, _one_line):
        return image_processor_class()(label_ids_to_fuse=stuff, **carried)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the converter's arguments."""
    parser.add_argument("--model", required=True, metavar="FOLDER-OR-ID", help="a folder, or an id on the Hub")
    add_output_options(parser)
    parser.add_argument(
        "--encoder",
        choices=SETTINGS_OF_ENCODERS,
        default="mask2former",
        help="mask2former: the same model; others: a model to fine-tune (default: %(default)s)",
    )
    defaults = ProScaleMask2FormerConfig
    parser.add_argument(
        "--encoder-stage-layers",
        type=stage_layers,
        metavar="P1,P2,P3",
        help="layers in the stages of the proscale encoder "
        f"(default: {','.join(map(str, defaults.encoder_stage_layers))})",
    )
    parser.add_argument(
        "--token-recalibration",
        choices=TOKEN_RECALIBRATIONS,
        help=f"of the proscale encoder (default: {defaults.token_recalibration})",
    )
    parser.add_argument(
        "--pixel-embedding",
        choices=[kind for kind in PIXEL_EMBEDDINGS if kind != "none"],  # which needs a backbone with three maps
        help="with another encoder than mask2former; conv keeps Mask2Former's convolution and its weights "
        f"(default: {defaults.pixel_embedding})",
    )


def stage_layers(text: str) -> tuple[int, ...]:
    """Reads "3,3,3"."""
    return tuple(int(part) for part in text.split(","))


def run(options: argparse.Namespace) -> None:
    """Convert and write; a failure leaves nothing behind."""
    check_output(options.output)
    check_shard_size(options.max_shard_size)
    settings = _encoder_settings(options)
    conversion = convert_model(options.model, given_categories(options), **settings)
    write_model_folder(conversion.model, conversion.image_processor, options.output, options.max_shard_size)
    print(summary(conversion, options.output))


def _encoder_settings(options: argparse.Namespace) -> dict[str, Any]:
    given = {
        name: getattr(options, name) for name in SETTINGS_OF_ENCODERS["proscale"] if getattr(options, name) is not None
    }
    own = SETTINGS_OF_ENCODERS[options.encoder]
    for name in given:
        if name not in own:
            encoders = " or ".join(encoder for encoder, names in SETTINGS_OF_ENCODERS.items() if name in names)
            raise ConversionError(f"--{name.replace('_', '-')} changes the model; it needs --encoder {encoders}.")
    if not own:
        return {}
    defaults = {name: getattr(ProScaleMask2FormerConfig, name) for name in (*own, "mask_padding")}
    return {"encoder": options.encoder, **defaults, **given}


def summary(conversion: Conversion, output: Path) -> str:
    """What a person should know after the conversion."""
    model, config = conversion.model, conversion.model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    stuff = len(conversion.image_processor.label_ids_to_fuse)
    stages = f" {tuple(config.encoder_stage_layers)}" if config.encoder == "proscale" else ""
    lines = [
        f"Wrote {output}: {config.backbone_config.model_type} backbone, {config.encoder} encoder{stages}, "
        f"{config.num_labels} labels, {stuff} of them stuff, {parameters / 1e6:.2f} M parameters.",
        *conversion.notes,
        f"Tensors taken over: {len(conversion.taken)}",
    ]
    for what, names in (
        ("Tensors taken over in part, for the coarser maps", conversion.in_part),
        ("New tensors, freshly initialised", conversion.new),
        ("Tensors left out", conversion.left_out),
    ):
        if names:
            lines += [f"{what}: {len(names)}", *(f"  {line}" for line in grouped(names))]
    if config.encoder != "mask2former":
        lines.append("Fine-tune the model before you use it.")
    return "\n".join(lines)


def grouped(names: Iterable[str]) -> list[str]:
    """
    Group tensor names into a few lines: encoder layers with the same tensors share a line.

    Args:
        names: Names in a state dict.

    Returns:
        One line for each group, with the number of its tensors.
    """
    parts_of_layer: dict[int, list[str]] = defaultdict(list)
    modules: dict[str, int] = defaultdict(int)
    for name in names:
        match = LAYER.fullmatch(name)
        if match:
            parts_of_layer[int(match[1])].append(match[2])
        else:
            modules[name.rpartition(".")[0] or name] += 1
    layers_with: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for layer, parts in parts_of_layer.items():
        layers_with[tuple(parts)].append(layer)
    lines = []
    for parts, layers in layers_with.items():
        tops = dict.fromkeys(part.rpartition(".")[0] for part in parts)
        lines.append(f"{DECODER}encoder.layers.{_ranges(layers)}: {len(layers) * len(parts)} ({', '.join(tops)})")
    return lines + [f"{module}: {count}" for module, count in modules.items()]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return f"{len(names)} of the tensors, such as {names[0]}, are"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text
