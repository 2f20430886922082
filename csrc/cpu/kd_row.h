// A row of kd_ce_loss and dkd_loss on CPU. Three sweeps over it: maxima; exponentials and their sums; the gradient.
#pragma once

#include "row.h"

#include <c10/util/SmallVector.h>

#include <utility>

namespace fastdistill {
inline namespace CPU_CAPABILITY {
namespace {

// How exp(s) of the cross-entropy comes from exp(s / temperature) of the distillation term.
enum class Share { kSeparate, kSame, kSquare };

struct Options {
  double temperature;
  double kd_weight, target_weight; // of the divergence, and if the target is apart of the target's own
  double ce_weight, label_smoothing;
  bool self_entropy; // KL has the weighing side's own entropy, soft cross-entropy has not
  double factor; // of both divergences: temperature^2, or 1
  double grad_scale; // 1 / rows counted for a mean
};

// What is said of a row by numbers, one or one a lane.
inline double log1p_exp(double x) {
  return std::log1p(std::exp(x));
}
template <typename T>
inline Vec<T> log1p_exp(const Vec<T>& x) {
  return x.exp().log1p();
}
inline double exp_of(double x) {
  return std::exp(x);
}
template <typename T>
inline Vec<T> exp_of(const Vec<T>& x) {
  return x.exp();
}
inline double choose(bool condition, double a, double b) {
  return condition ? a : b;
}
template <typename T>
inline Vec<T> choose(const Vec<T>& condition, const Vec<T>& a, const Vec<T>& b) {
  return Vec<T>::blendv(b, a, condition);
}

// Whether the target or another class, by its log odds: never by 1 - p, so that both probabilities are right however
// near they are to 1.
template <typename Stat>
struct Odds {
  Stat log_odds, surprise, other_surprise; // -log of either probability
  Stat p, other_p;

  explicit Odds(const Stat& x) : log_odds(x) {
    const Stat zero(0), positive = choose(x > zero, x, zero), tail = log1p_exp(choose(x > zero, zero - x, x));
    surprise = choose(x > zero, zero, zero - x) + tail;
    other_surprise = positive + tail;
    p = exp_of(zero - surprise);
    other_p = exp_of(zero - other_surprise);
  }
};

// The divergence between two such pairs of probabilities, and its gradients to the log odds.
template <typename Stat>
struct OddsDivergence {
  Stat value, to_weigher, to_other;

  OddsDivergence(const Odds<Stat>& weigher, const Odds<Stat>& other, bool self_entropy) {
    const Stat zero(0);
    const auto own = [&](const Stat& x) { return self_entropy ? x : zero; };
    value = weighted(weigher.p, other.surprise - own(weigher.surprise)) +
        weighted(weigher.other_p, other.other_surprise - own(weigher.other_surprise));
    to_weigher = weighted(weigher.p * weigher.other_p, own(weigher.log_odds) - other.log_odds);
    to_other = choose(weigher.log_odds > zero, weigher.other_p - other.other_p, other.p - weigher.p);
  }
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

// The loss of a row, or of a vector's worth of rows, and its gradients. KD, CE: which terms there are. REVERSE: the
// student's side weighs. APART: the divergence is of the classes but the target, whose share of the probability has a
// divergence of its own; gradients then come by way of the target's log odds, x = s_target / temperature - log(sum of
// the others' exponentials).
template <typename Form, bool KD, bool CE, bool REVERSE, Share SHARE, bool APART>
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
        kd_grad_(options.kd_weight * options.factor / options.temperature * options.grad_scale),
        target_grad_(options.target_weight * options.factor / options.temperature * options.grad_scale),
        ce_grad_(options.ce_weight * options.grad_scale),
        student_buffer_(scratch.student),
        teacher_buffer_(scratch.teacher),
        exp_s_(scratch.kd_student),
        exp_t_(scratch.kd_teacher),
        exp_ce_(SHARE == Share::kSame ? scratch.kd_student : scratch.ce_student) {}

  // The loss; leaves behind what the gradients need.
  Stat forward(const T* student, const T* teacher, const int64_t* labels) {
    student_ = student;
    teacher_ = teacher;
    [[maybe_unused]] Stat target_s(0), target_t(0);
    if constexpr (APART) {
      target_s = Form::pick(student, labels);
      target_t = Form::pick(teacher, labels);
      hide(labels);
    }
    student_max_ = teacher_max_ = Stat(-kInf<T>);
    for_each_range(labels, [&](int64_t begin, int64_t end) {
      student_max_ = larger(student_max_, max_of<Form>(student + begin, end - begin));
      if constexpr (KD)
        teacher_max_ = larger(teacher_max_, max_of<Form>(teacher + begin, end - begin));
    });
    Stat sum_s(0), sum_t(0), sum_ce(0), cross(0);
    constexpr int64_t kBlock = 2048; // lanes are summed in T for so long before they join the Stat: keeps long rows exact
    const auto add_block = [&](int64_t begin, int64_t end) {
      V block_s(0), block_t(0), block_ce(0), block_cross(0);
      for_each_vector<T>(begin, end, [&](int64_t i, int64_t count) {
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
    };
    for_each_range(labels, [&](int64_t first, int64_t last) {
      for (int64_t begin = first; begin < last; begin += kBlock)
        add_block(begin, std::min(begin + kBlock, last));
    });
    if constexpr (APART)
      show(labels, target_s, target_t);

    Stat loss(0);
    if constexpr (KD) {
      kd_s_ = Stat(kd_grad_) / sum_s;
      kd_t_ = Stat(kd_grad_) / sum_t;
      const Stat log_s = Form::log(sum_s), log_t = Form::log(sum_t);
      const Stat log_ratio = REVERSE ? log_t - log_s : options_.self_entropy ? log_s - log_t : log_s;
      mean_ = cross / (REVERSE ? sum_s : sum_t);
      kd = Stat(options_.factor) * (mean_ + log_ratio);
      loss = Stat(options_.kd_weight) * kd;
      if constexpr (APART)
        loss = loss + add_target(target_odds(target_s, student_max_, inv_temperature_, log_s),
                                 target_odds(target_t, teacher_max_, inv_temperature_, log_t), sum_s, sum_t);
    }
    if constexpr (CE) {
      if constexpr (SHARE == Share::kSame)
        sum_ce = sum_s;
      ce_s_ = Stat(ce_grad_) / sum_ce;
      const Stat smoothing(options_.label_smoothing);
      Stat log_sum = Form::log(sum_ce), surprise = log_sum + student_max_ - Form::pick(student, labels);
      if constexpr (APART) {
        const Odds<Stat> odds = target_odds(target_s, student_max_, T(1), log_sum);
        surprise = odds.surprise;
        log_sum = surprise + target_s - student_max_;
        ce_s_ = ce_s_ * odds.other_p;
        at_s_ = at_s_ + Stat(ce_grad_) * (smoothing - smoothing / Stat(classes_) - odds.other_p);
      }
      ce = (Stat(1) - smoothing) * surprise;
      if (options_.label_smoothing > 0)
        ce = ce + smoothing * (log_sum - mean_centred());
      loss = loss + Stat(options_.ce_weight) * ce;
    }
    return loss;
  }

  // Terms of the last row, without their weights.
  Stat target{0}, kd{0}, ce{0};

  void student_grad(const int64_t* labels, T* out) const {
    const V uniform(-ce_grad_ * options_.label_smoothing / classes_);
    const V from_s = Form::spread(kd_s_), from_t = Form::spread(kd_t_), from_ce = Form::spread(ce_s_);
    const V from_both = from_s + from_ce, from_target = Form::spread(from_target_s_);
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      V g = CE ? uniform : V(0);
      if constexpr (KD && REVERSE)
        g = g + weigher_grad(exp_s_, from_s, i, count);
      if constexpr (KD && !REVERSE) {
        const V& weight = CE && SHARE == Share::kSame ? from_both : from_s;
        g = at::vec::fmadd(load(exp_s_ + i, count, T(0)), weight, g);
        g = g - load(exp_t_ + i, count, T(0)) * from_t;
      }
      if constexpr (CE && (SHARE != Share::kSame || REVERSE))
        g = at::vec::fmadd(load(exp_ce_ + i, count, T(0)), from_ce, g);
      if constexpr (APART)
        g = at::vec::fmadd(load(exp_s_ + i, count, T(0)), from_target, g);
      g.store(out + i, count);
    });
    if constexpr (APART)
      Form::put(out, labels, at_s_);
    else if constexpr (CE)
      Form::subtract_at(out, labels, ce_grad_ * (1 - options_.label_smoothing));
  }

  void teacher_grad([[maybe_unused]] const int64_t* labels, T* out) const {
    const V from_s = Form::spread(kd_s_), from_t = Form::spread(kd_t_), from_target = Form::spread(from_target_t_);
    for_each_vector<T>(0, size_, [&](int64_t i, int64_t count) {
      V g(0);
      if constexpr (KD && REVERSE)
        g = load(exp_t_ + i, count, T(0)) * from_t - load(exp_s_ + i, count, T(0)) * from_s;
      else if constexpr (KD)
        g = weigher_grad(exp_t_, from_t, i, count);
      if constexpr (APART)
        g = at::vec::fmadd(load(exp_t_ + i, count, T(0)), from_target, g);
      g.store(out + i, count);
    });
    if constexpr (APART)
      Form::put(out, labels, at_t_);
  }

 private:
  V student_centred(int64_t i, int64_t count) const {
    return load(student_ + i, count, -kInf<T>) - Form::spread(student_max_);
  }

  V teacher_scaled(int64_t i, int64_t count) const {
    return (load(teacher_ + i, count, -kInf<T>) - Form::spread(teacher_max_)) * V(inv_temperature_);
  }

  // log p_weigher - log p_other (without the first term for soft cross-entropy), up to a constant of the row.
  V difference(const V& s, const V& t) const {
    return REVERSE ? s - t : options_.self_entropy ? t - s : s.neg();
  }

  // The gradient to the side that weighs: p_weigher * (log p_weigher - log p_other - divergence), of which the row's
  // constant has gone.
  V weigher_grad(const T* exps, const V& weight, int64_t i, int64_t count) const {
    const V d = difference(student_centred(i, count) * V(inv_temperature_), teacher_scaled(i, count));
    return weighted(load(exps + i, count, T(0)) * weight, d - Form::spread(mean_));
  }

  // A row's elements in one range, or in two but for its target; a row a lane has its target hidden instead.
  template <typename Body>
  void for_each_range([[maybe_unused]] const int64_t* labels, const Body& body) const {
    if constexpr (APART && Form::kRows == 1) {
      body(0, labels[0]);
      body(labels[0] + 1, size_);
    } else {
      body(0, size_);
    }
  }
  void hide(const int64_t* labels) const {
    show(labels, Stat(-kInf<T>), Stat(-kInf<T>));
  }
  void show(const int64_t* labels, const Stat& target_s, const Stat& target_t) const {
    if constexpr (Form::kRows > 1) { // read into the buffers
      Form::put(student_buffer_, labels, target_s);
      Form::put(teacher_buffer_, labels, target_t);
    }
  }

  // NaN for an infinite logit, or where no other class has a probability.
  Odds<Stat> target_odds(const Stat& target, const Stat& max, T scale, const Stat& log_sum) const {
    const Stat largest = larger(target, max);
    return Odds<Stat>((target - max) * Stat(scale) - log_sum + (largest - largest));
  }

  // The target's own term times its weight; leaves behind what it adds to the gradients.
  Stat add_target(const Odds<Stat>& student, const Odds<Stat>& teacher, const Stat& sum_s, const Stat& sum_t) {
    const OddsDivergence<Stat> divergence(REVERSE ? student : teacher, REVERSE ? teacher : student, options_.self_entropy);
    target = Stat(options_.factor) * divergence.value;
    at_s_ = Stat(target_grad_) * (REVERSE ? divergence.to_weigher : divergence.to_other);
    at_t_ = Stat(target_grad_) * (REVERSE ? divergence.to_other : divergence.to_weigher);
    from_target_s_ = Stat(0) - at_s_ / sum_s;
    from_target_t_ = Stat(0) - at_t_ / sum_t;
    return Stat(options_.target_weight) * target;
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
  const T inv_temperature_, kd_grad_, target_grad_, ce_grad_;
  T *student_buffer_, *teacher_buffer_;
  T *exp_s_, *exp_t_, *exp_ce_;
  const T* student_ = nullptr;
  const T* teacher_ = nullptr;
  Stat student_max_{0}, teacher_max_{0};
  Stat kd_s_{0}, kd_t_{0}, ce_s_{0}; // what an exponential weighs in the gradient
  Stat mean_{0}; // of `difference` over the distribution that weighs
  Stat at_s_{0}, at_t_{0}; // gradients to the target, where it is apart
  Stat from_target_s_{0}, from_target_t_{0}; // what an exponential weighs in the gradient by way of the log odds
};

} // namespace
} // namespace CPU_CAPABILITY
} // namespace fastdistill
