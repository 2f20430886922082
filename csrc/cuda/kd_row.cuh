// What the kernels of kd_ce_loss share: a row's sums, its loss and its gradients from them, and a careful pass over a
// row for any logits. Formulas: fastdistill/kernels/kd_ce_loss.py; as there, u = (z - reference) / temperature in base 2.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>
#include <type_traits>

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

// Logits of any type, eight at a time ----------------------------------------------------------------------------------

constexpr int kPacket = 8;

// Which elements of a row a thread takes together: kPacket neighbours, or every step-th.
struct Packet {
  int first, step, end;
  __device__ int at(int i) const {
    return first + i * step;
  }
};

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T, typename A>
__device__ T narrow(A x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16_rn(static_cast<float>(x));
  else if constexpr (std::is_same_v<T, __half>)
    return __float2half_rn(static_cast<float>(x));
  else
    return static_cast<T>(x);
}

// Calls body with a null pointer of the C++ type; a float problem has no double logits.
template <typename A, typename Body>
__device__ void with_type(Type type, const Body& body) {
  if (type == Type::kFloat)
    body(static_cast<float*>(nullptr));
  else if (type == Type::kBFloat16)
    body(static_cast<__nv_bfloat16*>(nullptr));
  else if (type == Type::kHalf)
    body(static_cast<__half*>(nullptr));
  else if constexpr (std::is_same_v<A, double>)
    body(static_cast<double*>(nullptr));
}

__device__ inline int bytes_of(Type type) {
  return type == Type::kDouble ? 8 : type == Type::kFloat ? 4 : 2;
}

__device__ inline const void* row_of(const void* logits, Type type, int64_t row, int64_t stride) {
  return static_cast<const char*>(logits) + row * stride * bytes_of(type);
}
__device__ inline void* row_of(void* logits, Type type, int64_t row, int64_t stride) {
  return static_cast<char*>(logits) + row * stride * bytes_of(type);
}

template <typename A>
__device__ A load_one(const void* row, Type type, int at) {
  A x = 0;
  with_type<A>(type, [&]<typename T>(T*) { x = widen(static_cast<const T*>(row)[at]); });
  return x;
}

template <int kSize, typename A, typename At>
__device__ void load_each(const void* row, Type type, A (&x)[kSize], int end, A padding, const At& at) {
  with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      x[i] = at(i) < end ? static_cast<A>(widen(static_cast<const T*>(row)[at(i)])) : padding;
  });
}

template <int kSize, typename A, typename At>
__device__ void store_each(void* row, Type type, const A (&x)[kSize], int end, const At& at) {
  with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (at(i) < end)
        static_cast<T*>(row)[at(i)] = narrow<T>(x[i]);
  });
}

template <typename T>
struct alignas(sizeof(T) * kPacket < 16 ? sizeof(T) * kPacket : 16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

template <typename A>
__device__ void load_packet(const void* row, Type type, const Packet& packet, A padding, A (&x)[kPacket]) {
  if (packet.step == 1 && packet.first + kPacket <= packet.end)
    with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
      for (int i = 0; i < kPacket; i += Pack<T>::kSize) {
        const auto pack = *reinterpret_cast<const Pack<T>*>(static_cast<const T*>(row) + packet.first + i);
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k)
          x[i + k] = widen(pack.values[k]);
      }
    });
  else
    load_each<kPacket>(row, type, x, packet.end, padding, [&](int i) { return packet.at(i); });
}

template <typename A>
__device__ void store_packet(void* row, Type type, const Packet& packet, const A (&x)[kPacket]) {
  if (packet.step == 1 && packet.first + kPacket <= packet.end)
    with_type<A>(type, [&]<typename T>(T*) {
#pragma unroll
      for (int i = 0; i < kPacket; i += Pack<T>::kSize) {
        Pack<T> pack;
#pragma unroll
        for (int k = 0; k < Pack<T>::kSize; ++k)
          pack.values[k] = narrow<T>(x[i + k]);
        *reinterpret_cast<Pack<T>*>(static_cast<T*>(row) + packet.first + i) = pack;
      }
    });
  else
    store_each<kPacket>(row, type, x, packet.end, [&](int i) { return packet.at(i); });
}

