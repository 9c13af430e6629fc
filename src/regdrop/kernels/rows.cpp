// The R-Drop terms in closed form on a CPU (see cpp_rows.py, closed_form.py): rows of many classes
// an item at a time, those of few as narrow_rows.h has it.
//
// An item's rows, one of every pass, are taken in blocks that fit into the first-level cache. The
// forward keeps running maxima and sums relative to them, the backward writes the gradient once.
// Between a load and a store everything stays in registers, conversions included, for which the
// usual numbers of passes are compiled in: exponentials are then most of the arithmetic. A row's
// last block is filled up with -inf in every pass, which contributes nothing, so that no loop over
// vectors needs a remainder.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/function.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

#include "narrow_rows.h"
#include "row_parts.h"

namespace {

constexpr int64_t kGrain = 32768;  // numbers a thread takes at least
constexpr int64_t kSmall = 65536;  // of so many the gradient is computed in the forward

// The vectors of the accumulator's type that a vector of the logits fills: two of a half type.
template <typename scalar_t>
constexpr int kParts = sizeof(at::opmath_type<scalar_t>) / sizeof(scalar_t);
template <typename scalar_t>
using Parts = std::array<Vectorized<at::opmath_type<scalar_t>>, kParts<scalar_t>>;

template <typename scalar_t>
Parts<scalar_t> load_parts(const scalar_t* from) {
  const auto x = Vectorized<scalar_t>::loadu(from);
  if constexpr (kParts<scalar_t> == 1) {
    return {x};
  } else {
    const auto [low, high] = at::vec::convert_to_float<scalar_t>(x);
    return {low, high};
  }
}

template <typename scalar_t>
void store_parts(scalar_t* to, const Parts<scalar_t>& x) {
  if constexpr (kParts<scalar_t> == 1) {
    x[0].store(to);
#ifdef __AVX512BF16__
  } else if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    // The instruction takes numbers below the smallest normal one for 0.
    const __m512bh rounded = _mm512_cvtne2ps_pbh(x[1], x[0]);
    _mm512_storeu_si512(to, reinterpret_cast<const __m512i&>(rounded));
#endif
  } else {
    at::vec::convert_from_float<scalar_t>(x[0], x[1]).store(to);
  }
}

// A block of an item: kBlock classes of every pass at most.
template <typename scalar_t, typename acc_t, int kPasses>
struct Block {
  using Vec = Vectorized<acc_t>;
  using Logits = EachPass<Parts<scalar_t>, kPasses>;

  static constexpr int64_t kStep = Vectorized<scalar_t>::size();
  static_assert(kBlock % kStep == 0);

  explicit Block(int64_t passes) : passes(passes), at(passes), buffer(passes * kBlock) {}

  // Rows are read where they are, unless they need filling up.
  void move_to(const scalar_t* rows, int64_t stride_pass, int64_t size) {
    padded = (size + kStep - 1) / kStep * kStep;
    each([&](int64_t i) {
      at[i] = rows + i * stride_pass;
      if (padded == size) return;
      scalar_t* own = own_memory(i);
      std::copy_n(at[i], size, own);
      std::fill(own + size, own + padded, -std::numeric_limits<scalar_t>::infinity());
      at[i] = own;
    });
  }

  scalar_t* own_memory(int64_t i) { return buffer.data() + i * kBlock; }

  // Read a vector of every pass.
  void read(Logits& x, int64_t v) const {
    each([&](int64_t i) { x[i] = load_parts(at[i] + v); });
  }

  // Subtract each pass's maximum from one part of them; return their mean over passes.
  Vec centre(Logits& x, int part, const EachPass<acc_t, kPasses>& maximum) const {
    Vec sum(0);
    each([&](int64_t i) {
      x[i][part] = x[i][part] - Vec(maximum[i]);
      sum = sum + x[i][part];
    });
    return sum * Vec(acc_t(1) / count());
  }

  int64_t count() const { return kPasses > 0 ? kPasses : passes; }

  // Call a function with each pass.
  template <typename function_t>
  void each(const function_t& function) const {
    for_each<kPasses>(passes, function);
  }

