// Exact integer Winograd F(4x4, 3x3): a 3x3 convolution of stride 1 with 36 instead of 144 multiplications
// per 4 x 4 pixels (Lavin and Gray, arXiv 1509.09308). Included by product_loops.h inside each ISA unit's own
// anonymous namespace; for units that multiply 16-bit elements and whose int32 sums wrap.
//
//   Y = A^T [ (G w G^T) . (B^T d B) ] A / 576      for a tile d of 6 x 6 pixels, sums over channels inside [
//   ]
//
// with the rows of G scaled by 24, but its last by 8, for which the last entry of A is 3. All of B, G and A
// are integers: transformed codes of 8 bits are at most 10 * 10 * 127 = 12700 and 12 * 12 * 127 = 18288, so
// 16-bit elements hold them. 576 Y is taken modulo 2^32: times the inverse of 9 that is 64 Y, which fits
// int32 for the channels of a block, and is shifted. The result is that of the direct product, bit for bit.
//
// The input gradient is the same convolution of dy, with w reversed and its channels swapped.

template <class K>
class Winograd {
 public:
  Winograd(const Plan& plan, const Product& product, uint8_t* scratch)
      : p(plan), w(plan.winograd), product(product), scratch(scratch) {}

  void Run(Parallel& parallel) {
    parallel.Run(
        p.panels * w.blocks + (w.is_shared ? w.groups : 0),
        [](void* self, int64_t task, int) { Self(self)->Prepare(task); }, this);
    const int64_t tasks = w.groups * (w.is_shared ? p.panels : 1);
    parallel.Run(
        tasks, [](void* self, int64_t task, int worker) { Self(self)->Multiply(task, worker); }, this);
  }

 private:
  static constexpr int64_t kLanes = 16, kPlanes = 36;
  using Codes = int16_t __attribute__((vector_size(2 * kLanes)));
  using Bytes = uint8_t __attribute__((vector_size(kLanes)));
  using Sums = uint32_t __attribute__((vector_size(4 * kLanes / 2)));
  static_assert(K::kNr == kLanes && sizeof(typename K::Lhs) == 2, "panels of 16 columns");

  const Plan& p;
  const WinogradPlan& w;
  const Product& product;
  uint8_t* const scratch;

  static Winograd* Self(void* self) { return static_cast<Winograd*>(self); }
  bool IsForward() const { return product.kind == Kind::kForward; }

  // (panels, blocks, planes, depth of a block, 16 columns), in words of two depths
  int16_t* Weights(int64_t panel, int64_t block, int64_t plane) const {
    auto* start = reinterpret_cast<int16_t*>(scratch);
    return start + ((panel * w.blocks + block) * kPlanes + plane) * w.block_depth * kLanes;
  }
  // (planes, tiles, depth); the planes lie a line further apart, so that they do not share an L1 set
  int16_t* Input(int64_t group, int worker) const {
    auto* start = reinterpret_cast<int16_t*>(scratch + w.input_offset);
    return start + (w.is_shared ? group : worker) * kPlanes * InputPlane();
  }
  int64_t InputPlane() const { return w.tiles_per_group * Depth() + 32; }
  int64_t Depth() const { return w.blocks * w.block_depth; }
  // Of a worker: (planes, tiles, 16 columns), then sums over blocks (tiles, 16 pixels, 16 columns)
  int32_t* Products(int worker) const {
    return reinterpret_cast<int32_t*>(scratch + w.worker_offset + worker * w.worker_bytes);
  }
  int64_t ProductPlane() const { return (w.tiles_per_group + K::kMr) * kLanes; }

  void Prepare(int64_t task) {
    if (task < p.panels * w.blocks) return TransformWeights(task / w.blocks, task % w.blocks);
    TransformInput(task - p.panels * w.blocks, 0);
  }

  // ---- Weights

  void TransformWeights(int64_t panel, int64_t block) {
    const int64_t first = block * w.block_depth;
    for (int64_t k = 0; k < w.block_depth; k += kLanes) {
      int16_t taps[9][kLanes][kLanes];  // [depth][column]
      for (int t = 0; t < 9; ++t) ReadTap(IsForward() ? t : 8 - t, first + k, panel * kLanes, taps[t]);
      for (int64_t i = 0; i < kLanes; i += 2) {
        Codes even[kPlanes], odd[kPlanes];
        TransformFilter(taps, i, even), TransformFilter(taps, i + 1, odd);
        for (int plane = 0; plane < kPlanes; ++plane)
          Interleave(even[plane], odd[plane], Weights(panel, block, plane) + (k + i) * kLanes);
      }
    }
  }

