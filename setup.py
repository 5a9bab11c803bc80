"""Build the compiled kernels of sinkhorn_ext. Everything else runs from its folder without a build.

    pip install -v --no-build-isolation -e .    # -v shows what was built, and why something was not

CUDA kernels need nvcc and a CUDA build of torch. CPU kernels need a C++ compiler. If something is missing or does not
compile, the build continues without it, and sinkhorn_ext then runs in plain torch. From CUDA 13 on, pip has nvcc:
    pip install "cuda-toolkit[nvcc,cccl]==13.0.*"    # 13.0: torch.version.cuda
Environment variables:
    SINKHORN_EXT_BUILD=strict      fail instead
    TORCH_CUDA_ARCH_LIST="9.0"     the GPU architectures to compile for (default: 8.0, 9.0 and those of the GPUs in
                                   this machine that nvcc knows; later ones are compiled from PTX when first used)
    CC, CXX, CUDA_HOME, MAX_JOBS   the compilers, and how many run at the same time
Copy this file together with the folder sinkhorn_ext/ to build it in another project.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"setup.py needs the torch that you will run with ({error}): pip install --no-build-isolation -e .")

STRICT = os.environ.get("SINKHORN_EXT_BUILD") == "strict"


def find_toolkit() -> str | None:
    """The CUDA toolkit: torch's choice, or else what pip installed beside torch, in nvidia/cu13 for CUDA 13."""
    major = str(torch.version.cuda).partition(".")[0]
    of_pip = Path(torch.__file__).parent.parent / "nvidia" / f"cu{major}"
    return cpp_extension.CUDA_HOME or (str(of_pip) if (of_pip / "bin" / "nvcc").exists() else None)


cpp_extension.CUDA_HOME = CUDA_HOME = find_toolkit()
WITH_CUDA = bool(CUDA_HOME and torch.version.cuda)
CXX_FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]  # results depend on neither errno nor traps
LINK_FLAGS = []
if sys.platform == "linux":
    # torch ships GCC's OpenMP, and a second copy would compete with it for cores. Clang needs its own.
    CXX_FLAGS.append("-fopenmp")
    LINK_FLAGS += ["-fopenmp"] if "clang" in os.environ.get("CXX", "") else []
    # Some compilers link a static C++ library. Error messages with numbers then crash, as torch uses the shared one.
    LINK_FLAGS.append("-l:libstdc++.so.6")
elif sys.platform == "darwin":
    CXX_FLAGS.append("-fopenmp-simd")
elif sys.platform == "win32":
    CXX_FLAGS = ["/O2"]


def extension(with_cuda: bool) -> Extension:
    """Describe the extension module, with or without CUDA kernels."""
    sources, flags, kind = ["module.cpp", "sinkhorn_cpu.cpp"], {"cxx": CXX_FLAGS}, CppExtension
    if with_cuda:
        sources, kind = [*sources, "sinkhorn_cuda.cu"], CUDAExtension
        # `python -m sinkhorn_ext` prints the architectures: what runs on a GPU depends on them.
        defines = ["-DWITH_CUDA", f"-DCUDA_ARCHITECTURES={set_cuda_architectures()}"]
        flags = {"cxx": [*CXX_FLAGS, *defines], "nvcc": ["-O3", "-ftz=true"]}  # exponentials below 1e-38 are 0
    result = kind(
        "sinkhorn_ext._C",
        [f"sinkhorn_ext/csrc/{source}" for source in sources],
        depends=["sinkhorn_ext/csrc/rows.h"],
        extra_compile_args=flags,
        extra_link_args=LINK_FLAGS,
    )
    if sys.platform == "linux":  # torch loads the CUDA runtime; a toolkit with nvcc may not contain it
        result.libraries = [library for library in result.libraries if library != "cudart"]
    return result


def set_cuda_architectures() -> str:
    """Set TORCH_CUDA_ARCH_LIST if it is not set, and return it: without it, torch needs a GPU to build."""
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        local = set()
        with suppress(RuntimeError):  # raised if the driver is too old for this torch
            local = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
        with suppress(OSError, subprocess.CalledProcessError):  # a GPU newer than nvcc compiles PTX itself
            command = [Path(CUDA_HOME, "bin", "nvcc"), "--list-gpu-arch"]
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
            local = {(major, minor) for major, minor in local if f"compute_{major}{minor}" in listed}
        names = [f"{major}.{minor}" for major, minor in sorted({(8, 0), (9, 0)} | local)]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"].replace(" ", ";")


class BuildWithFallback(BuildExtension):
    """Build C++ and CUDA kernels; if that fails, only C++ kernels; if that fails too, nothing."""

    def build_extensions(self) -> None:
        self.force = True  # an up-to-date library may still lack kernels that can be built now
        if not WITH_CUDA:
            print("sinkhorn_ext: no CUDA kernels:", "torch was built without CUDA" if CUDA_HOME else "no nvcc found")
        built = self._build("C++ and CUDA kernels") if WITH_CUDA else None
        if not built:
            fields = ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args", "extra_link_args")
            vars(self.extensions[0]).update({name: vars(extension(with_cuda=False))[name] for name in fields})
            built = self._build("C++ kernels")
        if not built:
            self.extensions.clear()
        print("sinkhorn_ext: built", built or "nothing, it will run in plain torch", flush=True)

    def _build(self, kernels: str) -> str | None:
        """Return what was built, or None after a failure."""
        try:
            super().build_extensions()
            return kernels
        except Exception as error:
            if STRICT:
                raise
            print(f"sinkhorn_ext: could not build {kernels}: {error}", flush=True)
            return None


setup(
    name="sinkhorn_ext",
    version="1.0",
    description="Sinkhorn-Knopp codes and the swapped-prediction loss of SwAV",
    packages=["sinkhorn_ext"],
    ext_modules=[extension(WITH_CUDA)],
    cmdclass={"build_ext": BuildWithFallback},
    install_requires=["torch>=2.6"],
    python_requires=">=3.10",
)
