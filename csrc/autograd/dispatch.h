// What every op's autograd needs of the dispatcher.
#pragma once

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

namespace fastdistill {

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// Whether a gradient to x is recorded. Only here, below torch.vmap, does a batch of tensors say so.
inline bool wants_grad(const at::Tensor& x) {
  return x.requires_grad() && at::GradMode::is_enabled();
}

// torch.func's derivatives end here: PyTorch has them of functions in Python only.
inline void check_no_torch_func(const char* op) {
  const auto& functorch = at::functorch::functorchTLSAccessor();
  if (!functorch)
    return;
  try {
    functorch->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, op, " cannot be differentiated by torch.func (grad, vjp, jvp, ...); expected torch.autograd.grad or "
        "Tensor.backward");
  }
}

} // namespace fastdistill
