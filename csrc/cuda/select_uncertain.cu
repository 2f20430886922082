// select_uncertain on CUDA: a radix selection of the last score that is chosen, digit after digit from the highest; then
// the scores up to it are gathered in the order of their rows, and only these are sorted.
#include "uncertainty.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>
#include <cub/device/device_radix_sort.cuh>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kItems = 4; // scores that a thread has under way
constexpr int kTile = kThreads * kItems;
constexpr int kMaxBlocks = 1024;
constexpr int kDigitBits = 11, kBins = 1 << kDigitBits;

// A score's place in the order: an integer that is smaller for a larger score, and 0 for NaN.
template <typename T>
using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;

template <typename T>
__device__ Key<T> key_of(T score) {
  score += 0; // -0 as 0
  if constexpr (std::is_same_v<T, double>)
    return isnan(score) ? 0 : ~static_cast<uint64_t>(__double_as_longlong(score)); // score >= 0: ordered as its bits are
  else
    return isnan(score) ? 0 : ~__float_as_uint(score);
}

// Digits are numbered from the highest; the last may have fewer bits.
template <typename T>
constexpr int kDigits = (8 * sizeof(T) + kDigitBits - 1) / kDigitBits;

template <typename T>
constexpr int bits_below(int digit) {
  return std::max<int>(8 * sizeof(T) - kDigitBits * (digit + 1), 0);
}

// What is known of the last key that is chosen: its leading digits, and how many keys with these are chosen.
template <typename T>
struct Last {
  Key<T> leading;
  uint32_t count;
};

// How many keys of a block's part come before the last one that is chosen, and how many equal it.
struct Tally {
  uint32_t before, equal;
};

template <typename T>
struct Ranking {
  const T* scores;
  int64_t rows, rows_of_block;
  uint32_t count;
  uint32_t* counts; // kBins for every digit: of keys with the last one's leading digits, by their next
  Last<T>* last; // by how many digits are known
  Tally* tallies; // of each block
  Key<T>* keys; // out: those chosen, in the order of their rows,
  int64_t* indices; // and their rows
};

struct Part {
  int64_t begin, end;
};

template <typename T>
__device__ Part part_of_block(const Ranking<T>& ranking) {
  const int64_t begin = blockIdx.x * ranking.rows_of_block;
  return {begin, min(begin + ranking.rows_of_block, ranking.rows)};
}

// The last one chosen by one digit more, of which keys have been counted. All threads have the result.
template <int kKnown, typename T>
__device__ Last<T> last_by(const Ranking<T>& ranking) {
  if constexpr (kKnown == 0) {
    return {0, ranking.count};
  } else {
    using Scan = cub::BlockScan<uint32_t, kThreads>;
    constexpr int kDigit = kKnown - 1, kBits = bits_below<T>(kDigit - 1) - bits_below<T>(kDigit);
    constexpr int kBinsOfThread = kBins / kThreads;
    __shared__ typename Scan::TempStorage storage;
    __shared__ Last<T> found;
    const Last<T> known = kDigit == 0 ? Last<T>{0, ranking.count} : ranking.last[kDigit];
    const uint32_t* const counts = ranking.counts + kDigit * kBins + threadIdx.x * kBinsOfThread;
    uint32_t count[kBinsOfThread], before[kBinsOfThread];
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i)
      count[i] = counts[i];
    Scan(storage).ExclusiveSum(count, before);
#pragma unroll
    for (int i = 0; i < kBinsOfThread; ++i)
      if (before[i] < known.count && known.count - before[i] <= count[i])
        found = {known.leading << kBits | (threadIdx.x * kBinsOfThread + i), known.count - before[i]};
    __syncthreads();
    if (blockIdx.x == 0 && threadIdx.x == 0)
      ranking.last[kKnown] = found;
    return found;
  }
}

