// uncertainty and its gradient on CUDA. Each row is read once, by a team: 4 threads, a warp or a block. Every thread sums
// over its own part of the row without talking to the others, then the team puts its sums together. Formulas:
// fastdistill/ops/uncertainty.py.
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
constexpr unsigned kAll = 0xffffffff;
constexpr int kFewClasses = 16, kWarpClasses = 1024; // up to as many, 4 threads and a warp are a row's team

// What is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename A>
__device__ constexpr A infinity() {
  return std::numeric_limits<A>::infinity();
}

// exp(x): for 16-bit logits in two instructions, which is more precise than they are.
template <bool kFast, typename A>
__device__ A exp_of(A x) {
  if constexpr (kFast) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
    return result;
  } else {
    return exp(x);
  }
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

// A reduction over groups of kLanes lanes; all have the result.
template <int kLanes, typename A, typename Reduce>
__device__ A over_lanes(A x, const Reduce& reduce) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = reduce(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The sums over all logits of a group of kLanes lanes, relative to the largest of them.
template <int kLanes, typename A>
__device__ Sums<A> together(Sums<A> sums) {
  const auto add = [](A a, A b) { return a + b; };
  const auto larger = [](A a, A b) { return fmax(a, b); };
  sums.refer_to(fmax(sums.largest, std::numeric_limits<A>::lowest()));
  Sums<A> all = of_nothing<A>();
  all.largest = all.reference = over_lanes<kLanes>(sums.largest, larger);
  const int lane = threadIdx.x % kWarp, first = lane / kLanes * kLanes;
  const unsigned equal = __ballot_sync(kAll, sums.largest == all.largest) >> first;
  const bool held = lane - first == __ffs(equal) - 1; // of the lanes' largest, all others count
  const A gap = bounded(sums.largest - all.largest), scale = exp(gap);
  all.others = over_lanes<kLanes>(scale * (sums.others + A(held ? 0 : 1)), add);
  all.weighted = over_lanes<kLanes>(scale * (sums.weighted + gap * (sums.others + 1)), add);
  all.second = over_lanes<kLanes>(held ? sums.second : sums.largest, larger);
  return all;
}

template <int kTeam, typename A>
__device__ Sums<A> together_in_team(const Sums<A>& sums) {
  if constexpr (kTeam <= kWarp) {
    return together<kTeam>(sums);
  } else {
    constexpr int kWarps = kTeam / kWarp;
    __shared__ Sums<A> of_warp[kWarps];
    const Sums<A> warp = together<kWarp>(sums);
    if (threadIdx.x % kWarp == 0)
      of_warp[threadIdx.x / kWarp] = warp;
    __syncthreads();
    return together<kWarps>(of_warp[threadIdx.x % kWarps]);
  }
}

template <typename T>
struct Problem {
  const T* logits;
  int64_t rows, stride; // elements from a row to the next
  int classes;
  Wide<T> at_uniform;
  Wide<T>* values; // where values are wanted,
  const Wide<T>* upstream; // and where gradients are
  T* grads;
};

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// A thread's share of the row of a team of no more than a warp.
template <Kind KIND, int kTeam, typename T>
__device__ void add_share(Sums<Wide<T>>& sums, const T* logits, int classes) {
  constexpr int kCount = kTeam == kWarp ? 8 : 4;
  for (int first = threadIdx.x % kTeam; first < classes; first += kTeam * kCount) {
    Wide<T> chunk[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = first + i * kTeam;
      chunk[i] = at < classes ? static_cast<Wide<T>>(logits[at]) : -infinity<Wide<T>>();
    }
    add<KIND, sizeof(T) == 2>(sums, chunk);
  }
}

// A thread's share of a block's row: 16 bytes at a time from where the row is aligned to that, and its ends one by one.
template <Kind KIND, typename T>
__device__ void add_block_share(Sums<Wide<T>>& sums, const T* logits, int classes) {
  constexpr int kPacks = 4; // loads that a thread has under way
  constexpr int kSize = Pack<T>::kSize;
  const int before = -(reinterpret_cast<uintptr_t>(logits) / sizeof(T)) % kSize; // classes > kSize
  const int packs = (classes - before) / kSize;
  const auto* const aligned = reinterpret_cast<const Pack<T>*>(logits + before);
  for (int first = threadIdx.x; first < packs; first += kThreads * kPacks) {
    Pack<T> loaded[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (first + p * kThreads < packs)
        loaded[p] = aligned[first + p * kThreads];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      if (first + p * kThreads < packs) {
        Wide<T> chunk[kSize];
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          chunk[i] = static_cast<Wide<T>>(loaded[p].values[i]);
        add<KIND, sizeof(T) == 2>(sums, chunk);
      }
    }
  }
  const int i = threadIdx.x;
  if (i < classes - packs * kSize) {
    const Wide<T> one[1] = {static_cast<Wide<T>>(logits[i < before ? i : i + packs * kSize])};
    add<KIND, sizeof(T) == 2>(sums, one);
  }
}

// The lowest class except one whose logit has the value; more than any class if there is none.
template <int kTeam, typename T>
__device__ int find(const T* logits, int classes, Wide<T> value, int except) {
  int lowest = std::numeric_limits<int>::max();
  for (int i = threadIdx.x % kTeam; i < classes; i += kTeam) {
    if (static_cast<Wide<T>>(logits[i]) == value && i != except) {
      lowest = i;
      break;
    }
  }
  if constexpr (kTeam <= kWarp) {
    return over_lanes<kTeam>(lowest, [](int a, int b) { return min(a, b); });
  } else {
    __shared__ int lowest_in_block;
    if (threadIdx.x == 0)
      lowest_in_block = lowest;
    __syncthreads();
    atomicMin(&lowest_in_block, lowest);
    __syncthreads();
    lowest = lowest_in_block;
    __syncthreads();
    return lowest;
  }
}

template <Kind KIND, int kTeam, typename T>
__device__ void write_gradient(
    const Problem<T>& problem, const T* logits, int64_t row, bool exists, const Sums<Wide<T>>& sums, Wide<T> total,
    Wide<T> exp_second) {
  using A = Wide<T>;
  int largest = 0, second = 0;
  if constexpr (KIND != Kind::kEntropy)
    largest = find<kTeam>(logits, problem.classes, sums.largest, -1);
  if constexpr (KIND == Kind::kMargin)
    second = find<kTeam>(logits, problem.classes, sums.second, largest);
  if (!exists)
    return;
  const A scale = problem.upstream[row] / (problem.at_uniform * total);
  for (int i = threadIdx.x % kTeam; i < problem.classes; i += kTeam) {
    const A gap = bounded(static_cast<A>(logits[i]) - sums.largest), e = exp_of<sizeof(T) == 2>(gap);
    A grad;
    if constexpr (KIND == Kind::kEntropy) {
      grad = e * (sums.weighted / total - gap) * scale;
    } else if constexpr (KIND == Kind::kLeastConfidence) {
      grad = (i == largest ? -sums.others : e) / total * scale;
    } else {
      grad = (i == largest ? -sums.others - exp_second : e * (1 - exp_second)) / total * scale;
      if (i == second)
        grad += exp_second * scale;
    }
    problem.grads[row * problem.classes + i] = static_cast<T>(grad);
  }
}

template <Kind KIND, int kTeam, typename T>
__global__ void __launch_bounds__(kThreads, kTeam > kWarp && sizeof(T) < 8 ? 4 : 2) measure_rows(const Problem<T> problem) {
  using A = Wide<T>;
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kTeam;
  const bool exists = row < problem.rows; // where not, the team reads the first row, for whole warps to work together
  const T* const logits = problem.logits + (exists ? row : 0) * problem.stride;
  Sums<A> sums = of_nothing<A>();
  if constexpr (kTeam <= kWarp)
    add_share<KIND, kTeam>(sums, logits, problem.classes);
  else
    add_block_share<KIND>(sums, logits, problem.classes);
  sums = together_in_team<kTeam>(sums);

  const A total = sums.others + 1 + (sums.largest - sums.largest); // NaN if that is infinite
  const A exp_second = KIND == Kind::kMargin ? exp(sums.second - sums.largest) : A(0);
  if (!problem.values) {
    write_gradient<KIND, kTeam>(problem, logits, row, exists, sums, total, exp_second);
  } else if (exists && threadIdx.x % kTeam == 0) {
    A value;
    if constexpr (KIND == Kind::kEntropy)
      value = log1p(sums.others) - sums.weighted / total;
    else
      value = (sums.others + exp_second) / total;
    problem.values[row] = value / problem.at_uniform;
  }
}

template <Kind KIND, int kTeam, typename T>
void launch(const Problem<T>& problem, cudaStream_t stream) {
  const int64_t blocks = (problem.rows * kTeam + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "logits has ", problem.rows, " rows; that is too many");
  measure_rows<KIND, kTeam><<<blocks, kThreads, 0, stream>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Kind KIND, typename T>
void run(const Tensor& logits, bool normalize, const Tensor* value, const Tensor* upstream, const Tensor* grad) {
  const int64_t classes = logits.size(-1);
  STD_TORCH_CHECK(classes <= std::numeric_limits<int>::max() / 2, "logits has ", classes, " classes; that is too many");
  double at_uniform = 1;
  if (normalize && KIND == Kind::kEntropy)
    at_uniform = std::log(classes);
  else if (normalize && KIND == Kind::kLeastConfidence)
    at_uniform = 1 - 1.0 / classes;
  const Problem<T> problem{
      .logits = static_cast<const T*>(logits.const_data_ptr()),
      .rows = logits.numel() / classes,
      .stride = logits.dim() == 2 ? logits.stride(0) : classes,
      .classes = static_cast<int>(classes),
      .at_uniform = static_cast<Wide<T>>(at_uniform),
      .values = value ? static_cast<Wide<T>*>(value->mutable_data_ptr()) : nullptr,
      .upstream = upstream ? static_cast<const Wide<T>*>(upstream->const_data_ptr()) : nullptr,
      .grads = grad ? static_cast<T*>(grad->mutable_data_ptr()) : nullptr};
  if (problem.rows == 0)
    return;

  const auto device = logits.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (classes <= kFewClasses)
    launch<KIND, 4>(problem, stream);
  else if (classes <= kWarpClasses)
    launch<KIND, kWarp>(problem, stream);
  else
    launch<KIND, kThreads>(problem, stream);
}

template <typename T>
void run_kind(const std::string& kind, const Tensor& logits, bool normalize, const Tensor* value, const Tensor* upstream,
              const Tensor* grad) {
  if (kind == "entropy")
    return run<Kind::kEntropy, T>(logits, normalize, value, upstream, grad);
  if (kind == "least_confidence")
    return run<Kind::kLeastConfidence, T>(logits, normalize, value, upstream, grad);
  STD_TORCH_CHECK(kind == "margin", "kind is '", kind, "'; expected entropy, least_confidence or margin");
  run<Kind::kMargin, T>(logits, normalize, value, upstream, grad);
}

// Values, or else gradients for an upstream gradient of each row.
void run_any(const std::string& kind, const Tensor& logits, bool normalize, const Tensor* value, const Tensor* upstream,
             const Tensor* grad) {
  const bool evenly_spaced = logits.is_contiguous() || (logits.dim() == 2 && logits.stride(1) == 1);
  const Tensor rows = evenly_spaced ? logits : torch::stable::contiguous(logits);
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return run_kind<float>(kind, rows, normalize, value, upstream, grad);
    case ScalarType::Double:
      return run_kind<double>(kind, rows, normalize, value, upstream, grad);
    case ScalarType::BFloat16:
      return run_kind<torch::headeronly::BFloat16>(kind, rows, normalize, value, upstream, grad);
    case ScalarType::Half:
      return run_kind<torch::headeronly::Half>(kind, rows, normalize, value, upstream, grad);
    default:
      STD_TORCH_CHECK(false, "uncertainty has no kernel for ", torch::headeronly::toString(logits.scalar_type()));
  }
}

ScalarType wide(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor uncertainty(const Tensor& logits, const std::string& kind, bool normalize) {
  const auto shape = logits.sizes();
  const Tensor value = torch::stable::new_empty(logits, {shape.data(), shape.size() - 1}, wide(logits));
  run_any(kind, logits, normalize, &value, nullptr, nullptr);
  return value;
}

Tensor uncertainty_backward(const Tensor& upstream, const Tensor& logits, const std::string& kind, bool normalize) {
  const Tensor upstreams = torch::stable::contiguous(torch::stable::to(upstream, wide(logits)));
  const Tensor grad = torch::stable::new_empty(logits, logits.sizes());
  run_any(kind, logits, normalize, nullptr, &upstreams, &grad);
  return grad;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("uncertainty", TORCH_BOX(&uncertainty));
  m.impl("uncertainty_backward", TORCH_BOX(&uncertainty_backward));
}

} // namespace fastdistill
