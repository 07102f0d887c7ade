"""Predictions as COCO files: what other tools read from them is what the evaluator has measured."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation_data import CATEGORIES, NearlyRight, instance_json, open_set, write_set
from proscale_hf.data.reading import read_color_map
from proscale_hf.data.sample import Sample
from proscale_hf.evaluation.coco_files import PredictionFiles, merge_parts
from proscale_hf.evaluation.evaluator import evaluate
from proscale_hf.evaluation.instance_truth import InstanceAnnotations
from proscale_hf.evaluation.panoptic_files import panoptic_quality_of_files
from proscale_hf.processing.run_length import encode_mask


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", images=5)


@pytest.fixture
def output(tmp_path):
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


def sample(image_id, height=4, width=6, file_name="photo.png") -> Sample:
    return Sample(Image.new("RGB", (width, height)), image_id, file_name, [], np.zeros((height, width), np.int32))


def predict(folder, output, **options):
    with PredictionFiles(output, CATEGORIES) as files:
        results = evaluate(NearlyRight(), NearlyRight.processor(), open_set(folder), files=files, **options)
    merge_parts(output, CATEGORIES)
    return results


class TestAgreement:
    def test_panoptic(self, folder, output):
        results = predict(folder, output)
        assert 0 < results["panoptic"]["All"]["pq"] < 1
        of_files = panoptic_quality_of_files(
            folder / "panoptic.json", folder / "maps", output / "panoptic.json", output / "panoptic"
        )
        assert of_files == results["panoptic"]

    def test_instances(self, folder, output, tmp_path):
        path = instance_json(tmp_path / "instances.json", folder)
        results = predict(folder, output, instance_annotations=InstanceAnnotations(path, CATEGORIES))
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(path))
            evaluation = COCOeval(truth, truth.loadRes(str(output / "instances.json")), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert 0 < results["instance"]["AP"] < 1
        assert evaluation.stats[0] == pytest.approx(results["instance"]["AP"], abs=1e-6)
        assert evaluation.stats[1] == pytest.approx(results["instance"]["AP50"], abs=1e-6)

    def test_semantic(self, folder, output):
        results = predict(folder, output)
        right = union = 0  # of grass
        for entry in open_set(folder):
            with Image.open(output / "semantic" / f"{entry.image_id:012d}.png") as picture:
                ids = np.asarray(picture)
            truth = entry.label_map(void=255)
            found, true = (ids == 90) & (truth != 255), truth == 2
            right, union = right + (found & true).sum(), union + (found | true).sum()
        per_class = results["semantic"]["per_class"]
        assert right / union in [pytest.approx(value) for value in per_class.values()]

    def test_a_prediction_can_be_opened_as_a_data_set(self, folder, output):
        from proscale_hf.data.opening import open_dataset

        predict(folder, output)
        again = open_dataset(
            "coco_panoptic",
            images=str(folder / "images"),
            annotations=str(output / "panoptic.json"),
            segment_maps=str(output / "panoptic"),
        )
        assert again.categories == CATEGORIES
        assert [entry.image_id for entry in again] == [entry.image_id for entry in open_set(folder)]


class TestPanoptic:
    def test_area_and_box(self, output):
        segment_map = np.zeros((4, 6), dtype=np.int32)
        segment_map[1:3, 2:6] = 2
        segment_map[2, 3] = 70_000
        with PredictionFiles(output, CATEGORIES) as files:
            files.add_panoptic(sample(5), segment_map, [{"id": 2, "category_id": 7}, {"id": 70_000, "category_id": 90}])
        merge_parts(output, CATEGORIES)
        content = json.loads((output / "panoptic.json").read_text())
        assert content["categories"] == CATEGORIES
        assert content["images"] == [{"id": 5, "file_name": "photo.png", "height": 4, "width": 6}]
        [annotation] = content["annotations"]
        assert annotation["segments_info"] == [
            {"id": 2, "category_id": 7, "area": 7, "bbox": [2, 1, 4, 2], "iscrowd": 0},
            {"id": 70_000, "category_id": 90, "area": 1, "bbox": [3, 2, 1, 1], "iscrowd": 0},
        ]
        assert (read_color_map(output / "panoptic" / annotation["file_name"]) == segment_map).all()

    def test_nothing_found(self, output):
        with PredictionFiles(output, CATEGORIES) as files:
            files.add_panoptic(sample(5), np.zeros((4, 6), dtype=np.int32), [])
            files.add_instances(sample(5), [])
        merge_parts(output, CATEGORIES)
        assert json.loads((output / "panoptic.json").read_text())["annotations"][0]["segments_info"] == []
        assert json.loads((output / "instances.json").read_text()) == []


class TestNames:
    def test_texts_as_ids(self, output):
        with PredictionFiles(output, CATEGORIES) as files:
            files.add_semantic(sample("../bonn/a b"), np.zeros((4, 6), dtype=np.int64))
        assert [path.name for path in (output / "semantic").iterdir()] == [".._bonn_a_b.png"]
        assert [path.name for path in output.parent.iterdir()] == ["output"]

    def test_two_images_of_one_name(self, output):
        with PredictionFiles(output, CATEGORIES) as files:
            files.add_semantic(sample("a/b"), np.zeros((4, 6), dtype=np.int64))
            with pytest.raises(ValueError, match=r"a_b\.png is there already"):
                files.add_semantic(sample("a_b"), np.zeros((4, 6), dtype=np.int64))


def test_semantic_pictures_hold_category_ids(output):
    label_map = np.arange(24).reshape(4, 6) % 4
    for rank, last_id in enumerate((12, 255, 256, 40_000)):
        categories = [*CATEGORIES[:3], {**CATEGORIES[3], "id": last_id}]
        with PredictionFiles(output, categories, rank) as files:
            files.add_semantic(sample(rank), label_map)
        ids = np.array(Image.open(output / "semantic" / f"{rank:012d}.png"))
        assert ids[0].tolist() == [7, 3, 90, last_id, 7, 3]
    files = PredictionFiles(output, [*CATEGORIES[:3], {**CATEGORIES[3], "id": 2**16}])
    with pytest.raises(ValueError, match="category id 65536 is above"):
        files.add_semantic(sample(9), label_map)


def test_several_processes_write_into_one_folder(output):
    for rank in (1, 0):
        with PredictionFiles(output, CATEGORIES, rank) as files:
            for image_id in range(rank, 5, 2):
                mask = encode_mask(np.ones((4, 6), dtype=bool))
                files.add_panoptic(sample(image_id), np.ones((4, 6), np.int32), [{"id": 1, "category_id": 7}])
                files.add_instances(sample(image_id), [{"category_id": 7, "segmentation": mask, "score": 0.1}])
    merge_parts(output, CATEGORIES)
    content = json.loads((output / "panoptic.json").read_text())
    instances = json.loads((output / "instances.json").read_text())
    for entries in (content["annotations"], instances):
        assert [entry["image_id"] for entry in entries] == [0, 2, 4, 1, 3]
    assert (coco_mask.decode(instances[0]["segmentation"]) == 1).all()
    assert sorted(path.name for path in output.iterdir()) == ["instances.json", "panoptic", "panoptic.json"]
