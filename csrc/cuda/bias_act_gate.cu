// bias_act_gate and its gradient on CUDA. The rows of h stand in groups that share a gate: one group, or one for each
// example. A block has the columns of one warp's vectors and a run of up to kRun rows of one group, over which each of
// its warps goes row by row, and in the backward sums for the gradients of bias and gate; a second launch adds up what
// the runs came to. All sums are in a fixed order. Formulas: fastdistill/ops/bias_act_gate.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarps * kWarp;
template <bool kGradient>
constexpr int kRun = kGradient ? 128 : 64; // rows: a sum's, or as many as a gate is read for

// What is computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// As PyTorch's headers have it, conversions are by name.
__device__ float widen(float x) {
  return x;
}
__device__ double widen(double x) {
  return x;
}
__device__ float widen(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ float widen(__half x) {
  return __half2float(x);
}

template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T values[kWidth];

  // Of 16-bit numbers two are in a register, and are taken apart where they are used.
  __device__ Wide<T> operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && kWidth > 1) {
      const unsigned pair = reinterpret_cast<const unsigned*>(values)[i / 2];
      return __uint_as_float(i % 2 ? pair & 0xffff0000 : pair << 16);
    } else if constexpr (std::is_same_v<T, __half> && kWidth > 1) {
      const __half2 pair = reinterpret_cast<const __half2*>(values)[i / 2];
      return i % 2 ? __high2float(pair) : __low2float(pair);
    } else {
      return widen(values[i]);
    }
  }
};

template <typename T>
__device__ unsigned pair_of(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&pair);
  }
}

// One number, or 16 bytes of them in one store, which nvcc makes four of unless told.
template <typename T, int kWidth>
__device__ void store(T* to, const Wide<T> (&x)[kWidth]) {
  if constexpr (kWidth == 1) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      *to = __float2bfloat16_rn(x[0]);
    else if constexpr (std::is_same_v<T, __half>)
      *to = __float2half_rn(x[0]);
    else
      *to = x[0];
  } else {
    uint4 bits;
    if constexpr (kWidth == 8)
      bits = {pair_of<T>(x[0], x[1]), pair_of<T>(x[2], x[3]), pair_of<T>(x[4], x[5]), pair_of<T>(x[6], x[7])};
    else
      memcpy(&bits, x, sizeof(bits));
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
  }
}

// What is read or written once for many rows: of any dtype.
template <typename Pointer>
struct Vector {
  Pointer data = nullptr; // where there is none
  ScalarType type = ScalarType::Float;
};

template <typename S, typename A, int kWidth>
__device__ void read_as(const void* from, int64_t at, A (&to)[kWidth]) {
  const S* const first = static_cast<const S*>(from) + at;
  if (reinterpret_cast<uintptr_t>(first) % sizeof(Pack<S, kWidth>) == 0) {
    const auto pack = *reinterpret_cast<const Pack<S, kWidth>*>(first);
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      to[k] = pack[k];
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k)
      to[k] = widen(first[k]);
  }
}

template <typename A, int kWidth>
__device__ void read(const Vector<const void*>& x, int64_t at, A (&to)[kWidth]) {
  switch (x.type) {
    case ScalarType::Double:
      return read_as<double>(x.data, at, to);
    case ScalarType::BFloat16:
      return read_as<__nv_bfloat16>(x.data, at, to);
    case ScalarType::Half:
      return read_as<__half>(x.data, at, to);
    default:
      return read_as<float>(x.data, at, to);
  }
}

template <typename A>
__device__ void write(const Vector<void*>& x, int64_t i, A value) {
  switch (x.type) {
    case ScalarType::Double:
      static_cast<double*>(x.data)[i] = value;
      break;
    case ScalarType::BFloat16:
      static_cast<__nv_bfloat16*>(x.data)[i] = __float2bfloat16_rn(value);
      break;
    case ScalarType::Half:
      static_cast<__half*>(x.data)[i] = __float2half_rn(value);
      break;
    default:
      static_cast<float*>(x.data)[i] = value;
  }
}