// Counts keys with the last one's leading digits by the next digit.
template <int kDigit, typename T>
__global__ void __launch_bounds__(kThreads) count_digit(const Ranking<T> ranking) {
  constexpr int kBelow = bits_below<T>(kDigit), kAbove = bits_below<T>(kDigit - 1);
  __shared__ uint32_t counts[kBins];
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    counts[bin] = 0;
  const Last<T> last = last_by<kDigit>(ranking);
  __syncthreads();
  const Part part = part_of_block(ranking);
  for (int64_t first = part.begin + threadIdx.x; first < part.end; first += kTile) {
    T score[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (first + i * kThreads < part.end)
        score[i] = ranking.scores[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i * kThreads < part.end) {
        const Key<T> key = key_of(score[i]);
        if (kDigit == 0 || key >> kAbove % (8 * sizeof(T)) == last.leading)
          atomicAdd(&counts[key >> kBelow & ((1u << (kAbove - kBelow)) - 1)], 1u);
      }
    }
  }
  __syncthreads();
  for (int bin = threadIdx.x; bin < kBins; bin += kThreads)
    if (counts[bin] > 0)
      atomicAdd(&ranking.counts[kDigit * kBins + bin], counts[bin]);
}

struct Add {
  __device__ Tally operator()(Tally a, Tally b) const {
    return {a.before + b.before, a.equal + b.equal};
  }
};
using Reduce = cub::BlockReduce<Tally, kThreads>;
using Scan = cub::BlockScan<Tally, kThreads>;

template <typename T>
__global__ void __launch_bounds__(kThreads) tally_parts(const Ranking<T> ranking) {
  __shared__ Reduce::TempStorage storage;
  const Key<T> last = last_by<kDigits<T>>(ranking).leading;
  const Part part = part_of_block(ranking);
  Tally tally{0, 0};
  for (int64_t first = part.begin + threadIdx.x; first < part.end; first += kTile) {
    T score[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i)
      if (first + i * kThreads < part.end)
        score[i] = ranking.scores[first + i * kThreads];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i * kThreads < part.end) {
        const Key<T> key = key_of(score[i]);
        tally = Add()(tally, {key < last, key == last});
      }
    }
  }
  tally = Reduce(storage).Reduce(tally, Add());
  if (threadIdx.x == 0)
    ranking.tallies[blockIdx.x] = tally;
}

// Of the keys that equal the last one, those of the first rows are chosen.
template <typename T>
__global__ void __launch_bounds__(kThreads) gather_chosen(const Ranking<T> ranking) {
  __shared__ union {
    Reduce::TempStorage reduce;
    Scan::TempStorage scan;
  } storage;
  __shared__ Tally before_block;
  const Last<T> last = ranking.last[kDigits<T>];
  Tally done{0, 0};
  for (int block = threadIdx.x; block < blockIdx.x; block += kThreads)
    done = Add()(done, ranking.tallies[block]);
  done = Reduce(storage.reduce).Reduce(done, Add());
  if (threadIdx.x == 0)
    before_block = done;
  __syncthreads();
  done = before_block;

  const Part part = part_of_block(ranking);
  for (int64_t tile = part.begin; tile < part.end; tile += kTile) {
    const int64_t first = tile + threadIdx.x * kItems;
    Key<T> key[kItems];
    Tally tally[kItems], all;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool exists = first + i < part.end;
      key[i] = exists ? key_of(ranking.scores[first + i]) : std::numeric_limits<Key<T>>::max();
      tally[i] = {exists && key[i] < last.leading, exists && key[i] == last.leading};
    }
    Tally place[kItems];
    Scan(storage.scan).ExclusiveScan(tally, place, Tally{0, 0}, Add(), all);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      place[i] = Add()(done, place[i]);
      if (tally[i].before || (tally[i].equal && place[i].equal < last.count)) {
        const uint32_t at = place[i].before + min(place[i].equal, last.count);
        ranking.keys[at] = key[i];
        ranking.indices[at] = first + i;
      }
    }
    done = Add()(done, all);
    __syncthreads();
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) gather_all(const Ranking<T> ranking) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row < ranking.rows) {
    ranking.keys[row] = key_of(ranking.scores[row]);
    ranking.indices[row] = row;
  }
}

