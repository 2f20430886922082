// softmax(scale q k^T + mask) v, each head times its gate, and its gradients: on the heads that count, of short sequences
// by products in registers, otherwise by PyTorch's flash attention.
#include "row.h"
#include "short_attention.h"

#include <ATen/OpMathType.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/index.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/unflatten.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// What is not registered for any backend is served by fastdistill/ops/reference.
template <typename Op, typename... Args>
auto by_reference(const char* name, const Args&... args) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
  return op.redispatch(c10::DispatchKeySet(), args...);
}

// Flash attention wants unit strides in a head's rows.
Tensor with_rows(const Tensor& x) {
  return x.stride(-1) == 1 ? x : x.contiguous();
}

// [B, H, S, D] with memory as [B, S, H, D].
Tensor empty_heads(const Tensor& like, int64_t batch, int64_t heads, bool zero) {
  const std::array<int64_t, 4> shape{batch, like.size(2), heads, like.size(3)};
  return (zero ? at::zeros(shape, like.options()) : at::empty(shape, like.options())).transpose(1, 2);
}

// x, or a copy of it, with memory as [B, S, H, D]: flash attention lays its output out as its query is.
Tensor by_token(const Tensor& x) {
  return x.transpose(1, 2).contiguous().transpose(1, 2);
}

// target = factor * source, [rows, size] each with unit stride in a row.
template <typename scalar_t>
void copy_rows(
    const scalar_t* source, int64_t source_stride, scalar_t* target, int64_t target_stride, int64_t rows, int64_t size,
    double factor) {
  using T = at::opmath_type<scalar_t>;
  for (int64_t r = 0; r < rows; ++r, source += source_stride, target += target_stride)
    if (factor == 1)
      std::copy_n(source, size, target);
    else
      at::vec::map<scalar_t>([by = T(factor)](const Vec<T>& x) { return x * Vec<T>(by); }, target, source, size);
}

// Heads of a batch that are computed together, and their gates. Tensors of all heads are [B, H, S, D]; packed, those of
// these: a view, [B, K, S, D], where they are neighbours and each example has the same ones; otherwise a copy,
// [pairs of example and head, 1, S, D].
class Heads {
 public:
  // Of `heads` those from `start` to `end`, of every example.
  Heads(int64_t batch, int64_t heads, int64_t start, int64_t end, const double* gates)
      : heads_(heads), start_(start), shape_{batch, end - start} {
    for (int64_t i = 0; i < batch; ++i)
      for (int64_t head = start; head < end; ++head)
        add(i * heads + head, gates ? gates[head] : 1);
  }

  // Of each example those whose gate is not 0, or all.
  Heads(int64_t batch, int64_t heads, const double* gates, bool all) : heads_(heads), start_(0), shape_{batch, heads} {
    for (int64_t i = 0; i < batch * heads; ++i)
      if (all || gates[i] != 0)
        add(i, gates[i]);
    copied_ = int64_t(pairs_.size()) < batch * heads;
    if (copied_)
      shape_ = {int64_t(pairs_.size()), 1};
  }

  bool none() const {
    return pairs_.empty();
  }

  // Whether packed tensors are those of all heads.
  bool are_all() const {
    return !copied_ && shape_[1] == heads_;
  }

  // Packed from all, times the gates where `gated`.
  Tensor pack(const Tensor& x, bool gated = false) const {
    const Tensor rows = with_rows(x);
    if (is_whole(gated))
      return rows; // also key's or value's with fewer heads
    if (!copied_ && !(gated && gated_))
      return rows.narrow(1, start_, shape_[1]);
    const Tensor packed = at::empty({shape_[0], shape_[1], x.size(2), x.size(3)}, x.options());
    copy(rows, false, packed, true, gated);
    return packed;
  }

  // Whether all heads' tensor is the packed one, as it is.
  bool is_whole(bool gated) const {
    return are_all() && !(gated && gated_);
  }

  // Their places among all from packed, times the gates where `gated`.
  void unpack(const Tensor& packed, const Tensor& all, bool gated = false) const {
    copy(with_rows(packed), true, all, false, gated);
  }

