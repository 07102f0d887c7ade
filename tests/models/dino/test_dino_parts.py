"""The parts of the detection model: feature levels, queries from tokens, denoising, and the decoder."""

import pytest
import torch

from helpers import detection_labels, tiny_detection_config, tiny_detector
from proscale_hf.layers.boxes import to_corners
from proscale_hf.layers.deformable_encoder import TokenGrid
from proscale_hf.models.dino.box_decoder import BoxDecoder
from proscale_hf.models.dino.denoising import ContrastiveDenoising, Noise, attention_between
from proscale_hf.models.dino.feature_levels import FeatureLevels
from proscale_hf.models.dino.query_selection import QuerySelection, token_boxes


SHAPES = [(1, 2), (2, 3), (4, 6), (8, 12)]  # coarse to fine


def grid_of(shapes=SHAPES, sizes=None) -> TokenGrid:
    """For one image, which covers so many rows and columns of each map."""
    maps = [torch.zeros(1, 64, *shape) for shape in shapes]
    if sizes is None:
        return TokenGrid.of_maps(maps)
    padding = [torch.ones(1, *shape, dtype=torch.bool) for shape in shapes]
    for mask, (height, width) in zip(padding, sizes, strict=True):
        mask[:, :height, :width] = False
    return TokenGrid.of_maps(maps, padding)


def seeded(module):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


# -- feature levels


def test_extra_levels_come_from_the_coarsest_map_as_it_is():
    levels = seeded(FeatureLevels([8, 16], num_levels=4, channels=64, temperature=20.0))
    fine, coarse = torch.randn(1, 8, 12, 20), torch.randn(1, 16, 6, 10)
    maps = levels((fine, coarse))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 2, 3), (1, 64, 3, 5), (1, 64, 6, 10), (1, 64, 12, 20)]
    second, first, *own = levels.input_projections
    torch.testing.assert_close(maps[1], first(coarse))
    torch.testing.assert_close(maps[0], second(first(coarse)))
    torch.testing.assert_close(maps[2], own[0](coarse))


def test_each_level_has_its_own_embedding():
    levels = seeded(FeatureLevels([8, 16], num_levels=2, channels=64, temperature=20.0))
    maps = [torch.zeros(1, 64, 3, 5)] * 2
    coarse, fine = levels.position_embeddings(maps)
    difference = (fine - coarse)[0, :, 1, 2]
    torch.testing.assert_close(difference, levels.level_embed[1] - levels.level_embed[0])


# -- queries from tokens


def test_tokens_propose_boxes_that_double_from_level_to_level():
    boxes = token_boxes(grid_of())
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.25, 0.5, 0.4, 0.4]))
    torch.testing.assert_close(boxes[0, -1], torch.tensor([11.5 / 12, 7.5 / 8, 0.05, 0.05]))
    padded = token_boxes(grid_of(sizes=[(1, 1), (1, 2), (2, 3), (4, 6)]))
    torch.testing.assert_close(padded[0, -96 + 5], torch.tensor([5.5 / 6, 0.5 / 4, 0.05, 0.05]))  # places in the image


def test_the_best_tokens_become_queries_and_keep_their_boxes():
    selection = seeded(QuerySelection(tiny_detection_config(num_queries=5)))
    tokens = torch.randn(1, 128, 64)
    chosen = selection(tokens, grid_of())
    scores = selection.class_head(selection.token_norm(selection.token_projection(tokens))).amax(-1)[0]
    assert chosen.tokens[0].tolist() == scores.argsort(descending=True)[:5].tolist()
    assert chosen.absent is None and chosen.content.shape == (1, 5, 64)
    torch.testing.assert_close(chosen.logits[0].amax(-1), scores[chosen.tokens[0]])
    torch.nn.init.zeros_(selection.box_head[-1].weight)
    torch.nn.init.zeros_(selection.box_head[-1].bias)
    boxes = selection(tokens, grid_of()).box_logits.sigmoid()
    torch.testing.assert_close(boxes, token_boxes(grid_of())[:, chosen.tokens[0]])


def test_tokens_at_the_border_of_large_maps_propose_nothing():
    """Half a cell of 1/60 lies within 0.01 of the edge."""
    selection = seeded(
        QuerySelection(tiny_detection_config(num_queries=240, num_feature_levels=3, encoder_stage_layers=(1,) * 3))
    )
    chosen = selection(torch.randn(1, 240, 64), grid_of([(4, 60)]))
    at_border = (chosen.tokens[0] % 60 == 0) | (chosen.tokens[0] % 60 == 59)
    assert at_border.sum() == 8
    assert (chosen.box_logits.sigmoid()[0, at_border] == 1).all()  # as in the original
    assert chosen.logits[0, at_border].std(0).max() < 1e-6  # all say the same


@pytest.mark.parametrize("padding", ["per_image", "original"])
def test_padding_proposes_nothing(padding):
    selection = seeded(QuerySelection(tiny_detection_config(num_queries=128, batch_padding=padding)))
    grid = grid_of(sizes=[(1, 1), (1, 2), (2, 3), (4, 6)])
    chosen = selection(torch.randn(1, 128, 64), grid)
    in_padding = grid.padding[0][chosen.tokens[0]]
    assert in_padding.sum() == 128 - 1 - 2 - 6 - 24
    if padding == "original":
        assert chosen.absent is None
    else:
        assert torch.equal(chosen.absent[0], in_padding) and in_padding[-95:].all()  # they come last
        assert (chosen.logits[0, in_padding] == -100).all()


# -- denoising


