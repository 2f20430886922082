// uncertainty, its gradient and select_uncertain on CPU. A row is read once: block after block, each while it is in the
// first-level cache, against the largest logit so far. Formulas: fastdistill/ops/uncertainty.py.
#include "row.h"

#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <array>
#include <bit>
#include <cstdint>
#include <numeric>
#include <string_view>
#include <type_traits>
#include <vector>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

using at::Tensor;

enum class Kind { kEntropy, kLeastConfidence, kMargin };

// A number per row.
double exp_of(double x) {
  return std::exp(x);
}
double log1p_of(double x) {
  return std::log1p(x);
}
template <typename T>
Vec<T> exp_of(const Vec<T>& x) {
  return x.exp();
}
template <typename T>
Vec<T> log1p_of(const Vec<T>& x) {
  return x.log1p();
}
template <typename T>
void load_rows(double& to, const T* from, int64_t) {
  to = *from;
}
template <typename T>
void load_rows(Vec<T>& to, const T* from, int64_t rows) {
  to = load(from, rows, T(0));
}
template <typename T>
void store_rows(double from, T* to, int64_t) {
  *to = from;
}
template <typename T>
void store_rows(const Vec<T>& from, T* to, int64_t rows) {
  from.store(to, rows);
}

// What the uncertainty of a row and its gradient are made of. With e = exp(z - largest), these are sums of e and of
// e * (z - largest) over all logits but one of the largest: its e is 1, beside which small ones would be lost.
template <typename Form, Kind KIND>
class Row {
  using T = typename Form::T;
  using V = Vec<T>;
  using Stat = typename Form::Stat;

 public:
  Row(const T* logits, int64_t size, double at_uniform) : logits_(logits), size_(size), at_uniform_(at_uniform) {
    if constexpr (Form::kRows == 1) {
      for (int64_t begin = 0; begin < size; begin += kBlock)
        add_block(begin, std::min(begin + kBlock, size));
      if (equals_ > 1)
        second_ = largest_;
    } else { // few classes
      largest_ = max_of<Form>(logits, size);
      add<true>(0, size);
      second_ = V::blendv(second_, largest_, equals_ > V(1));
    }
    others_ = others_ + (equals_ - Stat(1));
    total_ = others_ + Stat(1) + (largest_ - largest_); // NaN if that is infinite
    if constexpr (KIND == Kind::kMargin)
      exp_second_ = exp_of(second_ - largest_);
  }

  Stat value() const {
    Stat value = others_;
    if constexpr (KIND == Kind::kEntropy)
      value = log1p_of(others_) - weighted_ / total_;
    else if constexpr (KIND == Kind::kLeastConfidence)
      value = others_ / total_;
    else
      value = (others_ + exp_second_) / total_;
    return value / Stat(at_uniform_);
  }

  void gradient(const T* grad_outputs, int64_t rows, T* out) const {
    Stat scale;
    load_rows(scale, grad_outputs, rows);
    scale = scale / (Stat(at_uniform_) * total_);
    Stat constant = scale / total_, slope(0); // the gradient is e * (constant + slope * (z - largest)) ...
    if constexpr (KIND == Kind::kEntropy) {
      constant = scale * (weighted_ / total_);
      slope = Stat(0) - scale;
    } else if constexpr (KIND == Kind::kMargin) {
      constant = constant * (Stat(1) - exp_second_);
    }
    const V a = Form::spread(constant), b = Form::spread(slope);
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      const V gap = gap_to_largest(load(logits_ + i, count, -kInf<T>));
      const V factor = KIND == Kind::kEntropy ? at::vec::fmadd(b, gap, a) : a;
      (exp_nonpositive(gap) * factor).store(out + i, count);
    });
    if constexpr (KIND != Kind::kEntropy) { // ... but for the largest, and in the margin's also the second largest
      Stat at_largest = others_, at_second = scale * exp_second_;
      if constexpr (KIND == Kind::kMargin)
        at_largest = at_largest + exp_second_;
      at_largest = Stat(0) - scale * at_largest / total_;
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t largest = find(r, Form::lane(largest_, r), -1);
        if (largest >= 0)
          out[largest] = Form::lane(at_largest, r);
        const int64_t second = KIND == Kind::kMargin ? find(r, Form::lane(second_, r), largest) : -1;
        if (second >= 0)
          out[second] += Form::lane(at_second, r);
      }
    }
  }

 private:
  static constexpr int64_t kBlock = 1024;

  void add_block(int64_t begin, int64_t end) {
    const double largest = max_of<Form>(logits_ + begin, end - begin);
    if (begin == 0)
      largest_ = largest;
    else if (largest > largest_)
      raise_largest(largest);
    if (largest == largest_) {
      add<true>(begin, end);
    } else {
      add<false>(begin, end);
      second_ = std::max(second_, largest);
    }
  }

  void raise_largest(double largest) {
    const double gap = largest_ - largest, scale = std::exp(gap);
    weighted_ = scale * (weighted_ + std::max(gap, kFar) * (others_ + equals_));
    others_ = scale * (others_ + equals_);
    equals_ = 0;
    second_ = largest_;
    largest_ = largest;
  }

  // Adds logits to the sums; those equal to the largest, where some are, are counted instead.
  template <bool HAS_LARGEST>
  void add(int64_t begin, int64_t end) {
    V others(0), weighted(0), equals(0), second(-kInf<T>);
    for_each_vector<T>(begin, end, [&](int64_t i, int64_t count) {
      const V logits = load(logits_ + i, count, -kInf<T>);
      V gap = gap_to_largest(logits), e = exp_nonpositive(gap);
      if constexpr (HAS_LARGEST) {
        const V equal = logits == Form::spread(largest_);
        e = V::blendv(e, V(0), equal);
        gap = V::blendv(gap, V(0), equal); // NaN if both are -inf
        equals = equals + V::blendv(V(0), V(1), equal);
        if constexpr (KIND == Kind::kMargin)
          second = larger(second, V::blendv(logits, V(-kInf<T>), equal));
      }
      others = others + e;
      if constexpr (KIND == Kind::kEntropy)
        weighted = at::vec::fmadd(e, gap, weighted);
    });
    others_ = others_ + Form::sum(others);
    weighted_ = weighted_ + Form::sum(weighted);
    equals_ = equals_ + Form::sum(equals);
    if constexpr (Form::kRows == 1)
      second_ = std::max(second_, Form::max(second));
    else
      second_ = second;
  }

  // z - largest, no less than where exp is 0, so that their product is 0 too.
  V gap_to_largest(const V& logits) const {
    return at::vec::clamp_min(logits - Form::spread(largest_), V(kFar));
  }

  // Where a row has the value, at its lowest class except one; -1 if nowhere.
  int64_t find(int64_t row, double value, int64_t except) const {
    for (int64_t i = row; i < size_; i += Form::kRows)
      if (logits_[i] == value && i != except)
        return i;
    return -1;
  }

  static constexpr double kFar = -1000;
  const T* logits_;
  int64_t size_;
  double at_uniform_;
  Stat largest_{-kInf<T>}, second_{-kInf<T>};
  Stat others_{0}, weighted_{0};
  Stat equals_{0}; // logits equal to the largest
  Stat total_{0}, exp_second_{0};
};

