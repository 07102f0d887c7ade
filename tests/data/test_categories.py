"""The categories of known data sets, and those that a user's file brings."""

import json
import os

import pytest

from proscale_hf import ProScaleMask2FormerConfig
from proscale_hf.data import categories as module
from proscale_hf.data.categories import CATEGORY_SETS, load_categories, read_categories


def names(categories: list[dict]) -> list[str]:
    return [category["name"] for category in categories]


def ids(categories: list[dict]) -> list[int]:
    return [category["id"] for category in categories]


class TestKnownSets:
    @pytest.mark.parametrize(
        ("name", "number", "things"),
        [
            ("coco_panoptic", 133, 80),
            ("coco_instance", 80, 80),
            ("ade20k_panoptic", 150, 100),
            ("ade20k_instance", 100, 100),
            ("ade20k_semantic", 150, 100),
            ("cityscapes", 19, 8),
            ("cityscapes_instance", 8, 8),
            ("mapillary_vistas", 65, 37),
            ("mapillary_vistas_semantic", 65, 37),
        ],
    )
    def test_numbers(self, name, number, things):
        categories = load_categories(name)
        assert len(categories) == number and sum(category["isthing"] for category in categories) == things

    @pytest.mark.parametrize("name", CATEGORY_SETS)
    def test_entries_are_complete_and_what_a_configuration_takes(self, name):
        categories = load_categories(name)
        assert {tuple(category) for category in categories} == {("id", "name", "isthing", "color")}
        assert ids(categories) == sorted(ids(categories))
        assert all(category["name"] == category["name"].strip() for category in categories)
        config = ProScaleMask2FormerConfig(categories=categories, id2label=dict(enumerate(names(categories))))
        assert [config.category(label_id) for label_id in range(config.num_labels)] == categories

    @pytest.mark.parametrize(
        ("name", "label_id", "category_id", "category_name", "isthing", "color"),
        [
            ("coco_panoptic", 0, 1, "person", 1, [220, 20, 60]),
            ("coco_panoptic", 11, 13, "stop sign", 1, [220, 220, 0]),
            ("coco_panoptic", 79, 90, "toothbrush", 1, [191, 162, 208]),
            ("coco_panoptic", 80, 92, "banner", 0, [255, 255, 128]),
            ("coco_panoptic", 116, 184, "tree-merged", 0, [107, 142, 35]),
            ("coco_panoptic", 132, 200, "rug-merged", 0, [250, 141, 255]),
            ("coco_instance", 79, 90, "toothbrush", 1, [191, 162, 208]),
            ("ade20k_semantic", 0, 1, "wall", 0, [120, 120, 120]),
            ("ade20k_semantic", 149, 150, "flag", 1, [92, 0, 255]),
            ("ade20k_panoptic", 8, 8, "windowpane", 1, [230, 230, 230]),
            ("ade20k_panoptic", 48, 48, "skyscraper", 0, [140, 140, 140]),
            ("ade20k_instance", 0, 7, "bed", 1, [204, 5, 255]),
            ("ade20k_instance", 99, 149, "flag", 1, [92, 0, 255]),
            ("cityscapes", 0, 7, "road", 0, [128, 64, 128]),
            ("cityscapes", 11, 24, "person", 1, [220, 20, 60]),
            ("cityscapes", 18, 33, "bicycle", 1, [119, 11, 32]),
            ("cityscapes_instance", 5, 31, "train", 1, [0, 80, 100]),
            ("mapillary_vistas", 0, 1, "Bird", 1, [165, 42, 42]),
            ("mapillary_vistas", 64, 65, "Ego Vehicle", 0, [120, 10, 10]),
            ("mapillary_vistas_semantic", 13, 13, "Road", 0, [128, 64, 128]),
        ],
    )
    def test_some_entries(self, name, label_id, category_id, category_name, isthing, color):
        expected = {"id": category_id, "name": category_name, "isthing": isthing, "color": color}
        assert load_categories(name)[label_id] == expected

    def test_ids_of_the_data_sets(self):
        gaps = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
        assert ids(load_categories("coco_instance")) == [number for number in range(1, 91) if number not in gaps]
        city = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
        assert ids(load_categories("cityscapes")) == city
        assert ids(load_categories("cityscapes_instance")) == city[11:]
        assert ids(load_categories("ade20k_panoptic")) == list(range(150))
        assert ids(load_categories("ade20k_semantic")) == list(range(1, 151))
        assert ids(load_categories("mapillary_vistas")) == list(range(1, 66))

    def test_stuff(self):
        def stuff(name: str) -> list[int]:
            return [label_id for label_id, category in enumerate(load_categories(name)) if not category["isthing"]]

        assert stuff("coco_panoptic") == list(range(80, 133))
        assert stuff("cityscapes") == list(range(11))
        ade20k = stuff("ade20k_panoptic")
        assert len(ade20k) == 50 and ade20k[:9] == [0, 1, 2, 3, 4, 5, 6, 9, 11] and ade20k[-3:] == [140, 141, 145]

    def test_unknown_name(self):
        with pytest.raises(ValueError, match=r"'lvis'; known are coco_panoptic, .*mapillary_vistas") as error:
            load_categories("lvis")
        assert "\n" not in str(error.value)

    def test_each_call_gives_a_list_of_its_own(self):
        load_categories("cityscapes")[0]["name"] = "changed"
        assert load_categories("cityscapes")[0]["name"] == "road"

    def test_the_files_are_readable(self):
        for file in module.FOLDER.iterdir():
            assert max(map(len, file.read_text().splitlines())) < 120
            assert read_categories(file) == load_categories(file.stem)


