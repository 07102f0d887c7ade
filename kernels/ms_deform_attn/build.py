"""Build the kernel for the PyTorch of this Python, without Nix, into the layout that `kernels` loads.

    python kernels/ms_deform_attn/build.py

gives `build/torch213-cxx11-cpu-x86_64-linux/` and the like beside this file: what kernel-builder makes from the same
`build.toml`, by this machine's compilers. Afterwards `kernels.get_local_kernel(<this folder>)` works. `kernels` takes
only variants for the backend that torch is built for, so a torch for CUDA gets one of that name: with CPU code in any
case, and CUDA code if there is an nvcc for it.
"""

import argparse
import base64
import concurrent.futures
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent
TORCH_FLAGS = ["-DPy_LIMITED_API=0x03090000"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-unknown-pragmas"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]

# The newest symbol versions of manylinux_2_28, which kernels on the Hub must run on.
NEWEST_SYMBOLS = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
ALLOWED_LIBRARIES = re.compile(
    r"lib(c10|torch|c10_cuda|torch_cpu|torch_cuda|cudart|stdc\+\+|gcc_s|gomp|c|m|pthread|dl|rt)(-[0-9a-f]+)?\.so.*|ld-linux.*"
)
# What the extension module takes from Python, all part of the stable ABI.
ALLOWED_PYTHON_SYMBOLS = {"PyModule_Create2"}

REGISTRATION_HEADER = """\
// Written by build.py: what kernel-builder generates under the same name.

#pragma once

#include <Python.h>

#define MS_DEFORM_ATTN_TEXT_OF(NAME) #NAME
#define MS_DEFORM_ATTN_TEXT(NAME) MS_DEFORM_ATTN_TEXT_OF(NAME)
#define MS_DEFORM_ATTN_JOIN_OF(LEFT, RIGHT) LEFT##RIGHT
#define MS_DEFORM_ATTN_JOIN(LEFT, RIGHT) MS_DEFORM_ATTN_JOIN_OF(LEFT, RIGHT)

// With NAME expanded first.
#define TORCH_LIBRARY_EXPAND(NAME, MODULE) TORCH_LIBRARY(NAME, MODULE)

// Lets Python import the library, which registers the operators.
#define REGISTER_EXTENSION(NAME)                                                     \\
  PyMODINIT_FUNC MS_DEFORM_ATTN_JOIN(PyInit_, NAME)() {                              \\
    static PyModuleDef definition = {                                                \\
        PyModuleDef_HEAD_INIT, MS_DEFORM_ATTN_TEXT(NAME), nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr}; \\
    return PyModule_Create(&definition);                                             \\
  }
"""

OPS_MODULE = '''\
"""The operators of this build, under a name no other build has."""

import torch

from . import {name}


ops = torch.ops.{name}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{name}::{{op_name}}"
'''

# libstdc++ asks the glibc of this machine whether there are threads, in a variable that glibc 2.28 does not have.
PORTABILITY_SOURCE = """\
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;
"""

# Older versions of `kernels` look for a package of the kernel's name inside the variant.
COMPATIBILITY_MODULE = '''\
"""The package one folder up, for versions of `kernels` that look for it here."""

import importlib.util
import sys
from pathlib import Path


_path = Path(__file__).resolve().parent.parent / "__init__.py"
_name = "{name}_package"
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, _path)
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{name: value for name, value in vars(sys.modules[_name]).items() if not name.startswith("__")}})
__all__ = sys.modules[_name].__all__
'''


class BuildError(Exception):
    """Why there is no build, in one line."""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = ROOT / "build"
    parser.add_argument("--output", type=Path, default=default, help="where the variants go (default: %(default)s)")
    parser.add_argument(
        "--cuda", choices=["auto", "no"], default="auto", help="'no': CPU code only (default: %(default)s)"
    )
    parser.add_argument("--portable", action="store_true", help="refuse a library that manylinux_2_28 could not load")
    parser.add_argument("--sanitize", action="store_true", help="with AddressSanitizer and UndefinedBehaviorSanitizer")
    arguments = parser.parse_args()
    try:
        variant = build(arguments.output, arguments.cuda == "auto", arguments.portable, arguments.sanitize)
    except BuildError as error:
        sys.exit(f"build.py: {error}")
    print(variant)


def build(output: Path, allow_cuda: bool = True, portable: bool = False, sanitize: bool = False) -> Path:
    """Compile and lay out one variant, if it is not there yet; an older one stays until the new one is complete.

    Args:
        output: folder of the variants.
        allow_cuda: compile the CUDA sources where torch and nvcc permit.
        portable: refuse a library that manylinux_2_28 could not load; else only say so.
        sanitize: with AddressSanitizer and UndefinedBehaviorSanitizer.

    Returns:
        The variant's folder.

    Raises:
        BuildError: the machine lacks something, or the sources do not compile.
    """
    config = tomllib.loads((ROOT / "build.toml").read_text())
    package = config["general"]["name"].replace("-", "_")
    cuda = find_cuda() if allow_cuda else None
    # `kernels` takes only variants of the backend that torch is built for.
    backend = "cuda" if torch.version.cuda else "cpu"
    sources = sources_of(config, "cuda" if cuda else "cpu")
    python_files = sorted((ROOT / "torch-ext" / package).glob("*.py"))
    digest = digest_of([*sources, *python_files, ROOT / "build.toml", Path(__file__)], cuda, sanitize)
    name = f"_{package}_{backend}_{digest}"
    final = output / variant_name(backend)
    if not portable and is_build(final, name):
        return final
    capabilities = config["kernel"][f"{package}_cuda"]["cuda-capabilities"] if cuda else []

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".building-") as temporary:
        work, variant = Path(temporary) / "work", Path(temporary) / "variant"
        work.mkdir()
        (work / "registration.h").write_text(REGISTRATION_HEADER)
        variant.mkdir()
        for path in python_files:
            shutil.copy(path, variant)
        library = variant / f"{name}.abi3.so"
        compile_library(sources, name, library, work, cuda, capabilities, sanitize)
        if not sanitize:
            complaints = abi_complaints(library)
            if complaints and portable:
                raise BuildError(f"not portable: {'; '.join(complaints)}")
            for complaint in complaints:
                print(f"build.py: runs here, but is not for the Hub: {complaint}", file=sys.stderr)

        (variant / "_ops.py").write_text(OPS_MODULE.format(name=name))
        (variant / package).mkdir()
        (variant / package / "__init__.py").write_text(COMPATIBILITY_MODULE.format(name=name))
        metadata = {
            "name": config["general"]["name"],
            "id": name,
            "version": config["general"]["version"],
            "license": config["general"]["license"],
            "python-depends": [],
            "backend": {"type": backend} | ({"archs": capabilities} if backend == "cuda" else {}),
            "digest": {"algorithm": "sha256", "files": file_digests(variant)},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        shutil.copyfile(ROOT / "CARD.md", output / "CARD.md")

        if final.exists():
            final.rename(Path(temporary) / "previous")
        variant.rename(final)
    return final


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder, if torch is for CUDA of the same major version and there is an nvcc."""
    nvcc = shutil.which("nvcc") or (cpp_extension.CUDA_HOME and shutil.which(f"{cpp_extension.CUDA_HOME}/bin/nvcc"))
    if not torch.version.cuda or not nvcc:
        return None
    # nvcc may be a link or a script elsewhere; it knows where it belongs.
    plan = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    folder, release = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE), re.search(r"release (\d+)\.", version)
    if not folder or not release or release[1] != torch.version.cuda.split(".")[0]:
        print(f"build.py: no CUDA code, since {nvcc} is not for CUDA {torch.version.cuda}", file=sys.stderr)
        return None
    return Path(folder[1].strip()).resolve()


def sources_of(config: dict, backend: str) -> list[Path]:
    """The files that build.toml names for a backend, headers too."""
    sections = [config["torch"], *(kernel for kernel in config["kernel"].values() if kernel["backend"] == backend)]
    return [ROOT / path for section in sections for path in section["src"]]


def digest_of(files: list[Path], cuda: Path | None, sanitize: bool) -> str:
    """Seven digits that differ between builds that differ: two can then be loaded in one process."""
    digest = hashlib.sha256(repr((torch.__version__, bool(cuda), sanitize)).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:7]


def is_build(variant: Path, name: str) -> bool:
    """Whether a complete build of this name is there already."""
    metadata = variant / "metadata.json"
    return metadata.is_file() and json.loads(metadata.read_text())["id"] == name


def variant_name(backend: str) -> str:
    """The folder that `kernels` looks for: torch's version, its C++ ABI, backend, machine and system."""
    major, minor = torch.__version__.split(".")[:2]
    version = f"torch{major}{minor}"
    if platform.system() == "Linux":
        version += "-cxx11" if torch.compiled_with_cxx11_abi() else "-cxx98"
    compute = "cu" + "".join(torch.version.cuda.split(".")[:2]) if backend == "cuda" else "cpu"
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return f"{version}-{compute}-{machine}-{platform.system().lower()}"


def compile_library(
    sources: list[Path],
    name: str,
    library: Path,
    work: Path,
    cuda: Path | None,
    capabilities: list[str],
    sanitize: bool,
):
    """Compile all sources side by side and link them."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"no C++ compiler {compiler!r}: install one (Debian: apt install g++) or set CXX")
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    folders = [*cpp_extension.include_paths("cpu"), sysconfig.get_path("include")]
    folders += [cuda / "include"] if cuda else []
    includes = [f"-I{work}", *(part for folder in folders for part in ("-isystem", folder))]
    common = [
        f"-std=c++{20 if version >= (2, 12) else 17}",
        f"-DTORCH_EXTENSION_NAME={name}",
        f"-D{'CUDA' if cuda else 'CPU'}_KERNEL",
        *TORCH_FLAGS,
        *includes,
    ]
    host = ["-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-gnu-unique", "-Wno-psabi", *WARNINGS]
    if sanitize:
        host += SANITIZERS

    def compile_one(source: Path) -> Path:
        target = work / f"{source.parent.name}_{source.name}.o"
        if source.suffix == ".cu":
            codes = [cuda_code(capability, capability == capabilities[-1]) for capability in capabilities]
            options = ["-O3", "--threads=0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
            command = [cuda / "bin" / "nvcc", *options, *common, *codes, "-c", source, "-o", target]
        else:
            command = [compiler, *common, *host, "-c", source, "-o", target]
        run(command)
        return target

    portability = work / "portability.cpp"
    portability.write_text(PORTABILITY_SOURCE)
    units = [portability, *(source for source in sources if source.suffix in {".cpp", ".cu"})]
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, units))
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths("cpu")), "-lc10", "-ltorch", "-ltorch_cpu"]
    if cuda:
        libraries += [f"-L{cuda}/lib64", f"-L{cuda}/lib", "-lc10_cuda", "-ltorch_cuda", "-lcudart"]
    # Not against libgomp: the one that torch has loaded is the one to use.
    strip = ["-g", *SANITIZERS] if sanitize else ["-Wl,--strip-all"]
    run([compiler, "-shared", *objects, *libraries, *strip, "-o", library])


def cuda_code(capability: str, newest: bool) -> str:
    """nvcc's option for one capability; the newest also as PTX, for those to come."""
    number = capability.replace(".", "")
    return f"-gencode=arch=compute_{number},code={f'[sm_{number},compute_{number}]' if newest else f'sm_{number}'}"


def run(command: list):
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode != 0:
        print(result.stdout + result.stderr, file=sys.stderr)
        raise BuildError(f"{Path(command[0]).name} failed on {command[-3] if '-c' in command else 'the library'}")
    if result.stderr:
        print(result.stderr, file=sys.stderr)


def abi_complaints(library: Path) -> list[str]:
    """What keeps a library from systems that the Hub's kernels must run on: manylinux_2_28, Python's stable ABI."""
    symbols, dynamic = (
        subprocess.run(["readelf", "--wide", part, library], capture_output=True, text=True, check=True).stdout
        for part in ("--dyn-syms", "--dynamic")
    )
    complaints = []
    for symbol in sorted(set(re.findall(r" UND (\S+)", symbols))):
        version = re.fullmatch(r"(\w+)@(\w+?)_([\d.]+)", symbol)
        if version and tuple(map(int, version[3].split("."))) > NEWEST_SYMBOLS.get(version[2], (99,)):
            complaints.append(f"needs {symbol}")
        if re.match(r"_?Py", symbol) and symbol.split("@")[0] not in ALLOWED_PYTHON_SYMBOLS:
            complaints.append(f"uses {symbol}, not known to be of Python's stable ABI")
    for needed in re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic):
        if not ALLOWED_LIBRARIES.fullmatch(needed):
            complaints.append(f"links to {needed}")
    return complaints


def file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
    }


if __name__ == "__main__":
    main()
