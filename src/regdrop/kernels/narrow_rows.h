// Rows of few classes: a vector holds one class of as many items as it has numbers.
//
// In the other way, a row at a time, most of the time would go into filling up a vector and adding
// up what it holds. Here every number is one of its item, logarithms and divisions included. The
// exponentials and differences stay in the first-level cache, so that a gradient that is wanted at
// once needs no second ones.

#pragma once

#include <cmath>
#include <limits>

#include "row_parts.h"

namespace {

// Up to how many classes that is faster: of a backward alone to fewer, as it compares once more.
constexpr int64_t kFewClasses = 128, kFewClassesAgain = 64;

// What the terms of some items add up to.
struct Sums {
  double nll = 0, kl = 0;
};

template <typename scalar_t, typename acc_t, int kPasses>
class NarrowRows {
 public:
  using Vec = Vectorized<acc_t>;
  static constexpr int64_t kLanes = Vec::size();

  // Logits are (passes, items, classes), with the classes next to each other.
  NarrowRows(const Tensor& logits, const TargetRows<acc_t>& target)
      : target(target),
        passes(logits.size(0)),
        num_classes(logits.size(2)),
        stride_pass(logits.stride(0)),
        stride_item(logits.stride(1)),
        logits(logits.const_data_ptr<scalar_t>()),
        exponentials(passes * num_classes * kLanes),
        differences(exponentials.size()),
        at_class(passes * kLanes),
        highest(passes),
        total(passes),
        mean_difference(passes),
        cross(passes) {}

  // Read items, at most `kLanes`, and compare their passes.
  void compare(int64_t first, int64_t size) {
    read(first, size);
    EachPass<Vec, kPasses> origin(passes), sum(passes), product(passes), x(passes);
    each([&](int64_t i) {
      Vec top(-kInfinity);
      for (int64_t v = 0; v < num_classes; ++v)
        top = at::vec::clamp_min(Vec::loadu(exponential_at(i, v)), top);
      highest[i] = top;
      origin[i] = Vec::blendv(top, Vec(0), top == Vec(-kInfinity));
      sum[i] = product[i] = cross[i] = Vec(0);
    });
    acc_t spread_mass = 0;
    for (int64_t v = 0; v < num_classes; ++v) {
      Vec mean(0);
      each([&](int64_t i) {
        x[i] = Vec::loadu(exponential_at(i, v)) - origin[i];
        mean = mean + x[i];
      });
      mean = mean * Vec(acc_t(1) / count());
      const acc_t spread = target.has_spread() ? target.spread(first, v) : acc_t(0);
      spread_mass += spread;
      each([&](int64_t i) {
        const Vec e = exponential(x[i]), d = difference(x[i], mean);
        e.store(exponential_at(i, v));
        d.store(difference_at(i, v));
        sum[i] = sum[i] + e;
        product[i] = at::vec::fmadd(e, d, product[i]);
        if (spread != 0) cross[i] = at::vec::fmadd(Vec(spread), x[i], cross[i]);
      });
    }
    const Vec class_mass = Vec::loadu(on_class.data());
    mass = class_mass + Vec(spread_mass);
    nll = kl = Vec(0);
    const Vec share(acc_t(share_of(count())));
    each([&](int64_t i) {
      total[i] = Vec::blendv(Vec(acc_t(NAN)), sum[i], highest[i] < Vec(kInfinity));
      const Vec above = Vec::loadu(&at_class[i * kLanes]) - highest[i];
      const Vec own = Vec::blendv(above, Vec(0), class_mass == Vec(0));
      mean_difference[i] = product[i] / total[i];
      nll = nll + share * (mass * total[i].log() - at::vec::fmadd(class_mass, own, cross[i]));
      kl = kl + mean_difference[i];
    });
    nll = nll / Vec(acc_t(share_of(count()) * count()));
    kl = kl / Vec(acc_t(std::max<int64_t>(1, count() - 1)));
    // A class masked in one pass only is infinitely unlikely there; 0 * inf hides it.
    kl = Vec::blendv(kl, Vec(kInfinity), kl.isnan() & (nll == nll));
  }

  // Write what was found of the items.
  void store(const Statistics<acc_t>& out, int64_t first, int64_t size, int64_t items) const {
    const auto put = [&](acc_t* to, const Vec& x) {
      const Vec counted = Vec::blendv(Vec(0), x, Vec::loadu(counts.data()) != Vec(0));
      counted.store(to + first, size);
    };
    put(out.nll, nll);
    put(out.kl, kl);
    put(out.mass, mass);
    each([&](int64_t i) {
      put(out.maximum + i * items, highest[i]);
      put(out.inverse_sum + i * items, Vec(1) / total[i]);
      put(out.mean_difference + i * items, mean_difference[i]);
    });
  }

  void add_to(Sums& sums) const {
    std::array<acc_t, kLanes> nlls, kls;
    nll.store(nlls.data());
    kl.store(kls.data());
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (counts[lane] == 0) continue;
      sums.nll += nlls[lane];
      sums.kl += kls[lane];
    }
  }

