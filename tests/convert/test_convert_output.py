"""A model folder is written completely or not at all, and its weights are in memory only once."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers import tiny_config, tiny_model
from paths import ROOT
from proscale_hf import ProScaleMask2FormerForUniversalSegmentation, ProScaleMask2FormerImageProcessorPil
from proscale_hf.convert import ConversionError
from proscale_hf.convert.model_building import build_model, expected_tensors, to_float32
from proscale_hf.convert.output import check_output, check_shard_size, write_model_folder


def write(output: Path, **options) -> None:
    write_model_folder(tiny_model(), ProScaleMask2FormerImageProcessorPil(), output, **options)


def everything_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def test_written_folder(tmp_path):
    write(tmp_path / "new" / "folder")
    assert everything_in(tmp_path)[:2] == [tmp_path / "new", tmp_path / "new" / "folder"]
    state = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "new" / "folder").state_dict()
    expected = tiny_model().state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ProScaleMask2FormerImageProcessorPil.from_pretrained(tmp_path / "new" / "folder")


@pytest.mark.parametrize("mask", [0o022, 0o007, 0o077])
def test_permissions_are_the_usual_ones(tmp_path, mask):
    """Weights are not for their owner's eyes only, as safetensors would have it."""
    before = os.umask(mask)
    try:
        write(tmp_path / "new" / "folder")
    finally:
        os.umask(before)
    for path in everything_in(tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path
    assert not list(tmp_path.rglob(".*"))


def test_shards(tmp_path):
    write(tmp_path / "folder", max_shard_size="200KB")
    shards = sorted((tmp_path / "folder").glob("model-*-of-*.safetensors"))
    assert len(shards) > 1
    assert all(shard.stat().st_size < 220_000 for shard in shards)
    names = [name for shard in shards for name in load_file(shard)]
    assert len(set(names)) == len(names) == len(tiny_model().state_dict())
    state = ProScaleMask2FormerForUniversalSegmentation.from_pretrained(tmp_path / "folder").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_model().state_dict().items())


@pytest.mark.parametrize("size", ["200MB", "5GB", "1.5gb", "0.5KB", "1TB"])
def test_shard_sizes(size):
    check_shard_size(size)


@pytest.mark.parametrize(
    "size", ["", "200", "MB", "-5MB", "0GB", "0.0GB", "1e3MB", "nanMB", "5 apples", "5MB\n", "5GiB"]
)
def test_impossible_shard_sizes(tmp_path, size):
    with pytest.raises(ConversionError, match="looks like 200MB or 5GB, not like"):
        write(tmp_path / "folder", max_shard_size=size)
    assert not everything_in(tmp_path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda output: output.write_text("x"), "exists already"),
        (lambda output: (output.mkdir(), (output / "file").write_text("x")), "exists already"),
        (lambda output: output.symlink_to(output.parent), "is a symbolic link"),
        (lambda output: output.symlink_to("nowhere"), "is a symbolic link"),
        (lambda output: (output.mkdir(), os.chdir(output)), "is a folder in use"),
        (lambda output: os.mkfifo(output), "exists already"),
    ],
)
def test_output_in_use(tmp_path, monkeypatch, prepare, message):
    monkeypatch.chdir(tmp_path)  # and back again afterwards
    prepare(tmp_path / "output")
    before = everything_in(tmp_path)
    for output in (tmp_path / "output", f"{tmp_path}/other/../output/"):
        with pytest.raises(ConversionError, match=message):
            check_output(output)
    assert everything_in(tmp_path) == before


def test_folder_above_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConversionError, match="file is no folder that you may write to"):
        check_output(tmp_path / "file" / "output")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_folder_above_without_permission(tmp_path):
    (tmp_path / "above").mkdir(mode=0o500)
    with pytest.raises(ConversionError, match="above is no folder that you may write to"):
        check_output(tmp_path / "above" / "output")


def test_an_empty_folder_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder")
    assert (tmp_path / "folder" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), RuntimeError("other")])
