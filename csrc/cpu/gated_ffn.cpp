// bias_act_gate and its gradient on CPU: what lies between the two matrix products of a feed-forward block, in one
// sweep. The forward reads h once and writes a once; the backward reads h and the upstream gradient once, writes h's
// gradient once, and sums those of bias and gate on the way. Formulas: fastdistill/ops/bias_act_gate.py.
#include "row.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

enum class Activation { kGelu, kGeluTanh, kRelu, kSilu };

// Of a function: its value and its derivative.
template <typename T>
struct Point {
  Vec<T> value, slope;
};

// 1 / (1 + exp(-x)) and what it lacks to 1, both to their last digits.
template <typename T>
std::pair<Vec<T>, Vec<T>> sigmoid(const Vec<T>& x) {
  using V = Vec<T>;
  const V e = exp_nonpositive(x.abs().neg()), larger = V(1) / (V(1) + e), smaller = e * larger;
  const V negative = x < V(0);
  return {V::blendv(larger, smaller, negative), V::blendv(smaller, larger, negative)};
}

// The standard normal distribution function and its density.
template <typename T>
std::pair<Vec<T>, Vec<T>> normal(const Vec<T>& x) {
  using V = Vec<T>;
  const V e = exp_nonpositive(x * x * V(-0.5));
  const V density = e * V(0.3989422804014327);
  if constexpr (std::is_same_v<T, double>)
    return {V(0.5) * (x * V(-M_SQRT1_2)).erfc(), density};
  // The tail beyond |x| is e * t * p(t), t = 1 / (1 + 0.35 |x|), with p fitted to a relative error of 3e-8: it shares
  // the density's exponential, and on the negative side nothing is subtracted from 1.
  const V t = V(1) / at::vec::fmadd(x.abs(), V(0.35), V(1));
  V p(-0.02915789745748043);
  for (const double coefficient :
       {0.14403097331523895, -0.25583910942077637, 0.15931981801986694, -0.023212432861328125, 0.10555253177881241,
        0.11982128024101257, 0.139863520860672, 0.139621302485466})
    p = at::vec::fmadd(p, t, V(coefficient));
  const V tail = e * (t * p);
  return {V::blendv(V(1) - tail, tail, x < V(0)), density};
}

template <Activation A, typename T>
Point<T> activate(const Vec<T>& z) {
  using V = Vec<T>;
  if constexpr (A == Activation::kRelu) {
    const V off = z <= V(0); // NaN is not
    return {V::blendv(z, V(0), off), V::blendv(V(1), V(0), off)};
  } else if constexpr (A == Activation::kGelu) {
    const auto [below, density] = normal(z);
    return {z * below, at::vec::fmadd(z, density, below)};
  } else if constexpr (A == Activation::kSilu) {
    const auto [share, rest] = sigmoid(z);
    return {z * share, share * at::vec::fmadd(z, rest, V(1))};
  } else { // 0.5 (1 + tanh(u / 2)) = sigmoid(u)
    constexpr double kSlope = 1.5957691216057308, kCubic = 0.044715; // sqrt(8 / pi)
    const V square = z * z;
    const auto [share, rest] = sigmoid(z * V(kSlope) * at::vec::fmadd(square, V(kCubic), V(1)));
    const V inner_slope = V(kSlope) * at::vec::fmadd(square, V(3 * kCubic), V(1));
    return {z * share, at::vec::fmadd(z * inner_slope, share * rest, share)};
  }
}

// A part of one row each.
template <typename T>
struct Forward {
  const T *h, *bias, *gate;
  T* out;
  int64_t size;

  template <Activation A>
  void run() const {
    for_each_vector<T>(0, size, [&](int64_t i, int64_t count) {
      const Vec<T> z = load(h + i, count, T(0)) + load(bias + i, count, T(0));
      (activate<A>(z).value * load(gate + i, count, T(0))).store(out + i, count);
    });
  }
};

template <typename T>
struct Backward {
  const T *h, *bias, *gate, *grad_output;
  T *grad_h, *bias_sum, *gate_sum; // what is added to the sums; null: neither is wanted
  int64_t size;

  template <Activation A>
  void run() const {
    bias_sum ? sweep<A, true>() : sweep<A, false>();
  }

