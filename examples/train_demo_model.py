"""Train a small PRO-SCALE Mask2Former with `Trainer` on the demo scenes. This made the model in the package.

    python examples/train_demo_model.py --output_dir demo_model

A new model's backbone first learns to classify single pixels, see `pretrain_backbone.py`. Every option of
`TrainingArguments` can be given. `--model_name_or_path` names a model to fine-tune instead of starting a new one.
Each scene is seen once, since there is no end of scenes.
"""

from dataclasses import dataclass, field
from functools import partial

from proscale_hf.endings import end_well


if __name__ == "__main__":
    end_well()  # before the imports that take seconds

import torch
from evaluate_demo import measure_panoptic_quality
from pretrain_backbone import pretrain_backbone
from transformers import HfArgumentParser, ResNetConfig, Trainer, TrainingArguments, set_seed

from demo_scenes import ID2LABEL, STUFF_LABEL_IDS, DemoScenes, Scene
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerImageProcessorPil,
)


# Scenes of one size go through the backbone together, so its batch norm sees the whole batch.
TRAIN_SIZE = (128, 128)


@dataclass
class ExampleArguments:
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "model to fine-tune (directory or Hub id); a new small one if not given"},
    )
    pretraining_scenes: int = field(
        default=12_000, metadata={"help": "scenes whose pixels a new backbone learns to classify first"}
    )
    train_scenes: int = field(default=80_000, metadata={"help": "scenes to train on, each seen once"})
    evaluation_scenes: int = field(default=50, metadata={"help": "held-out scenes to measure PQ on, now and then"})
    backbone_learning_rate_factor: float = field(
        default=0.3,
        metadata={"help": "learning rate of the backbone over that of the rest; 0.1 for fine-tuning"},
    )


@dataclass
class DemoTrainingArguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit a new small model on a CPU."""

    num_train_epochs: float = field(default=1.0)
    per_device_train_batch_size: int = field(default=8)
    learning_rate: float = field(default=5e-4)
    weight_decay: float = field(default=0.05)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=100)
    max_grad_norm: float = field(default=1.0)
    logging_steps: float = field(default=100)
    eval_strategy: str = field(default="steps")
    eval_steps: float | None = field(default=2000)
    save_steps: float = field(default=500)
    save_total_limit: int | None = field(default=1)
    dataloader_num_workers: int = field(default=1)
    remove_unused_columns: bool | None = field(default=False)
    report_to: str | None = field(default="none")
    seed: int = field(default=0)


class PanopticTrainer(Trainer):
    """Trainer that evaluates by panoptic quality: metrics `eval_pq`, `eval_pq_things` and `eval_pq_stuff`."""

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        quality = measure_panoptic_quality(self.model, self.processing_class, eval_dataset or self.eval_dataset)
        metrics = {
            f"{metric_key_prefix}_pq": quality["All"]["pq"],
            f"{metric_key_prefix}_pq_things": quality["Things"]["pq"],
            f"{metric_key_prefix}_pq_stuff": quality["Stuff"]["pq"],
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def small_config() -> ProScaleMask2FormerConfig:
    """About 2 million parameters: a ResNet with basic blocks, and 64 channels in the rest of the model."""
    backbone_config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128, 160],
        depths=[2, 2, 2, 2],
        layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    return ProScaleMask2FormerConfig(
        backbone_config=backbone_config,
        freeze_backbone_batch_norm=False,
        feature_size=64,
        mask_feature_size=64,
        hidden_dim=64,
        encoder_stage_layers=(1, 1, 1),
        token_recalibration="linear",
        encoder_feedforward_dim=256,
        dim_feedforward=256,
        decoder_layers=6,
        num_queries=30,
        train_num_points=1024,
        id2label=ID2LABEL,
        label2id={name: label_id for label_id, name in ID2LABEL.items()},
    )


def create_image_processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(
        size={"shortest_edge": 128, "longest_edge": 256}, label_ids_to_fuse=STUFF_LABEL_IDS
    )


def collate_scenes(scenes: list[Scene], image_processor) -> dict:
    """Model inputs, with `mask_labels` and `class_labels`, of a batch of scenes."""
    return image_processor(
        images=[scene.image for scene in scenes],
        segmentation_maps=[scene.segment_ids for scene in scenes],
        instance_id_to_semantic_id=[scene.instance_id_to_semantic_id for scene in scenes],
        return_tensors="pt",
    )


def create_optimizer(
    model: torch.nn.Module, learning_rate: float, weight_decay: float, backbone_learning_rate_factor: float
) -> torch.optim.Optimizer:
    """AdamW; biases, norms and embeddings do not decay, and the backbone has a learning rate of its own."""
    backbone_prefix = "model.pixel_level_module.encoder."
    embeddings = {
        parameter
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding)
        for parameter in module.parameters()
    }
    groups = {}
    for name, parameter in model.named_parameters():
        in_backbone = name.startswith(backbone_prefix)
        decays = parameter.ndim > 1 and parameter not in embeddings and not name.endswith("level_embed")
        groups.setdefault((in_backbone, decays), []).append(parameter)
    return torch.optim.AdamW(
        {
            "params": parameters,
            "lr": learning_rate * (backbone_learning_rate_factor if in_backbone else 1.0),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (in_backbone, decays), parameters in groups.items()
    )


def main() -> None:
    arguments, training_arguments = HfArgumentParser(
        (ExampleArguments, DemoTrainingArguments)
    ).parse_args_into_dataclasses()
    set_seed(training_arguments.seed)
    if arguments.model_name_or_path is None:
        model = ProScaleMask2FormerForUniversalSegmentation(small_config())
        image_processor = create_image_processor()
        backbone_weights = pretrain_backbone(
            model.config.backbone_config,
            partial(collate_scenes, image_processor=image_processor),
            training_arguments,
            DemoScenes(arguments.pretraining_scenes, "train", training_arguments.seed + 1, TRAIN_SIZE),
        )
        model.model.pixel_level_module.encoder.load_state_dict(backbone_weights)
    else:
        model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(
            arguments.model_name_or_path,
            id2label=ID2LABEL,
            label2id={name: label_id for label_id, name in ID2LABEL.items()},
            ignore_mismatched_sizes=True,
        )
        image_processor = ProScaleMask2FormerImageProcessorPil.from_pretrained(
            arguments.model_name_or_path, label_ids_to_fuse=STUFF_LABEL_IDS
        )
    optimizer = create_optimizer(
        model,
        training_arguments.learning_rate,
        training_arguments.weight_decay,
        arguments.backbone_learning_rate_factor,
    )
    trainer = PanopticTrainer(
        model=model,
        args=training_arguments,
        train_dataset=DemoScenes(arguments.train_scenes, "train", training_arguments.seed, TRAIN_SIZE),
        eval_dataset=DemoScenes(arguments.evaluation_scenes, "held-out", seed=1),
        data_collator=partial(collate_scenes, image_processor=image_processor),
        processing_class=image_processor,
        optimizers=(optimizer, None),
    )
    trainer.train()
    model.save_pretrained(training_arguments.output_dir)
    image_processor.save_pretrained(training_arguments.output_dir)


if __name__ == "__main__":
    main()
