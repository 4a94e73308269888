// Depthwise convolution: each channel has a filter of its own, so there is no matrix product to speak of.
//
// Included by product_loops.h inside each ISA unit's own anonymous namespace. Codes are unpacked row by row;
// all loops run along the channels, which are neighbours in memory.
//
//   Element, Sum   int16_t and int32_t where largest lhs code * largest rhs code * terms < 2^31;
//                  int32_t and int64_t otherwise

template <class Element>
void ReadCodes(const Operand& operand, int64_t start, int64_t count, Element* __restrict out) {
  const int limbs = LimbCount(operand.bits);
  const auto offset = static_cast<int32_t>(uint32_t{1} << (8 * limbs - 1));
  const uint8_t* p0 = operand.plane[0] + start;
  if (limbs == 1) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Element>(p0[i] - offset);
    return;
  }
  const uint8_t* p1 = operand.plane[1] + start;
  if (limbs == 2) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Element>(p0[i] + (p1[i] << 8) - offset);
    return;
  }
  const uint8_t* p2 = operand.plane[2] + start;
  for (int64_t i = 0; i < count; ++i)
    out[i] = static_cast<Element>(p0[i] + (p1[i] << 8) + (p2[i] << 16) - offset);
}

template <class Element, class Sum>
class Depthwise {
 public:
  Depthwise(const Plan& plan, const Product& product, uint8_t* scratch)
      : p(plan), product(product), g(product.geometry), scratch(scratch) {}

  void Run(Parallel& parallel) {
    columns = reinterpret_cast<int32_t*>(scratch + parallel.workers() * p.worker_bytes);
    const int64_t width = product.kind == Kind::kFilterGradient ? g.out[2] : p.result[2];
    for (int64_t x = 0; x < width; ++x)
      for (int64_t tap = 0; tap < g.window[2]; ++tap)
        columns[x * g.window[2] + tap] = static_cast<int32_t>(Meets(2, x, tap));
    if (product.kind != Kind::kFilterGradient) {
      const int64_t* size = p.result;
      parallel.Run(
          g.batch * size[0] * size[1],
          [](void* self, int64_t row, int worker) { Self(self)->GatherRow(row, worker); }, this);
      return;
    }
    for (int w = 0; w < parallel.workers(); ++w)
      for (int64_t i = 0; i < Taps() * g.in_channels; ++i) Totals(w)[i] = 0;
    parallel.Run(
        g.batch * g.out[0] * g.out[1],
        [](void* self, int64_t row, int worker) { Self(self)->AddRow(row, worker); }, this);
    for (int64_t i = 0; i < Taps() * g.in_channels; ++i) {
      int64_t total = 0;
      for (int w = 0; w < parallel.workers(); ++w) total += Totals(w)[i];
      product.out[i] = static_cast<float>(total) * Low() * High();
    }
  }

 private:
  static constexpr int64_t kLanes = 64;  // channels at once

  const Plan& p;
  const Product& product;
  const Geometry& g;
  uint8_t* const scratch;
  int32_t* columns = nullptr;  // (pixels of a row, window): the column of lhs that is met, or -1

  static Depthwise* Self(void* self) { return static_cast<Depthwise*>(self); }

