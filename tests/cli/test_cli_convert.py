"""`proscale convert` and `python -m convert`: the same converters, light until one of them is chosen."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import TINY_SWIN
from paths import FIXTURES, ROOT
from proscale_hf.cli import main
from proscale_hf.cli.convert import SOURCES, converter
from proscale_hf.cli.convert import main as convert


RECORDED = FIXTURES / "parity_r50"
DETECTRON2 = ["--config", str(RECORDED / "config.yaml"), "--checkpoint", str(RECORDED / "model_final.pth")]
HEAVY = ("torch", "transformers", "datasets", "yaml", "numpy", "pycocotools")


def printed(capsys, run, *arguments) -> str:
    """What a command prints; `--help` ends it by a SystemExit."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES)
def test_both_helps_say_the_same_under_their_own_names(capsys, source):
    module = source.replace("-", "_")
    assert (ROOT / "convert" / f"{module}.py").is_file()
    ours = printed(capsys, main, ["convert", source, "--help"])
    clones = printed(capsys, convert, source, ["--help"])
    assert ours.startswith(f"usage: proscale convert {source} ")
    assert clones.startswith(f"usage: python -m convert.{module} ")
    options = [help_text.partition("\noptions:")[2] for help_text in (ours, clones)]
    assert options[0] == options[1] and "--output" in options[0]


@pytest.mark.parametrize("script", ["detectron2", "transformers_mask2former"])
def test_script_of_a_clone(script, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"convert/{script}.py", "--output", "nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "convert" / f"{script}.py"), run_name="__main__")
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"(see python -m convert.{script} --help)" in error


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["evaluate", "--help"], ["figure", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\n"
        "from proscale_hf.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert not end.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [([], "SOURCE"), (["onnx"], "choose from"), (["detectron2", "--output", "x"], "--config"), (["--x"], "SOURCE")],
)
def test_wrong_command_lines(capsys, arguments, hint):
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and hint in error


@pytest.mark.parametrize(
    "run", [lambda words: main(["convert", "detectron2", *words]), lambda w: convert("detectron2", w)]
)
def test_without_pyyaml_one_line_says_what_to_install(capsys, monkeypatch, run):
    for module in ("detectron2", "detectron2_config"):
        monkeypatch.delitem(sys.modules, f"proscale_hf.convert.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert run([*DETECTRON2, "--output", "nowhere"]) == 1
    assert capsys.readouterr().err == 'error: yaml is not installed: pip install "proscale-hf[convert]"\n'


def test_a_model_of_transformers(tmp_path):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    sizes = {"feature_size": 32, "mask_feature_size": 16, "hidden_dim": 32, "num_attention_heads": 4}
    sizes |= {"encoder_feedforward_dim": 16, "dim_feedforward": 16, "encoder_layers": 2, "decoder_layers": 3}
    config = Mask2FormerConfig(backbone_config=TINY_SWIN, num_labels=2, num_queries=3, **sizes)
    Mask2FormerForUniversalSegmentation(config).save_pretrained(tmp_path / "theirs")
    output = tmp_path / "ours"
    arguments = ["--model", str(tmp_path / "theirs"), "--output", str(output)]
    assert main(["convert", "transformers-mask2former", *arguments]) == 0
    assert json.loads((output / "config.json").read_text())["encoder"] == "mask2former"


def test_a_list_of_tensors_keeps_its_lines(tmp_path, capsys, monkeypatch):
    from proscale_hf.convert import ConversionError

    def fail(options):
        raise ConversionError("These are missing:\n  a\n  b")

    monkeypatch.setattr(converter("detectron2"), "run", fail)
    assert main(["convert", "detectron2", *DETECTRON2, "--output", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err == "error: These are missing:\n  a\n  b\n"
    assert not Path(tmp_path / "new").exists()
