// Fixed-point products on AMX-INT8: tiles of 16 rows of 64 bytes through tdpbusd.
#include <immintrin.h>

#include "plan.h"
#include "product.h"

namespace jax_apt {
namespace {

#include "unit.h"
#include "vectors512.h"
#include "vnni_kernel.h"

// 32 x 32 register block:
//
//                    rhs words, columns 0..15 | 16..31     tmm6, tmm7: [16 words of depth][16 columns][4]
//   lhs rows  0..15   tmm0  | tmm1                          tmm4: 16 rows x 64 bytes, read where they are
//   lhs rows 16..31   tmm2  | tmm3                          tmm5
//
// tdpbusd adds products of unsigned and signed bytes to int32 without saturation, as vpdpbusd does, so the
// same bound on the depth holds (see vnni_kernel.h). A segment's last tile may read past its end: the words
// of rhs are zero there.
struct AmxKernel {
  using Lhs = uint8_t;
  using Rhs = int8_t;
  using Columns = VnniKernel<Vector512, 1>;  // the same panels
  static constexpr int64_t kGroup = 4, kMr = 32, kNr = 32, kRowUnit = 16, kDepthUnit = 64, kKc = 2048;
  static constexpr double kSerial = 96e6;
  static constexpr bool kHasWinograd = false, kIsNonnegative = false, kSaturates = false;

  static void Setup() {
    struct alignas(64) Config {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    static constexpr Config kConfig;  // in memory: gcc believes that only its first bytes are read
    _tile_loadconfig(&kConfig);
  }

  static void Leave() { _tile_release(); }

  static void Run(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                  int rows, bool is_first, int32_t* tile) {
    if (rows > 16) return RunTiles<true>(lhs, stride, segments, count, rhs, is_first, tile);
    RunTiles<false>(lhs, stride, segments, count, rhs, is_first, tile);
  }

 private:
  template <bool kIsTall>
  static void RunTiles(const Lhs* lhs, int64_t stride, const Segment* segments, int count, const Rhs* rhs,
                       bool is_first, int32_t* tile) {
    constexpr int64_t kRowBytes = kNr * sizeof(int32_t);
    if (is_first) {
      _tile_zero(0);
      _tile_zero(1);
      if (kIsTall) {
        _tile_zero(2);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, tile, kRowBytes);
      _tile_loadd(1, tile + 16, kRowBytes);
      if (kIsTall) {
        _tile_loadd(2, tile + 16 * kNr, kRowBytes);
        _tile_loadd(3, tile + 16 * kNr + 16, kRowBytes);
      }
    }
    for (int s = 0; s < count; ++s) {
      const Lhs* a = lhs + segments[s].lhs;
      for (int64_t k = 0; k < segments[s].depth; k += 64, a += 64, rhs += 64 * kNr) {
        _tile_loadd(4, a, stride);
        _tile_loadd(6, rhs, kRowBytes);
        _tile_loadd(7, rhs + 64, kRowBytes);
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if (kIsTall) {
          _tile_loadd(5, a + 16 * stride, stride);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
        }
      }
    }
    _tile_stored(0, tile, kRowBytes);
    _tile_stored(1, tile + 16, kRowBytes);
    if (kIsTall) {
      _tile_stored(2, tile + 16 * kNr, kRowBytes);
      _tile_stored(3, tile + 16 * kNr + 16, kRowBytes);
    }
  }
};

}  // namespace

const Kernels kAmxKernels = KernelsOf<AmxKernel>("amx");

}  // namespace jax_apt
