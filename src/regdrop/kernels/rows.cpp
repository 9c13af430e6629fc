// The R-Drop terms in closed form on a CPU, an item at a time (see cpp_rows.py, closed_form.py).
//
// An item's rows, one of every pass, are taken in blocks that fit into the first-level cache. The
// forward keeps running maxima and sums relative to them, the backward writes the gradient once.
// Blocks are filled up with -inf in every pass, which contributes nothing, so that no loop over
// vectors needs a remainder.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
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

// A block of an item: kBlock classes of every pass, and their mean over passes.
template <typename scalar_t, typename acc_t>
struct Block {
  using Vec = Vectorized<acc_t>;

  explicit Block(int64_t passes)
      : passes(passes), values(passes * kBlock), mean(kBlock), spread(kBlock) {}

  acc_t* pass(int64_t i) { return values.data() + i * kBlock; }

  void load(const scalar_t* rows, int64_t stride_pass, int64_t size) {
    padded = (size + Vec::size() - 1) / Vec::size() * Vec::size();
    for (int64_t i = 0; i < passes; ++i) {
      at::vec::convert(rows + i * stride_pass, pass(i), size);
      std::fill(pass(i) + size, pass(i) + padded, -std::numeric_limits<acc_t>::infinity());
    }
  }

  // Subtract each pass's maximum, and collect the mean over passes.
  void centre(const acc_t* maximum) {
    const Vec factor(acc_t(1) / passes);
    for (int64_t v = 0; v < padded; v += Vec::size()) {
      Vec sum(0);
      for (int64_t i = 0; i < passes; ++i) {
        const Vec x = Vec::loadu(pass(i) + v) - Vec(maximum[i]);
        x.store(pass(i) + v);
        sum = sum + x;
      }
      (sum * factor).store(mean.data() + v);
    }
  }

  // 0 where a class is masked in every pass.
  Vec difference(Vec x, int64_t v) const {
    const Vec d = x - Vec::loadu(mean.data() + v);
    return Vec::blendv(d, Vec(0), d.isnan());
  }

  const int64_t passes;
  int64_t padded = 0;
  std::vector<acc_t> values;
  std::vector<acc_t> mean;
  std::vector<acc_t> spread;
};

template <typename acc_t>
acc_t sum_of(Vectorized<acc_t> x) {
  using Vec = Vectorized<acc_t>;
  return at::vec::vec_reduce_all<acc_t>([](Vec& a, Vec& b) { return a + b; }, x);
}

