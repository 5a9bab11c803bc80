// Shared by the CPU and the CUDA kernels: where the rows of scores lie in memory, and the checks of all arguments.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/macros/Macros.h>

#include <algorithm>
#include <optional>
#include <type_traits>

namespace sinkhorn_ext {

constexpr double kLog2E = 1.4426950408889634;  // kernels work in powers of two: exp(x) = exp2(x * log2 e)
constexpr double kLn2 = 0.6931471805599453;

template <typename scalar_t>
using accumulation_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

// Runs the code with scalar_t, the type of the scores, and T, the type to compute in.
#define DISPATCH(scores, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, scores.scalar_type(), name, [&] { \
    using T = accumulation_t<scalar_t>; \
    __VA_ARGS__ \
  })

// Registers one function for each operator of __init__.py. The functions have the operators' names.
#define IMPLEMENT_OPERATORS(library) \
  library.impl("prototype_logsumexp", prototype_logsumexp); \
  library.impl("prototype_totals", prototype_totals); \
  library.impl("potentials", potentials); \
  library.impl("codes", codes); \
  library.impl("moments", moments); \
  library.impl("sinkhorn", sinkhorn); \
  library.impl("swapped_loss", swapped_loss); \
  library.impl("swapped_loss_backward", swapped_loss_backward)

// The rows of A = `problems` independent problems. The rows of a problem are those of scores [A, N, K], followed by
// those of extra [A, Q, K].
template <typename scalar_t>
struct Rows {
  const scalar_t* scores;
  const scalar_t* extra;
  int64_t scores_problem_stride, scores_row_stride, extra_problem_stride, extra_row_stride;
  int64_t problems, score_rows, count, prototypes;

  C10_HOST_DEVICE const scalar_t* row(int64_t problem, int64_t i) const {
    return i < score_rows ? scores + problem * scores_problem_stride + i * scores_row_stride
                          : extra + problem * extra_problem_stride + (i - score_rows) * extra_row_stride;
  }
};

// Rows may have any stride. A copy is made only if the elements within a row are not contiguous.
inline at::Tensor with_contiguous_rows(const at::Tensor& scores) {
  return scores.stride(-1) == 1 || scores.size(-1) == 1 ? scores : scores.contiguous();
}

inline std::optional<at::Tensor> with_contiguous_rows(const std::optional<at::Tensor>& extra) {
  return extra ? std::make_optional(with_contiguous_rows(*extra)) : std::nullopt;
}

// Points into scores and extra, which must outlive the result.
template <typename scalar_t>
Rows<scalar_t> rows_of(const at::Tensor& scores, const std::optional<at::Tensor>& extra) {
  Rows<scalar_t> rows{};
  rows.scores = scores.const_data_ptr<scalar_t>();
  rows.scores_problem_stride = scores.stride(0);
  rows.scores_row_stride = scores.stride(1);
  rows.problems = scores.size(0);
  rows.score_rows = rows.count = scores.size(1);
  rows.prototypes = scores.size(2);
  if (extra) {
    rows.extra = extra->const_data_ptr<scalar_t>();
    rows.extra_problem_stride = extra->stride(0);
    rows.extra_row_stride = extra->stride(1);
    rows.count += extra->size(1);
  }
  return rows;
}

inline void check_scores(const at::Tensor& scores, const std::optional<at::Tensor>& extra) {
  TORCH_CHECK(scores.dim() == 3 && scores.is_floating_point() && scores.size(2) > 0,
              "scores: expected a floating-point tensor [A, B, K], K > 0, got ", scores.scalar_type(), " ",
              scores.sizes());
  TORCH_CHECK(!extra || (extra->dim() == 3 && extra->scalar_type() == scores.scalar_type() &&
                         extra->device() == scores.device() && extra->size(0) == scores.size(0) &&
                         extra->size(2) == scores.size(2)),
              "extra: expected [", scores.size(0), ", any, ", scores.size(2), "] ", scores.scalar_type(), " on ",
              scores.device(), " as scores, got ", extra->sizes(), " ", extra->scalar_type(), " on ", extra->device());
}

