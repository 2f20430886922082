// uncertainty and its gradient on CUDA. Each row is read once, by a team: a thread, a warp or a block. Every thread sums
// over its own part of the row without talking to the others, then the team puts its sums together. Formulas:
// fastdistill/ops/uncertainty.py.
#include "uncertainty.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
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

enum class Kind { kEntropy, kLeastConfidence, kMargin };

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int kPacks = 4; // loads of 16 bytes that a thread has under way
constexpr unsigned kAll = 0xffffffff;
constexpr int kFewClasses = 16, kWarpClasses = 2048; // up to as many, a thread and a warp are a row's team
constexpr int kManyRows = 16384; // from as many on, they keep all multiprocessors busy
constexpr float kLog2E = 1.44269504f, kLn2 = 0.693147181f;

// What is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
__device__ constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// 2^x in one instruction: more precise than 16-bit logits are.
__device__ float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

template <bool kFast, typename A>
__device__ A exp_of(A x) {
  if constexpr (kFast)
    return exp2_of(x * kLog2E);
  else
    return exp(x);
}

// No less than where exp is 0, so that their product is 0 too; -1000 also for NaN.
template <typename A>
__device__ A bounded(A gap) {
  return fmax(gap, A(-1000));
}

// With e = exp(z - reference), these are sums of e and of e * (z - reference) over all logits but one of the largest:
// beside its e those of the others may be too small to be seen. The reference is near the largest, then the largest.
template <typename A>
struct Sums {
  A largest, second, reference;
  A others, weighted;

  __device__ void refer_to(A next) {
    const A gap = bounded(reference - next), scale = exp(gap);
    weighted = scale * (weighted + gap * others);
    others *= scale;
    reference = next;
  }
};

template <typename A>
__device__ Sums<A> of_nothing() {
  return {-infinity<A>(), -infinity<A>(), -infinity<A>(), A(0), A(0)};
}

template <Kind KIND, bool kFast, int kCount, typename A>
__device__ void add(Sums<A>& sums, const A (&logits)[kCount]) {
  A added[kCount]; // of the largest so far and the next logit, the smaller: a NaN is
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    added[i] = logits[i] > sums.largest ? sums.largest : logits[i];
    sums.largest = fmax(sums.largest, logits[i]);
  }
  if (!(sums.largest - sums.reference <= A(4))) // as it is at first
    sums.refer_to(fmax(sums.largest, std::numeric_limits<A>::lowest()));
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const A gap = added[i] - sums.reference, e = exp_of<kFast>(gap);
    sums.others += e;
    if constexpr (KIND == Kind::kEntropy)
      sums.weighted += e * bounded(gap);
    if constexpr (KIND == Kind::kMargin)
      sums.second = fmax(sums.second, added[i]);
  }
}

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// More logits of a row than a Pack has: packs from where the row is aligned to that, and its ends one by one.
template <typename T>
struct Row {
  static constexpr int kSize = Pack<T>::kSize;
  const T* logits;
  int before, packs, ends;

  __device__ Row(const T* logits, int classes)
      : logits(logits),
        before(-(reinterpret_cast<uintptr_t>(logits) / sizeof(T)) % kSize),
        packs((classes - before) / kSize),
        ends(classes - packs * kSize) {}

  __device__ Pack<T> pack(int i) const {
    return reinterpret_cast<const Pack<T>*>(logits + before)[i];
  }
  __device__ int end_class(int i) const {
    return i < before ? i : i + packs * kSize;
  }
  __device__ T end(int i) const {
    return logits[end_class(i)];
  }
};

// The sums over every step-th pack, and one of the row's ends.
template <Kind KIND, typename T>
__device__ Sums<Wide<T>> sum_packs(const Row<T>& row, int first, int step, int end) {
  using A = Wide<T>;
  constexpr int kLoads = sizeof(T) == 2 ? 1 : kPacks; // seldom used for 16-bit logits
  Sums<A> sums = of_nothing<A>();
  for (; first < row.packs; first += step * kLoads) {
    Pack<T> loaded[kLoads];
#pragma unroll
    for (int p = 0; p < kLoads; ++p)
      if (first + p * step < row.packs)
        loaded[p] = row.pack(first + p * step);
#pragma unroll
    for (int p = 0; p < kLoads; ++p) {
      if (first + p * step < row.packs) {
        A chunk[Row<T>::kSize];
#pragma unroll
        for (int i = 0; i < Row<T>::kSize; ++i)
          chunk[i] = static_cast<A>(loaded[p].values[i]);
        add<KIND, sizeof(T) == 2>(sums, chunk);
      }
    }
  }
  if (end < row.ends) {
    const A one[1] = {static_cast<A>(row.end(end))};
    add<KIND, sizeof(T) == 2>(sums, one);
  }
  sums.refer_to(fmax(sums.largest, std::numeric_limits<A>::lowest()));
  return sums;
}

