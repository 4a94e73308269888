// Fixed-point products without vector instructions: the reference, and the path for every other CPU.
#include "plan.h"
#include "product.h"
#ifdef __SSE2__
#include <emmintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace jax_apt {
namespace {

#include "unit.h"

// 4 x 4 sums in plain C++. The plan picks limbs and a depth such that depth * largest lhs limb * largest rhs
// limb < 2^31: no partial sum overflows.
struct ScalarKernel {
  using Lhs = int16_t;
  using Rhs = int16_t;
  using Columns = ScalarKernel;
  static constexpr int64_t kGroup = 2, kMr = 4, kNr = 4, kRowUnit = 1, kDepthUnit = 2, kKc = 512;
  static constexpr double kSerial = 2e5;
  static constexpr bool kHasWinograd = false, kIsNonnegative = false, kSaturates = false;

  static void Setup() {}
  static void Leave() {}

  static void Run(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                  int rows, bool is_first, int32_t* tile) {
    for (int64_t i = 0; i < rows * kNr; ++i) tile[i] = is_first ? 0 : tile[i];
    for (int s = 0; s < count; ++s)
      for (int64_t k = 0; k < segments[s].depth; k += kGroup, rhs += kGroup * kNr)
        for (int r = 0; r < rows; ++r) {
          const Lhs* a = lhs + r * stride + segments[s].lhs + k;
          for (int64_t c = 0; c < kNr; ++c)
            tile[r * kNr + c] += a[0] * rhs[c * kGroup] + a[1] * rhs[c * kGroup + 1];
        }
  }
};

}  // namespace

const Kernels kScalarKernels = KernelsOf<ScalarKernel>("scalar");

}  // namespace jax_apt
