// 512-bit vectors for vnni_kernel.h; included by the AVX-512 units inside their anonymous namespaces.

struct Vector512 {
  using Type = __m512i;
  static constexpr int kLanes = 16;
  static Type Zero() { return _mm512_setzero_si512(); }
  static Type Load(const void* from) { return _mm512_loadu_si512(from); }
  static void Store(void* to, Type value) { _mm512_storeu_si512(to, value); }
  static Type Broadcast(const uint8_t* from) {
    int32_t word;
    __builtin_memcpy(&word, from, 4);
    return _mm512_set1_epi32(word);
  }
  static Type MultiplyAdd(Type sum, Type a, Type b) { return _mm512_dpbusd_epi32(sum, a, b); }
};
