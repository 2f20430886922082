// Attention without gates, masks and dropout by cuDNN, as PyTorch calls it.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace fastdistill::cudnn {

// Whether PyTorch's own attention would be cuDNN's, as it is on Hopper and where
// torch.backends.cuda.enable_cudnn_sdp(False) was not asked for; nor deterministic algorithms, which its gradient is not.
bool takes(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool is_causal, double scale);

// Tensors of heads are [B, H, S, D], D a multiple of 8, S long; what is returned lies in memory as [B, S, H, D], the
// logarithms of the softmax's denominators as [B, H, S].
std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool is_causal, double scale);

std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_output, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& output, const at::Tensor& logsumexp, bool is_causal, double scale);

} // namespace fastdistill::cudnn
