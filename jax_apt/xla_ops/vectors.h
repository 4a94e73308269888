// Vectors as wide as the unit's registers.
//
// Included by results.h inside each ISA unit's own anonymous namespace.

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
using DoubleVector = double __attribute__((vector_size(kVectorBytes)));
using HalfFloatVector = float __attribute__((vector_size(kVectorBytes / 2)));

template <class Value>  // a vector or one lane of it
Value LoadVector(const void* from) {
  Value value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class Value>
void StoreVector(void* to, Value value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// Past the caches, which need not read a line that is written whole. To be followed by a FinishStreams before
// another thread reads it.
inline void StreamVector(float* to, FloatVector value) {
#if defined(__AVX512BW__)
  _mm512_stream_ps(to, reinterpret_cast<__m512>(value));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, reinterpret_cast<__m256>(value));
#elif defined(__SSE2__)
  _mm_stream_ps(to, reinterpret_cast<__m128>(value));
#else
  StoreVector(to, value);
#endif
}

inline bool IsAligned(const float* out) { return reinterpret_cast<uintptr_t>(out) % 64 == 0; }

inline void FinishStreams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

// Integers below 2^51, as floats: added to the bits of 1.5 * 2^52, each is the last part of its mantissa.
inline HalfFloatVector RoundSmallLongs(LongVector values) {
  constexpr uint64_t kBits = 0x4338000000000000;
  constexpr double kValue = 6755399441055744;
  const auto exact = reinterpret_cast<DoubleVector>(values + kBits) - kValue;
  return __builtin_convertvector(exact, HalfFloatVector);
}
