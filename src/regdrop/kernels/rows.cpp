// The R-Drop terms in closed form on a CPU, an item at a time (see cpp_rows.py, closed_form.py).
//
// An item's rows, one of every pass, are taken in blocks that fit into the first-level cache. The
// forward keeps running maxima and sums relative to them, the backward writes the gradient once.
// Exponentials are most of the arithmetic: between a load and a store everything else stays in
// registers, for which the usual numbers of passes are compiled in. A row's last block is filled up
// with -inf in every pass, which contributes nothing, so that no loop over vectors needs a
// remainder.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;
using at::vec::Vectorized;

constexpr int64_t kBlock = 1024;
constexpr int64_t kGrain = 65536;  // numbers a thread takes at least

// What the likelihood is compared with, as raw pointers; null where not given.
template <typename acc_t>
struct TargetRows {
  TargetRows(const std::optional<Tensor>& classes, const std::optional<Tensor>& probabilities,
             const std::optional<Tensor>& weight, const std::optional<Tensor>& valid,
             double label_smoothing, int64_t num_classes)
      : classes(classes ? classes->const_data_ptr<int64_t>() : nullptr),
        probabilities(probabilities ? probabilities->const_data_ptr<acc_t>() : nullptr),
        weight(weight ? weight->const_data_ptr<acc_t>() : nullptr),
        valid(valid ? valid->const_data_ptr<bool>() : nullptr),
        kept(1 - label_smoothing),
        share(label_smoothing / num_classes),
        num_classes(num_classes) {}

  bool counts(int64_t item) const { return valid == nullptr || valid[item]; }

  bool has_spread() const { return share > 0 || probabilities != nullptr; }

  // The mass on each class of a block, but for that on the class index itself.
  void spread(acc_t* out, int64_t item, int64_t start, int64_t size) const {
    const acc_t* given = probabilities ? probabilities + item * num_classes + start : nullptr;
    for (int64_t v = 0; v < kBlock; ++v) {
      acc_t mass = 0;
      if (v < size) {
        mass = share + (given ? given[v] * kept : acc_t(0));
        if (weight) mass *= weight[start + v];
      }
      out[v] = mass;
    }
  }

  acc_t class_mass(int64_t item) const { return weight ? kept * weight[classes[item]] : kept; }

  const int64_t* classes;
  const acc_t* probabilities;
  const acc_t* weight;
  const bool* valid;
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

// A block of an item: kBlock classes of every pass at most.
template <typename scalar_t, typename acc_t, int kPasses>
struct Block {
  using Vec = Vectorized<acc_t>;

  explicit Block(int64_t passes) : passes(passes), at(passes), buffer(passes * kBlock) {}

  // Rows of the accumulator's type are read where they are, unless they need filling up.
  void load(const scalar_t* rows, int64_t stride_pass, int64_t size) {
    padded = (size + Vec::size() - 1) / Vec::size() * Vec::size();
    for (int64_t i = 0; i < count(); ++i) {
      if constexpr (std::is_same_v<scalar_t, acc_t>) {
        if (padded == size) {
          at[i] = rows + i * stride_pass;
          continue;
        }
      }
      acc_t* own = own_memory(i);
      at::vec::convert(rows + i * stride_pass, own, size);
      std::fill(own + size, own + padded, -std::numeric_limits<acc_t>::infinity());
      at[i] = own;
    }
  }

  acc_t* own_memory(int64_t i) { return buffer.data() + i * kBlock; }

  // Subtract each pass's maximum from a vector of every pass; return their mean over passes.
  Vec centre(EachPass<Vec, kPasses>& x, const EachPass<acc_t, kPasses>& maximum, int64_t v) const {
    Vec sum(0);
    for (int64_t i = 0; i < count(); ++i) {
      x[i] = Vec::loadu(at[i] + v) - Vec(maximum[i]);
      sum = sum + x[i];
    }
    return sum * Vec(acc_t(1) / count());
  }

  int64_t count() const { return kPasses > 0 ? kPasses : passes; }

