// proximity_conv and its gradients on CPU: a product of matrices for each token of an n-gram, by blocks of sentences and
// of channels, and over each block at once the maximum. The backward needs of each sentence and channel only the n-gram
// of the maximum: both gradients are sums of rows, of weights or of states. Formulas: fastdistill/ops/proximity_conv.py.
#include "row.h"

#include <ATen/OpMathType.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kRows = 256; // of states in a product, about
constexpr int64_t kChannels = 128; // in a product: what comes of it stays in the second-level cache
constexpr int64_t kRun = 64; // terms summed one after the other; sums of more are sums of such sums, lest digits be lost

// The inputs in the dtype computed in, contiguous: states [B, S, D], proximity [B, S], filters [K, C, D].
template <typename T>
struct Inputs {
  Inputs(const Tensor& states_, const Tensor& proximity_, const Tensor& weight, const Optional& attention_mask)
      : batch(states_.size(0)),
        length(states_.size(1)),
        width(states_.size(2)),
        channels(weight.size(0)),
        taps(weight.size(2)),
        states(states_.to(c10::CppTypeToScalarType<T>::value).contiguous()),
        proximity(proximity_.to(c10::CppTypeToScalarType<T>::value).contiguous()),
        filters(weight.to(c10::CppTypeToScalarType<T>::value).permute({2, 0, 1}).contiguous()),
        mask(attention_mask ? attention_mask->contiguous() : Tensor()),
        state_data(states.template const_data_ptr<T>()),
        proximity_data(proximity.template const_data_ptr<T>()),
        mask_data(attention_mask ? mask.const_data_ptr<bool>() : nullptr) {}

  bool is_real(int64_t sentence, int64_t token) const {
    return token >= 0 && token < length && (!mask_data || mask_data[sentence * length + token]);
  }
  T factor(int64_t sentence, int64_t token) const {
    return proximity_data[sentence * length + token];
  }
  const T* state(int64_t sentence, int64_t token) const {
    return state_data + (sentence * length + token) * width;
  }

  const int64_t batch, length, width, channels, taps;
  const Tensor states, proximity, filters, mask;
  const T *const state_data, *const proximity_data;
  const bool* const mask_data;
};

template <typename T>
void scale_row(const T* source, T factor, T* target, int64_t size) {
  at::vec::map<T>([factor](const Vec<T>& x) { return x * Vec<T>(factor); }, target, source, size);
}

// Forward --------------------------------------------------------------------------------------------------------------

// Some sentences' weighted states, one below the other, with K / 2 rows of zeros before, between and after them. Of each
// sentence the tokens from its first real one to its last.
template <typename T>
class Block {
 public:
  Block(const Inputs<T>& in, int64_t sentences)
      : in_(in),
        margin_(in.taps / 2),
        rows_(at::empty({sentences * (in.length + margin_) + margin_, in.width}, in.states.options())) {}

  void pack(int64_t begin, int64_t end) {
    spans_.clear();
    filled_ = 0;
    add_zeros(margin_);
    for (int64_t sentence = begin; sentence < end; ++sentence) {
      int64_t first = 0, last = in_.length;
      while (first < last && !in_.is_real(sentence, first))
        ++first;
      while (last > first && !in_.is_real(sentence, last - 1))
        --last;
      spans_.push_back({sentence, first, last, filled_ - margin_});
      for (int64_t token = first; token < last; ++token)
        if (in_.is_real(sentence, token))
          scale_row(in_.state(sentence, token), in_.factor(sentence, token), add_row(), in_.width);
        else
          add_zeros(1);
      add_zeros(margin_);
    }
  }

  // The convolution without bias, [rows, channels], a row for each of `pack` but margins at both ends.
  void convolve(int64_t channel, const Tensor& values) const {
    const int64_t rows = filled_ - 2 * margin_;
    if (rows <= 0)
      return;
    Tensor target = values.narrow(0, 0, rows);
    for (int64_t k = 0; k < in_.taps; ++k) {
      const Tensor filter = in_.filters.select(0, k).narrow(0, channel, values.size(1)).t();
      if (k == 0)
        at::mm_out(target, rows_.narrow(0, 0, rows), filter);
      else
        target.addmm_(rows_.narrow(0, k, rows), filter);
    }
  }

