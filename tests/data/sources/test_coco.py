"""COCO's formats: against recorded data, against pycocotools, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


datasets = pytest.importorskip("datasets")
coco_mask = pytest.importorskip("pycocotools.mask")
COCO = pytest.importorskip("pycocotools.coco").COCO

from paths import FIXTURES
from proscale_hf.data.categories import load_categories
from proscale_hf.data.opening import open_dataset
from proscale_hf.data.reading import read_color_map
from proscale_hf.data.sample import SampleError
from proscale_hf.data.sources import json_arrays
from proscale_hf.data.sources.json_arrays import read_array
from proscale_hf.evaluation.panoptic_quality import PanopticQuality
from proscale_hf.processing.packed_masks import unpack_masks
from proscale_hf.processing.run_length import decompress_counts


FIXTURE = FIXTURES / "panoptic_quality"
HEIGHT, WIDTH = 30, 40


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# Panoptic


@pytest.fixture
def panoptic(tmp_path):
    """The recorded ground truth in COCO's layout, with black images; and its JSON, to be changed."""
    root = tmp_path / "coco"
    shutil.copytree(FIXTURE / "panoptic_gt", root / "annotations" / "panoptic_val")
    content = json.loads((FIXTURE / "panoptic_gt.json").read_text())
    (root / "val").mkdir()
    for image in content["images"]:
        Image.new("RGB", (image["width"], image["height"])).save(root / "val" / image["file_name"])
    return root, content


def open_panoptic(root, content, **options):
    (root / "annotations" / "panoptic_val.json").write_text(json.dumps(content))
    return open_dataset("coco_panoptic", root=root, split="val", **options)


def test_panoptic_equals_the_recorded_data(panoptic):
    root, content = panoptic
    dataset = open_panoptic(root, content)
    assert len(dataset) == len(content["annotations"]) == 12
    assert [category["id"] for category in dataset.categories] == [entry["id"] for entry in content["categories"]]
    for sample, annotation in zip(dataset, content["annotations"], strict=True):
        assert sample.image_id == annotation["image_id"]
        assert Path(sample.file_name).is_file()
        areas = {segment["id"]: int((sample.segment_map == segment["id"]).sum()) for segment in sample.segments}
        assert areas == {segment["id"]: segment["area"] for segment in annotation["segments_info"]}
        assert [dataset.categories[segment["label_id"]]["id"] for segment in sample.segments] == [
            segment["category_id"] for segment in annotation["segments_info"]
        ]
        assert [s["iscrowd"] for s in sample.segments] == [s["iscrowd"] for s in annotation["segments_info"]]


def test_panoptic_quality_of_the_samples_against_the_files_is_perfect(panoptic):
    root, content = panoptic
    quality = PanopticQuality(
        [c["id"] for c in content["categories"] if c["isthing"]],
        [c["id"] for c in content["categories"] if not c["isthing"]],
    )
    dataset = open_panoptic(root, content)
    for sample, annotation in zip(dataset, content["annotations"], strict=True):
        planes, labels = sample.packed_masks()
        masks = unpack_masks(planes, len(labels)).numpy() == 1
        prediction = sum(index * mask.astype(int) for index, mask in enumerate(masks, start=1)) + np.zeros(
            masks.shape[1:], int
        )
        segments = [
            {"id": i, "category_id": dataset.categories[k]["id"]} for i, k in enumerate(labels.tolist(), start=1)
        ]
        truth = read_color_map(FIXTURE / "panoptic_gt" / annotation["file_name"])
        quality.update(prediction, segments, truth, annotation["segments_info"])
    assert quality.compute()["All"]["pq"] == 1.0


def test_the_order_of_coco_is_things_first(panoptic):
    root, content = panoptic
    known = load_categories("coco_panoptic")
    content |= {"categories": sorted(known, key=lambda category: category["id"]), "annotations": []}
    content["annotations"] = [{"image_id": 10, "file_name": "000000.png", "segments_info": []}]
    assert open_panoptic(root, content).categories == known
    content["categories"] = content["categories"][::2]
    assert [c["id"] for c in open_panoptic(root, content).categories] == [c["id"] for c in content["categories"]]


