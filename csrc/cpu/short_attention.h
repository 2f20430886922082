// softmax(scale q k^T + mask) v of short sequences: a head after the other, whose keys and values stay in the cache
// nearest to the core, with products in registers. PyTorch's flash attention calls a matrix product of each block.
//
// Scores are [keys, queries]: a vector holds one key's of as many queries as it has lanes, so that maxima and sums over
// keys are vertical, and of all that is given only the queries are transposed.
#pragma once

#include "philox.h"
#include "row.h"

#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>

#include <array>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace short_attention {

// Keys of a short sequence. One thread with AVX-512, against PyTorch's, 12 heads of 32: 8 to 45 keys in .47 to .70 of the
// time in float32 and .29 to .44 in bfloat16, 128 in .86 and .78, 256 in .90 and .80, 512 as long; with AVX2, 64 keys as
// long in float32.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kKeys = 256;
#elif defined(CPU_CAPABILITY_AVX2)
constexpr int64_t kKeys = 64;
#else
constexpr int64_t kKeys = 0; // not measured
#endif

constexpr int kRows = 6, kVectors = 2; // of a product's results in registers

template <typename T>
constexpr int64_t whole_vectors(int64_t size) {
  return (size + Vec<T>::size() - 1) / Vec<T>::size() * Vec<T>::size();
}

