// Which of kd_ce_loss's kernels is launched, and how.
#pragma once

#include "kd_any_rows.cuh"
#include "kd_few_classes.cuh"
#include "kd_stream.cuh"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <cuda_runtime.h>
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastdistill {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kOneBlock = 49152; // up to as many logits a side for each block, one cluster needs no second launch

// What is asked of a device once.
struct Device {
  int index, multiprocessors, block_memory, memory; // bytes of shared memory, of a block and of a multiprocessor
  bool streams; // has clusters and bulk copies, and runs code that uses them

  explicit Device(int index)
      : index(index),
        multiprocessors(attribute(cudaDevAttrMultiProcessorCount)),
        block_memory(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        memory(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor)) {
    cudaFuncAttributes kernel;
    STD_CUDA_CHECK(cudaFuncGetAttributes(&kernel, stream_rows<float, Divergence::kNone>));
    streams = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 && kernel.ptxVersion >= 90;
  }

  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, index));
    return value;
  }

  static const Device& at(int index) {
    static std::mutex mutex;
    static std::map<int, Device> devices;
    const std::lock_guard<std::mutex> lock(mutex);
    return devices.try_emplace(index, index).first->second;
  }
};

// A contiguous tensor on a CUDA device; torch::stable::new_empty takes several times as long.
Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef shape, ScalarType type, int device) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(shape[i], 1))
    strides[i] = stride;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      shape.size(), shape.data(), strides.data(), code, aoti_torch_device_type_cuda(), device, &handle));
  return Tensor(handle);
}

// How a launch goes, and what its blocks leave behind.
struct Launch {
  cudaStream_t stream;
  const Device& device;
  std::optional<Tensor> scratch = std::nullopt; // what a problem points to while its kernels are launched

  // Room for what so many blocks leave of a sum, unless there is one block.
  template <typename A>
  void expect(Problem<A>& problem, int64_t blocks) {
    if (problem.losses || blocks == 1)
      return;
    const int64_t size = blocks + 1;
    scratch = empty({&size, 1}, ScalarType::Double, device.index);
    problem.totals = static_cast<double*>(scratch->mutable_data_ptr());
  }
};

int tuned(const char* name, int value) {
#ifdef FASTDISTILL_TUNE
  if (const char* chosen = std::getenv(name))
    return std::atoi(chosen);
#endif
  return value;
}

// A launch of clusters; attribute must outlive the result.
cudaLaunchConfig_t config_of(const Launch& launch, int blocks, int threads, int cluster, cudaLaunchAttribute& attribute) {
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = launch.stream;
  config.attrs = &attribute;
  config.numAttrs = launch.device.streams ? 1 : 0;
  return config;
}

template <typename A, int kLanes, int kSize, int kBlock>
int launch_few(Problem<A>& problem, Launch& launch) {
  const int64_t needed = (problem.rows * kLanes + kBlock - 1) / kBlock;
  int cluster = 1;
  while (!problem.losses && launch.device.streams && cluster < kMaxCluster && cluster < needed)
    cluster *= 2;
  const bool one = !problem.losses && problem.rows * problem.classes <= kOneBlock * cluster;
  const int64_t most = launch.device.multiprocessors * (2048 / kBlock);
  const int blocks = one ? cluster : std::min<int64_t>(needed, most);
  if (!one)
    launch.expect(problem, blocks);
  cudaLaunchAttribute attribute;
  const auto config = config_of(launch, blocks, kBlock, one ? cluster : 1, attribute);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, few_classes<A, kLanes, kSize, kBlock>, problem));
  return blocks;
}

template <typename A>
int launch_any(Problem<A>& problem, Launch& launch) {
  const int64_t blocks = std::min<int64_t>(problem.rows, launch.device.multiprocessors * 8);
  launch.expect(problem, blocks);
  any_rows<A><<<blocks, kThreads, 0, launch.stream>>>(problem);
  return blocks;
}

struct StreamPlan {
  Ring ring;
  int cluster, memory; // blocks that share a row; bytes of a block
};

// Rings for rows from kilobytes to megabytes. Of short rows several are under way on a multiprocessor, in blocks of
// their own, so that one's exchange of sums hides behind others' work. What of a row its blocks do not hold is little
// enough for L2 to keep.
StreamPlan plan_stream(const Device& device, int64_t row_bytes, int sides) {
  constexpr int kReserved = 1024; // bytes of a block's shared memory that are the system's
  constexpr int64_t kBlockShare = 532480; // bytes of a row that are one block's
  StreamPlan plan;
  const int at_once = tuned("KD_AT_ONCE", row_bytes <= 40960 ? 4 : row_bytes <= 163840 ? 2 : 1);
  plan.cluster = 1;
  while (plan.cluster < kMaxCluster && row_bytes > kBlockShare * plan.cluster)
    plan.cluster *= 2;
  plan.cluster = tuned("KD_CLUSTER", plan.cluster);
  Ring& ring = plan.ring;
  ring.consumers = tuned("KD_CONSUMERS", (kMaxStreamThreads / at_once / kWarp - 1) * kWarp); // and the producer's warp
  ring.chunk = tuned("KD_CHUNK", at_once == 1 ? ring.consumers : 448);
  const int exchanged = 2 * (ring.consumers / kWarp) * plan.cluster * sizeof(Sums<float>);
  const int barriers = 64, slot = ring.chunk * 16 * sides + 16; // each slot has two barriers
  const int available = std::min(device.memory / at_once - kReserved, device.block_memory) - exchanged - barriers;
  ring.slots = tuned("KD_SLOTS", available / slot);
  ring.keep = std::max(ring.slots - tuned("KD_SPARE", std::max(ring.slots / 8, at_once == 4 ? 1 : 2)), 1);
  plan.memory = ring.slots * slot + exchanged + barriers;
  return plan;
}

