"""The model card of a Hub repository, made from the model's own facts: nothing is in it that they do not say."""

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig

from proscale_hf.hub import detection_card


TASK = "image-segmentation"
ANY_MODEL = "path-or-hub-id"  # in the examples, where the repository has no name yet
USUAL_SIZE = (800, 1333)  # of the papers' tables, height and width
FOLD_FROM = 25  # classes
COST_HEADING = "## Cost"

# Those of the Hub's identifiers that weights are likely to have; any other licence is "other" there, with a name.
HUB_LICENSES = (
    "apache-2.0",
    "mit",
    "bsd-2-clause",
    "bsd-3-clause",
    "cc0-1.0",
    "cc-by-4.0",
    "cc-by-sa-4.0",
    "cc-by-nc-4.0",
    "cc-by-nc-nd-4.0",
    "cc-by-nc-sa-4.0",
    "gpl-3.0",
    "lgpl-3.0",
    "agpl-3.0",
    "mpl-2.0",
    "openrail",
)

SWIN_NAMES = {
    (96, (2, 2, 6, 2)): "Swin-T",
    (96, (2, 2, 18, 2)): "Swin-S",
    (128, (2, 2, 18, 2)): "Swin-B",
    (192, (2, 2, 18, 2)): "Swin-L",
}
RESNET_NAMES = {(3, 4, 6, 3): "ResNet-50", (3, 4, 23, 3): "ResNet-101", (3, 8, 36, 3): "ResNet-152"}

PROSCALE_PAPER = """@inproceedings{aich2025progressive,
  title = {Progressive Token Length Scaling in Transformer Encoders for Efficient Universal Segmentation},
  author = {Aich, Abhishek and Suh, Yumin and Schulter, Samuel and Chandraker, Manmohan},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
  url = {https://arxiv.org/abs/2404.14657}
}"""
MASK2FORMER_PAPER = """@inproceedings{cheng2022masked,
  title = {Masked-attention Mask Transformer for Universal Image Segmentation},
  author = {Cheng, Bowen and Misra, Ishan and Schwing, Alexander G. and Kirillov, Alexander and Girdhar, Rohit},
  booktitle = {Conference on Computer Vision and Pattern Recognition},
  year = {2022},
  url = {https://arxiv.org/abs/2112.01527}
}"""


# as PRO-SCALE's tables call them
ARCHITECTURES = {"mask2former": "Mask2Former", "lite": "Lite-M2F", "rt": "RT-M2F"}
ENCODER_DESCRIPTIONS = {
    "mask2former": "a multi-scale deformable-attention encoder",
    "lite": "the encoder of [Lite-DETR](https://arxiv.org/abs/2303.07446), which changes the largest map only in its "
    "last layer",
    "rt": "the encoder of [RT-DETR](https://arxiv.org/abs/2304.08069), attention in the smallest map and convolutions "
    "across scales",
}


def model_card(
    model_or_config: Any,
    image_processor: Any = None,
    *,
    costs: str = "",
    repo_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    evaluated_on: str | None = None,
    datasets: Sequence[str] = (),
    base_model: str | None = None,
    tags: Iterable[str] = (),
) -> str:
    """
    Write a model card.

    Args:
        model_or_config: the model, or its configuration.
        image_processor: the image processor, or its settings as in `preprocessor_config.json`.
        costs: the section on costs, see [`cost_section`]; it is for images of the image processor's [`input_size`].
        repo_id: name on the Hub for the examples.
        metrics: measured values by the metric's name, such as `{"PQ": 52.8}`.
        evaluated_on: name of the data set and split that `metrics` were measured on.
        datasets: Hub ids of the data sets the model was trained on.
        base_model: Hub id of the model it was trained from.
        tags: further tags for the Hub.

    Returns:
        The text of `README.md`: metadata as YAML, then Markdown.

    Raises:
        ValueError: `metrics` without `evaluated_on`, or not finite.
    """
    if metrics and not evaluated_on:
        raise ValueError("`metrics` mean something with `evaluated_on` only: name the data set and split.")
    for name, value in (metrics or {}).items():
        if not math.isfinite(value):
            raise ValueError(f"The metric {name!r} must be a finite number, got {value}.")
    config = getattr(model_or_config, "config", model_or_config)
    settings = _settings(image_processor)
    things = _things(config, settings)
    title = f"{_architecture(config)}, {_backbone_name(config.backbone_config)}"
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag=_pipeline_task(config),
        tags=["proscale", *_tags(config, things), *map(_one_line, tags)],
        datasets=list(datasets) or None,
        base_model=base_model,
        model_name=title if metrics else None,
        eval_results=_eval_results(metrics or {}, evaluated_on, _pipeline_task(config)),
        **_license_metadata(config.weights_license),
    )
    sections = (
        f"# {_markdown(title)}",
        _description(config),
        _facts(config, settings, things),
        _use(config, repo_id or ANY_MODEL, things),
        _classes(config, things),
        costs,
        _metrics(metrics or {}, evaluated_on),
        _license(config.weights_license),
        _citation(config),
    )
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}\n"


