// Eight int32 lanes, for vnni_kernel.h; each unit adds its MultiplyAdd. Included by the ISA units inside
// their anonymous namespaces.

struct Lanes256 {
  using Type = __m256i;
  static constexpr int kLanes = 8;
  static Type Zero() { return _mm256_setzero_si256(); }
  static Type Load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void Store(void* to, Type value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
  static Type Broadcast(const uint8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm256_set1_epi32(word);
  }
};
