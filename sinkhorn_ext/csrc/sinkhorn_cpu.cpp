// Sinkhorn-Knopp and the swapped loss on CPUs. __init__.py declares the operators and has the formulas.
//
// All work on a row of K scores is done while the row is in the first-level cache, so a round reads the matrix once.
// The order of every sum depends only on the sizes, never on the number of threads: results repeat bit for bit.

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

// With GCC, each loop is compiled once per width of vector registers. The processor's own version is chosen when the
// library is loaded. code_path() has the same versions, so it is chosen in the same way and names the choice.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define CODE_PATH(target_name, name) \
  __attribute__((target(target_name))) const char* code_path() { return name; }
#if __GNUC__ >= 12
#define SIMD_WIDTHS __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#define CODE_PATHS \
  CODE_PATH("default", "default") CODE_PATH("arch=x86-64-v3", "x86-64-v3") CODE_PATH("arch=x86-64-v4", "x86-64-v4")
#else
#define SIMD_WIDTHS __attribute__((target_clones("default", "avx2")))
#define CODE_PATHS CODE_PATH("default", "default") CODE_PATH("avx2", "avx2")
#endif
#else
#define SIMD_WIDTHS
#define CODE_PATHS \
  const char* code_path() { return "default"; }
#endif

namespace sinkhorn_ext {
namespace {

CODE_PATHS

// Below and above these arguments, exp2 is 0 and infinite. They are volatile because with constants the compiler
// splits the clamp into branches, and the loops then run at two thirds of the speed.
volatile float exp2_lowest = -127, exp2_highest = 128;

struct Exp2 {
  const float lowest = exp2_lowest, highest = exp2_highest;

  // 2^x = 2^n * 2^f, with an integer n and f in [-0.5, 0.5]. The polynomial in f has a relative error of 2e-8. NaN
  // stays NaN.
  float operator()(float x) const {
    x = lowest > x ? lowest : x;
    x = highest < x ? highest : x;
    const float shifted = x + 12582912.f;  // 1.5 * 2^23: the addition rounds n into the low bits
    const float f = x - (shifted - 12582912.f);
    float p = 0.00015345812f;
    p = p * f + 0.0013399931f;
    p = p * f + 0.009618489f;
    p = p * f + 0.055503286f;
    p = p * f + 0.24022646f;
    p = p * f + 0.6931472f;
    p = p * f + 1.f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits << 23) + 0x3F800000u;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return p * power;
  }
  double operator()(double x) const { return std::exp2(x); }
};

// Loops over one row of n prototypes. x holds scores. The logits are x * scale + offset, in powers of two.

constexpr int64_t kBlock = 1024;  // columns to sum in T; the sums of blocks are added in double

template <typename T>
SIMD_WIDTHS double exp2_row(const T* x, const T* offset, T scale, T shift, int64_t n, T* e) {
  const Exp2 exp2;
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = begin; k < end; k++) {
      const T value = exp2(x[k] * scale + (offset[k] - shift));
      e[k] = value;
      sum += value;
    }
    total += sum;
  }
  return total;
}

template <typename T>
SIMD_WIDTHS T max_logit(const T* x, const T* offset, T scale, int64_t n) {
  T largest = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < n; k++) {
    const T logit = x[k] * scale + offset[k];
    largest = logit > largest ? logit : largest;
  }
  return largest;
}

// Ignores NaN.
template <typename T>
SIMD_WIDTHS T largest_score(const T* x, int64_t n) {
  T largest = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t k = 0; k < n; k++) largest = x[k] > largest ? x[k] : largest;
  return largest;
}

template <typename T>
SIMD_WIDTHS void raise_to_logits(T* largest, const T* x, T scale, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) largest[k] = x[k] * scale > largest[k] ? x[k] * scale : largest[k];
}

template <typename T>
SIMD_WIDTHS void add_exp2(T* sum, const T* x, T scale, const T* shift, int64_t n) {
  const Exp2 exp2;
#pragma omp simd
  for (int64_t k = 0; k < n; k++) sum[k] += exp2(x[k] * scale - shift[k]);
}

template <typename T>
SIMD_WIDTHS void change_shift(T* sum, const T* before, const T* after, int64_t n) {
  const Exp2 exp2;
#pragma omp simd
  for (int64_t k = 0; k < n; k++) sum[k] *= exp2(before[k] - after[k]);
}

