"""A detectron2 checkpoint becomes a folder for `from_pretrained`; tensors without a place are all named."""

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from proscale_hf import ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.cli.convert import main as convert
from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2 import convert_checkpoint
from proscale_hf.convert.rename import target_names


main = partial(convert, "detectron2")
LABELS, QUERIES, CHANNELS, HIDDEN, FEEDFORWARD = 5, 6, 32, 48, 24
STAGES = ["res2", "res3", "res4", "res5"]


class SourceModel(dict):
    """The state dict of a tiny original: random tensors under detectron2's names."""

    def __init__(self, config: dict):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        model = config["MODEL"]
        if model["BACKBONE"]["NAME"] == "D2SwinTransformer":
            self.swin(depths=model["SWIN"]["DEPTHS"], heads=model["SWIN"]["NUM_HEADS"])
        else:
            self.resnet(depth=model["RESNETS"]["DEPTH"], stem=model["RESNETS"]["STEM_OUT_CHANNELS"])
        self.pixel_decoder(model)
        self.mask_decoder(model)
        self["criterion.empty_weight"] = torch.tensor([1.0] * LABELS + [0.1])

    def add(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(shape, generator=self.generator) * 0.1

    def linear(self, name: str, outputs: int, *inputs: int) -> None:
        self.add(f"{name}.weight", outputs, *inputs)
        self.add(f"{name}.bias", outputs)

    def norm(self, name: str, channels: int) -> None:
        self.linear(name, channels)

    def swin(self, depths: list[int], heads: list[int]) -> None:
        channels = self.channels = [8, 16, 32, 64]
        self.linear("backbone.patch_embed.proj", 8, 3, 4, 4)
        self.norm("backbone.patch_embed.norm", 8)
        for stage, width in enumerate(channels):
            for block in range(depths[stage]):
                name = f"backbone.layers.{stage}.blocks.{block}"
                self.norm(f"{name}.norm1", width)
                self.add(f"{name}.attn.relative_position_bias_table", 25, heads[stage])
                self[f"{name}.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.int64)
                self.linear(f"{name}.attn.qkv", 3 * width, width)
                self.linear(f"{name}.attn.proj", width, width)
                self.norm(f"{name}.norm2", width)
                self.linear(f"{name}.mlp.fc1", 4 * width, width)
                self.linear(f"{name}.mlp.fc2", width, 4 * width)
            if stage < 3:
                self.add(f"backbone.layers.{stage}.downsample.reduction.weight", 2 * width, 4 * width)
                self.norm(f"backbone.layers.{stage}.downsample.norm", 4 * width)
            self.norm(f"backbone.norm{stage}", width)

    def convolution(self, name: str, outputs: int, inputs: int, size: int) -> None:
        self.add(f"{name}.weight", outputs, inputs, size, size)
        self.norm(f"{name}.norm", outputs)
        self.add(f"{name}.norm.running_mean", outputs)
        self[f"{name}.norm.running_var"] = torch.rand(outputs, generator=self.generator) + 0.5
        self[f"{name}.norm.num_batches_tracked"] = torch.tensor(3)

    def resnet(self, depth: int, stem: int) -> None:
        blocks = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]
        self.channels = [16, 32, 64, 128]
        self.convolution("backbone.stem.conv1", stem, 3, 7)
        inputs = stem
        for stage, outputs in enumerate(self.channels):
            for block in range(blocks[stage]):
                name = f"backbone.res{stage + 2}.{block}"
                if inputs != outputs:
                    self.convolution(f"{name}.shortcut", outputs, inputs, 1)
                if depth == 50:
                    self.convolution(f"{name}.conv1", outputs // 4, inputs, 1)
                    self.convolution(f"{name}.conv2", outputs // 4, outputs // 4, 3)
                    self.convolution(f"{name}.conv3", outputs, outputs // 4, 1)
                else:
                    self.convolution(f"{name}.conv1", outputs, inputs, 3)
                    self.convolution(f"{name}.conv2", outputs, outputs, 3)
                inputs = outputs

    def pixel_decoder(self, model: dict) -> None:
        start = "sem_seg_head.pixel_decoder"
        for level, channels in enumerate(reversed(self.channels[1:])):
            self.linear(f"{start}.input_proj.{level}.0", CHANNELS, channels, 1, 1)
            self.norm(f"{start}.input_proj.{level}.1", CHANNELS)
        self.add(f"{start}.transformer.level_embed", 3, CHANNELS)
        pixel_embedding = "conv"
        level_counts = [3] * model["SEM_SEG_HEAD"].get("TRANSFORMER_ENC_LAYERS", 0)
        if model["SEM_SEG_HEAD"]["PIXEL_DECODER_NAME"] == "PROSCALE":
            proscale = model["PROSCALE"]
            pixel_embedding = proscale["MASK_OUTPUT_OPS"]
            stages = proscale["PROSCALE_NUM_LAYERS"]
            level_counts = [1] * stages[0] + [2] * stages[1] + [3] * stages[2]
            if proscale["IS_EXCITE_CONV"] is not None:
                kernel = (1, 1) if proscale["IS_EXCITE_CONV"] else ()
                self.add(f"{start}.transformer.encoder.token_excite.ops.weight", 1, CHANNELS, *kernel)
                self.add(f"{start}.transformer.encoder.token_excite.ops.bias", 1)
        for layer, levels in enumerate(level_counts):
            name = f"{start}.transformer.encoder.layers.{layer}"
            self.linear(f"{name}.self_attn.sampling_offsets", 4 * levels * 4 * 2, CHANNELS)
            self.linear(f"{name}.self_attn.attention_weights", 4 * levels * 4, CHANNELS)
            self.linear(f"{name}.self_attn.value_proj", CHANNELS, CHANNELS)
            self.linear(f"{name}.self_attn.output_proj", CHANNELS, CHANNELS)
            self.norm(f"{name}.norm1", CHANNELS)
            self.linear(f"{name}.linear1", 1024, CHANNELS)
            self.linear(f"{name}.linear2", CHANNELS, 1024)
            self.norm(f"{name}.norm2", CHANNELS)
        self.add(f"{start}.adapter_1.weight", CHANNELS, self.channels[0], 1, 1)
        self.norm(f"{start}.adapter_1.norm", CHANNELS)
        if pixel_embedding == "conv":
            self.add(f"{start}.layer_1.weight", CHANNELS, CHANNELS, 3, 3)
        self.norm(f"{start}.layer_1.norm", CHANNELS)
        self.linear(f"{start}.mask_features", CHANNELS, CHANNELS, 1, 1)

    def mask_decoder(self, model: dict) -> None:
        start = "sem_seg_head.predictor"
        for layer in range(model["MASK_FORMER"]["DEC_LAYERS"] - 1):
            for name in ("self_attention_layers.{}.self_attn", "cross_attention_layers.{}.multihead_attn"):
                attention = f"{start}.transformer_{name.format(layer)}"
                self.add(f"{attention}.in_proj_weight", 3 * HIDDEN, HIDDEN)
                self.add(f"{attention}.in_proj_bias", 3 * HIDDEN)
                self.linear(f"{attention}.out_proj", HIDDEN, HIDDEN)
                self.norm(f"{attention.rpartition('.')[0]}.norm", HIDDEN)
            self.linear(f"{start}.transformer_ffn_layers.{layer}.linear1", FEEDFORWARD, HIDDEN)
            self.linear(f"{start}.transformer_ffn_layers.{layer}.linear2", HIDDEN, FEEDFORWARD)
            self.norm(f"{start}.transformer_ffn_layers.{layer}.norm", HIDDEN)
        self.norm(f"{start}.decoder_norm", HIDDEN)
        self.add(f"{start}.query_feat.weight", QUERIES, HIDDEN)
        self.add(f"{start}.query_embed.weight", QUERIES, HIDDEN)
        self.add(f"{start}.level_embed.weight", 3, HIDDEN)
        for level in range(3):
            self.linear(f"{start}.input_proj.{level}", HIDDEN, CHANNELS, 1, 1)
        self.linear(f"{start}.class_embed", LABELS + 1, HIDDEN)
        for layer, outputs in enumerate((HIDDEN, HIDDEN, CHANNELS)):
            self.linear(f"{start}.mask_embed.layers.{layer}", outputs, HIDDEN)


def source_config(backbone: str, **entries) -> dict:
    """A tiny original's configuration; `entries` are merged into the sections of that name."""
    config = {
        "META_ARCHITECTURE": "MaskFormer",
        "BACKBONE": {"NAME": {"swin": "D2SwinTransformer", "resnet": "build_resnet_backbone"}[backbone]},
        "SWIN": {"EMBED_DIM": 8, "DEPTHS": [1, 1, 2, 1], "NUM_HEADS": [1, 2, 2, 4], "WINDOW_SIZE": 3},
        "RESNETS": {
            "DEPTH": 50,
            "STEM_OUT_CHANNELS": 8,
            "RES2_OUT_CHANNELS": 16,
            "WIDTH_PER_GROUP": 4,
            "OUT_FEATURES": STAGES,
        },
        "SEM_SEG_HEAD": {
            "NAME": "MaskFormerHead",
            "IN_FEATURES": STAGES,
            "PIXEL_DECODER_NAME": "PROSCALE",
            "NUM_CLASSES": LABELS,
            "CONVS_DIM": CHANNELS,
            "MASK_DIM": CHANNELS,
        },
        "PROSCALE": {"PROSCALE_NUM_LAYERS": [1, 1, 1], "IS_EXCITE_CONV": False, "MASK_OUTPUT_OPS": "maxpool"},
        "MASK_FORMER": {
            "TRANSFORMER_IN_FEATURE": "multi_scale_pixel_decoder",
            "HIDDEN_DIM": HIDDEN,
            "NUM_OBJECT_QUERIES": QUERIES,
            "NHEADS": 4,
            "DIM_FEEDFORWARD": FEEDFORWARD,
            "DEC_LAYERS": 4,
        },
    }
    for section, values in entries.items():
        config[section] |= values
    return {"MODEL": config, "INPUT": {"FORMAT": "RGB"}}


def write(folder: Path, config: dict, state: dict[str, Tensor]) -> tuple[Path, Path]:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"model": dict(state), "iteration": 9, "optimizer": {}}, folder / "model_final.pth")
    return folder / "config.yaml", folder / "model_final.pth"


CONFIGS = {
    "swin": source_config("swin"),
    "swin without recalibration": source_config(
        "swin",
        PROSCALE={"IS_EXCITE_CONV": None, "MASK_OUTPUT_OPS": "avgpool", "PROSCALE_NUM_LAYERS": [2, 1, 2]},
    ),
    "resnet": source_config("resnet", PROSCALE={"IS_EXCITE_CONV": True, "MASK_OUTPUT_OPS": "conv"}),
    "small resnet, mask2former": source_config(
        "resnet",
        RESNETS={"DEPTH": 18, "STEM_OUT_CHANNELS": 16},
        SEM_SEG_HEAD={"PIXEL_DECODER_NAME": "MSDeformAttnPixelDecoder", "TRANSFORMER_ENC_LAYERS": 2},
    ),
}
ALL_CONFIGS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@ALL_CONFIGS
def test_every_tensor_arrives(tmp_path, config):
    source = SourceModel(config)
    model, _ = convert_checkpoint(*write(tmp_path, config, source))
    state = model.state_dict()
    arrived = set()
    for name, tensor in source.items():
        if name.rpartition(".")[2] not in ("empty_weight", "relative_position_index", "num_batches_tracked"):
            targets = target_names(name)
            assert torch.equal(torch.cat([state[target] for target in targets]), tensor), name
            arrived.update(targets)
    left = {name for name in state if name not in arrived and not name.endswith("num_batches_tracked")}
    assert {name.removeprefix("model.pixel_level_module.encoder.") for name in left} <= {
        "criterion.empty_weight",
        "swin.layernorm.weight",
        "swin.layernorm.bias",
    }
    assert torch.allclose(state["criterion.empty_weight"], source["criterion.empty_weight"])


@pytest.mark.parametrize(
    ("source", "targets"),
    [
        ("backbone.norm0.bias", ["E.hidden_states_norms.stage1.bias"]),
        (
            "backbone.layers.2.blocks.10.attn.qkv.weight",
            [f"E.swin.encoder.layers.2.blocks.10.attention.{x}_proj.weight" for x in "qkv"],
        ),
        (
            "backbone.layers.0.blocks.1.norm1.weight",
            ["E.swin.encoder.layers.0.blocks.1.layernorm_before.weight"],
        ),
        (
            "backbone.res5.0.conv2.norm.running_var",
            ["E.encoder.stages.3.layers.0.layer.1.normalization.running_var"],
        ),
        ("sem_seg_head.pixel_decoder.transformer.level_embed", ["D.level_embed"]),
        (
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.3.norm2.bias",
            ["D.encoder.layers.3.final_layer_norm.bias"],
        ),
        (
            "sem_seg_head.transformer.encoder.layers.3.norm1.bias",
            ["D.encoder.layers.3.self_attn_layer_norm.bias"],
        ),
        ("sem_seg_head.layer_1.norm.bias", ["D.layer_1.1.bias"]),
        ("sem_seg_head.predictor.static_query.weight", ["T.queries_features.weight"]),
        ("sem_seg_head.predictor.query_embed.weight", ["T.queries_embedder.weight"]),
        (
            "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_bias",
            [f"T.decoder.layers.1.self_attn.{x}_proj.bias" for x in "qkv"],
        ),
        (
            "sem_seg_head.predictor.transformer_cross_attention_layers.1.norm.bias",
            ["T.decoder.layers.1.cross_attn_layer_norm.bias"],
        ),
        ("sem_seg_head.predictor.class_embed.bias", ["class_predictor.bias"]),
        ("sem_seg_head.predictor.mask_embed.layers.2.extra.bias", []),
        ("backbone.stem.fc.weight", []),
    ],
)
def test_names(source, targets):
    starts = {
        "E.": "model.pixel_level_module.encoder.",
        "D.": "model.pixel_level_module.decoder.",
        "T.": "model.transformer_module.",
    }
    expected = tuple(starts.get(name[:2], name[:2]) + name[2:] for name in targets)
    assert target_names(source) == expected


def test_names_of_earlier_releases(tmp_path):
    config = CONFIGS["swin"]
    source = SourceModel(config)
    old = {
        name.replace(".pixel_decoder.", ".").replace(".query_feat.", ".static_query."): tensor
        for name, tensor in source.items()
    }
    config_path, new_path = write(tmp_path, config, source)
    torch.save(old, tmp_path / "old.pth")
    new_model, _ = convert_checkpoint(config_path, new_path)
    old_model, _ = convert_checkpoint(config_path, tmp_path / "old.pth")
    assert_equal_states(new_model.state_dict(), old_model.state_dict())


@ALL_CONFIGS
def test_command_line(tmp_path, config, capsys):
    config_path, checkpoint_path = write(tmp_path, config, SourceModel(config))
    output = tmp_path / "new" / "folder"
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path), "--output", str(output)]
    labels = write_labels(tmp_path, isthing=(1, 0, 1, 0, 0))
    assert main([*options, "--labels", str(labels)]) == 0
    assert "3 stuff labels, merged in panoptic results: b, d, e." in capsys.readouterr().out
    written = {file.name for file in output.iterdir()}
    assert written >= {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    assert [path.name for path in output.parent.iterdir()] == ["folder"]

    converted, image_processor = convert_checkpoint(config_path, checkpoint_path)
    loaded, info = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(output, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_states(loaded.state_dict(), converted.state_dict())
    assert loaded.config.mask_padding is False
    assert loaded.config.id2label == dict(enumerate("abcde"))
    assert loaded.config.category(3) == {"id": 40, "name": "d", "isthing": 0}
    loaded_processor = type(image_processor).from_pretrained(output)
    assert loaded_processor.label_ids_to_fuse == [1, 3, 4]
    assert list(loaded_processor.image_mean) == list(image_processor.image_mean)


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("backbone", ["swin", "resnet"])
def test_blue_first(tmp_path, backbone):
    """A model for BGR images becomes one for RGB images that computes the same."""
    config = source_config(backbone)
    source = SourceModel(config)
    red_first, _ = convert_checkpoint(*write(tmp_path, config, source))
    config["INPUT"]["FORMAT"] = "BGR"
    blue_first, _ = convert_checkpoint(*write(tmp_path, config, source))
    pixel_values = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = red_first(pixel_values)
        converted = blue_first(pixel_values.flip(1))
    assert torch.allclose(converted.masks_queries_logits, expected.masks_queries_logits, atol=1e-5)


def test_names_every_misfit(tmp_path, capsys):
    config = CONFIGS["swin"]
    source = SourceModel(config)
    del source["backbone.norm0.bias"]
    del source["sem_seg_head.predictor.class_embed.weight"]
    source["backbone.norm4.bias"] = torch.zeros(3)
    source["sem_seg_head.pixel_decoder.transformer.encoder.layers.3.norm1.weight"] = torch.zeros(32)
    source["sem_seg_head.predictor.query_feat.weight"] = torch.zeros(7, HIDDEN)
    source["backbone.layers.0.blocks.0.attn.qkv.bias"] = torch.tensor(0.0)
    config_path, checkpoint_path = write(tmp_path, config, source)
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path)]
    assert main([*options, "--output", str(tmp_path / "output")]) == 1
    message = capsys.readouterr().err
    for part in (
        "2 in the checkpoint, without a place in the model:\n",
        "  backbone.norm4.bias\n",
        "  sem_seg_head.pixel_decoder.transformer.encoder.layers.3.norm1.weight\n",
        "2 in the model, without a value in the checkpoint:\n",
        "  model.pixel_level_module.encoder.hidden_states_norms.stage1.bias\n",
        "  class_predictor.weight\n",
        "4 of another shape:\n",
        "query_feat.weight -> model.transformer_module.queries_features.weight: (7, 48) found, (6, 48)",
        "qkv.bias -> model.pixel_level_module.encoder.swin.encoder.layers.0.blocks.0.attention.q_proj.bias: ",
    ):
        assert part in message
    assert not (tmp_path / "output").exists()


