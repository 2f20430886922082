// What the kernels of kd_ce_loss share: a row's sums, and its loss and the coefficients of its gradients from them.
// Formulas: fastdistill/kernels/kd_row.py; as there, u = (z - reference) / temperature in base 2.
#pragma once

#include <cstdint>

namespace fastdistill {
namespace {

enum class Divergence { kForwardKl, kSoftCe, kReverseKl, kNone };
enum class Type : int { kFloat, kBFloat16, kHalf, kDouble };

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffff;

// A is what is computed in: float, or double if either side's logits are.
template <typename A>
struct Problem {
  const void *student, *teacher; // [rows, classes], unit column stride; teacher is the student if there is no divergence
  const void* labels; // [rows], integer of label_bytes; null without labels
  A* losses; // out [rows] if not reduced
  A* loss; // out [] if reduced and there are no totals
  A* terms; // out [2, rows]: distillation, cross-entropy, without their weights; null unless wanted
  double* totals; // out [blocks + 1]: sums of losses, and behind them what to divide by; null for a single block
  void *student_grad, *teacher_grad; // out [rows, classes], contiguous; null unless wanted
  const int* counts; // [count_blocks], of labels that count; null: a block counts them itself
  int64_t rows, student_stride, teacher_stride; // elements from a row to the next
  int64_t ignore_index;
  int classes, count_blocks, label_bytes;
  Type student_type, teacher_type;
  Divergence divergence;
  bool unsigned_labels, task, smooth, mean;
  int power; // 1 if cross-entropy's exponentials are distillation's, 0 otherwise; n > 1 if n-th powers are as good
  A temperature, scale, factor, kd_weight, soft_weight, ce_weight, label_smoothing; // scale: log2(e) over temperature;
  // factor: of the divergence; soft_weight: kd_weight times factor over temperature
};

__device__ inline float exp2_of(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
__device__ inline double exp2_of(double x) {
  return exp2(x);
}

__device__ inline float log2_of(float x) {
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Sums over part of a row: of the exponentials of both sides, of the student's at temperature 1, of the weighted gaps
// and of the student's shifted logits; and of how many logits. The references are logits, or logits times scale.
template <typename A>
struct alignas(16) Sums {
  A student_reference, teacher_reference;
  A student, teacher, task, gap, shifted, count;
};

template <typename A>
__device__ Sums<A> sums_of_nothing(A least) {
  return {least, least, 0, 0, 0, 0, 0, 0};
}

template <typename A>
__device__ A gap_of(Divergence divergence, A student, A teacher) {
  return divergence == Divergence::kForwardKl ? teacher - student
      : divergence == Divergence::kReverseKl  ? student - teacher
                                              : -student;
}

// The sums relative to other references; unit makes a difference of references one of exponents.
template <typename A>
__device__ void refer_to(Sums<A>& sums, A student, A teacher, A unit, A temperature, Divergence divergence) {
  const A by_student = (sums.student_reference - student) * unit;
  const A by_teacher = (sums.teacher_reference - teacher) * unit;
  const A student_factor = exp2_of(by_student), teacher_factor = exp2_of(by_teacher);
  const bool reverse = divergence == Divergence::kReverseKl;
  const A factor = reverse ? student_factor : teacher_factor, weights = reverse ? sums.student : sums.teacher;
  sums.gap = factor * weights == 0 // no weight, no gap, however large
      ? A(0)
      : factor * (sums.gap + weights * gap_of(divergence, by_student, by_teacher));
  sums.student *= student_factor;
  sums.teacher *= teacher_factor;
  sums.task *= exp2_of(by_student * temperature);
  if (sums.count != 0)
    sums.shifted += sums.count * by_student;
  sums.student_reference = student;
  sums.teacher_reference = teacher;
}

template <typename A>
__device__ Sums<A> together(Sums<A> a, Sums<A> b, A unit, A temperature, Divergence divergence) {
  const A student = fmax(a.student_reference, b.student_reference);
  const A teacher = fmax(a.teacher_reference, b.teacher_reference);
  refer_to(a, student, teacher, unit, temperature, divergence);
  refer_to(b, student, teacher, unit, temperature, divergence);
  return {student, teacher, a.student + b.student, a.teacher + b.teacher, a.task + b.task, a.gap + b.gap,
          a.shifted + b.shifted, a.count + b.count};
}

template <int kLanes, typename A>
__device__ A lanes_sum(A x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x += __shfl_xor_sync(kAll, x, step);
  return x;
}

template <int kLanes, typename A>
__device__ A lanes_max(A x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = fmax(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// The sums of a warp's lanes, or of each kLanes lanes, to all of them, bit for bit the same; the references already are.
template <int kLanes, typename A>
__device__ void add_lanes(Sums<A>& sums) {
  sums.student = lanes_sum<kLanes>(sums.student);
  sums.teacher = lanes_sum<kLanes>(sums.teacher);
  sums.task = lanes_sum<kLanes>(sums.task);
  sums.gap = lanes_sum<kLanes>(sums.gap);
  sums.shifted = lanes_sum<kLanes>(sums.shifted);
  sums.count = lanes_sum<kLanes>(sums.count);
}

template <int kLanes, typename A>
__device__ Sums<A> lanes_together(Sums<A> sums, A unit, A temperature, Divergence divergence) {
  const A student = lanes_max<kLanes>(sums.student_reference), teacher = lanes_max<kLanes>(sums.teacher_reference);
  refer_to(sums, student, teacher, unit, temperature, divergence);
  add_lanes<kLanes>(sums);
  return sums;
}

// Labels ---------------------------------------------------------------------------------------------------------------

template <typename A>
__device__ int64_t label_at(const Problem<A>& problem, int64_t row) {
  switch (problem.label_bytes) {
    case 8:
      return static_cast<const int64_t*>(problem.labels)[row];
    case 4:
      return static_cast<const int32_t*>(problem.labels)[row];
    case 2:
      return static_cast<const int16_t*>(problem.labels)[row];
    default:
      return problem.unsigned_labels ? static_cast<const uint8_t*>(problem.labels)[row]
                                     : static_cast<const int8_t*>(problem.labels)[row];
  }
}

struct Label {
  int value; // -1 if it is no class
  bool counts, valid; // not to be ignored; a class, or there are no labels
};

// What label_of makes of the label of a row: apart, for a load ahead of its use not to be waited for.
template <typename A>
__device__ int64_t load_label(const Problem<A>& problem, int64_t row) {
  return problem.labels ? label_at(problem, row) : -1;
}

template <typename A>
__device__ Label label_of(const Problem<A>& problem, int64_t loaded) {
  if (!problem.labels)
    return {-1, true, true};
  const bool valid = loaded >= 0 && loaded < problem.classes;
  return {valid ? static_cast<int>(loaded) : -1, loaded != problem.ignore_index, valid};
}

// This thread's part of how many rows count.
template <typename A>
__device__ int count_share(const Problem<A>& problem, int thread, int threads) {
  int count = 0;
  if (problem.counts)
    for (int i = thread; i < problem.count_blocks; i += threads)
      count += problem.counts[i];
  else
#pragma unroll 8
    for (int64_t row = thread; row < problem.rows; row += threads)
      count += label_at(problem, row) != problem.ignore_index;
  return count;
}

// Loss and gradients from a row's sums ---------------------------------------------------------------------------------

__device__ inline float quotient(float a, float b) {
  return __fdividef(a, b);
}
__device__ inline double quotient(double a, double b) {
  return a / b;
}

// Of a row's loss, without their weights; 0 where not computed.
template <typename A>
struct Terms {
  A kd, ce;
};

template <typename A>
__device__ Terms<A> terms_of(const Problem<A>& problem, const Sums<A>& sums, A label_shifted, Divergence divergence) {
  constexpr A kLn2 = 0.69314718055994530942;
  Terms<A> terms = {0, 0};
  if (divergence != Divergence::kNone) {
    const bool reverse = divergence == Divergence::kReverseKl;
    const A weigher = reverse ? sums.student : sums.teacher, other = reverse ? sums.teacher : sums.student;
    const A entropy = divergence == Divergence::kSoftCe ? log(other) : log(quotient(other, weigher));
    terms.kd = problem.factor * (quotient(sums.gap, weigher) * kLn2 + entropy);
  }
  if (problem.task) {
    const A unshift = problem.temperature * kLn2, log_sum = log(sums.task);
    A cross_entropy = log_sum - label_shifted * unshift;
    if (problem.smooth) {
      const A uniform = log_sum - sums.shifted / problem.classes * unshift;
      cross_entropy = (1 - problem.label_smoothing) * cross_entropy + problem.label_smoothing * uniform;
    }
    terms.ce = cross_entropy;
  }
  return terms;
}

// Factors of the exponentials in the gradients of a row whose loss counts share times, the mean gap, and what to
// subtract at the label and at each class. Where cross-entropy's exponentials are distillation's, task is 0 and its
// factor is the student's, except that reverse KL weighs the latter with the gap.
template <typename A>
struct Coefficients {
  A mean_gap, student, teacher, task, at_label, at_each;
};

template <typename A>
__device__ Coefficients<A> coefficients_of(const Problem<A>& problem, const Sums<A>& sums, A share, Divergence divergence) {
  const A soft = share * problem.soft_weight, hard = share * problem.ce_weight;
  Coefficients<A> result;
  result.mean_gap = quotient(sums.gap, divergence == Divergence::kReverseKl ? sums.student : sums.teacher);
  result.student = quotient(soft, sums.student);
  result.teacher = quotient(soft, sums.teacher);
  result.task = problem.task ? quotient(hard, sums.task) : A(0);
  result.at_label = hard * (1 - problem.label_smoothing);
  result.at_each = problem.smooth ? hard * problem.label_smoothing / problem.classes : A(0);
  return result;
}

} // namespace
} // namespace fastdistill