template <typename Sum, typename T>
SIMD_WIDTHS void add_scaled(Sum* sum, const T* x, T factor, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) sum[k] += x[k] * factor;
}

template <typename T>
SIMD_WIDTHS void store_scaled(T* out, const T* e, T factor, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) out[k] = e[k] * factor;
}

template <typename T>
SIMD_WIDTHS void scale_row(T* e, const T* scales, T factor, int64_t n) {
#pragma omp simd
  for (int64_t k = 0; k < n; k++) e[k] *= scales[k] * factor;
}

template <typename T>
SIMD_WIDTHS double dot(const T* e, const T* scales, int64_t n) {
  constexpr int64_t lanes = 32, block = lanes * kBlock;  // independent sums, as an addition waits for the previous one
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t end = std::min(begin + block, n);
    T sums[lanes] = {};
    int64_t k = begin;
    for (; k + lanes <= end; k += lanes) {
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; lane++) sums[lane] += e[k + lane] * scales[k + lane];
    }
    for (int64_t lane = 0; lane < end - k; lane++) sums[lane] += e[k + lane] * scales[k + lane];
    for (int64_t width = lanes / 2; width > 0; width /= 2) {
#pragma omp simd
      for (int64_t lane = 0; lane < width; lane++) sums[lane] += sums[lane + width];
    }
    total += sums[0];
  }
  return total;
}

// Returns whether all reciprocals lie between 1 / limit and limit.
template <typename T>
SIMD_WIDTHS bool store_reciprocals(T* reciprocals, const double* sums, T limit, int64_t n) {
  T low = 1, high = 1, all = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(+ : all)
  for (int64_t k = 0; k < n; k++) {
    const T value = 1 / static_cast<T>(sums[k]);
    reciprocals[k] = value;
    low = value < low ? value : low;
    high = value > high ? value : high;
    all += value;
  }
  return low > 1 / limit && high < limit && !std::isnan(all);
}

// Adds a row to sums. Returns the sum of its squares.
template <typename T>
SIMD_WIDTHS double add_moments(const T* x, int64_t n, double* sums) {
  double squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t k = 0; k < n; k++) {
    const double value = x[k];
    sums[k] += value;
    squares += value * value;
  }
  return squares;
}

// Stores the exponentials in e and adds them to sums. Returns the lowest logit.
template <typename T>
SIMD_WIDTHS T store_exp2(const T* x, T scale, T shift, int64_t n, T* e, T* sums) {
  const Exp2 exp2;
  T lowest = std::numeric_limits<T>::max();
#pragma omp simd reduction(min : lowest)
  for (int64_t k = 0; k < n; k++) {
    const T logit = x[k] * scale;
    const T value = exp2(logit - shift);
    e[k] = value;
    sums[k] += value;
    lowest = logit < lowest ? logit : lowest;
  }
  return lowest;
}

// Sum of the codes times the scores of all other crops. Where the code is 0 the product is 0, even for a score of -inf.
template <typename T>
SIMD_WIDTHS double agreement(const T* e, T inverse_sum, const T* all_crops, const T* own_crop, int64_t n) {
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = begin; k < end; k++) {
      const T code = e[k] * inverse_sum;
      sum += code == 0 ? T(0) : code * (all_crops[k] - own_crop[k]);
    }
    total += sum;
  }
  return total;
}

template <typename T>
SIMD_WIDTHS void gradient_row(const T* x, T scale, T log2_sum, T nmb_codes, const T* all_codes, const T* own_codes,
                              T factor, int64_t n, T* out) {
  const Exp2 exp2;
#pragma omp simd
  for (int64_t k = 0; k < n; k++)
    out[k] = factor * (nmb_codes * exp2(x[k] * scale - log2_sum) - (all_codes[k] - own_codes[k]));
}

template <typename To, typename From>
SIMD_WIDTHS void convert_row(To* to, const From* from, int64_t n) {
  for (int64_t k = 0; k < n; k++) to[k] = static_cast<To>(from[k]);
}

// Returns the row itself if its type is T. Otherwise converts it into scratch and returns that.
template <typename scalar_t, typename T>
const T* in_accumulation_type(const scalar_t* row, T* scratch, int64_t n) {
  if constexpr (std::is_same_v<scalar_t, T>) {
    return row;
  } else {
    convert_row(scratch, row, n);
    return scratch;
  }
}

// Stores e = exp2(logits - shift) and holds their sum. The shift keeps the sum in range. Most rows need no shift, and
// then one pass is enough.
template <typename T>
struct Exponentials {
  double sum;
  T shift = 0;

