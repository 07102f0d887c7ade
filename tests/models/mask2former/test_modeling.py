"""The model as a whole: the contracts of a Transformers model, and what this one promises beyond them."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForInstanceSegmentation,
    AutoModelForUniversalSegmentation,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
)

from helpers import FOUR_LEVELS, TINY_RESNET, TINY_SWIN, labels, pixels, tiny_config, tiny_model
from proscale_hf import (
    ProScaleMask2FormerConfig,
    ProScaleMask2FormerForUniversalSegmentation,
    ProScaleMask2FormerModel,
    ProScaleMask2FormerPreTrainedModel,
)
from proscale_hf.encoders.choice import ENCODER_CLASSES
from proscale_hf.encoders.rt import ConvolutionNorm
from proscale_hf.layers.deformable_encoder import AttentionLogits, SamplingOffsets
from proscale_hf.layers.linear import UniformLinear
from proscale_hf.models.mask2former.mask_decoder import MaskedCrossAttention
from proscale_hf.models.padding import pad_to_stride
from proscale_hf.processing.packed_masks import pack_masks


WITHOUT_LARGEST_MAP = {
    "pixel_embedding": "none",
    "common_stride": 8,
    "feature_strides": (8, 16, 32),
    "backbone_config": {**TINY_SWIN, "out_features": ["stage2", "stage3", "stage4"]},
}
VARIANTS = [
    {},
    {"encoder": "mask2former", "pixel_embedding": "conv", "token_recalibration": "none"},
    {"token_recalibration": "conv", "token_recalibration_layout": "original", "pixel_embedding": "avgpool"},
    {"token_recalibration_layout": "original", "stage_residual": True},
    {"backbone_config": TINY_RESNET, "pre_norm": True, "hidden_dim": 48},
    {"encoder": "lite"},
    {"encoder": "rt"},
    {"encoder": "rt", **WITHOUT_LARGEST_MAP},
    FOUR_LEVELS,
]
assert {changes.get("encoder", "proscale") for changes in VARIANTS} == set(ENCODER_CLASSES)


def mixed_batch() -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Three images of different sizes, padded to the largest multiple of 32."""
    sizes = [(64, 128), (64, 64), (50, 90)]  # sorting them by padded size is not its own inverse
    pixel_values, pixel_mask = torch.zeros(3, 3, 64, 128), torch.zeros(3, 64, 128, dtype=torch.int64)
    for i, (height, width) in enumerate(sizes):
        pixel_values[i, :, :height, :width] = pixels(1, height, width, seed=i)[0]
        pixel_mask[i, :height, :width] = 1
    return pixel_values, pixel_mask, sizes


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def logits_of(model: nn.Module, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        output = model(*args, **kwargs)
    return output.class_queries_logits, output.masks_queries_logits


# -- shapes and outputs


@pytest.mark.parametrize("changes", VARIANTS)
def test_shapes(changes):
    model = tiny_model(**changes)
    images = pixels(height=128, width=192)
    output = model(images, output_hidden_states=True, output_attentions=True, output_auxiliary_logits=True)
    assert output.class_queries_logits.shape == (2, 7, 5)
    sizes = [(128 // stride, 192 // stride) for stride in model.config.feature_strides]
    assert output.masks_queries_logits.shape == (2, 7, *sizes[0])
    assert [m.shape[-2:] for m in output.encoder_hidden_states] == sizes
    width = model.config.feature_size
    encoder_sizes = [(128 // stride, 192 // stride) for stride in model.config.encoder_strides]
    assert [m.shape[1:] for m in output.pixel_decoder_hidden_states] == [(width, *size) for size in encoder_sizes]
    assert output.pixel_decoder_last_hidden_state.shape == (2, 16, *sizes[0])
    hidden = model.config.hidden_dim
    assert [h.shape for h in output.transformer_decoder_hidden_states] == [(2, 7, hidden)] * 5
    assert [a.shape for a in output.attentions] == [(2, 4, 7, 7)] * 4
    tokens = [rows * columns for rows, columns in encoder_sizes]
    assert [a.shape[-1] for a in output.cross_attentions] == [*tokens, tokens[0]][:4]
    assert len(output.auxiliary_logits) == 4
    for weights in (*output.attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


def test_output_order_is_what_trainer_and_pipelines_read():
    output = tiny_model()(pixels(), **labels())
    assert list(output.keys())[:3] == ["loss", "class_queries_logits", "masks_queries_logits"]
    assert output.loss.ndim == 0
    parameters = list(inspect.signature(ProScaleMask2FormerForUniversalSegmentation.forward).parameters)
    assert parameters[1:4] == ["pixel_values", "mask_labels", "class_labels"]


def test_trainer_averages_accumulated_steps():
    """`Trainer` leaves it to models that take any keyword; here each step's loss is divided by its own objects."""
    parameters = inspect.signature(ProScaleMask2FormerForUniversalSegmentation.forward).parameters
    assert all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


@pytest.mark.parametrize("with_labels", [False, True])
def test_return_dict_false_gives_the_same_values(with_labels):
    model, given = tiny_model(), labels() if with_labels else {}
    torch.manual_seed(0)
    expected = model(pixels(), **given).to_tuple()
    torch.manual_seed(0)
    actual = model(pixels(), **given, return_dict=False)
    assert isinstance(actual, tuple) and len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_only_the_last_masks_are_kept_at_inference():
    output = tiny_model()(pixels())
    assert output.auxiliary_logits is None and output.attentions is None and output.loss is None
    assert all(isinstance(value, torch.Tensor) and len(value) == 2 for value in output.values())


def test_hidden_states_and_attentions_through_the_config():
    model = tiny_model()
    model.set_attn_implementation("eager")  # transformers refuses the next lines otherwise
    model.config.output_hidden_states = True
    model.config.output_attentions = True
    output = model(pixels())
    assert output.encoder_hidden_states and output.attentions


def test_hidden_states_and_attentions_keep_their_gradients():
    model = tiny_model().train()
    output = model(pixels(), output_hidden_states=True, output_attentions=True)
    watched = [
        output.encoder_hidden_states[0],
        output.pixel_decoder_hidden_states[0],
        output.transformer_decoder_hidden_states[0],
        output.transformer_decoder_hidden_states[-1],
        output.attentions[0],
        output.cross_attentions[0],
    ]
    for tensor in watched:
        tensor.retain_grad()
    (output.class_queries_logits.sum() + output.masks_queries_logits.sum()).backward()
    assert all(tensor.grad is not None for tensor in watched)


# -- training


@pytest.mark.parametrize("objects", [(3, 1), (0, 0)])
@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes, auxiliary, objects):
    """Or none at all wants one: several processes would wait for it."""
    model = tiny_model(**changes, use_auxiliary_loss=auxiliary).train()
    model(pixels(), **labels(objects)).loss.backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_what_swin_has_for_its_classifier_is_not_trained(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path).train()
    for model in (tiny_model(), loaded):
        frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        assert [name.split(".encoder.")[1] for name in frozen] == ["swin.layernorm.weight", "swin.layernorm.bias"]


@pytest.mark.parametrize("changes", [{}, {"ignore_value": 254}, {"mask_padding": False}])
def test_packed_masks_give_the_same_loss_and_gradients(changes):
    """In a batch that is padded, at a size that is not yet a multiple of the stride, with void pixels."""
    pixel_values, pixel_mask = torch.zeros(2, 3, 60, 90), torch.zeros(2, 60, 90)
    for i, (height, width) in enumerate([(60, 50), (40, 90)]):
        pixel_values[i, :, :height, :width] = pixels(1, height, width, seed=i)[0]
        pixel_mask[i, :height, :width] = 1
    if "mask_padding" in changes:  # then nothing is padded on
        pixel_values, pixel_mask = pixels(2, 64, 96), None
    given = labels((9, 2), *pixel_values.shape[-2:])
    model = tiny_model(**changes).train()
    for masks in given["mask_labels"]:
        masks[:, 5:20, 10:30] = model.config.ignore_value
    packed = [pack_masks(masks, model.config.ignore_value) for masks in given["mask_labels"]]
    results = []
    for name, masks in (("mask_labels", given["mask_labels"]), ("packed_masks", packed)):
        torch.manual_seed(0)
        model.zero_grad()
        output = model(pixel_values, pixel_mask=pixel_mask, **{name: masks}, class_labels=given["class_labels"])
        output.loss.backward()
        results.append((output.loss_dict, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("auxiliary", [True, False])
def test_loss_is_the_weighted_sum_of_its_terms(auxiliary):
    model = tiny_model(use_auxiliary_loss=auxiliary)
    output = model(pixels(), **labels())
    weights = {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}
    expected = sum(weights[key.rstrip("_0123456789")] * value for key, value in output.loss_dict.items())
    torch.testing.assert_close(output.loss, expected)
    assert len(output.loss_dict) == (15 if auxiliary else 3)


def test_earlier_predictions_that_are_only_asked_for_are_not_trained():
    output = tiny_model(use_auxiliary_loss=False)(pixels(), **labels(), output_auxiliary_logits=True)
    assert len(output.auxiliary_logits) == 4
    assert len(output.loss_dict) == 3


def test_loss_falls_when_trained():
    torch.manual_seed(0)
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(30):
        loss = model(pixels(), **labels()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("objects", [(0, 0), (0, 2), (12, 1)])
def test_no_objects_and_more_objects_than_queries_train(objects):
    model = tiny_model().train()
    loss = model(pixels(), **labels(objects)).loss
    loss.backward()
    assert loss.isfinite()
    assert model.class_predictor.weight.grad.isfinite().all()


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_gradient_checkpointing_changes_nothing(encoder, use_reentrant):
    plain = tiny_model(encoder=encoder).double().train()  # rounding is not what this is about
    checkpointed = copy.deepcopy(plain)
    enable = getattr(checkpointed, "activation_checkpointing_enable", checkpointed.gradient_checkpointing_enable)
    enable({"use_reentrant": use_reentrant})
    assert checkpointed.is_gradient_checkpointing
    images = pixels().double().requires_grad_()
    for model in (plain, checkpointed):
        torch.manual_seed(0)
        model(images, **labels()).loss.backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), checkpointed.named_parameters(), strict=True):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    torch.testing.assert_close(dict(plain.named_buffers()), dict(checkpointed.named_buffers()))  # batch statistics


@pytest.mark.parametrize("freeze", [True, False])
def test_backbone_batch_norm_is_frozen_on_request(freeze):
    model = tiny_model(backbone_config=TINY_RESNET, freeze_backbone_batch_norm=freeze).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    model(pixels(), **labels()).loss.backward()
    changed = [not torch.equal(a, norm.running_mean) for a, norm in zip(before, norms, strict=True)]
    assert norms and all(changed) is not freeze and any(changed) is not freeze
    assert all((norm.weight.grad is None) is freeze for norm in norms)


def test_frozen_batch_norm_survives_its_replacement():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model(backbone_config=TINY_RESNET)).train()
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and not any(norm.training for norm in norms)


def test_frozen_batch_norm_survives_loading(tmp_path):
    tiny_model(backbone_config=TINY_RESNET).save_pretrained(tmp_path)
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path).train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


def test_each_term_has_its_own_weight():
    model = tiny_model(class_weight=3.0, mask_weight=7.0, dice_weight=11.0)
    terms = {"loss_cross_entropy": 1.0, "loss_mask": 10.0, "loss_dice": 100.0, "loss_dice_0": 1000.0}
    assert model.criterion.weighted_sum(terms) == 3 + 70 + 1100 + 11000


@pytest.mark.parametrize(
    ("part", "encoder", "blocks"),
    [
        ("transformer_module", "proscale", 4 * 4),
        ("pixel_level_module.decoder", "proscale", 4 * 3),
        ("pixel_level_module.decoder", "mask2former", 2 * 3),
        ("pixel_level_module.decoder", "lite", 2 * 3),
        ("pixel_level_module.decoder", "rt", 1 * 3),
    ],
)
def test_dropout_acts_after_each_block_in_training(part, encoder, blocks):
    """Behind attention, inside and behind the feed-forward block; in mask decoder layers also behind the second
    attention."""
    model = tiny_model(dropout=0.5, encoder=encoder).model
    module = model.get_submodule(part)
    rates = []
    for child in module.modules():
        if isinstance(child, nn.Dropout):
            child.register_forward_hook(lambda _, arguments, output: rates.append((output == 0).float().mean().item()))
    model.train()
    model(pixels())
    assert len(rates) == blocks
    assert min(rates) > 0.3
    rates.clear()
    model.eval()(pixels())
    assert len(rates) == blocks


def test_attention_dropout_only_in_training():
    model = tiny_model(dropout=0.9).model
    layer = model.transformer_module.decoder.layers[0].self_attn
    queries = torch.randn(1, 7, 32)
    torch.testing.assert_close(*(layer.eval()(queries, queries[0])[0] for _ in range(2)))
    assert difference(*(layer.train()(queries, queries[0])[0] for _ in range(2))) > 1e-3


def test_the_configured_activation_is_used():
    relu, gelu = tiny_model(), tiny_model(activation_function="gelu")
    gelu.load_state_dict(relu.state_dict())
    assert difference(logits_of(relu, pixels())[0], logits_of(gelu, pixels())[0]) > 1e-4


@pytest.mark.parametrize("enforce", [False, True])
def test_enforced_input_projection(enforce):
    projections = tiny_model(enforce_input_projection=enforce).model.transformer_module.input_projections
    assert all(isinstance(projection, nn.Conv2d) is enforce for projection in projections)


# -- padding


@pytest.mark.parametrize("changes", VARIANTS)
def test_an_image_does_not_depend_on_its_batch_mates(changes):
    model = tiny_model(**changes)
    pixel_values, pixel_mask, sizes = mixed_batch()
    together = logits_of(model, pixel_values, pixel_mask=pixel_mask)
    for i, (height, width) in enumerate(sizes):
        largest = model.config.feature_strides[-1]
        height, width = -(-height // largest) * largest, -(-width // largest) * largest
        alone = logits_of(
            model,
            pixel_values[i : i + 1, :, :height, :width],
            pixel_mask=pixel_mask[i : i + 1, :height, :width],
        )
        assert difference(together[0][i], alone[0][0]) < 1e-4
        stride = model.config.common_stride
        assert difference(together[1][i, :, : height // stride, : width // stride], alone[1][0]) < 1e-4
        # resized as post-processing does, the image's border must not see what lies beyond
        upsampled = nn.functional.interpolate(together[1][i : i + 1], size=(64, 128), mode="bilinear")
        expected = nn.functional.interpolate(alone[1], size=(height, width), mode="bilinear")
        assert difference(upsampled[..., :height, :width], expected) < 1e-4


@pytest.mark.parametrize("changes", VARIANTS)
def test_a_batch_of_any_size_is_padded_to_the_stride(changes):
    model = tiny_model(**changes)
    sizes = [(33, 65), (20, 50)]
    pixel_values, pixel_mask = torch.zeros(2, 3, 33, 65), torch.zeros(2, 33, 65)
    for i, (height, width) in enumerate(sizes):
        pixel_values[i, :, :height, :width] = pixels(1, height, width, seed=i)[0]
        pixel_mask[i, :height, :width] = 1
    together = logits_of(model, pixel_values, pixel_mask=pixel_mask)
    alone = logits_of(model, pixel_values[1:, :, :20, :50], pixel_mask=pixel_mask[1:, :20, :50])
    stride = model.config.common_stride
    largest = model.config.feature_strides[-1]
    height, width = (-(-side // largest) * largest // stride for side in (33, 65))
    assert together[1].shape[-2:] == (height, width)
    height, width = (-(-side // largest) * largest // stride for side in (20, 50))
    assert alone[1].shape[-2:] == (height, width)
    assert difference(together[0][1], alone[0][0]) < 1e-4
    assert difference(together[1][1, :, :height, :width], alone[1][0]) < 1e-4

    given = labels((2, 1), 33, 65)
    padded = [pad_to_stride(masks, 32) for masks in given["mask_labels"]]
    losses = []
    for masks, image, mask in (
        (given["mask_labels"], pixel_values, pixel_mask),
        (padded, pad_to_stride(pixel_values, 32), pad_to_stride(pixel_mask, 32)),
    ):
        torch.manual_seed(0)
        losses.append(model(image, masks, given["class_labels"], mask).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_output_is_the_same_in_a_batch(changes):
    model = tiny_model(**changes)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        together, alone = model(pixels(), **asked), model(pixels()[1:], **asked)
    for name, value in together.items():
        values, expected = (value, alone[name]) if isinstance(value, tuple) else ((value,), (alone[name],))
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a[1:], b, rtol=1e-5, atol=1e-5, msg=name)


def test_padding_counts_as_image_when_not_masked():
    model = tiny_model(mask_padding=False)
    pixel_values, pixel_mask, _ = mixed_batch()
    with_mask = logits_of(model, pixel_values, pixel_mask=pixel_mask)
    without = logits_of(model, pixel_values)
    assert difference(with_mask[0], without[0]) == 0
    assert difference(with_mask[0], logits_of(tiny_model(), pixel_values, pixel_mask=pixel_mask)[0]) > 1e-3


def test_loss_does_not_look_at_padding():
    model = tiny_model(train_num_points=2000)
    pixel_values, pixel_mask, sizes = mixed_batch()
    given = labels((2, 2, 2), 64, 64)
    given["mask_labels"] = [nn.functional.pad(masks[:, :50], (0, 64, 0, 14)) for masks in given["mask_labels"]]
    torch.manual_seed(0)
    clean = model(pixel_values, pixel_mask=pixel_mask, **given).loss
    for masks, (height, width) in zip(given["mask_labels"], sizes, strict=True):
        masks[:, height + 1 :] = 1
        masks[:, :, width + 1 :] = 1
    torch.manual_seed(0)
    torch.testing.assert_close(model(pixel_values, pixel_mask=pixel_mask, **given).loss, clean)


def test_loss_looks_at_padding_when_it_counts_as_image():
    model = tiny_model(mask_padding=False)
    pixel_values, pixel_mask, _ = mixed_batch()
    given = labels((2, 2, 2), 64, 128)
    losses = []
    for mask in (pixel_mask, None):
        torch.manual_seed(0)
        losses.append(model(pixel_values, pixel_mask=mask, **given).loss)
    torch.testing.assert_close(*losses)


def test_an_empty_pixel_mask_is_one_pixel():
    pixel_mask = torch.zeros(2, 64, 96)
    output = tiny_model()(pixels(), pixel_mask=pixel_mask)
    assert output.image_sizes.tolist() == [[1, 1], [1, 1]]
    assert output.masks_queries_logits.isfinite().all()


def test_image_sizes_come_from_the_pixel_mask_or_stand_in_for_it():
    pixel_values, pixel_mask, sizes = mixed_batch()
    model, sizes = tiny_model(), torch.tensor(sizes)
    with torch.no_grad():
        masked, sized = model(pixel_values, pixel_mask=pixel_mask), model(pixel_values, image_sizes=sizes.int())
    for output in (masked, sized):
        assert output.image_sizes.dtype == torch.int64 and torch.equal(output.image_sizes, sizes)
    assert torch.equal(masked.class_queries_logits, sized.class_queries_logits)
    assert torch.equal(masked.masks_queries_logits, sized.masks_queries_logits)


def test_the_output_says_which_labels_are_stuff():
    assert tiny_model()(pixels()).stuff_labels is None
    names = ["cat", "grass", "sky", "dog"]
    categories = [{"id": i, "name": name, "isthing": int(i in (0, 3))} for i, name in enumerate(names)]
    model = tiny_model(categories=categories, id2label=dict(enumerate(names)))
    assert model(pixels()).stuff_labels.tolist() == [[False, True, True, False]] * 2
    model.config.id2label = {0: "grass", 1: "grass", 2: "tree", 3: "dog"}
    assert model(pixels()).stuff_labels.tolist() == [[False, True, False, False]] * 2


# -- types, attention implementations, compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_16_bit_weights(encoder, dtype):
    reference = tiny_model(encoder=encoder)
    model = copy.deepcopy(reference).to(dtype)
    output = model(pixels(), **labels())
    assert output.class_queries_logits.dtype == output.masks_queries_logits.dtype == dtype
    assert output.loss.isfinite()
    # on average: a single query's attention region may change when a mask's logit is near 0
    change = output.class_queries_logits.float() - reference(pixels()).class_queries_logits
    assert change.abs().mean() < 0.02


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_autocast_trains(encoder):
    model = tiny_model(encoder=encoder).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(pixels(), **labels()).loss
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_sampling_locations_and_attention_weights_stay_float32():
    model = tiny_model().to(torch.bfloat16)
    seen = []
    for module in model.modules():
        if type(module).__name__ == "MultiScaleDeformableAttention":
            module.register_forward_pre_hook(lambda _, arguments: seen.extend(a.dtype for a in arguments[4:6]))
    model(pixels().to(torch.bfloat16))
    assert seen and set(seen) == {torch.float32}


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_sdpa_equals_eager(encoder):
    model = tiny_model(encoder=encoder)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        results[implementation] = logits_of(model, *mixed_batch()[:1], pixel_mask=mixed_batch()[1])
    for a, b in zip(results["eager"], results["sdpa"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sdpa_is_the_default():
    assert tiny_model().config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_compiles_without_a_graph_break(encoder):
    model = tiny_model(encoder=encoder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.int64)
    for given in ({}, {"pixel_mask": pixel_mask}):
        for a, b in zip(logits_of(model, pixels(), **given), logits_of(compiled, pixels(), **given), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < (2, 15), reason="PyTorch 2.8 compiles for each size; not tried between")
def test_a_compiled_model_takes_other_sizes():
    """Not with transformers' Swin, which keeps the compiler busy when it does not know the size."""
    torch.compiler.reset()  # forget the graphs of other tests' models, which count too
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph

    model = tiny_model(backbone_config=TINY_RESNET)
    compiled = torch.compile(model, fullgraph=True, backend=count)
    sizes = [(64, 96), (96, 64), (128, 160), (64, 64), (100, 132), (96, 128), (160, 96)]
    for size in sizes:
        for a, b in zip(logits_of(model, pixels(1, *size)), logits_of(compiled, pixels(1, *size)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(graphs) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_exports(encoder, with_mask):
    model = tiny_model(encoder=encoder)
    given = {"pixel_mask": torch.ones(2, 64, 96, dtype=torch.int64)} if with_mask else {}
    program = torch.export.export(model, (pixels(),), given, strict=False)
    exported = program.module()(pixels(seed=5), **given)
    for a, b in zip(logits_of(model, pixels(seed=5), **given), exported.to_tuple()[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# -- weights: initial values, saving, loading


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_initial_values(encoder):
    torch.manual_seed(0)
    model = ProScaleMask2FormerForUniversalSegmentation(tiny_config(encoder=encoder))
    for module in model.modules():
        if isinstance(module, SamplingOffsets):
            heads, levels, points, _ = module.shape
            ring = module.bias.view(heads, levels, points, 2)
            distance = torch.arange(1.0, points + 1).expand(heads, levels, points)
            torch.testing.assert_close(ring.abs().amax(-1), distance)
            assert module.weight.abs().max() == 0
            torch.testing.assert_close(ring[0, 0, 0], torch.tensor([1.0, 0.0]))
        elif isinstance(module, AttentionLogits):
            assert module.weight.abs().max() == 0 and module.bias.abs().max() == 0
        elif isinstance(module, MaskedCrossAttention):
            assert abs(module.in_proj_weight.std() - (2 / (4 * 32)) ** 0.5) < 0.01
        elif isinstance(module, UniformLinear):
            assert 0.8 / 32**0.5 < module.weight.abs().max() <= 1 / 32**0.5
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.min() == 1 and module.bias.abs().max() == 0
        elif isinstance(module, ConvolutionNorm):
            bound = (3 / module[0].weight[0].numel()) ** 0.5
            assert 0.8 < module[0].weight.abs().max() / bound <= 1
    layer = model.model.transformer_module.decoder.layers[0]
    projection = model.model.pixel_level_module.decoder.input_projections[0][0]
    assert 0.8 < projection.weight.abs().max() / (3 / projection.in_channels) ** 0.5 <= 1
    assert abs(layer.fc1.weight.std() - (2 / (32 + 48)) ** 0.5) < 0.02
    assert abs(model.model.transformer_module.queries_features.weight.std() - 1) < 0.2
    assert model.model.pixel_level_module.decoder.level_embed.std() > 0.5
    assert model.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 1, 0.1])


def test_initial_values_reach_what_a_checkpoint_lacks(tmp_path):
    """Models are built without memory and filled later: every missing tensor must be initialised then."""
    model = tiny_model()
    model.model.save_pretrained(tmp_path)
    loaded = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path)
    assert loaded.criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 1, 0.1])
    assert 0.01 < loaded.class_predictor.weight.std() < 0.03
    torch.testing.assert_close(
        loaded.model.transformer_module.level_embed.weight, model.model.transformer_module.level_embed.weight
    )


@pytest.mark.parametrize("changes", VARIANTS)
def test_saved_and_loaded_is_the_same(tmp_path, changes):
    model = tiny_model(**changes)
    model.save_pretrained(tmp_path)
    loaded, report = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    for a, b in zip(logits_of(model, pixels()), logits_of(loaded, pixels()), strict=True):
        assert torch.equal(a, b)


def test_a_sharded_model_is_saved_as_itself(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "whole")
    sharded_class = type(f"FSDP{type(model).__name__}", (type(model),), {"__module__": nn.Module.__module__})
    model.__class__ = sharded_class  # as FSDP does it
    model.save_pretrained(tmp_path / "sharded")
    assert type(model) is sharded_class
    whole, sharded = ({path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "sharded"))
    assert sharded == whole
    assert (tmp_path / "sharded/config.json").read_text() == (tmp_path / "whole/config.json").read_text()


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_layers_that_are_not_split_are_there(encoder):
    model = tiny_model(encoder=encoder)
    assert {"MaskedAttentionLayer"} < model._no_split_modules <= {type(module).__name__ for module in model.modules()}


def test_other_classes_resize_head_and_loss(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path, id2label={0: "cat", 1: "dog"}, ignore_mismatched_sizes=True
    )
    assert model.class_predictor.weight.shape[0] == 3
    assert model.criterion.empty_weight.tolist() == pytest.approx([1, 1, 0.1])
    model(pixels(), **labels(num_labels=2)).loss.backward()


def test_auto_classes(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is ProScaleMask2FormerConfig
    assert type(AutoModel.from_pretrained(tmp_path)) is ProScaleMask2FormerModel
    for auto_class in (AutoModelForUniversalSegmentation, AutoModelForInstanceSegmentation):
        assert type(auto_class.from_pretrained(tmp_path)) is ProScaleMask2FormerForUniversalSegmentation
    assert type(AutoModelForUniversalSegmentation.from_config(model.config)) is type(model)
    assert isinstance(model, ProScaleMask2FormerPreTrainedModel)


def test_import_is_light():
    code = "import sys, proscale_hf; print('torchvision' in sys.modules, 'timm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"] * 2


# -- other implementations


AS_MASK2FORMER = {
    "encoder": "mask2former",
    "pixel_embedding": "conv",
    "token_recalibration": "none",
    "mask_padding": False,
}


def mask2former_like(model: ProScaleMask2FormerForUniversalSegmentation) -> Mask2FormerForUniversalSegmentation:
    """transformers' model of the same shape and weights."""
    names = set(inspect.signature(Mask2FormerConfig).parameters)
    shared = {name: value for name, value in model.config.to_dict().items() if name in names and name != "model_type"}
    reference = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**shared)).eval()
    reference.load_state_dict(model.state_dict())
    return reference


@pytest.mark.parametrize("pre_norm", [False, True])
def test_agrees_with_mask2former_of_transformers(pre_norm):
    model = tiny_model(**AS_MASK2FORMER, pre_norm=pre_norm, num_attention_heads=8)
    reference = mask2former_like(model)
    for a, b in zip(logits_of(model, pixels()), logits_of(reference, pixels()), strict=True):
        assert difference(a, b) < 1e-4 and a.std() > 0.1


def test_starts_from_a_checkpoint_of_transformers(tmp_path):
    model = tiny_model(**AS_MASK2FORMER)
    mask2former_like(model).save_pretrained(tmp_path)
    same = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path, **AS_MASK2FORMER)
    for a, b in zip(logits_of(model, pixels()), logits_of(same, pixels()), strict=True):
        assert difference(a, b) < 1e-4

    cheaper, report = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(
        tmp_path, encoder_stage_layers=(1, 1, 1), ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    assert all(name.startswith("model.pixel_level_module.decoder.encoder.") for name in new)
    assert report["unexpected_keys"] == {"model.pixel_level_module.decoder.layer_1.0.weight"}
    assert logits_of(cheaper, pixels())[0].isfinite().all()


def test_timm_backbone():
    pytest.importorskip("timm")
    backbone = {"model_type": "timm_backbone", "backbone": "mvitv2_tiny", "out_indices": [0, 1, 2, 3]}
    model = tiny_model(backbone_config=backbone)
    assert model(pixels(1)).masks_queries_logits.shape == (1, 7, 16, 24)


# -- wrong input


PACKED = [pack_masks(masks) for masks in labels()["mask_labels"]]
AS_PACKED = {"pixel_values": pixels(), "packed_masks": PACKED, "class_labels": labels()["class_labels"]}
MAP_LABELS = {"mask_labels": [torch.zeros(64, 96)] * 2, "class_labels": [torch.zeros(64, dtype=torch.int64)] * 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pixel_values": torch.zeros(0, 3, 64, 64)}, "not empty"),
        ({"pixel_values": torch.zeros(3, 64, 64)}, "batch, channels, height, width"),
        ({"pixel_values": pixels(), "pixel_mask": torch.ones(2, 64, 64)}, "pixel_mask"),
        ({"pixel_values": pixels(), "image_sizes": torch.tensor([64, 96])}, r"image_sizes. must be \(batch, 2\)"),
        ({"pixel_values": pixels(), "image_sizes": torch.tensor([[64, 96], [65, 1]])}, r"1 x 1 and .* 64 x 96, .*65"),
        ({"pixel_values": pixels(), "image_sizes": torch.tensor([[64, 96], [0, 1]])}, "between 1 x 1"),
        ({"pixel_values": pixels(), "mask_labels": labels()["mask_labels"]}, "belong together"),
        ({"pixel_values": pixels(), "packed_masks": PACKED}, "`packed_masks` and `class_labels` belong together"),
        ({"pixel_values": pixels(), "packed_masks": PACKED, **labels()}, "not both"),
        ({"pixel_values": pixels(), **labels((1,))}, "one entry per image"),
        ({**AS_PACKED, "packed_masks": PACKED[:1]}, "one entry per image: got 1 and 2"),
        ({**AS_PACKED, "packed_masks": [PACKED[0], torch.cat(PACKED)]}, "Image 1: .*uint8 .1 planes for 1 objects"),
        ({**AS_PACKED, "packed_masks": [planes[0] for planes in PACKED]}, "Image 0: .*uint8 .1 planes for 3 objects"),
        ({**AS_PACKED, "packed_masks": [planes.int() for planes in PACKED]}, "uint8 .*got torch.int32"),
        ({**AS_PACKED, "packed_masks": [planes[:, :32] for planes in PACKED]}, "`packed_masks` are 32 x 96.*64 x 96"),
        ({**AS_PACKED, "class_labels": [torch.zeros(3), torch.zeros(1)]}, "integers.*got torch.float32"),
        ({**AS_PACKED, "class_labels": [torch.zeros(3, 1, dtype=torch.int64)] * 2}, r"integers of shape \(objects,\)"),
        ({"pixel_values": pixels(), **labels((3, 1)), "class_labels": [torch.tensor([0])] * 2}, "Image 0.*1 objects"),
        ({"pixel_values": pixels(), **MAP_LABELS}, "Image 0.*shape"),
        ({"pixel_values": pixels(), **labels(num_labels=9, seed=3)}, "classes 0 to 3"),
        ({"pixel_values": pixels(), **labels(height=32, width=48)}, "32 x 48.*64 x 96"),
        (
            {"pixel_values": pixels(), **labels(), "mask_labels": [2 * masks for masks in labels()["mask_labels"]]},
            r"Image 0: `mask_labels`.*0 and 1, and 255 where void, but there is \[2\]",
        ),
    ],
)
def test_wrong_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny_model()(**arguments)
    assert "\n" not in str(error.value)


def test_masks_that_are_all_void_get_a_word():
    """White was meant, as pictures of masks have it."""
    given = labels()
    given["mask_labels"][1] *= 255
    with pytest.warns(UserWarning, match=r"Image 1: no pixel of `mask_labels` is 1.*255 is void") as said:
        tiny_model()(pixels(), **given)
    assert len(said) == 1


def test_backbone_with_too_few_maps_is_refused():
    with pytest.raises(ValueError, match="feature maps"):
        tiny_model(backbone_config={**TINY_RESNET, "out_features": ["stage3", "stage4"]})
