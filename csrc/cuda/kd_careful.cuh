// A pass over a row for any logits: infinities, NaN, maxima far apart.
#pragma once

#include "kd_packets.cuh"

#include <cstdint>
#include <limits>

namespace fastdistill {
namespace {

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