template <typename T, Divergence kDivergence>
int launch_stream(Problem<float>& problem, Launch& launch) {
  const auto kernel = stream_rows<T, kDivergence>;
  constexpr int kSides = kDivergence == Divergence::kNone ? 1 : 2;
  const StreamPlan plan = plan_stream(launch.device, int64_t{problem.classes} * sizeof(T) * kSides, kSides);
  cudaLaunchAttribute attribute;
  auto config = config_of(launch, plan.cluster, plan.ring.consumers + kWarp, plan.cluster, attribute);
  config.dynamicSmemBytes = plan.memory;

  int clusters = 0; // that a device holds at once
  {
    static std::mutex mutex;
    static std::map<std::tuple<int, int, int, int>, int> known;
    const std::lock_guard<std::mutex> lock(mutex);
    const auto [found, is_new] =
        known.try_emplace({launch.device.index, plan.cluster, plan.ring.consumers, plan.memory}, 0);
    if (is_new) {
      STD_CUDA_CHECK(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.device.block_memory));
      STD_CUDA_CHECK(cudaFuncSetAttribute(
          kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
      STD_CUDA_CHECK(cudaOccupancyMaxActiveClusters(&found->second, kernel, &config));
    }
    clusters = found->second;
  }
  STD_TORCH_CHECK(clusters > 0, "no multiprocessor holds a block of ", plan.memory, " bytes of shared memory");
  clusters = std::min<int64_t>(clusters, problem.rows);
  launch.expect(problem, clusters);
  config.gridDim = clusters * plan.cluster;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, problem, plan.ring));
  return clusters;
}

template <typename T>
int launch_stream_of(Problem<float>& problem, Launch& launch) {
  switch (problem.divergence) {
    case Divergence::kForwardKl:
      return launch_stream<T, Divergence::kForwardKl>(problem, launch);
    case Divergence::kSoftCe:
      return launch_stream<T, Divergence::kSoftCe>(problem, launch);
    case Divergence::kReverseKl:
      return launch_stream<T, Divergence::kReverseKl>(problem, launch);
    default:
      return launch_stream<T, Divergence::kNone>(problem, launch);
  }
}

// Where all rows begin as far from a multiple of 16 bytes as their gradients' rows do.
bool can_stream(const Problem<float>& problem, const Device& device) {
  const int size = problem.student_type == Type::kFloat ? 4 : 8;
  const auto same = [&](int64_t stride) { return (stride - problem.classes) % size == 0; };
  const auto aligned = [](const void* x) { return reinterpret_cast<uintptr_t>(x) % 16 == 0; };
  return device.streams && problem.student_type == problem.teacher_type && same(problem.student_stride) &&
      same(problem.teacher_stride) && aligned(problem.student) && aligned(problem.teacher) &&
      aligned(problem.student_grad) && aligned(problem.teacher_grad);
}

// The number of blocks, or clusters of blocks, that leave a share of a sum.
template <typename A>
int launch_rows(Problem<A>& problem, Launch& launch) {
  constexpr int kBlock = sizeof(A) == 4 ? 512 : 256;
  if (problem.classes <= 4)
    return launch_few<A, 1, 4, kBlock>(problem, launch);
  if (problem.classes <= 32)
    return launch_few<A, 4, 8, kBlock>(problem, launch);
  if (problem.classes <= 256)
    return launch_few<A, kWarp, 8, kBlock>(problem, launch);
  constexpr int kSize = sizeof(A) == 4 ? 32 : 16;
  if (problem.classes <= kWarp * kSize)
    return launch_few<A, kWarp, kSize, 256>(problem, launch);
  if constexpr (std::is_same_v<A, float>) {
    if (can_stream(problem, launch.device)) {
      if (problem.student_type == Type::kBFloat16)
        return launch_stream_of<__nv_bfloat16>(problem, launch);
      if (problem.student_type == Type::kHalf)
        return launch_stream_of<__half>(problem, launch);
      return launch_stream_of<float>(problem, launch);
    }
  }
  return launch_any(problem, launch);
}

} // namespace
} // namespace fastdistill
