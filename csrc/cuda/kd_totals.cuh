// Before kd_ce_loss's rows and after them: labels counted, losses added up.
#pragma once

#include "kd_block.cuh"

#include <cstdint>

namespace fastdistill {
namespace {

template <typename A>
__global__ void __launch_bounds__(kThreads) count_labels(const __grid_constant__ Problem<A> problem, int* counts) {
  int count = 0;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; row < problem.rows;
       row += static_cast<int64_t>(gridDim.x) * kThreads)
    count += label_at(problem, row) != problem.ignore_index;
  const double all = block_sum(count);
  if (threadIdx.x == 0)
    counts[blockIdx.x] = static_cast<int>(all);
}

template <typename A>
__global__ void __launch_bounds__(kThreads) add_up(const double* totals, int blocks, A* loss) {
  double total = 0;
  for (int i = threadIdx.x; i < blocks; i += kThreads)
    total += totals[i];
  total = block_sum(total);
  if (threadIdx.x == 0)
    *loss = static_cast<A>(total / totals[blocks]);
}

// Sums, or means, of the rows' terms: a block has one of both.
template <typename A>
__global__ void __launch_bounds__(kThreads, 1) add_up_terms(const __grid_constant__ Problem<A> problem, A* sums) {
  const double divisor = problem.mean ? rows_that_count(problem) : 1;
  const A* const terms = problem.terms + blockIdx.x * problem.rows;
  double total = 0;
  for (int64_t row = threadIdx.x; row < problem.rows; row += kThreads)
    total += terms[row];
  total = block_sum(total);
  if (threadIdx.x == 0)
    sums[blockIdx.x] = static_cast<A>(total / divisor);
}

} // namespace
} // namespace fastdistill