  // Call a function with each part of a vector.
  template <typename function_t>
  static void each_part(const function_t& function) {
    for_each<kParts<scalar_t>>(0, function);
  }

  const int64_t passes;
  int64_t padded = 0;
  EachPass<const scalar_t*, kPasses> at;
  std::vector<scalar_t> buffer;
};

template <typename acc_t>
acc_t sum_of(Vectorized<acc_t> x) {
  using Vec = Vectorized<acc_t>;
  return at::vec::vec_reduce_all<acc_t>([](Vec& a, Vec& b) { return a + b; }, x);
}

// In double, by several sums at once: one alone would wait for each of its additions.
template <typename acc_t>
double sum_of_block(const acc_t* numbers) {
  constexpr int64_t count = 32;
  static_assert(kBlock % count == 0);
  std::array<double, count> sums{};
  for (int64_t v = 0; v < kBlock; v += count)
    for (int64_t i = 0; i < count; ++i) sums[i] += numbers[v + i];
  double sum = 0;
  for (const double part : sums) sum += part;
  return sum;
}

template <typename acc_t>
acc_t first_of(Vectorized<acc_t> x) {
  std::array<acc_t, Vectorized<acc_t>::size()> numbers;
  x.store(numbers.data());
  return numbers[0];
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

template <typename scalar_t, typename acc_t, int kPasses>
void forward_items(const Tensor& logits, const TargetRows<acc_t>& target,
                   const Statistics<acc_t>& out, int64_t begin, int64_t end) {
  using Vec = Vectorized<acc_t>;
  constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  Block<scalar_t, acc_t, kPasses> block(passes);
  const int64_t count = block.count();
  EachPass<acc_t, kPasses> highest(passes), origin(passes), rise(passes);
  EachPass<Vec, kPasses> sum(passes), product(passes);
  typename Block<scalar_t, acc_t, kPasses>::Logits x(passes);
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
      block.move_to(row + start, logits.stride(0), size);
      // A higher maximum: what was summed is expressed relative to it. A nan may be lost here, its
      // exponential is not.
      acc_t mean_rise = 0;
      block.each([&](int64_t i) {
        Vec top(highest[i]);
        for (int64_t v = 0; v < block.padded; v += block.kStep)
          for (const Vec part : load_parts(block.at[i] + v)) top = at::vec::clamp_min(part, top);
        const acc_t higher = at::vec::vec_reduce_all<acc_t>(
            [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
        rise[i] = highest[i] == -infinity ? acc_t(0) : higher - highest[i];
        highest[i] = higher;
        origin[i] = higher == -infinity ? acc_t(0) : higher;
        // Relative to the first, since a sum of rises from the least finite number is not finite.
        mean_rise += i == 0 ? rise[0] : (rise[i] - rise[0]) / count;
        sum[i] = product[i] = Vec(0);
      });
      for (int64_t v = 0; v < block.padded; v += block.kStep) {
        block.read(x, v);
        // The next block's maximum needs little arithmetic and would wait for memory.
        block.each([&](int64_t i) { __builtin_prefetch(block.at[i] + v + kBlock); });
        block.each_part([&](int part) {
          const Vec mean = block.centre(x, part, origin);
          block.each([&](int64_t i) {
            const Vec e = exponential(x[i][part]);
            sum[i] = sum[i] + e;
            product[i] = at::vec::fmadd(e, difference(x[i][part], mean), product[i]);
          });
        });
      }
      block.each([&](int64_t i) {
        const double scale = rise[i] > 0 ? std::exp(-double(rise[i])) : 1;
        weighted[i] = (weighted[i] - total[i] * (rise[i] - mean_rise)) * scale;
        weighted[i] += sum_of<acc_t>(product[i]);
        total[i] = total[i] * scale + sum_of<acc_t>(sum[i]);
      });
      if (!target.has_spread()) continue;
      target.spread(spread.data(), item, start, size);
      for (int64_t i = 0; i < count; ++i) {
        Vec likelihood(0);
        for (int64_t v = 0; v < block.padded; v += block.kStep) {
          const Parts<scalar_t> z = load_parts(block.at[i] + v);
          block.each_part([&](int part) {
            const Vec s = Vec::loadu(spread.data() + v + part * Vec::size());
            const Vec term = s * (z[part] - Vec(origin[i]));
            likelihood = likelihood + Vec::blendv(term, Vec(0), s == Vec(0));
          });
        }
        cross[i] += sum_of<acc_t>(likelihood) - spread_mass * rise[i];
      }
      spread_mass += sum_of_block(spread.data());
    }
    double item_nll = 0, item_kl = 0;
    const double share = share_of(count);
    const double on_class = target.classes ? target.class_mass(item) : 0;
    for (int64_t i = 0; i < count; ++i) {
      if (!(highest[i] < infinity)) total[i] = std::nan("");
      if (on_class != 0) {
        const acc_t at_class = row[i * logits.stride(0) + target.classes[item]];
        cross[i] += on_class * (double(at_class) - double(highest[i]));
      }
      item_nll += share * ((on_class + spread_mass) * std::log(total[i]) - cross[i]);
      item_kl += weighted[i] / total[i];
      const int64_t at = i * items + item;
      out.maximum[at] = highest[i];
      out.inverse_sum[at] = 1 / total[i];
      out.mean_difference[at] = weighted[i] / total[i];
    }
    item_nll /= share * count;
    item_kl /= std::max<int64_t>(1, count - 1);
    // A class masked in one pass only is infinitely unlikely there; 0 * inf hides it.
    if (std::isnan(item_kl) && !std::isnan(item_nll)) item_kl = infinity;
    out.nll[item] = item_nll;
    out.kl[item] = item_kl;
    out.mass[item] = on_class + spread_mass;
  }
}

// Returns the statistics, (3 + 3 * passes, items), in one memory.
Tensor run_forward(const Tensor& logits, const Target& target) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  const Tensor memory = at::empty(
      {3 + 3 * passes, items}, logits.options().dtype(at::toOpMathType(logits.scalar_type())));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_forward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const TargetRows<acc_t> rows(target, num_classes);
        const Statistics<acc_t> out(memory.mutable_data_ptr<acc_t>(), passes, items);
        with_passes(passes, [&](auto constant) {
          at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
            constexpr int known = decltype(constant)::value;
            if (!is_narrow(logits, target))
              return forward_items<scalar_t, acc_t, known>(logits, rows, out, begin, end);
            NarrowRows<scalar_t, acc_t, known> narrow(logits, rows);
            each_group(begin, end, narrow.kLanes, [&](int64_t first, int64_t size) {
              narrow.compare(first, size);
              narrow.store(out, first, size, items);
            });
          });
        });
      });
  return memory;
}

