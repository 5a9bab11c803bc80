// Sinkhorn-Knopp and the swapped loss on NVIDIA GPUs. The operators are declared in __init__.py, with the formulas.
//
// A thread owns some columns of a slab of rows and keeps their totals in registers; a second stage adds up the slabs,
// in a fixed order, so results repeat bit for bit. For one process and K <= 4096 all rounds are one cooperative launch.

#include "rows.h"

#include <ATen/Dispatch.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>

namespace sinkhorn_ext {
namespace {

constexpr int kWarp = 32, kThreads = 512, kGroups = kThreads / kWarp;
constexpr int kMostItems = 8;                                // columns a thread can own
constexpr int64_t kTile = int64_t{kThreads} * kMostItems;    // columns a block can own: 4096
constexpr int kMostAssigning = 32;

template <typename scalar_t>
using accumulation_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

template <typename T>
__device__ constexpr T lowest() {
  return std::is_same_v<T, double> ? T(-1.7976931348623157e308) : T(-3.402823466e38f);
}

__device__ inline float power_of_two(float x) { return exp2f(x); }
__device__ inline double power_of_two(double x) { return exp2(x); }
__device__ inline float log_two(float x) { return log2f(x); }
__device__ inline double log_two(double x) { return log2(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // NaN loses
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Sum or maximum over a block, the same bits in every thread. Every thread must call. Two buffers in turn, so that one
// barrier is enough.
template <typename T>
class BlockReduce {
 public:
  __device__ BlockReduce() {
    __shared__ T buffers[2][kWarp];
    buffers_ = buffers;
  }
  __device__ T sum(T value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    const T* of_warps = exchange(value);
    T total = 0;
    for (int warp = 0; warp < blockDim.x / kWarp; warp++) total += of_warps[warp];
    return total;
  }
  __device__ T max(T value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value = larger(value, __shfl_xor_sync(~0u, value, offset));
    const T* of_warps = exchange(value);
    T largest = lowest<T>();
    for (int warp = 0; warp < blockDim.x / kWarp; warp++) largest = larger(largest, of_warps[warp]);
    return largest;
  }

 private:
  T (*buffers_)[kWarp];
  int turn_ = 0;

  __device__ const T* exchange(T value) {
    T* buffer = buffers_[turn_];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = value;
    __syncthreads();
    return buffer;
  }
};

template <typename T>
__device__ bool in_range(T sum) {  // no exponential was lost that matters
  return sum > T(1e-20) && sum < T(1e20);
}

// The logit of a score in powers of two. potential may be null.
template <typename scalar_t, typename T>
__device__ T log2_logit(const scalar_t* x, const T* potential, T scale, int64_t k) {
  return static_cast<T>(x[k]) * scale + (potential ? potential[k] * T(kLog2E) : T(0));
}

// log2 sum over a row of 2^logit, by a block; -inf if every score is.
template <typename scalar_t, typename T>
__device__ T row_log2_sum(const scalar_t* x, const T* potential, T scale, int64_t n, BlockReduce<T>& reduce) {
  const auto logit = [&](int64_t k) { return log2_logit(x, potential, scale, k); };
  T sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) sum += power_of_two(logit(k));
  sum = reduce.sum(sum);
  if (in_range(sum)) return log_two(sum);
  T largest = lowest<T>();
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) largest = larger(largest, logit(k));
  largest = reduce.max(largest);
  sum = 0;
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) sum += power_of_two(logit(k) - largest);
  return largest + log_two(reduce.sum(sum));
}

// Partial results of the slabs, [A, slabs, K] each: slab s of a problem is rows s, s + slabs, s + 2 slabs, ...
template <typename T>
struct Partials {
  T *shifts, *sums;
  int64_t slabs;
};

template <typename scalar_t, typename T, int kItems>
__device__ void log2_sums_of_slab(const Rows<scalar_t>& rows, int64_t problem, int64_t slab, int64_t first_column,
                                  T scale, const Partials<T>& partials) {
  T shifts[kItems], sums[kItems];
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    shifts[item] = lowest<T>();
    sums[item] = 0;
  }
  const int64_t n = rows.prototypes;
  for (int64_t row = slab; row < rows.count; row += partials.slabs) {
    const scalar_t* x = rows.row(problem, row);
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int64_t k = first_column + threadIdx.x + item * kThreads;
      if (k < n) {
        const T logit = static_cast<T>(x[k]) * scale, shift = larger(shifts[item], logit);
        sums[item] = sums[item] * power_of_two(shifts[item] - shift) + power_of_two(logit - shift);
        shifts[item] = shift;
      }
    }
  }
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int64_t k = first_column + threadIdx.x + item * kThreads;
    if (k < n) {
      partials.shifts[(problem * partials.slabs + slab) * n + k] = shifts[item];
      partials.sums[(problem * partials.slabs + slab) * n + k] = sums[item];
    }
  }
}

