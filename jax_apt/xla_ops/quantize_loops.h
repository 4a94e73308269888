// Quantization: float32 -> limb planes.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace (hence no include guard, no
// system headers and no std:: templates).

template <int kLimbs>
inline void StorePlanes(uint32_t code, uint8_t* planes, int64_t stride) {
  planes[0] = static_cast<uint8_t>(code);
  if (kLimbs > 1) planes[stride] = static_cast<uint8_t>(code >> 8);
  if (kLimbs > 2) planes[2 * stride] = static_cast<uint8_t>(code >> 16);
}

// Clips in float, since conversion turns large values into INT_MIN; rounds half to even, as the processor
// does unless told otherwise.
template <int kLimbs>
int64_t QuantizeAny(const float* __restrict x, int64_t count, float inverse, float limit,
                    uint8_t* __restrict planes, int64_t stride) {
  constexpr int32_t kOffset = 1 << (8 * kLimbs - 1);
  int32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float value = x[i];
    float scaled = value * inverse;
    scaled = scaled < limit ? scaled : limit;
    scaled = scaled > -limit ? scaled : -limit;
    const bool is_bad = !(__builtin_fabsf(value) <= 3.4028234663852886e38f);
    const int32_t code = static_cast<int32_t>(__builtin_rintf(scaled)) + kOffset;
    StorePlanes<kLimbs>(static_cast<uint32_t>(is_bad ? 0 : code), planes + i, stride);
    bad += is_bad;
  }
  return bad;
}

// Up to 16 bits. Adding 1.5 * 2^23 rounds half to even and leaves the integer in the low bits. Returns
// whether all values were finite; if not, what it wrote for those that were not is wrong.
template <int kLimbs>
bool QuantizeFinite(const float* __restrict x, int64_t count, float inverse, float limit,
                    uint8_t* __restrict planes, int64_t stride) {
  constexpr float kMagic = 12582912.0f + (1 << (8 * kLimbs - 1));
  const float low = kMagic - limit, high = kMagic + limit;
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    int32_t magnitude;
    __builtin_memcpy(&magnitude, x + i, 4);
    magnitude &= 0x7fffffff;
    largest = magnitude > largest ? magnitude : largest;
    float sum = x[i] * inverse + kMagic;
    sum = sum < high ? sum : high;
    sum = sum > low ? sum : low;
    uint32_t code;
    __builtin_memcpy(&code, &sum, 4);
    StorePlanes<kLimbs>(code, planes + i, stride);
  }
  return largest < 0x7f800000;
}

constexpr uint32_t kGolden = 0x9e3779b9;

// A hash: Wellons' lowbias32.
inline uint32_t Mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352d;
  x = (x ^ (x >> 15)) * 0x846ca68b;
  return x ^ (x >> 16);
}

// Rounds up with the probability of the fraction: `fixed_point.round_stochastically`, bit for bit.
template <int kLimbs>
int64_t QuantizeAtRandomInto(const float* __restrict x, int64_t count, uint32_t key, float inverse,
                             int32_t limit, uint8_t* __restrict planes, int64_t stride) {
  constexpr int32_t kOffset = 1 << (8 * kLimbs - 1);
  const float beyond = static_cast<float>(limit + 1);  // also what NaN becomes here
  int32_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t pattern;
    __builtin_memcpy(&pattern, x + i, 4);
    float scaled = x[i] * inverse;
    scaled = scaled < beyond ? scaled : beyond;
    scaled = scaled > -beyond ? scaled : -beyond;
    int32_t code = static_cast<int32_t>(scaled);
    code -= static_cast<int32_t>(static_cast<float>(code) > scaled);
    const uint32_t drawn = Mixed(pattern ^ (static_cast<uint32_t>(i) * kGolden + key)) >> 8;
    const float uniform = static_cast<float>(static_cast<int32_t>(drawn)) * 0x1p-24f;
    code += static_cast<int32_t>(uniform < scaled - static_cast<float>(code));
    code = code < limit ? code : limit;
    code = code > -limit ? code : -limit;
    const int32_t is_bad = (pattern & 0x7fffffff) >= 0x7f800000;
    StorePlanes<kLimbs>(static_cast<uint32_t>((code + kOffset) & (is_bad - 1)), planes + i, stride);
    bad += is_bad;
  }
  return bad;
}

int64_t QuantizeAtRandom(const float* x, int64_t count, int64_t first, Draw draw, int bits, int exponent,
                         uint8_t* planes, int64_t stride) {
  const float inverse = PowerOfTwo(-exponent);
  const int32_t limit = (1 << (bits - 1)) - 1;
  const uint32_t key =
      Mixed(draw.seed + static_cast<uint32_t>(draw.step) * kGolden) + static_cast<uint32_t>(first) * kGolden;
  switch (LimbCount(bits)) {
    case 1: return QuantizeAtRandomInto<1>(x, count, key, inverse, limit, planes, stride);
    case 2: return QuantizeAtRandomInto<2>(x, count, key, inverse, limit, planes, stride);
    default: return QuantizeAtRandomInto<3>(x, count, key, inverse, limit, planes, stride);
  }
}

template <int kLimbs>
int64_t QuantizeInto(const float* x, int64_t count, int bits, int exponent, uint8_t* planes, int64_t stride) {
  const float inverse = PowerOfTwo(-exponent), limit = static_cast<float>((int64_t{1} << (bits - 1)) - 1);
  constexpr int64_t kRun = 4096;
  int64_t bad = 0;
  for (int64_t i = 0; i < count; i += kRun) {
    const int64_t some = Min(kRun, count - i);
    if constexpr (kLimbs < 3)
      if (QuantizeFinite<kLimbs>(x + i, some, inverse, limit, planes + i, stride)) continue;
    bad += QuantizeAny<kLimbs>(x + i, some, inverse, limit, planes + i, stride);
  }
  return bad;
}

int64_t Quantize(const float* x, int64_t count, int bits, int exponent, uint8_t* planes, int64_t stride) {
  switch (LimbCount(bits)) {
    case 1: return QuantizeInto<1>(x, count, bits, exponent, planes, stride);
    case 2: return QuantizeInto<2>(x, count, bits, exponent, planes, stride);
    default: return QuantizeInto<3>(x, count, bits, exponent, planes, stride);
  }
}