def test_categories_of_ones_own_choice(panoptic, tmp_path):
    root, content = panoptic
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content["categories"][::-1]))
    dataset = open_panoptic(root, content, categories=path)
    assert [c["id"] for c in dataset.categories] == [c["id"] for c in content["categories"]][::-1]
    first = content["annotations"][0]["segments_info"][0]["category_id"]
    assert dataset.categories[dataset[0].segments[0]["label_id"]]["id"] == first


def test_files_at_other_places(panoptic):
    root, content = panoptic
    expected = [sample.image_id for sample in open_panoptic(root, content)]
    dataset = open_dataset(
        "coco_panoptic",
        images=root / "val",
        annotations=root / "annotations" / "panoptic_val.json",
        segment_maps=root / "annotations" / "panoptic_val",
    )
    assert [sample.image_id for sample in dataset] == expected


def test_an_edited_json_is_read_again(panoptic):
    root, content = panoptic
    assert len(open_panoptic(root, content)) == 12
    content["annotations"] = content["annotations"][3:]
    content["categories"][0]["name"] = "renamed"
    dataset = open_panoptic(root, content)
    assert len(dataset) == 9 and dataset.categories[0]["name"] == "renamed"


def test_segments_without_pixels_are_left_out(panoptic):
    root, content = panoptic
    expected = open_panoptic(root, content)[0]
    listed = content["annotations"][0]["segments_info"]
    listed.insert(1, {**listed[0], "id": 77})
    sample = open_panoptic(root, content)[0]
    assert sample.segments == expected.segments and (sample.segment_map == expected.segment_map).all()
    listed[:] = [listed[1]]
    with pytest.raises(SampleError, match=r"ids \[77\] in the list alone"):
        open_panoptic(root, content)[0]


def test_category_ids_outside_the_list_are_all_named(panoptic):
    root, content = panoptic
    content["annotations"][2]["segments_info"][0]["category_id"] = 991
    content["annotations"][5]["segments_info"][0]["category_id"] = 992
    content["annotations"][6]["segments_info"][1]["category_id"] = 991
    with pytest.raises(ValueError, match=r"991 \(2 times\), 992 \(1 times\); image 12, for example"):
        open_panoptic(root, content)


def change(path):
    def apply(content):
        *parents, last, value = path
        for key in parents:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (("categories", None), 'no array "categories"'),
        (("categories", []), "categories in .* is empty"),
        (("categories", 0, "isthing", None), "isthing"),
        (("categories", 1, "name", "class_0"), "occurs 2 times"),
        (("annotations", None), 'no array "annotations"'),
        (("annotations", []), "there is no annotation"),
        (("annotations", 0, "segments_info", 0, "iscrowd", "no"), '"iscrowd" must be 0 or 1'),
        (("images", None), 'no array "images"'),
        (("images", 1, "id", 10), "image 10 is listed twice"),
        (("images", 1, "id", "ten"), "ids .* of one kind"),
        (("images", 0, "file_name", "../../secret.jpg"), r"image 10 in .*val.json: .* not the name of a file inside"),
        (("annotations", 0, "file_name", "/etc/passwd"), "not the name of a file inside"),
        (("annotations", 0, "image_id", 999), "image 999 of an annotation is not under"),
        (("annotations", 0, "image_id", None), r'"image_id" of an annotation in .*val.json is missing'),
        (("annotations", 0, "segments_info", None), r'"segments_info" of the annotation of image 10 in .*val.json'),
        (("annotations", 0, "segments_info", 0, "category_id", "x"), '"category_id" of a segment .* image 10'),
        (("annotations", 0, "segments_info", 0, "id", True), '"id" of a segment'),
    ],
)
def test_panoptic_json_that_is_refused(panoptic, path, message):
    root, content = panoptic
    change(path)(content)
    with pytest.raises(ValueError, match=message) as error:
        open_panoptic(root, content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root, content: change(("annotations", 0, "segments_info", 0, "id", 7))(content),
            r"\[51448\] are in the",
        ),
        (lambda root, content: (root / "val" / "000000.jpg").unlink(), "no file .*000000.jpg"),
        (lambda root, content: (root / "annotations/panoptic_val/000000.png").unlink(), "no file .*000000.png"),
        (lambda root, content: Image.new("RGB", (9, 9)).save(root / "val" / "000000.jpg"), "9 x 9 .* 123 x 119"),
        (
            lambda root, content: Image.new("L", (119, 123)).save(root / "annotations/panoptic_val/000000.png"),
            "RGB picture",
        ),
        (lambda root, content: (root / "val" / "000000.jpg").write_bytes(b"\xff\xd8\xff junk"), "000000.jpg"),
    ],
)
def test_panoptic_samples_that_are_refused(panoptic, spoil, message):
    root, content = panoptic
    spoil(root, content)
    with pytest.raises(SampleError, match=message) as error:
        open_panoptic(root, content)[0]
    assert "\n" not in str(error.value)
    skipping = open_panoptic(root, content, on_error="skip")
    assert skipping[0].image_id == 11 and [Path(name).name for name in skipping.skipped] == ["000000.jpg"]


