// Sinkhorn-Knopp and the swapped loss on NVIDIA GPUs. __init__.py declares the operators and has the formulas.
//
// The rows of a problem are divided into slabs, one for each block. A block keeps its slab in shared memory as far as
// it fits, adds up its columns, and then the blocks of a problem add up the slabs in a fixed order: results repeat bit
// for bit. With one process, all rounds are one launch, whose blocks wait for each other: a cluster for each problem if
// problems are small, and otherwise a cooperative launch.
//
// A thread owns the columns k = threadIdx.x, threadIdx.x + kThreads, ... of every row. So the sums over rows, and the
// rows in shared memory, need no barrier. Only the sums over columns do.
//
// Not yet run on a GPU. tests/test_cuda_on_cpu.py runs all of it on a CPU.

#include "rows.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <string>
#include <type_traits>

namespace sinkhorn_ext {
namespace {

constexpr int kWarp = 32, kThreads = 512, kWarps = kThreads / kWarp;  // every block has kThreads threads
constexpr int kBlocksPerMultiprocessor = 2;  // while one waits for memory or at a barrier, the other computes
constexpr int kMaxRows = 64;                 // the most rows that a block sums at a time
constexpr int kCluster = 16;                 // the blocks of a cluster
constexpr int kMaxAssigning = 512;           // the most assigning crops

// The exponentials of a row are 2^(logit - shift), and its softmax is these times inverse.
struct RowScale {
  float shift, inverse;

  __device__ float log2_sum() const { return inverse == 0 ? -INFINITY : shift - log2f(inverse); }
};

// What each block has at the start of its shared memory. Rows follow.
struct Shared {
  union {
    float of_warps[kWarps][kMaxRows];
    double of_warps_in_double[kWarps];
    struct {
      float shifts[kThreads], sums[kThreads];
    } of_lanes;
  };
  RowScale scales[kMaxRows];
};

extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ inline Shared& shared_of_block() { return *reinterpret_cast<Shared*>(shared_memory); }

template <typename scalar_t>
__device__ scalar_t* rows_in_shared_memory() {
  return reinterpret_cast<scalar_t*>(shared_memory + sizeof(Shared));
}

// Every thread of a block must call the following functions.

__device__ double block_sum(double value) {
  double* of_warps = shared_of_block().of_warps_in_double;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  __syncthreads();  // what is in the memory may still be needed
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0;
  for (int warp = 0; warp < kWarps; warp++) total += of_warps[warp];
  return total;
}

// Calls body(first row, number of rows as a constant) for kGroup rows at a time as long as there are as many.
template <int kGroup, typename Body>
__device__ void for_groups(int first, int count, const Body& body) {
  for (; first + kGroup <= count; first += kGroup) body(first, std::integral_constant<int, kGroup>{});
  if constexpr (kGroup > 1) for_groups<kGroup / 2>(first, count, body);
}

// Copies rows into shared memory.
template <typename scalar_t, typename Row>
__device__ void stage_rows(int count, int n, const Row& row) {
  for_groups<4>(0, count, [&](int first, auto rows) {  // together, so that many loads are under way
    const scalar_t* from[rows];
    scalar_t* to = rows_in_shared_memory<scalar_t>() + first * n;
#pragma unroll
    for (int i = 0; i < rows; i++) from[i] = row(first + i);
#pragma unroll 2
    for (int k = threadIdx.x; k < n; k += kThreads) {
#pragma unroll
      for (int i = 0; i < rows; i++) to[i * n + k] = from[i][k];
    }
  });
}

// Finds the largest logit of each row, or sums 2^(logit - shift). Thread i then calls finish(result) for row i.
template <bool kLargest, typename Logit, typename Finish>
__device__ void reduce_rows(int count, int n, bool shifted, const Logit& logit, const Finish& finish) {
  const auto merge = [](float a, float b) { return kLargest ? fmaxf(a, b) : a + b; };  // fmaxf ignores NaN
  constexpr float neutral = kLargest ? -FLT_MAX : 0.f;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Shared& shared = shared_of_block();
  for_groups<4>(0, count, [&](int first, auto rows) {  // several at once hide the latency of each
    float own[rows], shifts[rows];
#pragma unroll
    for (int i = 0; i < rows; i++) {
      own[i] = neutral;
      shifts[i] = shifted ? shared.scales[first + i].shift : 0.f;
    }
#pragma unroll 2
    for (int k = threadIdx.x; k < n; k += kThreads) {
#pragma unroll
      for (int i = 0; i < rows; i++) {
        const float value = logit(first + i, k);
        own[i] = merge(own[i], kLargest ? value : exp2f(value - shifts[i]));
      }
    }
#pragma unroll
    for (int i = 0; i < rows; i++) {
      for (int offset = kWarp / 2; offset > 0; offset /= 2)
        own[i] = merge(own[i], __shfl_xor_sync(~0u, own[i], offset));
      if (lane == 0) shared.of_warps[warp][first + i] = own[i];
    }
  });
  __syncthreads();
  if (threadIdx.x < count) {
    float result = neutral;
    for (int i = 0; i < kWarps; i++) result = merge(result, shared.of_warps[i][threadIdx.x]);
    finish(result);
  }
}

// Sets the scales of `count` rows with these logits in powers of two. Most rows need no shift: their sum is in range,
// so no exponential overflowed, and none that matters underflowed.
template <typename Logit>
__device__ void scale_rows(int count, int n, const Logit& logit) {
  RowScale& own = shared_of_block().scales[threadIdx.x % kMaxRows];  // of a row for a thread with one
  for (bool shifted = false;; shifted = true) {
    bool repeat = false;
    reduce_rows<false>(count, n, shifted, logit, [&](float sum) {
      own = {shifted ? own.shift : 0.f, sum == 0 ? 0.f : 1 / sum};  // 0: all scores are -inf
      repeat = !shifted && !(sum > 1e-20f && sum < 1e20f);
    });
    if (!__syncthreads_or(repeat)) return;
    reduce_rows<true>(count, n, false, logit, [&](float largest) { own.shift = largest; });
    __syncthreads();
  }
}

// Sinkhorn-Knopp. All pointers are to device memory.
template <typename scalar_t>
struct Work {
  Rows<scalar_t> rows;
  float scale;  // of scores: logits are in powers of two
  int64_t iterations, slabs;
  int chunk_rows;           // the rows of a slab that fit into shared memory
  float *shifts, *sums;     // [A, slabs, K]: the sum of a slab's column is sums * 2^shifts in round 0, later sums
  float* potentials;        // [A, K]
  double* log2_potentials;  // [A, K]: the same in powers of two, for the next round
  float* totals;            // [A, K]: if not null, receives the sums over all slabs, logs in round 0; potentials stay
  float* codes;
  int64_t codes_stride;
};

// The rows of a block.
template <typename scalar_t, bool kStaged>
class Slab {
 public:
  __device__ explicit Slab(const Work<scalar_t>& work)
      : work_(work), n_(work.rows.prototypes), problem_(blockIdx.x / work.slabs), slab_(blockIdx.x % work.slabs),
        first_(work.rows.count * slab_ / work.slabs), last_(work.rows.count * (slab_ + 1) / work.slabs) {}