def test_nothing_stays_of_a_failed_write(tmp_path, monkeypatch, error):
    def fail(self, folder, **options):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "half").write_text("x")
        raise error

    monkeypatch.setattr(ProScaleMask2FormerImageProcessorPil, "save_pretrained", fail)
    with pytest.raises(ConversionError if isinstance(error, OSError) else type(error)) as raised:
        write(tmp_path / "new" / "folder")
    if isinstance(error, OSError):
        assert str(raised.value) == f"{tmp_path}/new/folder cannot be written: No space left on device."
    assert not everything_in(tmp_path)


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_what_appears_in_the_meantime_stays(tmp_path, monkeypatch, kind):
    """A link that is put in the folder's place is not followed, a folder with files not replaced."""
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "output"
    elsewhere.mkdir()

    def save(self, folder, **options):
        if kind == "link":
            output.symlink_to(elsewhere)
        else:
            output.mkdir()
            (output / "file").write_text("x")

    monkeypatch.setattr(ProScaleMask2FormerImageProcessorPil, "save_pretrained", save)
    with pytest.raises(ConversionError, match=r"cannot write .*output: "):
        write(output)
    assert not everything_in(elsewhere)
    assert everything_in(tmp_path) == [elsewhere, output] + ([output / "file"] if kind == "folder" else [])


WRITE_IN_A_PROCESS = """
import resource, signal, sys
from helpers import tiny_model
from proscale_hf.convert import ConversionError
from proscale_hf.convert.output import write_model_folder
from proscale_hf import ProScaleMask2FormerImageProcessorPil as ImageProcessor

class Waiting(ImageProcessor):
    def save_pretrained(self, folder):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        print("ready", flush=True)
        signal.pause()

model = tiny_model()
if sys.argv[2] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_model_folder(model, ImageProcessor() if sys.argv[2] == "full" else Waiting(), sys.argv[1])
except ConversionError as error:
    sys.exit(f"error: {error}")
"""


def start(output: Path, mode: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", WRITE_IN_A_PROCESS, str(output), mode],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_no_space_left(tmp_path):
    _, errors = start(tmp_path / "output", "full").communicate(timeout=120)
    assert "output cannot be written: " in errors.splitlines()[-1]
    assert "File too large" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert not everything_in(tmp_path)


def test_interruption(tmp_path):
    process = start(tmp_path / "new" / "output", "wait")
    assert process.stdout.readline() == "ready\n"
    assert everything_in(tmp_path)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode
    assert not everything_in(tmp_path)


def test_model_around_tensors():
    """Tensors become the weights themselves; parts of a larger one, and other types, are copied one by one."""
    model = tiny_model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del state["criterion.empty_weight"]
    names = [name for name in state if name.endswith("_proj.weight")][:3]
    half, part, own = names
    state[half] = state[half].half()
    state[part] = torch.cat((state[part], state[part]))[: len(state[part])]
    expected, address = dict(state), state[own].data_ptr()
    assert expected_tensors(model.config).keys() == model.state_dict().keys()
    assert all(tensor.is_meta for tensor in expected_tensors(model.config).values())

    built = build_model(model.config, to_float32(state))
    assert not state
    assert not built.training
    assert built.get_parameter(own).data_ptr() == address
    parameter = built.get_parameter(part)
    assert parameter.untyped_storage().nbytes() == parameter.nbytes
    for name, tensor in built.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        assert torch.equal(tensor, expected.get(name, model.state_dict()[name]).to(tensor.dtype)), name
    for (name, buffer), (_, built_buffer) in zip(model.named_buffers(), built.named_buffers(), strict=True):
        assert torch.equal(buffer, built_buffer), name


def test_model_with_absent_weights():
    """What is not given is initialised, as for a new model, and is not what happened to be in memory."""
    model = build_model(tiny_config(), {})
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(
        model.get_parameter("model.pixel_level_module.encoder.hidden_states_norms.stage1.weight"), torch.ones(8)
    )