  // Write p (mass a + b (1 - E + d)) - b mean(p) - a target for the first passes, else 0. The
  // gradient is shaped as the logits are, in another type perhaps.
  template <typename out_t>
  void differentiate(const Tensor& out, int64_t first, int64_t size, int64_t graded,
                     const SlopeRows<acc_t>& grad_nll, const SlopeRows<acc_t>& grad_kl) {
    std::array<acc_t, kLanes> taken{};
    for (int64_t lane = 0; lane < size; ++lane) taken[lane] = grad_nll[first + lane];
    const Vec a = Vec::loadu(taken.data());
    for (int64_t lane = 0; lane < size; ++lane) taken[lane] = grad_kl[first + lane];
    const Vec b = Vec::loadu(taken.data());
    (a * Vec::loadu(on_class.data())).store(taken.data());
    const bool compares = grad_kl.is_given;
    EachPass<Vec, kPasses> slope(passes), inverse(passes), p(passes);
    each([&](int64_t i) {
      inverse[i] = Vec(1) / total[i];
      slope[i] = a * mass;
      if (compares) slope[i] = slope[i] + b * (Vec(1) - mean_difference[i]);
    });
    const Vec share = b * Vec(acc_t(-1) / count());
    for (int64_t v = 0; v < num_classes; ++v) {
      Vec mean_p(0);
      each([&](int64_t i) {
        p[i] = Vec::loadu(exponential_at(i, v)) * inverse[i];
        mean_p = mean_p + p[i];
      });
      const acc_t spread = target.has_spread() ? target.spread(first, v) : acc_t(0);
      const Vec taken = mean_p * share - a * Vec(spread);
      each([&](int64_t i) {
        const Vec d = compares ? Vec::loadu(difference_at(i, v)) : Vec(0);
        const Vec factor = at::vec::fmadd(d, b, slope[i]);
        at::vec::fmadd(p[i], factor, taken).store(difference_at(i, v));
      });
    }
    const int64_t out_pass = out.stride(0), out_item = out.stride(1);
    out_t* const start = out.mutable_data_ptr<out_t>() + first * out_item;
    for (int64_t i = 0; i < passes; ++i) {
      out_t* const rows = start + i * out_pass;
      for (int64_t lane = 0; lane < size; ++lane)
        if (counts[lane] != 0) difference_at(i, target.classes[first + lane])[lane] -= taken[lane];
      const bool is_written = transpose<acc_t, out_t>(size, [&](int64_t v, auto transposed) {
        if (i < graded) transposed(difference_at(i, v), kLanes, rows + v, out_item);
      });
      for (int64_t lane = 0; lane < size; ++lane) {
        const bool is_graded = i < graded && counts[lane] != 0;
        if (is_graded && is_written) continue;
        out_t* row = rows + lane * out_item;
        const acc_t* from = difference_at(i, 0) + lane;
        for (int64_t v = 0; v < num_classes; ++v)
          row[v] = is_graded ? out_t(from[v * kLanes]) : out_t(0);
      }
    }
  }

 private:
  static constexpr acc_t kInfinity = std::numeric_limits<acc_t>::infinity();

  // Call a function with the first of as many classes as there are lanes, and with what transposes
  // so many rows of them; the last ones are taken twice where they do not come out even. False
  // where items or classes are too few for that, or types differ.
  template <typename from_t, typename to_t, typename function_t>
  bool transpose(int64_t size, const function_t& function) const {
    if constexpr (std::is_same_v<from_t, to_t>) {
      if (size < kLanes || num_classes < kLanes) return false;
      const auto transposed = [](const from_t* from, int64_t from_row, to_t* to, int64_t to_row) {
        at::vec::transpose_mxn<from_t, kLanes, kLanes>(from, from_row, to, to_row);
      };
      for (int64_t v = 0; v < num_classes; v += kLanes)
        function(std::min(v, num_classes - kLanes), transposed);
      return true;
    }
    return false;
  }

  // What rows that do not count hold stays in their lanes, and is not stored.
  void read(int64_t first, int64_t size) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      counts[lane] = lane < size && target.counts(first + lane);
      on_class[lane] = counts[lane] != 0 ? target.class_mass(first + lane) : 0;
    }
    for (int64_t i = 0; i < passes; ++i) {
      const scalar_t* rows = logits + i * stride_pass + first * stride_item;
      const bool is_read = transpose<scalar_t, acc_t>(size, [&](int64_t v, auto transposed) {
        transposed(rows + v, stride_item, exponential_at(i, v), kLanes);
      });
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const bool counted = counts[lane] != 0;
        const scalar_t* row = rows + lane * stride_item;
        at_class[i * kLanes + lane] = counted ? acc_t(row[target.classes[first + lane]]) : 0;
        acc_t* to = exponential_at(i, 0) + lane;
        if (is_read) continue;
        for (int64_t v = 0; v < num_classes; ++v) to[v * kLanes] = counted ? acc_t(row[v]) : 0;
      }
    }
  }

  template <typename function_t>
  void each(const function_t& function) const {
    for_each<kPasses>(passes, function);
  }

  int64_t count() const { return kPasses > 0 ? kPasses : passes; }

  int64_t offset(int64_t i, int64_t v) const { return (i * num_classes + v) * kLanes; }
  acc_t* exponential_at(int64_t i, int64_t v) { return exponentials.data() + offset(i, v); }
  acc_t* difference_at(int64_t i, int64_t v) { return differences.data() + offset(i, v); }

  const TargetRows<acc_t>& target;
  const int64_t passes, num_classes, stride_pass, stride_item;
  const scalar_t* logits;
  // Of e = exp(z - maximum) and of z - mean of z, (passes, classes, lanes).
  std::vector<acc_t> exponentials, differences;
  std::vector<acc_t> at_class;
  std::array<acc_t, kLanes> counts, on_class;
  EachPass<Vec, kPasses> highest, total, mean_difference, cross;
  Vec nll, kl, mass;
};

// Whether rows of at most so many classes are taken so.
inline bool is_narrow(const Tensor& logits, const Target& target, int64_t most = kFewClasses) {
  return logits.size(2) > 0 && logits.size(2) <= most && !target.probabilities;
}

// Call a function with the first item of as many as there are lanes, and with their number.
template <typename function_t>
void each_group(int64_t begin, int64_t end, int64_t lanes, const function_t& function) {
  for (int64_t first = begin; first < end; first += lanes)
    function(first, std::min(lanes, end - first));
}

}  // namespace