  // Round 0: log2 of the sum of each column's exponentials.
  __device__ void add_exponentials() {
    for_each_chunk([&](bool is_first) {
      for (int k = threadIdx.x; k < n_; k += kThreads) {
        float shift = is_first ? -FLT_MAX : work_.shifts[partial(k)];
        const float before = shift;
#pragma unroll 4
        for (int i = 0; i < count_; i++) shift = fmaxf(shift, row(i)[k] * work_.scale);
        float sum = is_first ? 0.f : work_.sums[partial(k)] * exp2f(before - shift);
#pragma unroll 4
        for (int i = 0; i < count_; i++) sum += exp2f(row(i)[k] * work_.scale - shift);
        work_.shifts[partial(k)] = shift;
        work_.sums[partial(k)] = sum;
      }
    });
  }

  // Later rounds: the sum of each column's codes.
  __device__ void add_codes() {
    for_each_chunk([&](bool is_first) {
      scale_chunk(count_);
      for (int k = threadIdx.x; k < n_; k += kThreads) {
        const float offset = offset_of(k);
        float total = is_first ? 0.f : work_.sums[partial(k)];
#pragma unroll 4
        for (int i = 0; i < count_; i++) total += code(i, k, offset);
        work_.sums[partial(k)] = total;
      }
    });
  }

  __device__ void store_codes() {
    for_each_chunk([&](bool) {
      const int count = min(int64_t{count_}, max(work_.rows.score_rows - begin_, int64_t{0}));  // extra rows have none
      scale_chunk(count);
      float* codes = work_.codes + begin_ * work_.codes_stride;
      for (int k = threadIdx.x; k < n_; k += kThreads) {
        const float offset = offset_of(k);
#pragma unroll 4
        for (int i = 0; i < count; i++)
          __stcs(codes + i * work_.codes_stride + k, code(i, k, offset));  // the cache is for scores
      }
    });
  }

