// Helpers for kernels that walk the rows of a [..., C] tensor. Compiled once per instruction set (CPU_CAPABILITY).
//
// A kernel is written once for two forms: OneRow, where a vector holds consecutive classes of one row and a sum over
// classes is a horizontal one, and RowPerLane, for few classes, where a vector holds one class of as many rows as it
// has lanes, and sums are vertical.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/functional_bfloat16.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastdistill {
inline namespace CPU_CAPABILITY {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr T kInf = std::numeric_limits<T>::infinity();

// exp(x) for x <= 0: the only kind a softmax needs once the maximum is subtracted. -inf gives 0, NaN stays NaN (which
// at::vec's exp_u20 does not promise), and the relative error is about 1 ulp.
template <typename T>
inline Vec<T> exp_nonpositive(const Vec<T>& x) {
  return x.exp();
}

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
// exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2; ln 2 in two parts; exp(r) by its minimax polynomial.
template <>
inline Vec<float> exp_nonpositive(const Vec<float>& x) {
#ifdef CPU_CAPABILITY_AVX512
  const Vec<float> clamped = _mm512_max_ps(_mm512_set1_ps(-105.0f), x); // max returns its second operand if either is NaN
#else
  const Vec<float> low(-87.33654f); // below it a float's exponential is subnormal: flushed to 0
  const Vec<float> clamped = _mm256_max_ps(low, x);
#endif
  const Vec<float> n = (clamped * Vec<float>(1.44269504f)).round();
  Vec<float> r = at::vec::fmadd(n, Vec<float>(-0.693359375f), clamped);
  r = at::vec::fmadd(n, Vec<float>(2.12194440e-4f), r);
  Vec<float> p = at::vec::fmadd(r, Vec<float>(1.9875691500e-4f), Vec<float>(1.3981999507e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(8.3334519073e-3f));
  p = at::vec::fmadd(p, r, Vec<float>(4.1665795894e-2f));
  p = at::vec::fmadd(p, r, Vec<float>(1.6666665459e-1f));
  p = at::vec::fmadd(p, r, Vec<float>(5.0000001201e-1f));
  p = at::vec::fmadd(p, r * r, r + Vec<float>(1.0f));
#ifdef CPU_CAPABILITY_AVX512
  return _mm512_scalef_ps(p, n);
#else
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return Vec<float>::blendv(p * Vec<float>(_mm256_castsi256_ps(exponent)), Vec<float>(0.0f), x < low);
#endif
}
#endif

// 0 * x = 0 for every x, infinite ones too: what has no probability adds nothing.
template <typename T>
inline Vec<T> weighted(const Vec<T>& weight, const Vec<T>& x) {
  return Vec<T>::blendv(weight * x, Vec<T>(0), weight == Vec<T>(0));
}
inline double weighted(double weight, double x) {
  return weight == 0 ? 0 : weight * x;
}

// max that keeps its first operand where the second is NaN: a NaN comes back with the exponentials.
template <typename T>
inline Vec<T> larger(const Vec<T>& a, const Vec<T>& b) {
  return at::vec::clamp_min(a, b);
}
inline double larger(double a, double b) {
  return a < b ? b : a;
}

// `count` elements from `source`, the lanes beyond them filled with `fill`.
template <typename T>
inline Vec<T> load(const T* source, int64_t count, T fill) {
  if (count >= Vec<T>::size())
    return Vec<T>::loadu(source);
  return Vec<T>::set(Vec<T>(fill), Vec<T>::loadu(source, count), count);
}

// Calls body(i, count) for each vector of [begin, end); count is less than Vec<T>::size() only for the last.
template <typename T, typename Body>
inline void for_each_vector(int64_t begin, int64_t end, const Body& body) {
  for (int64_t i = begin; i < end; i += Vec<T>::size())
    body(i, std::min<int64_t>(Vec<T>::size(), end - i));
}

// Elements as another type; between float and 16 bits by vectors, which at::vec::convert does one by one.
template <typename From, typename To>
inline void convert(const From* source, To* target, int64_t size) {
  int64_t i = 0;
  if constexpr (std::is_same_v<To, float> && at::vec::is_reduced_floating_point_v<From>) {
    for (; i + Vec<From>::size() <= size; i += Vec<From>::size()) {
      const auto [low, high] = at::vec::convert_to_float<From>(Vec<From>::loadu(source + i));
      low.store(target + i);
      high.store(target + i + Vec<float>::size());
    }
  } else if constexpr (std::is_same_v<From, float> && at::vec::is_reduced_floating_point_v<To>) {
    for (; i + Vec<To>::size() <= size; i += Vec<To>::size())
      at::vec::convert_from_float<To>(Vec<float>::loadu(source + i), Vec<float>::loadu(source + i + Vec<float>::size()))
          .store(target + i);
  }
  at::vec::convert(source + i, target + i, size - i);
}

// [..., C] as [N, C] rows with unit stride inside a row; copies only where it must.
inline at::Tensor as_rows(const at::Tensor& x) {
  const at::Tensor rows = x.dim() == 2 ? x : x.reshape({-1, x.size(-1)});
  return rows.stride(1) == 1 ? rows : rows.contiguous();
}

template <typename T_>
struct OneRow {
  using T = T_;
  using Stat = double; // a number per row
  static constexpr int64_t kRows = 1;

  static Stat sum(const Vec<T>& v) {
    return at::vec::vec_reduce_all<T>([](const Vec<T>& a, const Vec<T>& b) { return a + b; }, v);
  }
  static Stat max(const Vec<T>& v) {
    return at::vec::vec_reduce_all<T>(larger<T>, v);
  }
  static Stat log(Stat x) {
    return std::log(x);
  }
  static Vec<T> spread(Stat x) {
    return Vec<T>(x);
  }
  // The element of class labels[0].
  static Stat pick(const T* values, const int64_t* labels) {
    return values[labels[0]];
  }
  static void put(T* values, const int64_t* labels, Stat x) {
    values[labels[0]] = x;
  }
  static void subtract_at(T* values, const int64_t* labels, T x) {
    values[labels[0]] -= x;
  }
  static double lane(Stat x, int64_t) {
    return x;
  }

  template <typename S>
  static const T* read(const S* source, int64_t, int64_t, int64_t size, T* buffer) {
    if constexpr (std::is_same_v<S, T>)
      return source;
    convert(source, buffer, size);
    return buffer;
  }
  template <typename S>
  static T* writable(S* target, T* buffer) {
    if constexpr (std::is_same_v<S, T>)
      return target;
    return buffer;
  }
  template <typename S>
  static void write(const T* computed, const bool* ignored, S* target, int64_t, int64_t size) {
    if (ignored[0])
      std::fill_n(target, size, S(0));
    else if constexpr (!std::is_same_v<S, T>)
      convert(computed, target, size);
  }
};

template <typename T_>
struct RowPerLane {
  using T = T_;
  using Stat = Vec<T>;
  static constexpr int64_t kRows = Vec<T>::size();

  static Stat sum(const Vec<T>& v) {
    return v;
  }
  static Stat max(const Vec<T>& v) {
    return v;
  }
  static Stat log(const Stat& x) {
    return x.log();
  }
  static Vec<T> spread(const Stat& x) {
    return x;
  }
  static Stat pick(const T* values, const int64_t* labels) {
    T picked[kRows];
    for (int64_t lane = 0; lane < kRows; ++lane)
      picked[lane] = values[labels[lane] * kRows + lane];
    return Vec<T>::loadu(picked);
  }
  static void put(T* values, const int64_t* labels, const Stat& x) {
    T each[kRows];
    x.store(each);
    for (int64_t lane = 0; lane < kRows; ++lane)
      values[labels[lane] * kRows + lane] = each[lane];
  }
  static void subtract_at(T* values, const int64_t* labels, T x) {
    for (int64_t lane = 0; lane < kRows; ++lane)
      values[labels[lane] * kRows + lane] -= x;
  }
  static double lane(const Stat& x, int64_t i) {
    T values[kRows];
    x.store(values);
    return values[i];
  }

  template <typename S>
  static const T* read(const S* source, int64_t stride, int64_t rows, int64_t size, T* buffer) {
    if (rows < kRows)
      std::fill_n(buffer, size * kRows, T(0));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < size; ++c)
        buffer[c * kRows + r] = static_cast<T>(source[r * stride + c]);
    return buffer;
  }
  template <typename S>
  static T* writable(S*, T* buffer) {
    return buffer;
  }
  template <typename S>
  static void write(const T* computed, const bool* ignored, S* target, int64_t rows, int64_t size) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < size; ++c)
        target[r * size + c] = ignored[r] ? S(0) : static_cast<S>(computed[c * kRows + r]);
  }
};

