// Fixed-point GEMM without vector instructions: the reference, and the path for every other CPU.
#include "gemm.h"

namespace jax_apt {
namespace {

#include "gemm_loops.h"

// 4 x 4 sums in plain C++. MakePlan picks limbs and a depth such that depth * largest lhs limb * largest rhs
// limb < 2^31: no partial sum overflows.
struct ScalarMicroKernel {
  using Lhs = int16_t;
  using Rhs = int16_t;
  static constexpr int64_t kGroup = 2, kMr = 4, kNr = 4, kKc = 512;
  static constexpr int32_t kLhsOffset = 0;

  static void Run(const Lhs* lhs, const Rhs* rhs, const int32_t* start, int64_t groups, int32_t* tile) {
    for (int64_t r = 0; r < kMr; ++r)
      for (int64_t c = 0; c < kNr; ++c) {
        int32_t sum = start[c];
        const Lhs* a = lhs + r * LhsLayout<ScalarMicroKernel>::kStride;
        for (int64_t g = 0; g < groups; ++g) {
          const Rhs* b = rhs + (g * kNr + c) * kGroup;
          sum += a[2 * g] * b[0] + a[2 * g + 1] * b[1];
        }
        tile[r * kNr + c] = sum;
      }
  }
};

}  // namespace

const Kernels kScalarKernels = {"scalar", ScratchBytes<ScalarMicroKernel, ScalarMicroKernel>,
                                RunGemm<ScalarMicroKernel, ScalarMicroKernel>};

}  // namespace jax_apt
