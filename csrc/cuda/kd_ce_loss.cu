// kd_ce_loss on CUDA: loss and gradients in one launch, or in two where many blocks' losses are to be added up. Three
// kernels share the work: rows of few classes in registers; on sm_90 long rows streamed through shared memory, so that
// device memory is read once; and any other rows, read twice. Formulas: fastdistill/kernels/kd_ce_loss.py.
#include "hopper.cuh"
#include "kd_row.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256; // of a block that has a row
constexpr int kMaxWarps = 32;

// Over a block -----------------------------------------------------------------------------------------------------

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

// Few classes ------------------------------------------------------------------------------------------------------

// A team of kLanes threads has a row, kSize logits of each side in each thread's registers.
template <typename A, int kLanes, int kSize, int kBlock>
__global__ void __launch_bounds__(kBlock, sizeof(A) == 4 && kSize == 4 ? 2 : 1) few_classes(const __grid_constant__ Problem<A> problem) {
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

// Any rows ---------------------------------------------------------------------------------------------------------

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

// Long rows, streamed ----------------------------------------------------------------------------------------------

// A cluster of blocks has a row, each block a share of it. One thread of a block, the producer, copies chunks of the
// share into a ring of slots in shared memory, as far ahead as there are free slots. The other threads, the consumers,
// add up chunk after chunk as it lands; exchange their sums with the whole cluster; then write the gradient from the
// same chunks, whose slots the producer fills with the rows that follow. Of a share that is too long for the ring the
// last `keep` chunks stay in it; the others' slots are freed at once, and they are copied again for the gradient,
// hopefully from L2.
struct Ring {
  int consumers, slots, chunk, keep; // threads; slots; 16-byte vectors of a side in a slot; chunks
};

constexpr int kMaxStreamThreads = 512; // of a multiprocessor: 128 registers each, which the compiler needs

#if __CUDA_ARCH__ >= 900

struct Cursor {
  int slot = 0;
  uint32_t phase = 0;
  __device__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

// A block's share of a row. The row's ends, where they are no whole vectors, are the first block's `edges`.
template <typename T>
struct Share {
  static constexpr int kSize = 16 / sizeof(T);
  int head; // elements before the row's vectors
  int begin; // the share's first element in the row
  int count, chunks; // vectors; and how many slots they take

  __device__ Share(int64_t row, int classes, int rank, int blocks, int chunk) {
    head = static_cast<unsigned>(-(row * classes)) % kSize;
    const int vectors = (classes - head) / kSize, each = (vectors + blocks - 1) / blocks;
    const int first = min(rank * each, vectors);
    begin = head + first * kSize;
    count = min(each, vectors - first);
    chunks = (count + chunk - 1) / chunk;
  }
  // The same for all rows, if they are whole vectors: dividing takes longer than to ask.
  __device__ void move_to(int64_t row, int classes, int rank, int blocks, int chunk) {
    if (classes % kSize != 0)
      *this = Share(row, classes, rank, blocks, chunk);
  }
};

__device__ inline void unpack(uint4 vector, float (&x)[8], __nv_bfloat16) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(uint4 vector, float (&x)[8], __half) {
  const __half2* halves = reinterpret_cast<const __half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __low2float(halves[i]);
    x[2 * i + 1] = __high2float(halves[i]);
  }
}
__device__ inline void unpack(uint4 vector, float (&x)[4], float) {
  x[0] = __uint_as_float(vector.x);
  x[1] = __uint_as_float(vector.y);
  x[2] = __uint_as_float(vector.z);
  x[3] = __uint_as_float(vector.w);
}

__device__ inline uint4 pack(const float (&x)[8], __nv_bfloat16) {
  uint4 vector;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return vector;
}
__device__ inline uint4 pack(const float (&x)[8], __half) {
  uint4 vector;
  auto* pairs = reinterpret_cast<__half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  return vector;
}
__device__ inline uint4 pack(const float (&x)[4], float) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

// Exponentials at temperature 1 from those at temperature and their exponents.
template <int kSize>
__device__ void task_exps(
    const Problem<float>& problem, const float (&shifted)[kSize], const float (&soft)[kSize], float (&task)[kSize]) {
  if (problem.power == 0) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      task[i] = exp2_of(shifted[i] * problem.temperature);
    return;
  }
  float squared[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    task[i] = 1;
    squared[i] = soft[i];
  }
#pragma unroll 1
  for (int power = problem.power; power; power >>= 1) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (power & 1)
        task[i] *= squared[i];
      squared[i] *= squared[i];
    }
  }
}