  template <Activation A, bool SUMS>
  void sweep() const {
    for_each_vector<T>(0, size, [&](int64_t i, int64_t count) {
      const Vec<T> z = load(h + i, count, T(0)) + load(bias + i, count, T(0)), up = load(grad_output + i, count, T(0));
      const auto [value, slope] = activate<A>(z);
      const Vec<T> grad = up * load(gate + i, count, T(0)) * slope;
      grad.store(grad_h + i, count);
      if constexpr (SUMS) {
        (load(bias_sum + i, count, T(0)) + grad).store(bias_sum + i, count);
        at::vec::fmadd(up, value, load(gate_sum + i, count, T(0))).store(gate_sum + i, count);
      }
    });
  }
};

template <typename Part>
using Run = void (Part::*)() const;

template <typename Part>
Run<Part> choose(std::string_view activation) {
  if (activation == "gelu")
    return &Part::template run<Activation::kGelu>;
  if (activation == "gelu_tanh")
    return &Part::template run<Activation::kGeluTanh>;
  if (activation == "relu")
    return &Part::template run<Activation::kRelu>;
  TORCH_CHECK_VALUE(
      activation == "silu", "activation is '", activation, "'; expected gelu, gelu_tanh, relu or silu");
  return &Part::template run<Activation::kSilu>;
}

constexpr int64_t kBlock = 1024; // columns at a time, so that everything of a row's part is in the first-level cache
constexpr int64_t kRun = 32; // rows summed one after the other; sums of more are sums of such sums, lest digits be lost

// [..., I] in memory order, as rows in groups that share a gate.
struct Shape {
  Shape(const Tensor& h, const std::optional<Tensor>& gate)
      : width(h.size(-1)),
        groups(gate && gate->dim() == 2 ? gate->size(0) : 1),
        rows(width ? h.numel() / width : 0),
        group_rows(groups ? rows / groups : 0),
        blocks((width + kBlock - 1) / kBlock) {}

  const int64_t width, groups, rows, group_rows, blocks;
};

// What multiplies or is added, in the dtype computed in; `fill` where there is none.
Tensor operand(const std::optional<Tensor>& x, double fill, int64_t width, const Tensor& h) {
  const auto dtype = h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  if (x)
    return x->to(dtype).contiguous();
  return fill == 0 ? at::zeros({width}, h.options().dtype(dtype)) : at::ones({width}, h.options().dtype(dtype));
}

template <typename S, typename T = at::opmath_type<S>>
void forward(
    const Shape& shape, const Tensor& h, const Tensor& biases, const Tensor& gates, Run<Forward<T>> run, const Tensor& out) {
  const S* const in = h.const_data_ptr<S>();
  const T *const bias = biases.const_data_ptr<T>(), *const gate = gates.const_data_ptr<T>();
  S* const target = out.mutable_data_ptr<S>();
  const int64_t grain = row_grain(std::min(shape.width, kBlock));
  at::parallel_for(0, shape.rows * shape.blocks, grain, [&](int64_t begin, int64_t end) {
    T in_buffer[kBlock], out_buffer[kBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / shape.blocks, column = item % shape.blocks * kBlock, at = row * shape.width + column;
      const int64_t size = std::min(kBlock, shape.width - column);
      const Forward<T> part{
          .h = OneRow<T>::read(in + at, 0, 1, size, in_buffer),
          .bias = bias + column,
          .gate = gate + row / shape.group_rows * shape.width + column,
          .out = OneRow<T>::writable(target + at, out_buffer),
          .size = size};
      (part.*run)();
      if constexpr (!std::is_same_v<S, T>)
        convert(out_buffer, target + at, size);
    }
  });
}

Tensor bias_act_gate(
    const Tensor& h, const std::optional<Tensor>& bias, const std::optional<Tensor>& gate, std::string_view activation) {
  const Tensor out = empty_rows_like(h), rows = h.contiguous();
  const Shape shape(h, gate);
  const Tensor biases = operand(bias, 0, shape.width, h), gates = operand(gate, 1, shape.width, h);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "bias_act_gate", [&] {
    const auto run = choose<Forward<at::opmath_type<scalar_t>>>(activation);
    if (h.numel() > 0)
      forward<scalar_t>(shape, rows, biases, gates, run, out);
  });
  return out;
}

// The rows in order, each with those that it is summed with: of one group, and no more than kRun.
struct Runs {
  explicit Runs(const Shape& shape)
      : group_rows(shape.group_rows),
        of_group((group_rows + kRun - 1) / kRun),
        count(shape.groups * of_group),
        of_task(of_group > 1 ? 1 : kRun / std::max<int64_t>(group_rows, 1)), // short ones share a sum for the bias
        tasks(of_task ? (count + of_task - 1) / of_task : 0) {}