template <typename T, int kDigit = 0>
void count_digits(const Ranking<T>& ranking, int blocks, cudaStream_t stream) {
  if constexpr (kDigit < kDigits<T>) {
    count_digit<kDigit><<<blocks, kThreads, 0, stream>>>(ranking);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    count_digits<T, kDigit + 1>(ranking, blocks, stream);
  }
}

// Of one block of memory, pieces aligned to what any type here needs.
class Pieces {
 public:
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t begin = size_;
    size_ += (count * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return begin;
  }
  int64_t size() const {
    return size_;
  }

 private:
  int64_t size_ = 0;
};

template <typename T>
void rank(const Tensor& scores, uint32_t count, int64_t* chosen, cudaStream_t stream) {
  const int64_t rows = scores.numel();
  const auto sort = [&](void* memory, size_t& size, const Key<T>* keys, Key<T>* sorted, const int64_t* indices) {
    STD_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(
        memory, size, keys, sorted, indices, chosen, count, 0, static_cast<int>(8 * sizeof(T)), stream));
  };
  size_t sort_size = 0;
  sort(nullptr, sort_size, nullptr, nullptr, nullptr);

  Pieces pieces;
  const int64_t counts = pieces.add<uint32_t>(kDigits<T> * kBins), last = pieces.add<Last<T>>(kDigits<T> + 1),
                tallies = pieces.add<Tally>(kMaxBlocks), keys = pieces.add<Key<T>>(count),
                sorted = pieces.add<Key<T>>(count), indices = pieces.add<int64_t>(count),
                spare = pieces.add<char>(sort_size);
  const Tensor memory = torch::stable::new_empty(scores, {pieces.size()}, ScalarType::Byte);
  char* const base = static_cast<char*>(memory.mutable_data_ptr());
  const int64_t tiles = (rows + kTile - 1) / kTile;
  const int64_t tiles_of_block = (tiles + kMaxBlocks - 1) / kMaxBlocks;
  const int blocks = (tiles + tiles_of_block - 1) / tiles_of_block;
  const Ranking<T> ranking{
      .scores = static_cast<const T*>(scores.const_data_ptr()),
      .rows = rows,
      .rows_of_block = tiles_of_block * kTile,
      .count = count,
      .counts = reinterpret_cast<uint32_t*>(base + counts),
      .last = reinterpret_cast<Last<T>*>(base + last),
      .tallies = reinterpret_cast<Tally*>(base + tallies),
      .keys = reinterpret_cast<Key<T>*>(base + keys),
      .indices = reinterpret_cast<int64_t*>(base + indices)};
  if (count == rows) {
    gather_all<<<tiles * kItems, kThreads, 0, stream>>>(ranking);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  } else {
    STD_CUDA_CHECK(cudaMemsetAsync(ranking.counts, 0, kDigits<T> * kBins * sizeof(uint32_t), stream));
    count_digits(ranking, blocks, stream);
    tally_parts<<<blocks, kThreads, 0, stream>>>(ranking);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    gather_chosen<<<blocks, kThreads, 0, stream>>>(ranking);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  sort(base + spare, sort_size, ranking.keys, reinterpret_cast<Key<T>*>(base + sorted), ranking.indices);
}

Tensor select_uncertain(const Tensor& logits, int64_t count, const std::string& kind) {
  const Tensor scores = uncertainty_cuda(logits, kind, false);
  const int64_t rows = scores.numel();
  STD_TORCH_CHECK(rows < int64_t{1} << 32, "logits has ", rows, " rows; expected fewer than 2^32");
  STD_TORCH_CHECK(count > 0 && count <= rows, "count is ", count, "; expected from 1 to ", rows, ", the number of rows");
  const Tensor chosen = torch::stable::new_empty(scores, {count}, ScalarType::Long);

  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  int64_t* const indices = static_cast<int64_t*>(chosen.mutable_data_ptr());
  if (scores.scalar_type() == ScalarType::Double)
    rank<double>(scores, count, indices, stream);
  else
    rank<float>(scores, count, indices, stream);
  return chosen;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("select_uncertain", TORCH_BOX(&select_uncertain));
}

} // namespace fastdistill
