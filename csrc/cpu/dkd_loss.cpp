// dkd_loss on CPU. Formulas: fastdistill/ops/dkd_loss.py.
#include "kd_rows.h"

#include <torch/library.h>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

std::tuple<Tensor, Tensor, Tensor> dkd_loss(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
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
  const Options options{
      .temperature = temperature,
      .kd_weight = nontarget_weight,
      .target_weight = target_weight,
      .ce_weight = ce_weight,
      .label_smoothing = label_smoothing};
  return distillation_loss<true>(
      student_logits, teacher_logits, labels, options, divergence, scale_by_temperature, ignore_index, reduction,
      student_grad, teacher_grad, return_terms);
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("dkd_loss", &dkd_loss);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
