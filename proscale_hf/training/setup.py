"""What a recipe stands for: data sets, model and image processor, ready to train. Both training scripts begin here."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.utils import logging as transformers_logging

from proscale_hf.data.augmentation import build_augmentation
from proscale_hf.data.collate import TrainingTransform, TransformedDataset
from proscale_hf.data.dataset import SegmentationDataset
from proscale_hf.data.objects import check_objects
from proscale_hf.data.opening import open_dataset
from proscale_hf.evaluation.agreement import choose_tasks
from proscale_hf.files.memory import is_out_of_memory
from proscale_hf.files.text import one_line
from proscale_hf.hub.auto_classes import image_processor_class
from proscale_hf.hub.names import resolved
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.modeling_proscale_mask2former import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.models.mask2former.presets import preset_settings
from proscale_hf.training.recipe import Recipe, RecipeError, check_known, merged


logger = logging.getLogger(__name__)

SEGMENTERS = ("proscale_mask2former", "mask2former")  # types of models that weights can be taken from
# What a backbone has and a classifier has not: Swin's norms of the four outputs, and its last norm, which is not used.
WITHOUT_SOURCE = ("hidden_states_norms.", "layernorm.", "num_batches_tracked")


def load_datasets(recipe: Recipe) -> tuple[SegmentationDataset, SegmentationDataset | None]:
    """
    Open the recipe's data sets.

    Returns:
        Training and validation images; None where the recipe has no validation.

    Raises:
        ValueError: data are missing or wrong, there is no object to train on, the two have other classes, or the
            recipe's tasks cannot be evaluated.
    """
    if recipe.data.train is None:
        raise RecipeError("the recipe does not say what to train on: give data.train, with name and root")
    train = open_dataset(**recipe.data.train, on_error=recipe.data.on_error)
    check_objects(train)
    if recipe.data.validation is None:
        return train, None
    validation = open_dataset(**recipe.data.validation, on_error=recipe.data.on_error)
    for label_id, pair in enumerate(zip(_names(train.categories), _names(validation.categories), strict=False)):
        if pair[0] != pair[1]:
            raise RecipeError(
                f"label {label_id} is {pair[0]!r} in data.train and {pair[1]!r} in data.validation: give both the "
                "same categories"
            )
    if len(train.categories) != len(validation.categories):
        raise RecipeError(
            f"data.train has {len(train.categories)} categories and data.validation {len(validation.categories)}"
        )
    choose_tasks(validation, recipe.evaluation.tasks)  # refuses now what evaluation would refuse hours later
    return train, validation


def training_set(recipe: Recipe, dataset: SegmentationDataset, image_processor: Any) -> TransformedDataset:
    """The images augmented and normalised, reproducibly; to be put together by `proscale_hf.data.collate.collate`.

    Raises:
        ValueError: the recipe's augmentation is not possible.
    """
    transform = TrainingTransform(build_augmentation(recipe.augmentation), image_processor)
    return TransformedDataset(dataset, transform, recipe.seed)


def load_model_and_processor(
    recipe: Recipe, categories: list[dict[str, Any]]
) -> tuple[ProScaleMask2FormerForUniversalSegmentation, Any]:
    """
    The model to train, in float32 and in training mode, and its image processor.

    New weights depend on the recipe's seed alone. What a pretrained model does not have for these classes is new too,
    and one line of the log says what that is.

    Args:
        recipe: which model.
        categories: the data set's, in label order; they become `id2label` and `categories` of the configuration. Those
            that are stuff become `label_ids_to_fuse` of the image processor.

    Raises:
        ValueError: a field is not possible, or weights cannot be loaded or do not fit; one line.
    """
    config = create_config(recipe, categories)
    image_processor = create_image_processor(recipe, categories)
    torch.manual_seed(recipe.seed)
    if recipe.model.pretrained is not None:
        model, new = _load_weights(ProScaleMask2FormerForUniversalSegmentation, recipe.model.pretrained, config)
        if new:
            parts = sorted({name.rpartition(".")[0] for name in new})
            shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
            logger.warning("New, since %s has none that fit: %s.", recipe.model.pretrained, shown)
    else:
        with _one_line_errors("model.config"):
            model = ProScaleMask2FormerForUniversalSegmentation(config)
        if recipe.model.backbone is not None:
            load_backbone(model, recipe.model.backbone)
    model.train()
    if recipe.optimization.sync_batch_norm:
        synchronize_batch_norm(model)
    return model, image_processor


def create_config(recipe: Recipe, categories: list[dict[str, Any]]) -> ProScaleMask2FormerConfig:
    """The configuration: the pretrained model's or the preset's, with the recipe's fields and the data's classes.

    Raises:
        ValueError: a field has a value that is not possible, or the pretrained model cannot be found.
    """
    source = recipe.model.pretrained
    values: dict[str, Any] = {}
    if source is not None:
        with _one_line_errors(f"cannot load the model {source}"):
            values = ProScaleMask2FormerConfig.from_pretrained(source).to_dict()
        if values["model_type"] not in SEGMENTERS:
            raise RecipeError(
                f"model.pretrained {source} is a {values['model_type']}, not one of {', '.join(SEGMENTERS)}"
            )
    elif recipe.model.preset is not None:
        values = preset_settings(recipe.model.preset)
        del values["num_labels"]  # the data's
    names = _names(categories)
    with _one_line_errors("model.config"):
        return ProScaleMask2FormerConfig.from_dict(
            {
                **merged(values, recipe.model.config),
                "model_type": ProScaleMask2FormerConfig.model_type,
                "id2label": dict(enumerate(names)),
                "label2id": {name: label_id for label_id, name in enumerate(names)},
                "categories": categories,
            }
        )


def create_image_processor(recipe: Recipe, categories: list[dict[str, Any]]) -> Any:
    """The image processor of the installed backend: the pretrained model's if there is one, with the recipe's fields.

    Raises:
        ValueError: a field is unknown or has a value that is not possible.
    """
    processor_class = image_processor_class()
    known = list(processor_class.valid_kwargs.__annotations__)
    for key in recipe.image_processor:
        check_known(f"image_processor.{key}", key, known)
    stuff = [label_id for label_id, category in enumerate(categories) if not category.get("isthing", 1)]
    fields = {**recipe.image_processor, "label_ids_to_fuse": stuff}
    source = recipe.model.pretrained
    with _one_line_errors("image_processor" if source is None else f"cannot load the image processor of {source}"):
        return processor_class(**fields) if source is None else processor_class.from_pretrained(source, **fields)


def synchronize_batch_norm(model: nn.Module) -> None:
    """Let batch norms that are trained see the images of all GPUs. On the CPU, PyTorch has none that can."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if torch.distributed.get_backend() == "gloo":
        return
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module) is nn.BatchNorm2d and module.weight.requires_grad:  # timm's classes are more than norms
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(module))