// Writes p (mass a + b (1 - E + d)) - b mean(p) - a target for the first passes, else 0.
template <typename scalar_t, typename acc_t, int kPasses>
void backward_items(const Tensor& out, const Tensor& logits, const TargetRows<acc_t>& target,
                    const Statistics<acc_t>& in, const SlopeRows<acc_t>& grad_nll,
                    const SlopeRows<acc_t>& grad_kl, int64_t backward_passes, int64_t begin,
                    int64_t end) {
  using Vec = Vectorized<acc_t>;
  using Logits = typename Block<scalar_t, acc_t, kPasses>::Logits;
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  Block<scalar_t, acc_t, kPasses> block(passes);
  const int64_t count = block.count(), stride_pass = out.stride(0);
  EachPass<acc_t, kPasses> highest(passes), inverse_sum(passes), slope(passes);
  Logits x(passes), at_class(passes);
  EachPass<Vec, kPasses> p(passes);
  EachPass<scalar_t*, kPasses> grad(passes);
  std::vector<acc_t> spread(kBlock);
  for (int64_t item = begin; item < end; ++item) {
    scalar_t* out_row = out.mutable_data_ptr<scalar_t>() + item * out.stride(1);
    const auto clear_from = [&](int64_t first) {
      for (int64_t i = first; i < count; ++i)
        std::fill_n(out_row + i * stride_pass, num_classes, scalar_t(0));
    };
    const int64_t graded = target.counts(item) ? backward_passes : 0;
    if (graded == 0) {
      clear_from(0);
      continue;
    }
    const acc_t a = grad_nll[item], b = grad_kl[item];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * items + item;
      highest[i] = in.maximum[at];
      inverse_sum[i] = in.inverse_sum[at];
      slope[i] = a * in.mass[item] + b * (1 - in.mean_difference[at]);
    }
    const bool compares = grad_kl.is_given;
    // From one part of the logits to their gradients, in their place.
    const auto differentiate = [&](Logits& x, int part, Vec mass) {
      const Vec mean = block.centre(x, part, highest);
      Vec mean_p(0);
      block.each([&](int64_t i) {
        p[i] = exponential(x[i][part]) * Vec(inverse_sum[i]);
        mean_p = mean_p + p[i];
      });
      // Added, as fmsub has the wrong sign on ARM in older versions of torch (issue 149292).
      const Vec taken = at::vec::fmadd(Vec(-a), mass, mean_p * Vec(-b / count));
      block.each([&](int64_t i) {
        const Vec d = compares ? difference(x[i][part], mean) : Vec(0);
        const Vec factor = at::vec::fmadd(d, Vec(b), Vec(slope[i]));
        x[i][part] = at::vec::fmadd(p[i], factor, taken);
      });
    };
    const scalar_t* row = logits.const_data_ptr<scalar_t>() + item * logits.stride(1);
    // The target's class has more mass than its block knows of. It is differentiated apart, so that
    // it is rounded once, and first, as its logits may be written over.
    const bool has_class = grad_nll.is_given && target.classes;
    const int64_t label = has_class ? target.classes[item] : 0;
    if (has_class) {
      block.each([&](int64_t i) {
        at_class[i].fill(Vec(acc_t(row[i * logits.stride(0) + label])));
      });
      differentiate(at_class, 0, Vec(target.spread(item, label) + target.class_mass(item)));
    }
    const bool spreads = grad_nll.is_given && target.has_spread();
    for (int64_t start = 0; start < num_classes; start += kBlock) {
      const int64_t size = std::min(kBlock, num_classes - start);
      block.move_to(row + start, logits.stride(0), size);
      if (spreads) target.spread(spread.data(), item, start, size);
      // Written where it is read, or, of a block that was filled up, over what it was filled up in.
      const bool whole = block.padded == size;
      for (int64_t i = 0; i < graded; ++i)
        grad[i] = whole ? out_row + i * stride_pass + start : block.own_memory(i);
      for (int64_t v = 0; v < block.padded; v += block.kStep) {
        block.read(x, v);
        block.each_part([&](int part) {
          const acc_t* mass = spread.data() + v + part * Vec::size();
          differentiate(x, part, spreads ? Vec::loadu(mass) : Vec(0));
        });
        block.each([&](int64_t i) {
          if (i < graded) store_parts(grad[i] + v, x[i]);
        });
      }
      for (int64_t i = 0; i < graded && !whole; ++i)
        std::copy_n(grad[i], size, out_row + i * stride_pass + start);
    }
    if (has_class)
      for (int64_t i = 0; i < graded; ++i)
        out_row[i * stride_pass + label] = scalar_t(first_of<acc_t>(at_class[i][0]));
    clear_from(graded);
  }
}

