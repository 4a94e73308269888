// Register blocks of vpdpbusd, for vectors of any width.
//
// Included by the ISA units after unit.h, inside their anonymous namespaces.
//
// vpdpbusd adds four products of an unsigned and a signed byte without saturation. Sums wrap modulo 2^32;
// with one limb on each side only the final one must fit, with several the plan keeps the depth to
// 255 * 128 * depth < 2^31.
//
//               rhs word, first half | second half      2 registers: [column][4] bytes
//   lhs row  0   sum0,0  | sum0,1                        1 register: row r's 4 bytes, broadcast
//       ...       ...    |  ...                          2 * rows registers: int32 sums
//
// Vector: width kLanes of int32, with Load, Broadcast, MultiplyAdd, Store, Zero.

template <class Vector, int kRows>
void RunVnniTile(const uint8_t* lhs, int64_t stride, const Segment* segments, int count, const int8_t* rhs,
                 bool is_first, int32_t* tile) {
  using V = typename Vector::Type;
  constexpr int kLanes = Vector::kLanes, kNr = 2 * kLanes;
  V sums[kRows][2];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    sums[r][0] = is_first ? Vector::Zero() : Vector::Load(tile + r * kNr);
    sums[r][1] = is_first ? Vector::Zero() : Vector::Load(tile + r * kNr + kLanes);
  }
  for (int s = 0; s < count; ++s) {
    const uint8_t* a = lhs + segments[s].lhs;
    for (int64_t k = 0; k < segments[s].depth; k += 4, a += 4, rhs += 4 * kNr) {
      const V b0 = Vector::Load(rhs), b1 = Vector::Load(rhs + 4 * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V word = Vector::Broadcast(a + r * stride);
        sums[r][0] = Vector::MultiplyAdd(sums[r][0], word, b0);
        sums[r][1] = Vector::MultiplyAdd(sums[r][1], word, b1);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    Vector::Store(tile + r * kNr, sums[r][0]);
    Vector::Store(tile + r * kNr + kLanes, sums[r][1]);
  }
}

template <class Vector, int kMaxRows>
struct VnniKernel {
  using Lhs = uint8_t;
  using Rhs = int8_t;
  using Columns = VnniKernel;
  static constexpr int64_t kGroup = 4, kMr = kMaxRows, kNr = 2 * Vector::kLanes;
  static constexpr int64_t kRowUnit = 1, kDepthUnit = 4, kKc = 2048;
  static constexpr double kSerial = 1e6 * Vector::kLanes;
  static constexpr bool kHasWinograd = false, kIsNonnegative = false, kSaturates = false;

  static void Setup() {}
  static void Leave() {}

  static void Run(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                  int rows, bool is_first, int32_t* tile) {
    RunRows<kMaxRows>(lhs, stride, segments, count, rhs, rows, is_first, tile);
  }

 private:
  template <int kRows>
  static void RunRows(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                      int rows, bool is_first, int32_t* tile) {
    if constexpr (kRows > 1)
      if (rows < kRows) return RunRows<kRows - 1>(lhs, stride, segments, count, rhs, rows, is_first, tile);
    RunVnniTile<Vector, kRows>(lhs, stride, segments, count, rhs, is_first, tile);
  }
};
