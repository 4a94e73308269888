// Quantization of a whole tensor on a team of threads, and the choice of its format.
//
// Source of the method: Zhang et al., arXiv 1911.00361; jax_apt/qem.py and qpa.py are the same in JAX.
#ifndef JAX_APT_XLA_OPS_QUANTIZE_H_
#define JAX_APT_XLA_OPS_QUANTIZE_H_

#include "product.h"

namespace jax_apt {

constexpr int64_t kSerialValues = 1 << 18;  // of a tensor that the calling thread looks through alone
constexpr int kMaxWidths = 23;

enum class Measure { kMeanMagnitude, kElementwise, kResolution };

// How a width is chosen.
struct Choice {
  int widths[kMaxWidths];  // candidates, ascending; the last may be repeated
  int count;
  Measure measure;
  bool is_restart;  // the search begins at the first width, not at that in use
  float limit;      // largest |error sum| / sum|x| that needs no wider format
};

struct Format {
  int bits, exponent;
};

// What a measurement found; all zero where the tensor has no range: zeros alone, NaN or infinite values.
struct Statistics {
  float abs_sum;
  float error_sums[kMaxWidths];   // at each candidate width
  int32_t exponents[kMaxWidths];  // that the largest magnitude needs there
};

// The format that a measurement of x chooses; that in use where there is no range.
Format ChooseFormat(const Kernels&, const float* x, int64_t count, const Choice&, Format in_use, Statistics*,
                    Parallel&);

// x in limb planes of `stride` bytes; returns how many values were not finite. With a draw it is rounded at
// random, without one to nearest.
int64_t QuantizeTensor(const Kernels&, const float* x, int64_t count, Format, const Draw*, uint8_t* planes,
                       int64_t stride, Parallel&);

}  // namespace jax_apt

#endif  // JAX_APT_XLA_OPS_QUANTIZE_H_