def test_checkpoint_of_another_architecture(tmp_path):
    source = SourceModel(CONFIGS["resnet"])
    paths = write(tmp_path, CONFIGS["swin"], source)
    with pytest.raises(ConversionError) as error:
        convert_checkpoint(*paths)
    assert "backbone.res2.0.conv1.weight" in str(error.value)
    assert "swin.embeddings.patch_embeddings.projection.weight" in str(error.value)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda output: output.write_text("x"), "exists already"),
        (lambda output: (output.mkdir(), (output / "file").write_text("x")), "exists already"),
        (lambda output: output.symlink_to(output.parent), "symbolic link"),
        (lambda output: output.symlink_to("nowhere"), "symbolic link"),
    ],
)
def test_output_in_use(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "output")
    before = sorted(tmp_path.rglob("*"))
    options = ["--config", "x", "--checkpoint", "x", "--output", str(tmp_path / "output")]
    assert main(options) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_output_may_be_an_empty_folder(tmp_path):
    config_path, checkpoint_path = write(tmp_path, CONFIGS["swin"], SourceModel(CONFIGS["swin"]))
    (tmp_path / "output").mkdir()
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path)]
    assert main([*options, "--output", str(tmp_path / "output")]) == 0
    assert (tmp_path / "output" / "model.safetensors").is_file()


