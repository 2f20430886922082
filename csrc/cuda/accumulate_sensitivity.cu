// accumulate_sensitivity_ on CUDA: one launch for hundreds of tensors. Their addresses travel in the kernel's
// parameters; a block takes one tile of one tensor. Formula: fastdistill/ops/accumulate_sensitivity.py.
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
#include <cstdint>
#include <map>
#include <numeric>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kPacks = 4; // loads that a thread has under way per tensor
constexpr int kTensors = 512; // per launch, a power of two: 18 KB of parameters (CUDA 12.1, compute capability 7.0)

struct NoWeight {};

// What a launch works on. Tiles are numbered through all tensors, none of which is empty.
struct Work {
  void* total[kTensors];
  const void* grad[kTensors];
  const void* weight[kTensors];
  int64_t size[kTensors];
  int first_tile[kTensors];
  int count = 0;
};
static_assert(sizeof(Work) <= 32764, "more than a kernel's parameters hold");

template <typename T, int kWidth>
struct alignas(std::min<int>(16, sizeof(T) * kWidth)) Pack {
  T values[kWidth];
};

// Elements per 16 bytes of totals, and per block.
template <typename T>
constexpr int kVector = 16 / sizeof(T);
template <typename T>
constexpr int kTile = kThreads * kPacks * kVector<T>;

template <typename T, typename G, typename W>
__device__ T add(T total, G grad, W weight) {
  constexpr bool kWide = std::is_same_v<T, double> || std::is_same_v<G, double> || std::is_same_v<W, double>;
  using Wide = std::conditional_t<kWide, double, float>;
  Wide product = static_cast<Wide>(grad);
  if constexpr (!std::is_same_v<W, NoWeight>)
    product *= static_cast<Wide>(weight);
  return static_cast<T>(static_cast<Wide>(total) + fabs(product));
}

// The first `packs` times kWidth elements, all threads of the block together: loads first, so that all are under way.
template <int kWidth, typename T, typename G, typename W>
__device__ void add_packs(T* totals, const G* grads, const W* weights, int packs) {
  for (int first = threadIdx.x; first < packs; first += kThreads * kPacks) {
    Pack<T, kWidth> total[kPacks];
    Pack<G, kWidth> grad[kPacks];
    Pack<W, kWidth> weight[kPacks];
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = first + p * kThreads;
      if (i < packs) {
        total[p] = reinterpret_cast<const Pack<T, kWidth>*>(totals)[i];
        grad[p] = reinterpret_cast<const Pack<G, kWidth>*>(grads)[i];
        if constexpr (!std::is_same_v<W, NoWeight>)
          weight[p] = reinterpret_cast<const Pack<W, kWidth>*>(weights)[i];
      }
    }
#pragma unroll
    for (int p = 0; p < kPacks; ++p) {
      const int i = first + p * kThreads;
      if (i < packs) {
#pragma unroll
        for (int k = 0; k < kWidth; ++k)
          total[p].values[k] = add(total[p].values[k], grad[p].values[k], weight[p].values[k]);
        reinterpret_cast<Pack<T, kWidth>*>(totals)[i] = total[p];
      }
    }
  }
}

template <typename T, typename G, typename W>
__global__ void __launch_bounds__(kThreads) add_tiles(const __grid_constant__ Work work) {
  const int tile = blockIdx.x;
  int tensor = 0; // the last one whose first tile is not after this one
  for (int step = kTensors / 2; step > 0; step /= 2)
    if (tensor + step < work.count && work.first_tile[tensor + step] <= tile)
      tensor += step;

  const int64_t begin = static_cast<int64_t>(tile - work.first_tile[tensor]) * kTile<T>;
  const int size = min(static_cast<int64_t>(kTile<T>), work.size[tensor] - begin);
  T* totals = static_cast<T*>(work.total[tensor]) + begin;
  const G* grads = static_cast<const G*>(work.grad[tensor]) + begin;
  const W* weights = static_cast<const W*>(work.weight[tensor]) + begin;

  const auto address = reinterpret_cast<uintptr_t>(totals) | reinterpret_cast<uintptr_t>(grads) |
      (std::is_same_v<W, NoWeight> ? 0 : reinterpret_cast<uintptr_t>(weights));
  const int packs = address % 16 == 0 ? size / kVector<T> : 0, done = packs * kVector<T>;
  add_packs<kVector<T>>(totals, grads, weights, packs);
  add_packs<1>(totals + done, grads + done, weights + done, size - done);
}

