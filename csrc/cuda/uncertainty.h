// The uncertainty of rows of logits on CUDA, for select_uncertain.cu.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>

namespace fastdistill {

torch::stable::Tensor uncertainty_cuda(const torch::stable::Tensor& logits, const std::string& kind, bool normalize);

} // namespace fastdistill