// Two 16-bit logits.
template <typename T>
using Pair = std::conditional_t<std::is_same_v<T, torch::headeronly::Half>, __half2, __nv_bfloat162>;

__device__ float2 widen(__half2 x) {
  return __half22float2(x);
}
__device__ float2 widen(__nv_bfloat162 x) {
  const auto bits = reinterpret_cast<const unsigned&>(x); // __bfloat1622float2 takes three instructions
  return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};
}
template <typename P>
__device__ P both(float x) {
  if constexpr (std::is_same_v<P, __half2>)
    return __float2half2_rn(x);
  else
    return __float2bfloat162_rn(x);
}

// What a thread sums over 16-bit logits in about six instructions each, that the memory is what limits: with
// u = (z - reference) * log2(e), the sums of 2^u and of 2^u * u over all of them, the largest too, which is taken out at
// the end. Only where logits are ordinary: neither NaN nor +inf nor huge.
template <Kind KIND, typename T>
class QuickSums {
  using P = Pair<T>;

 public:
  // First see some pairs, then settle, then add them.
  __device__ void see(P pair) {
    if constexpr (KIND == Kind::kMargin)
      second_ = __hmax2(second_, __hmin2(largest_, pair));
    largest_ = __hmax2_nan(largest_, pair);
  }

  // Brings the reference near the largest; false where logits are not ordinary.
  __device__ bool settle() {
    const float top = largest();
    if (fabsf(top - reference_) <= 8)
      return true;
    reference_ = top == -infinity<float>() ? 0.0f : top;
    if (!(fabsf(reference_) <= 16384))
      return false;
    const float offset = -reference_ * kLog2E;
    const float shift = fminf(offset - offset_, 0); // where it is more there is nothing to scale
    const float scale = exp2_of(shift);
    weighted_ = scale * (weighted_ + shift * all_);
    all_ *= scale;
    offset_ = offset;
    least_ = both<P>(reference_ - fmaxf(256, fabsf(reference_) / 16));
    return true;
  }

  __device__ void add(P pair) {
    if constexpr (KIND == Kind::kEntropy)
      pair = __hmax2(pair, least_); // where 2^u is 0, for its product with u to be that too
    const float2 z = widen(pair);
    add(z.x);
    add(z.y);
  }

  __device__ Sums<float> sums() const {
    const float2 second = widen(second_), largest = widen(largest_);
    Sums<float> sums = of_nothing<float>();
    sums.largest = sums.reference = fmaxf(largest.x, largest.y);
    if constexpr (KIND == Kind::kMargin)
      sums.second = fmaxf(fminf(largest.x, largest.y), fmaxf(second.x, second.y));
    if (sums.largest > -infinity<float>()) {
      const float u = fmaf(sums.largest, kLog2E, offset_), scale = exp2_of(-u);
      sums.others = fmaxf(scale * all_ - 1, 0);
      sums.weighted = fminf(scale * (weighted_ - u * all_) * kLn2, 0);
    }
    return sums;
  }

 private:
  __device__ float largest() const {
    return widen(__hmax2_nan(largest_, __lowhigh2highlow(largest_))).x;
  }

  __device__ void add(float z) {
    const float u = fmaf(z, kLog2E, offset_), e = exp2_of(u);
    all_ += e;
    if constexpr (KIND == Kind::kEntropy)
      weighted_ = fmaf(e, u, weighted_);
  }

  P largest_ = both<P>(-infinity<float>()), second_ = largest_, least_ = both<P>(-256);
  float reference_ = 0, offset_ = 0;
  float all_ = 0, weighted_ = 0;
};

