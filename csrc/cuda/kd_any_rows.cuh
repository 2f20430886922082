// kd_ce_loss for rows of any kind: read twice.
#pragma once

#include "kd_block.cuh"
#include "kd_careful.cuh"

#include <cstdint>
#include <limits>

namespace fastdistill {
namespace {

// A block has a row.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1) any_rows(const __grid_constant__ Problem<A> problem) {
  __shared__ Sums<A> parts[2][kThreads / kWarp];
  const double divisor = problem.mean ? rows_that_count(problem) : 1;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  double total = 0;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < problem.rows; row += gridDim.x) {
    const Label label = label_of(problem, load_label(problem, row));
    const RowShare<A> share = share_of(problem, row, 0, problem.classes, threadIdx.x, kThreads);
    if (!label.counts) {
      zero_gradients(problem, share);
      if (threadIdx.x == 0)
        leave_loss(problem, row, Terms<A>{0, 0}, total);
      continue;
    }
    const auto over_block = [&](Sums<A> sums) {
      sums = lanes_together<kWarp>(sums, problem.scale, problem.temperature, problem.divergence);
      turn ^= 1;
      if (lane == 0)
        parts[turn][warp] = sums;
      __syncthreads();
      return lanes_together<kThreads / kWarp>(
          parts[turn][lane % (kThreads / kWarp)], problem.scale, problem.temperature, problem.divergence);
    };
    constexpr A kLowest = std::numeric_limits<A>::lowest();
    Sums<A> sums = over_block(careful_sums(problem, share, kLowest, kLowest));
    if (are_far(problem, sums))
      sums = over_block(careful_sums(problem, share, sums.student_reference, sums.teacher_reference));
    if (threadIdx.x == 0) {
      const bool labelled = problem.task && label.valid;
      const A label_logit = labelled ? load_one<A>(share.student, problem.student_type, label.value) : A(0);
      const Terms<A> terms = terms_of(
          problem, sums, (label_logit - sums.student_reference) * problem.scale, problem.divergence);
      leave_loss(problem, row, label.valid ? terms : unknown_terms<A>(), total);
    }
    if (problem.student_grad || problem.teacher_grad) {
      const A per_row = label.valid ? static_cast<A>(1 / divisor) : not_a_number<A>();
      careful_gradients(
          problem, share, sums, coefficients_of(problem, sums, per_row, problem.divergence), label.value);
    }
  }
  if (!problem.losses && threadIdx.x == 0)
    leave_total(problem, total, divisor, blockIdx.x, gridDim.x);
}

} // namespace
} // namespace fastdistill
