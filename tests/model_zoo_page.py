"""Writes docs/model_zoo.md from the facts about the published models: `python tests/model_zoo_page.py`."""

import json
import sys
import tempfile
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from detectron2_zoo import IMAGE_MODELS, write_configuration
from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.convert.detectron2_config import model_settings, read_config
from proscale_hf.cost import measure_cost


PAGE = ROOT / "docs" / "model_zoo.md"
ZOO = json.loads((ROOT / "proscale_hf" / "hub" / "model_zoo.json").read_text())
DATASETS = {  # title, and the height and width that costs are given for
    "coco": ("COCO", (800, 1333)),
    "cityscapes": ("Cityscapes", (1024, 2048)),
    "ade20k": ("ADE20K", (640, 853)),
    "mapillary-vistas": ("Mapillary Vistas", (1024, 1365)),
}
HEAD = """# Model zoo

`from_pretrained` of model, configuration and image processor knows the names on this page. Each stands for a checkpoint
that its authors published. **None of them is on the Hub yet**: convert the checkpoint ([conversion](conversion.md)),
and give the folder the name.

- A local folder of that name comes first, then the repository in the project's namespace on the Hub.
  `PROSCALE_HUB_NAMESPACE` names another namespace.
- transformers' Auto classes and pipelines do not know these names. Give them `proscale_hf.hub.names.resolve(name)`.
- Accuracy is what the authors published for the checkpoint, in percent: [PRO-SCALE]({proscale})
  with [the paper]({paper})'s in brackets, and [Mask2Former]({mask2former}).
- Cost is counted here (`proscale_hf/cost.py`): GFLOPs of one image in the papers' convention, where a multiply-add
  counts 1, and parameters.
- Licences of the weights: PRO-SCALE's are for non-commercial evaluation and must not be redistributed; Mask2Former's
  are CC BY-NC 4.0. Neither is the licence of this package.
"""


def page() -> str:
    """The whole page."""
    architectures = ZOO["architectures"]
    lines = [
        HEAD.format(
            proscale=architectures["PRO-SCALE"]["source"],
            paper="https://arxiv.org/abs/2404.14657",
            mask2former=architectures["Mask2Former"]["source"],
        )
    ]
    for dataset, (title, size) in DATASETS.items():
        lines += [
            f"## {title}, cost at {size[0]} x {size[1]}",
            "",
            "| name | backbone | accuracy | GFLOPs | of these pixel decoder | parameters | original configuration |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *(row(model, size) for model in ZOO["models"] if model["dataset"] == dataset),
            "",
        ]
    return "\n".join(lines)


def row(model: dict, size: tuple[int, int]) -> str:
    """One model."""
    cost = measure_cost(configuration(model["config"]), *size)
    in_paper = model.get("paper_metrics", {})
    metrics = [
        f"{name} {model['metrics'].get(name, '')} ({in_paper[name]})".replace("  ", " ")
        if name in in_paper
        else f"{name} {model['metrics'][name]}"
        for name in {**model["metrics"], **in_paper}
    ]
    cells = (
        f"`{model['name']}`",
        model["backbone"],
        ", ".join(metrics),
        f"{cost.total_gflops:.1f}",
        f"{cost.encoder_gflops:.1f}",
        f"{cost.parameters_millions:.1f} M",
        f"{model['config'].removeprefix('configs/')}",
    )
    return f"| {' | '.join(cells)} |"


def configuration(path: str) -> ProScaleMask2FormerConfig:
    """What the original's configuration file says."""
    entry = next(entry for entry in IMAGE_MODELS if path.endswith(str(entry.path)))
    with tempfile.TemporaryDirectory() as root:
        return ProScaleMask2FormerConfig(**model_settings(read_config(write_configuration(entry, Path(root)))))


if __name__ == "__main__":
    PAGE.write_text(page())
