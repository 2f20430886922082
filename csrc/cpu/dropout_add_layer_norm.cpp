// layer_norm(residual + dropout(x)), and its gradients, a row after the other in the cache nearest to the core.
#include "philox.h"
#include "row.h"

#include <ATen/ops/item.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// What dropout multiplies a row's elements by, the same for the same seed and row.
template <typename T>
class Factors {
 public:
  Factors(std::optional<uint64_t> seed, double p, int64_t size) : seed_(seed), p_(p), values_(seed ? padded(size) : 0) {}

  // Of none nothing.
  const T* of(int64_t row) {
    constexpr int64_t lanes = Vec<T>::size();
    if (!seed_)
      return nullptr;
    const uint32_t least = least_kept(p_);
    const T by = T(1 / (1 - p_));
    for (size_t start = 0; start < values_.size(); start += 4 * lanes) {
      const auto drawn = philox<lanes>(*seed_, start, row);
      for (int64_t own = 0; own < 4; ++own)
        for (int64_t lane = 0; lane < lanes; ++lane)
          values_[start + own * lanes + lane] = drawn[own][lane] >= least ? by : T(0);
    }
    return values_.data();
  }

 private:
  static int64_t padded(int64_t size) {
    constexpr int64_t block = 4 * Vec<T>::size();
    return (size + block - 1) / block * block;
  }
  std::optional<uint64_t> seed_;
  double p_;
  std::vector<T> values_;
};

// residual + x times the factors, if there are any.
template <typename T>
void add(const T* x, const T* residual, const T* factors, int64_t size, T* sum) {
  for_each_vector<T>(0, size, [&](int64_t d, int64_t n) {
    const auto a = load(x + d, n, T(0)), b = load(residual + d, n, T(0));
    (factors ? at::vec::fmadd(a, load(factors + d, n, T(0)), b) : a + b).store(sum + d, n);
  });
}

template <typename T, typename Value>
double mean_of(int64_t size, const Value& value) {
  Vec<T> sum(0);
  for_each_vector<T>(0, size, [&](int64_t d, int64_t n) { sum = sum + value(d, n); });
  return OneRow<T>::sum(sum) / static_cast<double>(size);
}

std::optional<uint64_t> number(const Optional& seed) {
  return seed ? std::optional<uint64_t>(seed->item<int64_t>()) : std::nullopt;
}

Tensor as(const Tensor& x, at::ScalarType type) {
  return x.to(type).contiguous();
}

at::ScalarType wide_type(const Tensor& x, const Tensor& residual, const Tensor& weight) {
  const bool is_double = x.scalar_type() == at::kDouble || residual.scalar_type() == at::kDouble ||
      weight.scalar_type() == at::kDouble;
  return is_double ? at::kDouble : at::kFloat;
}

template <typename T>
void forward(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& bias, std::optional<uint64_t> seed,
    double p, double eps, const Tensor& output, const Tensor& mean, const Tensor& rstd) {
  const int64_t size = x.size(1), rows_of_weight = x.numel() / weight.numel();
  const RowReader<OneRow<T>> xs(x), residuals(residual);
  const RowWriter<OneRow<T>> outputs(output);
  const T *weights = weight.const_data_ptr<T>(), *biases = bias.defined() ? bias.const_data_ptr<T>() : nullptr;
  T *means = mean.mutable_data_ptr<T>(), *rstds = rstd.mutable_data_ptr<T>();
  at::parallel_for(0, x.size(0), row_grain(size), [&](int64_t begin, int64_t end) {
    Factors<T> factors(seed, p, size);
    std::vector<T> own_x(size), own_residual(size), h(size), own_output(size);
    const bool is_counted = false;
    for (int64_t r = begin; r < end; ++r) {
      add(xs.read(r, 1, own_x.data()), residuals.read(r, 1, own_residual.data()), factors.of(r), size, h.data());
      const double middle = mean_of<T>(size, [&](int64_t d, int64_t n) { return load(h.data() + d, n, T(0)); });
      const Vec<T> centre{T(middle)};
      const double variance = mean_of<T>(size, [&](int64_t d, int64_t n) {
        const auto off = load(h.data() + d, n, T(middle)) - centre;
        return off * off;
      });
      const double by = 1 / std::sqrt(variance + eps);
      means[r] = T(middle);
      rstds[r] = T(by);
      const int64_t own = r / rows_of_weight * size;
      const T *w = weights + own, *b = biases ? biases + own : nullptr;
      T* y = outputs.begin(r, own_output.data());
      for_each_vector<T>(0, size, [&](int64_t d, int64_t n) {
        const auto normal = (load(h.data() + d, n, T(0)) - centre) * Vec<T>(T(by)) * load(w + d, n, T(0));
        (b ? normal + load(b + d, n, T(0)) : normal).store(y + d, n);
      });
      outputs.end(r, 1, y, &is_counted);
    }
  });
}