  int64_t Taps() const { return g.window[0] * g.window[1] * g.window[2]; }
  float Low() const { return PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent)); }
  float High() const { return PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent)); }

  // Of a worker: 64-bit sums (taps, channels), then unpacked filters or a row, then unpacked rows.
  int64_t* Totals(int worker) const { return reinterpret_cast<int64_t*>(scratch + worker * p.worker_bytes); }
  Element* Unpacked(int worker) const {
    return reinterpret_cast<Element*>(Totals(worker) + Taps() * g.in_channels);
  }

  // Position of lhs that pixel `at` of the result meets at a tap, or -1.
  int64_t Meets(int d, int64_t at, int64_t tap) const {
    int64_t place;
    if (product.kind == Kind::kInputGradient) {
      place = at + g.pad[d] - tap * g.dilation[d];
      if (place % g.stride[d] != 0) return -1;
      place /= g.stride[d];
    } else {
      place = at * g.stride[d] + tap * g.dilation[d] - g.pad[d];
    }
    return place >= 0 && place < p.source[d] ? place : -1;
  }

  // A row of y or dx: every pixel gathers the taps that it meets.
  void GatherRow(int64_t row, int worker) const {
    const int64_t y = row % p.result[1], z = row / p.result[1] % p.result[0],
                  n = row / p.result[1] / p.result[0];
    const int64_t channels = g.in_channels, width = p.source[2];
    Element* filters = Unpacked(worker);
    ReadCodes(product.rhs, 0, Taps() * channels, filters);
    Element* rows = filters + Taps() * channels;
    uint8_t is_met[kMaxRows];
    for (int64_t r = 0; r < g.window[0] * g.window[1]; ++r) {
      const int64_t from_z = Meets(0, z, r / g.window[1]), from_y = Meets(1, y, r % g.window[1]);
      is_met[r] = from_z >= 0 && from_y >= 0;
      if (is_met[r])
        ReadCodes(product.lhs, ((n * p.source[0] + from_z) * p.source[1] + from_y) * width * channels,
                  width * channels, rows + r * width * channels);
    }
    float* out = product.out + row * p.result[2] * channels;
    for (int64_t x = 0; x < p.result[2]; ++x, out += channels) {
      const Element *pixel[kMaxTaps], *filter[kMaxTaps];
      int terms = 0;
      for (int64_t r = 0, t = 0; r < g.window[0] * g.window[1]; ++r)
        for (int64_t tap = 0; tap < g.window[2]; ++tap, ++t) {
          const int64_t from_x = columns[x * g.window[2] + tap];
          if (!is_met[r] || from_x < 0) continue;
          pixel[terms] = rows + (r * width + from_x) * channels;
          filter[terms++] = filters + t * channels;
        }
      int64_t c = 0;
      for (; c + kLanes <= channels; c += kLanes) Gather(pixel, filter, terms, c, kLanes, out);
      Gather(pixel, filter, terms, c, channels - c, out);
    }
  }

  void Gather(const Element* const* pixel, const Element* const* filter, int terms, int64_t c, int64_t lanes,
              float* out) const {
    Sum sums[kLanes] = {};
    for (int t = 0; t < terms; ++t) MultiplyAdd(pixel[t] + c, filter[t] + c, lanes, sums);
    Store(sums, lanes, out + c);
  }

  void Store(const Sum* __restrict sums, int64_t lanes, float* __restrict out) const {
    const float low = Low(), high = High();
    for (int64_t i = 0; i < lanes; ++i) out[i] = static_cast<float>(sums[i]) * low * high;
  }

  static void MultiplyAdd(const Element* a, const Element* b, int64_t lanes, Sum* sums) {
    if (lanes == kLanes) return MultiplyAddAll(a, b, sums);
    for (int64_t i = 0; i < lanes; ++i) sums[i] += Sum{a[i]} * Sum{b[i]};
  }

  // Not inlined: gcc 12 would jam the loop over taps into this one and then not vectorize it (nearly 3 times
  // slower).
  __attribute__((noinline)) static void MultiplyAddAll(const Element* __restrict a,
                                                       const Element* __restrict b, Sum* __restrict sums) {
    for (int64_t i = 0; i < kLanes; ++i) sums[i] += Sum{a[i]} * Sum{b[i]};
  }

  // Adds what a row of dy and the rows of x that it meets give to every tap.
  void AddRow(int64_t row, int worker) const {
    const int64_t y = row % g.out[1], z = row / g.out[1] % g.out[0], n = row / g.out[1] / g.out[0];
    const int64_t channels = g.in_channels, width = g.in[2];
    Element *dy = Unpacked(worker), *x = dy + g.out[2] * channels;
    ReadCodes(product.rhs, row * g.out[2] * channels, g.out[2] * channels, dy);
    for (int64_t r = 0; r < g.window[0] * g.window[1]; ++r) {
      const int64_t from_z = Meets(0, z, r / g.window[1]), from_y = Meets(1, y, r % g.window[1]);
      if (from_z < 0 || from_y < 0) continue;
      ReadCodes(product.lhs, ((n * g.in[0] + from_z) * g.in[1] + from_y) * width * channels, width * channels,
                x);
      for (int64_t tap = 0; tap < g.window[2]; ++tap)
        for (int64_t c = 0; c < channels; c += kLanes)
          AddTap(x + c, dy + c, tap, Min(kLanes, channels - c),
                 Totals(worker) + (r * g.window[2] + tap) * channels + c);
    }
  }

  void AddTap(const Element* x, const Element* dy, int64_t tap, int64_t lanes, int64_t* totals) const {
    const int64_t channels = g.in_channels;
    for (int64_t start = 0; start < g.out[2]; start += p.safe_terms) {
      Sum sums[kLanes] = {};
      for (int64_t at = start; at < Min(g.out[2], start + p.safe_terms); ++at) {
        const int64_t from = columns[at * g.window[2] + tap];
        if (from >= 0) MultiplyAdd(x + from * channels, dy + at * channels, lanes, sums);
      }
      for (int64_t i = 0; i < lanes; ++i) totals[i] += sums[i];
    }
  }
};

void RunDepthwise(const Plan& plan, const Product& product, uint8_t* scratch, Parallel& parallel) {
  if (plan.is_narrow) return Depthwise<int16_t, int32_t>(plan, product, scratch).Run(parallel);
  Depthwise<int32_t, int64_t>(plan, product, scratch).Run(parallel);
}
