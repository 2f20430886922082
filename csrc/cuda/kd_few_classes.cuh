// kd_ce_loss for rows of few classes: in registers, read once.
#pragma once

#include "kd_block.cuh"
#include "kd_careful.cuh"

#include <cstdint>
#include <limits>

namespace fastdistill {
namespace {

// A team of kLanes threads has a row, kSize logits of each side in each thread's registers. Of the fewest, two blocks fit
// a multiprocessor.
template <typename A, int kLanes, int kSize, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 4 && kSize == 4 ? 2 : 1)
    few_classes(const __grid_constant__ Problem<A> problem) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  constexpr int kTeams = kBlock / kLanes;
#if __CUDA_ARCH__ >= 900
  if (cluster_size() > 1)
    arrive_in_cluster();
#endif
  const double divisor = problem.mean ? rows_that_count(problem) : 1;
  const int lane = threadIdx.x % kLanes;
  const auto at = [&](int i) { return i * kLanes + lane; };
  const int size = (problem.classes - lane + kLanes - 1) / kLanes;
  double total = 0;
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * kTeams; first < problem.rows;
       first += static_cast<int64_t>(gridDim.x) * kTeams) {
    const bool exists = first + threadIdx.x / kLanes < problem.rows;
    const int64_t row = exists ? first + threadIdx.x / kLanes : problem.rows - 1;
    const Label label = label_of(problem, load_label(problem, row));
    const void* const student_row = row_of(problem.student, problem.student_type, row, problem.student_stride);
    const void* const teacher_row = row_of(problem.teacher, problem.teacher_type, row, problem.teacher_stride);
    A student[kSize], teacher[kSize];
    load_each<kSize>(student_row, problem.student_type, student, problem.classes, -kInfinity, at);
    load_each<kSize>(teacher_row, problem.teacher_type, teacher, problem.classes, -kInfinity, at);
    const bool labelled = problem.task && label.counts && label.valid;
    const A label_logit = labelled ? load_one<A>(student_row, problem.student_type, label.value) : A(0);

    A student_max = -kInfinity, teacher_max = -kInfinity;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      student_max = fmax(student_max, student[i]);
      teacher_max = fmax(teacher_max, teacher[i]);
    }
    Sums<A> sums = sums_of_nothing<A>(0);
    sums.student_reference = lanes_max<kLanes>(student_max);
    sums.teacher_reference = lanes_max<kLanes>(teacher_max);
    add_carefully<kSize>(problem, sums, student, teacher, size);
    if (problem.power == 1)
      sums.task = sums.student;
    add_lanes<kLanes>(sums);

    const A label_shifted = (label_logit - sums.student_reference) * problem.scale;
    const Terms<A> terms = terms_of(problem, sums, label_shifted, problem.divergence);
    if (exists && lane == 0)
      leave_loss(problem, row, label.counts ? label.valid ? terms : unknown_terms<A>() : Terms<A>{0, 0}, total);
    if (!problem.student_grad && !problem.teacher_grad)
      continue;

    const A share = label.valid ? static_cast<A>(1 / divisor) : not_a_number<A>();
    const Coefficients<A> coefficients = coefficients_of(problem, sums, share, problem.divergence);
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Gradients<A> gradients = gradients_of(problem, sums, coefficients, student[i], teacher[i]);
      const A at_label = labelled && at(i) == label.value ? coefficients.at_label : A(0);
      student[i] = label.counts ? gradients.student - at_label : A(0);
      teacher[i] = label.counts ? gradients.teacher : A(0);
    }
    const int end = exists ? problem.classes : 0;
    if (problem.student_grad)
      store_each<kSize>(
          row_of(problem.student_grad, problem.student_type, row, problem.classes), problem.student_type, student, end, at);
    if (problem.teacher_grad)
      store_each<kSize>(
          row_of(problem.teacher_grad, problem.teacher_type, row, problem.classes), problem.teacher_type, teacher, end, at);
  }
  if (!problem.losses) {
    total = cluster_sum(block_sum(total));
    if (threadIdx.x == 0 && (problem.totals || blockIdx.x == 0))
      leave_total(problem, total, divisor, blockIdx.x, gridDim.x);
  }
}

} // namespace
} // namespace fastdistill
