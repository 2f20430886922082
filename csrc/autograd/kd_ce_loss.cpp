// Autograd for kd_ce_loss and dkd_loss: what fastdistill/ops registers where there is no compiled module, without the Python
// frames that cost more than a small batch's arithmetic.
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

// Of the outputs of a loss: (loss, or with its terms behind it; gradients for an upstream gradient of one).
class Distillation : public torch::autograd::Function<Distillation> {
 public:
  template <typename Op>
  static variable_list forward(
      AutogradContext* ctx,
      const Tensor& student,
      const Tensor& teacher,
      bool student_grad,
      bool teacher_grad,
      bool return_terms,
      const Op& op) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [loss, grad_student, grad_teacher] = op(student_grad, teacher_grad);
    ctx->save_for_backward({grad_student, grad_teacher});
    ctx->mark_non_differentiable({grad_student, grad_teacher});
    ctx->set_materialize_grads(false);
    ctx->saved_data["student_grad"] = student_grad;
    ctx->saved_data["teacher_grad"] = teacher_grad;
    if (return_terms)
      ctx->saved_data["return_terms"] = true;
    return {loss, grad_student, grad_teacher};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grad_outputs) {
    const variable_list saved = ctx->get_saved_variables();
    TORCH_CHECK(!at::GradMode::is_enabled(), "kd_ce_loss and dkd_loss cannot be differentiated twice (create_graph=True)");
    Tensor grad_output = grad_outputs[0];
    if (grad_output.defined() && ctx->saved_data.count("return_terms"))
      grad_output = grad_output.select(0, 0); // the terms are there to be looked at
    variable_list grads(6);
    for (const auto& [i, wanted] : {std::pair{0, "student_grad"}, std::pair{1, "teacher_grad"}})
      if (grad_output.defined() && ctx->saved_data[wanted].toBool() && ctx->needs_input_grad(i))
        grads[i] = times_grad_output(saved[i], grad_output);
    return grads;
  }
};

// The outputs of op, a function of which gradients it is to compute.
template <typename Op>
std::tuple<Tensor, Tensor, Tensor> with_autograd(
    const Tensor& student, const Tensor& teacher, bool student_grad, bool teacher_grad, bool return_terms, const Op& op) {
  const auto out = Distillation::apply(
      student, teacher, student_grad || wants_grad(student), teacher_grad || wants_grad(teacher), return_terms, op);
  return {out[0], out[1], out[2]};
}

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
    bool teacher_grad,
    bool return_terms) {
  check_no_torch_func("kd_ce_loss");
  static const auto op = find_op<decltype(kd_ce_loss)>("fastdistill::kd_ce_loss");
  return with_autograd(student, teacher, student_grad, teacher_grad, return_terms, [&](bool to_student, bool to_teacher) {
    return op.call(
        student, teacher, labels, temperature, kd_weight, ce_weight, divergence, scale_by_temperature,
        ignore_index, label_smoothing, reduction, to_student, to_teacher, return_terms);
  });
}

std::tuple<Tensor, Tensor, Tensor> dkd_loss(
    const Tensor& student,
    const Tensor& teacher,
    const Tensor& labels,
    double temperature,
    double target_weight,
    double nontarget_weight,
    double ce_weight,
    std::string_view divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    double label_smoothing,
    std::string_view reduction,
    bool student_grad,
    bool teacher_grad,
    bool return_terms) {
  check_no_torch_func("dkd_loss");
  static const auto op = find_op<decltype(dkd_loss)>("fastdistill::dkd_loss");
  return with_autograd(student, teacher, student_grad, teacher_grad, return_terms, [&](bool to_student, bool to_teacher) {
    return op.call(
        student, teacher, labels, temperature, target_weight, nontarget_weight, ce_weight, divergence, scale_by_temperature,
        ignore_index, label_smoothing, reduction, to_student, to_teacher, return_terms);
  });
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, Autograd, m) {
  m.impl("dkd_loss", &dkd_loss);
  m.impl("kd_ce_loss", &kd_ce_loss);
}

} // namespace fastdistill
