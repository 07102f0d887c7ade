"""Sources and data sets of them: the cache of rows, samples that cannot be used, workers, parts, names."""

import io
import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile


datasets = pytest.importorskip("datasets")

from proscale_hf.data import dataset as source_module
from proscale_hf.data.dataset import SegmentationDataset, SegmentationSource, choose_categories, complete_categories
from proscale_hf.data.opening import SOURCE_CLASSES, open_dataset
from proscale_hf.data.reading import path_inside, read_color_map, read_image, read_value_map, segments_from_values
from proscale_hf.data.sample import Sample, SampleError


CATEGORIES = [{"id": 3, "name": "cat", "isthing": 1}, {"id": 8, "name": "grass", "isthing": 0, "color": [0, 99, 0]}]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


class Squares(SegmentationSource):
    """Grey pictures, whose rows come from a text file: a grey value each."""

    made = 0

    def __init__(self, listing: Path, doubled: bool = False):
        self.listing = listing
        self.doubled = doubled
        self.categories = complete_categories(CATEGORIES)

    def files(self):
        return [self.listing]

    def rows(self):
        type(self).made += 1
        for line in self.listing.read_text().split():
            value = int(line) * (1 + self.doubled)
            yield {"image_id": value, "image": f"picture {value}"}

    def read(self, row):
        if row["image_id"] < 0:
            raise SampleError(f"{row['image']} is damaged.")
        image = Image.new("RGB", (4, 4), (row["image_id"],) * 3)
        segment = {"id": 1, "label_id": row["image_id"] // 100, "iscrowd": 0}
        return Sample(image, row["image_id"], row["image"], [segment], np.ones((4, 4), np.int32))


@pytest.fixture
def listing(tmp_path):
    path = tmp_path / "listing.txt"
    path.write_text("10 20 30 40 50 60 70")
    Squares.made = 0
    return path


def ids(dataset):
    return [dataset[i].image_id for i in range(len(dataset))]


def test_rows_are_made_once_and_again_when_something_changes(listing):
    assert ids(SegmentationDataset(Squares(listing))) == [10, 20, 30, 40, 50, 60, 70]
    assert ids(SegmentationDataset(Squares(listing))) == [10, 20, 30, 40, 50, 60, 70]
    assert Squares.made == 1
    assert ids(SegmentationDataset(Squares(listing, doubled=True)))[:2] == [20, 40]
    assert Squares.made == 2
    listing.write_text("11 21 31 41 51 61 71")  # as many bytes
    assert ids(SegmentationDataset(Squares(listing)))[:2] == [11, 21]
    assert Squares.made == 3


def test_rows_are_made_again_when_their_code_changes(listing):
    def rows(self):
        yield {"image_id": 7, "image": "picture 7"}

    changed = type("Squares", (Squares,), {"rows": rows, "__qualname__": Squares.__qualname__})
    assert len(SegmentationDataset(Squares(listing))) == 7
    assert ids(SegmentationDataset(changed(listing))) == [7]


def test_rows_that_fail_leave_nothing(listing, tmp_path):
    listing.write_text("10 20 x")
    with pytest.raises(ValueError, match="invalid literal"):
        SegmentationDataset(Squares(listing))
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    listing.write_text("10 20 30")
    assert ids(SegmentationDataset(Squares(listing))) == [10, 20, 30]


def test_no_rows(listing):
    listing.write_text("")
    with pytest.raises(ValueError, match=r"list of images of .*listing.txt is empty"):
        SegmentationDataset(Squares(listing))


def test_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"no file or folder .*listing.txt"):
        SegmentationDataset(Squares(tmp_path / "listing.txt"))


