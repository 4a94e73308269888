// Fixed-point products on 64-bit Arm's dot product (Armv8.2 FEAT_DotProd): bytes through sdot, 8 x 8 register
// blocks. Tested under emulation only; not timed on a CPU.
#include <arm_neon.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "neon_kernel.h"
#include "unit.h"

// sdot wants both sides signed. Flipping the top bit of a byte u of lhs, read as signed, gives u - 128, and
//
//   sum of u d = sum of (u - 128) d + 128 * (sum of d)
//
// modulo 2^32. The last term is the same for every row: two more sdot for the 16 of a block.
struct SignedDot {
  using Words = int8x16_t;
  static constexpr int kLess = 128;
  static Words Load(const uint8_t* from) { return Flip(vld1q_u8(from)); }
  static Words Broadcast(const uint8_t* from) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return Flip(vreinterpretq_u8_u32(vdupq_n_u32(word)));
  }
  template <int kLane>
  static int32x4_t MultiplyAdd(int32x4_t sums, int8x16_t rhs, Words lhs) {
    return vdotq_laneq_s32(sums, rhs, lhs, kLane);
  }

 private:
  static Words Flip(uint8x16_t bytes) { return vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80))); }
};

}  // namespace

const Kernels kNeonKernels = KernelsOf<NeonKernel<SignedDot>>("neon");

}  // namespace jax_apt