  // Adds up the slabs of this problem, and computes the potentials. The blocks of the problem share its columns. In a
  // block, `width` threads take adjacent columns, and each of kThreads / width lanes some of the slabs.
  __device__ void combine(bool is_first) {
    constexpr int kLoads = 8;  // under way at the same time
    auto& of_lanes = shared_of_block().of_lanes;
    int lanes = 1;
    while (lanes < kWarps && lanes * kLoads < work_.slabs) lanes *= 2;
    const int width = kThreads / lanes, lane = threadIdx.x / width;
    for (int64_t column = slab_ * width; column < n_; column += work_.slabs * width) {
      const int64_t k = column + threadIdx.x % width;
      float shift = -FLT_MAX, sum = 0;
      for (int64_t begin = lane; begin < work_.slabs; begin += lanes * kLoads) {
        float shifts[kLoads], sums[kLoads];
        const float before = shift;
#pragma unroll
        for (int i = 0; i < kLoads; i++) {
          const int64_t slab = begin + i * lanes, at = (problem_ * work_.slabs + slab) * n_ + k;
          const bool exists = k < n_ && slab < work_.slabs;
          shifts[i] = !exists ? -FLT_MAX : is_first ? work_.shifts[at] : 0.f;
          sums[i] = exists ? work_.sums[at] : 0.f;
          shift = fmaxf(shift, shifts[i]);
        }
        sum *= exp2f(before - shift);
#pragma unroll
        for (int i = 0; i < kLoads; i++) sum += sums[i] * exp2f(shifts[i] - shift);
      }
      of_lanes.shifts[threadIdx.x] = shift;
      of_lanes.sums[threadIdx.x] = sum;
      __syncthreads();
      if (lane == 0 && k < n_) {
        for (int i = threadIdx.x; i < kThreads; i += width) shift = fmaxf(shift, of_lanes.shifts[i]);
        double total = 0;
        for (int i = threadIdx.x; i < kThreads; i += width)
          total += of_lanes.sums[i] * exp2f(of_lanes.shifts[i] - shift);
        finish(problem_ * n_ + k, is_first, is_first ? shift + log2(total) : total);
      }
      __syncthreads();
    }
  }

 private:
  const Work<scalar_t>& work_;
  const int n_;
  const int64_t problem_, slab_, first_, last_;
  int64_t begin_ = 0;  // the chunk: rows of the slab that are in shared memory, or without kStaged read from the cache
  int count_ = 0, loaded_ = -1;
  bool backward_ = true;

  // Calls body(is first) for every chunk. It begins with the chunk that was used last and is still there.
  template <typename Body>
  __device__ void for_each_chunk(const Body& body) {
    backward_ = !backward_;
    const int chunks = max((last_ - first_ + work_.chunk_rows - 1) / work_.chunk_rows, int64_t{1});
    for (int turn = 0; turn < chunks; turn++) {
      const int chunk = backward_ ? chunks - 1 - turn : turn;
      begin_ = first_ + int64_t{chunk} * work_.chunk_rows;
      count_ = min(int64_t{work_.chunk_rows}, last_ - begin_);
      if (kStaged && chunk != loaded_)
        stage_rows<scalar_t>(count_, n_, [&](int i) { return work_.rows.row(problem_, begin_ + i); });
      loaded_ = chunk;
      body(turn == 0);
    }
  }

  __device__ const scalar_t* row(int i) const {
    return kStaged ? rows_in_shared_memory<scalar_t>() + i * n_ : work_.rows.row(problem_, begin_ + i);
  }
  __device__ float offset_of(int k) const { return work_.potentials[problem_ * n_ + k] * float(kLog2E); }
  __device__ int64_t partial(int k) const { return (problem_ * work_.slabs + slab_) * n_ + k; }

  __device__ void scale_chunk(int count) const {
    scale_rows(count, n_, [&](int i, int k) { return row(i)[k] * work_.scale + offset_of(k); });
  }
  __device__ float code(int i, int k, float offset) const {
    const RowScale scale = shared_of_block().scales[i];
    return exp2f(row(i)[k] * work_.scale + offset - scale.shift) * scale.inverse;
  }

  // A prototype without a finite score takes no part, whatever its potential is. Its potential stays 0.
  __device__ void finish(int64_t i, bool is_first, double value) const {
    if (work_.totals) {
      work_.totals[i] = is_first ? value * kLn2 : value;
    } else if (is_first) {
      set_potential(i, value == -INFINITY ? 0 : -value);
    } else if (value != 0) {
      set_potential(i, work_.log2_potentials[i] - log2(value));
    }
  }
  __device__ void set_potential(int64_t i, double value) const {
    work_.log2_potentials[i] = value;
    work_.potentials[i] = value * kLn2;
  }
};

// Does the steps first, ..., last - 1: two for each round, first those of the slabs, then the combination of them.
// After the rounds comes the step of the codes.
template <typename scalar_t, bool kStaged>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    steps_kernel(Work<scalar_t> work, int64_t first, int64_t last, bool in_cluster) {
  Slab<scalar_t, kStaged> slab(work);
  for (int64_t step = first; step < last; step++) {
    if (step == 2 * work.iterations) {
      slab.store_codes();
    } else if (step % 2 == 1) {
      slab.combine(step == 1);
    } else if (step > 0) {
      slab.add_codes();
    } else {
      slab.add_exponentials();
    }
    if (step + 1 == last) return;
    if (in_cluster) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
      cooperative_groups::this_cluster().sync();
#endif
    } else {
      cooperative_groups::this_grid().sync();
    }
  }
}

// The assigning crops, stored by value because a kernel cannot read host memory.
struct Assigning {
  int count = 0;
  int16_t crops[kMaxAssigning];