def test_cache_that_cannot_be_written(listing, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", listing / "cache")
    with pytest.raises(ValueError, match="set HF_DATASETS_CACHE to a folder that can be written") as error:
        SegmentationDataset(Squares(listing))
    assert "\n" not in str(error.value)


def test_a_full_disk_while_the_rows_are_written(listing, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("datasets.arrow_writer.ArrowWriter.finalize", fail)
    with pytest.raises(ValueError, match="No space left on device"):
        SegmentationDataset(Squares(listing))


def test_rows_lie_in_a_mapped_file(listing):
    dataset = SegmentationDataset(Squares(listing))
    assert dataset.rows.cache_files and len(dataset) == 7
    assert len(pickle.dumps(dataset)) < 20_000


def test_positions(listing):
    dataset = SegmentationDataset(Squares(listing))
    assert dataset[-1].image_id == 70
    for index in (7, -8):
        with pytest.raises(IndexError):
            dataset[index]
    assert [sample.image_id for sample in dataset] == ids(dataset)  # iteration ends


def test_parts(listing):
    dataset = SegmentationDataset(Squares(listing))
    assert ids(dataset.select([5, 1])) == [60, 20]
    parts = [ids(dataset.shard(3, index)) for index in range(3)]
    assert sorted(itertools.chain.from_iterable(parts)) == ids(dataset) and {len(part) for part in parts} == {2, 3}
    assert dataset.select([0]).categories is dataset.categories


def test_a_label_that_is_no_category(listing):
    listing.write_text("10 300")
    with pytest.raises(SampleError, match=r"labels \[3\] are not among the 2 categories"):
        SegmentationDataset(Squares(listing))[1]


def test_bad_samples_raise(listing):
    listing.write_text("10 -20 30")
    dataset = SegmentationDataset(Squares(listing))
    with pytest.raises(SampleError, match="picture -20 is damaged"):
        dataset[1]
    assert dataset.skipped == []


def test_bad_samples_are_skipped_and_named(listing, caplog, monkeypatch):
    monkeypatch.setattr(source_module.logger, "propagate", True)
    monkeypatch.setattr(source_module.logger.parent, "propagate", True)
    listing.write_text("10 -20 -30 40 -50")
    dataset = SegmentationDataset(Squares(listing), on_error="skip")
    assert ids(dataset) == [10, 40, 40, 40, 10]
    assert ids(dataset) == [10, 40, 40, 40, 10]
    assert dataset.skipped == ["picture -20", "picture -30", "picture -50"]
    messages = [record.getMessage() for record in caplog.records if "Left out" in record.getMessage()]
    assert messages == [f"Left out: picture {number} is damaged." for number in (-20, -30, -50)]  # once each
    part = dataset.select([0, 1])
    assert ids(part) == [10, 10] and part.skipped == ["picture -20"]


def test_nothing_but_bad_samples(listing):
    listing.write_text("-10 -20")
    with pytest.raises(SampleError, match="None of the 2 images can be used"):
        SegmentationDataset(Squares(listing), on_error="skip")[0]


def first(samples):
    return samples[0].image_id


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_what_was_skipped(listing, method):
    listing.write_text("10 -20 30 -40")
    dataset = SegmentationDataset(Squares(listing), on_error="skip")
    loader = torch.utils.data.DataLoader(dataset, num_workers=2, multiprocessing_context=method, collate_fn=first)
    assert list(loader) == [10, 30, 30, 10]
    assert dataset.skipped == ["picture -20", "picture -40"]


def test_only_the_two_ways_with_errors(listing):
    with pytest.raises(ValueError, match="raise or skip"):
        SegmentationDataset(Squares(listing), on_error="ignore")


def test_the_example_in_the_docstring(tmp_path, monkeypatch):
    """Under 30 lines, and it works."""
    code = source_module.__doc__.partition("maps/`:\n\n")[2].replace("\n    ", "\n").strip()
    assert "class Fields(SegmentationSource)" in code and len(code.splitlines()) < 30
    for folder in ("images", "maps"):
        (tmp_path / "fields" / folder).mkdir(parents=True)
    Image.new("RGB", (4, 2), "green").save(tmp_path / "fields" / "images" / "a.jpg")
    Image.fromarray(np.array([[3, 3, 8, 8], [8, 8, 8, 8]], np.uint8)).save(tmp_path / "fields" / "maps" / "a.png")
    (tmp_path / "fields" / "categories.json").write_text(json.dumps(CATEGORIES))
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "example"}
    exec(code, names)
    sample = names["dataset"][0]
    assert sample.image_id == "a"
    assert [segment["label_id"] for segment in sample.segments] == [0, 1]
    assert sample.segment_map.tolist() == [[1, 1, 2, 2], [2, 2, 2, 2]]


def test_categories_are_completed():
    cat, grass = complete_categories(CATEGORIES)
    assert grass == {"id": 8, "name": "grass", "isthing": 0, "color": [0, 99, 0]}
    assert len(cat["color"]) == 3 and complete_categories(CATEGORIES)[0] == cat
    with pytest.raises(ValueError, match="isthing"):
        complete_categories([{"id": 1, "name": "cat"}])


def test_categories_by_name_file_or_list(tmp_path):
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"categories": CATEGORIES}))
    assert choose_categories(path) == choose_categories(str(path)) == choose_categories(CATEGORIES)
    assert len(choose_categories("cityscapes")) == 19
    with pytest.raises(ValueError, match=r"no file ocean; .* cityscapes"):
        choose_categories("ocean")


