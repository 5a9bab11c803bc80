"""Builds the compiled kernels of sinkhorn_ext, and only those; everything else runs from its folder as it is.

    pip install -v --no-build-isolation -e .    # -v shows what was built, and why something was not

Builds CUDA kernels where nvcc and a CUDA build of torch are, CPU kernels where a C++ compiler is, and carries on
with what is left otherwise: sinkhorn_ext then runs in plain torch. In the environment:
    SINKHORN_EXT_BUILD=strict      fail instead of carrying on
    TORCH_CUDA_ARCH_LIST="9.0"     which GPUs to compile for (default: 8.0, 9.0 and this machine's, later ones by PTX)
    CC, CXX, CUDA_HOME, MAX_JOBS   compilers, and how many run at once
Copy this file with the folder sinkhorn_ext/ to build it in another project.
"""

import os
import sys
from contextlib import suppress

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"setup.py needs the torch that you will run with ({error}): pip install --no-build-isolation -e .")

STRICT = os.environ.get("SINKHORN_EXT_BUILD") == "strict"
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]  # results depend on neither errno nor traps
LINK_FLAGS = []
if sys.platform == "linux":
    # GCC's OpenMP comes with torch, and a second one would fight it for cores; clang needs its own.
    CXX_FLAGS.append("-fopenmp")
    LINK_FLAGS += ["-fopenmp"] if "clang" in os.environ.get("CXX", "") else []
    # Where a compiler links its own static C++ library, errors with numbers in them crash beside torch's shared one.
    LINK_FLAGS.append("-l:libstdc++.so.6")
elif sys.platform == "darwin":
    CXX_FLAGS.append("-fopenmp-simd")
elif sys.platform == "win32":
    CXX_FLAGS = ["/O2"]


def extension(with_cuda: bool) -> Extension:
    sources, flags, kind = ["sinkhorn_ext/csrc/sinkhorn_cpu.cpp"], {"cxx": CXX_FLAGS}, CppExtension
    if with_cuda:
        # Without a list, torch asks the GPU, and builders often have none.
        if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
            here = set()
            with suppress(RuntimeError):  # of a driver too old for this torch
                here = {torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count())}
            names = [f"{major}.{minor}" for major, minor in sorted({(8, 0), (9, 0)} | here)]
            os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"
        sources, kind = [*sources, "sinkhorn_ext/csrc/sinkhorn_cuda.cu"], CUDAExtension
        flags = {"cxx": [*CXX_FLAGS, "-DWITH_CUDA"], "nvcc": ["-O3"]}
    made = kind(
        "sinkhorn_ext._C",
        sources,
        depends=["sinkhorn_ext/csrc/rows.h"],
        extra_compile_args=flags,
        extra_link_args=LINK_FLAGS,
    )
    if sys.platform == "linux":  # torch brings the CUDA runtime too; a toolkit may have nvcc without it
        made.libraries = [library for library in made.libraries if library != "cudart"]
    return made


class BuildWhatCanBeBuilt(BuildExtension):
    def build_extensions(self) -> None:
        self.force = True  # a library that is newer than its sources may still lack what can be built now
        with_cuda = bool(CUDA_HOME and torch.version.cuda)
        if not with_cuda:
            print("sinkhorn_ext: no CUDA kernels:", "torch was built without CUDA" if CUDA_HOME else "no nvcc found")
        built = self._build("C++ and CUDA kernels") if with_cuda else None
        if not built:
            fields = ("sources", "include_dirs", "library_dirs", "libraries", "extra_compile_args", "extra_link_args")
            vars(self.extensions[0]).update({name: vars(extension(with_cuda=False))[name] for name in fields})
            built = self._build("C++ kernels")
        if not built:
            self.extensions.clear()
        print("sinkhorn_ext: built", built or "nothing, it will run in plain torch", flush=True)

    def _build(self, what: str) -> str | None:
        try:
            super().build_extensions()
            return what
        except Exception as error:
            if STRICT:
                raise
            print(f"sinkhorn_ext: could not build {what}: {error}", flush=True)
            return None


setup(
    name="sinkhorn_ext",
    version="1.0",
    description="Sinkhorn-Knopp codes and the swapped-prediction loss of SwAV",
    packages=["sinkhorn_ext"],
    ext_modules=[extension(with_cuda=bool(CUDA_HOME and torch.version.cuda))],
    cmdclass={"build_ext": BuildWhatCanBeBuilt},
    install_requires=["torch>=2.6"],
    python_requires=">=3.10",
)
