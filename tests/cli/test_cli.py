"""`proscale segment`: what it writes, and the one line it says when it cannot."""

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import TINY_RESNET, tiny_model
from proscale_hf import ProScaleMask2FormerImageProcessorPil
from proscale_hf.cli import console, loading, main
from proscale_hf.cli.console import progress
from proscale_hf.files.whole import write_whole
from proscale_hf.processing.pictures import load_image, save_image


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> Path:
    """A tiny model that is sure of class 1 everywhere, so that something is found; class 3 is stuff."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model = tiny_model(seed=1)
    with torch.no_grad():
        model.class_predictor.bias[1] += 20
    model.save_pretrained(folder)
    processor = ProScaleMask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96})
    processor.label_ids_to_fuse = [3]
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(saved_model, tmp_path) -> Path:
    """A copy to damage."""
    return shutil.copytree(saved_model, tmp_path / "model")


@pytest.fixture
def photo(tmp_path, monkeypatch) -> str:
    """A photo in the current folder, which is empty but for it."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(console, "PATIENCE", 600.0)  # a slow machine must not add lines to stderr
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((160, 120)).save("photo.jpg")
    return "photo.jpg"


def fails(capsys, arguments: list, exit_code: int = 1) -> str:
    """Runs a command that must fail with one line and leave no file behind; returns that line."""
    before = sorted(os.listdir())
    assert main([str(argument) for argument in arguments]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert sorted(os.listdir()) == before
    return captured.err


class TestSegment:
    def test_default_output(self, photo, saved_model, capsys):
        assert main(["segment", photo, "--model", str(saved_model)]) == 0
        assert sorted(os.listdir()) == ["photo.jpg", "photo_segmented.png"]
        with Image.open("photo_segmented.png") as picture:
            assert picture.width / picture.height == pytest.approx(4 / 3)
        table, wrote = capsys.readouterr().out.strip().rsplit("\n", 1)
        assert "LABEL_1" in table and "1.00" in table and "% of the picture" in table
        assert wrote == "wrote photo_segmented.png"

    @pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
    def test_tasks(self, photo, saved_model, task):
        arguments = ["--model", str(saved_model), "--task", task, "--output", "o.webp", "--json", "s.json"]
        assert main(["segment", photo, *arguments]) == 0
        assert Image.open("o.webp").format == "WEBP"
        content = json.loads(Path("s.json").read_text())
        assert (content["task"], content["height"], content["width"]) == (task, 120, 160)
        assert content["segments"]
        for number, segment in enumerate(content["segments"], start=1):
            assert segment["id"] == number
            assert (segment["label"], segment["label_id"], segment["isthing"]) == ("LABEL_1", 1, True)
            assert segment["category_id"] is None
            left, top, width, height = segment["bbox"]
            assert 0 < segment["area"] <= width * height
            assert left + width <= 160 and top + height <= 120
            assert segment["segmentation"]["size"] == [120, 160]
            assert (segment["score"] is None) == (task == "semantic")

    @pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
    def test_the_data_sets_own_ids_and_colors(self, photo, model_copy, task):
        categories = [{"id": 10 * label_id, "name": f"LABEL_{label_id}"} for label_id in range(4)]
        is_thing = int(task == "instance")  # stuff has no instances
        categories[1] = {"id": 184, "name": "tree-merged", "isthing": is_thing, "color": [1, 250, 35]}
        names = {label_id: category["name"] for label_id, category in enumerate(categories)}
        change_config(model_copy, categories=categories, id2label=names)
        arguments = ["--model", str(model_copy), "--task", task, "--output", "o.png", "--json", "s.json"]
        assert main(["segment", photo, *arguments]) == 0
        segments = json.loads(Path("s.json").read_text())["segments"]
        assert {(s["label"], s["label_id"], s["category_id"]) for s in segments} == {("tree-merged", 1, 184)}
        assert (np.array(Image.open("o.png")) == (1, 250, 35)).all(axis=-1).any()

    def test_categories_of_other_labels_are_not_used(self, photo, model_copy):
        change_config(
            model_copy, categories=[{"id": 8, "name": "cat"}, {"id": 9, "name": "dog", "color": [1, 250, 35]}]
        )
        main(["segment", photo, "--model", str(model_copy), "--output", "o.png", "--json", "s.json"])
        segments = json.loads(Path("s.json").read_text())["segments"]
        assert segments and all(segment["category_id"] is None for segment in segments)
        assert not (np.array(Image.open("o.png")) == (1, 250, 35)).all(axis=-1).any()

    def test_stuff_is_what_the_models_labels_say(self, photo, model_copy):
        """And not what the image processor's list, which is that of other labels perhaps."""
        names = {label_id: f"LABEL_{label_id}" for label_id in range(4)}
        for is_thing in (0, 1):
            categories = [{"id": i, "name": name, "isthing": is_thing} for i, name in names.items()]
            change_config(model_copy, categories=categories, id2label=names)
            arguments = ["--model", str(model_copy), "--task", "instance", "--json", "s.json"]
            assert main(["segment", photo, *arguments]) == 0
            segments = json.loads(Path("s.json").read_text())["segments"]
            assert bool(segments) == is_thing and all(segment["isthing"] for segment in segments)

    def test_top_k(self, photo, saved_model):
        found = []
        for options in ([], ["--top-k", "2"], ["--top-k", "1"]):
            arguments = ["--model", str(saved_model), "--task", "instance", "--json", "s.json", *options]
            assert main(["segment", photo, *arguments]) == 0
            found.append(json.loads(Path("s.json").read_text())["segments"])
        assert len(found[0]) > 2
        for number, segments in ((2, found[1]), (1, found[2])):  # the best ones, as without the option
            assert [segment["score"] for segment in segments] == [segment["score"] for segment in found[0][:number]]

    def test_same_photo_same_files(self, photo, saved_model):
        for name in ("a", "b"):
            main(["segment", photo, "--model", str(saved_model), "--output", f"{name}.png", "--json", f"{name}.json"])
        assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
        assert Path("a.json").read_bytes() == Path("b.json").read_bytes()

    def test_nothing_found(self, photo, model_copy, capsys):
        model = tiny_model()
        with torch.no_grad():
            model.class_predictor.bias[-1] += 20  # sure that there is no object
        model.save_pretrained(model_copy)
        assert main(["segment", photo, "--model", str(model_copy), "--json", "s.json"]) == 0
        assert "nothing found" in capsys.readouterr().out
        assert json.loads(Path("s.json").read_text())["segments"] == []

    @pytest.mark.parametrize("size", [(1, 1), (1000, 2), (2, 1000)])
    @pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
    def test_odd_sizes(self, photo, saved_model, size, task):
        Image.new("RGB", size, "red").save("odd.png")
        assert main(["segment", "odd.png", "--model", str(saved_model), "--task", task]) == 0
        assert Path("odd_segmented.png").is_file()

    def test_without_torchvision_the_result_is_the_same_kind(self, photo, saved_model, monkeypatch):
        monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
        _, processor = loading.load_model(str(saved_model))
        assert type(processor) is ProScaleMask2FormerImageProcessorPil
        assert processor.label_ids_to_fuse == [3]


def test_a_warning_is_one_line(photo, saved_model, monkeypatch, capsys):
    """A word from the library, without the place in its code."""
    monkeypatch.setattr(
        "proscale_hf.cli.segment.segment_image", lambda *_: warnings.warn("that is a guess", stacklevel=1) or []
    )
    assert main(["segment", photo, "--model", str(saved_model)]) == 0
    assert capsys.readouterr().err.splitlines()[-1] == "warning: that is a guess"


class TestWrongCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "hint"),
        [
            ([], "COMMAND"),
            (["paint"], "choose from"),
            (["segment"], "PHOTO"),
            (["segment", "photo.jpg", "other.jpg"], "other.jpg (see proscale segment --help)"),
            (["figure", "recalibration", "a.png", "--output", "b.png", "--x"], "--x (see proscale figure recal"),
            (["segment", "photo.jpg", "--task", "depth"], "panoptic"),
            (["segment", "photo.jpg", "--output", "o.xyz"], ".png"),
            (["segment", "photo.jpg", "--output", "o"], ".png"),
            (["segment", "photo.jpg", "--output", "nowhere/o.png"], "create it first"),
            (["segment", "photo.jpg", "--output", "folder.png"], "is a folder"),
            (["segment", "photo.jpg", "--output", "photo.jpg"], "same file"),
            (["segment", "photo.jpg", "--json", "./photo_segmented.png"], "same file"),
            (["segment", "photo.jpg", "--json", "/dev/null"], "not a regular file"),
            (["segment", "photo.jpg", "--json", ""], "is a folder"),
        ],
    )
    def test_one_line(self, photo, capsys, arguments, hint):
        os.mkdir("folder.png")
        assert hint in fails(capsys, arguments, exit_code=2)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
    def test_folder_without_permission(self, photo, capsys):
        os.mkdir("locked", mode=0o500)
        assert "may not be written" in fails(capsys, ["segment", photo, "--output", "locked/o.png"], exit_code=2)

    def test_no_demo_model(self, photo, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr(loading, "DEMO_MODEL", tmp_path / "absent")
        assert "--model" in fails(capsys, ["segment", photo], exit_code=2)


def jpeg_bytes() -> bytes:
    file = io.BytesIO()
    Image.effect_noise((200, 200), 80).convert("RGB").save(file, format="JPEG")
    return file.getvalue()


class TestBadPhotos:
    @pytest.mark.parametrize(
        ("content", "hint"),
        [
            (b"", "is empty"),
            (b"hello, I am a text", "not an image"),
            (jpeg_bytes()[:3000], "damaged"),
            (jpeg_bytes()[:20], "not an image"),
        ],
    )
    def test_bad_content(self, photo, saved_model, capsys, content, hint):
        Path("bad.jpg").write_bytes(content)
        line = fails(capsys, ["segment", "bad.jpg", "--model", saved_model])
        assert hint in line and "bad.jpg" in line

    @pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
    def test_cut_or_scrambled_files_give_a_value_error_or_a_picture(self, tmp_path, file_format):
        file = io.BytesIO()
        Image.effect_noise((64, 64), 80).save(file, format=file_format)
        whole = file.getvalue()
        random = np.random.default_rng(0)
        path = tmp_path / "bad"
        for trial in range(40):
            content = bytearray(whole)
            if trial % 2:
                content = content[: random.integers(1, len(whole))]
            for position in random.integers(0, len(content), 5):
                content[position] = random.integers(256)
            path.write_bytes(content)
            try:
                assert load_image(path).mode == "RGB"
            except ValueError as error:
                assert "\n" not in str(error)

    @pytest.mark.parametrize(
        ("path", "hint"), [("missing.png", "no file"), (".", "folder"), ("/dev/null", "not a file")]
    )
    def test_no_file(self, photo, saved_model, capsys, path, hint):
        assert hint in fails(capsys, ["segment", path, "--model", saved_model, "--output", "o.png"])

    def test_too_many_pixels(self, photo, saved_model, capsys, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        assert "smaller" in fails(capsys, ["segment", photo, "--model", saved_model])


class TestKindsOfPhotos:
    def test_all_become_upright_rgb(self, tmp_path):
        grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
        image = Image.fromarray(grey)
        kinds = {
            "grey.png": image,
            "binary.png": image.convert("1"),
            "palette.png": image.convert("P"),
            "color_alpha.png": image.convert("RGBA"),
            "grey_alpha.png": image.convert("LA"),
            "ink.jpg": image.convert("CMYK"),
            "ink.tif": image.convert("CMYK"),
            "deep.png": Image.fromarray(grey.astype(np.uint16) * 257),
            "deep.tif": Image.fromarray(grey.astype(np.uint16) * 257),
            "float.tif": Image.fromarray(grey.astype(np.float32)),
        }
        for name, picture in kinds.items():
            picture.save(tmp_path / name)
            result = load_image(tmp_path / name)
            assert (result.mode, result.size) == ("RGB", (8, 8)), name
            if name not in ("binary.png", "ink.jpg", "float.tif"):
                assert np.abs(np.asarray(result).astype(int) - grey[..., None]).max() <= 3, name

    def test_transparent_parts_become_white(self, tmp_path):
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
        assert np.asarray(load_image(tmp_path / "clear.png")).min() == 255

    def test_exif_orientation(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter, clockwise
        Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
        assert load_image(tmp_path / "turned.jpg").size == (20, 30)

    def test_first_frame(self, tmp_path):
        frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
        frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
        assert load_image(tmp_path / "moving.gif").getpixel((0, 0)) == (255, 0, 0)


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestBadModels:
    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "preprocessor_config.json"])
    def test_missing_file(self, photo, model_copy, capsys, missing):
        (model_copy / missing).unlink()
        assert f"has no {missing}" in fails(capsys, ["segment", photo, "--model", model_copy])

    def test_pickled_weights_are_not_read(self, photo, model_copy, capsys):
        (model_copy / "model.safetensors").unlink()
        torch.save({}, model_copy / "pytorch_model.bin")
        assert "has no model.safetensors" in fails(capsys, ["segment", photo, "--model", model_copy])

    @pytest.mark.parametrize("size", [0, 4, 1000, 100_000])
    def test_truncated_weights(self, photo, model_copy, capsys, size):
        os.truncate(model_copy / "model.safetensors", size)
        assert "damaged or incomplete" in fails(capsys, ["segment", photo, "--model", model_copy])

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_weights_that_are_not_numbers(self, photo, model_copy, capsys, value):
        model = tiny_model()
        with torch.no_grad():
            model.class_predictor.weight[0, 0] = value
        model.save_pretrained(model_copy)
        assert "class_predictor.weight" in fails(capsys, ["segment", photo, "--model", model_copy])

    def test_statistics_that_are_not_numbers(self, photo, model_copy, capsys):
        model = tiny_model(backbone_config=TINY_RESNET)
        name, mean = next((n, b) for n, b in model.named_buffers() if n.endswith("running_mean"))
        mean[0] = float("nan")
        model.save_pretrained(model_copy)
        assert name in fails(capsys, ["segment", photo, "--model", model_copy])

    def test_weights_of_another_size(self, photo, model_copy, capsys):
        change_config(model_copy, mask_feature_size=32)
        assert "do not belong" in fails(capsys, ["segment", photo, "--model", model_copy])

    def test_weights_of_a_smaller_model(self, photo, model_copy, capsys):
        change_config(model_copy, decoder_layers=6)
        assert "do not belong" in fails(capsys, ["segment", photo, "--model", model_copy])

    @pytest.mark.parametrize("content", ["{", "", "[]", "null", '{"encoder": "best"}'])
    def test_bad_config(self, photo, model_copy, capsys, content):
        (model_copy / "config.json").write_text(content)
        fails(capsys, ["segment", photo, "--model", model_copy])

    def test_another_kind_of_model(self, photo, model_copy, capsys):
        change_config(model_copy, model_type="mask2former")
        assert "model_type is mask2former" in fails(capsys, ["segment", photo, "--model", model_copy])

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("./absent", "no folder"),
            ("photo.jpg", "is a file"),
            ("nobody/nothing", "Hub"),
            ("not a name", "no folder"),
        ],
    )
    def test_no_such_model(self, photo, capsys, name, hint):
        assert hint in fails(capsys, ["segment", photo, "--model", name])


