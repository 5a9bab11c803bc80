// Sinkhorn-Knopp and the swapped loss on NVIDIA GPUs. __init__.py declares the operators and has the formulas.
//
// A block sums a slab of rows. Each thread owns some columns and keeps their totals in registers. A second stage adds
// the slabs in a fixed order, so results repeat bit for bit. With one process and K <= 4096, all rounds are one
// cooperative launch.

#include "rows.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cooperative_groups.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <string>

namespace sinkhorn_ext {
namespace {

constexpr int kWarp = 32, kThreads = 512, kWarps = kThreads / kWarp;  // every block has kThreads threads
constexpr int kMaxItems = 8;                                // the most columns that a thread owns
constexpr int64_t kTile = int64_t{kThreads} * kMaxItems;    // the most columns that a block owns: 4096
constexpr int kMaxAssigning = 512;                          // the most assigning crops

template <typename T>
__device__ constexpr T lowest() {
  if constexpr (std::is_same_v<T, double>) {
    return -1.7976931348623157e308;
  } else {
    return -3.402823466e38f;
  }
}

__device__ inline float power_of_two(float x) { return exp2f(x); }
__device__ inline double power_of_two(double x) { return exp2(x); }
__device__ inline float log_two(float x) { return log2f(x); }
__device__ inline double log_two(double x) { return log2(x); }
__device__ inline float larger(float a, float b) { return fmaxf(a, b); }  // ignores NaN
__device__ inline double larger(double a, double b) { return fmax(a, b); }

// Sum or maximum over a block. Every thread must call it, and every thread gets the same bits. It alternates between
// two buffers, so that one barrier is enough.
template <typename T>
class BlockReduce {
 public:
  __device__ BlockReduce() {
    __shared__ T buffers[2][kWarps];
    buffers_ = buffers;
  }
  __device__ T sum(T value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    const T* of_warps = exchange(value);
    T total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) total += of_warps[warp];
    return total;
  }
  __device__ T max(T value) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
      value = larger(value, __shfl_xor_sync(~0u, value, offset));
    const T* of_warps = exchange(value);
    T largest = lowest<T>();
#pragma unroll
    for (int warp = 0; warp < kWarps; warp++) largest = larger(largest, of_warps[warp]);
    return largest;
  }

 private:
  T (*buffers_)[kWarps];
  int turn_ = 0;

  __device__ const T* exchange(T value) {
    T* buffer = buffers_[turn_];
    turn_ ^= 1;
    if (threadIdx.x % kWarp == 0) buffer[threadIdx.x / kWarp] = value;
    __syncthreads();
    return buffer;
  }
};

// Returns whether a sum of exponentials is accurate: none overflowed, and none that matters underflowed.
template <typename T>
__device__ bool in_range(T sum) {
  return sum > T(1e-20) && sum < T(1e20);
}

// The logit of score k, in powers of two. potential may be null.
template <typename scalar_t, typename T>
__device__ T log2_logit(const scalar_t* x, const T* potential, T scale, int k) {
  return static_cast<T>(x[k]) * scale + (potential ? potential[k] * T(kLog2E) : T(0));
}

// The sum over a row of 2^(logit - shift). The shift keeps the sum in range.
template <typename T>
struct RowSum {
  T shift, sum;

  __device__ T inverse() const { return sum == 0 ? T(0) : 1 / sum; }  // 0: all scores are -inf
  __device__ T log2() const { return shift + log_two(sum); }
};

// Sums a row with a block. Most rows need no shift, and then one pass is enough.
template <typename scalar_t, typename T>
__device__ RowSum<T> row_sum(const scalar_t* x, const T* potential, T scale, int n, BlockReduce<T>& reduce) {
  const auto logit = [&](int k) { return log2_logit(x, potential, scale, k); };
  const auto sum = [&](T shift) {
    T own = 0;
    for (int k = threadIdx.x; k < n; k += kThreads) own += power_of_two(logit(k) - shift);
    return reduce.sum(own);
  };
  const T plain = sum(0);
  if (in_range(plain)) return {0, plain};
  T largest = lowest<T>();
  for (int k = threadIdx.x; k < n; k += kThreads) largest = larger(largest, logit(k));
  largest = reduce.max(largest);
  return {largest, sum(largest)};
}