// exp(scale * x), of 16-bit numbers in two instructions, which is more precise than they are.
template <bool kFast, typename A>
__device__ A exp_of(A x, A scale) {
  if constexpr (kFast) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * (scale * 1.44269504f)));
    return result;
  } else {
    return exp(scale * x);
  }
}

__device__ float reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ double reciprocal(double x) {
  return 1 / x;
}

// Of a function: its value and its derivative. What a caller does not use, the compiler leaves out.
template <typename A>
struct Point {
  A value, slope;
};

// 1 / (1 + exp(-x)) and what it lacks to 1, both to their last digits.
template <bool kFast, typename A>
__device__ void sigmoid(A x, A& share, A& rest) {
  const A e = exp_of<kFast>(fabs(x), A(-1)), larger = reciprocal(1 + e), smaller = e * larger;
  share = x < 0 ? smaller : larger;
  rest = x < 0 ? larger : smaller;
}

// The standard normal distribution function and its density.
template <bool kFast, typename A>
__device__ void normal(A x, A& share, A& density) {
  const A e = exp_of<kFast>(x * x, A(-0.5));
  density = e * A(0.3989422804014327);
  if constexpr (std::is_same_v<A, double>) {
    share = 0.5 * erfc(x * -0.7071067811865476);
  } else { // as in csrc/cpu/gated_ffn.cpp: with the density's exponential, and nothing subtracted from 1 below 0
    const float t = reciprocal(fmaf(fabs(x), 0.35f, 1.0f));
    float p = -0.02915789745748043f;
    p = fmaf(p, t, 0.14403097331523895f);
    p = fmaf(p, t, -0.25583910942077637f);
    p = fmaf(p, t, 0.15931981801986694f);
    p = fmaf(p, t, -0.023212432861328125f);
    p = fmaf(p, t, 0.10555253177881241f);
    p = fmaf(p, t, 0.11982128024101257f);
    p = fmaf(p, t, 0.139863520860672f);
    p = fmaf(p, t, 0.139621302485466f);
    const float tail = e * (t * p);
    share = x < 0 ? tail : 1 - tail;
  }
}

template <Activation ACTIVATION, bool kFast, typename A>
__device__ Point<A> activate(A z) {
  if constexpr (ACTIVATION == Activation::kRelu) {
    return {z <= 0 ? A(0) : z, z <= 0 ? A(0) : A(1)}; // NaN is not
  } else if constexpr (ACTIVATION == Activation::kGelu) {
    A share, density;
    normal<kFast>(z, share, density);
    return {z * share, share + z * density};
  } else if constexpr (ACTIVATION == Activation::kSilu) {
    A share, rest;
    sigmoid<kFast>(z, share, rest);
    return {z * share, share * (1 + z * rest)};
  } else { // 0.5 (1 + tanh(u / 2)) = sigmoid(u)
    constexpr A kSlope = 1.5957691216057308, kCubic = 0.044715; // sqrt(8 / pi)
    const A square = z * z;
    A share, rest;
    sigmoid<kFast>(kSlope * z * (1 + kCubic * square), share, rest);
    return {z * share, share + z * (kSlope * (1 + 3 * kCubic * square)) * (share * rest)};
  }
}

template <typename T>
struct Problem {
  const T *h, *grad_output; // [groups * group_rows, width]; grad_output for the gradient
  T* out; // the value, or the gradient of h
  Vector<const void*> bias, gate; // [width] and [groups, width]
  Vector<void*> bias_sums, gate_sums; // [groups * runs, width] where they are wanted
  int64_t width, group_rows;
  int runs, blocks; // of a group; across the width
};

// Over the warps of a block, of which each has a number for each column, to sums[row, first + column].
template <int kColumns, typename A, int kWidth>
__device__ void add_warps(
    const A (&sum)[kWidth], const Vector<void*>& sums, int64_t row, int64_t first, int64_t width) {
  __shared__ A of_warp[kWarps][kColumns];
  const int lane = threadIdx.x % kWarp, column = threadIdx.x;
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    of_warp[threadIdx.x / kWarp][lane * kWidth + k] = sum[k];
  __syncthreads();
  if (column < kColumns && first + column < width) {
    A total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      total += of_warp[warp][column];
    write(sums, row * width + first + column, total);
  }
}

