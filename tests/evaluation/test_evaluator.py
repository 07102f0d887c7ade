"""The evaluator: known numbers, what does not change them, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from evaluation_data import CATEGORIES, ID2LABEL, STUFF, NearlyRight, instance_json, open_set, right_outputs, write_set
from helpers import tiny_model
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.data.opening import open_dataset
from proscale_hf.data.sample import SampleError
from proscale_hf.evaluation.agreement import choose_tasks, match_labels
from proscale_hf.evaluation.batches import BatchShare
from proscale_hf.evaluation.evaluator import Evaluator, evaluate
from proscale_hf.evaluation.instance_truth import InstanceAnnotations, ThingSegments


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp("sets") / "set", images=5)


@pytest.fixture
def processor() -> ProScaleMask2FormerImageProcessorPil:
    return ProScaleMask2FormerImageProcessorPil(size={"height": 64, "width": 96}, label_ids_to_fuse=STUFF)


@pytest.fixture
def model() -> NearlyRight:
    return NearlyRight().eval()


@pytest.fixture
def model_processor() -> ProScaleMask2FormerImageProcessorPil:
    return NearlyRight.processor()


@pytest.fixture
def real_model():
    """Random, but it finds something."""
    model = tiny_model(id2label=ID2LABEL, num_queries=20)
    with torch.no_grad():
        model.class_predictor.weight.mul_(30)
        model.class_predictor.bias[-1] -= 5
    return model


class TestKnownNumbers:
    def test_a_right_model_is_perfect(self, folder, processor):
        evaluator = Evaluator(CATEGORIES)
        for sample in open_set(folder):
            evaluator.update([sample], right_outputs(sample.image.height), processor)
        results = evaluator.compute()
        assert results["images"] == 5
        # The crowd was found as a dog: neither right nor wrong. The sky neither is there nor is found.
        for group, classes in (("All", 3), ("Things", 2), ("Stuff", 1)):
            assert results["panoptic"][group] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": classes}
        assert results["instance"]["AP"] == pytest.approx(1.0)
        assert results["semantic"]["mIoU"] == pytest.approx(1.0)

    def test_what_lies_on_void_is_not_wrong(self, folder, processor):
        evaluator = Evaluator(CATEGORIES, ["panoptic", "semantic"])
        for sample in open_set(folder):
            outputs = right_outputs(sample.image.height)
            outputs["masks_queries_logits"][0, 2, :, 16:18] = 20  # grass, over the void stripe
            evaluator.update([sample], outputs, processor)
        results = evaluator.compute()
        assert results["panoptic"]["All"]["pq"] == 1.0
        assert results["semantic"]["mIoU"] == pytest.approx(1.0)

    def test_crowds_count_in_the_semantic_truth_alone(self, folder, processor):
        evaluator = Evaluator(CATEGORIES)
        for sample in open_set(folder):
            evaluator.update([sample], right_outputs(sample.image.height, labels=(0, 0, 2, 2, 1)), processor)
        results = evaluator.compute()
        # The crowd, 8 of 24 columns of dog, is called grass: one stuff segment with the true one, of 32 columns.
        assert results["panoptic"]["per_class"]["3"]["pq"] == 1.0
        assert results["panoptic"]["per_class"]["90"]["pq"] == 24 / 32
        assert results["instance"]["AP"] == pytest.approx(1.0)
        assert results["semantic"]["mIoU"] == pytest.approx((1 + 16 / 24 + 24 / 32) / 3)

    def test_a_wrong_class(self, folder, processor):
        evaluator = Evaluator(CATEGORIES)
        for sample in open_set(folder):
            evaluator.update([sample], right_outputs(sample.image.height, labels=(0, 1, 2, 1, 1)), processor)
        results = evaluator.compute()
        assert results["panoptic"]["per_class"]["7"] == {"pq": 1 / 1.5, "sq": 1.0, "rq": 1 / 1.5}
        assert results["panoptic"]["per_class"]["3"] == {"pq": 1 / 1.5, "sq": 1.0, "rq": 1 / 1.5}
        assert results["semantic"]["mIoU"] == pytest.approx((16 / 40 + 24 / 48 + 1) / 3)
        assert 0.3 < results["instance"]["AP"] < 0.9

    def test_labels_in_another_order(self, folder, processor):
        names = {0: "dog", 1: "grass", 2: "cat", 3: "sky"}
        label_map = match_labels(names, [1, 3], CATEGORIES, ["panoptic"])
        evaluator = Evaluator(CATEGORIES, label_map=label_map)
        processor.label_ids_to_fuse = [1, 3]
        for sample in open_set(folder):
            evaluator.update([sample], right_outputs(sample.image.height, labels=(2, 2, 1, 0, 0)), processor)
        results = evaluator.compute()
        assert results["panoptic"]["All"]["pq"] == results["instance"]["AP"] == results["semantic"]["mIoU"] == 1.0

    def test_instances_of_any_score_count(self, folder, processor):
        evaluator = Evaluator(CATEGORIES, ["instance"])
        for sample in open_set(folder):
            outputs = right_outputs(sample.image.height)
            outputs["class_queries_logits"] /= 20  # the right class is more likely than others, but below one half
            evaluator.update([sample], outputs, processor)
        assert evaluator.compute()["instance"]["AP50"] > 0.5

    def test_labels_that_the_data_do_not_have_are_left_out(self, folder, tmp_path, processor):
        truth = InstanceAnnotations(instance_json(tmp_path / "instances.json", folder), CATEGORIES)
        evaluator = Evaluator(CATEGORIES, ["instance"], [0, 1, None, None], truth)
        processor.label_ids_to_fuse = []  # so that grass is found as an instance, too
        for sample in open_set(folder):
            evaluator.update([sample], right_outputs(sample.image.height), processor)
        assert evaluator.compute()["instance"]["AP"] == pytest.approx(1.0)


class TestInstanceAnnotations:
    def test_ids_and_areas_are_what_the_file_says(self, folder, tmp_path):
        path = instance_json(tmp_path / "instances.json", folder)
        content = json.loads(path.read_text())
        for category in content["categories"]:
            category["id"] *= 100
        for annotation in content["annotations"]:
            annotation["category_id"] *= 100
            annotation["area"] = 5.5
        path.write_text(json.dumps(content))
        sample = open_set(folder)[0]
        true = InstanceAnnotations(path, CATEGORIES)(sample)
        assert true["labels"] == [7, 7, 3, 3] and true["area"] == [5.5] * 4 and true["iscrowd"] == [0, 0, 1, 0]
        dataset = open_dataset("coco_instance", images=str(folder / "images"), annotations=str(path))
        own = ThingSegments(dataset.categories)(dataset[0])
        assert own["labels"] == [700, 700, 300, 300] and own["area"] == [5.5] * 4

    def test_same_truth_same_result(self, folder, tmp_path, model, model_processor):
        dataset = open_set(folder)
        truth = InstanceAnnotations(instance_json(tmp_path / "instances.json", folder), dataset.categories)
        of_things = evaluate(model, model_processor, dataset, tasks=["instance"])
        of_json = evaluate(model, model_processor, dataset, tasks=["instance"], instance_annotations=truth)
        assert of_things["instance"]["AP"] > 0
        assert of_json["instance"] == of_things["instance"]

    def test_another_truth_another_result(self, folder, tmp_path, processor):
        dataset = open_set(folder)
        path = instance_json(tmp_path / "instances.json", folder)
        content = json.loads(path.read_text())
        content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] == 7]
        path.write_text(json.dumps(content))
        found = []
        for truth in (None, InstanceAnnotations(path, dataset.categories)):
            evaluator = Evaluator(CATEGORIES, ["instance"], instance_annotations=truth)
            for sample in dataset:
                evaluator.update([sample], right_outputs(sample.image.height, labels=(0, 0, 2, 2, 2)), processor)
            found.append(evaluator.compute()["instance"]["AP"])
        assert found[0] < 0.9
        assert found[1] == pytest.approx(1.0)  # no dog is found, but this truth has none

    def test_an_image_that_is_not_listed(self, folder, tmp_path, model, model_processor):
        dataset = open_set(folder)
        path = instance_json(tmp_path / "instances.json", folder, images=4)
        truth = InstanceAnnotations(path, dataset.categories)
        with pytest.raises(SampleError, match=r"instances.json does not list image 972 .*photo4"):
            evaluate(model, model_processor, dataset, instance_annotations=truth)

    def test_other_categories(self, folder, tmp_path):
        path = instance_json(tmp_path / "instances.json", folder)
        path.write_text(path.read_text().replace('"dog"', '"grass"'))
        with pytest.raises(ValueError, match="grass"):
            InstanceAnnotations(path, CATEGORIES)


class TestInstanceData:
    """A data set that has things alone, with a model that also knows stuff: the paper's AP^p."""

    @pytest.fixture
    def dataset(self, folder, tmp_path):
        path = instance_json(tmp_path / "instances.json", folder)
        return open_dataset("coco_instance", images=str(folder / "images"), annotations=str(path))

    def test_ap_alone(self, folder, dataset, model, model_processor):
        results = evaluate(model, model_processor, dataset)
        assert set(results) & {"panoptic", "instance", "semantic"} == {"instance"}
        expected = evaluate(model, model_processor, open_set(folder), tasks=["instance"])
        assert results["instance"]["AP"] == expected["instance"]["AP"] > 0

    def test_other_tasks_are_refused(self, dataset, model, model_processor):
        with pytest.raises(ValueError, match="cannot measure panoptic, only instance"):
            evaluate(model, model_processor, dataset, tasks=["panoptic", "instance"])