// Partial results of the slabs, each [A, slabs, K]. Slab s of a problem has the rows s, s + slabs, s + 2 slabs, ...
template <typename T>
struct Partials {
  T *shifts, *sums;
  int64_t slabs;
};

template <typename scalar_t, typename T, int kItems>
__device__ void log2_sums_of_slab(const Rows<scalar_t>& rows, int64_t problem, int64_t slab, int first_column, T scale,
                                  const Partials<T>& partials) {
  const int n = rows.prototypes;
  T shifts[kItems], sums[kItems];
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    shifts[item] = lowest<T>();
    sums[item] = 0;
  }
#pragma unroll 2
  for (int64_t row = slab; row < rows.count; row += partials.slabs) {
    const scalar_t* x = rows.row(problem, row);
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int k = first_column + threadIdx.x + item * kThreads;
      if (k < n) {
        const T logit = static_cast<T>(x[k]) * scale, shift = larger(shifts[item], logit);
        sums[item] = sums[item] * power_of_two(shifts[item] - shift) + power_of_two(logit - shift);
        shifts[item] = shift;
      }
    }
  }
  const int64_t start = (problem * partials.slabs + slab) * n;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int k = first_column + threadIdx.x + item * kThreads;
    if (k < n) {
      partials.shifts[start + k] = shifts[item];
      partials.sums[start + k] = sums[item];
    }
  }
}

// A row of K <= kThreads * kItems scores, held in the registers of a block.
template <typename scalar_t, typename T, int kItems>
struct HeldRow {
  scalar_t values[kItems];

  __device__ void load(const scalar_t* x, int n) {
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int k = threadIdx.x + item * kThreads;
      if (k < n) values[item] = x[k];
    }
  }
  __device__ void logits(T scale, const T* offsets, int n, T* result) const {
#pragma unroll
    for (int item = 0; item < kItems; item++)
      result[item] = static_cast<int>(threadIdx.x) + item * kThreads < n
                         ? static_cast<T>(values[item]) * scale + offsets[item]
                         : -std::numeric_limits<T>::infinity();
  }
};

template <typename T, int kItems>
__device__ T exponentiate(T* e, T shift) {
  T sum = 0;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    e[item] = power_of_two(e[item] - shift);
    sum += e[item];
  }
  return sum;
}

// Loads the potentials of the columns that a thread owns, in powers of two.
template <typename T, int kItems>
__device__ void load_offsets(const T* potentials, int n, T* offsets) {
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int k = threadIdx.x + item * kThreads;
    offsets[item] = k < n ? potentials[k] * T(kLog2E) : T(0);
  }
}

// Returns the inverse of the sum over a row of the exponentials e. Every thread must call it. For the few rows whose
// sum is out of range, reload() restores the logits in e, and the exponentials are computed again with a shift.
template <typename T, int kItems, typename Reload>
__device__ T normalize(T* e, T own_sum, BlockReduce<T>& reduce, const Reload& reload) {
  T sum = reduce.sum(own_sum);
  if (!in_range(sum)) {
    reload();
    T shift = lowest<T>();
#pragma unroll
    for (int item = 0; item < kItems; item++) shift = larger(shift, e[item]);
    shift = reduce.max(shift);
    sum = reduce.sum(exponentiate<T, kItems>(e, shift));
  }
  return sum == 0 ? T(0) : 1 / sum;  // 0: all scores are -inf
}

