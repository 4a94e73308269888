// Vectors as wide as the unit's registers.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace.

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
