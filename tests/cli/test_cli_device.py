"""`--device`, `--dtype` and `--use-kernels`: the model runs as asked, or one line says why not."""

import argparse

import pytest
import torch

from helpers import tiny_model
from proscale_hf.cli.console import CommandError
from proscale_hf.cli.device import add_device_options, place_model


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype):
    model = tiny_model()
    place_model(model, options("--dtype", dtype, "--device", "cpu"))
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_device_of_several_processes_goes_first():
    model = tiny_model()
    place_model(model, options("--device", "cpu"), torch.device("meta"))
    assert model.device.type == "meta"


def test_no_such_device():
    with pytest.raises(CommandError, match="cannot put the model on nonsense"):
        place_model(tiny_model(), options("--device", "nonsense"))


def test_kernels_without_their_library(monkeypatch):
    monkeypatch.setattr("proscale_hf.layers.kernels.kernelize", None)
    with pytest.raises(CommandError, match=r"proscale-hf\[kernels\]"):
        place_model(tiny_model(), options("--use-kernels", "--device", "cpu"))


def test_no_kernel_to_be_had(monkeypatch, capsys):
    monkeypatch.setattr("proscale_hf.models.base.use_kernel", lambda *_: "pytorch")
    place_model(tiny_model(), options("--use-kernels", "--device", "cpu"))
    assert "runs in PyTorch" in capsys.readouterr().err
