"""Compare encoders on the demo scenes, with the same seed, data and steps: the paper's claim on a small scale.

    python examples/compare_encoders.py --output comparison --seeds 0 1 2
    python examples/compare_encoders.py --output comparison --report

The first command trains every model that has no result in the folder yet. So it can be stopped and started again, and
several can run at once. The second command measures the speed of all models, in turns, and prints a Markdown table. As
in the paper, a segmentation model starts from a backbone that was trained to classify. Here it classified pixels of the
same scenes; there is one for each seed, which all models share.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import torch
from evaluate_demo import measure_panoptic_quality
from pretrain_backbone import pretrain_backbone
from safetensors.torch import load_file, save
from torch.utils.data import DataLoader
from train_demo_model import TRAIN_SIZE, collate_scenes, create_image_processor, create_optimizer, small_config
from transformers import (
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedModel,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
    set_seed,
)

from demo_scenes import DemoScenes
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.cost import measure_cost
from proscale_hf.files.whole import write_whole


MASK2FORMER = {"encoder": "mask2former", "pixel_embedding": "conv", "token_recalibration": "none"}
CONFIGURATIONS = {
    "mask2former": MASK2FORMER,
    "proscale-333": {"encoder_stage_layers": (3, 3, 3)},
    "proscale-222": {"encoder_stage_layers": (2, 2, 2)},
    "proscale-111": {"encoder_stage_layers": (1, 1, 1)},
    "proscale-333-without-trc": {"encoder_stage_layers": (3, 3, 3), "token_recalibration": "none"},
    "proscale-333-without-lpe": {"encoder_stage_layers": (3, 3, 3), "pixel_embedding": "conv"},
}
TRANSFORMERS = "transformers-mask2former"
NAMES = [*CONFIGURATIONS, TRANSFORMERS]
# Fields of our configuration that transformers' Mask2Former has too.
SHARED_FIELDS = (
    "feature_size",
    "mask_feature_size",
    "hidden_dim",
    "encoder_layers",
    "encoder_feedforward_dim",
    "dim_feedforward",
    "decoder_layers",
    "num_attention_heads",
    "num_queries",
    "train_num_points",
    "id2label",
    "label2id",
)
BATCH_SIZE = 8
LEARNING_RATE = 5e-4
BACKBONE_FACTOR = 0.3
WEIGHT_DECAY = 0.05
WARMUP_STEPS = 100
CLIP = 1.0
PRETRAINING_SCENES = 12_000
HELD_OUT_SCENES = 200
SPEED_ROUNDS = 15


def create_model(name: str) -> PreTrainedModel:
    """A new model of one of `NAMES`; all have the sizes of the model that comes with the package."""
    config = small_config()
    for field, value in CONFIGURATIONS.get(name, MASK2FORMER).items():
        setattr(config, field, value)
    if name != TRANSFORMERS:
        return ProScaleMask2FormerForUniversalSegmentation(config)
    shared = {field: getattr(config, field) for field in SHARED_FIELDS}
    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(backbone_config=config.backbone_config, **shared))


def pretrained_backbone(output: Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the seed's backbone, which is trained first if the folder does not have it yet."""
    path = output / f"backbone-{seed}.safetensors"
    if not path.exists():
        arguments = TrainingArguments(
            output_dir=str(output / "backbone"),
            seed=seed,
            num_train_epochs=1,
            remove_unused_columns=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        set_seed(seed)
        collate = partial(collate_scenes, image_processor=create_image_processor())
        scenes = DemoScenes(PRETRAINING_SCENES, "train", seed + 1000, TRAIN_SIZE)
        weights = pretrain_backbone(small_config().backbone_config, collate, arguments, scenes)
        write_whole(path, lambda file: file.write(save(weights)))
    return load_file(path)


def train(name: str, seed: int, steps: int, output: Path, device: str, use_kernels: bool) -> dict:
    """Train one model and measure it on held-out scenes; returns the content of its result file."""
    backbone = pretrained_backbone(output, seed)
    set_seed(seed)
    model = create_model(name).to(device)
    model.model.pixel_level_module.encoder.load_state_dict(backbone)
    if use_kernels and name != TRANSFORMERS:
        model.set_use_kernels(True)
    image_processor = create_image_processor()
    optimizer = create_optimizer(model, LEARNING_RATE, WEIGHT_DECAY, BACKBONE_FACTOR)
    scheduler = get_cosine_schedule_with_warmup(optimizer, WARMUP_STEPS, steps)
    batches = DataLoader(
        DemoScenes(steps * BATCH_SIZE, "train", seed, TRAIN_SIZE),
        batch_size=BATCH_SIZE,
        collate_fn=partial(collate_scenes, image_processor=image_processor),
        num_workers=1,
    )
    losses = []
    model.train()
    for step, batch in enumerate(batches, 1):
        batch["mask_labels"] = [masks.float() for masks in batch["mask_labels"]]  # transformers wants floats
        loss = model(**batch.to(device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"{name} seed {seed} step {step} of {steps}: loss {statistics.mean(losses[-100:]):.2f}", flush=True)
    quality = measure_panoptic_quality(model, image_processor, DemoScenes(HELD_OUT_SCENES, "held-out", seed=0))
    groups = {group: 100 * quality[group]["pq"] for group in ("All", "Things", "Stuff")}
    measures = {"pq": groups, "gflops": gflops(name), "last_loss": statistics.mean(losses[-100:])}
    return {"name": name, "seed": seed, "steps": steps, **measures}


def result_path(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-{seed}.json"


def measure_speed(names: list[str], device: str, use_kernels: bool) -> dict[str, float]:
    """Images per second of forward passes with a batch as in training: medians of runs in turns."""
    models = {name: create_model(name).to(device).eval() for name in names}
    for name, model in models.items():
        if use_kernels and name != TRANSFORMERS:
            model.set_use_kernels(True)
    pixel_values = torch.rand((BATCH_SIZE, 3, *TRAIN_SIZE), device=device)
    times = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(SPEED_ROUNDS):
            for name, model in models.items():
                start = time.perf_counter()
                model(pixel_values=pixel_values).masks_queries_logits.sum().item()  # waits for the device
                times[name].append(time.perf_counter() - start)
    return {name: BATCH_SIZE / statistics.median(values) for name, values in times.items()}


def gflops(name: str) -> float:
    config = small_config()
    for field, value in CONFIGURATIONS.get(name, MASK2FORMER).items():
        setattr(config, field, value)
    return measure_cost(config, *TRAIN_SIZE).total_gflops


def report(output: Path, device: str, use_kernels: bool) -> str:
    """A Markdown table of all results in the folder."""
    results = {}
    for path in sorted(output.glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["name"], []).append(result)
    if not results:
        sys.exit(f"error: {output} holds no results yet; train first, without --report")
    names = [name for name in NAMES if name in results]
    speed = measure_speed(names, device, use_kernels)
    rows = [
        "| model | PQ | PQ things | PQ stuff | seeds | GFLOPs | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in names:
        columns = [spread([run["pq"][group] for run in results[name]]) for group in ("All", "Things", "Stuff")]
        rows.append(
            f"| {name} | {' | '.join(columns)} | {len(results[name])} | {gflops(name):.3f} | {speed[name]:.0f} |"
        )
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    """The mean, and with several values their standard deviation."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    parser.add_argument("--steps", type=int, default=1500, help=f"of {BATCH_SIZE} scenes each (default: 1500)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's choice)")
    parser.add_argument("--use-kernels", action="store_true", help="the compiled deformable attention, in our models")
    parser.add_argument("--report", action="store_true", help="print the table of the results instead of training")
    arguments = parser.parse_args()
    if arguments.steps <= WARMUP_STEPS:
        parser.error(f"--steps must be more than {WARMUP_STEPS}, the steps of the warm-up")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.report:
        print(report(arguments.output, device, arguments.use_kernels))
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        for name in arguments.models:
            path = result_path(arguments.output, name, seed)
            if path.exists():
                continue
            result = train(name, seed, arguments.steps, arguments.output, device, arguments.use_kernels)
            text = json.dumps(result, indent=1)
            write_whole(path, lambda file, text=text: file.write(text.encode()))
            print(f"{name} seed {seed}: PQ {result['pq']['All']:.1f}", flush=True)


if __name__ == "__main__":
    main()
