// Words of neighbours along a row, and the instruction that multiplies and adds them lane by lane.
//
// Included by depthwise_loops.h inside each ISA unit's own anonymous namespace. A word is 32 bits: what one
// lane of an instruction multiplies at once.
//
//   ByteWords   4 codes of one limb: byte (0..255) of lhs times byte less 128 of rhs. So a sum is too large
//               by 128 times the sum of rhs's codes. vpdpbusd
//   PairWords   2 codes of one or two limbs, as int16; sums fit int32. vpmaddwd
//   WideWords   a code of any width, as int32; sums in 64 bits

#if defined(__AVX512BW__)
constexpr int64_t kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kVectorBytes = 32;
#else
constexpr int64_t kVectorBytes = 16;
#endif

constexpr int64_t kWordLanes = kVectorBytes / 4;
using WordVector = uint32_t __attribute__((vector_size(kVectorBytes)));
using IntVector = int32_t __attribute__((vector_size(kVectorBytes)));
using FloatVector = float __attribute__((vector_size(kVectorBytes)));
using LongVector = uint64_t __attribute__((vector_size(kVectorBytes)));

template <class Vector>
Vector LoadVector(const void* from) {
  Vector value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

// Scaled by two powers of two one after the other: their product might leave float32's range.
inline void StoreSums(WordVector sums, float low, float high, float* out) {
  const FloatVector values = __builtin_convertvector(reinterpret_cast<IntVector>(sums), FloatVector) * low * high;
  __builtin_memcpy(out, &values, sizeof values);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
struct ByteWords {
  static constexpr int64_t kGroup = 4, kLanes = kWordLanes;
  static constexpr bool kHasOffset = true;
  using Sum = uint32_t;
  using Vector = WordVector;

  static Vector Load(const uint32_t* words) { return LoadVector<Vector>(words); }
  static Vector MultiplyAdd(Vector sum, Vector lhs, Vector rhs) {
#if defined(__AVX512VNNI__)
    return (Vector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)lhs, (__m512i)rhs);
#else
    return (Vector)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)lhs, (__m256i)rhs);
#endif
  }
  static void Store(Vector sums, float low, float high, float* out) { StoreSums(sums, low, high, out); }
};
#endif

struct PairWords {
  static constexpr int64_t kGroup = 2, kLanes = kWordLanes;
  static constexpr bool kHasOffset = false;
  using Sum = uint32_t;
  using Vector = WordVector;

  static Vector Load(const uint32_t* words) { return LoadVector<Vector>(words); }
  static Vector MultiplyAdd(Vector sum, Vector lhs, Vector rhs) {
#if defined(__AVX512BW__)
    return sum + (Vector)_mm512_madd_epi16((__m512i)lhs, (__m512i)rhs);
#elif defined(__AVX2__)
    return sum + (Vector)_mm256_madd_epi16((__m256i)lhs, (__m256i)rhs);
#elif defined(__SSE2__)
    return sum + (Vector)_mm_madd_epi16((__m128i)lhs, (__m128i)rhs);
#else
    const auto a = reinterpret_cast<IntVector>(lhs), b = reinterpret_cast<IntVector>(rhs);
    const auto low = reinterpret_cast<IntVector>(lhs << 16) >> 16;
    return sum + reinterpret_cast<Vector>(low * (reinterpret_cast<IntVector>(rhs << 16) >> 16)) +
           reinterpret_cast<Vector>((a >> 16) * (b >> 16));
#endif
  }
  static void Store(Vector sums, float low, float high, float* out) { StoreSums(sums, low, high, out); }
};

struct WideWords {
  static constexpr int64_t kGroup = 1, kLanes = kVectorBytes / 8;
  static constexpr bool kHasOffset = false;
  using Sum = uint64_t;
  using Vector = LongVector;
  using Words = int32_t __attribute__((vector_size(kVectorBytes / 2)));

  static Vector Load(const uint32_t* words) {
    return __builtin_convertvector(LoadVector<Words>(words), Vector);
  }
  static Vector MultiplyAdd(Vector sum, Vector lhs, Vector rhs) {  // lanes that hold 32-bit numbers
#if defined(__AVX512BW__)
    return sum + (Vector)_mm512_maskz_mul_epi32(0xff, (__m512i)lhs, (__m512i)rhs);
#elif defined(__AVX2__)
    return sum + (Vector)_mm256_mul_epi32((__m256i)lhs, (__m256i)rhs);
#else
    return sum + lhs * rhs;
#endif
  }
  static void Store(Vector sums, float low, float high, float* out) {
    for (int64_t i = 0; i < kLanes; ++i) out[i] = static_cast<float>(static_cast<int64_t>(sums[i])) * low * high;
  }
};

// ---- Reading codes

// A row of pixels of an operand; pixels beside it hold the code 0.
struct CodeRow {
  const uint8_t* plane[kMaxLimbs];  // at pixel 0
  const uint8_t* zeros[kMaxLimbs];
  int64_t width, channels;  // pixels; from one pixel to the next

  struct Pixel {
    const uint8_t* limb[kMaxLimbs];
  };

  Pixel At(int64_t x, int64_t channel, int limbs) const {
    const bool is_inside = x >= 0 && x < width;
    Pixel pixel;
    for (int i = 0; i < limbs; ++i)
      pixel.limb[i] = is_inside ? plane[i] + x * channels + channel : zeros[i];
    return pixel;
  }
};