// Adds logits to sums whose references are logits times scale: right unless that shows in the sums.
template <Divergence kDivergence, int kSize>
__device__ void add_plainly(
    const Problem<float>& problem, Sums<float>& sums, const float (&student)[kSize], const float (&teacher)[kSize]) {
  float shifted[kSize], exps[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    shifted[i] = fmaf(student[i], problem.scale, -sums.student_reference);
    exps[i] = exp2_of(shifted[i]);
    sums.student += exps[i];
    if constexpr (kDivergence != Divergence::kNone) {
      const float teacher_shifted = fmaf(teacher[i], problem.scale, -sums.teacher_reference);
      const float teacher_exp = exp2_of(teacher_shifted);
      sums.teacher += teacher_exp;
      const float weight = kDivergence == Divergence::kReverseKl ? exps[i] : teacher_exp;
      sums.gap = fmaf(weight, gap_of(kDivergence, shifted[i], teacher_shifted), sums.gap);
    }
  }
  if (problem.power == 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.task = fmaf(exps[i], exps[i], sums.task);
  } else if (problem.power != 1) {
    float task[kSize];
    task_exps(problem, shifted, exps, task);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.task += task[i];
  }
  if (problem.smooth) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.shifted += shifted[i];
  }
}

// Replaces logits by their gradients, but for what is to be subtracted at the label.
template <Divergence kDivergence, int kSize>
__device__ void gradients_plainly(
    const Problem<float>& problem, const Sums<float>& sums, const Coefficients<float>& coefficients,
    float (&student)[kSize], float (&teacher)[kSize]) {
  constexpr float kLn2 = 0.693147181f;
  constexpr bool kReverse = kDivergence == Divergence::kReverseKl, kNone = kDivergence == Divergence::kNone;
  float shifted[kSize], exps[kSize], teacher_shifted[kSize] = {}, teacher_exps[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    shifted[i] = fmaf(student[i], problem.scale, -sums.student_reference);
    exps[i] = exp2_of(shifted[i]);
    if constexpr (!kNone) {
      teacher_shifted[i] = fmaf(teacher[i], problem.scale, -sums.teacher_reference);
      teacher_exps[i] = exp2_of(teacher_shifted[i]);
    }
  }
  [[maybe_unused]] const auto of_weigher = [&](float weight, int i) {
    return weight * ((gap_of(kDivergence, shifted[i], teacher_shifted[i]) - coefficients.mean_gap) * kLn2);
  };
  if (problem.student_grad) {
    const float same = problem.power == 1 ? coefficients.task : 0;
    const float linear = kReverse || kNone ? same : coefficients.student + same;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kNone)
        student[i] = -coefficients.at_each;
      else if constexpr (kReverse)
        student[i] = of_weigher(exps[i] * coefficients.student, i) - coefficients.at_each;
      else
        student[i] = fmaf(teacher_exps[i], -coefficients.teacher, -coefficients.at_each);
    }
    if (problem.power == 2) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        student[i] = fmaf(exps[i], fmaf(exps[i], coefficients.task, linear), student[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        student[i] = fmaf(exps[i], linear, student[i]);
      if (problem.power != 1) {
        float task[kSize];
        task_exps(problem, shifted, exps, task);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          student[i] = fmaf(task[i], coefficients.task, student[i]);
      }
    }
  }
  if (problem.teacher_grad) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kNone)
        teacher[i] = coefficients.at_label * 0; // NaN where the label is no class
      else if constexpr (kReverse)
        teacher[i] = fmaf(teacher_exps[i], coefficients.teacher, -exps[i] * coefficients.student);
      else
        teacher[i] = of_weigher(teacher_exps[i] * coefficients.teacher, i);
    }
  }
}

#endif