  struct Span {
    int64_t sentence, first, last, row; // `row`: that of the first token in the convolution
  };
  const std::vector<Span>& spans() const {
    return spans_;
  }

 private:
  T* add_row() {
    return rows_.template mutable_data_ptr<T>() + filled_++ * in_.width;
  }
  void add_zeros(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i)
      std::fill_n(add_row(), in_.width, T(0));
  }

  const Inputs<T>& in_;
  const int64_t margin_;
  const Tensor rows_;
  int64_t filled_ = 0;
  std::vector<Span> spans_;
};

// Of each channel the maximum over a sentence's tokens and the first token that has it, or of which it is NaN.
template <typename T>
void maximum(
    const Inputs<T>& in, const typename Block<T>::Span& span, const T* values, int64_t stride, int64_t channels,
    T* largest, int64_t* positions) {
  using V = Vec<T>;
  for_each_vector<T>(0, channels, [&](int64_t channel, int64_t count) {
    V most(-kInf<T>), where(-1); // a token's number is exact in a float, too
    for (int64_t token = span.first; token < span.last; ++token) {
      if (!in.is_real(span.sentence, token))
        continue;
      const V value = load(values + (token - span.first) * stride + channel, count, T(0));
      const V higher = (value > most) | ((value != value) & (most == most));
      most = V::blendv(most, value, higher);
      where = V::blendv(where, V(token), higher);
    }
    most.store(largest + channel, count);
    T tokens[V::size()];
    where.store(tokens);
    std::copy_n(tokens, count, positions + channel);
  });
}

template <typename T>
void forward(const Inputs<T>& in, T* largest, int64_t* positions) {
  TORCH_CHECK_VALUE(in.length <= 1 << 24, "states has ", in.length, " tokens; expected at most ", 1 << 24);
  const int64_t sentences = std::clamp<int64_t>(kRows / in.length, 1, std::max<int64_t>(in.batch, 1));
  const int64_t blocks = (in.batch + sentences - 1) / sentences, parts = (in.channels + kChannels - 1) / kChannels;
  at::parallel_for(0, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView guard; // of this thread
    Block<T> block(in, sentences);
    const Tensor buffer = at::empty({sentences * (in.length + in.taps / 2), kChannels}, in.states.options());
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % parts * kChannels, channels = std::min(kChannels, in.channels - channel);
      if (task / parts != packed) {
        packed = task / parts;
        block.pack(packed * sentences, std::min(in.batch, (packed + 1) * sentences));
      }
      block.convolve(channel, buffer.narrow(1, 0, channels));
      for (const auto& span : block.spans())
        maximum(
            in, span, buffer.template const_data_ptr<T>() + span.row * kChannels, kChannels, channels,
            largest + span.sentence * in.channels + channel, positions + span.sentence * in.channels + channel);
    }
  });
}

std::tuple<Tensor, Tensor> proximity_conv(
    const Tensor& states, const Tensor& proximity, const Tensor& weight, const Optional& bias,
    const Optional& attention_mask) {
  const auto options = states.options().dtype(at::toOpMathType(states.scalar_type()));
  Tensor largest = at::empty({states.size(0), weight.size(0)}, options);
  const Tensor positions = at::empty(largest.sizes(), options.dtype(at::kLong));
  AT_DISPATCH_FLOATING_TYPES(largest.scalar_type(), "proximity_conv", [&] {
    const Inputs<scalar_t> in(states, proximity, weight, attention_mask);
    forward(in, largest.mutable_data_ptr<scalar_t>(), positions.mutable_data_ptr<int64_t>());
  });
  if (bias)
    largest.add_(bias->to(largest.scalar_type()));
  return {largest.to(states.scalar_type()), positions};
}

// Backward -------------------------------------------------------------------------------------------------------------

template <typename T>
struct Term {
  const T* row;
  T factor;
};

