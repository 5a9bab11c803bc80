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

from setuptools import Extension, setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    sys.exit(f"setup.py needs the torch that you will run with ({error}): pip install --no-build-isolation -e .")

STRICT = os.environ.get("SINKHORN_EXT_BUILD") == "strict"
CXX_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math"]  # results depend on neither errno nor traps
if sys.platform == "linux":
    CXX_FLAGS.append("-fopenmp")  # compiled with, not linked: torch brings the library, and two would fight for cores
if sys.platform == "win32":
    CXX_FLAGS = ["/O2"]


def extension(with_cuda: bool) -> Extension:
    sources = ["sinkhorn_ext/csrc/sinkhorn_cpu.cpp"]
    if not with_cuda:
        return CppExtension("sinkhorn_ext._C", sources, extra_compile_args={"cxx": CXX_FLAGS})
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:  # without a list, torch asks the GPU, and builders often have none
        capabilities = {(8, 0), (9, 0)}
        if torch.cuda.is_available():
            capabilities.add(torch.cuda.get_device_capability())
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(f"{x}.{y}" for x, y in sorted(capabilities)) + "+PTX"
    sources.append("sinkhorn_ext/csrc/sinkhorn_cuda.cu")
    built = CUDAExtension("sinkhorn_ext._C", sources, extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3"]})
    if sys.platform == "linux":  # torch brings the CUDA runtime too; a toolkit may have nvcc without it
        built.libraries.remove("cudart")
    return built


class BuildWhatCanBeBuilt(BuildExtension):
    def build_extensions(self) -> None:
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