template <typename T, Divergence kDivergence>
__global__ void __launch_bounds__(kMaxStreamThreads, 1)
    stream_rows(const __grid_constant__ Problem<float> problem, const __grid_constant__ Ring ring) {
#if __CUDA_ARCH__ >= 900
  constexpr int kSize = Share<T>::kSize;
  constexpr int kSides = kDivergence == Divergence::kNone ? 1 : 2;
  extern __shared__ __align__(128) unsigned char memory[];
  const int blocks = cluster_size(), rank = cluster_rank(), cluster = blockIdx.x / blocks, clusters = gridDim.x / blocks;
  const int warps = ring.consumers / kWarp, parts = warps * blocks;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const uint32_t side_bytes = ring.chunk * 16, slot_bytes = side_bytes * kSides;

  // the ring, sums in exchange, barriers
  const uint32_t slots = shared_address(memory);
  auto* const exchanged = reinterpret_cast<Sums<float>*>(memory + ring.slots * slot_bytes);
  const uint32_t full = shared_address(exchanged + 2 * parts), empty = full + 8 * ring.slots;
  const uint32_t complete = empty + 8 * ring.slots;
  double& total = *reinterpret_cast<double*>(exchanged + 2 * parts + (ring.slots + 1) / 2 + 1);
  int& counted = reinterpret_cast<int*>(&total)[2];
  float& per_row = reinterpret_cast<float*>(&total)[3]; // what a row's loss counts
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < ring.slots; ++slot) {
      init_barrier(full + 8 * slot, 1);
      init_barrier(empty + 8 * slot, warps);
    }
    init_barrier(complete, 1);
    init_barrier(complete + 8, 1);
    publish_barriers();
    total = counted = 0;
  }
  __syncthreads();
  sync_cluster();

  const bool gradients = problem.student_grad || problem.teacher_grad;
  if (warp == warps) { // the producer
    if (lane == 0) {
      const uint64_t once = evict_first(), twice = evict_last();
      Cursor cursor;
      Share<T> share(cluster, problem.classes, rank, blocks, ring.chunk);
      int64_t next_label = load_label(problem, cluster);
      for (int64_t row = cluster; row < problem.rows; row += clusters) {
        const Label label = label_of(problem, next_label);
        next_label = load_label(problem, min(row + clusters, problem.rows - 1));
        if (label.counts) {
          share.move_to(row, problem.classes, rank, blocks, ring.chunk);
          const int chunks = share.chunks;
          const int again = gradients ? max(chunks - ring.keep, 0) : 0;
          const T* const student = static_cast<const T*>(problem.student) + row * problem.student_stride + share.begin;
          const T* const teacher = static_cast<const T*>(problem.teacher) + row * problem.teacher_stride + share.begin;
          for (int i = 0; i < chunks + again; ++i) {
            const int index = i < chunks ? i : i - chunks;
            const int64_t offset = static_cast<int64_t>(index) * ring.chunk * kSize;
            const uint32_t bytes = min(ring.chunk, share.count - index * ring.chunk) * 16;
            const uint64_t policy = i < again ? twice : once;
            const uint32_t barrier = full + 8 * cursor.slot, slot = slots + cursor.slot * slot_bytes;
            wait(empty + 8 * cursor.slot, cursor.phase ^ 1);
            arrive_and_expect(barrier, bytes * kSides);
            copy_bulk(slot, student + offset, bytes, barrier, policy);
            if constexpr (kSides == 2)
              copy_bulk(slot + side_bytes, teacher + offset, bytes, barrier, policy);
            cursor.advance(ring.slots);
          }
        }
      }
    }
    __syncwarp();
  } else {
    const int thread = threadIdx.x;
    if (problem.mean && problem.labels) {
      const int of_warp = __reduce_add_sync(kAll, count_share(problem, thread, ring.consumers));
      if (lane == 0)
        atomicAdd(&counted, of_warp);
      sync_threads_of(1, ring.consumers);
    }
    const auto divisor = [&] { return !problem.mean ? 1. : problem.labels ? counted : problem.rows; };
    if (thread == 0)
      per_row = static_cast<float>(1 / divisor());
    sync_threads_of(1, ring.consumers);

    const auto vector_at = [&](int slot, int side, int i) {
      return reinterpret_cast<const uint4*>(memory + slot * slot_bytes + side * side_bytes)[i];
    };
    const auto free_slot = [&](int slot) {
      __syncwarp();
      if (lane == 0)
        arrive(empty + 8 * slot);
    };
    // To each lane its part of what all the cluster's warps have summed. A block of parts is written again only two
    // exchanges on, for which every warp has first given its own, and so read these.
    uint32_t turn = 0;
    const auto exchange = [&](const Sums<float>& sums, const Sums<float>& nothing, const auto& join) {
      const uint32_t barrier = complete + 8 * (turn & 1);
      Sums<float>* const block = exchanged + (turn & 1) * parts;
      if (blocks == 1) {
        if (lane == 0)
          block[warp] = sums;
        sync_threads_of(1, ring.consumers);
      } else {
        if (thread == 0)
          arrive_and_expect(barrier, parts * sizeof(Sums<float>));
        if (lane < blocks) {
          const uint32_t to = address_in(shared_address(block + rank * warps + warp), lane);
          const uint32_t there = address_in(barrier, lane);
          store_async(to, sums.student_reference, sums.teacher_reference, sums.student, sums.teacher, there);
          store_async(to + 16, sums.task, sums.gap, sums.shifted, sums.count, there);
        }
        wait_for_cluster(barrier, (turn >> 1) & 1);
      }
      ++turn;
      Sums<float> mine = lane < parts ? block[lane] : nothing;
#pragma unroll 1
      for (int i = lane + kWarp; i < parts; i += kWarp)
        mine = join(mine, block[i]);
      return mine;
    };
    const auto over_lanes = [&](Sums<float> sums) {
      sums.student = lanes_sum<kWarp>(sums.student);
      if constexpr (kSides == 2) {
        sums.teacher = lanes_sum<kWarp>(sums.teacher);
        sums.gap = lanes_sum<kWarp>(sums.gap);
      }
      sums.task = lanes_sum<kWarp>(sums.task);
      if (problem.power == 1)
        sums.task = sums.student;
      if (problem.smooth)
        sums.shifted = lanes_sum<kWarp>(sums.shifted);
      return sums;
    };

    // Any reference near the maximum is as good. All of the cluster take one that would have made the sums of the row
    // before this one 1, and at first what its first logits suggest.
    const auto usable = [](float reference) { return fabsf(reference) < 0x1p23f; };
    const auto first_reference = [&](const void* logits, int64_t stride) {
      const float x = widen(static_cast<const T*>(logits)[cluster * stride + lane]);
      const float reference = lanes_max<kWarp>(x) * problem.scale;
      return usable(reference) ? reference : 0.f;
    };
    float student_reference = first_reference(problem.student, problem.student_stride);
    float teacher_reference = kSides == 2 ? first_reference(problem.teacher, problem.teacher_stride) : 0;

    Cursor cursor;
    Share<T> share(cluster, problem.classes, rank, blocks, ring.chunk);
    int64_t next_label = load_label(problem, cluster);
    for (int64_t row = cluster; row < problem.rows; row += clusters) {
      const Label label = label_of(problem, next_label);
      next_label = load_label(problem, min(row + clusters, problem.rows - 1));
      share.move_to(row, problem.classes, rank, blocks, ring.chunk);
      const int chunks = share.chunks;
      const int kept = gradients ? min(chunks, ring.keep) : 0;
      const T* const student_row = static_cast<const T*>(problem.student) + row * problem.student_stride;
      const T* const teacher_row = static_cast<const T*>(problem.teacher) + row * problem.teacher_stride;
      T* const student_grad = static_cast<T*>(problem.student_grad) + row * problem.classes;
      T* const teacher_grad = static_cast<T*>(problem.teacher_grad) + row * problem.classes;
      // what each lane of the first block's first warp has of the row's ends
      const int edges = rank == 0 ? share.head + (problem.classes - share.head) % kSize : 0;
      const bool has_edge = thread < edges;
      const int edge = thread < share.head ? thread : problem.classes - edges + thread;

      if (!label.counts) {
        const uint4 zero = {0, 0, 0, 0};
        for (int i = thread; i < share.count; i += ring.consumers) {
          if (problem.student_grad)
            __stcs(reinterpret_cast<uint4*>(student_grad + share.begin) + i, zero);
          if (problem.teacher_grad)
            __stcs(reinterpret_cast<uint4*>(teacher_grad + share.begin) + i, zero);
        }
        if (has_edge && problem.student_grad)
          student_grad[edge] = narrow<T>(0.f);
        if (has_edge && problem.teacher_grad)
          teacher_grad[edge] = narrow<T>(0.f);
        if (rank == 0 && thread == ring.consumers - 1)
          leave_loss(problem, row, Terms<float>{0, 0}, total);
        continue;
      }

      // loaded ahead of their use, so not widened yet, which would wait for them
      T student_end = T(), teacher_end = T(), label_logit = T();
      if (has_edge) {
        student_end = student_row[edge];
        teacher_end = teacher_row[edge];
      }
      const bool has_loss = rank == 0 && thread == ring.consumers - 1;
      if (has_loss && problem.task && label.valid)
        label_logit = student_row[label.value];

      Sums<float> sums = {student_reference, teacher_reference, 0, 0, 0, 0, 0, 0};
      int kept_slot = 0; // the first
      for (int index = 0; index < chunks; ++index) {
        wait(full + 8 * cursor.slot, cursor.phase);
        const int count = min(ring.chunk, share.count - index * ring.chunk);
        for (int i = thread; i < count; i += ring.consumers) {
          float student[kSize], teacher[kSize];
          unpack(vector_at(cursor.slot, 0, i), student, T());
          if constexpr (kSides == 2)
            unpack(vector_at(cursor.slot, 1, i), teacher, T());
          add_plainly<kDivergence>(problem, sums, student, teacher);
        }
        if (index < chunks - kept)
          free_slot(cursor.slot);
        else if (index == chunks - kept)
          kept_slot = cursor.slot;
        cursor.advance(ring.slots);
      }
      float student_edge[1], teacher_edge[1];
      if (has_edge) {
        student_edge[0] = widen(student_end);
        teacher_edge[0] = widen(teacher_end);
        add_plainly<kDivergence>(problem, sums, student_edge, teacher_edge);
      }
      const Sums<float> none = {student_reference, teacher_reference, 0, 0, 0, 0, 0, 0};
      sums = over_lanes(exchange(over_lanes(sums), none, [](Sums<float> a, const Sums<float>& b) {
        a.student += b.student;
        a.teacher += b.teacher;
        a.task += b.task;
        a.gap += b.gap;
        a.shifted += b.shifted;
        return a;
      }));

      const auto ordinary = [](float sum) { return sum > 0x1p-30f && sum < 0x1p30f; }; // nor is one over it too small
      const bool plain = ordinary(sums.student) && (kSides == 1 || ordinary(sums.teacher)) && sums.task > 0x1p-60f &&
          sums.task < 0x1p60f && fabsf(sums.gap) < 0x1p60f && fabsf(sums.shifted) < 0x1p100f;
      RowShare<float> whole;
      if (!plain) { // an infinity, a NaN, or logits far apart or too large to scale first and shift after
        const int begin = rank == 0 ? 0 : share.begin;
        const int end = rank == blocks - 1 ? problem.classes : share.begin + share.count * kSize;
        whole = share_of(problem, row, begin, end, thread, ring.consumers);
        const auto join = [&](const Sums<float>& a, const Sums<float>& b) {
          return together(a, b, problem.scale, problem.temperature, kDivergence);
        };
        constexpr float kLowest = std::numeric_limits<float>::lowest();
        sums.student_reference = sums.teacher_reference = kLowest;
#pragma unroll 1
        for (int pass = 0; pass < 2; ++pass) { // first for the references
          sums = careful_sums(problem, whole, sums.student_reference, sums.teacher_reference);
          sums = lanes_together<kWarp>(sums, problem.scale, problem.temperature, kDivergence);
          sums = exchange(sums, sums_of_nothing(kLowest), join);
          sums = lanes_together<kWarp>(sums, problem.scale, problem.temperature, kDivergence);
        }
      }
      const auto next = [&](float& reference, float sum, float largest) {
        const float better = plain ? reference + log2_of(sum) : largest * problem.scale;
        reference = usable(better) ? better : reference;
      };
      next(student_reference, sums.student, sums.student_reference);
      if constexpr (kSides == 2)
        next(teacher_reference, sums.teacher, sums.teacher_reference);
      if (has_loss) {
        const float logit = widen(label_logit);
        const float label_shifted = plain ? fmaf(logit, problem.scale, -sums.student_reference)
                                          : (logit - sums.student_reference) * problem.scale;
        const Terms<float> terms = terms_of(problem, sums, label_shifted, kDivergence);
        leave_loss(problem, row, label.valid ? terms : unknown_terms<float>(), total);
      }

      if (gradients) {
        const float counts_for = label.valid ? per_row : not_a_number<float>();
        const Coefficients<float> coefficients = coefficients_of(problem, sums, counts_for, kDivergence);
        if (!plain)
          careful_gradients(problem, whole, sums, coefficients, label.value);
        for (int step = 0; step < chunks; ++step) {
          const bool was_kept = step < kept;
          const int index = was_kept ? chunks - kept + step : step - kept;
          const int slot = was_kept ? kept_slot : cursor.slot;
          if (was_kept) {
            kept_slot = slot + 1 == ring.slots ? 0 : slot + 1;
          } else {
            wait(full + 8 * slot, cursor.phase);
            cursor.advance(ring.slots);
          }
          const int count = plain ? min(ring.chunk, share.count - index * ring.chunk) : 0;
          for (int i = thread; i < count; i += ring.consumers) {
            float student[kSize], teacher[kSize];
            unpack(vector_at(slot, 0, i), student, T());
            if constexpr (kSides == 2)
              unpack(vector_at(slot, 1, i), teacher, T());
            gradients_plainly<kDivergence>(problem, sums, coefficients, student, teacher);
            const int vector = index * ring.chunk + i;
            const unsigned beside = static_cast<unsigned>(label.value - share.begin - vector * kSize);
            if (problem.student_grad) {
              if (beside < kSize) {
#pragma unroll
                for (int k = 0; k < kSize; ++k)
                  student[k] -= k == beside ? coefficients.at_label : 0;
              }
              __stcs(reinterpret_cast<uint4*>(student_grad + share.begin) + vector, pack(student, T()));
            }
            if (problem.teacher_grad)
              __stcs(reinterpret_cast<uint4*>(teacher_grad + share.begin) + vector, pack(teacher, T()));
          }
          free_slot(slot);
        }
        if (has_edge && plain) {
          gradients_plainly<kDivergence>(problem, sums, coefficients, student_edge, teacher_edge);
          if (problem.student_grad)
            student_grad[edge] = narrow<T>(student_edge[0] - (edge == label.value ? coefficients.at_label : 0));
          if (problem.teacher_grad)
            teacher_grad[edge] = narrow<T>(teacher_edge[0]);
        }
      }
    }
    if (!problem.losses && rank == 0 && thread == ring.consumers - 1)
      leave_total(problem, total, divisor(), cluster, clusters);
    __syncwarp();
  }
  sync_cluster(); // no block may leave while another writes into its memory
