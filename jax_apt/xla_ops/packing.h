// Reading limb planes and laying them out for a micro-kernel: images of lhs, panels of rhs.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace (hence no include guard, no
// system headers and no std:: templates), so that every unit compiles it with its own instructions.
//
// Kernels on bytes multiply bytes of lhs as they are in memory (0..255) by bytes of rhs less 128
// (-128..127). Written with codes a and b, L planes each, and digits d = plane - 128:
//
//   a = sum of 256^i plane_i - offset(La)              offset(L) = 128 * 256^(L-1)
//   b = sum of 256^j d_j     + rest(Lb)                rest(L)   = 128 * (1 + 256 + ... + 256^(L-2))
//
//   sum of a b = sum of 256^(i+j) (sum of plane_i d_j) - offset(La) * (column sums of the digits of rhs)
//              + rest(Lb) * (row sums of a)
//
// Kernels on 16-bit elements multiply signed limbs and need no such terms. What only one of the two kinds of
// element calls is inline, so that the other's units are not told of unused functions.

int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }
int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }

float PowerOfTwo(int64_t exponent) {  // exact for -126..127
  const uint32_t pattern = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  __builtin_memcpy(&value, &pattern, 4);
  return value;
}

// ---- Elements ------------------------------------------------------------------------------------------

// One limb of `count` neighbours in memory.
inline void ReadLimb(const Operand& operand, Limb limb, int64_t start, int64_t count, uint8_t* out) {
  if (count > 0) __builtin_memcpy(out, operand.plane[limb.shift / 8] + start, count);
}

template <int kLimbs>
void ReadWords(const Operand& operand, Limb limb, int64_t start, int64_t count, int16_t* __restrict out) {
  const uint8_t *p0 = operand.plane[0] + start, *p1 = p0, *p2 = p0;
  if (kLimbs > 1) p1 = operand.plane[1] + start;
  if (kLimbs > 2) p2 = operand.plane[2] + start;
  for (int64_t i = 0; i < count; ++i) {
    int32_t code = p0[i] - (kLimbs == 1 ? 128 : 0);
    if (kLimbs == 2) code += (p1[i] - 128) * 256;
    if (kLimbs == 3) code += p1[i] * 256 + (p2[i] - 128) * 65536;
    out[i] = static_cast<int16_t>((code >> limb.shift) & limb.mask);
  }
}

inline void ReadLimb(const Operand& operand, Limb limb, int64_t start, int64_t count, int16_t* out) {
  switch (LimbCount(operand.bits)) {
    case 1: return ReadWords<1>(operand, limb, start, count, out);
    case 2: return ReadWords<2>(operand, limb, start, count, out);
    default: return ReadWords<3>(operand, limb, start, count, out);
  }
}

inline void Zeros(const Operand& operand, Limb limb, int64_t count, uint8_t* out) {  // limb of the code 0
  __builtin_memset(out, limb.shift / 8 == LimbCount(operand.bits) - 1 ? 128 : 0, count);
}

inline void Zeros(const Operand&, Limb, int64_t count, int16_t* out) {
  __builtin_memset(out, 0, count * sizeof(int16_t));
}

// ---- Images --------------------------------------------------------------------------------------------

// Pixels on a grid: point (n, i) holds pixel i * step + shift of image n, or zero beside it.
struct Image {
  const Operand& operand;
  const int64_t *grid, *source, *step, *shift;
  int64_t channels;

  // `count` points from number `first` on, pixel after pixel.
  template <class Element>
  void Fill(Limb limb, int64_t first, int64_t count, Element* out) const {
    int64_t at = first % grid[2], line = first / grid[2];
    while (count > 0) {
      const int64_t points = Min(count, grid[2] - at);
      FillLine(limb, line, at, points, out);
      out += points * channels, count -= points, at = 0, line += 1;
    }
  }

