// Fixed-point products on 64-bit Arm's mixed-sign dot product (Armv8.6 FEAT_I8MM): bytes through sudot, 8 x 8
// register blocks. Tested under emulation only; not timed on a CPU.
#include <arm_neon.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "neon_kernel.h"
#include "unit.h"

struct MixedDot {
  using Words = uint8x16_t;
  static constexpr int kLess = 0;
  static Words Load(const uint8_t* from) { return vld1q_u8(from); }
  static Words Broadcast(const uint8_t* from) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return vreinterpretq_u8_u32(vdupq_n_u32(word));
  }
  template <int kLane>
  static int32x4_t MultiplyAdd(int32x4_t sums, int8x16_t rhs, Words lhs) {
    return vsudotq_laneq_s32(sums, rhs, lhs, kLane);
  }
};

}  // namespace

const Kernels kNeonI8mmKernels = KernelsOf<NeonKernel<MixedDot>>("neon_i8mm");

}  // namespace jax_apt
