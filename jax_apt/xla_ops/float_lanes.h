// Vectors of neighbouring floats, as wide as the unit's registers.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace.

#if defined(__AVX512F__)
constexpr int64_t kFloatLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kFloatLanes = 8;
#else
constexpr int64_t kFloatLanes = 4;
#endif
using FloatLanes = float __attribute__((vector_size(4 * kFloatLanes)));
using IntLanes = int32_t __attribute__((vector_size(4 * kFloatLanes)));

template <class Value>  // lanes of floats or of their bits, or one
Value LoadFloats(const float* from) {
  Value value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <class Value>
void StoreFloats(float* to, Value value) {
  __builtin_memcpy(to, &value, sizeof value);
}