// The gradient's memory is mostly new: where the system has large pages, the first touch of it
// takes one fault for each of them instead of hundreds. The advice stays with the addresses when
// they serve another tensor, which does no harm.
void ask_for_large_pages(const Tensor& memory) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 21;
  const auto begin = reinterpret_cast<uintptr_t>(memory.data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage;
  const uintptr_t last = (begin + memory.nbytes()) / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void run_backward(const Tensor& out, const Tensor& logits, const Target& target,
                  const Tensor& memory, const Slope& grad_nll, const Slope& grad_kl,
                  int64_t backward_passes) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  if (!out.is_alias_of(logits)) ask_for_large_pages(out);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_backward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const TargetRows<acc_t> rows(target, num_classes);
        const Statistics<acc_t> in(memory.mutable_data_ptr<acc_t>(), passes, items);
        const SlopeRows<acc_t> nll(grad_nll), kl(grad_kl);
        with_passes(passes, [&](auto constant) {
          at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
            constexpr int known = decltype(constant)::value;
            if (!is_narrow(logits, target, kFewClassesAgain))
              return backward_items<scalar_t, acc_t, known>(out, logits, rows, in, nll, kl,
                                                            backward_passes, begin, end);
            NarrowRows<scalar_t, acc_t, known> narrow(logits, rows);
            each_group(begin, end, narrow.kLanes, [&](int64_t first, int64_t size) {
              narrow.compare(first, size);
              narrow.template differentiate<scalar_t>(out, first, size, backward_passes, nll, kl);
            });
          });
        });
      });
}

