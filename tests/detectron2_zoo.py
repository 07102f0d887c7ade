"""Facts about the originals' published models: their configurations, and the names and shapes in their checkpoints.

Mask2Former publishes a folder of configurations for each data set and task, PRO-SCALE a single folder. In each folder a
`Base-` file describes the data set, a file on top of it describes the model with a ResNet-50, and further files replace
the backbone. Names and shapes follow the structure of the originals' modules; nothing here comes from the converter.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor


@dataclass(frozen=True)
class ResNet:
    """detectron2's ResNet with bottlenecks."""

    depth: int
    trained_norm: bool = False  # batch norms that are trained count batches, frozen ones do not
    stem: int = 64
    channels: int = 256  # of the first stage's output
    bottleneck: int = 64

    @property
    def blocks(self) -> tuple[int, ...]:
        return {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[self.depth]

    @property
    def out_channels(self) -> list[int]:
        return [self.channels * 2**stage for stage in range(4)]


@dataclass(frozen=True)
class Swin:
    """Swin Transformer; windows of 12 come with images of 384 pixels."""

    embed_dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int = 7
    image_size: int = 224

    @property
    def out_channels(self) -> list[int]:
        return [self.embed_dim * 2**stage for stage in range(4)]


@dataclass(frozen=True)
class Architecture:
    """The facts that names and shapes depend on; the defaults are Mask2Former's."""

    backbone: ResNet | Swin
    classes: int
    queries: int = 100
    encoder_levels: tuple[int, ...] = (3,) * 6  # number of maps that each encoder layer sees
    recalibration: str = "none"
    pixel_convolution: bool = True
    decoder_layers: int = 9
    channels: int = 256
    hidden: int = 256
    feedforward: int = 2048
    heads: int = 8


R50, R101 = ResNet(50), ResNet(101)
R101_TRAINED_NORM = ResNet(101, trained_norm=True)
SWIN_T = Swin(96, (2, 2, 6, 2), (3, 6, 12, 24))
SWIN_S = Swin(96, (2, 2, 18, 2), (3, 6, 12, 24))
SWIN_B = Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), window=12, image_size=384)
SWIN_L = Swin(192, (2, 2, 18, 2), (6, 12, 24, 48), window=12, image_size=384)


@dataclass(frozen=True)
class Variant:
    """The changes that a file makes to its folder's model."""

    backbone: ResNet | Swin
    queries: int = 100
    sizes: tuple[int, int] | None = None
    proscale: bool = False


@dataclass(frozen=True)
class Folder:
    """The files for one data set and task."""

    train: str  # name of the training set
    category_set: str | None
    classes: int
    sizes: tuple[int, int]  # shorter edge, longest edge
    base: str
    main: str
    variants: dict[str, Variant]
    backbone: ResNet | Swin = R50
    ignore: int = 255
    entries: dict[str, Any] = field(default_factory=dict)  # of MODEL, where it is not Mask2Former


def _swin_files(schedule: str, **variants: Variant) -> dict[str, Variant]:
    return {f"swin/maskformer2_swin_{name}_bs16_{schedule}.yaml": variant for name, variant in variants.items()}


COCO_VARIANTS = {
    "maskformer2_R101_bs16_50ep.yaml": Variant(R101),
    **_swin_files(
        "50ep", tiny=Variant(SWIN_T), small=Variant(SWIN_S), base_384=Variant(SWIN_B), base_IN21k_384=Variant(SWIN_B)
    ),
    **_swin_files("100ep", large_IN21k_384=Variant(SWIN_L, queries=200)),
}
CITYSCAPES_SMALLER_VARIANTS = {
    "maskformer2_R101_bs16_90k.yaml": Variant(R101_TRAINED_NORM),
    **_swin_files("90k", tiny=Variant(SWIN_T), small=Variant(SWIN_S), base_IN21k_384=Variant(SWIN_B)),
}
CITYSCAPES_VARIANTS = CITYSCAPES_SMALLER_VARIANTS | _swin_files("90k", large_IN21k_384=Variant(SWIN_L, queries=200))
ADE20K_VARIANTS = _swin_files("160k", large_IN21k_384=Variant(SWIN_L, queries=200))
COCO, ADE20K, CITYSCAPES, MAPILLARY = (800, 1333), (640, 2560), (1024, 2048), (2048, 2048)
R50_TRAINED_NORM = ResNet(50, trained_norm=True)