// Sum over the rows of a slab of the softmax over prototypes; K <= kThreads * kItems.
template <typename scalar_t, typename T, int kItems>
__device__ void softmax_sums_of_slab(const Rows<scalar_t>& rows, const T* potentials, int64_t problem, int64_t slab,
                                     T scale, const Partials<T>& partials, BlockReduce<T>& reduce) {
  T offsets[kItems], sums[kItems];
  const int64_t n = rows.prototypes;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int64_t k = threadIdx.x + item * kThreads;
    offsets[item] = k < n ? potentials[problem * n + k] * T(kLog2E) : T(0);
    sums[item] = 0;
  }
  for (int64_t row = slab; row < rows.count; row += partials.slabs) {
    const scalar_t* x = rows.row(problem, row);
    T logits[kItems], sum = 0;
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int64_t k = threadIdx.x + item * kThreads;
      logits[item] = k < n ? static_cast<T>(x[k]) * scale + offsets[item] : -std::numeric_limits<T>::infinity();
      sum += power_of_two(logits[item]);
    }
    sum = reduce.sum(sum);
    T shift = 0;
    if (!in_range(sum)) {
      shift = lowest<T>();
#pragma unroll
      for (int item = 0; item < kItems; item++) shift = larger(shift, logits[item]);
      shift = reduce.max(shift);
      sum = 0;
#pragma unroll
      for (int item = 0; item < kItems; item++) sum += power_of_two(logits[item] - shift);
      sum = reduce.sum(sum);
    }
    const T inverse = sum == 0 ? 0 : 1 / sum;  // 0: every score is -inf, the image takes no part
#pragma unroll
    for (int item = 0; item < kItems; item++) sums[item] += power_of_two(logits[item] - shift) * inverse;
  }
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int64_t k = threadIdx.x + item * kThreads;
    if (k < n) partials.sums[(problem * partials.slabs + slab) * n + k] = sums[item];
  }
}

// The second stage, by all blocks: finish(i, sum over slabs) for every i = problem * K + k. A warp's lanes take
// neighbouring columns, its block's warps take the slabs in turn.
template <typename T, typename Finish>
__device__ void combine(const Partials<T>& partials, int64_t problems, int64_t n, bool with_shifts,
                        const Finish& finish) {
  __shared__ double of_groups[kGroups][kWarp + 1];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < problems * n; first += int64_t{gridDim.x} * kWarp) {
    const int64_t i = first + lane;
    const bool is_column = i < problems * n;
    const int64_t start = is_column ? i / n * partials.slabs * n + i % n : 0;
    T shift = 0;
    if (with_shifts) {
      shift = lowest<T>();
      if (is_column)
        for (int64_t slab = group; slab < partials.slabs; slab += kGroups)
          shift = larger(shift, partials.shifts[start + slab * n]);
      of_groups[group][lane] = shift;
      __syncthreads();
      for (int other = 0; other < kGroups; other++) shift = larger(shift, static_cast<T>(of_groups[other][lane]));
      __syncthreads();
    }
    double sum = 0;
    if (is_column)
#pragma unroll 4
      for (int64_t slab = group; slab < partials.slabs; slab += kGroups) {
        const T factor = with_shifts ? power_of_two(partials.shifts[start + slab * n] - shift) : T(1);
        sum += partials.sums[start + slab * n] * factor;
      }
    of_groups[group][lane] = sum;
    __syncthreads();
    if (group == 0 && is_column) {
      double total = 0;
      for (int other = 0; other < kGroups; other++) total += of_groups[other][lane];
      finish(i, with_shifts ? shift + log2(total) : total);
    }
    __syncthreads();
  }
}