// Calls body(first, rows, row, spare) for each Row of [N, C] logits: it is `rows` rows from `first` on, and `spare` is
// memory of its size.
template <typename Form, Kind KIND, typename Body>
void for_each_row(const Tensor& logits, bool normalize, const Body& body) {
  const int64_t n = logits.size(0), classes = logits.size(1), size = classes * Form::kRows;
  double at_uniform = 1;
  if (normalize && KIND == Kind::kEntropy)
    at_uniform = std::log(classes);
  else if (normalize && KIND == Kind::kLeastConfidence)
    at_uniform = 1 - 1.0 / classes;
  const RowReader<Form> reader(logits);
  at::parallel_for(0, (n + Form::kRows - 1) / Form::kRows, row_grain(size), [&](int64_t begin, int64_t end) {
    c10::SmallVector<typename Form::T, 1024> buffer;
    buffer.resize_for_overwrite(2 * size);
    for (int64_t first = begin * Form::kRows; first < std::min(n, end * Form::kRows); first += Form::kRows) {
      const int64_t rows = std::min(Form::kRows, n - first);
      const Row<Form, KIND> row(reader.read(first, rows, buffer.data()), size, at_uniform);
      body(first, rows, row, buffer.data() + size);
    }
  });
}

// Calls body.operator()<Form, Kind>() for these logits.
template <typename Body>
void choose(const Tensor& logits, std::string_view kind, const Body& body) {
  const auto with_kind = [&]<Kind KIND>() {
    const auto with_type = [&]<typename T>() {
      if (logits.size(1) <= kFewClasses)
        body.template operator()<RowPerLane<T>, KIND>();
      else
        body.template operator()<OneRow<T>, KIND>();
    };
    logits.scalar_type() == at::kDouble ? with_type.template operator()<double>() : with_type.template operator()<float>();
  };
  if (kind == "entropy")
    return with_kind.template operator()<Kind::kEntropy>();
  if (kind == "least_confidence")
    return with_kind.template operator()<Kind::kLeastConfidence>();
  TORCH_CHECK_VALUE(kind == "margin", "kind is '", kind, "'; expected entropy, least_confidence or margin");
  with_kind.template operator()<Kind::kMargin>();
}

template <typename Form, Kind KIND>
void write_values(const Tensor& rows, bool normalize, const Tensor& values) {
  using T = typename Form::T;
  T* const value = values.mutable_data_ptr<T>();
  for_each_row<Form, KIND>(rows, normalize, [&](int64_t first, int64_t count, const auto& row, T*) {
    store_rows(row.value(), value + first, count);
  });
}