def test_an_image_that_exif_turns(panoptic):
    root, content = panoptic
    turn = Image.Exif()
    turn[0x0112] = 6
    Image.new("RGB", (123, 119)).save(root / "val" / "000000.jpg", exif=turn)
    assert open_panoptic(root, content)[0].image.size == (119, 123)  # the annotation is of the upright picture
    Image.new("RGB", (119, 123)).save(root / "val" / "000000.jpg", exif=turn)
    with pytest.raises(SampleError, match="EXIF"):
        open_panoptic(root, content)[0]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match="Give root and split, or images"):
        open_dataset("coco_panoptic")
    with pytest.raises(ValueError, match=r"no .*val2017; check root and split"):
        open_dataset("coco_panoptic", root=tmp_path, split="val2017")
    with pytest.raises(ValueError, match=r"no .*nowhere; check images"):
        open_dataset("coco_instance", root=tmp_path, split="val2017", images=tmp_path / "nowhere")


# Instances


def random_shape(generator, kind):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
    top, left = generator.integers(0, HEIGHT - 8), generator.integers(0, WIDTH - 8)
    mask[top : top + 8, left : left + 8] = generator.random((8, 8)) > 0.3
    code = coco_mask.encode(mask)
    if kind == "compressed":
        return {"size": [HEIGHT, WIDTH], "counts": code["counts"].decode()}
    if kind == "uncompressed":
        return {"size": [HEIGHT, WIDTH], "counts": decompress_counts(code["counts"].decode())}
    polygons = generator.random((2, 5, 2)) * [WIDTH + 2, HEIGHT + 2] - 1  # a little over the edges
    return [polygon.round(2).ravel().tolist() for polygon in polygons]


@pytest.fixture
def instances(tmp_path):
    """Images with polygons and both kinds of run-length codes, in COCO's layout; the annotations in random order."""
    generator = np.random.default_rng(0)
    root = tmp_path / "coco"
    (root / "val").mkdir(parents=True)
    (root / "annotations").mkdir()
    images = [{"id": 5 + i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH} for i in range(6)]
    for image in images:
        Image.new("RGB", (WIDTH, HEIGHT)).save(root / "val" / image["file_name"])
    annotations = []
    for number in range(40):
        kind = ("polygons", "compressed", "uncompressed")[number % 3]
        annotations.append(
            {
                "id": number,
                "image_id": int(generator.integers(5, 9)),  # the last two images have none
                "category_id": int(generator.choice([4, 9])),
                "iscrowd": int(kind == "uncompressed"),
                "area": float(number),
                "segmentation": random_shape(generator, kind),
            }
        )
    categories = [{"id": 9, "name": "dög"}, {"id": 4, "name": "cat"}]
    return root, {"images": images, "annotations": annotations, "categories": categories}


def open_instances(root, content, **options):
    (root / "annotations" / "instances_val.json").write_text(json.dumps(content, ensure_ascii=False))
    return open_dataset("coco_instance", root=root, split="val", **options)


def test_instances_equal_pycocotools(instances):
    root, content = instances
    dataset = open_instances(root, content)
    reference = COCO(root / "annotations" / "instances_val.json")
    assert [sample.image_id for sample in dataset] == reference.getImgIds()
    for sample in dataset:
        expected = reference.loadAnns(reference.getAnnIds(imgIds=sample.image_id))
        assert len(expected) == len(sample.masks)
        for annotation, segment, mask in zip(expected, sample.segments, sample.masks, strict=True):
            assert np.array_equal(coco_mask.decode(mask), reference.annToMask(annotation))
            assert dataset.categories[segment["label_id"]]["id"] == annotation["category_id"]
            assert (segment["iscrowd"], segment["area"]) == (annotation["iscrowd"], annotation["area"])
        assert sample.packed_masks()[1].tolist() == [s["label_id"] for s in sample.segments if not s["iscrowd"]]
    assert [(c["name"], c["isthing"]) for c in dataset.categories] == [("dög", 1), ("cat", 1)]


