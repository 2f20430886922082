// A row's sums and gradients for ordinary logits, a vector of 16 bytes at a time; that logits are not shows in the sums.
#pragma once

#include "kd_row.cuh"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

namespace fastdistill {
namespace {

__device__ inline void unpack(uint4 vector, float (&x)[8], __nv_bfloat16) {
  const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}
__device__ inline void unpack(uint4 vector, float (&x)[8], __half) {
  const __half2* halves = reinterpret_cast<const __half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __low2float(halves[i]);
    x[2 * i + 1] = __high2float(halves[i]);
  }
}
__device__ inline void unpack(uint4 vector, float (&x)[4], float) {
  x[0] = __uint_as_float(vector.x);
  x[1] = __uint_as_float(vector.y);
  x[2] = __uint_as_float(vector.z);
  x[3] = __uint_as_float(vector.w);
}

__device__ inline uint4 pack(const float (&x)[8], __nv_bfloat16) {
  uint4 vector;
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
  return vector;
}
__device__ inline uint4 pack(const float (&x)[8], __half) {
  uint4 vector;
  auto* pairs = reinterpret_cast<__half2*>(&vector);
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pairs[i] = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
  return vector;
}
__device__ inline uint4 pack(const float (&x)[4], float) {
  return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

// Exponentials at temperature 1 from those at temperature and their exponents.
template <int kSize>
__device__ void task_exps(
    const Problem<float>& problem, const float (&shifted)[kSize], const float (&soft)[kSize], float (&task)[kSize]) {
  if (problem.power == 0) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      task[i] = exp2_of(shifted[i] * problem.temperature);
    return;
  }
  float squared[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    task[i] = 1;
    squared[i] = soft[i];
  }
#pragma unroll 1
  for (int power = problem.power; power; power >>= 1) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (power & 1)
        task[i] *= squared[i];
      squared[i] *= squared[i];
    }
  }
}

// Adds logits to sums whose references are logits times scale: right unless that shows in the sums.
template <Divergence kDivergence, int kSize>
__device__ void add_plainly(
    const Problem<float>& problem, Sums<float>& sums, const float (&student)[kSize], const float (&teacher)[kSize]) {
  float shifted[kSize], exps[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    shifted[i] = fmaf(student[i], problem.scale, -sums.student_reference);
    exps[i] = exp2_of(shifted[i]);
    sums.student += exps[i];
    if constexpr (kDivergence != Divergence::kNone) {
      const float teacher_shifted = fmaf(teacher[i], problem.scale, -sums.teacher_reference);
      const float teacher_exp = exp2_of(teacher_shifted);
      sums.teacher += teacher_exp;
      const float weight = kDivergence == Divergence::kReverseKl ? exps[i] : teacher_exp;
      sums.gap = fmaf(weight, gap_of(kDivergence, shifted[i], teacher_shifted), sums.gap);
    }
  }
  if (problem.power == 2) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.task = fmaf(exps[i], exps[i], sums.task);
  } else if (problem.power != 1) {
    float task[kSize];
    task_exps(problem, shifted, exps, task);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.task += task[i];
  }
  if (problem.smooth) {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      sums.shifted += shifted[i];
  }
}

// Replaces logits by their gradients, but for what is to be subtracted at the label.
template <Divergence kDivergence, int kSize>
__device__ void gradients_plainly(
    const Problem<float>& problem, const Sums<float>& sums, const Coefficients<float>& coefficients,
    float (&student)[kSize], float (&teacher)[kSize]) {
  constexpr float kLn2 = 0.693147181f;
  constexpr bool kReverse = kDivergence == Divergence::kReverseKl, kNone = kDivergence == Divergence::kNone;
  float shifted[kSize], exps[kSize], teacher_shifted[kSize] = {}, teacher_exps[kSize];
#pragma unroll
  for (int i = 0; i < kSize; ++i) {
    shifted[i] = fmaf(student[i], problem.scale, -sums.student_reference);
    exps[i] = exp2_of(shifted[i]);
    if constexpr (!kNone) {
      teacher_shifted[i] = fmaf(teacher[i], problem.scale, -sums.teacher_reference);
      teacher_exps[i] = exp2_of(teacher_shifted[i]);
    }
  }
  [[maybe_unused]] const auto of_weigher = [&](float weight, int i) {
    return weight * ((gap_of(kDivergence, shifted[i], teacher_shifted[i]) - coefficients.mean_gap) * kLn2);
  };
  if (problem.student_grad) {
    const float same = problem.power == 1 ? coefficients.task : 0;
    const float linear = kReverse || kNone ? same : coefficients.student + same;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kNone)
        student[i] = -coefficients.at_each;
      else if constexpr (kReverse)
        student[i] = of_weigher(exps[i] * coefficients.student, i) - coefficients.at_each;
      else
        student[i] = fmaf(teacher_exps[i], -coefficients.teacher, -coefficients.at_each);
    }
    if (problem.power == 2) {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        student[i] = fmaf(exps[i], fmaf(exps[i], coefficients.task, linear), student[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kSize; ++i)
        student[i] = fmaf(exps[i], linear, student[i]);
      if (problem.power != 1) {
        float task[kSize];
        task_exps(problem, shifted, exps, task);
#pragma unroll
        for (int i = 0; i < kSize; ++i)
          student[i] = fmaf(task[i], coefficients.task, student[i]);
      }
    }
  }
  if (problem.teacher_grad) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if constexpr (kNone)
        teacher[i] = coefficients.at_label * 0; // NaN where the label is no class
      else if constexpr (kReverse)
        teacher[i] = fmaf(teacher_exps[i], coefficients.teacher, -exps[i] * coefficients.student);
      else
        teacher[i] = of_weigher(teacher_exps[i] * coefficients.teacher, i);
    }
  }
}


} // namespace
} // namespace fastdistill