// A matrix by the strides of its rows and columns.
template <typename T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// c = a b, or with kAdd c += a b, [R, depth] by [depth, V vectors].
template <bool kAdd, typename T, int R, int V>
inline void block(Matrix<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t depth) {
  Vec<T> sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = kAdd ? Vec<T>::loadu(c + r * c_stride + v * Vec<T>::size()) : Vec<T>(0);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[V];
    for (int v = 0; v < V; ++v)
      right[v] = Vec<T>::loadu(b + k * b_stride + v * Vec<T>::size());
    for (int r = 0; r < R; ++r) {
      const Vec<T> left(a.data[r * a.row + k * a.column]);
      for (int v = 0; v < V; ++v)
        sums[r][v] = at::vec::fmadd(left, right[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v].store(c + r * c_stride + v * Vec<T>::size());
}

template <bool kAdd, int R, typename T>
inline void blocks(Matrix<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t columns, int64_t depth) {
  int64_t j = 0;
  for (constexpr int64_t step = kVectors * Vec<T>::size(); j + step <= columns; j += step)
    block<kAdd, T, R, kVectors>(a, b + j, b_stride, c + j, c_stride, depth);
  if (j < columns)
    block<kAdd, T, R, 1>(a, b + j, b_stride, c + j, c_stride, depth);
}

// c = a b, or with kAdd c += a b, [rows, depth] by [depth, columns], whole vectors of them.
template <bool kAdd = false, typename T>
void product(
    Matrix<T> a, const T* b, int64_t b_stride, T* c, int64_t c_stride, int64_t rows, int64_t columns, int64_t depth) {
  int64_t r = 0;
  const auto at = [&](int64_t row) { return Matrix<T>{a.data + row * a.row, a.row, a.column}; };
  for (; r + kRows <= rows; r += kRows)
    blocks<kAdd, kRows>(at(r), b, b_stride, c + r * c_stride, c_stride, columns, depth);
  for (; r + 2 <= rows; r += 2)
    blocks<kAdd, 2>(at(r), b, b_stride, c + r * c_stride, c_stride, columns, depth);
  if (r < rows)
    blocks<kAdd, 1>(at(r), b, b_stride, c + r * c_stride, c_stride, columns, depth);
}

// The exponentials of a vector of queries' scores, in place; `by` is what makes probabilities of them, and `sums` the log
// of their sum. Of nothing to attend to all are 0.
template <typename T>
inline void exponentials(T* scores, int64_t stride, int64_t keys, T* by, T* sums) {
  const Vec<T> zero(0), nothing(-kInf<T>);
  Vec<T> most = nothing, sum = zero;
  for (int64_t j = 0; j < keys; ++j)
    most = larger(most, Vec<T>::loadu(scores + j * stride));
  most = Vec<T>::blendv(most, zero, most == nothing);
  for (int64_t j = 0; j < keys; ++j) {
    const Vec<T> e = exp_nonpositive(Vec<T>::loadu(scores + j * stride) - most);
    e.store(scores + j * stride);
    sum = sum + e;
  }
  Vec<T>::blendv(Vec<T>(1) / sum, zero, sum == zero).store(by);
  Vec<T>::blendv(most + sum.log(), zero, sum == zero).store(sums);
}

// P (dP - sum(P dP) / sum(P)) of a vector of queries, in place of dP: the sum of P is as far from 1 as the log of a sum
// of exponentials is rounded.
template <typename T>
inline void gradients_of_scores(const T* probabilities, T* gradients, int64_t stride, int64_t keys) {
  Vec<T> sum(0), total(0);
  for (int64_t j = 0; j < keys * stride; j += stride) {
    const auto p = Vec<T>::loadu(probabilities + j);
    sum = at::vec::fmadd(p, Vec<T>::loadu(gradients + j), sum);
    total = total + p;
  }
  const Vec<T> mean = sum / Vec<T>::blendv(total, Vec<T>(1), total == Vec<T>(0));
  for (int64_t j = 0; j < keys * stride; j += stride)
    (Vec<T>::loadu(probabilities + j) * (Vec<T>::loadu(gradients + j) - mean)).store(gradients + j);
}

// [rows, size] of values as a matrix of T with whole vectors in a row: themselves if they are one, else a copy, with zeros
// beyond, which `own` keeps.
template <typename scalar_t, typename T>
Matrix<T> vectors(const scalar_t* source, int64_t stride, int64_t rows, int64_t size, std::vector<T>& own) {
  const int64_t padded = whole_vectors<T>(size);
  if constexpr (std::is_same_v<scalar_t, T>)
    if (size == padded)
      return Matrix<T>{source, stride, 1};
  own.resize(rows * padded);
  for (int64_t r = 0; r < rows; ++r, source += stride) {
    convert(source, own.data() + r * padded, size);
    std::fill(own.data() + r * padded + size, own.data() + (r + 1) * padded, T(0));
  }
  return Matrix<T>{own.data(), padded, 1};
}

// One head of one example.
template <typename scalar_t>
const scalar_t* head_of(const at::Tensor& x, int64_t i, int64_t h) {
  return x.const_data_ptr<scalar_t>() + i * x.stride(0) + h * x.stride(1);
}

// The transpose of a few rows, times a factor: [size, kQueries], with zeros beyond the rows up to whole vectors.
template <int64_t kQueries, typename T>
void transpose(Matrix<T> rows, int64_t count, int64_t size, T by, T* target) {
  const int64_t used = whole_vectors<T>(count);
  for (int64_t d = 0; d < size; ++d, target += kQueries) {
    for (int64_t r = 0; r < count; ++r)
      target[r] = rows.data[r * rows.row + d] * by;
    std::fill(target + count, target + used, T(0));
  }
}

// Scores, [keys, kQueries], of the queries from `start`, whose transpose times the scale is given.
template <int64_t kQueries, typename T>
void scores_of(
    Matrix<T> k, const T* queries, const at::Tensor& mask, bool is_causal, int64_t i, int64_t h, int64_t start,
    int64_t count, int64_t keys, int64_t size, T* scores) {
  product(k, queries, kQueries, scores, kQueries, keys, whole_vectors<T>(count), size);
  if (mask.defined()) {
    const T* m = mask.const_data_ptr<T>() + i * mask.stride(0) + h * mask.stride(1) + start * mask.stride(2);
    const bool is_same = mask.stride(2) == 0; // for all queries, as of padding
    for (int64_t j = 0; j < keys; ++j) {
      const T* of_key = m + j * mask.stride(3);
      if (is_same && *of_key == 0)
        continue;
      for (int64_t r = 0; r < count; ++r)
        scores[j * kQueries + r] += of_key[r * mask.stride(2)];
    }
  }
  for (int64_t j = is_causal ? start + 1 : keys; j < keys; ++j)
    std::fill_n(scores + j * kQueries, std::min(j - start, count), -kInf<T>);
}

// Rows of whole vectors times a factor, to rows of a tensor.
template <typename scalar_t, typename T>
void write(T* rows, int64_t stride, int64_t count, int64_t size, scalar_t* target, int64_t target_stride, const T* by) {
  for (int64_t r = 0; r < count; ++r, rows += stride, target += target_stride) {
    for (int64_t d = 0; d < stride; d += Vec<T>::size())
      (Vec<T>::loadu(rows + d) * Vec<T>(by[r])).store(rows + d);
    convert(rows, target, size);
  }
}

// What is left out of probabilities, and what the others are divided by.
struct Dropout {
  double p = 0;
  uint64_t seed = 0;

  // Times 0 or 1 / (1 - p) of a head's values, [keys, kQueries], from query `start` on; [keys, kQueries] of `others` too.
  // The same for the same seed, head, query and key.
  template <int64_t kQueries, typename T>
  void apply(int64_t head, int64_t start, int64_t count, int64_t keys, T* values, T* others = nullptr) const {
    constexpr int64_t lanes = Vec<T>::size();
    if (p == 0)
      return;
    const uint32_t least = least_kept(p);
    const T kept = T(1 / (1 - p));
    for (int64_t j = 0; j < keys; j += 4)
      for (int64_t r = 0; r < count; r += lanes) {
        const auto drawn = philox<lanes>(seed, static_cast<uint64_t>(j) << 32 | (start + r), head);
        for (int64_t own = 0; own < std::min<int64_t>(4, keys - j); ++own)
          for (int64_t lane = 0; lane < lanes; ++lane) {
            const T by = drawn[own][lane] >= least ? kept : T(0);
            values[(j + own) * kQueries + r + lane] *= by;
            if (others)
              others[(j + own) * kQueries + r + lane] *= by;
          }
      }
  }
};

template <typename scalar_t>
void forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool is_causal, const at::Tensor& mask,
    double scale, const Dropout& dropout, const at::Tensor& output, const at::Tensor& logs) {
  using T = at::opmath_type<scalar_t>;
  constexpr int64_t lanes = Vec<T>::size(), kQueries = kVectors * lanes;
  const int64_t heads = query.size(1), queries = query.size(2), size = query.size(3), keys = key.size(2);
  const int64_t group = heads / key.size(1), padded = whole_vectors<T>(size);
  at::parallel_for(0, query.size(0) * heads, row_grain(keys * size), [&](int64_t begin, int64_t end) {
    std::vector<T> own_keys, own_values, own_queries;
    std::vector<T> q(size * kQueries), scores(keys * kQueries), context(kQueries * padded);
    std::array<T, kQueries> by, sums;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / heads, h = n % heads;
      const auto k = vectors(head_of<scalar_t>(key, i, h / group), key.stride(2), keys, size, own_keys);
      const auto v = vectors(head_of<scalar_t>(value, i, h / group), value.stride(2), keys, size, own_values);
      for (int64_t start = 0; start < queries; start += kQueries) {
        const int64_t count = std::min(kQueries, queries - start);
        const scalar_t* given = head_of<scalar_t>(query, i, h) + start * query.stride(2);
        transpose<kQueries>(vectors(given, query.stride(2), count, size, own_queries), count, size, T(scale), q.data());
        scores_of<kQueries>(k, q.data(), mask, is_causal, i, h, start, count, keys, size, scores.data());
        for (int64_t r = 0; r < count; r += lanes)
          exponentials(scores.data() + r, kQueries, keys, by.data() + r, sums.data() + r);
        std::copy_n(sums.data(), count, logs.mutable_data_ptr<T>() + n * queries + start);
        dropout.apply<kQueries>(n, start, count, keys, scores.data());
        product(Matrix<T>{scores.data(), 1, kQueries}, v.data, v.row, context.data(), padded, count, padded, keys);
        scalar_t* target = output.mutable_data_ptr<scalar_t>() + i * output.stride(0) + h * output.stride(1) +
            start * output.stride(2);
        write(context.data(), padded, count, size, target, output.stride(2), by.data());
      }
    }
  });
}

