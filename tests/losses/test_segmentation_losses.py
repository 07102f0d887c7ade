"""Matching and losses: against the formulas written out, and what void pixels and missing objects may not do."""

import logging

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import as_products, labels
from proscale_hf.losses import masks as mask_losses
from proscale_hf.losses import matching
from proscale_hf.losses.matching import UNMATCHABLE, ImageObjects, ImagePredictions, Matcher
from proscale_hf.losses.segmentation import UniversalSegmentationLoss, totals_per_process
from proscale_hf.processing.packed_masks import pack_masks


def criterion(**changes) -> UniversalSegmentationLoss:
    settings = {
        "num_labels": 4,
        "no_object_weight": 0.1,
        "class_weight": 2.0,
        "mask_weight": 5.0,
        "dice_weight": 5.0,
        "num_points": 400,
        "oversample_ratio": 3.0,
        "importance_sample_ratio": 0.75,
    }
    return UniversalSegmentationLoss(**{**settings, **changes})


def predictions(number: int = 2, batch: int = 2, queries: int = 7, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    class_logits = torch.randn((number, batch, queries, 5), generator=generator)
    mask_logits = 3 * torch.randn((number, batch, queries, 16, 24), generator=generator)
    return class_logits, mask_logits


def packed(given: dict[str, list[torch.Tensor]]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Labels as the loss takes them."""
    return [pack_masks(masks) for masks in given["mask_labels"]], given["class_labels"]


def run(class_logits, mask_logits, mask_labels, class_labels, seed: int = 0, **changes) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    given = packed({"mask_labels": mask_labels, "class_labels": class_labels})
    return criterion(**changes)(class_logits, *as_products(mask_logits), *given)


@pytest.fixture
def points_inside(monkeypatch):
    """Random points away from the border, where bilinear sampling mixes in zeros."""
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: 0.25 + 0.5 * rand(*size, **kwargs))


def test_terms_on_a_known_match(points_inside):
    """One object, masks that are constant: no randomness is left, and the formulas can be worked out."""
    class_logits = torch.zeros(1, 1, 3, 5)
    class_logits[0, 0, 1, 2] = 4.0
    mask_logits = torch.full((1, 1, 3, 8, 8), -2.0)
    mask_logits[0, 0, 1] = 1.5
    given = [torch.ones(1, 32, 32, dtype=torch.uint8)], [torch.tensor([2])]
    terms = run(class_logits, mask_logits, *given)
    bce = nn.functional.softplus(torch.tensor(-1.5))
    p = torch.tensor(1.5).sigmoid() * 400
    torch.testing.assert_close(terms["loss_mask"], bce)
    torch.testing.assert_close(terms["loss_dice"], 1 - (2 * p + 1) / (p + 400 + 1))
    weight = torch.tensor([1.0, 1, 1, 1, 0.1])
    expected = nn.functional.cross_entropy(class_logits[0, 0], torch.tensor([4, 2, 4]), weight=weight)
    torch.testing.assert_close(terms["loss_cross_entropy"], expected)


def test_matching_finds_the_right_queries():
    given = labels((3, 2), 64, 96)
    class_logits, mask_logits = predictions(number=3)
    wanted = [torch.tensor([4, 0, 6]), torch.tensor([1, 5])]
    for i, queries in enumerate(wanted):
        small = nn.functional.interpolate(given["mask_labels"][i].float()[None], size=(16, 24), mode="area")[0]
        mask_logits[:, i] = -8
        mask_logits[:, i, queries] = 16 * small - 8
        class_logits[:, i, queries, given["class_labels"][i]] += 5
    loss = criterion()
    matches = loss.match(class_logits, *as_products(mask_logits), *packed(given), torch.ones(2, 2))
    for queries, match in zip(wanted, matches, strict=True):
        for prediction in range(3):
            of_prediction = match[1:, match[0] == prediction]
            order = of_prediction[1].argsort()
            assert of_prediction[0][order].tolist() == queries.tolist()


def test_all_predictions_at_once_equal_one_at_a_time(points_inside):
    """With constant masks the random points do not matter, so each prediction's terms must be its own."""
    class_logits, _ = predictions(number=3)
    mask_logits = torch.randn(3, 2, 7, 1, 1).expand(3, 2, 7, 16, 24).contiguous()
    given = [torch.ones(2, 64, 96, dtype=torch.uint8)] * 2, [torch.tensor([0, 3])] * 2
    together = run(class_logits, mask_logits, *given)
    for i, suffix in enumerate(("_0", "_1", "")):
        alone = run(class_logits[i : i + 1], mask_logits[i : i + 1], *given)
        for name, value in alone.items():
            torch.testing.assert_close(together[name + suffix], value)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_predictions_on_void_pixels_change_nothing(dtype):
    given = labels((3, 2), 64, 96)
    given["mask_labels"] = [masks.to(dtype) for masks in given["mask_labels"]]
    for masks in given["mask_labels"]:
        masks[:, :, 40:72] = 255
    class_logits, mask_logits = predictions()
    changed = mask_logits.clone()
    changed[..., 11:17] += 50  # columns 11 to 16 of 24 touch only void columns 40 to 71 of 96 when resized
    settings = {"importance_sample_ratio": 0.0}  # uncertain points are chosen by prediction, void or not
    before = run(class_logits, mask_logits, *given.values(), **settings)
    after = run(class_logits, changed, *given.values(), **settings)
    for name, value in before.items():
        torch.testing.assert_close(after[name], value)


def test_void_is_neither_object_nor_background():
    class_logits, mask_logits = predictions(number=1, batch=1)
    masks = labels((2,), 64, 96)["mask_labels"]
    classes = [torch.tensor([1, 2])]
    results = {}
    for value in (0, 1, 255):
        masks[0][:, 20:44] = value
        results[value] = run(class_logits, mask_logits, masks, classes)["loss_mask"].item()
    assert len(set(results.values())) == 3


def test_no_objects():
    class_logits, mask_logits = (x.requires_grad_() for x in predictions())
    nothing = labels((0, 0))
    terms = run(class_logits, mask_logits, *nothing.values())
    assert terms["loss_mask"] == terms["loss_dice"] == 0 and terms["loss_cross_entropy"] > 0
    sum(terms.values()).backward()
    assert mask_logits.grad.abs().max() == 0


def test_an_image_without_objects_beside_one_with():
    terms = run(*predictions(), *labels((0, 2)).values())
    assert all(value.isfinite() for value in terms.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_predictions_do_not_stop_the_matching(bad, monkeypatch, caplog):
    class_logits, mask_logits = predictions()
    embeddings, features = as_products(mask_logits)
    embeddings[:, :, 3] = bad
    class_logits[:, :, 3] = bad
    given = packed(labels((3, 1)))
    loss = criterion()
    monkeypatch.setattr(logging.getLogger("proscale_hf.losses.matching"), "propagate", True)
    for step in (1, 2):
        matches = loss.match(class_logits, embeddings, features, *given, torch.ones(2, 2))
        assert all(3 not in match[1] for match in matches)
        assert [match.shape[1] for match in matches] == [2 * 3, 2 * 1]
        assert loss.non_finite_costs == step * 2 * (3 + 1)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "8 of 56 matching costs are NaN or infinite"
    ]


def test_costs_that_are_not_numbers_are_replaced():
    costs = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0])
    matcher = Matcher([], num_labels=4)
    matcher.replace_non_finite(costs)
    assert costs.tolist() == [1.0, UNMATCHABLE, UNMATCHABLE, UNMATCHABLE, -2.0]
    assert matcher.non_finite_costs == 3