template <typename Form, Kind KIND>
void write_gradient(const Tensor& rows, bool normalize, const Tensor& grad_output, const Tensor& grad) {
  using T = typename Form::T;
  const Tensor grad_outputs = grad_output.reshape({-1}).to(c10::CppTypeToScalarType<T>::value).contiguous();
  const T* const row_grads = grad_outputs.const_data_ptr<T>();
  const RowWriter<Form> writer(grad);
  for_each_row<Form, KIND>(rows, normalize, [&](int64_t first, int64_t count, const auto& row, T* spare) {
    constexpr bool kNoneIgnored[Form::kRows] = {};
    T* const out = writer.begin(first, spare);
    row.gradient(row_grads + first, count, out);
    writer.end(first, count, out, kNoneIgnored);
  });
}

Tensor uncertainty(const Tensor& logits, std::string_view kind, bool normalize) {
  const Tensor rows = as_rows(logits);
  const auto dtype = logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor values = at::empty(logits.sizes().slice(0, logits.dim() - 1), logits.options().dtype(dtype));
  choose(rows, kind, [&]<typename Form, Kind KIND>() { write_values<Form, KIND>(rows, normalize, values); });
  return values;
}

Tensor uncertainty_backward(const Tensor& grad_output, const Tensor& logits, std::string_view kind, bool normalize) {
  const Tensor rows = as_rows(logits), grad = empty_rows_like(logits);
  choose(rows, kind, [&]<typename Form, Kind KIND>() {
    write_gradient<Form, KIND>(rows, normalize, grad_output, grad);
  });
  return grad;
}

// A score's place in the order: an integer that is smaller for a larger score, and 0 for NaN, with the row it is of.
template <typename T>
struct Ranked {
  using Key = std::conditional_t<std::is_same_v<T, double>, uint64_t, uint32_t>;
  static constexpr int kDigitBits = 11, kDigits = (8 * sizeof(Key) + kDigitBits - 1) / kDigitBits;
  using Counts = std::array<int64_t, 1 << kDigitBits>; // of items by digit

  Ranked() = default;
  Ranked(T score, int64_t row)
      : key(std::isnan(score) ? 0 : ~std::bit_cast<Key>(score + T(0))), // score >= 0: its bits are ordered as it is
        row(row) {}

  int64_t digit(int place) const {
    return key >> (kDigitBits * place) & ((1 << kDigitBits) - 1);
  }
  bool operator<(const Ranked& other) const {
    return key != other.key ? key < other.key : row < other.row;
  }

  Key key;
  uint32_t row;
};

// Those of which the first `count` in order are among.
template <typename T>
std::vector<Ranked<T>> candidates(const T* scores, int64_t n, int64_t count) {
  constexpr int kLeading = Ranked<T>::kDigits - 1;
  typename Ranked<T>::Counts counts{};
  for (int64_t r = 0; r < n; ++r)
    ++counts[Ranked<T>(scores[r], r).digit(kLeading)];
  int64_t last = 0, size = counts[0];
  while (size < count)
    size += counts[++last];
  std::vector<Ranked<T>> items;
  items.reserve(size);
  for (int64_t r = 0; r < n; ++r)
    if (const Ranked<T> item(scores[r], r); item.digit(kLeading) <= last)
      items.push_back(item);
  return items;
}

// Sorts items that are in the order of their rows.
template <typename T>
void sort(std::vector<Ranked<T>>& items) {
  if (items.size() < 1024) // fewer than would pay for the counts
    return std::sort(items.begin(), items.end());
  std::vector<Ranked<T>> sorted(items.size());
  for (int place = 0; place < Ranked<T>::kDigits; ++place) {
    typename Ranked<T>::Counts next{};
    for (const auto& item : items)
      ++next[item.digit(place)];
    std::exclusive_scan(next.begin(), next.end(), next.begin(), int64_t{0});
    for (const auto& item : items)
      sorted[next[item.digit(place)]++] = item;
    items.swap(sorted);
  }
}

template <typename T>
Tensor rank(const Tensor& scores, int64_t count) {
  const T* const score = scores.const_data_ptr<T>();
  auto items = candidates(score, scores.numel(), count);
  sort(items);
  const Tensor indices = at::empty({count}, scores.options().dtype(at::kLong));
  std::transform(items.begin(), items.begin() + count, indices.mutable_data_ptr<int64_t>(), [](const auto& i) { return i.row; });
  return indices;
}

Tensor select_uncertain(const Tensor& logits, int64_t count, std::string_view kind) {
  const Tensor scores = uncertainty(logits, kind, false);
  const int64_t n = scores.numel();
  TORCH_CHECK_VALUE(n < int64_t{1} << 32, "logits has ", n, " rows; expected fewer than 2^32");
  TORCH_CHECK_VALUE(count > 0 && count <= n, "count is ", count, "; expected from 1 to ", n, ", the number of rows");
  return scores.scalar_type() == at::kDouble ? rank<double>(scores, count) : rank<float>(scores, count);
}

} // namespace

TORCH_LIBRARY_IMPL(fastdistill, CPU, m) {
  m.impl("uncertainty", &uncertainty);
  m.impl("uncertainty_backward", &uncertainty_backward);
  m.impl("select_uncertain", &select_uncertain);
}

} // namespace CPU_CAPABILITY
} // namespace fastdistill
