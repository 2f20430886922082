// grad[r, :] *= grad_output[r] (or one grad_output for all rows), for the backward of losses that hold their gradient.
#include "row.h"

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/item.h>
#include <torch/library.h>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

template <typename scalar_t, typename Factor>
void scale(const Tensor& source, const Tensor& target, const Factor& factor) {
  using acc_t = at::opmath_type<scalar_t>;
  const int64_t size = source.size(1);
  const scalar_t* in = source.const_data_ptr<scalar_t>();
  scalar_t* out = target.mutable_data_ptr<scalar_t>();
  at::parallel_for(0, source.size(0), row_grain(size), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const acc_t by = factor(r);
      if (in == out && by == acc_t(1))
        continue;
      at::vec::map<scalar_t>(
          [by](const Vec<acc_t>& x) { return x * Vec<acc_t>(by); }, out + r * size, in + r * size, size);
    }
  });
}

void scale_into(const Tensor& source, const Tensor& target, const Tensor& grad_output) {
  if (source.numel() == 0)
    return;
  const Tensor rows = source.contiguous().view({-1, source.size(-1)}), out = target.view(rows.sizes());
  const Tensor factors = grad_output.reshape({-1}).to(at::kDouble).contiguous();
  const double* factor = factors.const_data_ptr<double>();
  const int64_t step = grad_output.dim() == 0 ? 0 : 1;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, source.scalar_type(), "scale_rows", [&] {
    scale<scalar_t>(rows, out, [&](int64_t r) { return factor[r * step]; });
  });
}

void scale_rows_(const Tensor& grad, const Tensor& grad_output) {
  // The loss is usually differentiated as it is: nothing to do.
  if (grad_output.dim() == 0 && grad_output.item().toDouble() == 1.0)
    return;
  if (grad.is_contiguous()) {
    scale_into(grad, grad, grad_output);
  } else {
    const Tensor scaled = empty_rows_like(grad);
    scale_into(grad, scaled, grad_output);
    grad.copy_(scaled);
  }
}

Tensor scale_rows(const Tensor& grad, const Tensor& grad_output) {
  const Tensor scaled = empty_rows_like(grad);
  scale_into(grad, scaled, grad_output);
  return scaled;
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("scale_rows_", &scale_rows_);
  m.impl("scale_rows", &scale_rows);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
