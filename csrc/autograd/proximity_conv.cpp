// Autograd for proximity_conv: what fastdistill/ops/proximity_conv.py registers where there is no compiled module.
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

using Forward =
    std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Tensor&, bool, bool, bool, bool);

class ProximityConv : public torch::autograd::Function<ProximityConv> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& states, const Tensor& proximity, const Tensor& weight, const Optional& bias,
      const Optional& attention_mask) {
    static const auto op = find_op<Forward>("fastdistill::proximity_conv");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, positions] = op.call(states, proximity, weight, bias, attention_mask);
    ctx->save_for_backward({states, proximity, weight, attention_mask.value_or(Tensor()), positions});
    ctx->mark_non_differentiable({positions});
    ctx->set_materialize_grads(false);
    ctx->saved_data["biased"] = bias.has_value();
    return {output, positions};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<Backward>("fastdistill::proximity_conv_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "proximity_conv cannot be differentiated twice (create_graph=True)");
    variable_list grads(5);
    if (!grad_outputs[0].defined())
      return grads;
    const variable_list saved = ctx->get_saved_variables();
    const Optional mask = saved[3].defined() ? Optional(saved[3]) : std::nullopt;
    const bool wanted[] = {
        ctx->needs_input_grad(0), ctx->needs_input_grad(1), ctx->needs_input_grad(2),
        ctx->saved_data["biased"].toBool() && ctx->needs_input_grad(3)}; // counted over the tensors that there are
    auto [of_states, of_proximity, of_weight, of_bias] = op.call(
        grad_outputs[0], saved[0], saved[1], saved[2], mask, saved[4], wanted[0], wanted[1], wanted[2], wanted[3]);
    const Tensor computed[] = {of_states, of_proximity, of_weight, of_bias};
    for (int i = 0; i < 4; ++i)
      if (wanted[i])
        grads[i] = computed[i];
    return grads;
  }
};

std::tuple<Tensor, Tensor> proximity_conv(
    const Tensor& states, const Tensor& proximity, const Tensor& weight, const Optional& bias,
    const Optional& attention_mask) {
  check_no_torch_func("proximity_conv");
  const auto out = ProximityConv::apply(states, proximity, weight, bias, attention_mask);
  return {out[0], out[1]};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("proximity_conv", &proximity_conv);
}

} // namespace fastdistill
