"""Checks of converted models: they pass for a right one, and name the first wrong stage of a broken one."""

import copy
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers import tiny_model
from parity_sets import FIXTURE, recorded_sets
from paths import ROOT
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli.loading import load_model
from proscale_hf.convert import ConversionError
from proscale_hf.convert.detectron2 import convert_checkpoint
from proscale_hf.convert.verification import compare_with_recorded, report_on_image


SETS = recorded_sets()
STAGES = [
    "backbone.res3",
    "backbone.res4",
    "backbone.res5",
    "multi_scale_features.0",
    "multi_scale_features.1",
    "multi_scale_features.2",
    "mask_features",
    "aux.0.class_queries_logits",
    "aux.0.masks_queries_logits",
    "class_queries_logits",
    "masks_queries_logits",
]


@cache
def converted(folder: Path = FIXTURE):
    return convert_checkpoint(folder / "config.yaml", folder / "model_final.pth")


def stages_of(table: str) -> list[str]:
    """The first column, without the header and the lines of text behind the table."""
    return [line.split()[0] for line in table.splitlines()[1:] if " x " in line]


@pytest.fixture
def recorded(tmp_path):
    """A function that writes the recorded tensors, some of them changed (None: left out), and gives the path."""

    def write(**changes):
        tensors = load_file(FIXTURE / "expected.safetensors") | {
            name.replace("__", "."): tensor for name, tensor in changes.items()
        }
        path = tmp_path / "recorded.safetensors"
        save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
        return path

    return write


@pytest.mark.parametrize("folder", SETS, ids=lambda path: path.name)
def test_recorded_sets_agree(folder):
    table = compare_with_recorded(*converted(folder), folder / "expected.safetensors", tolerance=1e-4)
    assert "all agree" in table
    stages = [stage for stage in stages_of(table) if stage in STAGES]
    assert stages == STAGES  # all of them, in the order of computation


def test_threads_do_not_change_the_comparison():
    """With four a pixel of an attention mask turns on some processors, and the last stage departs by 0.005."""
    before = torch.get_num_threads()
    tables = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            tables.append(compare_with_recorded(*converted(), FIXTURE / "expected.safetensors"))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert tables[0] == tables[1]


@pytest.mark.parametrize(
    ("weight", "stage"),
    [
        ("model.pixel_level_module.encoder.encoder.stages.1.layers.0.layer.0.convolution.weight", "backbone.res3"),
        ("model.pixel_level_module.encoder.encoder.stages.3.layers.0.layer.2.convolution.weight", "backbone.res5"),
        ("model.pixel_level_module.decoder.encoder.layers.0.self_attn.value_proj.weight", "multi_scale_features.0"),
        ("model.pixel_level_module.decoder.mask_projection.weight", "mask_features"),
        ("class_predictor.weight", "aux.0.class_queries_logits"),
        ("model.transformer_module.decoder.layernorm.weight", "aux.0.class_queries_logits"),
        (
            "model.transformer_module.decoder.mask_predictor.mask_embedder.2.0.weight",
            "aux.0.masks_queries_logits",
        ),
        ("model.transformer_module.decoder.layers.2.fc1.weight", "class_queries_logits"),
    ],
)
def test_first_wrong_stage_is_named(weight, stage):
    model, processor = converted()
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.get_parameter(weight).mul_(1.01)
    with pytest.raises(ConversionError, match=rf"departs .* at {stage}: error \S+, tolerance 0.0001") as error:
        compare_with_recorded(model, processor, FIXTURE / "expected.safetensors")
    agree = str(error.value).partition("; ")[2].removesuffix(" agree.")
    assert agree == ", ".join(STAGES[: STAGES.index(stage)])


def test_tolerance_is_obeyed_both_ways(recorded):
    scaled = load_file(FIXTURE / "expected.safetensors")["mask_features"] * 1.001
    path = recorded(mask_features=scaled)
    with pytest.raises(ConversionError, match=r"at mask_features: error 0\.001, tolerance 0\.0005"):
        compare_with_recorded(*converted(), path, tolerance=5e-4)
    assert "1.0e-03" in compare_with_recorded(*converted(), path, tolerance=2e-3)


def test_numbers_that_are_none_depart(recorded):
    features = load_file(FIXTURE / "expected.safetensors")["mask_features"]
    features[0, 0, 0, 0] = float("nan")
    with pytest.raises(ConversionError, match="at mask_features: error nan"):
        compare_with_recorded(*converted(), recorded(mask_features=features))