def _settings(image_processor: Any) -> Mapping[str, Any]:
    if image_processor is None or isinstance(image_processor, Mapping):
        return image_processor or {}
    return json.loads(image_processor.to_json_string())


def _things(config: PreTrainedConfig, settings: Mapping[str, Any]) -> dict[int, bool | None]:
    """For each label, whether it is a thing (countable) or stuff; None if nobody says."""
    stuff = config.stuff_label_ids(settings.get("label_ids_to_fuse") or None)
    return {label_id: None if stuff is None else label_id not in stuff for label_id in sorted(config.id2label)}


def _tasks(things: Mapping[int, bool | None]) -> list[str]:
    """What the classes are good for; all tasks if nobody says what they are."""
    kinds = set(things.values())
    if kinds == {True}:
        return ["instance-segmentation"]
    if kinds == {False}:
        return ["semantic-segmentation"]
    return ["panoptic-segmentation", "instance-segmentation", "semantic-segmentation"]


def _detects(config: PreTrainedConfig) -> bool:
    """Whether the model finds boxes, and no masks."""
    return "AutoModelForObjectDetection" in config.auto_classes


def _pipeline_task(config: PreTrainedConfig) -> str:
    return detection_card.TASK if _detects(config) else TASK


def _tags(config: PreTrainedConfig, things: Mapping[int, bool | None]) -> list[str]:
    return ["dino", detection_card.TASK] if _detects(config) else ["mask2former", *_tasks(things)]


def _architecture(config: PreTrainedConfig) -> str:
    if _detects(config):
        return detection_card.architecture(config)
    if config.encoder == "proscale":
        return f"PRO-SCALE ({', '.join(map(str, config.encoder_stage_layers))})"
    is_light = config.pixel_embedding in ("maxpool", "avgpool")
    return ARCHITECTURES[config.encoder] + (" with light pixel embedding" if is_light else "")


def _backbone_name(backbone: Any) -> str:
    name = None
    if backbone.model_type == "swin":
        name = SWIN_NAMES.get((backbone.embed_dim, tuple(backbone.depths)))
    elif backbone.model_type == "resnet" and backbone.layer_type == "bottleneck":
        if list(backbone.hidden_sizes) == [256, 512, 1024, 2048]:
            name = RESNET_NAMES.get(tuple(backbone.depths))
    elif backbone.model_type == "timm_backbone":
        name = f"timm's {backbone.backbone}"
    return _one_line(name or f"a {backbone.model_type} backbone")


def _description(config: PreTrainedConfig) -> str:
    if _detects(config):
        return detection_card.DESCRIPTIONS[config.encoder]
    mask2former = "[Mask2Former](https://arxiv.org/abs/2112.01527)"
    if config.encoder != "proscale":
        return (
            f"An image segmentation model of the {mask2former} architecture: "
            f"{ENCODER_DESCRIPTIONS[config.encoder]}, and a decoder whose queries look only where their own masks "
            "are. One model gives panoptic, instance and semantic results."
        )
    return (
        "An image segmentation model: [PRO-SCALE](https://arxiv.org/abs/2404.14657) makes the encoder of "
        f"{mask2former} cheap by letting the tokens of larger feature maps enter only in its later stages. One model "
        "gives panoptic, instance and semantic results."
    )