  int64_t begin(int64_t run) const {
    return run / of_group * group_rows + run % of_group * kRun;
  }
  int64_t end(int64_t run) const {
    return std::min(begin(run) + kRun, (run / of_group + 1) * group_rows);
  }

  const int64_t group_rows, of_group, count, of_task, tasks;
};

template <typename S, typename T = at::opmath_type<S>>
void backward(
    const Shape& shape,
    const Runs& runs,
    const Tensor& grad_outputs,
    const Tensor& h,
    const Tensor& biases,
    const Tensor& gates,
    Run<Backward<T>> run_part,
    const Tensor& grad,
    T* bias_sums, // [tasks, I] or null
    T* gate_sums) { // [runs, I] or null
  const S *const in = h.const_data_ptr<S>(), *const grad_output = grad_outputs.const_data_ptr<S>();
  const T *const bias = biases.const_data_ptr<T>(), *const gate = gates.const_data_ptr<T>();
  S* const target = grad.mutable_data_ptr<S>();
  const bool sums = bias_sums || gate_sums;
  const int64_t task_rows = std::min(runs.group_rows * runs.of_task, kRun);
  const int64_t grain = row_grain(task_rows * std::min(shape.width, kBlock));
  at::parallel_for(0, runs.tasks * shape.blocks, grain, [&](int64_t begin, int64_t end) {
    T in_buffer[kBlock], grad_output_buffer[kBlock], out_buffer[kBlock], unwanted[kBlock] = {};
    for (int64_t item = begin; item < end; ++item) {
      const int64_t task = item / shape.blocks, column = item % shape.blocks * kBlock;
      const int64_t size = std::min(kBlock, shape.width - column);
      T* const bias_sum = bias_sums ? bias_sums + task * shape.width + column : unwanted;
      std::fill_n(bias_sum, size, T(0));
      for (int64_t run = task * runs.of_task; run < std::min(runs.count, (task + 1) * runs.of_task); ++run) {
        T* const gate_sum = gate_sums ? gate_sums + run * shape.width + column : unwanted;
        std::fill_n(gate_sum, size, T(0));
        for (int64_t row = runs.begin(run); row < runs.end(run); ++row) {
          const int64_t at = row * shape.width + column;
          const Backward<T> part{
              .h = OneRow<T>::read(in + at, 0, 1, size, in_buffer),
              .bias = bias + column,
              .gate = gate + row / shape.group_rows * shape.width + column,
              .grad_output = OneRow<T>::read(grad_output + at, 0, 1, size, grad_output_buffer),
              .grad_h = OneRow<T>::writable(target + at, out_buffer),
              .bias_sum = sums ? bias_sum : nullptr,
              .gate_sum = gate_sum,
              .size = size};
          (part.*run_part)();
          if constexpr (!std::is_same_v<S, T>)
            convert(out_buffer, target + at, size);
        }
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> bias_act_gate_backward(
    const Tensor& grad_output,
    const Tensor& h,
    const std::optional<Tensor>& bias,
    const std::optional<Tensor>& gate,
    std::string_view activation,
    bool want_bias,
    bool want_gate) {
  const Tensor grad = empty_rows_like(h), rows = h.contiguous(), grad_outputs = grad_output.contiguous();
  const Shape shape(h, gate);
  const Runs runs(shape);
  const Tensor biases = operand(bias, 0, shape.width, h), gates = operand(gate, 1, shape.width, h);
  const Tensor bias_sums = at::empty({want_bias ? runs.tasks : 0, shape.width}, biases.options());
  const Tensor gate_sums = at::empty({want_gate ? shape.groups : 0, runs.of_group, shape.width}, biases.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, h.scalar_type(), "bias_act_gate_backward", [&] {
    using T = at::opmath_type<scalar_t>;
    const auto run = choose<Backward<T>>(activation);
    if (h.numel() > 0)
      backward<scalar_t>(
          shape, runs, grad_outputs, rows, biases, gates, run, grad,
          want_bias ? bias_sums.mutable_data_ptr<T>() : nullptr,
          want_gate ? gate_sums.mutable_data_ptr<T>() : nullptr);
  });
  const Tensor none = at::empty({0}, h.options());
  return {
      grad,
      want_bias ? bias_sums.sum(0).to(bias->scalar_type()) : none,
      want_gate ? (runs.of_group == 1 ? gate_sums : gate_sums.sum(1)).view(gate->sizes()).to(gate->scalar_type())
                : at::empty({0}, h.options())};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("bias_act_gate", &bias_act_gate);
  m.impl("bias_act_gate_backward", &bias_act_gate_backward);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