Tensor forward(const Tensor& logits, const std::optional<Tensor>& classes,
               const std::optional<Tensor>& probabilities, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& valid, double label_smoothing) {
  return run_forward(logits, {classes, probabilities, weight, valid, label_smoothing});
}

void backward(const Tensor& out, const Tensor& logits, const std::optional<Tensor>& classes,
              const std::optional<Tensor>& probabilities, const std::optional<Tensor>& weight,
              const std::optional<Tensor>& valid, double label_smoothing, const Tensor& memory,
              const std::optional<Tensor>& grad_nll, const std::optional<Tensor>& grad_kl,
              int64_t backward_passes) {
  run_backward(out, logits, {classes, probabilities, weight, valid, label_smoothing}, memory,
               {std::nullopt, grad_nll}, {std::nullopt, grad_kl}, backward_passes);
}

// Of the items of class indices that count their number, or class weight; refuses other numbers.
double count_items(const Target& target, int64_t num_classes, bool is_weighted) {
  const auto* classes = target.classes->const_data_ptr<int64_t>();
  double count = 0;
  const auto add = [&](const auto& weight_of) {
    for (int64_t item = 0; item < target.classes->numel(); ++item) {
      const int64_t index = classes[item];
      if (index == *target.ignored) continue;
      TORCH_CHECK_VALUE(index >= 0 && index < num_classes,
                        "target must hold class indices from 0 to ", num_classes - 1,
                        " or ignore_index=", *target.ignored, ", got ", index);
      count += weight_of(index);
    }
  };
  if (!is_weighted) {
    add([](int64_t) { return 1.0; });
  } else {
    AT_DISPATCH_FLOATING_TYPES(target.weight->scalar_type(), "rdrop_count", [&] {
      add([weight = target.weight->const_data_ptr<scalar_t>()](int64_t index) {
        return double(weight[index]);
      });
    });
  }
  return count;
}

// Returns what the terms of all items add up to, and writes the gradient of a loss that weights
// them, if its memory is given; in the accumulator's type, as its upstream gradient is not known.
Sums run_both(const Tensor& logits, const Target& target, const Tensor& gradient,
              double nll_slope, double kl_slope, bool compares, int64_t backward_passes) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  Sums sums;
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_both", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const TargetRows<acc_t> rows(target, num_classes);
        const SlopeRows<acc_t> nll({nll_slope});
        const SlopeRows<acc_t> kl({compares ? std::optional(kl_slope) : std::nullopt});
        with_passes(passes, [&](auto constant) {
          NarrowRows<scalar_t, acc_t, decltype(constant)::value> narrow(logits, rows);
          each_group(0, items, narrow.kLanes, [&](int64_t first, int64_t size) {
            narrow.compare(first, size);
            narrow.add_to(sums);
            if (gradient.defined())
              narrow.template differentiate<acc_t>(gradient, first, size, backward_passes, nll, kl);
          });
        });
      });
  return sums;
}

// The same of what the forward returned.
Sums sum_terms(const Tensor& memory, int64_t items) {
  Sums sums;
  AT_DISPATCH_FLOATING_TYPES(memory.scalar_type(), "rdrop_sum", [&] {
    const scalar_t* terms = memory.const_data_ptr<scalar_t>();
    for (int64_t item = 0; item < items; ++item) sums.nll += terms[item];
    for (int64_t item = 0; item < items; ++item) sums.kl += terms[items + item];
  });
  return sums;
}

