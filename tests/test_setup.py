"""setup.py builds what can be built, reports it, and continues without the rest."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import forked

ROOT = Path(__file__).resolve().parent.parent
BUILD_HERE = [sys.executable, "setup.py", "build_ext", "--inplace"]
INSTALL = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", "site", "."]


@pytest.fixture
def project(tmp_path):
    """Run commands in a project that has only copies of setup.py and sinkhorn_ext/."""
    shutil.copy(ROOT / "setup.py", tmp_path)
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(ROOT / "sinkhorn_ext", tmp_path / "sinkhorn_ext", ignore=ignored)

    def run(command, folder=".", **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SINKHORN_EXT")}
        process = subprocess.run(
            command, cwd=tmp_path / folder, env=environment | variables, capture_output=True, text=True
        )
        return process.returncode, process.stdout + process.stderr

    def python(*words, folder=".", **variables):
        unset = {name: "" for name in os.environ if name.startswith("SINKHORN_EXT")}
        process = forked(*words, folder=tmp_path / folder, **unset, **variables)
        return process.returncode, process.stdout + process.stderr

    run.folder, run.python = tmp_path, python
    return run


def break_sources(folder):
    """Make the compiler fail at once."""
    for source in folder.glob("sinkhorn_ext/csrc/*.cpp"):
        source.write_text("#error made by this test\n")


def test_without_a_compiler_it_installs_the_plain_torch_form_and_reports_that(project):
    status, output = project(INSTALL, CXX="/nonexistent/c++", CC="/nonexistent/cc", CUDA_HOME="/nonexistent")
    assert status == 0, output
    assert "sinkhorn_ext: could not build C++ kernels: " in output
    assert "sinkhorn_ext: built nothing, it will run in plain torch" in output
    use = "import sinkhorn_ext as s; print(s.__file__, s.backend('cpu'))"
    status, output = project.python("-c", use, folder="site")
    assert (status, output.split()) == (0, [str(project.folder / "site/sinkhorn_ext/__init__.py"), "torch"])


def test_a_strict_build_fails_without_a_compiler(project):
    variables = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", "CUDA_HOME": ""}
    status, output = project(BUILD_HERE, SINKHORN_EXT_BUILD="strict", **variables)
    assert status != 0 and "sinkhorn_ext: built" not in output


def test_the_message_of_the_compiler_is_printed(project):
    break_sources(project.folder)
    status, output = project(BUILD_HERE, CUDA_HOME="/nonexistent")
    assert status == 0, output
    assert "made by this test" in output
    assert "sinkhorn_ext: built nothing" in output and not list(project.folder.glob("sinkhorn_ext/_C.*"))


@pytest.mark.parametrize("cuda_home, version", [("/nonexistent", None), (None, "13.0")])
def test_it_reports_why_it_builds_no_cuda_kernels(project, cuda_home, version):
    break_sources(project.folder)
    program = f"""
import runpy, sys, torch, torch.utils.cpp_extension as e
e.CUDA_HOME, torch.version.cuda, torch.__file__ = {cuda_home!r}, {version!r}, "/nonexistent/torch/__init__.py"
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    status, output = project.python("-c", program)
    assert status == 0, output
    reason = "torch was built without CUDA" if cuda_home else "no nvcc found"
    assert f"sinkhorn_ext: no CUDA kernels: {reason}" in output


def test_it_finds_the_nvcc_that_pip_installed_and_leaves_newer_gpus_to_ptx(project):
    """With a stand-in for nvcc, which knows architectures up to 9.0, and for a GPU of 12.1 and one of 8.6."""
    nvcc = project.folder / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho compute_80; echo compute_86; echo compute_90\n")
    nvcc.chmod(0o755)
    program = f"""
import os, runpy, setuptools, torch, torch.utils.cpp_extension as e
e.CUDA_HOME, torch.version.cuda = None, "13.0"
torch.__file__ = {str(project.folder / "site-packages" / "torch" / "__init__.py")!r}
torch.cuda.device_count, torch.cuda.get_device_capability = lambda: 2, lambda gpu: [(12, 1), (8, 6)][gpu]
setuptools.setup = lambda ext_modules, **_: print(os.environ["TORCH_CUDA_ARCH_LIST"], e.CUDA_HOME)
runpy.run_path("setup.py", run_name="__main__")
"""
    status, output = project.python("-c", program, TORCH_CUDA_ARCH_LIST="", CUDA_HOME="")
    assert status == 0 and output.startswith(f"8.0;8.6;9.0+PTX {nvcc.parent.parent}\n"), output


@pytest.mark.parametrize("variable, names", [("", ["8.0", "9.0", "+PTX"]), ("7.5 8.6", ["7.5;8.6"])])
def test_cuda_sources_are_told_the_architectures_that_torch_compiles_for(project, variable, names):
    program = """
import os, runpy, setuptools, torch, torch.utils.cpp_extension as e
e.CUDA_HOME, torch.version.cuda = "/nonexistent", "13.0"
setuptools.setup = lambda ext_modules, **_: print(os.environ["TORCH_CUDA_ARCH_LIST"], ext_modules[0].extra_compile_args)
runpy.run_path("setup.py", run_name="__main__")
"""
    status, output = project.python("-c", program, TORCH_CUDA_ARCH_LIST=variable, CUDA_HOME="/nonexistent")
    assert status == 0, output
    (define,) = re.findall("-DCUDA_ARCHITECTURES=([^']*)", output)
    assert all(name in define for name in names)
    assert output.startswith(variable or define)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")
def test_with_a_broken_nvcc_the_copied_folder_still_gets_cpu_kernels(project):
    """It does so even if the compiler links a static C++ library: error messages are complete nonetheless."""
    flags = "-static-libstdc++" if sys.platform == "linux" else ""
    status, output = project(INSTALL, CUDA_HOME="/nonexistent", LDFLAGS=flags)
    assert status == 0, output
    assert "sinkhorn_ext: built C++ kernels" in output
    use = """
import warnings
warnings.simplefilter("error")
import torch
from sinkhorn_ext import _C, backend, sinkhorn, sinkhorn_potentials, swav_loss
assert backend("cpu") == "cpp" and _C.build_info()["cuda"] is None
scores = torch.rand(3, 8, 50, requires_grad=True)
assert torch.allclose(sinkhorn(scores[0]).sum(dim=1), torch.ones(8))
swav_loss(scores, sinkhorn_potentials(scores[:2])).backward()
assert scores.grad.abs().sum() > 0
try:
    torch.ops.sinkhorn_ext.prototype_totals(scores.detach(), None, torch.zeros(3, 49), 0.05)
except RuntimeError as error:
    assert "expected [3, 50] Float on cpu, got [3, 49] Float on cpu" in str(error), error
else:
    assert False
"""
    status, output = project.python("-c", use, folder="site")
    assert (status, output) == (0, "")
    status, output = project.python("-m", "sinkhorn_ext", folder="site")
    assert status == 0 and "backend on cpu        cpp\n" in output


def test_without_torch_the_error_tells_how_to_install(project):
    program = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    status, output = project.python("-c", program)
    assert status != 0 and "pip install --no-build-isolation" in output
