// Rows of logits, a row or a vector's worth of short rows at a time, kept in cache: what kd_ce_loss and dkd_loss on CPU
// share.
#pragma once

#include "kd_row.h"

#include <optional>
#include <string_view>
#include <tuple>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

struct Problem {
  const Tensor &student, &teacher;
  const int64_t* labels; // null: no labels
  int64_t ignore_index;
  const Tensor& losses; // [rows], or with the terms behind them [1 + terms, rows]
  const Tensor &grad_student, &grad_teacher;
  bool student_grad, teacher_grad, return_terms, reverse;
};

template <typename Form, bool KD, bool CE, bool REVERSE, Share SHARE, bool APART>
void run(const Problem& problem, const Options& options) {
  using T = typename Form::T;
  const int64_t n = problem.student.size(0), classes = problem.student.size(1);
  const RowReader<Form> student(problem.student), teacher(problem.teacher);
  const RowWriter<Form> grad_student(problem.grad_student), grad_teacher(problem.grad_teacher);
  T* losses = problem.losses.mutable_data_ptr<T>();
  const int64_t groups = (n + Form::kRows - 1) / Form::kRows;
  at::parallel_for(0, groups, row_grain(classes * Form::kRows), [&](int64_t begin, int64_t end) {
    Scratch<T> scratch(classes * Form::kRows);
    RowLoss<Form, KD, CE, REVERSE, SHARE, APART> row(options, classes, scratch);
    for (int64_t first = begin * Form::kRows; first < std::min(n, end * Form::kRows); first += Form::kRows) {
      const int64_t rows = std::min(Form::kRows, n - first);
      int64_t labels[Form::kRows] = {};
      bool ignored[Form::kRows] = {};
      for (int64_t r = 0; problem.labels && r < rows; ++r) {
        ignored[r] = problem.labels[first + r] == problem.ignore_index;
        labels[r] = ignored[r] ? 0 : problem.labels[first + r];
      }
      const bool skip = std::all_of(ignored, ignored + rows, [](bool i) { return i; });
      typename Form::Stat loss(0);
      if (!skip)
        loss = row.forward(
            student.read(first, rows, scratch.student),
            KD ? teacher.read(first, rows, scratch.teacher) : nullptr,
            labels);
      T* out = losses + first;
      const auto leave = [&](const auto& values) {
        for (int64_t r = 0; r < rows; ++r)
          out[r] = ignored[r] ? T(0) : T(Form::lane(values, r));
        out += n;
      };
      leave(loss);
      if (problem.return_terms) {
        if constexpr (APART)
          leave(row.target);
        leave(row.kd);
        leave(row.ce);
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
        write(grad_teacher, [&](T* out) { row.teacher_grad(labels, out); });
    }
  });
}

template <bool APART, typename Form, bool KD, bool CE, bool REVERSE>
void choose_share(const Problem& problem, const Options& options) {
  if constexpr (KD && CE) {
    if (options.temperature == 1)
      return run<Form, KD, CE, REVERSE, Share::kSame, APART>(problem, options);
    if (options.temperature == 2)
      return run<Form, KD, CE, REVERSE, Share::kSquare, APART>(problem, options);
  }
  run<Form, KD, CE, REVERSE, Share::kSeparate, APART>(problem, options);
}

template <bool APART, typename Form>
void choose_terms(const Problem& problem, const Options& options) {
  const bool kd = options.kd_weight != 0, ce = problem.labels && options.ce_weight != 0;
  if constexpr (!APART)
    if (!kd)
      return choose_share<APART, Form, false, true, false>(problem, options);
  if (problem.reverse)
    return ce ? choose_share<APART, Form, true, true, true>(problem, options)
              : choose_share<APART, Form, true, false, true>(problem, options);
  return ce ? choose_share<APART, Form, true, true, false>(problem, options)
            : choose_share<APART, Form, true, false, false>(problem, options);
}

template <bool APART, typename T>
void choose_form(const Problem& problem, const Options& options) {
  problem.student.size(1) <= kFewClasses ? choose_terms<APART, RowPerLane<T>>(problem, options)
                                         : choose_terms<APART, OneRow<T>>(problem, options);
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

// Sums of rows of losses, [] or a number for each [planes].
template <typename T>
Tensor reduce(const Tensor& losses, int64_t rows, int64_t planes, double denominator) {
  const T* row = losses.const_data_ptr<T>();
  Tensor loss = planes == 1 ? at::empty({}, losses.options()) : at::empty({planes}, losses.options());
  for (int64_t plane = 0; plane < planes; ++plane, row += rows) {
    double total = 0;
    for (int64_t r = 0; r < rows; ++r)
      total += row[r];
    loss.mutable_data_ptr<T>()[plane] = total / denominator;
  }
  return loss;
}

// The outputs of either op; of options, this sets those below label_smoothing.
template <bool APART>
std::tuple<Tensor, Tensor, Tensor> distillation_loss(
    const Tensor& student_logits,
    const Tensor& teacher_logits,
    const std::optional<Tensor>& labels,
    Options options,
    std::string_view divergence,
    bool scale_by_temperature,
    int64_t ignore_index,
    std::string_view reduction,
    bool student_grad,
    bool teacher_grad,
    bool return_terms) {
  const Tensor student = as_rows(student_logits), teacher = as_rows(teacher_logits);
  const Tensor row_labels = labels ? labels->to(at::kLong).contiguous() : Tensor();
  const int64_t n = student.size(0), classes = student.size(1);
  const int64_t counted = labels ? count_rows(row_labels, ignore_index, classes) : n;
  const bool mean = reduction == "mean", none = reduction == "none";

  const bool wide = student.scalar_type() == at::kDouble || teacher.scalar_type() == at::kDouble;
  const auto row_shape = student_logits.sizes().slice(0, student_logits.dim() - 1);
  const int64_t planes = !return_terms ? 1 : APART ? 4 : 3;
  c10::SmallVector<int64_t, 5> shape(row_shape.begin(), row_shape.end());
  if (return_terms)
    shape.insert(shape.begin(), planes);
  const Tensor losses = at::empty(shape, student.options().dtype(wide ? at::kDouble : at::kFloat));
  const auto gradient = [](const Tensor& logits, bool wanted) {
    return wanted ? empty_rows_like(logits) : at::empty({0}, logits.options());
  };
  const Tensor grad_student = gradient(student_logits, student_grad), grad_teacher = gradient(teacher_logits, teacher_grad);

  options.self_entropy = divergence != "soft_ce";
  options.factor = scale_by_temperature ? options.temperature * options.temperature : 1;
  options.grad_scale = mean ? 1.0 / std::max<int64_t>(counted, 1) : 1.0;
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
      .return_terms = return_terms,
      .reverse = divergence == "reverse_kl"};
  wide ? choose_form<APART, double>(problem, options) : choose_form<APART, float>(problem, options);

  const double denominator = mean ? counted : 1;
  return {
      none     ? losses
          : wide ? reduce<double>(losses, n, planes, denominator)
                 : reduce<float>(losses, n, planes, denominator),
      grad_student,
      grad_teacher};
}

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastdistill
