// gated_attention on CUDA, by the Triton kernels of kernels/gated_attention.py: what is given to which, and what is copied
// first because they cannot read it as it is.
#include "attention_by_cudnn.h"
#include "launch.h"

#include "../autograd/dispatch.h"

#include <ATen/Functions.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

namespace fastdistill {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kMaxSize = 128; // of a head
constexpr int64_t kAlignment = 8; // elements that one instruction copies
constexpr int64_t kMaxKeys = 128; // in a tile
constexpr int64_t kWholeKeys = 128, kWholeQueries = 256; // up to as many, one program has a whole head's backward,
constexpr int64_t kWholeKeyElements = 128 * 64; // which holds the keys in registers, in half precision only
constexpr int64_t kDotRows = 64; // that a program takes of the kernels "dots" and "gate_gradient"
constexpr int64_t kLong = 512, kLongWide = 256; // tokens, of heads of up to 64 channels and of wider ones
enum Mask { kNone, kBool, kFloat };

using Forward = std::tuple<Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&, double, bool, double,
    bool);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
    const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Optional&,
    const Tensor&, const Tensor&, double, bool, double, bool);

// The op as it is on a device of which no kernel is registered: in plain PyTorch.
template <typename Signature, typename... Args>
auto by_reference(const char* name, const Args&... args) {
  return find_op<Signature>(name).redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), args...);
}

bool is_for_reference(const Tensor& query, const Tensor& key) {
  return !triton::available() || query.scalar_type() == at::kDouble || query.size(3) > kMaxSize ||
      query.numel() == 0 || key.numel() == 0;
}

// [B, H, S, D] in memory as [B, S, H, D].
Tensor empty_heads(const Tensor& x) {
  return at::empty_permuted(x.sizes(), {0, 2, 1, 3}, x.options());
}

// With channels of zeros, which add nothing, up to a multiple of kAlignment.
Tensor widened(const Tensor& x) {
  return at::constant_pad_nd(x, {0, (kAlignment - x.size(3) % kAlignment) % kAlignment});
}

Tensor narrowed(const Tensor& x, int64_t size) {
  const Tensor part = x.narrow(3, 0, size);
  return empty_heads(part).copy_(part);
}

