// Max pooling's gradient: dx[p] = sum of dy over the windows whose maximum p is.
//
// Included by unit.h inside each ISA unit's own anonymous namespace. All loops run along the inner
// dimension. The result is XLA's bit for bit: of equal values the first of a window takes the gradient,
// padding counts as -infinity, a NaN gives way to the next value, and windows add up in row-major order.

class PoolGradient {
 public:
  // Of one image, `inner` neighbours from `start` on.
  PoolGradient(const Pool& pool, const float* x, const float* dy, float* dx, int64_t start, int64_t inner)
      : p(pool), x(x + start), dy(dy + start), dx(dx + start), inner(inner) {}

  void Run() const {
    for (int64_t i = 0; i < p.in[0] * p.in[1] * p.in[2]; ++i)
      for (int64_t c = 0; c < inner; ++c) dx[i * p.inner + c] = 0;
    int32_t pixels[kMaxPoolTaps];
    int64_t number = 0;
    for (int64_t z = 0; z < p.out[0]; ++z)
      for (int64_t y = 0; y < p.out[1]; ++y)
        for (int64_t w = 0; w < p.out[2]; ++w, ++number) {
          const int taps = FindPixels(z, y, w, pixels);
          const float* gradient = dy + number * p.inner;
          int64_t c = 0;
          for (; c + kWordLanes <= inner; c += kWordLanes)
            AddWindow<FloatVector, IntVector>(pixels, taps, x + c, gradient + c, dx + c);
          for (; c < inner; ++c) AddWindow<float, int32_t>(pixels, taps, x + c, gradient + c, dx + c);
        }
  }

 private:
  const Pool& p;
  const float *x, *dy;
  float* dx;
  const int64_t inner;

  // Pixels of a window, -1 where it is padding.
  int FindPixels(int64_t z, int64_t y, int64_t w, int32_t* pixels) const {
    int taps = 0;
    for (int64_t i = 0; i < p.window[0]; ++i)
      for (int64_t j = 0; j < p.window[1]; ++j)
        for (int64_t k = 0; k < p.window[2]; ++k) {
          const int64_t a = z * p.stride[0] + i - p.pad[0], b = y * p.stride[1] + j - p.pad[1],
                        c = w * p.stride[2] + k - p.pad[2];
          const bool is_inside = a >= 0 && a < p.in[0] && b >= 0 && b < p.in[1] && c >= 0 && c < p.in[2];
          pixels[taps++] = is_inside ? static_cast<int32_t>((a * p.in[1] + b) * p.in[2] + c) : -1;
        }
    return taps;
  }

  // One value, or neighbours in a vector.
  template <class Value, class Place>
  void AddWindow(const int32_t* pixels, int taps, const float* x, const float* gradient, float* dx) const {
    Value largest = Value{} + __builtin_nanf("");  // gives way to the first
    Place place = Place{} - 1;
    for (int t = 0; t < taps; ++t) {
      const Value value =
          pixels[t] < 0 ? Value{} - __builtin_inff() : LoadVector<Value>(x + pixels[t] * p.inner);
      const auto is_kept = largest >= value;
      largest = is_kept ? largest : value;
      place = is_kept ? place : Place{} + pixels[t];
    }
    const Value add = LoadVector<Value>(gradient);
    for (int t = 0; t < taps; ++t) {
      if (pixels[t] < 0) continue;
      float* to = dx + pixels[t] * p.inner;
      const Value sum = LoadVector<Value>(to);
      StoreVector(to, place == Place{} + pixels[t] ? sum + add : sum);
    }
  }
};

void MaxPoolGradient(const Pool& pool, const float* x, const float* dy, float* dx, int64_t start,
                     int64_t inner) {
  PoolGradient(pool, x, dy, dx, start, inner).Run();
}
