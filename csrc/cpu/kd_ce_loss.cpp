// kd_ce_loss on CPU: a row, or a vector's worth of short rows, at a time, kept in cache. Three sweeps over it: maxima;
// exponentials and their sums; the gradient. Formulas: fastdistill/ops/kd_ce_loss.py.
#include "row.h"

#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <tuple>
#include <utility>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

// How exp(s) of the cross-entropy comes from exp(s / temperature) of the distillation term.
enum class Share { kSeparate, kSame, kSquare };

struct Options {
  double temperature, kd_weight, ce_weight, label_smoothing;
  bool self_entropy; // KL has the target's own entropy, soft cross-entropy has not
  double grad_scale; // 1 / rows counted for a mean
};

// A thread's working rows; memory that a case does not use is never touched.
template <typename T>
struct Scratch {
  explicit Scratch(int64_t size) {
    arena.resize_for_overwrite(6 * size);
    T* next = arena.data();
    for (T** row : {&student, &teacher, &kd_student, &kd_teacher, &ce_student, &grad})
      *row = std::exchange(next, next + size);
  }
  c10::SmallVector<T, 512> arena;
  T *student, *teacher; // rows as T
  T *kd_student, *kd_teacher, *ce_student; // exponentials
  T* grad; // where the tensor itself cannot be computed in
};

template <typename Form, bool KD, bool CE, bool REVERSE, Share SHARE>
class RowLoss {
  using T = typename Form::T;
  using V = Vec<T>;
  using Stat = typename Form::Stat;

 public:
  RowLoss(const Options& options, int64_t classes, const Scratch<T>& scratch)
      : options_(options),
        classes_(classes),
        size_(classes * Form::kRows),
        inv_temperature_(1 / options.temperature),
        kd_grad_(options.kd_weight / options.temperature * options.grad_scale),
        ce_grad_(options.ce_weight * options.grad_scale),
        exp_s_(scratch.kd_student),
        exp_t_(scratch.kd_teacher),
        exp_ce_(SHARE == Share::kSame ? scratch.kd_student : scratch.ce_student) {}

  // The loss; leaves behind what the gradients need.
  Stat forward(const T* student, const T* teacher, const int64_t* labels) {
    student_ = student;
    teacher_ = teacher;
    student_max_ = max_of<Form>(student, size_);
    if constexpr (KD)
      teacher_max_ = max_of<Form>(teacher, size_);
    Stat sum_s(0), sum_t(0), sum_ce(0), cross(0);
    constexpr int64_t kBlock = 2048; // lanes are summed in T for so long before they join the Stat: keeps long rows exact
    for (int64_t begin = 0; begin < size_; begin += kBlock) {
      V block_s(0), block_t(0), block_ce(0), block_cross(0);
      for_each_vector<T>(begin, std::min(begin + kBlock, size_), [&](int64_t i, int64_t count) {
        const V s = student_centred(i, count);
        V exp_s;
        if constexpr (KD) {
          const V scaled_s = s * V(inv_temperature_), scaled_t = teacher_scaled(i, count);
          const V exp_t = exp_nonpositive(scaled_t);
          exp_s = exp_nonpositive(scaled_s);
          exp_s.store(exp_s_ + i, count);
          exp_t.store(exp_t_ + i, count);
          block_s = block_s + exp_s;
          block_t = block_t + exp_t;
          block_cross = block_cross + weighted(REVERSE ? exp_s : exp_t, difference(scaled_s, scaled_t));
        }
        if constexpr (CE && SHARE != Share::kSame) {
          const V exp_ce = SHARE == Share::kSquare ? exp_s * exp_s : exp_nonpositive(s);
          exp_ce.store(exp_ce_ + i, count);
          block_ce = block_ce + exp_ce;
        }
      });
      sum_s = sum_s + Form::sum(block_s);
      sum_t = sum_t + Form::sum(block_t);
      sum_ce = sum_ce + Form::sum(block_ce);
      cross = cross + Form::sum(block_cross);
    }

    Stat loss(0);
    if constexpr (KD) {
      kd_s_ = Stat(kd_grad_) / sum_s;
      kd_t_ = Stat(kd_grad_) / sum_t;
      const Stat log_s = Form::log(sum_s), log_t = Form::log(sum_t);
      const Stat log_ratio = REVERSE ? log_t - log_s : options_.self_entropy ? log_s - log_t : log_s;
      mean_ = cross / (REVERSE ? sum_s : sum_t);
      loss = Stat(options_.kd_weight) * (mean_ + log_ratio);
    }
    if constexpr (CE) {
      if constexpr (SHARE == Share::kSame)
        sum_ce = sum_s;
      ce_s_ = Stat(ce_grad_) / sum_ce;
      const Stat log_sum = Form::log(sum_ce), smoothing(options_.label_smoothing);
      Stat ce = (Stat(1) - smoothing) * (log_sum + student_max_ - Form::pick(student, labels));
      if (options_.label_smoothing > 0)
        ce = ce + smoothing * (log_sum - mean_centred());
      loss = loss + Stat(options_.ce_weight) * ce;
    }
    return loss;
  }

