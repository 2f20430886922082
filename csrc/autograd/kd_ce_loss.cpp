// Autograd for kd_ce_loss: what fastdistill/ops/kd_ce_loss.py registers where there is no compiled module, without the
// Python frames that cost more than a small batch's arithmetic.
#include "dispatch.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace fastdistill {
namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using LossArgs = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const std::optional<Tensor>&, double, double, double, std::string_view, bool, int64_t,
    double, std::string_view, bool, bool);

// The saved gradient times its upstream one: in its own memory when the graph is not retained, for this is then its last
// use, so that a backward allocates nothing; out of place under tracing, where the compiler plans memory.
Tensor times_grad_output(const Tensor& grad, const Tensor& grad_output) {
  static const auto scale_rows = find_op<Tensor(const Tensor&, const Tensor&)>("fastdistill::scale_rows");
  static const auto scale_rows_ = find_op<void(const Tensor&, const Tensor&)>("fastdistill::scale_rows_");
  if (at::isTensorSubclassLike(grad_output) || torch::autograd::get_current_graph_task_keep_graph())
    return scale_rows.call(grad, grad_output);
  scale_rows_.call(grad, grad_output);
  return grad;
}

class KdCeLoss : public torch::autograd::Function<KdCeLoss> {
 public:
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& student,
      const Tensor& teacher,
      const std::optional<Tensor>& labels,
      double temperature,
      double kd_weight,
      double ce_weight,
      std::string_view divergence,
      bool scale_by_temperature,
      int64_t ignore_index,
      double label_smoothing,
      std::string_view reduction,
      bool student_grad,
      bool teacher_grad) {
    static const auto op = find_op<LossArgs>("fastdistill::kd_ce_loss");
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_student, grad_teacher] = op.call(
        student, teacher, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature, ignore_index,
        label_smoothing, reduction, student_grad, teacher_grad);
    ctx->save_for_backward({grad_student, grad_teacher});
    ctx->mark_non_differentiable({grad_student, grad_teacher});
    ctx->set_materialize_grads(false);
    ctx->saved_data["student_grad"] = student_grad;
    ctx->saved_data["teacher_grad"] = teacher_grad;
    return {loss, grad_student, grad_teacher};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    const Tensor& grad_output = grad_outputs[0];
    TORCH_CHECK(!at::GradMode::is_enabled(), "kd_ce_loss cannot be differentiated twice (create_graph=True)");
    variable_list grads(13);
    for (const auto& [i, wanted] : {std::pair{0, "student_grad"}, std::pair{1, "teacher_grad"}})
      if (grad_output.defined() && ctx->saved_data[wanted].toBool() && ctx->needs_input_grad(i))
        grads[i] = times_grad_output(saved[i], grad_output);
    return grads;
  }
};

std::tuple<Tensor, Tensor, Tensor> kd_ce_loss(
    const Tensor& student,
    const Tensor& teacher,
    const std::optional<Tensor>& labels,
    double temperature,
    double kd_weight,
    double ce_weight,
    std::string_view divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    double label_smoothing,
    std::string_view reduction,
    bool student_grad,
    bool teacher_grad) {
  check_no_torch_func("kd_ce_loss");
  const auto out = KdCeLoss::apply(
      student, teacher, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature, ignore_index,
      label_smoothing, reduction, student_grad || wants_grad(student), teacher_grad || wants_grad(teacher));
  return {out[0], out[1], out[2]};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("kd_ce_loss", &kd_ce_loss);
}

} // namespace fastdistill
