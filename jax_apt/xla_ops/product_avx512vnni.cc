// Fixed-point products on AVX-512 VNNI: bytes through vpdpbusd, 12 x 32 register blocks.
#include <immintrin.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "unit.h"
#include "vectors512.h"
#include "vnni_kernel.h"

using Avx512VnniKernel = VnniKernel<Vector512, 12>;

}  // namespace

const Kernels kAvx512VnniKernels = KernelsOf<Avx512VnniKernel>("avx512vnni");

}  // namespace jax_apt
