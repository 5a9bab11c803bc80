// The Python module _C: importing it registers the kernels, and build_info() tells how they were built.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

#include <string>

// Turns the value of a macro into a string.
#define TEXT_OF(...) #__VA_ARGS__
#define TEXT(...) TEXT_OF(__VA_ARGS__)

namespace sinkhorn_ext {

torch::Library cpu_kernels();  // sinkhorn_cpu.cpp
const char* cpu_capability();
#ifdef WITH_CUDA
torch::Library cuda_kernels();  // sinkhorn_cuda.cu
std::string nvcc_version();
#endif

namespace {

std::string compiler() {
#if defined(__clang__)
  return "Clang " __clang_version__;
#elif defined(__GNUC__)
  return "GCC " __VERSION__;
#elif defined(_MSC_FULL_VER)
  return "MSVC " + std::to_string(_MSC_FULL_VER);
#else
  return "unknown";
#endif
}

std::string cxx_standard() {
#ifdef _MSVC_LANG  // __cplusplus has the value of C++98 there
  constexpr long standard = _MSVC_LANG;
#else
  constexpr long standard = __cplusplus;
#endif
  return "C++" + std::to_string(standard / 100 % 100) + " (" + std::to_string(standard) + ")";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cxx_standard"] = cxx_standard();
  info["torch"] = TORCH_VERSION;
  info["built_for"] = "sinkhorn_ext for torch " TORCH_VERSION;  // __init__.py finds it in files that do not load
#ifdef WITH_CUDA
  info["cuda"] = nvcc_version();
  info["cuda_architectures"] = TEXT(CUDA_ARCHITECTURES);
#else
  info["cuda"] = pybind11::none();
  info["cuda_architectures"] = pybind11::none();
#endif
  info["cpu_capability"] = cpu_capability();
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
  info["threads"] = at::get_num_threads();
#else
  info["openmp"] = pybind11::none();
  info["threads"] = 1;
#endif
  return info;
}

constexpr const char* kBuildInfoDoc = R"(Tell how the kernels were built, and what they use on this machine.

Returns a dict:
compiler, cxx_standard: what compiled the kernels.
torch: the version that they were compiled against.
cuda: the version of nvcc. cuda_architectures: as in TORCH_CUDA_ARCH_LIST. Both are None without CUDA kernels.
cpu_capability: the code path of the CPU kernels, chosen when they were loaded ("default", "x86-64-v3", ...).
openmp: the date (yyyymm) of its specification, or None. threads: the most that a CPU kernel may use now.
)";

// The kernels stay registered as long as this object exists. If one registration fails, none stays.
struct Kernels {
  torch::Library cpu = cpu_kernels();
#ifdef WITH_CUDA
  torch::Library cuda = cuda_kernels();
#endif
};

}  // namespace
}  // namespace sinkhorn_ext

// Registers the kernels when the module is executed, not when the library is loaded. Registration fails if the
// operators have changed since the compilation. Here that raises an ImportError; there it would end the process.
PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The compiled kernels of sinkhorn_ext. Importing this module registers them with torch.";
  m.def("build_info", sinkhorn_ext::build_info, sinkhorn_ext::kBuildInfoDoc);
  try {
    static const sinkhorn_ext::Kernels kernels;
  } catch (const c10::Error& error) {  // its what() would add a C++ backtrace
    throw pybind11::import_error(error.what_without_backtrace());
  }
}