  void student_grad(const int64_t* labels, T* out) const {
    const V uniform(-ce_grad_ * options_.label_smoothing / classes_);
    const V from_s = Form::spread(kd_s_), from_t = Form::spread(kd_t_), from_ce = Form::spread(ce_s_);
    const V from_both = from_s + from_ce;
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      V g = CE ? uniform : V(0);
      if constexpr (KD && REVERSE)
        g = g + target_grad(exp_s_, from_s, i, count);
      if constexpr (KD && !REVERSE) {
        const V& weight = CE && SHARE == Share::kSame ? from_both : from_s;
        g = at::vec::fmadd(load(exp_s_ + i, count, T(0)), weight, g);
        g = g - load(exp_t_ + i, count, T(0)) * from_t;
      }
      if constexpr (CE && (SHARE != Share::kSame || REVERSE))
        g = at::vec::fmadd(load(exp_ce_ + i, count, T(0)), from_ce, g);
      g.store(out + i, count);
    });
    if constexpr (CE)
      Form::subtract_at(out, labels, ce_grad_ * (1 - options_.label_smoothing));
  }

  void teacher_grad(T* out) const {
    const V from_s = Form::spread(kd_s_), from_t = Form::spread(kd_t_);
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      V g(0);
      if constexpr (KD && REVERSE)
        g = load(exp_t_ + i, count, T(0)) * from_t - load(exp_s_ + i, count, T(0)) * from_s;
      else if constexpr (KD)
        g = target_grad(exp_t_, from_t, i, count);
      g.store(out + i, count);
    });
  }

 private:
  V student_centred(int64_t i, int64_t count) const {
    return load(student_ + i, count, -kInf<T>) - Form::spread(student_max_);
  }

  V teacher_scaled(int64_t i, int64_t count) const {
    return (load(teacher_ + i, count, -kInf<T>) - Form::spread(teacher_max_)) * V(inv_temperature_);
  }

  // log p_target - log p_other (without the first term for soft cross-entropy), up to a constant of the row.
  V difference(const V& s, const V& t) const {
    return REVERSE ? s - t : options_.self_entropy ? t - s : s.neg();
  }

  // The gradient to the target side: p_target * (log p_target - log p_other - divergence), of which the row's constant
  // has gone.
  V target_grad(const T* exps, const V& weight, int64_t i, int64_t count) const {
    const V d = difference(student_centred(i, count) * V(inv_temperature_), teacher_scaled(i, count));
    return weighted(load(exps + i, count, T(0)) * weight, d - Form::spread(mean_));
  }

  // Mean over the classes of s - max(s).
  Stat mean_centred() const {
    Stat total(0);
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      const V s = student_centred(i, count);
      total = total + Form::sum(count < V::size() ? V::set(V(0), s, count) : s);
    });
    return total / Stat(classes_);
  }

  const Options& options_;
  const int64_t classes_, size_;
  const T inv_temperature_, kd_grad_, ce_grad_;
  T *exp_s_, *exp_t_, *exp_ce_;
  const T* student_ = nullptr;
  const T* teacher_ = nullptr;
  Stat student_max_{0}, teacher_max_{0};
  Stat kd_s_{0}, kd_t_{0}, ce_s_{0}; // what an exponential weighs in the gradient
  Stat mean_{0}; // of `difference` over the target's distribution
};