inline void check_iterations(int64_t iterations) {
  TORCH_CHECK(iterations >= 1, "iterations: expected 1 or more, got ", iterations);
}

inline at::ScalarType accumulation_type(const at::Tensor& scores) {
  return scores.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_potentials(const at::Tensor& potentials, const at::Tensor& scores, int64_t problems) {
  TORCH_CHECK(potentials.dim() == 2 && potentials.size(0) == problems && potentials.size(1) == scores.size(-1) &&
                  potentials.scalar_type() == accumulation_type(scores) && potentials.device() == scores.device(),
              "potentials: expected [", problems, ", ", scores.size(-1), "] ", accumulation_type(scores), " on ",
              scores.device(), ", got ", potentials.sizes(), " ", potentials.scalar_type(), " on ",
              potentials.device());
}

inline void check_logsumexps(const at::Tensor& logsumexps, const at::Tensor& potentials, const at::Tensor& scores) {
  TORCH_CHECK(logsumexps.dim() == 2 && logsumexps.size(0) == scores.size(0) + potentials.size(0) &&
                  logsumexps.size(1) == scores.size(1) && logsumexps.scalar_type() == potentials.scalar_type() &&
                  logsumexps.device() == scores.device(),
              "logsumexps: expected [", scores.size(0) + potentials.size(0), ", ", scores.size(1), "] ",
              potentials.scalar_type(), " on ", scores.device(), ", got ", logsumexps.sizes(), " ",
              logsumexps.scalar_type(), " on ", logsumexps.device());
}

inline void check_loss(const at::Tensor& scores, const std::optional<at::Tensor>& assigning,
                       const at::Tensor& potentials, at::IntArrayRef crops_for_assign) {
  check_scores(scores, std::nullopt);
  TORCH_CHECK(scores.size(0) >= 2 && scores.size(1) >= 1 && !crops_for_assign.empty(),
              "scores: expected at least two crops, one image and one assigning crop, got ", scores.sizes(),
              " and ", crops_for_assign.size(), " assigning crops");
  for (const int64_t crop : crops_for_assign)
    TORCH_CHECK(crop >= 0 && crop < scores.size(0) &&
                    std::count(crops_for_assign.begin(), crops_for_assign.end(), crop) == 1,
                "crops_for_assign: expected different crops in 0..", scores.size(0) - 1, ", got ", crops_for_assign);
  check_potentials(potentials, scores, crops_for_assign.size());
  TORCH_CHECK(!assigning || (assigning->dim() == 3 && assigning->size(0) == potentials.size(0) &&
                             assigning->size(1) == scores.size(1) && assigning->size(2) == scores.size(2) &&
                             assigning->scalar_type() == potentials.scalar_type() &&
                             assigning->device() == scores.device()),
              "assigning: expected [", potentials.size(0), ", ", scores.size(1), ", ", scores.size(2), "] ",
              potentials.scalar_type(), " on ", scores.device(), ", got ", assigning->sizes(), " ",
              assigning->scalar_type(), " on ", assigning->device());
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& potentials) {
  TORCH_CHECK(grad.dim() == 0 && grad.scalar_type() == potentials.scalar_type() && grad.device() == potentials.device(),
              "grad: expected a scalar ", potentials.scalar_type(), " on ", potentials.device(), ", got ",
              grad.scalar_type(), " ", grad.sizes(), " on ", grad.device());
}

inline void check_out(const at::Tensor& out, const at::Tensor& scores) {
  TORCH_CHECK(out.sizes() == scores.sizes() && out.scalar_type() == accumulation_type(scores) &&
                  out.device() == scores.device() && (out.stride(1) == 1 || out.size(1) == 1),
              "out: expected contiguous rows ", scores.sizes(), " ", accumulation_type(scores), " on ", scores.device(),
              ", got ", out.sizes(), " ", out.scalar_type(), " on ", out.device(), " with strides ", out.strides());
  at::assert_no_internal_overlap(out);
  at::assert_no_overlap(out, scores);
}

}  // namespace sinkhorn_ext