  static void Interleave(Codes even, Codes odd, int16_t* words) {
    for (int64_t c = 0; c < kLanes; ++c) words[2 * c] = even[c], words[2 * c + 1] = odd[c];
  }

  // 16 depths of 16 columns of a tap; zeros beside the filter.
  void ReadTap(int tap, int64_t depth, int64_t column, int16_t (*out)[kLanes]) const {
    const Geometry& g = product.geometry;
    const int64_t rows = IsForward() ? g.in_channels : g.out_channels;
    const int64_t depths = Max(0, Min(kLanes, rows - depth)), columns = Min(kLanes, p.columns - column);
    const uint8_t* from = product.rhs.plane[0] + tap * g.in_channels * g.out_channels;
    for (int64_t i = 0; i < kLanes; ++i)
      for (int64_t c = 0; c < kLanes; ++c) {
        const int64_t at = IsForward() ? (depth + i) * g.out_channels + column + c
                                       : (column + c) * g.out_channels + depth + i;
        out[i][c] = i < depths && c < columns ? static_cast<int16_t>(from[at] - 128) : int16_t{0};
      }
  }

  static void TransformFilter(const int16_t (*taps)[kLanes][kLanes], int64_t depth, Codes* out) {
    Codes half[6][3];
    for (int j = 0; j < 3; ++j) {
      Codes column[3], result[6];
      for (int i = 0; i < 3; ++i) __builtin_memcpy(&column[i], taps[3 * i + j][depth], sizeof(Codes));
      FilterRows(column, result);
      for (int i = 0; i < 6; ++i) half[i][j] = result[i];
    }
    for (int i = 0; i < 6; ++i) FilterRows(half[i], out + 6 * i);
  }

  static void FilterRows(const Codes* a, Codes* out) {  // G
    const Codes outer = a[0] + 4 * a[2];
    out[0] = 6 * a[0], out[1] = -4 * (a[0] + a[1] + a[2]), out[2] = -4 * (a[0] - a[1] + a[2]);
    out[3] = outer + 2 * a[1], out[4] = outer - 2 * a[1], out[5] = 8 * a[2];
  }

  // ---- Input