struct Problem {
  const Tensor &student, &teacher;
  const int64_t* labels; // null: no labels
  int64_t ignore_index;
  const Tensor &losses, &grad_student, &grad_teacher;
  bool student_grad, teacher_grad, reverse;
};

template <typename Form, bool KD, bool CE, bool REVERSE, Share SHARE>
void run(const Problem& problem, const Options& options) {
  using T = typename Form::T;
  const int64_t n = problem.student.size(0), classes = problem.student.size(1);
  const RowReader<Form> student(problem.student), teacher(problem.teacher);
  const RowWriter<Form> grad_student(problem.grad_student), grad_teacher(problem.grad_teacher);
  T* losses = problem.losses.mutable_data_ptr<T>();
  const int64_t groups = (n + Form::kRows - 1) / Form::kRows;
  at::parallel_for(0, groups, row_grain(classes * Form::kRows), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(classes * Form::kRows);
    RowLoss<Form, KD, CE, REVERSE, SHARE> row(options, classes, scratch);
    for (int64_t first = begin * Form::kRows; first < std::min(n, end * Form::kRows); first += Form::kRows) {
      const int64_t rows = std::min(Form::kRows, n - first);
      int64_t labels[Form::kRows] = {};
      bool ignored[Form::kRows] = {};
      for (int64_t r = 0; problem.labels && r < rows; ++r) {
        ignored[r] = problem.labels[first + r] == problem.ignore_index;
        labels[r] = ignored[r] ? 0 : problem.labels[first + r];
      }
      const bool skip = std::all_of(ignored, ignored + rows, [](bool i) { return i; });
      if (!skip) {
        const auto loss = row.forward(
            student.read(first, rows, scratch.student),
            KD ? teacher.read(first, rows, scratch.teacher) : nullptr,
            labels);
        for (int64_t r = 0; r < rows; ++r)
          losses[first + r] = ignored[r] ? T(0) : T(Form::lane(loss, r));
      } else {
        std::fill_n(losses + first, rows, T(0));
      }
      const auto write = [&](const RowWriter<Form>& writer, const auto& gradient) {
        T* out = writer.begin(first, scratch.grad);
        if (!skip)
          gradient(out);
        writer.end(first, rows, out, ignored);
      };
      if (problem.student_grad)
        write(grad_student, [&](T* out) { row.student_grad(labels, out); });
      if (problem.teacher_grad)
        write(grad_teacher, [&](T* out) { row.teacher_grad(out); });
    }
  });
}

template <typename Form, bool KD, bool CE, bool REVERSE>
void choose_share(const Problem& problem, const Options& options) {
  if constexpr (KD && CE) {
    if (options.temperature == 1)
      return run<Form, KD, CE, REVERSE, Share::kSame>(problem, options);
    if (options.temperature == 2)
      return run<Form, KD, CE, REVERSE, Share::kSquare>(problem, options);
  }
  run<Form, KD, CE, REVERSE, Share::kSeparate>(problem, options);
}

