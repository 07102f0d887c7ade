"""A first look counts what is there, and names what cannot be used."""

import json

import numpy as np
import pytest
from PIL import Image

from evaluation_data import STRIPES, instance_json, open_set, options_of, write_set
from proscale_hf.cli import main
from proscale_hf.cli.dataset_options import DATASETS, setting
from proscale_hf.data.first_look import look, segments_to_draw
from proscale_hf.data.opening import SOURCE_CLASSES, open_dataset


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set", 4)


def command(folder, *words):
    settings = [f"--set={name}={value}" for name, value in options_of(folder).items()]
    return ["first-look", "--dataset", "coco_panoptic", "--workers", "0", *settings, *map(str, words)]


class TestLook:
    def test_panoptic_counts(self, folder):
        seen = look(open_set(folder))
        heights = [32, 40, 48, 32]
        assert seen.images == 4 and seen.sizes == {(32, 96): 2, (40, 96): 1, (48, 96): 1}
        assert seen.pixels == 96 * sum(heights)
        cat, dog, grass, sky = seen.classes
        assert (cat.images, cat.segments, cat.crowds, cat.pixels) == (4, 8, 0, 40 * sum(heights))
        assert (dog.images, dog.segments, dog.crowds, dog.pixels) == (4, 4, 4, 24 * sum(heights))
        assert (grass.images, grass.pixels) == (4, 24 * sum(heights))
        assert sky.images == 0 and seen.absent == ["sky"]
        assert seen.empty == seen.unusable == 0

    def test_instances_count_the_same(self, folder, tmp_path):
        annotations = instance_json(tmp_path / "instances.json", folder)
        seen = look(open_dataset("coco_instance", images=str(folder / "images"), annotations=str(annotations)))
        dog, cat = seen.classes
        assert (cat.segments, dog.segments, dog.crowds) == (8, 4, 4)
        assert cat.pixels == 40 * (32 + 40 + 48 + 32)

    def test_workers_change_nothing(self, folder):
        assert look(open_set(folder), workers=2) == look(open_set(folder))

    def test_empty_and_unusable_images(self, folder):
        content = json.loads((folder / "panoptic.json").read_text())
        content["annotations"][1]["segments_info"] = []
        (folder / "panoptic.json").write_text(json.dumps(content))
        Image.new("RGB", (96, 40)).save(folder / "maps" / "photo1.png")
        (folder / "images" / "photo2.png").write_text("no picture")
        seen = look(open_set(folder, on_error="skip"))
        assert seen.images == 3 and seen.empty == seen.unusable == 1
        assert [name.endswith("photo1.png") for name in seen.empty_files] == [True]
        assert "photo2.png" in seen.errors[0]
        assert "photo2.png" in seen.to_text() and "1 cannot be used" in seen.to_text()

    def test_crowds_alone_are_nothing_to_train_on(self, folder):
        content = json.loads((folder / "panoptic.json").read_text())
        for segment in content["annotations"][2]["segments_info"]:
            segment["iscrowd"] = 1
        (folder / "panoptic.json").write_text(json.dumps(content))
        seen = look(open_set(folder))
        assert seen.empty == 1 and seen.empty_files[0].endswith("photo2.png")
        assert "nothing to train on: " in seen.to_text()
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["iscrowd"] = 1
        (folder / "panoptic.json").write_text(json.dumps(content))
        assert "There is nothing to train on: no image has an object" in look(open_set(folder)).to_text()

    def test_ids_outside_the_list_are_named(self, folder):
        with Image.open(folder / "maps" / "photo3.png") as picture:
            pixels = np.array(picture)
        pixels[0, 0] = (77, 0, 0)
        Image.fromarray(pixels).save(folder / "maps" / "photo3.png")
        seen = look(open_set(folder))
        assert seen.unusable == 1 and "photo3.png" in seen.errors[0] and "77" in seen.errors[0]

    def test_report(self, folder):
        text = look(open_set(folder)).to_text()
        assert "smallest 32 x 96, median 32 x 96, largest 48 x 96" in text
        assert "1 of 4 classes never occur: sky" in text

    def test_pictures_show_every_segment_and_say_crowd(self, folder):
        dataset = open_set(folder)
        segments = segments_to_draw(dataset[0], dataset.categories)
        assert [segment.box for segment in segments] == [(left, 0, right, 32) for left, right, _, _ in STRIPES]
        assert [segment.label for segment in segments] == ["cat", "cat", "grass", "dog (crowd)", "dog"]
        assert [segment.is_thing for segment in segments] == [True, True, False, True, True]


class TestCommand:
    def test_report_pictures_and_json(self, folder, tmp_path, capsys):
        words = ("--output", tmp_path / "look", "--overlays", 2, "--json", tmp_path / "look.json")
        assert main(command(folder, *words)) == 0
        assert "4 images" in capsys.readouterr().out
        names = sorted(path.name for path in (tmp_path / "look").iterdir())
        assert names == ["000000_photo0.png", "000001_photo1.png"]
        content = json.loads((tmp_path / "look.json").read_text())
        assert content["images"] == 4 and content["classes"][0]["segments"] == 8 and content["absent"] == ["sky"]

    def test_what_cannot_be_used_is_a_failure(self, folder, capsys):
        (folder / "images" / "photo0.png").write_text("no picture")
        assert main(command(folder, "--samples", 3)) == 1
        captured = capsys.readouterr()
        assert "2 images" in captured.out and "photo0.png" in captured.out
        assert captured.err == "error: 1 of 3 images cannot be used, see above; mend or remove them\n"

    @pytest.mark.parametrize(
        ("change", "exit_code", "hint"),
        [
            (("--samples", "0"), 2, "0 is too few"),
            (("--set", "rooot=x"), 1, "rooot"),
            (("--set", "root"), 2, "is not OPTION=VALUE"),
            (("--set", "root=[1]"), 1, "root of coco_panoptic must be"),
            (("--set", "categories=true"), 1, "categories of coco_panoptic must be"),
            (("--set", "annotations=nowhere.json"), 2, "same option twice"),
            (("--output", "set"), 2, "is there already"),
        ],
    )
    def test_wrong_command_lines(self, folder, capsys, monkeypatch, change, exit_code, hint):
        monkeypatch.chdir(folder.parent)
        assert main(command(folder, *change)) == exit_code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and hint in error

    @pytest.mark.parametrize(
        ("text", "value"),
        [
            ("val2017", "val2017"),
            ("255", 255),
            ("[0,255]", [0, 255]),
            ("true", True),
            ('"2017"', "2017"),
            ("a=b", "a=b"),
        ],
    )
    def test_values_of_options(self, text, value):
        assert setting(f"void={text}") == ("void", value)

    def test_the_help_names_all_data_sets(self):
        assert tuple(SOURCE_CLASSES) == DATASETS

    def test_unknown_data_set(self, capsys):
        assert main(["first-look", "--dataset", "coc"]) == 1
        assert "coco_panoptic" in capsys.readouterr().err