  explicit Assigning(at::IntArrayRef crops_for_assign) {
    TORCH_CHECK(crops_for_assign.size() <= kMaxAssigning, "crops_for_assign: expected at most ", kMaxAssigning,
                " crops, got ", crops_for_assign.size());
    for (const int64_t crop : crops_for_assign) crops[count++] = static_cast<int16_t>(crop);
  }
  __device__ int position(int64_t crop) const {  // -1: the crop does not assign
    for (int i = 0; i < count; i++)
      if (crops[i] == crop) return i;
    return -1;
  }
};

// The loss, for its kernels. code_scores [A, B, K] are null if the codes are of the assigning crops' own scores.
template <typename scalar_t>
struct Loss {
  Rows<scalar_t> rows;
  const float *code_scores, *potentials;
  Assigning assigning;
  float prediction_scale, code_scale;  // of scores: logits are in powers of two

  // The logit of a code, in powers of two. own: the row of scores of the same crop.
  __device__ float code_logit(int i, int64_t image, int k, const scalar_t* own) const {
    const int64_t n = rows.prototypes;
    const float score = code_scores ? code_scores[(i * rows.count + image) * n + k] : static_cast<float>(own[k]);
    return score * code_scale + potentials[i * n + k] * float(kLog2E);
  }
};

// One block per image. With kStaged, it reads the V x K scores of the image once, into shared memory. Otherwise it
// relies on the caches.
template <typename scalar_t, bool kStaged>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    swapped_loss_kernel(Loss<scalar_t> loss, double temperature, float* logsumexps, double* loss_per_image) {
  const int n = loss.rows.prototypes, nmb_crops = loss.rows.problems;
  const int64_t image = blockIdx.x, batch_size = loss.rows.count;
  if (kStaged) stage_rows<scalar_t>(nmb_crops, n, [&](int crop) { return loss.rows.row(crop, image); });
  const auto scores = [&](int crop) {
    return kStaged ? rows_in_shared_memory<scalar_t>() + crop * n : loss.rows.row(crop, image);
  };
  const RowScale* scales = shared_of_block().scales;

  // Sum over assigning crops i and other crops v of logsumexp_v minus the dot product of codes_i and scores_v.
  double own_loss = 0;
  for (int first = 0; first < nmb_crops; first += kMaxRows) {
    const int count = min(kMaxRows, nmb_crops - first);
    scale_rows(count, n, [&](int i, int k) { return scores(first + i)[k] * loss.prediction_scale; });
    if (threadIdx.x < count) {
      const int crop = first + threadIdx.x;
      const RowScale scale = scales[threadIdx.x];
      const double logsumexp = scale.inverse == 0 ? NAN : scale.log2_sum() * kLn2;  // NaN: no finite score
      logsumexps[crop * batch_size + image] = logsumexp;
      own_loss += (loss.assigning.count - (loss.assigning.position(crop) >= 0)) * logsumexp;
    }
  }
  for (int first = 0; first < loss.assigning.count; first += kMaxRows) {
    const int count = min(kMaxRows, loss.assigning.count - first);
    const auto own = [&](int i) { return scores(loss.assigning.crops[first + i]); };
    const auto logit = [&](int i, int k) { return loss.code_logit(first + i, image, k, own(i)); };
    scale_rows(count, n, logit);
    if (threadIdx.x < count)
      logsumexps[(nmb_crops + first + threadIdx.x) * batch_size + image] = scales[threadIdx.x].log2_sum() * kLn2;
    float agreement = 0;
    for (int k = threadIdx.x; k < n; k += kThreads) {
      float all_crops = 0;
#pragma unroll 4
      for (int crop = 0; crop < nmb_crops; crop++) all_crops += static_cast<float>(scores(crop)[k]);
      for (int i = 0; i < count; i++) {
        const float code = exp2f(logit(i, k) - scales[i].shift) * scales[i].inverse;
        if (code != 0) agreement += code * (all_crops - static_cast<float>(own(i)[k]));  // 0 adds 0, even to -inf
      }
    }
    own_loss -= agreement / temperature;
  }
  const double sum = block_sum(own_loss);
  if (threadIdx.x == 0) loss_per_image[image] = sum;
}

__global__ void __launch_bounds__(kThreads)
    mean_loss_kernel(const double* loss_per_image, int64_t batch_size, double factor, float* result) {
  double sum = 0;
  for (int64_t image = threadIdx.x; image < batch_size; image += kThreads) sum += loss_per_image[image];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *result = sum * factor;
}

// One thread per image and prototype computes the gradients of all crops.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    swapped_loss_backward_kernel(Loss<scalar_t> loss, const float* logsumexps, const float* grad, double factor,
                                 scalar_t* __restrict__ result) {
  const Assigning& assigning = loss.assigning;
  const int n = loss.rows.prototypes, nmb_crops = loss.rows.problems, k = blockIdx.y * kThreads + threadIdx.x;
  const int64_t image = blockIdx.x, batch_size = loss.rows.count;
  if (k >= n) return;
  const float scaled_grad = *grad * factor;
  const auto softmax = [&](float logit, int saved) {
    return exp2f(logit - logsumexps[saved * batch_size + image] * float(kLog2E));
  };
  const auto code = [&](int i) {
    return softmax(loss.code_logit(i, image, k, loss.rows.row(assigning.crops[i], image)), nmb_crops + i);
  };
  float all_codes = 0;
  for (int i = 0; i < assigning.count; i++) all_codes += code(i);
#pragma unroll 4
  for (int crop = 0; crop < nmb_crops; crop++) {
    const int position = assigning.position(crop);
    const float prediction = softmax(loss.rows.row(crop, image)[k] * loss.prediction_scale, crop);
    const float other_codes = position < 0 ? all_codes : all_codes - code(position);
    const float nmb_others = assigning.count - (position >= 0);
    result[(crop * batch_size + image) * n + k] = scaled_grad * (nmb_others * prediction - other_codes);
  }
}

