"""setup.py builds what can be built, says what, and carries on without the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
BUILD_HERE = [sys.executable, "setup.py", "build_ext", "--inplace"]
INSTALL = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--target", "site", "."]


@pytest.fixture
def project(tmp_path):
    """A project with copies of setup.py and sinkhorn_ext/ alone, in which to run a command."""
    shutil.copy(HOUSE / "setup.py", tmp_path)
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(HOUSE / "sinkhorn_ext", tmp_path / "sinkhorn_ext", ignore=ignored)

    def run(command, where=".", **variables):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SINKHORN_EXT")}
        process = subprocess.run(
            command, cwd=tmp_path / where, env=environment | variables, capture_output=True, text=True
        )
        return process.returncode, process.stdout + process.stderr

    run.folder = tmp_path
    return run


def test_without_a_compiler_it_installs_plain_torch_and_says_so(project):
    status, output = project(INSTALL, CXX="/nonexistent/c++", CC="/nonexistent/cc", CUDA_HOME="/nonexistent")
    assert status == 0, output
    assert "sinkhorn_ext: could not build C++ kernels: " in output
    assert "sinkhorn_ext: built nothing, it will run in plain torch" in output
    use = "import sinkhorn_ext as s; print(s.__file__, s.backend('cpu'))"
    status, output = project([sys.executable, "-c", use], where="site")
    assert (status, output.split()) == (0, [str(project.folder / "site/sinkhorn_ext/__init__.py"), "torch"])


def test_strict_fails_without_a_compiler(project):
    variables = {"CXX": "/nonexistent/c++", "CC": "/nonexistent/cc", "CUDA_HOME": ""}
    status, output = project(BUILD_HERE, SINKHORN_EXT_BUILD="strict", **variables)
    assert status != 0 and "sinkhorn_ext: built" not in output


def test_the_compilers_reason_is_printed(project):
    source = project.folder / "sinkhorn_ext" / "csrc" / "sinkhorn_cpu.cpp"
    source.write_text("#error the sky is falling\n")
    status, output = project(BUILD_HERE, CUDA_HOME="/nonexistent")
    assert status == 0, output
    assert "the sky is falling" in output
    assert "sinkhorn_ext: built nothing" in output and not list(project.folder.glob("sinkhorn_ext/_C.*"))


@pytest.mark.parametrize("cuda_home, version", [("/nonexistent", None), (None, "13.0")])
def test_what_cuda_kernels_lack_is_named(project, cuda_home, version):
    (project.folder / "sinkhorn_ext" / "csrc" / "sinkhorn_cpu.cpp").write_text("#error not in this test\n")
    program = f"""
import runpy, sys, torch, torch.utils.cpp_extension as e
e.CUDA_HOME, torch.version.cuda = {cuda_home!r}, {version!r}
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""
    status, output = project([sys.executable, "-c", program])
    assert status == 0, output
    lacking = "torch was built without CUDA" if cuda_home else "no nvcc found"
    assert f"sinkhorn_ext: no CUDA kernels: {lacking}" in output


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")
def test_with_a_broken_nvcc_the_copied_folder_still_gets_its_cpu_kernels(project):
    """With a compiler, too, whose default is a C++ library of its own: errors are told in whole nonetheless."""
    flags = "-static-libstdc++" if sys.platform == "linux" else ""
    status, output = project(INSTALL, CUDA_HOME="/nonexistent", LDFLAGS=flags)
    assert status == 0, output
    assert "sinkhorn_ext: built C++ kernels" in output
    use = """
import torch
from sinkhorn_ext import backend, sinkhorn, sinkhorn_potentials, swav_loss
assert backend("cpu") == "cpp"
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
    status, output = project([sys.executable, "-W", "error", "-c", use], where="site")
    assert (status, output) == (0, "")


def test_without_torch_it_says_how_to_install(project):
    program = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    status, output = project([sys.executable, "-c", program])
    assert status != 0 and "pip install --no-build-isolation" in output