bool begins_at_16_bytes(const Tensor& x) {
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

// With rows that begin at multiples of kAlignment elements, not too far apart, copied if need be; so is their number of
// channels.
Tensor aligned(const Tensor& x) {
  bool even = x.stride(3) == 1 && begins_at_16_bytes(x) && x.stride(2) <= std::numeric_limits<int32_t>::max();
  for (int dim = 0; dim < 3; ++dim)
    even = even && x.stride(dim) % kAlignment == 0;
  return even ? x : x.clone(at::MemoryFormat::Contiguous);
}

// A mask with a row for each query, its rows whole tiles, and in single precision numbers.
//
// So the kernels can copy it 16 bytes at a time, past the registers. Where they cannot, the compiler computes the softmax
// twice, laid out as the products are and as the mask is read.
Tensor in_tiles(const Tensor& mask, bool single) {
  const int64_t keys = mask.size(3);
  const auto dtype = single ? at::kFloat : mask.scalar_type();
  bool even = keys % kMaxKeys == 0 && mask.stride(3) == 1 && begins_at_16_bytes(mask) && mask.scalar_type() == dtype;
  for (int dim = 0; dim < 3; ++dim)
    even = even && mask.stride(dim) % 16 == 0;
  if (even)
    return mask;
  Tensor once = mask;
  for (int dim = 0; dim < 4; ++dim)
    if (mask.stride(dim) == 0)
      once = once.narrow(dim, 0, 1);
  const auto sizes = once.sizes();
  const Tensor tiles = at::full(
      {sizes[0], sizes[1], sizes[2], (keys + kMaxKeys - 1) / kMaxKeys * kMaxKeys},
      mask.scalar_type() == at::kBool ? 0.0 : -std::numeric_limits<double>::infinity(), once.options().dtype(dtype));
  tiles.narrow(3, 0, keys).copy_(once);
  return tiles.expand({mask.size(0), mask.size(1), mask.size(2), -1});
}

// Whether 32 bits count what lies between a tensor's first element and its last, as cuDNN does.
bool is_within_32_bits(const Tensor& x) {
  int64_t last = 0;
  for (int64_t dim = 0; dim < x.dim(); ++dim)
    last += (x.size(dim) - 1) * x.stride(dim);
  return last <= std::numeric_limits<int32_t>::max();
}

// Whether cuDNN makes the products, which of long sequences takes it less time (docs/gpu.md): where all heads are computed
// in any case, for want of gates or for their gradient.
bool is_for_cudnn(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate, const Optional& attn_mask,
    const Optional& seed, bool is_causal, double scale, bool gate_grad) {
  const int64_t queries = query.size(2), keys = key.size(2);
  const bool is_long = std::min(queries, keys) >= (query.size(3) <= 64 ? kLong : kLongWide);
  const bool is_plain = (queries == keys || !is_causal) && !attn_mask && !seed && key.size(1) == query.size(1);
  return is_long && is_plain && (gate_grad || !head_gate) && query.scalar_type() != at::kFloat &&
      is_within_32_bits(query) && is_within_32_bits(key) && is_within_32_bits(value) &&
      cudnn::takes(query, key, value, is_causal, scale);
}

// Of its shares, [B, H] or [B, H, blocks].
Tensor gate_gradient(const Tensor& shares, const Tensor& head_gate) {
  const bool whole = shares.dim() == 2;
  const Tensor sums = head_gate.dim() == 1 ? shares.sum(whole ? at::IntArrayRef{0} : at::IntArrayRef{0, 2})
      : whole                              ? shares
                                           : shares.sum(2);
  return sums.to(head_gate.scalar_type());
}

// What the kernels of one call share.
struct Call {
  int64_t batch, heads, queries, keys, size, group; // a group's heads have one key and value
  Tensor gate, mask, seed; // where there are none, any tensor: it is not read
  double scale, dropout_p;
  std::vector<int64_t> options; // as kernels/gated_attention.py takes them apart

  Call(const Tensor& query, const Tensor& key, const Optional& head_gate, const Optional& attn_mask,
       const Optional& seed_, double dropout_p_, bool is_causal, double scale_, bool gate_grad)
      : batch(query.size(0)), heads(query.size(1)), queries(query.size(2)), keys(key.size(2)), size(query.size(3)),
        group(heads / key.size(1)), gate(query), mask(query), seed(seed_.value_or(query)), scale(scale_),
        dropout_p(seed_ ? dropout_p_ : 0) {
    if (head_gate)
      gate = head_gate->expand({batch, heads});
    Mask kind = kNone;
    bool rows = false;
    if (attn_mask) {
      kind = attn_mask->scalar_type() == at::kBool ? kBool : kFloat;
      mask = attn_mask->expand({batch, heads, queries, keys});
      rows = queries > 1 && mask.stride(2) != 0;
      if (rows)
        mask = in_tiles(mask, query.scalar_type() == at::kFloat);
      if (mask.scalar_type() == at::kBool)
        mask = mask.view(at::kByte);
    }
    options = {size, group, head_gate.has_value(), gate_grad, kind, rows, is_causal, seed_.has_value()};
  }

  // A launch whose kernel takes the tensors, the first `strided` of them with the strides of rows, and what all take.
  void launch(const char* kernel, std::vector<Tensor> tensors, size_t strided, int64_t rows) const {
    std::vector<int64_t> strides(tensors.size(), 0);
    std::fill_n(strides.begin(), strided, triton::kRows);
    tensors.insert(tensors.end(), {gate, mask, seed});
    strides.insert(strides.end(), {2, 4, 0});
    triton::run({"gated_attention", kernel, std::move(tensors), std::move(strides), {heads, queries, keys},
                 {scale, dropout_p}, options, rows, batch * heads});
  }
};

std::tuple<Tensor, Tensor, Tensor> gated_attention(
    const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate, const Optional& attn_mask,
    const Optional& seed, double dropout_p, bool is_causal, double scale, bool gate_grad) {
  if (is_for_reference(query, key))
    return by_reference<Forward>("fastdistill::gated_attention", query, key, value, head_gate, attn_mask, seed,
                                 dropout_p, is_causal, scale, gate_grad);
  if (const int64_t size = query.size(3); size % kAlignment != 0) {
    auto [output, ungated, logsumexp] = gated_attention(
        widened(query), widened(key), widened(value), head_gate, attn_mask, seed, dropout_p, is_causal, scale,
        gate_grad);
    return {narrowed(output, size), gate_grad ? narrowed(ungated, size) : ungated, logsumexp};
  }
  const Call call(query, key, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad);
  if (is_for_cudnn(query, key, value, head_gate, attn_mask, seed, is_causal, scale, gate_grad)) {
    const auto [ungated, logsumexp] = cudnn::attention(aligned(query), aligned(key), aligned(value), is_causal, scale);
    if (!gate_grad)
      return {ungated, at::empty({0}, query.options()), logsumexp};
    const Tensor output = empty_heads(query);
    call.launch("gate", {ungated, output}, 2, call.queries);
    return {output, ungated, logsumexp};
  }
  const Tensor output = empty_heads(query);
  const Tensor ungated = gate_grad ? empty_heads(query) : at::empty({0}, query.options());
  const Tensor logsumexp = at::empty({call.batch, call.heads, call.queries}, query.options().dtype(at::kFloat));
  call.launch("forward",
              {aligned(query), aligned(key), aligned(value), output, gate_grad ? ungated : output, logsumexp}, 4,
              call.queries);
  return {output, ungated, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Optional& head_gate,
    const Optional& attn_mask, const Optional& seed, const Tensor& output, const Tensor& logsumexp, double dropout_p,
    bool is_causal, double scale, bool gate_grad) {
  if (is_for_reference(query, key))
    return by_reference<Backward>("fastdistill::gated_attention_backward", grad_output, query, key, value, head_gate,
                                  attn_mask, seed, output, logsumexp, dropout_p, is_causal, scale, gate_grad);
  if (const int64_t size = query.size(3); size % kAlignment != 0) {
    auto [grad_query, grad_key, grad_value, grad_gate] = gated_attention_backward(
        widened(grad_output), widened(query), widened(key), widened(value), head_gate, attn_mask, seed, widened(output),
        logsumexp, dropout_p, is_causal, scale, gate_grad);
    return {narrowed(grad_query, size), narrowed(grad_key, size), narrowed(grad_value, size), grad_gate};
  }
  const Call call(query, key, head_gate, attn_mask, seed, dropout_p, is_causal, scale, gate_grad);
  const auto numbers = query.options().dtype(at::kFloat);
  const Tensor q = aligned(query), k = aligned(key), v = aligned(value), o = aligned(output), g = aligned(grad_output),
               lse = logsumexp.contiguous();
  const auto shares_of_blocks = [&] {
    return at::empty({call.batch, call.heads, (call.queries + kDotRows - 1) / kDotRows}, numbers);
  };
  Tensor grad_gate = at::empty({0}, query.options());
  if (is_for_cudnn(query, key, value, head_gate, attn_mask, seed, is_causal, scale, gate_grad)) {
    Tensor gated = g;
    if (gate_grad) {
      gated = empty_heads(query);
      const Tensor shares = shares_of_blocks();
      call.launch("gate_gradient", {g, o, gated, shares}, 3, call.queries);
      grad_gate = gate_gradient(shares, *head_gate);
    }
    const auto [grad_query, grad_key, grad_value] = cudnn::attention_backward(gated, q, k, v, o, lse, is_causal, scale);
    return {grad_query, grad_key, grad_value, grad_gate};
  }
  // those to key and value of each of a group's heads, which are then added
  const auto empty_members = [&](const Tensor& x) {
    return call.group == 1
        ? empty_heads(x)
        : at::empty({call.batch, call.keys, call.heads, call.size}, numbers).transpose(1, 2);
  };
  const Tensor grad_query = empty_heads(query), grad_key = empty_members(key), grad_value = empty_members(value);
  Tensor shares = lse; // of the gate's gradient; not written unless wanted
  const bool whole = call.keys <= kWholeKeys && call.queries <= kWholeQueries &&
      call.keys * call.size <= kWholeKeyElements && query.scalar_type() != at::kFloat;
  if (whole) {
    if (gate_grad)
      shares = at::empty({call.batch, call.heads}, numbers);
    call.launch("whole", {g, q, k, v, o, grad_query, grad_key, grad_value, lse, shares}, 7, 1);
  } else {
    const Tensor dots = at::empty_like(lse);
    if (gate_grad)
      shares = shares_of_blocks();
    call.launch("dots", {g, o, dots, shares}, 2, call.queries);
    call.launch("key_value", {g, q, k, v, grad_key, grad_value, lse, dots}, 5, call.keys);
    call.launch("query", {g, q, k, v, grad_query, lse, dots}, 5, call.queries);
  }
  if (gate_grad && head_gate)
    grad_gate = gate_gradient(shares, *head_gate);
  const auto added = [&](const Tensor& grad, const Tensor& x) {
    return call.group == 1 ? grad : empty_heads(x).copy_(grad.unflatten(1, {-1, call.group}).sum(2));
  };
  return {grad_query, added(grad_key, key), added(grad_value, value), grad_gate};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("gated_attention", &gated_attention);
  m.impl("gated_attention_backward", &gated_attention_backward);
}

} // namespace fastdistill
