#include "attention_by_cudnn.h"

#include <ATen/Context.h>
#include <ATen/SDPBackend.h>
#include <ATen/ops/_fused_sdp_choice.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention.h>
#include <ATen/ops/_scaled_dot_product_cudnn_attention_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace fastdistill::cudnn {
namespace {

using at::Tensor;

Tensor by_position(const Tensor& x) {
  const Tensor rows = x.transpose(1, 2);
  return rows.is_contiguous() ? x : rows.contiguous().transpose(1, 2);
}

} // namespace

bool takes(const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  if (!query.is_cuda() || at::globalContext().deterministicAlgorithms())
    return false;
  const int64_t choice = at::_fused_sdp_choice(
      query, key, value, /*attn_mask=*/std::nullopt, /*dropout_p=*/0, is_causal, scale, /*enable_gqa=*/false);
  return static_cast<at::SDPBackend>(choice) == at::SDPBackend::cudnn_attention;
}

std::tuple<Tensor, Tensor> attention(
    const Tensor& query, const Tensor& key, const Tensor& value, bool is_causal, double scale) {
  const auto found = at::_scaled_dot_product_cudnn_attention(
      query, key, value, /*attn_bias=*/std::nullopt, /*compute_log_sumexp=*/true, /*dropout_p=*/0, is_causal,
      /*return_debug_mask=*/false, scale);
  return {by_position(std::get<0>(found)), std::get<1>(found).reshape({query.size(0), query.size(1), query.size(2)})};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(
    const Tensor& grad_output, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& output,
    const Tensor& logsumexp, bool is_causal, double scale) {
  const Tensor seed = at::empty({}, query.options().dtype(at::kLong)), offset = at::empty_like(seed); // dropout's
  const auto [grad_query, grad_key, grad_value] = at::_scaled_dot_product_cudnn_attention_backward(
      by_position(grad_output), query, key, value, by_position(output), logsumexp.unsqueeze(-1), seed, offset,
      /*attn_bias=*/Tensor(), /*cum_seq_q=*/Tensor(), /*cum_seq_k=*/Tensor(), query.size(2), key.size(2),
      /*dropout_p=*/0, is_causal, scale);
  return {by_position(grad_query), by_position(grad_key), by_position(grad_value)};
}

} // namespace fastdistill::cudnn
