// Words of neighbours along a row, and the instruction that multiplies and adds them lane by lane.
//
// Included by depthwise_loops.h inside each ISA unit's own anonymous namespace. A word is 32 bits: what one
// lane of an instruction multiplies at once.
//
//   ByteWords   4 codes of one limb: byte (0..255) of lhs times byte less 128 of rhs. So a sum is too large
//               by 128 times the sum of rhs's codes. vpdpbusd; sdot, where lhs is made signed first: then
//               it is its code, and the sum is right
//   PairWords   2 codes of one or two limbs, as int16; sums fit int32. vpmaddwd
//   WideWords   a code of any width, as int32; sums in 64 bits

// kWordLanes bytes as words, and half as many words, with their sign, as 64 bits: gcc 12 takes
// __builtin_convertvector apart lane by lane.
inline WordVector WidenBytes(const uint8_t* from) {
#if defined(__AVX512BW__)
  return (WordVector)_mm512_maskz_cvtepu8_epi32(0xffff,
                                                _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (WordVector)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
#ifdef __SSE2__
  int32_t word;
  __builtin_memcpy(&word, from, 4);
  const __m128i bytes = _mm_cvtsi32_si128(word), zero = _mm_setzero_si128();
  return (WordVector)_mm_unpacklo_epi16(_mm_unpacklo_epi8(bytes, zero), zero);
#else
  return WordVector{from[0], from[1], from[2], from[3]};
#endif
#endif
}

inline LongVector WidenWords(const uint32_t* from) {
#if defined(__AVX512BW__)
  return (LongVector)_mm512_maskz_cvtepi32_epi64(0xff,
                                                 _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__)
  return (LongVector)_mm256_cvtepi32_epi64(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return LongVector{static_cast<uint64_t>(static_cast<int32_t>(from[0])),
                    static_cast<uint64_t>(static_cast<int32_t>(from[1]))};
#endif
}

// Scaled by two powers of two one after the other: their product might leave float32's range.
inline void StoreSums(WordVector sums, float low, float high, float* out) {
  const FloatVector values =
      __builtin_convertvector(reinterpret_cast<IntVector>(sums), FloatVector) * low * high;
  __builtin_memcpy(out, &values, sizeof values);
}

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
struct ByteWords {
  static constexpr int64_t kGroup = 4, kLanes = kWordLanes;
#ifdef __ARM_FEATURE_DOTPROD
  static constexpr bool kHasOffset = false;
#else
  static constexpr bool kHasOffset = true;
#endif
  using Sum = uint32_t;
  using Vector = WordVector;

  static Vector Load(const uint32_t* words) { return LoadVector<Vector>(words); }
  static Vector MultiplyAdd(Vector sum, Vector lhs, Vector rhs) {
#if defined(__AVX512VNNI__)
    return (Vector)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)lhs, (__m512i)rhs);
#elif defined(__ARM_FEATURE_DOTPROD)
    return (Vector)vdotq_s32((int32x4_t)sum, (int8x16_t)(lhs ^ 0x80808080u), (int8x16_t)rhs);
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

  static Vector Load(const uint32_t* words) { return WidenWords(words); }
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
    for (int64_t i = 0; i < kLanes; ++i)
      out[i] = static_cast<float>(static_cast<int64_t>(sums[i])) * low * high;
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
    for (int i = 0; i < limbs; ++i) pixel.limb[i] = is_inside ? plane[i] + x * channels + channel : zeros[i];
    return pixel;
  }
};

// Bytes of kWordLanes channels, or of fewer where no more are there.
inline WordVector ReadBytes(const uint8_t* from, int64_t lanes) {
  uint8_t few[kWordLanes] = {};
  if (lanes < kWordLanes) {
    for (int64_t i = 0; i < lanes; ++i) few[i] = from[i];
    from = few;
  }
  return WidenBytes(from);
}

// A code in the low bits of each word: the byte as it is, or two's complement.
template <class P, int kLimbs>
WordVector ReadCodes(const CodeRow::Pixel& pixel, int64_t at, int64_t lanes) {
  WordVector code = ReadBytes(pixel.limb[0] + at, lanes);
  if constexpr (P::kGroup == 4) return code;
  if constexpr (kLimbs > 1) code |= ReadBytes(pixel.limb[1] + at, lanes) << 8;
  if constexpr (kLimbs > 2) code |= ReadBytes(pixel.limb[2] + at, lanes) << 16;
  code -= uint32_t{1} << (8 * kLimbs - 1);
  if constexpr (P::kGroup == 2) code &= 0xffff;
  return code;
}

// Which words of a row: number q holds the pixels first + q * step + k * spacing, k < kGroup.
struct WordGrid {
  int64_t first, count, step, spacing;
  const uint8_t* is_needed;  // null: all
  bool is_signed;            // bytes less 128

  uint32_t Flip(int64_t group) const { return group == 4 && is_signed ? 0x80808080u : 0; }
};

// Channels of a row that are read, and where to: words [channels / kChannelUnit][count][kChannelUnit], of
// which the loops over pixels read one stretch of memory.
struct WordBlock {
  int64_t channel, channels;
  uint32_t* words;

  uint32_t* At(int64_t channel, int64_t count) const {
    return words + channel / kChannelUnit * count * kChannelUnit + channel % kChannelUnit;
  }
};