def test_healthy_costs_are_not_reported(caplog):
    loss = criterion()
    class_logits, mask_logits = predictions()
    loss(class_logits, *as_products(mask_logits), *packed(labels()))
    assert loss.non_finite_costs == 0 and not caplog.records


class HostReads(TorchDispatchMode):
    """Operations that wait for the device because their result's value or shape is needed on the host."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.", "is_nonzero", "repeat_interleave")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if any(name in str(function) for name in self.NAMES):
            self.seen.append(str(function))
        return function(*arguments, **(options or {}))


def test_one_transfer_to_the_host_in_a_step(monkeypatch):
    """Before and after it nothing needs the host; in between everything is on the host."""
    events = []
    to_host = torch.Tensor.cpu
    match = UniversalSegmentationLoss.match

    def counted_transfer(tensor):
        events.append(f"transfer after {reads.seen}")
        return to_host(tensor)

    def counted_match(*arguments):
        matches = match(*arguments)
        reads.seen.clear()
        return matches

    monkeypatch.setattr(torch.Tensor, "cpu", counted_transfer)
    monkeypatch.setattr(UniversalSegmentationLoss, "match", counted_match)
    class_logits, mask_logits = (logits.requires_grad_() for logits in predictions())
    given = packed(labels((3, 2)))
    with HostReads() as reads:
        sum(criterion()(class_logits, *as_products(mask_logits), *given).values()).backward()
    assert events == ["transfer after []"]
    assert reads.seen == []


def test_each_cost_has_its_own_weight():
    """Twice a weight adds that cost once more: what is left is each cost by itself, and they all differ."""
    class_logits, mask_logits = predictions(number=1, batch=1)
    given = labels((3,), 64, 96)

    def cost(**weights):
        torch.manual_seed(0)
        loss = criterion(**{"class_weight": 1.0, "mask_weight": 1.0, "dice_weight": 1.0, **weights})
        (planes,), (classes,) = packed(given)
        embeddings, features = as_products(mask_logits)
        return loss.matcher.cost(
            ImagePredictions(class_logits[:, 0], embeddings[:, 0], features[0]),
            ImageObjects(classes, planes, torch.ones(2)),
        )

    parts = {name: cost(**{name: 2.0}) - cost() for name in ("class_weight", "mask_weight", "dice_weight")}
    probabilities = class_logits[:, 0].softmax(-1)[..., given["class_labels"][0]]
    torch.testing.assert_close(parts["class_weight"], -probabilities, rtol=1e-3, atol=1e-4)
    assert parts["dice_weight"].max() <= 1
    assert parts["mask_weight"].max() > 1.1  # a wrong logit costs more than a dice loss can
    torch.testing.assert_close(sum(parts.values()), cost(), rtol=1e-3, atol=1e-3)


def test_the_mean_is_over_the_points_that_count(points_inside):
    """Constant predictions cost the same per point, however many points are void."""
    class_logits, _ = predictions(number=1, batch=1)
    mask_logits = torch.full((1, 1, 7, 16, 24), 0.7)
    masks = torch.zeros(1, 64, 96, dtype=torch.uint8)
    clean = run(class_logits, mask_logits, [masks], [torch.tensor([1])])["loss_mask"]
    masks[:, :, :48] = 255
    torch.testing.assert_close(run(class_logits, mask_logits, [masks], [torch.tensor([1])])["loss_mask"], clean)


def test_losses_are_computed_in_float32_under_autocast(monkeypatch):
    """Masks are bfloat16 products then; what is computed from them is not."""
    seen = []

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*arguments):
            first = next(a for a in arguments if isinstance(a, torch.Tensor | ImagePredictions))
            dtype = (first if isinstance(first, torch.Tensor) else first.class_logits).dtype
            seen.append((torch.is_autocast_enabled("cpu"), dtype))
            return function(*arguments)

        monkeypatch.setattr(owner, name, recorded)

    record(Matcher, "cost")  # its class logits
    record(UniversalSegmentationLoss, "class_loss")
    record(matching, "sample_shared")
    record(mask_losses, "sample_shared")
    record(mask_losses, "point_losses")
    class_logits, mask_logits = (logits.bfloat16() for logits in predictions())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = run(class_logits, mask_logits, *labels().values())
    assert seen and set(seen) == {(False, torch.float32)}
    assert all(value.dtype == torch.float32 for value in terms.values())


@pytest.mark.parametrize(("processes", "masks", "weight"), [(1, 4, 2.5), (2, 5, 4.25), (4, 2.5, 2.125)])
def test_totals_are_summed_over_processes(monkeypatch, processes, masks, weight):
    """In this process 4 masks and a weight of 2.5; 6 of each in the others together."""
    reductions = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: reductions.append(tensor.add_(6)))
    num_masks, total_weight = totals_per_process(4, torch.tensor([2.5, 2.5]))
    assert num_masks == masks and total_weight.tolist() == [weight] * 2
    assert len(reductions) == (processes > 1)


@pytest.mark.parametrize("processes", [1, 8])
def test_there_is_always_something_to_divide_by(monkeypatch, processes):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: processes > 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: processes)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    num_masks, total_weight = totals_per_process(0, torch.zeros(2))
    assert num_masks == 1 / processes and (total_weight > 0).all()


def test_no_objects_and_no_weight_for_no_object():
    terms = run(*predictions(), *labels((0, 0)).values(), no_object_weight=0.0)
    assert terms["loss_cross_entropy"] == 0


def test_integers_of_any_type_are_classes():
    arguments = (*predictions(), labels()["mask_labels"])
    expected = run(*arguments, labels()["class_labels"])
    for dtype in (torch.int32, torch.uint8):
        torch.testing.assert_close(run(*arguments, [c.to(dtype) for c in labels()["class_labels"]]), expected)


@pytest.mark.parametrize(("classes", "wrong"), [([0, 4], r"\[4\]"), ([-1, 7], r"\[-1, 7\]")])
def test_classes_that_the_model_does_not_have_are_refused(classes, wrong):
    given = labels((2, 2))["mask_labels"], [torch.tensor([0, 3]), torch.tensor(classes)]
    with pytest.raises(ValueError, match=f"{wrong}.*classes 0 to 3"):
        run(*predictions(), *given)


def test_points_are_drawn_in_the_part_that_is_image():
    loss = criterion(importance_sample_ratio=0.75, oversample_ratio=3.0)
    masks = torch.ones(2, 8, 8, dtype=torch.uint8)
    points = loss.draw_points(pack_masks(masks), 2, torch.tensor([1.0, 0.5]))
    assert (points.uncertain, points.others) == (300, 100)
    assert points.positions.shape == (1300, 2) and points.inside.shape == (2, 1300)
    x, y = points.positions.unbind(-1)
    assert 0.45 < x.max() <= 0.5 and 0.9 < y.max() <= 1
    assert points.counted.all()