  Optional pack_mask(const Optional& given) const {
    if (!given || (given->size(1) == 1 && (!copied_ || given->size(0) == 1)))
      return given;
    const Tensor& mask = *given;
    if (!copied_)
      return mask.narrow(1, start_, shape_[1]);
    std::vector<int64_t> example, head;
    for (const int64_t i : pairs_) {
      example.push_back(mask.size(0) == 1 ? 0 : i / heads_);
      head.push_back(mask.size(1) == 1 ? 0 : i % heads_);
    }
    const Tensor rows = mask.index({at::tensor(example), at::tensor(head)});
    return rows.view({shape_[0], shape_[1], mask.size(2), mask.size(3)});
  }

 private:
  void add(int64_t pair, double gate) {
    pairs_.push_back(pair);
    gates_.push_back(gate);
    gated_ |= gate != 1;
  }

  void copy(const Tensor& from, bool from_packed, const Tensor& to, bool to_packed, bool gated) const {
    const auto offset = [&](const Tensor& x, bool packed, int64_t i) {
      const int64_t head = packed ? i : pairs_[i], heads = x.size(1);
      return head / heads * x.stride(0) + head % heads * x.stride(1);
    };
    const int64_t rows = from.size(2), size = from.size(3), count = pairs_.size();
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, from.scalar_type(), "gated_attention", [&] {
      const scalar_t* source = from.const_data_ptr<scalar_t>();
      scalar_t* target = to.mutable_data_ptr<scalar_t>();
      at::parallel_for(0, count, row_grain(rows * size), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i)
          copy_rows(
              source + offset(from, from_packed, i), from.stride(2), target + offset(to, to_packed, i), to.stride(2),
              rows, size, gated ? gates_[i] : 1);
      });
    });
  }

  int64_t heads_, start_;
  std::array<int64_t, 2> shape_;
  std::vector<int64_t> pairs_; // example * heads + head
  std::vector<double> gates_;
  bool copied_ = false, gated_ = false;
};

// All heads if `all`, otherwise those whose gate is not 0: of one gate for all examples, neighbours together, since
// copying small heads side by side takes longer than the closed ones save.
std::vector<Heads> parts(const Optional& gate, int64_t batch, int64_t heads, bool all) {
  const Tensor values = gate ? gate->to(at::kDouble).contiguous() : Tensor();
  const double* value = gate ? values.const_data_ptr<double>() : nullptr;
  std::vector<Heads> found;
  if (gate && gate->dim() == 2) {
    found.emplace_back(batch, heads, value, all);
    if (found.back().none())
      found.pop_back();
    return found;
  }
  for (int64_t start = 0, end; start < heads; start = end) {
    end = start;
    while (end < heads && (all || !value || value[end] != 0))
      ++end;
    if (end > start)
      found.emplace_back(batch, heads, start, end, value);
    while (end < heads && !(all || !value || value[end] != 0))
      ++end;
  }
  return found;
}

// A tensor of all heads, [B, H, S, D], from those of its parts, 0 elsewhere; times the gates where `gated`. It is the
// packed one itself where that is whole, unless it is to be `fresh`.
class Whole {
 public:
  Whole(const std::vector<Heads>& parts, const Tensor& like, bool gated = false, bool fresh = false)
      : gated_(gated), kept_(parts.size() == 1 && parts[0].is_whole(gated) && !fresh) {
    if (!kept_)
      all_ = empty_heads(like, like.size(0), like.size(1), !(parts.size() == 1 && parts[0].are_all()));
  }

  void add(const Heads& part, const Tensor& packed) {
    if (kept_)
      all_ = packed;
    else
      part.unpack(packed, all_, gated_);
  }

  const Tensor& get() const {
    return all_;
  }

 private:
  bool gated_, kept_;
  Tensor all_;
};