def test_some_stages_are_enough(recorded):
    keep = ("pixel_values", "mask_features", "masks_queries_logits")
    others = {name: None for name in load_file(FIXTURE / "expected.safetensors") if name not in keep}
    table = compare_with_recorded(*converted(), recorded(**others))
    assert stages_of(table) == ["mask_features", "masks_queries_logits"]


def test_image_processor_is_checked_where_the_pictures_are_recorded(recorded):
    model, processor = converted()
    images = [np.asarray(Image.open(FIXTURE / f"image_{i}.png").convert("RGB")) for i in range(2)]
    path = recorded(**{f"image_{i}": torch.from_numpy(image.copy()) for i, image in enumerate(images)})
    assert stages_of(compare_with_recorded(model, processor, path))[0] == "pixel_values"
    wrong = ProScaleMask2FormerImageProcessorPil(image_mean=[0.5, 0.5, 0.5], image_std=processor.image_std)
    with pytest.raises(ConversionError, match="at pixel_values"):
        compare_with_recorded(model, wrong, path)


# Maps of segments


@pytest.fixture
def recorded_maps(recorded):
    """A function as `recorded`, for a file with the maps too and the JSON beside it."""

    def write(facts=None, **changes):
        maps = {name: torch.from_numpy(array) for name, array in np.load(FIXTURE / "expected_maps.npz").items()}
        path = recorded(**maps | changes)
        if facts is None:
            shutil.copy(FIXTURE / "expected.json", path.with_suffix(".json"))
        else:
            path.with_suffix(".json").write_text(facts)
        return path

    return write


def test_maps_agree(recorded_maps):
    table = compare_with_recorded(*converted(), recorded_maps())
    names = [line.split()[0] for line in table.splitlines()[1 + len(STAGES) : -1]]
    kinds = ("panoptic_seg", "sem_seg_argmax", "instance_scores", "instance_masks")
    assert names == [f"{kind}_{i}" for i in range(2) for kind in kinds]


@pytest.mark.parametrize("name", ["panoptic_seg_1", "sem_seg_argmax_0"])
def test_wrong_map_is_named(name, recorded_maps):
    wrong = torch.from_numpy(np.load(FIXTURE / "expected_maps.npz")[name].copy())
    wrong[:2] = 77
    with pytest.raises(ConversionError, match=f"at {name}: error 0.0"):
        compare_with_recorded(*converted(), recorded_maps(**{name: wrong}))


def test_wrong_label_of_a_segment_is_found(recorded_maps):
    facts = json.loads((FIXTURE / "expected.json").read_text())
    facts["images"][0]["segments_info"][0]["category_id"] += 1
    with pytest.raises(ConversionError, match="at panoptic_seg_0"):
        compare_with_recorded(*converted(), recorded_maps(json.dumps(facts)))


def test_wrong_instances_are_named(recorded_maps):
    mask = torch.from_numpy(np.load(FIXTURE / "expected_maps.npz")["instance_masks_0"])
    with pytest.raises(ConversionError, match="at instance_masks_0: error 1,"):
        compare_with_recorded(*converted(), recorded_maps(instance_masks_0=1 - mask))
    for changes in ({"instance_classes_0": torch.tensor([6])}, {"instance_scores_0": torch.tensor([0.99])}):
        with pytest.raises(ConversionError, match="at instance_scores_0"):
            compare_with_recorded(*converted(), recorded_maps(**changes))


def test_maps_without_facts_are_left_out_and_said_to_be(recorded_maps):
    path = recorded_maps()
    path.with_suffix(".json").unlink()
    table = compare_with_recorded(*converted(), path)
    assert "panoptic_seg_0" not in table
    assert "maps not compared: there is no recorded.json" in table


@pytest.mark.parametrize("facts", ["{", "[]", "{}", '{"images": [{"size": [1, 1]}]}', '{"images": 3}'])
def test_wrong_facts_are_one_line(facts, recorded_maps):
    try:
        table = compare_with_recorded(*converted(), recorded_maps(facts))
        assert json.loads(facts) in ({}, [])
        assert "not compared" in table
    except ConversionError as error:
        assert "recorded.json" in str(error)
        assert "\n" not in str(error)