template <int kLimbs>
int32_t CodeAt(const CodeRow::Pixel& pixel, int64_t i) {
  constexpr int32_t kOffset = 1 << (8 * kLimbs - 1);
  int32_t code = pixel.limb[0][i];
  if (kLimbs > 1) code += pixel.limb[1][i] << 8;
  if (kLimbs > 2) code += pixel.limb[2][i] << 16;
  return code - kOffset;
}

// The bits of one code in its place in a word; a byte is kept as it is, or less 128 if it is signed.
template <class P, int kLimbs>
uint32_t Bits(const CodeRow::Pixel& pixel, int64_t i, bool is_signed) {
  if constexpr (P::kGroup == 4) return pixel.limb[0][i] ^ (is_signed ? 0x80u : 0u);
  if constexpr (P::kGroup == 2) return static_cast<uint16_t>(CodeAt<kLimbs>(pixel, i));
  return static_cast<uint32_t>(CodeAt<kLimbs>(pixel, i));
}

constexpr int64_t kWordBlock = 16;  // lanes whose number is known to the compiler

// `count` words of neighbouring channels from the kGroup pixels of each, or from the words `last` that hold
// all but the last of them one place on.
template <class P, int kLimbs, bool kHasLast>
void BuildWords(const CodeRow::Pixel* pixels, bool is_signed, int64_t count, const uint32_t* last,
                uint32_t* __restrict out) {
  constexpr int kBits = 32 / P::kGroup, kTop = 32 - kBits;
  const CodeRow::Pixel& top = pixels[P::kGroup - 1];
  const auto build = [&](int64_t start, int64_t lanes) {
    for (int64_t i = start; i < start + lanes; ++i) {
      uint32_t word = Bits<P, kLimbs>(top, i, is_signed) << kTop;
      if constexpr (P::kGroup > 1) {
        if constexpr (kHasLast) {
          word |= last[i] >> kBits;
        } else {
          for (int k = 0; k + 1 < P::kGroup; ++k)
            word |= Bits<P, kLimbs>(pixels[k], i, is_signed) << (k * kBits);
        }
      }
      out[i] = word;
    }
  };
  int64_t start = 0;
  for (; start + kWordBlock <= count; start += kWordBlock) build(start, kWordBlock);
  for (; start < count; ++start) build(start, 1);
}

// Which words of a row: number q holds the pixels first + q * step + k * spacing, k < kGroup.
struct WordGrid {
  int64_t first, count, step, spacing;
  const uint8_t* is_needed;  // null: all
  bool is_signed;

  bool Needs(int64_t q) const { return is_needed == nullptr || is_needed[q] != 0; }
};

// Words [q][block] of `channels` channels from `channel` on.
template <class P, int kLimbs>
void ReadRowWords(const CodeRow& row, const WordGrid& grid, int64_t channel, int64_t channels, int64_t block,
               uint32_t* out) {
  for (int64_t q = 0; q < grid.count; ++q) {
    if (!grid.Needs(q)) continue;
    CodeRow::Pixel pixels[P::kGroup];
    for (int64_t k = 0; k < P::kGroup; ++k)
      pixels[k] = row.At(grid.first + q * grid.step + k * grid.spacing, channel, kLimbs);
    const int64_t last = grid.step == 1 ? q - grid.spacing : -1;
    if (P::kGroup > 1 && last >= 0 && grid.Needs(last))
      BuildWords<P, kLimbs, true>(pixels, grid.is_signed, channels, out + last * block, out + q * block);
    else
      BuildWords<P, kLimbs, false>(pixels, grid.is_signed, channels, nullptr, out + q * block);
  }
}

template <class P>
void ReadRowWords(int limbs, const CodeRow& row, const WordGrid& grid, int64_t channel, int64_t channels,
               int64_t block, uint32_t* out) {
  if (limbs == 1) return ReadRowWords<P, 1>(row, grid, channel, channels, block, out);
  if constexpr (P::kGroup < 4) {
    if (limbs == 2) return ReadRowWords<P, 2>(row, grid, channel, channels, block, out);
    if constexpr (P::kGroup < 2) ReadRowWords<P, 3>(row, grid, channel, channels, block, out);
  }
}

// Words of the pixels `at`, one for each place in a word; -1 is the code 0. Signed.
template <class P, int kLimbs>
void PackWords(const CodeRow& row, const int64_t* at, int64_t channels, uint32_t* out) {
  CodeRow::Pixel pixels[P::kGroup];
  for (int64_t k = 0; k < P::kGroup; ++k) pixels[k] = row.At(at[k], 0, kLimbs);
  BuildWords<P, kLimbs, false>(pixels, true, channels, nullptr, out);
}

template <class P>
void PackWords(int limbs, const CodeRow& row, const int64_t* at, int64_t channels, uint32_t* out) {
  if (limbs == 1) return PackWords<P, 1>(row, at, channels, out);
  if constexpr (P::kGroup < 4) {
    if (limbs == 2) return PackWords<P, 2>(row, at, channels, out);
    if constexpr (P::kGroup < 2) PackWords<P, 3>(row, at, channels, out);
  }
}