// Sum over the rows of a slab of the softmax over prototypes, for K <= kThreads * kItems. With backward, it starts with
// the last row, because the previous pass has left that in the cache.
template <typename scalar_t, typename T, int kItems>
__device__ void softmax_sums_of_slab(const Rows<scalar_t>& rows, const T* potentials, int64_t problem, int64_t slab,
                                     bool backward, T scale, const Partials<T>& partials, BlockReduce<T>& reduce) {
  const int n = rows.prototypes;
  const int64_t steps = slab < rows.count ? (rows.count - slab + partials.slabs - 1) / partials.slabs : 0;
  const auto row_of = [&](int64_t step) {
    return rows.row(problem, slab + (backward ? steps - 1 - step : step) * partials.slabs);
  };
  T offsets[kItems], sums[kItems] = {};
  load_offsets<T, kItems>(potentials + problem * n, n, offsets);
  HeldRow<scalar_t, T, kItems> held;
  if (steps > 0) held.load(row_of(0), n);
  for (int64_t step = 0; step < steps; step++) {
    T e[kItems];
    held.logits(scale, offsets, n, e);
    const T own_sum = exponentiate<T, kItems>(e, 0);
    if (step + 1 < steps) held.load(row_of(step + 1), n);  // arrives while the block sums
    const T inverse = normalize<T, kItems>(e, own_sum, reduce, [&] {
      HeldRow<scalar_t, T, kItems> again;
      again.load(row_of(step), n);
      again.logits(scale, offsets, n, e);
    });
#pragma unroll
    for (int item = 0; item < kItems; item++) sums[item] += e[item] * inverse;
  }
  const int64_t start = (problem * partials.slabs + slab) * n;
#pragma unroll
  for (int item = 0; item < kItems; item++) {
    const int k = threadIdx.x + item * kThreads;
    if (k < n) partials.sums[start + k] = sums[item];
  }
}

// A sum of powers of two, stored as sum * 2^shift.
template <typename T>
struct ShiftedSum {
  T shift;
  double sum;

  __device__ void add(T other_shift, double other_sum) {
    const T larger_shift = larger(shift, other_shift);
    sum = sum * power_of_two(shift - larger_shift) + other_sum * power_of_two(other_shift - larger_shift);
    shift = larger_shift;
  }
};

// The second stage, done by all blocks: calls finish(i, result) for every i = problem * K + k. The result is the sum
// over slabs or, with shifts, its log2. The lanes of a warp take adjacent columns. Warp w of a block takes the slabs
// w, w + kWarps, w + 2 kWarps, ...
template <typename T, typename Finish>
__device__ void combine(const Partials<T>& partials, int64_t problems, int64_t n, bool with_shifts,
                        const Finish& finish) {
  __shared__ ShiftedSum<T> of_warps[kWarps][kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t first = int64_t{blockIdx.x} * kWarp; first < problems * n; first += int64_t{gridDim.x} * kWarp) {
    const int64_t i = first + lane;
    const bool is_column = i < problems * n;
    const int64_t start = is_column ? i / n * partials.slabs * n + i % n : 0;
    ShiftedSum<T> own{lowest<T>(), 0};
    if (is_column) {
#pragma unroll 4
      for (int64_t slab = warp; slab < partials.slabs; slab += kWarps) {
        if (with_shifts) {
          own.add(partials.shifts[start + slab * n], partials.sums[start + slab * n]);
        } else {
          own.sum += partials.sums[start + slab * n];
        }
      }
    }
    of_warps[warp][lane] = own;
    __syncthreads();
    if (warp == 0 && is_column) {
      for (int other = 1; other < kWarps; other++) {
        if (with_shifts) {
          own.add(of_warps[other][lane].shift, of_warps[other][lane].sum);
        } else {
          own.sum += of_warps[other][lane].sum;
        }
      }
      finish(i, with_shifts ? own.shift + log2(own.sum) : own.sum);
    }
    __syncthreads();
  }
}

// The potentials between rounds: in powers of two, and natural as the operator returns them.
template <typename T>
struct Potentials {
  double* log2;
  T* natural;

