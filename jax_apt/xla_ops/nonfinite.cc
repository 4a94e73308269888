#include "nonfinite.h"

#include <cmath>
#include <vector>

#include "sizes.h"

namespace jax_apt {
namespace {

// A tensor as rows of vectors: pixels of channels, or (taps, input channels) of output channels.
class Marks {
 public:
  Marks(const Operand& operand, int64_t rows, int64_t columns)
      : columns_(columns), is_marked_(rows * columns) {
    for (int64_t i = 0; i < rows * columns; ++i) {
      uint8_t any = 0;
      for (int limb = 0; limb < LimbCount(operand.bits); ++limb) any |= operand.plane[limb][i];
      is_marked_[i] = any == 0;
    }
  }

  // Calls `found(column)` for the marked ones of `count` columns from `first` on.
  template <class Found>
  void ForEach(int64_t row, int64_t first, int64_t count, Found found) const {
    const char* marks = &is_marked_[row * columns_ + first];
    for (int64_t c = 0; c < count; ++c)
      if (marks[c]) found(c);
  }

 private:
  int64_t columns_;
  std::vector<char> is_marked_;
};

class Spreader {
 public:
  explicit Spreader(const Product& product)
      : p(product),
        g(product.geometry),
        inner(g.in_channels / g.groups),
        outer(g.out_channels / g.groups),
        lhs(product.lhs, g.batch * Volume(IsGradientLhs() ? g.out : g.in),
            IsGradientLhs() ? g.out_channels : g.in_channels),
        rhs(product.rhs, IsGradientRhs() ? g.batch * Volume(g.out) : Volume(g.window) * inner,
            g.out_channels) {}

  // Pairs of pixels that meet at a tap.
  void Run() const {
    for (int64_t n = 0; n < g.batch; ++n)
      for (int64_t o = 0; o < Volume(g.out); ++o)
        for (int64_t t = 0; t < Volume(g.window); ++t) {
          const int64_t i = InputPixel(o, t);
          if (i < 0) continue;
          for (int64_t group = 0; group < g.groups; ++group)
            Meet(n * Volume(g.in) + i, n * Volume(g.out) + o, t, group);
        }
  }

 private:
  const Product& p;
  const Geometry& g;
  const int64_t inner, outer;  // channels of a group
  const Marks lhs, rhs;

  bool IsGradientLhs() const { return p.kind == Kind::kInputGradient; }
  bool IsGradientRhs() const { return p.kind == Kind::kFilterGradient; }

  int64_t InputPixel(int64_t out, int64_t tap) const {
    int64_t pixel = 0;
    const int64_t o[] = {out / (g.out[1] * g.out[2]), out / g.out[2] % g.out[1], out % g.out[2]};
    const int64_t t[] = {tap / (g.window[1] * g.window[2]), tap / g.window[2] % g.window[1],
                         tap % g.window[2]};
    for (int d = 0; d < kSpace; ++d) {
      const int64_t i = o[d] * g.stride[d] + t[d] * g.dilation[d] - g.pad[d];
      if (i < 0 || i >= g.in[d]) return -1;
      pixel = pixel * g.in[d] + i;
    }
    return pixel;
  }

  void Meet(int64_t x, int64_t y, int64_t tap, int64_t group) const {
    const int64_t c = group * inner, f = group * outer, w = tap * inner;
    switch (p.kind) {
      case Kind::kForward: {
        float* out = p.out + y * g.out_channels + f;
        lhs.ForEach(x, c, inner, [&](int64_t) { Fill(out, outer, 1); });
        for (int64_t i = 0; i < inner; ++i) rhs.ForEach(w + i, f, outer, [&](int64_t j) { out[j] = NAN; });
        break;
      }
      case Kind::kInputGradient: {
        float* out = p.out + x * g.in_channels + c;
        lhs.ForEach(y, f, outer, [&](int64_t) { Fill(out, inner, 1); });
        for (int64_t i = 0; i < inner; ++i) rhs.ForEach(w + i, f, outer, [&](int64_t) { out[i] = NAN; });
        break;
      }
      case Kind::kFilterGradient: {
        float* out = p.out + w * g.out_channels + f;
        lhs.ForEach(x, c, inner, [&](int64_t i) { Fill(out + i * g.out_channels, outer, 1); });
        rhs.ForEach(y, f, outer, [&](int64_t j) { Fill(out + j, inner, g.out_channels); });
        break;
      }
    }
  }

  static void Fill(float* out, int64_t count, int64_t step) {
    for (int64_t i = 0; i < count; ++i) out[i * step] = NAN;
  }
};

}  // namespace

void SpreadNonfinite(const Product& product) { Spreader(product).Run(); }

}  // namespace jax_apt
