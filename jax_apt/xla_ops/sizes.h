// How many values the arrays of a product hold, and how many its sums. Not for ISA units: see product.h.
#ifndef JAX_APT_XLA_OPS_SIZES_H_
#define JAX_APT_XLA_OPS_SIZES_H_

#include "product.h"

namespace jax_apt {

inline int64_t Volume(const int64_t* size) { return size[0] * size[1] * size[2]; }

struct Sizes {
  int64_t lhs, rhs, out;
};

inline Sizes SizesOf(Kind kind, const Geometry& g) {
  const int64_t x = g.batch * Volume(g.in) * g.in_channels, y = g.batch * Volume(g.out) * g.out_channels;
  const int64_t w = Volume(g.window) * (g.in_channels / g.groups) * g.out_channels;
  switch (kind) {
    case Kind::kForward: return {x, w, y};
    case Kind::kInputGradient: return {y, w, x};
    case Kind::kFilterGradient: break;
  }
  return {x, y, w};
}

// Terms of one element of the result.
inline int64_t Depth(const Geometry& g, Kind kind) {
  switch (kind) {
    case Kind::kForward: return Volume(g.window) * (g.in_channels / g.groups);
    case Kind::kInputGradient: return Volume(g.window) * (g.out_channels / g.groups);
    default: return g.batch * Volume(g.out);
  }
}

inline bool IsProductOfMatrices(const Geometry& g) {
  for (int d = 0; d < kSpace; ++d)
    if (g.window[d] != 1 || g.stride[d] != 1 || g.pad[d] != 0 || g.in[d] != g.out[d]) return false;
  return true;
}

// Bits of the largest possible sum.
inline int SumBits(const Product& product) {
  const int64_t depth = Depth(product.geometry, product.kind);
  int depth_bits = 0;
  while ((int64_t{1} << depth_bits) < depth) ++depth_bits;
  return product.lhs.bits + product.rhs.bits - 2 + depth_bits;
}

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_SIZES_H_