// Sums of columns, and of squares: first of each slab of rows, then of all. A thread owns a column.

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    moments_of_slabs_kernel(Rows<scalar_t> rows, double* sums, double* squares) {
  const int n = rows.prototypes, k = blockIdx.y * kThreads + threadIdx.x;
  double sum = 0, square = 0;
  if (k < n) {
#pragma unroll 4
    for (int64_t row = blockIdx.x; row < rows.count; row += gridDim.x) {
      const double value = static_cast<double>(rows.row(blockIdx.z, row)[k]);
      sum += value;
      square += value * value;
    }
    sums[(int64_t{blockIdx.z} * gridDim.x + blockIdx.x) * n + k] = sum;
  }
  square = block_sum(square);
  const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) squares[block] = square;
}

// result [problems * n + 1]. The last block adds the squares.
__global__ void __launch_bounds__(kThreads)
    add_moments_kernel(const double* sums, const double* squares, int64_t slabs, int64_t columns, int64_t n,
                       int64_t nmb_squares, double* result) {
  if (blockIdx.x + 1 == gridDim.x) {
    double square = 0;
    for (int64_t i = threadIdx.x; i < nmb_squares; i += kThreads) square += squares[i];
    square = block_sum(square);
    if (threadIdx.x == 0) result[columns] = square;
    return;
  }
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= columns) return;
  double sum = 0;
  for (int64_t slab = 0; slab < slabs; slab++) sum += sums[(i / n * slabs + slab) * n + i % n];
  result[i] = sum;
}

// Host code

// There are no kernels for float64. This calls the operator in plain torch, which it is on devices without kernels.
template <typename Operator, typename... Arguments>
auto in_torch(const char* name, const Arguments&... arguments) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Operator>();
  return handle.redispatch(c10::DispatchKeySet(c10::DispatchKey::XPU), arguments...);
}

#define FLOAT64_IN_TORCH(name, scores, ...) \
  if (scores.scalar_type() == at::kDouble) \
    return in_torch<decltype(name)>("sinkhorn_ext::" #name, __VA_ARGS__)

// Runs the code with scalar_t, the type of the scores.
#define DISPATCH_SCORES(scores, name, ...) \
  AT_DISPATCH_SWITCH( \
      scores.scalar_type(), name, AT_DISPATCH_CASE(at::kFloat, [&] { __VA_ARGS__ }) \
      AT_DISPATCH_CASE(at::kHalf, [&] { __VA_ARGS__ }) AT_DISPATCH_CASE(at::kBFloat16, [&] { __VA_ARGS__ }))

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Checks scores and extra, makes their rows contiguous and their device current, and allocates for the kernels.
struct Problem {
  at::Tensor scores;
  std::optional<at::Tensor> extra;
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  int64_t problems, rows, n;

  Problem(const at::Tensor& all_scores, const std::optional<at::Tensor>& all_extra) : guard(all_scores.device()) {
    check_scores(all_scores, all_extra);
    scores = with_contiguous_rows(all_scores);
    extra = with_contiguous_rows(all_extra);
    stream = c10::cuda::getCurrentCUDAStream();
    problems = scores.size(0);
    rows = scores.size(1) + (extra ? extra->size(1) : 0);
    n = scores.size(2);
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type = at::kFloat) const {
    return at::empty(sizes, scores.options().dtype(type));
  }

  int64_t attribute(cudaDeviceAttr name) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, scores.get_device()));
    return value;
  }
  int64_t blocks() const { return kBlocksPerMultiprocessor * attribute(cudaDevAttrMultiProcessorCount); }
  int64_t max_shared_bytes() const { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

  // row_bytes: of shared memory, for rows. attribute: of the launch, or null.
  template <typename Kernel>
  cudaLaunchConfig_t configure(Kernel kernel, dim3 grid, int64_t row_bytes, cudaLaunchAttribute* attribute) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = sizeof(Shared) + row_bytes;
    config.stream = stream;
    config.attrs = attribute;
    config.numAttrs = attribute ? 1 : 0;
    if (config.dynamicSmemBytes > 48 * 1024)
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_shared_bytes()));
    return config;
  }
  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, int64_t row_bytes, const Arguments&... arguments) const {
    const cudaLaunchConfig_t config = configure(kernel, grid, row_bytes, nullptr);
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
  }
};

