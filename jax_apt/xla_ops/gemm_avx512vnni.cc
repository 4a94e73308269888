// Fixed-point GEMM on AVX-512 VNNI: bytes through vpdpbusd, pairs of 16-bit limbs through vpdpwssd.
#include <immintrin.h>

#include "gemm.h"

namespace jax_apt {
namespace {

#include "gemm_loops.h"

// 12 x 32 register block, both kernels:
//
//               rhs group, columns 0..15 | 16..31    zmm24, zmm25: [column][kGroup]
//   lhs row  0   sum0,0  | sum0,1                     zmm26: row r's group, broadcast to 16 columns
//       ...       ...    |  ...                       zmm0..23: int32 sums
//   lhs row 11   sum11,0 | sum11,1
template <class Kernel>
void RunTile(const typename Kernel::Lhs* lhs, const typename Kernel::Rhs* rhs, const int32_t* start,
             int64_t groups, int32_t* tile) {
  constexpr int kRows = Kernel::kMr;
  __m512i sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = _mm512_loadu_si512(start);
    sums[r][1] = _mm512_loadu_si512(start + 16);
  }
  for (int64_t g = 0; g < groups; ++g, lhs += Kernel::kGroup, rhs += Kernel::kGroup * Kernel::kNr) {
    const __m512i b0 = _mm512_loadu_si512(rhs);
    const __m512i b1 = _mm512_loadu_si512(rhs + 16 * Kernel::kGroup);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      int32_t group;
      __builtin_memcpy(&group, lhs + r * LhsLayout<Kernel>::kStride, 4);
      const __m512i a = _mm512_set1_epi32(group);
      sums[r][0] = Kernel::MultiplyAdd(sums[r][0], a, b0);
      sums[r][1] = Kernel::MultiplyAdd(sums[r][1], a, b1);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    _mm512_store_si512(tile + r * Kernel::kNr, sums[r][0]);
    _mm512_store_si512(tile + r * Kernel::kNr + 16, sums[r][1]);
  }
}

// vpdpbusd adds four products of an unsigned and a signed byte without saturation. lhs holds code + 128
// (1..255) and the sums start at -128 * (column sums of rhs), so the result is that of the signed codes.
// Sums wrap modulo 2^32, so only the final one must fit: 1024 * 127 * 127 < 2^31.
struct ByteMicroKernel {
  using Lhs = uint8_t;
  using Rhs = int8_t;
  static constexpr int64_t kGroup = 4, kMr = 12, kNr = 32, kKc = 1024;
  static constexpr int32_t kLhsOffset = 128;

  static __m512i MultiplyAdd(__m512i sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, a, b); }
  static void Run(const Lhs* lhs, const Rhs* rhs, const int32_t* start, int64_t groups, int32_t* tile) {
    RunTile<ByteMicroKernel>(lhs, rhs, start, groups, tile);
  }
};

// vpdpwssd adds two products of int16 without saturation. MakePlan picks limbs and a depth such that
// depth * largest lhs limb * largest rhs limb < 2^31: no partial sum wraps.
struct WordMicroKernel {
  using Lhs = int16_t;
  using Rhs = int16_t;
  static constexpr int64_t kGroup = 2, kMr = 12, kNr = 32, kKc = 512;
  static constexpr int32_t kLhsOffset = 0;

  static __m512i MultiplyAdd(__m512i sum, __m512i a, __m512i b) { return _mm512_dpwssd_epi32(sum, a, b); }
  static void Run(const Lhs* lhs, const Rhs* rhs, const int32_t* start, int64_t groups, int32_t* tile) {
    RunTile<WordMicroKernel>(lhs, rhs, start, groups, tile);
  }
};

}  // namespace

const Kernels kAvx512VnniKernels = {"avx512vnni", ScratchBytes<ByteMicroKernel, WordMicroKernel>,
                                    RunGemm<ByteMicroKernel, WordMicroKernel>};

}  // namespace jax_apt