  const int64_t passes;
  int64_t padded = 0;
  EachPass<const acc_t*, kPasses> at;
  std::vector<acc_t> buffer;
};

// Below this an exponential counts as 0; that of float is about its smallest normal number.
template <typename acc_t>
constexpr acc_t kLeast = std::is_same_v<acc_t, float> ? -87.33 : -746;

// z - mean of z over passes; 0, where it might be inf - inf, in a pass in which a class has no
// probability.
template <typename acc_t>
Vectorized<acc_t> difference(Vectorized<acc_t> x, Vectorized<acc_t> mean) {
  using Vec = Vectorized<acc_t>;
  return Vec::blendv(x - mean, Vec(0), x < Vec(kLeast<acc_t>));
}

// The exponential of numbers of at most 0, and of nan.
inline Vectorized<double> exponential(Vectorized<double> x) { return x.exp(); }

inline Vectorized<float> exponential(Vectorized<float> x) {
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  // 2^n 2^f, n the nearest integer of x log2(e), f what remains. Where n and the exponents' bias are
  // added to a large number, the last bits of the sum are those of 2^n. 2^f is the polynomial of
  // degree 5 with the least relative error (9e-8) on [-1/2, 1/2] that is 1 at 0.
  using Vec = Vectorized<float>;
  using Bits = Vectorized<int32_t>;
  const Vec large(12582912.f + 127.f), least(kLeast<float>), log2e(1.44269504f);
  const Vec bounded = at::vec::clamp_min(x, least);
  const Vec shifted = at::vec::fmadd(bounded, log2e, large);
  const Vec f = at::vec::fmsub(bounded, log2e, shifted - large);
  Vec power = at::vec::fmadd(f, Vec(0.00132647273f), Vec(0.00967151299f));
  power = at::vec::fmadd(f, power, Vec(0.0555073358f));
  power = at::vec::fmadd(f, power, Vec(0.240222424f));
  power = at::vec::fmadd(f, power, Vec(0.693147004f));
  power = at::vec::fmadd(f, power, Vec(1.f));
  const Vec scale = at::vec::cast<float>(at::vec::cast<int32_t>(shifted) << Bits(23));
  return Vec::blendv(power * scale, Vec(0), x < least);
#else
  return x.exp_u20();
#endif
}

template <typename acc_t>
acc_t sum_of(Vectorized<acc_t> x) {
  using Vec = Vectorized<acc_t>;
  return at::vec::vec_reduce_all<acc_t>([](Vec& a, Vec& b) { return a + b; }, x);
}

int64_t grain(int64_t numbers_an_item) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers_an_item));
}

// Call a function with the number of passes as a constant: 0 for one that is not compiled in.
template <typename function_t>
void with_passes(int64_t passes, const function_t& function) {
  switch (passes) {
    case 1: return function(std::integral_constant<int, 1>());
    case 2: return function(std::integral_constant<int, 2>());
    case 3: return function(std::integral_constant<int, 3>());
    default: return function(std::integral_constant<int, 0>());
  }
}

// Of each item the likelihood, the divergence and the mass of the target; of each of its rows the
// maximum, one over the sum of exponentials, and the mean difference.
template <typename acc_t>
struct Statistics {
  acc_t *nll, *kl, *mass, *maximum, *inverse_sum, *mean_difference;
};