  void TransformInput(int64_t group, int worker) const {
    int16_t* out = Input(group, worker);
    const int64_t first = group * w.tiles_per_group;
    const int64_t tiles = Min(w.tiles_per_group, w.tiles - first);
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t x = (first + t) % w.columns, y = (first + t) / w.columns % w.rows;
      const int64_t n = (first + t) / w.columns / w.rows;
      TransformTile(n, 4 * y - w.pad[0], 4 * x - w.pad[1], out + t * Depth());
    }
  }

  void TransformTile(int64_t n, int64_t y, int64_t x, int16_t* out) const {
    const int64_t channels = p.source_channels;
    const uint8_t* pixel[kPlanes];  // null beside the image
    for (int64_t i = 0; i < 6; ++i)
      for (int64_t j = 0; j < 6; ++j) {
        const bool is_inside = y + i >= 0 && y + i < p.source[1] && x + j >= 0 && x + j < p.source[2];
        const int64_t at = ((n * p.source[1] + y + i) * p.source[2] + x + j) * channels;
        pixel[6 * i + j] = is_inside ? product.lhs.plane[0] + at : nullptr;
      }
    for (int64_t c = 0; c < Depth(); c += kLanes) {
      const int64_t count = Max(0, Min(kLanes, channels - c));
      Codes half[6][6];
      for (int j = 0; j < 6; ++j) {
        Codes column[6], result[6];
        for (int i = 0; i < 6; ++i) column[i] = ReadCodes(pixel[6 * i + j], c, count);
        InputRows(column, result);
        for (int i = 0; i < 6; ++i) half[i][j] = result[i];
      }
      for (int i = 0; i < 6; ++i) {
        Codes result[6];
        InputRows(half[i], result);
        for (int j = 0; j < 6; ++j)
          __builtin_memcpy(out + (6 * i + j) * InputPlane() + c, &result[j], sizeof(Codes));
      }
    }
  }

  static Codes ReadCodes(const uint8_t* pixel, int64_t c, int64_t count) {
    if (pixel == nullptr) return Codes{};
    Bytes bytes = Bytes{} + 128;
    if (count == kLanes) {
      __builtin_memcpy(&bytes, pixel + c, kLanes);
    } else {
      for (int64_t i = 0; i < count; ++i) bytes[i] = pixel[c + i];
    }
    return __builtin_convertvector(bytes, Codes) - 128;
  }

  static void InputRows(const Codes* a, Codes* out) {  // B^T
    const Codes p = a[4] - 4 * a[2], q = a[3] - 4 * a[1], r = a[4] - a[2], s = 2 * (a[3] - a[1]);
    out[0] = 4 * a[0] - 5 * a[2] + a[4], out[1] = p + q, out[2] = p - q;
    out[3] = r + s, out[4] = r - s, out[5] = 4 * a[1] - 5 * a[3] + a[5];
  }

  // ---- Products

  void Multiply(int64_t task, int worker) const {
    const int64_t group = w.is_shared ? task / p.panels : task;
    if (!w.is_shared) TransformInput(group, worker);
    if (w.is_shared) return MultiplyPanel(group, task % p.panels, worker);
    for (int64_t panel = 0; panel < p.panels; ++panel) MultiplyPanel(group, panel, worker);
  }

  void MultiplyPanel(int64_t group, int64_t panel, int worker) const {
    const int64_t first = group * w.tiles_per_group;
    const int64_t tiles = Min(w.tiles_per_group, w.tiles - first);
    const int16_t* input = Input(group, worker);
    int32_t* products = Products(worker);
    int32_t* totals = products + kPlanes * ProductPlane();
    const Segment segment{0, w.block_depth, 0, 0};
    for (int64_t block = 0; block < w.blocks; ++block) {
      for (int64_t plane = 0; plane < kPlanes; ++plane)
        for (int64_t t = 0; t < tiles; t += K::kMr)
          K::Run(input + plane * InputPlane() + t * Depth() + block * w.block_depth, Depth(), &segment, 1,
                 Weights(panel, block, plane), static_cast<int>(Min(K::kMr, tiles - t)), true,
                 products + plane * ProductPlane() + t * kLanes);
      for (int64_t t = 0; t < tiles; ++t) {
        int32_t* total = totals + t * 16 * kLanes;
        TransformProducts(products + t * kLanes, block == 0, total);
        if (block + 1 == w.blocks) Store(first + t, panel, total);
      }
    }
  }

  // Adds a tile's 16 pixels to their totals.
  void TransformProducts(const int32_t* products, bool is_first, int32_t* totals) const {
    constexpr int64_t kHalf = kLanes / 2;
    for (int64_t c = 0; c < kLanes; c += kHalf) {
      Sums half[4][6];
      for (int j = 0; j < 6; ++j) {
        Sums column[6], result[4];
        for (int i = 0; i < 6; ++i)
          __builtin_memcpy(&column[i], products + (6 * i + j) * ProductPlane() + c, sizeof(Sums));
        OutputRows(column, result);
        for (int i = 0; i < 4; ++i) half[i][j] = result[i];
      }
      for (int i = 0; i < 4; ++i) {
        Sums result[4];
        OutputRows(half[i], result);
        for (int j = 0; j < 4; ++j) AddPixel(result[j], is_first, totals + (4 * i + j) * kLanes + c);
      }
    }
  }

  static void OutputRows(const Sums* m, Sums* out) {  // A^T
    const Sums p = m[1] + m[2], q = m[1] - m[2], r = m[3] + m[4], s = m[3] - m[4];
    out[0] = m[0] + p + r, out[1] = q + 2 * s, out[2] = p + 4 * r, out[3] = q + 8 * s + 3 * m[5];
  }

  static void AddPixel(Sums sum, bool is_first, int32_t* total) {
    using Signed = int32_t __attribute__((vector_size(sizeof(Sums))));
    constexpr uint32_t kInverseOf9 = 0x38E38E39;
    Signed value = reinterpret_cast<Signed>(sum * kInverseOf9) >> 6, before;
    if (!is_first) {
      __builtin_memcpy(&before, total, sizeof(before));
      value += before;
    }
    __builtin_memcpy(total, &value, sizeof(value));
  }

  void Store(int64_t tile, int64_t panel, const int32_t* totals) const {
    const float low = PowerOfTwo(Min(product.lhs.exponent, product.rhs.exponent));
    const float high = PowerOfTwo(Max(product.lhs.exponent, product.rhs.exponent));
    const int64_t x = tile % w.columns * 4, y = tile / w.columns % w.rows * 4, n = tile / w.columns / w.rows;
    const int64_t width = Min(kLanes, p.columns - panel * kLanes);
    for (int64_t i = 0; i < Min(4, p.result[1] - y); ++i)
      for (int64_t j = 0; j < Min(4, p.result[2] - x); ++j) {
        float* out =
            product.out + ((n * p.result[1] + y + i) * p.result[2] + x + j) * p.columns + panel * kLanes;
        const int32_t* from = totals + (4 * i + j) * kLanes;
        if (width == kLanes) {
          for (int64_t c = 0; c < kLanes; ++c) out[c] = static_cast<float>(from[c]) * low * high;
        } else {
          for (int64_t c = 0; c < width; ++c) out[c] = static_cast<float>(from[c]) * low * high;
        }
      }
  }
};