def test_data_sets_by_name(tmp_path):
    with pytest.raises(ValueError, match="no data set 'voc'; known are coco_panoptic"):
        open_dataset("voc")
    with pytest.raises(ValueError, match="folder has no option rot; it takes root"):
        open_dataset("folder", rot="x")
    with pytest.raises(ValueError, match="folder needs the option root"):
        open_dataset("folder")
    assert all(issubclass(source_class, SegmentationSource) for source_class in SOURCE_CLASSES.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": True}, r"root of folder must be str \| Path, got True"),
        ({"root": "a", "split": 2017}, "split of folder .* got 2017. Put a name that looks like a number in quotes"),
        ({"root": "a", "void": "255"}, "void of folder must be .*int.*, got '255'"),
        ({"root": "a", "categories": 1.5}, "categories of folder must be"),
    ],
)
def test_values_of_the_wrong_type(options, message):
    with pytest.raises(ValueError, match=message) as error:
        open_dataset("folder", **options)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="drop_empty of coco_instance must be bool, got 'no'"):
        open_dataset("coco_instance", root="a", split="b", drop_empty="no")


@pytest.mark.parametrize(
    "name",
    [
        "../a.png",
        "/a.png",
        "//a.png",
        "b/../../a.png",
        "c:/a.png",
        "b\\a.png",
        "",
        None,
        "a\0.png",
        "a\n.png",
        "\ud800",
        "a" * 256,
    ],
)
def test_names_that_lead_out_of_their_folder(name):
    with pytest.raises(ValueError, match="inside folder"):
        path_inside("folder", name)


def test_names_inside_their_folder():
    assert path_inside("folder", "b/a.png") == Path("folder/b/a.png")


@pytest.mark.parametrize("mode", ["L", "P", "I;16"])
def test_maps_of_values(tmp_path, mode):
    values = np.array([[0, 7], [200, 33]])
    if mode == "P":
        picture = Image.fromarray(values.astype(np.uint8))
        picture.putpalette(list(range(256)) * 3)
    else:
        picture = Image.fromarray(values.astype(np.uint8 if mode == "L" else np.uint16))
    picture.save(tmp_path / "a.png")
    assert read_value_map(tmp_path / "a.png").tolist() == values.tolist()
    with pytest.raises(SampleError, match="must be an RGB picture"):
        read_color_map(tmp_path / "a.png")


@pytest.mark.parametrize("channels", [3, 4])
def test_maps_of_colors(tmp_path, channels):
    colors = np.random.default_rng(0).integers(0, 256, (5, 6, channels), dtype=np.uint8)
    Image.fromarray(colors).save(tmp_path / "a.png")
    red, green, blue = np.moveaxis(colors.astype(int)[..., :3], -1, 0)
    assert np.array_equal(read_color_map(tmp_path / "a.png"), red + 256 * green + 65536 * blue)
    with pytest.raises(SampleError, match="one channel"):
        read_value_map(tmp_path / "a.png")


def test_values_become_segments():
    values = np.array([[7, 7, 0], [300, 4, 4]])
    meaning = {7: 1, 300: 1, 4: 0, 0: None}
    segment_map, segments = segments_from_values(values, meaning.__getitem__, "a.png")
    assert segment_map.tolist() == [[2, 2, 0], [3, 1, 1]] and segment_map.dtype == np.int32
    assert [(segment["id"], segment["label_id"]) for segment in segments] == [(1, 0), (2, 1), (3, 1)]
    with pytest.raises(SampleError, match=r"a.png: values \[4, 300\] stand for no category"):
        segments_from_values(values, {7: 1, 0: None}.__getitem__, "a.png")


def test_pictures_that_cannot_be_read(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for read, name in ((read_image, "a.jpg"), (read_color_map, "a.png")):
        content = io.BytesIO()
        Image.fromarray(noise).save(content, format="JPEG" if name.endswith("jpg") else "PNG")
        (tmp_path / name).write_bytes(content.getvalue()[: len(content.getvalue()) // 2])
        assert not ImageFile.LOAD_TRUNCATED_IMAGES
        with pytest.raises(SampleError, match=name):
            read(tmp_path / name)
        with pytest.raises(SampleError, match="no file"):
            read(tmp_path / f"no_{name}")
    shutil.rmtree(tmp_path)