template <typename scalar_t, typename acc_t, int kPasses>
void forward_items(const Tensor& logits, const TargetRows<acc_t>& target,
                   const Statistics<acc_t>& out, int64_t begin, int64_t end) {
  using Vec = Vectorized<acc_t>;
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  Block<scalar_t, acc_t, kPasses> block(passes);
  const int64_t count = block.count();
  EachPass<acc_t, kPasses> highest(passes), origin(passes), rise(passes);
  EachPass<Vec, kPasses> x(passes), sum(passes), product(passes);
  // Of e = exp(z - maximum), of e * difference, and of target * (z - maximum).
  EachPass<double, kPasses> total(passes), weighted(passes), cross(passes);
  std::vector<acc_t> spread(kBlock);
  for (int64_t item = begin; item < end; ++item) {
    if (!target.counts(item)) {
      out.nll[item] = out.kl[item] = out.mass[item] = 0;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = i * items + item;
        out.maximum[at] = out.inverse_sum[at] = out.mean_difference[at] = 0;
      }
      continue;
    }
    std::fill(highest.begin(), highest.end(), -infinity);
    for (auto* sums : {&total, &weighted, &cross}) std::fill(sums->begin(), sums->end(), 0);
    double spread_mass = 0;
    const scalar_t* row = logits.const_data_ptr<scalar_t>() + item * logits.stride(1);
    for (int64_t start = 0; start < num_classes; start += kBlock) {
      const int64_t size = std::min(kBlock, num_classes - start);
      block.load(row + start, logits.stride(0), size);
      // A higher maximum: what was summed is expressed relative to it. A nan may be lost here, its
      // exponential is not.
      acc_t mean_rise = 0;
      for (int64_t i = 0; i < count; ++i) {
        Vec top(highest[i]);
        for (int64_t v = 0; v < block.padded; v += Vec::size())
          top = at::vec::clamp_min(Vec::loadu(block.at[i] + v), top);
        const acc_t higher = at::vec::vec_reduce_all<acc_t>(
            [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
        rise[i] = highest[i] == -infinity ? acc_t(0) : higher - highest[i];
        highest[i] = higher;
        origin[i] = higher == -infinity ? acc_t(0) : higher;
        mean_rise += rise[i] / count;
        sum[i] = product[i] = Vec(0);
      }
      for (int64_t v = 0; v < block.padded; v += Vec::size()) {
        const Vec mean = block.centre(x, origin, v);
        for (int64_t i = 0; i < count; ++i) {
          const Vec e = exponential(x[i]);
          sum[i] = sum[i] + e;
          product[i] = at::vec::fmadd(e, difference(x[i], mean), product[i]);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        const double scale = std::exp(-double(rise[i]));
        weighted[i] = (weighted[i] - total[i] * (rise[i] - mean_rise)) * scale;
        weighted[i] += sum_of<acc_t>(product[i]);
        total[i] = total[i] * scale + sum_of<acc_t>(sum[i]);
      }
      if (!target.has_spread()) continue;
      target.spread(spread.data(), item, start, size);
      for (int64_t i = 0; i < count; ++i) {
        Vec likelihood(0);
        for (int64_t v = 0; v < block.padded; v += Vec::size()) {
          const Vec s = Vec::loadu(spread.data() + v);
          const Vec term = s * (Vec::loadu(block.at[i] + v) - Vec(origin[i]));
          likelihood = likelihood + Vec::blendv(term, Vec(0), s == Vec(0));
        }
        cross[i] += sum_of<acc_t>(likelihood) - spread_mass * rise[i];
      }
      for (int64_t v = 0; v < size; ++v) spread_mass += spread[v];
    }
    double item_nll = 0, item_kl = 0;
    const double on_class = target.classes ? target.class_mass(item) : 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(highest[i] < infinity)) total[i] = std::nan("");
      if (target.classes) {
        const acc_t at_class = row[i * logits.stride(0) + target.classes[item]];
        cross[i] += on_class * (double(at_class) - double(highest[i]));
      }
      item_nll += (on_class + spread_mass) * std::log(total[i]) - cross[i];
      item_kl += weighted[i] / total[i];
      const int64_t at = i * items + item;
      out.maximum[at] = highest[i];
      out.inverse_sum[at] = 1 / total[i];
      out.mean_difference[at] = weighted[i] / total[i];
    }
    item_nll /= count;
    item_kl /= std::max<int64_t>(1, count - 1);
    // A class masked in one pass only is infinitely unlikely there; 0 * inf hides it.
    if (std::isnan(item_kl) && !std::isnan(item_nll)) item_kl = infinity;
    out.nll[item] = item_nll;
    out.kl[item] = item_kl;
    out.mass[item] = on_class + spread_mass;
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const std::optional<Tensor>& classes,
    const std::optional<Tensor>& probabilities, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& valid, double label_smoothing) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
  Tensor nll = at::empty({items}, options), kl = at::empty({items}, options);
  Tensor mass = at::empty({items}, options);
  Tensor maximum = at::empty({passes, items}, options);
  Tensor inverse_sum = at::empty({passes, items}, options);
  Tensor mean_difference = at::empty({passes, items}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_forward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const TargetRows<acc_t> target(classes, probabilities, weight, valid, label_smoothing,
                                       num_classes);
        const Statistics<acc_t> out{
            nll.mutable_data_ptr<acc_t>(),         kl.mutable_data_ptr<acc_t>(),
            mass.mutable_data_ptr<acc_t>(),        maximum.mutable_data_ptr<acc_t>(),
            inverse_sum.mutable_data_ptr<acc_t>(), mean_difference.mutable_data_ptr<acc_t>()};
        with_passes(passes, [&](auto constant) {
          at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
            forward_items<scalar_t, acc_t, decltype(constant)::value>(logits, target, out, begin, end);
          });
        });
      });
  return {nll, kl, maximum, inverse_sum, mean_difference, mass};
}

// What the backward reads of each item and row, and the gradients of both terms, null where none.
template <typename acc_t>
struct Slopes {
  const acc_t *maximum, *inverse_sum, *mean_difference, *mass, *grad_nll, *grad_kl;
};