template <typename T, bool kGradient>
constexpr int kBlocks = sizeof(T) > 4 ? 2 : kGradient ? 3 : 5; // on a multiprocessor, as far as registers go

template <typename T, int kWidth, Activation ACTIVATION, bool kGradient>
__global__ void __launch_bounds__(kThreads, kBlocks<T, kGradient>) sweep(const __grid_constant__ Problem<T> problem) {
  using A = Wide<T>;
  constexpr int kRows = 2; // that a warp has under way
  constexpr int kColumns = kWarp * kWidth; // of a block
  const int64_t width = problem.width;
  const int run = blockIdx.x / problem.blocks, group = run / problem.runs;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x % problem.blocks) * kColumns;
  const int64_t column = first_column + threadIdx.x % kWarp * kWidth;
  const int64_t first_row = static_cast<int64_t>(run % problem.runs) * kRun<kGradient>;
  const int rows = min(static_cast<int64_t>(kRun<kGradient>), problem.group_rows - first_row);
  const bool inside = column < width; // which kWidth divides

  A bias[kWidth] = {}, gate[kWidth], bias_sum[kWidth] = {}, gate_sum[kWidth] = {};
#pragma unroll
  for (int k = 0; k < kWidth; ++k)
    gate[k] = 1;
  if (inside && problem.bias.data)
    read(problem.bias, column, bias);
  if (inside && problem.gate.data)
    read(problem.gate, group * width + column, gate);

  int row = threadIdx.x / kWarp;
  int64_t at = (group * problem.group_rows + first_row + row) * width + column;
  const int64_t step = kWarps * width;
  for (; inside && row < rows; row += kWarps * kRows, at += kRows * step) {
    Pack<T, kWidth> h[kRows], grad_output[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * kWarps < rows) {
        h[r] = *reinterpret_cast<const Pack<T, kWidth>*>(problem.h + at + r * step);
        if constexpr (kGradient)
          grad_output[r] = *reinterpret_cast<const Pack<T, kWidth>*>(problem.grad_output + at + r * step);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row + r * kWarps < rows) {
        A out[kWidth];
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const Point<A> at_z = activate<ACTIVATION, sizeof(T) == 2>(h[r][k] + bias[k]);
          if constexpr (kGradient) {
            const A up = grad_output[r][k];
            out[k] = up * gate[k] * at_z.slope;
            bias_sum[k] += out[k];
            gate_sum[k] += up * at_z.value;
          } else {
            out[k] = at_z.value * gate[k];
          }
        }
        store(problem.out + at + r * step, out);
      }
    }
  }
  if constexpr (kGradient) {
    if (problem.bias_sums.data)
      add_warps<kColumns>(bias_sum, problem.bias_sums, run, first_column, width);
    if (problem.gate_sums.data)
      add_warps<kColumns>(gate_sum, problem.gate_sums, run, first_column, width);
  }
}

// [groups, count, width], to be summed over the count.
template <typename A>
struct Parts {
  const A* parts = nullptr;
  int64_t groups = 0, count = 0;
  Vector<void*> out; // [groups, width]

  // Threads that share a column: many where there is much to add.
  __host__ __device__ int teams() const {
    return count > kWarps ? kWarps : 1;
  }
  __host__ __device__ int64_t blocks(int64_t width) const {
    const int columns = kThreads / teams();
    return (width + columns - 1) / columns;
  }
};

template <typename A>
__global__ void __launch_bounds__(kThreads) add_runs(const Parts<A> bias, const Parts<A> gate, int64_t width) {
  const int64_t of_bias = bias.groups * bias.blocks(width), block = blockIdx.x;
  const Parts<A> x = block < of_bias ? bias : gate;
  const int64_t of_x = block < of_bias ? block : block - of_bias;
  const int columns = kThreads / x.teams();
  const int64_t group = of_x / x.blocks(width), column = of_x % x.blocks(width) * columns + threadIdx.x % columns;
  A total = 0;
  if (column < width) {
#pragma unroll 8
    for (int64_t i = threadIdx.x / columns; i < x.count; i += x.teams())
      total += x.parts[(group * x.count + i) * width + column];
  }
  __shared__ A of_thread[kThreads];
  of_thread[threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.x < columns && column < width) {
    for (int team = 1; team < x.teams(); ++team)
      total += of_thread[team * columns + threadIdx.x];
    write(x.out, group * width + column, total);
  }
}