  // A prototype without a finite score takes no part, whatever its potential is. Its potential stays 0.
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
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(float) ? 2 : 1)
    potentials_kernel(Rows<scalar_t> rows, T scale, int64_t iterations, Partials<T> partials,
                      Potentials<T> potentials) {
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  BlockReduce<T> reduce;
  const int64_t problem = blockIdx.x / partials.slabs, slab = blockIdx.x % partials.slabs;
  const bool has_slab = problem < rows.problems;  // the other blocks only help to combine
  if (has_slab) log2_sums_of_slab<scalar_t, T, kItems>(rows, problem, slab, 0, scale, partials);
  grid.sync();
  combine(partials, rows.problems, rows.prototypes, true,
          [&](int64_t i, double log2_sum) { potentials.start(i, log2_sum); });
  for (int64_t round = 1; round < iterations; round++) {
    grid.sync();
    if (has_slab)
      softmax_sums_of_slab<scalar_t, T, kItems>(rows, potentials.natural, problem, slab, round % 2 == 1, scale,
                                                partials, reduce);
    grid.sync();
    combine(partials, rows.problems, rows.prototypes, false,
            [&](int64_t i, double total) { potentials.advance(i, total); });
  }
}

// The same in separate launches, for several processes and for K > 4096.

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads) log2_sums_kernel(Rows<scalar_t> rows, T scale, Partials<T> partials) {
  log2_sums_of_slab<scalar_t, T, kMaxItems>(rows, blockIdx.z, blockIdx.x, blockIdx.y * kTile, scale, partials);
}

template <typename scalar_t, typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    softmax_sums_kernel(Rows<scalar_t> rows, const T* potentials, T scale, Partials<T> partials) {
  BlockReduce<T> reduce;
  softmax_sums_of_slab<scalar_t, T, kItems>(rows, potentials, blockIdx.z, blockIdx.x, true, scale, partials, reduce);
}

// For K > 4096, one kernel sums each row, then each thread of another kernel sums one column.

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    row_sums_kernel(Rows<scalar_t> rows, const T* potentials, T scale, RowSum<T>* result) {
  BlockReduce<T> reduce;
  const int64_t problem = blockIdx.x / rows.count, row = blockIdx.x % rows.count;
  const int n = rows.prototypes;
  const RowSum<T> sum = row_sum(rows.row(problem, row), potentials + problem * n, scale, n, reduce);
  if (threadIdx.x == 0) result[blockIdx.x] = sum;
}

