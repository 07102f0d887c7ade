"""The kernel as `kernels` loads it from the local folder, built first where sources are newer."""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).resolve().parent.parent


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session", autouse=True)
def compiler():
    """Without one there is nothing to test."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="session")
def builder():
    return load_module("build_ms_deform_attn", ROOT / "build.py")


@pytest.fixture(scope="session")
def variant(builder):
    """The folder of the build for this PyTorch."""
    return builder.build(ROOT / "build", allow_cuda=torch.cuda.is_available())


@pytest.fixture(scope="session")
def kernel(variant):
    kernels = pytest.importorskip("kernels")
    return kernels.get_local_kernel(ROOT)