// The same sums as sum_packs; false where a logit is not ordinary.
template <Kind KIND, int kTeam, typename T>
__device__ bool sum_packs_quickly(const Row<T>& row, Sums<float>& sums) {
  using P = Pair<T>;
  constexpr int kPairs = Row<T>::kSize / 2;
  const int member = threadIdx.x % kTeam;
  const bool has_end = member < row.ends;
  P end = both<P>(-infinity<float>());
  if (has_end) {
    const T value = row.end(member);
    end.x = reinterpret_cast<const decltype(end.x)&>(value);
  }
  QuickSums<KIND, T> quick;
  for (int first = member; first < row.packs; first += kTeam * kPacks) {
    Pack<T> loaded[kPacks];
    const P* const pairs[kPacks] = {
        reinterpret_cast<const P*>(loaded), reinterpret_cast<const P*>(loaded + 1),
        reinterpret_cast<const P*>(loaded + 2), reinterpret_cast<const P*>(loaded + 3)};
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (first + p * kTeam < row.packs)
        loaded[p] = row.pack(first + p * kTeam);
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (first + p * kTeam < row.packs)
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          quick.see(pairs[p][i]);
    if (!quick.settle())
      return false;
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (first + p * kTeam < row.packs)
#pragma unroll
        for (int i = 0; i < kPairs; ++i)
          quick.add(pairs[p][i]);
  }
  if (has_end) {
    quick.see(end);
    if (!quick.settle())
      return false;
    quick.add(end);
  }
  sums = quick.sums();
  return true;
}