// Potentials between rounds, in powers of two, and as they are returned.
template <typename T>
struct Potentials {
  double* log2;
  T* natural;

  // A prototype without a finite score takes no part, whatever its potential is: it stays at 0.
  __device__ void start(int64_t i, double log2_sum) const {
    set(i, log2_sum == -std::numeric_limits<double>::infinity() ? 0 : -log2_sum);
  }
  __device__ void advance(int64_t i, double total) const {
    if (total != 0) set(i, log2[i] - ::log2(total));
  }

 private:
  __device__ void set(int64_t i, double value) const {
    log2[i] = value;
    natural[i] = static_cast<T>(value * kLn2);
  }
};

template <typename scalar_t, typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    potentials_kernel(Rows<scalar_t> rows, T scale, int64_t iterations, Partials<T> partials, Potentials<T> potentials) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  BlockReduce<T> reduce;
  const int64_t problem = blockIdx.x / partials.slabs, slab = blockIdx.x % partials.slabs;
  log2_sums_of_slab<scalar_t, T, kItems>(rows, problem, slab, 0, scale, partials);
  grid.sync();
  combine(partials, rows.problems, rows.prototypes, true,
          [&](int64_t i, double log2_sum) { potentials.start(i, log2_sum); });
  for (int64_t round = 1; round < iterations; round++) {
    grid.sync();
    softmax_sums_of_slab<scalar_t, T, kItems>(rows, potentials.natural, problem, slab, scale, partials, reduce);
    grid.sync();
    combine(partials, rows.problems, rows.prototypes, false,
            [&](int64_t i, double total) { potentials.advance(i, total); });
  }
}

// The same in separate launches, for several processes and for K > 4096.

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) log2_sums_kernel(Rows<scalar_t> rows, T scale, Partials<T> partials) {
  log2_sums_of_slab<scalar_t, T, kMostItems>(rows, blockIdx.z, blockIdx.x, blockIdx.y * kTile, scale, partials);
}

template <typename scalar_t, typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    softmax_sums_kernel(Rows<scalar_t> rows, const T* potentials, T scale, Partials<T> partials) {
  BlockReduce<T> reduce;
  softmax_sums_of_slab<scalar_t, T, kItems>(rows, potentials, blockIdx.z, blockIdx.x, scale, partials, reduce);
}

// For K > 4096 the sum of each row comes first, then a thread adds up one column.

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    row_log2_sums_kernel(Rows<scalar_t> rows, const T* potentials, T scale, T* result) {
  BlockReduce<T> reduce;
  const int64_t problem = blockIdx.x / rows.count, row = blockIdx.x % rows.count, n = rows.prototypes;
  const T log2_sum = row_log2_sum(rows.row(problem, row), potentials + problem * n, scale, n, reduce);
  if (threadIdx.x == 0) result[blockIdx.x] = log2_sum;
}