#endif
}

// Before and after -------------------------------------------------------------------------------------------------

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

// Launches ---------------------------------------------------------------------------------------------------------

constexpr int64_t kOneBlock = 49152; // up to as many logits a side for each block, one cluster needs no second launch
constexpr int64_t kCountedByAll = 4096; // labels that every block counts for itself
constexpr int kCountBlocks = 128;

// What is asked of a device once.
struct Device {
  int index, multiprocessors, block_memory, memory; // bytes of shared memory, of a block and of a multiprocessor
  bool streams; // has clusters and bulk copies, and runs code that uses them

  explicit Device(int index)
      : index(index),
        multiprocessors(attribute(cudaDevAttrMultiProcessorCount)),
        block_memory(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        memory(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) {
    cudaFuncAttributes kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&kernel, stream_rows<float, Divergence::kNone>));
    streams = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && kernel.ptxVersion >= 90;
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }

  static const Device& at(int index) {
    static std::mutex mutex;
    static std::map<int, Device> devices;
    const std::lock_guard<std::mutex> lock(mutex);
    return devices.try_emplace(index, index).first->second;
  }
};

// A contiguous tensor on a CUDA device; torch::stable::new_empty takes several times as long.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type, int device) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1))
    strides[i] = stride;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.size(), shape.data(), strides.data(), code, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// How a launch goes, and what its blocks leave behind.
