// accumulate_sensitivity_ on CPU: one parallel region over the elements of all tensors together, so that threads share
// the work evenly whatever the tensors' sizes. Formula: fastdistill/ops/accumulate_sensitivity.py.
#include "row.h"

#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

// The tensors of one index, their elements in the same order in memory: as they came, or copies.
struct Item {
  Tensor total, grad, weight; // weight: undefined where there is none
  Tensor target; // the total as it came
  int64_t begin; // position of the first element, counted over all items

  bool wide() const {
    return total.scalar_type() == at::kDouble || grad.scalar_type() == at::kDouble ||
        (weight.defined() && weight.scalar_type() == at::kDouble);
  }
};

// Elements from `begin` on as T: where they are if the tensor holds that, else converted into the buffer.
template <typename T>
const T* read(const Tensor& x, int64_t begin, int64_t size, T* buffer) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "accumulate_sensitivity_", [&] {
    const scalar_t* source = x.const_data_ptr<scalar_t>() + begin;
    if constexpr (std::is_same_v<scalar_t, T>)
      return source;
    convert(source, buffer, size);
    return static_cast<const T*>(buffer);
  });
}

constexpr int64_t kBlock = 512; // elements at a time, so that what is converted stays in cache

template <typename T>
void add(const Item& item, int64_t begin, int64_t end) {
  T total_buffer[kBlock], grad_buffer[kBlock], weight_buffer[kBlock];
  const bool in_place = item.total.scalar_type() == c10::CppTypeToScalarType<T>::value;
  for (; begin < end; begin += kBlock) {
    const int64_t size = std::min(kBlock, end - begin);
    const T* total = read(item.total, begin, size, total_buffer);
    const T* grad = read(item.grad, begin, size, grad_buffer);
    T* sum = in_place ? item.total.mutable_data_ptr<T>() + begin : total_buffer;
    if (item.weight.defined()) {
      const T* weight = read(item.weight, begin, size, weight_buffer);
      const auto sensitivity = [](const Vec<T>& t, const Vec<T>& g, const Vec<T>& w) { return t + (g * w).abs(); };
      at::vec::map3<T>(sensitivity, sum, total, grad, weight, size);
    } else {
      const auto sensitivity = [](const Vec<T>& t, const Vec<T>& g) { return t + g.abs(); };
      at::vec::map2<T>(sensitivity, sum, total, grad, size);
    }
    if (!in_place)
      convert(sum, item.total.mutable_data_ptr<float>() + begin, size);
  }
}

bool same_order(const Tensor& total, const Tensor& other) {
  return (total.is_contiguous() && other.is_contiguous()) ||
      (total.is_non_overlapping_and_dense() && total.strides() == other.strides());
}

void accumulate_sensitivity_(at::TensorList totals, at::TensorList grads, std::optional<at::TensorList> weights) {
  std::vector<Item> items;
  items.reserve(totals.size());
  int64_t elements = 0;
  for (size_t i = 0; i < totals.size(); ++i) {
    if (totals[i].numel() == 0)
      continue;
    Item item{totals[i], grads[i], weights ? (*weights)[i] : Tensor(), totals[i], elements};
    if (!same_order(item.total, item.grad) || (weights && !same_order(item.total, item.weight))) {
      item.total = item.total.contiguous();
      item.grad = item.grad.contiguous();
      item.weight = weights ? item.weight.contiguous() : Tensor();
    }
    elements += item.total.numel();
    items.push_back(std::move(item));
  }

  at::parallel_for(0, elements, row_grain(1), [&](int64_t begin, int64_t end) {
    const auto after = [](int64_t position, const Item& item) { return position < item.begin; };
    auto item = std::upper_bound(items.begin(), items.end(), begin, after) - 1;
    for (; item != items.end() && item->begin < end; ++item) {
      const int64_t from = std::max(begin - item->begin, int64_t{0});
      const int64_t to = std::min(end - item->begin, item->total.numel());
      item->wide() ? add<double>(*item, from, to) : add<float>(*item, from, to);
    }
  });

  for (const Item& item : items)
    if (!item.total.is_same(item.target))
      item.target.copy_(item.total);
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("accumulate_sensitivity_", &accumulate_sensitivity_);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
