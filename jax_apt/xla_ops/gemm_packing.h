// Reading, splitting and packing operands: the part of the GEMM that sees how they are stored.
//
// Included by gemm_loops.h inside each ISA unit's own anonymous namespace (hence no include guard, no
// includes and no std:: templates), so that every unit compiles it with its own instructions.

constexpr int64_t kInt32Max = 2147483647;

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
int64_t MaxCode(int bits) { return (int64_t{1} << (bits - 1)) - 1; }

float PowerOfTwo(int64_t exponent) {  // exact for -126..127
  const uint32_t pattern = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &pattern, 4);
  return value;
}

// ---- Limbs -----------------------------------------------------------------------------------------
//
// A wide code is a sum of limbs: code = sum of limb_i * 2^shift_i, where the top limb keeps the sign and
// the others are unsigned bytes. A product of two codes is the sum of the products of their limbs.

struct Limb {
  int shift;
  int32_t mask;  // -1 for the top limb
};

struct Limbs {
  Limb limb[3];
  int count;
  int64_t largest;  // bound on the magnitude of any limb
};

// Unsigned bytes from below until at most `top_bits` are left for the top limb.
Limbs SplitBits(int bits, int top_bits) {
  Limbs limbs{};
  int shift = 0;
  for (; bits - shift > top_bits; shift += 8) limbs.limb[limbs.count++] = {shift, 255};
  limbs.limb[limbs.count++] = {shift, -1};
  // Shifting right rounds down: -(2^(bits-1) - 1) becomes -2^(bits-1-shift).
  limbs.largest = shift == 0 ? MaxCode(bits) : Max(255, MaxCode(bits - shift) + 1);
  return limbs;
}

// ---- Reading -----------------------------------------------------------------------------------------

template <class T>
struct Reader {  // integer codes
  explicit Reader(const Operand& operand) : data(static_cast<const T*>(operand.data)) {}
  static constexpr int32_t kMarker = -(int32_t{1} << (8 * sizeof(T) - 2)) * 2;
  bool IsFinite(int64_t i) const { return data[i] != kMarker; }
  int32_t Code(int64_t i) const { return data[i] == kMarker ? 0 : data[i]; }
  const T* data;
};

template <>
struct Reader<float> {  // quantizes: clips in float, since conversion turns large values into INT_MIN
  explicit Reader(const Operand& operand)
      : data(static_cast<const float*>(operand.data)),
        inverse(PowerOfTwo(-operand.exponent)),
        limit(static_cast<float>(MaxCode(operand.bits))) {}
  bool IsFinite(int64_t i) const { return data[i] - data[i] == 0.0f; }
  int32_t Code(int64_t i) const {
    float x = data[i] * inverse;
    x = x < limit ? x : limit;  // a NaN becomes the limit; its row is overwritten by NaN
    x = x > -limit ? x : -limit;
    return static_cast<int32_t>(__builtin_rintf(x));
  }
  const float* data;
  float inverse, limit;
};

template <class F>
void WithReader(const Operand& operand, F f) {
  switch (operand.dtype) {
    case DType::kF32: return f(Reader<float>(operand));
    case DType::kS8: return f(Reader<int8_t>(operand));
    case DType::kS16: return f(Reader<int16_t>(operand));
    case DType::kS32: return f(Reader<int32_t>(operand));
  }
}

// One limb, plus `offset`, of `count` neighbours in memory; false if one of them is not finite.
template <class R, class Out>
bool ReadLimbs(R reader, Limb limb, int32_t offset, int64_t start, int64_t count, Out* __restrict out) {
  int32_t is_bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<Out>(((reader.Code(start + i) >> limb.shift) & limb.mask) + offset);
    is_bad |= reader.IsFinite(start + i) ? 0 : 1;
  }
  return is_bad == 0;
}

// ---- Packing -----------------------------------------------------------------------------------------
//
// A lane is a row of lhs or a column of rhs. A packed word holds the kGroup elements of a lane that one
// instruction multiplies and adds: [g * kGroup, (g + 1) * kGroup) of the depth.

constexpr int64_t kMaxLanes = 96;
constexpr int64_t kPrefetchRows = 16;

// Part of an operand: element (lane, k) is at start + lane * lane_step + k * depth_step; one step is 1.
struct Block {
  int64_t start, lane_step, depth_step;
  int64_t lanes, depth;
};

// Lhs: each row contiguous, rows kStride apart, so that the micro-kernel's addresses are constants. The
// extra 64 bytes keep the rows of a tile out of one L1 set.
template <class K>
struct LhsLayout {
  using Element = typename K::Lhs;
  static constexpr int64_t kGroup = K::kGroup, kMaxDepth = K::kKc;
  static constexpr int64_t kStride = K::kKc + 64 / sizeof(Element);          // elements
  static constexpr int64_t kLaneStep = kStride / K::kGroup, kGroupStep = 1;  // words
  static constexpr int32_t kOffset = K::kLhsOffset;
  static constexpr bool kHasSums = false;
};

// Rhs: panels [depth / kGroup][kNr][kGroup].
template <class K>
struct RhsLayout {
  using Element = typename K::Rhs;
  static constexpr int64_t kGroup = K::kGroup, kMaxDepth = K::kKc;
  static constexpr int64_t kLaneStep = 1, kGroupStep = K::kNr;
  static constexpr int32_t kOffset = 0;
  static constexpr bool kHasSums = K::kLhsOffset != 0;  // see PackRhs
};