struct Launch {
  cudaStream_t stream;
  const Device& device;
  std::optional<Tensor> scratch = std::nullopt; // what a problem points to while its kernels are launched

  // Room for what so many blocks leave of a sum, unless there is one block.
  template <typename A>
  void expect(Problem<A>& problem, int64_t blocks) {
    if (problem.losses || blocks == 1)
      return;
    const int64_t size = blocks + 1;
    scratch = empty({&size, 1}, ScalarType::Double, device.index);
    problem.totals = static_cast<double*>(scratch->mutable_data_ptr());
  }
};

int tuned(const char* name, int value) {
#ifdef FASTDISTILL_TUNE
  if (const char* chosen = std::getenv(name))
    return std::atoi(chosen);
#endif
  return value;
}

// A launch of clusters; attribute must outlive the result.
cudaLaunchConfig_t config_of(const Launch& launch, int blocks, int threads, int cluster, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.device.streams ? 1 : 0;
  return config;
}

template <typename A, int kLanes, int kSize, int kBlock>
int launch_few(Problem<A>& problem, Launch& launch) {
  const int64_t needed = (problem.rows * kLanes + kBlock - 1) / kBlock;
  int cluster = 1;
  while (!problem.losses && launch.device.streams && cluster < kMaxCluster && cluster < needed)
    cluster *= 2;
  const bool one = !problem.losses && problem.rows * problem.classes <= kOneBlock * cluster;
  const int64_t most = launch.device.multiprocessors * (2048 / kBlock);
  const int blocks = one ? cluster : std::min<int64_t>(needed, most);
  if (!one)
    launch.expect(problem, blocks);
  cudaLaunchAttribute attribute;
  const auto config = config_of(launch, blocks, kBlock, one ? cluster : 1, attribute);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, few_classes<A, kLanes, kSize, kBlock>, problem));
  return blocks;
}