MASK2FORMER = {
    "coco/panoptic-segmentation": Folder(
        "coco_2017_train_panoptic",
        "coco_panoptic",
        133,
        COCO,
        "Base-COCO-PanopticSegmentation.yaml",
        "maskformer2_R50_bs16_50ep.yaml",
        COCO_VARIANTS,
    ),
    "coco/instance-segmentation": Folder(
        "coco_2017_train",
        "coco_instance",
        80,
        COCO,
        "Base-COCO-InstanceSegmentation.yaml",
        "maskformer2_R50_bs16_50ep.yaml",
        COCO_VARIANTS,
    ),
    "ade20k/panoptic-segmentation": Folder(
        "ade20k_panoptic_train",
        "ade20k_panoptic",
        150,
        ADE20K,
        "Base-ADE20K-PanopticSegmentation.yaml",
        "maskformer2_R50_bs16_160k.yaml",
        ADE20K_VARIANTS,
    ),
    "ade20k/instance-segmentation": Folder(
        "ade20k_instance_train",
        "ade20k_instance",
        100,
        ADE20K,
        "Base-ADE20K-InstanceSegmentation.yaml",
        "maskformer2_R50_bs16_160k.yaml",
        ADE20K_VARIANTS,
    ),
    "ade20k/semantic-segmentation": Folder(
        "ade20k_sem_seg_train",
        "ade20k_semantic",
        150,
        (512, 2048),
        "Base-ADE20K-SemanticSegmentation.yaml",
        "maskformer2_R50_bs16_160k.yaml",
        {
            "maskformer2_R101_bs16_90k.yaml": Variant(R101_TRAINED_NORM),
            **_swin_files("160k", tiny=Variant(SWIN_T), small=Variant(SWIN_S)),
            **_swin_files(
                "160k_res640",
                base_384=Variant(SWIN_B, sizes=(640, 2560)),
                base_IN21k_384=Variant(SWIN_B, sizes=(640, 2560)),
                large_IN21k_384=Variant(SWIN_L, sizes=(640, 2560)),
            ),
        },
    ),
    "cityscapes/panoptic-segmentation": Folder(
        "cityscapes_fine_panoptic_train",
        "cityscapes",
        19,
        CITYSCAPES,
        "Base-Cityscapes-PanopticSegmentation.yaml",
        "maskformer2_R50_bs16_90k.yaml",
        CITYSCAPES_VARIANTS,
        backbone=R50_TRAINED_NORM,
    ),
    "cityscapes/instance-segmentation": Folder(
        "cityscapes_fine_instance_seg_train",
        "cityscapes_instance",
        8,
        CITYSCAPES,
        "Base-Cityscapes-InstanceSegmentation.yaml",
        "maskformer2_R50_bs16_90k.yaml",
        CITYSCAPES_VARIANTS,
        backbone=R50_TRAINED_NORM,
    ),
    "cityscapes/semantic-segmentation": Folder(
        "cityscapes_fine_sem_seg_train",
        "cityscapes",
        19,
        CITYSCAPES,
        "Base-Cityscapes-SemanticSegmentation.yaml",
        "maskformer2_R50_bs16_90k.yaml",
        CITYSCAPES_SMALLER_VARIANTS | _swin_files("90k", large_IN21k_384=Variant(SWIN_L)),
        backbone=R50_TRAINED_NORM,
    ),
    "mapillary-vistas/panoptic-segmentation": Folder(
        "mapillary_vistas_panoptic_train",
        "mapillary_vistas",
        65,
        MAPILLARY,
        "Base-MapillaryVistas-PanopticSegmentation.yaml",
        "maskformer_R50_bs16_300k.yaml",
        _swin_files("300k", large_IN21k_384=Variant(SWIN_L, queries=200)),
        ignore=65,
    ),
    "mapillary-vistas/semantic-segmentation": Folder(
        "mapillary_vistas_sem_seg_train",
        "mapillary_vistas_semantic",
        65,
        MAPILLARY,
        "Base-MapillaryVistas-SemanticSegmentation.yaml",
        "maskformer2_R50_bs16_300k.yaml",
        _swin_files("300k", large_IN21k_384=Variant(SWIN_L)),
        ignore=65,
    ),
}