def _facts(config: PreTrainedConfig, settings: Mapping[str, Any], things: Mapping[int, bool | None]) -> str:
    tasks = [task.removesuffix("-segmentation") for task in _tasks(things)]
    if _detects(config):
        tasks = ["object detection"]
    facts = [("Task", ", ".join(tasks)), ("Backbone", _backbone_name(config.backbone_config))]
    if config.encoder == "proscale":
        layers = ", ".join(map(str, config.encoder_stage_layers))
        facts.append(("Encoder", f"PRO-SCALE, layers per stage ({layers})"))
    elif config.encoder == "rt":
        facts.append(("Encoder", "RT-DETR"))
    else:
        paper = {"lite": "Lite-DETR", "mask2former": "Mask2Former", "dino": "DINO"}[config.encoder]
        facts.append(("Encoder", f"{paper}, {config.encoder_layers} layers"))
    kinds = [name for flag, name in ((True, "things"), (False, "stuff"), (None, "of unknown kind"))]
    counts = [list(things.values()).count(flag) for flag in (True, False, None)]
    known = ", ".join(f"{count} {kind}" for count, kind in zip(counts, kinds, strict=True) if count)
    facts.append(("Classes", f"{config.num_labels} ({known})" if any(counts[:2]) else str(config.num_labels)))
    facts.append(("Queries", str(config.num_queries)))
    if settings:
        facts.append(("Input", _input_rule(settings)))
    return _table(("", ""), facts)


def _input_rule(settings: Mapping[str, Any]) -> str:
    size = settings.get("size") or {}
    if not settings.get("do_resize", True):
        rule = "images keep their size"
    elif size.get("height"):
        rule = f"images are resized to {size['height']} x {size['width']}"
    else:
        limits = [f"{name.replace('_', ' ')} {value}" for name, value in sorted(size.items(), reverse=True) if value]
        rule = f"images are resized to {', '.join(limits)} pixels"
    pad_size = settings.get("pad_size")
    return f"{rule}, then padded to {pad_size['height']} x {pad_size['width']}" if pad_size else rule