// The largest of a row's `size` values, NaN not counted.
template <typename Form>
inline typename Form::Stat max_of(const typename Form::T* values, int64_t size) {
  using T = typename Form::T;
  using V = Vec<T>;
  V a(-kInf<T>), b(-kInf<T>);
  int64_t i = 0;
  for (; i + 2 * V::size() <= size; i += 2 * V::size()) {
    a = larger(a, V::loadu(values + i));
    b = larger(b, V::loadu(values + i + V::size()));
  }
  for_each_vector<T>(i, size, [&](int64_t j, int64_t count) { a = larger(a, load(values + j, count, -kInf<T>)); });
  return Form::max(larger(a, b));
}

// Up to this many classes transposing rows into lanes is cheaper than what a vector wastes on a short row.
constexpr int64_t kFewClasses = 32;

// Rows of a tensor of any floating type, read as Form::T: in place where the tensor holds that and the form allows.
template <typename Form>
class RowReader {
 public:
  explicit RowReader(const at::Tensor& rows)
      : data_(static_cast<const char*>(rows.const_data_ptr())),
        stride_(rows.stride(0)),
        size_(rows.size(1)),
        element_(rows.element_size()),
        type_(rows.scalar_type()) {}

  const typename Form::T* read(int64_t first, int64_t rows, typename Form::T* buffer) const {
    const char* source = data_ + first * stride_ * element_;
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type_, "RowReader", [&] {
      return Form::read(reinterpret_cast<const scalar_t*>(source), stride_, rows, size_, buffer);
    });
  }

 private:
  const char* data_;
  int64_t stride_, size_, element_;
  at::ScalarType type_;
};