// A score's softmax where the row's sum is known; 0 where every score of the row is -inf.
template <typename scalar_t, typename T>
__device__ T softmax_of(const scalar_t* x, const T* potential, T scale, int64_t k, T log2_sum) {
  return log2_sum == -std::numeric_limits<T>::infinity()
             ? T(0)
             : power_of_two(log2_logit(x, potential, scale, k) - log2_sum);
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    softmax_columns_kernel(Rows<scalar_t> rows, const T* potentials, const T* row_log2_sums, T scale,
                           Partials<T> partials) {
  const int64_t n = rows.prototypes, problem = blockIdx.z, k = int64_t{blockIdx.y} * kThreads + threadIdx.x;
  if (k >= n) return;
  T sum = 0;
  for (int64_t row = blockIdx.x; row < rows.count; row += partials.slabs)
    sum += softmax_of(rows.row(problem, row), potentials + problem * n, scale, k,
                      row_log2_sums[problem * rows.count + row]);
  partials.sums[(problem * partials.slabs + blockIdx.x) * n + k] = sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(Partials<T> partials, int64_t problems, int64_t n, bool with_shifts, double factor, T* result) {
  combine(partials, problems, n, with_shifts, [&](int64_t i, double value) { result[i] = value * factor; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    combine_potentials_kernel(Partials<T> partials, int64_t problems, int64_t n, bool is_first,
                              Potentials<T> potentials) {
  combine(partials, problems, n, is_first, [&](int64_t i, double value) {
    if (is_first) {
      potentials.start(i, value);
    } else {
      potentials.advance(i, value);
    }
  });
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    codes_kernel(Rows<scalar_t> rows, const T* potentials, T scale, T* out, int64_t out_stride) {
  BlockReduce<T> reduce;
  const int64_t n = rows.prototypes;
  const scalar_t* x = rows.row(0, blockIdx.x);
  const T log2_sum = row_log2_sum(x, potentials, scale, n, reduce);
  T* codes = out + blockIdx.x * out_stride;
  for (int64_t k = threadIdx.x; k < n; k += blockDim.x) codes[k] = softmax_of(x, potentials, scale, k, log2_sum);
}

// The crops that assign, by value, as a kernel cannot read a list of the host.
struct Assigning {
  int count = 0, crops[kMostAssigning];

  Assigning(at::IntArrayRef crops_for_assign, int64_t nmb_crops) {
    TORCH_CHECK(crops_for_assign.size() <= kMostAssigning, "crops_for_assign: expected ", kMostAssigning,
                " crops at most, got ", crops_for_assign.size());
    for (const int64_t crop : crops_for_assign) {
      TORCH_CHECK(crop >= 0 && crop < nmb_crops && position(crop) < 0, "crops_for_assign: expected each of 0..",
                  nmb_crops - 1, " once at most, got ", crops_for_assign);
      crops[count++] = static_cast<int>(crop);
    }
  }
  C10_HOST_DEVICE int position(int64_t crop) const {  // -1: does not assign
    for (int i = 0; i < count; i++)
      if (crops[i] == crop) return i;
    return -1;
  }
};

// One block per image. Its V x K scores wait in shared memory where they fit, in the caches otherwise.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    swapped_loss_kernel(Rows<scalar_t> rows, const T* potentials, Assigning assigning, T prediction_scale, T code_scale,
                        double temperature, bool is_staged, T* logsumexps, double* loss_per_image) {
  extern __shared__ __align__(8) unsigned char shared[];
  scalar_t* staged = reinterpret_cast<scalar_t*>(shared);
  BlockReduce<T> reduce;
  const int64_t n = rows.prototypes, nmb_crops = rows.problems, image = blockIdx.x, batch_size = rows.count;
  if (is_staged) {
    for (int64_t crop = 0; crop < nmb_crops; crop++) {
      const scalar_t* x = rows.row(crop, image);
      for (int64_t k = threadIdx.x; k < n; k += blockDim.x) staged[crop * n + k] = x[k];
    }
    __syncthreads();
  }
  const auto scores = [&](int64_t crop) { return is_staged ? staged + crop * n : rows.row(crop, image); };
  const auto save = [&](int64_t row, T log2_sum) {
    if (threadIdx.x == 0) logsumexps[row * batch_size + image] = log2_sum * T(kLn2);
  };

  // Over assigning crops i and other crops v: logsumexp_v, less the codes of i times the scores of v.
  double loss = 0;
  for (int64_t crop = 0; crop < nmb_crops; crop++) {
    T log2_sum = row_log2_sum<scalar_t, T>(scores(crop), nullptr, prediction_scale, n, reduce);
    if (log2_sum == -std::numeric_limits<T>::infinity()) log2_sum = std::numeric_limits<T>::quiet_NaN();
    save(crop, log2_sum);
    const int other_codes = assigning.count - (assigning.position(crop) >= 0);
    if (other_codes > 0) loss += other_codes * (log2_sum * kLn2);
  }
  for (int i = 0; i < assigning.count; i++) {
    const scalar_t* own = scores(assigning.crops[i]);
    const T* potential = potentials + i * n;
    const T log2_sum = row_log2_sum(own, potential, code_scale, n, reduce);
    save(nmb_crops + i, log2_sum);
    T agreement = 0;
    for (int64_t k = threadIdx.x; k < n; k += blockDim.x) {
      const T code = softmax_of(own, potential, code_scale, k, log2_sum);
      if (code == 0) continue;  // counts as 0 even where the score is -inf
      T others = 0;
      for (int64_t crop = 0; crop < nmb_crops; crop++)
        if (crop != assigning.crops[i]) others += static_cast<T>(scores(crop)[k]);
      agreement += code * others;
    }
    loss -= reduce.sum(agreement) / temperature;
  }
  if (threadIdx.x == 0) loss_per_image[image] = loss;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mean_loss_kernel(const double* loss_per_image, int64_t batch_size, double factor, T* result) {
  BlockReduce<double> reduce;
  double sum = 0;
  for (int64_t image = threadIdx.x; image < batch_size; image += blockDim.x) sum += loss_per_image[image];
  sum = reduce.sum(sum);
  if (threadIdx.x == 0) *result = sum * factor;
}

// One thread per image and prototype: its gradient for every crop.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    swapped_loss_backward_kernel(Rows<scalar_t> rows, const T* potentials, const T* logsumexps, Assigning assigning,
                                 T prediction_scale, T code_scale, const T* grad, double factor, scalar_t* result) {
  const int64_t n = rows.prototypes, nmb_crops = rows.problems, batch_size = rows.count;
  const int64_t tiles = (n + kThreads - 1) / kThreads, image = blockIdx.x / tiles;
  const int64_t k = blockIdx.x % tiles * kThreads + threadIdx.x;
  if (k >= n) return;
  const T scaled_grad = *grad * factor;
  const auto code = [&](int i) {
    const T log2_sum = logsumexps[(nmb_crops + i) * batch_size + image] * T(kLog2E);
    return softmax_of(rows.row(assigning.crops[i], image), potentials + i * n, code_scale, k, log2_sum);
  };
  T all_codes = 0;
  for (int i = 0; i < assigning.count; i++) all_codes += code(i);
  for (int64_t crop = 0; crop < nmb_crops; crop++) {
    const int position = assigning.position(crop);
    const T log2_sum = logsumexps[crop * batch_size + image] * T(kLog2E);
    const T prediction = softmax_of<scalar_t, T>(rows.row(crop, image), nullptr, prediction_scale, k, log2_sum);
    const T other_codes = position < 0 ? all_codes : all_codes - code(position);
    const T nmb_others = assigning.count - (position >= 0);
    result[(crop * batch_size + image) * n + k] = scaled_grad * (nmb_others * prediction - other_codes);
  }
}

// Host side

#define DISPATCH(scores, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, scores.scalar_type(), name, [&] { \
    using T = accumulation_t<scalar_t>; \
    __VA_ARGS__ \
  })

// Calls body with the number of columns a thread owns as a constant; K <= 4096.
template <typename Body>
void with_items(int64_t n, const Body& body) {
  if (n <= 2 * kThreads) return body(std::integral_constant<int, 2>{});
  if (n <= 6 * kThreads) return body(std::integral_constant<int, 6>{});
  body(std::integral_constant<int, kMostItems>{});
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

// Checked scores and extra with contiguous rows on the current device and stream, and room for what kernels share.
struct Problem {
  at::Tensor scores;
  std::optional<at::Tensor> extra;
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
  int64_t problems, rows, n;

  Problem(const at::Tensor& all_scores, const std::optional<at::Tensor>& all_extra) : guard(all_scores.device()) {
    check_scores(all_scores, all_extra);
    scores = with_contiguous_rows(all_scores);
    if (all_extra) extra = with_contiguous_rows(*all_extra);
    stream = c10::cuda::getCurrentCUDAStream();
    problems = scores.size(0);
    rows = scores.size(1) + (extra ? extra->size(1) : 0);
    n = scores.size(2);
  }

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, scores.options().dtype(type));
  }
  at::Tensor per_prototype() const { return empty({problems, n}, accumulation_type(scores)); }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, scores.get_device()); }

  // Slabs of a problem, so that `blocks` blocks serve all problems.
  int64_t slabs(int64_t blocks) const { return std::clamp<int64_t>(blocks / problems, 1, std::max<int64_t>(rows, 1)); }

  at::Tensor partials(int64_t slabs) const { return empty({2, problems, slabs, n}, accumulation_type(scores)); }

  unsigned combining_blocks() const {
    return static_cast<unsigned>(std::min<int64_t>((problems * n + kWarp - 1) / kWarp, 4096));
  }
};