// With P the probabilities, and F what dropout multiplies them by: dV = (P F)^T dO, dP = F dO V^T,
// dS = P (dP - sum(P dP)), dQ = scale dS K, dK = scale dS^T Q. That sum is also sum(dO O), but rounds otherwise than dP:
// where one key has all of the probability, their difference would be noise, times the largest scores.
template <typename scalar_t>
void backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& logs, bool is_causal, const at::Tensor& mask, double scale, const Dropout& dropout,
    const at::Tensor& grad_query, const at::Tensor& grad_key, const at::Tensor& grad_value) {
  using T = at::opmath_type<scalar_t>;
  constexpr int64_t lanes = Vec<T>::size(), kQueries = kVectors * lanes;
  const int64_t queries = query.size(2), size = query.size(3), shared = key.size(1), keys = key.size(2);
  const int64_t group = query.size(1) / shared, padded = whole_vectors<T>(size);
  at::parallel_for(0, query.size(0) * shared, row_grain(keys * size * group), [&](int64_t begin, int64_t end) {
    std::vector<T> own_keys, own_values, own_queries, own_grads;
    std::vector<T> q(size * kQueries), g(size * kQueries), p(keys * kQueries), ds(keys * kQueries);
    std::vector<T> whole(dropout.p > 0 ? keys * kQueries : 0); // the probabilities
    std::vector<T> of_key(keys * padded), of_value(keys * padded), of_query(kQueries * padded);
    std::array<T, kQueries> log;
    const std::vector<T> scales(std::max(keys, kQueries), T(scale)), ones(keys, T(1));
    for (int64_t n = begin; n < end; ++n) {
      const int64_t i = n / shared, own = n % shared;
      const auto k = vectors(head_of<scalar_t>(key, i, own), key.stride(2), keys, size, own_keys);
      const auto v = vectors(head_of<scalar_t>(value, i, own), value.stride(2), keys, size, own_values);
      std::fill(of_key.begin(), of_key.end(), T(0));
      std::fill(of_value.begin(), of_value.end(), T(0));
      for (int64_t h = own * group; h < (own + 1) * group; ++h)
        for (int64_t start = 0; start < queries; start += kQueries) {
          const int64_t count = std::min(kQueries, queries - start);
          const auto rows = [&](const at::Tensor& x, std::vector<T>& copy) {
            return vectors(head_of<scalar_t>(x, i, h) + start * x.stride(2), x.stride(2), count, size, copy);
          };
          const auto given = rows(query, own_queries), grads = rows(grad, own_grads);
          log.fill(0);
          for (int64_t r = 0; r < count; ++r)
            log[r] = logs.const_data_ptr<T>()[i * logs.stride(0) + h * logs.stride(1) + (start + r) * logs.stride(2)];
          transpose<kQueries>(given, count, size, T(scale), q.data());
          transpose<kQueries>(grads, count, size, T(1), g.data());
          scores_of<kQueries>(k, q.data(), mask, is_causal, i, h, start, count, keys, size, p.data());
          scores_of<kQueries>(v, g.data(), at::Tensor(), false, i, h, start, count, keys, size, ds.data());
          for (int64_t r = 0; r < count; r += lanes)
            for (int64_t j = r; j < keys * kQueries; j += kQueries)
              exp_nonpositive(Vec<T>::loadu(p.data() + j) - Vec<T>::loadu(log.data() + r)).store(p.data() + j);
          if (dropout.p > 0)
            std::copy_n(p.data(), p.size(), whole.data());
          dropout.apply<kQueries>(i * query.size(1) + h, start, count, keys, p.data(), ds.data());
          const T* all = dropout.p > 0 ? whole.data() : p.data();
          for (int64_t r = 0; r < count; r += lanes)
            gradients_of_scores(all + r, ds.data() + r, kQueries, keys);
          const Matrix<T> kept{p.data(), kQueries, 1}, by_key{ds.data(), kQueries, 1}, by_query{ds.data(), 1, kQueries};
          product<true>(kept, grads.data, grads.row, of_value.data(), padded, keys, padded, count);
          product<true>(by_key, given.data, given.row, of_key.data(), padded, keys, padded, count);
          product(by_query, k.data, k.row, of_query.data(), padded, count, padded, keys);
          scalar_t* target = grad_query.mutable_data_ptr<scalar_t>() + i * grad_query.stride(0) +
              h * grad_query.stride(1) + start * grad_query.stride(2);
          write(of_query.data(), padded, count, size, target, grad_query.stride(2), scales.data());
        }
      const auto target = [&](const at::Tensor& x) {
        return x.mutable_data_ptr<scalar_t>() + i * x.stride(0) + own * x.stride(1);
      };
      write(of_key.data(), padded, keys, size, target(grad_key), grad_key.stride(2), scales.data());
      write(of_value.data(), padded, keys, size, target(grad_value), grad_value.stride(2), ones.data());
    }
  });
}

