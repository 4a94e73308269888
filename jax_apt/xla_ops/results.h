// What the exact sums of register blocks become: rows of float32.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace (hence no include guard, no
// system headers and no std:: templates).

#include "vectors.h"

template <class K>
class Results {
 public:
  static constexpr bool kIsBytes = sizeof(typename K::Lhs) == 1;
  static constexpr int64_t kLhsOffset = K::kIsNonnegative ? 0 : 128;  // of the top limb's bytes
  static constexpr int64_t kTile = K::kMr * K::kNr;
  static_assert(K::kNr % kWordLanes == 0, "whole vectors");

  Results(const Plan& plan, const Product& product)
      : p(plan), product(product), is_streamed(plan.is_out_streamed && IsAligned(product.out)) {}

  // Where the sums of a task are kept: for each pair of limbs int32, then 64 bits.
  struct Sums {
    int32_t* narrow;
    int64_t* wide;
  };

  // What the offsets of bytes call for, per column; see packing.h.
  struct Corrections {
    int64_t column[K::kNr];
    int32_t narrow[K::kNr];
    int64_t rest;  // times the row sums

    void Set(const Plan& p, const Phase& phase, const int64_t* digit_sums) {
      rest = 0;
      if constexpr (kIsBytes) {
        const int64_t offset = kLhsOffset << (8 * (p.lhs_limbs.count - 1));
        for (int64_t c = 0; c < K::kNr; ++c) {
          int64_t sum = 0;
          for (int b = 0; b < phase.blocks; ++b) sum += digit_sums[b * K::kNr + c];
          column[c] = offset * sum;
          narrow[c] = static_cast<int32_t>(column[c]);
        }
        for (int limb = 0; limb + 1 < p.rhs_limbs.count; ++limb) rest += int64_t{128} << (8 * limb);
      }
    }
  };

  void Widen(Sums sums, int rows, bool is_first) const {
    const int32_t* narrow = sums.narrow;
    for (int i = 0; i < p.lhs_limbs.count; ++i)
      for (int j = 0; j < p.rhs_limbs.count; ++j, narrow += kTile) {
        const int shift = p.lhs_limbs.limb[i].shift + p.rhs_limbs.limb[j].shift;
        const bool is_set = is_first && i == 0 && j == 0;
        int64_t* wide = sums.wide;
        for (int64_t c = 0; c < rows * K::kNr; ++c) {  // an unsigned shift: a negative one is undefined
          const auto term = static_cast<int64_t>(static_cast<uint64_t>(int64_t{narrow[c]}) << shift);
          wide[c] = is_set ? term : wide[c] + term;
        }
      }
  }

  // Rows of the result, null for a grid point that is none.
  void FindRows(const Phase& phase, const RowRun& run, int64_t row, int rows, float** out) const {
    if (p.is_lhs_channels) {
      for (int r = 0; r < rows; ++r) out[r] = product.out + (run.place * run.rows + row + r) * p.out_row;
      return;
    }
    if (p.is_matrix) {
      for (int r = 0; r < rows; ++r) out[r] = product.out + (row + r) * p.out_row;
      return;
    }
    const int64_t first = (phase.low[0] * p.grid[1] + phase.low[1]) * p.grid[2] + phase.low[2] + row;
    int64_t x = first % p.grid[2], y = first / p.grid[2] % p.grid[1], z = first / p.grid[2] / p.grid[1];
    for (int r = 0; r < rows; ++r) {
      const bool is_pixel =
          x >= phase.low[2] && x <= phase.high[2] && y >= phase.low[1] && y <= phase.high[1];
      const int64_t pixel = ((run.place * p.result[0] + z * phase.scale[0] + phase.shift[0]) * p.result[1] +
                             y * phase.scale[1] + phase.shift[1]) *
                                p.result[2] +
                            x * phase.scale[2] + phase.shift[2];
      out[r] = is_pixel ? product.out + pixel * p.out_row : nullptr;
      if (++x == p.grid[2]) x = 0, ++y;
      if (y == p.grid[1]) y = 0, ++z;
    }
  }

