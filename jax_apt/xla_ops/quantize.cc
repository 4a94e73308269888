#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace jax_apt {
namespace {

constexpr int64_t kTaskValues = 1 << 15;
constexpr int32_t kInfinityBits = 0x7f800000;

// Parts of a tensor, one for each task. What they find is joined in their order, so that a sum does not
// depend on the number of threads.
template <class Found, class Look>
std::vector<Found> LookThrough(const float* x, int64_t count, Parallel& parallel, Look look) {
  struct Context {
    const float* x;
    int64_t count;
    Look look;
    std::vector<Found> found;
  } context{x, count, look, std::vector<Found>((count + kTaskValues - 1) / kTaskValues)};
  const auto run = [](void* of, int64_t task, int) {
    auto& c = *static_cast<Context*>(of);
    const int64_t start = task * kTaskValues;
    c.found[task] = c.look(c.x + start, start, std::min(kTaskValues, c.count - start));
  };
  parallel.Run(static_cast<int64_t>(context.found.size()), run, &context);
  return std::move(context.found);
}

struct Range {
  int32_t largest;  // bits of a float
  double abs_sum;
};

Range FindRange(const Kernels& kernels, const float* x, int64_t count, Parallel& parallel) {
  Range range{0, 0};
  const auto look = [&](const float* part, int64_t, int64_t size) {
    Range found;
    kernels.measure_range(part, size, &found.largest, &found.abs_sum);
    return found;
  };
  for (const Range& found : LookThrough<Range>(x, count, parallel, look)) {
    range.largest = std::max(range.largest, found.largest);
    range.abs_sum += found.abs_sum;
  }
  return range;
}

// Least exponent at which the magnitude does not clip, as `fixed_point.exponent_for` finds it.
int ExponentFor(int32_t magnitude, int bits) {
  const int octave = (magnitude >> 23) - 127;
  const int32_t fraction = magnitude & 0x7fffff;
  const bool is_above = fraction > (1 << 23) - (1 << (25 - bits));
  return std::min(std::max(octave - (bits - 2) + is_above, -126), 126);
}

struct Errors {
  double sum[kMaxWidths];
};

void SumErrors(const Kernels& kernels, const float* x, int64_t count, const Choice& choice,
               Statistics* statistics, Parallel& parallel) {
  const auto look = [&](const float* part, int64_t, int64_t size) {
    Errors errors;
    for (int w = 0; w < choice.count; ++w)
      errors.sum[w] = w > 0 && choice.widths[w] == choice.widths[w - 1]
                          ? errors.sum[w - 1]
                          : kernels.measure_error(part, size, choice.widths[w], statistics->exponents[w],
                                                  choice.measure == Measure::kElementwise);
    return errors;
  };
  Errors total{};
  for (const Errors& errors : LookThrough<Errors>(x, count, parallel, look))
    for (int w = 0; w < choice.count; ++w) total.sum[w] += errors.sum[w];
  for (int w = 0; w < choice.count; ++w) statistics->error_sums[w] = static_cast<float>(total.sum[w]);
}

}  // namespace

Format ChooseFormat(const Kernels& kernels, const float* x, int64_t count, const Choice& choice,
                    Format in_use, Statistics* statistics, Parallel& parallel) {
  *statistics = {};
  const Range range = FindRange(kernels, x, count, parallel);
  if (range.largest == 0 || range.largest >= kInfinityBits) return in_use;
  statistics->abs_sum = static_cast<float>(range.abs_sum);
  for (int w = 0; w < choice.count; ++w)
    statistics->exponents[w] = ExponentFor(range.largest, choice.widths[w]);
  if (choice.measure == Measure::kResolution) {
    for (int w = 0; w < choice.count; ++w)
      statistics->error_sums[w] = static_cast<float>(count) * std::ldexp(1.0f, statistics->exponents[w]) / 4;
  } else {
    SumErrors(kernels, x, count, choice, statistics, parallel);
  }
  const auto is_good = [&](int w) {
    return std::fabs(statistics->error_sums[w]) / statistics->abs_sum <= choice.limit;
  };
  int chosen = 0;
  if (!choice.is_restart)
    while (chosen < choice.count - 1 && choice.widths[chosen] < in_use.bits) ++chosen;
  while (chosen < choice.count - 1 && !is_good(chosen)) ++chosen;
  return {choice.widths[chosen], statistics->exponents[chosen]};
}

int64_t QuantizeTensor(const Kernels& kernels, const float* x, int64_t count, Format format, const Draw* draw,
                       uint8_t* planes, int64_t stride, Parallel& parallel) {
  const auto look = [&](const float* part, int64_t start, int64_t size) {
    if (draw != nullptr)
      return kernels.quantize_at_random(part, size, start, *draw, format.bits, format.exponent,
                                        planes + start, stride);
    return kernels.quantize(part, size, format.bits, format.exponent, planes + start, stride);
  };
  int64_t nonfinite = 0;
  for (const int64_t found : LookThrough<int64_t>(x, count, parallel, look)) nonfinite += found;
  return nonfinite;
}

}  // namespace jax_apt