# All of its files lie next to each other; the main one is Mask2Former's.
PROSCALE = Folder(
    "coco_2017_train_panoptic",
    "coco_panoptic",
    133,
    COCO,
    "Base-COCO-PanopticSegmentation.yaml",
    "maskformer2_R50_bs16_50ep.yaml",
    {
        "res50_proscale_3_3_3_coco.yaml": Variant(R50, proscale=True),
        "swint_proscale_3_3_3_coco.yaml": Variant(SWIN_T, proscale=True),
    },
)

# Of these only what makes them models for video is written down, not the sizes of their frames.
VIDEO = {
    f"youtubevis_{year}": Folder(
        f"ytvis_{year}_train",
        None,
        40,
        COCO,
        "Base-YouTubeVIS-VideoInstanceSegmentation.yaml",
        "video_maskformer2_R50_bs16_8ep.yaml",
        {
            "video_maskformer2_R101_bs16_8ep.yaml": Variant(R101),
            **{
                f"swin/video_maskformer2_swin_{name}_bs16_8ep.yaml": variant
                for name, variant in (
                    ("tiny", Variant(SWIN_T)),
                    ("small", Variant(SWIN_S)),
                    ("base_IN21k_384", Variant(SWIN_B)),
                    ("large_IN21k_384", Variant(SWIN_L, queries=200)),
                )
            },
        },
        entries={
            "META_ARCHITECTURE": "VideoMaskFormer",
            "MASK_FORMER": {"TRANSFORMER_DECODER_NAME": "VideoMultiScaleMaskedTransformerDecoder"},
        },
    )
    for year in (2019, 2021)
}


@dataclass(frozen=True)
class Published:
    """One configuration, with its folder's facts and its own."""

    path: str
    folder: Folder
    variant: Variant

    @property
    def architecture(self) -> Architecture:
        mask2former = Architecture(self.variant.backbone, self.folder.classes, self.variant.queries)
        if not self.variant.proscale:
            return mask2former
        return replace(
            mask2former,
            encoder_levels=(1, 1, 1, 2, 2, 2, 3, 3, 3),
            recalibration="linear",
            pixel_convolution=False,
        )

    @property
    def sizes(self) -> tuple[int, int]:
        return self.variant.sizes or self.folder.sizes


def published(folders: dict[str, Folder]) -> list[Published]:
    """Every configuration of the folders, except the `Base-` files, which describe no model."""
    return [
        Published(f"configs/{name}/{file}" if name else f"configs/{file}", folder, variant)
        for name, folder in folders.items()
        for file, variant in ({folder.main: Variant(folder.backbone)} | folder.variants).items()
    ]


IMAGE_MODELS = published(MASK2FORMER) + published({"": PROSCALE})
VIDEO_MODELS = published(VIDEO)

# Training sizes are computed in the files, by a tag that makes YAML run Python.
COMPUTED = "!!python/object/apply:eval ['[int(x * 64) for x in range(5, 21)]']"
MEAN, DEVIATION = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def write_configuration(entry: Published, root: Path) -> Path:
    """Write an entry's file and the two it is based on; returns its path."""
    path = root / entry.path
    folder = path.parent.parent if path.parent.name == "swin" else path.parent
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(folder / entry.folder.base, _base_entries(entry.folder))
    _write(folder / entry.folder.main, {"_BASE_": entry.folder.base, "MODEL": _model_entries(entry.folder)})
    if path.name != entry.folder.main:
        main = f"../{entry.folder.main}" if path.parent != folder else entry.folder.main
        _write(path, {"_BASE_": main, **_variant_entries(entry.variant)})
    return path


def _write(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(entries).replace("COMPUTED", COMPUTED))