// Writes p (mass a + b (1 - E + d)) - b mean(p) - a target for the first passes, else 0.
template <typename scalar_t, typename acc_t, int kPasses>
void backward_items(const Tensor& out, const Tensor& logits, const TargetRows<acc_t>& target,
                    const Slopes<acc_t>& in, int64_t backward_passes, int64_t begin, int64_t end) {
  using Vec = Vectorized<acc_t>;
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  Block<scalar_t, acc_t, kPasses> block(passes);
  const int64_t count = block.count();
  EachPass<acc_t, kPasses> highest(passes), inverse_sum(passes), slope(passes);
  EachPass<Vec, kPasses> x(passes), p(passes);
  EachPass<acc_t*, kPasses> grad(passes);
  std::vector<acc_t> spread(kBlock);
  for (int64_t item = begin; item < end; ++item) {
    scalar_t* out_row = out.mutable_data_ptr<scalar_t>() + item * out.stride(1);
    const auto clear_from = [&](int64_t first) {
      for (int64_t i = first; i < count; ++i)
        std::fill_n(out_row + i * out.stride(0), num_classes, scalar_t(0));
    };
    const int64_t graded = target.counts(item) ? backward_passes : 0;
    if (graded == 0) {
      clear_from(0);
      continue;
    }
    const acc_t a = in.grad_nll ? in.grad_nll[item] : acc_t(0);
    const acc_t b = in.grad_kl ? in.grad_kl[item] : acc_t(0);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * items + item;
      highest[i] = in.maximum[at];
      inverse_sum[i] = in.inverse_sum[at];
      slope[i] = a * in.mass[item] + b * (1 - in.mean_difference[at]);
    }
    const bool spreads = in.grad_nll && target.has_spread();
    const scalar_t* row = logits.const_data_ptr<scalar_t>() + item * logits.stride(1);
    for (int64_t start = 0; start < num_classes; start += kBlock) {
      const int64_t size = std::min(kBlock, num_classes - start);
      block.load(row + start, logits.stride(0), size);
      if (spreads) target.spread(spread.data(), item, start, size);
      // Where a block is read in place it is written in place, after all passes were read.
      for (int64_t i = 0; i < graded; ++i) {
        grad[i] = block.own_memory(i);
        if constexpr (std::is_same_v<scalar_t, acc_t>)
          if (block.padded == size) grad[i] = out_row + i * out.stride(0) + start;
      }
      for (int64_t v = 0; v < block.padded; v += Vec::size()) {
        const Vec mean = block.centre(x, highest, v);
        Vec mean_p(0);
        for (int64_t i = 0; i < count; ++i) {
          p[i] = exponential(x[i]) * Vec(inverse_sum[i]);
          mean_p = mean_p + p[i];
        }
        Vec taken = mean_p * Vec(b / count);
        if (spreads) taken = at::vec::fmadd(Vec(a), Vec::loadu(spread.data() + v), taken);
        for (int64_t i = 0; i < graded; ++i) {
          const Vec d = in.grad_kl ? difference(x[i], mean) : Vec(0);
          const Vec factor = at::vec::fmadd(d, Vec(b), Vec(slope[i]));
          at::vec::fmsub(p[i], factor, taken).store(grad[i] + v);
        }
      }
      for (int64_t i = 0; i < graded; ++i) {
        if (in.grad_nll && target.classes) {
          const int64_t at = target.classes[item] - start;
          if (at >= 0 && at < size) grad[i][at] -= a * target.class_mass(item);
        }
        if (grad[i] == block.own_memory(i))
          at::vec::convert(grad[i], out_row + i * out.stride(0) + start, size);
      }
    }
    clear_from(graded);
  }
}

void backward(const Tensor& out, const Tensor& logits, const std::optional<Tensor>& classes,
              const std::optional<Tensor>& probabilities, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& valid, double label_smoothing, const Tensor& maximum,
              const Tensor& inverse_sum, const Tensor& mean_difference, const Tensor& mass,
              const std::optional<Tensor>& grad_nll, const std::optional<Tensor>& grad_kl,
              int64_t backward_passes) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_backward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const TargetRows<acc_t> target(classes, probabilities, weight, valid, label_smoothing,
                                       num_classes);
        const Slopes<acc_t> in{maximum.const_data_ptr<acc_t>(),
                               inverse_sum.const_data_ptr<acc_t>(),
                               mean_difference.const_data_ptr<acc_t>(),
                               mass.const_data_ptr<acc_t>(),
                               grad_nll ? grad_nll->const_data_ptr<acc_t>() : nullptr,
                               grad_kl ? grad_kl->const_data_ptr<acc_t>() : nullptr};
        with_passes(passes, [&](auto constant) {
          at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
            backward_items<scalar_t, acc_t, decltype(constant)::value>(
                out, logits, target, in, backward_passes, begin, end);
          });
        });
      });
}

}  // namespace

TORCH_LIBRARY(regdrop, library) {
  library.def("rows_forward", &forward);
  library.def("rows_backward", &backward);
}