// Writes a tensor in the accumulator's type times a number, in the type of the logits.
void scale(const Tensor& out, const Tensor& tensor, double factor) {
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, out.scalar_type(), "rdrop_scale", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        const acc_t* from = tensor.const_data_ptr<acc_t>();
        scalar_t* to = out.mutable_data_ptr<scalar_t>();
        const acc_t number = factor;
        for (int64_t at = 0; at < tensor.numel(); ++at) to[at] = scalar_t(from[at] * number);
      });
}

// A gradient as it is, behind what it depends on: whoever differentiates it is refused.
struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  using Variables = torch::autograd::variable_list;

  static Tensor forward(torch::autograd::AutogradContext*, const Tensor& gradient, const Tensor&,
                        const Tensor&) {
    return gradient.detach();
  }

  static Variables backward(torch::autograd::AutogradContext*, const Variables&) {
    TORCH_CHECK(false,
                "the closed form of the R-Drop loss gives no second derivative; "
                "use rdrop_cross_entropy with impl='eager', or RDropConfig(impl='eager')");
  }
};

// The whole loss of class indices, and its autograd: around small logits, Python and single
// operations of torch take longer than everything else. Of those the gradient is computed in the
// forward, and the backward multiplies it. Logits are (passes * batch, ..., classes), contiguous.
struct Loss : torch::autograd::Function<Loss> {
  using Variables = torch::autograd::variable_list;

  static Variables forward(torch::autograd::AutogradContext* context, const Tensor& logits,
                           const Tensor& classes, const std::optional<Tensor>& weight,
                           int64_t ignored, double label_smoothing, double nll_weight,
                           std::optional<double> kl_weight, bool is_mean, int64_t passes,
                           int64_t backward_passes, bool inplace, double largest_divergence) {
    const Target target{classes, {}, weight, {}, label_smoothing, ignored};
    const int64_t num_classes = logits.size(-1);
    const Tensor rows = logits.view({passes, classes.numel(), num_classes});
    const double count = count_items(target, num_classes, false);
    const double kl_count = count == 0 ? 1 : count;
    double nll_count = weight ? count_items(target, num_classes, true) : count;
    if (nll_count == 0) nll_count = 1;
    if (is_mean) nll_weight /= nll_count;
    if (is_mean && kl_weight) *kl_weight /= kl_count;
    const bool compares = kl_weight && passes > 1;
    const double nll_slope = nll_weight / backward_passes;
    const double kl_slope = compares ? *kl_weight * passes / backward_passes / (passes - 1) : 0;
    const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
    const bool is_small = logits.numel() <= kSmall && is_narrow(rows, target);
    Sums sums;
    Tensor memory;
    if (is_small) {
      if (logits.requires_grad()) memory = at::empty(logits.sizes(), options);
      const Tensor gradient = memory.defined() ? memory.view(rows.sizes()) : memory;
      sums = run_both(rows, target, gradient, nll_slope, kl_slope, compares, backward_passes);
    } else {
      memory = run_forward(rows, target);
      sums = sum_terms(memory, classes.numel());
    }
    if (passes > 1 && sums.kl / kl_count > largest_divergence) return {};
    const auto number = [&](double value) {
      const Tensor tensor = at::empty({}, options);
      AT_DISPATCH_FLOATING_TYPES(tensor.scalar_type(), "rdrop_number",
                                 [&] { *tensor.mutable_data_ptr<scalar_t>() = value; });
      return tensor;
    };
    const double total = nll_weight * sums.nll + (kl_weight ? *kl_weight * sums.kl : 0);
    const Variables found{number(total), number(sums.nll / nll_count), number(sums.kl / kl_count)};
    context->mark_non_differentiable({found[1], found[2]});
    context->set_materialize_grads(false);
    if (is_small) {
      context->save_for_backward(inplace ? Variables{memory, logits} : Variables{memory});
      context->saved_data["type"] = int64_t(logits.scalar_type());
      return found;
    }
    context->save_for_backward({memory, logits, classes, weight.value_or(Tensor())});
    context->saved_data["numbers"] = std::vector<double>{label_smoothing, nll_slope, kl_slope};
    context->saved_data["integers"] =
        std::vector<int64_t>{ignored, passes, backward_passes, inplace, compares};
    return found;
  }

