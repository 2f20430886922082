// Autograd for uncertainty: what fastdistill/ops/uncertainty.py registers where there is no compiled module.
#include "dispatch.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <string>
#include <string_view>

namespace fastdistill {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class Uncertainty : public torch::autograd::Function<Uncertainty> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, std::string_view kind, bool normalize) {
    static const auto op = find_op<Tensor(const Tensor&, std::string_view, bool)>("fastdistill::uncertainty");
    ctx->save_for_backward({logits});
    ctx->saved_data["kind"] = std::string(kind);
    ctx->saved_data["normalize"] = normalize;
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(logits, kind, normalize);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    static const auto op =
        find_op<Tensor(const Tensor&, const Tensor&, std::string_view, bool)>("fastdistill::uncertainty_backward");
    TORCH_CHECK(!at::GradMode::is_enabled(), "uncertainty cannot be differentiated twice (create_graph=True)");
    const Tensor logits = ctx->get_saved_variables()[0];
    const bool normalize = ctx->saved_data["normalize"].toBool();
    return {op.call(grad_outputs[0], logits, ctx->saved_data["kind"].toStringRef(), normalize), Tensor(), Tensor()};
  }
};

Tensor uncertainty(const Tensor& logits, std::string_view kind, bool normalize) {
  check_no_torch_func("uncertainty");
  return Uncertainty::apply(logits, kind, normalize);
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("uncertainty", &uncertainty);
}

} // namespace fastdistill