Activation activation_of(const std::string& name) {
  if (name == "gelu")
    return Activation::kGelu;
  if (name == "gelu_tanh")
    return Activation::kGeluTanh;
  if (name == "relu")
    return Activation::kRelu;
  STD_TORCH_CHECK(name == "silu", "activation is '", name, "'; expected gelu, gelu_tanh, relu or silu");
  return Activation::kSilu;
}

unsigned grid(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "h takes ", blocks, " blocks; that is too many");
  return blocks;
}

template <typename T>
using Kernel = void (*)(Problem<T>);

template <typename T, int kWidth, bool kGradient>
Kernel<T> kernel_of(Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return &sweep<T, kWidth, Activation::kGelu, kGradient>;
    case Activation::kGeluTanh:
      return &sweep<T, kWidth, Activation::kGeluTanh, kGradient>;
    case Activation::kRelu:
      return &sweep<T, kWidth, Activation::kRelu, kGradient>;
    default:
      return &sweep<T, kWidth, Activation::kSilu, kGradient>;
  }
}

// Rows of 16 bytes' multiples are read 16 bytes at a time, others element by element.
template <typename T, bool kGradient>
void launch(Activation activation, Problem<T> problem, int64_t runs, cudaStream_t stream) {
  constexpr int kVector = 16 / sizeof(T);
  const auto addresses = reinterpret_cast<uintptr_t>(problem.h) | reinterpret_cast<uintptr_t>(problem.grad_output) |
      reinterpret_cast<uintptr_t>(problem.out);
  const bool whole = problem.width % kVector == 0 && addresses % 16 == 0;
  const int columns = kWarp * (whole ? kVector : 1);
  problem.blocks = (problem.width + columns - 1) / columns;
  const auto kernel = whole ? kernel_of<T, kVector, kGradient>(activation) : kernel_of<T, 1, kGradient>(activation);
  kernel<<<grid(runs * problem.blocks), kThreads, 0, stream>>>(problem);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Contiguous, on the device of another: torch::stable::new_empty takes three times as long.
Tensor empty(const std::vector<int64_t>& sizes, ScalarType type, const Tensor& like) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (int64_t i = static_cast<int64_t>(sizes.size()) - 2; i >= 0; --i)
    strides[i] = strides[i + 1] * std::max<int64_t>(sizes[i + 1], 1);
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      sizes.size(), sizes.data(), strides.data(), static_cast<int32_t>(type), aoti_torch_device_type_cuda(),
      like.get_device_index(), &handle));
  return Tensor(handle);
}

Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty({sizes.data(), sizes.data() + sizes.size()}, x.scalar_type(), x);
}

