"""Recipes: everything that decides what a training computes, as YAML files that say only what differs from the paper.

The defaults are the paper's (https://arxiv.org/abs/2404.14657, appendix A). A file may start from another with `base`:

    base: coco_swin_t.yaml
    optimization: {max_steps: 90000}

Mappings merge key by key. One that names another `name` or `model_type` than its base replaces it, since the base's
other keys belong to something else. Lists are replaced.
"""

import difflib
import re
import types
import typing
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedConfig

from proscale_hf.evaluation.agreement import TASKS
from proscale_hf.files.text import printable, shown
from proscale_hf.models.mask2former.configuration_proscale_mask2former import ProScaleMask2FormerConfig
from proscale_hf.models.mask2former.presets import preset_settings


try:
    import yaml

    from proscale_hf.files.yaml_text import Chain, PlainLoader, explain_yaml, read_yaml
except ImportError as error:
    raise ImportError('recipes need PyYAML: pip install "proscale-hf[train]"') from error

KIND_KEYS = ("name", "model_type")
LARGEST_NUMBER = 1e18  # which is neither infinite, nor too large for PyTorch


class RecipeError(ValueError):
    """A recipe cannot be meant; the text is one line that names the key or file and what is possible."""


@dataclass
class ModelSection:
    """
    Attributes:
        pretrained: model to start from (folder, Hub id or short name); a new one if not given.
        preset: a new model's configuration by name, see `models/mask2former/presets.py`; that of PRO-SCALE
            (3, 3, 3) with Swin-T if not given.
        config: fields of `ProScaleMask2FormerConfig`, merged over the preset's or the pretrained model's.
        backbone: weights for a new model's backbone: a transformers or timm model (folder or Hub id), or a folder that
            has the backbone of a PRO-SCALE model, as the converter writes it. Random if not given.
    """

    pretrained: str | None = None
    preset: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    backbone: str | None = None


@dataclass
class DataSection:
    """
    Attributes:
        train: `name` and options of a data set, as `proscale_hf.data.opening.open_dataset` takes them.
        validation: the same; no evaluation if not given.
        on_error: what a corrupt image or annotation does: `"raise"` stops, `"skip"` takes the next one and counts.
    """

    train: dict[str, Any] | None = None
    validation: dict[str, Any] | None = None
    on_error: Literal["raise", "skip"] = "raise"


