"""ImageNet backbones of every publisher end up in the same places, and compute the same there."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from detectron2_zoo import (
    R50,
    R101,
    SWIN_B,
    SWIN_L,
    SWIN_S,
    SWIN_T,
    ResNet,
    StateDict,
    Swin,
    add_resnet,
    add_swin,
    resnet_convolutions,
)
from proscale_hf import ProScaleMask2FormerConfig, ProScaleMask2FormerForUniversalSegmentation
from proscale_hf.convert import ConversionError
from proscale_hf.convert.backbone import check_training_conditions, rename_backbone
from proscale_hf.convert.detectron2_config import Detectron2Config


ENCODER = "model.pixel_level_module.encoder."
STAGES = ["stage1", "stage2", "stage3", "stage4"]
TINY_RESNET = ResNet(50, stem=8, channels=16, bottleneck=4)
TINY_SWIN = Swin(8, (2, 2, 2, 2), (1, 2, 2, 4), window=4, image_size=256)


def msra(resnet: ResNet, device: str = "meta") -> dict[str, Tensor]:
    """Caffe2's names: one batch norm of scale and shift to each convolution, and biases that are not used."""
    state = StateDict(device)
    branches = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}
    for name, outputs, inputs, size in resnet_convolutions(resnet):
        stage, *block, convolution = name.split(".")
        caffe2 = f"{stage}_{block[0]}_{branches[convolution]}" if block else "conv1"
        norm = f"{caffe2}_bn" if block else "res_conv1_bn"
        state.add(f"{caffe2}_w", outputs, inputs, size, size)
        state.add(f"{caffe2}_b", outputs)
        state.add(f"{norm}_s", outputs)
        state.add(f"{norm}_b", outputs)
    state.add("fc1000_w", 1000, resnet.out_channels[-1])
    state.add("fc1000_b", 1000)
    return dict(state)


def detectron2(resnet: ResNet, device: str = "meta") -> dict[str, Tensor]:
    state = StateDict(device)
    add_resnet(state, resnet, "")
    state.linear("stem.fc", 1000, resnet.out_channels[-1])
    return dict(state)


def torchvision(resnet: ResNet, device: str = "meta") -> dict[str, Tensor]:
    state = StateDict(device)
    for name, outputs, inputs, size in resnet_convolutions(resnet):
        stage, *block, convolution = name.split(".")
        start = f"layer{int(stage[3:]) - 1}.{block[0]}." if block else ""
        shortcut = convolution == "shortcut"
        state.add(f"{start}{'downsample.0' if shortcut else convolution}.weight", outputs, inputs, size, size)
        norm = "downsample.1" if shortcut else convolution.replace("conv", "bn")
        state.batch_norm(f"{start}{norm}", outputs, counts=True)
    state.linear("fc", 1000, resnet.out_channels[-1])
    return dict(state)