template <typename A>
int launch_any(Problem<A>& problem, Launch& launch) {
  const int64_t blocks = std::min<int64_t>(problem.rows, launch.device.multiprocessors * 8);
  launch.expect(problem, blocks);
  any_rows<A><<<blocks, kThreads, 0, launch.stream>>>(problem);
  return blocks;
}

struct StreamPlan {
  Ring ring;
  int cluster, memory; // blocks that share a row; bytes of a block
};

// Rings for rows from kilobytes to megabytes. Of short rows several are under way on a multiprocessor, in blocks of
// their own, so that one's exchange of sums hides behind others' work. What of a row its blocks do not hold is little
// enough for L2 to keep.
StreamPlan plan_stream(const Device& device, int64_t row_bytes, int sides) {
  constexpr int kReserved = 1024; // bytes of a block's shared memory that are the system's
  constexpr int64_t kBlockShare = 348160; // bytes of a row that are one block's
  StreamPlan plan;
  const int at_once = tuned("KD_AT_ONCE", row_bytes <= 40960 ? 4 : row_bytes <= 163840 ? 2 : 1);
  plan.cluster = 1;
  while (plan.cluster < kMaxCluster && row_bytes > kBlockShare * plan.cluster)
    plan.cluster *= 2;
  plan.cluster = tuned("KD_CLUSTER", plan.cluster);
  Ring& ring = plan.ring;
  ring.consumers = tuned("KD_CONSUMERS", (kMaxStreamThreads / at_once / kWarp - 1) * kWarp); // and the producer's warp
  ring.chunk = tuned("KD_CHUNK", ring.consumers * (at_once == 1 ? 1 : 2));
  const int exchanged = 2 * (ring.consumers / kWarp) * plan.cluster * sizeof(Sums<float>);
  const int barriers = 64, slot = ring.chunk * 16 * sides + 16; // each slot has two barriers
  const int available = std::min(device.memory / at_once - kReserved, device.block_memory) - exchanged - barriers;
  ring.slots = tuned("KD_SLOTS", available / slot);
  ring.keep = std::max(ring.slots - tuned("KD_SPARE", std::max(ring.slots / 8, 2)), 1);
  plan.memory = ring.slots * slot + exchanged + barriers;
  return plan;
}

template <typename T, Divergence kDivergence>
int launch_stream(Problem<float>& problem, Launch& launch) {
  const auto kernel = stream_rows<T, kDivergence>;
  constexpr int kSides = kDivergence == Divergence::kNone ? 1 : 2;
  const StreamPlan plan = plan_stream(launch.device, int64_t{problem.classes} * sizeof(T) * kSides, kSides);
  cudaLaunchAttribute attribute;
  auto config = config_of(launch, plan.cluster, plan.ring.consumers + kWarp, plan.cluster, attribute);
  config.dynamicSmemBytes = plan.memory;

  int clusters = 0; // that a device holds at once
  {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int, int>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [found, is_new] =
        known.try_emplace({launch.device.index, plan.cluster, plan.ring.consumers, plan.memory}, 0);
    if (is_new) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.device.block_memory));
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found->second, kernel, &config));
    }
    clusters = found->second;
  }
  STD_TORCH_CHECK(clusters > 0, "no multiprocessor holds a block of ", plan.memory, " bytes of shared memory");
  clusters = std::min<int64_t>(clusters, problem.rows);
  launch.expect(problem, clusters);
  config.gridDim = clusters * plan.cluster;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, problem, plan.ring));
  return clusters;
}

