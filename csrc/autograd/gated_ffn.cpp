// Autograd for bias_act_gate: what fastdistill/ops/bias_act_gate.py registers where there is no compiled module.
#include "dispatch.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

namespace fastdistill {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using Optional = std::optional<Tensor>;
using ForwardArgs = Tensor(const Tensor&, const Optional&, const Optional&, std::string_view);
using BackwardArgs = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Optional&, const Optional&, std::string_view, bool, bool);

class BiasActGate : public torch::autograd::Function<BiasActGate> {
 public:
  static Tensor forward(
      AutogradContext* ctx, const Tensor& h, const Optional& bias, const Optional& gate, std::string_view activation) {
    static const auto op = find_op<ForwardArgs>("fastdistill::bias_act_gate");
    ctx->save_for_backward({h, bias.value_or(Tensor()), gate.value_or(Tensor())});
    ctx->saved_data["activation"] = std::string(activation);
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(h, bias, gate, activation);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<BackwardArgs>("fastdistill::bias_act_gate_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "bias_act_gate cannot be differentiated twice (create_graph=True)");
    const variable_list saved = ctx->get_saved_variables();
    const auto optional = [](const Tensor& x) { return x.defined() ? Optional(x) : std::nullopt; };
    const Optional bias = optional(saved[1]), gate = optional(saved[2]);
    const bool want_bias = bias && ctx->needs_input_grad(1); // counted over the tensors that there are
    const bool want_gate = gate && ctx->needs_input_grad(bias ? 2 : 1);
    const auto [grad_h, grad_bias, grad_gate] = op.call(
        grad_outputs[0], saved[0], bias, gate, ctx->saved_data["activation"].toStringRef(), want_bias, want_gate);
    return {grad_h, want_bias ? grad_bias : Tensor(), want_gate ? grad_gate : Tensor(), Tensor()};
  }
};

Tensor bias_act_gate(const Tensor& h, const Optional& bias, const Optional& gate, std::string_view activation) {
  check_no_torch_func("gated_ffn");
  return BiasActGate::apply(h, bias, gate, activation);
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("bias_act_gate", &bias_act_gate);
}

} // namespace fastdistill