int64_t grain(int64_t numbers_an_item) {
  return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, numbers_an_item));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& logits, const std::optional<Tensor>& classes,
    const std::optional<Tensor>& probabilities, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& valid, double label_smoothing) {
  const int64_t passes = logits.size(0), items = logits.size(1), num_classes = logits.size(2);
  const int64_t stride_pass = logits.stride(0), stride_item = logits.stride(1);
  const auto options = logits.options().dtype(at::toOpMathType(logits.scalar_type()));
  Tensor nll = at::empty({items}, options), kl = at::empty({items}, options);
  Tensor mass = at::empty({items}, options);
  Tensor maximum = at::empty({passes, items}, options);
  Tensor inverse_sum = at::empty({passes, items}, options);
  Tensor mean_difference = at::empty({passes, items}, options);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kBFloat16, at::kHalf, logits.scalar_type(), "rdrop_forward", [&] {
        using acc_t = at::opmath_type<scalar_t>;
        using Vec = Vectorized<acc_t>;
        constexpr acc_t infinity = std::numeric_limits<acc_t>::infinity();
        const TargetRows<acc_t> target(classes, probabilities, weight, valid, label_smoothing,
                                       num_classes);
        const scalar_t* rows = logits.const_data_ptr<scalar_t>();
        acc_t *nll_out = nll.mutable_data_ptr<acc_t>(), *kl_out = kl.mutable_data_ptr<acc_t>();
        acc_t *mass_out = mass.mutable_data_ptr<acc_t>();
        acc_t *maximum_out = maximum.mutable_data_ptr<acc_t>();
        acc_t *inverse_out = inverse_sum.mutable_data_ptr<acc_t>();
        acc_t *mean_out = mean_difference.mutable_data_ptr<acc_t>();

        at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
          Block<scalar_t, acc_t> block(passes);
          std::vector<acc_t> highest(passes), origin(passes), rise(passes);
          // Of e = exp(z - maximum), of e * difference, and of target * (z - maximum).
          std::vector<double> total(passes), weighted(passes), cross(passes);
          for (int64_t item = begin; item < end; ++item) {
            if (!target.counts(item)) {
              nll_out[item] = kl_out[item] = mass_out[item] = 0;
              for (int64_t i = 0; i < passes; ++i) {
                const int64_t at = i * items + item;
                maximum_out[at] = inverse_out[at] = mean_out[at] = 0;
              }
              continue;
            }
            std::fill(highest.begin(), highest.end(), -infinity);
            for (auto* sums : {&total, &weighted, &cross}) std::fill(sums->begin(), sums->end(), 0);
            double spread_mass = 0;
            const scalar_t* row = rows + item * stride_item;
            for (int64_t start = 0; start < num_classes; start += kBlock) {
              const int64_t size = std::min(kBlock, num_classes - start);
              block.load(row + start, stride_pass, size);
              // A higher maximum: what was summed is expressed relative to it.
              acc_t mean_rise = 0;
              for (int64_t i = 0; i < passes; ++i) {
                Vec top(highest[i]);
                for (int64_t v = 0; v < block.padded; v += Vec::size())
                  top = at::vec::maximum(top, Vec::loadu(block.pass(i) + v));
                const acc_t higher = at::vec::vec_reduce_all<acc_t>(
                    [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, top);
                rise[i] = highest[i] == -infinity ? acc_t(0) : higher - highest[i];
                highest[i] = higher;
                origin[i] = higher == -infinity ? acc_t(0) : higher;
                mean_rise += rise[i] / passes;
              }
              block.centre(origin.data());
              if (target.has_spread()) target.spread(block.spread.data(), item, start, size);
              for (int64_t i = 0; i < passes; ++i) {
                Vec sum(0), product(0);
                for (int64_t v = 0; v < block.padded; v += Vec::size()) {
                  const Vec x = Vec::loadu(block.pass(i) + v);
                  const Vec e = x.exp_u20();
                  sum = sum + e;
                  product = at::vec::fmadd(e, block.difference(x, v), product);
                }
                const double scale = std::exp(-double(rise[i]));
                weighted[i] = (weighted[i] - total[i] * (rise[i] - mean_rise)) * scale;
                weighted[i] += sum_of<acc_t>(product);
                total[i] = total[i] * scale + sum_of<acc_t>(sum);
                if (!target.has_spread()) continue;
                Vec likelihood(0);
                for (int64_t v = 0; v < block.padded; v += Vec::size()) {
                  const Vec s = Vec::loadu(block.spread.data() + v);
                  const Vec term = s * Vec::loadu(block.pass(i) + v);
                  likelihood = likelihood + Vec::blendv(term, Vec(0), s == Vec(0));
                }
                cross[i] += sum_of<acc_t>(likelihood) - spread_mass * rise[i];
              }
              if (target.has_spread())
                for (int64_t v = 0; v < size; ++v) spread_mass += block.spread[v];
            }
            double item_nll = 0, item_kl = 0;
            const double on_class = target.classes ? target.class_mass(item) : 0;
            for (int64_t i = 0; i < passes; ++i) {
              // The fast exponential does not carry a nan on.
              if (!(highest[i] < infinity)) total[i] = std::nan("");
              if (target.classes) {
                const acc_t at_class = row[i * stride_pass + target.classes[item]];
                cross[i] += on_class * (double(at_class) - double(highest[i]));
              }
              item_nll += (on_class + spread_mass) * std::log(total[i]) - cross[i];
              item_kl += weighted[i] / total[i];
              const int64_t at = i * items + item;
              maximum_out[at] = highest[i];
              inverse_out[at] = 1 / total[i];
              mean_out[at] = weighted[i] / total[i];
            }
            item_nll /= passes;
            item_kl /= std::max<int64_t>(1, passes - 1);
            // A class masked in one pass only is infinitely unlikely there; 0 * inf hides it.
            if (std::isnan(item_kl) && !std::isnan(item_nll)) item_kl = infinity;
            nll_out[item] = item_nll;
            kl_out[item] = item_kl;
            mass_out[item] = on_class + spread_mass;
          }
        });
      });
  return {nll, kl, maximum, inverse_sum, mean_difference, mass};
}