  Exponentials(const T* x, const T* offset, T scale, int64_t n, T* e) {
    sum = exp2_row(x, offset, scale, shift, n, e);
    if (sum > 1e-20 && sum < 1e20) return;
    shift = max_logit(x, offset, scale, n);
    sum = exp2_row(x, offset, scale, shift, n, e);
  }
  double inverse_sum() const { return sum == 0 ? 0 : 1 / sum; }  // 0: all scores are -inf
  double log2_sum() const { return shift + std::log2(sum); }
};

// Asks for huge pages: in pages of 4 KiB, the first write to a large result takes longer than computing the result.
inline void prefer_huge_pages(const at::Tensor& out) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 4096, large = 16 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.const_data_ptr()), end = begin + out.nbytes();
  const uintptr_t first_page = (begin + page - 1) / page * page;
  if (end - begin > large && out.is_contiguous())
    madvise(reinterpret_cast<void*>(first_page), (end - begin - page) / page * page, MADV_HUGEPAGE);
#endif
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Divides rows into slabs. One thread sums a slab. The number of slabs depends only on the sizes.
struct Slabs {
  int64_t per_problem, rows_per_slab, problems, rows;

  template <typename scalar_t>
  explicit Slabs(const Rows<scalar_t>& all) : problems(all.problems), rows(all.count) {
    constexpr int64_t min_elements = 32768, max_count = 32;
    int64_t count = 1;  // a power of two: the usual numbers of threads divide it evenly
    while (2 * count <= std::min({rows, rows * all.prototypes / min_elements, max_count})) count *= 2;
    rows_per_slab = divide_up(std::max<int64_t>(rows, 1), count);
    per_problem = divide_up(rows, rows_per_slab);
  }

  // Calls body(slab, problem, first row, last row + 1) for the slabs of all problems. With backward, each thread begins
  // with the slabs at which it ended the forward pass, because they may still be in a cache.
  template <typename Body>
  void for_each(const Body& body, bool backward = false) const {
    at::parallel_for(0, problems * per_problem, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const int64_t slab = backward ? begin + end - 1 - i : i;
        const int64_t first = slab % per_problem * rows_per_slab;
        body(slab, slab / per_problem, first, std::min(first + rows_per_slab, rows));
      }
    });
  }
};

constexpr int64_t kElementsPerThread = 16384;  // with fewer elements, starting a thread costs more than it saves

// Calls body(slab, problem, row, scratch [2 n], sums [n]) for every row. result [problems, n]: what body added to sums.
template <typename T, typename Body>
void sum_over_rows(const Slabs& slabs, int64_t n, double* result, const Body& body, bool backward = false) {
  const std::unique_ptr<double[]> totals(new double[slabs.problems * slabs.per_problem * n]);
  slabs.for_each([&](int64_t slab, int64_t problem, int64_t first, int64_t last) {
    constexpr int64_t rows_in_float = 64;
    const std::unique_ptr<T[]> memory(new T[3 * n]);
    T *sums = memory.get(), *scratch = sums + n;
    for (int64_t begin = first; begin < last; begin += rows_in_float) {
      std::fill_n(sums, n, T(0));
      for (int64_t row = begin; row < std::min(begin + rows_in_float, last); row++)
        body(slab, problem, row, scratch, sums);
      if (begin == first) {
        convert_row(&totals[slab * n], sums, n);
      } else {
        add_scaled(&totals[slab * n], sums, T(1), n);
      }
    }
  }, backward);
  for (int64_t problem = 0; problem < slabs.problems; problem++) {
    at::parallel_for(0, n, 1 + 4 * kElementsPerThread / (slabs.per_problem + 1), [&](int64_t begin, int64_t end) {
      std::fill(result + problem * n + begin, result + problem * n + end, 0.0);
      for (int64_t slab = problem * slabs.per_problem; slab < (problem + 1) * slabs.per_problem; slab++)
        add_scaled(result + problem * n + begin, &totals[slab * n + begin], 1.0, end - begin);
    });
  }
}

