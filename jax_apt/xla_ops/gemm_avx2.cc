// Fixed-point GEMM on AVX2: pairs of 16-bit limbs through vpmaddwd.
#include <immintrin.h>

#include "gemm.h"

namespace jax_apt {
namespace {

#include "gemm_loops.h"

// 6 x 16 register block:
//
//              rhs pair, columns 0..7 | 8..15       ymm12, ymm13: [column][2] int16
//   lhs row 0   sum00 | sum01                        ymm14: row r's pair, broadcast to 8 columns
//       ...      ...  |  ...                         ymm0..11: int32 sums
//   lhs row 5   sum50 | sum51                        ymm15: product
//
// vpmaddwd adds two products of int16 and would wrap only at four times -2^15. MakePlan picks limbs and a
// depth such that depth * largest lhs limb * largest rhs limb < 2^31 (at least 256 products, so each is
// below 2^23): neither a pair nor a sum wraps.
struct Avx2MicroKernel {
  using Lhs = int16_t;
  using Rhs = int16_t;
  static constexpr int64_t kGroup = 2, kMr = 6, kNr = 16, kKc = 512;
  static constexpr int32_t kLhsOffset = 0;

  static void Run(const Lhs* lhs, const Rhs* rhs, const int32_t* start, int64_t groups, int32_t* tile) {
    constexpr int64_t kStride = LhsLayout<Avx2MicroKernel>::kStride;
    const __m256i s0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start));
    const __m256i s1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(start + 8));
    // Named sums: gcc 12 spills a tile that is held in an array.
    __m256i c00 = s0, c01 = s1, c10 = s0, c11 = s1, c20 = s0, c21 = s1;
    __m256i c30 = s0, c31 = s1, c40 = s0, c41 = s1, c50 = s0, c51 = s1;
    for (int64_t g = 0; g < groups; ++g, lhs += kGroup, rhs += kGroup * kNr) {
      const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs));
      const __m256i b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs + 16));
      MultiplyAdd(lhs, b0, b1, c00, c01);
      MultiplyAdd(lhs + kStride, b0, b1, c10, c11);
      MultiplyAdd(lhs + 2 * kStride, b0, b1, c20, c21);
      MultiplyAdd(lhs + 3 * kStride, b0, b1, c30, c31);
      MultiplyAdd(lhs + 4 * kStride, b0, b1, c40, c41);
      MultiplyAdd(lhs + 5 * kStride, b0, b1, c50, c51);
    }
    Store(tile, c00, c01);
    Store(tile + kNr, c10, c11);
    Store(tile + 2 * kNr, c20, c21);
    Store(tile + 3 * kNr, c30, c31);
    Store(tile + 4 * kNr, c40, c41);
    Store(tile + 5 * kNr, c50, c51);
  }

 private:
  static void MultiplyAdd(const Lhs* pair, __m256i b0, __m256i b1, __m256i& c0, __m256i& c1) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    const __m256i a = _mm256_set1_epi32(both);
    c0 = _mm256_add_epi32(c0, _mm256_madd_epi16(a, b0));
    c1 = _mm256_add_epi32(c1, _mm256_madd_epi16(a, b1));
  }

  static void Store(int32_t* row, __m256i c0, __m256i c1) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(row), c0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(row + 8), c1);
  }
};

}  // namespace

const Kernels kAvx2Kernels = {"avx2", ScratchBytes<Avx2MicroKernel, Avx2MicroKernel>,
                              RunGemm<Avx2MicroKernel, Avx2MicroKernel>};

}  // namespace jax_apt