def _base_entries(folder: Folder) -> dict[str, Any]:
    trained_norm = {"NORM": "SyncBN"} if isinstance(folder.backbone, ResNet) and folder.backbone.trained_norm else {}
    sizes = {"MIN_SIZE_TRAIN": "COMPUTED", "MIN_SIZE_TEST": folder.sizes[0], "MAX_SIZE_TEST": folder.sizes[1]}
    return {
        "MODEL": {
            "BACKBONE": {"FREEZE_AT": 0, "NAME": "build_resnet_backbone"},
            "WEIGHTS": "detectron2://ImageNetPretrained/torchvision/R-50.pkl",
            "PIXEL_MEAN": MEAN,
            "PIXEL_STD": DEVIATION,
            "RESNETS": {
                "DEPTH": 50,
                "STEM_TYPE": "basic",
                "STEM_OUT_CHANNELS": 64,
                "STRIDE_IN_1X1": False,
                "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
                "RES5_MULTI_GRID": [1, 1, 1],
                **trained_norm,
            },
        },
        "DATASETS": {"TRAIN": f'("{folder.train}",)'},  # no YAML, but detectron2 reads it as a tuple
        "SOLVER": {"OPTIMIZER": "ADAMW"},
        "INPUT": {
            "FORMAT": "RGB",
            "CROP": {"ENABLED": True, "TYPE": "absolute", "SIZE": "(640, 640)"},
            **({} if folder.sizes == COCO else sizes),  # those of COCO are detectron2's defaults
        },
        "VERSION": 2,
    }


def _model_entries(folder: Folder) -> dict[str, Any]:
    mask_former = {
        "TRANSFORMER_DECODER_NAME": "MultiScaleMaskedTransformerDecoder",
        "TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
        "DEEP_SUPERVISION": True,
        "NO_OBJECT_WEIGHT": 0.1,
        "CLASS_WEIGHT": 2.0,
        "MASK_WEIGHT": 5.0,
        "DICE_WEIGHT": 5.0,
        "HIDDEN_DIM": 256,
        "NUM_OBJECT_QUERIES": 100,
        "NHEADS": 8,
        "DROPOUT": 0.0,
        "DIM_FEEDFORWARD": 2048,
        "ENC_LAYERS": 0,
        "PRE_NORM": False,
        "ENFORCE_INPUT_PROJ": False,
        "SIZE_DIVISIBILITY": 32,
        "DEC_LAYERS": 10,
        "TRAIN_NUM_POINTS": 12544,
        "OVERSAMPLE_RATIO": 3.0,
        "IMPORTANCE_SAMPLE_RATIO": 0.75,
        "TEST": {"SEMANTIC_ON": True, "INSTANCE_ON": True, "PANOPTIC_ON": True, "OVERLAP_THRESHOLD": 0.8},
    }
    return {
        "META_ARCHITECTURE": folder.entries.get("META_ARCHITECTURE", "MaskFormer"),
        "SEM_SEG_HEAD": {
            "NAME": "MaskFormerHead",
            "IGNORE_VALUE": folder.ignore,
            "NUM_CLASSES": folder.classes,
            "LOSS_WEIGHT": 1.0,
            "CONVS_DIM": 256,
            "MASK_DIM": 256,
            "NORM": "GN",
            "PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder",
            "IN_FEATURES": ["res2", "res3", "res4", "res5"],
            "DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
            "COMMON_STRIDE": 4,
            "TRANSFORMER_ENC_LAYERS": 6,
        },
        "MASK_FORMER": mask_former | folder.entries.get("MASK_FORMER", {}),
    }


def _variant_entries(variant: Variant) -> dict[str, Any]:
    backbone = variant.backbone
    if isinstance(backbone, ResNet):
        norm = {"NORM": "SyncBN"} if backbone.trained_norm else {}
        model: dict[str, Any] = {"RESNETS": {"DEPTH": backbone.depth, "STRIDE_IN_1X1": False, **norm}}
    else:
        swin = {
            "EMBED_DIM": backbone.embed_dim,
            "DEPTHS": list(backbone.depths),
            "NUM_HEADS": list(backbone.heads),
            "WINDOW_SIZE": backbone.window,
            "APE": False,
            "DROP_PATH_RATE": 0.3,
            "PATCH_NORM": True,
            **({"PRETRAIN_IMG_SIZE": backbone.image_size} if backbone.image_size != 224 else {}),
        }
        model = {"BACKBONE": {"NAME": "D2SwinTransformer"}, "SWIN": swin}
    if variant.queries != 100:
        model["MASK_FORMER"] = {"NUM_OBJECT_QUERIES": variant.queries}
    if variant.proscale:
        model["SEM_SEG_HEAD"] = {"PIXEL_DECODER_NAME": "PROSCALE"}
        model["PROSCALE"] = {
            "RESIDUAL": False,
            "PROSCALE_NUM_LAYERS": [3, 3, 3],
            "IS_EXCITE_CONV": False,
            "MASK_OUTPUT_OPS": "maxpool",
            "EXCITE_TEMP": 0.1,
        }
    sizes = {"INPUT": {"MIN_SIZE_TEST": variant.sizes[0], "MAX_SIZE_TEST": variant.sizes[1]}} if variant.sizes else {}
    return {"MODEL": model, **sizes}