// Does steps of Sinkhorn-Knopp, see steps_kernel: in one launch if the GPU can run all its blocks at once.
template <typename scalar_t>
class Steps {
 public:
  Work<scalar_t> work{};

  Steps(const Problem& problem, double epsilon, int64_t iterations) : problem_(problem) {
    work.rows = rows_of<scalar_t>(problem.scores, problem.extra);
    work.scale = kLog2E / epsilon;
    work.iterations = iterations;
    const int64_t bytes_per_row = problem.n * sizeof(scalar_t);
    const int64_t bytes_per_block =
        problem.attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / kBlocksPerMultiprocessor -
        problem.attribute(cudaDevAttrReservedSharedMemoryPerBlock);
    const int64_t header = sizeof(Shared);
    max_chunk_rows_ = std::clamp<int64_t>((bytes_per_block - header) / bytes_per_row, 1, kMaxRows);
    is_staged_ = header + bytes_per_row <= problem.max_shared_bytes();
    kernel_ = is_staged_ ? steps_kernel<scalar_t, true> : steps_kernel<scalar_t, false>;
  }

  void run(int64_t first, int64_t last) {
    if (last - first > 1 && (run_in_clusters(first, last) || run_cooperatively(first, last))) return;
    divide(problem_.blocks());
    for (int64_t step = first; step < last; step++)
      problem_.launch(kernel_, grid(), row_bytes(), work, step, step + 1, false);
  }

 private:
  const Problem& problem_;
  void (*kernel_)(Work<scalar_t>, int64_t, int64_t, bool);
  int64_t max_chunk_rows_;
  bool is_staged_;
  at::Tensor partials_;

  dim3 grid() const { return dim3(problem_.problems * work.slabs); }
  int64_t row_bytes() const { return is_staged_ ? work.chunk_rows * problem_.n * sizeof(scalar_t) : 0; }

  // Divides the work among this many blocks, at least one for each problem.
  void divide(int64_t blocks) {
    work.slabs = std::clamp<int64_t>(blocks / problem_.problems, 1, std::max<int64_t>(problem_.rows, 1));
    const int64_t rows = std::max<int64_t>(divide_up(problem_.rows, work.slabs), 1);
    work.chunk_rows = divide_up(rows, divide_up(rows, max_chunk_rows_));
    partials_ = problem_.empty({2, problem_.problems, work.slabs, problem_.n});
    work.shifts = partials_.mutable_data_ptr<float>();
    work.sums = work.shifts + partials_.numel() / 2;
  }

  // One cluster for each problem that fits into its shared memory. Not every GPU can run clusters of this size, and code
  // for GPUs before compute capability 9.0, which later ones may run too, has no barrier of clusters.
  bool run_in_clusters(int64_t first, int64_t last) {
    cudaFuncAttributes code{};
    const cudaError_t found = cudaFuncGetAttributes(&code, kernel_);
    if (found == cudaErrorNoKernelImageForDevice || found == cudaErrorInvalidDeviceFunction) {
      (void)cudaGetLastError();
      TORCH_CHECK(false, "sinkhorn_ext: its CUDA kernels were not compiled for this GPU. Build them again on this "
                         "machine: pip install --no-build-isolation -e . Or set SINKHORN_EXT=torch in the environment");
    }
    if (!succeeded(found) || code.ptxVersion < 90 || problem_.rows < kCluster ||
        problem_.rows > kCluster * max_chunk_rows_)
      return false;
    divide(kCluster * problem_.problems);
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    const cudaLaunchConfig_t config = problem_.configure(kernel_, grid(), row_bytes(), &attribute);
    int clusters = 0;
    return succeeded(cudaFuncSetAttribute(kernel_, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)) &&
           succeeded(cudaOccupancyMaxActiveClusters(&clusters, kernel_, &config)) && clusters > 0 &&
           succeeded(cudaLaunchKernelEx(&config, kernel_, work, first, last, true));
  }

  // All problems in one grid, if the GPU can run all its blocks at once. It may still fail if another program uses the GPU.
  bool run_cooperatively(int64_t first, int64_t last) {
    divide(problem_.blocks());
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
    cudaLaunchConfig_t config = problem_.configure(kernel_, grid(), row_bytes(), &attribute);
    int resident = 0;
    C10_CUDA_CHECK(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel_, kThreads, config.dynamicSmemBytes));
    if (resident < kBlocksPerMultiprocessor) {  // long rows
      divide(problem_.blocks() / kBlocksPerMultiprocessor);
      config = problem_.configure(kernel_, grid(), row_bytes(), &attribute);
    }
    // A launch that fails would end the capture of a CUDA graph.
    const int64_t multiprocessors = problem_.attribute(cudaDevAttrMultiProcessorCount);
    if (grid().x > multiprocessors * std::max(resident, 1)) return false;
    return problem_.attribute(cudaDevAttrCooperativeLaunch) &&
           succeeded(cudaLaunchKernelEx(&config, kernel_, work, first, last, false));
  }

  // Tells whether a call succeeded, and forgets its error, as there is another way. An earlier kernel's error stays.
  static bool succeeded(cudaError_t error) {
    if (error != cudaSuccess) (void)cudaGetLastError();
    return error == cudaSuccess;
  }
};

