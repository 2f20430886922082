// accumulate_sensitivity_ on CUDA: one launch for hundreds of tensors. Their addresses, gathered by
// csrc/accumulate_sensitivity.cpp, travel in the kernel's parameters, so that a CUDA graph keeps them; a block takes
// one tile of one tensor. Formula: fastdistill/ops/accumulate_sensitivity.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kPacks = 2; // loads that a thread has under way per tensor
constexpr int kTensors = 256; // per launch, a power of two: 9 KB of parameters (CUDA 12.1, compute capability 7.0)

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

template <typename T, typename G, typename W>
void launch(const int64_t* rows, int64_t count, cudaStream_t stream) {
  Work work;
  int tiles = 0;
  for (int64_t row = 0; row < count; ++row, rows += 4) {
    const int i = work.count++;
    work.total[i] = reinterpret_cast<void*>(rows[0]);
    work.grad[i] = reinterpret_cast<const void*>(rows[1]);
    work.weight[i] = reinterpret_cast<const void*>(rows[2]);
    work.size[i] = rows[3];
    work.first_tile[i] = tiles;
    tiles += (work.size[i] + kTile<T> - 1) / kTile<T>;
    if (work.count == kTensors || row == count - 1) {
      add_tiles<T, G, W><<<tiles, kThreads, 0, stream>>>(work);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
      work.count = tiles = 0;
    }
  }
}

// Calls body with a zero of the C++ type.
template <typename Body>
void with_type(int64_t type, const Body& body) {
  switch (static_cast<ScalarType>(type)) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "accumulate_sensitivity_ has no kernel for dtype ", type);
  }
}

template <typename T>
void launch_for(int64_t grad, int64_t weight, const int64_t* rows, int64_t count, cudaStream_t stream) {
  with_type(grad, [&]<typename G>(G) {
    if (weight < 0)
      launch<T, G, NoWeight>(rows, count, stream);
    else
      with_type(weight, [&]<typename W>(W) { launch<T, G, W>(rows, count, stream); });
  });
}

// A row of the table for each tensor: addresses of total, gradient and weight, and the number of elements, not 0. The
// dtypes are ScalarType's numbers, of weights that there are not -1.
void add_products(const Tensor& table, int64_t total, int64_t grad, int64_t weight, int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  const auto* rows = static_cast<const int64_t*>(table.const_data_ptr());
  if (static_cast<ScalarType>(total) == ScalarType::Double)
    launch_for<double>(grad, weight, rows, table.size(0), stream);
  else
    launch_for<float>(grad, weight, rows, table.size(0), stream);
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastdistill, m) {
  m.def("_add_products(Tensor table, int total, int grad, int weight, int device) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CPU, m) { // where the table is
  m.impl("_add_products", TORCH_BOX(&add_products));
}

} // namespace fastdistill
