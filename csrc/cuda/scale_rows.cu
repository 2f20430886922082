// scale_rows and scale_rows_ on CUDA: the backward of a loss whose forward already holds its gradient. In place, rows
// whose upstream gradient is 1 are not touched.
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
#include <type_traits>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kBlocks = 132 * 8; // they stride over the rest
constexpr int64_t kPiece = 16384; // elements of a row that a block takes at a time
constexpr int64_t kShortRow = 512; // shorter rows are taken element by element

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename T, typename U>
using Wide = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<U, double>, double, float>;

// A block takes pieces of rows; in a row's stead, all rows that share one upstream gradient.
template <typename T, typename U>
__global__ void __launch_bounds__(kThreads, 1) scale_pieces(
    const T* grad, const U* grad_output, T* out, int64_t pieces, int64_t pieces_of_row, int64_t length,
    int64_t stride) {
  using W = Wide<T, U>;
  for (int64_t piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
    const int64_t row = piece / pieces_of_row, first = (piece - row * pieces_of_row) * kPiece;
    const W factor = static_cast<W>(grad_output[row * stride]);
    if (factor == 1 && grad == out)
      continue;
    const int64_t begin = row * length + first;
    const int size = min(kPiece, length - first);
    const int before = min(size, static_cast<int>(-(reinterpret_cast<uintptr_t>(grad + begin) / sizeof(T)) % Pack<T>::kSize));
    const int packs = reinterpret_cast<uintptr_t>(out + begin + before) % 16 == 0 ? (size - before) / Pack<T>::kSize : 0;
    const auto* from = reinterpret_cast<const Pack<T>*>(grad + begin + before);
    auto* to = reinterpret_cast<Pack<T>*>(out + begin + before);
#pragma unroll 2
    for (int i = threadIdx.x; i < packs; i += kThreads) {
      Pack<T> pack = from[i];
#pragma unroll
      for (int k = 0; k < Pack<T>::kSize; ++k)
        pack.values[k] = static_cast<T>(static_cast<W>(pack.values[k]) * factor);
      to[i] = pack;
    }
    const int rest = size - packs * Pack<T>::kSize;
    for (int i = threadIdx.x; i < rest; i += kThreads) {
      const int64_t at = begin + (i < before ? i : i + packs * Pack<T>::kSize);
      out[at] = static_cast<T>(static_cast<W>(grad[at]) * factor);
    }
  }
}

template <typename T, typename U>
__global__ void __launch_bounds__(kThreads)
    scale_elements(const T* grad, const U* grad_output, T* out, int64_t elements, unsigned classes, int64_t stride) {
  using W = Wide<T, U>;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < elements;
       at += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t row = at <= 0xffffffff ? static_cast<unsigned>(at) / classes : at / classes;
    const W factor = static_cast<W>(grad_output[row * stride]);
    if (factor != 1 || grad != out)
      out[at] = static_cast<T>(static_cast<W>(grad[at]) * factor);
  }
}

// Calls body with a zero of the C++ type.
template <typename Body>
void with_type(const Tensor& x, const Body& body) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return body(float{});
    case ScalarType::Double:
      return body(double{});
    case ScalarType::BFloat16:
      return body(torch::headeronly::BFloat16{});
    case ScalarType::Half:
      return body(torch::headeronly::Half{});
    default:
      STD_TORCH_CHECK(false, "scale_rows has no kernel for ", torch::headeronly::toString(x.scalar_type()));
  }
}

bool is_shared(const Tensor& grad_output) {
  for (int64_t dim = 0; dim < grad_output.dim(); ++dim)
    if (grad_output.stride(dim) != 0)
      return false;
  return true;
}

// grad and out are contiguous, and may be the same.
void scale(const Tensor& grad, const Tensor& grad_output, const Tensor& out) {
  const int64_t elements = grad.numel();
  if (elements == 0)
    return;
  const bool shared = is_shared(grad_output);
  const Tensor factors = shared || grad_output.is_contiguous() ? grad_output : torch::stable::contiguous(grad_output);
  const int64_t classes = grad.size(-1), stride = shared ? 0 : 1, length = shared ? elements : classes;
  const int64_t pieces_of_row = (length + kPiece - 1) / kPiece, pieces = elements / length * pieces_of_row;

  const auto device = grad.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  with_type(grad, [&]<typename T>(T) {
    with_type(factors, [&]<typename U>(U) {
      const T* from = static_cast<const T*>(grad.const_data_ptr());
      const U* by = static_cast<const U*>(factors.const_data_ptr());
      T* to = static_cast<T*>(out.mutable_data_ptr());
      if (length <= kShortRow && !shared) {
        const int blocks = std::min<int64_t>((elements + kThreads - 1) / kThreads, kBlocks);
        scale_elements<<<blocks, kThreads, 0, stream>>>(from, by, to, elements, static_cast<unsigned>(classes), stride);
      } else {
        const int blocks = std::min<int64_t>(pieces, kBlocks);
        scale_pieces<<<blocks, kThreads, 0, stream>>>(from, by, to, pieces, pieces_of_row, length, stride);
      }
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor scale_rows(const Tensor& grad, const Tensor& grad_output) {
  const Tensor contiguous = grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  const Tensor out = torch::stable::empty_like(contiguous);
  scale(contiguous, grad_output, out);
  return out;
}

void scale_rows_(const Tensor& grad, const Tensor& grad_output) {
  if (grad.is_contiguous())
    return scale(grad, grad_output, grad);
  Tensor to = grad;
  const Tensor scaled = torch::stable::contiguous(grad);
  scale(scaled, grad_output, scaled);
  torch::stable::copy_(to, scaled);
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("scale_rows", TORCH_BOX(&scale_rows));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows_));
}

} // namespace fastdistill