template <typename Form>
void choose_terms(const Problem& problem, const Options& options) {
  const bool kd = options.kd_weight != 0, ce = problem.labels && options.ce_weight != 0;
  if (!kd)
    return choose_share<Form, false, true, false>(problem, options);
  if (problem.reverse)
    return ce ? choose_share<Form, true, true, true>(problem, options)
              : choose_share<Form, true, false, true>(problem, options);
  return ce ? choose_share<Form, true, true, false>(problem, options)
            : choose_share<Form, true, false, false>(problem, options);
}

template <typename T>
void choose_form(const Problem& problem, const Options& options) {
  problem.student.size(1) <= kFewClasses ? choose_terms<RowPerLane<T>>(problem, options)
                                         : choose_terms<OneRow<T>>(problem, options);
}

// How many rows count; an error names the first label that is out of range.
int64_t count_rows(const Tensor& labels, int64_t ignore_index, int64_t classes) {
  const int64_t* label = labels.const_data_ptr<int64_t>();
  int64_t counted = 0;
  for (int64_t r = 0; r < labels.numel(); ++r) {
    if (label[r] == ignore_index)
      continue;
    TORCH_CHECK_VALUE(
        label[r] >= 0 && label[r] < classes,
        "labels holds ", label[r], " at row ", r, "; expected 0 <= label < ", classes,
        " (the number of classes) or ignore_index (", ignore_index, ")");
    ++counted;
  }
  return counted;
}

template <typename T>
Tensor reduce(const Tensor& losses, double denominator) {
  const T* row = losses.const_data_ptr<T>();
  double total = 0;
  for (int64_t r = 0; r < losses.numel(); ++r)
    total += row[r];
  Tensor loss = at::empty({}, losses.options());
  *loss.mutable_data_ptr<T>() = total / denominator;
  return loss;
}

std::tuple<Tensor, Tensor, Tensor> kd_ce_loss(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    const std::optional<Tensor>& labels,
    double temperature,
    double kd_weight,
    double ce_weight,
    std::string_view divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    double label_smoothing,
    std::string_view reduction,
    bool student_grad,
    bool teacher_grad) {
  const Tensor student = as_rows(student_logits), teacher = as_rows(teacher_logits);
  const Tensor row_labels = labels ? labels->to(at::kLong).contiguous() : Tensor();
  const int64_t n = student.size(0), classes = student.size(1);
  const int64_t counted = labels ? count_rows(row_labels, ignore_index, classes) : n;
  const bool mean = reduction == "mean", none = reduction == "none";

  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  const auto row_shape = student_logits.sizes().slice(0, student_logits.dim() - 1);
  const Tensor losses = at::empty(row_shape, student.options().dtype(wide ? at::kDouble : at::kFloat));
  const auto gradient = [](const Tensor& logits, bool wanted) {
    return wanted ? empty_rows_like(logits) : at::empty({0}, logits.options());
  };
  const Tensor grad_student = gradient(student_logits, student_grad), grad_teacher = gradient(teacher_logits, teacher_grad);

  const Options options{
      .temperature = temperature,
      .kd_weight = scale_by_temperature ? kd_weight * temperature * temperature : kd_weight,
      .ce_weight = ce_weight,
      .label_smoothing = label_smoothing,
      .self_entropy = divergence != "soft_ce",
      .grad_scale = mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0};
  const Problem problem{
      .student = student,
      .teacher = teacher,
      .labels = labels ? row_labels.const_data_ptr<int64_t>() : nullptr,
      .ignore_index = ignore_index,
      .losses = losses,
      .grad_student = grad_student,
      .grad_teacher = grad_teacher,
      .student_grad = student_grad,
      .teacher_grad = teacher_grad,
      .reverse = divergence == "reverse_kl"};
  wide ? choose_form<double>(problem, options) : choose_form<float>(problem, options);

  const double denominator = mean ? counted : 1;
  return {
      none ? losses : wide ? reduce<double>(losses, denominator) : reduce<float>(losses, denominator),
      grad_student,
      grad_teacher};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("kd_ce_loss", &kd_ce_loss);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