 private:
  template <class Element>
  void FillLine(Limb limb, int64_t line, int64_t at, int64_t points, Element* out) const {
    const int64_t y = line % grid[1] * step[1] + shift[1], z = line / grid[1] % grid[0] * step[0] + shift[0];
    const int64_t n = line / grid[1] / grid[0];
    const bool is_inside = y >= 0 && y < source[1] && z >= 0 && z < source[0];
    const int64_t last = source[2] - 1 - shift[2];  // of point * step
    const int64_t low = Max(at, shift[2] < 0 ? CeilDiv(-shift[2], step[2]) : 0);
    const int64_t high = Min(at + points, last < 0 ? 0 : last / step[2] + 1);
    if (!is_inside || high <= low) return Zeros(operand, limb, points * channels, out);
    Zeros(operand, limb, (low - at) * channels, out);
    out += (low - at) * channels;
    const int64_t start =
        (((n * source[0] + z) * source[1] + y) * source[2] + low * step[2] + shift[2]) * channels;
    if (step[2] == 1) {
      ReadLimb(operand, limb, start, (high - low) * channels, out);
    } else {
      for (int64_t i = 0; i < high - low; ++i)
        ReadLimb(operand, limb, start + i * step[2] * channels, channels, out + i * channels);
    }
    Zeros(operand, limb, (at + points - high) * channels, out + (high - low) * channels);
  }
};

