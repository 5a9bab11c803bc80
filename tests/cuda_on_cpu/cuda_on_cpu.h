// Runs CUDA kernels on a CPU, to test their numbers and barriers without a GPU. It knows what sinkhorn_cuda.cu uses.
//
// Each CUDA thread is a fiber that runs until it waits. Warps, lanes and blocks run in a random order, so that a race
// changes results. It fails if threads wait for each other for ever, or not at the same barrier. Shared memory starts
// with NaN.
#pragma once

#include <ATen/core/Tensor.h>
#include <immintrin.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <tuple>
#include <vector>

#define __global__
#define __device__
#define __shared__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

enum cudaError_t {
  cudaSuccess,
  cudaErrorInvalidValue,
  cudaErrorInvalidClusterSize,
  cudaErrorCooperativeLaunchTooLarge,
  cudaErrorInvalidDeviceFunction,
  cudaErrorNoKernelImageForDevice,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrCooperativeLaunch,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
using cudaStream_t = int;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline dim3 threadIdx, blockIdx, gridDim;

namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
inline cudaStream_t getCurrentCUDAStream() { return 0; }
}  // namespace c10::cuda

#define C10_CUDA_CHECK(...) \
  do { \
    const int code_of_error = __VA_ARGS__; \
    TORCH_CHECK(code_of_error == cudaSuccess, #__VA_ARGS__, ": error ", code_of_error); \
  } while (0)

namespace cuda_on_cpu {

struct Device {  // an H200 with fewer multiprocessors
  int multiprocessors = 3, major = 9, shared_per_multiprocessor = 228 << 10, shared_per_block = 227 << 10;
  bool cooperates = true;
};
inline Device device;
inline int launches[3];  // without, with cooperation, with clusters
inline unsigned seed;
inline unsigned char* shared_memory;  // that of the block that runs
inline std::map<const void*, std::map<int, int>> attributes;

enum class Wait { kNothing, kWarp, kBlock, kGroup, kDone };

struct Thread {
  jmp_buf jump;  // where it goes on
  std::unique_ptr<char[]> stack;
  Wait wait = Wait::kNothing;
  int line = 0, partner = 0;
  bool vote = false;
  double value = 0, received = 0;
};

struct Block {
  unsigned index;
  std::vector<Thread> threads;  // used again by later launches
  std::vector<unsigned char> shared;
};

inline Thread* running;
inline std::vector<Block> used_blocks;
inline jmp_buf scheduler;
inline const std::function<void()>* body;

inline void wait(Wait what, int line) {
  running->wait = what;
  running->line = line;
  if (_setjmp(running->jump) == 0) _longjmp(scheduler, 1);
}

inline void run_thread() {
  while (true) {
    (*body)();
    wait(Wait::kDone, 0);
  }
}

inline void resume(Thread& thread) {
  running = &thread;
  if (_setjmp(scheduler)) return;
  if (thread.stack) _longjmp(thread.jump, 1);
  constexpr size_t bytes = 64 << 10;
  thread.stack.reset(new char[bytes]);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = thread.stack.get();
  context.uc_stack.ss_size = bytes;
  makecontext(&context, run_thread, 0);
  setcontext(&context);
}

template <typename T>
T shuffle_xor(T value, int mask, int line) {
  running->value = value;
  running->partner = mask;
  wait(Wait::kWarp, line);
  return static_cast<T>(running->received);
}

inline bool barrier(bool vote, int line) {
  running->vote = vote;
  wait(Wait::kBlock, line);
  return running->vote;
}

inline constexpr int kWarpSize = 32;

// Lets threads [begin, end) go on if all of them wait for it. Returns whether they do.
inline bool all_wait(Block& block, int begin, int end, Wait what) {
  const auto waits = [&](int i) { return block.threads[i].wait == what; };
  int count = 0;
  for (int i = begin; i < end; i++) count += waits(i);
  if (count < end - begin) {
    for (int i = begin; i < end; i++)
      TORCH_CHECK(count == 0 || block.threads[i].wait != Wait::kDone, "a barrier that thread ", i, " of block ",
                  block.index, " does not reach");
    return false;
  }
  for (int i = begin; i < end; i++)
    TORCH_CHECK(block.threads[i].line == block.threads[begin].line, "threads of block ", block.index,
                " wait at different barriers: lines ", block.threads[i].line, ", ", block.threads[begin].line);
  return true;
}

inline void release(Block& block, int begin, int end) {
  bool any = false;
  for (int i = begin; i < end; i++) any |= block.threads[i].vote;
  for (int i = begin; i < end; i++) {
    Thread& thread = block.threads[i];
    thread.wait = Wait::kNothing;
    thread.vote = any;
    thread.received = block.threads[begin + ((i - begin) ^ thread.partner)].value;
  }
}

// Runs the threads of a block until all wait for other blocks, or are done.
inline bool run_block(Block& block, std::mt19937& random) {
  const int threads = block.threads.size(), warps = threads / kWarpSize;
  std::vector<int> order(warps), lanes(kWarpSize);
  std::iota(order.begin(), order.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  std::memcpy(shared_memory, block.shared.data(), block.shared.size());
  blockIdx = {block.index % gridDim.x, block.index / gridDim.x % gridDim.y,
                 block.index / gridDim.x / gridDim.y};
  bool ran = false;
  do {
    std::shuffle(order.begin(), order.end(), random);
    for (const int warp : order) {
      const int first = warp * kWarpSize;
      do {
        std::shuffle(lanes.begin(), lanes.end(), random);
        for (const int lane : lanes) {
          if (block.threads[first + lane].wait != Wait::kNothing) continue;
          ran = true;
          threadIdx.x = first + lane;
          resume(block.threads[first + lane]);
        }
        if (!all_wait(block, first, first + kWarpSize, Wait::kWarp)) break;
        release(block, first, first + kWarpSize);
      } while (true);
    }
    if (!all_wait(block, 0, threads, Wait::kBlock)) break;
    release(block, 0, threads);
  } while (true);
  std::memcpy(block.shared.data(), shared_memory, block.shared.size());
  return ran;
}

// Runs blocks that may wait for each other.
inline void run_blocks(std::vector<Block>& blocks, int64_t count, std::mt19937& random) {

  const unsigned csr = _mm_getcsr();
  _mm_setcsr(csr | 0x8040);  // -ftz=true: denormal numbers are 0
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  while (true) {
    std::shuffle(order.begin(), order.end(), random);
    bool ran = false, done = true, released = true;
    for (const int i : order) ran |= run_block(blocks[i], random);
    for (const int i : order) {
      for (Thread& thread : blocks[i].threads) done &= thread.wait == Wait::kDone;
      released &= all_wait(blocks[i], 0, blocks[i].threads.size(), Wait::kGroup);
    }
    if (done) break;
    TORCH_CHECK(ran, "threads wait for each other for ever");
    for (const int i : order)
      if (released) release(blocks[i], 0, blocks[i].threads.size());
  }
  _mm_setcsr(csr);
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& kernel_body) {
  const int64_t nmb_blocks = int64_t{config.gridDim.x} * config.gridDim.y * config.gridDim.z;
  const int64_t shared = config.dynamicSmemBytes;
  const int64_t allowed = std::max(attributes[kernel][cudaFuncAttributeMaxDynamicSharedMemorySize], 48 << 10);
  if (nmb_blocks == 0 || config.gridDim.y > 65535 || config.gridDim.z > 65535 || shared > allowed ||
      shared > device.shared_per_block)
    return cudaErrorInvalidValue;
  int64_t group = 1;
  if (config.numAttrs && config.attrs->id == cudaLaunchAttributeClusterDimension) {
    group = config.attrs->val.clusterDim.x;
    if (device.major < 9 || nmb_blocks % group || group > 16 ||
        (group > 8 && !attributes[kernel][cudaFuncAttributeNonPortableClusterSizeAllowed]))
      return cudaErrorInvalidClusterSize;
  } else if (config.numAttrs) {
    group = nmb_blocks;
    if (group > device.multiprocessors * std::min<int64_t>(device.shared_per_multiprocessor / (shared + 1024), 2))
      return cudaErrorCooperativeLaunchTooLarge;
  }
  launches[config.numAttrs ? 1 + (config.attrs->id == cudaLaunchAttributeClusterDimension) : 0]++;
  gridDim = config.gridDim;
  body = &kernel_body;
  std::mt19937 random(seed);
  std::vector<int64_t> groups(nmb_blocks / group);
  std::iota(groups.begin(), groups.end(), 0);
  std::shuffle(groups.begin(), groups.end(), random);
  std::vector<Block> blocks = std::move(used_blocks);  // lost if this throws, as its threads would not begin anew
  blocks.resize(std::max<size_t>(group, blocks.size()));
  for (Block& block : blocks) block.threads.resize(config.blockDim.x);
  for (const int64_t i : groups) {
    for (int64_t j = 0; j < group; j++) {
      blocks[j].index = i * group + j;
      blocks[j].shared.assign(shared, 0xFF);
      for (Thread& thread : blocks[j].threads) thread.wait = Wait::kNothing;
    }
    run_blocks(blocks, group, random);
  }
  used_blocks = std::move(blocks);
  return cudaSuccess;
}

// 2^x with the error of the GPU's instruction, up to 2 units in the last place.
inline float exp2_approximately(float x) {
  float result = std::exp2(x);
  if (std::isfinite(result) && result > 1e-37f && result != 1) {
    int32_t bits, hash;
    std::memcpy(&bits, &result, sizeof bits);
    std::memcpy(&hash, &x, sizeof hash);
    bits += static_cast<int>(static_cast<uint32_t>(hash) * 2654435761u >> 16) % 5 - 2;
    std::memcpy(&result, &bits, sizeof bits);
  }
  return result;
}

}  // namespace cuda_on_cpu

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const auto& device = cuda_on_cpu::device;
  const std::map<int, int> values{
      {cudaDevAttrMultiProcessorCount, device.multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerMultiprocessor, device.shared_per_multiprocessor},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, device.shared_per_block},
      {cudaDevAttrReservedSharedMemoryPerBlock, 1024},
      {cudaDevAttrCooperativeLaunch, device.cooperates},
  };
  *value = values.at(name);
  return cudaSuccess;
}