// Writes p (mass a + b (1 - E + d)) - b mean(p) - a target for the first passes, else 0.
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
        using Vec = Vectorized<acc_t>;
        const TargetRows<acc_t> target(classes, probabilities, weight, valid, label_smoothing,
                                       num_classes);
        const scalar_t* rows = logits.const_data_ptr<scalar_t>();
        scalar_t* out_rows = out.mutable_data_ptr<scalar_t>();
        const acc_t *maximum_in = maximum.const_data_ptr<acc_t>();
        const acc_t *inverse_in = inverse_sum.const_data_ptr<acc_t>();
        const acc_t *mean_in = mean_difference.const_data_ptr<acc_t>();
        const acc_t *mass_in = mass.const_data_ptr<acc_t>();
        const acc_t* nll_in = grad_nll ? grad_nll->const_data_ptr<acc_t>() : nullptr;
        const acc_t* kl_in = grad_kl ? grad_kl->const_data_ptr<acc_t>() : nullptr;

        at::parallel_for(0, items, grain(passes * num_classes), [&](int64_t begin, int64_t end) {
          Block<scalar_t, acc_t> block(passes);
          std::vector<acc_t> highest(passes), mean_p(kBlock), p(passes * kBlock);
          for (int64_t item = begin; item < end; ++item) {
            scalar_t* out_row = out_rows + item * out.stride(1);
            const int64_t graded = target.counts(item) ? backward_passes : 0;
            if (graded == 0) {
              for (int64_t i = 0; i < passes; ++i)
                std::fill_n(out_row + i * out.stride(0), num_classes, scalar_t(0));
              continue;
            }
            const acc_t a = nll_in ? nll_in[item] : acc_t(0), b = kl_in ? kl_in[item] : acc_t(0);
            for (int64_t i = 0; i < passes; ++i) highest[i] = maximum_in[i * items + item];
            const scalar_t* row = rows + item * logits.stride(1);
            for (int64_t start = 0; start < num_classes; start += kBlock) {
              const int64_t size = std::min(kBlock, num_classes - start);
              block.load(row + start, logits.stride(0), size);
              block.centre(highest.data());
              for (int64_t v = 0; v < block.padded; v += Vec::size()) {
                Vec sum(0);
                for (int64_t i = 0; i < passes; ++i) {
                  const Vec x = Vec::loadu(block.pass(i) + v);
                  const Vec own = x.exp_u20() * Vec(inverse_in[i * items + item]);
                  own.store(p.data() + i * kBlock + v);
                  sum = sum + own;
                }
                (sum * Vec(b / passes)).store(mean_p.data() + v);
              }
              const bool spreads = nll_in && target.has_spread();
              if (spreads) target.spread(block.spread.data(), item, start, size);
              for (int64_t i = 0; i < graded; ++i) {
                acc_t* grad = block.pass(i);
                const Vec slope(a * mass_in[item] + b * (1 - mean_in[i * items + item]));
                for (int64_t v = 0; v < block.padded; v += Vec::size()) {
                  const Vec d = kl_in ? block.difference(Vec::loadu(grad + v), v) : Vec(0);
                  const Vec factor = at::vec::fmadd(d, Vec(b), slope);
                  Vec g = Vec::loadu(p.data() + i * kBlock + v) * factor;
                  g = g - Vec::loadu(mean_p.data() + v);
                  if (spreads) g = g - Vec(a) * Vec::loadu(block.spread.data() + v);
                  g.store(grad + v);
                }
                if (nll_in && target.classes) {
                  const int64_t at = target.classes[item] - start;
                  if (at >= 0 && at < size) grad[at] -= a * target.class_mass(item);
                }
                at::vec::convert(grad, out_row + i * out.stride(0) + start, size);
              }
            }
            for (int64_t i = graded; i < passes; ++i)
              std::fill_n(out_row + i * out.stride(0), num_classes, scalar_t(0));
          }
        });
      });
}

}  // namespace

TORCH_LIBRARY(regdrop, library) {
  library.def("rows_forward", &forward);
  library.def("rows_backward", &backward);
}