template <typename T>
int launch_stream_of(Problem<float>& problem, Launch& launch) {
  switch (problem.divergence) {
    case Divergence::kForwardKl:
      return launch_stream<T, Divergence::kForwardKl>(problem, launch);
    case Divergence::kSoftCe:
      return launch_stream<T, Divergence::kSoftCe>(problem, launch);
    case Divergence::kReverseKl:
      return launch_stream<T, Divergence::kReverseKl>(problem, launch);
    default:
      return launch_stream<T, Divergence::kNone>(problem, launch);
  }
}

// Where all rows begin as far from a multiple of 16 bytes as their gradients' rows do.
bool can_stream(const Problem<float>& problem, const Device& device) {
  const int size = problem.student_type == Type::kFloat ? 4 : 8;
  const auto same = [&](int64_t stride) { return (stride - problem.classes) % size == 0; };
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return device.streams && problem.student_type == problem.teacher_type && same(problem.student_stride) &&
      same(problem.teacher_stride) && aligned(problem.student) && aligned(problem.teacher) &&
      aligned(problem.student_grad) && aligned(problem.teacher_grad);
}

// The number of blocks, or clusters of blocks, that leave a share of a sum.
template <typename A>
int launch_rows(Problem<A>& problem, Launch& launch) {
  constexpr int kBlock = sizeof(A) == 4 ? 512 : 256;
  if (problem.classes <= 4)
    return launch_few<A, 1, 4, kBlock>(problem, launch);
  if (problem.classes <= 32)
    return launch_few<A, 4, 8, kBlock>(problem, launch);
  if (problem.classes <= 256)
    return launch_few<A, kWarp, 8, kBlock>(problem, launch);
  constexpr int kSize = sizeof(A) == 4 ? 32 : 16;
  if (problem.classes <= kWarp * kSize)
    return launch_few<A, kWarp, kSize, 256>(problem, launch);
  if constexpr (std::is_same_v<A, float>) {
    if (can_stream(problem, launch.device)) {
      if (problem.student_type == Type::kBFloat16)
        return launch_stream_of<__nv_bfloat16>(problem, launch);
      if (problem.student_type == Type::kHalf)
        return launch_stream_of<__half>(problem, launch);
      return launch_stream_of<float>(problem, launch);
    }
  }
  return launch_any(problem, launch);
}

// The op -----------------------------------------------------------------------------------------------------------

// Elements from a row to the next, where all rows are evenly spaced and a row's elements are neighbours.
std::optional<int64_t> row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1)
    return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0; // the stride that would go on as the dimensions after it do
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (x.size(dim) == 1)
      continue;
    if (stride && x.stride(dim) != next)
      return std::nullopt;
    if (!stride)
      stride = x.stride(dim);
    next = x.stride(dim) * x.size(dim);
  }
  return stride ? stride : x.size(last);
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      STD_TORCH_CHECK(false, "kd_ce_loss has no kernel for ", torch::headeronly::toString(x.scalar_type()));
  }
}

int label_bytes_of(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      return 8;
    case ScalarType::Int:
      return 4;
    case ScalarType::Short:
      return 2;
    case ScalarType::Char:
    case ScalarType::Byte:
      return 1;
    default:
      STD_TORCH_CHECK(false, "labels has dtype ", torch::headeronly::toString(labels.scalar_type()), "; expected integers");
  }
}

Divergence divergence_of(const std::string& name) {
  if (name == "forward_kl")
    return Divergence::kForwardKl;
  if (name == "soft_ce")
    return Divergence::kSoftCe;
  STD_TORCH_CHECK(name == "reverse_kl", "divergence is '", name, "'; expected forward_kl, soft_ce or reverse_kl");
  return Divergence::kReverseKl;
}

struct Options {
  double temperature, factor, kd_weight, ce_weight, label_smoothing;
  Divergence divergence;
  int64_t ignore_index;
  bool mean, reduced, return_terms;
};