  void StoreNarrow(const int32_t* sums, int rows, int64_t width, int64_t column,
                   const Corrections& corrections, float* const* out) const {
    const float low = LowScale(), high = HighScale();
    const auto store = [&](int r, auto put) {
      for (int64_t c = 0; c < K::kNr; c += kWordLanes) {  // modulo 2^32: only the final sum must fit
        auto sum = LoadVector<WordVector>(sums + r * K::kNr + c);
        if constexpr (kIsBytes) sum -= LoadVector<WordVector>(corrections.narrow + c);
        put(c, __builtin_convertvector(reinterpret_cast<IntVector>(sum), FloatVector) * low * high);
      }
    };
    for (int r = 0; r < rows; ++r) {
      if (out[r] == nullptr) continue;
      float* to = out[r] + column;
      if (width < K::kNr) {
        float values[K::kNr];
        store(r, [&](int64_t c, FloatVector value) { StoreVector(values + c, value); });
        __builtin_memcpy(to, values, width * sizeof(float));
      } else if (is_streamed) {
        store(r, [&](int64_t c, FloatVector value) { StreamVector(to + c, value); });
      } else {
        store(r, [&](int64_t c, FloatVector value) { StoreVector(to + c, value); });
      }
    }
  }

  void StoreWide(Sums sums, bool are_widened, int rows, int64_t width, int64_t column,
                 const Corrections& corrections, const int64_t* row_sums, float* const* out) const {
    const float low = LowScale(), high = HighScale();
    for (int r = 0; r < rows; ++r) {
      if (out[r] == nullptr) continue;
      int64_t sum[K::kNr];
      const int64_t row = corrections.rest * row_sums[r];
      for (int64_t c = 0; c < K::kNr; ++c) sum[c] = row - (kIsBytes ? corrections.column[c] : 0);
      if (are_widened) {
        for (int64_t c = 0; c < K::kNr; ++c) sum[c] += sums.wide[r * K::kNr + c];
      } else {
        AddPairs(sums.narrow + r * K::kNr, sum);
      }
      float values[K::kNr];
      if (p.are_sums_small) {
        for (int64_t c = 0; c < K::kNr; c += kWordLanes / 2)
          StoreVector(values + c, RoundSmallLongs(LoadVector<LongVector>(sum + c)));
      } else {
        for (int64_t c = 0; c < K::kNr; ++c) values[c] = static_cast<float>(sum[c]);
      }
      float* to = out[r] + column;
      if (width == K::kNr) {
        for (int64_t c = 0; c < K::kNr; c += kWordLanes) {
          const FloatVector value = LoadVector<FloatVector>(values + c) * low * high;
          is_streamed ? StreamVector(to + c, value) : StoreVector(to + c, value);
        }
      } else {
        for (int64_t c = 0; c < width; ++c) to[c] = values[c] * low * high;
      }
    }
  }

 private:
  const Plan& p;
  const Product& product;
  const bool is_streamed;

  // Powers of two multiply exactly; the smaller first keeps both steps within float32's range.
  float LowScale() const { return PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent)); }
  float HighScale() const { return PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent)); }

  // The narrow sums of a row, one kTile behind the other.
  void AddPairs(const int32_t* narrow, int64_t* sum) const {
    for (int i = 0; i < p.lhs_limbs.count; ++i)
      for (int j = 0; j < p.rhs_limbs.count; ++j, narrow += kTile) {
        const int shift = p.lhs_limbs.limb[i].shift + p.rhs_limbs.limb[j].shift;
        for (int64_t c = 0; c < K::kNr; ++c)  // an unsigned shift: a negative one is undefined
          sum[c] += static_cast<int64_t>(static_cast<uint64_t>(int64_t{narrow[c]}) << shift);
      }
  }
};