template <typename T>
void backward(
    const Tensor& grad, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, std::optional<uint64_t> seed, double p, const Tensor& grad_x, const Tensor& grad_residual,
    const Tensor& of_weight, const Tensor& of_bias) { // [N, tasks, D], sums of each task's rows
  const int64_t size = x.size(1), rows = x.size(0), rows_of_weight = x.numel() / weight.numel();
  const RowReader<OneRow<T>> grads(grad), xs(x), residuals(residual);
  const RowWriter<OneRow<T>> to_residual(grad_residual);
  const std::optional<RowWriter<OneRow<T>>> to_x =
      grad_x.defined() ? std::optional<RowWriter<OneRow<T>>>(grad_x) : std::nullopt;
  const T *all_weights = weight.const_data_ptr<T>(), *means = mean.const_data_ptr<T>(), *rstds = rstd.const_data_ptr<T>();
  const bool want_weight = of_weight.defined();
  const auto work = [&](int64_t begin, int64_t end, T* sums_weight, T* sums_bias) {
    Factors<T> factors(seed, p, size);
    std::vector<T> own_grad(size), own_x(size), own_residual(size), own_to_x(size), own_to_residual(size), normal(size);
    const bool is_counted = false;
    for (int64_t r = begin; r < end; ++r) {
      const T *g = grads.read(r, 1, own_grad.data()), *by = factors.of(r), *w = all_weights + r / rows_of_weight * size;
      add(xs.read(r, 1, own_x.data()), residuals.read(r, 1, own_residual.data()), by, size, normal.data());
      const Vec<T> centre(means[r]), scale(rstds[r]);
      Vec<T> sum(0), along(0);
      for_each_vector<T>(0, size, [&](int64_t d, int64_t n) {
        const auto to_normal = load(g + d, n, T(0)) * load(w + d, n, T(0));
        const auto one = (load(normal.data() + d, n, T(0)) - centre) * scale;
        one.store(normal.data() + d, n);
        sum = sum + to_normal;
        along = at::vec::fmadd(to_normal, one, along);
      });
      const Vec<T> mean_sum{T(OneRow<T>::sum(sum) / static_cast<double>(size))};
      const Vec<T> mean_along{T(OneRow<T>::sum(along) / static_cast<double>(size))};
      T* of_residual = to_residual.begin(r, own_to_residual.data());
      T* of_x = to_x ? to_x->begin(r, own_to_x.data()) : nullptr;
      for_each_vector<T>(0, size, [&](int64_t d, int64_t n) {
        const auto upstream = load(g + d, n, T(0)), one = load(normal.data() + d, n, T(0));
        const auto of_h = scale * (upstream * load(w + d, n, T(0)) - mean_sum - one * mean_along);
        of_h.store(of_residual + d, n);
        if (of_x)
          (by ? of_h * load(by + d, n, T(0)) : of_h).store(of_x + d, n);
        if (want_weight) {
          at::vec::fmadd(upstream, one, load(sums_weight + d, n, T(0))).store(sums_weight + d, n);
          (upstream + load(sums_bias + d, n, T(0))).store(sums_bias + d, n);
        }
      });
      to_residual.end(r, 1, of_residual, &is_counted);
      if (to_x)
        to_x->end(r, 1, of_x, &is_counted);
    }
  };
  if (!want_weight) {
    at::parallel_for(0, rows, row_grain(size), [&](int64_t begin, int64_t end) { work(begin, end, nullptr, nullptr); });
    return;
  }
  T *weights = of_weight.mutable_data_ptr<T>(), *biases = of_bias.mutable_data_ptr<T>();
  const int64_t tasks = of_weight.size(1);
  at::parallel_for(0, of_weight.size(0) * tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = i / tasks * rows_of_weight, task = i % tasks;
      work(
          first + rows_of_weight * task / tasks, first + rows_of_weight * (task + 1) / tasks, weights + i * size,
          biases + i * size);
    }
  });
}