template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    softmax_columns_kernel(Rows<scalar_t> rows, const T* potentials, const RowSum<T>* row_sums, T scale,
                           Partials<T> partials) {
  const int n = rows.prototypes, k = blockIdx.y * kThreads + threadIdx.x;
  const int64_t problem = blockIdx.z;
  if (k >= n) return;
  T total = 0;
  for (int64_t row = blockIdx.x; row < rows.count; row += partials.slabs) {
    const RowSum<T> sum = row_sums[problem * rows.count + row];
    const T logit = log2_logit(rows.row(problem, row), potentials + problem * n, scale, k);
    total += power_of_two(logit - sum.shift) * sum.inverse();
  }
  partials.sums[(problem * partials.slabs + blockIdx.x) * n + k] = total;
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

// One block per row. It holds the row in registers if kItems > 0.
template <typename scalar_t, typename T, int kItems>
__global__ void __launch_bounds__(kThreads)
    codes_kernel(Rows<scalar_t> rows, const T* potentials, T scale, T* __restrict__ out, int64_t out_stride) {
  BlockReduce<T> reduce;
  const int n = rows.prototypes;
  const scalar_t* x = rows.row(0, blockIdx.x);
  T* codes = out + blockIdx.x * out_stride;
  if constexpr (kItems > 0) {
    T offsets[kItems], e[kItems];
    HeldRow<scalar_t, T, kItems> held;
    held.load(x, n);
    load_offsets<T, kItems>(potentials, n, offsets);
    held.logits(scale, offsets, n, e);
    const T own_sum = exponentiate<T, kItems>(e, 0);
    const T inverse =
        normalize<T, kItems>(e, own_sum, reduce, [&] { held.logits(scale, offsets, n, e); });
#pragma unroll
    for (int item = 0; item < kItems; item++) {
      const int k = threadIdx.x + item * kThreads;
      if (k < n) __stcs(codes + k, e[item] * inverse);  // bypasses the cache, which scores need more than codes
    }
  } else {
    const RowSum<T> sum = row_sum(x, potentials, scale, n, reduce);
    const T inverse = sum.inverse();
    for (int k = threadIdx.x; k < n; k += kThreads)
      codes[k] = power_of_two(log2_logit(x, potentials, scale, k) - sum.shift) * inverse;
  }
}

// The assigning crops, stored by value because a kernel cannot read host memory.
struct Assigning {
  int count = 0;
  int16_t crops[kMaxAssigning];

  Assigning(at::IntArrayRef crops_for_assign, int64_t nmb_crops) {
    TORCH_CHECK(crops_for_assign.size() <= kMaxAssigning, "crops_for_assign: expected at most ", kMaxAssigning,
                " crops, got ", crops_for_assign.size());
    for (const int64_t crop : crops_for_assign) {
      TORCH_CHECK(crop >= 0 && crop < nmb_crops && position(crop) < 0,
                  "crops_for_assign: expected different crops in 0..", nmb_crops - 1, ", got ", crops_for_assign);
      crops[count++] = static_cast<int16_t>(crop);
    }
  }
  C10_HOST_DEVICE int position(int64_t crop) const {  // -1: the crop does not assign
    for (int i = 0; i < count; i++)
      if (crops[i] == crop) return i;
    return -1;
  }
};

// code_scores: [A, B, K] of the codes, or null if these are the scores of the assigning crops. Calls body with the row
// of an assigning crop and an image: a pointer to T, or to the scores' type.
template <typename T, typename scalar_t, typename Body>
__device__ auto with_code_scores(const T* code_scores, int64_t row, int n, const scalar_t* own, const Body& body) {
  return code_scores ? body(code_scores + row * n) : body(own);
}

// One block per image. With kStaged, it reads the V x K scores of the image once, into shared memory. Otherwise it
// relies on the caches.
template <typename scalar_t, typename T, bool kStaged>
__global__ void __launch_bounds__(kThreads)
    swapped_loss_kernel(Rows<scalar_t> rows, const T* code_scores, const T* potentials, Assigning assigning,
                        T prediction_scale, T code_scale, double temperature, T* logsumexps, double* loss_per_image) {
  extern __shared__ __align__(8) unsigned char shared[];
  scalar_t* staged = reinterpret_cast<scalar_t*>(shared);
  BlockReduce<T> reduce;
  const int n = rows.prototypes, nmb_crops = rows.problems;
  const int64_t image = blockIdx.x, batch_size = rows.count;
  if constexpr (kStaged) {
    for (int crop = 0; crop < nmb_crops; crop++) {
      const scalar_t* x = rows.row(crop, image);
#pragma unroll 4
      for (int k = threadIdx.x; k < n; k += kThreads) staged[crop * n + k] = x[k];
    }
    __syncthreads();
  }
  const auto scores = [&](int crop) -> const scalar_t* {
    if constexpr (kStaged) {
      return staged + crop * n;
    } else {
      return rows.row(crop, image);
    }
  };
  const auto save = [&](int row, T log2_sum) {
    if (threadIdx.x == 0) logsumexps[row * batch_size + image] = log2_sum * T(kLn2);
  };

  // Sum over assigning crops i and other crops v of logsumexp_v minus the dot product of codes_i and scores_v.
  double loss = 0;  // only thread 0 uses it
  for (int crop = 0; crop < nmb_crops; crop++) {
    const RowSum<T> sum = row_sum<scalar_t, T>(scores(crop), nullptr, prediction_scale, n, reduce);
    const T log2_sum = sum.sum == 0 ? std::numeric_limits<T>::quiet_NaN() : sum.log2();  // no finite score: NaN
    save(crop, log2_sum);
    if (threadIdx.x == 0) loss += (assigning.count - (assigning.position(crop) >= 0)) * (log2_sum * kLn2);
  }
  for (int i = 0; i < assigning.count; i++) {
    const scalar_t* own = scores(assigning.crops[i]);
    const T* potential = potentials + int64_t{i} * n;
    const int64_t row = i * batch_size + image;
    const RowSum<T> sum = with_code_scores(
        code_scores, row, n, own, [&](const auto* x) { return row_sum(x, potential, code_scale, n, reduce); });
    save(nmb_crops + i, sum.log2());
    const T inverse = sum.inverse();
    T agreement = 0;
    for (int k = threadIdx.x; k < n; k += kThreads) {
      const T logit = with_code_scores(code_scores, row, n, own,
                                       [&](const auto* x) { return log2_logit(x, potential, code_scale, k); });
      const T code = power_of_two(logit - sum.shift) * inverse;
      if (code == 0) continue;  // adds 0, even where the score is -inf
      T others = 0;
      for (int crop = 0; crop < nmb_crops; crop++)
        if (crop != assigning.crops[i]) others += static_cast<T>(scores(crop)[k]);
      agreement += code * others;
    }
    agreement = reduce.sum(agreement);
    if (threadIdx.x == 0) loss -= agreement / temperature;
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

// One thread per image and prototype computes the gradients of all crops.
template <typename scalar_t, typename T>
__global__ void __launch_bounds__(kThreads)
    swapped_loss_backward_kernel(Rows<scalar_t> rows, const T* code_scores, const T* potentials, const T* logsumexps,
                                 Assigning assigning, T prediction_scale, T code_scale, const T* grad, double factor,
                                 scalar_t* __restrict__ result) {
  const int n = rows.prototypes, nmb_crops = rows.problems, k = blockIdx.y * kThreads + threadIdx.x;
  const int64_t image = blockIdx.x, batch_size = rows.count;
  if (k >= n) return;
  const T scaled_grad = *grad * factor;
  const auto softmax = [&](const auto* x, const T* potential, T scale, int saved) {
    const T log2_sum = logsumexps[saved * batch_size + image] * T(kLog2E);
    return power_of_two(log2_logit(x, potential, scale, k) - log2_sum);
  };
  const auto code = [&](int i) {
    return with_code_scores(code_scores, i * batch_size + image, n, rows.row(assigning.crops[i], image),
                            [&](const auto* x) {
                              return softmax(x, potentials + int64_t{i} * n, code_scale, nmb_crops + i);
                            });
  };
  T all_codes = 0;
  for (int i = 0; i < assigning.count; i++) all_codes += code(i);
#pragma unroll 4
  for (int crop = 0; crop < nmb_crops; crop++) {
    const int position = assigning.position(crop);
    const T prediction = softmax(rows.row(crop, image), static_cast<const T*>(nullptr), prediction_scale, crop);
    const T other_codes = position < 0 ? all_codes : all_codes - code(position);
    const T nmb_others = assigning.count - (position >= 0);
    result[(crop * batch_size + image) * n + k] = scaled_grad * (nmb_others * prediction - other_codes);
  }
}

// Sums of columns, and of squares: first of each slab of rows, then of all. A thread owns a column.

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) moments_of_slabs_kernel(Rows<scalar_t> rows, double* sums, double* squares) {
  BlockReduce<double> reduce;
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
  square = reduce.sum(square);
  const int64_t block = (int64_t{blockIdx.z} * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  if (threadIdx.x == 0) squares[block] = square;
}

// result [problems * n + 1]. The last block adds the squares.
__global__ void __launch_bounds__(kThreads)
    add_moments_kernel(const double* sums, const double* squares, int64_t slabs, int64_t columns, int64_t n,
                       int64_t nmb_squares, double* result) {
  BlockReduce<double> reduce;
  if (blockIdx.x + 1 == gridDim.x) {
    double square = 0;
    for (int64_t i = threadIdx.x; i < nmb_squares; i += kThreads) square += squares[i];
    square = reduce.sum(square);
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

// Calls body with the number of columns per thread as a compile-time constant, for K <= 4096.
template <typename Body>
void with_items(int64_t n, const Body& body) {
  if (n <= 2 * kThreads) return body(std::integral_constant<int, 2>{});
  if (n <= 6 * kThreads) return body(std::integral_constant<int, 6>{});
  body(std::integral_constant<int, kMaxItems>{});
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

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

  at::Tensor empty(at::IntArrayRef sizes, at::ScalarType type) const {
    return at::empty(sizes, scores.options().dtype(type));
  }
  at::Tensor per_prototype() const { return empty({problems, n}, accumulation_type(scores)); }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount, scores.get_device()); }

  // The number of slabs per problem with which `blocks` blocks serve all problems and tiles of columns.
  int64_t slabs(int64_t blocks) const {
    const int64_t tiles = (n + kTile - 1) / kTile;
    return std::clamp<int64_t>(blocks / (problems * tiles), 1, std::max<int64_t>(rows, 1));
  }

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
  const at::Tensor memory = problem.empty({problem.problems, problem.rows, 2}, accumulation_type(problem.scores));
  RowSum<T>* row_sums = reinterpret_cast<RowSum<T>*>(memory.mutable_data_ptr<T>());
  if (problem.rows > 0) {
    row_sums_kernel<scalar_t, T>
        <<<problem.problems * problem.rows, kThreads, 0, problem.stream>>>(rows, potentials, scale, row_sums);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  }
  const dim3 blocks(partials.slabs, (problem.n + kThreads - 1) / kThreads, problem.problems);
  softmax_columns_kernel<scalar_t, T>
      <<<blocks, kThreads, 0, problem.stream>>>(rows, potentials, row_sums, scale, partials);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

constexpr int kBlocksPerMultiprocessor = 2;  // keeps enough loads in flight to use the full memory bandwidth

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

// Runs all rounds in one launch. Returns false if the GPU cannot run all blocks at once.
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
    const dim3 grid(std::max<int64_t>(partials.slabs * problem.problems,
                                      std::min<int64_t>(blocks, problem.combining_blocks())));
    const cudaError_t error = cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), grid, dim3(kThreads),
                                                          arguments, 0, problem.stream);
    if (error == cudaErrorCooperativeLaunchTooLarge) {  // another program uses the GPU
      (void)cudaGetLastError();
      return;
    }
    C10_CUDA_CHECK(error);
    launched = true;
  });
  return launched;
}

