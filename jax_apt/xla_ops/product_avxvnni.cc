// Fixed-point products on AVX-VNNI: bytes through the 256-bit vpdpbusd, 6 x 16 register blocks.
#include <immintrin.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "product_loops.h"
#include "vnni_kernel.h"

struct Vector256 {
  using Type = __m256i;
  static constexpr int kLanes = 8;
  static Type Zero() { return _mm256_setzero_si256(); }
  static Type Load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void Store(void* to, Type value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
  static Type Broadcast(const uint8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm256_set1_epi32(word);
  }
  static Type MultiplyAdd(Type sum, Type a, Type b) { return _mm256_dpbusd_avx_epi32(sum, a, b); }
};

using AvxVnniKernel = VnniKernel<Vector256, 6>;

}  // namespace

const Kernels kAvxVnniKernels = KernelsOf<AvxVnniKernel>("avxvnni");

}  // namespace jax_apt