// target = the sum of factor * row, in the order of the terms.
template <typename T>
void sum_rows(const std::vector<Term<T>>& terms, int64_t size, T* target) {
  using V = Vec<T>;
  constexpr int64_t kVectors = 4;
  const int64_t count = terms.size();
  int64_t i = 0;
  for (; i + kVectors * V::size() <= size; i += kVectors * V::size()) {
    V total[kVectors] = {V(0), V(0), V(0), V(0)};
    for (int64_t begin = 0; begin < count; begin += kRun) {
      V sum[kVectors] = {V(0), V(0), V(0), V(0)};
      for (int64_t t = begin; t < std::min(count, begin + kRun); ++t)
        for (int64_t v = 0; v < kVectors; ++v)
          sum[v] = at::vec::fmadd(V(terms[t].factor), V::loadu(terms[t].row + i + v * V::size()), sum[v]);
      for (int64_t v = 0; v < kVectors; ++v)
        total[v] = total[v] + sum[v];
    }
    for (int64_t v = 0; v < kVectors; ++v)
      total[v].store(target + i + v * V::size());
  }
  for_each_vector<T>(i, size, [&](int64_t j, int64_t width) {
    V total(0);
    for (int64_t begin = 0; begin < count; begin += kRun) {
      V sum(0);
      for (int64_t t = begin; t < std::min(count, begin + kRun); ++t)
        sum = at::vec::fmadd(V(terms[t].factor), load(terms[t].row + j, width, T(0)), sum);
      total = total + sum;
    }
    total.store(target + j, width);
  });
}

// Each sentence's channels in the order of their maxima's tokens: `channel(sentence)` from `begin` of a token on.
class ByToken {
 public:
  ByToken(const int64_t* positions, int64_t batch, int64_t length, int64_t channels)
      : length_(length), channels_(channels), begins_(batch * (length + 1)), sorted_(batch * channels) {
    at::parallel_for(0, batch, row_grain(channels), [&](int64_t first, int64_t last) {
      for (int64_t sentence = first; sentence < last; ++sentence)
        sort(positions + sentence * channels, &begins_[sentence * (length + 1)], &sorted_[sentence * channels]);
    });
  }

  // Calls body(channel) for each channel whose maximum is of the token.
  template <typename Body>
  void for_each(int64_t sentence, int64_t token, const Body& body) const {
    const int64_t* begin = &begins_[sentence * (length_ + 1) + token];
    for (int64_t i = begin[0]; i < begin[1]; ++i)
      body(sorted_[sentence * channels_ + i]);
  }

 private:
  void sort(const int64_t* positions, int64_t* begins, int64_t* sorted) const {
    for (int64_t channel = 0; channel < channels_; ++channel)
      if (positions[channel] >= 0)
        ++begins[positions[channel] + 1];
    for (int64_t token = 0; token < length_; ++token)
      begins[token + 1] += begins[token];
    std::vector<int64_t> next(begins, begins + length_);
    for (int64_t channel = 0; channel < channels_; ++channel)
      if (positions[channel] >= 0)
        sorted[next[positions[channel]]++] = channel;
  }

  int64_t length_, channels_;
  std::vector<int64_t> begins_, sorted_;
};

template <typename T>
T dot(const T* a, const T* b, int64_t size) {
  Vec<T> sum(0);
  for_each_vector<T>(0, size, [&](int64_t i, int64_t count) {
    sum = at::vec::fmadd(load(a + i, count, T(0)), load(b + i, count, T(0)), sum);
  });
  return OneRow<T>::sum(sum);
}

