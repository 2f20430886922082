// kd_ce_loss on CUDA: loss and gradients in one launch, or in two where many blocks' losses are to be added up. Three
// kernels share the work: rows of few classes in registers; on sm_90 long rows streamed through shared memory, so that
// device memory is read once; and any other rows, read twice. Formulas: fastdistill/kernels/kd_row.py.
#include "kd_launch.cuh"
#include "kd_totals.cuh"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <limits>
#include <string>

namespace fastdistill {
namespace {

constexpr int64_t kCountedByAll = 4096; // labels that every block counts for itself
constexpr int kCountBlocks = 128;

// Elements from a row to the next, where all rows are evenly spaced and a row's elements are neighbours.
std::optional<int64_t> row_stride(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  if (x.size(last) > 1 && x.stride(last) != 1)
    return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0; // the stride that would go on as the dimensions after it do
  for (int64_t dim = last - 1; dim >= 0; --dim) {
    if (x.size(dim) == 1)
      continue;
    if (stride && x.stride(dim) != next)
      return std::nullopt;
    if (!stride)
      stride = x.stride(dim);
    next = x.stride(dim) * x.size(dim);
  }
  return stride ? stride : x.size(last);
}

Type type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::kFloat;
    case ScalarType::Double:
      return Type::kDouble;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Half:
      return Type::kHalf;
    default:
      STD_TORCH_CHECK(false, "kd_ce_loss has no kernel for ", torch::headeronly::toString(x.scalar_type()));
  }
}

int label_bytes_of(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Long:
      return 8;
    case ScalarType::Int:
      return 4;
    case ScalarType::Short:
      return 2;
    case ScalarType::Char:
    case ScalarType::Byte:
      return 1;
    default:
      STD_TORCH_CHECK(false, "labels has dtype ", torch::headeronly::toString(labels.scalar_type()), "; expected integers");
  }
}

Divergence divergence_of(const std::string& name) {
  if (name == "forward_kl")
    return Divergence::kForwardKl;
  if (name == "soft_ce")
    return Divergence::kSoftCe;
  STD_TORCH_CHECK(name == "reverse_kl", "divergence is '", name, "'; expected forward_kl, soft_ce or reverse_kl");
  return Divergence::kReverseKl;
}

struct Options {
  double temperature, factor, kd_weight, ce_weight, label_smoothing;
  Divergence divergence;
  int64_t ignore_index;
  bool mean, reduced, return_terms;
};