// log2 of the sum over rows of 2^logit, per problem and prototype. Takes scores of any range. The result is -inf where
// no row has a finite score.
template <typename scalar_t, typename T = accumulation_t<scalar_t>>
void any_log2_sums_over_rows(const Rows<scalar_t>& rows, double epsilon, double* result) {
  const T scale = kLog2E / epsilon;
  const int64_t n = rows.prototypes;
  const Slabs slabs(rows);
  const int64_t size = slabs.problems * slabs.per_problem * n;
  const std::unique_ptr<T[]> largest(new T[size]), sums(new T[size]);
  slabs.for_each([&](int64_t slab, int64_t problem, int64_t first, int64_t last) {
    // A tile is 128 KiB of float: after the pass for the maximum it is still in the second-level cache for the sum.
    constexpr int64_t tile_rows = 16, tile_columns = 2048;
    T before[tile_columns], scratch[tile_columns];
    for (int64_t column = 0; column < n; column += tile_columns) {
      const int64_t width = std::min(tile_columns, n - column);
      T *tile_largest = &largest[slab * n + column], *tile_sums = &sums[slab * n + column];
      const auto values = [&](int64_t row) {
        return in_accumulation_type(rows.row(problem, row) + column, scratch, width);
      };
      std::fill_n(tile_largest, width, std::numeric_limits<T>::lowest());
      std::fill_n(tile_sums, width, T(0));
      for (int64_t begin = first; begin < last; begin += tile_rows) {
        const int64_t end = std::min(begin + tile_rows, last);
        std::copy_n(tile_largest, width, before);
        for (int64_t row = begin; row < end; row++) raise_to_logits(tile_largest, values(row), scale, width);
        change_shift(tile_sums, before, tile_largest, width);
        for (int64_t row = begin; row < end; row++) add_exp2(tile_sums, values(row), scale, tile_largest, width);
      }
    }
  });
  at::parallel_for(0, slabs.problems * n, 2048, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t start = i / n * slabs.per_problem * n + i % n;
      T top = std::numeric_limits<T>::lowest();
      double sum = 0;
      for (int64_t slab = 0; slab < slabs.per_problem; slab++) top = std::max(top, largest[start + slab * n]);
      for (int64_t slab = 0; slab < slabs.per_problem; slab++)
        sum += sums[start + slab * n] * Exp2()(largest[start + slab * n] - top);
      result[i] = top + std::log2(sum);
    }
  });
}

// The same in one pass, with one shift for all rows of a problem. Scores usually lie close enough together for that;
// otherwise the function above does the work.
template <typename scalar_t, typename T = accumulation_t<scalar_t>>
void log2_sums_over_rows(const Rows<scalar_t>& rows, double epsilon, double* result) {
  const int64_t n = rows.prototypes;
  const T scale = kLog2E / epsilon;
  if (rows.count == 0) return any_log2_sums_over_rows(rows, epsilon, result);
  std::vector<T> scratch(n), shifts(rows.problems * n);
  for (int64_t problem = 0; problem < rows.problems; problem++) {
    const T* first_row = in_accumulation_type(rows.row(problem, 0), scratch.data(), n);
    std::fill_n(&shifts[problem * n], n, largest_score(first_row, n) * scale);
  }
  sum_over_rows<T>(Slabs(rows), n, result, [&](int64_t, int64_t problem, int64_t row, T* row_scratch, T* sums) {
    add_exp2(sums, in_accumulation_type(rows.row(problem, row), row_scratch, n), scale, &shifts[problem * n], n);
  });
  for (int64_t i = 0; i < rows.problems * n; i++) {
    if (!(result[i] > 1e-20 && result[i] < 1e20)) return any_log2_sums_over_rows(rows, epsilon, result);
    result[i] = shifts[i] + std::log2(result[i]);
  }
}

// Sum over rows of the softmax over prototypes, per problem and prototype. offsets: the potentials in powers of two.
template <typename scalar_t, typename T = accumulation_t<scalar_t>>
void softmax_sums_over_rows(const Rows<scalar_t>& rows, const T* offsets, double epsilon, double* result) {
  const int64_t n = rows.prototypes;
  sum_over_rows<T>(Slabs(rows), n, result, [&](int64_t, int64_t problem, int64_t row, T* e, T* sums) {
    const T* x = in_accumulation_type(rows.row(problem, row), e + n, n);
    const Exponentials<T> softmax(x, offsets + problem * n, kLog2E / epsilon, n, e);
    add_scaled(sums, e, static_cast<T>(softmax.inverse_sum()), n);
  });
}

