// The CUDA kernels as operators for CPU tensors. Load it with torch.ops.load_library.

#include "rows.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "cuda_on_cpu.h"

#define exp2f cuda_on_cpu::exp2_approximately
#define CUDA CPU
using std::max;
using std::min;

#include "sinkhorn_cuda.cu"

namespace sinkhorn_ext {
namespace {
__attribute__((aligned(16))) unsigned char shared_memory[228 << 10];
}  // namespace

static const torch::Library kernels = cuda_kernels();
static const bool is_set = cuda_on_cpu::shared_memory = shared_memory;

}  // namespace sinkhorn_ext

extern "C" void set_device(int multiprocessors, int major, int shared_per_multiprocessor, bool cooperates, int seed) {
  cuda_on_cpu::device = {multiprocessors, major, shared_per_multiprocessor,
                         std::min(227 << 10, shared_per_multiprocessor - 1024), cooperates};
  cuda_on_cpu::seed = seed;
}

// How often kernels were launched: 0 plainly, 1 cooperatively, 2 in clusters.
extern "C" int nmb_launches(int kind) { return cuda_on_cpu::launches[kind]; }
