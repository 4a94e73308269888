// How many values the arrays of a product hold. Not for ISA units: see product.h.
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

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_SIZES_H_