def load_backbone(model: ProScaleMask2FormerForUniversalSegmentation, source: str) -> None:
    """
    Put pretrained weights into a new model's backbone.

    Args:
        model: what is filled; its configuration says which architecture the weights must have.
        source: see `ModelSection.backbone`. Only safetensors are read.

    Raises:
        ValueError: there are no such weights, or they do not fit; one line.
    """
    backbone = model.model.pixel_level_module.encoder
    config = model.config.backbone_config
    if config.model_type == "timm_backbone":
        weights = _timm_weights(config, source)
    else:
        with _one_line_errors(f"cannot load the backbone {source}"), resolved(source) as place:
            is_segmenter = AutoConfig.from_pretrained(place).model_type in SEGMENTERS
        if is_segmenter:
            donor, new = _load_weights(type(model), source, model.config)
            weights = donor.model.pixel_level_module.encoder.state_dict()
            new = [name for name in new if name.startswith("model.pixel_level_module.encoder.")]
        else:
            donor, new = _load_weights(type(backbone), source, config)
            weights = donor.state_dict()
        lacking = [name for name in new if not any(part in name for part in WITHOUT_SOURCE)]
        if lacking:
            raise RecipeError(
                f"model.backbone {source} has no weights that fit {len(lacking)} of the backbone's tensors, such as "
                f"{lacking[0]}: model.config.backbone_config must describe the same architecture"
            )
    backbone.load_state_dict(weights)


def _timm_weights(config: Any, source: str) -> dict[str, torch.Tensor]:
    with _one_line_errors(f"cannot load the backbone {source}"):
        import timm

        place = f"local-dir:{source}" if os.path.isdir(source) else f"hf-hub:{source}"
        donor = timm.create_model(place, pretrained=True, features_only=True, out_indices=config.out_indices)
    return {f"_backbone.{name}": tensor for name, tensor in donor.state_dict().items()}


def _load_weights(model_class: type, source: str, config: Any) -> tuple[nn.Module, list[str]]:
    """A float32 model with the weights of `source`, and the names of its tensors that had to be initialised."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # its report of new weights is a table; the caller says it in a line
    try:
        with _one_line_errors(f"cannot load the weights of {source}"):
            model, report = model_class.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    return model, sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})


@contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns what libraries raise over a bad source or field into a `RecipeError` of one line."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RecipeError(f"{what}: {one_line(error)}") from error


def _names(categories: list[dict[str, Any]]) -> list[str]:
    return [category["name"] for category in categories]
