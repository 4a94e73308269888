// Random products, quantizations, choices of formats and pooling gradients on every ISA that can run, from
// several threads at once, equal bit for bit to naive int64 loops. Without Python and XLA, so that it runs
// under emulators and sanitizers.
//
//   kernel_fuzz [cases of each caller] [callers] [seed] [ISAs, separated by commas]
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "call.h"
#include "dispatch.h"
#include "nonfinite.h"
#include "quantize.h"
#include "run.h"
#include "team.h"

namespace jax_apt {
namespace {

using Numbers = std::vector<int64_t>;

class Random {
 public:
  explicit Random(uint64_t seed) : bits(seed) {}
  int64_t Int(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(bits); }
  int64_t Pick(std::initializer_list<int64_t> values) { return values.begin()[Int(0, values.size() - 1)]; }

 private:
  std::mt19937_64 bits;
};

int64_t Volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

// ---- Geometries, as the custom call takes them

Numbers DrawMatrix(Random& random) {
  const int64_t deep = random.Pick({17000, 66000, 134000}),
                place = random.Int(0, 40);  // 0, 1, 2: deep M, K, N
  int64_t size[3];
  for (int i = 0; i < 3; ++i)
    size[i] = place < 3 ? (i == place ? deep : random.Int(1, 3)) : random.Int(0, 70);
  return {random.Int(1, 3), 1,      1, 1, size[0], 1, 1, size[0], 1, 1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1,
          size[1],          size[2]};
}

Numbers DrawConvolution(Random& random) {
  const bool is_plain = random.Int(0, 3) == 0;  // 3x3 of stride 1: Winograd, where there is one
  const int64_t dims = is_plain ? 2 : random.Int(1, 3);
  int64_t fields[6][kSpace];  // in, out, window, stride, pad, dilation
  for (int d = 0; d < kSpace; ++d) {
    const bool is_used = d >= kSpace - dims;
    const int64_t in = is_used ? random.Int(1, 10) : 1, window = !is_used   ? 1
                                                                 : is_plain ? 3
                                                                            : random.Int(1, 4);
    const int64_t stride = is_used && !is_plain ? random.Int(1, 3) : 1, pad = is_used ? random.Int(-1, 3) : 0;
    const int64_t dilation = is_used && !is_plain ? random.Int(1, 3) : 1,
                  after = is_used ? random.Int(-1, 3) : 0;
    const int64_t room = in + pad + after - (window - 1) * dilation - 1;
    const int64_t values[] = {in, room < 0 ? 0 : room / stride + 1, window, stride, pad, dilation};
    for (int f = 0; f < 6; ++f) fields[f][d] = values[f];
  }
  Numbers numbers{1, random.Int(1, is_plain ? 20 : 3)};  // Winograd needs many tiles
  for (const auto& field : fields) numbers.insert(numbers.end(), field, field + kSpace);
  int64_t groups = is_plain ? 1 : random.Pick({1, 1, 2, 3});
  int64_t x = groups * random.Pick({1, 2, 3, 5, 16, 17, 33}), y = groups * random.Pick({1, 2, 3, 8, 17, 33});
  if (!is_plain && random.Int(0, 3) == 0) groups = y = x;  // depthwise
  numbers.insert(numbers.end(), {groups, x, y});
  return numbers;
}

// ---- Products

struct Codes {
  std::vector<int32_t> codes;
  std::vector<uint8_t> planes;
};

Codes DrawCodes(Random& random, int64_t count, int bits) {
  const int64_t most = (int64_t{1} << (bits - 1)) - 1;
  const int64_t style = random.Int(0, 6), small = (most + 1) / 2, seldom = random.Pick({30, 300, 3000});
  int64_t run = 0;  // of large ones
  const auto draw = [&](int64_t i) {
    if (style < 2) return random.Int(-most, most);
    if (style == 2) return random.Int(0, 1) != 0 ? most : -most;
    if (style == 3) return most;
    if (style == 4) return i % 2 != 0 ? -most : 0;
    run = random.Int(1, seldom) == 1 ? 40 : run - 1;
    if (run <= 0) return random.Int(-small, small);
    return style == 5 ? most : -most;
  };
  Codes result;
  for (int64_t i = 0; i < count; ++i) result.codes.push_back(static_cast<int32_t>(draw(i)));
  for (int limb = 0; limb < LimbCount(bits); ++limb)
    for (const int32_t code : result.codes)
      result.planes.push_back(static_cast<uint8_t>((code + (1 << (8 * LimbCount(bits) - 1))) >> (8 * limb)));
  return result;
}

// Calls visit(pixel of x, pixel of y, tap) wherever the three meet.
template <class Visit>
void ForEachMeeting(const Geometry& g, Visit visit) {
  const int64_t taps = Volume(g.window), pixels = Volume(g.out);
  for (int64_t i = 0; i < g.batch * pixels * taps; ++i) {
    int64_t tap = i % taps, pixel = i / taps % pixels, place = 0, scale = 1;
    bool is_inside = true;
    for (int d = kSpace - 1; d >= 0; --d) {
      const int64_t at = pixel % g.out[d] * g.stride[d] + tap % g.window[d] * g.dilation[d] - g.pad[d];
      is_inside &= at >= 0 && at < g.in[d];
      place += at * scale, scale *= g.in[d], pixel /= g.out[d], tap /= g.window[d];
    }
    if (is_inside) visit(i / taps / pixels * Volume(g.in) + place, i / taps, i % taps);
  }
}

// Exact sums of one of the products of a call.
std::vector<int64_t> SumsOf(const Call& call, const int32_t* lhs, const int32_t* rhs) {
  const Geometry& g = call.geometry;
  const int64_t x_group = g.in_channels / g.groups, y_group = g.out_channels / g.groups;
  std::vector<int64_t> sums(call.sizes().out);
  ForEachMeeting(g, [&](int64_t x_pixel, int64_t y_pixel, int64_t tap) {
    for (int64_t c = 0; c < g.in_channels; ++c)
      for (int64_t f = c / x_group * y_group; f < (c / x_group + 1) * y_group; ++f) {
        const int64_t x = x_pixel * g.in_channels + c, y = y_pixel * g.out_channels + f;
        const int64_t w = (tap * x_group + c % x_group) * g.out_channels + f;
        switch (call.kind) {
          case Kind::kForward: sums[y] += int64_t{lhs[x]} * rhs[w]; break;
          case Kind::kInputGradient: sums[x] += int64_t{lhs[y]} * rhs[w]; break;
          case Kind::kFilterGradient: sums[w] += int64_t{lhs[x]} * rhs[y]; break;
        }
      }
  });
  return sums;
}

// Threads that are started for each task and joined at the end.
class Helpers {
 public:
  ~Helpers() {
    for (std::thread& thread : threads) thread.join();
  }
  Team MakeTeam(int workers) {
    return Team(workers, [this](std::function<void()> task) { threads.emplace_back(std::move(task)); });
  }