def swin_classifier(swin: Swin, device: str = "meta", prefix: str = "", classes: int = 1000) -> dict[str, Tensor]:
    """With the masks of shifted windows, which later releases do not store."""
    state = StateDict(device)
    add_swin(state, swin, prefix)
    for stage in range(3):
        resolution = swin.image_size // (4 * 2**stage)
        windows, tokens = (resolution // swin.window) ** 2, swin.window**2
        state.add(f"{prefix}layers.{stage}.blocks.1.attn_mask", windows, tokens, tokens)
    state.norm(f"{prefix}norm", swin.out_channels[-1])
    if classes:
        state.linear(f"{prefix}head", classes, swin.out_channels[-1])
    return dict(state)


def swin_22k(swin: Swin, device: str = "meta") -> dict[str, Tensor]:
    return swin_classifier(swin, device, classes=21841)


def moby(swin: Swin, device: str = "meta") -> dict[str, Tensor]:
    """An online and a momentum encoder, with heads for self-supervised training and queues of negatives."""
    state = StateDict(device)
    state.update(swin_classifier(swin, device, "encoder.", classes=0))
    state.update(swin_classifier(swin, device, "encoder_k.", classes=0))
    for name, inputs in (
        ("projector", swin.out_channels[-1]),
        ("projector_k", swin.out_channels[-1]),
        ("predictor", 256),
    ):
        state.linear(f"{name}.linear_hidden.0", 4096, inputs)
        state.batch_norm(f"{name}.linear_hidden.1", 4096, counts=True)
        state.linear(f"{name}.linear_out", 256, 4096)
    state.add("queue1", 256, 4096)
    state.add("queue2", 256, 4096)
    state["queue_ptr"] = torch.zeros(1, dtype=torch.int64, device=device)
    return dict(state)


def expected_state(backbone: ResNet | Swin, device: str = "meta", **changed) -> dict[str, Tensor]:
    return model_with(backbone, device, **changed).state_dict()


def model_with(backbone: ResNet | Swin, device: str = "meta", **changed) -> ProScaleMask2FormerForUniversalSegmentation:
    if isinstance(backbone, Swin):
        settings = {
            "model_type": "swin",
            "embed_dim": backbone.embed_dim,
            "depths": list(backbone.depths),
            "num_heads": list(backbone.heads),
            "window_size": backbone.window,
            "image_size": backbone.image_size,
        }
    else:
        settings = {
            "model_type": "resnet",
            "embedding_size": backbone.stem,
            "hidden_sizes": backbone.out_channels,
            "depths": list(backbone.blocks),
        }
    config = ProScaleMask2FormerConfig(
        backbone_config=settings | {"out_features": STAGES} | changed,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_stage_layers=(1, 1, 1),
        decoder_layers=2,
    )
    with torch.device(device):
        return ProScaleMask2FormerForUniversalSegmentation(config).eval()


@pytest.mark.parametrize(
    ("publish", "backbone"),
    [(publish, resnet) for publish in (msra, detectron2, torchvision) for resnet in (R50, R101)]
    + [(swin_classifier, SWIN_T), (swin_classifier, SWIN_S), (swin_classifier, SWIN_B)]
    + [(swin_22k, SWIN_B), (swin_22k, SWIN_L), (moby, SWIN_T)],
)
def test_every_publisher(publish: Callable, backbone):
    expected = expected_state(backbone)
    state = rename_backbone(publish(backbone), expected)
    fresh = {f"hidden_states_norms.{stage}.{word}" for stage in STAGES for word in ("weight", "bias")}
    fresh |= {"swin.layernorm.weight", "swin.layernorm.bias"}
    filled = {
        name: tensor.shape
        for name, tensor in expected.items()
        if name.startswith(ENCODER) and name.removeprefix(ENCODER) not in fresh and "num_batches" not in name
    }
    assert {name: tensor.shape for name, tensor in state.items()} == filled


def test_resnets_of_all_publishers_are_the_same_model():
    """Values are drawn in the same order for all; for the norms without statistics these are put beside."""
    expected = expected_state(TINY_RESNET)
    plain = rename_backbone(detectron2(TINY_RESNET, "cpu"), expected)
    assert_equal(rename_backbone(torchvision(TINY_RESNET, "cpu"), expected), plain)

    caffe2 = msra(TINY_RESNET, "cpu")
    state = rename_backbone(caffe2, expected)
    start = f"{ENCODER}encoder.stages.1.layers.0."
    for target, source in {
        f"{ENCODER}embedder.embedder.convolution.weight": "conv1_w",
        f"{ENCODER}embedder.embedder.normalization.weight": "res_conv1_bn_s",
        f"{ENCODER}embedder.embedder.normalization.bias": "res_conv1_bn_b",
        f"{start}shortcut.convolution.weight": "res3_0_branch1_w",
        f"{start}shortcut.normalization.bias": "res3_0_branch1_bn_b",
        f"{start}layer.0.convolution.weight": "res3_0_branch2a_w",
        f"{start}layer.1.normalization.weight": "res3_0_branch2b_bn_s",
        f"{start}layer.2.normalization.bias": "res3_0_branch2c_bn_b",
        f"{ENCODER}encoder.stages.3.layers.2.layer.2.convolution.weight": "res5_2_branch2c_w",
    }.items():
        assert torch.equal(state[target], caffe2[source]), source
    means = [tensor for name, tensor in state.items() if name.endswith("running_mean")]
    variances = [tensor for name, tensor in state.items() if name.endswith("running_var")]
    assert len(means) == len(variances) == len(list(resnet_convolutions(TINY_RESNET)))
    assert all(mean.eq(0).all() for mean in means)
    assert all(variance.eq(1).all() for variance in variances)


def test_moby_gives_the_online_encoder():
    expected = expected_state(TINY_SWIN)
    state = moby(TINY_SWIN, "cpu")
    online = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    for name in [name for name in state if name.startswith("encoder_k.")]:
        state[name] = state[name] + 1
    assert_equal(rename_backbone(state, expected), rename_backbone(online, expected))


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_half_precision_and_wrapped():
    expected = expected_state(TINY_RESNET)
    state = {f"module.{name}": tensor.half() for name, tensor in torchvision(TINY_RESNET, "cpu").items()}
    assert {tensor.dtype for tensor in rename_backbone(state, expected).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision_computes_the_same(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    original = getattr(models, name)(weights=None).eval()
    for module in original.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1)
            torch.nn.init.uniform_(module.bias, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    small = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
    model = model_with(R50, "cpu", **(small if name == "resnet18" else {}))
    model.load_state_dict(rename_backbone(original.state_dict(), model.state_dict()), strict=False)

    pixels = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.model.pixel_level_module.encoder(pixels).feature_maps
        value = original.maxpool(original.relu(original.bn1(original.conv1(pixels))))
        for stage, computed in enumerate(maps):
            value = getattr(original, f"layer{stage + 1}")(value)
            assert torch.allclose(computed, value, rtol=1e-4, atol=1e-4 * value.abs().max()), stage


def test_the_names_here_are_torchvisions():
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        state = models.resnet101(weights=None).state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {
        name: tensor.shape for name, tensor in torchvision(R101).items()
    }


def test_timms_swin_computes_the_same():
    """timm's Swin has the published names, except that downsampling begins a stage instead of ending one.

    The smallest map here has two windows on a side: of a single one timm does not shift, and Swin as a backbone does.
    """
    timm = pytest.importorskip("timm.models.swin_transformer")
    torch.manual_seed(0)
    original = timm.SwinTransformer(
        img_size=TINY_SWIN.image_size,
        embed_dim=TINY_SWIN.embed_dim,
        depths=TINY_SWIN.depths,
        num_heads=TINY_SWIN.heads,
        window_size=TINY_SWIN.window,
    ).eval()
    for parameter in original.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    published = {
        re.sub(r"layers\.(\d)\.downsample", lambda match: f"layers.{int(match[1]) - 1}.downsample", name): tensor
        for name, tensor in original.state_dict().items()
    }
    assert published.keys() - swin_classifier(TINY_SWIN).keys() <= {"head.fc.weight", "head.fc.bias"}

    model = model_with(TINY_SWIN, "cpu")
    model.load_state_dict(rename_backbone(published, model.state_dict()), strict=False)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        maps = model.model.pixel_level_module.encoder(pixels).feature_maps
        tokens = original.patch_embed(pixels)  # (batch, height, width, channels), as after each stage
        for stage, (layer, computed) in enumerate(zip(original.layers, maps, strict=True)):
            tokens = layer(tokens)
            normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])  # the fresh norm of each output
            assert torch.allclose(computed, normed.permute(0, 3, 1, 2), atol=1e-4), stage


@pytest.mark.parametrize(
    ("state", "backbone", "message"),
    [
        (torchvision(R50), SWIN_T, "^The checkpoint is torchvision's ResNet; the configuration has another backbone.$"),
        (moby(SWIN_T), R50, "^The checkpoint is MoBY's .*; the configuration has another backbone.$"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(1)}, R50, "no known ImageNet backbone; known are: MSRA's"),
        (torchvision(R50), R101, r"255 in the model, without .*stages\.2\.layers\.6\..*and 235 more$"),
        (swin_classifier(SWIN_T) | {"absolute_pos_embed": torch.zeros(1)}, SWIN_T, r"1 in .*\n  absolute_pos_embed$"),
        (swin_classifier(SWIN_B), Swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 7), r"24 of .*\(529, 4\) found, \(169, 4\)"),
    ],
)
def test_misfits(state, backbone, message):
    with pytest.raises(ConversionError, match=re.compile(message, re.DOTALL)):
        rename_backbone(state, expected_state(backbone))


