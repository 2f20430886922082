#include "launch.h"

#include "../autograd/dispatch.h"

#include <c10/core/DeviceGuard.h>

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <unordered_map>

namespace fastdistill::triton {
namespace {

// Of the driver's and PyTorch's interfaces only what is needed, found when first used: this is compiled without CUDA, too.
using LaunchKernel = int (*)(
    void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared, void* stream,
    void** parameters, void** extra);
using RetainPrimaryContext = int (*)(void** context, int device);
using SetCurrentContext = int (*)(void* context);
using CurrentStream = int32_t (*)(int32_t device, void** stream);

constexpr int kInvalidContext = 201;

template <typename Function>
Function find(const char* library, const char* name) {
  void* const handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  TORCH_CHECK(handle, library, " is not loaded");
  void* const function = dlsym(handle, name);
  TORCH_CHECK(function, library, " has no ", name);
  return reinterpret_cast<Function>(function);
}

// Makes the context that CUDA's runtime uses this thread's.
void enter_context(int32_t device) {
  static const auto retain = find<RetainPrimaryContext>("libcuda.so.1", "cuDevicePrimaryCtxRetain");
  static const auto set_current = find<SetCurrentContext>("libcuda.so.1", "cuCtxSetCurrent");
  void* context = nullptr;
  TORCH_CHECK(retain(&context, device) == 0 && set_current(context) == 0, "no CUDA context of device ", device);
}

struct Kernel {
  void* function;
  unsigned threads, shared;
  int64_t rows; // that a program takes of a pair; 0: all
};

std::string specialisation(const Launch& launch) {
  std::string key(launch.kernel);
  const auto add = [&](int64_t x) { key.push_back(static_cast<char>(x)); };
  add(launch.tensors[0].device().index());
  for (const at::Tensor& x : launch.tensors) // what Triton asks of a pointer
    add(static_cast<int>(x.scalar_type()) * 2 + (reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0));
  for (const int64_t size : launch.sizes) { // tiles depend on their powers of two, masks on what divides them
    add(std::bit_width(static_cast<uint64_t>(std::clamp<int64_t>(size - 1, 0, 1023))));
    add(size == 0 ? 7 : std::min(std::countr_zero(static_cast<uint64_t>(size)), 7));
  }
  for (const int64_t option : launch.options)
    add(option);
  return key;
}

void launch_kernel(const Kernel& kernel, const Launch& launch) {
  static const auto current_stream = find<CurrentStream>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  static const auto cu_launch = find<LaunchKernel>("libcuda.so.1", "cuLaunchKernel");
  std::array<void*, 16> addresses;
  std::array<int32_t, 16> narrow;
  std::array<float, 4> numbers;
  std::array<void*, 64> parameters;
  std::array<void*, 2> scratch = {nullptr, nullptr}; // parameters that Triton adds
  size_t count = 0;
  size_t narrowed = 0;
  const auto add_narrow = [&](int64_t value) {
    parameters.at(count++) = &(narrow.at(narrowed++) = static_cast<int32_t>(value));
  };
  for (size_t i = 0; i < launch.tensors.size(); ++i) {
    parameters.at(count++) = &(addresses.at(i) = launch.tensors[i].data_ptr());
    const bool rows = launch.strides[i] == kRows;
    const at::IntArrayRef strides = launch.tensors[i].strides();
    for (const int64_t& stride : strides.slice(0, launch.strides[i] - rows))
      parameters.at(count++) = const_cast<int64_t*>(&stride);
    if (rows)
      add_narrow(strides[2]);
  }
  for (const int64_t size : launch.sizes)
    add_narrow(size);
  for (size_t i = 0; i < launch.numbers.size(); ++i)
    parameters.at(count++) = &(numbers.at(i) = static_cast<float>(launch.numbers[i]));
  for (void*& pointer : scratch)
    parameters.at(count++) = &pointer;

  const int64_t blocks = launch.pairs * (kernel.rows == 0 ? 1 : (launch.rows + kernel.rows - 1) / kernel.rows);
  void* stream = nullptr;
  const int32_t device = launch.tensors[0].device().index();
  TORCH_CHECK(current_stream(device, &stream) == 0, "no current CUDA stream");
  const auto attempt = [&] {
    return cu_launch(
        kernel.function, blocks, 1, 1, kernel.threads, 1, 1, kernel.shared, stream, parameters.data(), nullptr);
  };
  int status = attempt();
  if (status == kInvalidContext) { // a thread that has not called CUDA's runtime yet
    enter_context(device);
    status = attempt();
  }
  TORCH_CHECK(status == 0, "launching ", launch.kernel, " of ", launch.module, " failed: CUDA driver error ", status);
}

using Compile = std::vector<int64_t>(
    std::string_view, std::string_view, at::TensorList, at::IntArrayRef, at::IntArrayRef, at::ArrayRef<double>,
    at::IntArrayRef, int64_t, int64_t);

} // namespace

bool available() {
  static const bool found = c10::Dispatcher::singleton().findSchema({"fastdistill::launch_triton", ""}).has_value();
  return found;
}

void run(const Launch& launch) {
  static std::mutex mutex;
  static std::unordered_map<std::string, Kernel> kernels;
  const c10::OptionalDeviceGuard guard(launch.tensors[0].device());
  const std::string key = specialisation(launch);
  {
    const std::lock_guard lock(mutex);
    const auto found = kernels.find(key);
    if (found != kernels.end())
      return launch_kernel(found->second, launch); // nodes of the map stay where they are
  }
  static const auto op = find_op<Compile>("fastdistill::launch_triton");
  const std::vector<int64_t> compiled = op.call(
      launch.module, launch.kernel, launch.tensors, launch.strides, launch.sizes, launch.numbers, launch.options,
      launch.rows, launch.pairs);
  if (compiled.empty()) // the interpreter's
    return;
  const std::lock_guard lock(mutex);
  kernels[key] = {
      reinterpret_cast<void*>(compiled[0]), static_cast<unsigned>(compiled[1]), static_cast<unsigned>(compiled[2]),
      compiled[3]};
}

} // namespace fastdistill::triton