// Key or value with a head for each of the query's. Flash attention itself takes fewer, where one call is for all heads
// as they are.
Tensor repeated(const Tensor& x, int64_t heads, const std::vector<Heads>& parts, bool gated) {
  if (x.size(1) == heads || (parts.size() == 1 && parts[0].is_whole(gated)))
    return x;
  return x.unsqueeze(2).expand({-1, -1, heads / x.size(1), -1, -1}).flatten(1, 2);
}

// The gradient to key or value from that to its repeated heads.
Tensor summed(const Tensor& grad, int64_t heads) {
  return grad.size(1) == heads ? grad : grad.unflatten(1, {heads, -1}).sum(2);
}

// What flash attention adds to the scores.
Optional additive_mask(const Optional& mask, const Tensor& query) {
  if (!mask)
    return {};
  Tensor m = *mask;
  while (m.dim() < 4)
    m = m.unsqueeze(0);
  const auto dtype = at::toOpMathType(query.scalar_type());
  if (m.scalar_type() != at::kBool)
    return m.to(dtype);
  return at::zeros(m.sizes(), query.options().dtype(dtype)).masked_fill_(m.logical_not(), -kInf<double>);
}

// Of each head of each example the sum of a * b over its tokens and channels: [B, H] in float64.
Tensor head_dots(const Tensor& a, const Tensor& b) {
  const int64_t heads = a.size(1), rows = a.size(2), size = a.size(3);
  const Tensor dots = at::empty({a.size(0), heads}, a.options().dtype(at::kDouble));
  double* dot = dots.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, a.scalar_type(), "gated_attention", [&] {
    using T = at::opmath_type<scalar_t>;
    using V = Vec<T>;
    using Form = OneRow<T>;
    const scalar_t *a_data = a.const_data_ptr<scalar_t>(), *b_data = b.const_data_ptr<scalar_t>();
    at::parallel_for(0, dots.numel(), row_grain(rows * size), [&](int64_t begin, int64_t end) {
      std::vector<T> a_buffer(size), b_buffer(size);
      for (int64_t i = begin; i < end; ++i) {
        const scalar_t* x = a_data + i / heads * a.stride(0) + i % heads * a.stride(1);
        const scalar_t* y = b_data + i / heads * b.stride(0) + i % heads * b.stride(1);
        double total = 0;
        for (int64_t r = 0; r < rows;) {
          V sum(0); // of a few rows: long sums in float lose digits
          for (const int64_t stop = std::min(rows, r + 8); r < stop; ++r) {
            const T* u = Form::read(x + r * a.stride(2), 0, 1, size, a_buffer.data());
            const T* v = Form::read(y + r * b.stride(2), 0, 1, size, b_buffer.data());
            for_each_vector<T>(0, size, [&](int64_t j, int64_t count) {
              sum = at::vec::fmadd(load(u + j, count, T(0)), load(v + j, count, T(0)), sum);
            });
          }
          total += Form::sum(sum);
        }
        dot[i] = total;
      }
    });
  });
  return dots;
}

// What no kernel here takes: dropout of long sequences, or with gates, whose closed heads are not counted; of fewer keys
// than fill a vector PyTorch's flash attention takes NaN in all scores for a mask.
bool needs_reference(const Tensor& query, const Tensor& key, const Optional& head_gate, const Optional& seed) {
  if (query.numel() == 0 || key.numel() == 0 || (seed && (head_gate || !short_attention::is_short(key))))
    return true;
  return key.size(2) < 16 && !short_attention::is_short(key) &&
      !std::isfinite(query.sum().item<double>() + key.sum().item<double>());
}

short_attention::Dropout dropout_of(const Optional& seed, double p) {
  return seed ? short_attention::Dropout{p, static_cast<uint64_t>(seed->item<int64_t>())} : short_attention::Dropout{};
}

std::tuple<Tensor, Tensor> attend(
    const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, const Optional& mask, double scale,
    const short_attention::Dropout& dropout) {
  if (short_attention::is_short(key))
    return short_attention::attention(query, key, value, is_causal, mask, scale, dropout);
  return at::_scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, is_causal, mask, scale);
}