def test_nothing_stays_of_a_failed_write(tmp_path, monkeypatch, capsys):
    def fail(self, folder, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ProScaleMask2FormerForUniversalSegmentation, "save_pretrained", fail)
    config_path, checkpoint_path = write(tmp_path, CONFIGS["swin"], SourceModel(CONFIGS["swin"]))
    before = sorted(tmp_path.rglob("*"))
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path)]
    assert main([*options, "--output", str(tmp_path / "output")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_impossible_models(tmp_path):
    config = source_config("swin", SEM_SEG_HEAD={"CONVS_DIM": 20})
    with pytest.raises(ConversionError, match=r"describes no possible model: .*feature_size"):
        convert_checkpoint(*write(tmp_path, config, SourceModel(CONFIGS["swin"])))


def write_labels(folder: Path, isthing: Sequence[int]) -> Path:
    categories = [
        {"id": 10 * (label + 1), "name": name, "isthing": thing}
        for label, (name, thing) in enumerate(zip("abcdefgh", isthing, strict=False))
    ]
    path = folder / "labels.json"
    path.write_text(json.dumps(categories))
    return path


def test_another_number_of_labels_is_refused(tmp_path, capsys):
    config_path, checkpoint_path = write(tmp_path, CONFIGS["swin"], SourceModel(CONFIGS["swin"]))
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path), "--output", str(tmp_path / "output")]
    assert main([*options, "--labels", str(write_labels(tmp_path, isthing=(1, 1)))]) == 1
    assert capsys.readouterr().err == "error: 2 labels are given, but the checkpoint has 5.\n"
    assert not (tmp_path / "output").exists()