at::Tensor potentials(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon,
                      int64_t iterations) {
  check_iterations(iterations);
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

at::Tensor moments(const at::Tensor& scores) {
  const Problem problem(scores, std::nullopt);
  const int64_t columns = problem.problems * problem.n;
  const at::Tensor result = problem.empty({columns + 1}, at::kDouble);
  const unsigned tiles = (problem.n + kThreads - 1) / kThreads;
  const int64_t blocks = kBlocksPerMultiprocessor * problem.multiprocessors() / std::max<int64_t>(
      problem.problems * tiles, 1);
  const int64_t slabs = std::clamp<int64_t>(blocks, 1, std::max<int64_t>(problem.rows, 1));
  const at::Tensor sums = problem.empty({problem.problems, slabs, problem.n}, at::kDouble);
  const at::Tensor squares = problem.empty({problem.problems * tiles * slabs}, at::kDouble);
  DISPATCH(scores, "moments", {
    if (problem.problems > 0) {
      moments_of_slabs_kernel<scalar_t><<<dim3(slabs, tiles, problem.problems), kThreads, 0, problem.stream>>>(
          rows_of<scalar_t>(problem.scores, std::nullopt), sums.mutable_data_ptr<double>(),
          squares.mutable_data_ptr<double>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
    add_moments_kernel<<<(columns + kThreads - 1) / kThreads + 1, kThreads, 0, problem.stream>>>(
        sums.const_data_ptr<double>(), squares.const_data_ptr<double>(), slabs, columns, problem.n, squares.numel(),
        result.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
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
    const auto launch = [&](auto items) {
      codes_kernel<scalar_t, T, items><<<problem.rows, kThreads, 0, problem.stream>>>(
          rows_of<scalar_t>(problem.scores, std::nullopt), contiguous.const_data_ptr<T>(), kLog2E / epsilon,
          out.mutable_data_ptr<T>(), out.stride(0));
    };
    if (problem.n <= kTile) {
      with_items(problem.n, launch);
    } else {
      launch(std::integral_constant<int, 0>{});
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void sinkhorn(const at::Tensor& scores, const std::optional<at::Tensor>& extra, double epsilon, int64_t iterations,
              at::Tensor out) {
  const auto problem = extra ? std::make_optional(extra->unsqueeze(0)) : std::nullopt;
  codes(scores, potentials(scores.unsqueeze(0), problem, epsilon, iterations)[0], epsilon, out);
}

// The memory of assigning scores, which `copy` keeps, or null.
template <typename T>
const T* pointer_to(const std::optional<at::Tensor>& assigning, at::Tensor& copy) {
  if (!assigning) return nullptr;
  copy = assigning->contiguous();
  return copy.const_data_ptr<T>();
}

std::tuple<at::Tensor, at::Tensor> swapped_loss(const at::Tensor& scores, const std::optional<at::Tensor>& assigned,
                                                const at::Tensor& potentials, at::IntArrayRef crops_for_assign,
                                                double temperature, double epsilon) {
  check_loss(scores, assigned, potentials, crops_for_assign);
  at::Tensor code_scores;
  const Problem problem(scores, std::nullopt);
  const Assigning assigning(crops_for_assign, problem.problems);
  const auto type = accumulation_type(scores);
  const at::Tensor loss = problem.empty({}, type), contiguous = potentials.contiguous();
  const at::Tensor logsumexps = problem.empty({problem.problems + assigning.count, problem.rows}, type);
  const at::Tensor loss_per_image = problem.empty({problem.rows}, at::kDouble);
  const double terms = static_cast<double>(assigning.count * (problem.problems - 1) * problem.rows);
  DISPATCH(scores, "swapped_loss", {
    // 1024 bytes are for the shared memory that the kernel declares itself.
    const int max_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, scores.get_device()) - 1024;
    const int64_t bytes = problem.problems * problem.n * static_cast<int64_t>(sizeof(scalar_t));
    const auto launch = [&](auto kernel, int64_t shared_bytes) {
      if (shared_bytes > 47 * 1024)
        C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, max_bytes));
      kernel<<<problem.rows, kThreads, shared_bytes, problem.stream>>>(
          rows_of<scalar_t>(problem.scores, std::nullopt), pointer_to<T>(assigned, code_scores),
          contiguous.const_data_ptr<T>(), assigning, kLog2E / temperature, kLog2E / epsilon, temperature, logsumexps.mutable_data_ptr<T>(),
          loss_per_image.mutable_data_ptr<double>());
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    };
    if (bytes <= max_bytes) {
      launch(swapped_loss_kernel<scalar_t, T, true>, bytes);
    } else {
      launch(swapped_loss_kernel<scalar_t, T, false>, 0);
    }
    mean_loss_kernel<T><<<1, kThreads, 0, problem.stream>>>(loss_per_image.const_data_ptr<double>(), problem.rows,
                                                            1 / terms, loss.mutable_data_ptr<T>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return {loss, logsumexps};
}

at::Tensor swapped_loss_backward(const at::Tensor& grad, const at::Tensor& scores,
                                 const std::optional<at::Tensor>& assigned, const at::Tensor& potentials,
                                 const at::Tensor& logsumexps, at::IntArrayRef crops_for_assign, double temperature,
                                 double epsilon) {
  check_loss(scores, assigned, potentials, crops_for_assign);
  at::Tensor code_scores;
  check_gradient(grad, potentials);
  check_logsumexps(logsumexps, potentials, scores);
  const Problem problem(scores, std::nullopt);
  const Assigning assigning(crops_for_assign, problem.problems);
  const at::Tensor result = problem.empty(scores.sizes(), scores.scalar_type());
  const at::Tensor contiguous = potentials.contiguous(), saved = logsumexps.contiguous();
  const double terms = static_cast<double>(assigning.count * (problem.problems - 1) * problem.rows);
  const dim3 blocks(problem.rows, (problem.n + kThreads - 1) / kThreads);
  DISPATCH(scores, "swapped_loss_backward", {
    swapped_loss_backward_kernel<scalar_t, T><<<blocks, kThreads, 0, problem.stream>>>(
        rows_of<scalar_t>(problem.scores, std::nullopt), pointer_to<T>(assigned, code_scores),
        contiguous.const_data_ptr<T>(), saved.const_data_ptr<T>(), assigning, kLog2E / temperature, kLog2E / epsilon, grad.const_data_ptr<T>(), 1 / (terms * temperature),
        result.mutable_data_ptr<scalar_t>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
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