// The matrix form: computes the exponentials once, in out, and scales them there. It is for a single process, and for
// scores whose exponentials and scales T can represent. For other scores it returns false with undefined values in out,
// and the caller uses the potentials instead.
template <typename scalar_t, typename T = accumulation_t<scalar_t>>
bool scale_exponentials(const Rows<scalar_t>& rows, double epsilon, int64_t iterations, T* out, int64_t out_stride) {
  constexpr T widest_log2 = 90, largest_scale = 1e30;
  const int64_t n = rows.prototypes;
  const double row_total = static_cast<double>(n) / rows.count;  // keeps prototypes' totals near 1: no scale drifts
  const T scale = kLog2E / epsilon;
  const Slabs slabs(rows);
  std::vector<T> lowest(slabs.per_problem, std::numeric_limits<T>::max()), scales(n);
  std::vector<double> sums(n);
  const T shift = largest_score(in_accumulation_type(rows.row(0, 0), scales.data(), n), n) * scale;
  std::atomic<bool> in_range{true};
  // A low exponential times a low scale can underflow. That is harmless only if the sum of the row is much larger.
  const auto inverse_row_sum = [&](const T* e) {
    const double sum = dot(e, scales.data(), n);
    if (!(sum > 1e-25)) in_range = false;
    return 1 / sum;
  };

  sum_over_rows<T>(slabs, n, sums.data(), [&](int64_t slab, int64_t, int64_t row, T* scratch, T* row_sums) {
    const T* x = in_accumulation_type(rows.row(0, row), scratch, n);
    lowest[slab] = std::min(lowest[slab], store_exp2(x, scale, shift, n, out + row * out_stride, row_sums));
  });
  // A score that is too high needs no check here: its sum, and so a scale, is out of range below.
  if (!(shift - *std::min_element(lowest.begin(), lowest.end()) <= widest_log2)) return false;
  for (int64_t round = 1;; round++) {
    if (!store_reciprocals(scales.data(), sums.data(), largest_scale, n)) return false;
    if (!in_range) return false;
    if (round >= iterations) break;
    sum_over_rows<T>(slabs, n, sums.data(), [&](int64_t, int64_t, int64_t row, T*, T* row_sums) {
      const T* e = out + row * out_stride;
      add_scaled(row_sums, e, static_cast<T>(row_total * inverse_row_sum(e)), n);
    }, round % 2 == 1);
  }
  slabs.for_each([&](int64_t, int64_t, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++) {
      T* e = out + row * out_stride;
      scale_row(e, scales.data(), static_cast<T>(inverse_row_sum(e)), n);
    }
  }, iterations % 2 == 1);
  return in_range;
}

template <typename T>
std::vector<T> in_powers_of_two(const at::Tensor& potentials) {
  const at::Tensor natural = potentials.contiguous();
  const T* values = natural.const_data_ptr<T>();
  std::vector<T> offsets(values, values + natural.numel());
  for (T& offset : offsets) offset *= kLog2E;
  return offsets;
}

template <typename T>
at::Tensor per_prototype(const std::vector<double>& values, double factor, const at::Tensor& scores) {
  at::Tensor result = at::empty({scores.size(0), scores.size(2)}, scores.options().dtype(accumulation_type(scores)));
  std::transform(values.begin(), values.end(), result.mutable_data_ptr<T>(), [&](double x) { return x * factor; });
  return result;
}

at::Tensor prototype_logsumexp(const at::Tensor& scores_, const std::optional<at::Tensor>& extra_, double epsilon) {
  check_scores(scores_, extra_);
  const at::Tensor scores = with_contiguous_rows(scores_);
  const auto extra = with_contiguous_rows(extra_);
  std::vector<double> sums(scores.size(0) * scores.size(2));
  at::Tensor result;
  DISPATCH(scores, "prototype_logsumexp", {
    log2_sums_over_rows(rows_of<scalar_t>(scores, extra), epsilon, sums.data());
    result = per_prototype<T>(sums, kLn2, scores);
  });
  return result;
}

at::Tensor prototype_totals(const at::Tensor& scores_, const std::optional<at::Tensor>& extra_,
                            const at::Tensor& potentials, double epsilon) {
  check_scores(scores_, extra_);
  check_potentials(potentials, scores_, scores_.size(0));
  const at::Tensor scores = with_contiguous_rows(scores_);
  const auto extra = with_contiguous_rows(extra_);
  std::vector<double> totals(potentials.numel());
  at::Tensor result;
  DISPATCH(scores, "prototype_totals", {
    const std::vector<T> offsets = in_powers_of_two<T>(potentials);
    softmax_sums_over_rows(rows_of<scalar_t>(scores, extra), offsets.data(), epsilon, totals.data());
    result = per_prototype<T>(totals, 1, scores);
  });
  return result;
}

