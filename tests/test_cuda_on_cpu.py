"""Run the CUDA kernels without a GPU: compiled for the CPU with what cuda_on_cpu/ has in place of CUDA.

This checks numbers, barriers and memory accesses, not whether the GPU accepts the launches, and no times.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, forked
from torch.utils import cpp_extension

FOLDER = Path(__file__).parent / "cuda_on_cpu"
SMALLER = {"kThreads = 512": "kThreads = 64", "kCluster = 16": "kCluster = 4"}  # runs faster


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Compile the CUDA kernels for the CPU; return the path of the library."""
    if not shutil.which("g++") or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86_64")
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    shutil.copy(ROOT / "sinkhorn_ext/csrc/rows.h", folder)
    source = (ROOT / "sinkhorn_ext/csrc/sinkhorn_cuda.cu").read_text()
    for old, new in SMALLER.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    (folder / "sinkhorn_cuda.cu").write_text(source)
    flags = ["-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
    includes = [f"-I{path}" for path in (folder, FOLDER, *cpp_extension.include_paths())]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-lc10", "-ltorch_cpu", "-ltorch"]
    command = ["g++", *flags, *includes, FOLDER / "kernels.cpp", "-o", folder / "kernels.so", *libraries]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return folder / "kernels.so"


def test_the_cuda_kernels_pass_the_numerical_tests_on_a_cpu(library):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    result = forked(FOLDER / "run.py", library, SINKHORN_EXT="torch", PYTHONPATH=paths)
    assert result.returncode == 0, result.stderr