class TestFile:
    @pytest.fixture
    def read(self, tmp_path):
        def read(content) -> list[dict]:
            path = tmp_path / "labels.json"
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
            return read_categories(path)

        return read

    def test_categories(self, read):
        categories = [
            {"id": 40, "name": "cat", "isthing": 1, "color": [1, 2, 3]},
            {"id": 7, "name": "sky", "isthing": 0},
            {"id": 0, "name": "fürst"},
        ]
        assert read(categories) == categories
        assert read({"images": [], "categories": categories}) == categories
        assert read([{"supercategory": "animal", **category} for category in categories]) == categories

    def test_names(self, read):
        expected = [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}]
        assert read(["cat", "dog"]) == expected
        assert read({"1": "dog", "0": "cat"}) == expected
        assert read(b'\xef\xbb\xbf["cat", "dog"]') == expected  # with a byte order mark

    def test_many_names_are_in_the_order_of_their_labels(self, read):
        content = {str(label_id): f"class {label_id}" for label_id in range(12)}
        assert names(read(dict(sorted(content.items())))) == list(content.values())

    @pytest.mark.parametrize(
        ("content", "hint"),
        [
            ([], "at least one"),
            ({}, "at least one"),
            ({"categories": []}, "at least one"),
            ({"categories": {"0": "cat"}}, "must be a list"),
            (5, "must be a list"),
            ("cat", "must be a list"),
            (None, "must be a list"),
            ([1, 2], "`categories[0]` must be a category"),
            (["cat", 5], "`name` of `categories[1]`.*not empty, got 5"),
            (["cat", {"id": 1, "name": "dog"}], "`name` of `categories[1]`"),
            (["cat", " "], "`name` of `categories[1]`"),
            (["cat", "dog", "cat"], "'cat' occurs 2 times"),
            ({"0": "cat", "2": "dog"}, "labels 0 to 1"),
            ({"1": "cat", "2": "dog"}, "labels 0 to 1"),
            ({"00": "cat"}, "labels 0 to 0"),
            ({"cat": 0}, "labels 0 to 0"),
            ({"0": None}, "`name` of `categories[0]`"),
            ([{"name": "cat"}], "`id` of `categories[0]`.*got None"),
            ([{"id": 1}], "`name` of `categories[0]`.*got None"),
            ([{"id": "1", "name": "cat"}], "whole number from 0 to 2147483647, got '1'"),
            ([{"id": True, "name": "cat"}], "`id`"),
            ([{"id": 1.0, "name": "cat"}], "`id`"),
            ([{"id": -1, "name": "cat"}], "`id`"),
            ([{"id": 2**31, "name": "cat"}], "`id`"),
            ([{"id": 1, "name": "cat"}, {"id": 1, "name": "dog"}], "`id` 1 occurs 2 times"),
            ([{"id": 1, "name": ["cat"]}], "`name`"),
            ([{"id": 1, "name": "cat", "isthing": 2}], "`isthing` of `categories[0]` must be 0 or 1, got 2"),
            ([{"id": 1, "name": "cat", "isthing": None}], "`isthing`"),
            ([{"id": 1, "name": "cat", "isthing": [0]}], "`isthing`"),
            ([{"id": 1, "name": "cat", "color": [0, 0]}], "three whole numbers"),
            ([{"id": 1, "name": "cat", "color": [0, 0, 0, 255]}], "three whole numbers"),
            ([{"id": 1, "name": "cat", "color": [0, 0, 256]}], "`color`"),
            ([{"id": 1, "name": "cat", "color": [0, -1, 0]}], "`color`"),
            ([{"id": 1, "name": "cat", "color": [0, 0.5, 0]}], "`color`"),
            ([{"id": 1, "name": "cat", "color": "red"}], "`color`"),
            ([{"id": 1, "name": "cat", "color": {"r": 1}}], "`color`"),
            ([{"id": 1, "name": "x" * 10**6, "isthing": "y" * 10**6}], "`isthing`"),
            (b"", "no valid JSON"),
            (b"[", "no valid JSON"),
            (b"\xff\x00\xff", "no valid JSON"),
            (b"[" * 200_000, "no valid JSON"),
            (b'[{"id": ' + b"9" * 5000 + b"}]", "no valid JSON|`id`"),
            (b'{"0": "cat", "0": "dog"}', "same key twice"),
        ],
    )
    def test_what_is_refused(self, read, content, hint):
        with pytest.raises(ValueError, match=hint.replace("[", r"\[").replace("]", r"\]")) as error:
            read(content)
        message = str(error.value)
        assert "labels.json" in message and "\n" not in message and len(message) < 500

    def test_no_file(self, tmp_path):
        for path in (tmp_path / "absent.json", tmp_path, "/dev/zero"):
            with pytest.raises(ValueError, match="no file"):
                read_categories(path)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
    def test_file_without_permission(self, tmp_path):
        path = tmp_path / "labels.json"
        path.write_text('["cat"]')
        path.chmod(0)
        with pytest.raises(ValueError, match="cannot be read"):
            read_categories(path)

    def test_too_large(self, read, monkeypatch):
        content = ["cat", "dog"]
        monkeypatch.setattr(module, "LARGEST_FILE", len(json.dumps(content)))
        assert len(read(content)) == 2
        monkeypatch.setattr(module, "LARGEST_FILE", len(json.dumps(content)) - 1)
        with pytest.raises(ValueError, match="larger than"):
            read(content)