def test_labels_of_a_known_data_set(tmp_path):
    """The classes, the stuff and the data set's own ids come without being given."""
    config = source_config("swin", SEM_SEG_HEAD={"NUM_CLASSES": 19})
    config["DATASETS"] = {"TRAIN": ["cityscapes_fine_panoptic_train"]}
    source = SourceModel(config)
    source.linear("sem_seg_head.predictor.class_embed", 20, HIDDEN)
    model, image_processor = convert_checkpoint(*write(tmp_path, config, source))
    assert (model.config.id2label[0], model.config.id2label[18]) == ("road", "bicycle")
    assert model.config.category(18)["id"] == 33
    assert image_processor.label_ids_to_fuse == list(range(11))


def test_weights_of_the_original_carry_their_licence(tmp_path):
    for name, licence in (("swin", True), ("small resnet, mask2former", False)):
        model, _ = convert_checkpoint(*write(tmp_path, CONFIGS[name], SourceModel(CONFIGS[name])))
        assert (model.config.weights_license is not None) == licence


def test_publishing_is_refused_before_anything_is_written(tmp_path, capsys):
    config_path, checkpoint_path = write(tmp_path, CONFIGS["swin"], SourceModel(CONFIGS["swin"]))
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path), "--output", str(tmp_path / "output")]
    assert main([*options, "--push-to-hub", "me/model"]) == 1
    assert "i-have-the-right-to-publish" in capsys.readouterr().err
    assert main([*options, "--push-to-hub", "not a name"]) == 1
    assert "cannot be a repository" in capsys.readouterr().err
    assert main([*options, "--dry-run"]) == 1
    assert capsys.readouterr().err == "error: --dry-run says how to upload; it needs --push-to-hub REPO.\n"
    assert not (tmp_path / "output").exists()


