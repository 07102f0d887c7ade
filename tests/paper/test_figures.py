"""The paper's figures: what they measure, and that the same data give the same picture."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_config, tiny_model
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.cost import measure_cost
from proscale_hf.encoders.choice import ENCODER_CLASSES
from proscale_hf.visualization import Segment


matplotlib = pytest.importorskip("matplotlib")

from proscale_hf.paper.figures import (
    compute_distribution,
    cost_and_quality,
    panoptic_maps,
    recalibration,
    token_similarity,
)
from proscale_hf.paper.figures.observation import Observation
from proscale_hf.paper.figures.plotting import scale_name, shortened


@pytest.fixture(scope="module")
def processor():
    return ProScaleMask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}, label_ids_to_fuse=[3])


@pytest.fixture(scope="module")
def image():
    """72 x 64 pixels, which the processor pads to 96 x 64."""
    pixels = np.random.default_rng(0).integers(0, 256, (72, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def same(picture: Image.Image, other: Image.Image) -> bool:
    return picture.mode == "RGB" and picture.tobytes() == other.tobytes()


def test_names_on_plots():
    assert [scale_name(stride) for stride in (4, 32, 12)] == ["s1, 1/4", "s4, 1/32", "1/12"]
    assert shortened("abc", 3) == "abc" and shortened("abcdef", 4) == "…def"


# compute distribution


def test_the_parts_of_a_cost_add_up():
    cost = measure_cost(tiny_config(), 64, 96)
    parts = compute_distribution.parts_of(cost)
    assert sum(parts.values()) == pytest.approx(cost.total_gflops)
    assert parts["encoder"] == cost.encoder_gflops and parts["rest"] == pytest.approx(cost.post_processing_gflops)


def test_shares_are_of_the_models_own_total(monkeypatch):
    cost = measure_cost(tiny_config(), 64, 96)
    half = {name: value / 2 for name, value in dataclasses.asdict(cost).items()}
    texts = []
    monkeypatch.setattr(matplotlib.axes.Axes, "text", lambda _, x, y, text, **options: texts.append((y, text)))
    compute_distribution.draw_compute_distribution({"whole": cost, "half": dataclasses.replace(cost, **half)}, 64, 96)
    whole, halves = ([text for row, text in texts if row == number and "%" in text] for number in (0, 1))
    assert halves and set(halves) <= set(whole)  # small parts have no number
    assert f"{cost.backbone_gflops / cost.total_gflops:.0%}" in halves


def test_pictures_do_not_depend_on_the_users_settings():
    cost = measure_cost(tiny_config(), 64, 96)
    costs = {"one": cost, "half $x$": dataclasses.replace(cost, total_gflops=cost.total_gflops * 2)}
    picture = compute_distribution.draw_compute_distribution(costs, 64, 96)
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        assert same(compute_distribution.draw_compute_distribution(costs, 64, 96), picture)
        assert matplotlib.rcParams["font.size"] == 30
    assert not same(compute_distribution.draw_compute_distribution({"one": cost}, 64, 96), picture)


# token similarity


def test_similarity_of_known_maps():
    channels = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(0))
    constant = token_similarity.similarity_by_distance(channels.expand(8, 6, 5) * 3, 100)
    np.testing.assert_allclose(constant, np.ones(15))  # half of the tokens, and no further
    signs = torch.tensor([1.0, -1.0]).repeat(16).reshape(1, 4, 8)
    np.testing.assert_allclose(token_similarity.similarity_by_distance(channels * signs, 4), [-1, 1, -1, 1])
    orthogonal = torch.eye(6).repeat(1, 4).reshape(6, 4, 6)  # each row of the map has the same six tokens
    np.testing.assert_allclose(token_similarity.similarity_by_distance(orthogonal, 7), [0, 0, 0, 0, 0, 1, 0])


def test_similarity_is_of_the_maps_that_enter_the_encoder(processor, image):
    model = tiny_model()
    similarity = token_similarity.measure_token_similarity(model, processor, [image, image], longest_distance=9)
    decoder = model.model.pixel_level_module.decoder
    pixel_values = processor(images=[image], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        coarsest_first = reversed(model.model.pixel_level_module.encoder(pixel_values).feature_maps[1:])
        maps = [project(found) for project, found in zip(decoder.input_projections, coarsest_first, strict=True)]
    assert list(similarity) == [32, 16, 8]
    for (stride, curve), found in zip(similarity.items(), maps, strict=True):
        valid = found[0, :, : -(-72 // stride)]  # 72 x 64 pixels, padded to 96 x 64
        np.testing.assert_allclose(curve, token_similarity.similarity_by_distance(valid, 9), rtol=1e-4)
    assert not decoder.encoder._forward_hooks


@pytest.mark.parametrize("encoder", sorted(ENCODER_CLASSES))
def test_similarity_of_each_encoder(processor, image, encoder):
    similarity = token_similarity.measure_token_similarity(tiny_model(encoder=encoder), processor, [image])
    assert [len(curve) for curve in similarity.values()] == [3, 10, 36]  # of 6, 20 and 72 tokens
    picture = token_similarity.draw_token_similarity(similarity)
    assert same(token_similarity.draw_token_similarity(similarity), picture)


def test_similarity_needs_images(processor):
    with pytest.raises(ValueError, match="at least one image"):
        token_similarity.measure_token_similarity(tiny_model(), processor, [])


def test_hooks_go_away_when_the_model_fails(processor, image, monkeypatch):
    model = tiny_model()
    module = model.model.pixel_level_module.decoder.encoder
    monkeypatch.setattr(module, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Observation(model, processor, image, [module])
    assert not module._forward_hooks


# recalibration


@pytest.mark.parametrize("kind, layout", [("linear", "paper"), ("conv", "paper"), ("linear", "original")])
def test_recalibration_weighs_positions(processor, image, kind, layout):
    model = tiny_model(token_recalibration=kind, token_recalibration_layout=layout)
    found = recalibration.measure_recalibration(model, processor, image)
    assert [(one.stride, one.attention.shape) for one in found] == [(32, (3, 2)), (16, (5, 4))]
    for one in found:
        assert one.attention.std() > 0
        np.testing.assert_allclose(one.after, one.before * one.attention, rtol=1e-4)
    assert found[0].extent == (0, 1, pytest.approx(96 / 72), 0)
    picture = recalibration.draw_recalibration([image, image], [found, found])
    assert same(recalibration.draw_recalibration([image, image], [found, found]), picture)


def test_before_and_after_differ_where_attention_does(image, monkeypatch):
    panels = []
    imshow = matplotlib.axes.Axes.imshow
    monkeypatch.setattr(
        matplotlib.axes.Axes,
        "imshow",
        lambda axes, values, **options: panels.append(values) or imshow(axes, values, **options),
    )
    attention, before = np.array([[0.2, 0.6], [0.4, 0.4]]), np.array([[1.0, 1.0], [2.0, 3.0]])
    found = recalibration.Recalibration(32, attention, before, before * attention, (0.0, 1.0, 1.0, 0.0))
    recalibration.draw_recalibration([image], [[found]])
    maps = [values for values in panels if values.shape == (2, 2)]
    np.testing.assert_allclose(maps, [attention, before, before * attention / 0.4])


def test_the_numbers_beside_a_panorama_have_room(processor, image):
    found = recalibration.measure_recalibration(tiny_model(), processor, image)
    flattest, tallest = recalibration.FLATTEST, recalibration.TALLEST
    for size, bounded in (((1000, 10), (1000, 1000 * flattest)), ((10, 1000), (1000 / tallest, 1000))):
        pictures = [Image.new("RGB", tuple(map(int, each)), "gray") for each in (size, bounded)]
        assert same(*(recalibration.draw_recalibration([picture], [found]) for picture in pictures))


def test_recalibration_with_positions_mixed_up(processor, image):
    model = tiny_model(token_recalibration="conv", token_recalibration_layout="original")
    found = recalibration.measure_recalibration(model, processor, image)
    assert [one.attention.shape for one in found] == [(3, 2), (5, 4)]


@pytest.mark.parametrize("changes", [{"token_recalibration": "none"}, {"encoder": "mask2former"}])
def test_without_recalibration_there_is_nothing_to_show(processor, image, changes):
    with pytest.raises(ValueError, match="no token recalibration"):
        recalibration.measure_recalibration(tiny_model(**changes), processor, image)


# cost and quality


def written(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_results_from_many_kinds_of_files(tmp_path):
    table = written(tmp_path, "table.csv", 'Name, GFLOPs, PQ\n"M2F, Swin-T",234.5,52.03\nmine,171,\n')
    evaluated = written(tmp_path, "results.json", {"model": "mine", "panoptic": {"All": {"pq": 0.5}}})
    compared = [written(tmp_path, f"{seed}.json", {"name": "x", "pq": {"All": 40.0 + seed}}) for seed in (0, 2)]
    counted = written(tmp_path, "cost.json", [{"name": "x", "total_gflops": 3.5}])
    assert cost_and_quality.read_results([table, evaluated, *compared, counted]) == [
        cost_and_quality.Result("M2F, Swin-T", 234.5, (52.03,)),
        cost_and_quality.Result("mine", 171.0, (50.0,)),
        cost_and_quality.Result("x", 3.5, (40.0, 42.0)),
    ]
    results = cost_and_quality.read_results(compared, count_gflops={"x": 7.0}.__getitem__)
    assert results[0].gflops == 7 and results[0].quality == 41 and results[0].deviation == pytest.approx(2**0.5)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", "name,gflops,pq\na,x,50\n", "`gflops` of result 1 in .*a.csv is no number: 'x'"),
        ("a.csv", "name,gflops,pq\na,1,500\n", "`pq` of result 1 .* is 500"),
        ("a.csv", "name,gflops,pq\na,1,nan\n", "not possible"),
        ("a.csv", "gflops,pq\n1,50\n", "has no name"),
        ("a.csv", "name,gflops,pq\n", "hold no results"),
        ("a.csv", "name,gflops\na,1\n", "no file gives a PQ for a"),
        ("a.csv", "name,pq\na,1\n", "no file gives the GFLOPs of a"),
        ("a.csv", "name,gflops,pq\na,1,5\na,2,5\n", "elsewhere it is 1"),
        ("a.json", "{", "cannot read the results in"),
        ("a.json", [3], "does not hold results"),
        ("a.json", {"name": "a", "gflops": [1], "pq": 3}, "no number"),
        ("a.json", {"name": "a", "gflops": 1, "panoptic": {"All": {"pq": None}}}, "no file gives a PQ"),
    ],
)
def test_results_that_cannot_be_used(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message) as error:
        cost_and_quality.read_results([written(tmp_path, name, content)])
    assert "\n" not in str(error.value)


def test_a_missing_results_file(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the results in .*nothing\.json"):
        cost_and_quality.read_results([tmp_path / "nothing.json"])


def test_names_stay_apart(monkeypatch):
    """The paper's table 6: neighbours 1.6 GFLOPs and 0.07 points of PQ apart."""
    boxes = []
    write_names = cost_and_quality._write_names

    def spy(axes, *arguments):
        write_names(axes, *arguments)
        boxes.extend(text.get_window_extent().extents for text in axes.texts)

    monkeypatch.setattr(cost_and_quality, "_write_names", spy)
    values = {"M2F": (234.5, 52.03), "(1, 1, 1)": (137.1, 50.79), "(3, 1, 1)": (138.7, 51.69)}
    values |= {"(1, 3, 1)": (143.8, 51.76), "(1, 1, 3)": (164.7, 52.4)}
    results = [cost_and_quality.Result(name, gflops, (pq,)) for name, (gflops, pq) in values.items()]
    picture = cost_and_quality.draw_cost_and_quality(results)
    assert len(boxes) == 5
    assert all(cost_and_quality._overlap(a, b) == 0 for i, a in enumerate(boxes) for b in boxes[:i])
    assert not same(cost_and_quality.draw_cost_and_quality(results, baseline="(1, 1, 1)"), picture)
    with pytest.raises(ValueError, match=r"no result named 'X'; there are M2F, \(1, 1, 1\)"):
        cost_and_quality.draw_cost_and_quality(results, baseline="X")