 private:
  std::vector<std::thread> threads;
};

std::string Describe(const char* isa, int64_t kind, const Numbers& geometry, const int32_t* formats) {
  std::string text = std::string(isa) + ", kind " + std::to_string(kind) + ", geometry";
  for (const int64_t number : geometry) text += " " + std::to_string(number);
  for (int i = 0; i < 4; ++i) text += (i == 0 ? ", formats " : " ") + std::to_string(formats[i]);
  return text;
}

bool AreEqual(const std::vector<float>& out, const std::vector<float>& wanted, const std::string& what) {
  for (size_t i = 0; i < out.size(); ++i)
    if (std::memcmp(&out[i], &wanted[i], sizeof(float)) != 0) {
      std::printf("%s: element %zu is %a, not %a\n", what.c_str(), i, out[i], wanted[i]);
      return false;
    }
  return true;
}

// The same filter gradients from a float32 dy of values that are codes, however it is rounded.
bool CheckFloats(Random& random, const Kernels& kernels, const Call& call, std::vector<Product> products,
                 const Codes& rhs, const std::vector<float>& wanted) {
  const int exponent = products[0].rhs.exponent;
  std::vector<float> values;
  for (const int32_t code : rhs.codes) values.push_back(std::ldexp(static_cast<float>(code), exponent));
  int64_t nonfinite = 0;
  std::vector<Floats> floats(products.size());
  for (size_t i = 0; i < products.size(); ++i) {
    const int64_t first = static_cast<int64_t>(i) * call.sizes().rhs;
    floats[i] = {values.data() + first, first, random.Int(0, 1) != 0, Draw{5, 7}, &nonfinite};
    products[i].rhs.floats = &floats[i];
    for (const uint8_t*& plane : products[i].rhs.plane) plane = nullptr;
  }
  std::vector<float> out(wanted.size(), 7.0F);
  for (size_t i = 0; i < products.size(); ++i)
    products[i].out = out.data() + static_cast<int64_t>(i) * call.sizes().out;
  Helpers helpers;
  Team team = helpers.MakeTeam(static_cast<int>(random.Int(1, 3)));
  return RunProducts(kernels, products, team) && nonfinite == 0 &&
         AreEqual(out, wanted, std::string(kernels.name) + ", dy in float32");
}

bool CheckProduct(Random& random, const std::vector<const Kernels*>& all) {
  const bool is_matrix = random.Int(0, 1) != 0;
  const Numbers geometry = is_matrix ? DrawMatrix(random) : DrawConvolution(random);
  const int64_t kind = random.Int(0, 2);
  const auto draw_bits = [&] {
    return static_cast<int32_t>(random.Pick({8, 8, 8, 16, 24, random.Int(2, 24)}));
  };
  const auto draw_exponent = [&] { return static_cast<int32_t>(random.Int(-30, 30)); };
  const int32_t formats[4] = {draw_bits(), draw_exponent(), draw_bits(), draw_exponent()};
  Call call;
  if (const char* error = call.Read(kind, geometry.data(), kGeometrySize)) {
    std::printf("%s: %s\n", Describe("no ISA", kind, geometry, formats).c_str(), error);
    return false;
  }
  const Codes lhs = DrawCodes(random, call.matrices * call.sizes().lhs, formats[0]);
  const Codes rhs = DrawCodes(random, call.matrices * call.sizes().rhs, formats[2]);
  std::vector<float> wanted, out(call.matrices * call.sizes().out);
  std::vector<Product> products;
  for (int64_t i = 0; i < call.matrices; ++i) {
    for (const int64_t sum :
         SumsOf(call, lhs.codes.data() + i * call.sizes().lhs, rhs.codes.data() + i * call.sizes().rhs))
      wanted.push_back(std::ldexp(static_cast<float>(sum), formats[1] + formats[3]));
    products.push_back(call.At(i, lhs.planes.data(), rhs.planes.data(), formats, out.data()));
  }
  for (const Kernels* kernels : all) {
    std::fill(out.begin(), out.end(), 7.0F);
    Helpers helpers;
    Team team = helpers.MakeTeam(static_cast<int>(random.Int(1, 3)));
    if (!RunProducts(*kernels, products, team)) return false;
    if (!AreEqual(out, wanted, Describe(kernels->name, kind, geometry, formats))) return false;
    if (kind == 2 && is_matrix && !CheckFloats(random, *kernels, call, products, rhs, wanted)) return false;
  }
  return true;
}

// Marked values make all that they contribute to NaN and nothing else.
bool CheckMarks(Random& random) {
  const Numbers geometry = DrawConvolution(random);
  const int64_t kind = random.Int(0, 2);
  const int32_t formats[4] = {static_cast<int32_t>(random.Int(2, 24)), 0,
                              static_cast<int32_t>(random.Int(2, 24)), 0};
  Call call;
  if (call.Read(kind, geometry.data(), kGeometrySize) != nullptr) return false;
  const int64_t sizes[2] = {call.sizes().lhs, call.sizes().rhs};
  std::vector<int32_t> marks[2], ones[2];
  std::vector<uint8_t> planes[2];
  for (int side = 0; side < 2; ++side) {
    for (int64_t i = 0; i < sizes[side]; ++i) marks[side].push_back(random.Int(0, 20) == 0 ? 1 : 0);
    ones[side].assign(sizes[side], 1);
    for (int limb = 0; limb < LimbCount(formats[2 * side]); ++limb)
      for (const int32_t mark : marks[side]) planes[side].push_back(mark != 0 ? 0 : 129);
  }
  std::vector<float> out(call.sizes().out, 7.0F);
  SpreadNonfinite(call.At(0, planes[0].data(), planes[1].data(), formats, out.data()));
  const std::vector<int64_t> of_lhs = SumsOf(call, marks[0].data(), ones[1].data());
  const std::vector<int64_t> of_rhs = SumsOf(call, ones[0].data(), marks[1].data());
  for (size_t i = 0; i < out.size(); ++i)
    if (std::isnan(out[i]) != (of_lhs[i] + of_rhs[i] > 0)) {
      std::printf("marks: %s, element %zu\n", Describe("any ISA", kind, geometry, formats).c_str(), i);
      return false;
    }
  return true;
}

// ---- Quantization

// Ties, values just beside them and outside the range, and such that are not finite.
float DrawValue(Random& random, int bits, int exponent) {
  const int64_t style = random.Int(0, 12), most = int64_t{1} << (bits - 1);
  if (style == 0) return std::numeric_limits<float>::quiet_NaN();
  if (style == 1) return random.Int(0, 1) != 0 ? HUGE_VALF : -HUGE_VALF;
  if (style == 2) return std::numeric_limits<float>::max() * (random.Int(0, 1) != 0 ? 1.0F : -1.0F);
  const auto halves = static_cast<float>(random.Int(-2 * most - 4, 2 * most + 4));
  const float value = std::ldexp(halves, exponent - 1);
  return style < 8 ? value : std::nextafter(value, style % 2 != 0 ? HUGE_VALF : -HUGE_VALF);
}

bool CheckQuantization(Random& random, const std::vector<const Kernels*>& all) {
  const int bits = static_cast<int>(random.Int(2, 24)), exponent = static_cast<int>(random.Int(-100, 100));
  const int limbs = LimbCount(bits);
  const int64_t count = random.Pick({0, 1, 3, 17, 64, random.Int(1, 9000)});
  const double most = std::ldexp(1, bits - 1) - 1;
  std::vector<float> x(count);
  std::vector<uint8_t> planes(limbs * count), wanted(limbs * count);
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    x[i] = DrawValue(random, bits, exponent);
    int64_t code = 0;
    if (std::isfinite(x[i])) {
      const double quotient = std::nearbyint(std::ldexp(double{x[i]}, -exponent));
      code =
          static_cast<int64_t>(std::fmax(-most, std::fmin(most, quotient))) + (int64_t{1} << (8 * limbs - 1));
    }
    bad += std::isfinite(x[i]) ? 0 : 1;
    for (int limb = 0; limb < limbs; ++limb)
      wanted[limb * count + i] = static_cast<uint8_t>(code >> (8 * limb));
  }
  for (const Kernels* kernels : all) {
    std::fill(planes.begin(), planes.end(), uint8_t{7});
    if (kernels->quantize(x.data(), count, bits, exponent, planes.data(), count) == bad && planes == wanted)
      continue;
    std::printf("%s: %d bits, exponent %d, %lld values\n", kernels->name, bits, exponent,
                static_cast<long long>(count));
    return false;
  }
  return true;
}

// Each code is a neighbour of its value, whatever the ISA the same one, and no other where a tensor is cut in
// two.
bool CheckRandomRounding(Random& random, const std::vector<const Kernels*>& all) {
  const int bits = static_cast<int>(random.Int(2, 24)), exponent = static_cast<int>(random.Int(-100, 100));
  const int limbs = LimbCount(bits);
  const int64_t count = random.Pick({0, 1, 3, 17, 64, random.Int(1, 9000)}), cut = random.Int(0, count);
  const Draw draw{static_cast<uint32_t>(random.Int(0, int64_t{1} << 31)),
                  static_cast<int32_t>(random.Int(0, 99))};
  const double most = std::ldexp(1, bits - 1) - 1;
  std::vector<float> x(count);
  for (float& value : x) value = DrawValue(random, bits, exponent) * 0.75F;
  std::vector<uint8_t> planes(limbs * count), first_found;
  for (const Kernels* kernels : all) {
    std::fill(planes.begin(), planes.end(), uint8_t{7});
    kernels->quantize_at_random(x.data(), cut, 0, draw, bits, exponent, planes.data(), count);
    kernels->quantize_at_random(x.data() + cut, count - cut, cut, draw, bits, exponent, planes.data() + cut,
                                count);
    if (first_found.empty()) first_found = planes;
    bool is_good = planes == first_found;
    for (int64_t i = 0; i < count; ++i) {
      int64_t code = -(int64_t{1} << (8 * limbs - 1));
      for (int limb = 0; limb < limbs; ++limb) code += int64_t{planes[limb * count + i]} << (8 * limb);
      const double scaled = std::ldexp(double{x[i]}, -exponent);
      const double clipped = std::fmax(-most, std::fmin(most, scaled));
      is_good &= std::isfinite(x[i]) ? std::fabs(static_cast<double>(code) - clipped) < 1
                                     : code == -(int64_t{1} << (8 * limbs - 1));
    }
    if (is_good) continue;
    std::printf("%s: random rounding, %d bits, exponent %d, %lld values\n", kernels->name, bits, exponent,
                static_cast<long long>(count));
    return false;
  }
  return true;
}

// Sums against double, exponents and the choice against what follows from those; the same with any team.
bool CheckChoice(Random& random, const std::vector<const Kernels*>& all) {
  const int64_t count = random.Pick({1, 15, 1000, 40000, random.Int(1, 100000)});
  const double spread = static_cast<double>(random.Int(0, 6)) / 2;  // of magnitudes: few and many outliers
  std::vector<float> x(count);
  double abs_sum = 0, largest = 0;
  for (float& value : x) {
    value = static_cast<float>(std::exp(spread * (static_cast<double>(random.Int(-300, 300)) / 100)));
    value *= static_cast<float>(random.Int(-9, 9));
    abs_sum += std::fabs(value), largest = std::fmax(largest, std::fabs(value));
  }
  const Choice choice{{8, 16, 24}, 3, static_cast<Measure>(random.Int(0, 2)), random.Int(0, 1) != 0, 0.02F};
  const Format in_use{static_cast<int>(random.Pick({8, 16})), 5};
  const auto error_at = [&](int bits, int exponent) {
    const double most = std::ldexp(1, bits - 1) - 1;
    double sum = 0;
    for (const float value : x) {
      const double code = std::nearbyint(std::ldexp(double{value}, -exponent));
      const double rounded = std::ldexp(std::fmax(-most, std::fmin(most, code)), exponent);
      sum += choice.measure == Measure::kElementwise ? std::fabs(value - rounded)
                                                     : std::fabs(value) - std::fabs(rounded);
    }
    return choice.measure == Measure::kResolution ? std::ldexp(static_cast<double>(count), exponent - 2)
                                                  : sum;
  };
  for (const Kernels* kernels : all) {
    Statistics found[2];
    Format formats[2];
    for (int i = 0; i < 2; ++i) {
      Helpers helpers;
      Team team = helpers.MakeTeam(i == 0 ? 1 : static_cast<int>(random.Int(2, 3)));
      formats[i] = ChooseFormat(*kernels, x.data(), count, choice, in_use, &found[i], team);
    }
    bool is_right = std::memcmp(&found[0], &found[1], sizeof(Statistics)) == 0 &&
                    std::memcmp(&formats[0], &formats[1], sizeof(Format)) == 0;
    is_right &= std::fabs(found[0].abs_sum - abs_sum) <= 1e-5 * abs_sum;
    int chosen = largest == 0 ? -1 : choice.is_restart || in_use.bits == 8 ? 0 : 1;
    for (int w = 0; w < 3 && largest > 0; ++w) {
      const int bits = choice.widths[w], exponent = found[0].exponents[w];
      const double most = std::ldexp(1, bits - 1) - 1;
      is_right &= std::ldexp(most, exponent) >= largest && std::ldexp(most, exponent - 1) < largest;
      is_right &= std::fabs(found[0].error_sums[w] - error_at(bits, exponent)) <= 1e-6 * abs_sum;
      if (w == chosen && w < 2 && std::fabs(found[0].error_sums[w]) / found[0].abs_sum > choice.limit)
        ++chosen;
    }
    is_right &= formats[0].bits == (chosen < 0 ? in_use.bits : choice.widths[chosen]);
    if (is_right) continue;
    std::printf("%s: choice among %lld values by measure %d\n", kernels->name, static_cast<long long>(count),
                static_cast<int>(choice.measure));
    return false;
  }
  return true;
}

// ---- Max pooling's gradient

// Small integers: many ties, and sums that are exact in any order. Some infinities and NaNs in x.
std::vector<float> DrawValues(Random& random, int64_t count, bool is_finite) {
  std::vector<float> values(count);
  for (float& value : values) {
    value = static_cast<float>(random.Int(-3, 3));
    if (is_finite || random.Int(0, 9) != 0) continue;
    value = random.Int(0, 1) != 0 ? -HUGE_VALF : std::numeric_limits<float>::quiet_NaN();
  }
  return values;
}

// The tap of a window that takes the gradient, or -1 if that is padding: a NaN gives way to the next value.
template <class At>
int64_t FindLargest(int64_t taps, At at) {
  int64_t best = 0;
  for (int64_t t = 1; t < taps; ++t)
    if (!(at(best) >= at(t))) best = t;
  return best;
}

std::vector<float> PoolGradientOf(const Pool& p, const std::vector<float>& x, const std::vector<float>& dy) {
  std::vector<float> dx(x.size());
  const int64_t taps = Volume(p.window);
  for (int64_t i = 0; i < static_cast<int64_t>(dy.size()); ++i) {
    const auto find = [&](int64_t tap) {  // in x, or -1
      int64_t pixel = i / p.inner, place = 0, scale = p.inner;
      for (int d = kSpace - 1; d >= 0; --d) {
        const int64_t at = pixel % p.out[d] * p.stride[d] + tap % p.window[d] - p.pad[d];
        if (at < 0 || at >= p.in[d]) return int64_t{-1};
        place += at * scale, scale *= p.in[d], pixel /= p.out[d], tap /= p.window[d];
      }
      return place + i % p.inner;
    };
    const int64_t best = FindLargest(taps, [&](int64_t t) { return find(t) < 0 ? -HUGE_VALF : x[find(t)]; });
    if (find(best) >= 0) dx[find(best)] += dy[i];
  }
  return dx;
}

bool CheckPool(Random& random, const std::vector<const Kernels*>& all) {
  Pool p;
  for (int d = 0; d < kSpace; ++d) {
    p.in[d] = random.Int(1, 6), p.window[d] = random.Int(1, 3), p.stride[d] = random.Int(1, 3);
    p.pad[d] = random.Int(0, p.window[d] - 1);
    const int64_t room = p.in[d] + p.pad[d] - p.window[d] + random.Int(0, 1);
    p.out[d] = room < 0 ? 0 : room / p.stride[d] + 1;
  }
  p.inner = random.Pick({1, 3, 4, 17, 33});
  const std::vector<float> x = DrawValues(random, Volume(p.in) * p.inner, false);
  const std::vector<float> dy = DrawValues(random, Volume(p.out) * p.inner, true);
  const std::vector<float> wanted = PoolGradientOf(p, x, dy);
  for (const Kernels* kernels : all) {
    std::vector<float> dx(x.size(), 7.0F);
    const int64_t half = p.inner / 2;
    kernels->max_pool_gradient(p, x.data(), dy.data(), dx.data(), 0, half);
    kernels->max_pool_gradient(p, x.data(), dy.data(), dx.data(), half, p.inner - half);
    if (!AreEqual(dx, wanted, std::string(kernels->name) + ", max pooling")) return false;
  }
  return true;
}

// ---- Callers

std::vector<const Kernels*> FindAll(const std::string& names) {
  std::vector<const Kernels*> all;
  for (size_t start = 0, end; start <= names.size(); start = end + 1) {
    end = std::min(names.find(',', start), names.size());
    all.push_back(FindKernels(names.substr(start, end - start).c_str()));
    if (all.back() != nullptr) continue;
    std::printf("ISA '%s' cannot run here; available: %s\n", names.c_str(), AvailableIsas());
    std::exit(2);
  }
  return all;
}

int Main(int count, char** arguments) {
  const auto number = [&](int i, int64_t otherwise) {
    return i < count ? std::atoll(arguments[i]) : otherwise;
  };
  const int64_t cases = number(1, 100), callers = number(2, 3), seed = number(3, 0);
  const std::string names = count > 4 ? arguments[4] : AvailableIsas();
  const std::vector<const Kernels*> all = FindAll(names);
  std::atomic<int64_t> failures{0};
  std::vector<std::thread> threads;
  for (int64_t caller = 0; caller < callers; ++caller)
    threads.emplace_back([&, caller] {
      Random random(static_cast<uint64_t>(seed * callers + caller));
      for (int64_t i = 0; i < cases && failures == 0; ++i)
        if (!CheckProduct(random, all) || !CheckMarks(random) || !CheckQuantization(random, all) ||
            !CheckRandomRounding(random, all) || !CheckChoice(random, all) || !CheckPool(random, all))
          ++failures;
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("%s: %lld callers of %lld cases, auto takes %s, %s\n", names.c_str(),
              static_cast<long long>(callers), static_cast<long long>(cases), FindKernels("auto")->name,
              failures == 0 ? "all equal" : "NOT EQUAL");
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace jax_apt

int main(int count, char** arguments) { return jax_apt::Main(count, arguments); }