// The careful pass -----------------------------------------------------------------------------------------------------

// Adds kSize logits of each side, -inf where there is none, to sums whose references are logits and no less than them.
template <int kSize, typename A>
__device__ void add_carefully(
    const Problem<A>& problem, Sums<A>& sums, const A (&student)[kSize], const A (&teacher)[kSize], int size) {
  const bool reverse = problem.divergence == Divergence::kReverseKl;
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    const A student_shifted = (student[i] - sums.student_reference) * problem.scale;
    const A teacher_shifted = (teacher[i] - sums.teacher_reference) * problem.scale;
    const A student_exp = exp2_of(student_shifted), teacher_exp = exp2_of(teacher_shifted);
    const A weight = reverse ? student_exp : teacher_exp;
    const A gap = gap_of(problem.divergence, student_shifted, teacher_shifted);
    sums.student += student_exp;
    sums.teacher += teacher_exp;
    sums.gap += weight == 0 ? A(0) : weight * gap; // no weight, no gap, however large
    if (problem.power != 1)
      sums.task += exp2_of(student_shifted * problem.temperature);
    if (problem.smooth && i < size)
      sums.shifted += student_shifted;
  }
}

template <typename A>
struct Gradients {
  A student, teacher;
};

// But for what is to be subtracted at the label.
template <typename A>
__device__ Gradients<A> gradients_of(
    const Problem<A>& problem, const Sums<A>& sums, const Coefficients<A>& coefficients, A student, A teacher) {
  constexpr A kLn2 = 0.69314718055994530942;
  const A student_shifted = (student - sums.student_reference) * problem.scale;
  const A teacher_shifted = (teacher - sums.teacher_reference) * problem.scale;
  const A student_exp = exp2_of(student_shifted);
  const A from_student = student_exp * coefficients.student;
  const A from_teacher = exp2_of(teacher_shifted) * coefficients.teacher;
  const bool reverse = problem.divergence == Divergence::kReverseKl;
  const A weight = reverse ? from_student : from_teacher, other = reverse ? from_teacher : from_student;
  const A gap = (gap_of(problem.divergence, student_shifted, teacher_shifted) - coefficients.mean_gap) * kLn2;
  const A of_weigher = weight == 0 ? A(0) : weight * gap, of_other = other - weight;
  Gradients<A> result{reverse ? of_weigher : of_other, reverse ? of_other : of_weigher};
  if (problem.divergence == Divergence::kNone)
    result = {0, coefficients.at_label * 0}; // NaN where the label is no class
  const A task_exp = problem.power == 1 ? student_exp : exp2_of(student_shifted * problem.temperature);
  if (problem.task)
    result.student += task_exp * coefficients.task - coefficients.at_each;
  return result;
}

// Whether sums must not be put together that are relative to other references: a sum of gaps would lose digits that the
// gradients need.
template <typename A>
__device__ bool are_far(const Problem<A>& problem, const Sums<A>& sums) {
  return !((fabs(sums.student_reference) + fabs(sums.teacher_reference)) * problem.scale < 256);
}

// The elements [begin, end) of a row, taken by a group of threads that sees them in packets.
template <typename A>
struct RowShare {
  const void *student, *teacher;
  void *student_grad, *teacher_grad;
  int begin, end, thread, threads;
  bool aligned; // all four, at begin, to what a Pack is

  template <typename Body>
  __device__ void for_each_packet(const Body& body) const {
#pragma unroll 1
    for (int first = begin; first < end; first += threads * kPacket)
      body(aligned ? Packet{first + thread * kPacket, 1, end} : Packet{first + thread, threads, end});
  }
};