template <typename A>
void run(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels, const Options& options,
    const Tensor& loss, const Tensor& student_grad, const Tensor& teacher_grad) {
  constexpr double kLog2E = 1.44269504088896340736;
  constexpr int kMaxPower = 16; // the largest temperature for which exp(z) is taken as a power of exp(z / temperature)
  const bool none = options.divergence == Divergence::kNone;
  const int64_t classes = student.size(-1);
  STD_TORCH_CHECK(classes <= std::numeric_limits<int>::max() / 2, "logits have ", classes, " classes; that is too many");
  const auto pointer = [](const Tensor& x) { return x.numel() ? x.mutable_data_ptr() : nullptr; };
  Problem<A> problem = {};
  problem.student = student.const_data_ptr();
  problem.teacher = none ? problem.student : teacher.const_data_ptr();
  problem.labels = labels ? labels->const_data_ptr() : nullptr;
  A* const losses = static_cast<A*>(loss.mutable_data_ptr()); // the terms' behind it
  (options.reduced ? problem.loss : problem.losses) = losses;
  problem.student_grad = pointer(student_grad);
  problem.teacher_grad = pointer(teacher_grad);
  problem.rows = student.numel() / classes;
  problem.student_stride = *row_stride(student);
  problem.teacher_stride = none ? problem.student_stride : *row_stride(teacher);
  problem.ignore_index = options.ignore_index;
  problem.classes = static_cast<int>(classes);
  problem.label_bytes = labels ? label_bytes_of(*labels) : 0;
  problem.student_type = type_of(student);
  problem.teacher_type = type_of(teacher);
  problem.divergence = options.divergence;
  problem.unsigned_labels = labels && labels->scalar_type() == ScalarType::Byte;
  problem.task = labels && options.ce_weight != 0;
  problem.smooth = problem.task && options.label_smoothing != 0;
  problem.mean = options.mean;
  const double temperature = none ? 1 : options.temperature;
  problem.power = 1;
  if (problem.task && temperature != 1) {
    const bool as_good = problem.student_type == Type::kBFloat16 || problem.student_type == Type::kHalf;
    problem.power = as_good && temperature <= kMaxPower && temperature == std::floor(temperature) ? temperature : 0;
  }
  problem.temperature = static_cast<A>(temperature);
  problem.scale = static_cast<A>(kLog2E / temperature);
  problem.factor = static_cast<A>(options.factor);
  problem.kd_weight = static_cast<A>(none ? 0 : options.kd_weight);
  problem.soft_weight = static_cast<A>(none ? 0 : options.kd_weight * options.factor / temperature);
  problem.ce_weight = static_cast<A>(options.ce_weight);
  problem.label_smoothing = static_cast<A>(options.label_smoothing);

  const auto device = student.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  Launch launch{static_cast<cudaStream_t>(stream), Device::at(device)};
  std::optional<Tensor> counts;
  if (problem.mean && labels && problem.rows > kCountedByAll) {
    problem.count_blocks = std::min<int64_t>((problem.rows + kThreads - 1) / kThreads, kCountBlocks);
    const int64_t size = problem.count_blocks;
    counts = empty({&size, 1}, ScalarType::Int, device);
    int* const to = static_cast<int*>(counts->mutable_data_ptr());
    count_labels<<<problem.count_blocks, kThreads, 0, launch.stream>>>(problem, to);
    problem.counts = to;
  }
  std::optional<Tensor> row_terms;
  if (options.return_terms && options.reduced) {
    const int64_t size = 2 * problem.rows;
    row_terms = empty({&size, 1}, loss.scalar_type(), device);
    problem.terms = static_cast<A*>(row_terms->mutable_data_ptr());
  } else if (options.return_terms) {
    problem.terms = losses + problem.rows;
  }
  A* const reduced = problem.loss;
  const int blocks = launch_rows(problem, launch);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (problem.totals) {
    add_up<<<1, kThreads, 0, launch.stream>>>(problem.totals, blocks, reduced);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  if (row_terms) {
    add_up_terms<<<2, kThreads, 0, launch.stream>>>(problem, reduced + 1);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

std::tuple<Tensor, Tensor, Tensor> kd_ce_loss(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    const std::optional<Tensor>& labels,
    double temperature,
    double kd_weight,
    double ce_weight,
    const std::string& divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    double label_smoothing,
    const std::string& reduction,
    bool student_grad,
    bool teacher_grad,
    bool return_terms) {
  const auto evenly_spaced = [](const Tensor& x) { return row_stride(x) ? x : torch::stable::contiguous(x); };
  const Tensor student = evenly_spaced(student_logits), teacher = evenly_spaced(teacher_logits);
  std::optional<Tensor> row_labels = labels;
  if (labels && !labels->is_contiguous())
    row_labels = torch::stable::contiguous(*labels);
  const bool wide = student.scalar_type() == ScalarType::Double || teacher.scalar_type() == ScalarType::Double;
  const auto shape = student_logits.sizes();
  const auto device = student.get_device_index();
  const auto gradient = [&](const Tensor& logits, bool wanted) {
    const int64_t none = 0;
    return wanted ? empty(shape, logits.scalar_type(), device) : empty({&none, 1}, logits.scalar_type(), device);
  };
  const Tensor grad_student = gradient(student, student_grad), grad_teacher = gradient(teacher, teacher_grad);
  const bool reduced = reduction != "none";
  std::vector<int64_t> loss_shape(shape.begin(), reduced ? shape.begin() : shape.end() - 1);
  if (return_terms)
    loss_shape.insert(loss_shape.begin(), 3);
  const Tensor loss = empty(loss_shape, wide ? ScalarType::Double : ScalarType::Float, device);
  if (student.numel() == 0) {
    if (reduced)
      torch::stable::fill_(loss, reduction == "mean" ? std::numeric_limits<double>::quiet_NaN() : 0);
    return {loss, grad_student, grad_teacher};
  }
  const Options options{
      .temperature = temperature,
      .factor = scale_by_temperature ? temperature * temperature : 1,
      .kd_weight = kd_weight,
      .ce_weight = ce_weight,
      .label_smoothing = label_smoothing,
      .divergence = kd_weight == 0 ? Divergence::kNone : divergence_of(divergence),
      .ignore_index = ignore_index,
      .mean = reduction == "mean",
      .reduced = reduced,
      .return_terms = return_terms};
  (wide ? run<double> : run<float>)(student, teacher, row_labels, options, loss, grad_student, grad_teacher);
  return {loss, grad_student, grad_teacher};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdistill, CUDA, m) {
  m.impl("kd_ce_loss", TORCH_BOX(&kd_ce_loss));
}

} // namespace fastdistill