class TestTasks:
    def test_default_is_all(self, folder):
        assert choose_tasks(open_set(folder), None) == ["panoptic", "instance", "semantic"]

    def test_semantic_maps(self, folder):
        dataset = open_set(folder)
        dataset.source.tasks = ("semantic",)
        assert choose_tasks(dataset, None) == ["semantic"]
        with pytest.raises(ValueError, match="cannot measure instance, only semantic"):
            choose_tasks(dataset, ["semantic", "instance"])
        assert choose_tasks(dataset, ["instance"], instance_annotations=object()) == ["instance"]

    def test_without_things_there_are_no_instances(self, folder):
        dataset = open_set(folder)
        dataset.source.categories = [{**category, "isthing": 0} for category in CATEGORIES]
        assert choose_tasks(dataset, None) == ["panoptic", "semantic"]

    @pytest.mark.parametrize("tasks", [["depth"], []])
    def test_unknown(self, folder, tasks):
        with pytest.raises(ValueError, match="panoptic, instance, semantic"):
            choose_tasks(open_set(folder), tasks)


class TestLabels:
    def test_by_name(self):
        names = {0: "sky", 1: "dog", 2: "cat", 3: "grass"}
        assert match_labels(names, [0, 3], CATEGORIES, ["panoptic"]) == [3, 1, 0, 2]

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            (
                {0: "cat", 1: "dog", 2: "grass", 3: "sea"},
                r"data set alone, \[sky\]; 1 in the model alone, \[sea\]",
            ),
            ({0: "cat", 1: "dog", 2: "grass"}, r"3 labels are not the data set's 4 categories .*\[sky\]"),
            ({0: "cat", 1: "dog", 2: "grass", 3: "sky", 4: "sea"}, r"1 in the model alone, \[sea\]"),
            ({0: "cat", 1: "cat", 2: "dog", 3: "grass", 4: "sky"}, "a name twice"),
        ],
    )
    def test_names_that_differ(self, names, message):
        with pytest.raises(ValueError, match=message):
            match_labels(names, STUFF, CATEGORIES, ["semantic"])

    def test_more_labels_do_for_instances(self):
        names = {0: "sea", 1: "cat", 2: "dog"}
        assert match_labels(names, [0], CATEGORIES[:2], ["instance"]) == [None, 0, 1]

    def test_things_and_stuff_must_agree(self):
        for task in ("panoptic", "instance"):
            with pytest.raises(ValueError, match=r"\[dog, sky\].*label_ids_to_fuse"):
                match_labels(ID2LABEL, [1, 2], CATEGORIES, [task])
        assert match_labels(ID2LABEL, [1, 2], CATEGORIES, ["semantic"]) == [0, 1, 2, 3]