# panoptic maps


def test_classes_have_one_colour_in_all_models():
    configs = {
        "a": tiny_config(num_labels=3, id2label={0: "cat", 1: "dog", 2: "sky"}),
        "b": tiny_config(num_labels=2, id2label={0: "sky", 1: "cat"}),
    }
    colors = panoptic_maps.class_colors(configs)
    assert colors["a"][0] == colors["b"][1] and colors["a"][2] == colors["b"][0]
    assert len(set(colors["a"].values())) == 3
    configs["b"].categories = [{"id": 9, "name": "sky"}, {"id": 7, "name": "cat", "color": [1, 2, 3]}]
    assert panoptic_maps.class_colors(configs)["a"] == {**colors["a"], 0: (1, 2, 3)}


def test_grid_of_panoptic_maps():
    images = [Image.new("RGB", (60, 40), "gray"), Image.new("RGB", (40, 60), "gray")]
    cat = Segment("cat", 0, (0, 0, 40, 40), np.ones((40, 40), dtype=bool), score=0.9)
    segments = {"first": [[cat], []], "a name much too long for the column above which it is to stand" * 2: [[], [cat]]}
    colors = {name: {0: (255, 0, 0)} for name in segments}
    picture = panoptic_maps.draw_panoptic_maps(images, segments, colors)
    column, gap = panoptic_maps.COLUMN_WIDTH, panoptic_maps.GAP
    header = 2 * panoptic_maps.FONT_SIZE
    heights = [round(column * 2 / 3), round(column * 3 / 2)]
    assert picture.size == (3 * column + 2 * gap, header + sum(heights) + gap)
    pixels = np.asarray(picture).astype(int)
    below = header + heights[0] + gap

    def has_red(row: int, number: int) -> bool:
        area = pixels[row : row + 20, number * (column + gap) :][:, :column]
        return bool((area[..., 0] > area[..., 1] + 50).any())

    assert [has_red(header + 5, number) for number in range(3)] == [False, True, False]
    assert [has_red(below + 5, number) for number in range(3)] == [False, False, True]


def test_a_tower_is_no_taller_than_its_row_may_be():
    tower, panorama = Image.new("RGB", (20, 400), "gray"), Image.new("RGB", (1000, 1), "gray")
    picture = panoptic_maps.draw_panoptic_maps([tower, panorama], {}, {})
    header, tallest = 2 * panoptic_maps.FONT_SIZE, panoptic_maps.TALLEST
    assert picture.size == (panoptic_maps.COLUMN_WIDTH, header + tallest + panoptic_maps.GAP + 1)
    is_gray = np.asarray(picture)[header + 10, :, 0] == 128
    assert is_gray.sum() == tallest * 20 / 400 and is_gray[panoptic_maps.COLUMN_WIDTH // 2]


def test_segments_of_a_model(processor, image):
    model = tiny_model(seed=7)  # whose masks leave something of the picture
    with torch.no_grad():
        model.class_predictor.bias[1] += 20
    segments = panoptic_maps.find_panoptic_segments(model, processor, image)
    assert segments and {segment.label_id for segment in segments} == {1}
    assert segments[0].full_mask(72, 64).shape == (72, 64)
