// kd_ce_loss for long rows on sm_90: streamed through shared memory, so that device memory is read once.
#pragma once

#include "hopper.cuh"
#include "kd_block.cuh"
#include "kd_careful.cuh"
#include "kd_plain.cuh"

#include <cstdint>
#include <limits>

namespace fastdistill {
namespace {

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

} // namespace
} // namespace fastdistill
