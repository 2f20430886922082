// Autograd for gated_attention: what fastdistill/ops/gated_attention.py registers where there is no compiled module.
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
    const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double, bool, double,
    bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
    const Tensor&, const Tensor&, double, bool, double, bool);

Optional optional(const Tensor& x) {
  return x.defined() ? Optional(x) : std::nullopt;
}

class GatedAttention : public torch::autograd::Function<GatedAttention> {
 public:
  static variable_list forward(
      AutogradContext* ctx, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate,
      const Optional& attn_mask, const Optional& seed, double dropout_p, bool is_causal, double scale, bool gate_grad) {
    static const auto op = find_op<Forward>("fastdistill::gated_attention");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [output, ungated, logsumexp] =
        op.call(query, key, value, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad);
    ctx->save_for_backward(
        {query, key, value, head_gate.value_or(Tensor()), attn_mask.value_or(Tensor()), seed.value_or(Tensor()),
         gate_grad ? ungated : output, logsumexp});
    ctx->mark_non_differentiable({ungated, logsumexp});
    ctx->set_materialize_grads(false);
    ctx->saved_data["dropout_p"] = dropout_p;
    ctx->saved_data["is_causal"] = is_causal;
    ctx->saved_data["scale"] = scale;
    ctx->saved_data["gate_grad"] = gate_grad;
    return {output, ungated, logsumexp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op = find_op<Backward>("fastdistill::gated_attention_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "gated_attention cannot be differentiated twice (create_graph=True)");
    variable_list grads(10);
    if (!grad_outputs[0].defined())
      return grads;
    const variable_list saved = ctx->get_saved_variables();
    const bool gate_grad = ctx->saved_data["gate_grad"].toBool();
    auto [query, key, value, gate] = op.call(
        grad_outputs[0], saved[0], saved[1], saved[2], optional(saved[3]), optional(saved[4]), optional(saved[5]),
        saved[6], saved[7], ctx->saved_data["dropout_p"].toDouble(), ctx->saved_data["is_causal"].toBool(),
        ctx->saved_data["scale"].toDouble(), gate_grad);
    grads[0] = query;
    grads[1] = key;
    grads[2] = value;
    if (gate_grad)
      grads[3] = gate;
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> gated_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate, const Optional& attn_mask,
    const Optional& seed, double dropout_p, bool is_causal, double scale, bool gate_grad) {
  check_no_torch_func("gated_attention");
  TORCH_CHECK_VALUE(
      !attn_mask || !wants_grad(*attn_mask),
      "attn_mask requires a gradient, which is not computed; expected attn_mask.detach()");
  const auto out = GatedAttention::apply(
      query, key, value, head_gate, attn_mask, seed, dropout_p, is_causal, scale,
      gate_grad || (head_gate && wants_grad(*head_gate)));
  return {out[0], out[1], out[2]};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("gated_attention", &gated_attention);
}

} // namespace fastdistill