// Rows of a contiguous tensor of any floating type: compute at `begin`'s address, then `end` stores what is not there
// yet, and zeros for ignored rows.
template <typename Form>
class RowWriter {
 public:
  explicit RowWriter(const at::Tensor& rows)
      : data_(static_cast<char*>(rows.mutable_data_ptr())),
        size_(rows.size(-1)),
        element_(rows.element_size()),
        type_(rows.scalar_type()) {}

  typename Form::T* begin(int64_t first, typename Form::T* buffer) const {
    return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type_, "RowWriter", [&] {
      return Form::writable(reinterpret_cast<scalar_t*>(target(first)), buffer);
    });
  }
  void end(int64_t first, int64_t rows, const typename Form::T* computed, const bool* ignored) const {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, type_, "RowWriter", [&] {
      Form::write(computed, ignored, reinterpret_cast<scalar_t*>(target(first)), rows, size_);
    });
  }

 private:
  char* target(int64_t first) const {
    return data_ + first * size_ * element_;
  }
  char* data_;
  int64_t size_, element_;
  at::ScalarType type_;
};

// A tensor about to be written once, whole. Asking for huge pages makes its first touch cost a fault per 2 MiB instead
// of one per 4 KiB, which otherwise costs more than the arithmetic.
inline at::Tensor empty_rows_like(const at::Tensor& x) {
  at::Tensor fresh = at::empty_like(x, at::MemoryFormat::Contiguous);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t begin = (address + kHuge - 1) & ~(kHuge - 1), end = (address + fresh.nbytes()) & ~(kHuge - 1);
  if (begin < end)
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
  return fresh;
}

// Rows per task, so that a task is worth a thread's wake-up.
inline int64_t row_grain(int64_t row_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size));
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