Three attend_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, bool is_causal, const Optional& mask, double scale,
    const short_attention::Dropout& dropout) {
  if (short_attention::is_short(key))
    return short_attention::attention_backward(grad, query, key, value, logsumexp, is_causal, mask, scale, dropout);
  return at::_scaled_dot_product_flash_attention_for_cpu_backward(
      grad, query, key, value, output, logsumexp, 0.0, is_causal, mask, scale);
}

Three gated_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate, const Optional& attn_mask,
    const Optional& seed, double dropout_p, bool is_causal, double scale, bool gate_grad) {
  if (needs_reference(query, key, head_gate, seed))
    return by_reference<decltype(gated_attention)>(
        "fastdistill::gated_attention", query, key, value, head_gate, attn_mask, seed, dropout_p, is_causal, scale,
        gate_grad);
  const int64_t batch = query.size(0), count = query.size(1);
  const auto heads = parts(head_gate, batch, count, gate_grad);
  const auto statistics = query.options().dtype(at::toOpMathType(query.scalar_type()));
  Whole output(heads, query, true, gate_grad);
  Whole logsumexp(heads, at::empty({batch, count, 1, query.size(2)}, statistics));
  Tensor ungated = at::empty({0}, query.options());
  const Optional mask = additive_mask(attn_mask, query);
  const Tensor k = repeated(key, count, heads, false), v = repeated(value, count, heads, false);
  const auto dropout = dropout_of(seed, dropout_p);
  for (const Heads& part : heads) {
    const auto [attention, sums] =
        attend(part.pack(query), part.pack(k), part.pack(v), is_causal, part.pack_mask(mask), scale, dropout);
    output.add(part, attention);
    logsumexp.add(part, sums.contiguous().unsqueeze(2));
    if (gate_grad) // then all heads are one part
      ungated = by_token(attention);
  }
  return {by_token(output.get()), ungated, logsumexp.get().squeeze(2).contiguous()};
}

Four gated_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate,
    const Optional& attn_mask, const Optional& seed, const Tensor& output, const Tensor& logsumexp, double dropout_p,
    bool is_causal, double scale, bool gate_grad) {
  if (needs_reference(query, key, head_gate, seed))
    return by_reference<decltype(gated_attention_backward)>(
        "fastdistill::gated_attention_backward", grad_output, query, key, value, head_gate, attn_mask, seed, output,
        logsumexp, dropout_p, is_causal, scale, gate_grad);
  const int64_t batch = query.size(0), count = query.size(1);
  const Tensor grad = with_rows(grad_output);
  Tensor grad_gate = at::empty({0}, query.options());
  if (gate_grad) {
    const Tensor dots = head_dots(grad, output);
    grad_gate = (head_gate->dim() == 1 ? dots.sum(0) : dots).to(head_gate->scalar_type());
  }
  const auto heads = parts(head_gate, batch, count, false);
  // The output is that of the upstream gradient times the gate or, where it is gated itself, that of value times gate.
  const Optional mask = additive_mask(attn_mask, query);
  const Tensor k = repeated(key, count, heads, !gate_grad), v = repeated(value, count, heads, !gate_grad);
  Whole grad_query(heads, query), grad_key(heads, k), grad_value(heads, v, !gate_grad);
  const auto dropout = dropout_of(seed, dropout_p);
  for (const Heads& part : heads) {
    const auto [of_query, of_key, of_value] = attend_backward(
        part.pack(grad, gate_grad), part.pack(query), part.pack(k), part.pack(v, !gate_grad), part.pack(output),
        part.pack(logsumexp.unsqueeze(2)).squeeze(2), is_causal, part.pack_mask(mask), scale, dropout);
    grad_query.add(part, of_query);
    grad_key.add(part, of_key);
    grad_value.add(part, of_value);
  }
  const auto whole = [](const Whole& grad, const Tensor& x) { return by_token(summed(grad.get(), x.size(1))); };
  return {whole(grad_query, query), whole(grad_key, key), whole(grad_value, value), grad_gate};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("gated_attention", &gated_attention);
  m.impl("gated_attention_backward", &gated_attention_backward);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