def test_the_categories_of_coco_instances(instances):
    root, content = instances
    content["annotations"] = []
    content["categories"] = [{"id": c["id"], "name": c["name"]} for c in load_categories("coco_instance")]
    assert open_instances(root, content).categories == load_categories("coco_instance")


def test_empty_images_can_be_dropped(instances):
    root, content = instances
    content["annotations"] = [annotation for annotation in content["annotations"] if annotation["image_id"] != 6]
    crowd = next(annotation for annotation in content["annotations"] if annotation["iscrowd"])
    content["annotations"].append({**crowd, "image_id": 6})
    assert [row["image_id"] for row in open_instances(root, content).rows] == [5, 6, 7, 8, 9, 10]
    assert [row["image_id"] for row in open_instances(root, content, drop_empty=True).rows] == [5, 7, 8]


def test_polygons_without_three_points_are_left_out(instances):
    root, content = instances
    triangle = [1.0, 1.0, 9.0, 1.0, 9.0, 9.0]
    shapes = [[], [[1.0, 1.0, 9.0, 9.0]], [[1.0, 1.0, 9.0, 9.0], triangle]]
    content["annotations"] = [
        {"image_id": 5, "category_id": 4, "segmentation": shape, "iscrowd": 0} for shape in shapes
    ]
    sample = open_instances(root, content)[0]
    assert len(sample.segments) == 1
    expected = coco_mask.frPyObjects([triangle], HEIGHT, WIDTH)[0]
    assert sample.masks == [expected] and sample.segments[0]["area"] == coco_mask.area(expected)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ([[1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 4.0]], "odd number"),
        ([[1.0, 1.0, 2.0, 2.0, 3.0, 1e9]], "far out of the image"),
        ([[1.0, 1.0, 2.0, 2.0, 3.0, float("nan")]], "far out of the image"),
        ([[1.0, 1.0, 2.0, 2.0, 3.0, "x"]], r"must be \[x, y, x, y, ...\], numbers alone"),
        ([["1", "1", "9", "1", "9", "9"]], r"must be \[x, y, x, y, ...\], numbers alone"),
        ([[1, 1, 2, 2, 3, True]], "numbers alone"),
        ([[1, 1, 2, 2, 3, 10**400]], "cannot be used"),
        ([[-WIDTH, -HEIGHT, 2 * WIDTH, 2 * HEIGHT] * 40_000], "outline of a polygon is longer"),
        ({"size": [HEIGHT, WIDTH], "counts": [0.5] * (2 * HEIGHT * WIDTH)}, "must be whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [float(HEIGHT * WIDTH)]}, "must be whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH - 1, True]}, "must be whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": [2**32, HEIGHT * WIDTH - 2**32]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [[1]]}, "must be whole numbers"),
        ({"size": [HEIGHT, WIDTH], "counts": "o" * 9}, "larger than any image"),
        ({"size": [float(HEIGHT), WIDTH], "counts": [HEIGHT * WIDTH]}, "size of a run-length code"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "EXIF"),
        ({"size": [HEIGHT, WIDTH, 1], "counts": [HEIGHT * WIDTH]}, "size of a run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": [5, 5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": [-5, HEIGHT * WIDTH + 5]}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "52203"}, "do not add up"),
        ({"size": [HEIGHT, WIDTH], "counts": "o"}, "breaks off"),
        ({"size": [HEIGHT, WIDTH], "counts": "\x7f"}, "characters"),
        ({"size": [3, 3], "counts": [9]}, "annotation 3 x 3"),
        ({"size": [HEIGHT, WIDTH]}, "a run-length code has no counts"),
        ({"size": HEIGHT, "counts": [9]}, "size of a run-length code"),
        ({"size": [HEIGHT, WIDTH], "counts": 9}, "cannot be used"),
    ],
)
def test_shapes_that_are_refused(instances, shape, message):
    root, content = instances
    content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": shape}]
    with pytest.raises(SampleError, match=message) as error:
        open_instances(root, content)[0]
    assert "0.png" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": [1, 2, 3, 4, 5, 6]}, r"list of polygons, each \[x, y, x, y, ...\]"),
        ({"segmentation": [[1, 1], [5, 5], [9, 2]]}, r"list of polygons, each \[x, y, x, y, ...\]"),
        ({"segmentation": [{"x": 1, "y": 1}] * 3}, r"list of polygons, each \[x, y, x, y, ...\]"),
        ({"segmentation": [[[1, 1, 2], [5, 5, 2], [9, 2, 2]]]}, r"polygons \[x, y, x, y, ...\], or pairs"),
        ({"segmentation": [[[1, 1], [5, 5], 9, 2]]}, r"polygons \[x, y, x, y, ...\], or pairs"),
        ({"segmentation": [[{"x": 1, "y": 1}] * 3]}, r"polygons \[x, y, x, y, ...\], or pairs"),
        ({"segmentation": [[[[1, 1], [5, 5], [9, 2]]]]}, r"polygons \[x, y, x, y, ...\], or pairs"),
        *(
            ({"iscrowd": value}, r'image 5 in .*instances_val.json: "iscrowd" must be 0 or 1')
            for value in ("yes", "", 2, -1, 0.5, None, [], {}, float("nan"))
        ),
        ({"image_id": 10**30}, '"image_id"'),
        ({"segmentation": None}, r'"segmentation" of an annotation of image 5 in .*instances_val.json is missing'),
        ({"category_id": 77}, r"77 \(1 times\)"),
        ({"image_id": 77}, "image 77"),
    ],
)
def test_instance_json_that_is_refused(instances, changes, message):
    root, content = instances
    content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": [[1, 1, 5, 5, 9, 2]], **changes}]
    with pytest.raises(ValueError, match=message):
        open_instances(root, content)


