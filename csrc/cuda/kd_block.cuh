// What a block of kd_ce_loss's kernels adds up and leaves behind.
#pragma once

#include "hopper.cuh"
#include "kd_row.cuh"

#include <cstdint>
#include <limits>

namespace fastdistill {
namespace {

constexpr int kThreads = 256; // of a block that has a row
constexpr int kMaxWarps = 32;

// The sum over a block, to its first thread; always in the same order.
__device__ double block_sum(double x) {
  __shared__ double of_warp[kMaxWarps];
  x = lanes_sum<kWarp>(x);
  if (threadIdx.x % kWarp == 0)
    of_warp[threadIdx.x / kWarp] = x;
  __syncthreads();
  if (threadIdx.x >= kWarp)
    return 0;
  return lanes_sum<kWarp>(threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : 0);
}

constexpr int kMaxCluster = 8;

// The sum over the first threads of a cluster's blocks, to the first of them, in the same order. All threads come, and
// have before come to arrive_in_cluster.
__device__ double cluster_sum(double x) {
#if __CUDA_ARCH__ >= 900
  const int blocks = cluster_size();
  if (blocks > 1) {
    __shared__ double of_block[kMaxCluster];
    wait_for_arrivals(); // a block's memory is there once it runs
    if (threadIdx.x == 0)
      store_there(address_in(shared_address(of_block + cluster_rank()), 0), x);
    sync_cluster();
    x = 0;
    for (int block = 0; block < blocks; ++block)
      x += of_block[block];
  }
#endif
  return x;
}

// How many rows count, to all threads of a block.
template <typename A>
__device__ double rows_that_count(const Problem<A>& problem) {
  if (!problem.labels)
    return problem.rows;
  __shared__ int count;
  if (threadIdx.x == 0)
    count = 0;
  __syncthreads();
  const int of_warp = __reduce_add_sync(kAll, count_share(problem, threadIdx.x, blockDim.x));
  if (threadIdx.x % kWarp == 0)
    atomicAdd(&count, of_warp);
  __syncthreads();
  return count;
}

// What the first thread of a block leaves: the loss itself, or a share of its sum, and behind the shares the divisor.
template <typename A>
__device__ void leave_total(const Problem<A>& problem, double total, double divisor, int block, int blocks) {
  if (!problem.totals) {
    *problem.loss = static_cast<A>(total / divisor);
  } else {
    problem.totals[block] = total;
    if (block == 0)
      problem.totals[blocks] = divisor;
  }
}

// A row's loss, to where it belongs, and its terms if they are wanted.
template <typename A>
__device__ void leave_loss(const Problem<A>& problem, int64_t row, const Terms<A>& terms, double& total) {
  const A loss = problem.kd_weight * terms.kd + problem.ce_weight * terms.ce;
  if (problem.terms) {
    problem.terms[row] = terms.kd;
    problem.terms[problem.rows + row] = terms.ce;
  }
  if (problem.losses)
    problem.losses[row] = loss;
  else
    total += loss;
}

template <typename A>
__device__ A not_a_number() {
  return std::numeric_limits<A>::quiet_NaN();
}

template <typename A>
__device__ Terms<A> unknown_terms() {
  return {not_a_number<A>(), not_a_number<A>()};
}

} // namespace
} // namespace fastdistill