# Files that do not fit


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "no pixel_values"),
        ({"pixel_values": torch.zeros(2, 160, 224)}, "2 x 160 x 224"),
        ({"pixel_values": torch.zeros(2, 3, 160, 224, dtype=torch.uint8)}, "uint8"),
        ({"pixel_values": torch.zeros(2, 5, 160, 224)}, "fails on pixels of 2 x 5 x 160 x 224"),
        ({"backbone__res4": torch.zeros(2, 128, 10, 15)}, "backbone.res4 cannot be compared"),
        ({"backbone__res9": torch.zeros(1)}, "has backbone.res9"),
        ({"aux__7__masks_queries_logits": torch.zeros(1)}, "has aux.7.masks_queries_logits"),
        ({name.replace(".", "__"): None for name in STAGES}, "no stage to compare"),
    ],
)
def test_files_that_do_not_fit(changes, message, recorded):
    with pytest.raises(ConversionError, match=message) as error:
        compare_with_recorded(*converted(), recorded(**changes))
    assert "\n" not in str(error.value)


def test_earlier_departure_is_named_rather_than_later_shape(recorded):
    path = recorded(backbone__res3=torch.zeros(2, 64, 20, 28) + 1, mask_features=torch.zeros(1))
    with pytest.raises(ConversionError, match=r"at backbone\.res3"):
        compare_with_recorded(*converted(), path)


@pytest.mark.parametrize("content", [None, b"", b"no tensors", b"\xff" * 64, "truncated"])
def test_damaged_files(content, tmp_path):
    path = tmp_path / "recorded.safetensors"
    if content == "truncated":
        content = (FIXTURE / "expected.safetensors").read_bytes()[:-1]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"recorded\.safetensors is no complete safetensors file") as error:
        compare_with_recorded(*converted(), path)
    assert "\n" not in str(error.value)


# On a picture


@cache
def demo():
    return load_model(None)


def processor_with(stuff: list[int]) -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96}, label_ids_to_fuse=stuff)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(path)
    return path


def test_report_shows_what_was_found():
    report = report_on_image(*demo(), ROOT / "examples" / "scene.png").splitlines()
    assert "140 x 132, input of the model 160 x 128" in report[0]
    assert "all logits finite" in report[0]
    assert report[1].startswith("panoptic segmentation: ")
    rows = [line.split() for line in report[3:]]
    assert len(rows) == int(report[1].split()[2])
    kinds = {row[-3] for row in rows}
    assert kinds == {"thing", "stuff"}
    shares = [float(row[-1].rstrip("%")) for row in rows]
    assert 90 < sum(shares) <= 100.5
    assert {"brick", "grass", "gravel"} >= {row[0] for row in rows if row[-3] == "stuff"}


@pytest.mark.parametrize(("stuff", "task"), [([], "instance"), ([0, 2], "panoptic"), ([0, 1, 2, 3], "semantic")])
def test_task_fits_the_labels(stuff, task, picture):
    report = report_on_image(tiny_model(), processor_with(stuff), picture)
    assert f"\n{task} segmentation: " in report


def test_best_scores_where_nothing_passes(picture):
    model = tiny_model()
    with torch.no_grad():
        model.class_predictor.bias[-1] += 20
        model.class_predictor.bias[2] += 5
    report = report_on_image(model, processor_with([0]), picture).splitlines()
    assert report[1] == "panoptic segmentation: no segments"
    rows = [line.split() for line in report[4:]]
    assert [row[0] for row in rows] == ["LABEL_2"] * 5
    scores = [float(row[1]) for row in rows]
    with torch.no_grad():
        inputs = processor_with([0])(Image.open(picture), return_tensors="pt")
        probabilities = model(**inputs).class_queries_logits.softmax(-1)[0, :, 2]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(probabilities.max().item(), rel=0.1)


def test_broken_model_is_refused(picture):
    model = tiny_model()
    with torch.no_grad():
        model.class_predictor.weight[1, 2] = float("nan")
    with pytest.raises(ConversionError, match=r"model is broken: .*% of class_queries_logits"):
        report_on_image(model, processor_with([]), picture)


@pytest.mark.parametrize("content", [None, b"", b"no picture"])
def test_unreadable_pictures(content, tmp_path):
    path = tmp_path / "picture.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"picture\.png") as error:
        report_on_image(*demo(), path)
    assert "\n" not in str(error.value)


def test_checks_leave_the_model_as_it_was():
    model, processor = converted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compare_with_recorded(model, processor, FIXTURE / "expected.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