def test_an_area_that_is_no_number_is_counted(instances):
    root, content = instances
    shape = [[1, 1, 5, 1, 5, 5, 1, 5]]
    content["annotations"] = [
        {"image_id": 5, "category_id": 4, "segmentation": shape, **area}
        for area in ({"area": 9.5}, {"area": float("nan")}, {})
    ]
    assert [segment["area"] for segment in open_instances(root, content)[0].segments] == [9.5, 16, 16]


def test_an_image_of_another_size_than_the_json_says(instances):
    root, content = instances
    content["images"][0]["width"] = WIDTH + 1
    content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": [[1, 1, 5, 5, 9, 2]]}]
    with pytest.raises(SampleError, match=r"the image is 30 x 40 .* annotation 30 x 41"):
        open_instances(root, content)[0]
    for image in content["images"]:
        del image["height"], image["width"]
    assert open_instances(root, content)[0].masks[0]["size"] == [HEIGHT, WIDTH]


def test_polygons_of_pairs_are_those_of_numbers(instances):
    root, content = instances
    square, hexagon = [[1, 1], [9, 1], [9, 9], [1, 9]], [[20, 5], [25, 5], [28, 10], [25, 15], [20, 15], [17.5, 10]]

    def masks(*polygons):
        content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": list(polygons)}]
        return open_instances(root, content)[0].masks

    expected = masks(*(np.ravel(polygon).tolist() for polygon in (square, hexagon)))
    assert masks(square, hexagon) == masks(np.ravel(square).tolist(), hexagon) == expected
    assert masks(square, [[1, 1], [2, 2]]) == masks(square)


@pytest.mark.parametrize(
    ("value", "expected"), [(0, 0), (1, 1), (False, 0), (True, 1), ("0", 0), ("1", 1), (1.0, 1)], ids=repr
)
def test_crowds_in_all_the_ways_they_are_written(instances, value, expected):
    root, content = instances
    shape = [[1, 1, 5, 1, 5, 5, 1, 5]]
    content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": shape, "iscrowd": value}]
    assert open_instances(root, content)[0].segments[0]["iscrowd"] == expected


def test_sizes_in_the_json_are_not_trusted(instances):
    root, content = instances
    side = 10**9
    content["images"][0] |= {"height": side, "width": side}
    shape = [[0, 0, side - 1, 0, side - 1, side - 1, 0, side - 1]]
    content["annotations"] = [{"image_id": 5, "category_id": 4, "segmentation": shape}]
    with pytest.raises(SampleError, match=r"0.png: the image is 30 x 40 .* annotation 1000000000 x 1000000000"):
        open_instances(root, content)[0]
    for value in (10**30, -1, 30.0, "30", True):
        content["images"][0]["height"] = value
        with pytest.raises(ValueError, match=r"image 5|0\.png"):
            open_instances(root, content)[0]


