// Launches Triton kernels without Python: the first launch of a specialisation goes through fastdistill::launch_triton,
// that is fastdistill/ops/library.py, which compiles the kernel; later ones go straight to the driver.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cstdint>
#include <string>
#include <vector>

namespace fastdistill::triton {

constexpr int64_t kRows = 3; // strides, of which the last is short and in the innermost loops

// What a kernel is launched with. Its parameters are, in this order: each tensor's address and as many of its strides as
// `strides` says (int64, but the last of kRows int32), sizes (int32) and numbers (float32); then come compile-time
// constants, which Python derives from the options and the sizes.
struct Launch {
  const char* module; // in fastdistill.kernels
  const char* kernel;
  std::vector<at::Tensor> tensors;
  std::vector<int64_t> strides, sizes;
  std::vector<double> numbers;
  std::vector<int64_t> options;
  int64_t rows, pairs; // programs: for each pair as many as the kernel needs for that many rows
};

// Whether Triton is there at all.
bool available();

void run(const Launch& launch);

} // namespace fastdistill::triton
