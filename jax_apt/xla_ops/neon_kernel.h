// Register blocks of the dot-product instructions of 64-bit Arm, 8 x 8.
//
// Included by the ISA units after unit.h, inside their anonymous namespaces.
//
//                  rhs words, columns 0..3 | 4..7     2 registers: [column][4] bytes
//   lhs row 0       sum00                  | sum01     8 registers: 16 bytes of a row, four words
//       ...          ...                   |  ...     16 registers: int32 sums
//   lhs row 7       sum70                  | sum71
//
// One word of lhs, picked by its lane, meets four columns. Sums wrap modulo 2^32; with one limb on each side
// only the final one must fit, with several the plan keeps the depth to 255 * 128 * depth < 2^31.
//
// Dot multiplies bytes of lhs (0..255) by those of rhs (-128..127):
//   Words                     16 bytes of lhs
//   Load, Broadcast           16 bytes, or 4 bytes four times
//   MultiplyAdd<lane>         adds the products of a word of lhs and the words of rhs
//   kLess                     what Load takes from each byte of lhs: 0 or 128

template <class Dot, int kRows>
struct NeonTile {
  static constexpr int64_t kNr = 8;
  int32x4_t sums[kRows][2];
  int32x4_t missing[2];  // -kLess * (column sums of rhs)

  template <int kLane>
  void Step(const typename Dot::Words* words, const int8_t* rhs) {
    const int8x16_t b0 = vld1q_s8(rhs), b1 = vld1q_s8(rhs + 16);
    if constexpr (Dot::kLess != 0) {
      const int8x16_t less = vdupq_n_s8(-Dot::kLess);
      missing[0] = vdotq_s32(missing[0], less, b0);
      missing[1] = vdotq_s32(missing[1], less, b1);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      sums[r][0] = Dot::template MultiplyAdd<kLane>(sums[r][0], b0, words[r]);
      sums[r][1] = Dot::template MultiplyAdd<kLane>(sums[r][1], b1, words[r]);
    }
  }

  void Run(const uint8_t* lhs, int64_t stride, const Segment* segments, int count, const int8_t* rhs,
           bool is_first, int32_t* tile) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        sums[r][half] = is_first ? vdupq_n_s32(0) : vld1q_s32(tile + r * kNr + 4 * half);
    missing[0] = missing[1] = vdupq_n_s32(0);
    for (int s = 0; s < count; ++s) {
      const uint8_t* a = lhs + segments[s].lhs;
      typename Dot::Words words[kRows];
      int64_t k = 0;
      for (; k + 16 <= segments[s].depth; k += 16, a += 16, rhs += 16 * kNr) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) words[r] = Dot::Load(a + r * stride);
        Step<0>(words, rhs), Step<1>(words, rhs + 4 * kNr);
        Step<2>(words, rhs + 8 * kNr), Step<3>(words, rhs + 12 * kNr);
      }
      for (; k < segments[s].depth; k += 4, a += 4, rhs += 4 * kNr) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) words[r] = Dot::Broadcast(a + r * stride);
        Step<0>(words, rhs);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      for (int half = 0; half < 2; ++half)
        vst1q_s32(tile + r * kNr + 4 * half, vsubq_s32(sums[r][half], missing[half]));
  }
};

template <class Dot>
struct NeonKernel {
  using Lhs = uint8_t;
  using Rhs = int8_t;
  using Columns = NeonKernel;
  static constexpr int64_t kGroup = 4, kMr = 8, kNr = 8, kRowUnit = 1, kDepthUnit = 4, kKc = 2048;
  static constexpr double kSerial = 4e6;
  static constexpr bool kHasWinograd = false, kIsNonnegative = false, kSaturates = false;

  static void Setup() {}
  static void Leave() {}

  static void Run(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                  int rows, bool is_first, int32_t* tile) {
    RunRows<kMr>(lhs, stride, segments, count, rhs, rows, is_first, tile);
  }

 private:
  template <int kRows>
  static void RunRows(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                      int rows, bool is_first, int32_t* tile) {
    if constexpr (kRows > 1)
      if (rows < kRows) return RunRows<kRows - 1>(lhs, stride, segments, count, rhs, rows, is_first, tile);
    NeonTile<Dot, kRows>().Run(lhs, stride, segments, count, rhs, is_first, tile);
  }
};