// Does the steps first, ..., last - 1. given: potentials for steps that do not compute them. Returns those computed or,
// with totals, the sums of the prototypes. codes: receives them in the step after the rounds.
at::Tensor do_steps(const Problem& problem, double epsilon, int64_t iterations, int64_t first, int64_t last,
                    const at::Tensor* given, bool totals, const at::Tensor* codes) {
  const at::Tensor result = problem.empty({problem.problems, problem.n});
  if (result.numel() == 0) return result;
  const at::Tensor log2_potentials = problem.empty({problem.problems, problem.n}, at::kDouble);
  const at::Tensor potentials = given ? given->contiguous() : result;
  DISPATCH_SCORES(problem.scores, "sinkhorn_ext", {
    Steps<scalar_t> steps(problem, epsilon, iterations);
    steps.work.potentials = static_cast<float*>(potentials.data_ptr());
    steps.work.log2_potentials = log2_potentials.mutable_data_ptr<double>();
    steps.work.totals = totals ? result.mutable_data_ptr<float>() : nullptr;
    if (codes) {
      steps.work.codes = codes->mutable_data_ptr<float>();
      steps.work.codes_stride = codes->stride(0);
    }
    steps.run(first, last);
  });
  return result;
}

at::Tensor prototype_logsumexp(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon) {
  FLOAT64_IN_TORCH(prototype_logsumexp, scores, scores, extra, epsilon);
  return do_steps(Problem(scores, extra), epsilon, 1, 0, 2, nullptr, true, nullptr);
}

at::Tensor prototype_totals(const at::Tensor& scores, const std::optional<at::Tensor>& extra,
                            const at::Tensor& potentials, double epsilon) {
  FLOAT64_IN_TORCH(prototype_totals, scores, scores, extra, potentials, epsilon);
  const Problem problem(scores, extra);
  check_potentials(potentials, scores, problem.problems);
  return do_steps(problem, epsilon, 2, 2, 4, &potentials, true, nullptr);
}

at::Tensor potentials(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon,
                      int64_t iterations) {
  FLOAT64_IN_TORCH(potentials, scores, scores, extra, epsilon, iterations);
  check_iterations(iterations);
  return do_steps(Problem(scores, extra), epsilon, iterations, 0, 2 * iterations, nullptr, false, nullptr);
}

void sinkhorn(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon, int64_t iterations,
              at::Tensor out) {
  FLOAT64_IN_TORCH(sinkhorn, scores, scores, extra, epsilon, iterations, out);
  check_iterations(iterations);
  const Problem problem(scores.unsqueeze(0), extra ? std::make_optional(extra->unsqueeze(0)) : std::nullopt);
  check_out(out, scores);
  do_steps(problem, epsilon, iterations, 0, 2 * iterations + 1, nullptr, false, &out);
}

void codes(const at::Tensor& scores, const at::Tensor& potentials, double epsilon, at::Tensor out) {
  FLOAT64_IN_TORCH(codes, scores, scores, potentials, epsilon, out);
  const Problem problem(scores.unsqueeze(0), std::nullopt);
  check_out(out, scores);
  check_potentials(potentials.unsqueeze(0), scores, 1);
  do_steps(problem, epsilon, 0, 0, 1, &potentials, false, &out);
}

at::Tensor moments(const at::Tensor& scores) {
  FLOAT64_IN_TORCH(moments, scores, scores);
  const Problem problem(scores, std::nullopt);
  const int64_t columns = problem.problems * problem.n, tiles = divide_up(problem.n, kThreads);
  const int64_t slabs = std::clamp<int64_t>(problem.blocks() / std::max<int64_t>(problem.problems * tiles, 1), 1,
                                            std::max<int64_t>(problem.rows, 1));
  const at::Tensor result = problem.empty({columns + 1}, at::kDouble);
  const at::Tensor sums = problem.empty({problem.problems, slabs, problem.n}, at::kDouble);
  const at::Tensor squares = problem.empty({problem.problems * tiles * slabs}, at::kDouble);
  DISPATCH_SCORES(scores, "moments", {
    if (problem.problems > 0)
      problem.launch(moments_of_slabs_kernel<scalar_t>, dim3(slabs, tiles, problem.problems), 0,
                     rows_of<scalar_t>(problem.scores, std::nullopt), sums.mutable_data_ptr<double>(),
                     squares.mutable_data_ptr<double>());
  });
  problem.launch(add_moments_kernel, dim3(divide_up(columns, kThreads) + 1), 0, sums.const_data_ptr<double>(),
                 squares.const_data_ptr<double>(), slabs, columns, problem.n, squares.numel(),
                 result.mutable_data_ptr<double>());
  return result;
}

