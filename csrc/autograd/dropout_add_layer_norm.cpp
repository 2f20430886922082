// Autograd for dropout_add_layer_norm: what fastdistill/ops/dropout_add_layer_norm.py registers where there is no
// compiled module.
#include "dispatch.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace fastdistill {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Forward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, double, double);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, double,
    bool);

class DropoutAddLayerNorm : public torch::autograd::Function<DropoutAddLayerNorm> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& bias,
      const Optional& seed, double dropout_p, double eps) {
    static const auto op = find_op<Forward>("fastdistill::dropout_add_layer_norm");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, mean, rstd] = op.call(x, residual, weight, bias, seed, dropout_p, eps);
    ctx->save_for_backward({x, residual, weight, mean, rstd, seed.value_or(Tensor())});
    ctx->mark_non_differentiable({mean, rstd});
    ctx->set_materialize_grads(false);
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["has_bias"] = bias.has_value();
    return {output, mean, rstd};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<Backward>("fastdistill::dropout_add_layer_norm_backward");
    TORCH_CHECK(
        !at::GradMode::is_enabled(), "dropout_add_layer_norm cannot be differentiated twice (create_graph=True)");
    variable_list grads(7);
    if (!grad_outputs[0].defined())
      return grads;
    const variable_list saved = ctx->get_saved_variables();
    const Optional seed = saved[5].defined() ? Optional(saved[5]) : std::nullopt;
    const bool want_weight = ctx->needs_input_grad(2);
    const bool want_bias = ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(3);
    const auto [x, residual, weight, bias] = op.call(
        grad_outputs[0], saved[0], saved[1], saved[2], saved[3], saved[4], seed,
        ctx->saved_data["dropout_p"].toDouble(), want_weight || want_bias);
    grads[0] = seed || saved[0].scalar_type() != saved[1].scalar_type() ? x : residual;
    grads[1] = residual;
    if (want_weight)
      grads[2] = weight;
    if (want_bias)
      grads[3] = bias;
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> dropout_add_layer_norm(
    const Tensor& x, const Tensor& residual, const Tensor& weight, const Optional& bias, const Optional& seed,
    double dropout_p, double eps) {
  check_no_torch_func("dropout_add_layer_norm");
  const auto out = DropoutAddLayerNorm::apply(x, residual, weight, bias, seed, dropout_p, eps);
  return {out[0], out[1], out[2]};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("dropout_add_layer_norm", &dropout_add_layer_norm);
}

} // namespace fastdistill