RGB = {"INPUT": {"FORMAT": "RGB"}}
FOR_TORCHVISION = RGB | {"MODEL": {"PIXEL_STD": [58, 57, 57], "RESNETS": {"STRIDE_IN_1X1": False}}}
FOR_MSRA: dict = {}  # detectron2's defaults


@pytest.mark.parametrize(
    ("publish", "backbone", "values"),
    [
        (msra, R50, FOR_MSRA),
        (torchvision, R50, FOR_TORCHVISION),
        (detectron2, R50, FOR_TORCHVISION),
        (detectron2, R50, FOR_MSRA),
        (swin_classifier, SWIN_T, RGB),
        (moby, SWIN_T, RGB),
    ],
)
def test_conditions_that_are_met(publish, backbone, values):
    check_training_conditions(publish(backbone), Detectron2Config(values))


@pytest.mark.parametrize(
    ("publish", "backbone", "values", "message"),
    [
        (
            msra,
            R50,
            FOR_TORCHVISION,
            r"is MSRA's .* must have INPUT.FORMAT BGR, MODEL.PIXEL_STD \(1.0, 1.0, 1.0\), "
            r"MODEL.RESNETS.STRIDE_IN_1X1 True.$",
        ),
        (torchvision, R50, FOR_MSRA, "is torchvision's .* INPUT.FORMAT RGB, MODEL.RESNETS.STRIDE_IN_1X1 False.$"),
        (swin_classifier, SWIN_T, {}, "is a Swin Transformer: the configuration must have INPUT.FORMAT RGB.$"),
        (moby, SWIN_T, {}, "is MoBY's .* INPUT.FORMAT RGB.$"),
    ],
)
def test_conditions_that_are_not_met(publish, backbone, values, message):
    with pytest.raises(ConversionError, match=message):
        check_training_conditions(publish(backbone), Detectron2Config(values))
