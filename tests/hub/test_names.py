"""Short names stand for a local folder or a repository in the project's namespace, and for nothing else."""

import json
from pathlib import Path

import pytest

import proscale_hf
from helpers import tiny_config
from proscale_hf.hub.license import check_may_publish
from proscale_hf.hub.names import HUB_NAMESPACE, MODEL_NAMES, resolve


ZOO = json.loads((Path(proscale_hf.__file__).parent / "hub" / "model_zoo.json").read_text())


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("PROSCALE_HUB_NAMESPACE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_published_names(name):
    assert resolve(name) == f"{HUB_NAMESPACE}/{name}"


def test_namespace_from_the_environment(monkeypatch):
    monkeypatch.setenv("PROSCALE_HUB_NAMESPACE", "my-lab")
    assert resolve("proscale-r50-coco") == "my-lab/proscale-r50-coco"
    monkeypatch.setenv("PROSCALE_HUB_NAMESPACE", "")
    assert resolve("proscale-r50-coco") == "proscale-hf/proscale-r50-coco"


@pytest.mark.parametrize("namespace", ["a/b", "..", "my lab", "../up"])
def test_impossible_namespace(monkeypatch, namespace):
    monkeypatch.setenv("PROSCALE_HUB_NAMESPACE", namespace)
    with pytest.raises(ValueError, match="PROSCALE_HUB_NAMESPACE is") as error:
        resolve("proscale-r50-coco")
    assert "\n" not in str(error.value)


def test_a_folder_comes_first_and_a_file_does_not(empty_folder):
    (empty_folder / "proscale-r50-coco").mkdir()
    (empty_folder / "proscale-swin-t-coco").touch()
    assert resolve("proscale-r50-coco") == "proscale-r50-coco"
    assert resolve("proscale-swin-t-coco") == "proscale-hf/proscale-swin-t-coco"


@pytest.mark.parametrize(
    "name",
    [
        "someone/proscale-swin-t",
        "bert-base-uncased",
        "./proscale-swin-t",
        "proscale",
        "",
        None,
        Path("proscale-r50-coco"),
    ],
)
def test_everything_else_is_left_to_transformers(name):
    assert resolve(name) == name


def test_a_file_with_such_a_name_is_left_to_transformers(empty_folder):
    (empty_folder / "proscale-config.json").write_text("{}")
    assert resolve("proscale-config.json") == "proscale-config.json"


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("proscale-swin-t", "proscale-swin-t-coco"),
        ("PROSCALE-R50-COCO", "proscale-r50-coco"),
        ("mask2former-swin-l22k-ade20k-semantic", "mask2former-swin-l-22k-ade20k-semantic"),
        ("mask2former-r50-coco", "mask2former-r50-coco-panoptic"),
    ],
)
def test_an_unknown_name_lists_the_known_ones_closest_first(name, closest):
    with pytest.raises(ValueError, match="closest first") as error:
        resolve(name)
    listed = str(error.value).partition("first): ")[2].rstrip(".").split(", ")
    assert sorted(listed) == sorted(MODEL_NAMES)
    assert closest in listed[:3]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["ProScaleMask2FormerConfig", "ProScaleMask2FormerImageProcessorPil"])
def test_classes_know_short_names(name):
    cls = getattr(proscale_hf, name)
    with pytest.raises(ValueError, match="closest first"):
        cls.from_pretrained("proscale-swin-t")


def test_zoo_has_the_facts_of_every_name():
    assert [model["name"] for model in ZOO["models"]] == list(MODEL_NAMES)
    assert len({model["config"] for model in ZOO["models"]}) == len(MODEL_NAMES)
    for model in ZOO["models"]:
        architecture = ZOO["architectures"][model["architecture"]]
        assert architecture["source"].startswith("https://github.com/") and architecture["license"]
        words = model["name"].split("-")
        assert words[0] == model["architecture"].replace("-", "").lower()
        assert model["dataset"] in model["name"] and model["dataset"] in model["config"]
        if words[0] == "mask2former":
            assert words[-1] == model["task"] and f"/{model['task']}-segmentation/" in model["config"]
            assert ("22k" in words) == ("ImageNet-22k" in model["backbone"]) == ("IN21k" in model["config"])
        main_metric = {"panoptic": "PQ", "instance": "AP", "semantic": "mIoU"}[model["task"]]
        assert next(iter(model["metrics"])) == main_metric
        assert all(20 < value < 90 for value in model["metrics"].values())


def test_published_accuracies():
    metrics = {model["name"]: model["metrics"] for model in ZOO["models"]}
    assert metrics["proscale-r50-coco"] == {"PQ": 51.44}
    assert metrics["proscale-swin-t-coco"] == {"PQ": 52.88}
    assert metrics["mask2former-swin-t-coco-panoptic"] == {"PQ": 53.2, "AP": 43.3, "mIoU": 63.2}
    assert metrics["mask2former-swin-l-22k-ade20k-semantic"] == {"mIoU": 56.1, "mIoU (ms+flip)": 57.3}
    assert metrics["mask2former-r50-cityscapes-instance"]["AP"] == 37.4
    assert metrics["mask2former-swin-l-22k-mapillary-vistas-panoptic"]["PQ"] == 45.5


class TestWeightsLicense:
    @pytest.mark.parametrize(
        "text",
        [
            ZOO["architectures"]["PRO-SCALE"]["license"],
            "other: evaluation only, no redistribution",
            "No-Redistribution",
        ],
    )
    def test_forbidden(self, text):
        config = tiny_config(weights_license=text)
        with pytest.raises(ValueError, match="forbids to publish"):
            check_may_publish(config, private=False)
        check_may_publish(config, private=True)
        check_may_publish(config, private=False, right=True)

    @pytest.mark.parametrize("text", [None, "apache-2.0", ZOO["architectures"]["Mask2Former"]["license"]])
    def test_allowed(self, text):
        check_may_publish(tiny_config(weights_license=text), private=False)

    def test_the_converter_writes_what_the_zoo_says(self):
        from proscale_hf.convert.detectron2 import PROSCALE_WEIGHTS_LICENSE

        assert ZOO["architectures"]["PRO-SCALE"]["license"] == PROSCALE_WEIGHTS_LICENSE