class StateDict(dict[str, Tensor]):
    """Collects tensors of given names and shapes.

    Args:
        device: `"meta"` for shapes alone; otherwise values are random.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.generator = None if device == "meta" else torch.Generator().manual_seed(0)

    def add(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(shape, device=self.device, generator=self.generator) * 0.1

    def linear(self, name: str, outputs: int, *inputs: int) -> None:
        self.add(f"{name}.weight", outputs, *inputs)
        self.add(f"{name}.bias", outputs)

    def norm(self, name: str, channels: int) -> None:
        self.linear(name, channels)

    def batch_norm(self, name: str, channels: int, counts: bool = False) -> None:
        self.norm(name, channels)
        self.add(f"{name}.running_mean", channels)
        self[f"{name}.running_var"] = torch.ones(channels, device=self.device)
        if counts:
            self[f"{name}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64, device=self.device)

    def attention(self, name: str, channels: int) -> None:
        """PyTorch's attention, with query, key and value in one."""
        self.add(f"{name}.in_proj_weight", 3 * channels, channels)
        self.add(f"{name}.in_proj_bias", 3 * channels)
        self.linear(f"{name}.out_proj", channels, channels)


def checkpoint(architecture: Architecture, device: str = "meta") -> dict[str, Tensor]:
    """The tensors of a detectron2 checkpoint under `model`, by name."""
    state = StateDict(device)
    backbone = architecture.backbone
    if isinstance(backbone, ResNet):
        add_resnet(state, backbone, "backbone.")
    else:
        add_swin(state, backbone, "backbone.")
        for stage, channels in enumerate(backbone.out_channels):
            state.norm(f"backbone.norm{stage}", channels)
    _add_pixel_decoder(state, architecture)
    _add_mask_decoder(state, architecture)
    state.add("criterion.empty_weight", architecture.classes + 1)
    return dict(state)


def resnet_convolutions(resnet: ResNet) -> Iterable[tuple[str, int, int, int]]:
    """detectron2's name, outputs, inputs and kernel size of each convolution."""
    yield "stem.conv1", resnet.stem, 3, 7
    inputs = resnet.stem
    for stage, blocks in enumerate(resnet.blocks):
        width, outputs = resnet.bottleneck * 2**stage, resnet.out_channels[stage]
        for block in range(blocks):
            name = f"res{stage + 2}.{block}"
            if block == 0:
                yield f"{name}.shortcut", outputs, inputs, 1
            yield f"{name}.conv1", width, inputs, 1
            yield f"{name}.conv2", width, width, 3
            yield f"{name}.conv3", outputs, width, 1
            inputs = outputs


def add_resnet(state: StateDict, resnet: ResNet, prefix: str) -> None:
    """detectron2's ResNet; each convolution holds its norm."""
    for name, outputs, inputs, size in resnet_convolutions(resnet):
        state.add(f"{prefix}{name}.weight", outputs, inputs, size, size)
        state.batch_norm(f"{prefix}{name}.norm", outputs, counts=resnet.trained_norm)


def add_swin(state: StateDict, swin: Swin, prefix: str) -> None:
    """The common part of Swin as a backbone and Swin as a classifier."""
    state.linear(f"{prefix}patch_embed.proj", swin.embed_dim, 3, 4, 4)
    state.norm(f"{prefix}patch_embed.norm", swin.embed_dim)
    tokens = swin.window**2
    for stage, width in enumerate(swin.out_channels):
        for block in range(swin.depths[stage]):
            name = f"{prefix}layers.{stage}.blocks.{block}"
            state.norm(f"{name}.norm1", width)
            state.add(f"{name}.attn.relative_position_bias_table", (2 * swin.window - 1) ** 2, swin.heads[stage])
            index = torch.zeros(tokens, tokens, dtype=torch.int64, device=state.device)
            state[f"{name}.attn.relative_position_index"] = index
            state.linear(f"{name}.attn.qkv", 3 * width, width)
            state.linear(f"{name}.attn.proj", width, width)
            state.norm(f"{name}.norm2", width)
            state.linear(f"{name}.mlp.fc1", 4 * width, width)
            state.linear(f"{name}.mlp.fc2", width, 4 * width)
        if stage < 3:
            state.add(f"{prefix}layers.{stage}.downsample.reduction.weight", 2 * width, 4 * width)
            state.norm(f"{prefix}layers.{stage}.downsample.norm", 4 * width)


