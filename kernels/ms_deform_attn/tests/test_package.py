"""The package as `kernels` and kernel-builder see it: layout, names, digests, ABI, and layers put into models."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_operators import Inputs


ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".inl"}


def test_build_file_is_valid_and_names_every_source(builder):
    rust = pytest.importorskip("kernels._rust")
    rust.Build.open(ROOT)  # kernel-builder's own parser
    config = builder.tomllib.loads((ROOT / "build.toml").read_text())
    named = {path.relative_to(ROOT) for backend in ("cpu", "cuda") for path in builder.sources_of(config, backend)}
    folders = ("ms_deform_attn_cpu", "ms_deform_attn_cuda", "torch-ext")
    there = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).glob("*")}
    assert named == {path for path in there if path.suffix in SOURCE_SUFFIXES}


def test_digests_and_metadata(variant):
    rust = pytest.importorskip("kernels._rust")
    metadata = rust.Metadata.read_from_file(variant / "metadata.json")
    assert metadata.id.startswith("_ms_deform_attn_") and (variant / f"{metadata.id}.abi3.so").is_file()
    metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, variant))


def test_library_needs_nothing_that_the_hub_does_not_allow(builder, variant):
    (library,) = variant.glob("*.so")
    assert builder.abi_complaints(library) == []


def test_abi_check_complains(builder, tmp_path):
    """About a symbol that is too new, a foreign library, and what is not of Python's stable ABI."""
    source, library = tmp_path / "bad.cpp", tmp_path / "bad.so"
    source.write_text(
        'extern "C" { int PyBad_New(); int __libc_start_main(); int zlibVersion();'
        " int all() { return PyBad_New() + __libc_start_main() + zlibVersion(); } }"
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", library], check=True)
    complaints = " ".join(builder.abi_complaints(library))
    assert "PyBad_New" in complaints
    if "GLIBC_2.34" in subprocess.run(["readelf", "--dyn-syms", library], capture_output=True, text=True).stdout:
        assert "__libc_start_main" in complaints


def test_the_same_sources_are_not_compiled_again(builder, variant, monkeypatch):
    monkeypatch.setattr(builder, "run", lambda command: pytest.fail("compiles"))
    assert builder.build(variant.parent, allow_cuda=torch.cuda.is_available()) == variant


def test_failure_is_one_line_and_leaves_nothing(tmp_path):
    command = [sys.executable, ROOT / "build.py", "--output", tmp_path / "build"]
    result = subprocess.run(command, env={"PATH": "/nonexistent"}, capture_output=True, text=True)
    assert result.returncode == 1
    assert "no C++ compiler" in result.stderr and "Traceback" not in result.stderr
    assert list((tmp_path / "build").iterdir()) == []


def test_older_loaders_find_the_package_inside(variant):
    """They import `<variant>/ms_deform_attn`."""
    code = (
        f"import sys; sys.path.insert(0, {str(variant)!r}); import torch, ms_deform_attn as kernel;"
        "print(sorted(kernel.__all__), kernel.ms_deform_attn(torch.ones(1, 1, 1, 8), [(1, 1)],"
        "torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)).sum().item())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    names = ["fused_ms_deform_attn", "layers", "ms_deform_attn", "reference"]
    assert result.stdout.strip() == f"{names} 8.0", result.stderr


def layers_of_models():
    modeling = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    pytest.importorskip("proscale_hf.layers.ms_deform_attn")
    from proscale_hf.layers import ms_deform_attn

    return [
        modeling.MultiScaleDeformableAttention,
        ms_deform_attn.MultiScaleDeformableAttention,
        ms_deform_attn.FusedMultiScaleDeformableAttention,
    ]


@pytest.mark.parametrize("index", range(3), ids=["transformers", "proscale", "proscale fused"])
def test_kernelize_puts_the_layers_into_models(variant, index, monkeypatch):
    kernels = pytest.importorskip("kernels")
    original = layers_of_models()[index]
    name = original.__name__
    # What transformers' decorator does, where transformers takes this version of `kernels`.
    monkeypatch.setattr(original, "kernel_layer_name", name, raising=False)
    mapping = {name: {"cpu": kernels.LocalLayerRepository(ROOT, layer_name=name)}}
    model = torch.nn.Sequential(original())
    with kernels.use_kernel_mapping(mapping, inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE, device="cpu")
    layer = model[0]
    assert layer.forward.__func__ is not original.forward

    inputs = Inputs([(6, 5), (3, 3)], head_dim=16)
    for form in ("points", "boxes") if name.startswith("Fused") else ("plain",):
        value, *others = inputs.arguments(form, torch.float32)
        rest = (64,) if form == "plain" else ()
        arguments = (value, torch.tensor(inputs.shapes), inputs.shapes, torch.tensor([0, 30]), *others, *rest)
        with torch.no_grad():
            torch.testing.assert_close(layer(*arguments), original()(*arguments), rtol=1e-4, atol=1e-4)