@dataclass
class OptimizationSection:
    """
    Attributes:
        learning_rate: of AdamW, before any decay.
        weight_decay: of all weights but norms and embeddings.
        backbone_factor: the backbone's learning rate over that of the rest.
        max_steps: how many updates; either this or `epochs`.
        epochs: how many passes over the training images.
        batch_size: images per update, over all processes.
        device_batch_size: images per process and forward pass, the rest by accumulation of gradients; as many as
            `batch_size` asks for if not given.
        schedule: `"steps"` (the paper's) or `"polynomial"` with power 0.9 (Mask2Former's for Cityscapes and ADE20K).
        decay_at: shares of the training after which `"steps"` multiplies the learning rate by `decay_factor`.
        decay_factor: see `decay_at`.
        warmup_steps: updates with a linearly growing learning rate.
        clip: largest norm of the gradient of the whole model; no clipping if not given.
        precision: `"no"` is float32; `"fp16"` and `"bf16"` are mixed.
        ema: decay of the exponential moving average of the weights, such as 0.9998, which is what is then evaluated and
            saved; no average if not given.
        sync_batch_norm: batch norms that are trained see the images of all GPUs, not of their own alone. All images
            must have one size then: a GPU that has another number of sizes than the others would wait for ever.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 0.05
    backbone_factor: float = 0.1
    max_steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    device_batch_size: int | None = None
    schedule: Literal["steps", "polynomial"] = "steps"
    decay_at: tuple[float, ...] = (0.9, 0.95)
    decay_factor: float = 0.1
    warmup_steps: int = 0
    clip: float | None = 0.01
    precision: Literal["no", "fp16", "bf16"] = "fp16"
    ema: float | None = None
    sync_batch_norm: bool = False


@dataclass
class EvaluationSection:
    """
    Attributes:
        tasks: what is measured; all that the annotations tell if not given. The first one decides which model is best.
        every: steps between evaluations; the end of training is always evaluated.
        batch_size: images per process and forward pass.
        patience: stop after that many evaluations in a row without a new best; never if not given.
    """

    tasks: tuple[str, ...] | None = None
    every: int = 5000
    batch_size: int = 1
    patience: int | None = None


@dataclass
class CheckpointSection:
    """
    Attributes:
        every: steps between checkpoints to resume from.
        keep: how many of them stay on disk.
    """

    every: int = 5000
    keep: int = 2


def jitter_of_coco() -> dict[str, Any]:
    return {"name": "large_scale_jitter", "scale": [0.1, 2.0], "size": [1024, 1024], "flip": 0.5, "pad": True}


@dataclass
class Recipe:
    """
    Attributes:
        model, data, optimization, evaluation, checkpoint: see the sections' classes.
        augmentation: `name` and settings, see `proscale_hf/data/augmentation.py`.
        image_processor: fields of the image processor, in place of its defaults or of the pretrained model's.
        seed: of initial weights, the order of images, augmentation and the points of the loss.
        workers: processes per training process that load images.
        log_every: steps between reports; losses are averaged over them.
    """

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    augmentation: dict[str, Any] = field(default_factory=jitter_of_coco)
    image_processor: dict[str, Any] = field(default_factory=dict)
    optimization: OptimizationSection = field(default_factory=OptimizationSection)
    evaluation: EvaluationSection = field(default_factory=EvaluationSection)
    checkpoint: CheckpointSection = field(default_factory=CheckpointSection)
    seed: int = 0
    workers: int = 4
    log_every: int = 50

    def to_yaml(self) -> str:
        """The whole recipe, defaults included, as a file that `load_recipe` reads."""
        return yaml.safe_dump(_plain(asdict(self)), sort_keys=False)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """
    Read a recipe.

    Args:
        path: YAML file.
        overrides: `section.key=value` each, with the value in YAML; they come last.

    Returns:
        The recipe, checked as far as that is possible without its data and its model.

    Raises:
        RecipeError: the file cannot be read, a key is unknown, or a value is not possible.
    """
    chain = Chain("`base:`", RecipeError)
    values = merged(chain.follow(path, partial(_read, Path(path), chain)), _parse_overrides(overrides))
    recipe = _build(Recipe, values, "")
    _check(recipe)
    return recipe


class RecipeLoader(PlainLoader):
    """YAML with 1e-4 as a number (YAML 1.1 takes it for text) and without repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key_node, deep=True) for key_node, _ in node.value]
        hashable = [key for key in keys if isinstance(key, Hashable)]  # of the others the base class complains
        for key, times in Counter(hashable).items():
            if times > 1:
                raise yaml.constructor.ConstructorError(
                    problem=f"{shown(key)} occurs {'twice' if times == 2 else f'{times} times'}",
                    problem_mark=node.start_mark,
                )
        return super().construct_mapping(node, deep)


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(path: Path, chain: Chain) -> dict[str, Any]:
    """A file's values, merged over those of its bases."""
    values = read_yaml(path, "recipe", RecipeError, RecipeLoader)
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise RecipeError(f"{path} must hold sections such as `optimization:`, not {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"{path}: base must be the name of a recipe file, got {shown(base)}")
    base_path = path.parent / base
    return merged(chain.follow(base_path, partial(_read, base_path, chain)), values)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        *sections, key = name.split(".")
        if not equals or not all((*sections, key)):
            raise RecipeError(f"{shown(override)} must be section.key=value, such as optimization.learning_rate=1e-4")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise RecipeError(f"{shown(override)}: {section} was given a value of its own before")
        try:
            place[key] = yaml.load(text, RecipeLoader)
        except Exception as error:  # PyYAML raises other types too, over a bad date, say
            raise RecipeError(f"{shown(override)}: the value is no valid YAML: {explain_yaml(error)}") from error
    return values


def merged(base: dict[str, Any], delta: dict[str, Any]) -> dict[str, Any]:
    """`delta` over `base`, key by key; see the top of this file."""
    result = dict(base)
    for key, value in delta.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        other_kind = both and any(value.get(kind, below.get(kind)) != below.get(kind) for kind in KIND_KEYS)
        result[key] = merged(below, value) if both and not other_kind else value
    return result


def _build(cls: type, values: Any, place: str) -> Any:
    """An instance of a section's class, from plain values over its defaults."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{place} must be a section with keys, got {shown(values)}")
    hints = typing.get_type_hints(cls)
    known = [entry.name for entry in fields(cls)]
    arguments = {}
    for key, value in values.items():
        full_name = f"{place}.{key}" if place else str(key)
        check_known(full_name, str(key), known)
        default = getattr(cls(), key)
        if isinstance(default, dict) and isinstance(value, dict):
            value = merged({"": default}, {"": value})[""]
        arguments[key] = _convert(value, hints[key], full_name)
    return cls(**arguments)


def check_known(full_name: str, key: str, known: Sequence[str]) -> None:
    """Raises a `RecipeError` with the nearest known names unless `key` is one of `known`."""
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
        raise RecipeError(f"the recipe has an unknown key {printable(full_name)}; {hint}")


def _convert(value: Any, hint: Any, name: str) -> Any:
    """A YAML value as the type that a field has."""
    if is_dataclass(hint):
        return _build(hint, value, name)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _convert(value, arguments[0], name)
    if origin is Literal:
        value = "no" if value is False and "no" in arguments else value  # YAML reads a bare `no` as false
        if value not in arguments:
            raise RecipeError(f"{name} must be one of {', '.join(arguments)}, got {shown(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise RecipeError(f"{name} must be a list such as [a, b], got {shown(value)}")
        return tuple(_convert(entry, arguments[0], name) for entry in value)
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RecipeError(f"{name} must be a section with keys, got {shown(value)}")
        return value
    if hint is bool and isinstance(value, bool):
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
    if hint is float and is_number:
        return float(value)
    if hint is int and is_number and value == int(value):
        return int(value)
    if hint is str and isinstance(value, str) and value:
        return value
    kinds = {float: "a number", int: "a whole number", str: "a text", bool: "true or false"}
    raise RecipeError(f"{name} must be {kinds[hint]}, got {shown(value)}")


def _check(recipe: Recipe) -> None:
    """What the types do not say."""
    optimization, evaluation = recipe.optimization, recipe.evaluation

    def require(condition: Callable[[Any], bool], form: str, section: Any, prefix: str, *names: str) -> None:
        for name in names:
            value = getattr(section, name)
            if value is not None and not condition(value):
                raise RecipeError(f"{prefix}{name} must be {form}, got {shown(value)}")

    require(lambda value: value > 0, "greater than 0", optimization, "optimization.", "learning_rate", "clip", "epochs")
    require(lambda value: value >= 0, "0 or more", optimization, "optimization.", "weight_decay", "backbone_factor")
    require(lambda value: value >= 0, "0 or more", optimization, "optimization.", "warmup_steps")
    require(lambda value: 0 < value <= 1, "in (0, 1]", optimization, "optimization.", "decay_factor")
    require(lambda value: 0 <= value < 1, "from 0 up to below 1", optimization, "optimization.", "ema")
    require(
        lambda value: value >= 1, "1 or more", optimization, "optimization.",
        "max_steps", "batch_size", "device_batch_size",
    )  # fmt: skip
    require(
        lambda values: all(0 < value < 1 for value in values) and list(values) == sorted(values),
        "growing shares of the training between 0 and 1",
        optimization,
        "optimization.",
        "decay_at",
    )
    require(lambda value: value >= 1, "1 or more", evaluation, "evaluation.", "every", "batch_size", "patience")
    require(lambda value: value >= 1, "1 or more", recipe.checkpoint, "checkpoint.", "every", "keep")
    require(lambda value: value >= 1, "1 or more", recipe, "", "log_every")
    require(lambda value: value >= 0, "0 or more", recipe, "", "seed", "workers")
    require(
        lambda tasks: bool(tasks) and set(tasks) <= set(TASKS),
        f"a list of {', '.join(TASKS)}",
        evaluation,
        "evaluation.",
        "tasks",
    )
    if optimization.max_steps is not None and optimization.epochs is not None:
        raise RecipeError("give either optimization.max_steps or optimization.epochs, and set the other to null")
    for part, section in (("train", recipe.data.train), ("validation", recipe.data.validation)):
        if section is not None and not isinstance(section.get("name"), str):
            raise RecipeError(f"data.{part} needs the name of a kind of data set, such as name: coco_panoptic")
    for key in recipe.model.config:
        check_known(f"model.config.{key}", key, [name for name in MODEL_FIELDS if name != "categories"])
    for key, what in (("backbone", "has a backbone"), ("preset", "has a configuration")):
        if recipe.model.pretrained is not None and getattr(recipe.model, key) is not None:
            raise RecipeError(f"give either model.pretrained, which {what}, or model.{key}, and set one to null")
    if recipe.model.preset is not None:
        try:
            preset_settings(recipe.model.preset)
        except ValueError as error:
            raise RecipeError(f"model.preset: {error}") from error


MODEL_FIELDS = tuple(
    entry.name
    for entry in fields(ProScaleMask2FormerConfig)
    if entry.name not in {general.name for general in fields(PreTrainedConfig)}
)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