class TestShares:
    @pytest.mark.parametrize("images", [1, 2, 7, 12])
    @pytest.mark.parametrize("batch_size", [1, 3, 20])
    @pytest.mark.parametrize("processes", [1, 2, 5])
    def test_each_image_counts_once(self, images, batch_size, processes):
        alone = BatchShare(images, batch_size)
        shares = [BatchShare(images, batch_size, rank, processes) for rank in range(processes)]
        assert len({len(share.batches) for share in shares}) == 1  # or one would wait for the others forever
        counted = [
            batch
            for share in shares
            for batch, is_counted in zip(share.batches, share.is_counted, strict=True)
            if is_counted
        ]
        assert sorted(counted) == alone.batches
        assert sorted(image for batch in counted for image in batch) == list(range(images))


class TestEvaluate:
    def test_batches_do_not_change_the_result(self, folder, real_model, processor):
        processor.size = {"shortest_edge": 32, "longest_edge": 96}
        one, three = (evaluate(real_model, processor, open_set(folder), batch_size=size) for size in (1, 3))
        assert one["images"] == three["images"] == 5
        assert one["panoptic"]["All"]["n"] > 1 and one["semantic"]["mIoU"] > 0
        for task in ("panoptic", "instance", "semantic"):
            assert flat(one[task]) == pytest.approx(flat(three[task]), abs=1e-3)

    def test_workers_do_not_change_the_result(self, folder, model, model_processor):
        dataset = open_set(folder)
        alone, helped = (evaluate(model, model_processor, dataset, batch_size=2, workers=count) for count in (0, 2))
        for task in ("panoptic", "instance", "semantic"):
            assert alone[task] == helped[task]

    def test_the_model_stays_in_its_mode(self, folder, model, model_processor):
        dataset = open_set(folder)
        expected = evaluate(model, model_processor, dataset)
        assert not model.training
        model.train()
        try:
            assert evaluate(model, model_processor, dataset)["panoptic"] == expected["panoptic"]
            assert model.training
            with pytest.raises(ValueError, match="cannot measure"):
                dataset.source.tasks = ()
                evaluate(model, model_processor, dataset, tasks=["semantic"])
            assert model.training
        finally:
            model.eval()

    def test_a_model_that_is_wrapped_for_several_processes(self, folder, model, model_processor):
        accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
        dataset = open_set(folder)
        expected = evaluate(model, model_processor, dataset)
        found = evaluate(torch.nn.DataParallel(model), model_processor, dataset, accelerator=accelerator)
        assert found["panoptic"] == expected["panoptic"]

    def test_bfloat16(self, folder, real_model, processor):
        seen = []
        real_model.class_predictor.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        for dtype in (None, torch.bfloat16):
            assert evaluate(real_model, processor, open_set(folder), dtype=dtype)["images"] == 5
        assert seen == 5 * [torch.float32] + 5 * [torch.bfloat16]

    def test_parts_add_up(self, folder, model, model_processor):
        dataset = open_set(folder)
        label_map = [3, 1, 0, 2]
        parts = [Evaluator(CATEGORIES, label_map=label_map) for _ in range(2)]
        whole = Evaluator(CATEGORIES, label_map=label_map)
        for index, sample in enumerate(dataset):
            inputs = model_processor(images=[sample.image], return_tensors="pt")
            with torch.no_grad():
                outputs = model(**inputs)
            for evaluator in (whole, parts[index % 2]):
                evaluator.update([sample], outputs, model_processor)
        expected, total = whole.compute(), Evaluator(CATEGORIES)
        for part in parts:
            total.merge(part.state())
        assert 0 < expected["instance"]["AP"] < 1 and expected["images"] == 5
        assert flat(total.compute()) == pytest.approx(flat(expected), abs=1e-12)

    def test_an_image_that_cannot_be_read(self, tmp_path, model, model_processor):
        folder = write_set(tmp_path / "set", images=5)
        good = evaluate(model, model_processor, open_set(folder).select([0, 1, 3, 4]))
        (folder / "images" / "photo2.png").write_bytes(b"no picture")
        for workers in (0, 1):
            with pytest.raises(SampleError, match=r"photo2\.png"):
                evaluate(model, model_processor, open_set(folder), workers=workers)
            dataset = open_set(folder, on_error="skip")
            results = evaluate(model, model_processor, dataset, workers=workers)
            assert results["images"] == 4
            assert len(results["skipped"]) == 1 and "photo2.png" in results["skipped"][0]
            for task in ("panoptic", "instance", "semantic"):
                assert results[task] == good[task]

    def test_no_image_can_be_read(self, tmp_path, model, model_processor):
        folder = write_set(tmp_path / "set", images=2)
        for path in (folder / "images").iterdir():
            path.write_bytes(b"no picture")
        with pytest.raises(SampleError, match=r"None of the 2 images can be used: .*photo0\.png"):
            evaluate(model, model_processor, open_set(folder, on_error="skip"))

    def test_weights_that_are_no_numbers(self, folder, real_model, processor):
        with torch.no_grad():
            real_model.class_predictor.bias.fill_(float("nan"))
        with pytest.raises(ValueError, match="NaN"):
            evaluate(real_model, processor, open_set(folder))


def flat(values, prefix: str = "") -> dict[str, float]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {key: value for name, entry in values.items() for key, value in flat(entry, f"{prefix}/{name}").items()}