def test_compressed_codes_are_read_in_linear_time():
    with pytest.raises(ValueError, match="larger than any image"):
        decompress_counts("o" * 10_000_000)


class TestChosenCategories:
    @pytest.fixture
    def opened(self, instances, tmp_path):
        root, content = instances  # 9 is dög, 4 is cat

        def open_with(*categories, **known):
            path = tmp_path / "own.json"
            path.write_text(json.dumps([{"id": i, "name": name, "isthing": 1} for i, name in categories]))
            return open_instances(root, content, **(known or {"categories": path}))

        return open_with

    def test_order_and_ways_of_writing_are_free(self, opened):
        dataset = opened((4, "Cat"), (9, "dög, hound"), (2, "cow"))
        assert [category["name"] for category in dataset.categories] == ["Cat", "dög, hound", "cow"]

    @pytest.mark.parametrize(
        "categories", [[(9, "cat"), (4, "dög")], [(9, "dög"), (4, "kitten")], [(9, "cow"), (4, "cat")]]
    )
    def test_contradictions_are_refused(self, opened, categories):
        with pytest.raises(ValueError, match=r"The option categories calls id \d .*, but .*val.json calls it '"):
            opened(*categories)

    def test_known_sets(self, opened, instances):
        with pytest.raises(ValueError, match=r"calls id 4 'motorcycle', but .* calls it 'cat', and 1 more"):
            opened(categories="coco_instance")
        _, content = instances
        known = load_categories("coco_instance")
        content["annotations"] = []
        content["categories"] = [{"id": c["id"], "name": c["name"]} for c in known]
        content["categories"][3]["name"] = "aeroplane"  # a synonym
        assert opened(categories="coco_instance").categories == known
        content["categories"][3]["name"] = "train"  # the name of another
        with pytest.raises(ValueError, match="calls id"):
            opened(categories="coco_instance")

    def test_a_json_without_categories_needs_some(self, opened, instances):
        del instances[1]["categories"]
        assert len(opened((4, "cat"), (9, "dog")).categories) == 2


def test_panoptic_categories_that_contradict(panoptic, tmp_path):
    root, content = panoptic
    chosen = json.loads(json.dumps(content["categories"]))
    chosen[0]["name"], chosen[1]["name"] = chosen[1]["name"], chosen[0]["name"]
    (tmp_path / "own.json").write_text(json.dumps(chosen))
    with pytest.raises(ValueError, match=r"calls id .*, and 1 more: give categories"):
        open_panoptic(root, content, categories=tmp_path / "own.json")


def test_nothing_is_left(instances):
    root, content = instances
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 1
    with pytest.raises(ValueError, match="no image has an object that is no crowd"):
        open_instances(root, content, drop_empty=True)


# Large JSON files


@pytest.mark.parametrize("chunk", [1, 7, 64, 2**20])
def test_entries_equal_those_of_json(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(json_arrays, "CHUNK", chunk)
    content = {
        "info": {"x": [1, {"images": [3]}]},
        "version": 123456,
        "images": [{"name": 'ä"\\☃', "n": [1.5, -2e3]}, {}, {"long": "y" * 300}],
        "none": [],
        "numbers": [1234, 5, 67890],
        "annotations": [{"id": i, "text": "é" * i} for i in range(30)],
    }
    for text in (json.dumps(content), "\ufeff" + json.dumps(content, ensure_ascii=False, indent=2)):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        for key in ("images", "none", "numbers", "annotations"):
            entries = list(read_array(tmp_path / "a.json", key))
            assert [entry.value for entry in entries] == content[key]
            places = [text.encode()[start : start + length] for _, start, length in entries]
            assert [json.loads(place) for place in places] == content[key]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1', '{"a" 1}', '{"a": [1, 2', '{"a": [1 2]}', '{"images": [{"a": 1}', "{1}", '{"b": tru}'],
)
def test_text_that_is_no_json(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"a.json: (it is no valid JSON|it must be a JSON object|the file has no array)"
    ) as error:
        list(read_array(tmp_path / "a.json", "images"))
    assert "\n" not in str(error.value)


def test_text_that_nests_too_deeply(tmp_path):
    (tmp_path / "a.json").write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(ValueError, match=r"a.json.* no valid JSON"):
        list(read_array(tmp_path / "a.json", "images"))