@pytest.mark.parametrize(
    ("number", "most", "groups"),
    [(100, 3, 33), (100, 0, 1), (100, 500, 1), (50, 3, 16), (49, 3, 98), (4, 7, 8), (1, 1, 2)],
)
def test_numbers_of_groups(number, most, groups):
    assert ContrastiveDenoising(tiny_detection_config(num_denoising=number)).num_groups(most) == groups


def denoise(config, labels):
    module = seeded(ContrastiveDenoising(config))
    return module, module([image["class_labels"] for image in labels], [image["boxes"] for image in labels])


def test_denoising_queries_lie_around_their_objects():
    labels = detection_labels((3, 1))
    torch.manual_seed(0)
    _, queries = denoise(tiny_detection_config(num_denoising=30, box_noise_scale=0.4), labels)
    groups = queries.targets.groups
    assert groups == 60 and queries.content.shape == (2, groups * 2 * 3, 64)
    halves = queries.box_logits.sigmoid().view(2, groups, 2, 3, 4)
    for image in range(2):
        boxes = labels[image]["boxes"]
        moved = (to_corners(halves[image, :, :, : len(boxes)]) - to_corners(boxes)).abs()
        share = (moved / (boxes[:, 2:].repeat(1, 2) / 2)).amax((0, 2, 3))  # of half the box
        assert 0.3 < share[0] < 0.41 and 0.6 < share[1] < 0.81  # positive and negative queries
    assert not halves[1, :, :, 1:].sub(0.5).any()  # left over in the image with one object
    assert not queries.content.view(2, groups, 2, 3, 64)[1, :, :, 1:].any()
    found, objects = queries.targets.matches[0]
    assert found[:4].tolist() == [0, 1, 2, 6] and objects[:4].tolist() == [0, 1, 2, 0]


def test_labels_change_with_half_the_ratio():
    module = ContrastiveDenoising(tiny_detection_config(label_noise_ratio=0.6))
    labels = torch.zeros(4, dtype=torch.int64)
    noise = Noise(torch.tensor([0.0, 0.29, 0.31, 0.9]), torch.full((4,), 2), torch.ones(4, 4), torch.zeros(4, 4))
    assert module.noised_labels(labels, noise).tolist() == [2, 2, 0, 0]


def test_groups_do_not_see_each_other_and_are_not_seen():
    sees = attention_between(torch.tensor([0, 0, 1, 1]), 2)
    expected = [
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert sees.int().tolist() == expected


# -- the decoder


def decoder_and_inputs(**changes):
    torch.manual_seed(0)
    decoder = seeded(BoxDecoder(tiny_detection_config(**changes)))
    return decoder, torch.randn(1, 5, 64), torch.rand(1, 5, 4) * 0.5 + 0.2, torch.randn(1, 128, 64)


def test_a_layer_looks_where_the_one_before_says_and_predicts_from_the_normalised_query():
    decoder, queries, boxes, memory = decoder_and_inputs()
    decoded = decoder(queries, boxes, memory, grid_of())
    torch.testing.assert_close(decoded.reference_boxes[0], boxes)
    logits = [b.logit() for b in decoded.reference_boxes]
    for layer in range(2):
        states = decoded.hidden_states[layer + 1]
        for found, state in (
            (decoded.reference_boxes[layer + 1], states),
            (decoded.boxes[layer], decoder.layernorm(states)),
        ):
            expected = (logits[layer] + decoder.box_head(state)).sigmoid()
            torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert not decoded.reference_boxes.requires_grad


def test_a_prediction_trains_its_own_layer_and_the_box_of_the_one_before():
    """Look forward twice. Layers that let no gradient through leave the way over the boxes alone."""
    decoder, *inputs = decoder_and_inputs()
    for layer in decoder.layers[1:]:
        layer.forward = lambda hidden_states, *_: (hidden_states.detach(), None)
    decoded = decoder(*inputs, grid_of())
    first_states = decoded.hidden_states[1]
    reached = [
        torch.autograd.grad(boxes.sum(), first_states, retain_graph=True, allow_unused=True)[0]
        for boxes in decoded.boxes
    ]
    assert reached[0].any() and reached[1].any() and (reached[2] is None or not reached[2].any())


@pytest.mark.parametrize("padding", ["per_image", "original"])
def test_boxes_are_places_in_the_image_and_positions_are_by_choice(padding):
    """In a padded batch queries find the same, unless their positions are those in the padded image."""
    decoder, queries, boxes, _ = decoder_and_inputs(batch_padding=padding)
    torch.manual_seed(1)
    maps = [torch.randn(1, 64, *shape) for shape in SHAPES]
    larger = [(2, 4), (4, 5), (8, 9), (13, 20)]
    padded = [
        torch.nn.functional.pad(m, (0, w - m.shape[3], 0, h - m.shape[2]), value=9.0)
        for m, (h, w) in zip(maps, larger, strict=True)
    ]
    alone, together = (torch.cat([m.flatten(2).transpose(1, 2) for m in given], dim=1) for given in (maps, padded))
    results = decoder(queries, boxes, alone, grid_of()), decoder(queries, boxes, together, grid_of(larger, SHAPES))
    difference = (results[0].boxes - results[1].boxes).abs().max()
    assert difference < 1e-5 if padding == "per_image" else difference > 1e-3


def test_without_gradients_for_the_boxes_of_tokens():
    """Queries begin at the tokens' boxes, but only the two-stage loss trains these."""
    model = tiny_detector().train()
    output = model(torch.randn(1, 3, 64, 96))
    output.pred_boxes.sum().backward()
    assert model.model.query_selection.box_head[-1].weight.grad is None