Tensor dense(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

std::optional<Tensor> dense(const std::optional<Tensor>& x) {
  return x ? std::optional(dense(*x)) : std::nullopt;
}

Vector<const void*> readable(const std::optional<Tensor>& x) {
  return x ? Vector<const void*>{x->const_data_ptr(), x->scalar_type()} : Vector<const void*>{};
}

Vector<void*> writable(const Tensor& x) {
  return {x.mutable_data_ptr(), x.scalar_type()};
}

struct Gradients {
  Tensor h, bias, gate;
};

// The value, or with an upstream gradient the gradients: of bias and gate where they are wanted.
template <typename T>
Gradients run(
    const Tensor& h,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& gate,
    Activation activation,
    const Tensor* grad_output = nullptr,
    bool want_bias = false,
    bool want_gate = false) {
  using A = Wide<T>;
  constexpr ScalarType kType = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  const int64_t width = h.size(-1), groups = gate && gate->dim() == 2 ? gate->size(0) : 1;
  const int64_t group_rows = width * groups == 0 ? 0 : h.numel() / (width * groups);
  const int64_t run_rows = grad_output ? kRun<true> : kRun<false>;
  const int64_t runs = (group_rows + run_rows - 1) / run_rows, parts = groups * runs;
  STD_TORCH_CHECK(parts <= std::numeric_limits<int>::max(), "h has too many rows");

  Gradients result{new_like(h)};
  if (grad_output) {
    result.bias = want_bias ? new_like(*bias) : empty({0}, h.scalar_type(), h);
    result.gate = want_gate ? new_like(*gate) : empty({0}, h.scalar_type(), h);
  }
  const bool at_once = want_gate && !want_bias && runs == 1; // a run is all that a gate's gradient sums
  const bool summed = (want_bias || want_gate) && !at_once;
  const Tensor sums = summed ? empty({want_bias + want_gate, parts, width}, kType, h) : Tensor();
  A* const numbers = summed ? static_cast<A*>(sums.mutable_data_ptr()) : nullptr;
  A* const bias_sums = want_bias ? numbers : nullptr;
  A* const gate_sums = want_gate && summed ? numbers + want_bias * parts * width : nullptr;

  const auto rows = dense(h);
  const auto biases = dense(bias), gates = dense(gate);
  Problem<T> problem; // filled so, for designated initialisers crash nvcc 13.0 here
  problem.h = static_cast<const T*>(rows.const_data_ptr());
  problem.grad_output = grad_output ? static_cast<const T*>(grad_output->const_data_ptr()) : nullptr;
  problem.out = static_cast<T*>(result.h.mutable_data_ptr());
  problem.bias = readable(biases);
  problem.gate = readable(gates);
  problem.bias_sums = {bias_sums, kType};
  problem.gate_sums = at_once ? writable(result.gate) : Vector<void*>{gate_sums, kType};
  problem.width = width;
  problem.group_rows = group_rows;
  problem.runs = static_cast<int>(runs);

  const auto device = h.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (h.numel() > 0) {
    if (grad_output)
      launch<T, true>(activation, problem, parts, stream);
    else
      launch<T, false>(activation, problem, parts, stream);
  }
  if (summed && width > 0) {
    Parts<A> of_bias, of_gate;
    if (want_bias)
      of_bias = {bias_sums, 1, parts, writable(result.bias)};
    if (want_gate)
      of_gate = {gate_sums, groups, runs, writable(result.gate)};
    const int64_t blocks = of_bias.groups * of_bias.blocks(width) + of_gate.groups * of_gate.blocks(width);
    if (blocks > 0) {
      add_runs<A><<<grid(blocks), kThreads, 0, stream>>>(of_bias, of_gate, width);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    }
  }
  return result;
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
      return body(__nv_bfloat16{});
    case ScalarType::Half:
      return body(__half{});
    default:
      STD_TORCH_CHECK(false, "bias_act_gate has no kernel for ", torch::headeronly::toString(type));
  }
}

Tensor bias_act_gate(
    const Tensor& h,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& gate,
    const std::string& activation) {
  const Activation kind = activation_of(activation);
  return with_type(h.scalar_type(), [&]<typename T>(T) { return run<T>(h, bias, gate, kind).h; });
}

std::tuple<Tensor, Tensor, Tensor> bias_act_gate_backward(
    const Tensor& grad_output,
    const Tensor& h,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& gate,
    const std::string& activation,
    bool want_bias,
    bool want_gate) {
  const Activation kind = activation_of(activation);
  const bool same = grad_output.scalar_type() == h.scalar_type();
  const Tensor grad_outputs = dense(same ? grad_output : torch::stable::to(grad_output, h.scalar_type()));
  Gradients of = with_type(h.scalar_type(), [&]<typename T>(T) {
    return run<T>(h, bias, gate, kind, &grad_outputs, want_bias && bias, want_gate && gate);
  });
  return {std::move(of.h), std::move(of.bias), std::move(of.gate)};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("bias_act_gate", TORCH_BOX(&bias_act_gate));
  m.impl("bias_act_gate_backward", TORCH_BOX(&bias_act_gate_backward));
}

} // namespace fastdistill