class TestWriting:
    def test_nothing_is_left_when_writing_fails(self, tmp_path):
        target = tmp_path / "result.json"
        target.write_text("old")

        def write_half(file):
            file.write(b"half of it")
            raise OSError("disk full")

        with pytest.raises(ValueError, match="disk full"):
            write_whole(target, write_half)
        assert target.read_text() == "old" and os.listdir(tmp_path) == ["result.json"]

    def test_format_limits(self, tmp_path):
        with pytest.raises(ValueError, match="cannot write"):
            save_image(Image.new("RGB", (20_000, 2)), tmp_path / "wide.webp")
        assert os.listdir(tmp_path) == []

    def test_links_stay_links(self, tmp_path):
        (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
        save_image(Image.new("RGB", (2, 2)), tmp_path / "link.png")
        assert (tmp_path / "link.png").is_symlink() and (tmp_path / "real.png").is_file()


def test_progress_on_a_terminal_is_wiped(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("thinking"):
        pass
    assert "thinking..." in terminal.getvalue() and terminal.getvalue().endswith("\r\x1b[K")


def test_progress_elsewhere_is_silent_for_short_steps(monkeypatch, capsys):
    with progress("thinking"):
        pass
    assert capsys.readouterr().err == ""


def test_module_and_help():
    """The help needs neither torchvision nor the model's code."""
    code = (
        "import runpy, sys; sys.argv = ['proscale', 'segment', '--help']\n"
        "try: runpy.run_module('proscale_hf', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not [n for n in sys.modules if n.startswith(('torchvision', 'proscale_hf.models'))]"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--task {panoptic,instance,semantic}" in result.stdout