#if defined(__SSE2__) || defined(__ARM_NEON)
#ifdef __SSE2__
using Bytes16 = __m128i;
Bytes16 LoadBytes(const void* in) { return _mm_loadu_si128(static_cast<const __m128i*>(in)); }
void StoreBytes(void* out, Bytes16 a) { _mm_storeu_si128(static_cast<__m128i*>(out), a); }
Bytes16 ZipLow(Bytes16 a, Bytes16 b, uint8_t) { return _mm_unpacklo_epi8(a, b); }
Bytes16 ZipHigh(Bytes16 a, Bytes16 b, uint8_t) { return _mm_unpackhi_epi8(a, b); }
inline Bytes16 ZipLow(Bytes16 a, Bytes16 b, int16_t) { return _mm_unpacklo_epi16(a, b); }
inline Bytes16 ZipHigh(Bytes16 a, Bytes16 b, int16_t) { return _mm_unpackhi_epi16(a, b); }
#else
using Bytes16 = uint8x16_t;
Bytes16 LoadBytes(const void* in) { return vld1q_u8(static_cast<const uint8_t*>(in)); }
void StoreBytes(void* out, Bytes16 a) { vst1q_u8(static_cast<uint8_t*>(out), a); }
Bytes16 ZipLow(Bytes16 a, Bytes16 b, uint8_t) { return vzip1q_u8(a, b); }
Bytes16 ZipHigh(Bytes16 a, Bytes16 b, uint8_t) { return vzip2q_u8(a, b); }
inline Bytes16 ZipLow(Bytes16 a, Bytes16 b, int16_t) {
  return vreinterpretq_u8_u16(vzip1q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
inline Bytes16 ZipHigh(Bytes16 a, Bytes16 b, int16_t) {
  return vreinterpretq_u8_u16(vzip2q_u16(vreinterpretq_u16_u8(a), vreinterpretq_u16_u8(b)));
}
#endif
constexpr int64_t kTransposeBytes = 16;

// kSide x kSide elements: rows of `in` become columns of `out`, by rounds of interleaving rows i and i +
// kSide / 2.
template <class Element, int kSide>
void TransposeSquare(const Element* in, int64_t in_step, Element* out, int64_t out_step) {
  Bytes16 a[kSide], b[kSide];
  for (int i = 0; i < kSide; ++i) a[i] = LoadBytes(in + i * in_step);
  for (int round = 1; round < kSide; round *= 2) {
    for (int i = 0; i < kSide / 2; ++i) {
      b[2 * i] = ZipLow(a[i], a[i + kSide / 2], Element{});
      b[2 * i + 1] = ZipHigh(a[i], a[i + kSide / 2], Element{});
    }
    for (int i = 0; i < kSide; ++i) a[i] = b[i];
  }
  for (int i = 0; i < kSide; ++i) StoreBytes(out + i * out_step, a[i]);
}
#else
constexpr int64_t kTransposeBytes = 1;

template <class Element, int kSide>
void TransposeSquare(const Element* in, int64_t, Element* out, int64_t) {
  *out = *in;
}
#endif

// (pixels, channels) -> (channels, pixels); `pixels` is at most kPixelChunk.
template <class Element>
void Transpose(const Element* in, int64_t pixels, int64_t channels, Element* out, int64_t out_step) {
  constexpr int kSide = Max(1, kTransposeBytes / int64_t{sizeof(Element)});
  const int64_t rest = pixels / kSide * kSide;
  int64_t done = 0;
  for (; done + kSide <= channels; done += kSide)
    for (int64_t i = 0; i < rest; i += kSide)
      TransposeSquare<Element, kSide>(in + i * channels + done, channels, out + done * out_step + i,
                                      out_step);
  for (int64_t c = 0; c < done; ++c)
    for (int64_t i = rest; i < pixels; ++i) out[c * out_step + i] = in[i * channels + c];
  for (int64_t c = done; c < channels; ++c)
    for (int64_t i = 0; i < pixels; ++i) out[c * out_step + i] = in[i * channels + c];
}

// ---- Panels --------------------------------------------------------------------------------------------
//
// A panel holds kNr columns of rhs: words [depth / kGroup][kNr], each the kGroup elements of a column that
// one instruction multiplies and adds.

// 32 bytes in two lanes, as processors have them; narrower ones take two registers.
using Bytes32 = uint8_t __attribute__((vector_size(32)));
using Halves16 = uint16_t __attribute__((vector_size(32)));

// Within each lane the first halves, or the last, of a and b in turn.
inline Bytes32 ZipFirst(Bytes32 a, Bytes32 b) {
  return __builtin_shufflevector(a, b, 0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 16, 48, 17, 49,
                                 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55);
}
inline Bytes32 ZipLast(Bytes32 a, Bytes32 b) {
  return __builtin_shufflevector(a, b, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 24, 56,
                                 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63);
}
inline Halves16 ZipFirst(Halves16 a, Halves16 b) {
  return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 8, 24, 9, 25, 10, 26, 11, 27);
}
inline Halves16 ZipLast(Halves16 a, Halves16 b) {
  return __builtin_shufflevector(a, b, 4, 20, 5, 21, 6, 22, 7, 23, 12, 28, 13, 29, 14, 30, 15, 31);
}

// Four rows of bytes, or two of 16-bit elements, become one row of words.
inline void Interleave(const uint8_t* const* row, int64_t columns, uint32_t* __restrict words) {
  int64_t c = 0;
  for (; c + 32 <= columns; c += 32) {
    Bytes32 a[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&a[i], row[i] + c, sizeof(a[i])), a[i] ^= 0x80;
    const auto first01 = reinterpret_cast<Halves16>(ZipFirst(a[0], a[1])),
               last01 = reinterpret_cast<Halves16>(ZipLast(a[0], a[1])),
               first23 = reinterpret_cast<Halves16>(ZipFirst(a[2], a[3])),
               last23 = reinterpret_cast<Halves16>(ZipLast(a[2], a[3]));
    const Halves16 zipped[4] = {ZipFirst(first01, first23), ZipLast(first01, first23),
                                ZipFirst(last01, last23), ZipLast(last01, last23)};
    for (int lane = 0; lane < 2; ++lane)
      for (int i = 0; i < 4; i += 2) {
        const Halves16 both = lane == 0 ? __builtin_shufflevector(zipped[i], zipped[i + 1], 0, 1, 2, 3, 4, 5,
                                                                  6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
                                        : __builtin_shufflevector(zipped[i], zipped[i + 1], 8, 9, 10, 11, 12,
                                                                  13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
        __builtin_memcpy(words + c + 16 * lane + 4 * i, &both, sizeof(both));
      }
  }
  for (; c < columns; ++c)
    words[c] = (row[0][c] | static_cast<uint32_t>(row[1][c]) << 8 | static_cast<uint32_t>(row[2][c]) << 16 |
                static_cast<uint32_t>(row[3][c]) << 24) ^
               0x80808080u;
}

inline void Interleave(const int16_t* const* row, int64_t columns, uint32_t* __restrict words) {
  const int16_t *r0 = row[0], *r1 = row[1];
  for (int64_t c = 0; c < columns; ++c)
    words[c] = static_cast<uint16_t>(r0[c]) | static_cast<uint32_t>(static_cast<uint16_t>(r1[c])) << 16;
}

// Elements of rhs at which the rows of a segment begin, one after the other.
class RowStarts {
 public:
  RowStarts(const Piece* piece, int64_t tap, int64_t start, int64_t step)
      : piece(piece), tap(tap), start(start), step(step), left(tap), at(start + piece->rhs) {}

  int64_t Next() {
    if (left == 0) ++piece, left = tap, at = start + piece->rhs;
    left -= 1, at += step;
    return at - step;
  }

 private:
  const Piece* piece;
  const int64_t tap, start, step;
  int64_t left, at;
};

// Two rows of codes of 8 bits become one row of words, of two 16-bit elements each.
template <class Element>
void InterleaveBytes(const uint8_t* r0, const uint8_t* r1, int64_t columns, Element* __restrict words) {
  int64_t c = 0;
#if defined(__SSE2__) || defined(__ARM_NEON)
  using Sixteen = uint8_t __attribute__((vector_size(16)));
  using Words16 = int16_t __attribute__((vector_size(32)));
  for (; c + 16 <= columns; c += 16) {
    const Bytes16 a = LoadBytes(r0 + c), b = LoadBytes(r1 + c);
    const Bytes16 halves[2] = {ZipLow(a, b, uint8_t{}), ZipHigh(a, b, uint8_t{})};
    for (int i = 0; i < 2; ++i) {
      Sixteen bytes;
      __builtin_memcpy(&bytes, &halves[i], sizeof(bytes));
      const Words16 half = __builtin_convertvector(bytes, Words16) - 128;
      __builtin_memcpy(words + 2 * c + 16 * i, &half, sizeof(half));
    }
  }
#endif
  for (; c < columns; ++c) {
    words[2 * c] = static_cast<Element>(r0[c] - 128);
    words[2 * c + 1] = static_cast<Element>(r1[c] - 128);
  }
}

constexpr uint32_t DigitMask(uint8_t) { return 0x80808080u; }
constexpr uint32_t DigitMask(int16_t) { return 0; }

// The words of 4 columns, `step` elements apart, become rows of 4, `out_step` words apart.
template <class Element>
void InterleaveColumns(const Element* columns, int64_t step, int64_t words, uint32_t* out, int64_t out_step) {
  using Four = uint32_t __attribute__((vector_size(16)));
  constexpr int64_t kGroup = 4 / sizeof(Element);
  const Four mask = Four{} + DigitMask(Element{});
  int64_t w = 0;
  for (; w + 4 <= words; w += 4, out += 4 * out_step) {
    Four a[4];
    for (int i = 0; i < 4; ++i) __builtin_memcpy(&a[i], columns + i * step + w * kGroup, sizeof(Four));
    const Four low0 = __builtin_shufflevector(a[0], a[1], 0, 4, 1, 5),
               high0 = __builtin_shufflevector(a[0], a[1], 2, 6, 3, 7),
               low1 = __builtin_shufflevector(a[2], a[3], 0, 4, 1, 5),
               high1 = __builtin_shufflevector(a[2], a[3], 2, 6, 3, 7);
    const Four rows[4] = {__builtin_shufflevector(low0, low1, 0, 1, 4, 5) ^ mask,
                          __builtin_shufflevector(low0, low1, 2, 3, 6, 7) ^ mask,
                          __builtin_shufflevector(high0, high1, 0, 1, 4, 5) ^ mask,
                          __builtin_shufflevector(high0, high1, 2, 3, 6, 7) ^ mask};
    for (int i = 0; i < 4; ++i) __builtin_memcpy(out + i * out_step, &rows[i], sizeof(Four));
  }
  for (; w < words; ++w, out += out_step)
    for (int64_t i = 0; i < kWordColumns; ++i) {
      __builtin_memcpy(out + i, columns + i * step + w * kGroup, 4);
      out[i] ^= DigitMask(Element{});
    }
}

inline int64_t SumBytes(const uint8_t* bytes, int64_t count) {
  uint32_t sum = 0;  // of at most 2^24 bytes
  for (int64_t i = 0; i < count; ++i) sum += bytes[i];
  return sum;
}

// Element whose digit is zero.
constexpr uint8_t ZeroDigit(uint8_t) { return 128; }
constexpr int16_t ZeroDigit(int16_t) { return 0; }

// A row of words, kNr of them; `width` columns are there.
template <class K, class Element>
void InterleavePadded(const Element* const* row, int64_t width, uint32_t* words) {
  const auto interleave = [=](int64_t columns) {
    if constexpr (sizeof(Element) < sizeof(typename K::Lhs)) {
      InterleaveBytes(row[0], row[1], columns, reinterpret_cast<typename K::Lhs*>(words));
    } else {
      Interleave(row, columns, words);
    }
  };
  if (width == K::kNr) return interleave(K::kNr);
  interleave(width);
  for (int64_t c = width; c < K::kNr; ++c) words[c] = 0;
}