// Rows whose sums are one task's, however many threads there are: so that these do not change a sum's order.
constexpr int64_t kRowsOfTask = 64;

template <typename Function>
void for_type(at::ScalarType type, const Function& function) {
  if (type == at::kDouble)
    function(double());
  else
    function(float());
}

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& bias, const Optional& seed,
    double dropout_p, double eps) {
  const at::ScalarType wide = wide_type(x, residual, weight);
  const auto to = c10::promoteTypes(c10::promoteTypes(x.scalar_type(), residual.scalar_type()), weight.scalar_type());
  const Tensor output = at::empty(x.sizes(), x.options().dtype(to));
  const Tensor mean = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide)), rstd = at::empty_like(mean);
  if (x.numel())
    for_type(wide, [&](auto zero) {
      forward<decltype(zero)>(
          as_rows(x), as_rows(residual), as(weight, wide), bias ? as(*bias, wide) : Tensor(), number(seed), dropout_p, eps, output,
          mean, rstd);
    });
  return {output, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dropout_add_layer_norm_backward(
    const Tensor& grad_output, const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& mean,
    const Tensor& rstd, const Optional& seed, double dropout_p, bool want_weight) {
  const at::ScalarType wide = mean.scalar_type();
  const bool is_own = seed || x.scalar_type() != residual.scalar_type();
  const auto contiguous = [](const Tensor& like) { return at::empty(like.sizes(), like.options()); };
  const Tensor grad_x = is_own ? contiguous(x) : at::empty({0}, x.options()), grad_residual = contiguous(residual);
  Tensor of_weight, of_bias;
  const int64_t size = x.size(-1), parts = weight.numel() / size;
  const int64_t tasks = std::max<int64_t>(1, x.numel() / weight.numel() / kRowsOfTask);
  if (want_weight) {
    of_weight = at::zeros({parts, tasks, size}, x.options().dtype(wide));
    of_bias = at::zeros({parts, tasks, size}, x.options().dtype(wide));
  }
  if (x.numel())
    for_type(wide, [&](auto zero) {
      using T = decltype(zero);
      const auto rows = [&](const Tensor& t) { return t.view({-1, size}); };
      backward<T>(
          as_rows(grad_output), as_rows(x), as_rows(residual), as(weight, wide), mean, rstd, number(seed), dropout_p,
          is_own ? rows(grad_x) : Tensor(), rows(grad_residual), of_weight, of_bias);
    });
  const auto whole = [&](const Tensor& sums) {
    return want_weight ? sums.sum(1).view(weight.sizes()).to(weight.scalar_type()) : at::empty({0}, weight.options());
  };
  return {grad_x, grad_residual, whole(of_weight), whole(of_bias)};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("dropout_add_layer_norm", &dropout_add_layer_norm);
  m.impl("dropout_add_layer_norm_backward", &dropout_add_layer_norm_backward);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