def test_dry_run_shows_files_and_card(tmp_path, capsys):
    config_path, checkpoint_path = write(tmp_path, CONFIGS["swin"], SourceModel(CONFIGS["swin"]))
    options = ["--config", str(config_path), "--checkpoint", str(checkpoint_path), "--output", str(tmp_path / "output")]
    assert main([*options, "--push-to-hub", "me/model", "--dry-run", "--private"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "model.safetensors",
        "preprocessor_config.json",
        "modeling_proscale_mask2former.py",
        "private repository",
    ):
        assert part in shown


PARITY = os.environ.get("PROSCALE_PARITY_DIR")


@pytest.mark.skipif(not PARITY, reason="PROSCALE_PARITY_DIR, the folder of recorded numbers, is not set")
@pytest.mark.parametrize("name", ["swin_proscale_3_2_1", "r50_proscale_1_2_2_conv"])
def test_parity(name):
    folder = Path(PARITY or ".") / name
    expected = load_file(folder / "expected.safetensors")
    model, _ = convert_checkpoint(folder / "config.yaml", folder / "model_final.pth")
    with torch.no_grad():
        outputs = model(expected["pixel_values"], output_hidden_states=True, output_auxiliary_logits=True)
    first_auxiliary = outputs.auxiliary_logits[0]
    computed = {
        **{f"backbone.res{index + 2}": value for index, value in enumerate(outputs.encoder_hidden_states)},
        **{f"multi_scale_features.{index}": value for index, value in enumerate(outputs.pixel_decoder_hidden_states)},
        "mask_features": outputs.pixel_decoder_last_hidden_state,
        "class_queries_logits": outputs.class_queries_logits,
        "masks_queries_logits": outputs.masks_queries_logits,
        "aux.0.class_queries_logits": first_auxiliary["class_queries_logits"],
        "aux.0.masks_queries_logits": first_auxiliary["masks_queries_logits"],
    }
    for tensor_name, value in computed.items():
        error = (value - expected[tensor_name]).abs().max() / expected[tensor_name].abs().max()
        assert error < 1e-5, f"{tensor_name}: {error:.1e}"