def input_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of a typical image as the model gets it, by the image processor's settings."""
    size = settings.get("pad_size") or (settings.get("size") if settings.get("do_resize", True) else None) or {}
    if size.get("height"):
        return size["height"], size["width"]
    if size.get("max_height"):
        return size["max_height"], size["max_width"]
    shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
    if shortest:
        return shortest, min(longest or shortest * 4 // 3, shortest * 5 // 3)
    if longest:
        return longest * 3 // 4, longest
    return USUAL_SIZE


def _use(config: PreTrainedConfig, repo_id: str, things: Mapping[int, bool | None]) -> str:
    examples = detection_card.use(repo_id) if _detects(config) else _segmentation_examples(repo_id, things)
    return f"""## Use it

The code is part of this repository; `trust_remote_code=True` lets Transformers run it.

{examples}

With the package `proscale_hf` installed, `import proscale_hf` first, and leave `trust_remote_code=True` away."""


def _segmentation_examples(repo_id: str, things: Mapping[int, bool | None]) -> str:
    name = json.dumps(repo_id)
    task = _tasks(things)[0].removesuffix("-segmentation")
    targets = "target_sizes=[(image.height, image.width)]"
    return f"""```python
from transformers import pipeline

segmenter = pipeline("{TASK}", model={name}, trust_remote_code=True)
for segment in segmenter("photo.jpg", subtask="{task}"):
    print(segment["label"], segment["score"])
```

Or step by step:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForUniversalSegmentation

model = AutoModelForUniversalSegmentation.from_pretrained({name}, trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained({name}, trust_remote_code=True)
image = Image.open("photo.jpg")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
result = processor.post_process_{task}_segmentation(outputs, {targets})[0]
```"""


def _classes(config: PreTrainedConfig, things: Mapping[int, bool | None]) -> str:
    names = [str(config.id2label[label_id]) for label_id in things]
    if names == [f"LABEL_{label_id}" for label_id in things]:
        return ""  # transformers' names for those that have none
    columns = {"label": list(map(str, things)), "name": names}
    if any(flag is not None for flag in things.values()):
        columns["kind"] = [{True: "thing", False: "stuff", None: ""}[flag] for flag in things.values()]
    ids = [(config.category(label_id) or {}).get("id", "") for label_id in things]
    if any(data_set_id != "" for data_set_id in ids):
        columns["id in the data set"] = list(map(str, ids))
    table = _table(tuple(columns), zip(*columns.values(), strict=True))
    if len(names) >= FOLD_FROM:
        table = f"<details>\n<summary>{len(names)} classes</summary>\n\n{table}\n\n</details>"
    return f"## Classes\n\n{table}"


def cost_section(cost: Any, height: int, width: int) -> str:
    """
    Args:
        cost: what one image costs, a `Cost`.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        The card's section on it, as Markdown.
    """
    rows = {**cost.stages, "total": cost.total_gflops}
    table = _table(("stage", "GFLOPs"), [(name, f"{value:.2f}") for name, value in rows.items()])
    return f"""{COST_HEADING}

{cost.parameters_millions:.2f} million parameters. One image of {height} x {width}, in 10^9 multiply-adds, counted as in
the papers (fvcore's rules):

{table}

A forward pass of this implementation takes {cost.forward_gflops:.2f}, with all products counted and without
post-processing."""


def _metrics(metrics: Mapping[str, float], evaluated_on: str | None) -> str:
    if not metrics:
        return ""
    rows = [(str(name), f"{value:g}") for name, value in metrics.items()]
    return f"## Results\n\nOn {_markdown(evaluated_on)}:\n\n{_table(('metric', 'value'), rows)}"


def _eval_results(metrics: Mapping[str, float], evaluated_on: str | None, task: str) -> list[EvalResult] | None:
    """What becomes `model-index` in the metadata."""
    return [
        EvalResult(
            task_type=task,
            dataset_type=_slug(evaluated_on),
            dataset_name=_one_line(evaluated_on),
            metric_type=_slug(name),
            metric_name=_one_line(name),
            metric_value=float(value),
        )
        for name, value in metrics.items()
    ] or None


def _license_metadata(weights_license: str | None) -> dict[str, str]:
    if weights_license is None:
        return {}
    identifier = weights_license.strip().lower()
    if identifier in HUB_LICENSES:
        return {"license": identifier}
    return {"license": "other", "license_name": _slug(identifier.removeprefix("other:"), "-")}


def _license(weights_license: str | None) -> str:
    if weights_license is None:
        return ""
    return f"## Licence\n\nWeights: {_markdown(weights_license)}\n\nCode files in this repository: apache-2.0"


def _citation(config: PreTrainedConfig) -> str:
    if _detects(config):
        is_proscale, own = config.encoder != "dino", detection_card.DINO_PAPER
    else:
        is_proscale, own = config.encoder != "mask2former" or config.pixel_embedding != "conv", MASK2FORMER_PAPER
    papers = [PROSCALE_PAPER, own] if is_proscale else [own]
    return "## Citation\n\n```bibtex\n" + "\n\n".join(papers) + "\n```"


def _table(header: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = [header, ("---",) * len(header), *(tuple(map(_markdown, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(text: str) -> str:
    """Text from elsewhere, such that it shows as it is, on one line, in a table too."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(_one_line(text), quote=False))


def _one_line(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in " ".join(str(text).split()))


def _slug(text: str, separator: str = "_") -> str:
    return re.sub(r"[^a-z0-9.]+", separator, text.lower()).strip(separator) or "unnamed"