template <typename T>
Partials<T> partials_in(const at::Tensor& memory) {
  T* begin = memory.mutable_data_ptr<T>();
  return {begin, begin + memory.numel() / 2, memory.size(2)};
}

template <typename scalar_t, typename T>
void launch_log2_sums(const Problem& problem, T scale, const Partials<T>& partials) {
  const dim3 blocks(partials.slabs, (problem.n + kTile - 1) / kTile, problem.problems);
  const auto rows = rows_of<scalar_t>(problem.scores, problem.extra);
  log2_sums_kernel<scalar_t, T><<<blocks, kThreads, 0, problem.stream>>>(rows, scale, partials);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename scalar_t, typename T>
void launch_softmax_sums(const Problem& problem, const T* potentials, T scale, const Partials<T>& partials) {
  const auto rows = rows_of<scalar_t>(problem.scores, problem.extra);
  if (problem.n <= kTile) {
    const dim3 blocks(partials.slabs, 1, problem.problems);
    with_items(problem.n, [&](auto items) {
      softmax_sums_kernel<scalar_t, T, items>
          <<<blocks, kThreads, 0, problem.stream>>>(rows, potentials, scale, partials);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const at::Tensor row_sums = problem.empty({problem.problems, problem.rows}, accumulation_type(problem.scores));
  if (problem.rows > 0) {
    row_log2_sums_kernel<scalar_t, T><<<problem.problems * problem.rows, kThreads, 0, problem.stream>>>(
        rows, potentials, scale, row_sums.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const dim3 blocks(partials.slabs, (problem.n + kThreads - 1) / kThreads, problem.problems);
  softmax_columns_kernel<scalar_t, T><<<blocks, kThreads, 0, problem.stream>>>(
      rows, potentials, row_sums.const_data_ptr<T>(), scale, partials);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kBlocksPerMultiprocessor = 2;  // enough rows on their way to fill the memory's pipeline

at::Tensor prototype_logsumexp(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon) {
  const Problem problem(scores, extra);
  const at::Tensor result = problem.per_prototype();
  if (result.numel() == 0) return result;
  const at::Tensor memory = problem.partials(problem.slabs(kBlocksPerMultiprocessor * problem.multiprocessors()));
  DISPATCH(scores, "prototype_logsumexp", {
    const Partials<T> partials = partials_in<T>(memory);
    launch_log2_sums<scalar_t, T>(problem, kLog2E / epsilon, partials);
    combine_kernel<T><<<problem.combining_blocks(), kThreads, 0, problem.stream>>>(
        partials, problem.problems, problem.n, true, kLn2, result.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

at::Tensor prototype_totals(const at::Tensor& scores, const std::optional<at::Tensor>& extra,
                            const at::Tensor& potentials, double epsilon) {
  check_potentials(potentials, scores, scores.size(0));
  const Problem problem(scores, extra);
  const at::Tensor result = problem.per_prototype();
  if (result.numel() == 0) return result;
  const at::Tensor memory = problem.partials(problem.slabs(kBlocksPerMultiprocessor * problem.multiprocessors()));
  const at::Tensor contiguous = potentials.contiguous();
  DISPATCH(scores, "prototype_totals", {
    const Partials<T> partials = partials_in<T>(memory);
    launch_softmax_sums<scalar_t, T>(problem, contiguous.const_data_ptr<T>(), kLog2E / epsilon, partials);
    combine_kernel<T><<<problem.combining_blocks(), kThreads, 0, problem.stream>>>(
        partials, problem.problems, problem.n, false, 1, result.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

// All rounds in one launch; false if the GPU cannot hold all its blocks at once.
template <typename scalar_t, typename T>
bool launch_cooperatively(const Problem& problem, T scale, int64_t iterations, Potentials<T> potentials) {
  if (problem.n > kTile || !attribute(cudaDevAttrCooperativeLaunch, problem.scores.get_device())) return false;
  bool launched = false;
  with_items(problem.n, [&](auto items) {
    const auto kernel = potentials_kernel<scalar_t, T, items>;
    int resident = 0;
    C10_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, kThreads, 0));
    const int64_t blocks = std::min(resident, kBlocksPerMultiprocessor) * problem.multiprocessors();
    if (blocks < problem.problems) return;
    const at::Tensor memory = problem.partials(problem.slabs(blocks));
    Rows<scalar_t> rows = rows_of<scalar_t>(problem.scores, problem.extra);
    Partials<T> partials = partials_in<T>(memory);
    void* arguments[] = {&rows, &scale, &iterations, &partials, &potentials};
    const dim3 grid(partials.slabs * problem.problems);
    C10_CUDA_CHECK(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads), arguments,
                                               0, problem.stream));
    launched = true;
  });
  return launched;
}

at::Tensor potentials(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon,
                      int64_t iterations) {
  const Problem problem(scores, extra);
  const at::Tensor result = problem.per_prototype();
  if (result.numel() == 0) return result;
  const at::Tensor log2_potentials = problem.empty({problem.problems, problem.n}, at::kDouble);
  DISPATCH(scores, "potentials", {
    const T scale = kLog2E / epsilon;
    const Potentials<T> state{log2_potentials.mutable_data_ptr<double>(), result.mutable_data_ptr<T>()};
    if (launch_cooperatively<scalar_t, T>(problem, scale, iterations, state)) return;
    const at::Tensor memory = problem.partials(problem.slabs(kBlocksPerMultiprocessor * problem.multiprocessors()));
    const Partials<T> partials = partials_in<T>(memory);
    for (int64_t round = 0; round < iterations; round++) {
      if (round == 0) {
        launch_log2_sums<scalar_t, T>(problem, scale, partials);
      } else {
        launch_softmax_sums<scalar_t, T>(problem, state.natural, scale, partials);
      }
      combine_potentials_kernel<T><<<problem.combining_blocks(), kThreads, 0, problem.stream>>>(
          partials, problem.problems, problem.n, round == 0, state);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return result;
}

void codes(const at::Tensor& scores, const at::Tensor& potentials, double epsilon, at::Tensor out) {
  check_out(out, scores);
  check_potentials(potentials.unsqueeze(0), scores, 1);
  const Problem problem(scores.unsqueeze(0), std::nullopt);
  if (out.numel() == 0) return;
  const at::Tensor contiguous = potentials.contiguous();
  DISPATCH(scores, "codes", {
    codes_kernel<scalar_t, T><<<problem.rows, kThreads, 0, problem.stream>>>(
        rows_of<scalar_t>(problem.scores, std::nullopt), contiguous.const_data_ptr<T>(), kLog2E / epsilon,
        out.mutable_data_ptr<T>(), out.stride(0));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void sinkhorn(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon, int64_t iterations,
              at::Tensor out) {
  const auto problem = extra ? std::make_optional(extra->unsqueeze(0)) : std::nullopt;
  codes(scores, potentials(scores.unsqueeze(0), problem, epsilon, iterations)[0], epsilon, out);
}

std::tuple<at::Tensor, at::Tensor> swapped_loss(const at::Tensor& scores, const at::Tensor& potentials,
                                                at::IntArrayRef crops_for_assign, double temperature,
                                                double epsilon) {
  check_potentials(potentials, scores, crops_for_assign.size());
  const Problem problem(scores, std::nullopt);
  const Assigning assigning(crops_for_assign, problem.problems);
  const auto type = accumulation_type(scores);
  const at::Tensor loss = problem.empty({}, type), contiguous = potentials.contiguous();
  const at::Tensor logsumexps = problem.empty({problem.problems + assigning.count, problem.rows}, type);
  const at::Tensor loss_per_image = problem.empty({problem.rows}, at::kDouble);
  const double terms = static_cast<double>(assigning.count * (problem.problems - 1) * problem.rows);
  DISPATCH(scores, "swapped_loss", {
    const auto kernel = swapped_loss_kernel<scalar_t, T>;
    // What the kernel itself declares comes out of the same shared memory.
    const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, scores.get_device()) - 1024;
    const int64_t bytes = problem.problems * problem.n * static_cast<int64_t>(sizeof(scalar_t));
    const bool is_staged = bytes <= most;
    if (is_staged && bytes > 47 * 1024)
      C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    kernel<<<problem.rows, kThreads, is_staged ? bytes : 0, problem.stream>>>(
        rows_of<scalar_t>(problem.scores, std::nullopt), contiguous.const_data_ptr<T>(), assigning,
        kLog2E / temperature, kLog2E / epsilon, temperature, is_staged, logsumexps.mutable_data_ptr<T>(),
        loss_per_image.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    mean_loss_kernel<T><<<1, kThreads, 0, problem.stream>>>(loss_per_image.const_data_ptr<double>(), problem.rows,
                                                            1 / terms, loss.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, logsumexps};
}

at::Tensor swapped_loss_backward(const at::Tensor& grad, const at::Tensor& scores, const at::Tensor& potentials,
                                 const at::Tensor& logsumexps, at::IntArrayRef crops_for_assign, double temperature,
                                 double epsilon) {
  check_potentials(potentials, scores, crops_for_assign.size());
  check_logsumexps(logsumexps, potentials, scores);
  const Problem problem(scores, std::nullopt);
  const Assigning assigning(crops_for_assign, problem.problems);
  const at::Tensor result = problem.empty(scores.sizes(), scores.scalar_type());
  const at::Tensor contiguous = potentials.contiguous(), saved = logsumexps.contiguous();
  const double terms = static_cast<double>(assigning.count * (problem.problems - 1) * problem.rows);
  const int64_t tiles = (problem.n + kThreads - 1) / kThreads;
  DISPATCH(scores, "swapped_loss_backward", {
    swapped_loss_backward_kernel<scalar_t, T><<<problem.rows * tiles, kThreads, 0, problem.stream>>>(
        rows_of<scalar_t>(problem.scores, std::nullopt), contiguous.const_data_ptr<T>(), saved.const_data_ptr<T>(),
        assigning, kLog2E / temperature, kLog2E / epsilon, grad.const_data_ptr<T>(), 1 / (terms * temperature),
        result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(sinkhorn_ext, CUDA, library) {
  library.impl("prototype_logsumexp", prototype_logsumexp);
  library.impl("prototype_totals", prototype_totals);
  library.impl("potentials", potentials);
  library.impl("codes", codes);
  library.impl("sinkhorn", sinkhorn);
  library.impl("swapped_loss", swapped_loss);
  library.impl("swapped_loss_backward", swapped_loss_backward);
}

}  // namespace sinkhorn_ext
