// Fixed-point products on AVX-VNNI: bytes through the 256-bit vpdpbusd, 6 x 16 register blocks.
#include <immintrin.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "unit.h"
#include "vectors256.h"
#include "vnni_kernel.h"

struct Vector256 : Lanes256 {
  static Type MultiplyAdd(Type sum, Type a, Type b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};

using AvxVnniKernel = VnniKernel<Vector256, 6>;

}  // namespace

const Kernels kAvxVnniKernels = KernelsOf<AvxVnniKernel>("avxvnni");

}  // namespace jax_apt
