"""Post-processing: against recorded results of the original, and a plain reference on random inputs."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional

from paths import FIXTURES, ROOT
from proscale_hf.processing import postprocessing
from proscale_hf.processing.postprocessing import instance_segmentation, panoptic_segmentation, semantic_segmentation


RECORDED = ("coco_like", "swin", "r50")
# (height, width) of mask logits, padded batch, image in it, target
GEOMETRIES = [
    ((8, 12), (32, 48), (32, 48), (32, 48)),
    ((8, 12), (32, 48), (27, 41), (27, 41)),
    ((8, 12), (32, 48), (1, 48), (3, 100)),
    ((8, 12), (32, 48), (20, 7), (61, 22)),
    ((16, 8), (64, 32), (64, 20), (17, 5)),
    ((8, 8), (32, 32), (32, 1), (1, 1)),
    ((24, 40), (96, 160), (90, 150), (241, 403)),
]


def recorded(name):
    """Inputs, keyword arguments and expectations of a set recorded from the original."""
    folder = FIXTURES / f"postprocess_{name}"
    settings = json.loads((folder / "expected.json").read_text())
    arrays = dict(np.load(folder / "expected.npz"))
    images = settings["images"]
    logits = [torch.from_numpy(arrays[key]) for key in ("class_queries_logits", "masks_queries_logits")]
    sizes = {
        "padded_size": tuple(settings["padded_size"]),
        "image_sizes": [tuple(image["size"]) for image in images],
        "target_sizes": [tuple(image["target_size"]) for image in images],
    }
    return logits, sizes, settings, arrays


def random_case(geometry, seed=0, queries=9, labels=5, batch=2):
    """Smooth masks and confident classes, so that segments exist, overlap and get fused."""
    logit_size, padded_size, image_size, target_size = geometry
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, queries, 4, 5, generator=generator) * 6
    masks = functional.interpolate(coarse, size=logit_size, mode="bicubic", align_corners=False)
    classes = torch.randn(batch, queries, labels + 1, generator=generator) * 4
    sizes = {
        "padded_size": padded_size,
        "image_sizes": [image_size] * batch,
        "target_sizes": [target_size] * batch,
    }
    return (classes, masks), sizes


def reference_masks(masks, padded_size, image_size, target_size):
    masks = functional.interpolate(masks[None], size=padded_size, mode="bilinear", align_corners=False)
    masks = masks[..., : image_size[0], : image_size[1]]
    return functional.interpolate(masks, size=target_size, mode="bilinear", align_corners=False)[0]


def reference_panoptic(class_logits, masks, stuff, object_mask_threshold, overlap_threshold):
    scores, labels = class_logits.softmax(-1).max(-1)
    kept = (labels != class_logits.shape[-1] - 1) & (scores > object_mask_threshold)
    scores, labels, probabilities = scores[kept], labels[kept], masks.sigmoid()[kept]
    segmentation = torch.zeros(masks.shape[1:], dtype=torch.int32)
    segments, fused = [], {}
    if len(scores) == 0:
        return segmentation, segments
    winner = (scores[:, None, None] * probabilities).argmax(0)
    for query, label in enumerate(labels.tolist()):
        inside = probabilities[query] >= 0.5
        won = winner == query
        final = won & inside
        if won.sum() == 0 or inside.sum() == 0 or final.sum() == 0:
            continue
        if won.sum().item() / inside.sum().item() < overlap_threshold:
            continue
        if label in fused:
            segmentation[final] = fused[label]
            continue
        segment_id = len(segments) + 1
        if label in stuff:
            fused[label] = segment_id
        segmentation[final] = segment_id
        segments.append((segment_id, label, label in stuff, scores[query].item()))
    return segmentation, segments


def listed(segments_info):
    return [(info["id"], info["label_id"], info["was_fused"]) for info in segments_info]


@pytest.mark.parametrize("name", RECORDED)
def test_panoptic_equals_the_original(name):
    logits, sizes, settings, arrays = recorded(name)
    things = settings["thing_classes"]
    results = panoptic_segmentation(
        *logits,
        **sizes,
        label_ids_to_fuse=set(range(settings["num_labels"])) - set(things),
        object_mask_threshold=settings["object_mask_threshold"],
        overlap_threshold=settings["overlap_threshold"],
    )
    for index, (result, image) in enumerate(zip(results, settings["images"], strict=True)):
        expected = [(s["id"], s["category_id"], not s["isthing"]) for s in image["segments_info"]]
        assert listed(result["segments_info"]) == expected
        equal = result["segmentation"].numpy() == arrays[f"panoptic_seg_{index}"]
        assert equal.mean() >= 0.999


@pytest.mark.parametrize("name", RECORDED)
def test_semantic_equals_the_original(name):
    logits, sizes, _, arrays = recorded(name)
    for index, label_map in enumerate(semantic_segmentation(*logits, **sizes)):
        assert (label_map.numpy() == arrays[f"sem_seg_argmax_{index}"]).mean() >= 0.999


@pytest.mark.parametrize("name", RECORDED)
def test_instances_equal_the_original(name):
    logits, sizes, settings, arrays = recorded(name)
    results = instance_segmentation(
        *logits, **sizes, thing_label_ids=settings["thing_classes"], top_k=settings["top_k"]
    )
    for index, (result, size) in enumerate(zip(results, sizes["target_sizes"], strict=True)):
        scores = arrays[f"instance_scores_{index}"]
        order = np.argsort(-scores, kind="stable")
        masks = np.unpackbits(arrays[f"instance_masks_{index}"], axis=-1, count=size[1])
        np.testing.assert_allclose(result["scores"].numpy(), scores[order], rtol=1e-4)
        assert result["labels"].tolist() == arrays[f"instance_classes_{index}"][order].tolist()
        found = result["masks"].stacked()
        assert found.shape == masks.shape
        assert masks.size == 0 or (found.numpy() == masks[order]).mean() >= 0.999


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(4))
def test_panoptic_equals_a_plain_implementation(geometry, seed):
    logits, sizes = random_case(geometry, seed)
    results = panoptic_segmentation(
        *logits, **sizes, label_ids_to_fuse=[0, 1], object_mask_threshold=0.3, overlap_threshold=0.4
    )
    for class_logits, masks, result in zip(*logits, results, strict=True):
        full = reference_masks(masks, *geometry[1:])
        segmentation, segments = reference_panoptic(class_logits, full, {0, 1}, 0.3, 0.4)
        assert listed(result["segments_info"]) == [segment[:3] for segment in segments]
        scores = [info["score"] for info in result["segments_info"]]
        assert scores == pytest.approx([segment[3] for segment in segments])
        assert result["segmentation"].dtype == torch.int32
        assert result["segmentation"].shape == geometry[3]
        assert (result["segmentation"] == segmentation).float().mean() >= 0.999


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_semantic_equals_a_plain_implementation(geometry):
    logits, sizes = random_case(geometry)
    results = semantic_segmentation(*logits, **sizes, return_scores=True)
    for class_logits, masks, (label_map, scores) in zip(*logits, results, strict=True):
        full = reference_masks(masks, *geometry[1:])
        expected = torch.einsum("qc,qhw->chw", class_logits.softmax(-1)[:, :-1], full.sigmoid())
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
        assert label_map.dtype == torch.int64
        assert label_map.shape == geometry[3]
        assert (label_map == expected.argmax(0)).float().mean() >= 0.999


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("top_k", [4, 1000])
def test_instances_equal_a_plain_implementation(geometry, top_k):
    logits, sizes = random_case(geometry)
    results = instance_segmentation(*logits, **sizes, thing_label_ids=[4, 2, 3], top_k=top_k)
    for class_logits, masks, result in zip(*logits, results, strict=True):
        full = reference_masks(masks, *geometry[1:])
        probabilities = class_logits.softmax(-1)[:, :-1].flatten()
        top = probabilities.argsort(descending=True)[:top_k]
        expected = []
        for pair in top.tolist():
            query, label = divmod(pair, 5)
            inside = full[query] > 0
            quality = full[query].sigmoid()[inside].sum() / (inside.sum() + 1e-6)
            if label in (2, 3, 4):
                expected.append(((probabilities[pair] * quality).item(), label, inside))
        expected.sort(key=lambda item: -item[0])
        assert result["scores"].dtype == torch.float32
        assert result["labels"].dtype == torch.int64
        assert result["scores"].tolist() == pytest.approx([item[0] for item in expected], rel=1e-4)
        found = [item for item in expected if item[0] > 0]  # the order of empty ones is open
        assert result["labels"].tolist()[: len(found)] == [item[1] for item in found]
        if found:
            wanted = torch.stack([item[2] for item in found])
            assert (result["masks"].stacked()[: len(found)] == wanted).float().mean() >= 0.999


@pytest.mark.parametrize("task", ["panoptic", "semantic", "instance"])
def test_strips_change_nothing(task, monkeypatch):
    geometry = GEOMETRIES[-1]
    logits, sizes = random_case(geometry)

    def compute():
        if task == "panoptic":
            results = panoptic_segmentation(*logits, **sizes, label_ids_to_fuse=[0], object_mask_threshold=0.3)
            return [result["segmentation"] for result in results]
        if task == "semantic":
            return semantic_segmentation(*logits, **sizes)
        return [result["masks"].stacked() for result in instance_segmentation(*logits, **sizes, thing_label_ids=[1, 2])]

    whole = compute()
    monkeypatch.setattr(postprocessing, "STRIP_VALUES", 1)  # one row at a time
    for expected, result in zip(whole, compute(), strict=True):
        assert (expected == result).float().mean() >= 0.999


def test_images_do_not_depend_on_the_batch():
    logits, _ = random_case(GEOMETRIES[0], batch=3)
    sizes = {"image_sizes": [(20, 48), (32, 30), (9, 9)], "target_sizes": [(7, 9), (64, 60), (31, 13)]}
    together = panoptic_segmentation(
        *logits, padded_size=(32, 48), **sizes, label_ids_to_fuse=[0], object_mask_threshold=0.3
    )
    for index, result in enumerate(together):
        alone = panoptic_segmentation(
            *(part[index : index + 1] for part in logits),
            padded_size=(32, 48),
            **{name: torch.tensor(values[index : index + 1]) for name, values in sizes.items()},
            label_ids_to_fuse=[0],
            object_mask_threshold=0.3,
        )[0]
        assert torch.equal(result["segmentation"], alone["segmentation"])
        assert result["segments_info"] == alone["segments_info"]


def painted(boxes, labels, scores, size=(16, 16), num_labels=4):
    """Sure masks in boxes (top, left, bottom, right) at full resolution, one per query."""
    masks = torch.full((1, len(boxes), *size), -20.0)
    for mask, (top, left, bottom, right) in zip(masks[0], boxes, strict=True):
        mask[top:bottom, left:right] = 20.0
    probabilities = torch.zeros(1, len(boxes), num_labels + 1)
    probabilities[0, range(len(boxes)), labels] = torch.tensor(scores)
    probabilities[..., -1] = 1 - probabilities.sum(-1)
    return probabilities.log(), masks


def simple_panoptic(logits, **options):
    size = tuple(logits[1].shape[-2:])
    return panoptic_segmentation(*logits, padded_size=size, image_sizes=[size], target_sizes=[size], **options)[0]


def test_no_segment_id_is_used_twice():
    # stuff, thing, the same stuff, thing: transformers' version gives the last thing the first thing's id
    boxes = [(0, 0, 4, 16), (4, 0, 8, 16), (8, 0, 12, 16), (12, 0, 16, 16)]
    result = simple_panoptic(painted(boxes, [3, 0, 3, 1], [0.9, 0.95, 0.85, 0.9]), label_ids_to_fuse=[3])
    assert listed(result["segments_info"]) == [(1, 3, True), (2, 0, False), (3, 1, False)]
    assert result["segments_info"][0]["score"] == pytest.approx(0.9)
    assert result["segmentation"][::4, 0].tolist() == [1, 2, 1, 3]


def test_pixels_outside_every_mask_stay_void():
    # the best query still wins the lower half, with a mask probability below one half
    logits = painted([(0, 0, 8, 16)], [0], [0.95])
    assert simple_panoptic(logits, label_ids_to_fuse=[])["segmentation"].unique().tolist() == [0, 1]
    assert (simple_panoptic(logits, label_ids_to_fuse=[])["segmentation"][8:] == 0).all()


def test_mask_area_is_measured_before_weighting():
    # mask probability 0.55 times score 0.85 is below one half; the area must still count
    classes, masks = painted([(0, 0, 16, 16)], [0], [0.85])
    masks[:] = 0.2
    result = simple_panoptic((classes, masks), label_ids_to_fuse=[])
    assert (result["segmentation"] == 1).all()


def test_overlapped_segments_are_dropped():
    # the second query keeps half of its mask: dropped at 0.8, kept at 0.5 (the threshold itself passes)
    logits = painted([(0, 0, 8, 16), (0, 0, 16, 16)], [0, 1], [0.95, 0.9])
    dropped = simple_panoptic(logits, label_ids_to_fuse=[], overlap_threshold=0.8)
    assert listed(dropped["segments_info"]) == [(1, 0, False)]
    assert (dropped["segmentation"][8:] == 0).all()
    kept = simple_panoptic(logits, label_ids_to_fuse=[], overlap_threshold=0.5)
    assert listed(kept["segments_info"]) == [(1, 0, False), (2, 1, False)]


def test_padding_is_cropped():
    # an object in the right half of the padded batch, which for a narrow image is all padding
    logits = painted([(0, 0, 16, 8), (0, 8, 16, 16)], [0, 1], [0.9, 0.9])
    sizes = {"padded_size": (16, 16), "image_sizes": [(16, 8)], "target_sizes": [(32, 16)]}
    result = panoptic_segmentation(*logits, **sizes, label_ids_to_fuse=[])[0]
    assert listed(result["segments_info"]) == [(1, 0, False)]
    assert (result["segmentation"] == 1).all()
    assert (semantic_segmentation(*logits, **sizes)[0] == 0).all()
    instances = instance_segmentation(*logits, **sizes, thing_label_ids=[0, 1], score_threshold=0.5)[0]
    assert instances["labels"].tolist() == [0]


def test_top_k_comes_before_the_thing_filter():
    logits = painted([(0, 0, 8, 8), (8, 8, 16, 16)], [3, 0], [0.95, 0.9])
    sizes = {"padded_size": (16, 16), "image_sizes": [(16, 16)], "target_sizes": [(16, 16)]}
    assert instance_segmentation(*logits, **sizes, thing_label_ids=[0], top_k=1)[0]["labels"].tolist() == []
    assert instance_segmentation(*logits, **sizes, thing_label_ids=[0], top_k=2)[0]["labels"].tolist() == [0]


def test_one_query_can_be_several_instances():
    logits = painted([(0, 0, 8, 8)], [0], [0.5])
    logits[0][0, 0, 1] = logits[0][0, 0, 0] - 1
    sizes = {"padded_size": (16, 16), "image_sizes": [(16, 16)], "target_sizes": [(16, 16)]}
    result = instance_segmentation(*logits, **sizes, thing_label_ids=[0, 1], score_threshold=0.01)[0]
    assert result["labels"].tolist() == [0, 1]
    assert torch.equal(result["masks"][0], result["masks"][1])


def test_score_threshold_keeps_the_same_instances():
    logits, sizes = random_case(GEOMETRIES[1])
    everything = instance_segmentation(*logits, **sizes, thing_label_ids=range(5))
    some = instance_segmentation(*logits, **sizes, thing_label_ids=range(5), score_threshold=0.4)
    for all_of_image, some_of_image in zip(everything, some, strict=True):
        above = all_of_image["scores"] >= 0.4
        assert 0 < above.sum() < len(above)
        for name in ("scores", "labels"):
            assert torch.equal(some_of_image[name], all_of_image[name][above])
        assert torch.equal(some_of_image["masks"].stacked(), all_of_image["masks"].stacked()[above])


def test_empty_results_keep_types_and_shapes():
    logits, sizes = random_case(GEOMETRIES[3])
    logits[0][..., :-1] = -30.0
    for result in panoptic_segmentation(*logits, **sizes, label_ids_to_fuse=[0]):
        assert result["segmentation"].dtype == torch.int32
        assert result["segmentation"].shape == (61, 22)
        assert (result["segmentation"] == 0).all()
        assert result["segments_info"] == []
    for result in instance_segmentation(*logits, **sizes, thing_label_ids=[]):
        assert result["masks"].stacked().dtype == torch.bool
        assert result["masks"].stacked().shape == (0, 61, 22)
        assert result["scores"].dtype == torch.float32
        assert result["labels"].dtype == torch.int64
        assert len(result["scores"]) == len(result["labels"]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, sizes = random_case(GEOMETRIES[-1])
    logits = [part.to(dtype) for part in logits]
    options = {"label_ids_to_fuse": [0], "object_mask_threshold": 0.3, **sizes}
    expected = panoptic_segmentation(*(part.float() for part in logits), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = panoptic_segmentation(*logits, **options)
    for result, wanted in zip(results, expected, strict=True):
        assert result["segments_info"] == wanted["segments_info"]
        assert torch.equal(result["segmentation"], wanted["segmentation"])


def test_infinite_logits_do_not_spread():
    logits = painted([(0, 0, 8, 16)], [0], [0.95])
    logits[1][logits[1] > 0] = float("inf")
    logits[1][logits[1] < 0] = float("-inf")
    logits[0][0, 0, 0] = float("inf")
    segmentation = simple_panoptic(logits, label_ids_to_fuse=[])["segmentation"]
    assert (segmentation[:8] == 1).all()
    assert (segmentation[8:] == 0).all()


def test_gradients_are_not_tracked_and_inputs_not_changed():
    logits, sizes = random_case(GEOMETRIES[0])
    logits = [part.requires_grad_() for part in logits]
    copies = [part.detach().clone() for part in logits]
    semantic_segmentation(*logits, **sizes)
    panoptic_segmentation(*logits, **sizes, label_ids_to_fuse=[], object_mask_threshold=0.1)
    scores = instance_segmentation(*logits, **sizes, thing_label_ids=[0, 1])[0]["scores"]
    assert not scores.requires_grad
    for part, copy in zip(logits, copies, strict=True):
        assert torch.equal(part, copy)


@pytest.mark.parametrize("which", [0, 1])
def test_nan_is_one_clear_error(which):
    logits, sizes = random_case(GEOMETRIES[0])
    logits[which][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"NaN.*weights"):
        semantic_segmentation(*logits, **sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_sizes": [(4, 4)]}, "target_sizes has 1 entries for a batch of 2"),
        ({"image_sizes": torch.tensor([[4, 4]])}, "image_sizes has 1 entries"),
        ({"image_sizes": [(32, 48), (33, 48)]}, r"image size \(33, 48\) does not fit"),
        ({"target_sizes": [(4, 4), (0, 4)]}, "at least 1 x 1"),
    ],
)
def test_impossible_sizes_are_errors(changes, message):
    logits, sizes = random_case(GEOMETRIES[0])
    with pytest.raises(ValueError, match=message):
        semantic_segmentation(*logits, **{**sizes, **changes})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_agrees():
    logits, sizes = random_case(GEOMETRIES[-1])
    options = {"label_ids_to_fuse": [0], "object_mask_threshold": 0.3, **sizes}
    expected = panoptic_segmentation(*logits, **options)
    results = panoptic_segmentation(*(part.cuda() for part in logits), **options)
    for result, wanted in zip(results, expected, strict=True):
        assert result["segmentation"].is_cuda
        assert listed(result["segments_info"]) == listed(wanted["segments_info"])
        assert (result["segmentation"].cpu() == wanted["segmentation"]).float().mean() >= 0.999


MEASURE = """
import resource, sys, torch
from proscale_hf.processing.postprocessing import *
from proscale_hf.processing.run_length import run_lengths
torch.set_num_threads(1)
generator = torch.Generator().manual_seed(0)
classes = torch.randn(1, 100, 134, generator=generator) * 0.1
classes[0, range(100), range(100)] += 15  # every query is a sure object of another class
masks = torch.nn.functional.interpolate(torch.randn(1, 100, 6, 12, generator=generator), size=(192, 336))
call = {
    "panoptic": lambda **sizes: panoptic_segmentation(
        classes, masks, **sizes, label_ids_to_fuse=range(80, 133), overlap_threshold=0.0),
    "semantic": lambda **sizes: semantic_segmentation(classes, masks, **sizes),
    "instance": lambda **sizes: [run_lengths(mask.numpy().view("u1")) for image in instance_segmentation(
        classes, masks, **sizes, thing_label_ids=range(25)) for mask in image["masks"]],
}[sys.argv[1]]
sizes = {"padded_size": (768, 1344), "image_sizes": [(750, 1333)]}
call(**sizes, target_sizes=[(20, 30)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = call(**sizes, target_sizes=[(2160, 3840)])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("task", "limit"), [("panoptic", 1.5e9), ("semantic", 1.5e9), ("instance", 3e8)])
def test_memory_at_4k_is_bounded(task, limit):
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, task],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(process.stdout) * unit < limit


OVERLAY = """
import resource, torch
from PIL import Image
from proscale_hf.processing.postprocessing import panoptic_segmentation
from proscale_hf.visualization import draw_segments, segments_from_result
classes = torch.full((1, 4, 5), -10.0)
classes[0, range(4), range(4)] = 10
masks = torch.full((1, 4, 64, 64), -10.0)
for i in range(4):
    masks[0, i, 16 * i : 16 * (i + 1)] = 10
sizes = {"padded_size": (256, 256), "image_sizes": [(256, 256)]}
def draw(side):
    image = Image.new("RGB", (side, side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    [result] = panoptic_segmentation(classes, masks, **sizes, target_sizes=[(side, side)], label_ids_to_fuse=[])
    draw_segments(image, segments_from_result(result, dict(enumerate("abcd"))))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
draw(64)
print(draw(7000))
"""


@pytest.mark.slow
def test_memory_of_a_large_map_and_its_overlay_is_what_the_guide_says():
    process = subprocess.run([sys.executable, "-c", OVERLAY], capture_output=True, text=True, check=True, cwd=ROOT)
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(process.stdout) * unit < 4 * 7000**2 + 6e8