at::Tensor potentials(const at::Tensor& scores_, const std::optional<at::Tensor>& extra_, double epsilon,
                      int64_t iterations) {
  check_scores(scores_, extra_);
  check_iterations(iterations);
  const at::Tensor scores = with_contiguous_rows(scores_);
  const auto extra = with_contiguous_rows(extra_);
  const int64_t size = scores.size(0) * scores.size(2);
  std::vector<double> log2_potentials(size), totals(size);
  at::Tensor result;
  DISPATCH(scores, "potentials", {
    const Rows<scalar_t> rows = rows_of<scalar_t>(scores, extra);
    std::vector<T> offsets(size);
    log2_sums_over_rows(rows, epsilon, totals.data());
    // A prototype without a finite score takes no part, whatever its potential is. Its potential stays 0.
    for (int64_t i = 0; i < size; i++)
      log2_potentials[i] = totals[i] == -std::numeric_limits<double>::infinity() ? 0 : -totals[i];
    for (int64_t round = 1; round < iterations; round++) {
      std::copy(log2_potentials.begin(), log2_potentials.end(), offsets.begin());
      softmax_sums_over_rows(rows, offsets.data(), epsilon, totals.data());
      for (int64_t i = 0; i < size; i++) log2_potentials[i] -= totals[i] == 0 ? 0 : std::log2(totals[i]);
    }
    result = per_prototype<T>(log2_potentials, kLn2, scores);
  });
  return result;
}

void codes(const at::Tensor& scores_, const at::Tensor& potentials, double epsilon, at::Tensor out) {
  check_scores(scores_.unsqueeze(0), std::nullopt);
  check_potentials(potentials.unsqueeze(0), scores_, 1);
  check_out(out, scores_);
  const at::Tensor scores = with_contiguous_rows(scores_);
  const int64_t n = scores.size(1);
  prefer_huge_pages(out);
  DISPATCH(scores, "codes", {
    const std::vector<T> offsets = in_powers_of_two<T>(potentials);
    const scalar_t* x = scores.const_data_ptr<scalar_t>();
    T* result = out.mutable_data_ptr<T>();
    at::parallel_for(0, scores.size(0), 1 + kElementsPerThread / n, [&](int64_t begin, int64_t end) {
      std::vector<T> e(n), scratch(std::is_same_v<scalar_t, T> ? 0 : n);
      for (int64_t row = begin; row < end; row++) {
        const T* values = in_accumulation_type(x + row * scores.stride(0), scratch.data(), n);
        const Exponentials<T> softmax(values, offsets.data(), kLog2E / epsilon, n, e.data());
        store_scaled(result + row * out.stride(0), e.data(), static_cast<T>(softmax.inverse_sum()), n);
      }
    });
  });
}

void sinkhorn(const at::Tensor& scores_, const std::optional<at::Tensor>& extra, double epsilon, int64_t iterations,
              at::Tensor out) {
  check_scores(scores_.unsqueeze(0), extra ? std::make_optional(extra->unsqueeze(0)) : std::nullopt);
  check_iterations(iterations);
  check_out(out, scores_);
  const at::Tensor scores = with_contiguous_rows(scores_).unsqueeze(0);
  prefer_huge_pages(out);
  bool done = scores.size(1) == 0;
  if (!extra && !done) {
    DISPATCH(scores, "sinkhorn", {
      const Rows<scalar_t> rows = rows_of<scalar_t>(scores, std::nullopt);
      done = scale_exponentials<scalar_t>(rows, epsilon, iterations, out.mutable_data_ptr<T>(), out.stride(0));
    });
  }
  if (done) return;
  const auto problem = extra ? std::make_optional(extra->unsqueeze(0)) : std::nullopt;
  codes(scores[0], potentials(scores, problem, epsilon, iterations)[0], epsilon, out);
}

