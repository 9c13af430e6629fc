// What both ways of taking rows have in common (see rows.cpp, narrow_rows.h).

#pragma once

#include <ATen/ATen.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

constexpr int64_t kBlock = 1024;  // classes of a row that are taken at once, at most

// What the likelihood is compared with, as `Target` holds it. Items are left out by `valid`, or by
// a class that is `ignored`.
struct Target {
  std::optional<Tensor> classes, probabilities, weight, valid;
  double label_smoothing;
  std::optional<int64_t> ignored = std::nullopt;
};

// The same as raw pointers, null where not given.
template <typename acc_t>
struct TargetRows {
  TargetRows(const Target& target, int64_t num_classes)
      : classes(target.classes ? target.classes->const_data_ptr<int64_t>() : nullptr),
        probabilities(target.probabilities ? target.probabilities->const_data_ptr<acc_t>()
                                           : nullptr),
        weight(target.weight ? target.weight->const_data_ptr<acc_t>() : nullptr),
        valid(target.valid ? target.valid->const_data_ptr<bool>() : nullptr),
        ignored(target.ignored),
        kept(1 - target.label_smoothing),
        share(target.label_smoothing / num_classes),
        num_classes(num_classes) {}

  bool counts(int64_t item) const {
    return (valid == nullptr || valid[item]) && !(ignored && classes[item] == *ignored);
  }

  bool has_spread() const { return share > 0 || probabilities != nullptr; }

  // The mass on a class, but for that on the class index itself.
  acc_t spread(int64_t item, int64_t at) const {
    const acc_t given = probabilities ? probabilities[item * num_classes + at] * kept : acc_t(0);
    return (share + given) * (weight ? weight[at] : acc_t(1));
  }

  // The same of a block of classes.
  void spread(acc_t* out, int64_t item, int64_t start, int64_t size) const {
    if (probabilities || weight) {
      for (int64_t v = 0; v < size; ++v) out[v] = spread(item, start + v);
    } else {
      std::fill(out, out + size, share);
    }
    std::fill(out + size, out + kBlock, acc_t(0));
  }

  acc_t class_mass(int64_t item) const { return weight ? kept * weight[classes[item]] : kept; }

  const int64_t* classes;
  const acc_t* probabilities;
  const acc_t* weight;
  const bool* valid;
  const std::optional<int64_t> ignored;
  const acc_t kept;
  const acc_t share;
  const int64_t num_classes;
};

// One number for each pass: in registers where their number is known, else in memory.
template <typename value_t, int kPasses>
struct EachPass : std::array<value_t, kPasses> {
  explicit EachPass(int64_t) {}
};
template <typename value_t>
struct EachPass<value_t, 0> : std::vector<value_t> {
  explicit EachPass(int64_t passes) : std::vector<value_t>(passes) {}
};

// Call a function with 0, 1, ..., kCount - 1, written out: a loop over an array of vectors would
// keep it in memory. Where kCount is 0 it is not known and `count` holds.
template <int kCount, typename function_t>
inline void for_each(int64_t count, const function_t& function) {
  if constexpr (kCount > 1) for_each<kCount - 1>(count, function);
  if constexpr (kCount > 0) return function(kCount - 1);
  for (int64_t i = 0; i < count; ++i) function(i);
}

// What a number is multiplied by in a sum over passes, which else might not be finite though all of
// them are: a power of 2, which rounds nothing, of at most 1 / count.
inline double share_of(int64_t count) {
  double share = 1;
  while (share * count > 1) share /= 2;
  return share;
}

// Below this an exponential is 0 or next to it, and a difference counts as 0.
template <typename acc_t>
constexpr acc_t kLeast = std::is_same_v<acc_t, float> ? -87.33 : -746;

// z - mean of z over passes; 0, where it might be inf - inf or the mean is not finite since masks
// of the least finite number were added, in a pass in which a class has no probability.
template <typename acc_t>
Vectorized<acc_t> difference(Vectorized<acc_t> x, Vectorized<acc_t> mean) {
  return (x - mean) & (x >= Vectorized<acc_t>(kLeast<acc_t>));
}

#ifdef CPU_CAPABILITY_AVX512
// The same without a mask in a vector.
inline Vectorized<float> difference(Vectorized<float> x, Vectorized<float> mean) {
  const auto possible = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLeast<float>), _CMP_GE_OQ);
  return _mm512_maskz_sub_ps(possible, x, mean);
}
#endif

// The exponential of numbers of at most 0, and of nan.
inline Vectorized<double> exponential(Vectorized<double> x) { return x.exp(); }

inline Vectorized<float> exponential(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  // 2^n 2^f, n the nearest integer of x log2(e), f what remains. Where n and the exponents' bias
  // are added to a large number, the last bits of the sum are those of 2^n; of the least n, that of
  // -88 and less, they are 0. 2^f is the polynomial of degree 5 with the least relative error
  // (9e-8) on [-1/2, 1/2] that is 1 at 0.
  using Vec = Vectorized<float>;
  using Bits = Vectorized<int32_t>;
  const Vec large(12582912.f + 127.f), least(-88.f), log2e(1.44269504f);
  const Vec bounded = at::vec::clamp_min(x, least);
  const Vec shifted = at::vec::fmadd(bounded, log2e, large);
  const Vec f = at::vec::fmadd(bounded, log2e, large - shifted);
  Vec power = at::vec::fmadd(f, Vec(0.00132647273f), Vec(0.00967151299f));
  power = at::vec::fmadd(f, power, Vec(0.0555073358f));
  power = at::vec::fmadd(f, power, Vec(0.240222424f));
  power = at::vec::fmadd(f, power, Vec(0.693147004f));
  power = at::vec::fmadd(f, power, Vec(1.f));
  return power * at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Bits(23));
#else
  return x.exp_u20();
#endif
}

// Of each item the likelihood, the divergence and the mass of the target; of each of its rows the
// maximum, one over the sum of exponentials, and the mean difference.
template <typename acc_t>
struct Statistics {
  Statistics(acc_t* memory, int64_t passes, int64_t items)
      : nll(memory),
        kl(nll + items),
        mass(kl + items),
        maximum(mass + items),
        inverse_sum(maximum + passes * items),
        mean_difference(inverse_sum + passes * items) {}

  acc_t *nll, *kl, *mass, *maximum, *inverse_sum, *mean_difference;
};

// The gradient of a term: a number for all items, or one an item, or none.
struct Slope {
  std::optional<double> number = std::nullopt;
  std::optional<Tensor> items = std::nullopt;
};

template <typename acc_t>
struct SlopeRows {
  explicit SlopeRows(const Slope& slope)
      : number(slope.number.value_or(0)),
        items(slope.items ? slope.items->const_data_ptr<acc_t>() : nullptr),
        is_given(slope.number || slope.items) {}

  acc_t operator[](int64_t item) const { return items ? items[item] : number; }

  const acc_t number;
  const acc_t* items;
  const bool is_given;
};

}  // namespace