  static Variables backward(torch::autograd::AutogradContext* context, Variables grads) {
    Variables found(12);
    if (!grads[0].defined()) return found;
    {
      const at::NoGradGuard guard;
      found[0] = gradient(context, grads[0].item<double>());
    }
    if (!at::GradMode::is_enabled()) return found;
    Tensor source = at::empty({0}, found[0].options());
    torch::autograd::impl::set_gradient_edge(source,
                                             torch::autograd::get_current_node()->next_edge(0));
    found[0] = NoSecondDerivative::apply(found[0], source, grads[0]);
    return found;
  }

  static Tensor gradient(torch::autograd::AutogradContext* context, double grad) {
    const Variables saved = context->get_saved_variables();
    // What is small has its gradient since the forward, but for the upstream one.
    if (saved.size() < 4) {
      const auto type = at::ScalarType(context->saved_data["type"].toInt());
      const bool inplace = saved.size() == 2;
      const Tensor out =
          inplace ? saved[1].detach()
                  : at::empty(saved[0].sizes(), saved[0].options().dtype(type));
      scale(out, saved[0], grad);
      if (inplace) out.unsafeGetTensorImpl()->bump_version();
      return out;
    }
    const auto numbers = context->saved_data["numbers"].toDoubleVector();
    const auto integers = context->saved_data["integers"].toIntVector();
    const int64_t passes = integers[1];
    const bool inplace = integers[3], compares = integers[4];
    const Tensor logits = saved[1].detach();
    const Tensor out = inplace ? logits : at::empty_like(logits);
    const std::array<int64_t, 3> shape{passes, saved[2].numel(), logits.size(-1)};
    const auto weight = saved[3].defined() ? std::optional<Tensor>(saved[3]) : std::nullopt;
    run_backward(out.view(shape), logits.view(shape),
                 {saved[2], {}, weight, {}, numbers[0], integers[0]}, saved[0],
                 {numbers[1] * grad}, {compares ? std::optional(numbers[2] * grad) : std::nullopt},
                 integers[2]);
    if (inplace) out.unsafeGetTensorImpl()->bump_version();
    return out;
  }
};

// Whether these are the tensors that the loss below takes; others go another way, or are refused.
bool are_usual(const Tensor& logits, const Tensor& classes, const std::optional<Tensor>& weight,
               int64_t passes) {
  const auto dims = logits.dim();
  if (!logits.device().is_cpu() || logits.layout() != at::kStrided || !logits.is_contiguous() ||
      logits.is_neg() || !at::isFloatingType(logits.scalar_type()) || dims < 2)
    return false;
  if (!classes.device().is_cpu() || classes.layout() != at::kStrided || !classes.is_contiguous() ||
      classes.is_neg() || classes.scalar_type() != at::kLong || classes.dim() != dims - 1)
    return false;
  if (logits.size(0) != passes * classes.size(0) ||
      !std::equal(classes.sizes().begin() + 1, classes.sizes().end(), logits.sizes().begin() + 1))
    return false;
  // Forward mode has no rule here.
  if (logits._fw_grad(0).defined()) return false;
  if (!weight) return true;
  return weight->device().is_cpu() && weight->dim() == 1 && weight->is_contiguous() &&
         weight->size(0) == logits.size(-1) &&
         weight->scalar_type() == at::toOpMathType(logits.scalar_type());
}

std::vector<Tensor> loss(const Tensor& logits, const Tensor& classes,
                         const std::optional<Tensor>& weight, int64_t ignored,
                         double label_smoothing, double nll_weight,
                         std::optional<double> kl_weight, bool is_mean, int64_t passes,
                         int64_t backward_passes, bool inplace, double largest_divergence) {
  if (!are_usual(logits, classes, weight, passes)) return {};
  return Loss::apply(logits, classes, weight, ignored, label_smoothing, nll_weight, kl_weight,
                     is_mean, passes, backward_passes, inplace, largest_divergence);
}

}  // namespace

TORCH_LIBRARY(regdrop, library) {
  library.def("rows_forward", &forward);
  library.def("rows_backward", &backward);
  library.def("rows_loss", &loss);
}