// Owns the memory that its `loss` points to.
template <typename scalar_t>
struct LossArguments {
  std::optional<at::Tensor> code_scores;
  at::Tensor potentials;
  Loss<scalar_t> loss;

  LossArguments(const Problem& problem, const std::optional<at::Tensor>& assigning, const at::Tensor& potentials_,
                at::IntArrayRef crops_for_assign, double temperature, double epsilon)
      : code_scores(assigning ? std::make_optional(assigning->contiguous()) : std::nullopt),
        potentials(potentials_.contiguous()),
        loss{rows_of<scalar_t>(problem.scores, std::nullopt),
             code_scores ? code_scores->template const_data_ptr<float>() : nullptr,
             potentials.const_data_ptr<float>(), Assigning(crops_for_assign),
             static_cast<float>(kLog2E / temperature), static_cast<float>(kLog2E / epsilon)} {}
};

std::tuple<at::Tensor, at::Tensor> swapped_loss(const at::Tensor& scores, const std::optional<at::Tensor>& assigning,
                                                const at::Tensor& potentials, at::IntArrayRef crops_for_assign,
                                                double temperature, double epsilon) {
  FLOAT64_IN_TORCH(swapped_loss, scores, scores, assigning, potentials, crops_for_assign, temperature, epsilon);
  check_loss(scores, assigning, potentials, crops_for_assign);
  const Problem problem(scores, std::nullopt);
  const int64_t nmb_assigning = crops_for_assign.size();
  const at::Tensor loss = problem.empty({});
  const at::Tensor logsumexps = problem.empty({problem.problems + nmb_assigning, problem.rows});
  const at::Tensor loss_per_image = problem.empty({problem.rows}, at::kDouble);
  DISPATCH_SCORES(scores, "swapped_loss", {
    const LossArguments<scalar_t> arguments(problem, assigning, potentials, crops_for_assign, temperature, epsilon);
    const int64_t bytes = problem.problems * problem.n * sizeof(scalar_t), header = sizeof(Shared);
    const bool is_staged = header + bytes <= problem.max_shared_bytes();
    problem.launch(is_staged ? swapped_loss_kernel<scalar_t, true> : swapped_loss_kernel<scalar_t, false>,
                   dim3(problem.rows), is_staged ? bytes : 0, arguments.loss, temperature,
                   logsumexps.mutable_data_ptr<float>(), loss_per_image.mutable_data_ptr<double>());
  });
  const double terms = static_cast<double>(nmb_assigning * (problem.problems - 1) * problem.rows);
  problem.launch(mean_loss_kernel, dim3(1), 0, loss_per_image.const_data_ptr<double>(), problem.rows, 1 / terms,
                 loss.mutable_data_ptr<float>());
  return {loss, logsumexps};
}

at::Tensor swapped_loss_backward(const at::Tensor& grad, const at::Tensor& scores,
                                 const std::optional<at::Tensor>& assigning, const at::Tensor& potentials,
                                 const at::Tensor& logsumexps, at::IntArrayRef crops_for_assign, double temperature,
                                 double epsilon) {
  FLOAT64_IN_TORCH(swapped_loss_backward, scores, grad, scores, assigning, potentials, logsumexps, crops_for_assign,
                   temperature, epsilon);
  check_loss(scores, assigning, potentials, crops_for_assign);
  check_gradient(grad, potentials);
  check_logsumexps(logsumexps, potentials, scores);
  const Problem problem(scores, std::nullopt);
  const at::Tensor result = problem.empty(scores.sizes(), scores.scalar_type()), saved = logsumexps.contiguous();
  const double terms = static_cast<double>(potentials.size(0) * (problem.problems - 1) * problem.rows);
  DISPATCH_SCORES(scores, "swapped_loss_backward", {
    const LossArguments<scalar_t> arguments(problem, assigning, potentials, crops_for_assign, temperature, epsilon);
    problem.launch(swapped_loss_backward_kernel<scalar_t>, dim3(problem.rows, divide_up(problem.n, kThreads)), 0,
                   arguments.loss, saved.const_data_ptr<float>(), grad.const_data_ptr<float>(),
                   1 / (terms * temperature), result.mutable_data_ptr<scalar_t>());
  });
  return result;
}

}  // namespace

torch::Library cuda_kernels() {
  torch::Library library = MAKE_TORCH_LIBRARY_IMPL(sinkhorn_ext, CUDA);
  IMPLEMENT_OPERATORS(library);
  return library;
}

std::string nvcc_version() {
  return std::to_string(__CUDACC_VER_MAJOR__) + "." + std::to_string(__CUDACC_VER_MINOR__) + "." +
         std::to_string(__CUDACC_VER_BUILD__);
}

}  // namespace sinkhorn_ext
