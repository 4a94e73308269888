// Error measurement: the range of a tensor, and how far quantization moves it.
//
// Included by unit.h inside each ISA unit's own anonymous namespace. Sums are kept in float for each
// lane over a short run, and the runs are added in double.

constexpr int64_t kMeasuredRun = 1024;
constexpr int32_t kMagnitudeBits = 0x7fffffff;

template <class Value, class Bits>
inline Value Magnitude(Value value) {
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  bits &= kMagnitudeBits;
  __builtin_memcpy(&value, &bits, sizeof bits);
  return value;
}

// Adds values of floats in some lanes up in double.
inline double SumLanes(FloatVector lanes) {
  double sum = 0;
  for (int64_t i = 0; i < kWordLanes; ++i) sum += lanes[i];
  return sum;
}

// Largest magnitude, as a float's bits, and sum|x|.
void MeasureRange(const float* x, int64_t count, int32_t* largest, double* abs_sum) {
  IntVector most = IntVector{};
  double sum = 0;
  int64_t i = 0;
  while (i + kWordLanes <= count) {
    FloatVector part = FloatVector{};
    for (const int64_t end = Min(count, i + kMeasuredRun); i + kWordLanes <= end; i += kWordLanes) {
      const IntVector bits = LoadVector<IntVector>(x + i) & kMagnitudeBits;
      most = bits > most ? bits : most;
      part += Magnitude<FloatVector, IntVector>(LoadVector<FloatVector>(x + i));
    }
    sum += SumLanes(part);
  }
  *largest = 0;
  for (int64_t lane = 0; lane < kWordLanes; ++lane) *largest = most[lane] > *largest ? most[lane] : *largest;
  for (; i < count; ++i) {
    const int32_t bits = LoadVector<int32_t>(x + i) & kMagnitudeBits;
    *largest = bits > *largest ? bits : *largest;
    sum += __builtin_fabsf(x[i]);
  }
  *abs_sum = sum;
}

inline float Rounded(float value) { return __builtin_nearbyintf(value); }
inline FloatVector Rounded(FloatVector value) {
  for (int64_t i = 0; i < kWordLanes; ++i) value[i] = __builtin_nearbyintf(value[i]);
  return value;
}

// |x| - |x^| or |x - x^| of values in some lanes.
template <bool kIsElementwise, class Value, class Bits>
inline Value QuantizationError(const float* from, float inverse, float limit, float resolution) {
  const Value x = LoadVector<Value>(from), low = Value{} - limit, high = Value{} + limit;
  Value code = Rounded(x * inverse);
  code = code < high ? code : high;
  code = code > low ? code : low;
  const Value value = code * resolution;
  if constexpr (kIsElementwise) return Magnitude<Value, Bits>(x - value);
  return Magnitude<Value, Bits>(x) - Magnitude<Value, Bits>(value);
}

template <bool kIsElementwise>
double SumErrors(const float* x, int64_t count, float inverse, float limit, float resolution) {
  double sum = 0;
  int64_t i = 0;
  while (i + kWordLanes <= count) {
    FloatVector part = FloatVector{};
    for (const int64_t end = Min(count, i + kMeasuredRun); i + kWordLanes <= end; i += kWordLanes)
      part += QuantizationError<kIsElementwise, FloatVector, IntVector>(x + i, inverse, limit, resolution);
    sum += SumLanes(part);
  }
  for (; i < count; ++i)
    sum += QuantizationError<kIsElementwise, float, int32_t>(x + i, inverse, limit, resolution);
  return sum;
}

double MeasureError(const float* x, int64_t count, int bits, int exponent, bool is_elementwise) {
  const float inverse = PowerOfTwo(-exponent), resolution = PowerOfTwo(exponent);
  const auto limit = static_cast<float>((int64_t{1} << (bits - 1)) - 1);
  return is_elementwise ? SumErrors<true>(x, count, inverse, limit, resolution)
                        : SumErrors<false>(x, count, inverse, limit, resolution);
}