at::Tensor moments(const at::Tensor& scores_) {
  check_scores(scores_, std::nullopt);
  const at::Tensor scores = with_contiguous_rows(scores_);
  const int64_t n = scores.size(2);
  const at::Tensor result = at::zeros({scores.size(0) * n + 1}, scores.options().dtype(at::kDouble));
  double* sums = result.mutable_data_ptr<double>();
  DISPATCH(scores, "moments", {
    const Rows<scalar_t> rows = rows_of<scalar_t>(scores, std::nullopt);
    const Slabs slabs(rows);
    std::vector<double> totals(slabs.problems * slabs.per_problem * n), squares(slabs.problems * slabs.per_problem);
    slabs.for_each([&](int64_t slab, int64_t problem, int64_t first, int64_t last) {
      std::vector<T> scratch(std::is_same_v<scalar_t, T> ? 0 : n);
      for (int64_t row = first; row < last; row++) {
        const T* x = in_accumulation_type(rows.row(problem, row), scratch.data(), n);
        squares[slab] += add_moments(x, n, &totals[slab * n]);
      }
    });
    for (int64_t slab = 0; slab < static_cast<int64_t>(squares.size()); slab++) {
      add_scaled(sums + slab / slabs.per_problem * n, &totals[slab * n], 1.0, n);
      sums[slabs.problems * n] += squares[slab];
    }
  });
  return result;
}

// For each crop, its position in crops_for_assign, or -1 if it does not assign.
std::vector<int64_t> positions(at::IntArrayRef crops_for_assign, int64_t nmb_crops) {
  std::vector<int64_t> result(nmb_crops, -1);
  for (size_t i = 0; i < crops_for_assign.size(); i++) result[crops_for_assign[i]] = i;
  return result;
}

// The scores of the codes of an image and an assigning crop, and where the crop's own scores are them, a conversion.
template <typename scalar_t, typename T>
struct CodeScores {
  const Rows<scalar_t>& own;
  std::optional<Rows<T>> assigning;
  at::IntArrayRef crops;

  CodeScores(const Rows<scalar_t>& scores, const std::optional<at::Tensor>& assigning_, at::IntArrayRef crops_)
      : own(scores), crops(crops_) {
    if (assigning_) assigning = rows_of<T>(*assigning_, std::nullopt);
  }
  const T* row(int64_t i, int64_t image, T* scratch) const {
    if (assigning) return assigning->row(i, image);
    return in_accumulation_type(own.row(crops[i], image), scratch, own.prototypes);
  }
};

std::tuple<at::Tensor, at::Tensor> swapped_loss(const at::Tensor& scores_, const std::optional<at::Tensor>& assigning_,
                                                const at::Tensor& potentials, at::IntArrayRef crops_for_assign,
                                                double temperature, double epsilon) {
  check_loss(scores_, assigning_, potentials, crops_for_assign);
  const auto assigning = with_contiguous_rows(assigning_);
  const int64_t nmb_crops = scores_.size(0), batch_size = scores_.size(1), n = scores_.size(2);
  const int64_t nmb_assigning = crops_for_assign.size();
  const at::Tensor scores = with_contiguous_rows(scores_);
  at::Tensor logsumexps = at::empty({nmb_crops + nmb_assigning, batch_size}, potentials.options());
  std::vector<double> loss_per_image(batch_size);
  DISPATCH(scores, "swapped_loss", {
    const Rows<scalar_t> rows = rows_of<scalar_t>(scores, std::nullopt);
    const std::vector<T> offsets = in_powers_of_two<T>(potentials), no_offset(n);
    T* saved = logsumexps.mutable_data_ptr<T>();
    const CodeScores<scalar_t, T> code_scores(rows, assigning, crops_for_assign);
    at::parallel_for(0, batch_size, 1 + kElementsPerThread / (nmb_crops * n), [&](int64_t begin, int64_t end) {
      std::vector<T> e(n), all_crops(n), scratch(std::is_same_v<scalar_t, T> ? 0 : n);
      for (int64_t image = begin; image < end; image++) {
        double loss = 0;
        std::fill(all_crops.begin(), all_crops.end(), T(0));
        std::vector<double> log_sums(nmb_crops);
        for (int64_t crop = 0; crop < nmb_crops; crop++) {
          const T* x = in_accumulation_type(rows.row(crop, image), scratch.data(), n);
          const Exponentials<T> prediction(x, no_offset.data(), kLog2E / temperature, n, e.data());
          log_sums[crop] = prediction.sum == 0 ? std::nan("") : prediction.log2_sum() * kLn2;
          saved[crop * batch_size + image] = log_sums[crop];
          add_scaled(all_crops.data(), x, T(1), n);
        }
        const double all_log_sums = std::accumulate(log_sums.begin(), log_sums.end(), 0.0);
        for (int64_t i = 0; i < nmb_assigning; i++) {
          const Exponentials<T> code(code_scores.row(i, image, scratch.data()), &offsets[i * n], kLog2E / epsilon, n,
                                     e.data());
          saved[(nmb_crops + i) * batch_size + image] = code.log2_sum() * kLn2;
          loss += all_log_sums - log_sums[crops_for_assign[i]];
          const T inverse_sum = code.inverse_sum();
          const T* x = in_accumulation_type(rows.row(crops_for_assign[i], image), scratch.data(), n);
          loss -= agreement(e.data(), inverse_sum, all_crops.data(), x, n) / temperature;
        }
        loss_per_image[image] = loss;
      }
    });
  });
  const double loss = std::accumulate(loss_per_image.begin(), loss_per_image.end(), 0.0);
  const double terms = static_cast<double>(nmb_assigning * (nmb_crops - 1) * batch_size);
  return {at::scalar_tensor(loss / terms, potentials.options()), logsumexps};
}