struct cudaFuncAttributes {
  int ptxVersion;
};

template <typename Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* result, Kernel) {
  result->ptxVersion = 10 * cuda_on_cpu::device.major;
  return cuda_on_cpu::device.major ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, cudaFuncAttribute name, int value) {
  cuda_on_cpu::attributes[reinterpret_cast<const void*>(kernel)][name] = value;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  *clusters = 1;
  return cudaSuccess;
}

template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t shared) {
  *blocks = std::min<int>(cuda_on_cpu::device.shared_per_multiprocessor / (shared + 1024), 2);
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  const std::tuple<Parameters...> values(arguments...);
  return cuda_on_cpu::launch(*config, reinterpret_cast<const void*>(kernel), [&] { std::apply(kernel, values); });
}

namespace cooperative_groups {
struct Group {
  int line;
  void sync() const { cuda_on_cpu::wait(cuda_on_cpu::Wait::kGroup, line); }
};
}  // namespace cooperative_groups

#define this_grid() Group{__LINE__}
#define this_cluster() Group{__LINE__}
#define __syncthreads() (void)cuda_on_cpu::barrier(false, __LINE__)
#define __syncthreads_or(vote) cuda_on_cpu::barrier(vote, __LINE__)
#define __shfl_xor_sync(lanes, value, mask) cuda_on_cpu::shuffle_xor(value, mask, __LINE__)
#define __stcs(address, value) (*(address) = (value))
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0
#define __CUDACC_VER_BUILD__ 0