// The tensors of one index, their elements in the same order in memory: as they came, or copies.
struct Item {
  Tensor total, grad;
  std::optional<Tensor> weight;
};

bool is_dense(const Tensor& x) {
  std::vector<int64_t> dims(x.dim());
  std::iota(dims.begin(), dims.end(), 0);
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return x.stride(a) < x.stride(b); });
  int64_t expected = 1;
  for (const int64_t dim : dims) {
    if (x.size(dim) != 1 && x.stride(dim) != expected)
      return false;
    expected *= x.size(dim);
  }
  return true;
}

bool same_order(const Tensor& total, const Tensor& other) {
  return (total.is_contiguous() && other.is_contiguous()) ||
      (total.strides().equals(other.strides()) && is_dense(total));
}

template <typename T, typename G, typename W>
void launch(const std::vector<Item>& items, cudaStream_t stream) {
  Work work;
  int tiles = 0;
  for (const Item& item : items) {
    const int i = work.count++;
    work.total[i] = item.total.mutable_data_ptr();
    work.grad[i] = item.grad.const_data_ptr();
    work.weight[i] = item.weight ? item.weight->const_data_ptr() : nullptr;
    work.size[i] = item.total.numel();
    work.first_tile[i] = tiles;
    tiles += (work.size[i] + kTile<T> - 1) / kTile<T>;
    if (work.count == kTensors || &item == &items.back()) {
      add_tiles<T, G, W><<<tiles, kThreads, 0, stream>>>(work);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      work.count = tiles = 0;
    }
  }
}

// Calls body with a zero of the C++ type.
template <typename Body>
auto with_type(ScalarType type, const Body& body) {
  switch (type) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "accumulate_sensitivity_ has no kernel for ", torch::headeronly::toString(type));
  }
}

using Launch = void (*)(const std::vector<Item>&, cudaStream_t);

template <typename T>
Launch launch_for_totals(const Item& item) {
  return with_type(item.grad.scalar_type(), [&]<typename G>(G) -> Launch {
    if (!item.weight)
      return launch<T, G, NoWeight>;
    return with_type(item.weight->scalar_type(), []<typename W>(W) -> Launch { return launch<T, G, W>; });
  });
}

Launch launch_for(const Item& item) {
  const ScalarType type = item.total.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "totals must be float32 or float64");
  return type == ScalarType::Float ? launch_for_totals<float>(item) : launch_for_totals<double>(item);
}

void accumulate_sensitivity_(
    const std::vector<Tensor>& totals,
    const std::vector<Tensor>& grads,
    const std::optional<std::vector<Tensor>>& weights) {
  std::map<Launch, std::vector<Item>> groups; // one for every combination of dtypes: usually there is one
  std::vector<std::pair<Tensor, Tensor>> copied; // totals as they came, and their contiguous copies
  for (size_t i = 0; i < totals.size(); ++i) {
    if (totals[i].numel() == 0)
      continue;
    Item item{totals[i], grads[i], weights ? std::optional((*weights)[i]) : std::nullopt};
    if (!same_order(item.total, item.grad) || (item.weight && !same_order(item.total, *item.weight))) {
      item.total = torch::stable::contiguous(item.total);
      item.grad = torch::stable::contiguous(item.grad);
      if (item.weight)
        item.weight = torch::stable::contiguous(*item.weight);
      if (!totals[i].is_contiguous())
        copied.emplace_back(totals[i], item.total);
    }
    groups[launch_for(item)].push_back(std::move(item));
  }
  if (groups.empty())
    return;

  const auto device = totals[0].get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  for (const auto& [launch, items] : groups)
    launch(items, static_cast<cudaStream_t>(stream));
  for (auto& [total, copy] : copied)
    torch::stable::copy_(total, copy);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("accumulate_sensitivity_", TORCH_BOX(&accumulate_sensitivity_));
}

} // namespace fastdistill
