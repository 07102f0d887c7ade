"""Demo scenes: reproducible, consistent with their own description, and disjoint between the splits."""

import json
import subprocess
import sys

import numpy as np
import pytest


pytest.importorskip("skimage")
pytest.importorskip("sklearn")

import demo_scenes
from demo_scenes import ID2LABEL, STUFF_LABEL_IDS, THING_LABEL_IDS, DemoScenes
from paths import EXAMPLES
from proscale_hf.evaluation.panoptic_files import panoptic_quality_of_files


def run_command(*arguments):
    command = [sys.executable, str(EXAMPLES / "demo_scenes.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_command_writes_the_same_bytes_each_time(tmp_path):
    for name in ("first", "second"):
        assert run_command("--output", tmp_path / name, "--number", 5, "--seed", 3).returncode == 0
    first = contents(tmp_path / "first")
    assert len(first) == 11
    assert first == contents(tmp_path / "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "second"]


def test_scene_depends_on_split_seed_and_index_alone():
    scene = DemoScenes(4, "train", seed=1)[2]
    again = DemoScenes(100, "train", seed=1)[2]
    assert scene.image.tobytes() == again.image.tobytes()
    for other in (
        DemoScenes(4, "held-out", 1)[2],
        DemoScenes(4, "train", 2)[2],
        DemoScenes(4, "train", 1)[3],
    ):
        assert other.image.tobytes() != scene.image.tobytes()


def test_size_can_be_fixed():
    assert {scene.image.size for scene in DemoScenes(4, size=(130, 150))} == {(150, 130)}


def test_segments_describe_the_map():
    labels, sizes = set(), set()
    for scene in DemoScenes(60, "held-out", seed=5):
        height, width = scene.segment_ids.shape
        assert scene.image.size == (width, height)
        assert scene.image.mode == "RGB"
        assert 128 <= height <= 192
        assert 128 <= width <= 160
        assert set(np.unique(scene.segment_ids)) == set(scene.instance_id_to_semantic_id)
        for segment in scene.segments_info:
            mask = scene.segment_ids == segment["id"]
            left, top, box_width, box_height = segment["bbox"]
            inside = mask[top : top + box_height, left : left + box_width]
            assert inside.sum() == mask.sum() == segment["area"]
            assert all(edge.any() for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
        stuff = [segment["category_id"] for segment in scene.segments_info if segment["category_id"] in STUFF_LABEL_IDS]
        assert len(stuff) == len(set(stuff))
        assert 1 <= len(scene.segments_info) - len(stuff) <= 4
        labels |= {segment["category_id"] for segment in scene.segments_info}
        sizes.add((height, width))
    assert labels == set(ID2LABEL) == {*THING_LABEL_IDS, *STUFF_LABEL_IDS}
    assert len(sizes) > 50


def test_some_digits_overlap_but_none_is_lost():
    hidden = []
    generator = np.random.default_rng(0)
    for _ in range(50):
        segment_ids = np.ones((140, 140), dtype=np.int32)
        mask = np.ones((60, 60), dtype=bool)
        segment_ids[:60, :60] = 2
        place = demo_scenes.find_place(generator, mask, segment_ids, {2: 3600})
        segment_ids[place] = 3
        hidden.append(1 - (segment_ids == 2).sum() / 3600)
    assert 0 < max(hidden) <= 0.25


def test_crowded_place_is_given_up():
    segment_ids = np.full((40, 40), 2, dtype=np.int32)
    mask = np.ones((40, 40), dtype=bool)
    assert demo_scenes.find_place(np.random.default_rng(0), mask, segment_ids, {2: 1600}) is None


def test_splits_share_no_digit_and_no_photograph_pixel(monkeypatch):
    train, held_out = (demo_scenes.load_digit_split(split) for split in demo_scenes.SPLITS)
    assert len(train[1]) + len(held_out[1]) == 1797
    assert len(held_out[1]) == 450
    assert set(held_out[1]) == set(range(10))
    assert not {image.tobytes() for image in train[0]} & {image.tobytes() for image in held_out[0]}

    load_half = demo_scenes.load_photograph_half.__wrapped__  # past the cache
    photograph = demo_scenes.photographs.brick()
    left_changed, right_changed = photograph.copy(), photograph.copy()
    left_changed[:, :256] //= 2
    right_changed[:, 256:] //= 2
    halves = {}
    for name, picture in {"as it is": photograph, "left": left_changed, "right": right_changed}.items():
        monkeypatch.setattr(demo_scenes.photographs, "brick", lambda picture=picture: picture)
        halves[name] = [load_half("brick", split).tobytes() for split in demo_scenes.SPLITS]
    train, held_out = halves["as it is"]
    assert halves["left"][0] != train
    assert halves["left"][1] == held_out
    assert halves["right"][0] == train
    assert halves["right"][1] != held_out


def test_written_set_is_coco_panoptic(tmp_path):
    demo_scenes.write_scenes(DemoScenes(6, "held-out"), tmp_path / "set")
    truth = tmp_path / "set" / "panoptic.json", tmp_path / "set" / "panoptic"
    quality = panoptic_quality_of_files(*truth, *truth)
    assert quality["All"]["pq"] == quality["Things"]["pq"] == quality["Stuff"]["pq"] == 1.0
    categories = json.loads(truth[0].read_text())["categories"]
    assert {category["id"]: category["name"] for category in categories} == ID2LABEL
    assert [category["id"] for category in categories if not category["isthing"]] == STUFF_LABEL_IDS


def test_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "mine").touch()
    finished = run_command("--output", tmp_path, "--number", 1)
    assert finished.returncode != 0
    assert "is there already" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fail(generator, split, height, width):
        raise OSError("disk full")

    monkeypatch.setattr(demo_scenes, "draw_scene", fail)
    with pytest.raises(OSError, match="disk full"):
        demo_scenes.write_scenes(DemoScenes(2), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((1, "test"), "train, held-out"), ((-1,), "negative"), ((1, "train", -1), "negative")],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DemoScenes(*arguments)