// A token's gradient is the sum of the filters' rows under which it stands in the maxima's n-grams. Null: not wanted.
template <typename T>
void to_states(const Inputs<T>& in, const T* grad, const int64_t* positions, T* grad_states, T* grad_proximity) {
  const ByToken maxima(positions, in.batch, in.length, in.channels);
  const T* const filters = in.filters.template const_data_ptr<T>();
  at::parallel_for(0, in.batch * in.length, row_grain(in.width * in.taps), [&](int64_t begin, int64_t end) {
    std::vector<Term<T>> terms;
    std::vector<T> sum(in.width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t sentence = row / in.length, token = row % in.length;
      terms.clear();
      for (int64_t k = 0; in.is_real(sentence, token) && k < in.taps; ++k)
        if (const int64_t center = token + in.taps / 2 - k; center >= 0 && center < in.length)
          maxima.for_each(sentence, center, [&](int64_t channel) {
            terms.push_back({filters + (k * in.channels + channel) * in.width, grad[sentence * in.channels + channel]});
          });
      sum_rows(terms, in.width, sum.data());
      if (grad_proximity)
        grad_proximity[row] = terms.empty() ? T(0) : dot(sum.data(), in.state(sentence, token), in.width);
      if (grad_states)
        scale_row(sum.data(), terms.empty() ? T(0) : in.factor(sentence, token), grad_states + row * in.width, in.width);
    }
  });
}

// A filter's gradient is the sum of the weighted states under it in the maxima's n-grams.
template <typename T>
void to_weight(const Inputs<T>& in, const T* grad, const int64_t* positions, T* grad_weight) {
  at::parallel_for(0, in.channels, row_grain(in.batch * in.width * in.taps), [&](int64_t begin, int64_t end) {
    std::vector<Term<T>> terms;
    std::vector<T> sum(in.width);
    for (int64_t channel = begin; channel < end; ++channel)
      for (int64_t k = 0; k < in.taps; ++k) {
        terms.clear();
        for (int64_t sentence = 0; sentence < in.batch; ++sentence) {
          const int64_t center = positions[sentence * in.channels + channel], token = center + k - in.taps / 2;
          if (center >= 0 && in.is_real(sentence, token))
            terms.push_back(
                {in.state(sentence, token), grad[sentence * in.channels + channel] * in.factor(sentence, token)});
        }
        sum_rows(terms, in.width, sum.data());
        for (int64_t i = 0; i < in.width; ++i)
          grad_weight[(channel * in.width + i) * in.taps + k] = sum[i];
      }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> proximity_conv_backward(
    const Tensor& grad_output, const Tensor& states, const Tensor& proximity, const Tensor& weight,
    const Optional& attention_mask, const Tensor& positions, bool want_states, bool want_proximity, bool want_weight,
    bool want_bias) {
  const auto dtype = at::toOpMathType(states.scalar_type());
  const auto output = [&](const Tensor& like, bool wanted) {
    const auto options = states.options().dtype(dtype);
    return wanted ? at::empty(like.sizes(), options) : at::empty({0}, options);
  };
  const Tensor grad_states = output(states, want_states), grad_proximity = output(proximity, want_proximity);
  const Tensor grad_weight = output(weight, want_weight);
  const Tensor grad = grad_output.to(dtype).masked_fill(positions.lt(0), 0).contiguous();
  const Tensor maxima = positions.contiguous();
  AT_DISPATCH_FLOATING_TYPES(dtype, "proximity_conv_backward", [&] {
    const Inputs<scalar_t> in(states, proximity, weight, attention_mask);
    const auto pointer = [](const Tensor& x) { return x.numel() ? x.mutable_data_ptr<scalar_t>() : nullptr; };
    const scalar_t* const upstream = grad.const_data_ptr<scalar_t>();
    const int64_t* const tokens = maxima.const_data_ptr<int64_t>();
    if (want_states || want_proximity)
      to_states(in, upstream, tokens, pointer(grad_states), pointer(grad_proximity));
    if (want_weight)
      to_weight(in, upstream, tokens, pointer(grad_weight));
  });
  const Tensor grad_bias = want_bias ? grad.sum(0) : at::empty({0}, grad.options());
  return {
      grad_states.to(states.scalar_type()),
      grad_proximity.to(want_proximity ? proximity.scalar_type() : states.scalar_type()),
      grad_weight.to(states.scalar_type()), grad_bias.to(states.scalar_type())};
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("proximity_conv", &proximity_conv);
  m.impl("proximity_conv_backward", &proximity_conv_backward);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