inline bool is_short(const at::Tensor& key) {
  return key.size(2) <= kKeys;
}

inline at::Tensor empty_by_token(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.options()).transpose(1, 2);
}

inline at::Tensor expanded(const std::optional<at::Tensor>& mask, const at::Tensor& query, const at::Tensor& key) {
  return mask ? mask->expand({query.size(0), query.size(1), query.size(2), key.size(2)}) : at::Tensor();
}

// Output, with memory as [B, S, H, D], and each query's log of the sum of exponentials, [B, H, S]. Key and value may have
// fewer heads, each for as many of the query's, one after the other. The mask is added to the scores.
inline std::tuple<at::Tensor, at::Tensor> attention(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool is_causal,
    const std::optional<at::Tensor>& mask, double scale, const Dropout& dropout) {
  const at::Tensor output = empty_by_token(query);
  const auto wide = query.options().dtype(at::toOpMathType(query.scalar_type()));
  const at::Tensor logs = at::empty({query.size(0), query.size(1), query.size(2)}, wide);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "gated_attention", [&] {
    forward<scalar_t>(query, key, value, is_causal, expanded(mask, query, key), scale, dropout, output, logs);
  });
  return {output, logs};
}

// The gradients to query, key and value, with memory as theirs in `attention`.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& logs, bool is_causal, const std::optional<at::Tensor>& mask, double scale,
    const Dropout& dropout) {
  const at::Tensor of_query = empty_by_token(query), of_key = empty_by_token(key), of_value = empty_by_token(value);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, query.scalar_type(), "gated_attention", [&] {
    backward<scalar_t>(
        grad, query, key, value, logs, is_causal, expanded(mask, query, key), scale, dropout, of_query, of_key, of_value);
  });
  return {of_query, of_key, of_value};
}

} // namespace short_attention
} // namespace CPU_CAPABILITY
} // namespace fastdistill
