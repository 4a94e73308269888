// A call as it comes from outside: numbers in an array become products.
#ifndef JAX_APT_XLA_OPS_CALL_H_
#define JAX_APT_XLA_OPS_CALL_H_

#include "plan.h"
#include "product.h"
#include "sizes.h"

namespace jax_apt {

// matrices, batch, in[3], out[3], window[3], stride[3], pad[3], dilation[3], groups, in channels, out
// channels.
constexpr int64_t kGeometrySize = 5 + 6 * kSpace;

struct Call {
  Kind kind;
  int64_t matrices;  // independent products that share formats, one behind the other within each plane
  Geometry geometry;

  // Null, or what is wrong.
  const char* Read(int64_t kind_number, const int64_t* numbers, int64_t count) {
    if (kind_number < 0 || kind_number > 2) return "kind must be 0, 1 or 2";
    if (count != kGeometrySize) return "the geometry has the wrong length";
    kind = static_cast<Kind>(kind_number);
    matrices = *numbers++;
    geometry.batch = *numbers++;
    for (int64_t* field :
         {geometry.in, geometry.out, geometry.window, geometry.stride, geometry.pad, geometry.dilation})
      for (int d = 0; d < kSpace; ++d) field[d] = *numbers++;
    geometry.groups = numbers[0], geometry.in_channels = numbers[1], geometry.out_channels = numbers[2];
    return FindMistake();
  }

  Sizes sizes() const { return SizesOf(kind, geometry); }  // of one product

  // The i-th product; `lhs` and `rhs` hold planes, each of all matrices.
  Product At(int64_t i, const uint8_t* lhs, const uint8_t* rhs, const int32_t* formats, float* out) const {
    Product product = At(i, lhs, static_cast<const Floats*>(nullptr), formats, out);
    for (int limb = 0; limb < kMaxLimbs && limb < LimbCount(formats[2]); ++limb)
      product.rhs.plane[limb] = rhs + (limb * matrices + i) * sizes().rhs;
    return product;
  }

  // The same; `rhs` is that of this product alone.
  Product At(int64_t i, const uint8_t* lhs, const Floats* rhs, const int32_t* formats, float* out) const {
    const Sizes size = sizes();
    Product product{kind,
                    geometry,
                    {{}, formats[0], formats[1], nullptr},
                    {{}, formats[2], formats[3], rhs},
                    out + i * size.out};
    for (int limb = 0; limb < kMaxLimbs && limb < LimbCount(formats[0]); ++limb)
      product.lhs.plane[limb] = lhs + (limb * matrices + i) * size.lhs;
    return product;
  }

 private:
  const char* FindMistake() const {
    const Geometry& g = geometry;
    if (matrices < 0 || g.batch < 0 || g.in_channels < 0 || g.out_channels < 0) return "a size is negative";
    if (g.groups < 1 || g.in_channels % g.groups != 0 || g.out_channels % g.groups != 0)
      return "groups must divide the channels";
    for (int d = 0; d < kSpace; ++d) {
      if (g.in[d] < 0 || g.out[d] < 0 || g.window[d] < 1) return "a size is negative or a window empty";
      if (g.stride[d] < 1 || g.dilation[d] < 1) return "strides and dilations must be at least 1";
    }
    return nullptr;
  }
};

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_CALL_H_