template <typename A>
__device__ RowShare<A> share_of(const Problem<A>& problem, int64_t row, int begin, int end, int thread, int threads) {
  RowShare<A> share{
      row_of(problem.student, problem.student_type, row, problem.student_stride),
      row_of(problem.teacher, problem.teacher_type, row, problem.teacher_stride),
      row_of(problem.student_grad, problem.student_type, row, problem.classes),
      row_of(problem.teacher_grad, problem.teacher_type, row, problem.classes),
      begin, end, thread, threads, true};
  if (!problem.student_grad)
    share.student_grad = nullptr;
  if (!problem.teacher_grad)
    share.teacher_grad = nullptr;
  const auto address = [&](const void* x, Type type) { return reinterpret_cast<uintptr_t>(x) + begin * bytes_of(type); };
  share.aligned = (address(share.student, problem.student_type) | address(share.teacher, problem.teacher_type) |
                   (share.student_grad ? address(share.student_grad, problem.student_type) : 0) |
                   (share.teacher_grad ? address(share.teacher_grad, problem.teacher_type) : 0)) % 16 == 0;
  return share;
}

// A thread's sums, relative to the largest logits that it saw, if they are larger than the references to begin with.
template <typename A>
__device__ Sums<A> careful_sums(const Problem<A>& problem, const RowShare<A>& share, A student, A teacher) {
  constexpr A kInfinity = std::numeric_limits<A>::infinity();
  Sums<A> sums = {student, teacher, 0, 0, 0, 0, 0, 0};
  share.for_each_packet([&](const Packet& packet) {
    A student[kPacket], teacher[kPacket];
    load_packet(share.student, problem.student_type, packet, -kInfinity, student);
    load_packet(share.teacher, problem.teacher_type, packet, -kInfinity, teacher);
    A student_max = sums.student_reference, teacher_max = sums.teacher_reference;
    int size = 0;
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      size += packet.at(i) < packet.end;
      student_max = fmax(student_max, student[i]);
      teacher_max = fmax(teacher_max, teacher[i]);
    }
    if (student_max != sums.student_reference || teacher_max != sums.teacher_reference)
      refer_to(sums, student_max, teacher_max, problem.scale, problem.temperature, problem.divergence);
    add_carefully(problem, sums, student, teacher, size);
    sums.count += size;
  });
  if (problem.power == 1)
    sums.task = sums.student;
  return sums;
}

template <typename A>
__device__ void careful_gradients(
    const Problem<A>& problem, const RowShare<A>& share, const Sums<A>& sums, const Coefficients<A>& coefficients,
    int label) {
  share.for_each_packet([&](const Packet& packet) {
    A student[kPacket], teacher[kPacket];
    load_packet(share.student, problem.student_type, packet, A(0), student);
    load_packet(share.teacher, problem.teacher_type, packet, A(0), teacher);
#pragma unroll
    for (int i = 0; i < kPacket; ++i) {
      const Gradients<A> gradients = gradients_of(problem, sums, coefficients, student[i], teacher[i]);
      student[i] = gradients.student - (problem.task && packet.at(i) == label ? coefficients.at_label : A(0));
      teacher[i] = gradients.teacher;
    }
    if (share.student_grad)
      store_packet(share.student_grad, problem.student_type, packet, student);
    if (share.teacher_grad)
      store_packet(share.teacher_grad, problem.teacher_type, packet, teacher);
  });
}

template <typename A>
__device__ void zero_gradients(const Problem<A>& problem, const RowShare<A>& share) {
  const A zero[kPacket] = {};
  share.for_each_packet([&](const Packet& packet) {
    if (share.student_grad)
      store_packet(share.student_grad, problem.student_type, packet, zero);
    if (share.teacher_grad)
      store_packet(share.teacher_grad, problem.teacher_type, packet, zero);
  });
}

} // namespace
} // namespace fastdistill
