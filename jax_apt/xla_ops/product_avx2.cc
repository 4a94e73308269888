// Fixed-point products on AVX2: pairs of 16-bit limbs through vpmaddwd.
#include <immintrin.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "unit.h"
#include "vectors256.h"
#include "vnni_kernel.h"
#include "winograd_loops.h"

// 6 x 16 register block:
//
//              rhs pair, columns 0..7 | 8..15       ymm12, ymm13: [column][2] int16
//   lhs row 0   sum00 | sum01                        ymm14: row r's pair, broadcast to 8 columns
//       ...      ...  |  ...                         ymm0..11: int32 sums
//   lhs row 5   sum50 | sum51                        ymm15: product
//
// vpmaddwd adds two products of int16 and would wrap only at four times -2^15. The plan picks limbs and a
// depth such that depth * largest lhs limb * largest rhs limb < 2^31 (at least 256 products, so each is
// below 2^23): neither a pair nor a sum wraps.
struct Avx2Kernel {
  using Lhs = int16_t;
  using Rhs = int16_t;
  using Columns = Avx2Kernel;
  static constexpr int64_t kGroup = 2, kMr = 6, kNr = 16, kRowUnit = 1, kDepthUnit = 2, kKc = 512;
  static constexpr double kSerial = 3e6;
  static constexpr bool kHasWinograd = true, kIsNonnegative = false, kSaturates = false;

  static void Setup() {}
  static void Leave() {}

  static void Run(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                  int rows, bool is_first, int32_t* tile) {
    Multiply(
        lhs, stride, rows, is_first, tile, count, rhs, [segments](int s) { return segments[s].lhs; },
        [segments](int s) { return (segments[s].depth + kGroup - 1) / kGroup; }, kGroup);
  }

  // A row's pairs lie `step` elements apart.
  static void RunPairs(const Lhs* lhs, int64_t stride, int64_t step, int64_t pairs, const Rhs* rhs, int rows,
                       int32_t* tile) {
    Multiply(
        lhs, stride, rows, true, tile, 1, rhs, [](int) { return 0; }, [pairs](int) { return pairs; }, step);
  }

 private:
  template <class Offset, class Pairs>
  static inline __attribute__((always_inline)) void Multiply(const Lhs* lhs, int64_t stride, int rows,
                                                             bool is_first, int32_t* tile, int count,
                                                             const Rhs* rhs, Offset offset, Pairs pairs,
                                                             int64_t step) {
    // Rows that are not there repeat the last one; their sums are not read.
    const int64_t r1 = rows > 1 ? stride : 0, r2 = rows > 2 ? 2 * stride : r1,
                  r3 = rows > 3 ? 3 * stride : r2;
    const int64_t r4 = rows > 4 ? 4 * stride : r3, r5 = rows > 5 ? 5 * stride : r4;
    // Named sums: gcc 12 spills a tile that is held in an array.
    __m256i c00, c01, c10, c11, c20, c21, c30, c31, c40, c41, c50, c51;
    Load(tile, is_first, c00, c01), Load(tile + kNr, is_first, c10, c11);
    Load(tile + 2 * kNr, is_first, c20, c21), Load(tile + 3 * kNr, is_first, c30, c31);
    Load(tile + 4 * kNr, is_first, c40, c41), Load(tile + 5 * kNr, is_first, c50, c51);
    for (int s = 0; s < count; ++s) {
      const Lhs* a = lhs + offset(s);
      for (int64_t k = pairs(s); k > 0; --k, a += step, rhs += kGroup * kNr) {
        const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs));
        const __m256i b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rhs + 16));
        MultiplyAdd(a, b0, b1, c00, c01);
        MultiplyAdd(a + r1, b0, b1, c10, c11);
        MultiplyAdd(a + r2, b0, b1, c20, c21);
        MultiplyAdd(a + r3, b0, b1, c30, c31);
        MultiplyAdd(a + r4, b0, b1, c40, c41);
        MultiplyAdd(a + r5, b0, b1, c50, c51);
      }
    }
    Store(tile, c00, c01), Store(tile + kNr, c10, c11), Store(tile + 2 * kNr, c20, c21);
    Store(tile + 3 * kNr, c30, c31), Store(tile + 4 * kNr, c40, c41), Store(tile + 5 * kNr, c50, c51);
  }

  static void Load(const int32_t* row, bool is_first, __m256i& c0, __m256i& c1) {
    c0 = c1 = _mm256_setzero_si256();
    if (is_first) return;
    c0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row));
    c1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row + 8));
  }

  static void MultiplyAdd(const Lhs* pair, __m256i b0, __m256i b1, __m256i& c0, __m256i& c1) {
    int32_t both;
    __builtin_memcpy(&both, pair, 4);
    const __m256i a = _mm256_set1_epi32(both);
    c0 = _mm256_add_epi32(c0, _mm256_madd_epi16(a, b0));
    c1 = _mm256_add_epi32(c1, _mm256_madd_epi16(a, b1));
  }

  static void Store(int32_t* row, __m256i c0, __m256i c1) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), c0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 8), c1);
  }
};

// vpmaddubsw multiplies unsigned by signed bytes and adds pairs with saturation to 16 bits: exact for bytes
// of lhs up to 127, as a ReLU's output has them, since 2 * 127 * 128 < 2^15. Three instructions for 32
// products, where 16-bit elements take four.
struct Vector256 : Lanes256 {
  static Type MultiplyAdd(Type sum, Type a, Type b) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
  }
};

struct Avx2NonnegativeKernel : VnniKernel<Vector256, 6> {
  static constexpr double kSerial = 4e6;
  static constexpr bool kIsNonnegative = true;
};

// Bytes of lhs up to 255 are as quick where two neighbours of rhs add up to no more than 128 either way,
// since 255 * 128 < 2^15. Where they do not, what saturates is added later, or, in a block that has many of
// them, each product is kept apart from its neighbour.
struct Apart256 : Lanes256 {
  static Type MultiplyAdd(Type sum, Type a, Type b) {
    const Type even = _mm256_and_si256(a, _mm256_set1_epi16(255)),
               odd = _mm256_andnot_si256(_mm256_set1_epi16(255), a);
    const Type ones = _mm256_set1_epi16(1);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(even, b), ones));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(odd, b), ones));
  }
};

struct Avx2SmallKernel : VnniKernel<Vector256, 6> {
  static constexpr double kSerial = 4e6;
  static constexpr bool kSaturates = true;
  using Apart = VnniKernel<Apart256, 6>;

  // Whether a row of words has pairs that may saturate.
  static bool HasLargePair(const Rhs* words) {
    const __m256i ones = _mm256_set1_epi8(1), most = _mm256_set1_epi16(128);
    const __m256i first = _mm256_maddubs_epi16(ones, Lanes256::Load(words)),
                  second = _mm256_maddubs_epi16(ones, Lanes256::Load(words + 32));
    const __m256i largest = _mm256_max_epi16(_mm256_abs_epi16(first), _mm256_abs_epi16(second));
    const __m256i is_large = _mm256_cmpgt_epi16(largest, most);
    return _mm256_testz_si256(is_large, is_large) == 0;
  }
};

}  // namespace

const Kernels kAvx2NonnegativeKernels = KernelsOf<Avx2NonnegativeKernel>("avx2");
const Kernels kAvx2SmallKernels = KernelsOf<Avx2SmallKernel>("avx2");
const Kernels kAvx2Kernels = KernelsOf<Avx2Kernel>("avx2", &kAvx2NonnegativeKernels, &kAvx2SmallKernels);

}  // namespace jax_apt