// Rows of a row-major operand are far apart and only a few lines of each are read, a pattern that the
// hardware does not foresee. Measured on (64, 4608) x (4608, 1024) float32, one thread of a Zen 4, whole
// product: 1.09 times as fast with AVX-512 VNNI, 1.27 with AVX2.
template <class R>
void PrefetchRow(const R& reader, int64_t start, int64_t count) {
  const auto first = reinterpret_cast<uintptr_t>(reader.data) + start * sizeof(*reader.data);
  for (size_t at = 0; at < count * sizeof(*reader.data); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + at));
}

template <class R>
void MarkBad(const R& reader, int64_t start, int64_t step, int64_t count, uint8_t* is_bad) {
  for (int64_t i = 0; i < count; ++i) is_bad[i] |= !reader.IsFinite(start + i * step);
}

// Memory runs along the lanes: reads kGroup rows of lanes and interleaves them into words.
template <class L, class R>
void PackAcross(R reader, Limb limb, const Block& b, int64_t padded_lanes, uint32_t* __restrict words,
                int32_t* sums, uint8_t* is_bad) {
  constexpr int kBits = 32 / L::kGroup;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  int32_t limbs[L::kGroup][kMaxLanes];
  for (auto& row : limbs)
    for (int32_t& value : row) value = L::kOffset;
  for (int64_t g = 0; g < CeilDiv(b.depth, L::kGroup); ++g) {
    for (int64_t j = 0; j < L::kGroup; ++j) {
      const int64_t k = g * L::kGroup + j, start = b.start + k * b.depth_step;
      PrefetchRow(reader, start + kPrefetchRows * b.depth_step, b.lanes);
      if (k >= b.depth) {
        for (int64_t lane = 0; lane < b.lanes; ++lane) limbs[j][lane] = L::kOffset;
      } else if (!ReadLimbs(reader, limb, L::kOffset, start, b.lanes, limbs[j])) {
        MarkBad(reader, start, 1, b.lanes, is_bad);
      }
    }
    uint32_t* out = words + g * L::kGroupStep;
    for (int64_t lane = 0; lane < padded_lanes; ++lane) {
      uint32_t word = 0;
      for (int64_t j = 0; j < L::kGroup; ++j) {
        word |= (static_cast<uint32_t>(limbs[j][lane]) & kMask) << (j * kBits);
        if (L::kHasSums) sums[lane] += limbs[j][lane];
      }
      out[lane * L::kLaneStep] = word;
    }
  }
}

// Memory runs along the depth: reads lane by lane.
template <class L, class R>
void PackAlong(R reader, Limb limb, const Block& b, int64_t padded_lanes, uint32_t* words, int32_t* sums,
               uint8_t* is_bad) {
  typename L::Element elements[L::kMaxDepth + L::kGroup];
  const int64_t groups = CeilDiv(b.depth, L::kGroup);
  for (int64_t lane = 0; lane < padded_lanes; ++lane) {
    const int64_t depth = lane < b.lanes ? b.depth : 0, start = b.start + lane * b.lane_step;
    if (!ReadLimbs(reader, limb, L::kOffset, start, depth, elements)) is_bad[lane] = 1;
    for (int64_t k = depth; k < groups * L::kGroup; ++k) elements[k] = L::kOffset;
    if (L::kHasSums)
      for (int64_t k = 0; k < depth; ++k) sums[lane] += elements[k];
    uint32_t* out = words + lane * L::kLaneStep;
    for (int64_t g = 0; g < groups; ++g)
      __builtin_memcpy(out + g * L::kGroupStep, elements + g * L::kGroup, sizeof(uint32_t));
  }
}

template <class L, class R>
void Pack(R reader, Limb limb, const Block& b, int64_t padded_lanes, void* packed, int32_t* sums,
          uint8_t* is_bad) {
  static_assert(sizeof(typename L::Element) * L::kGroup == sizeof(uint32_t), "a group is a word");
  auto* words = static_cast<uint32_t*>(packed);
  if (b.depth_step == 1) return PackAlong<L>(reader, limb, b, padded_lanes, words, sums, is_bad);
  PackAcross<L>(reader, limb, b, padded_lanes, words, sums, is_bad);
}

// Rows m0.. at depth k0.., filled up to whole groups and register blocks.
template <class K>
void PackLhs(const Gemm& g, Limb limb, int64_t m0, int64_t rows, int64_t k0, int64_t depth,
             typename K::Lhs* packed, uint8_t* is_bad_row) {
  const int64_t m_step = g.lhs.is_transposed ? 1 : g.k, k_step = g.lhs.is_transposed ? g.m : 1;
  const Block block{m0 * m_step + k0 * k_step, m_step, k_step, rows, depth};
  WithReader(g.lhs, [&](auto reader) {
    Pack<LhsLayout<K>>(reader, limb, block, RoundUp(rows, K::kMr), packed, nullptr, is_bad_row);
  });
}

// Columns n0.. at depth k0.. as a panel: kNr starting values, then the words. The starting values undo
// lhs's offset: sum of (lhs + offset) * rhs - offset * (sum of rhs) = sum of lhs * rhs.
template <class K>
void PackRhs(const Gemm& g, Limb limb, int64_t n0, int64_t columns, int64_t k0, int64_t depth, int32_t* panel,
             uint8_t* is_bad_column) {
  const int64_t n_step = g.rhs.is_transposed ? g.k : 1, k_step = g.rhs.is_transposed ? 1 : g.n;
  const Block block{n0 * n_step + k0 * k_step, n_step, k_step, columns, depth};
  int32_t sums[K::kNr] = {};
  WithReader(g.rhs, [&](auto reader) {
    Pack<RhsLayout<K>>(reader, limb, block, K::kNr, panel + K::kNr, sums, is_bad_column);
  });
  for (int64_t c = 0; c < K::kNr; ++c) panel[c] = -K::kLhsOffset * sums[c];
}