def _add_pixel_decoder(state: StateDict, architecture: Architecture) -> None:
    start, channels, heads, points = "sem_seg_head.pixel_decoder", architecture.channels, architecture.heads, 4
    backbone_channels = architecture.backbone.out_channels
    for level, inputs in enumerate(reversed(backbone_channels[1:])):
        state.linear(f"{start}.input_proj.{level}.0", channels, inputs, 1, 1)
        state.norm(f"{start}.input_proj.{level}.1", channels)
    state.add(f"{start}.transformer.level_embed", 3, channels)
    for layer, levels in enumerate(architecture.encoder_levels):
        name = f"{start}.transformer.encoder.layers.{layer}"
        state.linear(f"{name}.self_attn.sampling_offsets", heads * levels * points * 2, channels)
        state.linear(f"{name}.self_attn.attention_weights", heads * levels * points, channels)
        state.linear(f"{name}.self_attn.value_proj", channels, channels)
        state.linear(f"{name}.self_attn.output_proj", channels, channels)
        state.norm(f"{name}.norm1", channels)
        state.linear(f"{name}.linear1", 1024, channels)
        state.linear(f"{name}.linear2", channels, 1024)
        state.norm(f"{name}.norm2", channels)
    if architecture.recalibration != "none":
        kernel = {"linear": (), "conv": (1, 1)}[architecture.recalibration]
        name = f"{start}.transformer.encoder.token_excite.ops"
        state.add(f"{name}.weight", 1, channels, *kernel)
        state.add(f"{name}.bias", 1)
    state.linear(f"{start}.mask_features", channels, channels, 1, 1)
    state.add(f"{start}.adapter_1.weight", channels, backbone_channels[0], 1, 1)
    state.norm(f"{start}.adapter_1.norm", channels)
    if architecture.pixel_convolution:
        state.add(f"{start}.layer_1.weight", channels, channels, 3, 3)
    state.norm(f"{start}.layer_1.norm", channels)


def _add_mask_decoder(state: StateDict, architecture: Architecture) -> None:
    start, hidden, queries = "sem_seg_head.predictor", architecture.hidden, architecture.queries
    for layer in range(architecture.decoder_layers):
        state.attention(f"{start}.transformer_self_attention_layers.{layer}.self_attn", hidden)
        state.norm(f"{start}.transformer_self_attention_layers.{layer}.norm", hidden)
        state.attention(f"{start}.transformer_cross_attention_layers.{layer}.multihead_attn", hidden)
        state.norm(f"{start}.transformer_cross_attention_layers.{layer}.norm", hidden)
        state.linear(f"{start}.transformer_ffn_layers.{layer}.linear1", architecture.feedforward, hidden)
        state.linear(f"{start}.transformer_ffn_layers.{layer}.linear2", hidden, architecture.feedforward)
        state.norm(f"{start}.transformer_ffn_layers.{layer}.norm", hidden)
    state.norm(f"{start}.decoder_norm", hidden)
    state.add(f"{start}.query_feat.weight", queries, hidden)
    state.add(f"{start}.query_embed.weight", queries, hidden)
    state.add(f"{start}.level_embed.weight", 3, hidden)
    if architecture.channels != hidden:
        for level in range(3):
            state.linear(f"{start}.input_proj.{level}", hidden, architecture.channels, 1, 1)
    state.linear(f"{start}.class_embed", architecture.classes + 1, hidden)
    for layer, outputs in enumerate((hidden, hidden, architecture.channels)):
        state.linear(f"{start}.mask_embed.layers.{layer}", outputs, hidden)


def with_old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layout before version 2 of the originals' modules: no level for the pixel decoder, another query name."""
    return {
        name.replace(".pixel_decoder.", ".").replace(".query_feat.", ".static_query."): tensor
        for name, tensor in state.items()
    }