template <typename A>
void run(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels, const Options& options,
    const Tensor& loss, const Tensor& student_grad, const Tensor& teacher_grad) {
  constexpr double kLog2E = 1.44269504088896340736;
  constexpr int kMaxPower = 16; // the largest temperature for which exp(z) is taken as a power of exp(z / temperature)
  const bool none = options.divergence == Divergence::kNone;
  const int64_t classes = student.size(-1);
  STD_TORCH_CHECK(classes <= std::numeric_limits<int>::max() / 2, "logits have ", classes, " classes; that is too many");
  const auto pointer = [](const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; };
  Problem<A> problem = {};
  problem.student = student.const_data_ptr();
  problem.teacher = none ? problem.student : teacher.const_data_ptr();
  problem.labels = labels ? labels->const_data_ptr() : nullptr;
  A* const losses = static_cast<A*>(loss.mutable_data_ptr()); // the terms' behind it
  (options.reduced ? problem.loss : problem.losses) = losses;
  problem.student_grad = pointer(student_grad);
  problem.teacher_grad = pointer(teacher_grad);
  problem.rows = student.numel() / classes;
  problem.student_stride = *row_stride(student);
  problem.teacher_stride = none ? problem.student_stride : *row_stride(teacher);
  problem.ignore_index = options.ignore_index;
  problem.classes = static_cast<int>(classes);
  problem.label_bytes = labels ? label_bytes_of(*labels) : 0;
  problem.student_type = type_of(student);
  problem.teacher_type = type_of(teacher);
  problem.divergence = options.divergence;
  problem.unsigned_labels = labels && labels->scalar_type() == ScalarType::Byte;
  problem.task = labels && options.ce_weight != 0;
  problem.smooth = problem.task && options.label_smoothing != 0;
  problem.mean = options.mean;
  const double temperature = none ? 1 : options.temperature;
  problem.power = 1;
  if (problem.task && temperature != 1) {
    const bool as_good = problem.student_type == Type::kBFloat16 || problem.student_type == Type::kHalf;
    problem.power = as_good && temperature <= kMaxPower && temperature == std::floor(temperature) ? temperature : 0;
  }
  problem.temperature = static_cast<A>(temperature);
  problem.scale = static_cast<A>(kLog2E / temperature);
  problem.factor = static_cast<A>(options.factor);
  problem.kd_weight = static_cast<A>(none ? 0 : options.kd_weight);
  problem.soft_weight = static_cast<A>(none ? 0 : options.kd_weight * options.factor / temperature);
  problem.ce_weight = static_cast<A>(options.ce_weight);
  problem.label_smoothing = static_cast<A>(options.label_smoothing);

  const auto device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Launch launch{static_cast<cudaStream_t>(stream), Device::at(device)};
  std::optional<Tensor> counts;
  if (problem.mean && labels && problem.rows > kCountedByAll) {
    problem.count_blocks = std::min<int64_t>((problem.rows + kThreads - 1) / kThreads, kCountBlocks);
    const int64_t size = problem.count_blocks;
    counts = empty({&size, 1}, ScalarType::Int, device);
    int* const to = static_cast<int*>(counts->mutable_data_ptr());
    count_labels<<<problem.count_blocks, kThreads, 0, launch.stream>>>(problem, to);
    problem.counts = to;
  }
  std::optional<Tensor> row_terms;
  if (options.return_terms && options.reduced) {
    const int64_t size = 2 * problem.rows;
    row_terms = empty({&size, 1}, loss.scalar_type(), device);
    problem.terms = static_cast<A*>(row_terms->mutable_data_ptr());
  } else if (options.return_terms) {
    problem.terms = losses + problem.rows;
  }
  A* const reduced = problem.loss;
  const int blocks = launch_rows(problem, launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (problem.totals) {
    add_up<<<1, kThreads, 0, launch.stream>>>(problem.totals, blocks, reduced);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (row_terms) {
    add_up_terms<<<2, kThreads, 0, launch.stream>>>(problem, reduced + 1);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor, Tensor> kd_ce_loss(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    const std::optional<Tensor>& labels,
    double temperature,
    double kd_weight,
    double ce_weight,
    const std::string& divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    double label_smoothing,
    const std::string& reduction,
    bool student_grad,
    bool teacher_grad,
    bool return_terms) {
  const auto evenly_spaced = [](const Tensor& x) { return row_stride(x) ? x : torch::stable::contiguous(x); };
  const Tensor student = evenly_spaced(student_logits), teacher = evenly_spaced(teacher_logits);
  std::optional<Tensor> row_labels = labels;
  if (labels && !labels->is_contiguous())
    row_labels = torch::stable::contiguous(*labels);
  const bool wide = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const auto shape = student_logits.sizes();
  const auto device = student.get_device_index();
  const auto gradient = [&](const Tensor& logits, bool wanted) {
    const int64_t none = 0;
    return wanted ? empty(shape, logits.scalar_type(), device) : empty({&none, 1}, logits.scalar_type(), device);
  };
  const Tensor grad_student = gradient(student, student_grad), grad_teacher = gradient(teacher, teacher_grad);
  const bool reduced = reduction != "none";
  std::vector<int64_t> loss_shape(shape.begin(), reduced ? shape.begin() : shape.end() - 1);
  if (return_terms)
    loss_shape.insert(loss_shape.begin(), 3);
  const Tensor loss = empty(loss_shape, wide ? ScalarType::Double : ScalarType::Float, device);
  if (student.numel() == 0) {
    if (reduced)
      torch::stable::fill_(loss, reduction == "mean" ? std::numeric_limits<double>::quiet_NaN() : 0);
    return {loss, grad_student, grad_teacher};
  }
  const Options options{
      .temperature = temperature,
      .factor = scale_by_temperature ? temperature * temperature : 1,
      .kd_weight = kd_weight,
      .ce_weight = ce_weight,
      .label_smoothing = label_smoothing,
      .divergence = kd_weight == 0 ? Divergence::kNone : divergence_of(divergence),
      .ignore_index = ignore_index,
      .mean = reduction == "mean",
      .reduced = reduced,
      .return_terms = return_terms};
  (wide ? run<double> : run<float>)(student, teacher, row_labels, options, loss, grad_student, grad_teacher);
  return {loss, grad_student, grad_teacher};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("kd_ce_loss", TORCH_BOX(&kd_ce_loss));
}

} // namespace fastdistill
