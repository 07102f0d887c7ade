"""The page on fine-tuning, pasted line by line into a shell."""

import os
import re
import subprocess
import sys

import pytest

from paths import ROOT


BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INSTALLED = ("datasets", "pycocotools", "torchvision", "accelerate", "yaml")


@pytest.mark.slow
def test_commands_of_the_page_work(tmp_path):
    for package in INSTALLED:
        pytest.importorskip(package)
    for name in ("examples", "proscale_hf"):
        (tmp_path / name).symlink_to(ROOT / name)
    commands = "\n".join(BLOCK.findall((ROOT / "docs" / "fine_tuning.md").read_text()))
    # What an installation gives: both commands, and pip has nothing left to do.
    shell = f"""
        set -e
        pip() {{ test "$1" = install; }}
        python() {{ '{sys.executable}' "$@"; }}
        proscale() {{ '{sys.executable}' -m proscale_hf "$@"; }}
    """
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(tmp_path / "cache"),
    }
    result = subprocess.run(
        ["bash", "-c", shell + commands], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert "triangle" in result.stdout
    row = next(line for line in result.stdout.splitlines() if line.startswith("| `shapes`"))
    assert float(row.split("|")[2]) > 30  # AP in percent
    pictures = [tmp_path / "overlay.png", *(tmp_path / "look").glob("*.png")]
    assert len(pictures) > 1 and all(picture.stat().st_size for picture in pictures)
    assert {path.name for path in (tmp_path / "shapes").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "README.md",
        "recipe.yaml",
    }