at::Tensor swapped_loss_backward(const at::Tensor& grad, const at::Tensor& scores_,
                                 const std::optional<at::Tensor>& assigning_, const at::Tensor& potentials,
                                 const at::Tensor& logsumexps, at::IntArrayRef crops_for_assign, double temperature,
                                 double epsilon) {
  check_loss(scores_, assigning_, potentials, crops_for_assign);
  const auto assigning = with_contiguous_rows(assigning_);
  const int64_t nmb_crops = scores_.size(0), batch_size = scores_.size(1), n = scores_.size(2);
  const int64_t nmb_assigning = crops_for_assign.size();
  check_gradient(grad, potentials);
  check_logsumexps(logsumexps, potentials, scores_);
  const std::vector<int64_t> position = positions(crops_for_assign, nmb_crops);
  const at::Tensor scores = with_contiguous_rows(scores_);
  at::Tensor result = at::empty(scores.sizes(), scores.options());
  prefer_huge_pages(result);
  const double factor =
      grad.item<double>() / (nmb_assigning * (nmb_crops - 1) * static_cast<double>(batch_size) * temperature);
  DISPATCH(scores, "swapped_loss_backward", {
    const Rows<scalar_t> rows = rows_of<scalar_t>(scores, std::nullopt);
    const std::vector<T> offsets = in_powers_of_two<T>(potentials), log2_sums = in_powers_of_two<T>(logsumexps);
    const std::vector<T> no_code(n);
    scalar_t* gradient = result.mutable_data_ptr<scalar_t>();
    const CodeScores<scalar_t, T> code_scores(rows, assigning, crops_for_assign);
    at::parallel_for(0, batch_size, 1 + kElementsPerThread / (nmb_crops * n), [&](int64_t begin, int64_t end) {
      const int64_t converted = std::is_same_v<scalar_t, T> ? 0 : n;
      std::vector<T> codes(nmb_assigning * n), all_codes(n), scratch(converted), unrounded(converted);
      for (int64_t image = begin; image < end; image++) {
        std::fill(all_codes.begin(), all_codes.end(), T(0));
        for (int64_t i = 0; i < nmb_assigning; i++) {
          const T* x = code_scores.row(i, image, scratch.data());
          const T log2_sum = log2_sums[(nmb_crops + i) * batch_size + image];
          exp2_row(x, &offsets[i * n], static_cast<T>(kLog2E / epsilon), log2_sum, n, &codes[i * n]);
          add_scaled(all_codes.data(), &codes[i * n], T(1), n);
        }
        for (int64_t crop = 0; crop < nmb_crops; crop++) {
          const bool assigns = position[crop] >= 0;
          const T* x = in_accumulation_type(rows.row(crop, image), scratch.data(), n);
          scalar_t* out = gradient + (crop * batch_size + image) * n;
          T* row = converted ? unrounded.data() : reinterpret_cast<T*>(out);
          gradient_row(x, static_cast<T>(kLog2E / temperature), log2_sums[crop * batch_size + image],
                       static_cast<T>(nmb_assigning - assigns), all_codes.data(),
                       assigns ? &codes[position[crop] * n] : no_code.data(), static_cast<T>(factor), n, row);
          if (converted) convert_row(out, row, n);
        }
      }
    });
  });
  return result;
}

}  // namespace

torch::Library cpu_kernels() {
  torch::Library library = MAKE_TORCH_LIBRARY_IMPL(sinkhorn_ext, CPU);
  IMPLEMENT_OPERATORS(library);
  return library;
}

const char* cpu_capability() { return code_path(); }

}  // namespace sinkhorn_ext
