// accumulate_sensitivity_ up to its kernels. Of hundreds of tensors, Python's checks and a list of tensors on its way
// into a stable library take longer than a GPU takes to add them: here are the checks, in one pass, and the gathering
// of addresses for csrc/cuda.
#include "autograd/dispatch.h"

#include <pybind11/pybind11.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace fastdistill {
namespace {

namespace py = pybind11;
using at::ScalarType;
using at::Tensor;
using at::TensorList;
using c10::DispatchKey;

// Strided tensors on CPU or CUDA, in no transform of torch.func.
const c10::DispatchKeySet kPlain = c10::DispatchKeySet(
                                       {DispatchKey::Dense,
                                        DispatchKey::AutogradFunctionality,
                                        DispatchKey::ADInplaceOrView,
                                        DispatchKey::AutocastCPU,
                                        DispatchKey::AutocastCUDA}) |
    c10::DispatchKeySet(c10::BackendComponent::CPUBit) | c10::DispatchKeySet(c10::BackendComponent::CUDABit);

bool is_plain(py::handle x) {
  return THPVariable_CheckExact(x.ptr()) && kPlain.isSupersetOf(THPVariable_Unpack(x.ptr()).key_set());
}

bool is_total(const Tensor& x) {
  return (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble) && !x.requires_grad() &&
      x.is_non_overlapping_and_dense();
}

bool fits(const Tensor& x, const Tensor& total) {
  const ScalarType type = x.scalar_type();
  return (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble) &&
      x.device() == total.device() && x.sizes() == total.sizes();
}

// A list or tuple, or None.
struct Column {
  explicit Column(py::handle column)
      : sequence(column),
        valid(column.is_none() || PyList_CheckExact(column.ptr()) || PyTuple_CheckExact(column.ptr())) {}

  py::handle operator[](Py_ssize_t i) const {
    return PySequence_Fast_GET_ITEM(sequence.ptr(), i);
  }
  bool has_size(Py_ssize_t size) const {
    return sequence.is_none() || PySequence_Fast_GET_SIZE(sequence.ptr()) == size;
  }

  const py::handle sequence;
  const bool valid;
  std::vector<Tensor> used; // of indices with a gradient
};

// Calls the op if its arguments are certain to be right, which most are. Otherwise nothing is done.
bool try_accumulate_sensitivity_(py::handle totals_, py::handle grads_, py::handle weights_) {
  Column totals(totals_), grads(grads_), weights(weights_);
  if (!totals.valid || !grads.valid || !weights.valid || totals_.is_none() || grads_.is_none() ||
      c10::impl::dispatch_mode_enabled() || at::impl::torch_function_mode_enabled())
    return false;
  const bool weighted = !weights_.is_none();
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(totals_.ptr());
  if (!grads.has_size(size) || !weights.has_size(size))
    return false;

  std::vector<const void*> written, read;
  for (Column* column : {&totals, &grads, &weights})
    column->used.reserve(size);
  written.reserve(size);
  read.reserve(2 * size);
  std::optional<c10::Device> device;
  for (Py_ssize_t i = 0; i < size; ++i) {
    if (!is_plain(totals[i]))
      return false;
    const Tensor& total = THPVariable_Unpack(totals[i].ptr());
    if (!is_total(total) || (device && total.device() != *device))
      return false;
    device = total.device();
    const bool used = !grads[i].is_none();
    const auto take = [&](Column& column) {
      if (!is_plain(column[i]) || !fits(THPVariable_Unpack(column[i].ptr()), total))
        return false;
      const Tensor& x = THPVariable_Unpack(column[i].ptr());
      read.push_back(x.const_data_ptr());
      if (used)
        column.used.push_back(x);
      return true;
    };
    if ((used && !take(grads)) || (weighted && !take(weights)))
      return false;
    if (total.numel() > 0)
      written.push_back(total.const_data_ptr());
    if (used)
      totals.used.push_back(total);
  }
  std::sort(written.begin(), written.end());
  const auto is_written = [&](const void* x) { return std::binary_search(written.begin(), written.end(), x); };
  if (std::adjacent_find(written.begin(), written.end()) != written.end() ||
      std::any_of(read.begin(), read.end(), is_written))
    return false;

  static const auto op =
      find_op<void(TensorList, TensorList, std::optional<TensorList>)>("fastdistill::accumulate_sensitivity_");
  const py::gil_scoped_release release;
  const at::AutoDispatchBelowADInplaceOrView guard;
  op.call(totals.used, grads.used, weighted ? std::optional<TensorList>(weights.used) : std::nullopt);
  for (const Tensor& total : totals.used)
    if (!total.is_inference())
      total.unsafeGetTensorImpl()->bump_version();
  return true;
}

bool same_order(const Tensor& total, const Tensor& other) {
  return (total.is_contiguous() && other.is_contiguous()) ||
      (total.is_non_overlapping_and_dense() && total.strides() == other.strides());
}

// csrc/cuda's kernel is told where the tensors are: in a table for each combination of dtypes, by a row for each tensor.
void accumulate_sensitivity_on_cuda(TensorList totals, TensorList grads, std::optional<TensorList> weights) {
  std::map<std::array<int64_t, 3>, std::vector<int64_t>> tables; // usually one
  std::deque<Tensor> copies;
  std::vector<std::pair<Tensor, Tensor>> copied; // totals as they came, and their contiguous copies
  for (size_t i = 0; i < totals.size(); ++i) {
    const Tensor *total = &totals[i], *grad = &grads[i], *weight = weights ? &(*weights)[i] : nullptr;
    if (total->numel() == 0)
      continue;
    if (!same_order(*total, *grad) || (weight && !same_order(*total, *weight))) {
      for (const Tensor** x : {&total, &grad, &weight})
        if (*x)
          *x = &copies.emplace_back((*x)->contiguous());
      if (!totals[i].is_contiguous())
        copied.emplace_back(totals[i], *total);
    }
    const auto type = [](const Tensor* x) { return x ? static_cast<int64_t>(x->scalar_type()) : -1; };
    auto& table = tables[{type(total), type(grad), type(weight)}];
    table.reserve(4 * totals.size());
    const auto address = [](const void* x) { return reinterpret_cast<int64_t>(x); };
    table.insert(
        table.end(),
        {address(total->mutable_data_ptr()), address(grad->const_data_ptr()),
         address(weight ? weight->const_data_ptr() : nullptr), total->numel()});
  }
  static const auto op = find_op<void(const Tensor&, int64_t, int64_t, int64_t, int64_t)>("fastdistill::_add_products");
  for (auto& [types, table] : tables)
    op.call(
        at::from_blob(table.data(), {static_cast<int64_t>(table.size()) / 4, 4}, at::kLong),
        types[0], types[1], types[2], totals[0].get_device());
  for (const auto& [total, copy] : copied)
    total.copy_(copy);
}

} // namespace

void bind_accumulate_sensitivity(py::module_& m) {
  m.def("try_accumulate_sensitivity_", &try_accumulate_sensitivity_);
  m.def("serve_accumulate_sensitivity_on_cuda", [] { // where csrc/cuda is loaded
    static torch::Library library(torch::Library::IMPL, "fastdistill", DispatchKey::CUDA, __FILE__, __LINE__);
    library.impl("accumulate_sensitivity_", &accumulate_sensitivity_on_cuda);
  });
}

} // namespace fastdistill