// A reduction over groups of kLanes lanes; all have the result.
template <int kLanes, typename A, typename Reduce>
__device__ A over_lanes(A x, const Reduce& reduce) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = reduce(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

template <int kLanes, typename A>
__device__ A largest_of(A x) {
  return over_lanes<kLanes>(x, [](A a, A b) { return fmax(a, b); });
}

template <int kLanes, typename A>
__device__ A sum_of(A x) {
  return over_lanes<kLanes>(x, [](A a, A b) { return a + b; });
}

// The sums of kLanes lanes, relative to the largest logit of all, and without it: one of them holds it.
template <Kind KIND, int kLanes, typename A>
__device__ Sums<A> put_together(const Sums<A>& sums, A largest, bool holds) {
  const A gap = bounded(sums.largest - largest), scale = exp(gap);
  Sums<A> all = of_nothing<A>();
  all.largest = all.reference = largest;
  all.others = sum_of<kLanes>(scale * (sums.others + A(holds ? 0 : 1)));
  if constexpr (KIND == Kind::kEntropy)
    all.weighted = sum_of<kLanes>(scale * (sums.weighted + gap * (sums.others + 1)));
  if constexpr (KIND == Kind::kMargin)
    all.second = largest_of<kLanes>(holds ? sums.second : sums.largest);
  return all;
}

// The lowest lane for which it is true.
__device__ int first_lane(bool it) {
  return __ffs(__ballot_sync(kAll, it)) - 1;
}

// The sums of a team, a warp or a block. Where the thread that holds the largest logit says that it should be done with
// care, its warp sums what that thread has summed once more: careful(thread) sums a lane's part of it.
template <Kind KIND, int kTeam, typename A, typename Careful>
__device__ Sums<A> put_team_together(Sums<A> sums, bool with_care, const Careful& careful) {
  constexpr int kWarps = kTeam / kWarp;
  const int warp = threadIdx.x % kTeam / kWarp, lane = threadIdx.x % kWarp;
  A largest = largest_of<kWarp>(sums.largest);
  int holder = 0; // the warp that holds the largest
  if constexpr (kWarps > 1) {
    __shared__ A largest_of_warp[kWarps];
    if (lane == 0)
      largest_of_warp[warp] = largest;
    __syncthreads();
    const A of_warp = largest_of_warp[lane % kWarps];
    largest = largest_of<kWarps>(of_warp);
    holder = first_lane(of_warp == largest);
  }
  bool holds = false;
  if (warp == holder) {
    const int held_by = first_lane(sums.largest == largest);
    holds = lane == held_by;
    if (__shfl_sync(kAll, with_care, held_by)) {
      const Sums<A> part = careful(warp * kWarp + held_by);
      const Sums<A> whole = put_together<KIND, kWarp>(part, largest, lane == first_lane(part.largest == largest));
      if (holds)
        sums = whole;
    }
  }
  sums = put_together<KIND, kWarp>(sums, largest, holds);
  if constexpr (kWarps > 1) {
    __shared__ Sums<A> of_warp[kWarps];
    if (lane == 0)
      of_warp[warp] = sums;
    __syncthreads();
    sums = of_warp[lane % kWarps];
    sums.others = sum_of<kWarps>(sums.others);
    sums.weighted = sum_of<kWarps>(sums.weighted);
    sums.second = largest_of<kWarps>(sums.second);
  }
  return sums;
}

template <Kind KIND, int kTeam, typename T>
__device__ Sums<Wide<T>> sum_row(const T* logits, int classes) {
  using A = Wide<T>;
  if constexpr (kTeam == 1) {
    Sums<A> sums = of_nothing<A>();
    constexpr int kCount = 4;
    for (int first = 0; first < classes; first += kCount) {
      A chunk[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        chunk[i] = first + i < classes ? static_cast<A>(logits[first + i]) : -infinity<A>();
      add<KIND, false>(sums, chunk); // there are few: precise ones cost nothing beside the reading
    }
    sums.refer_to(fmax(sums.largest, std::numeric_limits<A>::lowest()));
    return sums;
  } else {
    const Row<T> row(logits, classes);
    const int member = threadIdx.x % kTeam, lane = threadIdx.x % kWarp;
    Sums<A> sums;
    bool near_certain = false; // of the logits that a thread has, all but one are lost beside it
    if constexpr (sizeof(T) == 2) {
      if (sum_packs_quickly<KIND, kTeam>(row, sums))
        near_certain = sums.others < 1;
      else
        sums = sum_packs<KIND>(row, member, kTeam, member);
    } else {
      sums = sum_packs<KIND>(row, member, kTeam, member);
    }
    return put_team_together<KIND, kTeam>(sums, near_certain, [&](int thread) {
      return sum_packs<KIND>(row, thread + lane * kTeam, kWarp * kTeam, lane == 0 ? thread : row.ends);
    });
  }
}

template <typename T>
struct Problem {
  const T* logits;
  int64_t rows, stride; // elements from a row to the next
  int classes;
  int rows_of_warp; // one after the other, where a warp is a row's team
  Wide<T> at_uniform;
  Wide<T>* values; // where values are wanted,
  const Wide<T>* grad_output; // and where gradients are
  T* grads;
};

template <typename A>
__device__ A total_of(const Sums<A>& sums) {
  return sums.others + 1 + (sums.largest - sums.largest); // NaN if that is infinite
}

template <Kind KIND, typename A>
__device__ A exp_second_of(const Sums<A>& sums) {
  return KIND == Kind::kMargin ? exp(sums.second - sums.largest) : A(0);
}

template <int kTeam>
__device__ int lowest_of_team(int x) {
  if constexpr (kTeam <= kWarp) {
    return over_lanes<kTeam>(x, [](int a, int b) { return min(a, b); });
  } else {
    __shared__ int lowest;
    if (threadIdx.x == 0)
      lowest = x;
    __syncthreads();
    atomicMin(&lowest, x);
    __syncthreads();
    x = lowest;
    __syncthreads();
    return x;
  }
}

// Every class as one of the others first; then the largest, and in the margin's also the second largest: of equals those
// of the lowest classes, which are known once all have been seen.
template <Kind KIND, int kTeam, typename T>
__device__ void write_gradient(
    const Problem<T>& problem, const T* logits, int64_t row, bool exists, const Sums<Wide<T>>& sums) {
  using A = Wide<T>;
  const A total = total_of(sums), exp_second = exp_second_of<KIND>(sums);
  constexpr int kNowhere = std::numeric_limits<int>::max();
  const int classes = exists ? problem.classes : 0, member = threadIdx.x % kTeam;
  const A scale = exists ? problem.grad_output[row] / (problem.at_uniform * total) : A(0), mean = sums.weighted / total;
  T* const grads = problem.grads + row * problem.classes;
  int largest = kNowhere, next = kNowhere, second = kNowhere; // next to the largest, one that equals it
  const auto gradient_of_other = [&](A logit) {
    const A gap = bounded(logit - sums.largest), e = exp_of<sizeof(T) == 2>(gap);
    if constexpr (KIND == Kind::kEntropy)
      return e * (mean - gap) * scale;
    else if constexpr (KIND == Kind::kLeastConfidence)
      return e / total * scale;
    else
      return e * (1 - exp_second) / total * scale;
  };
  const auto gradient = [&](T value, int i) {
    const A logit = static_cast<A>(value);
    if (KIND != Kind::kEntropy && logit == sums.largest) {
      next = min(next, max(largest, i));
      largest = min(largest, i);
    } else if (KIND == Kind::kMargin && logit == sums.second) {
      second = min(second, i);
    }
    return static_cast<T>(gradient_of_other(logit));
  };
  bool done = false;
  if constexpr (kTeam > 1) {
    const Row<T> from(logits, classes), to(grads, classes);
    done = from.before == to.before;
    if (done) {
      for (int p = member; p < from.packs; p += kTeam) {
        Pack<T> pack = from.pack(p);
#pragma unroll
        for (int i = 0; i < Row<T>::kSize; ++i)
          pack.values[i] = gradient(pack.values[i], from.before + p * Row<T>::kSize + i);
        reinterpret_cast<Pack<T>*>(grads + from.before)[p] = pack;
      }
      if (member < from.ends)
        grads[from.end_class(member)] = gradient(from.end(member), from.end_class(member));
    }
  }
  if (!done)
    for (int i = member; i < classes; i += kTeam)
      grads[i] = gradient(logits[i], i);

  if constexpr (KIND != Kind::kEntropy) {
    const int largest_of_row = lowest_of_team<kTeam>(largest);
    if constexpr (KIND == Kind::kMargin)
      second = lowest_of_team<kTeam>(sums.second < sums.largest ? second : largest == largest_of_row ? next : largest);
    __syncthreads(); // the team's writes before these
    if (member == 0) {
      if (largest_of_row < classes)
        grads[largest_of_row] = static_cast<T>((-sums.others - exp_second) / total * scale);
      if (second < classes)
        grads[second] = static_cast<T>(gradient_of_other(sums.second) + exp_second * scale);
    }
  }
}

template <Kind KIND, typename A>
__device__ A value_of(const Sums<A>& sums, A at_uniform) {
  A value;
  if constexpr (KIND == Kind::kEntropy)
    value = log1p(sums.others) - sums.weighted / total_of(sums);
  else
    value = (sums.others + exp_second_of<KIND>(sums)) / total_of(sums);
  return value / at_uniform;
}

// Values, or else gradients.
template <Kind KIND, int kTeam, bool kGradient, typename T>
__global__ void __launch_bounds__(kThreads, kTeam > 1 && sizeof(T) < 8 ? 4 : 2) measure_rows(const Problem<T> problem) {
  const int64_t team = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  const int rows_of_team = kTeam == kWarp ? problem.rows_of_warp : 1, member = threadIdx.x % kTeam;
  Sums<Wide<T>> kept; // of the member-th row
  for (int i = 0; i < rows_of_team; ++i) {
    const int64_t row = team * rows_of_team + i;
    const bool exists = row < problem.rows; // where not, the first row is read, for whole warps to work together
    const T* const logits = problem.logits + (exists ? row : 0) * problem.stride;
    const Sums<Wide<T>> sums = sum_row<KIND, kTeam>(logits, problem.classes);
    if constexpr (kGradient)
      write_gradient<KIND, kTeam>(problem, logits, row, exists, sums);
    else if (member == i)
      kept = sums;
  }
  const int64_t row = team * rows_of_team + member;
  if (!kGradient && member < rows_of_team && row < problem.rows)
    problem.values[row] = value_of<KIND>(kept, problem.at_uniform);
}

template <Kind KIND, int kTeam, typename T>
void launch(const Problem<T>& problem, cudaStream_t stream) {
  const int64_t rows_of_block = kThreads / kTeam * (kTeam == kWarp ? problem.rows_of_warp : 1);
  const int64_t blocks = (problem.rows + rows_of_block - 1) / rows_of_block;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "logits has ", problem.rows, " rows; that is too many");
  const auto kernel = problem.values ? measure_rows<KIND, kTeam, false, T> : measure_rows<KIND, kTeam, true, T>;
  kernel<<<blocks, kThreads, 0, stream>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Kind KIND, typename T>
void run(const Tensor& logits, bool normalize, const Tensor* value, const Tensor* grad_output, const Tensor* grad) {
  const int64_t classes = logits.size(-1), rows = logits.numel() / classes;
  STD_TORCH_CHECK(classes <= std::numeric_limits<int>::max() / 2, "logits has ", classes, " classes; that is too many");
  double at_uniform = 1;
  if (normalize && KIND == Kind::kEntropy)
    at_uniform = std::log(classes);
  else if (normalize && KIND == Kind::kLeastConfidence)
    at_uniform = 1 - 1.0 / classes;
  const Problem<T> problem{
      .logits = static_cast<const T*>(logits.const_data_ptr()),
      .rows = rows,
      .stride = logits.dim() == 2 ? logits.stride(0) : classes,
      .classes = static_cast<int>(classes),
      .rows_of_warp = rows >= kManyRows ? 4 : 1, // their values are then computed at once
      .at_uniform = static_cast<Wide<T>>(at_uniform),
      .values = value ? static_cast<Wide<T>*>(value->mutable_data_ptr()) : nullptr,
      .grad_output = grad_output ? static_cast<const Wide<T>*>(grad_output->const_data_ptr()) : nullptr,
      .grads = grad ? static_cast<T*>(grad->mutable_data_ptr()) : nullptr};
  if (rows == 0)
    return;

  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (classes <= kFewClasses)
    launch<KIND, 1>(problem, stream);
  else if (classes <= kWarpClasses)
    launch<KIND, kWarp>(problem, stream);
  else
    launch<KIND, kThreads>(problem, stream);
}

template <typename T>
void run_kind(const std::string& kind, const Tensor& logits, bool normalize, const Tensor* value,
              const Tensor* grad_output, const Tensor* grad) {
  if (kind == "entropy")
    return run<Kind::kEntropy, T>(logits, normalize, value, grad_output, grad);
  if (kind == "least_confidence")
    return run<Kind::kLeastConfidence, T>(logits, normalize, value, grad_output, grad);
  STD_TORCH_CHECK(kind == "margin", "kind is '", kind, "'; expected entropy, least_confidence or margin");
  run<Kind::kMargin, T>(logits, normalize, value, grad_output, grad);
}

// Values, or else gradients for an upstream gradient of each row.
void run_any(const std::string& kind, const Tensor& logits, bool normalize, const Tensor* value,
             const Tensor* grad_output, const Tensor* grad) {
  const bool evenly_spaced = logits.is_contiguous() || (logits.dim() == 2 && logits.stride(1) == 1);
  const Tensor rows = evenly_spaced ? logits : torch::stable::contiguous(logits);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run_kind<float>(kind, rows, normalize, value, grad_output, grad);
    case ScalarType::Double:
      return run_kind<double>(kind, rows, normalize, value, grad_output, grad);
    case ScalarType::BFloat16:
      return run_kind<torch::headeronly::BFloat16>(kind, rows, normalize, value, grad_output, grad);
    case ScalarType::Half:
      return run_kind<torch::headeronly::Half>(kind, rows, normalize, value, grad_output, grad);
    default:
      STD_TORCH_CHECK(false, "uncertainty has no kernel for ", torch::headeronly::toString(logits.scalar_type()));
  }
}

ScalarType wide(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

} // namespace

Tensor uncertainty_cuda(const Tensor& logits, const std::string& kind, bool normalize) {
  const auto shape = logits.sizes();
  const Tensor value = torch::stable::new_empty(logits, {shape.data(), shape.size() - 1}, wide(logits));
  run_any(kind, logits, normalize, &value, nullptr, nullptr);
  return value;
}

namespace {

Tensor uncertainty_backward(const Tensor& grad_output, const Tensor& logits, const std::string& kind, bool normalize) {
  const Tensor grad_outputs = torch::stable::contiguous(torch::stable::to(grad_output, wide(logits)));
  const Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  run_any(kind, logits, normalize, nullptr, &grad_outputs, &grad);
  return grad;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("uncertainty", TORCH_BOX(&uncertainty_cuda));
  m.impl("uncertainty_backward", TORCH_BOX(&uncertainty_backward));
}

} // namespace fastdistill