template <class P, int kLimbs>
void PackWord(const CodeRow::Pixel* pixels, uint32_t flip, int64_t c, int64_t lanes, uint32_t* out) {
  const auto pack = [&](int64_t lanes) {
    WordVector word = WordVector{} + flip;
#pragma GCC unroll 4
    for (int k = 0; k < P::kGroup; ++k)
      word ^= ReadCodes<P, kLimbs>(pixels[k], c, lanes) << (k * (32 / P::kGroup));
    __builtin_memcpy(out, &word, sizeof word);
  };
  if (lanes >= kWordLanes) return pack(kWordLanes);
  pack(lanes);
}

template <class P, int kLimbs>
void PackApart(const CodeRow& row, const WordGrid& grid, const WordBlock& block) {
  for (int64_t q = 0; q < grid.count; ++q) {
    if (grid.is_needed != nullptr && !grid.is_needed[q]) continue;
    CodeRow::Pixel pixels[P::kGroup];
    for (int64_t k = 0; k < P::kGroup; ++k)
      pixels[k] = row.At(grid.first + q * grid.step + k * grid.spacing, block.channel, kLimbs);
    for (int64_t c = 0; c < block.channels; c += kWordLanes)
      PackWord<P, kLimbs>(pixels, grid.Flip(P::kGroup), c, block.channels - c,
                          block.At(c, grid.count) + q * kChannelUnit);
  }
}

// Words of neighbours at every pixel, of kChannelUnit channels or of fewer: each one is the last, shifted,
// and one more code.
template <class P, int kLimbs, bool kIsFull>
void Slide(const CodeRow& row, const WordGrid& grid, int64_t channel, int64_t lanes, uint32_t* out) {
  constexpr int kBits = 32 / P::kGroup % 32, kTop = (32 - kBits) % 32, kParts = kChannelUnit / kWordLanes;
  WordVector word[kParts] = {};
  const auto take = [&](const CodeRow::Pixel& pixel) {
#pragma GCC unroll 4
    for (int v = 0; v < kParts; ++v) {
      const int64_t c = v * kWordLanes;
      const auto code = ReadCodes<P, kLimbs>(pixel, c, kIsFull ? kWordLanes : Max(lanes - c, 0)) << kTop;
      word[v] = kBits == 0 ? code : (word[v] >> kBits) | code;
    }
  };
  const auto slide = [&](CodeRow::Pixel pixel, int64_t count, int64_t step) {
    for (int64_t i = 0; i < count; ++i, out += kChannelUnit) {
      take(pixel);
      __builtin_memcpy(out, word, sizeof word);
      for (int limb = 0; limb < kLimbs; ++limb) pixel.limb[limb] += step;
    }
  };
  for (int64_t k = 0; k + 1 < P::kGroup; ++k) take(row.At(grid.first + k, channel, kLimbs));
  const int64_t first = grid.first + P::kGroup - 1, end = first + grid.count;
  const int64_t low = Min(end, Max(first, 0)), high = Max(low, Min(end, row.width));
  slide(row.At(-1, channel, kLimbs), low - first, 0);
  slide(row.At(low < high ? low : -1, channel, kLimbs), high - low, low < high ? row.channels : 0);
  slide(row.At(-1, channel, kLimbs), end - high, 0);
}

template <class P, int kLimbs>
void PackSliding(const CodeRow& row, const WordGrid& grid, const WordBlock& block) {
  for (int64_t c = 0; c < block.channels; c += kChannelUnit) {
    const int64_t lanes = block.channels - c;
    if (lanes >= kChannelUnit)
      Slide<P, kLimbs, true>(row, grid, block.channel + c, lanes, block.At(c, grid.count));
    else
      Slide<P, kLimbs, false>(row, grid, block.channel + c, lanes, block.At(c, grid.count));
  }
}

template <class P, int kLimbs>
void PackRow(const CodeRow& row, const WordGrid& grid, const WordBlock& block) {
  if (grid.step == 1 && grid.spacing == 1 && !grid.is_signed) return PackSliding<P, kLimbs>(row, grid, block);
  PackApart<P, kLimbs>(row, grid, block);
}

template <class P>
void PackRow(int limbs, const CodeRow& row, const WordGrid& grid, const WordBlock& block) {
  if (limbs == 1) return PackRow<P, 1>(row, grid, block);
  if constexpr (P::kGroup < 4) {
    if (limbs == 2) return PackRow<P, 2>(row, grid, block);
    if constexpr (P::kGroup < 2) PackRow<P, 3>(row, grid, block);
  }
}

// Signed words of the pixels `at`, one for each place in a word; -1 is the code 0.
template <class P, int kLimbs>
void PackPixels(const CodeRow& row, const int64_t* at, int64_t channels, uint32_t* out) {
  CodeRow::Pixel pixels[P::kGroup];
  for (int64_t k = 0; k < P::kGroup; ++k) pixels[k] = row.At(at[k], 0, kLimbs);
  for (int64_t c = 0; c < channels; c += kWordLanes)
    PackWord<P, kLimbs>(pixels, P::kGroup == 4 ? 0x80808080u : 0, c, channels - c, out + c);
}

template <class P>
void PackPixels(int limbs, const CodeRow& row, const int64_t* at, int64_t channels, uint32_t* out) {
  if (limbs == 1) return PackPixels<P, 1>(row, at, channels, out);
  if constexpr (P::kGroup < 4) {
    if (limbs == 2) return PackPixels<P, 2>(row, at, channels, out);
    if constexpr (P::kGroup < 2) PackPixels<P, 3>(row, at, channels, out);
  }
}
